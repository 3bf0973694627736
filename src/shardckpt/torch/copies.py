"""Shards out of and into torch tensors, as host memory.

Layer: torch. CPU tensors are lent as they are, strides included; CUDA tensors too where the staging
engine copies them itself; other devices go through a host copy. No numpy, so every dtype passes.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardckpt.errors import UnsupportedStateError
from shardckpt.state import HOST, HostArray

_BYTES: Final = (1,)
_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})


def host_array(tensor: torch.Tensor, *, may_stay_on_device: bool = False) -> HostArray:
    """Return the memory of a tensor's values; contiguous memory as a row of bytes.

    Args:
        tensor: On any device; what is copied to the host is ordered after its current stream.
        may_stay_on_device: Return memory of a CUDA device as it is, where it is contiguous or rows
            of a pitch.
    """
    # The detached alias stays valid where the caller gives its parameter other memory (`p.data =
    # ...`).
    alias = tensor.detach()
    if alias.is_conj():
        alias = alias.resolve_conj()
    if alias.is_neg():
        alias = alias.resolve_neg()
    device = HOST
    if not alias.is_cpu:
        if may_stay_on_device and alias.is_cuda and _has_rows(alias):
            device = alias.get_device()
        else:
            alias = alias.to("cpu")
    if alias.is_contiguous():
        return HostArray(alias.data_ptr(), (alias.nbytes,), _BYTES, 1, alias, device)
    return _lent(alias, device)


def is_lent(tensor: torch.Tensor, *, may_stay_on_device: bool = False) -> bool:
    """Return whether `host_array` gives the tensor's own memory and no copy of it."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.is_cpu or (may_stay_on_device and tensor.is_cuda and _has_rows(tensor))


def _has_rows(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    rows = tensor.ndim == 2 and tensor.stride(1) == 1
    return rows and tensor.stride(0) >= tensor.shape[1]


def host_target(tensor: torch.Tensor) -> HostArray:
    """Return writable host memory for a target: its own on the CPU, else a buffer for `place`."""
    alias = tensor.detach()
    if alias.is_cpu:
        return _lent(alias)
    return _lent(torch.empty(alias.shape, dtype=alias.dtype, device="cpu"))


def place(tensor: torch.Tensor, host: HostArray) -> None:
    """Copy a filled buffer into a device tensor; nothing to do for CPU tensors."""
    if tensor.is_cpu:
        return
    filled = host.owner
    assert isinstance(filled, torch.Tensor)
    with torch.no_grad():
        tensor.detach().copy_(filled)


def check_storable(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor that is not plain strided memory.

    Raises:
        UnsupportedStateError: Sparse, quantized, on the meta device, or of a foreign subclass;
            names `what`.
    """
    if tensor.layout is not torch.strided:
        raise UnsupportedStateError(
            f"{what}: a {tensor.layout} tensor cannot be stored; make it dense"
        )
    if tensor.is_meta:
        raise UnsupportedStateError(
            f"{what}: the tensor is on the meta device and has no values; materialize the "
            "module first "
            "(module.to_empty(device=...), then initialise or restore)"
        )
    if tensor.is_quantized:
        raise UnsupportedStateError(
            f"{what}: a quantized tensor cannot be stored; store its int_repr() and scale"
        )
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        raise UnsupportedStateError(
            f"{what}: a {type(tensor).__module__}.{type(tensor).__qualname__} is made of "
            "several tensors and cannot "
            "be stored as one; keep its parts in the state"
        )


def check_fillable(tensor: torch.Tensor, what: str) -> None:
    """Refuse a tensor into which values cannot be written in place.

    Raises:
        UnsupportedStateError: Its bytes are not its values, or elements share memory; names `what`.
    """
    if tensor.is_conj() or tensor.is_neg():
        raise UnsupportedStateError(
            f"{what}: a lazily conjugated or negated tensor cannot be filled; call "
            "resolve_conj() or resolve_neg()"
        )
    strides = tensor.stride()
    if 0 in strides and any(s == 0 and n > 1 for s, n in zip(strides, tensor.shape, strict=True)):
        raise UnsupportedStateError(
            f"{what}: an expanded tensor (strides {strides}) cannot be filled; make it contiguous"
        )


def _lent(tensor: torch.Tensor, device: int = HOST) -> HostArray:
    item = tensor.element_size()
    strides = tuple([stride * item for stride in tensor.stride()])
    return HostArray(tensor.data_ptr(), tuple(tensor.shape), strides, item, tensor, device)
