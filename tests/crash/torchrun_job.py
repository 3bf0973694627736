"""A tiny FSDP2 job for torchrun that may kill one of its ranks in its second save.

Run by test_torchrun_kill.py: STORE NOTES RUN VICTIM OP PATH WHEN. What it restored, what it saved
and what was acknowledged goes to files in NOTES.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardckpt.options import Retention
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.torch import Checkpointer


class Trigger:
    """Kills this process once it is armed."""

    def __init__(self) -> None:
        self.is_armed = False

    def __call__(self, call: Call) -> None:
        if self.is_armed:
            os.kill(os.getpid(), signal.SIGKILL)


def build() -> nn.Module:
    torch.manual_seed(0)
    # 13 rows are cut evenly by no world size used here.
    model = nn.Sequential(nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 5))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return cast("nn.Module", fully_shard(model, mesh=mesh))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    inputs = torch.randn(8, 13, generator=torch.Generator().manual_seed(step))
    model(inputs).square().mean().backward()
    optimizer.step()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a digest of every global value, whatever the world size."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        for value in (parameter, *(v for _, v in sorted(optimizer.state[parameter].items()))):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found.update(whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    store, notes, run, victim, op, path, when = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    is_first = dist.get_rank() == 0
    trigger = Trigger()
    at = cast("Literal['before', 'half-way', 'after']", when)
    faults = [Fault(trigger, op, path, times=None, when=at)] * (dist.get_rank() == int(victim))
    storage = LocalStorage(store, ops=FaultyFileOps(*faults))
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(storage, retention=Retention(last=2), timeout_s=20) as checkpointer:
        restored = checkpointer.restore(state)
        step = 0 if restored is None else restored.step
        found = digest(model, optimizer)
        if is_first:
            (Path(notes) / f"restored-{run}").write_text(f"{step} {found}")
        for number in (1, 2):
            step += 1
            train_step(model, optimizer, step)
            found = digest(model, optimizer)
            if is_first:
                (Path(notes) / f"saved-{step}").write_text(found)
            trigger.is_armed = number == 2
            checkpointer.save(step, state).wait()
            if is_first:
                (Path(notes) / "acknowledged").write_text(str(step))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
