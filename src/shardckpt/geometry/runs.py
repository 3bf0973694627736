"""Where a box lies in the flat memory of a C-order array.

Layer: geometry (integers only).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardckpt.geometry.box import Box, Shape


def element_strides(shape: Shape) -> tuple[int, ...]:
    """Return how many elements apart neighbours along each dim lie in C order.

    >>> element_strides((2, 3, 4))
    (12, 4, 1)
    """
    return c_strides_bytes(shape, 1)


def c_strides_bytes(shape: Shape, itemsize_bytes: int) -> tuple[int, ...]:
    """Return the strides in bytes of a C-order array without gaps."""
    strides: list[int] = []
    step = itemsize_bytes
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def inner_run(box: Box, shape: Shape) -> tuple[int, int]:
    """Return `(num_outer_dims, run_elements)`: one such run per index of the outer dims.

    The inner dims are those that the box covers wholly, plus the one outside them.

    >>> inner_run(Box((1, 0), (2, 4)), (4, 4))
    (0, 8)
    """
    run = 1
    dim = len(shape)
    while dim > 0:
        dim -= 1
        run *= box.shape[dim]
        if box.shape[dim] != shape[dim]:
            break
    # Outer dims of one index do not break the run.
    while dim > 0 and box.shape[dim - 1] == 1:
        dim -= 1
    return dim, run


def single_run(box: Box, shape: Shape) -> tuple[int, int] | None:
    """Return `[start, stop)` in elements where the box is one contiguous range, else None."""
    outer, run = inner_run(box, shape)
    if outer and run:
        return None
    start = sum(o * s for o, s in zip(box.offsets, element_strides(shape), strict=True))
    return start, start + box.num_elements


def element_runs(box: Box, shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield the element ranges that `box` covers in a C-order array, ascending and never touching.

    Args:
        box: Region inside the array.
        shape: Shape of the array.

    Yields:
        Half-open `(start, stop)` in elements from the first one.

    >>> list(element_runs(Box((1, 1), (2, 2)), (4, 4)))
    [(5, 7), (9, 11)]
    """
    outer, run = inner_run(box, shape)
    if run == 0 or box.num_elements == 0:
        return
    strides = element_strides(shape)
    base = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    for index in itertools.product(*(range(n) for n in box.shape[:outer])):
        start = base + sum(i * s for i, s in zip(index, strides[:outer], strict=True))
        yield start, start + run
