"""Torch dtypes by canonical name.

Layer: torch.
"""

from __future__ import annotations

from typing import Final

import torch

from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.dtypes import ITEMSIZE_BYTES

# Torch's own names are the canonical ones; an older torch lacks some of them.
TORCH_DTYPE: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name)
    for name in ITEMSIZE_BYTES
    if isinstance(getattr(torch, name, None), torch.dtype)
}
DTYPE_NAME: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def torch_dtype(name: str, what: str) -> torch.dtype:
    """Return the torch dtype of a canonical name.

    Raises:
        UnsupportedStateError: This torch has no such dtype.
    """
    dtype = TORCH_DTYPE.get(name)
    if dtype is None:
        raise UnsupportedStateError(f"{what}: torch {torch.__version__} has no dtype {name}")
    return dtype
