"""File operations that record every call and fail, die or pause where a test says so.

Layer: testing. A `FaultyFileOps` stands where a storage expects its `FileOps`. Calls are numbered
from 1 in the order in which they begin; a fault picks its calls by operation, path and count.
"""

from __future__ import annotations

import ctypes
import fnmatch
import os
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeVar, final

from shardckpt.storage.fileops import FileOps, PosixFileOps, calls_into

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One file operation that began.

    Attributes:
        number: Counted from 1 over all operations of this `FaultyFileOps`.
        op: Name of the `FileOps` method.
        path: What it works on, as an absolute path.
        target: The second name of a `link`.
        offset: First byte of a read or write; else 0.
        nbytes: Bytes of a read, write, truncate or fallocate; else 0.
        data: The bytes of a write where `keep_data` is set.
    """

    number: int
    op: str
    path: str
    target: str = ""
    offset: int = 0
    nbytes: int = 0
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and at which calls.

    Attributes:
        action: An error number to raise; "kill" for SIGKILL of this process; or a function that is
            called with the call and may block, raise, or change the world.
        op: Glob of operations.
        path: Glob of paths; of a `link`, of its new name.
        first: The first matching call that is hit, counted from 1.
        times: How many matching calls are hit from there on; None means all.
        when: "before" the operation, "after" it (its effect is there, its answer is lost), or
            "half-way": of a write, the first half reaches the file.
    """

    action: int | Literal["kill"] | Callable[[Call], None]
    op: str = "*"
    path: str = "*"
    first: int = 1
    times: int | None = 1
    when: Literal["before", "half-way", "after"] = "before"


@final
class FaultyFileOps:
    """A `FileOps` that records, and breaks on command. Thread-safe."""

    def __init__(
        self, *faults: Fault, inner: FileOps | None = None, keep_data: bool = False
    ) -> None:
        """Begin counting.

        Args:
            faults: What goes wrong; every fault counts its own matches.
            inner: Does the work; by default the system's calls.
            keep_data: Whether `Call.data` holds a copy of written bytes.
        """
        self._faults: Final = faults
        self._inner: Final[FileOps] = PosixFileOps() if inner is None else inner
        self._keep_data: Final = keep_data
        self._lock: Final = threading.Lock()
        self._calls: Final[list[Call]] = []
        self._num_matches: Final = [0] * len(faults)
        self._paths: Final[dict[int, str]] = {}
        self._native_calls: Final = calls_into(self)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every call that began, in order."""
        with self._lock:
            return tuple(self._calls)

    def named(self, *ops: str) -> tuple[tuple[str, str], ...]:
        """Return (operation, last component of the path) of the calls to `ops`, in order."""
        return tuple(
            (call.op, os.path.basename(call.target or call.path))
            for call in self.calls
            if call.op in ops
        )

    def open_paths(self) -> Sequence[str]:
        """Return the paths of descriptors that are open now, to find leaks."""
        with self._lock:
            return sorted(self._paths.values())

    def open(self, name: str, flags: int, *, dir_fd: int | None, mode: int = 0o600) -> int:
        """Record, then open."""
        path = self._path(name, dir_fd)
        call, hits = self._begin("open", path)
        self._strike(call, hits, "before")
        fd = self._inner.open(name, flags, dir_fd=dir_fd, mode=mode)
        try:
            self._strike(call, hits, "after")
        except BaseException:
            # The file may be there, but an open that failed gives no descriptor.
            self._inner.close(fd)
            raise
        with self._lock:
            self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        """Record, then close; a fault never keeps the descriptor open, as on Linux."""
        with self._lock:
            path = self._paths.pop(fd, f"fd {fd}")
        call, hits = self._begin("close", path)
        try:
            self._strike(call, hits, "before")
        finally:
            self._inner.close(fd)
        self._strike(call, hits, "after")

    def write_at(self, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Record, then write."""
        data = ctypes.string_at(address, nbytes) if self._keep_data else None
        self._run(
            "write_at",
            self._path_of(fd),
            lambda: self._inner.write_at(fd, address, nbytes, offset),
            offset=offset,
            nbytes=nbytes,
            data=data,
            half=lambda: self._inner.write_at(fd, address, nbytes // 2, offset),
        )

    def read_at(self, fd: int, address: int, nbytes: int, offset: int) -> int:
        """Record, then read."""
        return self._run(
            "read_at",
            self._path_of(fd),
            lambda: self._inner.read_at(fd, address, nbytes, offset),
            offset=offset,
            nbytes=nbytes,
        )

    def native_calls(self) -> int:
        """Return C functions that record and break like `write_at` and `read_at`."""
        return ctypes.addressof(self._native_calls)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Record, then cut."""
        self._run(
            "truncate",
            self._path_of(fd),
            lambda: self._inner.truncate(fd, nbytes),
            nbytes=nbytes,
        )

    def fallocate(self, fd: int, nbytes: int) -> None:
        """Record, then reserve."""
        self._run(
            "fallocate",
            self._path_of(fd),
            lambda: self._inner.fallocate(fd, nbytes),
            nbytes=nbytes,
        )

    def fdatasync(self, fd: int) -> None:
        """Record, then flush."""
        self._run("fdatasync", self._path_of(fd), lambda: self._inner.fdatasync(fd))

    def fsync_dir(self, fd: int) -> None:
        """Record, then flush."""
        self._run("fsync_dir", self._path_of(fd), lambda: self._inner.fsync_dir(fd))

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        """Record, then link."""
        self._run(
            "link",
            self._path(source, dir_fd),
            lambda: self._inner.link(source, target, dir_fd=dir_fd),
            target=self._path(target, dir_fd),
        )

    def unlink(self, name: str, *, dir_fd: int) -> None:
        """Record, then unlink."""
        path = self._path(name, dir_fd)
        self._run("unlink", path, lambda: self._inner.unlink(name, dir_fd=dir_fd))

    def mkdir(self, name: str, *, dir_fd: int | None, mode: int = 0o700) -> None:
        """Record, then make."""
        path = self._path(name, dir_fd)
        self._run("mkdir", path, lambda: self._inner.mkdir(name, dir_fd=dir_fd, mode=mode))

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        """Record, then remove."""
        path = self._path(name, dir_fd)
        self._run("rmdir", path, lambda: self._inner.rmdir(name, dir_fd=dir_fd))

    def names(self, fd: int) -> list[str]:
        """Record, then list."""
        return self._run("names", self._path_of(fd), lambda: self._inner.names(fd))

    def stat_fd(self, fd: int) -> os.stat_result:
        """Record, then look."""
        return self._run("stat_fd", self._path_of(fd), lambda: self._inner.stat_fd(fd))

    def stat_name(self, name: str, *, dir_fd: int) -> os.stat_result:
        """Record, then look."""
        path = self._path(name, dir_fd)
        return self._run("stat_name", path, lambda: self._inner.stat_name(name, dir_fd=dir_fd))

    def _run(
        self,
        op: str,
        path: str,
        perform: Callable[[], T],
        *,
        target: str = "",
        offset: int = 0,
        nbytes: int = 0,
        data: bytes | None = None,
        half: Callable[[], object] | None = None,
    ) -> T:
        call, hits = self._begin(op, path, target=target, offset=offset, nbytes=nbytes, data=data)
        self._strike(call, hits, "before")
        if half is not None and any(fault.when == "half-way" for fault in hits):
            half()
            self._strike(call, hits, "half-way")
        result = perform()
        self._strike(call, hits, "after")
        return result

    def _begin(
        self,
        op: str,
        path: str,
        *,
        target: str = "",
        offset: int = 0,
        nbytes: int = 0,
        data: bytes | None = None,
    ) -> tuple[Call, tuple[Fault, ...]]:
        """Record a call and return it with the faults that hit it."""
        with self._lock:
            call = Call(len(self._calls) + 1, op, path, target, offset, nbytes, data)
            self._calls.append(call)
            return call, tuple(
                fault for place, fault in enumerate(self._faults) if self._hits(place, fault, call)
            )

    def _hits(self, place: int, fault: Fault, call: Call) -> bool:
        if not fnmatch.fnmatchcase(call.op, fault.op):
            return False
        if not fnmatch.fnmatchcase(call.target or call.path, fault.path):
            return False
        self._num_matches[place] += 1
        num_after = self._num_matches[place] - fault.first
        return num_after >= 0 and (fault.times is None or num_after < fault.times)

    def _strike(self, call: Call, hits: Sequence[Fault], when: str) -> None:
        for fault in hits:
            if fault.when != when:
                continue
            if fault.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif isinstance(fault.action, int):
                raise OSError(fault.action, os.strerror(fault.action), call.path)
            elif not isinstance(fault.action, str):
                fault.action(call)

    def _path_of(self, fd: int) -> str:
        with self._lock:
            return self._paths.get(fd, f"fd {fd}")

    def _path(self, name: str, dir_fd: int | None) -> str:
        return (
            name if dir_fd is None else os.path.normpath(os.path.join(self._path_of(dir_fd), name))
        )
