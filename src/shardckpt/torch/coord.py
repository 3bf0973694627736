"""Coordination through torch's own key-value store, without its process group.

Layer: torch. A c10d store has one connection per client: a call that waits blocks every other user
of it, and no call heeds its timeout once the server is gone. So this one has a connection of its
own, used by one helper thread that is left behind when it does not answer (`coord.bounded`).
TCPStore drops the connection on a value of more than 8 MiB, so large values travel in parts.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import torch

from shardckpt.coord.bounded import BoundedCalls
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError
from shardckpt.torch import private

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.coord.base import Coord

PREFIX: Final = "shardckpt"
PART_BYTES: Final = 4 << 20
_WHOLE: Final = b"w"
_PARTS: Final = b"p"
T = TypeVar("T")


def default_coord(timeout_s: float) -> Coord:
    """Return the coordination of this job: torch's store, or a dictionary for a job of one process.

    Args:
        timeout_s: Seconds that one call of the store may take.

    Raises:
        ValueError: The environment says several ranks, but torch.distributed is not initialised.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        if world_size == 1:
            return SingleCoord()
        return C10dCoord(private.default_store(), rank, world_size, timeout_s=timeout_s)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() first, or pass coord="
        )
    return SingleCoord()


@final
class C10dCoord:
    """The keys of one job in a c10d store (TCPStore, FileStore, HashStore). Thread-safe."""

    def __init__(self, store: Any, rank: int, world_size: int, *, timeout_s: float) -> None:
        """Use a store that all ranks share; the trainer may go on using it.

        Args:
            store: The job's store.
            rank: This rank.
            world_size: Ranks in the job.
            timeout_s: Seconds that one call may take.

        Raises:
            ValueError: The rank is not below the world size.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size} ranks")
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._calls = BoundedCalls(self._connect, rank, timeout_s)

    @property
    def rank(self) -> int:
        """This rank; rank 0 is the coordinator."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self._world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a value, its parts first, so that a reader finds all of it or nothing.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        if len(value) < PART_BYTES:
            self._set(key, _WHOLE + value)
            return
        parts = [value[i : i + PART_BYTES] for i in range(0, len(value), PART_BYTES)]
        for i, part in enumerate(parts):
            self._set(f"{key}#{i}", _WHOLE + part)
        self._set(key, _PARTS + str(len(parts)).encode())

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet; never waits for it.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        raw = self._get(key)
        if raw is None or raw[:1] == _WHOLE:
            return None if raw is None else raw[1:]
        parts = [self._get(f"{key}#{i}") for i in range(int(raw[1:]))]
        # A part is absent only where the value was deleted meanwhile.
        return None if None in parts else b"".join(part[1:] for part in parts if part is not None)

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine. Best effort, never raises."""
        try:
            raw = self._get(key)
            if raw is None:
                return
            num_parts = int(raw[1:]) if raw[:1] == _PARTS else 0
            for name in (key, *(f"{key}#{i}" for i in range(num_parts))):
                self._delete(name)
        except (DeadlineError, ValueError):
            return

    def close(self) -> None:
        """Let the helper thread end. Never raises."""
        self._calls.close()

    def _set(self, key: str, raw: bytes) -> None:
        self._call(f"set {key}", lambda store: store.set(key, raw))

    def _delete(self, key: str) -> None:
        self._call(f"delete {key}", lambda store: store.delete_key(key))

    def _get(self, key: str) -> bytes | None:
        # get() of an absent key would wait, so its presence is asked first.
        return self._call(
            f"get {key}", lambda store: store.get(key) if store.check([key]) else None
        )

    def _call(self, what: str, call: Callable[[Any], T]) -> T:
        return self._calls.call(what, call)

    def _connect(self) -> Any:
        prefixed = torch.distributed.distributed_c10d.PrefixStore
        return prefixed(PREFIX, _own_connection(self._store, self._timeout_s))


def _own_connection(store: Any, timeout_s: float) -> Any:
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        own = clone()
    except RuntimeError:
        # A kind of store that cannot be cloned is shared; calls here never wait, so nobody is
        # blocked long.
        return store
    own.set_timeout(timedelta(seconds=timeout_s))
    return own
