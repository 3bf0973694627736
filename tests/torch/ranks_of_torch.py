"""Rank functions of the torch tests: top level, because spawn finds them by name."""

from __future__ import annotations

import datetime
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from late_copies import LateSave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardckpt.torch import Checkpointer, RngState

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 37


class Block(nn.Module):
    """Two layers whose sizes no mesh divides, a buffer, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 50)
        self.down = nn.Linear(50, WIDTH, bias=False)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x))) * self.scale.sum()


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(WIDTH, 4))


def fsdp2(seed: int) -> nn.Module:
    model = build(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hsdp(seed: int) -> nn.Module:
    model = build(seed)
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard")
    )
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tp_fsdp(seed: int) -> nn.Module:
    model = build(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    for block in list(model)[:3]:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def ddp(seed: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(build(seed))


def fsdp1(seed: int) -> nn.Module:
    return FullyShardedDataParallel(
        build(seed), use_orig_params=True, device_id=torch.device("cpu")
    )


LAYOUTS: dict[str, Callable[[int], nn.Module]] = {
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "tp_fsdp": tp_fsdp,
    "ddp": ddp,
    "fsdp1": fsdp1,
}


def join(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )


def leave() -> None:
    """End this rank's process without taking Python down, which torch's gloo threads may abort.

    Rank 0, which serves the others, goes last.
    """
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    if dist.get_rank() == 0:
        store.wait([f"left/{rank}" for rank in range(1, dist.get_world_size())])
    else:
        store.set(f"left/{dist.get_rank()}", b"")
    sys.stdout.flush()
    os._exit(0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    # Every rank sees the same batch: tensor-parallel ranks must, or their replicas drift apart.
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return every value of a state as whole tensors, gathered by torch itself."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            found = {
                k.replace("_fsdp_wrapped_module.", ""): v.detach().clone()
                for k, v in model.state_dict().items()
            }
        # Not FullyShardedDataParallel.optim_state_dict(): on the CPU it gathers every state of a
        # parameter into one buffer, so that exp_avg comes out with the values of exp_avg_sq.
        for name, parameter in model.named_parameters():
            mine = {
                k: v
                for k, v in optimizer.state[parameter].items()
                if v.ndim == 0 or parameter.numel()
            }
            by_rank: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(by_rank, mine)
            for key in {key: None for states in by_rank for key in states}:
                parts = [states[key] for states in by_rank if key in states]
                shape = found[name.replace("_fsdp_wrapped_module.", "")].shape
                found[f"{name}/{key}"] = (
                    torch.cat(parts).reshape(shape) if parts[0].ndim else parts[0]
                )
        return {k.replace("_fsdp_wrapped_module.", ""): v for k, v in found.items()}
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found = {k: full(v).detach().clone() for k, v in inner.state_dict().items()}
    for name, parameter in inner.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}/{key}"] = full(value).detach().clone()
    return found


def state_of(kind: str, seed: int) -> dict[str, Any]:
    model = LAYOUTS[kind](seed)
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "rng": RngState(),
        "progress": {"offset": 0},
    }


def reshard_everywhere(rank: int, world_size: int, port: int, root: str) -> None:
    """Save in each layout; load each save into every layout; compare whole tensors bit for bit."""
    join(rank, world_size, port)
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for kind in LAYOUTS:
        state = state_of(kind, seed=1)
        train(state["model"], state["optimizer"], steps=2)
        state["progress"] = {"offset": 77, "seen": (1, 2)}
        saved[kind] = full_values(state["model"], state["optimizer"])
        with Checkpointer(f"{root}/{kind}", timeout_s=60) as checkpointer:
            checkpointer.save(1, state)
    for source, target in itertools.product(LAYOUTS, LAYOUTS):
        state = state_of(target, seed=2)
        with Checkpointer(f"{root}/{source}", timeout_s=60) as checkpointer:
            restored = checkpointer.restore(state)
        assert restored is not None
        assert state["progress"] == {"offset": 77, "seen": (1, 2)}
        found = full_values(state["model"], state["optimizer"])
        assert found.keys() == saved[source].keys(), (source, target)
        for key, value in found.items():
            assert torch.equal(value, saved[source][key]), f"{source} -> {target}: {key}"
    leave()


def load_elsewhere(rank: int, world_size: int, port: int, root: str, expected: str) -> None:
    """Load what four ranks saved in each layout on another world size."""
    join(rank, world_size, port)
    reference: dict[str, dict[str, torch.Tensor]] = torch.load(expected)
    for source, values in reference.items():
        state = state_of("fsdp2", seed=3)
        with Checkpointer(f"{root}/{source}", timeout_s=60) as checkpointer:
            assert checkpointer.restore(state) is not None
        found = full_values(state["model"], state["optimizer"])
        for key, value in found.items():
            assert torch.equal(value, values[key]), f"{source} on {world_size}: {key}"
    leave()


def save_each_layout(rank: int, world_size: int, port: int, root: str, expected: str) -> None:
    """Save in each layout and write down the whole tensors."""
    join(rank, world_size, port)
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for kind in LAYOUTS:
        state = state_of(kind, seed=1)
        train(state["model"], state["optimizer"], steps=2)
        saved[kind] = full_values(state["model"], state["optimizer"])
        with Checkpointer(f"{root}/{kind}", timeout_s=60) as checkpointer:
            checkpointer.save(1, state)
    if rank == 0:
        torch.save(saved, expected)
    leave()


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object",
    "monitored_barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list", "send", "isend", "irecv", "batch_isend_irecv", "new_group",
)  # fmt: skip


def save_without_collectives(rank: int, world_size: int, port: int, root: str) -> None:
    """Every collective raises while states of every layout are saved and restored."""
    join(rank, world_size, port)

    def refuse(*_args: object, **_keywords: object) -> None:
        raise AssertionError("a collective was called")

    for kind in LAYOUTS:
        state = state_of(kind, seed=1)
        train(state["model"], state["optimizer"], steps=1)
        group = dist.distributed_c10d._get_default_group()
        backend = type(group._get_backend(torch.device("cpu")))
        names = [
            n
            for n in (
                "allgather",
                "allreduce",
                "broadcast",
                "barrier",
                "send",
                "recv",
                "alltoall",
                "_allgather_base",
                "reduce_scatter",
                "gather",
                "scatter",
            )
            if hasattr(backend, n)
        ]
        patches = [
            mock.patch.object(dist, name, refuse) for name in COLLECTIVES if hasattr(dist, name)
        ]
        patches += [
            mock.patch.object(type(group), n, refuse) for n in names if hasattr(type(group), n)
        ]
        for patch in patches:
            patch.start()
        try:
            with Checkpointer(f"{root}/{kind}", timeout_s=60) as checkpointer:
                for step in (1, 2, 3):
                    checkpointer.save(step, state)
                checkpointer.restore(state)
        finally:
            for patch in patches:
                patch.stop()
    leave()


def copies_wait_for_steps(rank: int, world_size: int, port: int) -> None:
    """In each layout, what a step changes is copied late, and never after the step."""
    join(rank, world_size, port)
    for kind in LAYOUTS:
        state = state_of(kind, seed=1)
        train(state["model"], state["optimizer"], steps=2)
        save = LateSave()
        save.save(state)
        with_memory = {key for key, group in save.groups.items() if group}
        params = [key for key in save.groups if key.startswith("model/") and "scale" not in key]
        assert with_memory >= set(params), (kind, set(params) - with_memory)
        assert all(save.groups[key] == 0 for key in save.groups if "scale" in key), kind
        assert any(key.startswith("optimizer/state/") for key in with_memory), kind
        train(state["model"], state["optimizer"], steps=1)
        assert save.fenced == [save.groups[params[0]]], kind
        assert save.torn() == [], kind
        # Without the hook the same step tears them: what is compared is the very memory.
        save.save(state)
        save.fences.close()
        train(state["model"], state["optimizer"], steps=1)
        assert save.torn() != [], kind
    leave()
