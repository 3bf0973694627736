"""One tensor to one leaf: global shape, layout, and the boxes this rank holds. No communication.

Layer: torch.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import whole
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.layout import MeshLayout
from shardckpt.state import Leaf
from shardckpt.state import Shard as LocalShard
from shardckpt.torch.private import FlatRange, local_tensor, split_factor

_NAMES: Final[dict[torch.dtype, str]] = {
    torch.bool: "bool",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex32: "complex32",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
    torch.float8_e5m2: "float8_e5m2",
    torch.float8_e5m2fnuz: "float8_e5m2fnuz",
    torch.float8_e8m0fnu: "float8_e8m0fnu",
    torch.float4_e2m1fn_x2: "float4_e2m1fn_x2",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}


class Layouts:
    """Turns tensors into leaves; remembers layouts, because thousands of tensors share a few."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._layouts: dict[tuple[int, Any], MeshLayout] = {}
        self._meshes: dict[int, Any] = {}

    def leaf(self, key: str, role: str, tensor: torch.Tensor, flat: FlatRange | None = None) -> Leaf:
        """Return the leaf of a tensor.

        Args:
            key: Its key.
            role: Its role.
            tensor: A plain tensor, a DTensor, or the local 1-D part of an FSDP1 parameter.
            flat: For FSDP1, which part.

        Raises:
            UnsupportedStateError: The tensor is sparse, quantized, meta, an unreduced sum, or irregular.
        """
        if flat is not None and tensor.numel() == flat.stop - flat.start:
            return _flat_leaf(key, role, tensor, flat)
        if not isinstance(tensor, DTensor):
            _check_plain(key, tensor)
            shape = tuple(tensor.shape)
            spec = ArraySpec(shape, dtype_name(key, tensor.dtype))
            shards = (LocalShard(whole(shape), tensor.detach()),) if 0 not in shape else ()
            return Leaf(key, spec, role, None, shards)
        local = local_tensor(tensor)
        _check_plain(key, local)
        shape = tuple(tensor.shape)
        spec = ArraySpec(shape, dtype_name(key, local.dtype))
        layout = self._layout(key, tensor)
        coordinate = tensor.device_mesh.get_coordinate()
        if coordinate is None:
            return Leaf(key, spec, role, layout, ())
        box = layout.box_at(tuple(coordinate), shape)
        if box.shape != tuple(local.shape):
            if math.prod(box.shape) == local.numel() == 0:
                return Leaf(key, spec, role, layout, ())
            raise UnsupportedStateError(
                f"{key}: rank at mesh coordinate {list(coordinate)} holds shape {list(local.shape)}, but "
                f"placements {tensor.placements} of a tensor of shape {list(shape)} give {list(box.shape)}. "
                "Redistribute it to even placements before saving."
            )
        shards = (LocalShard(box, local.detach()),) if 0 not in box.shape else ()
        return Leaf(key, spec, role, layout, shards)

    def _layout(self, key: str, tensor: DTensor) -> MeshLayout:
        mesh = tensor.device_mesh
        cached = self._layouts.get((id(mesh), tensor.placements))
        if cached is None:
            cuts = _cuts(key, tensor)
            cached = MeshLayout(tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()), cuts)
            self._layouts[(id(mesh), tensor.placements)] = cached
            self._meshes[id(mesh)] = mesh  # Kept, so that its id is not given to another mesh.
        return cached


def dtype_name(key: str, dtype: torch.dtype) -> str:
    """Return the canonical name of a torch dtype.

    Raises:
        UnsupportedStateError: It has none.
    """
    try:
        return _NAMES[dtype]
    except KeyError:
        raise UnsupportedStateError(f"{key}: dtype {dtype} cannot be stored; convert it first") from None


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a canonical name."""
    return _DTYPES[name]


def _cuts(key: str, tensor: DTensor) -> tuple[tuple[int, ...], ...]:
    """Return for each dim the mesh axes that cut it, in the order in which they cut.

    FSDP over TP is written as a strided shard on the outer axis whose split factor is the product of the inner axes
    that shard the same dim; physically the inner axes cut first.
    """
    placements = tensor.placements
    sizes = tuple(tensor.device_mesh.mesh.shape)
    cuts: list[list[int]] = [[] for _ in range(tensor.ndim)]
    # Inner axes first, so that a strided one finds those that cut before it.
    for axis in reversed(range(len(placements))):
        placement = placements[axis]
        if isinstance(placement, Partial):
            raise UnsupportedStateError(
                f"{key}: axis {axis} holds unreduced sums ({placement}); reduce the tensor before saving"
            )
        if isinstance(placement, Replicate):
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise UnsupportedStateError(f"{key}: placement {placement} is not known")
        dim = dim % max(tensor.ndim, 1)
        factor = split_factor(placement)
        if factor is None or isinstance(placement, Shard) and factor == 1:
            cuts[dim].insert(0, axis)
            continue
        inner = math.prod(sizes[a] for a in cuts[dim])
        if factor != inner:
            raise UnsupportedStateError(
                f"{key}: {placement} on axis {axis} has split factor {factor}, the axes inside it cut dim {dim} into "
                f"{inner}. Redistribute it to Shard({dim}) before saving."
            )
        cuts[dim].append(axis)
    return tuple(tuple(cut) for cut in cuts)


def _flat_leaf(key: str, role: str, tensor: torch.Tensor, flat: FlatRange) -> Leaf:
    local = tensor.detach().reshape(-1)
    shards: list[LocalShard] = []
    position = 0
    for box in ranges_to_boxes(flat.start, flat.stop, flat.shape):
        part = local[position : position + box.num_elements].view(box.shape)
        shards.append(LocalShard(box, part))
        position += box.num_elements
    spec = ArraySpec(flat.shape, dtype_name(key, tensor.dtype))
    return Leaf(key, spec, role, "boxes", tuple(shards))


def _check_plain(key: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise UnsupportedStateError(f"{key}: a {kind} tensor cannot be stored; make it dense and real first")
