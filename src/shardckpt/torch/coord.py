"""Ranks agree through the job's own c10d store, over a connection of our own.

Layer: torch. A pending call on the trainer's client would block the trainer's own calls, and c10d
calls ignore their timeouts once the server is gone; so calls go over a clone of the store, in a
thread that may be left behind.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch.distributed as dist

from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError, ShardckptError
from shardckpt.torch.private import default_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.coord.base import Coord

T = TypeVar("T")


@final
class C10dCoord:
    """A `Coord` on a c10d store. Thread-safe."""

    def __init__(self, store: Any, rank: int, world_size: int, *, timeout_s: float) -> None:
        """Open an own connection.

        Args:
            store: A c10d Store; cloned.
            rank: This rank.
            world_size: Ranks in the job.
            timeout_s: Seconds until one call counts as lost.

        Raises:
            DeadlineError: The store did not answer.
        """
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._is_lost = False
        threading.Thread(target=self._serve, name="shardckpt-coord", daemon=True).start()
        self._store = self._call(store.clone, "clone")

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self._world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a value.

        Raises:
            DeadlineError: The store did not answer in time.
        """
        self._call(lambda: self._store.set(key, value), f"set {key}")

    def get(self, key: str) -> bytes | None:
        """Return the value, or None where nothing is published yet.

        Raises:
            DeadlineError: The store did not answer in time.
        """

        def read() -> bytes | None:
            return self._store.get(key) if self._store.check([key]) else None

        return self._call(read, f"get {key}")

    def delete(self, key: str) -> None:
        """Forget a key; best effort."""
        try:
            self._call(lambda: self._store.delete_key(key), f"delete {key}")
        except ShardckptError:
            return

    def close(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _call(self, function: Callable[[], T], what: str) -> T:
        future: Future[T] = Future()
        if not self._is_lost:
            self._calls.put((future, function))
        if self._is_lost or not wait_futures([future], self._timeout_s).done:
            self._is_lost = True
            raise DeadlineError(
                f"the job's key-value store did not answer '{what}' within {self._timeout_s:g} "
                "s; the process that "
                "serves it (rank 0 or the launcher) is gone or unreachable"
            )
        try:
            return future.result()
        except (RuntimeError, OSError) as error:  # c10d's own errors are RuntimeErrors.
            raise DeadlineError(f"the job's key-value store failed at '{what}': {error}") from error

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


def default_coord(timeout_s: float) -> Coord:
    """Return the coord of this job: that of torch.distributed, or one rank alone.

    Raises:
        ShardckptError: A launcher started several ranks and torch.distributed is not initialized.
        DeadlineError: The store did not answer.
    """
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return SingleCoord()
        return C10dCoord(
            default_store(), dist.get_rank(), dist.get_world_size(), timeout_s=timeout_s
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ShardckptError(
            f"WORLD_SIZE is {world_size}, but torch.distributed is not initialized; call "
            "torch.distributed.init_process_group() before opening a checkpointer"
        )
    return SingleCoord()
