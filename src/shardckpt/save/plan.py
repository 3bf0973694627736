"""The save plan: who writes which bytes, and where in its file. Pure functions from data to data.

Layer: save. The coordinator merges the ranks' structures into one global plan, only when one of
them is new; every rank then derives its own payloads and file offsets from it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.errors import StateMismatchError
from shardckpt.format.manifest import BoxColumn, MeshColumn, layout_column, mesh_layout
from shardckpt.format.shard_file import (
    ALIGNED_FROM_BYTES,
    CHUNK_BYTES,
    HEADER_BYTES,
    MAX_FILE_BYTES,
    PAGE_BYTES,
    SMALL_ALIGN_BYTES,
)
from shardckpt.format.shares import replica_share
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box, Shape
from shardckpt.geometry.layout import BoxLayout, Layout, MeshLayout, replicated
from shardckpt.geometry.regions import coverage_problem
from shardckpt.save.balance import choose_writers
from shardckpt.save.structure import BOXES, WHOLE, Structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardckpt.state import Leaf

_MAX_PROBLEMS_SHOWN: Final = 10


class GlobalPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The arrays of the whole job, in the manifest's columns."""

    keys: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    roles: list[str]
    layout_ids: list[int]
    owners: list[int]
    writers: list[int]
    layouts: list[MeshColumn | BoxColumn]
    aliases: dict[str, str]
    per_rank: dict[str, str]


class Payload(msgspec.Struct, frozen=True, gc=False):
    """A byte range of one local shard at its place in a file.

    Attributes:
        leaf: Index of the leaf in the state tree.
        shard: Index of the shard in the leaf.
        start: First byte of the shard's C-order bytes.
        nbytes: Bytes.
        file: Number of the file.
        offset: Byte of the file.
    """

    leaf: int
    shard: int
    start: int
    nbytes: int
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank writes.

    Attributes:
        payloads: In file order.
        file_bytes: For each file the bytes of header and payloads, a multiple of 4096.
    """

    payloads: tuple[Payload, ...]
    file_bytes: tuple[int, ...]

    @property
    def image_bytes(self) -> int:
        """Host memory that holds all files up to their tables."""
        return sum(self.file_bytes)


def merge(structures: Sequence[Structure], class_of_rank: Sequence[int]) -> GlobalPlan:
    """Combine the distinct structures of all ranks into one plan.

    Args:
        structures: Distinct structures.
        class_of_rank: For each rank the index of its structure.

    Raises:
        StateMismatchError: Ranks disagree on an array, or irregular boxes do not cover one exactly
            once.
    """
    ranks_of_class: list[list[int]] = [[] for _ in structures]
    for rank, index in enumerate(class_of_rank):
        ranks_of_class[index].append(rank)
    problems: list[str] = []
    specs: dict[str, tuple[ArraySpec, str, int]] = {}
    layouts: dict[str, Layout] = {}
    meshes: dict[str, list[MeshLayout]] = {}
    holders: dict[str, list[int]] = {}  # Of whole copies, as indexes of structures.
    boxes: dict[str, dict[Box, list[int]]] = {}
    aliases: dict[str, str] = {}
    per_rank: dict[str, str] = {}
    for index, structure in enumerate(structures):
        ranks = ranks_of_class[index]
        mesh_layouts = [mesh_layout(c) for c in structure.layouts if isinstance(c, MeshColumn)]
        aliases.update(structure.aliases)
        per_rank.update(structure.per_rank)
        columns = zip(
            structure.keys, structure.dtypes, structure.shapes, structure.roles,
            structure.layout_ids, strict=True,
        )  # fmt: skip
        for key, dtype, shape, role, layout_id in columns:
            spec = ArraySpec(tuple(shape), dtype)
            kind = min(layout_id, 0)
            known = specs.setdefault(key, (spec, role, kind))
            if known[0] != spec or known[2] != kind:
                problems.append(
                    f"key {key!r}: rank {ranks[0]} holds {spec}, another rank {known[0]}"
                    + ("" if known[2] == kind else " with another kind of layout")
                )
            elif layout_id == WHOLE:
                holders.setdefault(key, []).append(index)
            elif layout_id == BOXES:
                of_key = boxes.setdefault(key, {})
                for box in _boxes(structure.boxes[key], len(shape)):
                    of_key.setdefault(box, []).extend(ranks)
            elif mesh_layouts[layout_id] not in meshes.setdefault(key, []):
                meshes[key].append(mesh_layouts[layout_id])
    # Many arrays lie alike; what costs as much as there are ranks is done once for all of them.
    joined: dict[tuple[MeshLayout, ...], MeshLayout | None] = {}
    for key, found in meshes.items():
        of_meshes = tuple(found)
        if of_meshes not in joined:
            joined[of_meshes] = _joined(of_meshes)
        layout = joined[of_meshes]
        if layout is None:
            problems.append(
                f"key {key!r}: ranks hold it under different placements, on meshes "
                f"{[mesh.mesh_shape for mesh in found]}"
            )
        else:
            layouts[key] = layout
    for key, of_key in boxes.items():
        problem = coverage_problem(specs[key][0].shape, list(of_key))
        if problem:
            problems.append(f"key {key!r}: {problem}")
        layouts[key] = BoxLayout(tuple(of_key), tuple(tuple(sorted(r)) for r in of_key.values()))
    if problems:
        raise _disagreement(problems)
    shared: dict[tuple[int, ...], MeshLayout] = {}
    for key, indexes in holders.items():
        group = tuple(indexes)
        if group not in shared:
            shared[group] = replicated(sorted(r for i in group for r in ranks_of_class[i]))
        layouts[key] = shared[group]
    return _columns(specs, layouts, aliases, per_rank)


def _joined(meshes: Sequence[MeshLayout]) -> MeshLayout | None:
    """Return one layout for equal copies on separate meshes; None where they do not fit together.

    A parameter that only the data-parallel axis cuts lives on one submesh per tensor-parallel
    rank: each submesh holds a whole copy, so the submeshes are one more axis of replicas. It is
    the last one where the ranks then ascend evenly, as those of a mesh that was sliced do.
    """
    first = meshes[0]
    if len(meshes) == 1:
        return first
    ranks = tuple(rank for mesh in meshes for rank in mesh.ranks)
    if len(set(ranks)) != sum(len(set(mesh.ranks)) for mesh in meshes) or any(
        (mesh.mesh_shape, mesh.cuts) != (first.mesh_shape, first.cuts) for mesh in meshes
    ):
        return None
    ordered = sorted(meshes, key=lambda mesh: mesh.ranks[0])
    interleaved = tuple(chain.from_iterable(zip(*(m.ranks for m in ordered), strict=True)))
    last = MeshLayout((*first.mesh_shape, len(meshes)), interleaved, first.cuts)
    if isinstance(last.ranks, range):
        return last
    cuts = tuple(tuple(axis + 1 for axis in cut) for cut in first.cuts)
    return MeshLayout((len(meshes), *first.mesh_shape), ranks, cuts)


def rank_plan(
    plan: GlobalPlan, leaves: Sequence[Leaf], rank: int, max_file_bytes: int = MAX_FILE_BYTES
) -> RankPlan:
    """Return what `rank`, which holds `leaves`, writes."""
    index_of = {key: i for i, key in enumerate(plan.keys)}
    mesh: dict[int, tuple[MeshLayout, tuple[int, int] | None]] = {}
    replicas: dict[int, dict[Box, tuple[int, ...]]] = {}
    pieces: list[tuple[int, int, int, int]] = []
    for leaf_index, leaf in enumerate(leaves):
        tensor = index_of[leaf.key]
        layout_id, owner = plan.layout_ids[tensor], plan.owners[tensor]
        writers = plan.writers[tensor]
        column = plan.layouts[layout_id]
        if isinstance(column, MeshColumn):
            if layout_id not in mesh:
                layout = mesh_layout(column)
                mesh[layout_id] = (layout, _replica_of(layout, rank))
            layout, place = mesh[layout_id]
            for shard_index, shard in enumerate(leaf.shards):
                replica, num = place or _replica_of_box(layout, shard.box, leaf.spec.shape, rank)
                nbytes = shard.box.num_elements * leaf.spec.itemsize_bytes
                start, stop = replica_share(nbytes, num, owner, writers, replica)
                if start < stop:
                    pieces.append((leaf_index, shard_index, start, stop))
            continue
        if layout_id not in replicas:
            listed = _boxes(column.boxes, len(leaf.spec.shape))
            replicas[layout_id] = dict(zip(listed, map(tuple, column.ranks), strict=True))
        for shard_index, shard in enumerate(leaf.shards):
            ranks = replicas[layout_id][shard.box]
            nbytes = shard.box.num_elements * leaf.spec.itemsize_bytes
            start, stop = replica_share(nbytes, len(ranks), owner, writers, ranks.index(rank))
            if start < stop:
                pieces.append((leaf_index, shard_index, start, stop))
    return _place_in_files(pieces, leaves, max_file_bytes)


def _place_in_files(
    pieces: list[tuple[int, int, int, int]], leaves: Sequence[Leaf], max_file_bytes: int
) -> RankPlan:
    """Put big payloads first at page boundaries, then small ones packed.

    Those that no fence protects stand together where big and small ones meet: an extent is copied
    whole, and each that holds one of them is copied before `save` returns.
    """
    big = [p for p in pieces if p[3] - p[2] >= ALIGNED_FROM_BYTES]
    big.sort(key=lambda p: leaves[p[0]].fence == 0)
    small = [p for p in pieces if p[3] - p[2] < ALIGNED_FROM_BYTES]
    small.sort(key=lambda p: leaves[p[0]].fence != 0)
    payloads: list[Payload] = []
    ends: list[int] = [HEADER_BYTES]
    for leaf, shard, start, stop in (*big, *small):
        while start < stop:
            align = PAGE_BYTES if stop - start >= ALIGNED_FROM_BYTES else SMALL_ALIGN_BYTES
            offset = -(-ends[-1] // align) * align
            if offset + (stop - start) > max_file_bytes and ends[-1] > HEADER_BYTES:
                ends.append(HEADER_BYTES)
                continue
            # What goes on in the next file begins with a chunk: no checksum spans two payloads.
            room = (max_file_bytes - offset) // CHUNK_BYTES * CHUNK_BYTES
            nbytes = min(stop - start, max(ALIGNED_FROM_BYTES, room))
            payloads.append(Payload(leaf, shard, start, nbytes, len(ends) - 1, offset))
            ends[-1] = offset + nbytes
            start += nbytes
    return RankPlan(tuple(payloads), tuple(-(-end // PAGE_BYTES) * PAGE_BYTES for end in ends))


def _columns(
    specs: Mapping[str, tuple[ArraySpec, str, int]],
    layouts: Mapping[str, Layout],
    aliases: dict[str, str],
    per_rank: dict[str, str],
) -> GlobalPlan:
    keys = sorted(specs)
    ids: dict[Layout, int] = {}
    by_identity: dict[int, int] = {}
    layout_ids: list[int] = []
    for key in keys:
        layout = layouts[key]
        if id(layout) not in by_identity:
            by_identity[id(layout)] = ids.setdefault(layout, len(ids))
        layout_ids.append(by_identity[id(layout)])
    owners, writers = choose_writers([(layouts[key], *specs[key][:2]) for key in keys])
    return GlobalPlan(
        keys=keys,
        dtypes=[specs[key][0].dtype for key in keys],
        shapes=[list(specs[key][0].shape) for key in keys],
        roles=[specs[key][1] for key in keys],
        layout_ids=layout_ids,
        owners=owners,
        writers=writers,
        layouts=[layout_column(layout) for layout in ids],
        aliases=aliases,
        per_rank=per_rank,
    )


def _replica_of(layout: MeshLayout, rank: int) -> tuple[int, int] | None:
    """Return index and number of replicas of all that `rank` holds; None where boxes differ."""
    coordinate = layout.coordinate(rank)
    if coordinate is None or not layout.has_distinct_ranks:
        return None
    return layout.replica_index(coordinate), layout.num_replicas


def _replica_of_box(layout: MeshLayout, box: Box, shape: Shape, rank: int) -> tuple[int, int]:
    holders = next(ranks for held, ranks in layout.shards_touching(box, shape) if held == box)
    return holders.index(rank), len(holders)


def _boxes(numbers: Sequence[int], num_dims: int) -> list[Box]:
    if num_dims == 0:
        return []
    step = 2 * num_dims
    return [
        Box(tuple(numbers[i : i + num_dims]), tuple(numbers[i + num_dims : i + step]))
        for i in range(0, len(numbers), step)
    ]


def _disagreement(problems: list[str]) -> StateMismatchError:
    shown = "\n  ".join(problems[:_MAX_PROBLEMS_SHOWN])
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    tail = f"\n  and {more} more" if more > 0 else ""
    return StateMismatchError(
        f"the ranks' states do not fit together ({len(problems)} keys):\n  {shown}{tail}\n"
        "Give different arrays different names on every rank.",
        tuple(problems),
    )
