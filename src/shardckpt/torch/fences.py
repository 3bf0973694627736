"""Who may change which tensor: what an optimizer's step changes is copied until it is about to.

Layer: torch. What one optimizer of the state owns (its parameters and their state) changes only in
its `step`, so a save may go on copying it after it returned. One hook before every optimizer step
of the process waits for the copies of what that step will change. All else is copied before `save`
returns.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, Final, Protocol, final
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from shardckpt.torch import private

if TYPE_CHECKING:
    from collections.abc import Iterable


_CLOCK: Final = 1  # The group whose steps are the training's steps.


class Copying(Protocol):
    """What goes on copying after a save returned."""

    @property
    def is_staging(self) -> bool:
        """Whether any copy is still to be made."""

    def fence(self, group: int | None = None) -> None:
        """Return once no copy has to read arrays of `group` any more; None means any array."""

    def step_began(self) -> None:
        """Take note that a training step begins."""


@final
class OptimizerFences:
    """Gives every optimizer a group and waits for the group's copies before the optimizer steps.

    Not thread-safe: describe a state and step optimizers on one thread.
    """

    def __init__(self) -> None:
        """Start without a hook and without groups."""
        self._groups: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._numbers = itertools.count(1)
        self._owned: list[torch.Tensor] = []
        self._described: set[int] = set()
        self._remove_hook: Any = None

    def watch(self, copying: Copying) -> None:
        """Hook into every optimizer step of the process until `close`."""
        process = os.getpid()

        def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
            # A forked child has a copy of this hook, but nobody copies on its behalf.
            if os.getpid() != process:
                return
            if self._groups.get(optimizer) == _CLOCK:
                copying.step_began()
            if copying.is_staging:
                self._fence(copying, optimizer)
            else:
                self._owned = []

        # Traced, the hook would be compiled into the step as it was at one moment.
        hook = torch.compiler.disable(before_step)
        self._remove_hook = register_optimizer_step_pre_hook(hook).remove

    def close(self) -> None:
        """Remove the hook."""
        if self._remove_hook is not None:
            self._remove_hook()
            self._remove_hook = None
        self._owned = []

    def group_of(self, optimizer: Optimizer) -> int:
        """Return the optimizer's group, the same at every call, or 0 where no hook guards it."""
        if not _is_guarded(optimizer):
            return 0
        group = self._groups.get(optimizer)
        if group is None:
            group = self._groups[optimizer] = next(self._numbers)
        return group

    def owners(self, optimizers: Iterable[Optimizer]) -> dict[int, int]:
        """Return the group of every parameter by identity; 0 where more than one optimizer has it.

        Args:
            optimizers: All optimizers of the state that is described next.
        """
        groups: dict[int, int] = {}
        params: list[torch.Tensor] = []
        for optimizer in optimizers:
            group = self.group_of(optimizer)
            for fields in optimizer.param_groups:
                for param in fields["params"]:
                    if groups.setdefault(id(param), group) != group:
                        groups[id(param)] = 0
                    params.append(param)
        self._described = set(groups.values()) - {0}
        self._owned = [param for param in params if groups[id(param)]]
        return groups

    def _fence(self, copying: Copying, optimizer: Optimizer) -> None:
        group = self._groups.get(optimizer, 0)
        if group:
            copying.fence(group)
        if group not in self._described and self._shares_memory(optimizer):
            copying.fence()

    def _shares_memory(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer outside the state changes memory that may be copied late."""
        owned = {_storage(param) for param in self._owned} - {0}
        return any(
            _storage(param) in owned
            for fields in optimizer.param_groups
            for param in fields["params"]
        )


def _is_guarded(optimizer: Optimizer) -> bool:
    """Return whether every change of what the optimizer owns comes after the hook."""
    kind: Any = type(optimizer)
    return (
        # Without this mark the step is not torch's wrapper, so it runs no hooks.
        private.runs_step_hooks(kind)
        # A captured step is replayed without Python.
        and not any(fields.get("capturable") for fields in optimizer.param_groups)
        # Schedule-free optimizers swap the parameters there.
        and not callable(getattr(kind, "train", None))
        and not callable(getattr(kind, "eval", None))
        # A wrapper (SAM, Lookahead) changes parameters around the step of what it wraps.
        and not any(isinstance(part, Optimizer) for part in vars(optimizer).values())
    )


def _storage(tensor: torch.Tensor) -> int:
    local = private.plain(tensor)
    return local.untyped_storage().data_ptr() if local.layout is torch.strided else 0
