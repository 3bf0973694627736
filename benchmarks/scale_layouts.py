"""The states of large jobs as data: which tensors a rank holds and how they lie on the mesh.

Shapes are those of a transformer with a width of 16,384. No rank's memory is allocated: a shard is
one element that is repeated, because nothing here reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shardckpt.geometry.layout import MeshLayout
from shardckpt.testing.arrays import Sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardckpt.geometry.box import Box, Shape

WIDTH: Final = 16_384
HIDDEN: Final = 53_248
KV_WIDTH: Final = 1_024
DTYPE: Final = "float16"  # Two bytes, as bfloat16 has, which numpy lacks.
# Of one layer: name, shape, and which of its dims tensor parallelism cuts (None: none).
LAYER: Final = (
    ("attention.wq.weight", (WIDTH, WIDTH), 0),
    ("attention.wk.weight", (KV_WIDTH, WIDTH), 0),
    ("attention.wv.weight", (KV_WIDTH, WIDTH), 0),
    ("attention.wo.weight", (WIDTH, WIDTH), 1),
    ("feed_forward.w1.weight", (HIDDEN, WIDTH), 0),
    ("feed_forward.w2.weight", (WIDTH, HIDDEN), 1),
    ("feed_forward.w3.weight", (HIDDEN, WIDTH), 0),
    ("attention_norm.weight", (WIDTH,), None),
    ("ffn_norm.weight", (WIDTH,), None),
)
NUM_EXPERTS: Final = 64
EXPERTS: Final = (
    ("moe.experts.w1", (NUM_EXPERTS, 2_048, WIDTH), 0),
    ("moe.experts.w2", (NUM_EXPERTS, WIDTH, 2_048), 0),
    ("moe.experts.w3", (NUM_EXPERTS, 2_048, WIDTH), 0),
    ("moe.router.weight", (NUM_EXPERTS, WIDTH), None),
)
TP: Final = 8


@dataclass(frozen=True, slots=True)
class Mesh:
    """A layout as a framework tells it: the ranks of its mesh one by one."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]

    def layout(self) -> MeshLayout:
        """Return the engine's form."""
        return MeshLayout(self.shape, self.ranks, self.cuts)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One array of the job."""

    key: str
    shape: Shape
    mesh: Mesh


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that hold the same arrays."""

    ranks: range
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A job: its ranks in groups, ascending."""

    kind: str
    world_size: int
    groups: tuple[Group, ...]

    def group_of(self, rank: int) -> Group:
        """Return the group of a rank."""
        return next(group for group in self.groups if rank in group.ranks)

    def state_of(self, rank: int, layouts: dict[int, MeshLayout]) -> dict[str, Any]:
        """Return what a rank passes to `save`, for the backend of numpy arrays.

        Args:
            rank: The rank.
            layouts: By id of a mesh; those that are missing are made.
        """
        state: dict[str, Any] = {}
        for tensor in self.group_of(rank).tensors:
            layout = layouts.get(id(tensor.mesh))
            if layout is None:
                layout = layouts[id(tensor.mesh)] = tensor.mesh.layout()
            coordinate = layout.coordinate(rank)
            assert coordinate is not None
            box = layout.box_at(coordinate, tensor.shape)
            part = np.broadcast_to(np.zeros((), DTYPE), box.shape)
            state[tensor.key] = Sharded(tensor.shape, layout, ((box, part),))
        return state


def boxes_of(job: Job, rank: int, layouts: dict[int, MeshLayout]) -> list[tuple[Tensor, Box]]:
    """Return the box of every array that a rank holds."""
    found = []
    for tensor in job.group_of(rank).tensors:
        layout = layouts.get(id(tensor.mesh))
        if layout is None:
            layout = layouts[id(tensor.mesh)] = tensor.mesh.layout()
        coordinate = layout.coordinate(rank)
        assert coordinate is not None
        found.append((tensor, layout.box_at(coordinate, tensor.shape)))
    return found


def on_fsdp(job: Job, world_size: int) -> Job:
    """Return a job that holds the arrays of another one, all cut over all ranks."""
    mesh = Mesh((world_size,), tuple(range(world_size)), ((0,),))
    tensors = [Tensor(t.key, t.shape, mesh) for group in job.groups for t in group.tensors]
    return _one_group("fsdp", world_size, sorted(tensors, key=lambda tensor: tensor.key))


def fsdp(world_size: int, num_tensors: int) -> Job:
    """Return a dense model whose arrays are all cut over all ranks (FSDP2)."""
    mesh = Mesh((world_size,), tuple(range(world_size)), ((0,),))
    return _one_group("fsdp", world_size, _layers(num_tensors, lambda _: mesh))


def hsdp(world_size: int, num_tensors: int) -> Job:
    """Return one that is cut over 64 ranks (fewer in a small job) and replicated over the rest."""
    inner = min(64, world_size // 2)
    mesh = Mesh((world_size // inner, inner), tuple(range(world_size)), ((1,),))
    return _one_group("hsdp", world_size, _layers(num_tensors, lambda _: mesh))


def tp_fsdp(world_size: int, num_tensors: int) -> Job:
    """Return tensor parallelism of 8 inside FSDP; norms are replicated over the former."""
    ranks = tuple(range(world_size))
    shape = (world_size // TP, TP)
    meshes = {
        0: Mesh(shape, ranks, ((1, 0),)),
        1: Mesh(shape, ranks, ((0,), (1,))),
        None: Mesh(shape, ranks, ((0,),)),
    }
    return _one_group("tp_fsdp", world_size, _layers(num_tensors, meshes.__getitem__))


def pp_fsdp(world_size: int, num_tensors: int) -> Job:
    """Return 16 pipeline stages with keys of their own, each under FSDP on its ranks."""
    stages = 16
    size = world_size // stages
    groups = []
    for stage in range(stages):
        ranks = range(stage * size, (stage + 1) * size)
        mesh = Mesh((size,), tuple(ranks), ((0,),))
        first, last = stage * num_tensors // stages, (stage + 1) * num_tensors // stages
        groups.append(Group(ranks, tuple(_layers(last - first, lambda _, m=mesh: m, first))))
    return Job("pp_fsdp", world_size, tuple(groups))


def moe(world_size: int, num_tensors: int) -> Job:
    """Return a mixture of experts: those on a mesh of 8 expert-parallel ranks by FSDP."""
    ranks = tuple(range(world_size))
    dense = Mesh((world_size,), ranks, ((0,),))
    experts = Mesh((world_size // TP, TP), ranks, ((1,), (0,)))
    half = num_tensors // 2
    tensors = _layers(half, lambda _: dense)
    for index in range(num_tensors - half):
        layer, (name, shape, cut) = index // len(EXPERTS), EXPERTS[index % len(EXPERTS)]
        mesh = dense if cut is None else experts
        tensors.append(Tensor(f"model/layers.{layer}.{name}", shape, mesh))
    return _one_group("moe", world_size, sorted(tensors, key=lambda tensor: tensor.key))


def jax_2d(world_size: int, num_tensors: int) -> Job:
    """Return a JAX mesh (data, model): some arrays are cut over the latter only."""
    ranks = tuple(range(world_size))
    shape = (world_size // 16, 16)
    meshes = {
        0: Mesh(shape, ranks, ((1,), (0,))),
        1: Mesh(shape, ranks, ((), (1,))),
        None: Mesh(shape, ranks, ()),
    }
    return _one_group("jax_2d", world_size, _layers(num_tensors, meshes.__getitem__))


def jax_3d(world_size: int, num_tensors: int) -> Job:
    """Return a JAX mesh (replica, fsdp, model), one device for each process."""
    ranks = tuple(range(world_size))
    inner = min(64, world_size // 16)
    shape = (world_size // inner // 8, inner, 8)
    meshes = {
        0: Mesh(shape, ranks, ((2,), (1,))),
        1: Mesh(shape, ranks, ((1,), (2,))),
        None: Mesh(shape, ranks, ((1,),)),
    }
    return _one_group("jax_3d", world_size, _layers(num_tensors, meshes.__getitem__))


JOBS: Final[dict[str, Callable[[int, int], Job]]] = {
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp_fsdp": tp_fsdp,
    "pp_fsdp": pp_fsdp,
    "moe": moe,
    "jax_2d": jax_2d,
    "jax_3d": jax_3d,
}


def _one_group(kind: str, world_size: int, tensors: Sequence[Tensor]) -> Job:
    return Job(kind, world_size, (Group(range(world_size), tuple(tensors)),))


def _layers(
    num_tensors: int, mesh_of: Callable[[int | None], Mesh], first: int = 0
) -> list[Tensor]:
    tensors = []
    for index in range(first, first + num_tensors):
        layer, (name, shape, cut) = index // len(LAYER), LAYER[index % len(LAYER)]
        tensors.append(Tensor(f"model/layers.{layer}.{name}", shape, mesh_of(cut)))
    return sorted(tensors, key=lambda tensor: tensor.key)
