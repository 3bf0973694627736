"""What tagged JSON does not know of torch: tensors, dtypes, devices, sizes.

Layer: torch. A tensor is either written into the JSON (little-endian bytes) or becomes a leaf that
the JSON refers to.
"""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any, Final

import torch

from shardckpt.errors import FormatError, UnsupportedStateError
from shardckpt.geometry.dtypes import itemsize_bytes
from shardckpt.torch import private
from shardckpt.torch.copies import check_storable
from shardckpt.torch.dtypes import DTYPE_NAME, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_INLINE_BYTES: Final = 1 << 20
MAX_PER_RANK_BYTES: Final = 64 << 20


def encode_inline(value: object, path: str, *, max_bytes: int = MAX_INLINE_BYTES) -> object | None:
    """Return the JSON of a value that tagged JSON does not know; tensors are written out.

    Raises:
        UnsupportedStateError: A tensor is too large for JSON, sharded, or not plain memory.
    """
    if isinstance(value, torch.Tensor):
        if private.plain(value) is not value:
            raise UnsupportedStateError(
                f"{path}: a DTensor can only be a value of its own, not a part of this one"
            )
        check_storable(value, path)
        if value.dtype not in DTYPE_NAME:
            raise UnsupportedStateError(f"{path}: tensors of {value.dtype} cannot be stored")
        nbytes = value.numel() * value.element_size()
        if nbytes > max_bytes:
            raise UnsupportedStateError(
                f"{path}: a tensor of {nbytes} bytes is too large to be stored inside a value "
                f"(at most {max_bytes}); "
                "put it into the state by itself"
            )
        return {
            "t": "tensor",
            "dtype": DTYPE_NAME[value.dtype],
            "shape": list(value.shape),
            "v": base64.b64encode(_bytes_of(value)).decode(),
        }
    return _encode_other(value)


def decode_inline(value: Any) -> object:
    """Return what `encode_inline` encoded; tensors are new and on the host.

    Raises:
        FormatError: The JSON is malformed.
    """
    if not isinstance(value, dict):
        raise FormatError(f"malformed torch value {value!r}")
    kind = value.get("t")
    if kind == "tensor":
        return _decode_tensor(value)
    if kind == "dtype":
        return torch_dtype(value["v"], "value")
    if kind == "device":
        return torch.device(value["v"])
    if kind == "size":
        return torch.Size(value["v"])
    if kind == "bytesio":
        return io.BytesIO(base64.b64decode(value["v"], validate=True))
    raise FormatError(f"torch value of kind {kind!r} is not known to this version")


def collector(
    name: str, tensors: dict[str, torch.Tensor]
) -> Callable[[object, str], object | None]:
    """Return an encoder that puts tensors into `tensors` by path below `name`."""

    def extension(value: object, path: str) -> object | None:
        if not isinstance(value, torch.Tensor):
            return _encode_other(value)
        below = path[len(name) + 1 :]
        if below in tensors:
            raise UnsupportedStateError(f"{path}: two tensors of the value have this path")
        tensors[below] = value
        return {"t": "leaf", "key": below}

    return extension


def resolver(tensors: Mapping[str, torch.Tensor]) -> Callable[[object], object]:
    """Return a decoder that puts tensors of `tensors` where `collector` found them."""

    def extension(value: Any) -> object:
        if isinstance(value, dict) and value.get("t") == "leaf":
            return tensors[value["key"]]
        return decode_inline(value)

    return extension


def references(found: list[str]) -> Callable[[object], object]:
    """Return a decoder that only lists the paths referred to."""

    def extension(value: Any) -> object:
        if isinstance(value, dict) and value.get("t") == "leaf":
            found.append(str(value["key"]))
            return None
        return decode_inline(value)

    return extension


def _encode_other(value: object) -> object | None:
    if isinstance(value, torch.dtype) and value in DTYPE_NAME:
        return {"t": "dtype", "v": DTYPE_NAME[value]}
    if isinstance(value, torch.device):
        return {"t": "device", "v": str(value)}
    if isinstance(value, torch.Size):
        return {"t": "size", "v": list(value)}
    if type(value) is io.BytesIO:
        return {"t": "bytesio", "v": base64.b64encode(value.getvalue()).decode()}
    return None


def _bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _decode_tensor(value: dict[str, Any]) -> torch.Tensor:
    data = bytearray(base64.b64decode(value["v"], validate=True))
    name, shape = str(value["dtype"]), [int(n) for n in value["shape"]]
    dtype = torch_dtype(name, "value")
    if any(n < 0 for n in shape) or len(data) != math.prod(shape) * itemsize_bytes(name):
        raise FormatError(f"tensor of {len(data)} bytes does not have shape {shape} of {name}")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
