"""The JAX job of the demo: one process with eight devices, from the newest step, whoever saved it.

    python examples/cross/train_jax.py --ckpt runs --until 20 --losses j.jsonl

It has no first values of its own: step 0 is what torch saved before it trained.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gpt_jax
import jax
import numpy as np
import optax
from gpt_map import gpt_map
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from task import Corpus, Task, check_text, log_warnings, parse_options, write_loss

# isort: split
from corpus import VOCABULARY

from shardckpt import Retention
from shardckpt.jax import Checkpointer, load

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

DEVICES: Final = 8


@dataclass(frozen=True, slots=True)
class Job:
    """All that the process needs to train.

    Attributes:
        blank: Shapes and shardings of parameters and optimizer state.
        zeros: Makes them all zero.
        step: Takes and donates them with a batch; returns new ones and the loss.
        batches: Where batches lie.
    """

    options: argparse.Namespace
    task: Task
    corpus: Corpus
    blank: dict[str, Any]
    zeros: Any
    step: Any
    batches: NamedSharding


def main() -> None:
    """Run the job described on the command line."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    log_warnings()
    job = build(parse_options(), Task())
    if job.options.alone_from is None:
        checkpointed_training(job)
    else:
        train(job, loaded(job), first=job.options.alone_from)


def checkpointed_training(job: Job) -> None:
    """Train from the newest step, and save the end."""
    options = job.options
    blank = {**job.blank, "corpus": ""}
    with Checkpointer(options.ckpt, retention=Retention(last=4)) as ckpt:
        restored = ckpt.restore(blank, map=gpt_map(job.task.heads))
        if restored is None:
            raise SystemExit(f"{options.ckpt}: no step to go on from; start with train_torch.py")
        check_text(restored.state, job.corpus)
        write_state(restored.state, options.restored)
        state = train(job, restored.state, first=restored.step)
        ckpt.save(options.until, state)
    write_state(state, options.trained)


def loaded(job: Job) -> dict[str, Any]:
    """Return the state of the step to start from, without writing to the store."""
    options, model_map = job.options, gpt_map(job.task.heads)
    if options.no_moments:
        # What is not loaded stays what it is in the target: the moments are those of step 0.
        return load(
            options.ckpt, job.zeros(), step=options.alone_from, only=["params/*"], map=model_map
        ).state
    blank = {**job.blank, "corpus": ""}
    return load(options.ckpt, blank, step=options.alone_from, map=model_map).state


def train(job: Job, state: dict[str, Any], first: int) -> dict[str, Any]:
    """Train every step from `first` on; return the new state."""
    params, opt_state = state["params"], state["opt_state"]
    for step in range(first, job.options.until):
        inputs, targets = (
            jax.device_put(part.astype(np.int32), job.batches)
            for part in job.task.batch(job.corpus, step)
        )
        params, opt_state, loss = job.step(params, opt_state, inputs, targets)
        write_loss(job.options.losses, step, float(loss))
    return {**state, "params": params, "opt_state": opt_state}


def build(options: argparse.Namespace, task: Task) -> Job:
    """Compile what trains the model on the mesh; nothing of the model's size is made yet."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    optimizer = optax.adamw(
        task.lr, b1=task.betas[0], b2=task.betas[1], eps=task.eps, weight_decay=task.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )  # fmt: skip

    def fresh() -> dict[str, Any]:
        params = gpt_jax.blank(VOCABULARY, task.context, task.layers, task.width, task.heads)
        return {"params": params, "opt_state": optimizer.init(params)}

    def loss_of(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        scores = gpt_jax.logits(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()

    def step(params: Any, opt_state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, inputs, targets)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def on_mesh(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x)))

    blank = jax.tree.map(on_mesh, jax.eval_shape(fresh))
    lies = jax.tree.map(lambda x: x.sharding, blank)
    results = (lies["params"], lies["opt_state"], NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=results)
    batches = NamedSharding(mesh, PartitionSpec("data"))
    zeros = jax.jit(fresh, out_shardings=lies)
    return Job(options, task, task.text(), blank, zeros, compiled, batches)


def spec_of(array: Any) -> PartitionSpec:
    """Return how an array is cut as FSDP does: its largest dim that divides by the devices."""
    fitting = [dim for dim, size in enumerate(array.shape) if size % DEVICES == 0]
    if not fitting:
        return PartitionSpec()
    cut = max(fitting, key=lambda dim: array.shape[dim])
    return PartitionSpec(*("data" if dim == cut else None for dim in range(cut + 1)))


def write_state(state: dict[str, Any], path: Path | None) -> None:
    """Write what this job holds in memory, not what a checkpoint says."""
    if path is None:
        return
    adam = state["opt_state"][0]
    arrays = {"steps": np.asarray(int(adam.count))}
    trees = {"parameter": state["params"], "moment 1": adam.mu, "moment 2": adam.nu}
    for what, tree in trees.items():
        for at, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            arrays[f"{what} {'.'.join(part.key for part in at)}"] = np.asarray(leaf)
    np.savez(path, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
