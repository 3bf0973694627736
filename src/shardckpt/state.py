"""Framework-neutral state: what a backend tells the engine about a training state.

Layer: state. A state is arrays (leaves), plain values (objects) and values that differ by rank
(per_rank). What is made anew for every array at every save is a Struct: a frozen dataclass takes
seven times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from shardckpt.errors import UnsupportedStateError
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box, Shape
from shardckpt.geometry.layout import MeshLayout
from shardckpt.options import PER_RANK_RULES, PerRankRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


HOST: Final = -1


class HostArray(msgspec.Struct, frozen=True, gc=False):
    """Memory of one shard on the host, maybe strided; valid while `owner` is referenced.

    Attributes:
        address: Address of element 0.
        shape: Elements per dim.
        strides_bytes: Bytes from one index to the next, per dim.
        itemsize_bytes: Bytes of an element.
        owner: Whatever keeps the memory alive.
        device: For a save: the CUDA device whose memory it is, -1 for the host.
    """

    address: int
    shape: Shape
    strides_bytes: tuple[int, ...]
    itemsize_bytes: int
    owner: object
    device: int = HOST

    @property
    def is_contiguous(self) -> bool:
        """Return whether the elements lie in C order without gaps."""
        return _is_contiguous(self.shape, self.strides_bytes, self.itemsize_bytes)


@lru_cache(maxsize=4096)
def _is_contiguous(shape: Shape, strides_bytes: tuple[int, ...], itemsize_bytes: int) -> bool:
    expected = itemsize_bytes
    for size, stride in zip(reversed(shape), reversed(strides_bytes), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


class Shard(msgspec.Struct, frozen=True, gc=False):
    """The part of one array that this rank holds: its box and the framework's handle of the memory.

    `data` is opaque to the core; `Backend.host_array` turns it into a `HostArray`.
    """

    box: Box
    data: object


class Leaf(msgspec.Struct, frozen=True, gc=False):
    """One array of the state.

    Attributes:
        key: Path in the state, for example `model/layers.0.weight`.
        spec: Global shape and dtype.
        role: Meaning across frameworks (`param`, `buffer`, `adam_m`, `adam_v`, `count`, `other`).
        layout: Where the shards lie: a mesh layout; None where every rank that has this key holds a
            whole copy; "boxes" where `shards` are irregular and other ranks hold the rest.
        shards: What this rank holds; empty boxes left out, no replica twice.
        fence: 0 where it must be copied before `save` returns; else who announces its changes: it
            may be copied later, until `fence` is called for this number.
        is_lasting: Whether the backend returns this very object again for as long as all of it is
            as it was, the place of its memory included. It keeps no memory alive.
    """

    key: str
    spec: ArraySpec
    role: str
    layout: MeshLayout | Literal["boxes"] | None
    shards: tuple[Shard, ...]
    fence: int = 0
    is_lasting: bool = False


@dataclass(frozen=True, slots=True)
class PerRank:
    """Marks a value or stateful object of the user's state as belonging to one rank each.

    Attributes:
        value: A plain value, or an object with `state_dict` and `load_state_dict`.
        rule: What a restore on another world size does: "error", "rank0" or "drop".
    """

    value: object
    rule: PerRankRule = "error"

    def __post_init__(self) -> None:
        """Refuse an unknown rule.

        Raises:
            ValueError: The rule is not one of the three.
        """
        if self.rule not in PER_RANK_RULES:
            raise ValueError(
                f"PerRank rule is {self.rule!r}; use one of {', '.join(PER_RANK_RULES)}"
            )


def as_per_rank(value: object) -> PerRank | None:
    """Return the PerRank that a value is, or that a loader of torchdata stands for; else None."""
    if isinstance(value, PerRank):
        return value
    if any(
        c.__name__ == "StatefulDataLoader" and c.__module__.startswith("torchdata")
        for c in type(value).__mro__
    ):
        return PerRank(value, "error")
    return None


@dataclass(frozen=True, slots=True)
class PerRankValue:
    """A value of this rank alone (tagged JSON) and the rule for another world size."""

    value: object
    rule: PerRankRule


@dataclass(frozen=True, slots=True)
class StateTree:
    """A described state.

    Attributes:
        leaves: Arrays, sorted by key.
        objects: Values equal on all ranks, by key (tagged JSON values: see format.tagged).
        per_rank: Values of this rank alone, by key.
        aliases: Key of a tied array to the key under which its bytes are stored.
    """

    leaves: tuple[Leaf, ...]
    objects: Mapping[str, object]
    per_rank: Mapping[str, PerRankValue]
    aliases: Mapping[str, str]


def check_distinct(keys: Sequence[str]) -> None:
    """Refuse two parts of a state that have one key.

    Raises:
        UnsupportedStateError: Names the key.
    """
    if len(set(keys)) == len(keys):
        return
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise UnsupportedStateError(
                f"{key}: two parts of the state have this key (dict keys such as 1 and '1'?); "
                "rename one of them"
            )
        seen.add(key)
