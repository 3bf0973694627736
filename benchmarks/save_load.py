"""Durable save and load of an FSDP2 training state beside torch.distributed.checkpoint (DCP).

`python benchmarks/save_load.py [--ranks 2] [--gib 1.5]`

Both save durably: DCP with its own default of flushing every file. Each round saves and loads with
both, the order swapped from round to round; the first round only warms up. Old checkpoints are
removed between the timed parts. Every load is compared bit for bit on every rank. DCP gets its
state dict for free: neither `get_state_dict` nor `set_state_dict` is timed.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import torch
from harness import (
    GIB,
    MIB,
    Report,
    arguments,
    drop_from_cache,
    read_into_cache,
    say,
    scratch,
    spread,
    staging_bytes,
    wait_for_retention,
)
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch_job import join_gloo, locals_of, together

from shardckpt.options import Retention
from shardckpt.testing.ranks import RankContext, run_ranks
from shardckpt.torch import Checkpointer, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTH: Final = 2048
KEPT_STEPS: Final = 2  # Retention never leaves fewer than two good steps.
BOTH: Final = ("shardckpt", "dcp")


class Trainee:
    """An FSDP2 model with AdamW state whose every value is known without a copy."""

    def __init__(self, nbytes: int, world_size: int) -> None:
        """Build it and take one step, so that moments are there; all ranks."""
        layer_bytes = 3 * 4 * WIDTH * (WIDTH + 1)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(max(1, nbytes // layer_bytes))]
        mesh = init_device_mesh("cpu", (world_size,))
        self.model = fully_shard(
            nn.Sequential(*(fully_shard(layer, mesh=mesh) for layer in layers)), mesh=mesh
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        model, optimizer = get_state_dict(self.model, self.optimizer)
        self.state_dict = {"model": model, "optimizer": optimizer}
        self.locals = locals_of(self.state_dict)
        # Random bits, as long as the longest tensor and one more for each: every tensor holds the
        # same bits from another start. The counters of the optimizer stay what they are.
        length = max(value.numel() for value in self.locals) + len(self.locals)
        self._bits = torch.randint(-(1 << 31), 1 << 31, (length,), dtype=torch.int32)
        for i, value in enumerate(self.locals):
            value.view(torch.int32).copy_(self._expected(i))
        self.rank_bytes = sum(value.nbytes for value in self.locals)

    def forget(self) -> None:
        """Overwrite every value, which also touches all memory."""
        for value in self.locals:
            value.fill_(-1)

    def check(self, what: str) -> None:
        """Compare every local value with what was saved.

        Raises:
            AssertionError: A bit differs.
        """
        for i, value in enumerate(self.locals):
            if not torch.equal(value.view(torch.int32), self._expected(i)):
                raise AssertionError(f"{what}: local tensor {i} differs from what was saved")

    def _expected(self, i: int) -> torch.Tensor:
        size = self.locals[i].numel()
        return torch.ones(1).view(torch.int32) if size == 1 else self._bits[i : i + size]


def measure(told: RankContext, place: Path, nbytes: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of every timed part and what staging held, on every rank."""
    torch.manual_seed(told.rank)
    torch.set_num_threads(1)
    join_gloo(told)
    trainee = Trainee(nbytes, told.world_size)
    ours, theirs = place / "shardckpt", place / "dcp"
    seconds: dict[str, list[float]] = defaultdict(list)
    checkpointer = Checkpointer(ours, retention=Retention(last=KEPT_STEPS))
    for round_ in range(rounds + 1):
        calls: dict[str, tuple[Callable[[], object], Callable[[], object], Path]] = {
            "shardckpt": (
                lambda step=round_: _save(checkpointer, step, trainee.state, seconds),
                lambda: load(ours, trainee.state),
                ours,
            ),
            "dcp": (
                lambda: dcp.save(trainee.state_dict, checkpoint_id=theirs),
                lambda: dcp.load(trainee.state_dict, checkpoint_id=theirs),
                theirs,
            ),
        }
        for name in BOTH if round_ % 2 else BOTH[::-1]:
            save, fill, directory = calls[name]
            if name == "dcp" and told.rank == 0:
                shutil.rmtree(theirs, ignore_errors=True)
                os.sync()
            seconds[f"{name} save"].append(together(save))
            settle(ours, told)
            for kind in ("cold", "warm"):
                trainee.forget()
                if told.rank == 0:
                    # Not by the load before: one that read past the page cache leaves it as it was.
                    (drop_from_cache if kind == "cold" else read_into_cache)(directory)
                seconds[f"{name} load {kind}"].append(together(fill))
                trainee.check(f"{name} {kind}")
        if told.rank == 0:
            say(f"round {round_}: " + ", ".join(f"{k} {v[-1]:.3f}" for k, v in seconds.items()))
    arena_bytes = staging_bytes(checkpointer)
    checkpointer.close()
    distributed.destroy_process_group()
    return {
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "staging_bytes": arena_bytes,
        "rank_bytes": trainee.rank_bytes,
    }


def _save(
    checkpointer: Checkpointer, step: int, state: dict[str, Any], seconds: dict[str, list[float]]
) -> None:
    started = time.perf_counter()
    handle = checkpointer.save(step, state)
    seconds["shardckpt stall"].append(time.perf_counter() - started)
    handle.wait()


def settle(store: Path, told: RankContext) -> None:
    """Wait until the step before is removed, so that its removal disturbs no timed part."""
    wait_for_retention(store, KEPT_STEPS)
    if told.rank == 0:
        os.sync()
    distributed.barrier()


def main() -> int:
    """Run the ranks and judge."""
    parser = arguments("Save and load an FSDP2 state beside DCP.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gib", type=float, default=1.5, help="bytes of the whole state")
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    with scratch(told.directory) as place:
        results = run_ranks(
            told.ranks, measure, place, int(told.gib * GIB), told.rounds,
            timeout_s=1200.0, directory=place / "ranks",
        )  # fmt: skip
    first: Any = results[0]
    seconds = first["seconds"]
    report = Report("save_load")
    report.facts["state_mib"] = round(sum(r["rank_bytes"] for r in results) / MIB)
    for name, values in sorted(seconds.items()):
        say(f"{name:22} {spread(values)} s")
        report.facts[f"{name} s"] = [round(v, 4) for v in values]

    def ratio(what: str) -> float:
        theirs, ours = seconds[f"dcp {what}"], seconds[f"shardckpt {what}"]
        return statistics.median(theirs) / statistics.median(ours)

    report.add("save_times_faster_than_dcp", ratio("save"), at_least=1.3)
    report.add("load_cold_times_faster_than_dcp", ratio("load cold"), at_least=1.0)
    report.add("load_warm_times_faster_than_dcp", ratio("load warm"), at_least=1.0)
    stall = statistics.median(seconds["shardckpt stall"])
    report.add("stall_part_of_save", stall / statistics.median(seconds["shardckpt save"]))
    report.add(
        "staging_bytes_per_shard_byte",
        max(r["staging_bytes"] / r["rank_bytes"] for r in results),
        at_most=1.02,
    )
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
