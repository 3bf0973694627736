"""Coordination through torch's own key-value store, without its process group.

Layer: torch. A c10d store has one connection per client: a call that waits blocks every other user
of it, and no call heeds its timeout once the server is gone. So this one has a connection of its
own, used by one helper thread that is left behind when it does not answer (`coord.bounded`), and
another one for calls that wait.
TCPStore drops the connection on a value of more than 8 MiB, so large values travel in parts.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import torch

from shardckpt.coord.base import ask_again, get_in_order
from shardckpt.coord.bounded import BoundedCalls, WaitingCalls
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError
from shardckpt.torch import private

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardckpt.coord.base import Coord

PREFIX: Final = "shardckpt"
PART_BYTES: Final = 4 << 20
_WHOLE: Final = b"w"
_PARTS: Final = b"p"
# Longer than anybody waits: a client that gives up in the store prints warnings.
_WAITS_PER_TIMEOUT: Final = 3
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
        self._waiting = WaitingCalls(self._connect_to_wait, rank)
        self._num_parts: dict[str, int] = {}

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
        self._num_parts[key] = len(parts)

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet; never waits for it.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        return self._joined(key, self._get(key))

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys in two requests, or None for all where one is absent.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        names = list(keys)
        raws = self._call(f"get {len(names)} keys", lambda store: _get_many(store, names))
        if raws is None:
            return get_in_order(self.get, keys)
        return [self._joined(key, raw) for key, raw in zip(names, raws, strict=True)]

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Return the value once it is published, or None after `timeout_s`.

        Raises:
            DeadlineError: The store failed.
        """
        what = f"wait {key}"
        if not self._waiting.has_room(what):
            return ask_again(self.get, key, timeout_s)
        raw = self._waiting.call(what, lambda store: _wait(store, key), timeout_s)
        return ask_again(self.get, key, timeout_s) if raw == b"" else self._joined(key, raw)

    def delete(self, key: str) -> None:
        """Forget a key; an absent key is fine. Best effort, never raises.

        Of a value in parts whoever set or got it knows the parts.
        """
        num_parts = self._num_parts.pop(key, 0)
        try:
            for name in (key, *(f"{key}#{i}" for i in range(num_parts))):
                self._delete(name)
        except DeadlineError:
            return

    def close(self) -> None:
        """Let the helper threads end. Never raises."""
        self._calls.close()
        self._waiting.close()

    def _joined(self, key: str, raw: bytes | None) -> bytes | None:
        """Return the value that a key's raw bytes stand for."""
        if raw is None or raw[:1] == _WHOLE:
            return None if raw is None else raw[1:]
        num_parts = self._num_parts[key] = int(raw[1:])
        parts = [self._get(f"{key}#{i}") for i in range(num_parts)]
        # A part is absent only where the value was deleted meanwhile.
        return None if None in parts else b"".join(part[1:] for part in parts if part is not None)

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
        # A kind of store that cannot be cloned is shared; these calls never wait, so nobody is
        # blocked long.
        own = _own_connection(self._store, self._timeout_s)
        return _prefixed(self._store if own is None else own)

    def _connect_to_wait(self) -> Any:
        own = _own_connection(self._store, _WAITS_PER_TIMEOUT * self._timeout_s)
        return None if own is None else _prefixed(own)


def _prefixed(store: Any) -> Any:
    return torch.distributed.distributed_c10d.PrefixStore(PREFIX, store)


def _own_connection(store: Any, timeout_s: float) -> Any:
    """Return a connection that nobody else uses; None where the store has none to give."""
    clone = getattr(store, "clone", None)
    if clone is None:
        return None
    try:
        own = clone()
    except RuntimeError:
        return None
    own.set_timeout(timedelta(seconds=timeout_s))
    return own


def _get_many(store: Any, keys: list[str]) -> list[bytes] | list[None] | None:
    """Return all values, Nones where one is absent; None where the store takes single keys only."""
    if not store.has_extended_api():
        return None
    if not store.check(keys):
        return [None] * len(keys)
    values: list[bytes] = store.multi_get(keys)
    return values


def _wait(store: Any, key: str) -> bytes:
    """Return the raw value once it is there; b"", which no value is, without a connection."""
    if store is None:
        return b""
    raw: bytes = store.get(key)
    return raw
