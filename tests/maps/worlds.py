"""Jobs of numpy arrays that pass for a torch or a JAX job: save on some ranks, load on others."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from shardckpt.checkpointer import CheckpointerCore, load_once
from shardckpt.load.loader import LoadOptions, LoadStats
from shardckpt.options import Retention, Staging
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.arrays import ArrayBackend, Sharded, shard_of
from shardckpt.testing.coords import MemoryCoordHub
from shardckpt.testing.jobs import raised, run_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardckpt.geometry.layout import MeshLayout
    from shardckpt.load.maps import ModelMap
    from shardckpt.state import StateTree
    from shardckpt.storage.base import Storage

_names = itertools.count()


def backend_named(name: str, roles: Mapping[str, str] | None = None) -> ArrayBackend:
    """Return a backend of numpy arrays under the name of a framework, with roles by key."""
    backend = ArrayBackend()
    backend.name = name

    def describe(state: Mapping[str, Any]) -> StateTree:
        tree = ArrayBackend.describe(backend, state)
        leaves = (
            msgspec.structs.replace(leaf, role=(roles or {}).get(leaf.key, leaf.role))
            for leaf in tree.leaves
        )
        return replace(tree, leaves=tuple(leaves))

    backend.describe = describe  # type: ignore[method-assign]
    return backend


def cut(
    arrays: Mapping[str, np.ndarray], layouts: Mapping[str, MeshLayout | None], rank: int
) -> dict[str, Any]:
    """Return one rank's part of every array; a layout of None is a whole copy."""
    found: dict[str, Any] = {}
    for key, value in arrays.items():
        layout = layouts.get(key)
        found[key] = value.copy() if layout is None else shard_of(value, layout, rank)
    return found


def save(
    framework: str,
    world_size: int,
    state_of: Callable[[int], dict[str, Any]],
    roles: Mapping[str, str] | None = None,
) -> Storage:
    """Save one state per rank, and return the store."""
    storage, hub = MemoryStorage(), MemoryCoordHub(world_size)

    def one(rank: int) -> None:
        core = CheckpointerCore(
            storage, backend_named(framework, roles), hub.coord(rank), save_every=None,
            retention=Retention(last=1), config={}, timeout_s=20, on_busy="wait",
            staging=Staging(), environment={}, namespace="save",
        )  # fmt: skip
        core.save(1, state_of(rank))
        core.close()

    raised(run_threads(world_size, one))
    return storage


def load(
    storage: Storage,
    framework: str,
    states: list[dict[str, Any]],
    model_map: ModelMap | None,
    roles: Mapping[str, str] | None = None,
    **options: Any,
) -> list[LoadStats]:
    """Load into one state per rank."""
    hub, namespace = MemoryCoordHub(len(states)), f"load {next(_names)}"

    def one(rank: int) -> LoadStats:
        return load_once(
            storage, backend_named(framework, roles), hub.coord(rank), states[rank], step=None,
            options=LoadOptions(model_map=model_map, **options), timeout_s=20,
            namespace=namespace, environment={},
        ).stats  # fmt: skip

    return raised(run_threads(len(states), one))


def memory_of(value: Any) -> list[np.ndarray]:
    """Return the arrays that a rank holds of a value."""
    if isinstance(value, Sharded):
        return [part for _, part in value.parts]
    return [value]


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """Overwrite a state's arrays with another value in every byte."""
    for value in state.values():
        for array in memory_of(value):
            array.reshape(-1).view(np.uint8)[...] = 0xA5
    return state
