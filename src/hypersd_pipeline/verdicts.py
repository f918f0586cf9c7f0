"""What was checked and found good: remembered for each state of the files, so that the next start need not read them again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import fingerprint, write_text

_VERSION = 1
"""Raise it when a check learns to see more."""


def remembered(what: str, files: Iterable[Path], options: Any, check: Callable[[], Any]) -> Any:
    """What ``check`` returned for these files, which JSON can hold. It is called where a file, the options or the check have changed.

    A file is known by its place, size and time. What is refused is never remembered.

    Args:
        what: the name of the check. files: all that it reads. options: what else its result depends on.

    Raises:
        UserError: whatever ``check`` raises.
    """
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    kept = cache_folder() / f"{fingerprint(_VERSION, what, states, options)}.json"
    try:
        return json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    result = check()
    try:
        write_text(kept, json.dumps(result))
    except (OSError, UserError):  # a home that cannot be written to: the files are read again at each start
        pass
    return result


def cache_folder() -> Path:
    """Where verdicts are kept: the user's cache, ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypersd_pipeline" / "checked"
