"""Optimizers keyed by parameter name; state that does not exist yet is made without running a step.

Layer: torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.distributed.tensor import DTensor, Replicate

from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.torch.private import FlatRange, local_tensor
from shardckpt.torch.shards import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardckpt.backend import SavedState

ROLES: Final = {"exp_avg": "adam_m", "exp_avg_sq": "adam_v", "step": "count"}


def group_names(
    key: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> list[list[str]]:
    """Return the parameter names of every group.

    Raises:
        UnsupportedStateError: A parameter belongs to no module of the state.
    """
    groups: list[list[str]] = []
    for index, group in enumerate(optimizer.param_groups):
        of_group: list[str] = []
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None:
                raise UnsupportedStateError(
                    f"{key}: parameter {position} of group {index} (shape "
                    f"{list(parameter.shape)}) is in no module of "
                    "the state, so it has no name. Put its module into the state too."
                )
            of_group.append(name)
        groups.append(of_group)
    return groups


def hyperparameters(
    optimizer: torch.optim.Optimizer, groups: list[list[str]]
) -> list[dict[str, Any]]:
    """Return every group without its tensors, its parameters by name."""
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": names}
        for group, names in zip(optimizer.param_groups, groups, strict=True)
    ]


def created_state(
    key: str,
    optimizer: torch.optim.Optimizer,
    groups: list[list[str]],
    saved: SavedState,
    flat: Mapping[int, FlatRange],
) -> dict[str, tuple[torch.nn.Parameter, str, torch.Tensor]]:
    """Allocate the saved state that the optimizer does not have yet.

    Returns:
        By key the parameter, the name of the state, and its tensor; nothing is attached.
    """
    prefix = f"{key}/state/"
    by_name: dict[str, list[str]] = {}
    for saved_key in saved.leaves:
        if saved_key.startswith(prefix):
            name, _, state_name = saved_key[len(prefix) :].rpartition("/")
            by_name.setdefault(name, []).append(state_name)
    created: dict[str, tuple[torch.nn.Parameter, str, torch.Tensor]] = {}
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            existing = optimizer.state.get(parameter, {})
            for state_name in by_name.get(name, ()):
                if not isinstance(existing.get(state_name), torch.Tensor):
                    full = f"{prefix}{name}/{state_name}"
                    tensor = _allocate(parameter, group, saved, full, flat.get(id(parameter)))
                    created[full] = (parameter, state_name, tensor)
    return created


def check_groups(key: str, optimizer: torch.optim.Optimizer, saved: object) -> None:
    """Refuse saved groups of another number.

    Raises:
        StateMismatchError: Another number of groups.
    """
    if isinstance(saved, list) and len(saved) != len(optimizer.param_groups):
        raise StateMismatchError(
            f"{key}: saved with {len(saved)} parameter groups, the target has "
            f"{len(optimizer.param_groups)}. Build the "
            "optimizer with the same groups, or leave it out by only=[...]."
        )


def set_hyperparameters(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Set every hyperparameter of every group; tensors are filled in place."""
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for name, value in values.items():
            if name == "params":
                continue
            current = group.get(name)
            if isinstance(current, torch.Tensor) and isinstance(value, torch.Tensor):
                current.copy_(value)
            elif isinstance(current, torch.Tensor) and isinstance(value, (int, float)):
                current.fill_(value)
            else:
                group[name] = value


def _allocate(
    parameter: torch.nn.Parameter,
    group: Mapping[str, Any],
    saved: SavedState,
    key: str,
    flat: FlatRange | None,
) -> torch.Tensor:
    leaf = saved.leaves[key]
    shape, dtype = leaf.spec.shape, torch_dtype(leaf.spec.dtype)
    if not shape:
        on_device = group.get("capturable") or group.get("fused")
        device = parameter.device if on_device else torch.device("cpu")
        return torch.zeros((), dtype=dtype, device=device)
    if flat is not None:
        numel = flat.stop - flat.start
        whole = shape == flat.shape
        return torch.zeros(numel if whole else shape, dtype=dtype, device=parameter.device)
    if not isinstance(parameter, DTensor):
        if shape == tuple(parameter.shape):
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False).detach()
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    if shape == tuple(parameter.shape):
        local = torch.zeros_like(local_tensor(parameter), dtype=dtype)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
    if not leaf.is_sharded:
        return torch.zeros(shape, dtype=dtype, device=local_tensor(parameter).device)
    placements = [
        p if getattr(p, "dim", len(shape)) < len(shape) else Replicate()
        for p in parameter.placements
    ]
    return torch.distributed.tensor.zeros(
        shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements
    )
