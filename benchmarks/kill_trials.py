"""Whether a run that is killed at random moments ends with the same models as one that is not.

    python benchmarks/kill_trials.py FOLDER --env smoke --trials 5 --kills 4

Each trial copies the checkout below FOLDER without its data, starts the main job, and kills it with SIGKILL at random moments, the first
one during its start. Then the job runs to its end, and the hashes of its models are compared with those of a run without kills.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from compare_checkouts import data_folder, models_of

ROOT = Path(__file__).parents[1]


def start(checkout: Path, env: str) -> subprocess.Popen[bytes]:
    """The main job, in a process group of its own."""
    command = [sys.executable, "-m", "kedro", "run", "--env", env, "--pipelines", "full_distill"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout / "src")}, start_new_session=True, **quiet)


def trial(checkout: Path, env: str, moments: list[float]) -> tuple[list[float], int, dict[str, str]]:
    """Run with a kill after each of the moments (seconds after a start). Returns the kills, the last exit code and the models."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    kills: list[float] = []
    for moment in moments:
        process = start(checkout, env)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append(moment)
    code = start(checkout, env).wait()
    return kills, code, models_of(data_folder(checkout, env))


def main() -> int:
    """Print a line a trial; 1 where a run failed or a model differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--env", default="smoke")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=45.0, help="the latest moment of a kill after a start")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, bad = random.Random(given.seed), 0
    expected: dict[str, str] = {}
    for number in range(given.trials + 1):
        moments = [round(rng.uniform(1, given.seconds if i else given.seconds / 3), 1) for i in range(given.kills)] if number else []
        checkout = given.folder / f"trial_{number}"
        kills, code, found = trial(checkout, given.env, moments)
        expected = expected or found
        same = sum(found.get(name) == value for name, value in expected.items())
        bad += code != 0 or found != expected
        print(
            f"{'without kills' if not number else f'killed after {kills} s'}: exit code {code}, {same} of {len(expected)} models the same",
            flush=True,
        )
        shutil.rmtree(checkout)
    return int(bad > 0 or not expected)


if __name__ == "__main__":
    sys.exit(main())
