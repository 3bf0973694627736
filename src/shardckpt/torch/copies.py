"""Tensor memory in and out.

Layer: torch.
"""

from __future__ import annotations

import torch

from shardckpt.errors import UnsupportedStateError
from shardckpt.state import HostArray


def host_array(tensor: torch.Tensor) -> HostArray:
    """Return host memory with the tensor's values; a device tensor is copied first."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return _view(tensor if tensor.device.type == "cpu" else tensor.cpu())


def host_target(tensor: torch.Tensor) -> HostArray:
    """Return writable host memory: the tensor's own, or a buffer where it lies on a device.

    Raises:
        UnsupportedStateError: The tensor is a lazy conjugate or negative.
    """
    if tensor.is_conj() or tensor.is_neg():
        raise UnsupportedStateError("a lazily conjugated or negated tensor cannot be filled; resolve it first")
    if tensor.device.type == "cpu":
        return _view(tensor)
    return _view(torch.empty(tensor.shape, dtype=tensor.dtype))


def placed(tensor: torch.Tensor, host: HostArray) -> None:
    """Copy a filled buffer to the device where it is not the tensor's own memory."""
    source = host.owner
    if source is not tensor:
        assert isinstance(source, torch.Tensor)
        with torch.no_grad():
            tensor.copy_(source)


def _view(tensor: torch.Tensor) -> HostArray:
    item = tensor.element_size()
    strides = tuple(s * item for s in tensor.stride())
    return HostArray(tensor.data_ptr(), tuple(tensor.shape), strides, item, tensor)
