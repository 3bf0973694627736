"""Optimizer state that does not exist yet: memory as the optimizer would make it, without a step.

Layer: torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shardckpt.torch import private
from shardckpt.torch.dtypes import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardckpt.backend import SavedLeaf
    from shardckpt.torch.leaves import ParamRef
    from shardckpt.torch.shards import Leaves


def created_state(
    key: str,
    ref: ParamRef,
    state_name: str,
    row: SavedLeaf,
    group: Mapping[str, Any],
    leaves: Leaves,
) -> torch.Tensor:
    """Return memory for state that the optimizer has not made yet, of the kind it makes itself.

    Its values are unset: a restore fills every byte of it or attaches none of it.

    Raises:
        UnsupportedStateError: It cannot be made here.
    """
    param = ref.param.detach()
    shape = row.spec.shape
    device = private.plain(param).device
    if not shape:
        # As Optimizer.load_state_dict: counters stay on the host unless kernels want them.
        on_host = state_name == "step" and not (group.get("capturable") or group.get("fused"))
        return empty((), row, "cpu" if on_host else device, key)
    dtype = torch_dtype(row.spec.dtype, key)
    if ref.flat is not None and shape == ref.flat.shape:
        return torch.empty(ref.flat.local.shape, dtype=dtype, device=ref.flat.local.device)
    if not leaves.is_dtensor(param):
        like_param = shape == tuple(param.shape)
        return (
            torch.empty_like(param, dtype=dtype) if like_param else empty(shape, row, device, key)
        )
    return _created_dtensor(key, param, row, dtype, leaves)


def _created_dtensor(
    key: str, param: Any, row: SavedLeaf, dtype: torch.dtype, leaves: Leaves
) -> torch.Tensor:
    """Return a DTensor of the saved shape, cut as the parameter is where the dims agree."""
    from torch.distributed.tensor import DTensor, Replicate

    shape, local = row.spec.shape, private.local_tensor(param)
    if shape == tuple(param.shape):
        placements, memory = param.placements, torch.empty_like(local, dtype=dtype)
    else:
        placements = tuple(
            p
            if row.is_sharded and _fits(private.cut_of(p, key).dim, shape, tuple(param.shape))
            else Replicate()
            for p in param.placements
        )
        box = leaves.local_box(
            leaves.layout_from(key, param.device_mesh, placements, len(shape)), shape
        )
        memory = torch.empty(box.shape if box else (0,), dtype=dtype, device=local.device)
    strides = (
        param.stride()
        if shape == tuple(param.shape)
        else torch.empty(shape, device="meta").stride()
    )
    return DTensor.from_local(
        memory,
        param.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def _fits(dim: int | None, shape: tuple[int, ...], param_shape: tuple[int, ...]) -> bool:
    return (
        dim is not None
        and dim < min(len(shape), len(param_shape))
        and shape[dim] == param_shape[dim]
    )


def empty(
    shape: tuple[int, ...], row: SavedLeaf, device: torch.device | str, key: str
) -> torch.Tensor:
    """Return unset memory of a saved leaf's dtype.

    Raises:
        UnsupportedStateError: This torch has no such dtype.
    """
    return torch.empty(shape, dtype=torch_dtype(row.spec.dtype, key), device=device)
