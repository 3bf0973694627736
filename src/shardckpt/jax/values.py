"""Leaves that are no arrays: plain values, and objects that give and take their state.

Layer: jax. An object has `state_dict` and `load_state_dict`, or `get_state` and `set_state` (of
grain's iterators). Small arrays inside a value are written into its JSON; so are tensors that a
loader of torch keeps in its state, without importing torch.
"""

from __future__ import annotations

import base64
import math
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from shardckpt.errors import FormatError, StateMismatchError, UnsupportedStateError
from shardckpt.format.tagged import decode, encode
from shardckpt.geometry.dtypes import ITEMSIZE_BYTES, itemsize_bytes
from shardckpt.jax import private
from shardckpt.jax.copies import check_storable
from shardckpt.jax.leaves import is_key_array
from shardckpt.state import PerRank, PerRankValue, as_per_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_INLINE_BYTES: Final = 1 << 20
MAX_PER_RANK_BYTES: Final = 64 << 20


@runtime_checkable
class StateDict(Protocol):
    """An object that gives and takes its state in the manner of torch."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state."""


@runtime_checkable
class GetState(Protocol):
    """An object that gives and takes its state in the manner of grain."""

    def get_state(self) -> Any:
        """Return the state."""

    def set_state(self, state: Any) -> Any:
        """Take a state."""


def describe_object(key: str, value: object) -> object:
    """Return the tagged JSON of a plain value or an object's state, equal on all processes.

    Raises:
        UnsupportedStateError: It cannot be stored exactly.
    """
    return encode(_content(value), key, extension=partial(_encode, max_bytes=MAX_INLINE_BYTES))


def describe_per_rank(key: str, marked: PerRank) -> PerRankValue:
    """Return this process's value as tagged JSON.

    Raises:
        UnsupportedStateError: It cannot be stored exactly.
    """
    extension = partial(_encode, max_bytes=MAX_PER_RANK_BYTES)
    return PerRankValue(encode(_content(marked.value), key, extension=extension), marked.rule)


def give(key: str, owner: object, saved: object) -> object:
    """Hand a saved value to its owner and return that; a plain value is replaced by it.

    Raises:
        StateMismatchError: The owner refused it.
    """
    value = decode(saved, extension=_decode, what=key)
    if not isinstance(owner, (StateDict, GetState)):
        return value
    try:
        if isinstance(owner, StateDict):
            owner.load_state_dict(value)
        else:
            owner.set_state(value)
    except Exception as error:
        kind = type(owner)
        raise StateMismatchError(
            f"{key}: the {kind.__module__}.{kind.__qualname__} refused the saved value: "
            f"{type(error).__name__}: {error}"
        ) from error
    return owner


def give_per_rank(key: str, owner: object, saved: object) -> object:
    """Hand a process's own value to its owner, or return what takes its place in the state.

    Raises:
        StateMismatchError: The owner refused it.
    """
    marked = as_per_rank(owner)
    assert marked is not None
    given = give(key, marked.value, saved)
    return owner if given is marked.value else replace(marked, value=given)


def _content(value: object) -> object:
    if isinstance(value, StateDict):
        return value.state_dict()
    if isinstance(value, GetState):
        return value.get_state()
    return value


def _encode(value: Any, path: str, *, max_bytes: int) -> object | None:
    if isinstance(value, jax.Array):
        check_storable(path, value)
        if is_key_array(value):
            name, _ = private.key_impl(value.dtype)
            words = _array("jax", np.array(private.key_words(value)), path, max_bytes)
            return {"t": "key", "impl": name, "words": words}
        if not value.is_fully_addressable:
            raise UnsupportedStateError(
                f"{path}: an array that lies on several processes can only be a leaf of the state"
            )
        return _array("jax", np.array(value), path, max_bytes)
    if type(value) is np.ndarray or isinstance(value, np.generic):
        return _array("ndarray", np.asarray(value), path, max_bytes)
    if _is_tensor(value):
        return _array("tensor", value.detach().cpu().numpy(), path, max_bytes)
    if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        check_storable(path, value)
    return None


def _array(
    kind: str, array: np.ndarray[Any, Any], path: str, max_bytes: int
) -> dict[str, object] | None:
    if array.dtype.name not in ITEMSIZE_BYTES:
        return None
    if array.nbytes > max_bytes:
        raise UnsupportedStateError(
            f"{path}: an array of {array.nbytes} bytes is too large to be stored inside a value "
            f"(at most {max_bytes}); put it into the state by itself"
        )
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return {
        "t": kind,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "v": base64.b64encode(little.tobytes()).decode(),
    }


def _decode(value: Any) -> object:
    """Return what `_encode` encoded; arrays are new, those of JAX on the default device.

    Raises:
        FormatError: The JSON is malformed, or the value needs torch, which is not imported.
    """
    kind = value["t"]
    if kind == "key":
        words = jax.device_put(_decode_array(value["words"]))
        return jax.random.wrap_key_data(words, impl=str(value["impl"]))
    array = _decode_array(value)
    if kind == "jax":
        return jax.device_put(array)
    if kind == "ndarray":
        return array
    torch = sys.modules.get("torch")
    if kind != "tensor" or torch is None:
        raise FormatError(
            f"a value of kind {kind!r} cannot be made here; import torch if it is a tensor"
        )
    return torch.from_numpy(array)


def _decode_array(value: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    data = base64.b64decode(value["v"], validate=True)
    name, shape = str(value["dtype"]), [int(n) for n in value["shape"]]
    if any(n < 0 for n in shape) or len(data) != math.prod(shape) * itemsize_bytes(name):
        raise FormatError(f"an array of {len(data)} bytes does not have shape {shape} of {name}")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    little = np.frombuffer(data, dtype.newbyteorder("<"))
    return little.astype(dtype).reshape(shape)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
