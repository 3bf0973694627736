"""The bytes side: what the engine asks of a store. Keys and bytes only.

Layer: storage. Keys are `/`-joined names of `[A-Za-z0-9._-]`, never absolute, never with `.` or
`..`. What is durable on return is stated per method; "durable" means it survives a power cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager


class LentFile(NamedTuple):
    """What native threads read or write a file by.

    Attributes:
        fd: Descriptor for calls through the page cache.
        direct_fd: The same file past the page cache, or -1.
        calls: `FileOps.native_calls()`.
    """

    fd: int
    direct_fd: int
    calls: int


class Writer(Protocol):
    """One new object being written; invisible or garbage until `commit` returns."""

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Write memory at `address` to byte `offset`; safe to call from several threads.

        Raises:
            StorageError: The write failed; the object must be given up.
        """

    def lend(self) -> AbstractContextManager[LentFile] | None:
        """Lend the file to native threads for the block; None where no descriptor leads to it.

        Raises:
            StorageError: An earlier write failed.
        """

    def fail(self, error: OSError) -> None:
        """Take note that a native write failed, and raise it.

        Raises:
            StorageError: Always.
        """

    def commit(self, nbytes: int) -> None:
        """Cut the object to `nbytes` and make it durable, name included. Never retried.

        Raises:
            StorageError: A flush or close failed; the object must be given up.
        """

    def abort(self) -> None:
        """Give the object up; its bytes may stay as garbage. Never raises."""


class Reader(Protocol):
    """One object open for ranged reads."""

    @property
    def nbytes(self) -> int:
        """Size of the object when it was opened."""

    def read_into(self, offset: int, address: int, nbytes: int) -> None:
        """Fill memory at `address` from byte `offset`; safe to call from several threads.

        Raises:
            StorageError: The read failed or the object ended early.
        """

    def lend(self) -> AbstractContextManager[LentFile] | None:
        """Lend the file to native code for the block; None where no descriptor leads to it.

        The block may run in several threads at once; an `OSError` in it leaves as a `StorageError`.

        Raises:
            StorageError: The object was closed, or a read in the block failed.
        """

    def close(self) -> None:
        """Release the object. Never raises."""


class Storage(Protocol):
    """A store: one directory, bucket prefix or dictionary."""

    @property
    def url(self) -> str:
        """Where the store is, without credentials; for messages."""

    def prepare(self) -> None:
        """Make the place writable objects can go into (create the directory); durable on return.

        Raises:
            StorageError: The place cannot be made or is not a directory.
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create `key` in one atomic step; False where it exists. Durable when True.

        On any error the object may or may not exist: the caller reads it back.

        Raises:
            StorageError: The put failed.
        """

    def create(self, key: str, nbytes: int) -> Writer:
        """Start a new object of about `nbytes`; an existing key is an error.

        Raises:
            StorageError: The key exists, or there is no room.
        """

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return the whole object.

        Raises:
            FileNotFoundError: There is no such key.
            StorageError: The read failed, it is not a regular object, or it is larger than
                `max_bytes`.
        """

    def open(self, key: str) -> Reader:
        """Open an object for ranged reads.

        Raises:
            FileNotFoundError: There is no such key.
            StorageError: It is not a regular object or cannot be opened.
        """

    def list(self, prefix: str) -> Sequence[str]:
        """Return the names directly below `prefix` (a directory key, "" for the top), sorted.

        An absent prefix is an empty one.

        Raises:
            StorageError: The listing failed.
        """

    def sync(self, prefix: str) -> None:
        """Make every name directly below `prefix` durable that a listing shows.

        Raises:
            StorageError: The flush failed.
        """

    def delete(self, key: str) -> None:
        """Remove one object; an absent key is fine. Not durable until `sync` of its parent.

        Raises:
            StorageError: The removal failed.
        """

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below `prefix` and the prefix itself; follows no links. Not durable.

        An absent prefix is fine.

        Raises:
            StorageError: The removal failed half-way; calling it again goes on.
        """
