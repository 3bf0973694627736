"""Orbax to shardckpt: what an Orbax step becomes, and its conversion.

Layer: convert. Arrays keep their dtype and bits; scalars and strings become plain values; what is
empty (None, empty dicts and tuples) has no key, as in a flattened pytree, and is remembered in the
step's configuration, so that the way back gives it again.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardckpt.convert.boxes import boxes_along_chunks
from shardckpt.convert.orbax_read import DEFAULT_ITEM, OrbaxStep, TreeItem, open_item
from shardckpt.convert.orbax_tree import ARRAY_KINDS, EMPTY_KINDS, STRING
from shardckpt.convert.paths import KEY_DATA, KEY_IMPL, key_of, roles_of
from shardckpt.errors import UnsupportedStateError
from shardckpt.format.tagged import encode
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import whole
from shardckpt.geometry.dtypes import ITEMSIZE_BYTES
from shardckpt.state import Leaf, Shard, StateTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from shardckpt.convert.paths import Path

# What a batch of boxes may take, beside the encoded bytes and the decoded chunks it is made of.
_BOX_SHARE: Final = 4
_SCALAR: Final = "scalar"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the values of a shard are."""

    item: TreeItem
    name: str


@dataclass(frozen=True, slots=True)
class Incoming:
    """One Orbax step as shardckpt will hold it.

    Attributes:
        step: Its number.
        tree: Arrays and values.
        notes: What the way back needs; goes into the configuration.
        metrics: Figures.
        nbytes: Bytes of all arrays.
        num_zero_chunks: Chunks that an older Orbax left out because they held only zeros.
    """

    step: int
    tree: StateTree
    notes: dict[str, Any]
    metrics: dict[str, float]
    nbytes: int
    num_zero_chunks: int


def incoming(found: OrbaxStep, *, only_item: bool, keys: str, budget_bytes: int) -> Incoming:
    """Return what a step holds, every array known to be complete.

    Args:
        found: The step.
        only_item: The one item was asked for by name, so its tree is the whole state.
        keys: Glob of the keys to take.
        budget_bytes: Memory for boxes.

    Raises:
        CorruptCheckpointError: Something is missing or damaged.
        FormatError: Something is in a form that is not known here.
        UnsupportedStateError: An array's dtype is not known, or the tree is a single array.
    """
    opened = {name: open_item(name, place) for name, place in found.items.items()}
    leaves: list[Leaf] = []
    objects: dict[str, object] = {}
    notes: dict[str, Any] = {"items": [], "empty": {}, "dicts": []}
    for name, item in opened.items():
        bare = only_item or name in ("", DEFAULT_ITEM)
        prefix: Path = () if bare else (name,)
        notes["items"].append({"name": name or DEFAULT_ITEM, "prefix": key_of(prefix)})
        notes["dicts"] += [key_of((*prefix, *path)) for path in sorted(item.tree.dicts)]
        _add_item(item, prefix, keys, budget_bytes, leaves, objects, notes)
    for name, value in found.values.items():
        if fnmatch.fnmatchcase(name, keys):
            objects[key_of((name,))] = encode(value, name)
            notes["items"].append({"name": name, "prefix": key_of((name,)), "json": True})
    leaves.sort(key=lambda leaf: leaf.key)
    return Incoming(
        found.step, StateTree(tuple(leaves), objects, {}, {}), notes, dict(found.metrics),
        sum(leaf.spec.nbytes for leaf in leaves),
        sum(item.num_zero_chunks for item in opened.values()),
    )  # fmt: skip


def read_shards(wanted: Sequence[tuple[Leaf, Shard]]) -> list[np.ndarray[Any, Any]]:
    """Return the values of shards of an `Incoming`.

    Raises:
        CorruptCheckpointError: A chunk is damaged.
    """
    results: list[np.ndarray[Any, Any] | None] = [None] * len(wanted)
    by_item: dict[int, list[int]] = {}
    for index, (_, shard) in enumerate(wanted):
        assert isinstance(shard.data, _Source)
        by_item.setdefault(id(shard.data.item), []).append(index)
    for indices in by_item.values():
        sources = [(wanted[i][1].data, wanted[i][1].box) for i in indices]
        first = sources[0][0]
        assert isinstance(first, _Source)
        names = [(s.name, box) for s, box in sources if isinstance(s, _Source)]
        for index, values in zip(indices, first.item.folder.read(names), strict=True):
            results[index] = values
    return [values for values in results if values is not None]


def _add_item(
    item: TreeItem,
    prefix: Path,
    keys: str,
    budget_bytes: int,
    leaves: list[Leaf],
    objects: dict[str, object],
    notes: dict[str, Any],
) -> None:
    arrays = [node.path for node in item.tree.nodes if node.kind in ARRAY_KINDS]
    roles = roles_of([path for path in arrays if path])
    for node in item.tree.nodes:
        key = key_of((*prefix, *node.path))
        if not key:
            raise UnsupportedStateError(
                f"{item.folder}: the item is a single {node.kind}, so it has no key. Save it "
                "inside a dict."
            )
        if not fnmatch.fnmatchcase(key, keys):
            continue
        if node.kind in EMPTY_KINDS:
            notes["empty"][key] = node.kind
        elif node.kind == STRING:
            objects[key] = encode(item.strings[node.name], key)
        elif node.kind == _SCALAR:
            objects[key] = encode(_scalar(item, node.name), key)
        else:
            if node.name in item.key_impls:
                objects[f"{key}/{KEY_IMPL}"] = item.key_impls[node.name]
                key = f"{key}/{KEY_DATA}"
            leaves.append(_leaf(item, node.name, key, roles[node.path], budget_bytes))


def _leaf(item: TreeItem, name: str, key: str, role: str, budget_bytes: int) -> Leaf:
    stored = item.arrays[name]
    if stored.dtype not in ITEMSIZE_BYTES:
        raise UnsupportedStateError(
            f"key {key!r}: dtype {stored.dtype} is not known here. Cast it before it is saved, or "
            "leave it out by --keys."
        )
    spec = ArraySpec(stored.shape, stored.dtype)
    source = _Source(item, name)
    boxes = boxes_along_chunks(
        spec.shape, stored.chunk, spec.itemsize_bytes, budget_bytes // _BOX_SHARE
    )
    if len(boxes) <= 1:
        shards = (Shard(whole(spec.shape), source),) if boxes else ()
        return Leaf(key, spec, role, None, shards)
    return Leaf(key, spec, role, "boxes", tuple(Shard(box, source) for box in boxes))


def _scalar(item: TreeItem, name: str) -> bool | float | complex:
    (value,) = item.folder.read([(name, whole(item.arrays[name].shape))])
    found = value.item()
    assert isinstance(found, (bool, int, float, complex))
    return found
