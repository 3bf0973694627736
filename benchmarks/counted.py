"""A job's key-value store whose calls are counted, by kind, with their bytes."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.coord.base import Coord


@final
class CountedCoord:
    """Passes every call on and counts it. Thread-safe.

    A call is one operation: `get_many` of a thousand keys, too, where the store answers it at once.
    A wait is one operation however long it lasts; one that is gone on with counts again, although
    the store hears nothing of that, because a store that cannot wait would be asked again.

    Attributes:
        operations: Calls by kind.
        sent_bytes: Bytes of values that were set.
        received_bytes: Bytes of values that were got.
    """

    def __init__(self, coord: Coord) -> None:
        """Count the calls of `coord`."""
        self._coord = coord
        self._lock = threading.Lock()
        self.operations: Counter[str] = Counter()
        self.sent_bytes = 0
        self.received_bytes = 0

    @property
    def rank(self) -> int:
        """This rank."""
        return self._coord.rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self._coord.world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a value."""
        self._count("set", sent_bytes=len(value))
        self._coord.set(key, value)

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet."""
        value = self._coord.get(key)
        self._count("get", received_bytes=len(value or b""))
        return value

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys."""
        values = self._coord.get_many(keys)
        self._count("get_many", received_bytes=sum(len(value or b"") for value in values))
        return values

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`."""
        value = self._coord.wait(key, timeout_s)
        self._count("wait", received_bytes=len(value or b""))
        return value

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._count("delete")
        self._coord.delete(key)

    def close(self) -> None:
        """Release what the store holds."""
        self._coord.close()

    def _count(self, kind: str, sent_bytes: int = 0, received_bytes: int = 0) -> None:
        with self._lock:
            self.operations[kind] += 1
            self.sent_bytes += sent_bytes
            self.received_bytes += received_bytes
