"""Find and describe what an Orbax directory holds, checked before a byte of an array is read.

Layer: convert. Three places are understood: the root of a `CheckpointManager`
(`<root>/<step>/<item>/`), one step of it, and one item (what `StandardCheckpointer` writes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from shardckpt.convert.files import is_folder, is_there, names_in, read_json
from shardckpt.convert.orbax_tree import ARRAY_KINDS, STRING, Tree, parse_tree
from shardckpt.convert.zarr import ArrayFolder, StoredArray
from shardckpt.errors import CorruptCheckpointError, FormatError, StepNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

METADATA: Final = "_METADATA"
STEP_METADATA: Final = "_CHECKPOINT_METADATA"
COMMITTED: Final = "commit_success.txt"
TEMPORARY: Final = ".orbax-checkpoint-tmp"
DEFAULT_ITEM: Final = "default"
METRICS: Final = "metrics"
_JSON_FILES: Final = ("metadata", METRICS)
_STEP: Final = re.compile(r"(?:.*_)?(\d+)")


@dataclass(frozen=True, slots=True)
class TreeItem:
    """A pytree item: its tree, and every array of it known to be complete.

    Attributes:
        name: Name of the item; "" for a bare item.
        tree: What `_METADATA` says.
        arrays: By the name under which Orbax stores it.
        strings: Likewise.
        key_impls: Names of arrays that are typed random keys, with their implementation.
        num_zero_chunks: Chunks that an older Orbax left out because they held only zeros.
        folder: Reads the arrays.
    """

    name: str
    tree: Tree
    arrays: Mapping[str, StoredArray]
    strings: Mapping[str, str]
    key_impls: Mapping[str, str]
    num_zero_chunks: int
    folder: ArrayFolder


@dataclass(frozen=True, slots=True)
class OrbaxStep:
    """One committed step.

    Attributes:
        step: Its number.
        folder: Its directory.
        items: Name and directory of each item that is a pytree; the name is "" for a bare item.
        values: Content of items that are plain JSON, by name.
        metrics: Figures that `CheckpointManager.save(metrics=)` kept.
    """

    step: int
    folder: Path
    items: Mapping[str, Path]
    values: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def is_orbax(place: Path) -> bool:
    """Return whether something of Orbax lies here, committed or not."""
    names = names_in(place)
    return (
        is_item(place)
        or any(name.startswith(STEP_METADATA) for name in names)
        or any(TEMPORARY in name for name in names)
        or any(
            _STEP.fullmatch(name)
            and (is_there(place / name / STEP_METADATA) or is_there(place / name / COMMITTED))
            for name in names
        )
    )


def is_item(place: Path) -> bool:
    """Return whether a directory is an item that holds arrays."""
    return any(is_there(place / name) for name in (METADATA, "manifest.ocdbt"))


def find_steps(place: Path, step: int | None, item: str | None) -> list[OrbaxStep]:
    """Return the committed steps of a place, oldest first; or the one that was asked for.

    Args:
        place: Root, step or item.
        step: Only this one; the number of a bare item, whose directory need not tell.
        item: Only this item of each step.

    Raises:
        StepNotFoundError: The step or item is not there, or nothing is.
        CorruptCheckpointError: The step asked for was never committed, or files are missing.
        FormatError: An item was written by a handler that is not known here.
    """
    own = _STEP.fullmatch(place.name)
    if is_item(place):
        _check_committed(place)
        if item is not None:
            raise StepNotFoundError(f"{place} is one item; leave item {item!r} out")
        parent = _STEP.fullmatch(place.parent.name)
        number = next((int(m[1]) for m in (own, parent) if m), 0) if step is None else step
        return [OrbaxStep(number, place, {"": place})]
    if own and is_there(place / STEP_METADATA):
        if step is not None and step != int(own[1]):
            raise StepNotFoundError(f"{place} is step {int(own[1])}, not {step}")
        return [_open_step(place, int(own[1]), item)]
    found: dict[int, Path] = {}
    uncommitted: list[str] = []
    for name in names_in(place):
        matched = _STEP.fullmatch(name.partition(TEMPORARY)[0])
        if not matched or not is_folder(place / name):
            continue
        if TEMPORARY in name or not is_there(place / name / COMMITTED):
            uncommitted.append(name)
            if step == int(matched[1]) and TEMPORARY not in name:
                _check_committed(place / name)
        else:
            found[int(matched[1])] = place / name
    if step is not None and step not in found:
        others = [n for n in uncommitted if _STEP.fullmatch(n.partition(TEMPORARY)[0])]
        raise StepNotFoundError(
            f"{place}: step {step} is not committed; committed steps are {sorted(found)}, "
            f"unfinished ones {others}"
        )
    if not found:
        raise StepNotFoundError(
            f"{place}: no committed step of Orbax here; unfinished ones are {uncommitted}. Give "
            "the directory of a CheckpointManager, of one of its steps, or of one item."
        )
    chosen = sorted(found) if step is None else [step]
    return [_open_step(found[number], number, item) for number in chosen]


def open_item(name: str, place: Path) -> TreeItem:
    """Read an item's metadata and check that every chunk of every array is there.

    Raises:
        CorruptCheckpointError: Metadata or chunks are missing or damaged; names file and key.
        FormatError: It is in a form that is not known here.
    """
    what = place / METADATA
    if not is_there(what):
        raise CorruptCheckpointError(
            f"{what} is missing: nobody can say which arrays the item holds. Restore it with the "
            "code that saved it and save it again, or take another step."
        )
    tree = parse_tree(read_json(what), str(what))
    ocdbt = is_there(place / "manifest.ocdbt") if tree.is_ocdbt is None else tree.is_ocdbt
    if ocdbt and not is_there(place / "manifest.ocdbt"):
        raise CorruptCheckpointError(
            f"{place / 'manifest.ocdbt'} is missing: the arrays' database was not copied or not "
            "finished. Take another step."
        )
    folder = ArrayFolder(place, ocdbt=ocdbt, zarr3=tree.is_zarr3)
    stored = [node for node in tree.nodes if node.kind in ARRAY_KINDS]
    names = folder.names() if stored else frozenset()
    arrays: dict[str, StoredArray] = {}
    num_zero_chunks = 0
    for node in stored:
        array = folder.describe(node.name, names)
        if array.num_missing and tree.keeps_fill:
            raise CorruptCheckpointError(
                f"{place}, key {node.name!r}: {array.num_missing} of its chunks are missing, the "
                f"first is {array.missing}. They would be read as zeros; take another step."
            )
        num_zero_chunks += array.num_missing
        arrays[node.name] = array
    return TreeItem(
        name, tree, arrays, _strings(place, tree), _key_impls(place), num_zero_chunks, folder
    )


def _open_step(place: Path, number: int, only: str | None) -> OrbaxStep:
    _check_committed(place)
    said = read_json(place / STEP_METADATA) if is_there(place / STEP_METADATA) else {}
    handlers = said.get("item_handlers") if isinstance(said, dict) else None
    handlers = handlers if isinstance(handlers, dict) else {}
    names = [name for name in names_in(place) if is_folder(place / name)]
    missing = sorted(set(handlers) - set(names))
    if missing:
        raise CorruptCheckpointError(
            f"{place}: {STEP_METADATA} names the items {missing}, whose directories are missing"
        )
    if only is not None and only not in names:
        raise StepNotFoundError(f"{place}: there is no item {only!r}; items are {names}")
    items: dict[str, Path] = {}
    values: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    for name in names:
        kind = str(handlers.get(name, "")).rpartition(".")[2]
        json_file = next(
            (place / name / f for f in _JSON_FILES if is_there(place / name / f)), None
        )
        if name == METRICS and json_file is not None:
            metrics = _metrics(json_file)
        elif only not in (None, name):
            continue
        elif kind in ("StandardCheckpointHandler", "PyTreeCheckpointHandler") or is_item(
            place / name
        ):
            items[name] = place / name
        elif json_file is not None and kind in ("JsonCheckpointHandler", ""):
            values[name] = read_json(json_file)
        else:
            raise FormatError(
                f"{place / name}: item {name!r} was written by {kind or 'an unknown handler'}, "
                "which is not known here (StandardCheckpointHandler, PyTreeCheckpointHandler and "
                "JsonCheckpointHandler are). Choose another item by --item."
            )
    return OrbaxStep(number, place, items, values, metrics)


def _check_committed(place: Path) -> None:
    if TEMPORARY in place.name or not is_there(place / COMMITTED):
        raise CorruptCheckpointError(
            f"{place} was never committed: it has no {COMMITTED}. Take another step; where an "
            f"Orbax wrote it that knew no such file, vouch for it by making an empty {COMMITTED}."
        )


def _metrics(path: Path) -> dict[str, float]:
    data = read_json(path)
    if not isinstance(data, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in data.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _strings(place: Path, tree: Tree) -> dict[str, str]:
    wanted = [node.name for node in tree.nodes if node.kind == STRING]
    if not wanted:
        return {}
    path = place / "_strings.json"
    found = read_json(path)
    absent = [name for name in wanted if not isinstance(found.get(name), str)]
    if absent:
        raise CorruptCheckpointError(f"{path}: the strings {absent[:8]} are missing")
    return {name: found[name] for name in wanted}


def _key_impls(place: Path) -> dict[str, str]:
    """Return the implementation of every array that is a typed random key."""
    impls: dict[str, str] = {}
    folder = place / "array_metadatas"
    for name in names_in(folder):
        data = read_json(folder / name)
        try:
            for entry in data["array_metadatas"]:
                array = entry["array_metadata"]
                extra = array.get("ext_metadata") or {}
                if "random_key_impl" in extra:
                    impls[str(array["param_name"])] = str(extra["random_key_impl"])
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"{folder / name}: {error!r}") from error
    return impls
