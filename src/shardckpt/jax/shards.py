"""Shardings as layouts: which boxes of an array this process holds, and who holds the rest.

Layer: jax. Nothing is asked of other processes: a sharding knows all devices, and a device knows
its process. What many arrays share is made once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, final

import jax
import msgspec
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding

from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box, Shape, whole
from shardckpt.geometry.dtypes import ITEMSIZE_BYTES
from shardckpt.geometry.layout import MeshLayout, replicated
from shardckpt.jax.copies import Held, Memory, is_host_memory, is_plain
from shardckpt.jax.leaves import OTHER, OUTSIDE
from shardckpt.state import Leaf, Shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jax.sharding import Sharding

_MAX_CACHED: Final = 65536
LATE: Final = 1


class Placed(msgspec.Struct, frozen=True, gc=False):
    """How arrays of one sharding, shape and dtype lie.

    Attributes:
        spec: Shape and dtype.
        layout: As in `Leaf`.
        boxes: The non-empty boxes this process holds, which of its shards to take of each, and that
            shard's bytes, as a shape.
        is_on_host: Whether the arrays are in the host's own memory.
        is_param: Whether the dtype is one of parameters: floating or complex.
        is_absent: Whether the array is another single process's own, who describes it alone.
    """

    spec: ArraySpec
    layout: MeshLayout | Literal["boxes"] | None
    boxes: tuple[tuple[Box, int, Shape], ...]
    is_on_host: bool
    is_param: bool
    is_absent: bool


@final
class Shards:
    """Makes leaves of arrays."""

    def __init__(self) -> None:
        """Start with nothing cached."""
        self._placed: dict[tuple[Sharding, Shape, Any], Placed] = {}
        self._layouts: dict[MeshLayout, MeshLayout] = {}

    def leaf(self, key: str, array: jax.Array, role: str, *, late: bool) -> Leaf | None:
        """Return the leaf of an array; None where another process alone holds it.

        Args:
            key: Its key.
            array: An array of plain numbers, not deleted.
            role: Its role.
            late: Whether it may be copied after `save` returned.

        Raises:
            UnsupportedStateError: It cannot be stored exactly.
        """
        placed = self.placed(key, array.shape, array.dtype, array.sharding)
        if placed.is_absent:
            return None
        memory = Memory(is_plain(array), placed.is_on_host, late)
        shards = tuple(
            Shard(box, Held(array.addressable_data(index), size, memory))
            for box, index, size in placed.boxes
        )
        fence = LATE if late and placed.is_on_host else 0
        return Leaf(key, placed.spec, _role(role, placed.is_param), placed.layout, shards, fence)

    def placed(self, key: str, shape: Shape, dtype: Any, sharding: Sharding) -> Placed:
        """Return how an array of this shape and dtype lies under a sharding.

        Raises:
            UnsupportedStateError: It cannot be stored exactly.
        """
        known = self._placed.get((sharding, shape, dtype))
        if known is None:
            if len(self._placed) >= _MAX_CACHED:
                self._placed.clear()
            known = self._placed[sharding, shape, dtype] = self._place(key, shape, dtype, sharding)
        return known

    def _place(self, key: str, shape: Shape, dtype: Any, sharding: Sharding) -> Placed:
        spec = spec_of(key, shape, dtype)
        _check_sharding(key, sharding)
        local: dict[Box, int] = {}
        devices = sharding.addressable_devices_indices_map(shape)
        for index, slices in enumerate(devices.values()):
            local.setdefault(box_of(slices, shape), index)
        itemsize_bytes = ITEMSIZE_BYTES[spec.dtype]
        held = tuple(
            (box, index, (box.num_elements * itemsize_bytes,))
            for box, index in local.items()
            if box.num_elements
        )
        devices_of_all: set[Any] = set(sharding.device_set)
        processes = {device.process_index for device in devices_of_all}
        is_own = processes == {jax.process_index()} and jax.process_count() > 1
        layout: MeshLayout | Literal["boxes"] | None
        if is_own:
            # Every process may have one under this key: whole copies.
            layout = None if list(local) == [whole(shape)] else "boxes"
        else:
            layout = self._layout(sharding, shape)
        return Placed(
            spec,
            layout,
            held,
            all(is_host_memory(device, sharding.memory_kind) for device in devices),
            bool(jnp.issubdtype(dtype, np.inexact)),
            len(processes) == 1 and not devices,
        )

    def _layout(self, sharding: Sharding, shape: Shape) -> MeshLayout | Literal["boxes"]:
        indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
        layout: MeshLayout | None = None
        if isinstance(sharding, NamedSharding):
            layout = _of_mesh(sharding, shape)
        elif all(box_of(slices, shape) == whole(shape) for slices in indices.values()):
            layout = replicated(tuple(device.process_index for device in indices))
        return "boxes" if layout is None else self._layouts.setdefault(layout, layout)


def numpy_leaf(key: str, array: np.ndarray[Any, Any], role: str) -> Leaf:
    """Return the leaf of a numpy array: every process holds a whole copy.

    Raises:
        UnsupportedStateError: It cannot be stored exactly.
    """
    spec = spec_of(key, array.shape, array.dtype)
    is_param = bool(jnp.issubdtype(array.dtype, np.inexact))
    shards = (Shard(whole(array.shape), array),) if array.size else ()
    return Leaf(key, spec, _role(role, is_param), None, shards)


def spec_of(key: str, shape: Shape, dtype: Any) -> ArraySpec:
    """Return shape and canonical dtype.

    Raises:
        UnsupportedStateError: Arrays of this dtype cannot be stored.
    """
    name = np.dtype(dtype).name
    if name not in ITEMSIZE_BYTES:
        raise UnsupportedStateError(f"{key}: arrays of {dtype} cannot be stored")
    return ArraySpec(shape, name)


def _role(role: str, is_param: bool) -> str:
    if role == OUTSIDE:
        return "param" if is_param else OTHER
    return role


def _of_mesh(sharding: NamedSharding, shape: Shape) -> MeshLayout | None:
    """Return the layout that mesh and PartitionSpec mean; None where the boxes are others."""
    names = sharding.mesh.axis_names
    cuts: list[tuple[int, ...]] = []
    for entry in sharding.spec:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        if not isinstance(axes, tuple) or any(axis not in names for axis in axes):
            return None
        cuts.append(tuple(names.index(axis) for axis in axes))
    while cuts and not cuts[-1]:
        cuts.pop()
    devices = list(sharding.mesh.devices.flat)
    layout = MeshLayout(
        tuple(sharding.mesh.devices.shape),
        tuple(device.process_index for device in devices),
        tuple(cuts),
    )
    own = sharding.addressable_devices_indices_map(shape)
    for position, device in enumerate(devices):
        if device in own:
            coordinate = np.unravel_index(position, layout.mesh_shape)
            if layout.box_at(tuple(map(int, coordinate)), shape) != box_of(own[device], shape):
                return None
    return layout


def box_of(slices: Any, shape: Shape) -> Box:
    """Return the box that the slices of a sharding mean."""
    bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=True)]
    return Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))


def _check_sharding(key: str, sharding: Sharding) -> None:
    if isinstance(sharding, NamedSharding) and getattr(sharding.spec, "unreduced", None):
        raise UnsupportedStateError(
            f"{key}: the array is unreduced over {sorted(sharding.spec.unreduced)}: its devices "
            "hold parts of a sum. Reduce it (jax.reshard to a spec without unreduced) before saving"
        )
