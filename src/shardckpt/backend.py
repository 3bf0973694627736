"""The framework seam: what the engine asks of torch or JAX.

Layer: above state, below checkpointer. The core calls these in this order. Save: `describe`,
`owners` of the leaves it has staged before, `host_array` for every shard of the others. Restore:
`targets` builds what is wanted, the core compares it with what is saved and reads into
`host_target` of the targets, then `finish` hands over what is not an array and returns the restored
state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from shardckpt.geometry.array_spec import ArraySpec

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from shardckpt.state import HostArray, Leaf, StateTree


class SavedLeaf(msgspec.Struct, frozen=True):
    """What a checkpoint says of one saved array: spec, role, and whether it was cut over a mesh."""

    spec: ArraySpec
    role: str
    is_sharded: bool


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a checkpoint holds, without values of arrays.

    Attributes:
        leaves: By key.
        objects: Tagged JSON values by key.
        per_rank: Tagged JSON values of the rank asking, by key, after the rule for another world
            size; a key whose rule says `drop` is absent.
        aliases: Tied key to stored key.
        per_rank_dropped: Keys whose values another world size drops.
    """

    leaves: Mapping[str, SavedLeaf]
    objects: Mapping[str, object]
    per_rank: Mapping[str, object]
    aliases: Mapping[str, str]
    per_rank_dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Targets:
    """What a restore wants filled.

    Attributes:
        leaves: Arrays to fill, by key of the *target*; each shard's `data` is writable memory.
        object_keys: Keys of objects and per-rank values the target takes.
        finish_data: Opaque to the core; handed back to `finish`.
    """

    leaves: Mapping[str, Leaf]
    object_keys: frozenset[str]
    per_rank_keys: frozenset[str]
    finish_data: object


class Backend(Protocol):
    """One framework. `state` is what the user passes: a mapping of names to objects.

    Attributes:
        name: Of the framework.
        fills_in_place: Whether reading changes what the user's state holds, so that a failure half
            way leaves a mixture.
    """

    name: str
    fills_in_place: bool

    def describe(self, state: Any) -> StateTree:
        """Return what `state` holds, without copying arrays and without communication.

        Leaves that are lasting are returned again where nothing of them changed. A backend without
        such leaves is never asked for `owners`.

        Raises:
            UnsupportedStateError: A value cannot be stored exactly; names its path.
        """

    def host_array(self, data: object) -> HostArray:
        """Return the memory of a shard's `data`; what the engine cannot stage is copied first."""

    def owners(self, leaves: Sequence[Leaf]) -> list[object]:
        """Return what keeps the memory of leaves alive that are lasting."""

    def streams(self, devices: Collection[int]) -> Sequence[int]:
        """Return pairs of device and stream: where the caller uses arrays of `devices` now."""

    def targets(self, state: Any, saved: SavedState, *, only: tuple[str, ...]) -> Targets:
        """Return what `state` wants filled, given what is saved, changing nothing the user can see.

        State that an optimizer creates lazily is allocated here (detached from the optimizer) for
        every saved key whose parameter exists, and attached in `finish`.

        Args:
            state: The user's state.
            saved: What the checkpoint holds, keys already renamed to the target's names.
            only: Globs of keys wanted; empty means all.

        Raises:
            UnsupportedStateError: A value cannot be filled.
        """

    def host_target(self, data: object) -> HostArray:
        """Return writable host memory for a target shard; on a device, a buffer for `placed`."""

    def placed(self, data: object, host: HostArray) -> None:
        """Copy a filled `host_target` into the target where it is not the target's own memory."""

    def finish(self, targets: Targets, saved: SavedState) -> Any:
        """Attach created state, hand objects and per-rank values to their owners.

        Returns:
            The restored state: what the user passed where it is filled in place, else a new one.

        Raises:
            StateMismatchError: An owner refused its value.
        """
