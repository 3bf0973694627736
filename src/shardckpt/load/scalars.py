"""Read a few numbers of a checkpoint before a load changes anything.

Layer: load.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from shardckpt.geometry.box import Box
from shardckpt.load.cast import Temporary, allocate
from shardckpt.load.plan import Wanted, plan_load
from shardckpt.load.read import run_load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.format.manifest import SavedTensor
    from shardckpt.load.open import OpenCheckpoint
    from shardckpt.state import HostArray


def read_scalars(checkpoint: OpenCheckpoint, tensors: Sequence[SavedTensor]) -> list[float]:
    """Return the values of 0-dim arrays, verified; integers are exact up to 2**53.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum.
        StorageError: A read failed.
    """
    sources = [allocate((), tensor.spec.dtype) for tensor in tensors]
    pairs = zip(tensors, sources, strict=True)
    run_load(plan_load(checkpoint, [Wanted(t, Box((), ()), s) for t, s in pairs]))
    return [
        _number(source, tensor.spec.dtype) for tensor, source in zip(tensors, sources, strict=True)
    ]


def _number(source: HostArray, dtype: str) -> float:
    number = allocate((), "float64")
    Temporary(source, dtype, number, "float64").finish()
    return ctypes.c_double.from_address(number.address).value
