"""Convert: from one place to another, in whichever direction, one step after the other.

Layer: convert. Everything that can be refused is refused before the first byte is written: what is
missing, unknown or not supported, a target that is there, too little room.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from shardckpt.catalog.store import Catalog
from shardckpt.convert.files import free_bytes, is_there, names_in
from shardckpt.convert.from_orbax import Incoming, incoming, read_shards
from shardckpt.convert.orbax_read import TEMPORARY, find_steps, is_orbax
from shardckpt.convert.outgoing import outgoing
from shardckpt.convert.state_write import StepWriter
from shardckpt.convert.to_orbax import write_step
from shardckpt.convert.zarr import tensorstore
from shardckpt.errors import FormatError, StorageError, StoreNotFoundError
from shardckpt.format.root import STORE_KEY
from shardckpt.format.tagged import encode
from shardckpt.load.open import OpenCheckpoint
from shardckpt.provenance import environment_facts, writer_name
from shardckpt.save.commit import Described
from shardckpt.storage.open import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from shardckpt.convert.to_orbax import Outgoing
    from shardckpt.format.manifest import Manifest, SavedTensor
    from shardckpt.format.root import Entry

    Chosen = Callable[[Manifest, Mapping[str, SavedTensor], Mapping[str, float]], Outgoing]

Kind = Literal["orbax", "shardckpt"]

BUDGET_BYTES: Final = 64 << 20
_MIN_BUDGET_BYTES: Final = 1 << 20
# Names, tables and metadata beside the arrays.
_ROOM_BYTES: Final = 1 << 20
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did.

    Attributes:
        to: What was written.
        steps: Its steps, oldest first.
        num_arrays: Arrays of all steps.
        nbytes: Their bytes.
        seconds: How long it took.
    """

    to: Kind
    steps: tuple[int, ...]
    num_arrays: int
    nbytes: int
    seconds: float


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    step: int | None = None,
    item: str | None = None,
    to: Kind | None = None,
    keys: str = "*",
    empty: Collection[str] = (),
    budget_bytes: int = BUDGET_BYTES,
    progress: Callable[[str], None] = _logger.info,
) -> Converted:
    """Convert committed steps from Orbax to a new store, or from a store to Orbax.

    Args:
        source: A store, the directory of a `CheckpointManager`, one of its steps, or one item.
        target: A directory that is absent or empty.
        step: Only this step; all by default.
        item: From Orbax: only this item, its tree being the whole state. To Orbax: what the item is
            called.
        to: What to write; by default what the source is not.
        keys: Glob of the keys to take.
        empty: To Orbax: keys of empty nodes (`optax.EmptyState()`) of the tree it will be restored
            into; those of a step that came from Orbax are known.
        budget_bytes: Most bytes of arrays in memory at once; a larger chunk of an Orbax array is
            taken whole, because nobody can read a part of it.
        progress: Told once for every step.

    Raises:
        ValueError: The source is of the kind to be written, or the budget is too small.
        StoreNotFoundError: The source is neither.
        StepNotFoundError: There is no such step or item.
        CorruptCheckpointError: The source is damaged or incomplete.
        FormatError: The source is in a form that is not known here.
        UnsupportedStateError: The target cannot hold a value; names its key.
        StorageError: The target is there already, has no room, or cannot be written.
        MissingDependencyError: tensorstore is not installed.
    """
    if budget_bytes < _MIN_BUDGET_BYTES:
        raise ValueError(f"budget_bytes is {budget_bytes}; use at least {_MIN_BUDGET_BYTES}")
    kind = _kind_of(source)
    wanted: Kind = "shardckpt" if kind == "orbax" else "orbax"
    if to is not None and to != wanted:
        raise ValueError(
            f"{os.fspath(source)} is a checkpoint of {kind} already; use --to {wanted}"
        )
    tensorstore()
    started = time.monotonic()
    if kind == "orbax":
        found = _from_orbax(Path(source), target, step, item, keys, budget_bytes, progress)
    else:
        chosen = partial(outgoing, item=item, keys=keys, empty=empty)
        found = _to_orbax(source, Path(target), step, chosen, budget_bytes, progress)
    steps, num_arrays, nbytes = found
    return Converted(wanted, tuple(steps), num_arrays, nbytes, time.monotonic() - started)


def _kind_of(source: str | os.PathLike[str]) -> Kind:
    try:
        storage = open_storage(source)
        if STORE_KEY in storage.list(""):
            return "shardckpt"
    except StorageError:
        if not is_there(Path(source)):
            raise
    if is_orbax(Path(source)):
        return "orbax"
    raise StoreNotFoundError(
        f"{os.fspath(source)}: neither a store of shardckpt (no {STORE_KEY} file) nor a checkpoint "
        "of Orbax (no committed steps, no _METADATA). Check the path."
    )


def _from_orbax(
    source: Path,
    target: str | os.PathLike[str],
    step: int | None,
    item: str | None,
    keys: str,
    budget_bytes: int,
    progress: Callable[[str], None],
) -> tuple[list[int], int, int]:
    for name in names_in(source):
        if TEMPORARY in name:
            progress(f"{name}: left out, it was never committed")
    found = [
        incoming(one, only_item=item is not None, keys=keys, budget_bytes=budget_bytes)
        for one in find_steps(source, step, item)
    ]
    _check_not_empty(found, source, keys)
    storage = open_storage(target)
    if storage.list(""):
        raise StorageError(
            f"{storage.url} is not empty; conversions make new stores only. Give another place, "
            "or remove what an earlier conversion left there."
        )
    _check_room(Path(storage.url), sum(one.nbytes for one in found), len(found))
    catalog = Catalog(storage, writer=writer_name())
    root = catalog.create()
    writer, root = catalog.take_over()
    for number, one in enumerate(found, 1):
        _warn_of_zeros(one, source)
        config = msgspec.json.encode(encode({"orbax": one.notes}, "config"))
        facts = environment_facts({"converted_from": f"Orbax, {source}"}, 1)
        # What Orbax saves is a state of JAX, and model maps read it as one.
        described = Described("jax", root.store_id, msgspec.Raw(config), facts)
        if number == 1:
            steps = StepWriter(catalog, writer, described, budget_bytes // 2)
        steps.described = described
        steps.write(one.step, one.tree, read_shards, one.metrics)
        progress(
            f"step {one.step}: {len(one.tree.leaves)} arrays, {one.nbytes / 2**20:.1f} MiB "
            f"({number} of {len(found)})"
        )
    num_arrays = sum(len(one.tree.leaves) for one in found)
    return [one.step for one in found], num_arrays, sum(one.nbytes for one in found)


def _to_orbax(
    source: str | os.PathLike[str],
    target: Path,
    step: int | None,
    chosen: Chosen,
    budget_bytes: int,
    progress: Callable[[str], None],
) -> tuple[list[int], int, int]:
    catalog = Catalog(open_storage(source), writer=writer_name())
    root = catalog.newest()
    entries: Sequence[Entry] = root.current if step is None else [catalog.find(root, step)]
    newest = {entry.step: entry for entry in entries}
    if not newest:
        raise StoreNotFoundError(f"{os.fspath(source)}: the store holds no committed step")
    if names_in(target):
        raise StorageError(
            f"{target} is not empty; conversions make new directories only. Give another place, "
            "or remove what an earlier conversion left there."
        )
    plans = {entry.attempt: _planned_bytes(catalog, entry, chosen) for entry in newest.values()}
    nbytes = sum(plans.values())
    _check_room(target, nbytes, len(plans))
    num_arrays = 0
    for number, entry in enumerate(newest.values(), 1):
        lease = catalog.lease(entry.attempt)
        try:
            num_arrays += _write_entry(catalog, entry, target, chosen, budget_bytes)
        finally:
            if lease is not None:
                lease.release()
        progress(
            f"step {entry.step}: {plans[entry.attempt] / 2**20:.1f} MiB ({number} of {len(newest)})"
        )
    return list(newest), num_arrays, nbytes


def _planned_bytes(catalog: Catalog, entry: Entry, chosen: Chosen) -> int:
    """Return the bytes of arrays that one step will have, or raise why it cannot be written."""
    checkpoint = OpenCheckpoint(catalog.storage, entry.attempt, entry.manifest)
    plan = chosen(checkpoint.manifest, checkpoint.tensors, entry.metrics)
    return sum(i.nbytes for i in plan.items.values())


def _write_entry(
    catalog: Catalog, entry: Entry, target: Path, chosen: Chosen, budget_bytes: int
) -> int:
    checkpoint = OpenCheckpoint(catalog.storage, entry.attempt, entry.manifest)
    try:
        plan = chosen(checkpoint.manifest, checkpoint.tensors, entry.metrics)
        write_step(target, entry.step, checkpoint, plan, budget_bytes)
    finally:
        checkpoint.close()
    return sum(len(i.saved) for i in plan.items.values())


def _check_not_empty(found: Sequence[Incoming], source: Path, keys: str) -> None:
    empty = [one.step for one in found if not one.tree.leaves and not one.tree.objects]
    if empty:
        raise FormatError(f"{source}: steps {empty} hold nothing that matches --keys {keys!r}")


def _warn_of_zeros(one: Incoming, source: Path) -> None:
    if one.num_zero_chunks:
        _logger.warning(
            "%s, step %d: %d chunks are absent; the Orbax that wrote it left out chunks of zeros, "
            "so they are taken as zeros. It cannot be told whether one was lost.",
            source, one.step, one.num_zero_chunks,
        )  # fmt: skip


def _check_room(target: Path, nbytes: int, num_steps: int) -> None:
    needed = nbytes + num_steps * _ROOM_BYTES
    free = free_bytes(target)
    if needed > free:
        raise StorageError(
            f"{target}: the conversion writes up to {needed} bytes, and {free} are free. Nothing "
            "was written. Make room, give another place, or choose one step by --step."
        )
