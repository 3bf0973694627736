"""The side of torch: the FSDP2 example trains, and shardckpt, DCP and `torch.save` save it.

Model, optimizer, data and step are those of examples/torch_fsdp, only larger. Runs in the ranks.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from blocking import DcpSave, TorchSave
from harness import drop_from_cache
from overhead_runs import Course, Plan, open_systems
from systems import OURS, PEERS, Dcp, Shardckpt
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch_job import join_gloo, locals_of, together

from shardckpt.torch import RngState

if TYPE_CHECKING:
    from collections.abc import Callable

    from overhead_runs import Saves

    from shardckpt.testing.ranks import RankContext

EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "torch_fsdp"
BLOCK: Final = f"{OURS}, overlap=False"
THREAD: Final = "dcp.async_save, thread"
PROCESS: Final = "dcp.async_save, process"
DCP_SAVE: Final = "dcp.save"
TORCH_SAVE: Final = "torch.save, file per rank"
ASYNC_PEERS: Final = (THREAD, PROCESS)
# The settings of each that stall least (benchmarks/stall.py).
DCP_WAYS: Final = {
    THREAD: "dcp thread, cached, staged in background, plan cached",
    PROCESS: "dcp process, cached in shared memory, staged in background, plan cached",
}
HEAD_WIDTH: Final = 64
DEPTH: Final = 12
CONTEXT: Final = 32
BYTES_PER_PARAMETER: Final = 12
RESTORES: Final = 2


def shape_for(state_bytes: int) -> tuple[int, int]:
    """Return layers and width of the example's model whose state is nearest to so many bytes."""
    width = (state_bytes / BYTES_PER_PARAMETER / DEPTH / 12) ** 0.5
    width = max(1, round(width / HEAD_WIDTH)) * HEAD_WIDTH
    return max(1, round(state_bytes / BYTES_PER_PARAMETER / 12 / width**2)), width


class Example:
    """The job of the FSDP2 example on one rank."""

    def __init__(self, state_bytes: int, world_size: int) -> None:
        """Build it and take a step, so that there are moments; all ranks."""
        sys.path.append(str(EXAMPLE))
        import train

        layers, width = shape_for(state_bytes)
        sizes = {
            "steps": 1_000_000, "layers": layers, "width": width, "heads": width // HEAD_WIDTH,
            "context": CONTEXT, "global-batch": world_size,
        }  # fmt: skip
        told = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        self._step = train.train_step
        self._job = train.build(train.parse_options(told), torch.device("cpu"))
        self.before_update: Callable[[], None] = lambda: None
        self._began_s = self._fence_s = 0.0
        # This hook is the first of all, those of the optimizer itself come last.
        register_optimizer_step_pre_hook(self._update_begins)
        self._job.optimizer.register_step_pre_hook(self._update_goes_on)
        self.step()
        model, optimizer = self._job.model, self._job.optimizer
        self.state = {
            "model": model, "optimizer": optimizer, "scheduler": self._job.scheduler,
            "rng": RngState(), "progress": self._job.progress,
        }  # fmt: skip
        of_model, of_optimizer = get_state_dict(model, optimizer)
        self.state_dict = {"model": of_model, "optimizer": of_optimizer}
        self.locals = locals_of(self.state_dict)
        self.rank_bytes = sum(value.nbytes for value in self.locals)

    def step(self) -> float:
        """Train on a batch as the example does; return what the update waited."""
        self._step(self._job)
        return self._fence_s

    def gather(self) -> None:
        """Return when all ranks are here."""
        distributed.barrier()

    def _update_begins(self, *_: object) -> None:
        self._began_s = time.perf_counter()

    def _update_goes_on(self, *_: object) -> None:
        self.before_update()
        self._fence_s = time.perf_counter() - self._began_s


def makers(example: Example, place: Path, names: tuple[str, ...]) -> dict[str, Callable[[], Saves]]:
    """Return what opens each system."""

    def of_dcp(name: str) -> Dcp:
        make_stager, kind = PEERS[DCP_WAYS[name]]
        return Dcp(example, place, DCP_WAYS[name], make_stager(), kind)

    every: dict[str, Callable[[], Saves]] = {
        OURS: lambda: Shardckpt(example, place),
        BLOCK: lambda: Shardckpt(example, place, overlap=False),
        DCP_SAVE: lambda: DcpSave(example, place),
        THREAD: lambda: of_dcp(THREAD),
        PROCESS: lambda: of_dcp(PROCESS),
        TORCH_SAVE: lambda: TorchSave(example, place),
    }
    return {name: make for name, make in every.items() if name in names}


NAMES: Final = (OURS, BLOCK, DCP_SAVE, THREAD, PROCESS, TORCH_SAVE)


def restore(told: RankContext, example: Example, place: Path, name: str, system: Saves) -> float:
    """Save, forget, load from the disk, compare; return the seconds of the load; all ranks.

    Raises:
        AssertionError: A bit differs.
    """
    system.make_room()
    system.save(1_000_000)
    system.before_update()
    system.wait()
    wanted = [value.clone() for value in example.locals]
    for value in example.locals:
        value.fill_(-1)
    if told.rank == 0:
        system.tidy()
        drop_from_cache(place)
    seconds = together(system.load)
    for i, (value, copy) in enumerate(zip(example.locals, wanted, strict=True)):
        if not torch.equal(value.view(torch.uint8), copy.view(torch.uint8)):
            raise AssertionError(f"{name}: local tensor {i} differs from what was saved")
    return seconds


def measure(
    told: RankContext, place: Path, state_bytes: int, plan: Plan, names: tuple[str, ...]
) -> dict[str, Any]:
    """Return every run and restore; all ranks."""
    torch.manual_seed(told.rank)
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # For DCP's process.
    join_gloo(told)
    example = Example(state_bytes, told.world_size)
    able, unable = open_systems(makers(example, place, names), example)
    course = Course(example, able, told.rank)
    course.run(plan, "torch")
    restores_s: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(RESTORES):
        for name, system in able.items():
            restores_s[name].append(restore(told, example, place, name, system))
    for system in able.values():
        system.close()
    distributed.destroy_process_group()
    return {
        "runs": course.runs, "restores_s": restores_s, "unable": unable,
        "rank_bytes": example.rank_bytes,
    }  # fmt: skip
