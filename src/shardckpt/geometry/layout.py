"""How one array lies on the ranks of a mesh, in closed form.

Layer: geometry (integers only). A dim may be cut by several mesh axes, one after the other; each
cut is a ceil-chunk, so that the last shards may be short or empty. This is what FSDP2 does, what TP
followed by FSDP does (tensor-parallel axis first: torch writes it as a strided shard), and what
JAX's PartitionSpec means. Axes that cut nothing hold replicas. Where one rank drives several
devices it stands on the mesh once for each of them.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from shardckpt.geometry.box import Box, Shape
from shardckpt.geometry.runs import element_strides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class MeshLayout:
    """A regular layout: mesh axes, the ranks on the mesh, and which axes cut which dim.

    Attributes:
        mesh_shape: Ranks along each axis.
        ranks: Global rank at each mesh coordinate, row-major; `len == prod(mesh_shape)`. A rank may
            stand at several. Always a `range` where the ranks are evenly spaced and ascending, so
            that most meshes cost the same however large they are; else a tuple.
        cuts: For each array dim the mesh axes that cut it, in the order in which they cut. Dims at
            the end that nothing cuts may be left out.
    """

    mesh_shape: Shape
    ranks: Sequence[int]
    cuts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Bring the ranks into their one form, and refuse parts that contradict each other.

        Raises:
            ValueError: Wrong number of ranks, an unknown axis or an axis used twice.
        """
        if not isinstance(self.ranks, range):
            object.__setattr__(self, "ranks", _as_range(tuple(self.ranks)))
        axes = [axis for cut in self.cuts for axis in cut]
        if len(self.ranks) != math.prod(self.mesh_shape):
            raise ValueError(
                f"mesh {self.mesh_shape} needs {math.prod(self.mesh_shape)} ranks, got {self.ranks}"
            )
        if len(set(axes)) != len(axes) or not all(0 <= a < len(self.mesh_shape) for a in axes):
            raise ValueError(f"cuts {self.cuts} do not fit mesh {self.mesh_shape}")

    @cached_property
    def replica_axes(self) -> tuple[int, ...]:
        """Axes that cut no dim: along them lie equal copies."""
        used = {axis for cut in self.cuts for axis in cut}
        return tuple(a for a in range(len(self.mesh_shape)) if a not in used)

    @cached_property
    def num_replicas(self) -> int:
        """Ranks that hold a copy of the first shard; the same for every shard of a regular mesh."""
        if self.has_distinct_ranks:
            return math.prod(self.mesh_shape[a] for a in self.replica_axes)
        return len(self._ranks_where({axis: 0 for cut in self.cuts for axis in cut}))

    @cached_property
    def has_distinct_ranks(self) -> bool:
        """Whether every rank stands at one coordinate only."""
        return isinstance(self.ranks, range) or len(self._index_of_rank) == len(self.ranks)

    @cached_property
    def _index_of_rank(self) -> dict[int, int]:
        return {rank: i for i, rank in enumerate(self.ranks)}

    def coordinate(self, rank: int) -> Shape | None:
        """Return the mesh coordinate of a rank that stands once on the mesh; None where nowhere."""
        if not isinstance(self.ranks, range):
            index = self._index_of_rank.get(rank)
        else:
            index = self.ranks.index(rank) if rank in self.ranks else None
        return None if index is None else _unravel(index, self.mesh_shape)

    def replica_index(self, coordinate: Shape) -> int:
        """Return which of the equal copies the rank at `coordinate` holds."""
        index = 0
        for axis in self.replica_axes:
            index = index * self.mesh_shape[axis] + coordinate[axis]
        return index

    def box_at(self, coordinate: Shape, shape: Shape) -> Box:
        """Return the box of an array of `shape` that the rank at `coordinate` holds."""
        offsets: list[int] = []
        lengths: list[int] = []
        for dim, size in enumerate(shape):
            start, stop = 0, size
            for axis in self.cuts[dim] if dim < len(self.cuts) else ():
                first, last = chunk_bounds(stop - start, self.mesh_shape[axis], coordinate[axis])
                start, stop = start + first, start + last
            offsets.append(start)
            lengths.append(stop - start)
        return Box(tuple(offsets), tuple(lengths))

    def shards_touching(self, wanted: Box, shape: Shape) -> Iterator[tuple[Box, Sequence[int]]]:
        """Yield `(box, ranks)` of every non-empty shard that meets `wanted`.

        `ranks[i]` holds replica `i` of that shard; a rank that holds several holds the first of
        them. Cost grows with the shards met, not with the mesh.
        """
        per_dim: list[list[tuple[int, int, tuple[int, ...]]]] = []
        for dim, size in enumerate(shape):
            axes = self.cuts[dim] if dim < len(self.cuts) else ()
            starts, stops, coords = _dim_intervals(size, tuple(self.mesh_shape[a] for a in axes))
            first = bisect_right(stops, wanted.offsets[dim])
            last = bisect_left(starts, wanted.offsets[dim] + wanted.shape[dim])
            per_dim.append([(starts[i], stops[i], coords[i]) for i in range(first, last)])
        for combination in itertools.product(*per_dim):
            fixed: dict[int, int] = {}
            for dim, (_, _, coords_of_dim) in enumerate(combination):
                axes = self.cuts[dim] if dim < len(self.cuts) else ()
                fixed.update(zip(axes, coords_of_dim, strict=True))
            box = Box(tuple(c[0] for c in combination), tuple(c[1] - c[0] for c in combination))
            yield box, self._ranks_where(fixed)

    def _ranks_where(self, fixed: dict[int, int]) -> Sequence[int]:
        # A cut beyond the array's dims (a 0-dim array under a sharded layout) does not occur:
        # layouts are made per array.
        strides = element_strides(self.mesh_shape)
        first = sum(strides[axis] * position for axis, position in fixed.items())
        places: Sequence[int] = range(first, first + 1)
        for axis in self.replica_axes:
            step, extent = strides[axis], self.mesh_shape[axis] * strides[axis]
            # Evenly spaced places stay a range, which costs the same for any number of replicas.
            if isinstance(places, range) and (len(places) == 1 or places.step == extent):
                places = range(places.start, places.start + len(places) * extent, step)
            else:
                places = [place + at for place in places for at in range(0, extent, step)]
        if isinstance(self.ranks, range) and isinstance(places, range):
            return self.ranks[places.start : places.stop : places.step]
        ranks = [self.ranks[place] for place in places]
        return tuple(ranks) if self.has_distinct_ranks else tuple(dict.fromkeys(ranks))


def _as_range(ranks: tuple[int, ...]) -> Sequence[int]:
    """Return the range that has these ranks, or the ranks.

    >>> _as_range((1, 3, 5)), _as_range((4,)), _as_range((1, 1)), _as_range((0, 2, 3))
    (range(1, 7, 2), range(4, 5), (1, 1), (0, 2, 3))
    """
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if not ranks or step < 1:
        return ranks
    found = range(ranks[0], ranks[0] + step * len(ranks), step)
    return found if found[-1] == ranks[-1] and tuple(found) == ranks else ranks


def replicated(ranks: Sequence[int]) -> MeshLayout:
    """Return the layout of a plain array of which every rank in `ranks` holds a whole copy."""
    return MeshLayout((len(ranks),), ranks, ())


@dataclass(frozen=True)
class BoxLayout:
    """An irregular layout: every box and the ranks that hold a copy of it, written down.

    Attributes:
        boxes: Non-empty boxes that cover the array exactly once.
        ranks: For each box the ranks that hold it; `ranks[i][j]` holds replica `j`.
    """

    boxes: tuple[Box, ...]
    ranks: tuple[tuple[int, ...], ...]

    def shards_touching(self, wanted: Box, shape: Shape) -> Iterator[tuple[Box, Sequence[int]]]:
        """Yield `(box, ranks)` of every shard that meets `wanted`, as `MeshLayout` does."""
        for box, ranks in zip(self.boxes, self.ranks, strict=True):
            if box.intersect(wanted) is not None:
                yield box, ranks


Layout = MeshLayout | BoxLayout


def chunk_bounds(length: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Return `[start, stop)` of ceil-chunk `index` of `length` elements; late chunks may be empty.

    >>> [chunk_bounds(5, 4, i) for i in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    size = -(-length // num_chunks)
    return min(length, index * size), min(length, (index + 1) * size)


@lru_cache(maxsize=4096)
def _dim_intervals(
    length: int, axis_sizes: tuple[int, ...]
) -> tuple[list[int], list[int], list[tuple[int, ...]]]:
    """Cut `[0, length)` by each axis in turn; return the non-empty intervals in ascending order."""
    intervals: list[tuple[int, int, tuple[int, ...]]] = [(0, length, ())] if length else []
    for num_chunks in axis_sizes:
        cut: list[tuple[int, int, tuple[int, ...]]] = []
        for start, stop, coords in intervals:
            for index in range(num_chunks):
                first, last = chunk_bounds(stop - start, num_chunks, index)
                if first < last:
                    cut.append((start + first, start + last, (*coords, index)))
        intervals = cut
    return [i[0] for i in intervals], [i[1] for i in intervals], [i[2] for i in intervals]


def _unravel(index: int, shape: Shape) -> Shape:
    coordinate: list[int] = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        coordinate.append(position)
    return tuple(reversed(coordinate))
