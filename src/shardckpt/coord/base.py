"""How ranks agree: a key-value store with deadlines. No collectives.

Layer: coord. Values are small bounded bytes. Every wait has a name and a deadline, and watches an
abort key so that the first error of any rank ends every wait.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable

_POLL_FIRST_S: Final = 0.0005
_POLL_MOST_S: Final = 0.02


class Coord(Protocol):
    """A key-value store shared by the ranks of one job. Thread-safe."""

    @property
    def rank(self) -> int:
        """This rank; rank 0 is the coordinator."""

    @property
    def world_size(self) -> int:
        """Ranks in the job."""

    def set(self, key: str, value: bytes) -> None:
        """Publish a value.

        Raises:
            DeadlineError: The store did not answer in time.
        """

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet; never waits for it.

        Raises:
            DeadlineError: The store did not answer in time.
        """

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine. Best effort, never raises."""

    def close(self) -> None:
        """Release connections and threads. Never raises."""


class AbortedWaitError(Exception):
    """Internal: the abort key appeared during a wait; carries its value."""

    def __init__(self, value: bytes) -> None:
        """Keep the published value."""
        super().__init__(value)
        self.value = value


def wait_for(
    coord: Coord,
    key: str,
    *,
    what: str,
    timeout_s: float,
    abort_key: str | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes:
    """Wait until `key` is published and return its value.

    Args:
        coord: The store.
        key: Key to wait for.
        what: Name of the wait for the message, for example "rank 3's report of step 40".
        timeout_s: Seconds until giving up.
        abort_key: A key whose appearance ends the wait early.
        monotonic: Clock.
        sleep: Sleeper.

    Raises:
        DeadlineError: Nothing was published in time; names `what`.
        AbortedWaitError: `abort_key` was published first.
    """
    deadline = monotonic() + timeout_s
    pause_s = _POLL_FIRST_S
    while True:
        value = coord.get(key)
        if value is not None:
            return value
        if abort_key is not None:
            abort = coord.get(abort_key)
            if abort is not None:
                raise AbortedWaitError(abort)
        remaining_s = deadline - monotonic()
        if remaining_s <= 0:
            raise DeadlineError(f"waited {timeout_s:g} s for {what}, which did not come")
        sleep(min(pause_s, remaining_s))
        pause_s = min(pause_s * 1.5, _POLL_MOST_S)
