"""The one table of file operations: every file call of the engine goes through a `FileOps`.

Layer: storage. Recording, fault injection and kill points hook in here
(`shardckpt.testing.faults`), so nothing else in the package may touch the file system; a test
greps for it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import Final, Protocol, final

from shardckpt import native
from shardckpt.pure import TRANSFER_CALL, WAIT_CALL, FileCalls

_LOG: Final = logging.getLogger("shardckpt.storage")


class FileOps(Protocol):
    """File operations by descriptor and by name inside an open directory. Thread-safe.

    A `dir_fd` of None means that `name` is an absolute path. Every method raises `OSError` when it
    fails.
    """

    def open(self, name: str, flags: int, *, dir_fd: int | None, mode: int = 0o600) -> int:
        """Open `name` and return a descriptor that child programs do not inherit."""

    def close(self, fd: int) -> None:
        """Close `fd`; it is gone even when this raises, so it is never closed again."""

    def write_at(self, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Write all of `nbytes` at `address` to byte `offset`, however many calls it takes."""

    def read_at(self, fd: int, address: int, nbytes: int, offset: int) -> int:
        """Fill `nbytes` at `address` from byte `offset`; fewer only at the end of the file."""

    def native_calls(self) -> int:
        """Return what native threads read and write by, so that their calls come here, too.

        The address of a `FileCalls` that lives as long as this object (see `calls_into`), or 0 for
        the system's own calls.
        """

    def truncate(self, fd: int, nbytes: int) -> None:
        """Make the file `nbytes` long."""

    def fallocate(self, fd: int, nbytes: int) -> None:
        """Reserve room for `nbytes`; EOPNOTSUPP where the file system cannot."""

    def fdatasync(self, fd: int) -> None:
        """Make the bytes and the size of a file durable; not its name."""

    def fsync_dir(self, fd: int) -> None:
        """Make the names in a directory durable; not the bytes behind them."""

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        """Give `source` the second name `target`; EEXIST where that is taken."""

    def unlink(self, name: str, *, dir_fd: int) -> None:
        """Remove a name that is not a directory."""

    def mkdir(self, name: str, *, dir_fd: int | None, mode: int = 0o700) -> None:
        """Make a directory."""

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        """Remove an empty directory."""

    def names(self, fd: int) -> list[str]:
        """Return the names in a directory, in any order."""

    def stat_fd(self, fd: int) -> os.stat_result:
        """Return the status of an open file."""

    def stat_name(self, name: str, *, dir_fd: int) -> os.stat_result:
        """Return the status of a name; a symbolic link is not followed."""


def calls_into(ops: FileOps) -> FileCalls:
    """Return C functions that run `write_at` and `read_at` of `ops`, from any thread.

    They must outlive every native call that was given their address.
    """

    def pwrite(fd: int, address: int | None, nbytes: int, offset: int) -> int:
        try:
            ops.write_at(fd, address or 0, nbytes, offset)
        except BaseException as error:
            return _failed(error)
        return nbytes

    def pread(fd: int, address: int | None, nbytes: int, offset: int) -> int:
        try:
            return ops.read_at(fd, address or 0, nbytes, offset)
        except BaseException as error:
            return _failed(error)

    def wait_ready(fd: int, timeout_ms: int) -> None:
        """Return at once: whoever answers EAGAIN here decides how often."""

    return FileCalls(TRANSFER_CALL(pwrite), TRANSFER_CALL(pread), WAIT_CALL(wait_ready))


def _failed(error: BaseException) -> int:
    """Hand an exception to C as its errno, with -1 as the result."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None:
        _LOG.error("a file operation called by native code raised no errno", exc_info=error)
    ctypes.set_errno(code or errno.EIO)
    return -1


def close_unwritten(ops: FileOps, fd: int) -> None:
    """Close a descriptor nothing was written through. Never raises: there is nothing to lose."""
    try:
        ops.close(fd)
    except OSError:
        _LOG.debug("closing descriptor %d, only read from, failed", fd, exc_info=True)


@final
class PosixFileOps:
    """The system's own calls."""

    def __init__(self, *, flush: bool = True) -> None:
        """Choose whether flushes reach the disk.

        Args:
            flush: False turns `fdatasync` and `fsync_dir` into nothing: right for files that no
                power cut needs to leave behind (keys of a `FileCoord`), wrong for checkpoints.
        """
        self._flush: Final = flush

    def open(self, name: str, flags: int, *, dir_fd: int | None, mode: int = 0o600) -> int:
        """Open `name` and return a descriptor that child programs do not inherit."""
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close `fd`; it is gone even when this raises, so it is never closed again."""
        os.close(fd)

    def write_at(self, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Write all of `nbytes` at `address` to byte `offset`, however many calls it takes."""
        native.write_full(fd, address, nbytes, offset)

    def read_at(self, fd: int, address: int, nbytes: int, offset: int) -> int:
        """Fill `nbytes` at `address` from byte `offset`; fewer only at the end of the file."""
        return native.read_full(fd, address, nbytes, offset)

    def native_calls(self) -> int:
        """Return 0: native threads make the same calls themselves."""
        return 0

    def truncate(self, fd: int, nbytes: int) -> None:
        """Make the file `nbytes` long."""
        os.ftruncate(fd, nbytes)

    def fallocate(self, fd: int, nbytes: int) -> None:
        """Reserve room for `nbytes`; EOPNOTSUPP where the file system cannot.

        Raises:
            OSError: There is no room, or the file system cannot reserve any.
        """
        # Not os.posix_fallocate: where the file system cannot, libc writes to every block.
        while _fallocate(fd, 0, 0, nbytes) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def fdatasync(self, fd: int) -> None:
        """Make the bytes and the size of a file durable; not its name."""
        if self._flush:
            os.fdatasync(fd)

    def fsync_dir(self, fd: int) -> None:
        """Make the names in a directory durable; not the bytes behind them."""
        if self._flush:
            os.fsync(fd)

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        """Give `source` the second name `target`; EEXIST where that is taken."""
        os.link(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        """Remove a name that is not a directory."""
        os.unlink(name, dir_fd=dir_fd)

    def mkdir(self, name: str, *, dir_fd: int | None, mode: int = 0o700) -> None:
        """Make a directory."""
        os.mkdir(name, mode, dir_fd=dir_fd)

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        """Remove an empty directory."""
        os.rmdir(name, dir_fd=dir_fd)

    def names(self, fd: int) -> list[str]:
        """Return the names in a directory, in any order."""
        return os.listdir(fd)

    def stat_fd(self, fd: int) -> os.stat_result:
        """Return the status of an open file."""
        return os.fstat(fd)

    def stat_name(self, name: str, *, dir_fd: int) -> os.stat_result:
        """Return the status of a name; a symbolic link is not followed."""
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
