"""Model maps: how the arrays of a torch model and of its JAX twin correspond, as data. Pure.

Layer: load. A map is a list of rules. It serves both directions, since every rule is reversible:
renamed, transposed, reshaped, stacked (scanned layers) and split arrays hold the same elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from shardckpt.errors import ModelMapError
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.factors import DimFactors, Link, region_of
from shardckpt.geometry.regions import coverage_problem
from shardckpt.load.rules import CompiledRule, DimPattern, RuleSide, Side, compile_rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardckpt.geometry.box import Box, Shape


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One correspondence, for one array or for those of all layers.

    Attributes:
        torch: Name of the parameter in the module; `{i}` stands for a number, `{p:q,k,v}` for one
            of some words.
        jax: Path of the parameter in the tree, joined by "/".
        dims: `torch dims -> jax dims`, each a name or, in parentheses, a product of names; empty
            where both are equal. A variable of one side's names may be an axis of the other side's
            dims. `(h d)[512:1024]` is a window of a dim that several rules share.

    >>> Rule("layers.{i}.up.weight", "layers/up/kernel", "out in -> i in out").jax
    'layers/up/kernel'
    """

    torch: str
    jax: str
    dims: str = ""


class ModelMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """How one model is written in torch and in JAX; data that may be kept as JSON.

    Pass it to `restore` and `load`: a checkpoint of the other framework is then read through it,
    parameters and optimizer state alike, and one of the own framework as if there were none.

    Attributes:
        rules: Every parameter and buffer is named by exactly one, or by several windows.
        sizes: Sizes of axes that the shape of an array does not tell, such as heads.
        torch: Name of the module in the torch state.
        jax: Name of the tree in the JAX state.
        ignore: Globs of keys of either state that have no counterpart: saved ones are left out,
            those of the target stay as they are.
    """

    rules: tuple[Rule, ...]
    sizes: dict[str, int] = {}
    torch: str = "model"
    jax: str = "params"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Parse every rule.

        Raises:
            ModelMapError: A rule is malformed, a size is no positive number, a name is empty.
        """
        if bad := sorted(name for name, size in self.sizes.items() if size < 1):
            raise ModelMapError(f"sizes={self.sizes!r}: {', '.join(bad)} must be at least 1.")
        if not self.torch or not self.jax:
            raise ModelMapError("torch= and jax= name the model in either state; one is empty.")
        _ = self.compiled

    @cached_property
    def compiled(self) -> tuple[CompiledRule, ...]:
        """The rules, parsed."""
        return tuple(compile_rule(rule.torch, rule.jax, rule.dims) for rule in self.rules)

    def to_json(self) -> str:
        """Return the map as JSON text."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    @staticmethod
    def from_json(text: str | bytes) -> ModelMap:
        """Return the map that `to_json` wrote.

        Raises:
            ModelMapError: It is no such text, or the map contradicts itself.
        """
        try:
            return msgspec.json.decode(text, type=ModelMap)
        except msgspec.MsgspecError as error:
            raise ModelMapError(f"this is not the JSON of a model map: {error}") from error

    def prefix(self, side: Side) -> str:
        """Return the name of the model in the state of one side."""
        return self.torch if side == "torch" else self.jax


@dataclass(slots=True)
class Translated:
    """A target array and the saved ones that it is made of."""

    spec: ArraySpec
    sources: list[tuple[str, Link]] = field(default_factory=list)


@dataclass(slots=True)
class Translation:
    """What the map makes of some arrays, and what it could not do, one line each.

    Attributes:
        arrays: Target arrays by name.
        unused: Saved arrays that go nowhere, or not exactly once.
        unmade: Why a target array cannot be made, by its name.
    """

    arrays: dict[str, Translated] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unmade: dict[str, str] = field(default_factory=dict)


def translate(
    model_map: ModelMap, arrays: Mapping[str, ArraySpec], source: Side, *, label: str = ""
) -> Translation:
    """Return the arrays of the other side that some arrays of one side give.

    Args:
        model_map: The rules.
        arrays: Spec of every saved array, by its name in the model.
        source: The side that saved them.
        label: What they are, for messages, such as "adam_m of ".
    """
    target: Side = "jax" if source == "torch" else "torch"
    result = Translation()
    parts: dict[str, list[_Part]] = {}
    used: dict[str, list[Box]] = {}
    for rule in model_map.compiled:
        try:
            _apply(rule, model_map, arrays, source, target, parts, used)
        except _CannotApplyError as error:
            result.unused.append(f"{label}{error}")
    for name, found in parts.items():
        _join(name, found, label, result)
    for name, spec in arrays.items():
        if name not in used:
            result.unused.append(f"{label}{name!r} ({spec}): saved, but no rule names it")
        elif problem := coverage_problem(spec.shape, used[name]):
            result.unused.append(
                f"{label}{name!r} ({spec}): the rules do not use it exactly once: {problem}"
            )
    return result


class _CannotApplyError(Exception):
    """A rule does not fit an array."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one saved array gives to a target, by which rule, as one of how many."""

    saved: str
    spec: ArraySpec
    link: Link
    rule: CompiledRule
    num_siblings: int


def _apply(
    rule: CompiledRule,
    model_map: ModelMap,
    arrays: Mapping[str, ArraySpec],
    source: Side,
    target: Side,
    parts: dict[str, list[_Part]],
    used: dict[str, list[Box]],
) -> None:
    """Add what a rule makes of all arrays that it names."""
    here, there = rule.side(source), rule.side(target)
    matches = {n: m for n in arrays if (m := here.name.match(n)) is not None}
    if not matches:
        return
    known = dict(model_map.sizes)
    for pattern in (here.name, there.name):
        known.update({v: len(words) for v, words in pattern.words.items()})
    for variable in here.name.variables:
        if variable not in here.name.words and variable not in there.name.variables:
            known[variable] = 1 + max(match[variable] for match in matches.values())
    stacked = [v for v in here.name.variables if v not in there.name.variables]
    num_siblings = math.prod(known[v] for v in stacked)
    for name, match in matches.items():
        spec = arrays[name]
        dims_here, dims_there = _dims_of(here, there, len(spec.shape))
        sizes = _sizes(rule, name, spec, dims_here, known)
        axes = {axis: at for at, axis in enumerate(sizes)}
        saved_dims = _factors(dims_here, axes)
        target_dims = _factors(dims_there, axes)
        extents = tuple(sizes.values())
        used.setdefault(name, []).append(region_of(saved_dims, extents))
        split = [v for v in there.name.variables if v not in here.name.variables]
        for indexes in _indexes([sizes[v] for v in split]):
            at = {**match, **dict(zip(split, indexes, strict=True))}
            fixed = tuple((axes[v], at[v]) for v in (*stacked, *split))
            link = Link(extents, fixed, saved_dims, target_dims)
            part = _Part(name, spec, link, rule, num_siblings)
            parts.setdefault(there.name.fill(at), []).append(part)


def _dims_of(
    here: RuleSide, there: RuleSide, num_dims: int
) -> tuple[tuple[DimPattern, ...], tuple[DimPattern, ...]]:
    if here.dims is None or there.dims is None:
        same = tuple(DimPattern((f"dim {i}",), None) for i in range(num_dims))
        return same, same
    return here.dims, there.dims


def _sizes(
    rule: CompiledRule,
    name: str,
    spec: ArraySpec,
    dims: tuple[DimPattern, ...],
    known: Mapping[str, int],
) -> dict[str, int]:
    """Return the size of every axis of the rule, from the shape of an array."""
    if len(dims) != len(spec.shape):
        raise _CannotApplyError(f"{name!r} ({spec}): rule {rule.text} is about {len(dims)} dims")
    variables = {*rule.torch.name.variables, *rule.jax.name.variables}
    sizes = {v: known[v] for v in variables if v in known}
    for dim, extent in zip(dims, spec.shape, strict=True):
        length = extent if dim.window is None else dim.window[1] - dim.window[0]
        rest = [axis for axis in dim.axes if axis not in known]
        product = math.prod(known[axis] for axis in dim.axes if axis in known)
        if len(rest) > 1:
            raise _CannotApplyError(
                f"{name!r} ({spec}): the shape does not tell the sizes of {', '.join(rest)} of "
                f"rule {rule.text}; give all but one in ModelMap(sizes=...)"
            )
        if (dim.window and dim.window[1] > extent) or (
            length % product if rest else length != product
        ):
            raise _CannotApplyError(
                f"{name!r} ({spec}): {length} of {extent} indexes do not divide into "
                f"{' x '.join(f'{a}={known[a]}' if a in known else a for a in dim.axes) or '1'} "
                f"of rule {rule.text}"
            )
        sizes.update({axis: known[axis] for axis in dim.axes if axis in known})
        sizes.update(dict.fromkeys(rest, length // product))
    return sizes


def _factors(dims: tuple[DimPattern, ...], axes: Mapping[str, int]) -> tuple[DimFactors, ...]:
    return tuple(
        DimFactors(0 if d.window is None else d.window[0], tuple(axes[a] for a in d.axes))
        for d in dims
    )


def _indexes(shape: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in shape:
        found = [(*index, at) for index in found for at in range(size)]
    return found


def _join(name: str, parts: list[_Part], label: str, result: Translation) -> None:
    """Add a target array where its parts hold every element of it exactly once."""
    origin = ", ".join(repr(p.saved) for p in parts[:4]) + (", ..." if len(parts) > 4 else "")
    dtypes = sorted({part.spec.dtype for part in parts})
    regions: dict[str, Box] = {}
    for part in parts:
        regions[part.rule.text] = region_of(part.link.target, part.link.sizes)
    stops = {len(box.stop): box.stop for box in regions.values()}
    problem: str | None = None
    if len(dtypes) > 1:
        problem = f"saved as {' and '.join(dtypes)}"
    elif len(stops) > 1:
        problem = "the rules give it different numbers of dims"
    shape: Shape = tuple(max(s) for s in zip(*(b.stop for b in regions.values()), strict=False))
    for text, box in regions.items():
        mine = [part for part in parts if part.rule.text == text]
        other = [p for p in mine if region_of(p.link.target, p.link.sizes) != box]
        if other:
            problem = f"{mine[-1].saved!r} and {other[0].saved!r} differ in shape"
        elif len({part.link.fixed for part in mine}) != len(mine):
            problem = f"rule {text} gives it twice"
        elif len(mine) != mine[0].num_siblings:
            problem = f"{len(mine)} of {mine[0].num_siblings} arrays of rule {text} are saved"
    problem = problem or coverage_problem(shape, list(regions.values()))
    if problem is not None:
        result.unmade[name] = f"{label}{name!r} cannot be made of {origin}: {problem}"
        return
    spec = ArraySpec(shape, dtypes[0])
    result.arrays[name] = Translated(spec, [(part.saved, part.link) for part in parts])
