"""The save plan: every byte has one writer, shares are balanced, disagreement is named."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import StateMismatchError
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.format.shares import replica_share, replicas_of
from shardckpt.geometry.layout import MeshLayout
from shardckpt.save.plan import merge, rank_plan
from shardckpt.save.structure import structure_of
from shardckpt.testing.arrays import ArrayBackend, Fenced, Sharded, shard_of

if TYPE_CHECKING:
    from shardckpt.state import StateTree


def tree(rank: int, arrays: dict[str, np.ndarray], layout: MeshLayout | None) -> StateTree:
    state = {
        key: value if layout is None or value.ndim == 0 else shard_of(value, layout, rank)
        for key, value in arrays.items()
    }
    return ArrayBackend().describe(state)


@given(st.integers(0, 10**7), st.integers(1, 9), st.integers(-1, 8), st.integers(1, 9))
def test_shares_of_replicas_tile_the_shard(
    nbytes: int, replicas: int, owner: int, writers: int
) -> None:
    position = 0
    for turn in range(replicas):
        replica = (max(owner, 0) + turn) % replicas
        start, stop = replica_share(nbytes, replicas, owner, writers, replica)
        if start < stop:
            assert start == position
            position = stop
    assert position == nbytes


@given(st.integers(1, 10**7), st.integers(1, 300), st.integers(-1, 8), st.integers(1, 9), st.data())
def test_replicas_that_hold_some_bytes_are_all_found(
    nbytes: int, replicas: int, owner: int, writers: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, nbytes - 1))
    last = data.draw(st.integers(first + 1, nbytes))
    shares = [
        replica_share(nbytes, replicas, owner, writers, replica) for replica in range(replicas)
    ]
    holders = {r for r, (a, b) in enumerate(shares) if max(a, first) < min(b, last)}
    found = replicas_of(nbytes, replicas, owner, writers, first, last)
    assert holders <= set(found)
    chunks = -(-nbytes // CHUNK_BYTES)  # Where these are fewer, most replicas hold nothing.
    assert len(found) <= len(holders) * -(-replicas // chunks) + 2


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [((1,), ()), ((3,), ((0,),)), ((2, 2), ((1,),)), ((2, 2), ((1, 0),)), ((4,), ())]
    ),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3000)), min_size=1, max_size=5),
)
def test_every_byte_of_every_array_has_exactly_one_writer(
    case: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], shapes: list[tuple[int, int]]
) -> None:
    mesh, cuts = case
    world = math.prod(mesh)
    layout = MeshLayout(mesh, tuple(range(world)), cuts)
    arrays = {f"k{i}": np.zeros(shape, np.float64) for i, shape in enumerate(shapes)}
    trees = [tree(rank, arrays, layout) for rank in range(world)]
    plan = merge([structure_of(t) for t in trees], list(range(world)))
    written = {key: np.zeros(value.shape, int) for key, value in arrays.items()}
    for rank, described in enumerate(trees):
        for payload in rank_plan(plan, described.leaves, rank).payloads:
            leaf = described.leaves[payload.leaf]
            box = leaf.shards[payload.shard].box
            part = np.zeros(box.num_elements, int)
            part[payload.start // 8 : (payload.start + payload.nbytes) // 8] = 1
            where = tuple(slice(a, b) for a, b in zip(box.offsets, box.stop, strict=True))
            written[leaf.key][where] += part.reshape(box.shape)
    assert all((counts == 1).all() for counts in written.values())


def test_replicated_bytes_are_split_evenly() -> None:
    arrays = {"big": np.zeros((3001, 701), np.float32), **{f"s{i}": np.zeros(9) for i in range(64)}}
    trees = [tree(rank, arrays, None) for rank in range(5)]
    plan = merge([structure_of(trees[0])], [0] * 5)
    loads = [
        sum(p.nbytes for p in rank_plan(plan, t.leaves, r).payloads) for r, t in enumerate(trees)
    ]
    assert max(loads) - min(loads) <= 2 * 65536


def test_no_share_is_too_small_to_read_and_the_bytes_still_are_balanced() -> None:
    """With many replicas a share each would be crumbs in as many files."""
    arrays = {f"a{i}": np.zeros((300 + i, 4096), np.float32) for i in range(24)}
    trees = [tree(rank, arrays, None) for rank in range(40)]
    plan = merge([structure_of(trees[0])], [0] * 40)
    assert set(plan.writers) == {4, 5}
    payloads = [rank_plan(plan, t.leaves, r).payloads for r, t in enumerate(trees)]
    assert min(p.nbytes for of_rank in payloads for p in of_rank) >= 15 * CHUNK_BYTES
    loads = [sum(p.nbytes for p in of_rank) for of_rank in payloads]
    assert sum(loads) == sum(array.nbytes for array in arrays.values())
    assert max(loads) - min(loads) <= 2 << 20


def test_a_file_that_would_grow_too_large_is_split() -> None:
    described = tree(0, {"a": np.zeros(2**20), "b": np.zeros(2**19)}, None)
    plan = merge([structure_of(described)], [0])
    split = rank_plan(plan, described.leaves, 0, max_file_bytes=4 << 20)
    assert len(split.file_bytes) > 2
    assert max(split.file_bytes) <= 4 << 20
    assert sum(p.nbytes for p in split.payloads) == 8 * (2**20 + 2**19)
    # A reader refuses what does not begin with a chunk.
    assert all(p.start % CHUNK_BYTES == 0 for p in split.payloads)


def test_what_no_fence_protects_stands_together() -> None:
    state = {
        f"{size}{i}": Fenced(np.zeros(n)) if i % 2 else np.zeros(n)
        for i in range(8)
        for size, n in (("big", 2**18), ("small", 9))
    }
    described = ArrayBackend().describe(state)
    plan = rank_plan(merge([structure_of(described)], [0]), described.leaves, 0)
    is_eager = [described.leaves[p.leaf].fence == 0 for p in plan.payloads]
    assert is_eager == [False] * 4 + [True] * 8 + [False] * 4


def test_ranks_that_hold_different_arrays_under_one_key_are_named() -> None:
    trees = [tree(0, {"w": np.zeros(4)}, None), tree(1, {"w": np.zeros(5)}, None)]
    with pytest.raises(StateMismatchError, match=r"'w'.*float64\[5\].*float64\[4\]"):
        merge([structure_of(t) for t in trees], [0, 1])


def test_copies_on_separate_submeshes_are_replicas() -> None:
    value = np.arange(40.0).reshape(10, 4)
    trees = []
    for rank in range(4):
        layout = MeshLayout((2,), (rank % 2, rank % 2 + 2), ((0,),))
        trees.append(ArrayBackend().describe({"w": shard_of(value, layout, rank)}))
    plan = merge([structure_of(t) for t in trees], [0, 1, 2, 3])
    payloads = [rank_plan(plan, t.leaves, r).payloads for r, t in enumerate(trees)]
    assert sum(p.nbytes for of_rank in payloads for p in of_rank) == value.nbytes


def test_slices_of_a_mesh_are_joined_into_the_mesh() -> None:
    """Norms of FSDP under tensor parallelism: two numbers for the ranks, however many there are."""
    value = np.arange(40.0).reshape(10, 4)
    trees = []
    for rank in range(64):
        layout = MeshLayout((8,), tuple(range(rank % 8, 64, 8)), ((0,),))
        trees.append(ArrayBackend().describe({"w": shard_of(value, layout, rank)}))
    plan = merge([structure_of(t) for t in trees], list(range(64)))
    assert [column.rank_runs for column in plan.layouts] == [[0, 64]]
    payloads = [rank_plan(plan, t.leaves, r).payloads for r, t in enumerate(trees)]
    assert sum(p.nbytes for of_rank in payloads for p in of_rank) == value.nbytes


def test_a_gap_between_irregular_boxes_is_named() -> None:
    value = np.zeros((4, 4))
    rows = MeshLayout((2,), (0, 1), ((0,),))
    part = shard_of(value, rows, 0)
    described = ArrayBackend().describe({"w": Sharded((4, 4), "boxes", part.parts)})
    with pytest.raises(StateMismatchError, match="8 of 16 elements"):
        merge([structure_of(described)], [0])
