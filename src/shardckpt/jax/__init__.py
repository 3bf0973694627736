"""shardckpt for JAX: any pytree, any sharding, one or many processes.

Layer: framework front; adds types and defaults to `shardckpt.checkpointer`, nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardckpt.checkpointer import (
    DEFAULT_TIMEOUT_S,
    CheckpointerCore,
    Restored,
    load_once,
    next_namespace,
)
from shardckpt.jax.backend import JaxBackend
from shardckpt.jax.coord import default_coord
from shardckpt.load.loader import load_options
from shardckpt.options import Auto, Every, Retention, Staging
from shardckpt.provenance import environment_facts
from shardckpt.save.handle import SaveHandle
from shardckpt.storage.open import open_storage

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType

    from shardckpt.coord.base import Coord
    from shardckpt.load.maps import ModelMap
    from shardckpt.save.saver import OnBusy
    from shardckpt.storage.base import Storage

__all__ = ["Checkpointer", "Restored", "SaveHandle", "load"]


class Checkpointer:
    """Saves a JAX training state in the background and restores it onto any mesh.

    Every process of the job makes one and calls the same methods in the same order. `state` is a
    mapping of names to pytrees: arrays of any sharding, typed random keys, optax and Flax nnx
    states, numpy arrays, plain values, and objects with `state_dict` and `load_state_dict` or
    `get_state` and `set_state`. A rank is a process.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Storage,
        *,
        save_every: Every | Auto | None = None,
        retention: Retention | None = None,
        config: Any = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_busy: OnBusy = "wait",
        staging: Staging | None = None,
        coord: Coord | None = None,
    ) -> None:
        """Open the store and become its writer; an older job is fenced from now on.

        Args:
            url: Directory of the store (made where absent), or a storage.
            save_every: When `should_save` says yes: `Every(steps=, s=)`, or `Auto()`, which
                measures and chooses; None never.
            retention: Which steps stay; the last 3 by default.
            config: Plain values (dict of hyperparameters) saved beside the state and compared at
                restore.
            timeout_s: Seconds after which any wait for another rank fails, naming who is missing.
            on_busy: "wait" or "skip": what a save does that finds no room for its copies.
            staging: How saves are copied and written beside the training. With `overlap=True`
                arrays in host memory are copied after `save` returned; what a step would donate
                until then keeps its memory, and the step takes new memory instead, unless
                `fence()` is called before it.
            coord: How ranks agree; by default the key-value store of
                jax.distributed, or one process alone.

        Raises:
            StorageError: The place cannot be made or written.
            FencedError: Another job opened the store at the same moment.
            DeadlineError: Not all ranks came.
        """
        used = default_coord(timeout_s) if coord is None else coord
        options = staging or Staging()
        overlap = options.overlap is True
        self._core = CheckpointerCore(
            open_storage(url), JaxBackend(overlap=overlap), used,
            save_every=save_every, retention=retention or Retention(), config=config,
            timeout_s=timeout_s, on_busy=on_busy, staging=replace(options, overlap=overlap),
            environment=_environment(used.world_size),
            namespace=next_namespace(coord),
        )  # fmt: skip

    def should_save(self, step: int) -> bool:
        """Return whether to save at this step, the same on every process; call it once per step.

        The time between calls is the time of a step, which the pace of writing follows.

        Raises:
            DeadlineError: With a rule by seconds, the coordinator's word did not come.
        """
        self._core.step_began()
        return self._core.should_save(step)

    def save(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save the state and return once it is copied; the rest goes on in the background.

        Waits for the arrays to be computed. Afterwards every array may be donated, and is: no
        reference is kept. Host-local arrays that differ between processes belong into `PerRank`.

        Args:
            step: Training step. Saving a step again replaces it once the new one is committed.
            state: What to save.
            metrics: Figures for `Best`, taken from rank 0.

        Raises:
            ShardckptError: An earlier save failed; raised at the same call on every rank.
            PoisonedStateError: The last restore failed half-way.
            UnsupportedStateError: A value cannot be stored exactly.
            ValueError: A negative step or a metric that is no number.
        """
        return self._core.save(step, state, metrics=metrics)

    def restore(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        strict: bool = True,
        only: tuple[str, ...] | list[str] = (),
        rename: Mapping[str, str] | None = None,
        cast: bool = False,
        fallback: bool = False,
        map: ModelMap | None = None,
    ) -> Restored | None:
        """Return a new state from the newest step, whatever mesh and processes saved it.

        Args:
            state: What to restore: arrays, or `jax.ShapeDtypeStruct`s with a sharding (as of
                `jax.eval_shape`), of which shape, dtype and sharding are used and nothing is
                changed. Without a sharding an array goes to the default device, uncommitted, as
                does what replaces an uncommitted one. Objects take their state in place.
            step: A committed step; another than the newest starts a branch and abandons what
                followed.
            strict: Missing and unexpected keys are errors.
            only: Globs of keys to load; the rest of the new state is what `state` holds.
            rename: Saved key to key of this state; one `*` allowed on both sides.
            cast: Convert values to the dtype of the target.
            fallback: Where the newest step is damaged, take the one before, with a warning.
            map: How the torch twin of the model is written: what torch saved is read through it,
                and what JAX saved as if there were none. Random keys stay as they are; a schedule
                is set to the number of steps that torch made.

        Returns:
            What was restored, its `state` new, or None where nothing was ever committed.

        Raises:
            StateMismatchError: Lists every key that does not fit; nothing was changed.
            StepNotFoundError: That step is not there.
            CorruptCheckpointError: Damaged data; names the newest other step.
        """
        options = load_options(strict=strict, only=only, rename=rename, cast=cast, model_map=map)
        return self._core.restore(state, step=step, options=options, fallback=fallback)

    def steps(self) -> list[int]:
        """Return the committed steps of the current branch, oldest first."""
        return self._core.steps()

    def latest(self) -> int | None:
        """Return the newest committed step, or None."""
        return self._core.latest()

    def pin(self, step: int, *, pinned: bool = True) -> None:
        """Keep a step out of retention, or give it back; call it on one rank.

        Raises:
            StepNotFoundError: It is not committed.
        """
        self._core.pin(step, pinned=pinned)

    def fence(self) -> None:
        """Return once every array of the state is copied; at once without `overlap=True`.

        Call it before a step that donates arrays of the state, to keep the donation.
        """
        self._core.fence()

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            ShardckptError: It failed, with the same error on every rank.
        """
        self._core.wait()

    def close(self) -> None:
        """Wait for the save under way and release everything.

        Raises:
            ShardckptError: The last save failed, with the same error on every rank.
        """
        self._core.close()

    def __enter__(self) -> Checkpointer:
        """Return the checkpointer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error of the block a failure to save is logged, not raised."""
        self._core.leave(error)


def load(
    url: str | os.PathLike[str] | Storage,
    state: Mapping[str, Any],
    *,
    step: int | None = None,
    strict: bool = True,
    only: tuple[str, ...] | list[str] = (),
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
    map: ModelMap | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    coord: Coord | None = None,
) -> Restored:
    """Return a new state from a committed step without becoming a writer: warm starts, evaluation.

    Arguments are those of `Checkpointer.restore`; a job that trains into the store is not
    disturbed.

    Raises:
        StoreNotFoundError: There is no store.
        StepNotFoundError: There is no such step.
        StateMismatchError: Lists every key that does not fit; nothing was changed.
        CorruptCheckpointError: Damaged data.
    """
    used = default_coord(timeout_s) if coord is None else coord
    try:
        return load_once(
            open_storage(url), JaxBackend(), used, state,
            step=step, options=load_options(
 strict=strict, only=only, rename=rename, cast=cast, model_map=map),
            timeout_s=timeout_s, namespace=next_namespace(coord),
            environment=_environment(used.world_size),
        )  # fmt: skip
    finally:
        if coord is None:
            used.close()


def _environment(world_size: int) -> dict[str, str]:
    versions = {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "numpy": np.__version__,
        "devices": f"{jax.device_count()} {jax.local_devices()[0].platform}",
    }
    return environment_facts(versions, world_size)
