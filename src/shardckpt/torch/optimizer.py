"""Optimizer state by parameter name, and its creation without a step.

Layer: torch. Keys: `<name>/state/<param>/<state name>`, `<name>/param_groups` (an object, its
tensors are leaves `<name>/param_groups/<i>/<field>`) and `<name>/state_objects` for state that is
no tensor. A parameter goes by its name in the module; only an optimizer over several modules of
the state says `<module>.<name>`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

import torch

from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.format.tagged import decode, encode
from shardckpt.torch import private
from shardckpt.torch.copies import check_fillable
from shardckpt.torch.created import created_state, empty
from shardckpt.torch.leaves import ModuleView, ParamRef
from shardckpt.torch.values import decode_inline, encode_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from shardckpt.backend import SavedState
    from shardckpt.state import Leaf
    from shardckpt.torch.shards import Leaves

ROLES: Final = {"exp_avg": "adam_m", "exp_avg_sq": "adam_v", "step": "count"}
# How to step belongs to the run, not to the state; created counters lie where the target's own
# settings want them.
_OF_THE_RUN: Final = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)
_MAX_SHOWN: Final = 8
_EMPTY: Final[Mapping[str, object]] = {}


@dataclass(slots=True)
class OptimizerPlan:
    """What `attach` will do to an optimizer.

    Attributes:
        leaves: Tensors to fill.
        object_keys: Objects the optimizer takes.
        created: State to attach: parameter, state name, tensor.
        group_of: For each of the optimizer's groups the index of the saved one.
        lone_scalars: Group and field of numbers that were saved as a tensor, with the tensor to
            fill.
    """

    leaves: list[Leaf] = field(default_factory=list)
    object_keys: set[str] = field(default_factory=set)
    created: list[tuple[torch.Tensor, str, torch.Tensor]] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    lone_scalars: list[tuple[int, str, torch.Tensor]] = field(default_factory=list)


@dataclass(slots=True)
class OptimizerState:
    """The state of one optimizer, its tensors as columns.

    Attributes:
        refs: For each tensor the parameter whose state it is.
        names: Name of each in that state.
        tensors: The tensors.
        values: State that is no tensor: by parameter, then by name.
    """

    refs: list[ParamRef] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    values: dict[str, dict[str, object]] = field(default_factory=dict)

    def causes(self, fence: int) -> object:
        """Return what the leaves follow from besides the tensors; cheap to compare."""
        # A plain tensor beside a sharded parameter lies where the parameter does.
        specs = [private.spec_of(ref.param) for ref in self.refs]
        return fence, [ref.name for ref in self.refs], self.names, specs


@final
class OptimizerView:
    """One optimizer of the state and the names of its parameters."""

    def __init__(
        self, name: str, optimizer: torch.optim.Optimizer, modules: Mapping[str, ModuleView]
    ) -> None:
        """Find the name of every parameter.

        Raises:
            UnsupportedStateError: A parameter belongs to no module of the state, or the optimizer
                is split over ranks.
        """
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise UnsupportedStateError(
                f"{name}: ZeroRedundancyOptimizer keeps whole tensors on one rank each; shard "
                "the model with fully_shard"
            )
        self.name = name
        self.optimizer = optimizer
        refs = _named_params(name, optimizer, modules)
        self.groups: list[list[ParamRef]] = [
            [refs[id(p)] for p in g["params"]] for g in optimizer.param_groups
        ]
        self.by_name: dict[str, ParamRef] = {
            ref.name: ref for group in self.groups for ref in group
        }

    def state(self) -> OptimizerState:
        """Return the state as it stands."""
        found = OptimizerState()
        state = self.optimizer.state
        for group in self.groups:
            for ref in group:
                for state_name, value in state.get(ref.param, _EMPTY).items():
                    if isinstance(value, torch.Tensor):
                        found.refs.append(ref)
                        found.names.append(state_name)
                        found.tensors.append(value)
                    else:
                        found.values.setdefault(ref.name, {})[state_name] = value
        return found

    def state_leaves(self, state: OptimizerState, leaves: Leaves, fence: int) -> list[Leaf]:
        """Return one leaf per tensor of the state.

        Args:
            state: Of this optimizer.
            leaves: Makes the leaves.
            fence: Group of what changes only in the optimizer's step, or 0.

        Raises:
            UnsupportedStateError: A tensor cannot be stored exactly.
        """
        return [
            self._state_leaf(self._key(ref, name), ref, name, tensor, leaves, fence)
            for ref, name, tensor in zip(state.refs, state.names, state.tensors, strict=True)
        ]

    def group_leaves(self, leaves: Leaves) -> list[Leaf]:
        """Return the leaves of tensors among the hyperparameters.

        Raises:
            UnsupportedStateError: A tensor cannot be stored exactly.
        """
        return [
            leaves.leaf(f"{self._groups_key}/{i}/{key}", value, "other")
            for i, fields in enumerate(self.optimizer.param_groups)
            for key, value in fields.items()
            if isinstance(value, torch.Tensor)
        ]

    def objects(self, state: OptimizerState) -> dict[str, object]:
        """Return hyperparameters and state that is no tensor, as tagged JSON values by key.

        Raises:
            UnsupportedStateError: A value cannot be stored exactly.
        """
        found: dict[str, object] = {
            self._groups_key: encode(self._group_values(), self._groups_key)
        }
        if state.values:
            found[self._values_key] = encode(
                state.values, self._values_key, extension=encode_inline
            )
        return found

    def plan(
        self, saved: SavedState, leaves: Leaves, is_wanted: Callable[[str], bool]
    ) -> OptimizerPlan:
        """Allocate what is missing and say what to fill; the optimizer stays as it is.

        Raises:
            StateMismatchError: Groups differ, or saved values belong to unknown parameters.
            UnsupportedStateError: A tensor cannot be filled.
        """
        plan = OptimizerPlan()
        if self._groups_key in saved.objects and is_wanted(self._groups_key):
            self._plan_groups(plan, saved, leaves)
        if is_wanted(self._groups_key):
            plan.object_keys.add(self._groups_key)
        self._plan_state(plan, saved, leaves, is_wanted)
        self._plan_values(plan, saved, is_wanted)
        return plan

    def attach(self, plan: OptimizerPlan, saved: SavedState) -> None:
        """Give the optimizer its created state, values and hyperparameters."""
        state = self.optimizer.state
        for param, state_name, tensor in plan.created:
            state[param][state_name] = tensor
        if self._values_key in plan.object_keys and self._values_key in saved.objects:
            values: Any = decode(saved.objects[self._values_key], extension=decode_inline)
            for name, by_state_name in values.items():
                ref = self.by_name[name]
                for state_name, value in by_state_name.items():
                    state[ref.param][state_name] = _moved(value, private.plain(ref.param).device)
        if plan.group_of:
            groups: Any = decode(saved.objects[self._groups_key])
            for fields, index in zip(self.optimizer.param_groups, plan.group_of, strict=True):
                _set_fields(fields, groups[index])
        for i, key, tensor in plan.lone_scalars:
            self.optimizer.param_groups[i][key] = tensor.item()

    @property
    def _groups_key(self) -> str:
        return f"{self.name}/param_groups"

    @property
    def _values_key(self) -> str:
        return f"{self.name}/state_objects"

    def _group_values(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for fields, refs in zip(self.optimizer.param_groups, self.groups, strict=True):
            row: dict[str, object] = {"params": [ref.name for ref in refs]}
            row.update(
                (key, value)
                for key, value in fields.items()
                if key not in ("params", "param_names") and not isinstance(value, torch.Tensor)
            )
            rows.append(row)
        return rows

    def _key(self, ref: ParamRef, state_name: str) -> str:
        return f"{self.name}/state/{ref.name}/{state_name}"

    def _state_leaf(
        self,
        key: str,
        ref: ParamRef,
        state_name: str,
        tensor: torch.Tensor,
        leaves: Leaves,
        fence: int = 0,
    ) -> Leaf:
        role = ROLES.get(state_name, "other")
        if leaves.is_dtensor(tensor) or tensor.ndim == 0:
            return leaves.leaf(key, tensor, role, fence)
        if ref.flat is not None:
            if tensor.shape == ref.flat.local.shape:
                return leaves.flat(key, ref.flat, tensor, role, fence)
        elif leaves.is_dtensor(ref.param):
            # Plain state beside a DTensor: of the local shape it can only be this rank's part.
            if tensor.shape == private.local_tensor(ref.param).shape:
                return leaves.sharded(key, ref.param, tensor, role, fence)
        else:
            return leaves.leaf(key, tensor, role, fence)
        if tensor.numel() == 1:
            return leaves.leaf(key, tensor, role, fence)
        raise UnsupportedStateError(
            f"{key}: a plain tensor of shape {list(tensor.shape)} beside a sharded parameter "
            "of shape "
            f"{list(ref.flat.shape if ref.flat else ref.param.shape)} may differ by rank, so "
            "its place is unknown; "
            "keep it as a DTensor"
        )

    def _plan_groups(self, plan: OptimizerPlan, saved: SavedState, leaves: Leaves) -> None:
        rows: Any = decode(saved.objects[self._groups_key], what=self._groups_key)
        names = [[ref.name for ref in group] for group in self.groups]
        plan.group_of = _matching_groups(self.name, names, [list(row["params"]) for row in rows])
        for i, (fields, index) in enumerate(
            zip(self.optimizer.param_groups, plan.group_of, strict=True)
        ):
            prefix = f"{self._groups_key}/{index}/"
            saved_tensors = {key[len(prefix) :] for key in saved.leaves if key.startswith(prefix)}
            for key, value in fields.items():
                if isinstance(value, torch.Tensor) and key not in rows[index]:
                    check_fillable(private.plain(value), prefix + key)
                    plan.leaves.append(leaves.leaf(prefix + key, value, "other"))
            for key in sorted(
                saved_tensors - {k for k, v in fields.items() if isinstance(v, torch.Tensor)}
            ):
                created = empty(
                    saved.leaves[prefix + key].spec.shape,
                    saved.leaves[prefix + key],
                    "cpu",
                    prefix + key,
                )
                if created.numel() == 1:
                    plan.leaves.append(leaves.leaf(prefix + key, created, "other"))
                    plan.lone_scalars.append((i, key, created))

    def _plan_state(
        self,
        plan: OptimizerPlan,
        saved: SavedState,
        leaves: Leaves,
        is_wanted: Callable[[str], bool],
    ) -> None:
        flags = {
            id(ref.param): fields
            for fields, group in zip(self.optimizer.param_groups, self.groups, strict=True)
            for ref in group
        }
        has = self.optimizer.state
        # A tied parameter may have been saved under another of its names.
        known = {name: ref for ref in self.by_name.values() for name in (*ref.tied_names, ref.name)}
        seen: set[tuple[int, str]] = set()
        prefix = f"{self.name}/state/"
        for key in sorted({*saved.leaves, *saved.aliases}):
            if not key.startswith(prefix) or not is_wanted(key):
                continue
            name, _, state_name = key[len(prefix) :].rpartition("/")
            ref = known.get(name)
            if ref is None or (id(ref.param), state_name) in seen:
                continue
            seen.add((id(ref.param), state_name))
            tensor = has.get(ref.param, {}).get(state_name)
            if isinstance(tensor, torch.Tensor):
                check_fillable(private.plain(tensor), key)
            else:
                row = saved.leaves[saved.aliases.get(key, key)]
                tensor = created_state(key, ref, state_name, row, flags[id(ref.param)], leaves)
                plan.created.append((ref.param, state_name, tensor))
            plan.leaves.append(self._state_leaf(key, ref, state_name, tensor, leaves))
        # What the optimizer has and nobody saved is wanted all the same, so that it is reported as
        # missing.
        for ref in self.by_name.values():
            for state_name, value in has.get(ref.param, {}).items():
                if isinstance(value, torch.Tensor) and (id(ref.param), state_name) not in seen:
                    plan.leaves.append(
                        self._state_leaf(self._key(ref, state_name), ref, state_name, value, leaves)
                    )

    def _plan_values(
        self, plan: OptimizerPlan, saved: SavedState, is_wanted: Callable[[str], bool]
    ) -> None:
        if not is_wanted(self._values_key):
            return
        if self._values_key in saved.objects:
            values: Any = decode(
                saved.objects[self._values_key], extension=decode_inline, what=self._values_key
            )
            unknown = sorted(values.keys() - self.by_name.keys())
            if unknown:
                raise StateMismatchError(
                    f"{self._values_key}: saved for parameters the optimizer does not have: "
                    f"{_shown(unknown)}",
                    tuple(unknown),
                )
            plan.object_keys.add(self._values_key)
        elif any(
            not isinstance(value, torch.Tensor)
            for ref in self.by_name.values()
            for value in self.optimizer.state.get(ref.param, {}).values()
        ):
            plan.object_keys.add(self._values_key)


def _named_params(
    name: str, optimizer: torch.optim.Optimizer, modules: Mapping[str, ModuleView]
) -> dict[int, ParamRef]:
    """Return the name of every parameter by identity.

    Raises:
        UnsupportedStateError: A parameter belongs to no module of the state.
    """
    known = {module: view.params() for module, view in modules.items()}
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for refs in known.values():
        if mine <= refs.keys():
            return refs
    merged: dict[int, ParamRef] = {}
    for module, refs in known.items():
        for identity, ref in refs.items():
            tied = tuple(f"{module}.{other}" for other in ref.tied_names)
            merged.setdefault(identity, ParamRef(f"{module}.{ref.name}", ref.param, ref.flat, tied))
    for i, group in enumerate(optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            if id(param) not in merged:
                raise UnsupportedStateError(
                    f"{name}: parameter {j} of group {i} (shape {list(param.shape)}) belongs "
                    "to no module of the state "
                    f"({', '.join(modules) or 'it has none'}). Put its module into the state, "
                    "and make the optimizer "
                    "after fully_shard or FSDP has replaced the parameters."
                )
    return merged


def _matching_groups(name: str, wanted: list[list[str]], saved: list[list[str]]) -> list[int]:
    """Return for each wanted group the saved one with the same parameters.

    Where names differ (a renamed model), groups of equal sizes in equal order match.

    Raises:
        StateMismatchError: Some group has no counterpart; lists the differences.
    """
    index_of = {frozenset(group): i for i, group in enumerate(saved)}
    found = [index_of.get(frozenset(group)) for group in wanted]
    if len(wanted) == len(saved) and None not in found and len(set(found)) == len(found):
        return [i for i in found if i is not None]
    if [len(g) for g in wanted] == [len(g) for g in saved]:
        return list(range(len(wanted)))
    mine, theirs = {n for g in wanted for n in g}, {n for g in saved for n in g}
    problems = [
        f"{name}: {len(saved)} parameter groups of {[len(g) for g in saved]} parameters were "
        "saved, the optimizer has "
        f"{len(wanted)} of {[len(g) for g in wanted]}"
    ]
    if theirs - mine:
        problems.append(f"{name}: saved, but not in the optimizer: {_shown(sorted(theirs - mine))}")
    if mine - theirs:
        problems.append(f"{name}: in the optimizer, but not saved: {_shown(sorted(mine - theirs))}")
    raise StateMismatchError(
        "; ".join(problems)
        + f". Make the same groups, or leave '{name}/param_groups' out by only=[globs].",
        tuple(problems),
    )


def _set_fields(fields: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if key in _OF_THE_RUN:
            continue
        present = fields.get(key)
        if isinstance(present, torch.Tensor) and isinstance(value, (int, float)):
            with torch.no_grad():
                present.fill_(value)
        else:
            fields[key] = value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MAX_SHOWN
    return ", ".join(listed[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
