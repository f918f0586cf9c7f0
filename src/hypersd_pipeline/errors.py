"""The one exception for bad input, and sentences for what an operating system refuses."""

from __future__ import annotations

import errno
import re
from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input or configuration.

    The message is one sentence that names the file, key or row and the cure. The command line prints it without a traceback.
    """


_FULL = "no space is left for it; free some or raise the quota, and run again: what was finished before is kept"
_DENIED = "permission denied; give this user the right to it, or choose another folder"
_STORAGE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: "its file system is read-only; choose another folder, or mount it for writing",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EMFILE: "too many files are open; raise the limit (`ulimit -n 4096`) and run again",
    errno.ENOTDIR: "a part of this path is a file; move that file, or choose another folder",
    errno.EISDIR: "it is a folder, and a file is expected here; move it, or choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the device cannot be read or written; check the disk",
    errno.ESTALE: "the network file system has lost it; mount it again and run again",
}
"""What the user can do about an error number of the operating system."""


def storage_fault(error: BaseException, path: Path | str | None = None) -> str | None:
    """One sentence for an exception that comes from a full disk, a missing permission or the like. None for any other.

    Args:
        error: with its causes. torch and safetensors hide the operating system's error in their own.
        path: what was being written, maybe under a temporary name beside it. The error may name that one, or none.
    """
    seen: BaseException | None = error
    while seen is not None:
        # Rust's libraries give the number in words only.
        told = re.search(r"\(os error (\d+)\)", str(seen))
        number = seen.errno if isinstance(seen, OSError) else int(told[1]) if told else None
        if number in _STORAGE:
            named = getattr(seen, "filename", None)
            beside = path is not None and (named is None or Path(named).parent == Path(path).parent or Path(path) in Path(named).parents)
            return f"{path if beside else named or 'a file'}: {_STORAGE[number]}."
        seen = seen.__cause__ or seen.__context__
    return None
