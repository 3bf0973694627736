"""Torch tensors as leaves: the layout of a tensor, and the shards of it that this rank holds.

Layer: torch. DTensors get a mesh layout, FSDP1's flat parameters irregular boxes, plain tensors
none. Nothing is copied and nobody is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

import torch

from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box, Shape, whole
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.layout import MeshLayout
from shardckpt.state import Leaf, Shard
from shardckpt.torch.copies import check_storable
from shardckpt.torch.dtypes import DTYPE_NAME
from shardckpt.torch.private import Cut, FlatPart, cut_of, dtensor_class, local_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_CACHED: Final = 1 << 17
# Device mesh, placements and shape of a DTensor.
_Placed: TypeAlias = tuple[Any, Any, torch.Size]
_Placement: TypeAlias = tuple[int, object, torch.Size, torch.dtype]


@dataclass(frozen=True, slots=True)
class _Mesh:
    shape: Shape
    ranks: tuple[int, ...]


def cut_order(
    cuts: Sequence[Cut], mesh_shape: Shape, num_dims: int
) -> tuple[tuple[int, ...], ...] | None:
    """Return for each dim the mesh axes that cut it, in the order in which they really cut.

    Torch writes placements from the first axis to the last. A plain shard cuts before the later
    axes; a strided one was cut after later axes whose sizes multiply to its split factor (tensor
    parallel, then FSDP).

    Args:
        cuts: One per mesh axis.
        mesh_shape: Ranks along each axis.
        num_dims: Dims of the tensor.

    Returns:
        None where a split factor fits no set of later axes.

    >>> cut_order([Cut(0, 2), Cut(0, 1)], (4, 2), 1)
    ((1, 0),)
    """
    order: list[list[int]] = [[] for _ in range(num_dims)]
    for axis in reversed(range(len(cuts))):
        cut = cuts[axis]
        if cut.dim is None:
            continue
        later = order[cut.dim]
        position, product = 0, 1
        while product < cut.split and position < len(later):
            product *= mesh_shape[later[position]]
            position += 1
        if product != cut.split:
            return None
        later.insert(position, axis)
    # Dims at the end that nothing cuts are left out, so that tensors of any rank share a layout.
    while order and not order[-1]:
        order.pop()
    return tuple(tuple(axes) for axes in order)


@final
class Leaves:
    """Makes leaves; what many tensors share (mesh, layout, box, spec) is made once."""

    def __init__(self) -> None:
        """Start with nothing cached."""
        self._rank = 0
        self._dtensor: type[torch.Tensor] | None = None
        self._mesh_by_id: dict[int, _Mesh] = {}
        self._meshes: dict[_Mesh, _Mesh] = {}
        self._layouts: dict[tuple[int, Any, int], MeshLayout] = {}
        self._distinct: dict[tuple[int, tuple[tuple[int, ...], ...]], MeshLayout] = {}
        self._boxes: dict[tuple[int, Shape], Box | None] = {}
        self._specs: dict[tuple[Shape, torch.dtype], tuple[ArraySpec, Box]] = {}
        self._by_placement: dict[_Placement, tuple[ArraySpec, MeshLayout, Box | None]] = {}

    @property
    def rank(self) -> int:
        """The rank whose shards these are."""
        return self._rank

    def begin(self) -> None:
        """Begin a description: rank and imported classes may have changed, ids may be reused."""
        rank = _global_rank()
        if rank != self._rank:
            self._boxes.clear()
            self._by_placement.clear()
        self._rank = rank
        self._dtensor = dtensor_class()
        self._mesh_by_id.clear()
        caches: tuple[dict[Any, Any], ...] = (
            self._layouts, self._boxes, self._specs, self._by_placement,
        )  # fmt: skip
        if max(map(len, caches)) > _MAX_CACHED:
            for cache in (*caches, self._meshes, self._distinct):
                cache.clear()

    def is_dtensor(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor is a DTensor."""
        return self._dtensor is not None and isinstance(tensor, self._dtensor)

    def leaf(self, key: str, tensor: torch.Tensor, role: str, fence: int = 0) -> Leaf:
        """Return the leaf of a DTensor or a plain tensor.

        Args:
            key: Its key.
            tensor: The tensor.
            role: Its role.
            fence: Group of the only optimizer that changes it, or 0.

        Raises:
            UnsupportedStateError: The tensor cannot be stored exactly.
        """
        layout: MeshLayout | None = None
        box: Box | None
        if self.is_dtensor(tensor):
            local = local_tensor(tensor)
            spec, layout, box = self._lies(key, _placed(tensor), local)
        else:
            local = tensor
            check_storable(tensor, key)
            spec, box = self._spec(key, tuple(tensor.shape), tensor.dtype)
            box = box if tensor.numel() else None
        if fence and not (local.is_cpu or local.is_cuda):
            fence = 0
        return Leaf(key, spec, role, layout, () if box is None else (Shard(box, local),), fence)

    def sharded(self, key: str, like: Any, local: torch.Tensor, role: str, fence: int = 0) -> Leaf:
        """Return the leaf of a local tensor that lies on the mesh as the DTensor `like` does.

        Raises:
            UnsupportedStateError: The placements cannot be stored, or the local tensor has another
                shape than they say.
        """
        spec, layout, box = self._lies(key, _placed(like), local)
        if fence and not (local.is_cpu or local.is_cuda):
            fence = 0
        return Leaf(key, spec, role, layout, () if box is None else (Shard(box, local),), fence)

    def flat(
        self, key: str, part: FlatPart, local: torch.Tensor, role: str, fence: int = 0
    ) -> Leaf:
        """Return the leaf of FSDP1's flat memory: `local` holds the elements of `part`.

        Raises:
            UnsupportedStateError: The tensor cannot be stored exactly.
        """
        check_storable(local, key)
        spec, _ = self._spec(key, part.shape, local.dtype)
        shards: list[Shard] = []
        offset = 0
        for box in ranges_to_boxes(part.start, part.stop, part.shape):
            stop = offset + box.num_elements
            shards.append(Shard(box, local[offset:stop].view(box.shape)))
            offset = stop
        return Leaf(
            key, spec, role, "boxes", tuple(shards), fence if local.is_cpu or local.is_cuda else 0
        )

    def _lies(
        self, key: str, placed: _Placed, local: torch.Tensor
    ) -> tuple[ArraySpec, MeshLayout, Box | None]:
        """Return spec, layout, and the box of a local tensor; no box where it has no elements."""
        check_storable(local, key)
        device_mesh, placements, size = placed
        mesh = self._mesh(device_mesh)
        # Meshes live as long as this cache, so their ids stay theirs.
        case = (id(mesh), placements, size, local.dtype)
        found = self._by_placement.get(case)
        if found is None:
            shape = tuple(size)
            layout = self._layout(key, mesh, placements, len(shape))
            spec, _ = self._spec(key, shape, local.dtype)
            found = self._by_placement[case] = (spec, layout, self.local_box(layout, shape))
        spec, layout, box = found
        if box is None or local.shape == box.shape:
            return found if box is None or local.numel() else (spec, layout, None)
        if not box.num_elements and not local.numel():
            return spec, layout, None
        raise UnsupportedStateError(
            f"{key}: rank {self._rank} holds a local tensor of shape {list(local.shape)}, but "
            f"placements {placements} of {list(size)} on a mesh of {layout.mesh_shape} mean "
            f"{list(box.shape)}. Make the DTensor with distribute_tensor or fully_shard."
        )

    def layout_from(self, key: str, device_mesh: Any, placements: Any, num_dims: int) -> MeshLayout:
        """Return the layout of a DTensor with these placements.

        Raises:
            UnsupportedStateError: The placements cannot be stored.
        """
        return self._layout(key, self._mesh(device_mesh), placements, num_dims)

    def local_box(self, layout: MeshLayout, shape: Shape) -> Box | None:
        """Return this rank's box under a layout, or None off the mesh."""
        # Layouts live as long as this cache, so their ids stay theirs.
        known = (id(layout), shape)
        if known not in self._boxes:
            coordinate = layout.coordinate(self._rank)
            self._boxes[known] = None if coordinate is None else layout.box_at(coordinate, shape)
        return self._boxes[known]

    def _layout(self, key: str, mesh: _Mesh, placements: Any, num_dims: int) -> MeshLayout:
        known = (id(mesh), placements, num_dims)
        layout = self._layouts.get(known)
        if layout is None:
            cuts = [cut_of(placement, key) for placement in placements]
            order = cut_order(cuts, mesh.shape, num_dims)
            if order is None:
                raise UnsupportedStateError(
                    f"{key}: placements {placements} on a mesh of {mesh.shape} cut a dim in an "
                    "order that cannot be "
                    "stored; redistribute the tensor to plain Shard placements"
                )
            layout = self._distinct.get((id(mesh), order))
            if layout is None:
                layout = self._distinct[id(mesh), order] = MeshLayout(mesh.shape, mesh.ranks, order)
            self._layouts[known] = layout
        return layout

    def _mesh(self, device_mesh: Any) -> _Mesh:
        mesh = self._mesh_by_id.get(id(device_mesh))
        if mesh is None:
            ranks = device_mesh.mesh
            mesh = _Mesh(tuple(ranks.shape), tuple(ranks.flatten().tolist()))
            mesh = self._mesh_by_id[id(device_mesh)] = self._meshes.setdefault(mesh, mesh)
        return mesh

    def _spec(self, key: str, shape: Shape, dtype: torch.dtype) -> tuple[ArraySpec, Box]:
        known = self._specs.get((shape, dtype))
        if known is None:
            name = DTYPE_NAME.get(dtype)
            if name is None:
                raise UnsupportedStateError(f"{key}: tensors of {dtype} cannot be stored")
            known = self._specs[shape, dtype] = (ArraySpec(shape, name), whole(shape))
        return known


def _placed(dtensor: Any) -> _Placed:
    return dtensor.device_mesh, dtensor.placements, dtensor.shape


def _global_rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return 0
