"""The only file that touches private parts of torch; tests/torch/test_private.py is its contract.

Layer: torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class FlatRange:
    """The part `[start, stop)` of a flattened parameter that this rank's FSDP1 shard holds.

    Attributes:
        shape: Shape of the whole parameter.
        start: First element held.
        stop: One past the last.
    """

    shape: tuple[int, ...]
    start: int
    stop: int


def local_tensor(dtensor: Any) -> torch.Tensor:
    """Return a DTensor's local shard without entering autograd."""
    return dtensor._local_tensor


def default_store() -> Any:
    """Return the key-value store of the default process group."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def split_factor(placement: Any) -> int | None:
    """Return the split factor of a strided shard, or None for any other placement."""
    factor = getattr(placement, "split_factor", None)
    return factor if isinstance(factor, int) else None


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is wrapped by FullyShardedDataParallel."""
    return any(c.__name__ == "FullyShardedDataParallel" for c in type(module).__mro__)


def flat_ranges(module: nn.Module) -> dict[int, FlatRange] | None:
    """Return, by id of the original parameter, what this rank holds of it; no communication.

    None where some part of the module keeps one flat parameter instead (`use_orig_params=False`).
    """
    ranges: dict[int, FlatRange] = {}
    for part in module.modules():
        handle = getattr(part, "_handle", None) if is_fsdp1(part) else None
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat = handle.flat_param
        if flat._params is None:
            return None
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = info.intra_param_start_idx if info.in_shard else 0
            stop = info.intra_param_end_idx + 1 if info.in_shard else 0
            ranges[id(parameter)] = FlatRange(tuple(shape), start, stop)
    return ranges


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and torch.compile's wrapper."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module
