"""What a shardckpt step becomes in Orbax: keys to paths, values to scalars and strings. Pure.

Layer: convert.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from shardckpt.convert.orbax_read import DEFAULT_ITEM
from shardckpt.convert.orbax_tree import Node
from shardckpt.convert.paths import KEY_DATA, KEY_IMPL, Path, path_of
from shardckpt.convert.to_orbax import Outgoing, OutgoingItem
from shardckpt.convert.zarr import can_store
from shardckpt.errors import FormatError, StepNotFoundError, UnsupportedStateError
from shardckpt.format.tagged import decode

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from shardckpt.format.manifest import Manifest, SavedTensor

_NOTES: Final = "orbax"
_INT_BITS: Final = 63
_MAX_PROBLEMS_SHOWN: Final = 10
_ARRAY: Final = "np.ndarray"


def notes_of(manifest: Manifest) -> dict[str, Any]:
    """Return what a conversion from Orbax left for the way back; empty where there was none."""
    config = msgspec.json.decode(manifest.config)
    notes = config.get(_NOTES) if isinstance(config, dict) else None
    return notes if isinstance(notes, dict) else {}


def outgoing(
    manifest: Manifest,
    tensors: Mapping[str, SavedTensor],
    metrics: Mapping[str, float],
    *,
    item: str | None,
    keys: str,
    empty: Collection[str] = (),
) -> Outgoing:
    """Return what to write for one step.

    Args:
        manifest: The step.
        tensors: Its arrays.
        metrics: Its figures.
        item: Name of the one item; of a step that came from Orbax, which of its items. None: the
            items it came from, or "default".
        keys: Glob of the keys to take.
        empty: Keys of empty nodes, besides those that Orbax itself had saved.

    Raises:
        UnsupportedStateError: Orbax cannot hold some values; lists their keys.
        StepNotFoundError: It came from Orbax and has no such item.
    """
    notes = notes_of(manifest)
    chosen = _items(notes, item)
    items: dict[str, OutgoingItem] = {}
    json_items: dict[str, object] = {}
    problems: list[str] = []

    def place(key: str) -> tuple[OutgoingItem, Path] | None:
        for name, prefix in chosen.items():
            if key == prefix or not prefix or key.startswith(f"{prefix}/"):
                path = path_of(key)[len(path_of(prefix)) if prefix else 0 :]
                return items.setdefault(name, OutgoingItem()), path
        return None

    impls = _key_impls(manifest)
    stored = {**{key: key for key in tensors}, **manifest.aliases}
    for key, source in sorted(stored.items()):
        found = place(key)
        if found is None or not fnmatch.fnmatchcase(key, keys):
            continue
        tensor = tensors[source]
        if not can_store(tensor.spec.dtype):
            problems.append(f"{key}: zarr has no dtype {tensor.spec.dtype}")
            continue
        target, path = found
        impl = impls.get(key)
        path = path if impl is None else path[:-1]
        node = Node(path, _ARRAY) if impl is None else Node(path, "jax.Array", tensor.spec.shape)
        target.nodes.append(node)
        target.saved[node.name] = tensor
        if impl is not None:
            target.key_impls[node.name] = impl
    json_names = {i["prefix"]: i["name"] for i in notes.get("items", []) if i.get("json")}
    for key, raw in sorted(manifest.objects.items()):
        is_impl = f"{key.removesuffix(KEY_IMPL)}{KEY_DATA}" in impls and key.endswith(
            f"/{KEY_IMPL}"
        )
        if is_impl or not fnmatch.fnmatchcase(key, keys):
            continue
        try:
            value = decode(msgspec.json.decode(raw), what=key)
        except FormatError:
            problems.append(f"{key}: a value of {manifest.framework} that Orbax does not know")
            continue
        if key in json_names:
            if item in (None, json_names[key]):
                json_items[json_names[key]] = value
        elif (found := place(key)) is not None:
            _add_value(*found, value, key, problems)
    problems += [
        f"{key}: values that differ by rank have no place in Orbax"
        for key in sorted(manifest.per_rank)
        if fnmatch.fnmatchcase(key, keys)
    ]
    if problems:
        raise _unsupported(manifest.step, problems)
    for key, kind in {**dict.fromkeys(empty, "None"), **notes.get("empty", {})}.items():
        found = place(key)
        if found is not None and fnmatch.fnmatchcase(key, keys):
            found[0].nodes.append(Node(found[1], str(kind)))
    for key in notes.get("dicts", []):
        found = place(key)
        if found is not None:
            found[0].dicts.add(found[1])
    return Outgoing(items, json_items, metrics)


def _key_impls(manifest: Manifest) -> dict[str, str]:
    """Return the implementation of typed random keys, by the key of their words."""
    impls: dict[str, str] = {}
    for key in manifest.keys:
        if key.endswith(f"/{KEY_DATA}"):
            raw = manifest.objects.get(f"{key.removesuffix(KEY_DATA)}{KEY_IMPL}")
            impl = None if raw is None else msgspec.json.decode(raw)
            if isinstance(impl, str):
                impls[key] = impl
    return impls


def _items(notes: Mapping[str, Any], item: str | None) -> dict[str, str]:
    """Return the prefix of keys of each item."""
    known = {i["name"]: str(i["prefix"]) for i in notes.get("items", []) if not i.get("json")}
    if not known:
        return {item or DEFAULT_ITEM: ""}
    if item is None:
        return known
    if len(known) == 1 and not next(iter(known.values())):
        return {item: ""}
    json_names = [i["name"] for i in notes["items"] if i.get("json")]
    if item not in known and item not in json_names:
        raise StepNotFoundError(
            f"there is no item {item!r}; this step came from Orbax with the items "
            f"{sorted([*known, *json_names])}"
        )
    return {item: known[item]} if item in known else {}


def _add_value(
    item: OutgoingItem, path: Path, value: object, key: str, problems: list[str]
) -> None:
    """Add a plain value; what has parts becomes a subtree, as in any pytree."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value) and value:
        for name, part in value.items():
            _add_value(item, (*path, name), part, f"{key}/{name}", problems)
        return
    if isinstance(value, (list, tuple)) and value:
        for index, part in enumerate(value):
            _add_value(item, (*path, str(index)), part, f"{key}/{index}", problems)
        return
    empty = {dict: "Dict", list: "List", tuple: "Tuple", type(None): "None"}.get(type(value))
    node = Node(path, empty or "")
    if isinstance(value, str):
        node = Node(path, "string")
        item.strings[node.name] = value
    elif isinstance(value, (np.ndarray, np.generic)):
        node = Node(path, _ARRAY)
        item.values[node.name] = np.asarray(value)
    elif isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= _INT_BITS):
        node = Node(path, "scalar")
        item.values[node.name] = np.asarray(value)
    elif empty is None:
        problems.append(f"{key}: a {type(value).__name__} has no place in Orbax")
        return
    item.nodes.append(node)


def _unsupported(step: int, problems: list[str]) -> UnsupportedStateError:
    shown = "\n  ".join(problems[:_MAX_PROBLEMS_SHOWN])
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    tail = f"\n  and {more} more" if more > 0 else ""
    return UnsupportedStateError(
        f"step {step} cannot be written for Orbax ({len(problems)} keys):\n  {shown}{tail}\n"
        "Choose the arrays that can by --keys, for example --keys 'model/*'."
    )
