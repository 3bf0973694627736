"""Durable save and load of a large FSDP2 state beside fio, safetensors and plain reads.

`python benchmarks/durable.py [--gib 4] [--ranks 2 1] [--rounds 5]`

A save counts until its step is committed. fio writes and reads as many bytes on the same file
system in every round, with the patterns that a first look at all of them found fastest; the best of
a round counts. A warm load is judged by a plain read of the same files by several threads into
the memory of the state itself, touched before. Every load is compared bit for bit on every rank.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
from collections import defaultdict
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

import fio
import torch
from harness import GIB, MIB, Report, arguments, drop_from_cache, say, scratch, spread
from save_load import KEPT_STEPS, Trainee, settle
from torch import distributed
from torch_job import join_gloo, together

from shardckpt.options import Retention
from shardckpt.testing.ranks import RankContext, run_ranks
from shardckpt.torch import Checkpointer, load

try:
    from safetensors.torch import save_file
except ImportError:
    save_file = None

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

KEPT_PATTERNS: Final = 2
READ_BYTES: Final = 8 * MIB
LEAST_OF_FIO: Final = 0.9
LEAST_OF_WARM_READ: Final = 0.8
TIMEOUT_S: Final = 1200.0


def fastest(place: Path, nbytes: int) -> tuple[fio.Pattern, ...]:
    """Return the patterns that write or read fastest, after trying all."""
    written: dict[fio.Pattern, float] = {}
    read: dict[fio.Pattern, float] = {}
    for pattern in fio.PATTERNS:
        written[pattern] = fio.write(place, pattern, nbytes)
        read[pattern] = fio.read(place, pattern, nbytes)
        say(f"fio {pattern.name}: {written[pattern] / 1e9:.2f}, {read[pattern] / 1e9:.2f} GB/s")
    fio.remove(place)
    best = [
        pattern
        for speeds in (written, read)
        for pattern in sorted(speeds, key=speeds.__getitem__)[-KEPT_PATTERNS:]
    ]
    return tuple(dict.fromkeys(best))


class Bench:
    """One rank's side."""

    def __init__(
        self, told: RankContext, place: Path, nbytes: int, patterns: tuple[fio.Pattern, ...]
    ) -> None:
        """Build the state and warm up; all ranks."""
        torch.manual_seed(told.rank)
        torch.set_num_threads(1)
        join_gloo(told)
        self._told, self._place, self._patterns = told, place, patterns
        self.trainee = Trainee(nbytes, told.world_size)
        self._nbytes = self.trainee.rank_bytes * told.world_size
        self._store = place / "store"
        self._checkpointer = Checkpointer(self._store, retention=Retention(last=KEPT_STEPS))
        # Not a small buffer, which would stay in the processor's cache.
        self._targets = [
            memoryview(value.view(torch.uint8).numpy())[start : start + READ_BYTES]
            for value in self.trainee.locals
            for start in range(0, value.nbytes - READ_BYTES + 1, READ_BYTES)
        ]
        self.speeds: dict[str, list[float]] = defaultdict(list)

    def round(self, number: int) -> None:
        """Measure everything once, the order swapped from round to round; all ranks."""
        saves = [lambda: self._save(number), self._save_tensors, self._fio]
        for save in saves if number % 2 else saves[::-1]:
            save()
        settle(self._store, self._told)
        for load_ in (self._load_cold, self._load_warm):
            load_()
        if self._told.rank == 0:
            say(", ".join(f"{name} {v[-1] / 1e9:.2f}" for name, v in self.speeds.items()))

    def close(self) -> None:
        """End; all ranks."""
        self._checkpointer.close()
        distributed.destroy_process_group()

    def _note(self, name: str, seconds: float) -> None:
        self.speeds[name].append(self._nbytes / seconds)

    def _save(self, step: int) -> None:
        state = self.trainee.state
        self._note("save", together(lambda: self._checkpointer.save(step, state).wait()))
        settle(self._store, self._told)

    def _save_tensors(self) -> None:
        if save_file is None:
            return
        path = self._place / f"rank-{self._told.rank}.safetensors"
        tensors = {str(i): value for i, value in enumerate(self.trainee.locals)}

        def save() -> None:
            save_file(tensors, path)
            for name in (path, path.parent):
                fd = os.open(name, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)

        self._note("safetensors save", together(save))
        path.unlink()
        distributed.barrier()

    def _fio(self) -> None:
        if self._told.rank == 0 and self._patterns:
            place = self._place / "fio"
            written, read = [], []
            for pattern in self._patterns:
                written.append(fio.write(place, pattern, self._nbytes))
                read.append(fio.read(place, pattern, self._nbytes))
            fio.remove(place)
            os.sync()
            self.speeds["fio write"].append(max(written))
            self.speeds["fio read"].append(max(read))
        distributed.barrier()

    def _load_cold(self) -> None:
        if self._told.rank == 0:
            drop_from_cache(self._store)
        self._load("load cold")

    def _load_warm(self) -> None:
        # Fills the page cache, whatever the loads do.
        together(lambda: self._read_files(1))
        for num_threads in (1, 2):
            self._note(
                f"plain warm read, {num_threads} per rank",
                together(lambda n=num_threads: self._read_files(n)),
            )
        self._load("load warm")

    def _load(self, name: str) -> None:
        self.trainee.forget()
        self._note(name, together(lambda: load(self._store, self.trainee.state)))
        self.trainee.check(name)

    def _read_files(self, num_threads: int) -> None:
        """Read this rank's part of the newest step's files into the state's memory."""
        newest = max(self._store.glob("step-*"))
        parts = [
            (path, start)
            for path in sorted(newest.rglob("*")) if path.is_file()
            for start in range(0, path.stat().st_size, READ_BYTES)
        ]  # fmt: skip
        mine = list(zip(parts[self._told.rank :: self._told.world_size], cycle(self._targets)))
        threads = [
            threading.Thread(target=_read_parts, args=(mine[i::num_threads],))
            for i in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _read_parts(parts: Iterable[tuple[tuple[Path, int], memoryview]]) -> None:
    fds: dict[Path, int] = {}
    for (path, start), target in parts:
        if path not in fds:
            fds[path] = os.open(path, os.O_RDONLY)
        os.preadv(fds[path], [target], start)
    for fd in fds.values():
        os.close(fd)


def measure(
    told: RankContext, place: Path, nbytes: int, rounds: int, patterns: tuple[fio.Pattern, ...]
) -> dict[str, Any]:
    """Return the bytes per second of everything, without the first round; all ranks."""
    bench = Bench(told, place, nbytes, patterns)
    for number in range(rounds + 1):
        bench.round(number)
    bench.close()
    return {
        "speeds": {name: values[1:] for name, values in bench.speeds.items()},
        "rank_bytes": bench.trainee.rank_bytes,
    }


def judge(report: Report, ranks: int, speeds: dict[str, list[float]]) -> None:
    """Print and add the figures of one number of ranks."""
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in sorted(speeds.items()):
        say(f"{ranks} ranks, {name:28} {spread([v / 1e9 for v in values])} GB/s")
    report.series[f"{ranks} ranks, GB/s"] = {
        name: [round(v / 1e9, 3) for v in values] for name, values in speeds.items()
    }
    tail = f"{ranks}_ranks"
    for ours, theirs in (("save", "fio write"), ("load cold", "fio read")):
        report.add(f"{ours.replace(' ', '_')}_gb_per_s_{tail}", median[ours] / 1e9)
        if theirs in median:
            report.add(
                f"{ours.replace(' ', '_')}_per_{theirs.replace(' ', '_')}_{tail}",
                median[ours] / median[theirs], at_least=LEAST_OF_FIO,
            )  # fmt: skip
    if "safetensors save" in median:
        report.add(
            f"save_times_faster_than_safetensors_{tail}",
            median["save"] / median["safetensors save"], at_least=1.0,
        )  # fmt: skip
    plain = max(median[name] for name in median if name.startswith("plain"))
    report.add(f"load_warm_gb_per_s_{tail}", median["load warm"] / 1e9)
    report.add(
        f"load_warm_per_plain_read_{tail}", median["load warm"] / plain,
        at_least=LEAST_OF_WARM_READ,
    )  # fmt: skip


def main() -> int:
    """Run every number of ranks and judge."""
    parser = arguments("Save and load durably beside fio, safetensors and plain reads.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--gib", type=float, default=4.0, help="bytes of the whole state")
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    nbytes = int(told.gib * GIB)
    report = Report("durable")
    with scratch(told.directory) as place:
        patterns: tuple[fio.Pattern, ...] = ()
        if fio.is_installed():
            patterns = fastest(place / "fio", nbytes)
            report.facts["fio"] = [pattern.name for pattern in patterns]
        else:
            report.facts["fio"] = "not installed: apt-get install fio"
        if save_file is None:
            report.facts["safetensors"] = "not installed: pip install safetensors"
        for ranks in told.ranks:
            results: list[Any] = run_ranks(
                ranks, measure, place / str(ranks), nbytes, told.rounds, patterns,
                timeout_s=TIMEOUT_S, directory=place / str(ranks) / "ranks",
            )  # fmt: skip
            report.facts["state_mib"] = round(sum(r["rank_bytes"] for r in results) / MIB)
            judge(report, ranks, results[0]["speeds"])
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
