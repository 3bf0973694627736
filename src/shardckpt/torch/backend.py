"""The torch side of the framework seam: names to modules, optimizers and other stateful objects.

Layer: torch. No collectives, no process group: what other ranks hold follows from placements.
"""

from __future__ import annotations

import logging
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, final
from weakref import ref

import msgspec
import torch
from torch import nn

from shardckpt import native
from shardckpt.backend import SavedState, Targets
from shardckpt.errors import UnsupportedStateError
from shardckpt.format.tagged import MAX_DEPTH, decode, encode
from shardckpt.load.check import is_wanted
from shardckpt.state import HostArray, Leaf, PerRank, PerRankValue, StateTree, check_distinct
from shardckpt.torch import copies
from shardckpt.torch.leaves import ModuleView
from shardckpt.torch.objects import (
    ObjectPlan,
    Stateful,
    as_per_rank,
    describe_object,
    describe_per_rank,
    give,
    give_per_rank,
    plan_object,
    plan_tensor,
)
from shardckpt.torch.optimizer import OptimizerPlan, OptimizerView
from shardckpt.torch.shards import Leaves
from shardckpt.torch.unmoved import Unmoved
from shardckpt.torch.values import decode_inline, encode_inline

if TYPE_CHECKING:
    from shardckpt.torch.fences import OptimizerFences

_logger = logging.getLogger("shardckpt")


@dataclass(frozen=True, slots=True)
class _Item:
    """One named object of the user's state, and the mapping it stands in."""

    name: str
    value: object
    container: Mapping[str, object]
    key: str


@dataclass(slots=True)
class _Finish:
    """What `finish` still has to hand over; only what was asked for."""

    state: Mapping[str, Any]
    extra: list[tuple[ModuleView, str]] = field(default_factory=list)
    optimizers: list[tuple[OptimizerView, OptimizerPlan]] = field(default_factory=list)
    objects: list[tuple[_Item, ObjectPlan]] = field(default_factory=list)
    per_rank: list[_Item] = field(default_factory=list)


@final
class TorchBackend:
    """State maps names to modules, optimizers, stateful objects, tensors and plain values.

    Keys: `<name>/<parameter or buffer>` for modules, `<name>/state/<parameter>/<state>` and
    `<name>/param_groups` for optimizers, `<name>` and `<name>/<path of a tensor>` for the rest.
    Mappings may nest. Not thread-safe.
    """

    name = "torch"
    fills_in_place = True

    def __init__(self, fences: OptimizerFences | None = None) -> None:
        """Start with nothing cached.

        Args:
            fences: Who guards optimizer steps; None: every leaf may change as `save` returns.
        """
        self._leaves = Leaves()
        self._unmoved: dict[str, Unmoved] = {}
        self._fences = fences
        self._cuda_problem: str | None = None

    def describe(self, state: Mapping[str, Any]) -> StateTree:
        """Return what `state` holds, without copying arrays and without communication.

        Raises:
            UnsupportedStateError: A value cannot be stored exactly; names its path.
        """
        _refuse_capture()
        items, modules = self._look(state)
        found: list[Leaf] = []
        objects: dict[str, object] = {}
        per_rank: dict[str, PerRankValue] = {}
        plain: list[str] = []
        tensors: list[torch.Tensor] = []
        fences = self._fences
        owners = {} if fences is None else fences.owners(_optimizers(items))
        aliases: dict[str, str] = {}
        for item in items:
            value = item.value
            if isinstance(value, nn.Module):
                view = modules[item.name]
                causes = view.causes(owners)
                make = partial(view.leaves, self._leaves, owners)
                found += self._made(item.name, causes, [*view.tensors.values()], make)
                aliases.update(
                    {f"{item.name}/{a}": f"{item.name}/{b}" for a, b in view.aliases.items()}
                )
                for name, extra in view.extra.items():
                    key = f"{item.name}/{name}"
                    objects[key] = encode(extra, key, extension=encode_inline)
            elif isinstance(value, torch.optim.Optimizer):
                fence = 0 if fences is None else fences.group_of(value)
                seen = OptimizerView(item.name, value, modules)
                held = seen.state()
                make = partial(seen.state_leaves, held, self._leaves, fence)
                found += self._made(item.name, held.causes(fence), held.tensors, make)
                found += seen.group_leaves(self._leaves)
                objects.update(seen.objects(held))
            elif isinstance(value, torch.Tensor):
                plain.append(item.name)
                tensors.append(value)
            elif (marked := as_per_rank(value)) is not None:
                per_rank[item.name] = describe_per_rank(item.name, marked)
            else:
                leaves, objects[item.name] = describe_object(item.name, value, self._leaves)
                found += leaves
        found += self._made("", plain, tensors, partial(self._plain_leaves, plain, tensors))
        found.sort(key=attrgetter("key"))
        check_distinct([*(leaf.key for leaf in found), *objects, *per_rank, *aliases])
        return StateTree(tuple(found), objects, per_rank, aliases)

    def host_array(self, data: object) -> HostArray:
        """Return the memory of a shard; what the engine cannot stage is copied to the host."""
        tensor = data() if isinstance(data, ref) else data
        assert isinstance(tensor, torch.Tensor)
        stays = tensor.is_cuda and self._stages_cuda()
        return copies.host_array(tensor, may_stay_on_device=stays)

    def owners(self, leaves: Sequence[Leaf]) -> list[object]:
        """Return the storages of lasting leaves.

        They stay valid where the caller gives a parameter other memory (`p.data = ...`).
        """
        data: list[Any] = [shard.data for leaf in leaves for shard in leaf.shards]
        return [local().untyped_storage() for local in data]

    def streams(self, devices: Collection[int]) -> Sequence[int]:
        """Return pairs of device and the calling thread's current CUDA stream there."""
        return [
            number
            for device in sorted(devices)
            for number in (device, torch.cuda.current_stream(device).cuda_stream)
        ]

    def _stages_cuda(self) -> bool:
        if self._cuda_problem is None:
            _, _, self._cuda_problem = native.cuda_probe()
            if self._cuda_problem:
                _logger.warning(
                    "CUDA tensors are copied to the host before save() returns, because the driver "
                    "cannot be used: %s",
                    self._cuda_problem,
                )
        return not self._cuda_problem

    def targets(
        self, state: Mapping[str, Any], saved: SavedState, *, only: tuple[str, ...]
    ) -> Targets:
        """Return what `state` wants filled, given what is saved; changes nothing the user can see.

        Args:
            state: The user's state.
            saved: What the checkpoint holds, under the target's names.
            only: Globs of keys wanted; empty means all.

        Raises:
            UnsupportedStateError: A value cannot be filled.
            StateMismatchError: Parameter groups differ.
        """
        items, modules = self._look(state)
        found: list[Leaf] = []
        object_keys: set[str] = set()
        per_rank_keys: set[str] = set()
        finish = _Finish(state)
        for item in items:
            value = item.value
            if isinstance(value, nn.Module):
                view = modules[item.name]
                view.check_fillable()
                found += _as_saved(view, view.leaves(self._leaves), saved)
                wanted = [name for name in view.extra if is_wanted(f"{item.name}/{name}", only)]
                object_keys.update(f"{item.name}/{name}" for name in wanted)
                finish.extra += [(view, name) for name in wanted]
            elif isinstance(value, torch.optim.Optimizer):
                optimizer = OptimizerView(item.name, value, modules)
                plan = optimizer.plan(saved, self._leaves, lambda key: is_wanted(key, only))
                found += plan.leaves
                object_keys |= plan.object_keys
                finish.optimizers.append((optimizer, plan))
            elif isinstance(value, torch.Tensor):
                found.append(plan_tensor(item.name, value, self._leaves))
            elif is_wanted(item.name, only):
                _check_replaceable(item)
                if as_per_rank(value) is not None:
                    per_rank_keys.add(item.name)
                    finish.per_rank.append(item)
                else:
                    planned = plan_object(item.name, value, saved, self._leaves)
                    found += planned.leaves
                    object_keys.add(item.name)
                    finish.objects.append((item, planned))
        leaves = {leaf.key: leaf for leaf in sorted(found, key=attrgetter("key"))}
        return Targets(leaves, frozenset(object_keys), frozenset(per_rank_keys), finish)

    def host_target(self, data: object) -> HostArray:
        """Return writable host memory for a target; for a device tensor, a buffer for `placed`."""
        assert isinstance(data, torch.Tensor)
        return copies.host_target(data)

    def placed(self, data: object, host: HostArray) -> None:
        """Copy a filled buffer into a device tensor; CPU tensors were filled in place."""
        assert isinstance(data, torch.Tensor)
        copies.place(data, host)

    def finish(self, targets: Targets, saved: SavedState) -> Mapping[str, Any]:
        """Attach created optimizer state and hand objects and per-rank values to their owners.

        Random generators come last, since an owner may draw numbers while it takes its state.

        Returns:
            The user's state itself, which was filled in place.

        Raises:
            StateMismatchError: An owner refused its value.
        """
        finish = targets.finish_data
        assert isinstance(finish, _Finish)
        for view, name in finish.extra:
            key = f"{view.name}/{name}"
            if key in saved.objects:
                view.set_extra(name, decode(saved.objects[key], extension=decode_inline, what=key))
        for optimizer, plan in finish.optimizers:
            optimizer.attach(plan, saved)
        for item, planned in finish.objects:
            if item.name in saved.objects:
                _replace(
                    item, give(item.name, item.value, saved.objects[item.name], planned.tensors)
                )
        for item in finish.per_rank:
            if item.name in saved.per_rank:
                _replace(item, give_per_rank(item.name, item.value, saved.per_rank[item.name]))
        return finish.state

    def _plain_leaves(self, keys: list[str], tensors: list[torch.Tensor]) -> list[Leaf]:
        pairs = zip(keys, tensors, strict=True)
        return [self._leaves.leaf(key, tensor, "other") for key, tensor in pairs]

    def _made(
        self,
        name: str,
        causes: object,
        tensors: Sequence[torch.Tensor],
        make: Callable[[], list[Leaf]],
    ) -> list[Leaf]:
        """Return the leaves of a module or an optimizer: the very same while nothing changes."""
        causes = (self._leaves.rank, causes)
        unmoved = self._unmoved.get(name)
        if unmoved is not None and unmoved.holds(causes, tensors):
            return unmoved.leaves
        self._unmoved.pop(name, None)
        leaves = make()
        stays = any(tensor.is_cuda for tensor in tensors) and self._stages_cuda()
        unmoved = Unmoved.of(
            causes, tensors, leaves,
            is_dtensor=self._leaves.is_dtensor, may_stay_on_device=stays,
        )  # fmt: skip
        if unmoved is not None:
            self._unmoved[name] = unmoved
        return leaves

    def _look(self, state: Mapping[str, Any]) -> tuple[list[_Item], dict[str, ModuleView]]:
        if not isinstance(state, Mapping):
            raise UnsupportedStateError(
                f"the state is a {type(state).__qualname__}; pass a mapping such as "
                "{'model': model, 'optimizer': optimizer}"
            )
        self._leaves.begin()
        items = _items(state, "", 0)
        modules = {
            i.name: ModuleView(i.name, i.value) for i in items if isinstance(i.value, nn.Module)
        }
        return items, modules


def _items(state: Mapping[str, Any], prefix: str, depth: int) -> list[_Item]:
    items: list[_Item] = []
    for key, value in state.items():
        if not isinstance(key, str) or not key:
            raise UnsupportedStateError(
                f"{prefix or 'the state'}: names are non-empty strings, got {key!r}"
            )
        if not isinstance(value, torch.Tensor) and _holds_state(value, depth):
            items += _items(value, f"{prefix}{key}/", depth + 1)
        else:
            items.append(_Item(prefix + key, value, state, key))
    return items


def _optimizers(items: Iterable[_Item]) -> Iterator[torch.optim.Optimizer]:
    for item in items:
        if isinstance(item.value, torch.optim.Optimizer):
            yield item.value


def _holds_state(value: object, depth: int) -> bool:
    """Return whether a value is a mapping of named objects rather than one plain value."""
    if depth > MAX_DEPTH or not isinstance(value, Mapping) or isinstance(value, Stateful):
        return False
    return all(isinstance(key, str) and key for key in value) and any(
        isinstance(inner, (torch.Tensor, PerRank, Stateful)) or _holds_state(inner, depth + 1)
        for inner in value.values()
    )


def _as_saved(view: ModuleView, leaves: list[Leaf], saved: SavedState) -> list[Leaf]:
    """Return leaves under the saved name where a tied tensor was saved under another name."""
    names = {
        f"{view.name}/{stored}": f"{view.name}/{alias}" for alias, stored in view.aliases.items()
    }

    def is_saved(key: str) -> bool:
        return key in saved.leaves or key in saved.aliases

    return [
        msgspec.structs.replace(leaf, key=names[leaf.key])
        if leaf.key in names and not is_saved(leaf.key) and is_saved(names[leaf.key])
        else leaf
        for leaf in leaves
    ]


def _check_replaceable(item: _Item) -> None:
    value = item.value.value if isinstance(item.value, PerRank) else item.value
    if not isinstance(value, Stateful) and not isinstance(item.container, MutableMapping):
        raise UnsupportedStateError(
            f"{item.name}: a {type(value).__qualname__} is replaced when it is restored, but "
            "it stands in a "
            f"{type(item.container).__qualname__}, which cannot be changed; use a dict"
        )


def _replace(item: _Item, value: object) -> None:
    if value is not item.value:
        assert isinstance(item.container, MutableMapping)
        item.container[item.key] = value


def _refuse_capture() -> None:
    if (
        torch.cuda.is_available()
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    ):
        raise UnsupportedStateError(
            "the current stream captures a CUDA graph; save outside of the capture"
        )
