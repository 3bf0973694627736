"""Convert values from the saved dtype to the target's, where the user asked for it.

Layer: load. numpy and ml_dtypes round to nearest even, as both frameworks do.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from shardckpt.errors import StateMismatchError
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.runs import c_strides_bytes
from shardckpt.state import HostArray

if TYPE_CHECKING:
    from shardckpt.geometry.box import Shape


@dataclass(frozen=True, slots=True)
class Temporary:
    """A buffer of the saved dtype that stands in for a target until it is copied or converted."""

    source: HostArray
    source_dtype: str
    target: HostArray
    target_dtype: str

    def finish(self) -> None:
        """Copy the buffer into the target, converting where the dtypes differ.

        Raises:
            StateMismatchError: numpy knows no such conversion.
        """
        source = _view(self.source, self.source_dtype)
        target = _view(self.target, self.target_dtype)
        if (
            self.source_dtype != self.target_dtype
            and target.dtype.kind == "V"
            and _is_opaque(self.target_dtype)
        ):
            raise StateMismatchError(f"cannot convert {self.source_dtype} to {self.target_dtype}")
        target[...] = source.astype(target.dtype) if target.dtype != source.dtype else source


def allocate(shape: Shape, dtype: str) -> HostArray:
    """Return a fresh C-order buffer of the saved dtype."""
    spec = ArraySpec(shape, dtype)
    buffer = ctypes.create_string_buffer(max(1, spec.nbytes))
    return HostArray(
        ctypes.addressof(buffer),
        shape,
        c_strides_bytes(shape, spec.itemsize_bytes),
        spec.itemsize_bytes,
        buffer,
    )


def _is_opaque(dtype: str) -> bool:
    return dtype in ("complex32", "float4_e2m1fn_x2")


def _view(array: HostArray, dtype: str) -> np.ndarray[Any, Any]:
    if _is_opaque(dtype):
        kind = np.dtype((np.void, array.itemsize_bytes))
    else:
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    span = array.itemsize_bytes + sum(
        (n - 1) * s for n, s in zip(array.shape, array.strides_bytes, strict=True) if n
    )
    if 0 in array.shape:
        return np.empty(array.shape, kind)
    memory = memoryview((ctypes.c_char * span).from_address(array.address))
    return np.ndarray(array.shape, kind, memory, 0, array.strides_bytes)
