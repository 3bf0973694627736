"""The limits of this machine: what no checkpointing engine on it can beat.

`python benchmarks/limits.py [--gib 1]`
"""

from __future__ import annotations

import os
import statistics
import sys
from array import array
from typing import TYPE_CHECKING, Final

from harness import GIB, Memory, Report, arguments, drop_from_cache, scratch, timed

from shardckpt import native
from shardckpt.format.shard_file import CHUNK_BYTES

if TYPE_CHECKING:
    from pathlib import Path

EXTENT_BYTES: Final = 8 << 20
ROUNDS: Final = 3


def copy(target: Memory, source: Memory, num_threads: int) -> None:
    rows = array("q")
    for start in range(0, source.nbytes, EXTENT_BYTES):
        rows.extend((target.address + start, source.address + start, 1, 1, EXTENT_BYTES, 1, 1))
    native.copy_rows(rows, num_threads)


def checksum(memory: Memory) -> None:
    native.chunk_crcs(array("q", (memory.address, memory.nbytes, 0)), 1, CHUNK_BYTES)


def write(path: Path, memory: Memory, flags: int) -> None:
    """Write and flush a new file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
    try:
        os.posix_fallocate(fd, 0, memory.nbytes)
        for start in range(0, memory.nbytes, EXTENT_BYTES):
            native.write_full(fd, memory.address + start, EXTENT_BYTES, start)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def read(path: Path, memory: Memory, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        for start in range(0, memory.nbytes, EXTENT_BYTES):
            native.read_full(fd, memory.address + start, EXTENT_BYTES, start)
    finally:
        os.close(fd)


def main() -> int:
    """Measure every limit, alternating them."""
    parser = arguments("Measure memory, checksum and disk.")
    parser.add_argument("--gib", type=float, default=1.0, help="bytes moved by each measurement")
    told = parser.parse_args()
    nbytes = int(told.gib * GIB) // EXTENT_BYTES * EXTENT_BYTES
    source, target = Memory(nbytes), Memory(nbytes)
    speeds: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        speeds.setdefault(name, []).append(nbytes / seconds / 1e9)

    with scratch(told.directory) as place:
        path = place / "file"
        for _ in range(ROUNDS):
            note("copy_1_thread_gb_per_s", timed(lambda: copy(target, source, 1)))
            note("copy_2_threads_gb_per_s", timed(lambda: copy(target, source, 2)))
            note("crc32c_gb_per_s", timed(lambda: checksum(source)))
            for name, flags in (("direct", os.O_DIRECT), ("buffered", 0)):
                path.unlink(missing_ok=True)
                speed = timed(lambda flags=flags: write(path, source, flags))
                note(f"write_{name}_and_flush_gb_per_s", speed)
            drop_from_cache(place)
            note("read_cold_gb_per_s", timed(lambda: read(path, target, 0)))
            note("read_warm_gb_per_s", timed(lambda: read(path, target, 0)))
            drop_from_cache(place)
            note("read_direct_gb_per_s", timed(lambda: read(path, target, os.O_DIRECT)))
    report = Report("limits")
    for name, values in speeds.items():
        report.add(name, statistics.median(values))
    return report.finish(told)


if __name__ == "__main__":
    sys.exit(main())
