"""Files of lines that stay on the disk: a sequence of millions of items that costs eight bytes of memory each."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, Generic, TypeVar, overload

T = TypeVar("T")


class Lines(Sequence[T], Generic[T]):
    """The lines of an open file. Each one is read and parsed when it is asked for.

    Args:
        file: opened for reading. It stays open, so its content stays even where another file takes its name.
        parse: makes an item of a line. It gets the line's bytes, with the line's end.
        starts: where each line begins, and the end of the last one. None: the file is read once to find out.
        keep: whether a line is an item. It gets the line's bytes. Used only where ``starts`` is None.
    """

    def __init__(
        self, file: BinaryIO, parse: Callable[[bytes], T], starts: array[int] | None = None, keep: Callable[[bytes], bool] | None = None
    ) -> None:
        self._file, self._parse = file, parse
        if starts is None:
            starts, stops, at = array("q"), array("q"), 0
            file.seek(0)
            for line in file:
                if keep is None or keep(line):
                    starts.append(at)
                    stops.append(at + len(line))
                at += len(line)
            self._starts, self._stops = starts, stops
        else:
            self._starts, self._stops = starts[:-1], starts[1:]

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, number: int) -> bytes:
        """The bytes of one line. Several threads may read at once."""
        start, stop = self._starts[number], self._stops[number]
        return os.pread(self._file.fileno(), stop - start, start)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        if isinstance(at, slice):
            return tuple(self._parse(self.line(number)) for number in range(*at.indices(len(self))))
        return self._parse(self.line(at))

    def __iter__(self) -> Iterator[T]:
        return (self._parse(self.line(number)) for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Lines({', '.join(map(repr, islice(self, 3)))}{', ...' if len(self) > 3 else ''})"


class Picked(Sequence[T], Generic[T]):
    """Some items of a sequence, by number, each perhaps changed on the way."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int], change: Callable[[T], T] = lambda item: item) -> None:
        self._items, self._numbers, self._change = items, numbers, change

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        return self._change(self._items[int(self._numbers[at])])

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(len(self)))
