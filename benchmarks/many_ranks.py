"""Coordination of many real processes: what a save costs each rank and the key-value store.

`python benchmarks/many_ranks.py [--ranks 8,16,32,64] [--jax-ranks 8,16,32] [--rounds 5]`

Every rank is a process with a Checkpointer of its own on the real stores: torch's TCPStore, and the
client of JAX's distributed runtime. The state is small (256 arrays of 4 KiB, of which each rank
writes its share), so that what is seen is coordination. Calls of the store are counted between
saves: a call is one operation, and so is a wait, which the store itself does and answers once (on
torch a request beside the one that checks a value's presence; one that is gone on with counts
again). Where a store could not wait, each time it is asked would count.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from counted import CountedCoord
from harness import Report, arguments, say, scratch, table
from scale import exponent, numbers

from shardckpt.options import Retention
from shardckpt.testing.ranks import RankContext, run_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shardckpt.coord.base import Coord

NUM_ARRAYS: Final = 256
ARRAY_BYTES: Final = 4096
MOST_OPERATIONS: Final = 8
MOST_EXPONENT: Final = 1.05
TIMEOUT_S: Final = 300.0
QUIET_S: Final = 0.5


def torch_rank(told: RankContext, place: Path, rounds: int) -> dict[str, Any]:
    """Save with torch's Checkpointer over a TCPStore; all ranks."""
    import torch

    from shardckpt.torch import Checkpointer
    from shardckpt.torch.coord import C10dCoord

    torch.set_num_threads(1)
    store = torch.distributed.TCPStore(
        "127.0.0.1", told.port, is_master=told.rank == 0, wait_for_workers=False,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    coord = CountedCoord(C10dCoord(store, told.rank, told.world_size, timeout_s=TIMEOUT_S))
    state = {f"w{i}": torch.full((ARRAY_BYTES // 4,), float(i)) for i in range(NUM_ARRAYS)}
    with Checkpointer(
        place, retention=Retention(last=2), timeout_s=TIMEOUT_S, coord=coord
    ) as checkpointer:
        return _saves(checkpointer, {"model": state}, coord, rounds)


def jax_rank(told: RankContext, place: Path, rounds: int) -> dict[str, Any]:
    """Save with JAX's Checkpointer over its distributed runtime; all processes."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from shardckpt.jax import Checkpointer
    from shardckpt.jax.coord import default_coord

    jax.distributed.initialize(f"127.0.0.1:{told.port}", told.world_size, told.rank)
    coord = CountedCoord(default_coord(TIMEOUT_S))
    state = {f"w{i}": np.full(ARRAY_BYTES // 4, float(i), np.float32) for i in range(NUM_ARRAYS)}
    try:
        with Checkpointer(
            place, retention=Retention(last=2), timeout_s=TIMEOUT_S, coord=coord
        ) as checkpointer:
            return _saves(checkpointer, {"model": state}, coord, rounds)
    finally:
        jax.distributed.shutdown()


def _saves(checkpointer: Any, state: Any, coord: Coord, rounds: int) -> dict[str, Any]:
    """Save once with a new structure, then some times more; return what was counted of each."""
    assert isinstance(coord, CountedCoord)
    before = Counter(coord.operations)
    cpu_s, began = time.process_time(), time.perf_counter()
    checkpointer.save(0, state).wait()
    first_s, first_cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    time.sleep(QUIET_S)  # What follows a save: the messages of the one before are deleted.
    first = Counter(coord.operations)
    first.subtract(before)
    checkpointer.save(1, state).wait()
    time.sleep(QUIET_S)
    before, sent, received = Counter(coord.operations), coord.sent_bytes, coord.received_bytes
    cpu_s, seconds = time.process_time(), []
    for number in range(2, rounds + 2):
        began = time.perf_counter()
        checkpointer.save(number, state).wait()
        seconds.append(time.perf_counter() - began)
    time.sleep(QUIET_S)
    later = Counter(coord.operations)
    later.subtract(before)
    return {
        "first": dict(first),
        "first_s": first_s,
        "first_cpu_s": first_cpu_s,
        "later": {kind: count / rounds for kind, count in later.items()},
        "seconds": seconds,
        "cpu_s": (time.process_time() - cpu_s) / rounds,
        "kv_bytes": (coord.sent_bytes - sent + coord.received_bytes - received) / rounds,
    }


def measure(
    framework: str, ranks: Sequence[int], rounds: int, place: Path
) -> dict[int, dict[str, Any]]:
    """Run the job at every size and return its figures."""
    work = {"torch": torch_rank, "jax": jax_rank}[framework]
    found: dict[int, dict[str, Any]] = {}
    for num_ranks in ranks:
        results: list[Any] = run_ranks(
            num_ranks, work, place / f"{framework}-{num_ranks}", rounds, timeout_s=TIMEOUT_S
        )
        coordinator, others = results[0], results[1:]
        total = sum(sum(result["later"].values()) for result in results)
        found[num_ranks] = {
            "operations of a save": total,
            "operations of a save per rank": total / num_ranks,
            "of an ordinary rank": max(sum(result["later"].values()) for result in others),
            "of the coordinator": sum(coordinator["later"].values()),
            "of the first save per rank": sum(sum(r["first"].values()) for r in results)
            / num_ranks,
            "ordinary rank by kind": _mean(result["later"] for result in others),
            "coordinator by kind": coordinator["later"],
            "save_s": statistics.median(s for result in results for s in result["seconds"]),
            "first_save_s": statistics.median(result["first_s"] for result in results),
            "cpu_s of an ordinary rank": statistics.mean(r["cpu_s"] for r in others),
            "cpu_s of the coordinator": coordinator["cpu_s"],
            "kv bytes of a save": sum(result["kv_bytes"] for result in results),
        }
        say(f"{framework}: {num_ranks} ranks done")
    return found


def _mean(counts: Any) -> dict[str, float]:
    counted = list(counts)
    kinds = sorted({kind for count in counted for kind in count})
    return {kind: sum(c.get(kind, 0) for c in counted) / len(counted) for kind in kinds}


def show(framework: str, found: dict[int, dict[str, Any]]) -> None:
    """Print one framework's figures."""
    rows = [
        (
            framework, ranks, f"{f['operations of a save per rank']:.2f}",
            f"{f['of an ordinary rank']:.2f}",
            " ".join(f"{kind} {n:.2f}" for kind, n in f["ordinary rank by kind"].items()),
            f"{f['of the coordinator']:.1f}",
            " ".join(f"{kind} {n:.1f}" for kind, n in sorted(f["coordinator by kind"].items())),
            f"{1e3 * f['cpu_s of an ordinary rank']:.1f}",
            f"{1e3 * f['cpu_s of the coordinator']:.1f}", f"{f['save_s']:.3f}",
            f"{f['kv bytes of a save'] / ranks:.0f}",
        )
        for ranks, f in found.items()
    ]  # fmt: skip
    table(
        (
            "store", "ranks", "operations per rank", "most of an ordinary rank", "by kind",
            "of the coordinator", "by kind", "cpu ms of a rank", "of the coordinator", "save s",
            "kv bytes per rank",
        ),
        rows,
    )  # fmt: skip


def judge(report: Report, framework: str, found: dict[int, dict[str, Any]]) -> None:
    """Add one framework's figures."""
    largest = max(found)
    report.series[framework] = found
    report.add(
        f"{framework}_operations_of_an_ordinary_rank_per_save",
        max(f["of an ordinary rank"] for f in found.values()), at_most=MOST_OPERATIONS,
    )  # fmt: skip
    report.add(
        f"{framework}_operations_per_rank_and_save_at_{largest}",
        found[largest]["operations of a save per rank"], at_most=MOST_OPERATIONS,
    )  # fmt: skip
    report.add(
        f"{framework}_cpu_ms_of_an_ordinary_rank_per_save_at_{largest}",
        1e3 * found[largest]["cpu_s of an ordinary rank"],
    )
    report.add(
        f"{framework}_cpu_ms_of_the_coordinator_per_save_at_{largest}",
        1e3 * found[largest]["cpu_s of the coordinator"],
    )
    if len(found) > 1:
        report.add(
            f"{framework}_operations_of_a_save_exponent_in_ranks",
            exponent({n: f["operations of a save"] for n, f in found.items()}),
            at_most=MOST_EXPONENT,
        )
        report.add(
            f"{framework}_cpu_of_the_coordinator_exponent_in_ranks",
            exponent({n: f["cpu_s of the coordinator"] for n, f in found.items()}),
            at_most=MOST_EXPONENT,
        )


def main() -> int:
    """Run the jobs and judge."""
    parser = arguments("Count what saves of many real processes ask of their key-value store.")
    parser.add_argument("--ranks", type=numbers, default=[8, 16, 32, 64])
    parser.add_argument("--jax-ranks", type=numbers, default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small one, to see that it runs")
    told = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("torch is missing: pip install torch, or make setup")
    if told.quick:
        told.ranks, told.jax_ranks, told.rounds = [2, 3], [], 2
    report = Report("many_ranks")
    with scratch(told.directory) as place:
        for framework, ranks in (("torch", told.ranks), ("jax", told.jax_ranks)):
            if framework == "jax" and ranks and importlib.util.find_spec("jax") is None:
                report.facts["cannot run here"] = {"jax": "not installed: pip install jax"}
                continue
            if ranks:
                found = measure(framework, ranks, told.rounds, place)
                show(framework, found)
                judge(report, framework, found)
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
