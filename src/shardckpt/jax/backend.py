"""The JAX side of the framework seam: any pytree, taken apart and put together anew.

Layer: jax. No computation and no communication: what other processes hold follows from shardings.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

import jax
import numpy as np
from jax import tree_util
from jax.sharding import SingleDeviceSharding

from shardckpt import native
from shardckpt.backend import SavedState, Targets
from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.geometry.box import whole
from shardckpt.jax import copies, private
from shardckpt.jax.copies import Buffer, Held, Target
from shardckpt.jax.leaves import OTHER, Tree, Trees, is_key_array
from shardckpt.jax.shards import Shards, box_of, numpy_leaf, spec_of
from shardckpt.jax.values import (
    describe_object,
    describe_per_rank,
    give,
    give_per_rank,
)
from shardckpt.load.check import is_wanted
from shardckpt.state import (
    HostArray,
    Leaf,
    PerRankValue,
    Shard,
    StateTree,
    as_per_rank,
    check_distinct,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

# A typed key is stored as its words, beside the name of what makes random numbers of them.
_WORDS: Final = "key_data"
_IMPL: Final = "impl"
_logger = logging.getLogger("shardckpt")


@dataclass(slots=True)
class _Filled:
    """A leaf whose place an array read takes: `target` of JAX, or `buffer` for numpy."""

    stored: str
    target: Target | None = None
    buffer: Buffer | None = None
    impl: str | None = None
    is_scalar: bool = False


@dataclass(slots=True)
class _Finish:
    """What `finish` puts together.

    Attributes:
        trees: The user's values, taken apart.
        filled: Leaves that are arrays, by key.
        only: Globs of keys wanted.
    """

    trees: dict[str, Tree]
    only: tuple[str, ...]
    filled: dict[str, _Filled] = field(default_factory=dict)


@final
class JaxBackend:
    """State maps names to pytrees of arrays, typed keys, plain values and stateful objects.

    Keys: `<name>/<path>`; a typed key is `<key>/key_data` and `<key>/impl`. Not thread-safe.
    """

    name = "jax"
    fills_in_place = False

    def __init__(self, *, overlap: bool = False) -> None:
        """Start with nothing cached.

        Args:
            overlap: Whether arrays in host memory may be copied after `save` returned, which keeps
                them from being donated until they are.
        """
        self._trees = Trees()
        self._shards = Shards()
        self._overlap = overlap
        self._cuda_problem: str | None = None

    def describe(self, state: Mapping[str, Any]) -> StateTree:
        """Return what `state` holds, once it is computed; without copies and communication.

        Raises:
            UnsupportedStateError: A value cannot be stored exactly; names its key.
        """
        trees = self._trees.of(state)
        _wait_until_computed(trees.values())
        leaves: list[Leaf] = []
        objects: dict[str, object] = {}
        per_rank: dict[str, PerRankValue] = {}
        for key, role, value in _items(trees):
            if isinstance(value, jax.Array):
                leaf = self._array_leaf(key, role, value, objects)
                if leaf is not None:
                    leaves.append(leaf)
            elif isinstance(value, (np.ndarray, np.generic)):
                leaves.append(numpy_leaf(key, _plain(key, value), role))
            elif (marked := as_per_rank(value)) is not None:
                per_rank[key] = describe_per_rank(key, marked)
            else:
                objects[key] = describe_object(key, value)
        leaves.sort(key=lambda leaf: leaf.key)
        check_distinct([*(leaf.key for leaf in leaves), *objects, *per_rank])
        return StateTree(tuple(leaves), objects, per_rank, {})

    def host_array(self, data: object) -> HostArray:
        """Return the memory of a shard; what the engine cannot stage is copied to the host."""
        if isinstance(data, np.ndarray):
            return copies.numpy_array(data)
        assert isinstance(data, Held)
        return copies.host_array(data, may_stay_on_device=self._stages(data))

    def owners(self, leaves: Sequence[Leaf]) -> list[object]:
        """Return nothing: arrays are never changed, so every save describes new ones."""
        assert not leaves
        return []

    def streams(self, devices: Collection[int]) -> Sequence[int]:
        """Return the default stream of each device: the arrays were waited for, so any will do."""
        return [number for device in sorted(devices) for number in (device, 0)]

    def targets(
        self, state: Mapping[str, Any], saved: SavedState, *, only: tuple[str, ...]
    ) -> Targets:
        """Return what `state` wants filled, given what is saved; changes nothing.

        Args:
            state: Arrays, or `ShapeDtypeStruct`s in their place, and whatever else is restored.
            saved: What the checkpoint holds, under the target's names.
            only: Globs of keys wanted; empty means all.

        Raises:
            UnsupportedStateError: A value cannot be filled.
            StateMismatchError: Typed keys of another implementation.
        """
        finish = _Finish(self._trees.of(state), only)
        leaves: dict[str, Leaf] = {}
        object_keys: set[str] = set()
        per_rank_keys: set[str] = set()
        problems: list[str] = []
        for key, role, value in _items(finish.trees):
            if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
                filled, leaf = self._target(key, role or OTHER, value)
                if filled.impl is not None:
                    object_keys.add(f"{key}/{_IMPL}")
                    problems += _impl_problem(key, filled.impl, saved, only)
            elif isinstance(value, (np.ndarray, np.generic)):
                filled, leaf = _numpy_target(key, role or OTHER, value)
            elif as_per_rank(value) is not None:
                per_rank_keys.add(key)
                continue
            else:
                object_keys.add(key)
                continue
            leaves[leaf.key] = leaf
            finish.filled[key] = filled
        if problems:
            raise StateMismatchError("\n".join(problems), tuple(problems))
        in_order = {key: leaves[key] for key in sorted(leaves)}
        wanted = frozenset(key for key in object_keys if is_wanted(key, only))
        own = frozenset(key for key in per_rank_keys if is_wanted(key, only))
        return Targets(in_order, wanted, own, finish)

    def host_target(self, data: object) -> HostArray:
        """Return the memory from which the part of an array will be made."""
        assert isinstance(data, Buffer)
        return data.host_array()

    def placed(self, data: object, host: HostArray) -> None:
        """Do nothing: arrays are made in `finish`, all at once."""

    def finish(self, targets: Targets, saved: SavedState) -> dict[str, Any]:
        """Make the arrays and return the new state, in the target's own containers.

        What was not loaded stays what it was in the target.

        Raises:
            StateMismatchError: An object refused its value.
        """
        finish = targets.finish_data
        assert isinstance(finish, _Finish)
        loaded = {
            key: filled
            for key, filled in finish.filled.items()
            if saved.aliases.get(filled.stored, filled.stored) in saved.leaves
            and is_wanted(filled.stored, finish.only)
        }
        values = _made(loaded)
        for key, _, value in _items(finish.trees):
            if key in finish.filled:
                continue
            if key in targets.per_rank_keys and key in saved.per_rank:
                values[key] = give_per_rank(key, value, saved.per_rank[key])
            elif key in targets.object_keys and key in saved.objects:
                values[key] = give(key, value, saved.objects[key])
        return {
            name: tree_util.tree_unflatten(
                tree.structure,
                [values.get(k, leaf) for k, leaf in zip(tree.keys, tree.leaves, strict=True)],
            )
            for name, tree in finish.trees.items()
        }

    def _array_leaf(
        self, key: str, role: str, array: jax.Array, objects: dict[str, object]
    ) -> Leaf | None:
        if not is_key_array(array):
            return self._shards.leaf(key, array, role, late=self._overlap)
        objects[f"{key}/{_IMPL}"] = private.key_impl(array.dtype)[0]
        words = private.key_words(array)
        return self._shards.leaf(f"{key}/{_WORDS}", words, OTHER, late=self._overlap)

    def _target(self, key: str, role: str, like: Any) -> tuple[_Filled, Leaf]:
        if isinstance(like, jax.core.Tracer):
            copies.check_storable(key, like)
        shape, dtype, stored, impl = tuple(like.shape), like.dtype, key, None
        sharding = like.sharding
        is_committed = sharding is not None and getattr(like, "committed", True)
        if is_key_array(like):
            impl, words = private.key_impl(dtype)
            stored, dtype, shape = f"{key}/{_WORDS}", np.dtype(np.uint32), (*shape, *words)
            sharding = _words_sharding(like, shape)
        if sharding is None:
            if jax.process_count() > 1:
                raise UnsupportedStateError(
                    f"{key}: this ShapeDtypeStruct has no sharding, and the job has "
                    f"{jax.process_count()} processes; say where the array goes: "
                    "jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))"
                )
            sharding = SingleDeviceSharding(jax.local_devices()[0])
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise UnsupportedStateError(
                f"{key}: the target is {dtype}, which JAX makes "
                f"{jax.dtypes.canonicalize_dtype(dtype)} while jax_enable_x64 is off. Switch it on "
                "(jax.config.update('jax_enable_x64', True)), or make the target "
                f"{jax.dtypes.canonicalize_dtype(dtype)} and pass cast=True"
            )
        placed = self._shards.placed(stored, shape, dtype, sharding)
        indices = sharding.addressable_devices_indices_map(shape)
        boxes = [box_of(slices, shape) for slices in indices.values()]
        target = Target(shape, dtype, sharding, boxes, is_committed=is_committed)
        shards = tuple(Shard(box, target.buffers[box]) for box, *_ in placed.boxes)
        return (
            _Filled(stored, target=target, impl=impl),
            Leaf(stored, placed.spec, role, placed.layout, shards),
        )

    def _stages(self, held: Held) -> bool:
        if held.memory.is_on_host or next(iter(held.array.devices())).platform != "gpu":
            return False
        if self._cuda_problem is None:
            _, _, self._cuda_problem = native.cuda_probe()
            if self._cuda_problem:
                _logger.warning(
                    "arrays on a GPU are copied to the host by JAX before save() returns, because "
                    "the driver cannot be used: %s",
                    self._cuda_problem,
                )
        return not self._cuda_problem


def _items(trees: Mapping[str, Tree]) -> Iterator[tuple[str, str, Any]]:
    for tree in trees.values():
        yield from zip(tree.keys, tree.roles, tree.leaves, strict=True)


def _wait_until_computed(trees: Iterable[Tree]) -> None:
    arrays: list[Any] = []
    for tree in trees:
        for key, value in zip(tree.keys, tree.leaves, strict=True):
            if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
                copies.check_storable(key, value)
                arrays.append(value)
    jax.block_until_ready(arrays)


def _words_sharding(like: Any, words_shape: tuple[int, ...]) -> Any:
    """Return where the words of typed keys go: as the keys, each whole."""
    if isinstance(like, jax.Array):
        return private.key_words(like).sharding
    if like.sharding is None or isinstance(like.sharding, SingleDeviceSharding):
        return like.sharding
    return private.words_sharding(like, words_shape)


def _numpy_target(key: str, role: str, value: Any) -> tuple[_Filled, Leaf]:
    array = _plain(key, value)
    spec = spec_of(key, array.shape, array.dtype)
    buffer = Buffer(array.shape, np.dtype(array.dtype.newbyteorder("=")))
    shards = (Shard(whole(array.shape), buffer),) if array.size else ()
    filled = _Filled(key, buffer=buffer, is_scalar=isinstance(value, np.generic))
    return filled, Leaf(key, spec, role, None, shards)


def _plain(key: str, value: Any) -> np.ndarray[Any, Any]:
    """Return a numpy array or scalar as a plain array.

    Raises:
        UnsupportedStateError: A subclass, which means more than its elements.
    """
    if isinstance(value, np.generic) or type(value) in (np.ndarray, np.memmap):
        return np.asarray(value)
    raise UnsupportedStateError(
        f"{key}: a {type(value).__module__}.{type(value).__qualname__} means more than its "
        "elements; keep plain arrays in the state"
    )


def _made(loaded: Mapping[str, _Filled]) -> dict[str, Any]:
    """Return the values of filled targets."""
    of_jax = {key: filled for key, filled in loaded.items() if filled.target is not None}
    arrays = copies.make_arrays([f.target for f in of_jax.values() if f.target is not None])
    values: dict[str, Any] = {}
    for (key, filled), array in zip(of_jax.items(), arrays, strict=True):
        if filled.impl is None:
            values[key] = array
        else:
            values[key] = jax.random.wrap_key_data(array, impl=filled.impl)
    for key, filled in loaded.items():
        if filled.buffer is not None:
            values[key] = filled.buffer.array[()] if filled.is_scalar else filled.buffer.array
    return values


def _impl_problem(key: str, impl: str, saved: SavedState, only: tuple[str, ...]) -> list[str]:
    name = f"{key}/{_IMPL}"
    found = saved.objects.get(name, impl)
    if found == impl or not is_wanted(name, only):
        return []
    return [
        f"{key!r}: saved as random keys of {found!r}, target is {impl!r}; make the target with "
        f"jax.random.key(seed, impl={found!r})"
    ]
