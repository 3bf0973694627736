"""shardckpt for JAX beside Orbax: stall, inflation, durable saves, restores, memory, many arrays.

`python benchmarks/jax_peers.py [--gib 1.5] [--processes 1 2] [--rounds 5] [--quick]`

Eight devices in one process, and four in each of two. The stall of a save is the time in `save()`
and what the next step, which donates the whole state, takes longer until it is done; its inflation
is the time of all steps until the save is durable, and of `save()`, less that of as many steps
without. Orbax runs in several settings; the best of them counts in every figure. A restore is timed
until every array is ready, with the files out of the page cache and in it. Memory is measured in
processes of their own. Every restored state is compared bit for bit with the one that was saved.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import threading
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import fio
from harness import (
    GIB,
    MIB,
    Report,
    arguments,
    drop_from_cache,
    read_into_cache,
    resident_bytes,
    say,
    scratch,
    table,
)

from shardckpt.options import Retention
from shardckpt.testing.ranks import RankContext, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jax_trainee import Mode, Trainee

NUM_DEVICES: Final = 8
OURS: Final = "shardckpt"
NONE: Final = "no saves"
MODES: Final[tuple[Mode, ...]] = ("device", "compute")
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "orbax, default": {},
    "orbax, no compression": {"use_compression": False},
    "orbax, zarr3, no compression": {"use_zarr3": True, "use_compression": False},
    "orbax, no OCDBT, no compression": {"use_ocdbt": False, "use_compression": False},
    "orbax, pinned host": {"use_compression": False, "enable_pinned_host_transfer": True},
}
# Pinned memory and the format of the metadata change nothing in a restore.
RESTORED: Final = (
    OURS, "orbax, default", "orbax, no compression", "orbax, no OCDBT, no compression",
)  # fmt: skip
TURNS_OF_OURS: Final = 2
STEPS_WITHOUT: Final = 4  # As many as a save usually spans.
SETTLE_S: Final = 0.5
TIMEOUT_S: Final = 2400.0
SMALL_ARRAYS: Final = 20_000
SMALL_ROUNDS: Final = 2  # Orbax takes most of a minute for each.
MOST: Final = {"stall": 0.5, "inflation": 0.25, "small": 0.2, "read": 1.05, "memory": 1.0}
LEAST: Final = {"save": 2.0, "fio": 0.9, "restore": 1.5}
QUICK_SMALL_ARRAYS: Final = 200


class System(Protocol):
    """One way to save."""

    def save(self, step: int, state: Any) -> None:
        """Begin a save; the one before is done."""

    def is_durable(self) -> bool:
        """Return whether this process's part of the save is done."""

    def wait(self) -> None:
        """Wait until it is."""

    def restore(self, target: Any) -> Any:
        """Return the last save as the target says."""

    def close(self) -> None:
        """End."""


class Shardckpt:
    """Ours, as it is by default."""

    def __init__(self, place: Path) -> None:
        """Open a store."""
        from shardckpt.jax import Checkpointer

        self.place = place / "shardckpt"
        self._checkpointer = Checkpointer(self.place, retention=Retention(last=2))
        self._handle: Any = None
        self.stats: Any = None

    def save(self, step: int, state: Any) -> None:
        """Begin a save."""
        self._handle = self._checkpointer.save(step, {"state": state})

    def is_durable(self) -> bool:
        """Return whether the step is committed."""
        return self._handle.committed.done()

    def wait(self) -> None:
        """Wait until it is."""
        if self._handle is not None:
            self._handle.wait()

    def restore(self, target: Any) -> Any:
        """Return the last save."""
        from shardckpt.jax import load

        restored = load(self.place, {"state": target})
        self.stats = restored.stats
        return restored.state["state"]

    def close(self) -> None:
        """End."""
        self._checkpointer.close()


class Orbax:
    """An AsyncCheckpointer, in one setting."""

    def __init__(self, place: Path, name: str) -> None:
        """Make it."""
        import orbax.checkpoint as ocp

        self.place = place / name.replace(",", "").replace(" ", "-")
        self.place.mkdir(exist_ok=True)
        self._ocp = ocp
        handler = ocp.PyTreeCheckpointHandler(**SETTINGS[name])
        self._checkpointer = ocp.AsyncCheckpointer(handler)
        self._step = -1
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: Any) -> None:
        """Begin a save."""
        before, self._step = self._step, step
        self._checkpointer.save(self._at(step), args=self._ocp.args.PyTreeSave(state))
        self._before = before
        self._thread = threading.Thread(target=self._checkpointer.wait_until_finished)
        self._thread.start()

    def is_durable(self) -> bool:
        """Return whether the save is done."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is; then the one before may go."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._before >= 0 and _is_first():
            shutil.rmtree(self._at(self._before), ignore_errors=True)

    def restore(self, target: Any) -> Any:
        """Return the last save."""
        restore_args = self._ocp.checkpoint_utils.construct_restore_args(target)
        return self._checkpointer.restore(
            self._at(self._step),
            args=self._ocp.args.PyTreeRestore(target, restore_args=restore_args),
        )

    def close(self) -> None:
        """End."""
        self.wait()
        self._checkpointer.close()

    def _at(self, step: int) -> Path:
        return (self.place / str(step)).resolve()


def open_system(name: str, place: Path) -> System:
    """Return a system by its name."""
    return Shardckpt(place) if name == OURS else Orbax(place, name)


def join(told: RankContext) -> None:
    """Begin JAX with this process's share of the devices; before anything uses a device."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        os.environ.pop(name, None)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES // told.world_size)
    if told.world_size > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{told.port}", told.world_size, told.rank, initialization_timeout=60
        )


def _is_first() -> bool:
    import jax

    return jax.process_index() == 0


def _barrier(name: str) -> None:
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _slowest(value: float) -> float:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return float(np.max(multihost_utils.process_allgather(np.float32(value))))


def _together(call: Callable[[], object]) -> float:
    _barrier("begin")
    began = time.perf_counter()
    call()
    return _slowest(time.perf_counter() - began)


def _check(found: Any, wanted: Any, what: str) -> None:
    """Compare what this process holds of two states.

    Raises:
        AssertionError: A bit differs.
    """
    import jax
    import numpy as np

    whole = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(wanted)[0]:
        whole[path] = {str(s.index): np.asarray(s.data) for s in leaf.addressable_shards}
    for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
        for shard in leaf.addressable_shards:
            other = whole[path].get(str(shard.index))
            if other is not None and not np.array_equal(np.asarray(shard.data), other):
                raise AssertionError(f"{what}: {jax.tree_util.keystr(path)} differs")


class Bench:
    """One process's side of one set of processes."""

    def __init__(self, told: RankContext, place: Path, nbytes: int, *, quick: bool) -> None:
        """Make the state and warm up every system; all processes."""
        join(told)
        from jax_trainee import Trainee, mesh_of

        self.trainee: Trainee = Trainee(nbytes, mesh_of((NUM_DEVICES,)))
        self._place = place
        self._told = told
        names = [OURS, "orbax, default"] if quick else [OURS, *SETTINGS]
        self.systems = {name: open_system(name, place) for name in names}
        self._step = 0
        self.unable: dict[str, str] = {}
        for name in list(self.systems):
            try:
                self._turn(name, "device")
            except Exception as error:  # What cannot run here is told, not left out.
                self.unable[name] = f"{type(error).__name__}: {str(error)[:200]}"
                del self.systems[name]

    def train(self, mode: Mode, rounds: int) -> dict[str, list[dict[str, float]]]:
        """Return every turn of one kind of steps."""
        turns: dict[str, list[dict[str, float]]] = defaultdict(list)
        peers = [name for name in self.systems if name != OURS]
        for round_ in range(rounds):
            order = [OURS] * TURNS_OF_OURS + [NONE] + peers
            for name in order if round_ % 2 else order[::-1]:
                turns[name].append(self._turn(name, mode))
        return dict(turns)

    def _turn(self, name: str, mode: Mode) -> dict[str, float]:
        system = self.systems.get(name)
        self._step += 1
        trainee = self.trainee
        self._settle()
        trainee.step(mode)
        _barrier("turn")
        began = saved = time.perf_counter()
        if system is not None:
            system.save(self._step, trainee.state)
            saved = time.perf_counter()
        steps: list[tuple[float, float]] = []
        # Turns without a save ask, too: what the question takes is not what the save does.
        while not steps or _slowest(float(self._is_busy(system, len(steps)))) > 0:
            steps.append(trainee.step(mode))
        total = time.perf_counter() - began
        if system is not None:
            system.wait()
        first = steps[0]
        return {
            "save": _slowest(saved - began), "step": _slowest(first[1] - first[0]),
            "total": _slowest(total), "steps": float(len(steps)),
        }  # fmt: skip

    @staticmethod
    def _is_busy(system: System | None, num_steps: int) -> bool:
        return num_steps < STEPS_WITHOUT if system is None else not system.is_durable()

    def durable(self, rounds: int, patterns: tuple[fio.Pattern, ...]) -> dict[str, list[float]]:
        """Return the seconds of blocking saves, and fio's for as many bytes."""
        seconds: dict[str, list[float]] = defaultdict(list)
        for round_ in range(rounds):
            names = list(self.systems)
            for name in names if round_ % 2 else names[::-1]:
                seconds[name].append(self._save(name))
            self._settle()
            if self._told.rank == 0 and patterns:
                speed = max(
                    fio.write(self._place / "fio", pattern, self.trainee.nbytes)
                    for pattern in patterns
                )
                fio.remove(self._place / "fio")
                seconds["fio"].append(self.trainee.nbytes / speed)
            _barrier("fio")
        return dict(seconds)

    def _save(self, name: str) -> float:
        system = self.systems[name]
        self._step += 1

        def save() -> None:
            system.save(self._step, self.trainee.state)
            system.wait()

        self._settle()
        return _together(save)

    def _settle(self) -> None:
        """Let end what was written or deleted before, by whomever: it is not to slow the next."""
        time.sleep(SETTLE_S)
        if self._told.rank == 0:
            os.sync()
        _barrier("settled")

    def restores(self, rounds: int) -> dict[str, list[float]]:
        """Return the seconds of restores: system, mesh, and whether files were cached."""
        import jax
        from jax_trainee import abstract, mesh_of

        shapes = {key: leaf.shape for key, leaf in self.trainee.abstract["params"].items()}
        meshes = {"same mesh": (NUM_DEVICES,), "other mesh": (2, NUM_DEVICES // 2)}
        seconds: dict[str, list[float]] = defaultdict(list)
        names = [name for name in self.systems if name in RESTORED]
        for name in names:
            self._save(name)
        for round_ in range(rounds + 1):
            for mesh_name, shape in meshes.items():
                target = abstract(shapes, mesh_of(shape))
                for name in names if round_ % 2 else names[::-1]:
                    for cache, prepare in (("cold", drop_from_cache), ("warm", read_into_cache)):
                        system = self.systems[name]
                        if self._told.rank == 0:
                            prepare(system.place)
                        took: list[Any] = []
                        spent = _together(
                            lambda s=system, t=target, into=took: into.append(
                                jax.block_until_ready(s.restore(t))
                            )
                        )
                        _check(took.pop(), self.trainee.state, f"{name}, {mesh_name}, {cache}")
                        if round_:  # The first compiles and warms up.
                            seconds[f"{name} | {mesh_name} | {cache}"].append(spent)
                ours = self.systems[OURS].stats
                ratio = ours.job_read_bytes / max(1, self.trainee.nbytes)
                seconds[f"read | {mesh_name}"].append(ratio)
        return dict(seconds)

    def close(self) -> None:
        """End every system."""
        for system in self.systems.values():
            system.close()


def measure(
    told: RankContext, place: Path, nbytes: int, rounds: int, patterns: tuple[fio.Pattern, ...],
    quick: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that one set of processes measures together."""
    bench = Bench(told, place, nbytes, quick=quick)
    turns = {}
    for mode in MODES:
        turns[mode] = bench.train(mode, rounds)
        if told.rank == 0:
            say(f"{told.world_size} processes, {mode}-bound: done")
    durable = bench.durable(rounds, patterns)
    if told.rank == 0:
        say(f"{told.world_size} processes, durable saves: done")
    result = {
        "turns": turns, "durable": durable, "restores": bench.restores(rounds),
        "unable": bench.unable, "nbytes": bench.trainee.nbytes,
    }  # fmt: skip
    if told.rank == 0:
        say(f"{told.world_size} processes, restores: done")
    bench.close()
    return result


def peak(told: RankContext, place: Path, nbytes: int, name: str) -> float:
    """Return the most memory beyond the state while saves drain, per byte of this rank's state."""
    join(told)
    from jax_trainee import Trainee, mesh_of

    trainee = Trainee(nbytes, mesh_of((NUM_DEVICES,)))
    system = open_system(name, place)
    trainee.step("device")
    before, highest, stop = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(3):
        system.save(step, trainee.state)
        trainee.step("device")
        trainee.step("device")
        system.wait()
    stop.set()
    watcher.join()
    system.close()
    return (highest - before) / (trainee.nbytes / told.world_size)


def small(told: RankContext, place: Path, num_arrays: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of durable saves and loads of many small arrays."""
    join(told)
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from jax_trainee import mesh_of

    sharding = NamedSharding(mesh_of((NUM_DEVICES,)), PartitionSpec("data"))
    like = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=sharding)
    key = jax.random.key(0)
    make = jax.jit(partial(jax.random.normal, shape=(32, 32)), out_shardings=sharding)
    state = {f"{i}": make(jax.random.fold_in(key, i % 50)) for i in range(num_arrays)}
    target = dict.fromkeys(state, like)
    seconds: dict[str, list[float]] = defaultdict(list)
    for name in (OURS, "orbax, default"):
        system = open_system(name, place)
        for round_ in range(rounds):

            def save(s: System = system, step: int = round_) -> None:
                s.save(step, state)
                s.wait()

            seconds[f"{name} | save"].append(_together(save))
            took: list[Any] = []
            seconds[f"{name} | load"].append(
                _together(
                    lambda s=system, into=took: into.append(
                        jax.block_until_ready(s.restore(target))
                    )
                )
            )
            _check(took.pop(), state, f"{name}, small arrays")
        system.close()
    return dict(seconds)


def judge_turns(report: Report, label: str, mode: Mode, turns: dict[str, Any]) -> None:
    """Print all systems in one mode and add the figures."""
    step_s = statistics.median(turn["step"] for turn in turns[NONE])
    total_s = statistics.median(turn["total"] / turn["steps"] for turn in turns[NONE])
    stalls, inflations, rows = {}, {}, []
    for name, of in turns.items():
        if name == NONE:
            continue
        all_stalls = [turn["save"] + turn["step"] - step_s for turn in of]
        stalls[name] = statistics.median(all_stalls)
        inflations[name] = statistics.median(t["total"] - t["steps"] * total_s for t in of)
        rows.append((
            name, len(of), f"{1e3 * stalls[name]:.1f}",
            f"{1e3 * statistics.median(t['save'] for t in of):.1f}",
            f"{1e3 * (statistics.median(t['step'] for t in of) - step_s):.1f}",
            f"{inflations[name]:.3f}",
            f"{statistics.median(t['total'] for t in of):.2f}",
        ))  # fmt: skip
        report.series[f"{label} {mode} {name}"] = {
            "stall_ms": [round(1e3 * s, 2) for s in all_stalls],
            "inflation_s": round(inflations[name], 4),
        }
    header = (
        f"{label}, {mode}-bound", "saves", "stall ms", "save() ms", "next step ms", "inflation s",
        "until durable s",
    )  # fmt: skip
    table(header, rows)
    ours_s, ours_inflation_s = stalls.pop(OURS), inflations.pop(OURS)
    name = f"{label}_{mode}_bound"
    report.add(f"{name}_stall_ms", 1e3 * ours_s)
    report.add(
        f"{name}_stall_per_stall_of_best_orbax", ours_s / min(stalls.values()),
        at_most=MOST["stall"],
    )  # fmt: skip
    report.add(
        f"{name}_inflation_per_inflation_of_best_orbax",
        ours_inflation_s / max(1e-3, min(inflations.values())), at_most=MOST["inflation"],
    )  # fmt: skip


def judge_rest(report: Report, label: str, result: dict[str, Any]) -> None:
    """Add the figures of durable saves and restores."""
    medians = {name: statistics.median(values) for name, values in result["durable"].items()}
    fio_s = medians.pop("fio", None)
    table((f"{label}, durable save", "s"), [(n, f"{s:.2f}") for n, s in medians.items()])
    ours_s = medians.pop(OURS)
    report.add(
        f"{label}_save_speed_per_best_orbax", min(medians.values()) / ours_s,
        at_least=LEAST["save"],
    )  # fmt: skip
    if fio_s is None:
        report.facts["missing"] = "fio: apt-get install fio"
    else:
        report.add(f"{label}_save_speed_per_fio", fio_s / ours_s, at_least=LEAST["fio"])
    restores = {name: statistics.median(v) for name, v in result["restores"].items()}
    table((f"{label}, restore", "s"), [(n, f"{s:.3f}") for n, s in restores.items()])
    for mesh in ("same mesh", "other mesh"):
        for cache in ("cold", "warm"):
            times = {
                n.split(" | ")[0]: s for n, s in restores.items() if n.endswith(f"{mesh} | {cache}")
            }
            own_s = times.pop(OURS)
            report.add(
                f"{label}_restore_{mesh.replace(' ', '_')}_{cache}_speed_per_best_orbax",
                min(times.values()) / own_s, at_least=LEAST["restore"],
            )  # fmt: skip
        report.add(
            f"{label}_restore_{mesh.replace(' ', '_')}_bytes_read_per_byte",
            restores[f"read | {mesh}"], at_most=MOST["read"],
        )  # fmt: skip


def main() -> int:
    """Measure and report."""
    parser = arguments("JAX: saves and restores beside Orbax.")
    parser.add_argument("--gib", type=float, default=1.5, help="bytes of the whole state")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small state and one peer")
    told = parser.parse_args()
    nbytes = int((0.02 if told.quick else told.gib) * GIB)
    report = Report("jax_peers")
    from importlib.metadata import version

    report.facts |= {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}
    patterns = tuple(
        p for p in fio.PATTERNS if p.name in ("psync depth 1 x 2", "libaio depth 4 x 1")
    )
    patterns = patterns if fio.is_installed() and not told.quick else ()
    for num in told.processes:
        label = f"{num}x{NUM_DEVICES // num}"
        with scratch(told.directory) as place:
            results = run_ranks(
                num, measure, place, nbytes,
                1 if told.quick else told.rounds, patterns, told.quick, timeout_s=TIMEOUT_S,
                directory=place / "ranks",
            )  # fmt: skip
        result: Any = results[0]
        report.facts[f"{label} state MiB"] = result["nbytes"] // MIB
        if result["unable"]:
            report.facts["cannot run here"] = result["unable"]
        for mode in MODES:
            judge_turns(report, label, mode, result["turns"][mode])
        judge_rest(report, label, result)
        peaks = {}
        for name in (OURS, "orbax, default"):
            with scratch(told.directory) as place:
                found: list[Any] = run_ranks(
                    num, peak, place, nbytes, name, timeout_s=TIMEOUT_S, directory=place / "ranks"
                )
            peaks[name] = max(found)
        table((f"{label}, peak memory beyond the state", "x state"),
              [(name, f"{value:.2f}") for name, value in peaks.items()])  # fmt: skip
        report.add(f"{label}_peak_memory_beyond_state", peaks[OURS], at_most=MOST["memory"])
        report.add(f"{label}_peak_memory_beyond_state_orbax", peaks["orbax, default"])
        with scratch(told.directory) as place:
            many: Any = run_ranks(
                num, small, place,
                QUICK_SMALL_ARRAYS if told.quick else SMALL_ARRAYS,
                1 if told.quick else SMALL_ROUNDS,
                timeout_s=TIMEOUT_S, directory=place / "ranks",
            )[0]  # fmt: skip
        times = {name: statistics.median(values) for name, values in many.items()}
        table((f"{label}, small arrays", "s"), [(n, f"{s:.2f}") for n, s in times.items()])
        for what in ("save", "load"):
            peers = [s for n, s in times.items() if n.endswith(what) and not n.startswith(OURS)]
            report.add(
                f"{label}_small_arrays_{what}_time_per_best_orbax",
                times[f"{OURS} | {what}"] / min(peers), at_most=MOST["small"],
            )  # fmt: skip
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
