"""The coordination of a job of one process: a dictionary.

Layer: coord.
"""

from __future__ import annotations

import threading
from typing import Final, final


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

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine."""
        with self._lock:
            self._values.pop(key, None)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
