"""A save without the engine that copies as late as its fences allow, whatever the timing."""

from __future__ import annotations

from typing import Any

import torch

from shardckpt.torch.backend import TorchBackend
from shardckpt.torch.fences import OptimizerFences


class LateSave:
    """A save at its laziest: what may be copied late is copied when it is fenced, or at the end.

    Attributes:
        fenced: The groups fenced so far, in order; None is all of them.
        groups: Group of every leaf of the last save.
        num_steps: Training steps begun.
    """

    def __init__(self) -> None:
        self.fenced: list[int | None] = []
        self.num_steps = 0
        self.groups: dict[str, int] = {}
        self._late: dict[str, list[torch.Tensor]] = {}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._saved: dict[str, list[torch.Tensor]] = {}
        self.fences = OptimizerFences()
        self._backend = TorchBackend(self.fences)
        self.fences.watch(self)

    @property
    def is_staging(self) -> bool:
        return bool(self._late)

    def fence(self, group: int | None = None) -> None:
        self.fenced.append(group)
        for key in list(self._late):
            if group in (None, self.groups[key]):
                self._saved[key] = [alias.clone() for alias in self._late.pop(key)]

    def step_began(self) -> None:
        self.num_steps += 1

    def save(self, state: dict[str, Any]) -> None:
        self.fenced.clear()
        for leaf in self._backend.describe(state).leaves:
            aliases = [self._alias(shard.data) for shard in leaf.shards]
            self.groups[leaf.key] = leaf.fence
            self._before[leaf.key] = [alias.clone() for alias in aliases]
            if leaf.fence:
                self._late[leaf.key] = aliases
            else:
                self._saved[leaf.key] = self._before[leaf.key]

    def _alias(self, data: object) -> torch.Tensor:
        alias = self._backend.host_array(data).owner
        assert isinstance(alias, torch.Tensor)
        return alias

    def late(self) -> set[str]:
        """Return the keys that are still to be copied."""
        return set(self._late)

    def torn(self) -> list[str]:
        """Finish, and return the keys of which the copy differs from what it was at `save`."""
        self.fence()
        return [
            key
            for key, before in self._before.items()
            if not all(_same_bytes(a, b) for a, b in zip(before, self._saved[key], strict=True))
        ]


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Not torch.equal, to which NaN differs from itself.
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
