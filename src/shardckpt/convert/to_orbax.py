"""shardckpt to Orbax: one committed step as `<root>/<step>/<item>/`, as Orbax 0.12 writes it.

Layer: convert. Order: everything into `<root>/<step>.orbax-checkpoint-tmp`; all of it flushed; the
rename that makes the step exist; the root's names flushed.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from shardckpt.convert.boxes import chunk_shape, grid
from shardckpt.convert.files import commit_folder, make_folder, sync_tree, write_text
from shardckpt.convert.orbax_read import (
    COMMITTED,
    METADATA,
    METRICS,
    STEP_METADATA,
    TEMPORARY,
)
from shardckpt.convert.orbax_tree import Node, tree_json
from shardckpt.convert.zarr import ArrayFolder, StoredArray
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import whole
from shardckpt.load.plan import Wanted, plan_load
from shardckpt.load.read import run_load
from shardckpt.state import HostArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from shardckpt.format.manifest import SavedTensor
    from shardckpt.geometry.box import Box
    from shardckpt.load.open import OpenCheckpoint

    Values = np.ndarray[Any, Any]

_HANDLERS: Final = "orbax.checkpoint._src.handlers"
_TREE_HANDLER: Final = f"{_HANDLERS}.standard_checkpoint_handler.StandardCheckpointHandler"
_JSON_HANDLER: Final = f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler"
_MOST_ARRAYS: Final = 1024
# A transaction keeps what is written, plain and encoded, until it is committed.
_BATCH_SHARE: Final = 4


@dataclass(slots=True)
class OutgoingItem:
    """One pytree item to write.

    Attributes:
        nodes: Its tree.
        dicts: Dicts whose entries are named 0, 1, 2, ...
        saved: Arrays of the checkpoint, by node name.
        values: Arrays that are in memory: scalars.
        strings: By node name.
        key_impls: Names of typed random keys, with their implementation.
    """

    nodes: list[Node] = field(default_factory=list)
    dicts: set[tuple[str, ...]] = field(default_factory=set)
    saved: dict[str, SavedTensor] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)
    key_impls: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(tensor.spec.nbytes for tensor in self.saved.values())


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One step to write.

    Attributes:
        items: Pytrees by name.
        json_items: Plain values by name.
        metrics: Figures.
    """

    items: Mapping[str, OutgoingItem]
    json_items: Mapping[str, object]
    metrics: Mapping[str, float]


def write_step(
    root: Path, step: int, checkpoint: OpenCheckpoint, outgoing: Outgoing, budget_bytes: int
) -> None:
    """Write one step into the root of a `CheckpointManager`, in one atomic rename.

    Args:
        root: Directory of the manager.
        step: Its number.
        checkpoint: Where the arrays are.
        outgoing: What to write.
        budget_bytes: Most bytes of arrays in memory at once.

    Raises:
        CorruptCheckpointError: The source is damaged.
        UnsupportedStateError: Orbax cannot hold the tree.
        StorageError: The target cannot be written.
    """
    final = root / str(step)
    temporary = root / f"{step}{TEMPORARY}"
    started_ns = time.time_ns()
    handlers: dict[str, str] = {}
    for name, item in outgoing.items.items():
        handlers[name] = _TREE_HANDLER
        _write_item(temporary / name, item, checkpoint, budget_bytes)
        _write_marker(temporary / name, final / name)
    plain = dict(outgoing.json_items)
    if outgoing.metrics:
        plain[METRICS] = dict(outgoing.metrics)
    for name, value in plain.items():
        handlers[name] = _JSON_HANDLER
        make_folder(temporary / name)
        file = METRICS if name == METRICS else "metadata"
        write_text(temporary / name / file, json.dumps(value))
        _write_marker(temporary / name, final / name)
    facts = {
        "item_handlers": handlers,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started_ns,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    write_text(temporary / STEP_METADATA, json.dumps(facts))
    _write_marker(temporary, final)
    sync_tree(temporary)
    commit_folder(temporary, final)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype of a canonical name."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def _write_marker(folder: Path, final: Path) -> None:
    write_text(folder / COMMITTED, f"Checkpoint commit was successful to {final}")


def _write_item(
    folder: Path, item: OutgoingItem, checkpoint: OpenCheckpoint, budget_bytes: int
) -> None:
    make_folder(folder)
    metadata = tree_json(item.nodes, item.dicts)
    target = ArrayFolder(folder, ocdbt=True, zarr3=True)
    chunks: dict[str, tuple[int, ...]] = {}
    for created, parts in _batches(item, budget_bytes // _BATCH_SHARE, chunks):
        target.write(created, _filled(checkpoint, item, parts))
    write_text(folder / METADATA, json.dumps(metadata))
    if item.strings:
        write_text(folder / "_strings.json", json.dumps(item.strings))
    if item.key_impls:
        _write_random_keys(folder, item, chunks)


def _batches(
    item: OutgoingItem, budget_bytes: int, chunks: dict[str, tuple[int, ...]]
) -> Iterator[tuple[list[StoredArray], list[tuple[str, Box]]]]:
    """Yield arrays to make and chunks to write, each array with or before its first chunk."""
    created: list[StoredArray] = []
    parts: list[tuple[str, Box]] = []
    nbytes = 0
    for node in item.nodes:
        spec = _spec(item, node.name)
        if spec is None:
            continue
        saved = item.saved.get(node.name)
        chunk = (
            tuple(max(n, 1) for n in spec.shape)
            if saved is None
            else chunk_shape(spec.shape, saved.layout, spec.itemsize_bytes, budget_bytes)
        )
        chunks[node.name] = chunk
        if len(created) >= _MOST_ARRAYS:
            yield created, parts
            created, parts, nbytes = [], [], 0
        created.append(StoredArray(node.name, spec.shape, spec.dtype, chunk, 0, ""))
        if 0 in spec.shape:
            continue
        for box in grid(spec.shape, chunk):
            box_bytes = box.num_elements * spec.itemsize_bytes
            if parts and nbytes + box_bytes > budget_bytes:
                yield created, parts
                created, parts, nbytes = [], [], 0
            parts.append((node.name, box))
            nbytes += box_bytes
    if created or parts:
        yield created, parts


def _spec(item: OutgoingItem, name: str) -> ArraySpec | None:
    if name in item.saved:
        return item.saved[name].spec
    if name in item.values:
        return ArraySpec(item.values[name].shape, item.values[name].dtype.name)
    return None


def _filled(
    checkpoint: OpenCheckpoint, item: OutgoingItem, parts: Sequence[tuple[str, Box]]
) -> list[tuple[str, Box, Values]]:
    """Read the boxes from the checkpoint, every chunk verified."""
    wanted: list[Wanted] = []
    filled: list[tuple[str, Box, Values]] = []
    for name, box in parts:
        tensor = item.saved.get(name)
        if tensor is None:
            filled.append((name, whole(box.shape), item.values[name]))
            continue
        values = np.empty(box.shape, numpy_dtype(tensor.spec.dtype))
        memory = HostArray(
            values.__array_interface__["data"][0], box.shape, values.strides, values.itemsize,
            values,
        )  # fmt: skip
        wanted.append(Wanted(tensor, box, memory))
        filled.append((name, box, values))
    run_load(plan_load(checkpoint, wanted))
    return filled


def _write_random_keys(
    folder: Path, item: OutgoingItem, chunks: Mapping[str, tuple[int, ...]]
) -> None:
    """Say which arrays are typed random keys; Orbax keeps that beside its device arrays."""
    entries = [
        {
            "array_metadata": {
                "param_name": name,
                "write_shape": list(chunks[name]),
                "chunk_shape": list(chunks[name]),
                "ext_metadata": {"random_key_impl": impl},
            }
        }
        for name, impl in item.key_impls.items()
    ]
    make_folder(folder / "array_metadatas")
    write_text(folder / "array_metadatas" / "process_0", json.dumps({"array_metadatas": entries}))
    one_device = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
    shardings = {base64.b64encode(name.encode()).decode(): one_device for name in item.key_impls}
    write_text(folder / "_sharding", json.dumps(shardings))
