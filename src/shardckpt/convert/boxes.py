"""Cut an array into boxes that memory can hold, along the chunks it is stored in. Pure.

Layer: convert.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from shardckpt.geometry.box import Box, whole
from shardckpt.geometry.layout import BoxLayout, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardckpt.geometry.box import Shape


def boxes_along_chunks(
    shape: Shape, chunk: Shape, itemsize_bytes: int, max_bytes: int
) -> list[Box]:
    """Return boxes that cover an array, each made of whole chunks, in C order.

    A box has at most `max_bytes`, unless a single chunk has more: a chunk is never cut, because
    whoever reads a part of it decodes all of it.

    Args:
        shape: Elements of the array.
        chunk: Elements of a stored chunk.
        itemsize_bytes: Bytes of an element.
        max_bytes: Most bytes of a box.

    >>> [box.shape for box in boxes_along_chunks((10, 4), (2, 4), 4, 64)]
    [(4, 4), (4, 4), (2, 4)]
    """
    if 0 in shape:
        return []
    step = [min(c, n) for c, n in zip(chunk, shape, strict=True)]
    for dim in reversed(range(len(shape))):
        rest = math.prod(step) // step[dim] * itemsize_bytes
        fit = max_bytes // (rest * step[dim])
        if fit > 1:
            step[dim] = min(shape[dim], step[dim] * fit)
        if step[dim] < shape[dim]:
            break
    return list(grid(shape, tuple(step)))


def grid(shape: Shape, step: Shape) -> Iterator[Box]:
    """Yield the boxes of a regular grid over an array, in C order; the last ones may be short."""
    if not shape:
        yield whole(shape)
        return
    starts = [range(0, n, s) for n, s in zip(shape, step, strict=True)]
    for offsets in itertools.product(*starts):
        lengths = (min(s, n - o) for o, s, n in zip(offsets, step, shape, strict=True))
        yield Box(offsets, tuple(lengths))


def chunk_shape(shape: Shape, layout: Layout, itemsize_bytes: int, max_bytes: int) -> Shape:
    """Return the chunks in which to store an array that lies so on its ranks.

    A chunk is the largest shard, halved along its longest dim until it fits.

    Args:
        shape: Elements of the array.
        layout: Where it lay when it was saved.
        itemsize_bytes: Bytes of an element.
        max_bytes: Most bytes of a chunk.

    >>> from shardckpt.geometry.layout import MeshLayout
    >>> chunk_shape((8, 6), MeshLayout((2,), (0, 1), ((0,),)), 4, 1 << 20)
    (4, 6)
    """
    chunk = [max(n, 1) for n in shape]
    if 0 not in shape and shape:
        if isinstance(layout, BoxLayout):
            shards = list(layout.boxes)
        else:
            # The first shard of a mesh is never shorter than another.
            shards = [layout.box_at((0,) * len(layout.mesh_shape), shape)]
        chunk = [max(box.shape[dim] for box in shards) for dim in range(len(shape))]
    while math.prod(chunk) * itemsize_bytes > max_bytes and max(chunk) > 1:
        dim = chunk.index(max(chunk))
        chunk[dim] = -(-chunk[dim] // 2)
    return tuple(chunk)
