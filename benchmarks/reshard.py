"""What a load in another layout reads: every pair of layouts and world sizes.

`python benchmarks/reshard.py`

One pool of ranks stays up; each layout lives on a mesh of its first ranks. Every layout saves once
and every layout loads every one of these. Values are compared bit for bit on every rank. Bytes read
are judged against bytes needed, on the rank that fares worst, where the load cuts only dims that
begin a row-major array or that the save had cut, too; a cut along another dim must read more than
it needs, and is only told. Reads are rounded to checksum chunks: small tensors are told apart, and
so is one of 5.9 MiB whose parts end inside chunks.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from harness import Report, arguments, say, scratch, table
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from shardckpt.testing.ranks import RankContext, run_ranks
from shardckpt.torch import Checkpointer, load
from shardckpt.torch.coord import C10dCoord

if TYPE_CHECKING:
    from pathlib import Path

POOL: Final = 8
TENSOR_PARALLEL: Final = 2
TIMEOUT_S: Final = 120.0
MOST_READ: Final = 1.05
# The matrices of a transformer of width 768, cut by columns or by rows under tensor parallelism;
# one shape whose parts end in the middle of chunks wherever they can; and small tensors.
SHAPES: Final = {
    "model/column": ((2304, 768), (3072, 768)),
    "model/row": ((768, 3072),),
    "odd/column": ((1536, 1000),),
    "odd/row": ((1536, 1000),),
    "small/column": ((514, 260),) * 4,
    "small/row": ((514, 260),) * 4,
}
GROUPS: Final = tuple(SHAPES)
SIZES: Final = ("model", "odd", "small")


@dataclass(frozen=True)
class Job:
    """One layout on the first ranks of the pool."""

    layout: str
    num_ranks: int

    @property
    def name(self) -> str:
        """Return what tables call it."""
        return f"{self.layout}-{self.num_ranks}"

    def mesh_shape(self) -> tuple[int, ...]:
        """Return the shape of its mesh."""
        if self.layout == "hsdp":
            return (2, self.num_ranks // 2)
        if self.layout == "tp+fsdp2":
            return (self.num_ranks // TENSOR_PARALLEL, TENSOR_PARALLEL)
        return (self.num_ranks,)

    def cuts_columns(self, group: str) -> bool:
        """Return whether tensors of this group are cut along their last dim."""
        return self.layout == "tp+fsdp2" and group.endswith("row")

    def loads(self) -> tuple[str, ...]:
        """Return the parts to load one by one: what this layout cuts alike is loaded together."""
        return GROUPS if self.layout == "tp+fsdp2" else SIZES

    def placements(self, group: str) -> tuple[Any, ...] | None:
        """Return torch's placements, or None for plain tensors."""
        if self.layout == "fsdp2":
            return (Shard(0),)
        if self.layout == "hsdp":
            return (Replicate(), Shard(0))
        if self.layout == "tp+fsdp2":
            if group.endswith("row"):
                return (Shard(0), Shard(1))
            return (_StridedShard(0, split_factor=TENSOR_PARALLEL), Shard(0))
        return None

    def part(self, full: torch.Tensor, group: str, rank: int) -> torch.Tensor:
        """Return what a rank holds of a tensor."""
        if self.layout == "fsdp2":
            return _chunk(full, self.num_ranks, 0, rank)
        if self.layout == "hsdp":
            return _chunk(full, self.num_ranks // 2, 0, rank % (self.num_ranks // 2))
        if self.layout == "tp+fsdp2":
            data, tensor = divmod(rank, TENSOR_PARALLEL)
            mine = _chunk(full, TENSOR_PARALLEL, int(group.endswith("row")), tensor)
            return _chunk(mine, self.num_ranks // TENSOR_PARALLEL, 0, data)
        return full


JOBS: Final = (
    Job("plain", 1),
    *(Job("fsdp2", n) for n in (1, 2, 3, 4, 8)),
    *(Job("hsdp", n) for n in (4, 8)),
    *(Job("tp+fsdp2", n) for n in (4, 8)),
    *(Job("ddp", n) for n in (2, 3, 4, 8)),
)


def _chunk(full: torch.Tensor, count: int, dim: int, index: int) -> torch.Tensor:
    parts = torch.chunk(full, count, dim)
    return parts[index] if index < len(parts) else full.narrow(dim, 0, 0)


class Pool:
    """This process as a rank of every job."""

    def __init__(self, told: RankContext, place: Path) -> None:
        """Join the pool and make every mesh; all ranks."""
        torch.set_num_threads(1)
        self._rank = told.rank
        self._place = place
        # Not a TCPStore: each of its connections asks the name server for the name of its peer,
        # which on some machines takes seconds now and then, and every load opens one.
        self._store = distributed.FileStore(str(told.directory / "store"), -1)
        self._store.set_timeout(datetime.timedelta(seconds=TIMEOUT_S))
        distributed.init_process_group(
            "gloo", store=distributed.PrefixStore("pool", self._store),
            rank=told.rank, world_size=told.world_size,
        )  # fmt: skip
        self._full = _full_tensors()
        self._meshes = {
            job: DeviceMesh("cpu", torch.arange(job.num_ranks).view(job.mesh_shape()))
            for job in JOBS
        }

    def save(self, job: Job) -> None:
        """Save the state in one layout; all ranks of the pool."""
        if self._rank < job.num_ranks:
            coord = self._coord(f"save/{job.name}", job)
            with Checkpointer(self._place / job.name, coord=coord) as checkpointer:
                checkpointer.save(1, {"state": self._state(job, filled=True)}).wait()
        distributed.barrier()

    def load(self, saved: Job, job: Job) -> dict[str, tuple[float, int, int]]:
        """Load part by part, compare, and return seconds, bytes read and bytes needed of each.

        Raises:
            AssertionError: A value differs.
        """
        found: dict[str, tuple[float, int, int]] = {}
        state = self._state(job, filled=False) if self._rank < job.num_ranks else {}
        for group in job.loads():
            distributed.barrier()
            started = time.perf_counter()
            if state:
                coord = self._coord(f"load/{saved.name}/{job.name}/{group}", job)
                restored = load(
                    self._place / saved.name, {"state": state}, only=[f"state/{group}/*"],
                    coord=coord,
                )  # fmt: skip
                coord.close()
                stats = restored.stats
            distributed.barrier()
            if state:
                seconds = time.perf_counter() - started
                found[group] = (seconds, stats.read_bytes, stats.needed_bytes)
        for key, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            expected = job.part(self._full[key], _group(key), self._rank)
            if not torch.equal(local.view(torch.int32), expected.view(torch.int32)):
                raise AssertionError(f"{saved.name} to {job.name}: {key} differs")
        return found

    def _coord(self, name: str, job: Job) -> C10dCoord:
        store = distributed.PrefixStore(name, self._store)
        return C10dCoord(store, self._rank, job.num_ranks, timeout_s=TIMEOUT_S)

    def _state(self, job: Job, *, filled: bool) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for key, full in self._full.items():
            group = _group(key)
            part = job.part(full, group, self._rank)
            local = part.clone(memory_format=torch.contiguous_format)
            if not filled:
                local.fill_(-1)
            placements = job.placements(group)
            state[key] = (
                local
                if placements is None
                else DTensor.from_local(
                    local, self._meshes[job], placements, run_check=False, shape=full.shape,
                    stride=full.stride(),
                )
            )  # fmt: skip
        return state


def _group(key: str) -> str:
    return key.rpartition("/")[0]


def _full_tensors() -> dict[str, torch.Tensor]:
    """Return the whole state, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{group}/{i}": torch.randn(shape, generator=generator)
        for group, shapes in SHAPES.items()
        for i, shape in enumerate(shapes)
    }


def measure(told: RankContext, place: Path) -> list[dict[str, Any]]:
    """Save and load every pair; all ranks of the pool."""
    pool = Pool(told, place)
    for job in JOBS:
        pool.save(job)
    found: list[dict[str, Any]] = []
    for saved in JOBS:
        found += [pool.load(saved, job) for job in JOBS]
        say(f"loaded {saved.name} {len(JOBS)} times")
    distributed.barrier()
    distributed.destroy_process_group()
    return found


def judge(report: Report, results: list[Any]) -> None:
    """Print every pair and add the figures."""
    ratios: dict[str, list[float]] = defaultdict(list)
    seconds: dict[tuple[Job, Job], float] = {}
    rows: list[list[str]] = []
    pairs = [(saved, job) for saved in JOBS for job in JOBS]
    for i, (saved, job) in enumerate(pairs):
        ranks = [result[i] for result in results if result[i]]
        seconds[saved, job] = sum(max(rank[part][0] for rank in ranks) for part in job.loads())
        row = [saved.name, job.name]
        for group in job.loads():
            # Of the rank that fares worst.
            ratio = max(rank[group][1] / rank[group][2] for rank in ranks if rank[group][2])
            stays = saved.cuts_columns(group) or not job.cuts_columns(group)
            ratios[f"{group.partition('/')[0]}_{'stays' if stays else 'changes'}"].append(ratio)
            text = f"{ratio:.3f}{'' if stays else ' *'}"
            row += [text] if job.loads() is GROUPS else [text] * 2
        rows.append(row)
    slower = {pair: s / seconds[pair[1], pair[1]] for pair, s in seconds.items()}
    for row, pair in zip(rows, pairs, strict=True):
        row.append(f"{slower[pair]:.2f}")
    table(("saved", "loaded", *GROUPS, "time / same layout"), rows)
    report.facts["pairs, each compared bit for bit"] = len(pairs)
    report.add(
        "read_per_needed_of_model_tensors_from_4_mib_worst",
        max(ratios["model_stays"]), at_most=MOST_READ,
    )  # fmt: skip
    report.add("read_per_needed_of_odd_6_mib_tensors_worst", max(ratios["odd_stays"]))
    report.add(
        "read_per_needed_of_odd_6_mib_tensors_median", statistics.median(ratios["odd_stays"])
    )
    report.add(
        "read_per_needed_of_tensors_below_4_mib_median", statistics.median(ratios["small_stays"])
    )
    report.add("read_per_needed_of_tensors_below_4_mib_worst", max(ratios["small_stays"]))
    report.add("read_per_needed_where_the_split_changes_worst", max(ratios["model_changes"]))
    report.add("time_per_same_layout_time_median", statistics.median(slower.values()))
    report.add("time_per_same_layout_time_worst", max(slower.values()))


def main() -> int:
    """Run the pool and judge."""
    parser = arguments("Load every layout into every other.")
    told = parser.parse_args()
    with scratch(told.directory) as place:
        results = run_ranks(POOL, measure, place, timeout_s=1200.0, directory=place / "ranks")
    report = Report("reshard")
    judge(report, results)
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
