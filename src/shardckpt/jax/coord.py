"""Coordination through the key-value store of JAX's distributed runtime.

Layer: jax. Only the store: no barrier, which is for one use, and no collective on devices, which
would queue behind the training step. The runtime aborts every process when the one that serves the
store is gone, so such a loss is recovered by the next start, not by an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import jax

from shardckpt.coord.base import ask_again, get_in_order
from shardckpt.coord.bounded import BoundedCalls, WaitingCalls
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError
from shardckpt.jax import private

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardckpt.coord.base import Coord

T = TypeVar("T")
# Longer than anybody waits, so that no wait is ever begun twice.
_WAITS_PER_TIMEOUT: Final = 3


def default_coord(timeout_s: float) -> Coord:
    """Return the coordination of this job: JAX's store, or a dictionary for a single process.

    Args:
        timeout_s: Seconds that one call of the store may take.

    Raises:
        ValueError: There are several processes without a distributed runtime.
    """
    process, num_processes = jax.process_index(), jax.process_count()
    if num_processes == 1:
        return SingleCoord()
    client = private.client()
    if client is None:
        raise ValueError(
            f"this is process {process} of {num_processes}, but JAX's distributed runtime is not "
            "initialised; call jax.distributed.initialize() first, or pass coord="
        )
    return JaxCoord(client, process, num_processes, timeout_s=timeout_s)


@final
class JaxCoord:
    """The keys of one job in JAX's key-value store; a rank is a process. Thread-safe."""

    def __init__(self, client: Any, rank: int, world_size: int, *, timeout_s: float) -> None:
        """Use the store of the job; the trainer may go on using it.

        Args:
            client: Client of the distributed runtime.
            rank: Index of this process.
            world_size: Processes in the job.
            timeout_s: Seconds that one call may take.

        Raises:
            ValueError: The rank is not below the world size.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size} ranks")
        self._client = client
        self._rank = rank
        self._world_size = world_size
        self._calls = BoundedCalls(lambda: client, rank, timeout_s)
        self._waiting = WaitingCalls(lambda: client, rank)
        self._most_wait_ms = int(1000 * _WAITS_PER_TIMEOUT * timeout_s)

    @property
    def rank(self) -> int:
        """This process; process 0 is the coordinator."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return self._world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a value.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        name = _name(key)
        self._call(f"set {key}", lambda client: client.key_value_set_bytes(name, value, True))

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet; never waits for it.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        name = _name(key)
        return self._call(f"get {key}", lambda client: _get(client, name))

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys, None from the first absent one on.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        names = [_name(key) for key in keys]
        return self._call(
            f"get {len(names)} keys",
            lambda client: get_in_order(lambda name: _get(client, name), names),
        )

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`.

        Raises:
            DeadlineError: The store failed.
        """
        what, name = f"wait {key}", _name(key)
        if not self._waiting.has_room(what):
            return ask_again(self.get, key, timeout_s)
        most_ms = self._most_wait_ms
        return self._waiting.call(
            what, lambda client: client.blocking_key_value_get_bytes(name, most_ms), timeout_s
        )

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine. Best effort, never raises."""
        name = _name(key)
        try:
            self._call(f"delete {key}", lambda client: client.key_value_delete(name))
        except DeadlineError:
            return

    def close(self) -> None:
        """Let the helper threads end. Never raises."""
        self._calls.close()
        self._waiting.close()

    def _call(self, what: str, call: Callable[[Any], T]) -> T:
        return self._calls.call(what, call)


def _get(client: Any, name: str) -> bytes | None:
    try:
        value: bytes = client.key_value_try_get_bytes(name)
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("NOT_FOUND"):
            return None
        raise
    return value


def _name(key: str) -> str:
    # Deleting a key of this store deletes what lies below it, too, so ours have no slashes.
    return "shardckpt:" + key.replace("%", "%25").replace("/", "%2F")
