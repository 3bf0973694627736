"""A backend of plain numpy arrays, so that the engine's tests need no framework.

Layer: testing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from shardckpt.backend import SavedState, Targets
from shardckpt.errors import UnsupportedStateError
from shardckpt.format.tagged import decode, encode
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box, Shape, whole
from shardckpt.state import HostArray, Leaf, PerRank, PerRankValue, Shard, StateTree

if TYPE_CHECKING:
    from shardckpt.geometry.layout import MeshLayout


@dataclass(frozen=True, slots=True)
class Sharded:
    """One rank's part of a global array.

    Attributes:
        global_shape: Shape of the whole array.
        layout: Where it lies; "boxes" for irregular parts.
        parts: Box and memory of each part this rank holds.
    """

    global_shape: Shape
    layout: MeshLayout | Literal["boxes"]
    parts: tuple[tuple[Box, np.ndarray[Any, Any]], ...]


@dataclass(frozen=True, slots=True)
class Fenced:
    """An array that may be copied late: whoever changes it calls `fence(group)` first.

    Attributes:
        value: The array.
        group: From 1.
    """

    value: np.ndarray[Any, Any] | Sharded
    group: int = 1


def shard_of(array: np.ndarray[Any, Any], layout: MeshLayout, rank: int) -> Sharded:
    """Return the part of a known global array that `rank` holds under `layout`, as a copy."""
    coordinate = layout.coordinate(rank)
    if coordinate is None:
        return Sharded(array.shape, layout, ())
    box = layout.box_at(coordinate, array.shape)
    part = array[tuple(slice(a, b) for a, b in zip(box.offsets, box.stop, strict=True))]
    return Sharded(array.shape, layout, ((box, part.copy()),))


@final
class ArrayBackend:
    """State maps names to numpy arrays, `Sharded`, `Fenced`, `PerRank` or plain values."""

    name = "numpy"
    fills_in_place = True

    def describe(self, state: Mapping[str, Any]) -> StateTree:
        """Return what the mapping holds."""
        leaves: list[Leaf] = []
        objects: dict[str, object] = {}
        per_rank: dict[str, PerRankValue] = {}
        for key, value in sorted(state.items()):
            if isinstance(value, Fenced):
                leaves.append(_leaf(key, value.value, value.group))
            elif isinstance(value, (np.ndarray, Sharded)):
                leaves.append(_leaf(key, value))
            elif isinstance(value, PerRank):
                per_rank[key] = PerRankValue(encode(value.value, key), value.rule)
            else:
                objects[key] = encode(value, key)
        return StateTree(tuple(leaves), objects, per_rank, {})

    def host_array(self, data: object) -> HostArray:
        """Return the array's memory."""
        assert isinstance(data, np.ndarray)
        return HostArray(
            data.__array_interface__["data"][0], data.shape, data.strides, data.itemsize, data
        )

    def owners(self, leaves: Sequence[Leaf]) -> list[object]:
        """Return nothing: no leaf is returned twice."""
        assert not leaves
        return []

    def streams(self, devices: Collection[int]) -> Sequence[int]:
        """Return nothing: there are no devices."""
        del devices
        return ()

    def targets(
        self, state: Mapping[str, Any], saved: SavedState, *, only: tuple[str, ...]
    ) -> Targets:
        """Return every array of the mapping as a target."""
        del saved, only
        tree = self.describe(state)
        return Targets(
            {leaf.key: leaf for leaf in tree.leaves},
            frozenset(tree.objects),
            frozenset(tree.per_rank),
            state,
        )

    def host_target(self, data: object) -> HostArray:
        """Return the array's memory."""
        return self.host_array(data)

    def placed(self, data: object, host: HostArray) -> None:
        """Do nothing: targets are filled in place."""

    def finish(self, targets: Targets, saved: SavedState) -> Mapping[str, Any]:
        """Replace plain values in the mapping and return it."""
        state = targets.finish_data
        assert isinstance(state, MutableMapping)
        for key in targets.object_keys & saved.objects.keys():
            state[key] = decode(saved.objects[key])
        for key in targets.per_rank_keys & saved.per_rank.keys():
            state[key] = PerRank(decode(saved.per_rank[key]), state[key].rule)
        return state


def _leaf(key: str, value: np.ndarray[Any, Any] | Sharded, fence: int = 0) -> Leaf:
    if isinstance(value, Sharded):
        if not value.parts:
            raise UnsupportedStateError(f"{key}: a rank without a part must leave the key out")
        spec = ArraySpec(value.global_shape, value.parts[0][1].dtype.name)
        shards = tuple(Shard(box, part) for box, part in value.parts if box.num_elements)
        return Leaf(key, spec, "param", value.layout, shards, fence)
    box = whole(value.shape)
    shards = (Shard(box, value),) if box.num_elements else ()
    return Leaf(key, ArraySpec(value.shape, value.dtype.name), "param", None, shards, fence)
