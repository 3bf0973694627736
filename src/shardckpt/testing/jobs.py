"""Whole jobs on numpy arrays: a known state for every step, and ranks that are threads.

Layer: testing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar, final

import numpy as np

from shardckpt.checkpointer import CheckpointerCore
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load.loader import LoadOptions
from shardckpt.options import Retention, Staging
from shardckpt.testing.arrays import ArrayBackend, Sharded, shard_of
from shardckpt.testing.coords import MemoryCoordHub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardckpt.coord.base import Coord
    from shardckpt.save.saver import OnBusy
    from shardckpt.storage.base import Storage

T = TypeVar("T")
State = dict[str, object]
LOAD: Final = LoadOptions()


def global_arrays(step: int) -> dict[str, np.ndarray]:
    """Return the arrays a job holds at a step; every other step's differ, but the empty one."""
    rng = np.random.default_rng(step)
    return {
        "layer.bias": rng.standard_normal(70).astype(np.float32),
        "layer.weight": rng.standard_normal((60, 70)).astype(np.float32),
        "none": np.zeros((0, 4), np.float32),
        "scale": np.array(rng.standard_normal()),
        "table": rng.integers(0, 1 << 40, (25, 40)),
    }


def state_at(step: int, rank: int, world_size: int) -> State:
    """Return one rank's state at a step: matrices cut by rows, the rest on every rank."""
    layout = MeshLayout((world_size,), tuple(range(world_size)), ((0,),))
    state: State = {
        key: shard_of(value, layout, rank) if value.ndim == 2 and value.size else value
        for key, value in global_arrays(step).items()
    }
    return state | {"progress": {"step": step, "seen": (step, step + 1)}}


def blank_state(rank: int, world_size: int) -> State:
    """Return a state of the same shape that equals no step's."""
    state = state_at(0, rank, world_size)
    for value in state.values():
        for array in _memory_of(value):
            array[...] = -1
    return state | {"progress": None}


def same_state(found: State, wanted: State) -> bool:
    """Say whether two states of one rank are equal bit for bit."""
    return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in wanted)


@dataclass(slots=True, kw_only=True)
class JobOptions:
    """How the ranks of a job open their checkpointer."""

    retention: Retention = field(default_factory=lambda: Retention(last=2))
    timeout_s: float = 10.0
    on_busy: OnBusy = "wait"
    staging: Staging = field(default_factory=Staging)


def open_job(
    storage: Storage, coord: Coord, options: JobOptions, *, namespace: str = "job"
) -> CheckpointerCore:
    """Open one rank's checkpointer; all ranks.

    Raises:
        ShardckptError: The store cannot be opened.
    """
    return CheckpointerCore(
        storage, ArrayBackend(), coord, save_every=None, retention=options.retention,
        config={"lr": 0.1}, timeout_s=options.timeout_s, on_busy=options.on_busy,
        staging=options.staging,
        environment={}, namespace=namespace,
    )  # fmt: skip


@final
class ThreadJob:
    """A job whose ranks are threads of this process, over one store."""

    def __init__(self, storages: Sequence[Storage], options: JobOptions | None = None) -> None:
        """Open the checkpointers of all ranks.

        Args:
            storages: One per rank; they may differ in their faults.
            options: How to open.

        Raises:
            BaseException: What the first rank that failed raised.
        """
        self._options: Final = JobOptions() if options is None else options
        self._storages: Final = tuple(storages)
        self.hub: Final = MemoryCoordHub(len(storages))
        self._cores: Final = raised(self._map(self._open))

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self._storages)

    def each(self, fn: Callable[[CheckpointerCore, int], T]) -> list[T | BaseException]:
        """Run `fn(checkpointer, rank)` on every rank at once; return results or errors."""
        return self._map(lambda rank: fn(self._cores[rank], rank))

    def save(self, step: int) -> list[bool | BaseException]:
        """Save `state_at(step)` on every rank; return each rank's outcome."""

        def save(core: CheckpointerCore, rank: int) -> bool:
            handle = core.save(step, state_at(step, rank, self.world_size))
            # Not handle.wait(): a failure that only this raised comes again at the next save.
            core.wait()
            return handle.committed.result()

        return self.each(save)

    def restored_step(self, step: int | None = None, options: LoadOptions = LOAD) -> int | None:
        """Restore on every rank, check the values bit for bit, and return the step.

        Raises:
            BaseException: What the first rank that failed raised.
            AssertionError: Values differ from those of the step.
        """
        return raised(self.each(lambda core, rank: self._restore(core, rank, step, options)))[0]

    def close(self) -> list[BaseException | None]:
        """Close on every rank; return each rank's outcome."""
        return self.each(lambda core, _: core.close())

    def _open(self, rank: int) -> CheckpointerCore:
        return open_job(self._storages[rank], self.hub.coord(rank), self._options)

    def _restore(
        self, core: CheckpointerCore, rank: int, step: int | None, options: LoadOptions
    ) -> int | None:
        state = blank_state(rank, self.world_size)
        found = core.restore(state, step=step, options=options, fallback=False)
        if found is None:
            return None
        assert same_state(state, state_at(found.step, rank, self.world_size)), found.step
        return found.step

    def _map(self, fn: Callable[[int], T]) -> list[T | BaseException]:
        return run_threads(self.world_size, fn)


def run_threads(world_size: int, fn: Callable[[int], T]) -> list[T | BaseException]:
    """Run `fn(rank)` for every rank at once, each in a thread; return results or errors."""
    results: list[T | BaseException] = [KeyError("did not run")] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = fn(rank)
        except BaseException as error:
            results[rank] = error

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}")
        for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def raised(results: Sequence[T | BaseException]) -> list[T]:
    """Return the results, or raise the first error among them.

    Raises:
        BaseException: The first error.
    """
    values: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        values.append(result)
    return values


def _memory_of(value: object) -> list[np.ndarray]:
    if isinstance(value, Sharded):
        return [part for _, part in value.parts]
    return [value] if isinstance(value, np.ndarray) else []


def _same(found: object, wanted: object) -> bool:
    ours, theirs = _memory_of(found), _memory_of(wanted)
    if not theirs:
        return found == wanted
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(ours, theirs, strict=True)
    )
