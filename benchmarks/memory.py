"""Host memory beyond the state: one staging copy, reused; flat over many saves.

`python benchmarks/memory.py [--mib 64] [--saves 100]`

Shared memory counts, too; page cache does not. The slope is that of the straight line nearest to
all saves after the first few.
"""

from __future__ import annotations

import statistics
import sys

import torch
from harness import MIB, Report, arguments, resident_bytes, scratch, staging_bytes, table

from shardckpt.torch import Checkpointer

WARM_UP_SAVES = 5


def main() -> int:
    """Save many times and watch the anonymous memory of the process."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--mib", type=int, default=64, help="size of the state")
    parser.add_argument("--saves", type=int, default=100)
    told = parser.parse_args()
    report = Report("memory")
    layers = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(told.mib // 12)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer}
    state_bytes = 3 * sum(p.nbytes for p in model.parameters())
    with scratch(told.directory) as place, Checkpointer(place / "store") as checkpointer:
        before = resident_bytes()
        seen: list[int] = []
        for step in range(told.saves):
            checkpointer.save(step, state).wait()
            seen.append(resident_bytes() - before)
        arena_bytes = staging_bytes(checkpointer)
    table(
        ("after save", "MiB beyond the state"),
        [(i + 1, f"{seen[i] / MIB:.1f}") for i in range(0, told.saves, 7)],
    )
    steady = seen[WARM_UP_SAVES:]
    slope = statistics.linear_regression(range(len(steady)), steady).slope
    report.facts["staging_mib"] = round(arena_bytes / MIB, 1)
    report.series["MiB beyond the state"] = [round(nbytes / MIB, 2) for nbytes in seen]
    report.add("memory_beyond_state_per_state_byte", max(seen) / state_bytes, at_most=1.1)
    report.add("memory_beyond_state_and_arena_mib", (max(seen) - arena_bytes) / MIB)
    report.add("growth_after_warm_up_mib", (max(steady) - steady[0]) / MIB, at_most=4)
    report.add("growth_per_100_saves_by_slope_mib", 100 * slope / MIB, at_most=1)
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
