"""A loss that brings a gradient, already taken at a network's output, into the network's graph."""

from __future__ import annotations

from torch import Tensor


def carry(output: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar with the value ``value`` whose gradient at ``output`` is ``gradient``.

    Terms are judged and weighed at a detached copy of the output; their own graphs are freed before the network's is walked, once.
    """
    carried = (output * gradient).sum()
    return carried + (value - carried).detach()
