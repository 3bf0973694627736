"""Cut a contiguous range of a C-order array into boxes.

Layer: geometry (integers only). Flat shards (FSDP1) and byte shares of a box are such ranges. The
idea of writing them as a few boxes, without communication, is ByteCheckpoint's (NSDI 2025).
"""

from __future__ import annotations

from shardckpt.geometry.box import Box, Shape
from shardckpt.geometry.runs import element_strides


def ranges_to_boxes(start: int, stop: int, shape: Shape) -> list[Box]:
    """Return disjoint boxes, in order, that hold exactly elements `[start, stop)` of an array.

    Each box is itself a contiguous range, so box `i` starts where box `i - 1` ended. At most
    `2 * len(shape) - 1` boxes.

    >>> [(b.offsets, b.shape) for b in ranges_to_boxes(1, 7, (3, 3))]
    [((0, 1), (1, 2)), ((1, 0), (1, 3)), ((2, 0), (1, 1))]
    """
    boxes: list[Box] = []
    if not shape:
        return [Box((), ())] if start < stop else []
    strides = element_strides(shape)
    while start < stop:
        # The largest block that starts here: as many whole sub-arrays of one dim as fit.
        dim = len(shape) - 1
        while dim > 0 and start % strides[dim - 1] == 0 and stop - start >= strides[dim - 1]:
            dim -= 1
        index = start // strides[dim]
        position = index % shape[dim] if dim > 0 else index
        count = min((stop - start) // strides[dim], shape[dim] - position)
        offsets = tuple(start // s % n for s, n in zip(strides, shape, strict=True))
        lengths = tuple(1 if d < dim else count if d == dim else n for d, n in enumerate(shape))
        boxes.append(Box(offsets, lengths))
        start += count * strides[dim]
    return boxes
