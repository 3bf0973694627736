"""Walk a local store by descriptors, so that no symbolic link below the root is followed.

Layer: storage. A path is resolved one component at a time with O_DIRECTORY|O_NOFOLLOW; a link
planted by somebody else, before or during the walk, is an error and never a way out of the store.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, final

from shardckpt.errors import StorageError
from shardckpt.storage.fileops import close_unwritten

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardckpt.storage.fileops import FileOps

_ROOT_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
_DIR_FLAGS: Final = _ROOT_FLAGS | os.O_NOFOLLOW
_DEEPEST: Final = 16
_REMEMBERED_DIRS: Final = 256


@final
class Directories:
    """The directories of one store. Thread-safe; holds no descriptor between calls."""

    def __init__(self, root: str, ops: FileOps) -> None:
        """Take the absolute path of the root, which itself may be a link."""
        self._root: Final = root
        self._ops: Final = ops
        # Directories whose name this process made durable; a dict, because it keeps the order.
        self._durable: Final[dict[tuple[str, ...], None]] = {}
        self._lock: Final = threading.Lock()

    def make_root(self) -> None:
        """Make the root and what is missing above it, durable on return.

        Raises:
            OSError: A directory cannot be made, or something else stands in its place.
        """
        self._make_above(self._root)
        parent = os.path.dirname(self._root)
        try:
            fd = self._ops.open(parent, _ROOT_FLAGS, dir_fd=None)
        except PermissionError:
            # A parent that may not be read is one in which nobody here could have made the root.
            return
        with self._closing(fd):
            self._ops.fsync_dir(fd)

    @contextmanager
    def opened(self, parts: Sequence[str]) -> Iterator[int]:
        """Give the descriptor of an existing directory for the time of the block.

        Yields:
            The descriptor.

        Raises:
            OSError: It does not exist (FileNotFoundError), or a component is not a directory.
        """
        with self._walk(parts, make=False) as fd:
            yield fd

    @contextmanager
    def made(self, parts: Sequence[str]) -> Iterator[int]:
        """Give the descriptor of a directory, made where missing, all names down to it durable.

        Yields:
            The descriptor.

        Raises:
            OSError: It cannot be made, or a component is not a directory.
        """
        with self._walk(parts, make=True) as fd:
            yield fd

    def hold(self, parts: Sequence[str]) -> int:
        """Return the descriptor of a directory as `made` gives it; the caller closes it.

        Raises:
            OSError: It cannot be made, or a component is not a directory.
        """
        with self.made(parts) as fd:
            return self._ops.open(".", _DIR_FLAGS, dir_fd=fd)

    def remove(self, parts: Sequence[str]) -> None:
        """Remove a directory and everything below it; an absent one is fine.

        Raises:
            OSError: Something cannot be removed; doing it again goes on.
        """
        with self._lock:
            for known in [known for known in self._durable if known[: len(parts)] == tuple(parts)]:
                del self._durable[known]
        try:
            with self.opened(parts[:-1]) as fd:
                self._remove_name(fd, parts[-1], depth=0)
        except FileNotFoundError:
            return

    def _make_above(self, path: str) -> None:
        try:
            close_unwritten(self._ops, self._ops.open(path, _ROOT_FLAGS, dir_fd=None))
        except FileNotFoundError:
            parent = os.path.dirname(path)
            self._make_above(parent)
            try:
                self._ops.mkdir(path, dir_fd=None)
            except FileExistsError:
                # Another rank was faster; whether it made a directory, the next open tells.
                close_unwritten(self._ops, self._ops.open(path, _ROOT_FLAGS, dir_fd=None))
            with self._closing(self._ops.open(parent, _ROOT_FLAGS, dir_fd=None)) as fd:
                self._ops.fsync_dir(fd)

    @contextmanager
    def _walk(self, parts: Sequence[str], *, make: bool) -> Iterator[int]:
        fd = self._ops.open(self._root, _ROOT_FLAGS, dir_fd=None)
        try:
            for depth, part in enumerate(parts, start=1):
                path = tuple(parts[:depth])
                below = self._made_below(fd, path) if make else self._below(fd, part)
                above, fd = fd, below
                close_unwritten(self._ops, above)
            yield fd
        finally:
            close_unwritten(self._ops, fd)

    def _made_below(self, fd: int, path: tuple[str, ...]) -> int:
        try:
            below = self._below(fd, path[-1])
            with self._lock:
                is_durable = path in self._durable
        except FileNotFoundError:
            with suppress(FileExistsError):  # Another rank was faster.
                self._ops.mkdir(path[-1], dir_fd=fd)
            below = self._below(fd, path[-1])
            is_durable = False
        if not is_durable:
            # Also when another rank made it: that rank may not have come to its own fsync yet, and
            # what we put inside is only as durable as the names above it.
            try:
                self._ops.fsync_dir(fd)
            except BaseException:
                close_unwritten(self._ops, below)
                raise
            self._remember(path)
        return below

    def _remember(self, path: tuple[str, ...]) -> None:
        with self._lock:
            self._durable[path] = None
            while len(self._durable) > _REMEMBERED_DIRS:
                del self._durable[next(iter(self._durable))]

    def _below(self, fd: int, name: str) -> int:
        return self._ops.open(name, _DIR_FLAGS, dir_fd=fd)

    def _remove_name(self, fd: int, name: str, *, depth: int) -> None:
        """Remove `name`, whatever it is, and what is below it."""
        try:
            self._ops.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError) as refusal:
            self._remove_dir(fd, name, refusal, depth=depth)

    def _remove_dir(self, fd: int, name: str, refusal: OSError, *, depth: int) -> None:
        """Remove a directory; where `name` is none after all, raise why it was not unlinked."""
        try:
            # Before going down: the kernel answers EBUSY for a mount point, bind mounts included,
            # and ENOTEMPTY only for a directory of this very file system.
            self._ops.rmdir(name, dir_fd=fd)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise refusal from None
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            if depth == _DEEPEST:
                raise StorageError(
                    f"{name} lies more than {_DEEPEST} directories deep, which no checkpoint does; "
                    "look at it and remove it by hand"
                ) from error
            self._empty(fd, name, depth=depth)

    def _empty(self, fd: int, name: str, *, depth: int) -> None:
        with self._closing(self._below(fd, name)) as below:
            for inner in self._ops.names(below):
                self._remove_name(below, inner, depth=depth + 1)
        try:
            self._ops.rmdir(name, dir_fd=fd)
        except FileNotFoundError:
            return

    @contextmanager
    def _closing(self, fd: int) -> Iterator[int]:
        try:
            yield fd
        finally:
            close_unwritten(self._ops, fd)
