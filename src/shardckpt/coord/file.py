"""Coordination through a shared directory, for launchers that have no key-value store.

Layer: coord. Every key is one small object of a storage that is passed in. Values appear whole or
not at all, because the storage publishes them in one step.
"""

from __future__ import annotations

import hashlib
import logging
import re
from typing import TYPE_CHECKING, Final, Protocol, final

from shardckpt.coord.base import ask_again, get_in_order
from shardckpt.errors import DeadlineError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOG: Final = logging.getLogger("shardckpt.coord")
_MOST_VALUE_BYTES: Final = 64 << 20
_MOST_SET_ATTEMPTS: Final = 100
_LONGEST_NAME: Final = 190
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9-]")


class KeyStore(Protocol):
    """What is needed of a storage; every `shardckpt.storage.base.Storage` has it."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create `key` in one atomic step; return False where it exists."""

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return the whole object; FileNotFoundError where there is none."""

    def delete(self, key: str) -> None:
        """Remove one object; an absent key is fine."""


@final
class FileCoord:
    """The keys of one job as objects of a storage. Thread-safe.

    A failing storage raises `StorageError` where the other stores raise `DeadlineError`.
    """

    def __init__(self, storage: KeyStore, rank: int, world_size: int, *, job: str) -> None:
        """Join a job.

        Args:
            storage: Where the keys go. A `LocalStorage` with `PosixFileOps(flush=False)` is
                quickest: these keys need not survive a power cut.
            rank: This rank.
            world_size: Ranks in the job.
            job: Names this run and no other, the same on every rank: keys of a run before must not
                be taken for ours.

        Raises:
            ValueError: `rank` is not below `world_size`, or `job` is empty.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size} ranks")
        if not job:
            raise ValueError("the job has no name; pass one that differs from run to run")
        self._storage: Final = storage
        self._rank: Final = rank
        self._world_size: Final = world_size
        self._prefix: Final = _safe_name(job)

    @property
    def rank(self) -> int:
        """This rank; rank 0 is the coordinator."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self._world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a value; an earlier one of the same key is replaced.

        Raises:
            DeadlineError: Others kept replacing the same key.
            StorageError: The storage failed.
            ValueError: The value is larger than any that is ever needed.
        """
        if len(value) > _MOST_VALUE_BYTES:
            raise ValueError(
                f"value of {key!r} has {len(value)} bytes; at most {_MOST_VALUE_BYTES} are allowed"
            )
        name = self._name(key)
        for _ in range(_MOST_SET_ATTEMPTS):
            if self._storage.put_if_absent(name, value):
                return
            self._storage.delete(name)
        raise DeadlineError(
            f"could not publish {key!r}: others replaced it {_MOST_SET_ATTEMPTS} times meanwhile"
        )

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet; never waits for it.

        Raises:
            StorageError: The storage failed.
        """
        try:
            return self._storage.get(self._name(key), _MOST_VALUE_BYTES)
        except FileNotFoundError:
            return None

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys, None from the first absent one on.

        Raises:
            StorageError: The storage failed.
        """
        return get_in_order(self.get, keys)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`.

        Raises:
            StorageError: The storage failed.
        """
        return ask_again(self.get, key, timeout_s)

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine. Best effort, never raises."""
        try:
            self._storage.delete(self._name(key))
        except StorageError:
            _LOG.debug("key %r was not deleted", key, exc_info=True)

    def close(self) -> None:
        """Do nothing: no connection is held."""

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{_safe_name(key)}"


def _safe_name(key: str) -> str:
    """Return a name any storage accepts; different keys get different names."""
    name = "k" + _UNSAFE.sub(lambda found: f"_{ord(found[0]):x}_", key)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"h{hashlib.sha256(key.encode()).hexdigest()}"
