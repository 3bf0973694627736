"""A checkpoint of one framework as the state of the other would have saved it. Pure.

Layer: load. Parameters go through the rules of the map; optimizer state goes the way of its
parameter, found by role; one count of optax is the step of every parameter in torch. Everything
that is lost or kept is said.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from shardckpt.backend import SavedLeaf, SavedState, Targets
from shardckpt.errors import FormatError
from shardckpt.format.tagged import decode
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.factors import DimFactors, Link
from shardckpt.load.check import is_wanted
from shardckpt.load.expand import Source
from shardckpt.load.maps import ModelMap, Translated, translate
from shardckpt.load.roles import (
    COUNT,
    SCHEDULE,
    TORCH_STATE,
    OptimizerSlots,
    optimizer_slots,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from shardckpt.format.manifest import SavedTensor
    from shardckpt.load.rules import Side

SIDES: Final = ("torch", "jax")
_SCALAR: Final = Link((), (), (), ())
_MAX_SHOWN: Final = 8


@dataclass(slots=True)
class Mapped:
    """What a load through a map needs beside the target's own wishes.

    Attributes:
        saved: What is saved, under the target's names and in its shapes.
        sources: What every target array is made of.
        fills: Target arrays that are one number throughout.
        kept: Keys of the target that nothing is loaded into.
        notes: What a message adds to a target's key: the saved names.
        problems: One line per array that the map leaves out, uses twice, or cannot make.
        remarks: What was left behind, one line each.
    """

    saved: SavedState
    sources: dict[str, Source] = field(default_factory=dict)
    fills: dict[str, int] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    notes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def wanted(self, targets: Targets) -> Targets:
        """Return the targets without what is kept."""
        return Targets(
            {key: leaf for key, leaf in targets.leaves.items() if key not in self.kept},
            targets.object_keys & self.saved.objects.keys(),
            frozenset(),
            targets.finish_data,
        )


def applies(saved_by: str, target: str) -> bool:
    """Whether a checkpoint of one framework is read through a map by the other."""
    return {saved_by, target} == set(SIDES)


def map_state(
    model_map: ModelMap,
    saved_by: str,
    tensors: Mapping[str, SavedTensor],
    saved: SavedState,
    targets: Targets,
    read_scalars: Callable[[Sequence[SavedTensor]], list[float]],
    *,
    strict: bool,
    only: Collection[str],
) -> Mapped:
    """Return the saved state as the target's framework would have saved it.

    Args:
        model_map: The map.
        saved_by: Framework that saved.
        tensors: The saved arrays by name.
        saved: What is saved, under its own names.
        targets: What the state holds, told without knowing what is saved.
        read_scalars: Reads values of 0-dim arrays.
        strict: Whether saved arrays that go nowhere are problems.
        only: Globs of target keys wanted; empty means all.
    """
    run = _Mapping(model_map, cast("Side", saved_by), tensors, saved, targets, only)
    run.map_model()
    run.map_moments()
    run.map_counts(read_scalars)
    run.map_rest()
    if not strict or only:
        run.unused.clear()
    run.result.problems += run.unused
    return run.result


class _Mapping:
    """One use of a map, step by step."""

    def __init__(
        self,
        model_map: ModelMap,
        source: Side,
        tensors: Mapping[str, SavedTensor],
        saved: SavedState,
        targets: Targets,
        only: Collection[str],
    ) -> None:
        self._map = model_map
        self._source: Side = source
        self._target: Side = "jax" if source == "torch" else "torch"
        self._tensors = tensors
        self._saved = saved
        self._targets = targets
        self._only = only
        self._leaves: dict[str, SavedLeaf] = {}
        self._model, self._target_model = model_map.prefix(source), model_map.prefix(self._target)
        self.unused: list[str] = []
        self.result = Mapped(SavedState(self._leaves, {}, {}, {}))
        self._slots = self._slots_of_saved()
        self._target_slots = optimizer_slots(
            self._target,
            {key: leaf.role for key, leaf in targets.leaves.items()},
            self._names(targets.leaves, self._target_model),
            self._target_model,
        )

    def map_model(self) -> None:
        """Give every parameter and buffer of the target what it is made of."""
        arrays = {name: self._spec(self._key(name)) for name in self._named_by_rules()}
        found = translate(self._map, arrays, self._source)
        self._note(found.unused, {f"{self._target_model}/{n}": w for n, w in found.unmade.items()})
        for name, made in found.arrays.items():
            key = f"{self._target_model}/{name}"
            is_copy_of_tied = all(self._key(n) in self._saved.aliases for n, _ in made.sources)
            if is_copy_of_tied and key not in self._targets.leaves:
                continue
            self._add(key, made, self._key, self._role(self._key(made.sources[0][0])))

    def map_moments(self) -> None:
        """Give optimizer state the way of its parameter."""
        if self._slots.is_empty and self._has_optimizer():
            self._fill_zeros()
            return
        by_role: dict[str, dict[str, str]] = {}
        for (role, param), keys in self._slots.moments.items():
            if len(keys) > 1:
                self.result.problems.append(
                    f"{' and '.join(map(repr, keys))}: all saved as {role} of {param!r}; leave all "
                    "but one out by ModelMap(ignore=...)"
                )
            by_role.setdefault(role, {})[param] = keys[0]
        for role, keys_of in by_role.items():
            arrays = {param: self._spec(key) for param, key in keys_of.items()}
            found = translate(self._map, arrays, self._source, label=f"{role} of ")
            places = {n: self._place(role, n) for n in (*found.arrays, *found.unmade)}
            self._note(
                found.unused, {places[n] or f"{role} of {n}": w for n, w in found.unmade.items()}
            )
            for name, made in found.arrays.items():
                place = places[name]
                if place is None:
                    self.unused.append(
                        f"{keys_of[made.sources[0][0]]!r}: saved, but the state has no {role} of "
                        f"{self._target_model}/{name}"
                    )
                else:
                    self._add(place, made, keys_of.__getitem__, role)

    def map_counts(self, read_scalars: Callable[[Sequence[SavedTensor]], list[float]]) -> None:
        """Give counts of steps, which torch has per parameter and optax once."""
        counts = self._slots.counts
        places = [key for key in self._count_places() if is_wanted(key, self._only)]
        schedules = [k for k in self._target_slots.schedules if is_wanted(k, self._only)]
        step: int | None = 0 if self._slots.is_empty and self._has_optimizer() else None
        if counts and (places or schedules):
            step = self._agreed_step(counts, read_scalars)
        if counts and step is not None:
            for key in places:
                leaf = self._targets.leaves.get(key)
                spec = ArraySpec((), "float32") if leaf is None else leaf.spec
                self._leaves[key] = SavedLeaf(spec, COUNT, is_sharded=False)
                self.result.sources[key] = Source(((self._tensors[counts[0]], _SCALAR),))
                self.result.notes[key] = f" (saved as {counts[0]!r})"
        self._map_schedules(schedules, step)

    def map_rest(self) -> None:
        """Hand over what both states call by one name; say what else there is."""
        result = self.result
        dropped: list[str] = [*self._saved.per_rank, *self._saved.per_rank_dropped]
        dropped += [key for key in self._saved.leaves if self._is_ignored(key)]
        for key in self._slots.others:
            spec = self._spec(key)
            if key in self._targets.leaves and key not in self._leaves:
                self._leaves[key] = self._saved.leaves[key]
                result.sources[key] = Source(((self._tensors[key], _identity(spec)),))
            elif not spec.shape or _is_stream(spec, self._role(key)):
                dropped.append(key)
            else:
                self.unused.append(f"{key!r} ({spec}): saved, but no rule and no role names it")
        if self._target == "torch":
            dropped += self._slots.schedules
        objects = cast("dict[str, object]", result.saved.objects)
        for key, value in self._saved.objects.items():
            if key in self._targets.object_keys:
                objects[key] = value
            else:
                dropped.append(key)
        kept = self._targets.object_keys - objects.keys() | self._targets.per_rank_keys
        for key, leaf in self._targets.leaves.items():
            is_free = not leaf.spec.shape and key in self._target_slots.others
            if key not in self._leaves and (
                self._is_ignored(key) or is_free or _is_stream(leaf.spec, leaf.role)
                or (key in self._target_slots.schedules and key not in result.fills)
            ):  # fmt: skip
                result.kept.add(key)
        self._remark(sorted(dropped), sorted({*kept, *result.kept}))

    def _slots_of_saved(self) -> OptimizerSlots:
        names = self._names([*self._saved.leaves, *self._saved.aliases], self._model)
        roles = {k: row.role for k, row in self._saved.leaves.items() if not self._is_ignored(k)}
        return optimizer_slots(self._source, roles, names, self._model)

    def _named_by_rules(self) -> list[str]:
        """Return the names to translate: of tied ones those that a rule names."""
        names = sorted(self._names(self._saved.leaves, self._model))
        tied: dict[str, list[str]] = {}
        for alias, stored in self._saved.aliases.items():
            if alias.startswith(f"{self._model}/"):
                tied.setdefault(stored, []).append(alias[len(self._model) + 1 :])
        chosen: list[str] = []
        for name in names:
            if self._is_ignored(self._key(name)):
                continue
            known = [n for n in (name, *tied.get(self._key(name), ())) if self._is_named(n)]
            chosen += known or [name]
        return chosen

    def _is_named(self, name: str) -> bool:
        return any(rule.side(self._source).name.match(name) for rule in self._map.compiled)

    def _add(self, key: str, made: Translated, key_of: Callable[[str], str], role: str) -> None:
        keys = [key_of(name) for name, _ in made.sources]
        parts = tuple(
            (self._tensor(saved), link) for saved, (_, link) in zip(keys, made.sources, strict=True)
        )
        self._leaves[key] = SavedLeaf(made.spec, role, is_sharded=False)
        self.result.sources[key] = Source(parts)
        self.result.notes[key] = f" (saved as {_shown(map(repr, dict.fromkeys(keys)))})"

    def _note(self, unused: list[str], unmade: Mapping[str, str]) -> None:
        self.unused += unused
        for key, why in unmade.items():
            if is_wanted(key, self._only) and (key in self._targets.leaves or not self._only):
                self.result.problems.append(why)

    def _place(self, role: str, name: str) -> str | None:
        """Return the target's key for state of a parameter, or None where it has none."""
        if self._target == "torch":
            optimizers = self._torch_optimizers()
            known = self._target_slots.moments.get((role, name))
            if known:
                return known[0]
            return f"{optimizers[0]}/state/{name}/{TORCH_STATE[role]}" if optimizers else None
        keys = self._target_slots.moments.get((role, name), [])
        return keys[0] if keys else None

    def _count_places(self) -> list[str]:
        """Return the keys of all counts that the target has, or will have once it is filled."""
        if self._target == "jax":
            return self._target_slots.counts
        ends = {f"/{TORCH_STATE[role]}" for role in ("adam_m", "adam_v")}
        found = dict.fromkeys(self._target_slots.counts)
        for key in self._leaves:
            stem, _, last = key.rpartition("/")
            if f"/{last}" in ends and not key.startswith(f"{self._target_model}/"):
                found[f"{stem}/{TORCH_STATE[COUNT]}"] = None
        return list(found)

    def _agreed_step(
        self, counts: list[str], read_scalars: Callable[[Sequence[SavedTensor]], list[float]]
    ) -> int | None:
        """Return the one number of steps that all counts tell."""
        values = read_scalars([self._tensors[key] for key in counts])
        lowest, highest = min(values), max(values)
        if lowest == highest and lowest == int(lowest):
            return int(lowest)
        one, other = counts[values.index(lowest)], counts[values.index(highest)]
        self.result.problems.append(
            f"{one!r} is {lowest:g} and {other!r} is {highest:g}: the other framework counts the "
            "steps of all parameters together, so they must be equal whole numbers; leave the "
            "optimizer out by only=[globs]"
        )
        return None

    def _map_schedules(self, places: list[str], step: int | None) -> None:
        told = self._scheduler_counts()
        if not places:
            return
        number = next(iter(told.values())) if len(set(told.values())) == 1 else step
        if number is None:
            self.result.remarks.append(
                f"{_shown(places)}: nothing saved tells how many steps the schedule has made; "
                "the target's own value is kept"
            )
            return
        if step is not None and number != step:
            self.result.remarks.append(
                f"{_shown(places)}: set to {number}, as {_shown(told)} says; the optimizer has "
                f"made {step} steps"
            )
        for key in places:
            leaf = self._targets.leaves[key]
            self._leaves[key] = SavedLeaf(leaf.spec, SCHEDULE, is_sharded=False)
            self.result.fills[key] = number

    def _scheduler_counts(self) -> dict[str, int]:
        """Return the steps of every saved learning-rate scheduler of torch, by key."""
        found: dict[str, int] = {}
        for key, value in self._saved.objects.items():
            try:
                content = decode(value, what=key)
            except FormatError:
                continue  # It holds tensors, which a scheduler's counters are not.
            if isinstance(content, dict) and isinstance(content.get("last_epoch"), int):
                found[key] = content["last_epoch"]
        return found

    def _has_optimizer(self) -> bool:
        return self._source == "torch" and any(
            key.endswith("/param_groups") for key in self._saved.objects
        )

    def _torch_optimizers(self) -> list[str]:
        ends = "/param_groups"
        return sorted(k[: -len(ends)] for k in self._targets.object_keys if k.endswith(ends))

    def _fill_zeros(self) -> None:
        """Make the state before the first step, which torch has not made yet."""
        slots = self._target_slots
        for key in [*(keys[0] for keys in slots.moments.values()), *slots.counts]:
            leaf = self._targets.leaves[key]
            self._leaves[key] = SavedLeaf(leaf.spec, leaf.role, is_sharded=False)
            self.result.fills[key] = 0

    def _remark(self, dropped: list[str], kept: list[str]) -> None:
        remarks = self.result.remarks
        if dropped:
            remarks.append(
                f"saved by {self._source} and not converted: {_shown(dropped)}. Hyperparameters "
                "are set in code; random streams and loaders of data derive new ones from "
                "(seed, step)."
            )
        if kept:
            remarks.append(f"kept as the state had them before: {_shown(kept)}.")

    def _is_ignored(self, key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, glob) for glob in self._map.ignore)

    def _names(self, keys: Iterable[str], model: str) -> set[str]:
        return {key[len(model) + 1 :] for key in keys if key.startswith(f"{model}/")}

    def _key(self, name: str) -> str:
        return f"{self._model}/{name}"

    def _tensor(self, key: str) -> SavedTensor:
        return self._tensors[self._saved.aliases.get(key, key)]

    def _spec(self, key: str) -> ArraySpec:
        return self._tensor(key).spec

    def _role(self, key: str) -> str:
        return self._saved.leaves[self._saved.aliases.get(key, key)].role


def _is_stream(spec: ArraySpec, role: str) -> bool:
    """Whether an array outside of the model is a random key of JAX, which is uint32 words."""
    return role == "other" and spec.dtype == "uint32"


def _identity(spec: ArraySpec) -> Link:
    dims = tuple(DimFactors(0, (dim,)) for dim in range(len(spec.shape)))
    return Link(spec.shape, (), dims, dims)


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MAX_SHOWN
    return ", ".join(listed[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
