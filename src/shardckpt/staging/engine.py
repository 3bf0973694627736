"""One rank's staging engine: how much memory and how many threads it gets, and its failures.

Layer: staging. The engine itself is native (csrc/core/engine.h); this module decides and explains.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Final

from shardckpt import native
from shardckpt.errors import StagingMemoryError

if TYPE_CHECKING:
    from shardckpt.native import Engine
    from shardckpt.options import Staging

SLOT_BYTES: Final = 8 << 20
EVERY_GROUP: Final = -1
_MAX_COPY_THREADS: Final = 4
_NUM_FLUSH_THREADS: Final = 2
_SHARE_OF_MEMORY: Final = 0.4
# The disk has usually written this part of a large save before the last array is copied; memory for
# it is taken where it has not. So a save takes no more of it than the state has.
_PART_WRITTEN: Final = 0.025
# Of torchrun, Open MPI, and Slurm ("8(x3),4": three hosts have 8 tasks, one has 4).
_TOLD_BY_LAUNCHER: Final = (
    "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE",
)  # fmt: skip
_TASKS: Final = re.compile(r"(?:^|,)(\d+)")
_logger = logging.getLogger("shardckpt")


def start_engine(options: Staging) -> Engine:
    """Start the engine, with all of its memory where the user said how much.

    Raises:
        StagingMemoryError: More than this process may use, or the system has not that much.
        OSError: The system gives no threads.
    """
    cores = len(options.cpus) or len(os.sched_getaffinity(0))
    num_threads = max(1, min(_MAX_COPY_THREADS, cores // _ranks_on_host()))
    engine = native.staging_engine(num_threads, _NUM_FLUSH_THREADS, list(options.cpus))
    engine.set_rate(options.write_bytes_per_s or 0)
    if options.staging_bytes is not None:
        limit = native.memory_limit()
        if options.staging_bytes > limit:
            raise StagingMemoryError(
                f"staging_bytes is {options.staging_bytes}, but this process may use {limit} bytes "
                "of memory in all; ask for less (a smaller ring works, saves then wait for the "
                "disk)"
            )
        _reserve(engine, options.staging_bytes, options.staging_bytes)
    return engine


def make_room(engine: Engine, options: Staging, file_bytes: tuple[int, ...]) -> None:
    """Grow the engine's memory to hold a save of these files, as far as its bound goes.

    Raises:
        StagingMemoryError: There is not even room for the smallest ring.
    """
    if options.staging_bytes is not None:
        return
    wanted = sum(-(-nbytes // SLOT_BYTES) * SLOT_BYTES for nbytes in file_bytes)
    bound = max(2 * SLOT_BYTES, int(native.memory_limit() * _SHARE_OF_MEMORY) // _ranks_on_host())
    if wanted > bound:
        _logger.warning(
            "a save takes %d MiB of staging memory, %d MiB are its bound (40 %% of the memory "
            "limit, shared by the ranks of the host): saves wait for the disk. "
            "Staging(staging_bytes=...) sets another bound.",
            wanted >> 20,
            bound >> 20,
        )
        wanted = bound // SLOT_BYTES * SLOT_BYTES
    held = engine.stats()[0] * SLOT_BYTES
    if wanted <= held:
        return
    try:
        num_spare = int(wanted // SLOT_BYTES * _PART_WRITTEN)
        _reserve(engine, wanted - num_spare * SLOT_BYTES, wanted)
    except StagingMemoryError:
        if held == 0:
            raise
        _logger.warning(
            "no memory to grow staging from %d to %d MiB: saves wait for the disk",
            held >> 20,
            wanted >> 20,
        )


def _reserve(engine: Engine, nbytes: int, most_bytes: int) -> None:
    try:
        engine.reserve(nbytes, most_bytes)
    except OSError as error:
        raise StagingMemoryError(
            f"no room for {nbytes} bytes of staging memory: {error.strerror}. Set a smaller "
            "Staging(staging_bytes=...): saves then wait for the disk."
        ) from error


def _ranks_on_host() -> int:
    """Return how many ranks the launcher started on this host; 1 where it does not tell."""
    for name in _TOLD_BY_LAUNCHER:
        told = _TASKS.findall(os.environ.get(name, ""))
        if told:
            return max(1, *map(int, told))
    return 1
