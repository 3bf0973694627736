"""Every coordination store keeps the promises of the seam."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.coord.base import AbortedWaitError, Coord, wait_for
from shardckpt.coord.file import FileCoord, _safe_name
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
    clock = iter(range(1000))
    waits: list[float] = []

    def wait() -> bytes:
        return wait_for(
            coord,
            "report/1",
            what="rank 1's report of step 7",
            timeout_s=5,
            abort_key="abort",
            monotonic=lambda: float(next(clock)),
            sleep=waits.append,
        )

    with pytest.raises(DeadlineError, match="waited 5 s for rank 1's report of step 7"):
        wait()
    assert len(waits) == 4
    coord.set("abort", b"rank 2 failed")
    with pytest.raises(AbortedWaitError) as caught:
        wait()
    assert caught.value.value == b"rank 2 failed"
    coord.set("report/1", b"fine")
    assert wait() == b"fine"


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
