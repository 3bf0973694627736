"""What an array is, without its values: global shape and dtype.

Layer: geometry (integers only).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardckpt.geometry.dtypes import itemsize_bytes

if TYPE_CHECKING:
    from shardckpt.geometry.box import Shape


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Global shape in elements and canonical dtype name of one array."""

    shape: Shape
    dtype: str

    @property
    def itemsize_bytes(self) -> int:
        """Bytes of one element."""
        return itemsize_bytes(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize_bytes

    def __str__(self) -> str:
        """Return for example `float32[4, 8]`."""
        return f"{self.dtype}{list(self.shape)}"
