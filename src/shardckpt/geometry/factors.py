"""Two arrays that hold the same elements in another order: dims as products of common axes.

Layer: geometry (integers only). A transposed, reshaped, stacked or split array is such a pair. A
box of one of them becomes boxes of the other and the strides that lead through the memory of the
first, so that a resharding read needs no whole array and no copy.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardckpt.geometry.box import Box, Shape
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.runs import element_strides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Boxes of one region that may be wanted one by one; more are read as one and picked from memory.
MAX_BOXES: Final = 1024
_Ranges = dict[int, tuple[int, int]]  # First index and count, by axis.


@dataclass(frozen=True, slots=True)
class DimFactors:
    """One dim, or a window of it, as the C-order product of axes.

    Attributes:
        start: First index of the dim that belongs to the product.
        axes: Positions in `Link.sizes`, the outermost first; none stands for one index.
    """

    start: int
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """How a saved and a target array share elements.

    Attributes:
        sizes: Size of every axis.
        fixed: Axis and its index, where the name of one array stands for one index of an axis that
            the other one has as (part of) a dim.
        saved: The dims of the saved array.
        target: The dims of the target; every axis that is not fixed is on both sides once.
    """

    sizes: Shape
    fixed: tuple[tuple[int, int], ...]
    saved: tuple[DimFactors, ...]
    target: tuple[DimFactors, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A box of the saved array and where its elements lie in memory.

    Where `is_direct`, the memory of the target is addressed by the dims of `box`. Otherwise the box
    is read into a buffer of its own in C order, and `axes` are copied from there.

    Attributes:
        box: Region of the saved array.
        offset_bytes: From the first element of the target box to the first one here.
        strides_bytes: Bytes in the target's memory, per dim of `box`; empty where not direct.
        axes: Count, elements apart in the buffer, bytes apart in the target's memory.
    """

    box: Box
    offset_bytes: int
    strides_bytes: tuple[int, ...]
    axes: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_direct(self) -> bool:
        """Whether the box can be read into the target as it is."""
        return len(self.strides_bytes) == len(self.box.shape)


def region_of(dims: Sequence[DimFactors], sizes: Shape) -> Box:
    """Return the box that the products of some dims span in their array."""
    return Box(tuple(d.start for d in dims), tuple(_extent(d.axes, sizes) for d in dims))


def views(link: Link, box: Box, strides_bytes: Sequence[int]) -> Iterator[View]:
    """Yield what must be read to fill the part of a target box that a link provides.

    Args:
        link: The two arrays.
        box: Region of the target, in global coordinates.
        strides_bytes: Bytes from one index to the next in the memory of that region, per dim.

    Yields:
        Views that are disjoint in the target and together hold each linked element of the box.

    >>> swap = Link((2, 3), (), (DimFactors(0, (0,)), DimFactors(0, (1,))),
    ...             (DimFactors(0, (1,)), DimFactors(0, (0,))))
    >>> [(v.box, v.strides_bytes) for v in views(swap, Box((0, 0), (3, 2)), (8, 4))]
    [(Box(offsets=(0, 0), shape=(2, 3)), (4, 8))]
    """
    per_dim: list[list[Box]] = []
    for dim, first, length in zip(link.target, box.offsets, box.shape, strict=True):
        shape = tuple(link.sizes[a] for a in dim.axes)
        start = max(first, dim.start) - dim.start
        stop = min(first + length, dim.start + math.prod(shape)) - dim.start
        if stop <= start:
            return
        per_dim.append(ranges_to_boxes(start, stop, shape))
    for combination in itertools.product(*per_dim):
        ranges = _ranges(link, combination)
        if ranges is not None:
            yield from _views_of(link, ranges, box, strides_bytes)


def _ranges(link: Link, parts: Sequence[Box]) -> _Ranges | None:
    """Return the range of every axis in one rectangular part, or None where it holds nothing."""
    ranges: _Ranges = {axis: (index, 1) for axis, index in link.fixed}
    for dim, part in zip(link.target, parts, strict=True):
        for axis, first, count in zip(dim.axes, part.offsets, part.shape, strict=True):
            if axis not in ranges:
                ranges[axis] = (first, count)
            elif not first <= ranges[axis][0] < first + count:
                return None
    return ranges


def _views_of(
    link: Link, ranges: _Ranges, box: Box, strides_bytes: Sequence[int]
) -> Iterator[View]:
    """Yield the views of a rectangular part: direct ones, or a single one with a buffer."""
    offset = 0
    step: dict[int, int] = {}
    for dim, first, stride in zip(link.target, box.offsets, strides_bytes, strict=True):
        inner = element_strides(tuple(link.sizes[a] for a in dim.axes))
        offset += (dim.start - first) * stride
        for axis, apart in zip(dim.axes, inner, strict=True):
            offset += ranges[axis][0] * apart * stride
            step[axis] = apart * stride
    dims = [_SavedDim.of(dim, link.sizes, ranges, step) for dim in link.saved]
    num_boxes = math.prod(dim.num_runs for dim in dims)
    last_cut = max((i for i, dim in enumerate(dims) if dim.num_runs > 1), default=0)
    # Cut in an inner dim, every box would touch the same chunks of the file as the others.
    is_cut_outside = all(
        dim.num_elements == 1 or i == last_cut for i, dim in enumerate(dims[: last_cut + 1])
    )
    if num_boxes > 1 and (num_boxes > MAX_BOXES or not is_cut_outside):
        yield _buffered(link, ranges, step, dims, offset)
        return
    for runs in itertools.product(*(dim.runs() for dim in dims)):
        yield View(
            Box(tuple(r[0] for r in runs), tuple(r[1] for r in runs)),
            offset + sum(r[2] for r in runs),
            tuple(r[3] for r in runs),
        )


def _buffered(
    link: Link, ranges: _Ranges, step: dict[int, int], dims: list[_SavedDim], offset: int
) -> View:
    box = Box(tuple(d.first for d in dims), tuple(d.last + 1 - d.first for d in dims))
    axes: list[tuple[int, int, int]] = []
    for dim, apart_in_buffer in zip(link.saved, element_strides(box.shape), strict=True):
        inner = element_strides(tuple(link.sizes[a] for a in dim.axes))
        axes += [
            (ranges[axis][1], apart * apart_in_buffer, step[axis])
            for axis, apart in zip(dim.axes, inner, strict=True)
            if ranges[axis][1] > 1
        ]
    return View(box, offset, (), tuple(axes))


@dataclass(frozen=True, slots=True)
class _SavedDim:
    """What is wanted of one dim of the saved array.

    Attributes:
        first: First index wanted.
        last: Last index wanted.
        outer: Count, step in this dim, bytes apart in the target: axes that cut it into runs.
        length: Indexes of a run.
        stride_bytes: Bytes apart in the target within a run.
    """

    first: int
    last: int
    outer: tuple[tuple[int, int, int], ...]
    length: int
    stride_bytes: int

    @staticmethod
    def of(dim: DimFactors, sizes: Shape, ranges: _Ranges, step: dict[int, int]) -> _SavedDim:
        inner = element_strides(tuple(sizes[a] for a in dim.axes))
        first = last = dim.start
        outer: list[tuple[int, int, int]] = []
        length, stride = 1, 0
        for axis, apart in zip(reversed(dim.axes), reversed(inner), strict=True):
            start, count = ranges[axis]
            first += start * apart
            last += (start + count - 1) * apart
            if count == 1:
                continue
            if length == 1 and not outer and apart == 1:
                length, stride = count, step[axis]
            elif not outer and length == apart and step[axis] == length * stride:
                length *= count
            else:
                outer.append((count, apart, step[axis]))
        return _SavedDim(first, last, tuple(reversed(outer)), length, stride)

    @property
    def num_runs(self) -> int:
        return math.prod(count for count, _, _ in self.outer)

    @property
    def num_elements(self) -> int:
        return self.num_runs * self.length

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield first index, indexes, offset in bytes in the target, stride in bytes there."""
        for index in itertools.product(*(range(count) for count, _, _ in self.outer)):
            start = self.first + sum(i * o[1] for i, o in zip(index, self.outer, strict=True))
            offset = sum(i * o[2] for i, o in zip(index, self.outer, strict=True))
            yield start, self.length, offset, self.stride_bytes


def _extent(axes: Sequence[int], sizes: Shape) -> int:
    return math.prod(sizes[a] for a in axes)
