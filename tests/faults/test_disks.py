"""Disks that are full, read-only or failing: a save fails on all ranks, the old step stays."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from shardckpt.errors import SaveFailedError, StorageError
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import Fault, FaultyFileOps
from shardckpt.testing.jobs import ThreadJob, state_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.crash


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _storage(place: Path, *faults: Fault) -> tuple[LocalStorage, FaultyFileOps]:
    ops = FaultyFileOps(*faults, inner=PosixFileOps(flush=False))
    return LocalStorage(place, ops=ops), ops


def _same_error(outcomes: list[bool | BaseException]) -> StorageError | SaveFailedError:
    """Return the one error that all ranks raised, in the same words."""
    first = outcomes[0]
    assert isinstance(first, (StorageError, SaveFailedError)), first
    assert {(type(o), str(o)) for o in outcomes} == {(type(first), str(first))}
    return first


def test_a_full_disk_fails_the_save_on_all_ranks_and_the_next_one_works_with_room(
    small_disk: Path,
) -> None:
    """The step before stays the newest, and a failed save's own garbage does not keep it full."""
    store = small_disk / "store"
    job = ThreadJob([LocalStorage(store) for _ in range(3)])
    assert job.save(1) == [True] * 3
    filler = small_disk / "filler"
    room = os.statvfs(small_disk)
    filler.write_bytes(b"x" * (room.f_bavail * room.f_frsize - (16 << 10)))
    error = _same_error(job.save(2))
    assert os.strerror(errno.ENOSPC) in str(error)
    assert "rank" in str(error)
    assert job.restored_step() == 1
    filler.unlink()
    assert job.save(3) == [True] * 3
    assert job.restored_step() == 3
    assert job.close() == [None] * 3
    # Only what is committed is left.
    assert {name[:17] for name in os.listdir(store) if name.startswith("step")} == {
        "step-000000000001",
        "step-000000000003",
    }


@pytest.mark.parametrize("op", ["fdatasync", "close", "write_at", "fallocate", "fsync_dir", "open"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_error_of_a_writer_reaches_all_ranks_and_is_never_tried_again(
    tmp_path: Path, op: str, rank: int
) -> None:
    """A failed flush may have dropped the bytes: trying it again would lie."""
    path = "*/step-*2.*/rank-*.shard" if op != "fsync_dir" else "*/step-*2.*"
    pairs = [
        _storage(tmp_path / "store", *([Fault(errno.EIO, op=op, path=path)] if r == rank else []))
        for r in range(3)
    ]
    job = ThreadJob([storage for storage, _ in pairs])
    assert job.save(1) == [True] * 3
    error = _same_error(job.save(2))
    assert os.strerror(errno.EIO) in str(error)
    assert f"rank {rank}" in str(error) or f"rank-{rank:05}" in str(error) or rank == 0
    attempt_calls = [
        call.path for call in pairs[rank][1].calls
        if call.op == op and "step-000000000002" in call.path and
        (op == "fsync_dir" or call.path.endswith(".shard"))
    ]  # fmt: skip
    if op in ("fdatasync", "fsync_dir"):
        assert len(attempt_calls) == 1, attempt_calls
    assert job.restored_step() == 1
    assert job.save(2) == [True] * 3
    assert job.restored_step() == 2
    assert job.close() == [None] * 3


@pytest.mark.parametrize(
    ("op", "path"),
    [("fdatasync", "*/step-*2.*/*"), ("link", "*/MANIFEST.json"), ("write_at", "*/step-*2.*/.*")],
)
def test_a_manifest_that_cannot_be_written_fails_the_save_on_all_ranks(
    tmp_path: Path, op: str, path: str
) -> None:
    """The shards are there, and still nothing is committed."""
    # The first save links a manifest too.
    fault = Fault(errno.EIO, op=op, path=path, first=2 if op == "link" else 1)
    pairs = [_storage(tmp_path / "store", *([fault] if r == 0 else [])) for r in range(2)]
    job = ThreadJob([storage for storage, _ in pairs])
    assert job.save(1) == [True] * 2
    assert os.strerror(errno.EIO) in str(_same_error(job.save(2)))
    assert job.restored_step() == 1
    assert job.save(3) == [True] * 2
    assert job.close() == [None] * 2


def test_one_failed_put_of_the_root_costs_nothing(tmp_path: Path) -> None:
    """The log is read again and the put repeated: a lost answer is no lost step."""
    for when in ("before", "after"):
        fault = Fault(errno.EIO, op="link", path="*/roots/*", first=3, when=when)  # type: ignore[arg-type]
        storage, _ = _storage(tmp_path / when, fault)
        job = ThreadJob([storage])
        assert job.save(1) == [True]
        assert job.restored_step() == 1
        assert job.close() == [None]


def test_a_read_only_store_fails_at_opening_and_says_so(tmp_path: Path) -> None:
    """Before any training, not at the first save."""
    storage, _ = _storage(tmp_path / "store")
    job = ThreadJob([storage])
    assert job.save(1) == [True]
    assert job.close() == [None]
    read_only = Fault(errno.EROFS, op="link", times=None)
    opens = Fault(errno.EROFS, op="open", path="*/.*", times=None)
    with pytest.raises(StorageError, match=os.strerror(errno.EROFS)):
        ThreadJob([_storage(tmp_path / "store", read_only, opens)[0] for _ in range(2)])
    job = ThreadJob([storage])
    assert job.restored_step() == 1
    assert job.close() == [None]


def test_a_store_path_that_is_a_file_is_refused_on_all_ranks_and_left_alone(tmp_path: Path) -> None:
    """The error names the path."""
    place = tmp_path / "store"
    place.write_text("mine")
    with pytest.raises(StorageError, match="store"):
        ThreadJob([_storage(place)[0] for _ in range(2)])
    assert place.read_text() == "mine"


def test_a_failed_save_is_reported_once_and_the_next_call_saves(tmp_path: Path) -> None:
    """A job that never waits learns of it at its next save, on every rank at the same call."""
    fault = Fault(errno.EIO, op="write_at", path="*/rank-00001.0.shard")
    job = ThreadJob([_storage(tmp_path / "store", fault)[0] for _ in range(2)])
    queued = job.each(lambda core, rank: core.save(1, state_at(1, rank, 2)) is not None)
    assert queued == [True] * 2
    error = _same_error(job.save(2))
    assert os.strerror(errno.EIO) in str(error)
    assert job.save(2) == [True] * 2
    assert job.close() == [None] * 2
