"""The torch side of the seam: describes a state and takes a restored one apart again.

Layer: torch. Runs no collective and touches no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn

from shardckpt.backend import SavedState, Targets
from shardckpt.load.check import is_wanted
from shardckpt.state import HostArray, Leaf, PerRank, PerRankValue, StateTree
from shardckpt.torch import copies
from shardckpt.torch.modules import NamedTensors, named_tensors, parameter_names
from shardckpt.torch.objects import (
    as_per_rank,
    decode_object,
    decode_per_rank,
    describe_per_rank,
    encode_object,
    is_stateful,
)
from shardckpt.torch.optimizer import (
    ROLES,
    check_groups,
    created_state,
    group_names,
    hyperparameters,
    set_hyperparameters,
)
from shardckpt.torch.private import FlatRange, local_tensor
from shardckpt.torch.shards import Layouts, torch_dtype

Finish = Callable[[], object]


@final
class TorchBackend:
    """`shardckpt.backend.Backend` for torch."""

    name = "torch"

    def __init__(self) -> None:
        """Remember layouts between saves."""
        self._layouts = Layouts()

    def describe(self, state: Mapping[str, Any]) -> StateTree:
        """Return what the mapping holds, without copying arrays and without communication.

        Raises:
            UnsupportedStateError: A value cannot be stored exactly.
        """
        walk = _Walk(self._layouts, state, None, ())
        walk.run()
        return StateTree(walk.sorted_leaves(), walk.objects, walk.per_rank, walk.aliases)

    def host_array(self, data: object) -> HostArray:
        """Return host memory of a shard."""
        assert isinstance(data, torch.Tensor)
        return copies.host_array(data)

    def targets(
        self, state: Mapping[str, Any], saved: SavedState, *, only: tuple[str, ...]
    ) -> Targets:
        """Return what the mapping wants filled; missing optimizer state is made, not attached.

        Raises:
            UnsupportedStateError: A value cannot be filled.
            StateMismatchError: An optimizer has another number of groups.
        """
        walk = _Walk(self._layouts, state, saved, only)
        walk.run()
        leaves = {leaf.key: leaf for leaf in walk.sorted_leaves() if is_wanted(leaf.key, only)}
        return Targets(
            leaves,
            frozenset(key for key in walk.objects if is_wanted(key, only)),
            frozenset(key for key in walk.per_rank if is_wanted(key, only)),
            walk.finishers,
        )

    def host_target(self, data: object) -> HostArray:
        """Return writable host memory for a target shard.

        Raises:
            UnsupportedStateError: The tensor is a lazy view that cannot be written.
        """
        assert isinstance(data, torch.Tensor)
        return copies.host_target(data)

    def placed(self, data: object, host: HostArray) -> None:
        """Copy a filled buffer into a tensor on a device."""
        assert isinstance(data, torch.Tensor)
        copies.placed(data, host)

    def finish(self, targets: Targets, saved: SavedState) -> None:
        """Attach created state and hand every value to its owner."""
        finishers = targets.finish_data
        assert isinstance(finishers, list)
        with torch.no_grad():
            for finish in finishers:
                finish()


@dataclass(slots=True)
class _Walk:
    """One pass over the user's state, for a save (`saved` is None) or a restore."""

    layouts: Layouts
    state: Mapping[str, Any]
    saved: SavedState | None
    only: tuple[str, ...]
    leaves: list[Leaf] = field(default_factory=list)
    objects: dict[str, object] = field(default_factory=dict)
    per_rank: dict[str, PerRankValue] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    finishers: list[Finish] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    flat: dict[int, FlatRange] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)

    def run(self) -> None:
        self._mapping("", self.state)
        # Optimizers last: their parameters get names from all modules, wherever those stand.
        names = parameter_names(self.modules)
        for key, optimizer in self.optimizers.items():
            self._optimizer(key, optimizer, names)

    def sorted_leaves(self) -> tuple[Leaf, ...]:
        return tuple(sorted(self.leaves, key=lambda leaf: leaf.key))

    def _mapping(self, prefix: str, mapping: Mapping[str, Any]) -> None:
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            marked = as_per_rank(value)
            if marked is not None:
                self._per_rank(key, marked, mapping, name)
            elif isinstance(value, nn.Module):
                self._module(key, value)
            elif isinstance(value, torch.optim.Optimizer):
                self.optimizers[key] = value
            elif isinstance(value, torch.Tensor):
                self.leaves.append(self.layouts.leaf(key, "other", value))
            elif isinstance(value, Mapping) and _holds_state(value):
                self._mapping(f"{key}/", value)
            elif is_stateful(value):
                self._object(key, value.state_dict(), value.load_state_dict)
            else:
                self._object(key, value, _replacer(mapping, name))

    def _module(self, key: str, module: nn.Module) -> None:
        found = named_tensors(key, module)
        self.modules[key] = module
        self.flat.update(found.flat)
        stored: dict[tuple[Any, ...], str] = {}
        for name in sorted(found.tensors):
            self._module_tensor(key, name, found, stored)
        for name, part in found.extra.items():
            self._object(f"{key}/{name}", part.get_extra_state(), part.set_extra_state)

    def _module_tensor(
        self, key: str, name: str, found: NamedTensors, stored: dict[tuple[Any, ...], str]
    ) -> None:
        tensor = found.tensors[name]
        full = f"{key}/{name}"
        identity = _identity(tensor)
        if identity is not None:
            first = stored.setdefault(identity, full)
            if first != full:
                self.aliases[full] = first
                return
        role = "param" if name in found.parameters else "buffer"
        self.leaves.append(self.layouts.leaf(full, role, tensor, found.flat.get(id(tensor))))

    def _optimizer(self, key: str, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        groups = group_names(key, optimizer, names)
        plain: dict[str, dict[str, object]] = {}
        for group, of_group in zip(optimizer.param_groups, groups, strict=True):
            for parameter, name in zip(group["params"], of_group, strict=True):
                flat = self.flat.get(id(parameter))
                for state_name, value in optimizer.state.get(parameter, {}).items():
                    full = f"{key}/state/{name}/{state_name}"
                    if isinstance(value, torch.Tensor):
                        role = ROLES.get(state_name, "other")
                        self.leaves.append(
                            self.layouts.leaf(full, role, value, flat if value.ndim else None)
                        )
                    else:
                        plain.setdefault(name, {})[state_name] = value
        self._object(
            f"{key}/param_groups",
            hyperparameters(optimizer, groups),
            lambda value: set_hyperparameters(optimizer, value),
        )
        if plain or (self.saved is not None and f"{key}/state_objects" in self.saved.objects):
            self._object(
                f"{key}/state_objects", plain, lambda value: _set_plain(optimizer, groups, value)
            )
        if self.saved is not None:
            self._create(key, optimizer, groups, self.saved)

    def _create(
        self, key: str, optimizer: torch.optim.Optimizer, groups: list[list[str]], saved: SavedState
    ) -> None:
        """Add targets for saved state that the optimizer has not made yet."""
        wanted_groups = saved.objects.get(f"{key}/param_groups")
        if is_wanted(f"{key}/param_groups", self.only) and wanted_groups is not None:
            check_groups(key, optimizer, wanted_groups)
        created = created_state(key, optimizer, groups, saved, self.flat)
        for full, (parameter, state_name, tensor) in created.items():
            if not is_wanted(full, self.only):
                continue
            flat = self.flat.get(id(parameter)) if tensor.ndim else None
            self.leaves.append(
                self.layouts.leaf(full, ROLES.get(state_name, "other"), tensor, flat)
            )
            self.finishers.append(_attacher(optimizer, parameter, state_name, tensor))

    def _per_rank(self, key: str, marked: PerRank, mapping: Mapping[str, Any], name: str) -> None:
        self.per_rank[key] = describe_per_rank(key, marked)
        if self.saved is None or key not in self.saved.per_rank or not is_wanted(key, self.only):
            return
        value = self.saved.per_rank[key]
        owner = marked.value
        if is_stateful(owner):
            self.finishers.append(lambda: owner.load_state_dict(decode_per_rank(value)))  # type: ignore[attr-defined]
        else:
            replace = _replacer(mapping, name)
            self.finishers.append(lambda: replace(PerRank(decode_per_rank(value), marked.rule)))

    def _object(self, key: str, value: object, take: Callable[[Any], object]) -> None:
        if self.saved is None:
            self.objects[key] = encode_object(key, value, self._object_leaf)
            return
        self.objects[key] = None
        saved = self.saved.objects.get(key)
        if key not in self.saved.objects or not is_wanted(key, self.only):
            return
        tensors = {
            path: torch.empty(
                self.saved.leaves[path].spec.shape,
                dtype=torch_dtype(self.saved.leaves[path].spec.dtype),
            )
            for path in _leaf_paths(saved)
            if path in self.saved.leaves
        }
        for path, tensor in tensors.items():
            self._object_leaf(path, tensor)
        self.finishers.append(lambda: take(decode_object(saved, tensors)))

    def _object_leaf(self, path: str, tensor: torch.Tensor) -> None:
        self.leaves.append(self.layouts.leaf(path, "other", tensor))


def _holds_state(mapping: Mapping[Any, Any]) -> bool:
    """Whether a mapping groups stateful things, rather than being a plain value itself."""
    return (
        bool(mapping)
        and all(isinstance(k, str) for k in mapping)
        and any(
            isinstance(v, (nn.Module, torch.optim.Optimizer, torch.Tensor))
            or as_per_rank(v) is not None
            or is_stateful(v)
            or (isinstance(v, Mapping) and _holds_state(v))
            for v in mapping.values()
        )
    )


def _identity(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    local = local_tensor(tensor) if hasattr(tensor, "_local_tensor") else tensor
    if local.numel() == 0 or local.is_meta or local.layout is not torch.strided:
        return None
    return local.data_ptr(), tuple(local.shape), local.stride(), local.dtype


def _leaf_paths(value: object) -> list[str]:
    """Return the keys of the leaves that tagged JSON refers to."""
    if isinstance(value, list):
        return [path for item in value for path in _leaf_paths(item)]
    if isinstance(value, dict):
        inner = value.get("v")
        if value.get("$") == "x" and isinstance(inner, dict) and "leaf" in inner:
            return [str(inner["leaf"])]
        return [path for item in value.values() for path in _leaf_paths(item)]
    return []


def _replacer(mapping: Mapping[str, Any], name: str) -> Callable[[Any], None]:
    def replace(value: Any) -> None:
        if isinstance(mapping, MutableMapping):
            mapping[name] = value

    return replace


def _attacher(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state_name: str, tensor: torch.Tensor
) -> Finish:
    def attach() -> None:
        optimizer.state[parameter][state_name] = tensor

    return attach


def _set_plain(
    optimizer: torch.optim.Optimizer, groups: list[list[str]], values: dict[str, dict[str, Any]]
) -> None:
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            optimizer.state[parameter].update(values.get(name, {}))
