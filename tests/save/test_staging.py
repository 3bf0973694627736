"""Copies beside the training: what is saved is the state at save(), or the save fails."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from shardckpt import native
from shardckpt.errors import StagingMemoryError, TornCopyError
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load.loader import LoadOptions
from shardckpt.options import Staging
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.arrays import Fenced, Sharded, shard_of
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.testing.jobs import JobOptions, ThreadJob, raised

if TYPE_CHECKING:
    from pathlib import Path

    from shardckpt.checkpointer import CheckpointerCore
    from shardckpt.native import Engine
    from shardckpt.save.handle import SaveHandle

pytestmark = pytest.mark.skipif(not native.IS_NATIVE, reason="the pure path copies inside save()")
_WAIT_S = 20.0
_ROWS, _COLUMNS = 600, 4096  # Of float32 on each rank: more than an extent.


def _storage(place: Path, *faults: Fault) -> LocalStorage:
    return LocalStorage(place, ops=FaultyFileOps(*faults, inner=PosixFileOps(flush=False)))


def _quick(place: Path) -> LocalStorage:
    """Return a store whose writes stay in native code."""
    return LocalStorage(place, ops=PosixFileOps(flush=False))


def _job(place: Path, world_size: int, **options: object) -> ThreadJob:
    return ThreadJob([_quick(place)] * world_size, JobOptions(**options))  # type: ignore[arg-type]


def _weights(rank: int, world_size: int, seed: int = 1) -> Sharded:
    rng = np.random.default_rng(seed)
    layout = MeshLayout((world_size,), tuple(range(world_size)), ((0,),))
    return shard_of(rng.standard_normal((_ROWS * world_size, _COLUMNS), np.float32), layout, rank)


def _state(rank: int, world_size: int, num_more: int = 0) -> dict[str, object]:
    more = {f"more {i}": Fenced(_weights(rank, world_size, 9 + i), 1) for i in range(num_more)}
    return more | {
        "backwards": np.arange(5000)[::-1],
        "bias": np.full(33, 7.0),
        "moment": Fenced(_weights(rank, world_size, 2), 2),
        "step": Fenced(np.array([3]), 1),
        "weight": Fenced(_weights(rank, world_size), 1),
    }


def _arrays(state: dict[str, object]) -> dict[str, np.ndarray]:
    found = {}
    for key, value in state.items():
        inner = value.value if isinstance(value, Fenced) else value
        found[key] = inner.parts[0][1] if isinstance(inner, Sharded) else inner
    return found  # type: ignore[return-value]


def _change(state: dict[str, object], *keys: str) -> None:
    for key, array in _arrays(state).items():
        if not keys or key in keys:
            array += 1


def _engine(core: CheckpointerCore) -> Engine:
    saver = core._saver
    assert saver is not None
    return saver._engine


def _pause(job: ThreadJob, *, is_paused: bool = True) -> None:
    raised(job.each(lambda core, _: _engine(core).set_paused(is_paused)))


def _assert_restores(job: ThreadJob, step: int, num_more: int = 0) -> None:
    """The step holds what `_state` gives."""

    def restore(core: CheckpointerCore, rank: int) -> None:
        state = _state(rank, job.world_size, num_more)
        wanted = {key: array.copy() for key, array in _arrays(state).items()}
        for array in _arrays(state).values():
            array[...] = -5
        core.restore(state, step=step, options=LoadOptions(), fallback=False)
        for key, array in _arrays(state).items():
            assert np.array_equal(array, wanted[key]), key

    raised(job.each(restore))


class _Gate:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, call: Call) -> None:
        del call
        self.reached.set()
        assert self.open.wait(_WAIT_S)


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_was_saved_is_the_state_at_save_though_all_changes_after_the_fence(
    tmp_path: Path, world_size: int
) -> None:
    """Arrays without a fence may change as soon as save() returns, others after their fence."""
    job = _job(tmp_path / "store", world_size)
    _pause(job)

    def save(core: CheckpointerCore, rank: int) -> SaveHandle:
        state = _state(rank, world_size)
        handle = core.save(1, state)
        _change(state, "backwards", "bias")
        assert core.is_staging
        assert not handle.staged.done()
        core.fence(1)
        _change(state, "step", "weight")
        assert core.is_staging
        core.fence()
        assert not core.is_staging
        assert handle.staged.done()
        _change(state, "moment")
        return handle

    handles = raised(job.each(save))
    assert [handle.wait() for handle in handles] == [True] * world_size
    assert all(handle.fence_s > 0 for handle in handles)
    _assert_restores(job, 1)
    assert job.close() == [None] * world_size


def test_save_copies_nothing_that_a_fence_protects(tmp_path: Path) -> None:
    """With the copy threads held up, only what has no fence was copied when save() returns."""
    job = _job(tmp_path / "store", 1, staging=Staging(staging_bytes=64 << 20))
    _pause(job)
    before = np.zeros((20 << 20) // 8)

    def save(core: CheckpointerCore, _: int) -> None:
        core.save(1, {"early": np.zeros(5), "late": Fenced(before)})
        num_slots, num_free, _ = _engine(core).stats()
        # The last extent holds `early` and the end of `late`; it may even be written by now.
        assert num_slots - num_free <= 1
        assert core.is_staging

    raised(job.each(save))
    _pause(job, is_paused=False)
    assert job.close() == [None]


def test_arrays_that_are_freed_after_save_are_kept_until_they_are_copied(tmp_path: Path) -> None:
    """The engine holds on to what it will read."""
    job = _job(tmp_path / "store", 1)
    _pause(job)
    state = _state(0, 1)
    handle = raised(job.each(lambda core, _: core.save(1, state)))[0]
    state.clear()
    gc.collect()
    _pause(job, is_paused=False)
    assert handle.wait() is True
    _assert_restores(job, 1)
    assert job.close() == [None]


def test_a_torn_copy_fails_on_all_ranks_naming_the_key_and_later_saves_block(
    tmp_path: Path,
) -> None:
    """One rank changed one array without a fence."""
    job = _job(tmp_path / "store", 3)
    _pause(job)
    states = [_state(rank, 3) for rank in range(3)]
    handles = raised(job.each(lambda core, rank: core.save(1, states[rank])))
    _change(states[1], "moment")
    _pause(job, is_paused=False)
    outcomes = job.each(lambda _, rank: handles[rank].wait())
    assert [type(outcome) for outcome in outcomes] == [TornCopyError] * 3
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "key 'moment'" in str(outcomes[0])
    assert "rank 1" in str(outcomes[0])
    assert [type(o) for o in job.each(lambda core, _: core.wait())] == [TornCopyError] * 3
    _pause(job)

    def save_blocking(core: CheckpointerCore, rank: int) -> SaveHandle:
        state = _state(rank, 3)
        handle = core.save(2, state)
        assert not core.is_staging
        _change(state)
        return handle

    assert [handle.wait() for handle in raised(job.each(save_blocking))] == [True] * 3
    _assert_restores(job, 2)
    assert job.close() == [None] * 3


def test_a_counter_that_moves_alone_is_a_torn_copy(tmp_path: Path) -> None:
    """A step of sparse updates may miss every witness, but it counts."""
    job = _job(tmp_path / "store", 1)
    _pause(job)
    state = _state(0, 1)
    handle = raised(job.each(lambda core, _: core.save(1, state)))[0]
    # Of `weight`, one element that no witness holds.
    _arrays(state)["weight"][1, 1000] += 1
    _arrays(state)["step"] += 1
    _pause(job, is_paused=False)
    with pytest.raises(TornCopyError, match="key 'step'"):
        handle.wait()
    assert [type(o) for o in job.close()] == [TornCopyError]


def test_debugging_finds_a_change_that_no_witness_sees(tmp_path: Path) -> None:
    for check_copies in (False, True):
        job = _job(tmp_path / str(check_copies), 1, staging=Staging(check_copies=check_copies))
        _pause(job)
        state = _state(0, 1)
        handle = raised(job.each(lambda core, _, state=state: core.save(1, state)))[0]
        _arrays(state)["weight"][1, 1000] += 1
        _pause(job, is_paused=False)
        if not check_copies:
            assert handle.wait() is True
            assert job.close() == [None]
            continue
        with pytest.raises(TornCopyError, match="key 'weight'"):
            handle.wait()
        assert [type(o) for o in job.close()] == [TornCopyError]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("on_busy", ["wait", "skip"])
def test_a_ring_smaller_than_the_state_saves_it_whole(
    tmp_path: Path, world_size: int, on_busy: str
) -> None:
    """Saves then wait for the disk; none is skipped while nothing is under way."""
    staging = Staging(staging_bytes=16 << 20)
    job = _job(tmp_path / "store", world_size, staging=staging, on_busy=on_busy)

    num_more = 1  # 28 MiB on every rank.

    def save(core: CheckpointerCore, rank: int) -> list[bool]:
        outcomes = []
        for step in (1, 2, 3):
            state = _state(rank, world_size, num_more)
            handle = core.save(step, state)
            core.fence()
            _change(state)
            outcomes.append(handle)
        return [handle.wait() for handle in outcomes]

    outcomes = raised(job.each(save))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    if on_busy == "wait":
        assert outcomes[0] == [True] * 3
    assert outcomes[0][0] is True
    newest = max(step for step, saved in zip((1, 2, 3), outcomes[0], strict=True) if saved)
    _assert_restores(job, newest, num_more)
    assert [_engine(core).stats()[0] for core in job._cores] == [2] * world_size
    assert job.close() == [None] * world_size


def test_two_saves_in_flight_commit_in_order_and_a_failure_comes_at_the_same_later_call(
    tmp_path: Path,
) -> None:
    """Save 1 fails while save 2 is queued; outcomes are told in order, alike on all ranks."""
    gate = _Gate()
    held = Fault(gate, op="write_at", path="*/step-*1.*/rank-00001.0.shard", first=2)
    failing = Fault(28, op="write_at", path="*/step-*1.*/rank-00001.0.shard", first=2)
    storages = [
        _storage(tmp_path / "store", *([held, failing] if r == 1 else [])) for r in range(2)
    ]
    job = ThreadJob(storages)
    first = raised(job.each(lambda core, rank: core.save(1, _state(rank, 2))))
    raised(job.each(lambda core, _: core.fence()))
    second = raised(job.each(lambda core, rank: core.save(2, _state(rank, 2))))
    assert gate.reached.wait(_WAIT_S)
    assert not any(handle.committed.done() for handle in (*first, *second))
    gate.open.set()
    assert [handle.wait() for handle in second] == [True] * 2
    assert all(handle.committed.done() for handle in first)
    third = job.each(lambda core, rank: core.save(3, _state(rank, 2)))
    assert all(isinstance(outcome, OSError) for outcome in third), third
    assert len({str(outcome) for outcome in third}) == 1
    assert os.strerror(28) in str(third[0])
    assert raised(job.each(lambda core, rank: core.save(4, _state(rank, 2)).wait())) == [True] * 2
    assert raised(job.each(lambda core, _: core.steps())) == [[2, 4]] * 2
    assert job.close() == [None] * 2


def test_a_failure_that_save_raises_does_not_confuse_the_next_decision_to_skip(
    tmp_path: Path,
) -> None:
    """The decision of the call that raised must not be taken for the next call's."""
    gate = _Gate()
    failing = Fault(5, op="write_at", path="*/step-*1.*/rank-00000.0.shard", first=2)
    held = Fault(gate, op="link", path="*/step-*2.*/MANIFEST.json")
    job = ThreadJob(
        [_storage(tmp_path / "store", failing, held), _storage(tmp_path / "store")],
        JobOptions(on_busy="skip"),
    )
    first = raised(job.each(lambda core, rank: core.save(1, _state(rank, 2))))
    raised(job.each(lambda core, _: core.fence()))
    for handle in first:
        assert isinstance(handle.committed.exception(_WAIT_S), OSError)
    second = raised(job.each(lambda core, rank: core.save(2, _state(rank, 2))))
    assert gate.reached.wait(_WAIT_S)
    # Not busy, so it waits for the first one's outcome, and raises that.
    raising = job.each(lambda core, rank: core.save(3, _state(rank, 2)))
    assert all(isinstance(outcome, OSError) for outcome in raising), raising
    third = raised(job.each(lambda core, rank: core.save(4, _state(rank, 2))))
    fourth = raised(job.each(lambda core, rank: core.save(5, _state(rank, 2)).wait()))
    assert fourth == [False] * 2
    gate.open.set()
    assert [handle.wait() for handle in (*second, *third)] == [True] * 4
    assert job.close() == [None] * 2


def test_more_staging_memory_than_there_is_is_refused_with_both_numbers(tmp_path: Path) -> None:
    limit = native.memory_limit()
    wanted = limit + (1 << 30)
    with pytest.raises(StagingMemoryError) as raised_:
        _job(tmp_path / "store", 1, staging=Staging(staging_bytes=wanted))
    assert str(wanted) in str(raised_.value)
    assert str(limit) in str(raised_.value)


class _NoRoom:
    """An engine that has no memory for a while."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.is_full = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def reserve(self, nbytes: int, most_bytes: int = 0) -> None:
        if self.is_full:
            raise OSError(12, os.strerror(12))
        self._engine.reserve(nbytes, most_bytes)


@pytest.mark.parametrize("rank_without", [0, 1])
def test_a_rank_without_memory_fails_the_save_on_all_ranks_and_asks_again_at_the_next(
    tmp_path: Path, rank_without: int
) -> None:
    job = _job(tmp_path / "store", 2)
    saver = job._cores[rank_without]._saver
    assert saver is not None
    full = _NoRoom(saver._engine)
    saver._engine = full  # type: ignore[assignment]
    handles = raised(job.each(lambda core, rank: core.save(1, _state(rank, 2))))
    outcomes = job.each(lambda core, _: core.wait())
    assert [type(outcome) for outcome in outcomes] == [StagingMemoryError] * 2, outcomes
    assert all("no room for" in str(outcome) for outcome in outcomes)
    assert all(handle.committed.done() for handle in handles)
    full.is_full = False
    assert raised(job.each(lambda core, rank: core.save(2, _state(rank, 2)).wait())) == [True] * 2
    _assert_restores(job, 2)
    assert job.close() == [None] * 2


def test_a_coordinator_that_cannot_describe_its_state_tells_all_ranks_at_once(
    tmp_path: Path,
) -> None:
    """Ranks whose structure is not new have staged already, and wait for an outcome."""
    job = _job(tmp_path / "store", 2, timeout_s=30.0)
    assert raised(job.each(lambda core, rank: core.save(1, _state(rank, 2)).wait())) == [True] * 2

    def save(core: CheckpointerCore, rank: int) -> SaveHandle:
        state = _state(rank, 2)
        return core.save(2, state if rank else state | {"odd": object()})

    handles = raised(job.each(save))
    errors = [handle.committed.exception(_WAIT_S) for handle in handles]
    assert len({type(error) for error in errors}) == 1, errors
    assert all("odd" in str(error) for error in errors)
    assert len(job.each(lambda core, _: core.wait())) == 2
    assert raised(job.each(lambda core, rank: core.save(3, _state(rank, 2)).wait())) == [True] * 2
    assert job.close() == [None] * 2


def test_a_store_without_descriptors_is_written_by_the_saver_itself() -> None:
    """Objects in memory, or in a bucket."""
    job = ThreadJob([MemoryStorage()], JobOptions(staging=Staging(staging_bytes=16 << 20)))
    assert raised(job.each(lambda core, rank: core.save(1, _state(rank, 1)).wait())) == [True]
    _assert_restores(job, 1)
    assert job.close() == [None]


def test_the_saver_keeps_no_array_once_all_are_copied(tmp_path: Path) -> None:
    """Memory of the training is not held until the commit."""
    gate = _Gate()
    job = ThreadJob([_storage(tmp_path / "store", Fault(gate, op="link", path="*/MANIFEST.json"))])
    array = np.ones(1 << 20)
    before = sys.getrefcount(array)
    raised(job.each(lambda core, _: core.save(1, {"weight": Fenced(array)})))
    raised(job.each(lambda core, _: core.fence()))
    assert gate.reached.wait(_WAIT_S)
    gc.collect()
    assert sys.getrefcount(array) == before
    gate.open.set()
    assert job.close() == [None]


def test_memory_does_not_grow_over_fifty_saves(tmp_path: Path) -> None:
    job = _job(tmp_path / "store", 1)
    state = {"weight": Fenced(np.ones(4 << 17)), "bias": np.ones(9)}  # 4 MiB.

    def save(core: CheckpointerCore, _: int) -> int:
        for step in range(50):
            core.save(step, state)
            core.fence()
            state["weight"].value[:] += 1  # type: ignore[attr-defined]
            if step == 9:
                core.wait()
                before = _resident_bytes()
        core.wait()
        return _resident_bytes() - before

    grown = raised(job.each(save))[0]
    assert grown < 8 << 20, grown
    assert job.close() == [None]


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_EQUAL = """
import sys
from unittest import mock
sys.path.insert(0, sys.argv[1])
import make
from shardckpt import native
from shardckpt.format.root import attempt_name
same = lambda step, epoch, nonce: attempt_name(step, epoch, "0" * 32)
with mock.patch("shardckpt.catalog.store.attempt_name", same):
    make.make(sys.argv[2])
print(native.IS_NATIVE)
"""


def test_the_pure_path_writes_the_same_shard_bytes(tmp_path: Path) -> None:
    golden = os.path.join(os.path.dirname(__file__), "..", "golden")
    shards = []
    for pure in ("0", "1"):
        place = tmp_path / pure
        done = subprocess.run(
            [sys.executable, "-c", _EQUAL, golden, str(place)],
            env={
                **os.environ,
                "SHARDCKPT_PURE_PYTHON": pure,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(pure == "0")]
        shards.append(
            {str(path.relative_to(place)): path.read_bytes() for path in place.glob("*/rank-*")}
        )
    assert len(shards[0]) == 2
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"staging_bytes": 1}, "staging_bytes is 1;"),
        ({"write_bytes_per_s": 1 << 19}, "write_bytes_per_s is 524288;"),
        ({"max_inflation": 1.0}, r"max_inflation is 1\.0;"),
        ({"cpus": (0, -1)}, r"cpus is \[0, -1\];"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Staging(**options)


@pytest.mark.parametrize("on_busy", ["wait", "skip"])
def test_a_storage_slower_than_the_interval_is_said_once(
    tmp_path: Path, on_busy: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "shardckpt")
    gate = _Gate()
    held = Fault(gate, op="link", path="*/step-*1.*/MANIFEST.json")
    job = ThreadJob(
        [_storage(tmp_path / "store", held), _storage(tmp_path / "store")],
        JobOptions(on_busy=cast("Any", on_busy)),
    )

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if "slower" in r.msg or "longer" in r.msg]

    def open_once_told() -> None:
        deadline = time.monotonic() + _WAIT_S
        while not told() and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.open.set()

    def save_all(core: CheckpointerCore, rank: int) -> list[bool]:
        handles = [core.save(1, _state(rank, 2))]
        if rank == 0:
            assert gate.reached.wait(_WAIT_S)
        handles.append(core.save(2, _state(rank, 2)))
        # With "wait" the third returns only when the first is committed.
        opens = threading.Thread(target=open_once_told)
        opens.start()
        handles += [core.save(step, _state(rank, 2)) for step in (3, 4)]
        opens.join()
        return [handle.wait() for handle in handles]

    outcomes = raised(job.each(save_all))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][:2] == [True, True]
    assert len(told()) == 1, told()
    assert "the storage takes longer than the interval between saves" in told()[0]
    assert job.close() == [None] * 2
