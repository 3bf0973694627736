"""Train a small GPT with FSDP2 on Python's own standard library, with checkpoints from shardckpt.

    torchrun --standalone --nproc-per-node 2 examples/torch_fsdp/train.py --ckpt runs/gpt

Stopped or killed, it goes on where it was, here on 3 ranks, then on 1:

    torchrun --standalone --nproc-per-node 3 examples/torch_fsdp/train.py --ckpt runs/gpt
    python examples/torch_fsdp/train.py --ckpt runs/gpt

What it shows: the whole of the checkpointing is `checkpointed_training` below. Model, optimizer,
scheduler, random number generators and the position in the data are saved every `--save-every`
steps while training goes on. The same command resumes from the newest checkpoint, on any number of
ranks that divides the global batch. On the same number of ranks every later loss is equal bit for
bit to that of a run never interrupted; on another number it differs by rounding only, because the
global batch of a step does not depend on who computes it.

It runs on CPU (gloo) or, where CUDA is available, one GPU per rank (NCCL). Every rank draws the
whole model before it is cut, which is fine for models that fit one host's memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from corpus import VOCABULARY, Corpus, batch_of, slice_of_rank, standard_library
from gpt import GPT, cut_over
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from shardckpt import Best, Every, Retention
from shardckpt.torch import Checkpointer, RngState

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

CORPUS_BYTES: Final = 4_000_000
_NO_CONFIG: Final = ("ckpt", "metrics", "log_every", "stop_step", "resume_step", "no_checkpoint")


class Progress:
    """Where the job is in its data; saved and restored like any other part of the state."""

    def __init__(self, corpus_digest: str) -> None:
        """Start at the first sample."""
        self.samples = 0
        self._corpus_digest = corpus_digest

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the text it is a position in."""
        return {"samples": self.samples, "corpus": self._corpus_digest}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take a saved position.

        Raises:
            ValueError: It is a position in another text.
        """
        if saved["corpus"] != self._corpus_digest:
            raise ValueError(
                f"the checkpoint was trained on text {saved['corpus']}, this Python's standard "
                f"library is text {self._corpus_digest}: resume with the Python that started it"
            )
        self.samples = saved["samples"]


@dataclass(frozen=True, slots=True)
class Job:
    """All that one rank needs to train."""

    options: argparse.Namespace
    device: torch.device
    corpus: Corpus
    model: GPT
    optimizer: AdamW
    scheduler: LambdaLR
    progress: Progress
    started_s: float


def main() -> None:
    """Run one rank of the job described on the command line."""
    options = parse_options(sys.argv[1:])
    with process_group() as device:
        # One line per rank, so that whoever watches the job knows which process is which rank.
        print(
            f"rank {dist.get_rank()} of {dist.get_world_size()} is process {os.getpid()}",
            flush=True,
        )
        if dist.get_rank() == 0:
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        job = build(options, device)
        if options.no_checkpoint:
            plain_training(job)
        else:
            checkpointed_training(job)


def checkpointed_training(job: Job) -> None:
    """Train from the newest checkpoint, or from the start, and save on the way."""
    options = job.options
    state = {
        "model": job.model,
        "optimizer": job.optimizer,
        "scheduler": job.scheduler,
        "rng": RngState(),
        "progress": job.progress,
    }
    with Checkpointer(
        options.ckpt,
        save_every=Every(steps=options.save_every),
        retention=Retention(last=3, best=Best("val_loss", "min", n=1)),
        config={name: value for name, value in vars(options).items() if name not in _NO_CONFIG},
        timeout_s=600,
    ) as ckpt:
        restored = ckpt.restore(state, step=options.resume_step)
        if restored is not None and dist.get_rank() == 0:
            before, now = ranks(restored.world_size), ranks(dist.get_world_size())
            print(f"restored step {restored.step} saved on {before}, now {now}", flush=True)
        for step in steps(job, first=restored.step + 1 if restored else 0):
            loss = train_step(job)
            val_loss = None
            if ckpt.should_save(step) or step == steps(job)[-1]:
                val_loss = validation_loss(job)
                ckpt.save(step, state, metrics={"val_loss": val_loss})
            report(job, step, loss, val_loss)


def plain_training(job: Job) -> None:
    """Train from the start, and neither save nor restore."""
    for step in steps(job):
        loss = train_step(job)
        is_measured = step % job.options.save_every == 0 or step == steps(job)[-1]
        report(job, step, loss, validation_loss(job) if is_measured else None)


def steps(job: Job, first: int = 0) -> range:
    """Return the steps to train, from `first` on."""
    return range(first, min(job.options.steps, job.options.stop_step or job.options.steps))


def train_step(job: Job) -> float:
    """Train on the next global batch and return its mean loss before the update."""
    options = job.options
    samples = slice_of_rank(
        job.progress.samples, options.global_batch, dist.get_rank(), dist.get_world_size()
    )
    losses = token_losses(job, job.corpus.train, samples)
    # Slices are equal and FSDP averages gradients over ranks: the mean over the global batch.
    losses.mean().backward()  # type: ignore[no-untyped-call]
    job.optimizer.step()
    job.optimizer.zero_grad()
    job.scheduler.step()
    job.progress.samples += options.global_batch
    return global_mean(losses.detach())


@torch.no_grad()
def validation_loss(job: Job) -> float:
    """Return the mean loss over a fixed batch of held-out text."""
    options = job.options
    samples = slice_of_rank(0, options.global_batch, dist.get_rank(), dist.get_world_size())
    return global_mean(token_losses(job, job.corpus.held_out, samples))


def token_losses(job: Job, text: np.ndarray[Any, Any], samples: range) -> torch.Tensor:
    """Return the loss of every token of these samples, flat, float32."""
    inputs, targets = batch_of(text, samples, job.options.context, job.options.seed)
    logits = job.model(torch.from_numpy(inputs).to(job.device))
    return F.cross_entropy(
        logits.view(-1, VOCABULARY),
        torch.from_numpy(targets).to(job.device).view(-1),
        reduction="none",
    )


def global_mean(losses: torch.Tensor) -> float:
    """Return the mean over all ranks' equally many losses, summed in float64."""
    total = losses.double().sum()
    dist.all_reduce(total)
    return float(total) / (losses.numel() * dist.get_world_size())


def report(job: Job, step: int, loss: float, val_loss: float | None) -> None:
    """Append the step to the metrics file, and print it now and then; rank 0 speaks for all."""
    options = job.options
    if dist.get_rank() != 0:
        return
    if options.metrics is not None:
        line = {
            "step": step,
            "loss": loss,
            "val_loss": val_loss,
            "world_size": dist.get_world_size(),
            "time_s": round(time.monotonic() - job.started_s, 3),
        }
        with options.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if step % options.log_every == 0 or val_loss is not None:
        held_out = "" if val_loss is None else f"  val_loss {val_loss:.4f}"
        print(f"step {step}  loss {loss:.4f}{held_out}", flush=True)


def build(options: argparse.Namespace, device: torch.device) -> Job:
    """Make the model, cut over all ranks, and what trains it; refuse options that do not fit."""
    world_size = dist.get_world_size()
    slice_of_rank(0, options.global_batch, 0, world_size)
    torch.manual_seed(options.seed)
    corpus = standard_library(CORPUS_BYTES)
    model = GPT(options.layers, options.width, options.heads, options.context)
    model.to(device)
    cut_over(init_device_mesh(device.type, (world_size,)), model)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)

    def warmup_then_cosine(step: int) -> float:
        warm = (step + 1) / max(1, options.warmup)
        done = (step - options.warmup) / max(1, options.steps - options.warmup)
        return (
            warm if step < options.warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))
        )

    scheduler = LambdaLR(optimizer, warmup_then_cosine)
    progress = Progress(corpus.digest)
    return Job(options, device, corpus, model, optimizer, scheduler, progress, time.monotonic())


def ranks(count: int) -> str:
    """Return "1 rank" or "n ranks"."""
    return f"{count} rank" + "s" * (count > 1)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the job torchrun describes, or be a job of one rank; turn every source of chance off.

    Yields:
        The device of this rank.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # With one thread per rank the order of every sum on the CPU is fixed.
    torch.set_num_threads(1)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options, or leave with a usage message."""
    parser = argparse.ArgumentParser(description="Train a small GPT with FSDP2 and shardckpt.")
    parser.add_argument(
        "--steps", type=int, default=200, help="steps the learning rate is planned for"
    )
    parser.add_argument("--stop-step", type=int, help="leave earlier: after this many steps in all")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="bytes the model sees at a time")
    parser.add_argument(
        "--global-batch", type=int, default=24, help="samples per step over all ranks"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", default="runs/gpt", help="store for checkpoints")
    parser.add_argument(
        "--save-every", type=int, default=20, help="steps from one save to the next"
    )
    parser.add_argument("--resume-step", type=int, help="restore this step, not the newest")
    parser.add_argument("--no-checkpoint", action="store_true", help="neither save nor restore")
    parser.add_argument("--metrics", type=Path, help="append one JSON line per step to this file")
    parser.add_argument("--log-every", type=int, default=10, help="steps from one line to the next")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
    # All is saved and closed here. Leave without tearing Python down: a gloo thread that still has
    # the tensor of the last all-reduce needs Python's lock to let it go, and where Python ends
    # first the process aborts. With FSDP these threads outlive destroy_process_group.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
