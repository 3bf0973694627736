"""A box is a rectangular region of a global array, in elements.

Layer: geometry (integers only).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The region `[offsets, offsets + shape)` of an array, in elements."""

    offsets: Shape
    shape: Shape

    @property
    def stop(self) -> Shape:
        """One past the last index in each dim."""
        return tuple(o + n for o, n in zip(self.offsets, self.shape, strict=True))

    @property
    def num_elements(self) -> int:
        """Elements in the box (1 for a 0-dim box)."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """Return the common region, or None where it is empty."""
        offsets: list[int] = []
        shape: list[int] = []
        for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True):
            start = a if a > b else b
            stop = min(a + n, b + m)
            if stop <= start:
                return None
            offsets.append(start)
            shape.append(stop - start)
        return Box(tuple(offsets), tuple(shape))

    def relative_to(self, outer: Box) -> Box:
        """Return this box in the coordinates of `outer`.

        Raises:
            ValueError: This box does not lie inside `outer`.
        """
        if not outer.contains(self):
            raise ValueError(f"{self} does not lie inside {outer}")
        return Box(
            tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.shape
        )

    def contains(self, other: Box) -> bool:
        """Return whether `other` lies inside this box."""
        return all(
            a <= b and b + m <= a + n
            for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        )


def whole(shape: Shape) -> Box:
    """Return the box that is the whole array of `shape`."""
    return Box((0,) * len(shape), shape)
