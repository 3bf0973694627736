"""State that is neither module nor optimizer: values, stateful objects, RNGs.

Layer: torch.
"""

from __future__ import annotations

import base64
import random
import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from shardckpt.errors import FormatError, UnsupportedStateError
from shardckpt.format.tagged import decode, encode
from shardckpt.state import HostArray, PerRank, PerRankRule, PerRankValue
from shardckpt.torch.copies import host_array
from shardckpt.torch.shards import dtype_name, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_INLINE_BYTES: Final = 1 << 26


class RngState:
    """The random states of this rank: Python, numpy's global one, torch on CPU and CUDA.

    Restored exactly on an equal world size. On another one the rule decides: "drop" (default: keep
    the generators as they are, with a warning), "rank0" (every rank takes those of rank 0) or
    "error".
    """

    def __init__(self, rule: PerRankRule = "drop") -> None:
        """Choose the rule for another world size."""
        self.rule: PerRankRule = rule

    def state_dict(self) -> dict[str, Any]:
        """Return all states as plain values and byte tensors."""
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            state["numpy"] = numpy.random.get_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all states that were saved and exist here."""
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy as np

            np.random.set_state(state["numpy"])
        if "cuda" in state and torch.cuda.is_available():
            for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(value, device)


def as_per_rank(value: object) -> PerRank | None:
    """Return what belongs to one rank each: PerRank, RngState, torchdata's loaders."""
    if isinstance(value, PerRank):
        return value
    if isinstance(value, RngState):
        return PerRank(value, value.rule)
    if any(c.__module__.startswith("torchdata.") for c in type(value).__mro__) and is_stateful(
        value
    ):
        return PerRank(value, "error")
    return None


def is_stateful(value: object) -> bool:
    """Whether a value offers state_dict and load_state_dict."""
    kind = type(value)
    return callable(getattr(kind, "state_dict", None)) and callable(
        getattr(kind, "load_state_dict", None)
    )


def describe_per_rank(key: str, marked: PerRank) -> PerRankValue:
    """Return the tagged JSON of a per-rank value, tensors inside as bytes.

    Raises:
        UnsupportedStateError: Some part cannot be stored.
    """
    inner = marked.value
    value = inner.state_dict() if is_stateful(inner) else inner  # type: ignore[attr-defined]
    return PerRankValue(encode(value, key, extension=_inline), marked.rule)


def encode_object(key: str, value: object, leaf: Callable[[str, torch.Tensor], None]) -> object:
    """Return the tagged JSON of a value; tensors inside become leaves through `leaf`.

    Raises:
        UnsupportedStateError: Some part cannot be stored.
    """

    def extension(item: object, path: str) -> object | None:
        if isinstance(item, torch.Tensor):
            leaf(path, item)
            return {"leaf": path}
        return _small(item)

    return encode(value, key, extension=extension)


def decode_object(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """Return the value of tagged JSON; leaves are looked up in `tensors` by key."""

    def extension(item: object) -> object:
        if isinstance(item, dict) and "leaf" in item:
            return tensors[item["leaf"]]
        return _restored(item)

    return decode(value, extension=extension)


def _inline(item: object, path: str) -> object | None:
    if isinstance(item, torch.Tensor):
        if item.nbytes > _MAX_INLINE_BYTES:
            raise UnsupportedStateError(
                f"{path}: a per-rank tensor of {item.nbytes} bytes; at most 64 MiB"
            )
        packed = item.detach().cpu().contiguous()
        raw = _bytes_of(packed) if packed.numel() else b""
        return {
            "tensor": dtype_name(path, item.dtype),
            "shape": list(item.shape),
            "v": base64.b64encode(raw).decode(),
        }
    return _small(item)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    from shardckpt.pure import memory

    host: HostArray = host_array(tensor)
    return bytes(memory(host.address, tensor.nbytes))


def _small(item: object) -> object | None:
    if isinstance(item, torch.Size):
        return {"size": list(item)}
    if isinstance(item, torch.dtype):
        return {"dtype": str(item).removeprefix("torch.")}
    if isinstance(item, torch.device):
        return {"device": str(item)}
    return None


def _restored(item: object) -> object:
    if isinstance(item, dict):
        if "tensor" in item:
            raw = bytearray(base64.b64decode(str(item["v"]), validate=True))
            dtype, shape = torch_dtype(str(item["tensor"])), item["shape"]
            return (
                torch.frombuffer(raw, dtype=dtype).reshape(shape)
                if raw
                else torch.empty(shape, dtype=dtype)
            )
        if "size" in item:
            return torch.Size(item["size"])
        if "dtype" in item and isinstance(getattr(torch, str(item["dtype"]), None), torch.dtype):
            return getattr(torch, str(item["dtype"]))
        if "device" in item:
            return torch.device(str(item["device"]))
    raise FormatError(f"a value of unknown kind: {item!r}")


def decode_per_rank(value: object) -> Any:
    """Return the value of a per-rank entry's tagged JSON."""
    return decode(value, extension=_restored)
