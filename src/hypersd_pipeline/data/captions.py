"""The distinct captions of a data set, which stay where the rows have them: 48 bytes of memory for each caption, and not its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import overload

import numpy as np

from hypersd_pipeline.data.rows import Row


class DistinctCaptions(Sequence[str]):
    """Each caption once, in the order in which the rows of all splits have them.

    Two captions are the same where 128 bits of their hashes are.
    """

    def __init__(self, splits: Mapping[str, Sequence[Row]]) -> None:
        self._splits = splits
        hashes, counts = bytearray(), []
        for rows in splits.values():
            lengths = np.empty(len(rows), np.int64)
            for number, row in enumerate(rows):
                lengths[number] = len(row.captions)
                for caption in row.captions:
                    hashes += blake2b(caption.encode(), digest_size=16).digest()
            counts.append(lengths)
        self._offsets = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()  # of the rows of all splits, one after the other
        self._rows = dict(zip(splits, np.cumsum([0, *map(len, counts)]).tolist(), strict=False))  # where each split's rows begin
        _, firsts, inverse = np.unique(np.frombuffer(hashes, [("a", "u8"), ("b", "u8")]), return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        self._firsts, self._numbers = firsts[order], ranks[inverse].astype(np.int64)

    def __len__(self) -> int:
        return len(self._firsts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        occurrence = int(self._firsts[at])
        row = int(np.searchsorted(self._offsets, occurrence, side="right")) - 1
        name = [name for name, start in self._rows.items() if start <= row][-1]
        return self._splits[name][row - self._rows[name]].captions[occurrence - int(self._offsets[row])]

    def of_split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the captions of all its rows, int64, and where those of each row begin and the last one's end, int64."""
        start = self._rows[name]
        offsets = self._offsets[start : start + len(self._splits[name]) + 1]
        return self._numbers[offsets[0] : offsets[-1]], offsets - offsets[0]
