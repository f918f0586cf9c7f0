"""Runs a command, and writes its exit code and its peak memory. Started as a file of its own, with the standard library alone.

    python -IS measure.py LOG COMMAND ...

Linux counts what the parent had taken to the peak of a child that it starts. So a large process starts this small one, and this one starts
the command.
"""

import json
import os
import signal
import subprocess
import sys


def main() -> None:
    """Print ``{"code": ..., "peak": bytes}``, of the command and of those that it waited for, whichever had the highest peak."""
    with open(sys.argv[1], "wb") as log:
        child = subprocess.Popen(sys.argv[2:], stdout=log, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal gives it to the command too
    _, status, usage = os.wait4(child.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss * unit}))


if __name__ == "__main__":
    main()
