"""Whether boxes cover an array exactly once.

Layer: geometry (integers only).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shardckpt.geometry.box import Box, Shape, whole

if TYPE_CHECKING:
    from collections.abc import Sequence


def coverage_problem(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Say how `boxes` fail to cover an array of `shape` exactly once, or return None.

    Boxes are swept in order of their first dim, so the cost grows with overlaps in that dim, not
    with all pairs.
    """
    outer = whole(shape)
    for box in boxes:
        if len(box.shape) != len(shape) or not outer.contains(box):
            return f"{box} lies outside the array of shape {list(shape)}"
    if shape:
        active: list[Box] = []
        for box in sorted((b for b in boxes if b.num_elements), key=lambda b: b.offsets):
            active = [b for b in active if b.offsets[0] + b.shape[0] > box.offsets[0]]
            for other in active:
                if other.intersect(box) is not None:
                    return f"{box} and {other} overlap"
            active.append(box)
    elif len(boxes) > 1:
        return f"{len(boxes)} boxes hold the same scalar"
    covered = sum(box.num_elements for box in boxes)
    if covered != math.prod(shape):
        return f"the boxes hold {covered} of {math.prod(shape)} elements"
    return None
