"""What every benchmark shares: arguments, facts of the machine, a table, and one JSON line.

A script compares two things in one run, alternating them, and judges ratios: times depend on the
machine and on what else runs there. With `--check` it exits 1 when a figure falls short.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import shardckpt
from shardckpt import native
from shardckpt.staging.engine import SLOT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


GIB: Final = 1 << 30
MIB: Final = 1 << 20
SWEEP_TIMEOUT_S: Final = 60.0


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure falls short")
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="where checkpoints go; a real disk"
    )
    return parser


def facts() -> dict[str, Any]:
    """Return machine and versions, without names or paths."""
    return {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *_told()]),
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "torch": _version("torch"),
        "shardckpt": shardckpt.__version__,
        "native": native.IS_NATIVE,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _told() -> list[str]:
    """Return the arguments that change what is measured, without places."""
    told = list(sys.argv[1:])
    for option in ("--json", "--directory"):
        if option in told:
            at = told.index(option)
            del told[at : at + 2]
    return told


def _first_match(path: str, pattern: str) -> str:
    found = re.search(pattern, Path(path).read_text())
    return found.group(1).strip() if found else "unknown"


class Report:
    """The figures of one benchmark; a figure is judged when it is added.

    Attributes:
        facts: Machine, versions, and what was found out on the way.
        series: What is plotted.
    """

    def __init__(self, benchmark: str) -> None:
        """Start without figures."""
        self._benchmark = benchmark
        self._figures: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = facts()
        self.series: dict[str, Any] = {}

    def add(
        self,
        name: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a figure; without a bound it is only told.

        Args:
            name: What was measured; a unit other than a ratio ends the name.
            value: The figure.
            at_least: It must not be less.
            at_most: It must not be more.
        """
        ok = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        must = f">= {at_least:g}" if at_least is not None else ""
        must += f"<= {at_most:g}" if at_most is not None else ""
        self._figures[name] = {"value": float(f"{value:.4g}"), "must": must or None, "ok": ok}

    def finish(self, told: argparse.Namespace) -> int:
        """Print the table and the JSON line; return the exit status."""
        table(
            ("figure", "value", "must", "ok"),
            [
                (name, f["value"], f["must"] or "", "yes" if f["ok"] else "NO")
                for name, f in self._figures.items()
            ],
        )
        result = {"benchmark": self._benchmark, "facts": self.facts, "figures": self._figures}
        if self.series:
            result["series"] = self.series
        if told.json is not None:
            told.json.parent.mkdir(parents=True, exist_ok=True)
            told.json.write_text(json.dumps(result, indent=1) + "\n")
        say(json.dumps(result))
        return int(told.check and not all(f["ok"] for f in self._figures.values()))


def say(line: str) -> None:
    """Print one line now, so that a run that takes minutes can be followed."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class Memory:
    """Anonymous, page-aligned memory that has been touched."""

    def __init__(self, nbytes: int) -> None:
        """Map and touch it: the first touch is no part of any limit."""
        self.map = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.nbytes = nbytes
        ctypes.memset(self.address, 0x5A, nbytes)


def spread(seconds: Sequence[float]) -> str:
    """Return median and range as text."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def refuse_unless_free(parser: argparse.ArgumentParser, directory: Path, needed_bytes: int) -> None:
    """Leave with exit status 2, before anything is written, where the disk has too little room."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        parser.error(
            f"{needed_bytes} bytes are needed in {directory.resolve()}, {free_bytes} are free: "
            "use --directory on another disk, or a smaller --gib"
        )


def wait_for_retention(store: Path, kept_steps: int) -> None:
    """Return when the steps that fell out of retention are removed, so that nothing is disturbed.

    Raises:
        TimeoutError: They were not.
    """
    deadline = time.monotonic() + SWEEP_TIMEOUT_S
    while len(list(store.glob("step-*"))) > kept_steps:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the steps before the last {kept_steps} were not removed")
        time.sleep(0.02)


def drop_from_cache(directory: Path) -> None:
    """Make the next read of every file below come from the disk.

    Dirty pages cannot be dropped, so each file is flushed first.
    """
    for path in directory.rglob("*"):
        if not path.is_file():
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_into_cache(directory: Path) -> None:
    """Bring every file below a directory into the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(8 * MIB):
                    pass


def resident_bytes() -> int:
    """Return this process's memory in RAM, shared memory included: page cache does not count."""
    kinds = ("RssAnon", "RssShmem")
    kib = [_first_match("/proc/self/status", rf"{kind}:\s*(\d+) kB") for kind in kinds]
    return 1024 * sum(int(value) for value in kib)


def staging_bytes(checkpointer: Any) -> int:
    """Return the host memory that a checkpointer holds for copies."""
    return checkpointer._core._saver._engine.stats()[0] * SLOT_BYTES


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Give a directory that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="shardckpt-bench-", dir=parent.resolve()) as name:
        yield Path(name)
