"""The side of JAX: the pjit example trains on 8 devices, and shardckpt and Orbax save it.

Model, optimizer, data and step are those of examples/jax_pjit, only larger. Runs in the process.
Orbax saves without compression, which is its fastest setting here, and as it flushes by itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from files import keep_only
from harness import drop_from_cache, wait_for_retention
from overhead_runs import Course, Plan, open_systems

from shardckpt.options import Retention

if TYPE_CHECKING:
    from collections.abc import Callable

    from overhead_runs import Saves

    from shardckpt.testing.ranks import RankContext

EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "jax_pjit"
NUM_DEVICES: Final = 8
OURS: Final = "shardckpt"
ORBAX_SYNC: Final = "orbax, Checkpointer"
ORBAX_ASYNC: Final = "orbax, AsyncCheckpointer"
NAMES: Final = (OURS, ORBAX_SYNC, ORBAX_ASYNC)
ASYNC_PEERS: Final = (ORBAX_ASYNC,)
HEAD_WIDTH: Final = 64
DEPTH: Final = 12
CONTEXT: Final = 16
BYTES_PER_PARAMETER: Final = 12
RESTORES: Final = 2
KEPT_STEPS: Final = 2  # Retention never leaves fewer than two good steps.


class Example:
    """The job of the pjit example in one process."""

    def __init__(self, state_bytes: int) -> None:
        """Compile it and take a step."""
        # A proxy is not asked about this machine.
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ.pop(name, None)
        sys.path.insert(0, str(EXAMPLE))
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
        import train

        width = (state_bytes / BYTES_PER_PARAMETER / DEPTH / 12) ** 0.5
        width = max(1, round(width / HEAD_WIDTH)) * HEAD_WIDTH
        layers = max(1, round(state_bytes / BYTES_PER_PARAMETER / 12 / width**2))
        sizes = {
            "steps": 1_000_000, "layers": layers, "width": width, "heads": width // HEAD_WIDTH,
            "context": CONTEXT, "global-batch": NUM_DEVICES, "devices": NUM_DEVICES,
        }  # fmt: skip
        told = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        self._jax, self._train = jax, train
        self._job = train.build(train.parse_options(told))
        self._data = train.batches_of(self._job)
        self.blank = {name: self._job.blank[name] for name in ("params", "opt_state")}
        params, opt_state = self._job.fresh()
        self.state = {"params": params, "opt_state": opt_state}
        self.nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.before_update: Callable[[], None] = lambda: None
        self.step()

    def step(self) -> float:
        """Train on a batch as the example does, and wait for all of it; nothing is fenced."""
        batch = self._train.spread(self._job, next(self._data))
        params, opt_state, loss = self._job.step(
            self.state["params"], self.state["opt_state"], *batch
        )
        self.state = {"params": params, "opt_state": opt_state}
        self._jax.block_until_ready((self.state, loss))
        return 0.0

    def gather(self) -> None:
        """Do nothing: there is one process."""


class Saved(Protocol):
    """What is saved.

    Attributes:
        state: The arrays.
        blank: Their shapes and shardings.
    """

    state: dict[str, Any]
    blank: dict[str, Any]


class Shardckpt:
    """Ours, as it is by default: copies are made before `save` returns."""

    in_flight: Final = 2

    def __init__(self, saved: Saved, place: Path) -> None:
        """Open a store."""
        from shardckpt.jax import Checkpointer

        self._saved, self.place = saved, place / OURS
        self._checkpointer = Checkpointer(self.place, retention=Retention(last=KEPT_STEPS))
        self._handle: Any = None
        self._before: Any = None

    def step_began(self, step: int) -> None:
        """Tell the checkpointer, as a training loop does."""
        self._checkpointer.should_save(step)

    def make_room(self) -> None:
        """Return when the save before the last is committed: two may be in flight."""
        if self._before is not None:
            self._before.wait()

    def save(self, step: int) -> None:
        """Begin a save."""
        self._before = self._handle
        self._handle = self._checkpointer.save(step, dict(self._saved.state))

    def before_update(self) -> None:
        """Do nothing."""

    def is_durable(self) -> bool:
        """Return whether the step is committed."""
        return self._handle is None or self._handle.committed.done()

    def wait(self) -> None:
        """Return when the last save is committed."""
        if self._handle is not None:
            self._handle.wait()

    def tidy(self) -> None:
        """Return when retention has deleted what is not needed."""
        wait_for_retention(self.place, KEPT_STEPS)

    def load(self) -> Any:
        """Return the newest step."""
        from shardckpt.jax import load

        return load(self.place, dict(self._saved.blank)).state

    def close(self) -> None:
        """Wait for the last save."""
        self._checkpointer.close()


class Orbax:
    """Orbax, blocking or in the background."""

    in_flight: Final = 1

    def __init__(
        self, saved: Saved, place: Path, *, background: bool, compress: bool = False
    ) -> None:
        """Make its checkpointer."""
        import orbax.checkpoint as ocp

        self._saved, self._ocp = saved, ocp
        way = "async" if background else "sync"
        self.place = (place / f"orbax-{way}{'-compressed' * compress}").resolve()
        self.place.mkdir()
        handler = ocp.PyTreeCheckpointHandler(use_compression=compress)
        self._background = background
        make = ocp.AsyncCheckpointer if background else ocp.Checkpointer
        self._checkpointer: Any = make(handler)
        self._step = 0

    @property
    def newest(self) -> Path:
        """Return where the last save lies."""
        return self.place / str(self._step)

    def step_began(self, step: int) -> None:
        """Do nothing."""

    def make_room(self) -> None:
        """Return when the save before is done."""
        self.wait()

    def save(self, step: int) -> None:
        """Begin a save, or make it."""
        self._step = step
        args = self._ocp.args.PyTreeSave(self._saved.state)
        self._checkpointer.save(self.place / str(step), args=args, force=True)

    def before_update(self) -> None:
        """Do nothing."""

    def is_durable(self) -> bool:
        """Return whether the checkpoint has its final name."""
        return not self._background or self.newest.exists()

    def wait(self) -> None:
        """Return when the last save is done."""
        if self._background:
            self._checkpointer.wait_until_finished()

    def tidy(self) -> None:
        """Delete all checkpoints but the last."""
        keep_only(self.newest)

    def load(self) -> Any:
        """Return the last save."""
        target = self._saved.blank
        restore_args = self._ocp.checkpoint_utils.construct_restore_args(target)
        return self._checkpointer.restore(
            self.newest,
            args=self._ocp.args.PyTreeRestore(target, restore_args=restore_args),
        )

    def close(self) -> None:
        """End."""
        self.wait()
        self._checkpointer.close()


def restore(example: Example, name: str, system: Any, step: int) -> float:
    """Save, load from the disk, compare; return the seconds of the load.

    Raises:
        AssertionError: A bit differs.
    """
    import jax
    import numpy as np

    system.make_room()
    system.save(step)
    system.wait()
    system.tidy()
    drop_from_cache(system.place)
    began = time.perf_counter()
    found = jax.block_until_ready(system.load())
    seconds = time.perf_counter() - began
    wanted, got = jax.tree.leaves(example.state), jax.tree.leaves(found)
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if not np.array_equal(np.asarray(a), np.asarray(b)):
            raise AssertionError(f"{name}: array {i} differs from what was saved")
    return seconds


def measure(
    told: RankContext, place: Path, state_bytes: int, plan: Plan, names: tuple[str, ...]
) -> dict[str, Any]:
    """Return every run and restore."""
    example = Example(state_bytes)
    every: dict[str, Callable[[], Saves]] = {
        OURS: lambda: Shardckpt(example, place),
        ORBAX_SYNC: lambda: Orbax(example, place, background=False),
        ORBAX_ASYNC: lambda: Orbax(example, place, background=True),
    }
    makers = {name: make for name, make in every.items() if name in names}
    able, unable = open_systems(makers, example)
    course = Course(example, able, told.rank)
    course.run(plan, "jax")
    restores_s: dict[str, list[float]] = {name: [] for name in able}
    for round_ in range(RESTORES):
        for name, system in able.items():
            restores_s[name].append(restore(example, name, system, 1_000_000 + round_))
    for system in able.values():
        system.close()
    return {
        "runs": course.runs, "restores_s": restores_s, "unable": unable,
        "rank_bytes": example.nbytes,
    }  # fmt: skip
