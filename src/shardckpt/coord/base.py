"""How ranks agree: a key-value store with deadlines. No collectives.

Layer: coord. Values are small bounded bytes. Every wait has a name and a deadline, and looks at an
abort key now and then, so that the first error of any rank ends every wait. A store that can wait
does so by itself: thousands of ranks that ask again and again would be all it has time for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_POLL_FIRST_S: Final = 0.0005
_POLL_MOST_S: Final = 0.02
_SLICE_FIRST_S: Final = 2.0
_SLICE_MOST_S: Final = 16.0


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

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys, in few requests where the store can; never waits for them.

        Where one is absent, others may be None although they are published: ask again.

        Raises:
            DeadlineError: The store did not answer in time.
        """

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`; one request, if it can.

        Waiting for the same key again goes on with that request.

        Raises:
            DeadlineError: The store failed.
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
) -> bytes:
    """Wait until `key` is published and return its value.

    The abort key is looked at after 2 s, then less and less often: whoever publishes `key` also
    publishes there that it failed, or heard of a failure (`coord.session`).

    Args:
        coord: The store.
        key: Key to wait for.
        what: Name of the wait for the message, for example "rank 3's report of step 40".
        timeout_s: Seconds until giving up.
        abort_key: A key whose appearance ends the wait early.
        monotonic: Clock.

    Raises:
        DeadlineError: Nothing was published in time; names `what`.
        AbortedWaitError: `abort_key` was published first.
    """
    deadline = monotonic() + timeout_s
    slice_s = _SLICE_FIRST_S
    while True:
        remaining_s = deadline - monotonic()
        value = coord.wait(key, max(0.0, min(slice_s, remaining_s)))
        if value is not None:
            return value
        if abort_key is not None:
            abort = coord.get(abort_key)
            if abort is not None:
                raise AbortedWaitError(abort)
        if remaining_s <= slice_s:
            raise DeadlineError(f"waited {timeout_s:g} s for {what}, which did not come")
        slice_s = min(slice_s * 2, _SLICE_MOST_S)


def ask_again(
    get: Callable[[str], bytes | None],
    key: str,
    timeout_s: float,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes | None:
    """Wait as `Coord.wait` does on a store that cannot: ask again and again.

    Args:
        get: Returns the value of a key, or None where it is absent.
        key: Key to wait for.
        timeout_s: Seconds until giving up.
        monotonic: Clock.
        sleep: Sleeper.
    """
    deadline = monotonic() + timeout_s
    pause_s = _POLL_FIRST_S
    while (value := get(key)) is None:
        remaining_s = deadline - monotonic()
        if remaining_s <= 0:
            break
        sleep(min(pause_s, remaining_s))
        pause_s = min(pause_s * 1.5, _POLL_MOST_S)
    return value


def get_in_order(get: Callable[[str], bytes | None], keys: Sequence[str]) -> list[bytes | None]:
    """Get as `Coord.get_many` does where every key is a request: up to the first absent one."""
    values: list[bytes | None] = []
    for key in keys:
        values.append(get(key))
        if values[-1] is None:
            break
    return values + [None] * (len(keys) - len(values))
