"""Shards out of and into JAX arrays, as host memory.

Layer: jax. Arrays in host memory are lent by address, CUDA arrays too where the staging engine
copies them itself; everything else goes through a copy that JAX makes of a throw-away alias,
because it caches such a copy on the array that was asked. No operation of JAX runs here: it would
be compiled, and would follow the mesh that is in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import jax
import ml_dtypes
import msgspec
import numpy as np
from jax.sharding import SingleDeviceSharding

from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.box import Box, Shape, whole
from shardckpt.jax import private
from shardckpt.state import HostArray

if TYPE_CHECKING:
    from collections.abc import Sequence

# JAX uses memory of this alignment as it is.
_ALIGN_BYTES: Final = 64
_BYTES: Final = (1,)
_BITS_OF_BYTE: Final = 8


class Memory(msgspec.Struct, frozen=True, gc=False):
    """What the parts of an array have in common.

    Attributes:
        is_plain: Whether the memory of each is its elements in C order, none of them packed.
        is_on_host: Whether it is the host's.
        is_late: Whether it may be copied after `save` returned: a donation must find it in use.
    """

    is_plain: bool
    is_on_host: bool
    is_late: bool


class Held(msgspec.Struct, frozen=True, gc=False):
    """What one device holds of an array.

    Attributes:
        array: The array of that device.
        size: Its bytes, as a shape, where it is plain.
        memory: What it shares with the other parts.
    """

    array: jax.Array
    size: Shape
    memory: Memory


def is_host_memory(device: Any, memory_kind: str | None) -> bool:
    """Return whether arrays of a device lie in memory the host can read by address."""
    if device.platform == "cpu":
        return True
    return device.platform == "gpu" and memory_kind in ("pinned_host", "unpinned_host")


def host_array(held: Held, *, may_stay_on_device: bool = False) -> HostArray:
    """Return the memory of a shard, ready to be read.

    Args:
        held: The shard; nothing is computed into it any more.
        may_stay_on_device: Return memory of a CUDA device as it is.
    """
    array, memory = held.array, held.memory
    if memory.is_plain:
        if memory.is_on_host and not memory.is_late:
            # No owner that JAX can see: a reference in Python does not keep it from donating.
            return HostArray(array.unsafe_buffer_pointer(), held.size, _BYTES, 1, array)
        if may_stay_on_device:
            (device,) = array.devices()
            return HostArray(
                array.unsafe_buffer_pointer(), held.size, _BYTES, 1, array,
                device.local_hardware_id,
            )  # fmt: skip
    return _row_of_bytes(np.asarray(_alias(array)))


def numpy_array(array: np.ndarray[Any, Any]) -> HostArray:
    """Return the memory of a numpy array; what is not little-endian or runs backwards is copied."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    return _lent(array)


def is_plain(array: jax.Array) -> bool:
    """Return whether memory on a device is the elements in C order, none of them packed."""
    if jax.dtypes.itemsize_bits(array.dtype) < _BITS_OF_BYTE:
        return False
    layout = private.device_layout(array)
    return layout is None or (
        not layout.tiling and tuple(layout.major_to_minor) == tuple(range(array.ndim))
    )


def _alias(array: jax.Array) -> jax.Array:
    """Return another array of the same memory, with which JAX's cached host copy goes."""
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])


def _row_of_bytes(array: np.ndarray[Any, Any]) -> HostArray:
    array = np.ascontiguousarray(array)
    return HostArray(array.ctypes.data, (array.nbytes,), _BYTES, 1, array)


def _lent(array: np.ndarray[Any, Any]) -> HostArray:
    return HostArray(array.ctypes.data, array.shape, array.strides, array.itemsize, array)


@final
class Buffer:
    """Host memory of one box of a target; allocated when it is first asked for."""

    def __init__(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        """Remember what will be wanted."""
        self._shape = shape
        self._dtype = dtype
        self._array: np.ndarray[Any, Any] | None = None

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The memory, as an array."""
        if self._array is None:
            nbytes = int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize
            raw = np.empty(nbytes + _ALIGN_BYTES, np.uint8)
            start = -raw.ctypes.data % _ALIGN_BYTES
            self._array = raw[start : start + nbytes].view(self._dtype).reshape(self._shape)
        return self._array

    def host_array(self) -> HostArray:
        """Return the memory, to be written."""
        return _lent(self.array)


@final
class Target:
    """One JAX array to be made from host buffers, one for each distinct box."""

    def __init__(
        self, shape: Shape, dtype: Any, sharding: Any, boxes: Sequence[Box], *, is_committed: bool
    ) -> None:
        """Remember what to make.

        Args:
            shape: Global shape.
            dtype: Dtype of the array.
            sharding: Where it goes.
            boxes: Box of each device of this process, in the sharding's order.
            is_committed: False leaves it to JAX where the array, of a single device, goes.
        """
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._sharding = sharding
        self._is_committed = is_committed
        self._boxes = tuple(boxes)
        self.buffers = {box: Buffer(box.shape, self._dtype) for box in boxes}

    def pieces(self) -> list[tuple[np.ndarray[Any, Any], Any]]:
        """Return host memory and destination of the part of each device."""
        if not self._is_committed:
            return [(self.buffers[whole(self._shape)].array, None)]
        kind = self._sharding.memory_kind
        devices = self._sharding.addressable_devices_indices_map(self._shape)
        return [
            (self.buffers[box].array, SingleDeviceSharding(device, memory_kind=kind))
            for device, box in zip(devices, self._boxes, strict=True)
        ]

    def made(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Return the array of the parts that were put to their devices."""
        if not self._is_committed:
            return parts[0]
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, list(parts), dtype=self._dtype
        )


def make_arrays(targets: Sequence[Target]) -> list[jax.Array]:
    """Return the arrays of filled targets; all transfers are under way at once."""
    pieces = [target.pieces() for target in targets]
    flat = [piece for of_target in pieces for piece in of_target]
    put = iter(jax.device_put([a for a, _ in flat], [s for _, s in flat]) if flat else [])
    return [
        target.made([next(put) for _ in of_target])
        for target, of_target in zip(targets, pieces, strict=True)
    ]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a canonical name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def check_storable(key: str, value: Any) -> None:
    """Refuse an array that has no values of its own.

    Raises:
        UnsupportedStateError: Traced, deleted, or a mere description.
    """
    if isinstance(value, jax.core.Tracer):
        raise UnsupportedStateError(
            f"{key}: a traced value has no numbers yet; call save() and restore() outside of jit"
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        raise UnsupportedStateError(
            f"{key}: a ShapeDtypeStruct has no values; save arrays, or restore into it"
        )
    if value.is_deleted():
        raise UnsupportedStateError(
            f"{key}: the array was deleted, most likely donated to a jitted step "
            "(donate_argnums). Save what that step returned, or save before the step"
        )
