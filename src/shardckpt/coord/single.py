"""The coordination of a job of one process: a dictionary.

Layer: coord.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, final

from shardckpt.coord.base import ask_again, get_in_order

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class SingleCoord:
    """A world of one rank. Thread-safe."""

    def __init__(self) -> None:
        """Begin empty."""
        self._values: Final[dict[str, bytes]] = {}
        self._lock: Final = threading.Lock()

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def set(self, key: str, value: bytes) -> None:
        """Publish a copy of a value."""
        with self._lock:
            self._values[key] = bytes(value)

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet."""
        with self._lock:
            return self._values.get(key)

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys, None from the first absent one on."""
        return get_in_order(self.get, keys)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`."""
        return ask_again(self.get, key, timeout_s)

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine."""
        with self._lock:
            self._values.pop(key, None)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
