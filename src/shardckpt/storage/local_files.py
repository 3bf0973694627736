"""Files of a local store while they are written or read.

Layer: storage. Several threads write one file at once; giving it up never closes a descriptor
under a running call, because the last call out does the closing.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

from shardckpt.errors import StorageError
from shardckpt.storage.base import LentFile
from shardckpt.storage.failure import storage_error, storage_errors
from shardckpt.storage.fileops import close_unwritten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardckpt.storage.fileops import FileOps

_LOG: Final = logging.getLogger("shardckpt.storage")
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_NOFOLLOW
# O_NONBLOCK: opening a FIFO somebody planted must not wait for its other end.
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECT_FROM_BYTES: Final = 1 << 20
_NOT_SUPPORTED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def create_file(ops: FileOps, name: str, *, dir_fd: int) -> int:
    """Create a file that did not exist and return its descriptor for buffered writes.

    Raises:
        OSError: The name exists (as a link, too), or the file cannot be made.
    """
    return ops.open(name, _WRITE_FLAGS | os.O_CREAT | os.O_EXCL, dir_fd=dir_fd)


def reopen(ops: FileOps, name: str, flags: int, *, dir_fd: int) -> int:
    """Open a file that was found regular once more, with further flags.

    Raises:
        OSError: It cannot be opened.
    """
    return ops.open(name, _READ_FLAGS | flags, dir_fd=dir_fd)


def open_regular(ops: FileOps, name: str, *, dir_fd: int) -> tuple[int, int]:
    """Open a regular file to read; return its descriptor and size.

    Raises:
        StorageError: It is something else: a FIFO, a device, or another user's file by a hard link.
        OSError: It cannot be opened.
    """
    fd = ops.open(name, _READ_FLAGS, dir_fd=dir_fd)
    try:
        status = ops.stat_fd(fd)
        _check_regular(name, status, ops.stat_fd(dir_fd))
    except BaseException:
        close_unwritten(ops, fd)
        raise
    return fd, status.st_size


@final
class _Calls:
    """Counts the calls that use descriptors and runs `release` once, when the last is out."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Final = release
        self._lock: Final = threading.Lock()
        self._num_inside = 0
        self._is_over = False
        self._is_released = False

    @contextmanager
    def inside(self, operation: str, path: str) -> Iterator[None]:
        """Keep the descriptors open for the block.

        Raises:
            StorageError: They are given up already.
        """
        with self._lock:
            if self._is_over:
                raise StorageError(f"cannot {operation} {path}: it was closed or given up before")
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
            self._release_if_last()

    def end(self) -> int:
        """Let no further call in and release when the last is out; return how many are inside."""
        with self._lock:
            self._is_over = True
            num_inside = self._num_inside
        self._release_if_last()
        return num_inside

    def _release_if_last(self) -> None:
        with self._lock:
            if not self._is_over or self._num_inside or self._is_released:
                return
            self._is_released = True
        self._release()


@final
class LocalWriter:
    """One new file, under its final name but meaningless until `commit` returned."""

    def __init__(self, ops: FileOps, path: str, name: str, *, dir_fd: int, fd: int) -> None:
        """Take over `dir_fd` and `fd`, made by `create_file` as `name`; `path` is for messages."""
        self._ops: Final = ops
        self._path: Final = path
        self._name: Final = name
        self._dir_fd: Final = dir_fd
        self._fds = [fd]
        self._fd: Final = fd
        self._direct_fd = -1
        self._failure: BaseException | None = None
        self._is_committed = False
        self._calls: Final = _Calls(self._give_up)

    def reserve(self, nbytes: int) -> None:
        """Reserve room on disk and, for a large file, set up writes past the page cache.

        Raises:
            StorageError: There is no room.
        """
        if nbytes == 0:
            return
        with storage_errors(f"reserve {nbytes} bytes for", self._path):
            try:
                self._ops.fallocate(self._fd, nbytes)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
                # Growing once is cheaper than growing with every write.
                self._ops.truncate(self._fd, nbytes)
            if nbytes >= _DIRECT_FROM_BYTES:
                self._open_direct()

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Write `nbytes` at `address` to byte `offset`; safe to call from several threads.

        Raises:
            StorageError: The write failed, now or before; the file must be given up.
        """
        with self._calls.inside("write", self._path):
            self._check_unharmed("write")
            try:
                with storage_errors(f"write bytes {offset} to {offset + nbytes} of", self._path):
                    self._ops.write_at(self._fd, address, nbytes, offset)
            except BaseException as error:
                self._failure = self._failure or error
                raise

    @contextmanager
    def lend(self) -> Iterator[LentFile]:
        """Lend the descriptors to native threads for the block.

        Raises:
            StorageError: An earlier write failed.
        """
        with self._calls.inside("write", self._path):
            self._check_unharmed("write")
            yield LentFile(self._fd, self._direct_fd, self._ops.native_calls())

    def fail(self, error: OSError) -> None:
        """Take note that a native write failed, and raise it.

        Raises:
            StorageError: Always.
        """
        self._failure = self._failure or storage_error("write", self._path, error)
        raise self._failure from error

    def commit(self, nbytes: int) -> None:
        """Cut the file to `nbytes` and make it durable, name included; never retried.

        Raises:
            StorageError: A flush or close failed, or an earlier write had; the file is given up.
        """
        try:
            with self._calls.inside("commit", self._path):
                self._check_unharmed("commit")
                self._check_alone(self._calls.end())
                with storage_errors("make durable", self._path):
                    self._flush(nbytes)
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            self._calls.end()

    def abort(self) -> None:
        """Give the file up and remove it, as far as that is possible. Never raises."""
        self._calls.end()

    def _flush(self, nbytes: int) -> None:
        self._ops.truncate(self._fd, nbytes)
        # After a failed flush the kernel drops the pages and calls them clean: a second try would
        # "succeed" with the bytes lost. So there is exactly one.
        self._ops.fdatasync(self._fd)
        while self._fds:
            # Network file systems report lost writes at close; the descriptor is gone either way.
            self._ops.close(self._fds.pop())
        self._ops.fsync_dir(self._dir_fd)
        self._is_committed = True

    def _check_unharmed(self, operation: str) -> None:
        if self._failure is not None:
            raise StorageError(
                f"cannot {operation} {self._path}: an earlier operation on it failed "
                f"({self._failure}); write it anew under another name"
            ) from self._failure

    def _check_alone(self, num_inside: int) -> None:
        if num_inside > 1:
            raise StorageError(
                f"cannot commit {self._path}: {num_inside - 1} writes are still running; wait for "
                "them first"
            )

    def _open_direct(self) -> None:
        """Open a second descriptor for O_DIRECT; where refused, everything goes buffered."""
        flags = _WRITE_FLAGS | os.O_DIRECT
        try:
            fd = self._ops.open(self._name, flags, dir_fd=self._dir_fd)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            return
        self._fds.append(fd)
        ours, opened = self._ops.stat_fd(self._fd), self._ops.stat_fd(fd)
        if (ours.st_dev, ours.st_ino) != (opened.st_dev, opened.st_ino):
            raise StorageError(
                f"{self._path} was replaced while it was being created; look who writes into "
                "this store"
            )
        self._direct_fd = fd

    def _give_up(self) -> None:
        """Close everything and remove an uncommitted file; failures are only logged."""
        try:
            while self._fds:
                fd = self._fds.pop()
                try:
                    self._ops.close(fd)
                except OSError:
                    _LOG.debug("closing %s, which was given up, failed", self._path, exc_info=True)
            if not self._is_committed:
                self._ops.unlink(self._name, dir_fd=self._dir_fd)
        except OSError:
            _LOG.debug("%s was given up but not removed", self._path, exc_info=True)
        finally:
            close_unwritten(self._ops, self._dir_fd)


@final
class LocalReader:
    """One file open for ranged reads. Thread-safe."""

    def __init__(
        self, ops: FileOps, path: str, *, fd: int, nbytes: int, reopen: Callable[[int], int]
    ) -> None:
        """Take over `fd` of a regular file with `nbytes`.

        Args:
            ops: The file operations.
            path: For messages.
            fd: Descriptor for reads through the page cache.
            nbytes: Size of the file.
            reopen: Opens the same name with further flags; may raise `OSError`.
        """
        self._ops: Final = ops
        self._path: Final = path
        self._fd: Final = fd
        self._nbytes: Final = nbytes
        self._reopen: Final = reopen
        self._lock: Final = threading.Lock()
        self._direct_fd: int | None = None if nbytes >= _DIRECT_FROM_BYTES else -1
        self._calls: Final = _Calls(self._release)

    @property
    def nbytes(self) -> int:
        """Size of the file when it was opened."""
        return self._nbytes

    def read_into(self, offset: int, address: int, nbytes: int) -> None:
        """Fill `nbytes` at `address` from byte `offset`; safe to call from several threads.

        Raises:
            StorageError: The read failed or the file ended early.
        """
        with self._calls.inside("read", self._path):
            read_exactly(self._ops, self._path, self._fd, offset, address, nbytes)

    @contextmanager
    def lend(self) -> Iterator[LentFile]:
        """Lend the descriptors to native code for the block; until its end they stay open.

        Raises:
            StorageError: The reader was closed, or a read in the block failed.
        """
        with self._calls.inside("read", self._path), storage_errors("read", self._path):
            with self._lock:
                if self._direct_fd is None:
                    self._direct_fd = self._open_direct()
            direct_fd = self._direct_fd
            yield LentFile(self._fd, direct_fd, self._ops.native_calls())

    def close(self) -> None:
        """Release the file. Never raises."""
        self._calls.end()

    def _open_direct(self) -> int:
        """Return a second descriptor for reads past the page cache; -1 where there is none to have.

        Whatever the reason, nothing is lost by it: every byte can be read by the first.
        """
        try:
            fd = self._reopen(os.O_DIRECT)
        except OSError:
            _LOG.debug("%s is read through the page cache only", self._path, exc_info=True)
            return -1
        try:
            ours, opened = self._ops.stat_fd(self._fd), self._ops.stat_fd(fd)
            if (ours.st_dev, ours.st_ino) == (opened.st_dev, opened.st_ino):
                return fd
        except BaseException:
            close_unwritten(self._ops, fd)
            raise
        close_unwritten(self._ops, fd)  # The name means another file by now.
        return -1

    def _release(self) -> None:
        if self._direct_fd is not None and self._direct_fd >= 0:
            close_unwritten(self._ops, self._direct_fd)
        close_unwritten(self._ops, self._fd)


def read_exactly(ops: FileOps, path: str, fd: int, offset: int, address: int, nbytes: int) -> None:
    """Fill `nbytes` at `address` from byte `offset` of an open file.

    Raises:
        StorageError: The read failed or the file ended early.
    """
    try:
        got = ops.read_at(fd, address, nbytes, offset)
    except OSError as error:
        raise storage_error(f"read bytes {offset} to {offset + nbytes} of", path, error) from error
    if got != nbytes:
        raise StorageError(
            f"cannot read bytes {offset} to {offset + nbytes} of {path}: it ends at byte "
            f"{offset + got}, {nbytes - got} bytes short. The file was cut; verify the checkpoint "
            "or restore another step."
        )


def _check_regular(name: str, status: os.stat_result, directory: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(
            f"{name} is not a regular file (mode {status.st_mode:o}), so it is not opened; "
            "nothing of this kind belongs into a store: look who put it there and remove it"
        )
    if status.st_nlink > 1 and status.st_uid not in {os.geteuid(), directory.st_uid}:
        raise StorageError(
            f"{name} has {status.st_nlink} names and belongs to user {status.st_uid}, neither us "
            "nor the owner of its directory, so it is not opened; look who linked it and remove it"
        )
