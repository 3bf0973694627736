"""The order of file operations that makes an object durable, and what a failing one leads to."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardckpt import native
from shardckpt.errors import StorageError
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.testing.ranks import RankContext, RankDeath, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.storage.local_files import LocalWriter

_MIB = 1 << 20
_CHANGING = (
    "mkdir", "write_at", "truncate", "fdatasync", "link", "fsync_dir", "unlink", "fallocate",
)  # fmt: skip
_BUFFER = ctypes.create_string_buffer(b"0123456789abcdef" * 256)
_ADDRESS = ctypes.addressof(_BUFFER)


def _store(place: Path, *faults: Fault) -> tuple[LocalStorage, FaultyFileOps]:
    LocalStorage(place / "store").prepare()
    ops = FaultyFileOps(*faults)
    return LocalStorage(place / "store", ops=ops), ops


def _write(storage: LocalStorage, key: str = "step/a.shard") -> LocalWriter:
    writer = storage.create(key, 4096)
    writer.write(0, _ADDRESS, 4096)
    return writer


def _order(ops: FaultyFileOps, *names: str) -> list[str]:
    return [
        f"{op} {re.sub('[.]tmp-[0-9a-f]{32}', 'TEMPORARY', name)}"
        for op, name in ops.named(*(names or _CHANGING))
    ]


# The order


def test_a_put_flushes_the_bytes_then_links_then_flushes_the_directory(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path)
    storage.put_if_absent("roots/1", b"root")
    assert _order(ops) == [
        "mkdir roots",
        "fsync_dir store",
        "write_at TEMPORARY",
        "fdatasync TEMPORARY",
        "link 1",
        "fsync_dir roots",
        "unlink TEMPORARY",
    ]


def test_a_lost_put_leaves_no_temporary(tmp_path: Path) -> None:
    storage, _ = _store(tmp_path)
    storage.put_if_absent("roots/1", b"root")
    storage.put_if_absent("roots/1", b"late")
    assert [path.name for path in Path(storage.url, "roots").iterdir()] == ["1"]


def test_a_commit_flushes_once_then_closes_then_flushes_the_directory(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path)
    _write(storage).commit(4096)
    of_file = [entry for entry in _order(ops, *_CHANGING, "close") if "close st" not in entry]
    assert of_file == [
        "mkdir step",
        "fsync_dir store",
        "fallocate a.shard",
        "write_at a.shard",
        "truncate a.shard",
        "fdatasync a.shard",
        "close a.shard",
        "fsync_dir step",
    ]


def test_a_directory_another_rank_made_is_made_durable_too(tmp_path: Path) -> None:
    """That rank may be about to fsync the parent, or dead."""
    storage, ops = _store(tmp_path)
    Path(storage.url, "step", "sub").mkdir(parents=True)
    _write(storage, "step/sub/a").commit(4096)
    _write(storage, "step/sub/b").commit(4096)
    assert _order(ops, "fsync_dir") == [
        "fsync_dir store",
        "fsync_dir step",
        "fsync_dir sub",
        "fsync_dir sub",
    ]


def test_a_directory_deleted_and_made_again_is_made_durable_again(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path)
    for _ in range(2):
        storage.put_if_absent("step/a", b"1")
        storage.delete_tree("step")
    assert _order(ops, "fsync_dir").count("fsync_dir store") == 2


def test_preparing_makes_every_new_directory_durable_in_its_parent(tmp_path: Path) -> None:
    ops = FaultyFileOps()
    LocalStorage(tmp_path / "a" / "b", ops=ops).prepare()
    assert _order(ops, "mkdir", "fsync_dir") == [
        "mkdir a",
        f"fsync_dir {tmp_path.name}",
        "mkdir b",
        "fsync_dir a",
        "fsync_dir a",
    ]


# Failures


@pytest.mark.parametrize("op", ["truncate", "fdatasync", "close", "fsync_dir"])
def test_a_failed_flush_or_close_is_never_retried(tmp_path: Path, op: str) -> None:
    """The second try would succeed: the fault strikes once."""
    storage, ops = _store(tmp_path)
    _write(storage, "step/before").commit(4096)
    path = "*/step" if op == "fsync_dir" else "*/a.shard"
    broken = FaultyFileOps(Fault(errno.EIO, op, path), inner=ops)
    storage = LocalStorage(storage.url, ops=broken)
    writer = _write(storage)
    with pytest.raises(StorageError, match=r"a\.shard.*EIO.*anew") as caught:
        writer.commit(4096)
    assert caught.value.errno == errno.EIO
    with pytest.raises(StorageError, match=r"a\.shard"):
        writer.commit(4096)
    writer.abort()
    tried = [call for call in broken.calls if call.op == op and call.path.endswith(path[1:])]
    assert len(tried) == 1
    assert storage.list("step") == ["before"]
    assert broken.open_paths() == []


def test_a_failed_flush_of_a_put_is_never_retried(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path, Fault(errno.EIO, "fdatasync"))
    with pytest.raises(StorageError, match=r"roots/1.*EIO"):
        storage.put_if_absent("roots/1", b"root")
    assert [call.op for call in ops.calls].count("fdatasync") == 1
    assert "link" not in [call.op for call in ops.calls]
    assert list(Path(storage.url, "roots").iterdir()) == []


def test_a_failed_write_forbids_the_commit(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path, Fault(errno.ENOSPC, "write_at", when="half-way"))
    writer = storage.create("step/a", 4096)
    with pytest.raises(StorageError, match=r"bytes 0 to 4096 of .*step/a.*Free space"):
        writer.write(0, _ADDRESS, 4096)
    with pytest.raises(StorageError, match=r"step/a.*earlier operation"):
        writer.write(0, _ADDRESS, 4096)
    with pytest.raises(StorageError, match=r"step/a.*earlier operation"):
        writer.commit(4096)
    writer.abort()
    assert "fdatasync" not in [call.op for call in ops.calls]
    assert storage.list("step") == []


def _put(storage: LocalStorage) -> object:
    return storage.put_if_absent("roots/1", b"root")


def _create(storage: LocalStorage) -> object:
    writer = storage.create("roots/1", 2 * _MIB)
    try:
        writer.write(0, _ADDRESS, 4)
        writer.commit(4)
    finally:
        writer.abort()
    return True


def _read(storage: LocalStorage) -> object:
    reader = storage.open("old")
    try:
        reader.read_into(0, ctypes.addressof(ctypes.create_string_buffer(8)), 3)
    finally:
        reader.close()
    return storage.get("old", 9)


def _tidy(storage: LocalStorage) -> object:
    storage.delete("old")
    storage.delete_tree("tree")
    storage.sync("")
    return storage.list("")


def _failure_of(
    work: Callable[[LocalStorage], object], storage: LocalStorage
) -> StorageError | None:
    try:
        work(storage)
    except StorageError as error:
        return error
    return None


@pytest.mark.crash
@pytest.mark.parametrize("work", [_put, _create, _read, _tidy])
@pytest.mark.parametrize("when", ["before", "after"])
def test_any_single_failure_is_reported_and_leaks_no_descriptor(
    tmp_path: Path, work: Callable[[LocalStorage], object], when: str
) -> None:
    """Each operation of the work fails once, its effect there or not."""
    number = 0
    while True:
        number += 1
        storage, ops = _store(tmp_path / str(number), Fault(errno.EIO, first=number, when=when))
        plain = LocalStorage(storage.url)
        plain.put_if_absent("old", b"old")
        plain.put_if_absent("tree/sub/leaf", b"leaf")
        failure = _failure_of(work, storage)
        if failure is not None:
            assert failure.errno == errno.EIO
            assert storage.url in str(failure)
        assert ops.open_paths() == []
        if work is _put and "1" in plain.list("roots"):
            assert plain.get("roots/1", 9) == b"root"
        if work is _put and failure is None:
            assert plain.list("roots") == ["1"]
        if work is _create and failure is None:
            assert plain.get("roots/1", 9) == b"0123"
        if number > len(ops.calls):
            break
    assert number > 5


def _put_and_die(told: RankContext, root: str) -> None:
    place = Path(root) / str(told.rank)
    storage, _ = _store(place, Fault("kill", first=told.rank + 1))
    storage.put_if_absent("roots/1", b"root")


@pytest.mark.crash
@pytest.mark.multiproc
def test_a_put_killed_at_any_operation_leaves_all_or_nothing(tmp_path: Path) -> None:
    """And one temporary at most, which the next delete removes."""
    _, counting = _store(tmp_path / "count")
    LocalStorage(tmp_path / "count" / "store", ops=counting).put_if_absent("roots/1", b"root")
    num_ops = len(counting.calls)
    results = run_ranks(num_ops, _put_and_die, str(tmp_path), may_die=range(num_ops))
    assert results == [RankDeath(-9)] * num_ops
    outcomes = []
    for rank in range(num_ops):
        storage = LocalStorage(tmp_path / str(rank) / "store")
        was_there = "1" in storage.list("roots")
        outcomes.append(was_there)
        if was_there:
            assert storage.get("roots/1", 9) == b"root"
        assert storage.put_if_absent("roots/1", b"next") is not was_there
        left = [name for name in os.listdir(Path(storage.url, "roots")) if name != "1"]
        assert len(left) <= 1
        storage.delete("roots/absent")
        assert os.listdir(Path(storage.url, "roots")) == ["1"]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


# A put whose answer is lost


def test_a_put_told_that_its_own_name_exists_has_won(tmp_path: Path) -> None:
    """A server may carry out a link twice and answer the second time."""
    storage, ops = _store(tmp_path, Fault(errno.EEXIST, "link", when="after"))
    assert storage.put_if_absent("roots/1", b"root") is True
    assert "fsync_dir roots" in _order(ops)


def test_a_put_that_lost_and_was_told_so_stays_lost(tmp_path: Path) -> None:
    storage, _ = _store(tmp_path)
    Path(storage.url, "1").write_bytes(b"theirs")
    assert storage.put_if_absent("1", b"mine") is False


def test_a_put_whose_link_answered_with_an_error_can_be_read_back(tmp_path: Path) -> None:
    storage, _ = _store(tmp_path, Fault(errno.EIO, "link", when="after"))
    with pytest.raises(StorageError, match="EIO"):
        storage.put_if_absent("roots/1", b"root")
    assert storage.get("roots/1", 9) == b"root"


def test_a_put_whose_temporary_is_deleted_starts_again(tmp_path: Path) -> None:
    other = LocalStorage(tmp_path / "store")

    def sweep(_: Call) -> None:
        other.delete("roots/absent")

    storage, ops = _store(tmp_path, Fault(sweep, "link"))
    assert storage.put_if_absent("roots/1", b"root") is True
    assert [call.op for call in ops.calls].count("fdatasync") == 2
    assert os.listdir(Path(storage.url, "roots")) == ["1"]


def test_a_put_whose_temporaries_are_always_deleted_gives_up(tmp_path: Path) -> None:
    other = LocalStorage(tmp_path / "store")
    storage, _ = _store(tmp_path, Fault(lambda _: other.delete("x"), "link", times=None))
    with pytest.raises(StorageError, match="removed 8 times"):
        storage.put_if_absent("1", b"root")


def test_a_put_without_hard_links_says_what_to_do(tmp_path: Path) -> None:
    for code in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        storage, _ = _store(tmp_path, Fault(code, "link"))
        with pytest.raises(StorageError, match=r"refuses hard links.*put the store on") as caught:
            storage.put_if_absent("roots/1", b"root")
        assert caught.value.errno == code
        assert os.listdir(Path(storage.url, "roots")) == []


# Past the page cache, or not


def _big_write(storage: LocalStorage) -> bytes:
    """Write 4096 bytes from here and 20 MiB by a native thread."""
    data = os.urandom(20 * _MIB)
    payload = ctypes.create_string_buffer(data, len(data))
    nbytes = 4096 + len(data)
    engine = native.staging_engine(1, 1, [])
    engine.reserve(len(data))
    row = array("q", (ctypes.addressof(payload), len(data), 0, 4096, 0, -1, 0, 1, 0))
    ticket = engine.begin(row, array("q", (nbytes,)), False)
    writer = storage.create("a.shard", nbytes)
    try:
        writer.write(0, _ADDRESS, 4096)
        with writer.lend() as lent:
            engine.attach(ticket, 0, *lent)
            assert engine.wait_flushed(ticket, 0, 30_000)
        kind, _, _, code, words = engine.failure(ticket)
        if kind:
            writer.fail(OSError(code, words))
        writer.commit(nbytes)
    finally:
        writer.abort()
        assert engine.release(ticket, 30_000)
        assert engine.close(30_000)
    return _BUFFER.raw[:4096] + data


def test_large_writes_go_in_extents_of_8_mib(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path)
    data = _big_write(storage)
    written = [(call.offset, call.nbytes) for call in ops.calls if call.op == "write_at"]
    assert written == [
        (0, 4096),
        (4096, 8 * _MIB),
        (4096 + 8 * _MIB, 8 * _MIB),
        (4096 + 16 * _MIB, 4 * _MIB),
    ]
    assert Path(storage.url, "a.shard").read_bytes() == data


@pytest.mark.parametrize(
    ("fault", "num_writes"),
    [
        (Fault(errno.EINVAL, "open", "*/a.shard", first=2), 4),
        (Fault(errno.EOPNOTSUPP, "open", "*/a.shard", first=2), 4),
        (Fault(errno.EINVAL, "write_at", "*/a.shard", first=2), 5),
        (Fault(errno.EINVAL, "write_at", "*/a.shard", first=3), 5),
    ],
    ids=["open", "open-unsupported", "first-extent", "second-extent"],
)
def test_where_o_direct_is_refused_buffered_writes_give_equal_bytes(
    tmp_path: Path, fault: Fault, num_writes: int
) -> None:
    """It is tried once per file: after the refusal, nothing is."""
    storage, ops = _store(tmp_path, fault)
    data = _big_write(storage)
    assert Path(storage.url, "a.shard").read_bytes() == data
    assert [call.op for call in ops.calls].count("write_at") == num_writes
    assert ops.open_paths() == []


def test_after_one_refusal_nothing_more_goes_past_the_page_cache(tmp_path: Path) -> None:
    """So a second EINVAL comes from a buffered write, where it is no refusal but an error."""
    refusal, failure = (Fault(errno.EINVAL, "write_at", first=first) for first in (2, 4))
    storage, ops = _store(tmp_path, refusal, failure)
    with pytest.raises(StorageError, match="EINVAL"):
        _big_write(storage)
    assert [call.op for call in ops.calls].count("write_at") == 4
    assert ops.open_paths() == []


def test_another_error_of_a_direct_write_is_no_reason_to_try_again(tmp_path: Path) -> None:
    storage, ops = _store(tmp_path, Fault(errno.EIO, "write_at", first=2))
    with pytest.raises(StorageError, match="EIO"):
        _big_write(storage)
    assert [call.op for call in ops.calls].count("write_at") == 2


def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(tmp_path: Path) -> None:
    storage, _ = _store(tmp_path, Fault(errno.EOPNOTSUPP, "fallocate"))
    data = _big_write(storage)
    assert storage.get("a.shard", len(data)) == data


# Giving up beside running calls


def test_abort_keeps_descriptors_open_until_the_last_write_is_out(tmp_path: Path) -> None:
    """A descriptor closed under a running write may by then be another file's."""
    inside, go_on = threading.Event(), threading.Event()

    def hold(_: Call) -> None:
        inside.set()
        assert go_on.wait(30)

    storage, ops = _store(tmp_path, Fault(hold, "write_at"))
    writer = storage.create("a", 4096)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(writer.write, 0, _ADDRESS, 4096)
        assert inside.wait(30)
        writer.abort()
        assert f"{storage.url}/a" in ops.open_paths()
        go_on.set()
        job.result(30)
    assert ops.open_paths() == []
    assert storage.list("") == []


def test_a_commit_beside_a_running_write_is_refused(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(_: Call) -> None:
        inside.set()
        assert go_on.wait(30)

    storage, ops = _store(tmp_path, Fault(hold, "write_at"))
    writer = storage.create("a", 4096)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(writer.write, 0, _ADDRESS, 4096)
        assert inside.wait(30)
        with pytest.raises(StorageError, match="1 writes are still running"):
            writer.commit(4096)
        go_on.set()
        job.result(30)
    assert ops.open_paths() == []
    assert storage.list("") == []


def test_a_file_cut_after_it_was_opened_is_an_error_and_no_short_answer(tmp_path: Path) -> None:
    storage, _ = _store(tmp_path)
    storage.put_if_absent("a", b"0123456789")
    reader = storage.open("a")
    os.truncate(Path(storage.url, "a"), 4)
    with pytest.raises(StorageError, match=r"ends at byte 4, 6 bytes short"):
        reader.read_into(0, _ADDRESS, 10)
    reader.close()
