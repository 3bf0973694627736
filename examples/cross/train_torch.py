"""The torch job of the demo: FSDP2 on any number of ranks, from the newest step, whoever saved it.

torchrun --nproc-per-node 2 examples/cross/train_torch.py --ckpt runs --until 10 --losses t.jsonl
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from gpt_map import gpt_map
from task import Corpus, Task, check_text, log_warnings, parse_options, write_loss

# isort: split
from corpus import VOCABULARY
from gpt import GPT, cut_over
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.optim import AdamW
from train import global_mean, process_group

from shardckpt import Retention
from shardckpt.torch import Checkpointer

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Job:
    """All that one rank needs to train."""

    options: argparse.Namespace
    task: Task
    corpus: Corpus
    device: torch.device
    model: GPT
    optimizer: AdamW


def main() -> None:
    """Run one rank of the job described on the command line."""
    options = parse_options()
    with process_group() as device:
        if dist.get_rank() == 0:
            log_warnings()
        job = build(options, Task(), device)
        if options.alone_from is not None:
            assert options.alone_from == 0, "this job goes on alone from its own first values only"
            train(job, first=0)
        else:
            checkpointed_training(job)


def checkpointed_training(job: Job) -> None:
    """Train from the newest step, or from the start, and save the start and the end."""
    options = job.options
    state: dict[str, Any] = {
        "model": job.model,
        "optimizer": job.optimizer,
        "corpus": job.corpus.digest,
    }
    with Checkpointer(options.ckpt, retention=Retention(last=4)) as ckpt:
        restored = ckpt.restore(state, map=gpt_map(job.task.heads))
        if restored is None:
            ckpt.save(0, state)
        else:
            check_text(state, job.corpus)
            write_state(job, options.restored)
        train(job, first=restored.step if restored else 0)
        ckpt.save(options.until, state)
    write_state(job, options.trained)


def train(job: Job, first: int) -> None:
    """Train every step from `first` on."""
    for step in range(first, job.options.until):
        batch = job.task.batch(job.corpus, step, dist.get_rank(), dist.get_world_size())
        inputs, targets = (torch.from_numpy(part).to(job.device) for part in batch)
        scores = job.model(inputs).view(-1, VOCABULARY)
        losses = F.cross_entropy(scores, targets.view(-1), reduction="none")
        losses.mean().backward()  # type: ignore[no-untyped-call]
        job.optimizer.step()
        job.optimizer.zero_grad()
        loss = global_mean(losses.detach())
        if dist.get_rank() == 0:
            write_loss(job.options.losses, step, loss)


def build(options: argparse.Namespace, task: Task, device: torch.device) -> Job:
    """Make the model, cut over all ranks, and its optimizer."""
    torch.manual_seed(task.seed)
    model = GPT(task.layers, task.width, task.heads, task.context).to(device)
    cut_over(init_device_mesh(device.type, (dist.get_world_size(),)), model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        groups, lr=task.lr, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay
    )
    return Job(options, task, task.text(), device, model, optimizer)


def write_state(job: Job, path: Path | None) -> None:
    """Write what this job holds in memory, not what a checkpoint says; rank 0 writes."""
    if path is None:
        return
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, parameter in job.model.named_parameters():
        of_optimizer = job.optimizer.state[parameter]
        arrays[f"parameter {name}"] = whole(parameter)
        arrays[f"moment 1 {name}"] = whole(of_optimizer["exp_avg"])
        arrays[f"moment 2 {name}"] = whole(of_optimizer["exp_avg_sq"])
        arrays[f"steps {name}"] = np.asarray(int(of_optimizer["step"]))
    if dist.get_rank() == 0:
        np.savez(path, **arrays)  # type: ignore[arg-type]


def whole(tensor: Any) -> np.ndarray[Any, Any]:
    """Return all of a sharded tensor; every rank must call it."""
    found: np.ndarray[Any, Any] = tensor.detach().full_tensor().cpu().numpy()
    return found


if __name__ == "__main__":
    main()
    # As ../torch_fsdp/train.py: a gloo thread may outlive the process group.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
