"""Aspect-ratio buckets: the sizes that images are brought to, of nearly the same area (SDXL, arXiv 2307.01952, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from hypersd_pipeline.config import Count, Strict

Size = tuple[int, int]


class Buckets(Strict):
    """Which sizes there are.

    Attributes:
        step: sides are multiples of it, in pixels.
        aspect: of the longer side to the shorter one, at most.
    """

    step: Count = 64
    aspect: float = Field(default=2.0, ge=1.0, le=4.0)

    def sizes(self, resolution: int) -> list[Size]:
        """``(height, width)`` in pixels, from the tallest to the widest. None has a larger area than the square of ``resolution``.

        For each height it is the largest width, and the other way round.
        """
        square = resolution // self.step
        wide: dict[int, int] = {}
        for width in range(square, square * square + 1):
            height = square * square // width
            if height and width <= self.aspect * height:
                wide[height] = width
        found = {(height * self.step, width * self.step) for height, width in wide.items()}
        return sorted(found | {(width, height) for height, width in found}, key=lambda size: size[1] / size[0])


def nearest(sizes: Sequence[Size], width: int, height: int) -> int:
    """The number of the size whose ratio of sides is the nearest to the image's."""
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - aspect))
