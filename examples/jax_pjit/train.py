"""Train a small GPT in JAX on Python's own standard library, with checkpoints from shardckpt.

    python examples/jax_pjit/train.py --ckpt runs/gpt-jax --devices 8

As a job of two processes with four devices each:

    python examples/jax_pjit/train.py --devices 4 --processes 2 --process 0 --port 5555 &
    python examples/jax_pjit/train.py --devices 4 --processes 2 --process 1 --port 5555

What it shows: the whole of the checkpointing is `train` below. Parameters and optimizer state are
cut over the mesh, the jitted step donates them, and `save` may be called right before it. The same
command resumes from the newest checkpoint, on any mesh: `--model 2` makes every second device a
tensor-parallel one. On the same mesh of the same processes every later loss is equal bit for bit to
that of a run never interrupted; on another it differs by rounding only, because the global batch
of a step does not depend on who computes it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# The text and its order are those of the torch example.
sys.path.append(str(Path(__file__).parents[1] / "torch_fsdp"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gpt
import grain
import jax
import numpy as np
import optax
from corpus import VOCABULARY, Corpus, batch_of, standard_library
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardckpt import Best, Every, Retention
from shardckpt.jax import Checkpointer

CORPUS_BYTES: Final = 4_000_000
_NO_CONFIG: Final = (
    *("ckpt", "metrics", "log_every", "stop_step", "no_checkpoint"),
    *("devices", "processes", "process", "port", "model"),
)


@dataclass(frozen=True, slots=True)
class Samples:
    """The windows of the text in the order of the job, for grain to pick from."""

    text: np.ndarray[Any, Any]
    context: int
    seed: int
    num: int

    def __len__(self) -> int:
        """Return how many samples the job takes in all."""
        return self.num

    def __getitem__(self, sample: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the inputs and targets of one sample."""
        first = int(sample)
        pair = batch_of(self.text, range(first, first + 1), self.context, self.seed)
        return pair[0][0], pair[1][0]


@dataclass(frozen=True, slots=True)
class Job:
    """All that one process needs to train.

    Attributes:
        options: Of the command line.
        corpus: The text.
        blank: Shapes and shardings of parameters and optimizer state.
        fresh: Computes their first values.
        step: Takes and donates them with a batch; returns new ones and the loss.
        loss: The loss alone.
        batches: Where batches lie.
        started_s: When the process started.
    """

    options: argparse.Namespace
    corpus: Corpus
    blank: Any
    fresh: Any
    step: Any
    loss: Any
    batches: NamedSharding
    started_s: float


def main() -> None:
    """Run one process of the job described on the command line."""
    options = parse_options(sys.argv[1:])
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        address = f"127.0.0.1:{options.port}"
        # A process that is gone ends the others after this long, not after 100 s.
        jax.distributed.initialize(
            address, options.processes, options.process, heartbeat_timeout_seconds=10
        )
    print(f"process {options.process} of {options.processes} is {os.getpid()}", flush=True)
    if options.process == 0:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
        logging.getLogger("shardckpt").setLevel(logging.INFO)
    train(build(options))


def train(job: Job) -> None:
    """Train from the newest checkpoint, or from the start, and save on the way."""
    options, data = job.options, batches_of(job)
    if options.no_checkpoint:
        params, opt_state = job.fresh()
        for step in steps(job):
            params, opt_state, loss = job.step(params, opt_state, *spread(job, next(data)))
            report(job, step, float(loss))
        return
    with Checkpointer(
        options.ckpt,
        save_every=Every(steps=options.save_every),
        retention=Retention(last=3, best=Best("val_loss", "min", n=1)),
        config={name: value for name, value in vars(options).items() if name not in _NO_CONFIG},
    ) as ckpt:
        restored = ckpt.restore({**job.blank, "data": data, "text": job.corpus.digest})
        if restored is None:
            params, opt_state = job.fresh()
        else:
            check_text(job, restored.state["text"])
            params, opt_state = restored.state["params"], restored.state["opt_state"]
            if options.process == 0:
                mesh = f"{options.processes} x {options.devices} devices"
                saved_by = restored.world_size
                print(f"restored step {restored.step} saved by {saved_by}, now {mesh}", flush=True)
        for step in steps(job, first=restored.step + 1 if restored else 0):
            params, opt_state, loss = job.step(params, opt_state, *spread(job, next(data)))
            if ckpt.should_save(step) or step == steps(job)[-1]:
                held_out = float(job.loss(params, *held_out_batch(job)))
                state = {"params": params, "opt_state": opt_state}
                # The iterator of grain knows where the job is in its data.
                state |= {"data": data, "text": job.corpus.digest}
                ckpt.save(step, state, metrics={"val_loss": held_out})
            report(job, step, float(loss))


def steps(job: Job, first: int = 0) -> range:
    """Return the steps to train, from `first` on."""
    return range(first, min(job.options.steps, job.options.stop_step or job.options.steps))


def batches_of(job: Job) -> Any:
    """Return grain's iterator over global batches, alike in every process of any job."""
    options = job.options
    num = options.steps * options.global_batch
    samples = Samples(job.corpus.train, options.context, options.seed, num)
    dataset = grain.MapDataset.source(samples).batch(options.global_batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def check_text(job: Job, saved: str) -> None:
    """Refuse a position in another text.

    Raises:
        ValueError: The text differs.
    """
    if saved != job.corpus.digest:
        raise ValueError(
            f"the checkpoint was trained on text {saved}, this Python's standard library is text "
            f"{job.corpus.digest}: resume with the Python that started it"
        )


def held_out_batch(job: Job) -> tuple[jax.Array, jax.Array]:
    """Return the same global batch of held-out text every time."""
    options = job.options
    numbers = range(options.global_batch)
    return spread(job, batch_of(job.corpus.held_out, numbers, options.context, options.seed))


def spread(job: Job, pair: Any) -> tuple[jax.Array, jax.Array]:
    """Return a global batch cut over the data axis."""
    inputs, targets = (
        jax.make_array_from_callback(part.shape, job.batches, part.astype(np.int32).__getitem__)
        for part in pair
    )
    return inputs, targets


def build(options: argparse.Namespace) -> Job:
    """Compile what trains the model on the mesh; nothing of the model's size is made yet."""
    devices = np.array(jax.devices())
    mesh = Mesh(devices.reshape(-1, options.model), ("data", "model"))
    schedule = optax.warmup_cosine_decay_schedule(
        options.lr / options.warmup, options.lr, options.warmup, options.steps, 0.1 * options.lr
    )
    optimizer = optax.adamw(
        schedule, b1=0.9, b2=0.95, weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )  # fmt: skip

    def fresh() -> tuple[Any, Any]:
        key = jax.random.key(options.seed)
        params = gpt.init(key, options.layers, options.width, options.context, VOCABULARY)
        return params, optimizer.init(params)

    def loss_of(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        scores = gpt.logits(params, inputs, options.heads)
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()

    def step(params: Any, opt_state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, inputs, targets)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    shapes = jax.eval_shape(fresh)
    whole = NamedSharding(mesh, PartitionSpec())
    of_params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), gpt.specs(shapes[0]))
    # Moments lie as their parameters do, counters everywhere.
    of_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, shapes[1], of_params,
        transform_non_params=lambda _: whole,
    )  # fmt: skip
    blank = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        {"params": shapes[0], "opt_state": shapes[1]},
        {"params": of_params, "opt_state": of_state},
    )
    return Job(
        options, standard_library(CORPUS_BYTES), blank,
        jax.jit(fresh, out_shardings=(of_params, of_state)),
        jax.jit(step, donate_argnums=(0, 1), out_shardings=(of_params, of_state, whole)),
        jax.jit(loss_of, out_shardings=whole),
        NamedSharding(mesh, PartitionSpec("data")), time.monotonic(),
    )  # fmt: skip


def report(job: Job, step: int, loss: float) -> None:
    """Append the step to the metrics file, and print it now and then; process 0 speaks for all."""
    options = job.options
    if options.process != 0:
        return
    if options.metrics is not None:
        line = {"step": step, "loss": loss, "time_s": round(time.monotonic() - job.started_s, 3)}
        with options.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if step % options.log_every == 0:
        print(f"step {step}  loss {loss:.4f}", flush=True)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options, or leave with a usage message."""
    parser = argparse.ArgumentParser(description="Train a small GPT with JAX and shardckpt.")
    add = parser.add_argument
    add("--steps", type=int, default=200, help="steps the learning rate is planned for")
    add("--stop-step", type=int, help="leave earlier: after this many steps in all")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=64, help="bytes the model sees at a time")
    add("--global-batch", type=int, default=24, help="samples per step over all devices")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--ckpt", default="runs/gpt-jax", help="store for checkpoints")
    add("--save-every", type=int, default=20, help="steps from one save to the next")
    add("--no-checkpoint", action="store_true", help="neither save nor restore")
    add("--metrics", type=Path, help="append one JSON line per step to this file")
    add("--log-every", type=int, default=10, help="steps from one line to the next")
    add("--devices", type=int, default=4, help="CPU devices of each process")
    add("--model", type=int, default=1, help="devices along the tensor-parallel axis")
    add("--processes", type=int, default=1)
    add("--process", type=int, default=0, help="number of this process")
    add("--port", type=int, default=5555, help="of process 0, for several processes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
