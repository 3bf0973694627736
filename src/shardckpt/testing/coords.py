"""Coordination for ranks that are threads of one process.

Layer: testing.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, final

from shardckpt.coord.base import ask_again, get_in_order

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class MemoryCoordHub:
    """The shared dictionary of a job; `coord(rank)` is what one rank gets."""

    def __init__(self, world_size: int) -> None:
        """Begin empty.

        Args:
            world_size: Ranks in the job.
        """
        self.world_size: Final = world_size
        self.values: Final[dict[str, bytes]] = {}
        self.lock: Final = threading.Lock()

    def coord(self, rank: int) -> ThreadCoord:
        """Return the coordination of one rank.

        Raises:
            ValueError: There is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size} ranks")
        return ThreadCoord(self, rank)


@final
class ThreadCoord:
    """One rank's view of a `MemoryCoordHub`. Thread-safe."""

    def __init__(self, hub: MemoryCoordHub, rank: int) -> None:
        """Join `hub` as `rank`."""
        self._hub: Final = hub
        self._rank: Final = rank

    @property
    def rank(self) -> int:
        """This rank; rank 0 is the coordinator."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self._hub.world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a copy of a value."""
        with self._hub.lock:
            self._hub.values[key] = bytes(value)

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet."""
        with self._hub.lock:
            return self._hub.values.get(key)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys, None from the first absent one on."""
        return get_in_order(self.get, keys)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`."""
        return ask_again(self.get, key, timeout_s)

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine."""
        with self._hub.lock:
            self._hub.values.pop(key, None)

    def close(self) -> None:
        """Do nothing: the hub goes with its last reference."""
