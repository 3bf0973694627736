"""Leaves that need not be made again: their tensors are the same, and lie where they lay.

Layer: torch. Most saves of a training find every tensor of a module and of an optimizer as the save
before left it. To see that takes half a microsecond per tensor here; to look at each anew takes
five times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter, call, is_
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, final
from weakref import ref

import torch

from shardckpt.state import Leaf, Shard
from shardckpt.torch import private
from shardckpt.torch.copies import is_lent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_Place: TypeAlias = tuple[list[int], list[torch.Size], list[tuple[int, ...]], list[torch.dtype]]
_DTYPE: Final = attrgetter("dtype")


@final
@dataclass(frozen=True, slots=True)
class Unmoved:
    """Leaves, and all that they followed from; keeps no tensor alive.

    Attributes:
        causes: Names, fences and whatever else the caller made the leaves from.
        tensors: One per leaf.
        are_dtensors: Which of the tensors are DTensors.
        specs: Mesh and placements of these, None for the others.
        local_tensors: The tensor itself, or a DTensor's local one.
        place: Address, shape, strides and dtype of the local tensors.
        leaves: The leaves; their shards' `data` are weak references to the local tensors.
    """

    causes: object
    tensors: list[ref[torch.Tensor]]
    are_dtensors: list[bool]
    specs: list[object]
    local_tensors: list[ref[torch.Tensor]]
    place: _Place
    leaves: list[Leaf]

    @classmethod
    def of(
        cls,
        causes: object,
        tensors: Sequence[torch.Tensor],
        leaves: Sequence[Leaf],
        *,
        is_dtensor: Callable[[torch.Tensor], bool],
        may_stay_on_device: bool,
    ) -> Self | None:
        """Return what there is to know again, or None where a leaf is not its tensor's own memory.

        Args:
            causes: What the leaves were made from besides the tensors.
            tensors: One per leaf.
            leaves: The leaves.
            is_dtensor: Says whether a tensor is one.
            may_stay_on_device: Whether the engine copies CUDA memory itself.
        """
        if len(tensors) != len(leaves):
            return None
        are_dtensors = [is_dtensor(tensor) for tensor in tensors]
        local_tensors = _local(tensors, are_dtensors)
        again: list[Leaf] = []
        for leaf, local in zip(leaves, local_tensors, strict=True):
            if not is_lent(local, may_stay_on_device=may_stay_on_device):
                return None
            if any(shard.data is not local for shard in leaf.shards):
                return None
            shards = tuple(Shard(shard.box, ref(local)) for shard in leaf.shards)
            again.append(
                Leaf(leaf.key, leaf.spec, leaf.role, leaf.layout, shards, leaf.fence, True)
            )
        return cls(
            causes, list(map(ref, tensors)), are_dtensors, list(map(private.spec_of, tensors)),
            list(map(ref, local_tensors)), _place(local_tensors), again,
        )  # fmt: skip

    def holds(self, causes: object, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these causes and tensors would give the leaves again."""
        if causes != self.causes or len(tensors) != len(self.tensors):
            return False
        if not _are_same(self.tensors, tensors):
            return False
        local_tensors = _local(tensors, self.are_dtensors)
        return (
            _are_same(self.local_tensors, local_tensors)
            # `tensor.data = ...` and the like change what the very same tensor is.
            and _place(local_tensors) == self.place
            and list(map(private.spec_of, tensors)) == self.specs
            and not any(map(torch.Tensor.is_neg, local_tensors))
            and not any(map(torch.Tensor.is_conj, local_tensors))
        )


def _local(tensors: Sequence[torch.Tensor], are_dtensors: list[bool]) -> list[torch.Tensor]:
    return [
        private.local_tensor(tensor) if is_dtensor else tensor
        for tensor, is_dtensor in zip(tensors, are_dtensors, strict=True)
    ]


def _are_same(refs: list[ref[torch.Tensor]], tensors: Sequence[torch.Tensor]) -> bool:
    return all(map(is_, map(call, refs), tensors))


def _place(tensors: list[Any]) -> _Place:
    kind = torch.Tensor
    return (
        list(map(kind.data_ptr, tensors)), list(map(kind.size, tensors)),
        list(map(kind.stride, tensors)), list(map(_DTYPE, tensors)),
    )  # fmt: skip
