"""Random draws of a whole batch, of which one pass of one process takes its rows.

A batch may be computed in several passes (gradient accumulation) and by several processes. What is drawn for it must not depend on that.
So everything that a stage draws is drawn for the whole batch, by all processes alike, and each takes its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Draws(torch.Generator):
    """A generator for `rand`, `randn` and `randint`, which then give the rows of one pass of one process.

    With one pass and one process it is an ordinary generator. PyTorch's own functions take it too and know nothing of rows.
    """

    _pass, _passes, _rank, _ranks, _next = 0, 1, 0, 1, 0
    _held: list[tuple[Any, Tensor]]
    _began: Tensor

    def take(self, part: int, passes: int, rank: int = 0, ranks: int = 1) -> None:
        """From now on give the rows of pass ``part`` of ``passes``, and of those every ``ranks``-th from ``rank`` on.

        With more than one pass, the draws of the first are held until the next first pass.
        """
        self._pass, self._passes, self._rank, self._ranks = part, passes, rank, ranks
        self._next = 0
        if part == 0:
            self._held = []

    def following(self) -> Draws:
        """A generator that gives what this one will give in the next pass, as long as this one draws nothing else before."""
        other = Draws()
        other._began = self.get_state()
        other.set_state(other._began)
        other._held = list(getattr(self, "_held", ()))
        other.take((self._pass + 1) % self._passes, self._passes, self._rank, self._ranks)
        return other

    def catch_up(self, other: Draws) -> bool:
        """Stand where ``other`` (`following`) stands by now, as if this one had drawn what it has drawn.

        Returns:
            False, and nothing is changed, where this one would have drawn something else.
        """
        here = (self._pass, self._passes, self._rank, self._ranks, self._next)
        if here != (other._pass, other._passes, other._rank, other._ranks, 0):
            return False
        after = other.get_state()
        if torch.equal(after, other._began):  # all came from the first pass
            if any(mine[1] is not its[1] for mine, its in zip(self._held, other._held[: other._next], strict=False)):
                return False
        elif torch.equal(self.get_state(), other._began):
            self.set_state(after)
            self._held = other._held
        else:
            return False
        self._next = other._next
        return True

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is drawn inside belongs to no update: each pass draws anew, and each process takes its rows of it."""
        before, self._pass, self._passes = (self._pass, self._passes), 0, 1
        try:
            yield
        finally:
            self._pass, self._passes = before

    def rows(self, what: tuple[Any, ...], shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Draw for the whole batch and give this part's rows, ``shape``. A draw without dimensions is shared by all parts.

        Args:
            what: the kind of draw. Where a pass draws another kind than the first pass did, it is a new draw.
        """
        if self._passes == self._ranks == 1:
            return draw(shape)
        mine = shape[0] * self._ranks if shape else 0
        whole = self._whole((*what, shape), (mine * self._passes, *shape[1:]) if shape else (), draw)
        return whole[self._pass * mine :][:mine][self._rank :: self._ranks].contiguous() if shape else whole

    def _whole(self, what: tuple[Any, ...], shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        if self._passes == 1:
            return draw(shape)
        number, self._next = self._next, self._next + 1
        if number < len(self._held) and self._held[number][0] == what:
            return self._held[number][1]
        drawn = draw(shape)
        if number == len(self._held):
            self._held.append((what, drawn))
        return drawn


def apart(generator: torch.Generator) -> AbstractContextManager[None]:
    """See `Draws.apart`. Nothing for an ordinary generator."""
    return generator.apart() if isinstance(generator, Draws) else nullcontext()


def _rows(what: tuple[Any, ...], shape: Sequence[int], generator: torch.Generator, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    return generator.rows(what, tuple(shape), draw) if isinstance(generator, Draws) else draw(tuple(shape))


def randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal, float32 ``shape`` on the CPU. The first dimension is the batch."""
    return _rows(("randn",), shape, generator, lambda whole: torch.randn(whole, generator=generator))


def rand(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1), ``shape`` on the CPU. The first dimension is the batch."""
    return _rows(("rand", dtype), shape, generator, lambda whole: torch.rand(whole, generator=generator, dtype=dtype))


def randint(low: int, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Integers in ``[low, high)``, int64 ``shape`` on the CPU. The first dimension is the batch. ``()`` is one number for all rows."""
    return _rows(("randint", low, high), shape, generator, lambda whole: torch.randint(low, high, whole, generator=generator))
