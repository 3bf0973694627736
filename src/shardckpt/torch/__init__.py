"""shardckpt for PyTorch: FSDP2, tensor parallel, HSDP, FSDP1, DDP and plain modules.

Layer: framework front; adds types and defaults to `shardckpt.checkpointer`, nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardckpt.checkpointer import (
    DEFAULT_TIMEOUT_S,
    CheckpointerCore,
    Restored,
    load_once,
    next_namespace,
)
from shardckpt.load.loader import load_options
from shardckpt.load.together import Together
from shardckpt.options import Auto, Every, Retention, Staging
from shardckpt.provenance import environment_facts
from shardckpt.save.handle import SaveHandle
from shardckpt.storage.open import open_storage
from shardckpt.torch.backend import TorchBackend
from shardckpt.torch.coord import default_coord
from shardckpt.torch.exchange import default_exchange
from shardckpt.torch.fences import OptimizerFences
from shardckpt.torch.objects import RngState

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, MutableMapping
    from types import TracebackType

    from shardckpt.coord.base import Coord
    from shardckpt.load.maps import ModelMap
    from shardckpt.save.saver import OnBusy
    from shardckpt.storage.base import Storage

__all__ = ["Checkpointer", "Restored", "RngState", "SaveHandle", "load"]


class Checkpointer:
    """Saves a torch training state in the background and restores it on any number of ranks.

    Every rank of the job makes one and calls the same methods in the same order. `state` is a
    mapping of names to modules, optimizers, schedulers, loaders, anything with `state_dict` and
    `load_state_dict`, tensors or plain values.
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
            staging: How saves are copied and written beside the training.
            coord: How ranks agree; by default the store of torch.distributed, or one rank alone.

        Raises:
            StorageError: The place cannot be made or written.
            FencedError: Another job opened the store at the same moment.
            DeadlineError: Not all ranks came.
        """
        used = default_coord(timeout_s) if coord is None else coord
        options = staging or Staging()
        overlaps = options.overlap is not False
        self._fences = OptimizerFences()
        self._core = CheckpointerCore(
            open_storage(url), TorchBackend(self._fences if overlaps else None), used,
            save_every=save_every, retention=retention or Retention(), config=config,
            timeout_s=timeout_s, on_busy=on_busy, staging=options,
            environment=_environment(used.world_size),
            namespace=next_namespace(coord),
            exchange=default_exchange(timeout_s) if coord is None else None,
        )  # fmt: skip
        if overlaps:
            self._fences.watch(self._core)

    def should_save(self, step: int) -> bool:
        """Return whether to save at this step, the same on every rank; call it once per step.

        Raises:
            DeadlineError: With a rule by seconds, the coordinator's word did not come.
        """
        return self._core.should_save(step)

    def save(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save the state and return at once; writing, flush and commit go on in the background.

        What an optimizer of the state owns may still be copied after the return, until its next
        `step`; all else is copied before. Code that changes parameters or optimizer state
        outside of a step calls `fence()` first.

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
        state: MutableMapping[str, Any],
        *,
        step: int | None = None,
        strict: bool = True,
        only: tuple[str, ...] | list[str] = (),
        rename: Mapping[str, str] | None = None,
        cast: bool = False,
        transactional: bool = False,
        fallback: bool = False,
        map: ModelMap | None = None,
    ) -> Restored | None:
        """Fill the state in place from the newest step, whatever world size saved it.

        Args:
            state: What to fill; plain values are replaced in the mapping.
            step: A committed step; another than the newest starts a branch and abandons what
                followed.
            strict: Missing and unexpected keys are errors.
            only: Globs of keys to load.
            rename: Saved key to key of this state; one `*` allowed on both sides.
            cast: Convert values to the dtype of the target.
            transactional: Change nothing unless every rank has read everything; costs the state's
                memory again.
            fallback: Where the newest step is damaged, take the one before, with a warning.
            map: How the JAX twin of the model is written: what JAX saved is read through it, and
                what torch saved as if there were none. Hyperparameters, schedulers and random
                streams stay as they are.

        Returns:
            What was restored, or None where nothing was ever committed.

        Raises:
            StateMismatchError: Lists every key that does not fit; nothing was changed.
            StepNotFoundError: That step is not there.
            CorruptCheckpointError: Damaged data; names the newest other step.
        """
        options = load_options(
            strict=strict,
            only=only,
            rename=rename,
            cast=cast,
            transactional=transactional,
            model_map=map,
        )
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
        """Return once every tensor of the state may be changed; at once where none is copied.

        Optimizer steps need no call. What else changes a parameter or optimizer state that was
        saved does: swapping weights, averaging into the model, clipping or pruning parameters,
        `load_state_dict`, freeing or resizing storage, replaying a captured CUDA graph.
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
        try:
            self._core.close()
        finally:
            self._fences.close()

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
        try:
            self._core.leave(error)
        finally:
            self._fences.close()


def load(
    url: str | os.PathLike[str] | Storage,
    state: MutableMapping[str, Any],
    *,
    step: int | None = None,
    strict: bool = True,
    only: tuple[str, ...] | list[str] = (),
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
    transactional: bool = False,
    map: ModelMap | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    coord: Coord | None = None,
) -> Restored:
    """Fill the state from a committed step without becoming a writer: warm starts, evaluation.

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
            open_storage(url), TorchBackend(), used, state,
            step=step, options=load_options(
 strict=strict, only=only, rename=rename, cast=cast, transactional=transactional,
 model_map=map),
            timeout_s=timeout_s, namespace=next_namespace(coord),
            environment=_environment(used.world_size),
            together=Together(default_exchange(timeout_s) if coord is None else None),
        )  # fmt: skip
    finally:
        if coord is None:
            used.close()


def _environment(world_size: int) -> dict[str, str]:
    return environment_facts({"torch": str(torch.__version__), "numpy": np.__version__}, world_size)
