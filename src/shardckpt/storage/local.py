"""A store in a local or shared directory.

Layer: storage. How an object becomes durable here, in numbered steps:

`put_if_absent` (small objects, one winner):
    1. Write a temporary with a random name, `.tmp-<128 random bits>`, in the same directory.
    2. Flush it and close it, both checked: the bytes are durable under a name that nobody lists.
    3. `link` it to the final name. The kernel lets exactly one succeed; EEXIST means another one
       won, unless the temporary now has two names: then the win was ours and only its answer was
       lost.
    4. fsync the directory: the final name is durable. Only now is True returned.
    5. Unlink the temporary.

`create` ... `commit` (large objects, one writer each):
    1. Create the final name with O_EXCL|O_NOFOLLOW and reserve the space, so a full disk shows at
       once.
    2. Write: past the page cache where offset, address and size allow it, buffered elsewhere.
    3. Cut to size, flush once, close every descriptor. Any failure gives the file up; nothing is
       retried.
    4. fsync the directory.

Directories are made on the way, each one's name made durable in its parent before anything goes
inside. A process that dies in a put leaves one temporary; the next `delete` in that directory
removes it. No clock tells a dead writer's temporary from a live one's, and none has to: a put that
finds its temporary gone starts again at step 1.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, final

from shardckpt.errors import StorageError
from shardckpt.storage.failure import storage_error, storage_errors
from shardckpt.storage.fileops import FileOps, PosixFileOps, close_unwritten
from shardckpt.storage.keys import is_name, split_key, split_prefix
from shardckpt.storage.local_dirs import Directories
from shardckpt.storage.local_files import (
    LocalReader,
    LocalWriter,
    create_file,
    open_regular,
    read_exactly,
    reopen,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEMPORARY: Final = ".tmp-"
_MOST_PUT_ATTEMPTS: Final = 8
_NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@final
class LocalStorage:
    """A store in a directory. Thread-safe; holds no descriptor between calls."""

    def __init__(self, root: str | os.PathLike[str], *, ops: FileOps | None = None) -> None:
        """Name the directory; nothing is touched yet.

        Args:
            root: The directory; made by `prepare`. A relative path is taken from where we are now.
            ops: The file operations; the system's own by default.
        """
        self._root: Final = os.path.abspath(os.fspath(root))
        self._ops: Final[FileOps] = PosixFileOps() if ops is None else ops
        self._dirs: Final = Directories(self._root, self._ops)

    @property
    def url(self) -> str:
        """The directory's absolute path."""
        return self._root

    def prepare(self) -> None:
        """Make the directory where it is missing and prove that files can be made in it.

        Raises:
            StorageError: It cannot be made, is not a directory, or cannot be written to.
        """
        try:
            self._dirs.make_root()
        except NotADirectoryError as error:
            raise storage_error(
                "prepare the store",
                self._root,
                error,
                "Something on this path is a file: name a directory.",
            ) from error
        except OSError as error:
            raise storage_error("prepare the store", self._root, error) from error
        with storage_errors("write into the store", self._root), self._dirs.opened(()) as dir_fd:
            probe = _temporary_name()
            self._ops.close(create_file(self._ops, probe, dir_fd=dir_fd))
            self._ops.unlink(probe, dir_fd=dir_fd)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create `key` in one atomic step; return False where it exists. Durable when True.

        Raises:
            StorageError: The put failed; whether the object exists, only reading it tells.
        """
        *above, name = split_key(key)
        path = self._path(key)
        with storage_errors("put", path), self._dirs.made(above) as dir_fd:
            for _ in range(_MOST_PUT_ATTEMPTS):
                with suppress(_TemporaryGoneError):
                    return self._put_once(dir_fd, name, data)
        raise StorageError(
            f"cannot put {path}: its temporary was removed {_MOST_PUT_ATTEMPTS} times by deletes "
            "beside it; find out who keeps deleting in this directory, then try again"
        )

    def create(self, key: str, nbytes: int) -> LocalWriter:
        """Start a new object of about `nbytes`; an existing key is an error.

        Raises:
            StorageError: The key exists, or there is no room.
        """
        *above, name = split_key(key)
        path = self._path(key)
        with storage_errors("create", path):
            dir_fd = self._dirs.hold(above)
            try:
                fd = create_file(self._ops, name, dir_fd=dir_fd)
            except BaseException:
                close_unwritten(self._ops, dir_fd)
                raise
        writer = LocalWriter(self._ops, path, name, dir_fd=dir_fd, fd=fd)
        try:
            writer.reserve(nbytes)
        except BaseException:
            writer.abort()
            raise
        return writer

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return the whole object.

        Raises:
            FileNotFoundError: There is no such key.
            StorageError: The read failed, or it is no regular file or exceeds `max_bytes`.
        """
        path = self._path(key)
        fd, nbytes = self._open_existing(key)
        try:
            if nbytes > max_bytes:
                raise StorageError(
                    f"cannot read {path}: it has {nbytes} bytes, at most {max_bytes} are allowed "
                    "here. It is damaged or not what its name says; verify the checkpoint."
                )
            buffer = ctypes.create_string_buffer(max(nbytes, 1))
            read_exactly(self._ops, path, fd, 0, ctypes.addressof(buffer), nbytes)
            return buffer.raw[:nbytes]
        finally:
            close_unwritten(self._ops, fd)

    def open(self, key: str) -> LocalReader:
        """Open an object for ranged reads.

        Raises:
            FileNotFoundError: There is no such key.
            StorageError: It is not a regular file or cannot be opened.
        """
        fd, nbytes = self._open_existing(key)
        return LocalReader(
            self._ops, self._path(key), fd=fd, nbytes=nbytes, reopen=partial(self._reopen, key)
        )

    def list(self, prefix: str) -> Sequence[str]:
        """Return the names directly below `prefix`, sorted; those no key can have are left out.

        Raises:
            StorageError: The listing failed.
        """
        try:
            with storage_errors("list", self._path(prefix)):
                return self._names(split_prefix(prefix))
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def sync(self, prefix: str) -> None:
        """Make every name directly below `prefix` durable that a listing shows.

        Raises:
            StorageError: The flush failed.
        """
        parts = split_prefix(prefix)
        with storage_errors("make the names durable in", self._path(prefix)):
            try:
                with self._dirs.opened(parts) as dir_fd:
                    self._ops.fsync_dir(dir_fd)
            except FileNotFoundError:
                return  # An absent directory lists no names.

    def delete(self, key: str) -> None:
        """Remove one object and the temporaries beside it; an absent key is fine. Not durable.

        Raises:
            StorageError: The removal failed.
        """
        *above, name = split_key(key)
        with storage_errors("delete", self._path(key)):
            try:
                with self._dirs.opened(above) as dir_fd:
                    self._unlink(dir_fd, name)
                    for other in self._ops.names(dir_fd):
                        if other.startswith(_TEMPORARY):
                            self._unlink(dir_fd, other)
            except FileNotFoundError:
                return

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below `prefix` and the prefix itself; follows no links. Not durable.

        Raises:
            StorageError: The removal failed half-way; calling it again goes on.
        """
        parts = split_key(prefix)
        with storage_errors("delete everything below", self._path(prefix)):
            self._dirs.remove(parts)

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _names(self, parts: Sequence[str]) -> Sequence[str]:
        with self._dirs.opened(parts) as dir_fd:
            return sorted(name for name in self._ops.names(dir_fd) if is_name(name))

    def _unlink(self, dir_fd: int, name: str) -> None:
        with suppress(FileNotFoundError):
            self._ops.unlink(name, dir_fd=dir_fd)

    def _open_existing(self, key: str) -> tuple[int, int]:
        *above, name = split_key(key)
        path = self._path(key)
        try:
            with self._dirs.opened(above) as dir_fd:
                return open_regular(self._ops, name, dir_fd=dir_fd)
        except StorageError as error:
            raise StorageError(f"cannot open {path}: {error}") from error
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", path) from None
        except OSError as error:
            raise storage_error("open", path, error) from error

    def _reopen(self, key: str, flags: int) -> int:
        *above, name = split_key(key)
        with self._dirs.opened(above) as dir_fd:
            return reopen(self._ops, name, flags, dir_fd=dir_fd)

    def _put_once(self, dir_fd: int, name: str, data: bytes) -> bool:
        temporary = _temporary_name()
        try:
            self._write_temporary(dir_fd, temporary, data)
            if not self._link(dir_fd, temporary, name):
                return False
            # The bytes are durable since the flush above, but the new name lives in the directory:
            # without this a power cut loses an object that was acknowledged.
            self._ops.fsync_dir(dir_fd)
            return True
        finally:
            with suppress(OSError):  # What stays behind is harmless; the next delete removes it.
                self._ops.unlink(temporary, dir_fd=dir_fd)

    def _write_temporary(self, dir_fd: int, temporary: str, data: bytes) -> None:
        fd = create_file(self._ops, temporary, dir_fd=dir_fd)
        try:
            if data:
                source = ctypes.create_string_buffer(data, len(data))
                self._ops.write_at(fd, ctypes.addressof(source), len(data), 0)
            self._ops.fdatasync(fd)
        except BaseException:
            with suppress(OSError):  # The failure above is the one to report.
                self._ops.close(fd)
            raise
        self._ops.close(fd)

    def _link(self, dir_fd: int, temporary: str, name: str) -> bool:
        try:
            self._ops.link(temporary, name, dir_fd=dir_fd)
        except FileExistsError:
            return self._has_two_names(dir_fd, temporary)
        except FileNotFoundError as error:
            raise _TemporaryGoneError from error
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise storage_error(
                "put",
                os.path.join(self._root, "...", name),
                error,
                "The file system refuses hard links, without which no put has exactly one winner; "
                "put the store on one that has them (ext4, XFS, btrfs, NFS, Lustre, GPFS).",
            ) from error
        return True

    def _has_two_names(self, dir_fd: int, temporary: str) -> bool:
        """Return whether a put that was told "exists" had won: a server may repeat a request."""
        try:
            return self._ops.stat_name(temporary, dir_fd=dir_fd).st_nlink > 1
        except FileNotFoundError as error:
            raise _TemporaryGoneError from error


class _TemporaryGoneError(Exception):
    """Internal: a delete beside a put removed its temporary."""


def _temporary_name() -> str:
    return f"{_TEMPORARY}{secrets.token_hex(16)}"
