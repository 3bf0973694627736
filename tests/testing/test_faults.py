"""Faults strike exactly the calls they name."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import pytest

from shardckpt.pure import FileCalls
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.testing.ranks import RankContext, RankDeath, run_ranks

if TYPE_CHECKING:
    from pathlib import Path

_BUFFER = ctypes.create_string_buffer(b"0123456789")
_ADDRESS = ctypes.addressof(_BUFFER)


def _open(ops: FaultyFileOps, path: Path) -> int:
    return ops.open(str(path), os.O_RDWR | os.O_CREAT, dir_fd=None)


def test_calls_are_recorded_in_order_with_absolute_paths_and_data(tmp_path: Path) -> None:
    ops = FaultyFileOps(keep_data=True)
    dir_fd = ops.open(str(tmp_path), os.O_RDONLY, dir_fd=None)
    fd = ops.open("a", os.O_RDWR | os.O_CREAT, dir_fd=dir_fd)
    ops.write_at(fd, _ADDRESS, 4, 2)
    ops.close(fd)
    ops.link("a", "b", dir_fd=dir_fd)
    path = str(tmp_path / "a")
    assert ops.calls == (
        Call(1, "open", str(tmp_path)),
        Call(2, "open", path),
        Call(3, "write_at", path, offset=2, nbytes=4, data=b"0123"),
        Call(4, "close", path),
        Call(5, "link", path, target=str(tmp_path / "b")),
    )
    assert ops.open_paths() == [str(tmp_path)]
    ops.close(dir_fd)
    assert ops.open_paths() == []


def test_a_fault_hits_the_named_operation_path_and_count_only(tmp_path: Path) -> None:
    ops = FaultyFileOps(Fault(errno.EIO, "fdatasync", "*/a", first=2, times=2))
    a, b = _open(ops, tmp_path / "a"), _open(ops, tmp_path / "b")
    outcomes = []
    for _ in range(5):
        ops.fdatasync(b)
        try:
            ops.fdatasync(a)
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno)
    assert outcomes == [0, errno.EIO, errno.EIO, 0, 0]
    ops.close(a)
    ops.close(b)


@pytest.mark.parametrize(
    ("when", "stored"), [("before", b""), ("half-way", b"01234"), ("after", b"0123456789")]
)
def test_a_failing_write_has_no_half_or_all_of_its_effect(
    tmp_path: Path, when: str, stored: bytes
) -> None:
    ops = FaultyFileOps(Fault(errno.ENOSPC, "write_at", when=when))
    fd = _open(ops, tmp_path / "a")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        ops.write_at(fd, _ADDRESS, 10, 0)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == stored
    ops.close(fd)


def test_calls_by_native_code_are_recorded_and_struck_with_their_errno(tmp_path: Path) -> None:
    ops = FaultyFileOps(
        Fault(errno.ENOSPC, "write_at", first=2), Fault(errno.EINTR, "read_at"), keep_data=True
    )
    path = str(tmp_path / "a")
    fd = _open(ops, tmp_path / "a")
    calls = FileCalls.from_address(ops.native_calls())
    got = ctypes.create_string_buffer(10)
    assert calls.pwrite(fd, _ADDRESS, 10, 3) == 10
    assert calls.pwrite(fd, _ADDRESS, 10, 13) == -1
    assert ctypes.get_errno() == errno.ENOSPC
    assert calls.pread(fd, ctypes.addressof(got), 10, 5) == -1
    assert ctypes.get_errno() == errno.EINTR
    assert calls.pread(fd, ctypes.addressof(got), 10, 5) == 8
    assert got.raw == b"23456789\0\0"
    assert ops.calls[1:] == (
        Call(2, "write_at", path, offset=3, nbytes=10, data=b"0123456789"),
        Call(3, "write_at", path, offset=13, nbytes=10, data=b"0123456789"),
        Call(4, "read_at", path, offset=5, nbytes=10),
        Call(5, "read_at", path, offset=5, nbytes=10),
    )
    ops.close(fd)


def test_what_raises_no_errno_reaches_native_code_as_eio(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(call: Call) -> None:
        raise ValueError(call.op)

    ops = FaultyFileOps(Fault(refuse, "read_at"))
    fd = _open(ops, tmp_path / "a")
    assert FileCalls.from_address(ops.native_calls()).pread(fd, _ADDRESS, 1, 0) == -1
    assert ctypes.get_errno() == errno.EIO
    assert "ValueError: read_at" in caplog.text
    ops.close(fd)


def test_a_failing_close_closes_all_the_same(tmp_path: Path) -> None:
    for when in ("before", "after"):
        ops = FaultyFileOps(Fault(errno.EIO, "close", when=when))
        fd = _open(ops, tmp_path / "a")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            ops.close(fd)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(fd)
        assert ops.open_paths() == []


def test_an_open_whose_answer_is_lost_keeps_the_file_and_gives_no_descriptor(
    tmp_path: Path,
) -> None:
    ops = FaultyFileOps(Fault(errno.EIO, "open", when="after"))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        _open(ops, tmp_path / "a")
    assert (tmp_path / "a").exists()
    assert ops.open_paths() == []


def test_a_function_sees_the_call_it_is_run_at(tmp_path: Path) -> None:
    seen: list[Call] = []
    ops = FaultyFileOps(Fault(seen.append, "truncate", times=None))
    fd = _open(ops, tmp_path / "a")
    ops.truncate(fd, 3)
    ops.truncate(fd, 5)
    ops.close(fd)
    assert [(call.number, call.nbytes) for call in seen] == [(2, 3), (3, 5)]


def _die_at(told: RankContext, number: int) -> None:
    storage = LocalStorage(
        told.directory / "store", ops=FaultyFileOps(Fault("kill", "link", first=number))
    )
    storage.prepare()
    storage.put_if_absent("1", b"")
    storage.put_if_absent("2", b"")


@pytest.mark.multiproc
@pytest.mark.crash
def test_a_kill_point_ends_the_process_before_the_operation(tmp_path: Path) -> None:
    assert run_ranks(1, _die_at, 2, may_die=[0], directory=tmp_path) == [RankDeath(-9)]
    assert LocalStorage(tmp_path / "shared" / "store").list("") == ["1"]
