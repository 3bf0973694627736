"""Who reads what: every rank gets every byte once, and storage gives every byte once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.catalog.store import Catalog
from shardckpt.checkpointer import load_once
from shardckpt.coord.single import SingleCoord
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.geometry.box import Box
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load.exchange import (
    BATCH_BYTES,
    SLOT_BYTES,
    Batch,
    Wants,
    assign,
    chunks_in,
    files_of,
    split_plan,
    wants_of,
)
from shardckpt.load.loader import LoadOptions
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.plan import LoadPlan, Piece, Wanted, plan_load
from shardckpt.load.together import Together
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.arrays import ArrayBackend, Sharded, shard_of
from shardckpt.testing.coords import MemoryCoordHub
from shardckpt.testing.jobs import JobOptions, open_job, raised, run_threads

Arrays = dict[str, np.ndarray]


def _layouts(world_size: int) -> list[MeshLayout | None]:
    """Return rows, columns, both ways of a mesh of two axes, and whole copies."""
    ranks = tuple(range(world_size))
    found: list[MeshLayout | None] = [
        MeshLayout((world_size,), ranks, ((0,),)),
        MeshLayout((world_size,), ranks, ((), (0,))),
        None,
    ]
    if world_size % 2 == 0:
        mesh = (2, world_size // 2)
        found += [MeshLayout(mesh, ranks, ((1,),)), MeshLayout(mesh, ranks, ((0,), (1,)))]
    return found


@st.composite
def _jobs(draw: st.DrawFn, most_ranks: int) -> list[MeshLayout | None]:
    """Return one layout per array, all on the same ranks; the first entry is never None."""
    world_size = draw(st.integers(1, most_ranks))
    layouts = _layouts(world_size)
    return [layouts[0], *(draw(st.sampled_from(layouts)) for _ in range(3))]


@st.composite
def _arrays(draw: st.DrawFn) -> Arrays:
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    found = {}
    for i in range(4):
        shape = (draw(st.integers(1, 700)), draw(st.integers(1, 400)))
        found[f"a{i}"] = rng.standard_normal(shape).astype(np.float32)
    return found


def _state(arrays: Arrays, layouts: list[MeshLayout | None], rank: int, *, blank: bool) -> dict:
    state: dict[str, object] = {}
    for (key, value), layout in zip(arrays.items(), layouts, strict=True):
        if layout is None:
            state[key] = np.full_like(value, -1) if blank else value
            continue
        part = shard_of(value, layout, rank)
        if blank:
            for _, memory in part.parts:
                memory[...] = -1
        state[key] = part
    return state


def _world(layouts: list[MeshLayout | None]) -> int:
    assert layouts[0] is not None
    return len(layouts[0].ranks)


def _saved(arrays: Arrays, layouts: list[MeshLayout | None]) -> MemoryStorage:
    storage = MemoryStorage()
    hub = MemoryCoordHub(_world(layouts))

    def save(rank: int) -> None:
        core = open_job(storage, hub.coord(rank), JobOptions())
        core.save(1, _state(arrays, layouts, rank, blank=False))
        core.close()

    raised(run_threads(hub.world_size, save))
    return storage


def _open(storage: MemoryStorage) -> OpenCheckpoint:
    entry = Catalog(storage, writer="test").newest().latest
    assert entry is not None
    return OpenCheckpoint(storage, entry.attempt, entry.manifest)


def _plan(checkpoint: OpenCheckpoint, state: dict[str, object]) -> LoadPlan:
    backend = ArrayBackend()
    wanted = []
    for key, value in state.items():
        parts = (
            value.parts
            if isinstance(value, Sharded)
            else ((Box((0,) * value.ndim, value.shape), value),)
        )
        wanted += [
            Wanted(checkpoint.tensors[key], box, backend.host_array(memory))
            for box, memory in parts
            if box.num_elements
        ]
    return plan_load(checkpoint, wanted)


def _chunks(pieces: list[Piece]) -> Counter[tuple[object, ...]]:
    """Count the chunks of pieces, each with where it goes."""
    return Counter(
        (
            piece.payload.key, piece.payload.box, piece.payload.start, start, id(piece.wanted),
            piece.direct_address and piece.direct_address + start - piece.start,
        )
        for piece in pieces
        for start in range(piece.start, piece.stop, CHUNK_BYTES)
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(_arrays(), _jobs(3), _jobs(5), st.integers(1, 3), st.booleans())
def test_every_chunk_is_delivered_once_and_read_once(
    arrays: Arrays,
    saved: list[MeshLayout | None],
    loaded: list[MeshLayout | None],
    num_hosts: int,
    spans: bool,
) -> None:
    checkpoint = _open(_saved(arrays, saved))
    world_size = _world(loaded)
    hosts = [f"host {rank % num_hosts}" for rank in range(world_size)]
    states = [_state(arrays, loaded, rank, blank=True) for rank in range(world_size)]
    plans = [_plan(checkpoint, state) for state in states]
    lists = [wants_of(plan) for plan in plans]
    batches = assign(lists, range(world_size), hosts, spans=spans)
    read: list[set[tuple[str, int]]] = []
    wanted: list[set[tuple[str, int]]] = []
    for rank, plan in enumerate(plans):
        mine = [batch for batch in batches if batch.provider_for(rank) is not None]
        left, copied = split_plan(plan, mine)
        _check_split(plan, left, copied, mine)
        wanted.append(_places(plan))
        read.append(_places(left) | _read_by(rank, batches, plan))
    for domain in [range(world_size)] if spans else _domains(hosts):
        plain = sum(len(wanted[rank]) for rank in domain)
        together = set().union(*(wanted[rank] for rank in domain))
        actual = sum(len(read[rank]) for rank in domain)
        assert set().union(*(read[rank] for rank in domain)) == together
        if batches:
            assert actual == len(together)
        else:
            assert actual == plain
    if not batches:
        # Each domain alone may be below the bound; all of them are.
        sizes = [_sizes(plan) for plan in plans]
        unique = 0
        for domain in [range(world_size)] if spans else _domains(hosts):
            together_sizes: dict[tuple[str, int], int] = {}
            for rank in domain:
                together_sizes.update(sizes[rank])
            unique += sum(together_sizes.values())
        excess = sum(sum(of_rank.values()) for of_rank in sizes) - unique
        assert excess <= 4 * CHUNK_BYTES or excess <= 0.05 * unique


def _check_split(
    plan: LoadPlan,
    left: LoadPlan,
    copied: dict[int, list[tuple[Piece, int]]],
    batches: list[Batch],
) -> None:
    """Nothing is lost or doubled, and what is copied lies in the slot where it is read to."""
    pieces = [piece for read in left.reads for piece in read.pieces]
    pieces += [piece for found in copied.values() for piece, _ in found]
    assert _chunks(pieces) == _chunks([piece for read in plan.reads for piece in read.pieces])
    files = files_of(plan)
    for batch in batches:
        slot: dict[tuple[str, object, int, int], int] = {}
        end = 0
        for extent in batch.extents:
            assert extent.at >= end
            assert (extent.at - extent.start) % 4096 == 0
            for payload, low, high in chunks_in(files[extent.file], extent):
                for start in range(low, high, CHUNK_BYTES):
                    at = extent.at + payload.offset + start - extent.start
                    slot[payload.key, payload.box, payload.start, start] = at
                end = extent.at + payload.offset + high - extent.start
        assert end <= BATCH_BYTES + CHUNK_BYTES < SLOT_BYTES
        for piece, place in copied.get(batch.index, ()):
            for start in range(piece.start, piece.stop, CHUNK_BYTES):
                name = (piece.payload.key, piece.payload.box, piece.payload.start, start)
                assert slot[name] == place + start - piece.start


def _places(plan: LoadPlan) -> set[tuple[str, int]]:
    return set(_sizes(plan))


def _sizes(plan: LoadPlan) -> dict[tuple[str, int], int]:
    """Return the bytes of every chunk that a plan reads, by file and place."""
    return {
        (read.file.key, piece.payload.offset + start): min(CHUNK_BYTES, piece.stop - start)
        for read in plan.reads
        for piece in read.pieces
        for start in range(piece.start, piece.stop, CHUNK_BYTES)
    }


def _read_by(rank: int, batches: tuple[Batch, ...], plan: LoadPlan) -> set[tuple[str, int]]:
    files = files_of(plan)
    found: list[tuple[str, int]] = []
    for batch in batches:
        if batch.reader != rank:
            continue
        for extent in batch.extents:
            for payload, low, high in chunks_in(files[extent.file], extent):
                found += [
                    (files[extent.file].key, payload.offset + start)
                    for start in range(low, high, CHUNK_BYTES)
                ]
    assert len(found) == len(set(found))
    return set(found)


def _domains(hosts: list[str]) -> list[list[int]]:
    return [[r for r, h in enumerate(hosts) if h == host] for host in dict.fromkeys(hosts)]


@settings(max_examples=20, deadline=None)
@given(_arrays(), _jobs(3), _jobs(5), st.integers(1, 2), st.booleans())
def test_ranks_that_exchange_get_every_value(
    arrays: Arrays,
    saved: list[MeshLayout | None],
    loaded: list[MeshLayout | None],
    num_hosts: int,
    transactional: bool,
) -> None:
    storage = _saved(arrays, saved)
    hub = MemoryCoordHub(_world(loaded))
    states = [_state(arrays, loaded, rank, blank=True) for rank in range(hub.world_size)]
    raised(
        run_threads(
            hub.world_size,
            lambda rank: load_once(
                storage, ArrayBackend(), hub.coord(rank), states[rank], step=None,
                options=LoadOptions(transactional=transactional), timeout_s=20, namespace="load",
                environment={}, together=Together(host=f"test {rank % num_hosts}"),
            ),
        )
    )  # fmt: skip
    for rank, state in enumerate(states):
        wanted = _state(arrays, loaded, rank, blank=False)
        for key, value in state.items():
            assert _bytes(value) == _bytes(wanted[key]), (rank, key)


def _bytes(value: object) -> list[bytes]:
    if isinstance(value, Sharded):
        return [memory.tobytes() for _, memory in value.parts]
    assert isinstance(value, np.ndarray)
    return [value.tobytes()]


def _whole(nbytes: int) -> Wants:
    return Wants([0], [0], [4096], [4096 + nbytes])


def test_replicas_read_equal_shares() -> None:
    nbytes = 100 << 20
    batches = assign([_whole(nbytes)], [0] * 8, ["host"] * 8, spans=False)
    shares = Counter[int]()
    for batch in batches:
        shares[batch.reader] += sum(extent.stop - extent.start for extent in batch.extents)
    assert sum(shares.values()) == nbytes
    assert max(shares.values()) <= nbytes / 8 * 1.1


def test_who_reads_more_for_itself_reads_less_for_others() -> None:
    shared = 8 << 20
    lists = [Wants([0, 1], [0, 0], [4096] * 2, [4096 + shared, 4096 + (64 << 20)]), _whole(shared)]
    batches = assign(lists, [0, 1], ["host"] * 2, spans=False)
    assert batches[0].reader == 1


@pytest.mark.parametrize(("nbytes", "is_shared"), [(CHUNK_BYTES, False), (CHUNK_BYTES * 8, True)])
def test_a_few_chunks_are_read_twice_rather_than_exchanged(nbytes: int, is_shared: bool) -> None:
    assert bool(assign([_whole(nbytes)], [0, 0], ["host"] * 2, spans=False)) is is_shared


def test_nothing_is_exchanged_with_another_host_unless_it_can_be() -> None:
    lists, hosts = [_whole(8 << 20)], ["a", "b"]
    assert assign(lists, [0, 0], hosts, spans=False) == ()
    assert {b.providers for b in assign(lists, [0, 0], hosts, spans=True)} == {
        ((0, (0,)), (1, (1,))),
        ((1, (1,)), (0, (0,))),
    }


def test_a_payload_nobody_wants_is_in_no_range() -> None:
    arrays = {f"a{i}": np.full((300,), i, np.float32) for i in range(3)}
    storage = MemoryStorage()
    core = open_job(storage, SingleCoord(), JobOptions())
    core.save(1, dict(arrays))
    core.close()
    checkpoint = _open(storage)
    outer: dict[str, object] = {key: np.zeros_like(arrays[key]) for key in ("a0", "a2")}
    all_three: dict[str, object] = {key: np.zeros_like(value) for key, value in arrays.items()}
    assert len(wants_of(_plan(checkpoint, outer)).starts) == 2
    assert len(wants_of(_plan(checkpoint, all_three)).starts) == 1
