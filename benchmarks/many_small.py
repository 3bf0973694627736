"""Many small tensors: 20,000 of 4 KiB, sharded over two ranks, beside DCP.

`python benchmarks/many_small.py [--tensors 20000] [--ranks 2] [--rounds 2]`

Here the bytes cost nothing and every tensor does. A save lasts until it is committed. The first
round warms up; both engines run in every round. Every load is compared bit for bit on every rank.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import torch
from harness import Report, arguments, say, scratch, spread
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch_job import join_gloo, together

from shardckpt.options import Retention
from shardckpt.testing.ranks import RankContext, run_ranks
from shardckpt.torch import Checkpointer, load

if TYPE_CHECKING:
    from pathlib import Path

ROWS: Final = 32
COLUMNS: Final = 32  # 32 x 32 of 4 bytes are 4 KiB.
MOST_OF_DCP: Final = 0.05


def state_of(told: RankContext, num_tensors: int) -> dict[str, DTensor]:
    """Return this rank's sharded tensors, as FSDP2 would hold them."""
    mesh = init_device_mesh("cpu", (told.world_size,))
    rows = ROWS // told.world_size
    values = torch.randn(num_tensors, rows, COLUMNS)
    return {
        f"layers.{i}.weight": DTensor.from_local(values[i].clone(), mesh, [Shard(0)])
        for i in range(num_tensors)
    }


def measure(told: RankContext, place: Path, num_tensors: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of every timed part; all ranks."""
    torch.manual_seed(told.rank)
    torch.set_num_threads(1)
    join_gloo(told)
    state = state_of(told, num_tensors)
    copies = {key: value.to_local().clone() for key, value in state.items()}
    seconds: dict[str, list[float]] = defaultdict(list)
    checkpointer = Checkpointer(place / "shardckpt", retention=Retention(last=2))

    def filled(name: str) -> None:
        for key, value in state.items():
            if not torch.equal(value.to_local(), copies[key]):
                raise AssertionError(f"{name}: {key} differs from what was saved")
            value.to_local().fill_(-1)

    def restored() -> None:
        for key, value in state.items():
            value.to_local().copy_(copies[key])

    for round_ in range(rounds + 1):
        saving = together(lambda step=round_: checkpointer.save(step, {"model": state}).wait())
        seconds["shardckpt save, new state" if round_ == 0 else "shardckpt save"].append(saving)
        filled("before load")
        loading = together(lambda: load(place / "shardckpt", {"model": state}))
        seconds["shardckpt load"].append(loading)
        filled("shardckpt")
        restored()
        if told.rank == 0:
            shutil.rmtree(place / "dcp", ignore_errors=True)
        seconds["dcp save"].append(
            together(lambda: dcp.save({"model": state}, checkpoint_id=place / "dcp"))
        )
        filled("before load")
        seconds["dcp load"].append(
            together(lambda: dcp.load({"model": state}, checkpoint_id=place / "dcp"))
        )
        filled("dcp")
        restored()
    checkpointer.close()
    distributed.destroy_process_group()
    return dict(seconds)


def main() -> int:
    """Run the ranks and judge."""
    parser = arguments("Save and load many small tensors beside DCP.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    with scratch(told.directory) as place:
        results: list[Any] = run_ranks(
            told.ranks, measure, place, told.tensors, told.rounds,
            timeout_s=1200.0, directory=place / "ranks",
        )  # fmt: skip
    seconds = results[0]
    report = Report("many_small")
    medians: dict[str, float] = {}
    for name, values in seconds.items():
        counted = values[1:] or values
        medians[name] = statistics.median(counted)
        report.facts[f"{name} s"] = [round(v, 4) for v in values]
        say(f"{name:28} {spread(counted)} s")
    for what in ("save", "load"):
        ratio = medians[f"shardckpt {what}"] / medians[f"dcp {what}"]
        report.add(f"{what}_time_per_dcp_time", ratio, at_most=MOST_OF_DCP)
    new = medians["shardckpt save, new state"] / medians["dcp save"]
    report.add("save_of_new_state_time_per_dcp_time", new, at_most=MOST_OF_DCP)
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
