"""What the benchmarks of torch share: ranks in one process group, timed together."""

from __future__ import annotations

import os
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.testing.ranks import RankContext


def locals_of(state: Any) -> list[torch.Tensor]:
    """Return what this rank holds of every tensor in nested dicts, flat."""
    if isinstance(state, dict):
        return [tensor for inner in state.values() for tensor in locals_of(inner)]
    if not isinstance(state, torch.Tensor):
        return []
    local = state.to_local() if isinstance(state, DTensor) else state
    return [local.detach().view(-1)]


def join_gloo(told: RankContext) -> None:
    """Join the process group of a run's ranks, told what torchrun would tell them."""
    os.environ["LOCAL_WORLD_SIZE"] = str(told.world_size)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{told.port}",
        rank=told.rank,
        world_size=told.world_size,
    )


def together(call: Callable[[], object]) -> float:
    """Return the seconds until every rank has done its call."""
    torch.distributed.barrier()
    started = perf_counter()
    call()
    torch.distributed.barrier()
    return perf_counter() - started
