"""Whatever way bytes take from a file into an array, they are the saved ones or an error."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from array import array
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from shardckpt import native, pure
from shardckpt.catalog.store import Catalog
from shardckpt.checkpointer import load_once
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.load.loader import LoadOptions
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.plan import LoadPlan, Wanted, plan_load
from shardckpt.load.read import Chunks, read_to, reads_from, run_load, verify_at
from shardckpt.storage.fileops import FileOps, PosixFileOps, calls_into
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.arrays import ArrayBackend
from shardckpt.testing.jobs import JobOptions, open_job

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from shardckpt.load.read import Read
    from shardckpt.storage.base import LentFile, Reader, Storage

_WAIT_S = 20


class _Ops:
    """The system's calls; remembers which reads went past the page cache, and may spoil them."""

    def __init__(self, *, no_direct: bool = False, refuses: bool = False, most: int = 0) -> None:
        self._inner = PosixFileOps(flush=False)
        self._no_direct = no_direct
        self._refuses = refuses
        self._most = most
        self._direct: set[int] = set()
        self._calls = calls_into(cast("FileOps", self))
        self.opened: list[int] = []
        self.closed: list[int] = []
        self.reads: list[tuple[bool, int, int]] = []
        self.before_read = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def native_calls(self) -> int:
        return ctypes.addressof(self._calls)

    def open(self, name: str, flags: int, *, dir_fd: int | None, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT and self._no_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        fd = self._inner.open(name, flags, dir_fd=dir_fd, mode=mode)
        self._direct.discard(fd)
        if flags & os.O_DIRECT:
            self._direct.add(fd)
        self.opened.append(fd)
        return fd

    def close(self, fd: int) -> None:
        self.closed.append(fd)
        self._inner.close(fd)

    def read_at(self, fd: int, address: int, nbytes: int, offset: int) -> int:
        self.before_read()
        is_direct = fd in self._direct
        self.reads.append((is_direct, offset, nbytes))
        if is_direct and self._refuses:
            raise OSError(errno.EINVAL, "larger blocks, please")
        # Less than asked for means the end of the file here, but not to native code.
        is_native = threading.current_thread().name.startswith("shardckpt-read")
        most = self._most if self._most and is_native else nbytes
        return self._inner.read_at(fd, address, min(nbytes, most), offset)


_ROUTES = ("cached", "past the cache", "no O_DIRECT", "EINVAL", "short reads", "memory", "pure")


def _saved() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    state: dict[str, Any] = {
        "large": rng.integers(0, 256, 3_000_001, np.uint8),
        "columns": rng.standard_normal((300, 1000)).astype(np.float32),
        "every second": rng.integers(0, 1 << 30, (2, 70_001)),
        "nothing": np.zeros((0, 3), np.float32),
        "one": np.array(3.5),
        "three": np.array([1, 2, 3], np.uint8),
    }
    return state | {f"small.{i}": rng.standard_normal(i + 1) for i in range(200)}


def _blank() -> dict[str, Any]:
    state = {key: np.full_like(value, 9) for key, value in _saved().items()}
    # Targets that are not contiguous: read through rows of a strided copy.
    state["columns"] = np.full((300, 1000), 9, np.float32, order="F")
    state["every second"] = np.full((2, 140_002), 9)[:, ::2]
    return state


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(np.array_equal(found[key], wanted[key]) for key in wanted)


def _save(storage: Storage) -> None:
    core = open_job(storage, SingleCoord(), JobOptions())
    core.save(1, _saved()).wait()
    core.close()


def _load(storage: Storage, state: dict[str, Any]) -> None:
    load_once(
        storage, ArrayBackend(), SingleCoord(), state, step=None, options=LoadOptions(),
        timeout_s=20, namespace="load", environment={},
    )  # fmt: skip


def _shard(place: Path) -> Path:
    (path,) = place.rglob("*.shard")
    return path


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(fd, [bytearray(1)], 8192, os.RWF_NOWAIT)
    except BlockingIOError:
        return
    finally:
        os.close(fd)
    pytest.skip("this file system keeps every page")


def _changed(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.chmod(0o600)
    path.write_bytes(data)


def _opened(storage: Storage) -> OpenCheckpoint:
    latest = Catalog(storage, writer="test").newest().latest
    assert latest is not None
    return OpenCheckpoint(storage, latest.attempt, latest.manifest)


def _plan(checkpoint: OpenCheckpoint, state: dict[str, Any]) -> LoadPlan:
    backend = ArrayBackend()
    wanted = [
        Wanted(checkpoint.tensors[leaf.key], shard.box, backend.host_target(shard.data))
        for leaf in backend.describe(state).leaves
        for shard in leaf.shards
    ]
    return plan_load(checkpoint, wanted)


def _on_route(
    route: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[LocalStorage, _Ops]:
    """Return a saved store and make its reads take a route."""
    ops = _Ops(
        no_direct=route == "no O_DIRECT",
        refuses=route == "EINVAL",
        most=5000 if route == "short reads" else 0,
    )
    path = _shard(place)
    if route in ("cached", "pure"):
        path.read_bytes()
    else:
        _forget(path)
    if route == "pure":
        monkeypatch.setattr(native, "_impl", pure)
    return LocalStorage(place, ops=cast("FileOps", ops)), ops


@pytest.mark.parametrize("route", _ROUTES)
def test_every_route_gives_the_saved_values(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _blank()
    if route == "memory":
        storage = MemoryStorage()
        _save(storage)
        _load(storage, state)
        assert _same(state, _saved())
        return
    _save(LocalStorage(tmp_path, ops=PosixFileOps(flush=False)))
    local, ops = _on_route(route, tmp_path, monkeypatch)
    _load(local, state)
    assert _same(state, _saved())
    direct = [read for read in ops.reads if read[0]]
    if route in ("cached", "pure", "no O_DIRECT") or not native.IS_NATIVE:
        assert direct == []
    else:
        assert direct
        assert all(offset % 4096 == 0 == nbytes % 4096 for _, offset, nbytes in direct)
    assert sorted(ops.opened) == sorted(ops.closed)


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_systems_own_calls_give_the_saved_values(tmp_path: Path, is_cached: bool) -> None:
    storage = LocalStorage(tmp_path, ops=PosixFileOps(flush=False))
    _save(storage)
    path = _shard(tmp_path)
    if is_cached:
        path.read_bytes()
    else:
        _forget(path)
    state = _blank()
    _load(storage, state)
    assert _same(state, _saved())


@pytest.mark.parametrize("route", _ROUTES)
@pytest.mark.parametrize("key", ["large", "columns", "every second", "three", "small.17"])
def test_a_changed_chunk_is_named_on_every_route(
    route: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if route == "memory":
        storage = MemoryStorage()
        _save(storage)
        (name,) = (name for name in storage._objects if name.endswith(".shard"))
        checkpoint = _opened(storage)
        (payload,) = [p for p in checkpoint.files_of(0)[0].payloads if p.key == key]
        at = payload.offset + payload.nbytes - 1
        data = bytearray(storage._objects[name])
        data[at] ^= 0x40
        storage._objects[name] = bytes(data)
        with pytest.raises(CorruptCheckpointError) as caught:
            _load(storage, _blank())
    else:
        plain = LocalStorage(tmp_path, ops=PosixFileOps(flush=False))
        _save(plain)
        checkpoint = _opened(plain)
        (payload,) = [p for p in checkpoint.files_of(0)[0].payloads if p.key == key]
        checkpoint.close()
        at = payload.offset + payload.nbytes - 1
        _changed(_shard(tmp_path), at)
        local, _ = _on_route(route, tmp_path, monkeypatch)
        with pytest.raises(CorruptCheckpointError) as caught:
            _load(local, _blank())
    chunk = payload.offset + (payload.nbytes - 1) // 65536 * 65536
    for part in ("rank-00000.0.shard", "saved by rank 0", repr(key), f"chunk at byte {chunk} "):
        assert part in str(caught.value)


def _chunks(read: Read) -> list[Chunks]:
    return [(piece.payload, piece.start, piece.stop) for piece in read.pieces]


def test_a_range_read_into_memory_is_checked_too(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, ops=PosixFileOps(flush=False))
    _save(storage)
    checkpoint = _opened(storage)
    reads = _plan(checkpoint, _blank()).reads
    saved = _shard(tmp_path).read_bytes()
    for read in reads:
        memory = np.zeros(read.stop - read.start, np.uint8)
        read_to(read.file, _chunks(read), memory.ctypes.data)
        for piece in read.pieces:
            found = memory[piece.file_start - read.start : piece.file_stop - read.start]
            assert found.tobytes() == saved[piece.file_start : piece.file_stop]
        verify_at(read.file, _chunks(read), memory.ctypes.data)
        memory[-1] ^= 1
        with pytest.raises(CorruptCheckpointError, match="chunk at byte"):
            verify_at(read.file, _chunks(read), memory.ctypes.data)
    last = reads[-1]
    _changed(_shard(tmp_path), last.pieces[0].file_start)
    memory = np.zeros(last.stop - last.start, np.uint8)
    with pytest.raises(CorruptCheckpointError, match="chunk at byte"):
        read_to(last.file, _chunks(last), memory.ctypes.data)
    checkpoint.close()


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, ops=PosixFileOps(flush=False))
    _save(storage)
    checkpoint = _opened(storage)
    plan = _plan(checkpoint, _blank())
    os.truncate(_shard(tmp_path), 100_000)
    with pytest.raises(StorageError, match="ends at byte 100000"):
        run_load(plan)
    checkpoint.close()


def test_a_read_that_fails_names_the_file_and_keeps_its_errno(tmp_path: Path) -> None:
    _save(LocalStorage(tmp_path, ops=PosixFileOps(flush=False)))
    ops = _Ops()
    checkpoint = _opened(LocalStorage(tmp_path, ops=cast("FileOps", ops)))
    plan = _plan(checkpoint, _blank())

    def fail() -> None:
        raise OSError(errno.EIO, "broken")

    ops.before_read = fail
    with pytest.raises(StorageError, match=r"cannot read .*rank-00000\.0\.shard.*EIO") as caught:
        run_load(plan)
    assert caught.value.errno == errno.EIO
    checkpoint.close()
    assert sorted(ops.opened) == sorted(ops.closed)


def test_a_file_closed_during_a_read_stays_open_until_the_read_is_done(tmp_path: Path) -> None:
    _save(LocalStorage(tmp_path, ops=PosixFileOps(flush=False)))
    ops = _Ops()
    checkpoint = _opened(LocalStorage(tmp_path, ops=cast("FileOps", ops)))
    state = _blank()
    plan = _plan(checkpoint, state)
    reached, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        reached.set()
        assert go_on.wait(_WAIT_S)

    ops.before_read = pause
    errors: list[BaseException] = []

    def load() -> None:
        try:
            run_load(LoadPlan(plan.reads[:1], 0, 0), num_readers=1)
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=load)
    reader.start()
    assert reached.wait(_WAIT_S)
    (file,) = checkpoint.files_of(0)
    checkpoint.close()
    num_open = len(ops.opened) - len(ops.closed)
    go_on.set()
    reader.join(_WAIT_S)
    assert num_open > 0
    assert errors == []
    assert sorted(ops.opened) == sorted(ops.closed)
    with pytest.raises(StorageError, match="closed or given up"), _lent(file.reader):
        pass


def _lent(reader: Reader) -> AbstractContextManager[LentFile]:
    lent = reader.lend()
    assert lent is not None
    return lent


def test_each_rank_begins_at_a_file_of_its_own(tmp_path: Path) -> None:
    class File:
        pass

    class Fake:
        def __init__(self, file: File, number: int) -> None:
            self.file, self.number = file, number

    files = [File() for _ in range(3)]
    reads = cast("tuple[Read, ...]", tuple(Fake(f, n) for f in files for n in range(2)))
    for rank in range(5):
        order = reads_from(reads, rank)
        assert order[0].file is files[rank % 3]  # type: ignore[comparison-overlap]
        assert sorted(map(id, order)) == sorted(map(id, reads))
        assert [cast("Any", read).number for read in order] == [0, 1] * 3
    assert reads_from((), 3) == []


def test_where_no_file_is_lent_ranges_of_nonsense_are_refused_as_well() -> None:
    memory = np.zeros(100, np.uint8)
    wanted = native.ChunkRange(0, 100, array("q", (50, 51, 0, 0)), array("q"), b"\0" * 4, 0, 64)
    with pytest.raises(ValueError, match="piece 0, 51 bytes at 50"):
        native.place_chunks(memory.ctypes.data, wanted)
