"""A store in a dictionary: for tests and for trying things out. Nothing in it outlives the process.

Layer: storage.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from typing import TYPE_CHECKING, Final, final

from shardckpt.errors import StorageError
from shardckpt.storage.keys import split_key, split_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class MemoryStorage:
    """A store in a dictionary. Thread-safe."""

    def __init__(self) -> None:
        """Begin empty."""
        self._objects: Final[dict[str, bytes]] = {}
        self._being_written: Final[set[str]] = set()
        self._lock: Final = threading.Lock()

    @property
    def url(self) -> str:
        """A name for messages; no other process can open it."""
        return f"memory store {id(self):x}"

    def prepare(self) -> None:
        """Do nothing: a dictionary is always ready."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create `key` with a copy of `data`; return False where it exists.

        Raises:
            StorageError: The key lies below an object, or objects lie below it.
        """
        split_key(key)
        with self._lock:
            if key in self._objects or key in self._being_written:
                return False
            self._check_place(key)
            self._objects[key] = bytes(data)
            return True

    def create(self, key: str, nbytes: int) -> MemoryWriter:
        """Start a new object; an existing key is an error.

        Raises:
            StorageError: The key exists, lies below an object, or objects lie below it.
        """
        split_key(key)
        with self._lock:
            if key in self._objects or key in self._being_written:
                raise _failure(errno.EEXIST, f"cannot create {key} in {self.url}: it exists")
            self._check_place(key)
            self._being_written.add(key)
        return MemoryWriter(self, key, nbytes)

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return the whole object.

        Raises:
            FileNotFoundError: There is no such key.
            StorageError: It is larger than `max_bytes`, or objects lie below the key.
        """
        data = self._existing(key)
        if len(data) > max_bytes:
            raise StorageError(
                f"cannot read {key} in {self.url}: it has {len(data)} bytes, at most {max_bytes} "
                "are allowed here"
            )
        return data

    def open(self, key: str) -> MemoryReader:
        """Open an object for ranged reads.

        Raises:
            FileNotFoundError: There is no such key.
            StorageError: Objects lie below the key.
        """
        return MemoryReader(key, self._existing(key))

    def list(self, prefix: str) -> Sequence[str]:
        """Return the names directly below `prefix`, sorted.

        Raises:
            StorageError: `prefix` is an object.
        """
        parts = split_prefix(prefix)
        with self._lock:
            if prefix in self._objects:
                raise _failure(
                    errno.ENOTDIR, f"cannot list {prefix} in {self.url}: it is an object"
                )
            paths = [key.split("/") for key in self._objects]
        return sorted({path[len(parts)] for path in paths if tuple(path[: len(parts)]) == parts})

    def sync(self, prefix: str) -> None:
        """Check the prefix; memory is as durable as it gets."""
        split_prefix(prefix)

    def delete(self, key: str) -> None:
        """Remove one object; an absent key is fine.

        Raises:
            StorageError: Objects lie below the key.
        """
        split_key(key)
        with self._lock:
            self._check_no_directory(key)
            self._objects.pop(key, None)

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below `prefix` and the prefix itself."""
        split_key(prefix)
        with self._lock:
            for key in [*self._objects]:
                if key == prefix or key.startswith(f"{prefix}/"):
                    del self._objects[key]

    def _finish(self, key: str, data: bytes | None) -> None:
        """Publish what a writer wrote, or with None forget that it was writing."""
        with self._lock:
            self._being_written.discard(key)
            if data is not None:
                self._objects[key] = data

    def _existing(self, key: str) -> bytes:
        split_key(key)
        with self._lock:
            self._check_no_directory(key)
            try:
                return self._objects[key]
            except KeyError:
                raise FileNotFoundError(errno.ENOENT, "there is no such object", key) from None

    def _check_place(self, key: str) -> None:
        self._check_no_directory(key)
        parts = split_key(key)
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if above in self._objects:
                raise _failure(
                    errno.ENOTDIR, f"cannot put {key} in {self.url}: {above} is an object"
                )

    def _check_no_directory(self, key: str) -> None:
        if any(other.startswith(f"{key}/") for other in self._objects):
            raise _failure(
                errno.EISDIR, f"{key} in {self.url} is not an object: others lie below it"
            )


@final
class MemoryWriter:
    """One new object, invisible until `commit` returns."""

    def __init__(self, storage: MemoryStorage, key: str, nbytes: int) -> None:
        """Write `key` of `storage`, about `nbytes` long."""
        self._storage: Final = storage
        self._key: Final = key
        self._data: Final = bytearray(nbytes)
        self._lock: Final = threading.Lock()
        self._is_over = False

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Copy `nbytes` of memory at `address` to byte `offset`; safe to call from several threads.

        Raises:
            StorageError: The object was committed or given up before.
        """
        data = ctypes.string_at(address, nbytes)
        with self._lock:
            self._check_open("write")
            self._data.extend(bytes(max(0, offset + nbytes - len(self._data))))
            self._data[offset : offset + nbytes] = data

    def lend(self) -> None:
        """Return None: there is no descriptor."""

    def fail(self, error: OSError) -> None:
        """Raise the failure of a native write; none can be.

        Raises:
            StorageError: Always.
        """
        raise StorageError(f"cannot write {self._key}: {error}") from error

    def commit(self, nbytes: int) -> None:
        """Cut the object to `nbytes` and make it visible.

        Raises:
            StorageError: The object was committed or given up before.
        """
        with self._lock:
            self._check_open("commit")
            self._is_over = True
            whole = bytes(self._data[:nbytes]) + bytes(max(0, nbytes - len(self._data)))
            self._storage._finish(self._key, whole)

    def abort(self) -> None:
        """Give the object up. Never raises."""
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self._storage._finish(self._key, None)

    def _check_open(self, operation: str) -> None:
        if self._is_over:
            raise StorageError(f"cannot {operation} {self._key}: it was closed or given up before")


@final
class MemoryReader:
    """One object open for ranged reads. Thread-safe."""

    def __init__(self, key: str, data: bytes) -> None:
        """Read `data`, the value of `key`."""
        self._key: Final = key
        self._data: Final = data

    @property
    def nbytes(self) -> int:
        """Size of the object."""
        return len(self._data)

    def read_into(self, offset: int, address: int, nbytes: int) -> None:
        """Fill `nbytes` of memory at `address` from byte `offset`.

        Raises:
            StorageError: The object ends early.
        """
        data = self._data[offset : offset + nbytes]
        if len(data) != nbytes:
            raise StorageError(
                f"cannot read bytes {offset} to {offset + nbytes} of {self._key}: it has "
                f"{len(self._data)} bytes"
            )
        ctypes.memmove(address, data, nbytes)

    def lend(self) -> None:
        """Return None: there is no file."""

    def close(self) -> None:
        """Do nothing: memory goes with its last reference."""


def _failure(code: int, message: str) -> StorageError:
    failure = StorageError(message)
    failure.errno = code
    return failure
