"""Which keys of the parameters anything reads, and the nearest one to a key that nothing does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

LIKE = "like"
"""The key of a section that is a copy of another one."""

_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")
"""An interpolation of another key. One with a colon is a resolver's."""


def unread(parameters: Mapping[Any, Any], read: Iterable[tuple[str, ...]]) -> tuple[list[str], list[str]] | None:
    """The first key that nothing reads: its path, and the names that could stand there. None where every key is read.

    Args:
        read: paths of sections and values. What is inside one of them is checked by its own type.
    """
    return _unread(parameters, set(read), ())


def _unread(values: Mapping[Any, Any], read: set[tuple[str, ...]], above: tuple[str, ...]) -> tuple[list[str], list[str]] | None:
    for key, value in values.items():
        path = (*above, str(key))
        if path in read or str(key).startswith("_"):
            continue
        below = [known for known in read if known[: len(path)] == path]
        if not below:
            return list(path), sorted({known[len(above)] for known in read if known[: len(above)] == above})
        if isinstance(value, Mapping) and (found := _unread(value, read, path)):
            return found
    return None


def named_elsewhere(written: Any) -> Iterator[tuple[str, ...]]:
    """The sections that others are ``like``, and the keys that are interpolated: they are read where they are named."""
    if isinstance(written, Mapping):
        for key, value in written.items():
            if key == LIKE and isinstance(value, str):
                yield tuple(value.split("."))
            yield from named_elsewhere(value)
    elif isinstance(written, list | tuple):
        for value in written:
            yield from named_elsewhere(value)
    elif isinstance(written, str):
        for name in _REFERENCE.findall(written):
            yield tuple(name.strip().strip(".").split("."))


def nearest(
    name: str, known: Iterable[str], choose: str = "remove it, or use one of", correct: str = "correct its spelling or remove it"
) -> str:
    """The second half of a sentence about a key that is unknown: the name that was probably meant, or all names where they are few."""
    names = list(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    listed = ", ".join(names)
    return f"{choose} {listed}" if 0 < len(listed) <= 450 else correct
