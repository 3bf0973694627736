"""What a load in another layout reads: every pair of layouts and world sizes.

`python benchmarks/reshard.py`

One pool of ranks stays up; each layout lives on a mesh of its first ranks. Every layout saves once
and every layout loads every one of these, part by part. Values are compared bit for bit on every
rank. The bytes that all ranks together read are judged against the bytes of the state: what
several ranks need is read once. Parts are told apart: small tensors are all chunk borders.

Then a few pairs are timed on a larger state, each alternating with the load of the same layout,
from files that are in the page cache.
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
from harness import Report, arguments, say, scratch, spread, table
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from shardckpt.testing.ranks import RankContext, run_ranks
from shardckpt.torch import Checkpointer, load
from shardckpt.torch.coord import C10dCoord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

POOL: Final = 8
TENSOR_PARALLEL: Final = 2
TIMEOUT_S: Final = 120.0
MOST_READ: Final = 1.05
MOST_TIME: Final = 1.15
MOST_TIME_OTHER_DIM: Final = 1.5
REPEATS: Final = 5
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
TIMED_SHAPES: Final = {
    "model/column": ((2304, 768), (3072, 768)) * 8,
    "model/row": ((768, 3072),) * 8,
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

    def loads(self) -> tuple[str, ...]:
        """Return the parts to load one by one: what this layout cuts alike is loaded together."""
        return GROUPS if self.layout == "tp+fsdp2" else SIZES

    def placements(self, group: str) -> tuple[Any, ...] | None:
        """Return torch's placements, or None for plain tensors."""
        if self.layout == "fsdp2":
            return (Shard(0),)
        if self.layout == "columns":
            return (Shard(1),)
        if self.layout == "hsdp":
            return (Replicate(), Shard(0))
        if self.layout == "tp+fsdp2":
            if group.endswith("row"):
                return (Shard(0), Shard(1))
            return (_StridedShard(0, split_factor=TENSOR_PARALLEL), Shard(0))
        return None

    def part(self, full: torch.Tensor, group: str, rank: int) -> torch.Tensor:
        """Return what a rank holds of a tensor."""
        if self.layout in ("fsdp2", "columns"):
            return _chunk(full, self.num_ranks, int(self.layout == "columns"), rank)
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
    Job("columns", 4),
)
TIMED: Final = (
    (Job("fsdp2", 2), Job("fsdp2", 1)),
    (Job("fsdp2", 1), Job("fsdp2", 2)),
    (Job("fsdp2", 4), Job("fsdp2", 3)),
    (Job("fsdp2", 4), Job("columns", 4)),
    (Job("fsdp2", 4), Job("ddp", 4)),
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
        self._meshes = {
            job: DeviceMesh("cpu", torch.arange(job.num_ranks).view(job.mesh_shape()))
            for job in JOBS
        }
        self._full: dict[str, torch.Tensor] = {}
        self._prefix = ""

    def take(self, shapes: dict[str, tuple[tuple[int, ...], ...]], prefix: str) -> None:
        """Take another state; all ranks of the pool."""
        self._full = _full_tensors(shapes)
        self._prefix = prefix

    def save(self, job: Job) -> None:
        """Save the state in one layout; all ranks of the pool."""
        if self._rank < job.num_ranks:
            coord = self._coord(f"save/{job.name}", job)
            with Checkpointer(self._where(job), coord=coord) as checkpointer:
                checkpointer.save(1, {"state": self._state(job, filled=True)}).wait()
        distributed.barrier()

    def load(
        self, saved: Job, job: Job, parts: Sequence[str], turn: int = 0
    ) -> dict[str, tuple[float, int, int]]:
        """Load part by part and compare.

        Returns:
            By part: seconds, bytes that all ranks read, bytes of the state.

        Raises:
            AssertionError: A value differs.
        """
        found: dict[str, tuple[float, int, int]] = {}
        state = self._state(job, filled=False) if self._rank < job.num_ranks else {}
        for part in parts:
            distributed.barrier()
            started = time.perf_counter()
            if state:
                coord = self._coord(f"load/{saved.name}/{job.name}/{part}/{turn}", job)
                restored = load(
                    self._where(saved), {"state": state}, only=[f"state/{part}/*"], coord=coord
                )
                coord.close()
                stats = restored.stats
            distributed.barrier()
            if state:
                seconds = time.perf_counter() - started
                nbytes = sum(v.nbytes for k, v in self._full.items() if k.startswith(f"{part}/"))
                found[part] = (seconds, stats.job_read_bytes, nbytes)
        for key, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            expected = job.part(self._full[key], _group(key), self._rank)
            if not torch.equal(local.view(torch.int32), expected.view(torch.int32)):
                raise AssertionError(f"{saved.name} to {job.name}: {key} differs")
        return found

    def _where(self, job: Job) -> Path:
        return self._place / f"{self._prefix}{job.name}"

    def _coord(self, name: str, job: Job) -> C10dCoord:
        store = distributed.PrefixStore(self._prefix + name, self._store)
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


def _full_tensors(shapes: dict[str, tuple[tuple[int, ...], ...]]) -> dict[str, torch.Tensor]:
    """Return the whole state, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{group}/{i}": torch.randn(shape, generator=generator)
        for group, of_group in shapes.items()
        for i, shape in enumerate(of_group)
    }


def measure(told: RankContext, place: Path) -> tuple[list[dict[str, Any]], list[list[list[float]]]]:
    """Save and load every pair, then time some; all ranks of the pool."""
    pool = Pool(told, place)
    pool.take(SHAPES, "")
    for job in JOBS:
        pool.save(job)
    found: list[dict[str, Any]] = []
    for saved in JOBS:
        found += [pool.load(saved, job, job.loads()) for job in JOBS]
        say(f"loaded {saved.name} {len(JOBS)} times")
    pool.take(TIMED_SHAPES, "timed-")
    for job in dict.fromkeys(job for pair in TIMED for job in pair):
        pool.save(job)
    timed: list[list[list[float]]] = []
    for saved, job in TIMED:
        seconds: list[list[float]] = [[], []]
        # The first turn is not timed: it maps memory and brings files into the page cache.
        for turn in range(REPEATS + 1):
            for of_layout, source in zip(seconds, (job, saved), strict=True):
                told_part = pool.load(source, job, ("model",), turn).get("model")
                if turn and told_part:
                    of_layout.append(told_part[0])
        timed.append(seconds)
    distributed.barrier()
    distributed.destroy_process_group()
    return found, timed


def judge(report: Report, results: list[Any]) -> None:
    """Print every pair and add the figures."""
    ratios: dict[str, list[float]] = defaultdict(list)
    rows: list[list[str]] = []
    pairs = [(saved, job) for saved in JOBS for job in JOBS]
    for i, (saved, job) in enumerate(pairs):
        parts = results[0][0][i]
        row = [saved.name, job.name]
        for part, (_, job_read, needed) in parts.items():
            ratios[part.partition("/")[0]].append(job_read / needed)
            row += [f"{job_read / needed:.3f}"] * (1 if job.loads() is GROUPS else 2)
        whole = sum(p[1] for p in parts.values()) / sum(p[2] for p in parts.values())
        ratios["all"].append(whole)
        rows.append([*row, f"{whole:.3f}"])
    table(("saved", "loaded", *GROUPS, "all"), rows)
    report.facts["pairs, each compared bit for bit"] = len(pairs)
    report.add("job_read_per_byte_of_the_state_worst_pair", max(ratios["all"]), at_most=MOST_READ)
    report.add("job_read_per_byte_of_model_tensors_worst", max(ratios["model"]), at_most=MOST_READ)
    report.add("job_read_per_byte_of_odd_tensors_worst", max(ratios["odd"]), at_most=MOST_READ)
    report.add("job_read_per_byte_of_tensors_below_1_mib_worst", max(ratios["small"]))
    for i, (saved, job) in enumerate(TIMED):
        # Until the last rank is done.
        same, other = (
            [
                max(turn)
                for turn in zip(*(r[1][i][which] for r in results if r[1][i][which]), strict=True)
            ]
            for which in (0, 1)
        )
        say(f"{saved.name} to {job.name}: {spread(other)} s, same layout {spread(same)} s")
        most = MOST_TIME_OTHER_DIM if job.layout == "columns" else MOST_TIME
        report.add(
            f"time_{saved.name}_to_{job.name}_per_same_layout_time",
            statistics.median(other) / statistics.median(same),
            at_most=None if job.layout == "ddp" else most,
        )


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
