"""What one rank holds, as data: hashed at every save, exchanged only when the hash is new. Pure.

Layer: save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shardckpt.format.manifest import BoxColumn, MeshColumn, layout_column
from shardckpt.format.sealed import digest
from shardckpt.geometry.layout import MeshLayout
from shardckpt.state import PerRankValue, StateTree

if TYPE_CHECKING:
    from collections.abc import Sequence


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """Keys, specs and layouts of one rank's state, without values.

    Attributes:
        keys: Arrays, sorted; the next four columns follow them.
        dtypes: Canonical names.
        shapes: Global shapes.
        roles: Roles.
        layout_ids: Index into `layouts`; -1 a whole copy; -2 boxes, listed in `boxes`.
        layouts: Distinct mesh layouts.
        boxes: For each array of irregular boxes: offsets and shapes of this rank's boxes.
        aliases: Tied key to stored key.
        object_keys: Values equal on all ranks.
        per_rank: Keys of this rank's own values, with their rule.
    """

    keys: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    roles: list[str]
    layout_ids: list[int]
    layouts: list[MeshColumn | BoxColumn]
    boxes: dict[str, list[int]]
    aliases: dict[str, str]
    object_keys: list[str]
    per_rank: dict[str, str]


WHOLE = -1
BOXES = -2


def structure_of(tree: StateTree) -> Structure:
    """Return the structure of a described state."""
    layouts: dict[MeshLayout, int] = {}
    columns: list[MeshColumn | BoxColumn] = []
    by_identity: dict[int, int] = {}
    layout_ids: list[int] = []
    boxes: dict[str, list[int]] = {}
    for leaf in tree.leaves:
        if isinstance(leaf.layout, MeshLayout):
            # Backends share layout objects, and hashing one with thousands of ranks per array is
            # slow.
            layout_id = by_identity.get(id(leaf.layout))
            if layout_id is None:
                layout_id = layouts.setdefault(leaf.layout, len(columns))
                if layout_id == len(columns):
                    columns.append(layout_column(leaf.layout))
                by_identity[id(leaf.layout)] = layout_id
            layout_ids.append(layout_id)
        elif leaf.layout is None:
            layout_ids.append(WHOLE)
        else:
            layout_ids.append(BOXES)
            boxes[leaf.key] = [n for s in leaf.shards for n in (*s.box.offsets, *s.box.shape)]
    return Structure(
        keys=[leaf.key for leaf in tree.leaves],
        dtypes=[leaf.spec.dtype for leaf in tree.leaves],
        shapes=[list(leaf.spec.shape) for leaf in tree.leaves],
        roles=[leaf.role for leaf in tree.leaves],
        layout_ids=layout_ids,
        layouts=columns,
        boxes=boxes,
        aliases=dict(tree.aliases),
        object_keys=sorted(tree.objects),
        per_rank={key: value.rule for key, value in sorted(tree.per_rank.items())},
    )


def encode_structure(structure: Structure) -> tuple[bytes, str]:
    """Return the canonical bytes of a structure and their digest."""
    data = msgspec.json.encode(structure, order="deterministic")
    return data, digest(data)


def has_structure_of(tree: StateTree, known: StateTree, changed: Sequence[int]) -> bool:
    """Return whether two described states differ at most in values and fences; cheap where True.

    Backends share specs, layouts and boxes between descriptions, so most comparisons are of
    identities.

    Args:
        tree: A described state.
        known: An earlier one.
        changed: Indexes of the leaves to compare; the others are known to be equal.
    """
    if len(tree.leaves) != len(known.leaves) or tree.objects.keys() != known.objects.keys():
        return False
    if tree.aliases != known.aliases or tree.per_rank.keys() != known.per_rank.keys():
        return False
    if any(value.rule != known.per_rank[key].rule for key, value in tree.per_rank.items()):
        return False
    for index in changed:
        leaf, other = tree.leaves[index], known.leaves[index]
        if (
            leaf.key != other.key
            or leaf.role != other.role
            or not (leaf.spec is other.spec or leaf.spec == other.spec)
            or not (leaf.layout is other.layout or leaf.layout == other.layout)
            or len(leaf.shards) != len(other.shards)
        ):
            return False
        for shard, known_shard in zip(leaf.shards, other.shards, strict=True):
            if not (shard.box is known_shard.box or shard.box == known_shard.box):
                return False
    return True


def without_data(tree: StateTree) -> StateTree:
    """Return the tree without the caller's memory and values."""
    leaves = tuple(
        msgspec.structs.replace(leaf, shards=tuple(type(s)(s.box, None) for s in leaf.shards))
        for leaf in tree.leaves
    )
    rules = {key: PerRankValue(None, value.rule) for key, value in tree.per_rank.items()}
    return StateTree(leaves, dict.fromkeys(tree.objects), rules, dict(tree.aliases))
