"""fio as the measure of a disk: sequential, past the page cache, timed until durable."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness import MIB

if TYPE_CHECKING:
    from pathlib import Path

BLOCK_BYTES: Final = 8 * MIB


@dataclass(frozen=True, slots=True)
class Pattern:
    """How fio is told to do it.

    Attributes:
        engine: fio's ioengine.
        depth: Requests in flight per job.
        jobs: Processes, each with a file of its own.
    """

    engine: str
    depth: int
    jobs: int

    @property
    def name(self) -> str:
        """Return what tables call it."""
        return f"{self.engine} depth {self.depth} x {self.jobs}"


PATTERNS: Final = tuple(
    Pattern(engine, depth, jobs)
    for engine, depth in (("psync", 1), ("libaio", 1), ("libaio", 2), ("libaio", 4))
    for jobs in (1, 2)
)


def is_installed() -> bool:
    """Return whether there is fio."""
    return shutil.which("fio") is not None


def write(place: Path, pattern: Pattern, nbytes: int) -> float:
    """Return the bytes per second of writing new files until they are durable."""
    remove(place)
    return _run(place, pattern, nbytes, "write", "--end_fsync=1")


def read(place: Path, pattern: Pattern, nbytes: int) -> float:
    """Return the bytes per second of reading what `write` with as many jobs wrote."""
    return _run(place, pattern, nbytes, "read")


def remove(place: Path) -> None:
    """Delete the files."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()


def _run(place: Path, pattern: Pattern, nbytes: int, what: str, *more: str) -> float:
    size = nbytes // pattern.jobs // BLOCK_BYTES * BLOCK_BYTES
    command = [
        "fio", "--name=limit", f"--directory={place}", f"--rw={what}", f"--bs={BLOCK_BYTES}",
        "--direct=1", f"--ioengine={pattern.engine}", f"--iodepth={pattern.depth}",
        f"--numjobs={pattern.jobs}", f"--size={size}", "--output-format=json", *more,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    jobs = json.loads(done.stdout)["jobs"]
    # The run time of a job includes its last fsync; fio's own start and layout are not counted.
    return size * pattern.jobs / (max(job["job_runtime"] for job in jobs) / 1e3)
