"""What benchmarks do with the files of a system: flush, count, delete. Knows no framework."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def flush(path: Path) -> None:
    """Flush a file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_share(top: Path, rank: int, num_ranks: int) -> None:
    """Flush every file below a directory that is this rank's, dealt round."""
    files = sorted(path for path in top.rglob("*") if path.is_file())
    for path in files[rank::num_ranks]:
        flush(path)


def flush_names(top: Path) -> None:
    """Flush a directory, all below it, and the one above it."""
    for path in (top.parent, top, *(path for path in top.rglob("*") if path.is_dir())):
        flush(path)


def size_of(top: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(path.stat().st_size for path in top.rglob("*") if path.is_file())


def keep_only(newest: Path) -> None:
    """Delete everything else beside a checkpoint."""
    for old in newest.parent.glob("*"):
        if old != newest:
            shutil.rmtree(old)
