"""Every coordination store keeps the promises of the seam."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.coord.base import AbortedWaitError, Coord, ask_again, wait_for
from shardckpt.coord.bounded import WaitingCalls
from shardckpt.coord.file import FileCoord, _safe_name
from shardckpt.coord.session import Failure, Round, RoundFailedError
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError, StorageError
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.keys import is_name
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.coords import MemoryCoordHub
from shardckpt.testing.faults import Fault, FaultyFileOps
from shardckpt.testing.ranks import RankContext, run_ranks

if TYPE_CHECKING:
    from pathlib import Path

Join = Callable[[int], Coord]
_WAIT_S = 20.0


@pytest.fixture(params=["memory-files", "files", "threads"])
def join(request: pytest.FixtureRequest, tmp_path: Path) -> Join:
    """Return what gives a rank of a world of four its coordination."""
    if request.param == "threads":
        return MemoryCoordHub(4).coord
    storage = MemoryStorage()
    if request.param == "files":
        storage = LocalStorage(tmp_path / "coord", ops=PosixFileOps(flush=False))
        storage.prepare()
    return lambda rank: FileCoord(storage, rank, 4, job="run-1")


def test_what_one_rank_sets_every_rank_gets(join: Join) -> None:
    one, other = join(0), join(3)
    assert (one.rank, one.world_size) == (0, 4)
    assert (other.rank, other.world_size) == (3, 4)
    for key, value in (("a/b", b"1"), ("a_b", b"2"), ("", b""), ("k/" * 300, b"\0\xff")):
        assert other.get(key) is None
        one.set(key, value)
        assert other.get(key) == value


def test_a_later_value_replaces_an_earlier_one(join: Join) -> None:
    one, other = join(0), join(1)
    for value in (b"1", b"longer", b""):
        one.set("k", value)
        assert other.get("k") == value


def test_a_deleted_key_is_forgotten_and_may_be_set_again(join: Join) -> None:
    one, other = join(0), join(1)
    one.set("k", b"1")
    other.delete("k")
    other.delete("k")
    assert one.get("k") is None
    other.set("k", b"2")
    assert one.get("k") == b"2"


def test_ranks_racing_for_a_key_leave_one_whole_value(join: Join) -> None:
    start = threading.Barrier(4)

    def publish(rank: int) -> None:
        coord = join(rank)
        start.wait(30)
        for _ in range(20):
            coord.set("k", bytes([rank]) * 1000)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(publish, rank) for rank in range(4)]:
            job.result(30)
    value = join(0).get("k")
    assert value in {bytes([rank]) * 1000 for rank in range(4)}


def test_waiting_ends_with_the_value_the_abort_or_the_deadline(join: Join) -> None:
    coord = join(0)

    def wait(timeout_s: float) -> bytes:
        return wait_for(
            coord,
            "report/1",
            what="rank 1's report of step 7",
            timeout_s=timeout_s,
            abort_key="abort",
        )

    with pytest.raises(DeadlineError, match=r"waited 0.1 s for rank 1's report of step 7"):
        wait(0.1)
    coord.set("abort", b"rank 2 failed")
    with pytest.raises(AbortedWaitError) as caught:
        wait(0.1)
    assert caught.value.value == b"rank 2 failed"
    coord.set("report/1", b"fine")
    assert wait(5.0) == b"fine"


def test_a_wait_ends_as_soon_as_another_rank_publishes(join: Join) -> None:
    waiting, other = join(1), join(0)
    assert waiting.wait("k", 0.01) is None
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(waiting.wait, "k", 60.0)
        other.set("k", b"now")
        assert answer.result(30) == b"now"


def test_several_keys_come_at_once_or_as_far_as_they_are_there(join: Join) -> None:
    one, other = join(0), join(1)
    one.set("a", b"1")
    assert other.get_many(["a", "b"])[1] is None
    one.set("b", b"2")
    assert other.get_many(["a", "b"]) == [b"1", b"2"]
    assert other.get_many([]) == []


def test_a_wait_that_nobody_asks_for_again_gives_its_connection_back() -> None:
    """The coordinator may get by another way what it waited for: for ever fewer could wait."""
    connections = itertools.count()
    calls = WaitingCalls(lambda: next(connections), 0)
    over = threading.Event()
    names = [f"wait {i}" for i in range(4)]
    for name in names:
        assert calls.has_room(name)
        assert calls.call(name, lambda _: over.wait(_WAIT_S), 0.01) is None
    assert not calls.has_room("another")
    over.set()
    deadline = time.monotonic() + _WAIT_S
    while not calls.has_room("another") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert calls.call("another", lambda connection: connection, _WAIT_S) in range(4)
    assert next(connections) == 4
    calls.close()


def test_asking_again_gets_rarer_up_to_a_bound() -> None:
    clock = iter(range(1000))
    pauses: list[float] = []
    value = ask_again(
        lambda _: None, "k", 30.0, monotonic=lambda: float(next(clock)), sleep=pauses.append
    )
    assert value is None
    assert len(pauses) == 29
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 0.02


def test_the_coordinator_passes_a_failure_on_to_those_who_wait_for_its_word() -> None:
    """Without it they would look for errors seldom, so as not to keep the store busy."""
    hub = MemoryCoordHub(3)
    rounds = [Round(hub.coord(rank), "job/save/0", "step 1", 60.0) for rank in range(3)]

    def wait() -> Failure:
        with pytest.raises(RoundFailedError) as caught:
            rounds[2].wait("answer", Failure, what="the answer")
        return caught.value.failure

    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        told = pool.submit(wait)
        rounds[1].fail(OSError("disk"), "answer")
        with pytest.raises(RoundFailedError) as caught:
            rounds[0].gather("hello", Failure, what="call")
        rounds[0].fail(caught.value, "answer")
        assert told.result(30) == Failure("OSError", 1, "disk")
        assert time.monotonic() - started < 1.5
    for round_ in rounds:
        round_.forget()
    assert not hub.values


def test_a_coordinator_hears_of_a_failure_where_it_waits_for_a_message() -> None:
    """Not only when it looks, and no wait is left behind."""
    hub = MemoryCoordHub(2)
    Round(hub.coord(1), "r", "step 1", 60.0).fail(OSError("disk"), "asked", gathered=("report",))
    assert hub.coord(0).get("r/asked") is None
    hub.coord(0).delete("r/error")
    round_ = Round(hub.coord(0), "r", "step 1", 60.0)
    round_.publish("report/0", Failure("a", 0, "message"))
    with pytest.raises(RoundFailedError, match="disk") as caught:
        round_.gather("report", Failure, what="report")
    assert caught.value.failure.rank == 1


def test_a_rank_that_fails_is_heard_of_where_the_coordinator_is_gone() -> None:
    hub = MemoryCoordHub(3)
    Round(hub.coord(1), "r", "step 1", 60.0).fail(OSError("disk"))
    with pytest.raises(RoundFailedError, match="disk"):
        Round(hub.coord(2), "r", "step 1", 60.0).wait("answer", Failure, what="the answer")


def test_messages_of_many_ranks_are_gathered_in_order() -> None:
    hub = MemoryCoordHub(1000)
    for rank in range(1000):
        Round(hub.coord(rank), "r", "step 1", 5.0).publish(f"hello/{rank}", Failure("", rank, ""))
    found = Round(hub.coord(0), "r", "step 1", 5.0).gather("hello", Failure, what="hello")
    assert [failure.rank for failure in found] == list(range(1000))
    hub.coord(0).delete("r/hello/300")
    hub.coord(0).delete("r/hello/999")
    with pytest.raises(DeadlineError, match=r"no hello from rank 300, 999 of 1000 within 0.1 s"):
        Round(hub.coord(0), "r", "step 1", 0.1).gather("hello", Failure, what="hello")


def test_a_world_of_one_needs_nothing_else() -> None:
    coord = SingleCoord()
    assert (coord.rank, coord.world_size) == (0, 1)
    assert coord.get("a/b") is None
    coord.set("a/b", b"1")
    coord.set("a/b", b"2")
    assert coord.get("a/b") == b"2"
    coord.delete("a/b")
    coord.delete("a/b")
    assert coord.get("a/b") is None
    coord.close()


def test_jobs_in_one_directory_do_not_see_each_other() -> None:
    storage = MemoryStorage()
    FileCoord(storage, 0, 1, job="run-1").set("k", b"old")
    assert FileCoord(storage, 0, 1, job="run-2").get("k") is None


@pytest.mark.parametrize(
    ("rank", "world_size", "job"), [(4, 4, "j"), (-1, 4, "j"), (0, 0, "j"), (0, 1, "")]
)
def test_a_rank_outside_the_world_or_a_nameless_job_is_refused(
    rank: int, world_size: int, job: str
) -> None:
    with pytest.raises(ValueError, match=r"world of|no name"):
        FileCoord(MemoryStorage(), rank, world_size, job=job)
    if job:
        with pytest.raises(ValueError, match="world of"):
            MemoryCoordHub(world_size).coord(rank)


def test_a_value_beyond_all_need_is_refused_before_it_is_written() -> None:
    storage = MemoryStorage()
    with pytest.raises(ValueError, match=r"67108865 bytes; at most 67108864"):
        FileCoord(storage, 0, 1, job="j").set("k", bytes((64 << 20) + 1))
    assert storage.list("") == []


def test_a_failing_directory_is_reported_by_set_and_get_but_not_by_delete(tmp_path: Path) -> None:
    """Deleting is best effort; the others are what agreement rests on."""
    LocalStorage(tmp_path).prepare()
    ops = FaultyFileOps(Fault(errno.EIO, times=None))
    coord = FileCoord(LocalStorage(tmp_path, ops=ops), 0, 1, job="j")
    with pytest.raises(StorageError, match="EIO"):
        coord.set("k", b"1")
    with pytest.raises(StorageError, match="EIO"):
        coord.get("k")
    coord.delete("k")


@given(st.lists(st.text(max_size=250), min_size=2, max_size=8, unique=True))
def test_different_keys_have_different_names_that_any_store_takes(keys: list[str]) -> None:
    names = [_safe_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert all(is_name(name) for name in names)


def _everybody_tells_everybody(told: RankContext) -> list[bytes]:
    storage = LocalStorage(told.directory / "coord", ops=PosixFileOps(flush=False))
    storage.prepare()
    coord = FileCoord(storage, told.rank, told.world_size, job="test")
    coord.set(f"hello/{told.rank}", str(told.rank).encode())
    return [
        wait_for(coord, f"hello/{rank}", what=f"rank {rank}", timeout_s=30)
        for rank in range(told.world_size)
    ]


@pytest.mark.multiproc
def test_processes_meet_in_a_directory() -> None:
    assert run_ranks(3, _everybody_tells_everybody) == [[b"0", b"1", b"2"]] * 3
