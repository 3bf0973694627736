"""One rule of a model map: names with variables, dims as products of named axes. Pure.

Layer: load. A rule has two sides, torch and jax. A variable of a name (`{i}`: a number from 0;
`{p:q,k,v}`: one of some words) is on the other side either a variable of the name, too, or an axis
of the dims: then many arrays of one side are one array of the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from shardckpt.errors import ModelMapError

if TYPE_CHECKING:
    from collections.abc import Mapping

Side: TypeAlias = Literal["torch", "jax"]

_VARIABLE: Final = re.compile(r"\{([a-z_]\w*)(?::([^{}]*))?\}")
_DIM: Final = re.compile(r"\s*(?:(\w+)|\(([^()]*)\))(?:\[(\d+):(\d+)\])?")
_AXIS: Final = re.compile(r"[a-z_]\w*|1", re.IGNORECASE)
_ARROW: Final = "->"


@dataclass(frozen=True, slots=True)
class NamePattern:
    """The names of one side.

    Attributes:
        text: As written.
        regex: Matches a name; one group for every variable.
        variables: In the order of the text.
        words: The words of a variable; none where it is a number.
    """

    text: str
    regex: re.Pattern[str]
    variables: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]

    def match(self, name: str) -> dict[str, int] | None:
        """Return the index that every variable has in a name, or None."""
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        return {
            variable: self.words[variable].index(text) if variable in self.words else int(text)
            for variable, text in zip(self.variables, found.groups(), strict=True)
        }

    def fill(self, indexes: Mapping[str, int]) -> str:
        """Return the name for some indexes."""

        def one(match: re.Match[str]) -> str:
            index = indexes[match[1]]
            return self.words[match[1]][index] if match[1] in self.words else str(index)

        return _VARIABLE.sub(one, self.text)


@dataclass(frozen=True, slots=True)
class DimPattern:
    """One dim: the axes it is a product of, and the window of the dim that the rule is about."""

    axes: tuple[str, ...]
    window: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class RuleSide:
    """One side of a rule; `dims` is None where both sides have the same dims."""

    name: NamePattern
    dims: tuple[DimPattern, ...] | None


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule, parsed and checked."""

    text: str
    torch: RuleSide
    jax: RuleSide

    def side(self, side: Side) -> RuleSide:
        """Return one side."""
        return self.torch if side == "torch" else self.jax


def compile_rule(torch: str, jax: str, dims: str) -> CompiledRule:
    """Parse a rule and check that its sides agree.

    Args:
        torch: Names on the torch side.
        jax: Names on the jax side.
        dims: `torch dims -> jax dims`; empty where they are equal.

    Raises:
        ModelMapError: It is malformed, or an axis is not on both sides exactly once.
    """
    text = f"{torch!r} <-> {jax!r}" + (f" {dims!r}" if dims else "")
    words = _words_of(text, torch, jax)
    names = _name(text, torch, 0, words), _name(text, jax, 1, words)
    if not dims.strip():
        if set(names[0].variables) != set(names[1].variables):
            raise _error(
                text,
                "a variable is in one name only; say in dims where its arrays are stacked, such as "
                "dims='out in -> i in out'",
            )
        return CompiledRule(text, RuleSide(names[0], None), RuleSide(names[1], None))
    if dims.count(_ARROW) != 1:
        raise _error(text, "dims are written 'torch dims -> jax dims'")
    left, right = dims.split(_ARROW)
    rule = CompiledRule(
        text, RuleSide(names[0], _dims(text, left)), RuleSide(names[1], _dims(text, right))
    )
    _check_axes(rule)
    return rule


def _words_of(text: str, *names: str) -> dict[str, list[tuple[str, ...] | None]]:
    """Return the words of every variable, per side."""
    words: dict[str, list[tuple[str, ...] | None]] = {}
    for at, name in enumerate(names):
        for match in _VARIABLE.finditer(name):
            if match[2] is None:
                continue
            chosen = tuple(match[2].split(","))
            if len(set(chosen)) != len(chosen) or not all(chosen):
                raise _error(text, f"the words of {match[0]} are empty or equal")
            words.setdefault(match[1], [None, None])[at] = chosen
    for variable, (one, other) in words.items():
        if one is not None and other is not None and len(one) != len(other):
            raise _error(text, f"variable {variable!r} has {len(one)} words on one side, "
                               f"{len(other)} on the other")  # fmt: skip
    return words


def _name(
    text: str, name: str, at: int, words: Mapping[str, list[tuple[str, ...] | None]]
) -> NamePattern:
    variables: list[str] = []
    chosen: dict[str, tuple[str, ...]] = {}
    pattern, end = "", 0
    for match in _VARIABLE.finditer(name):
        variable = match[1]
        if variable in variables:
            raise _error(text, f"variable {variable!r} is twice in {name!r}")
        variables.append(variable)
        pattern += re.escape(name[end : match.start()])
        end = match.end()
        if variable in words:
            mine, other = words[variable][at], words[variable][1 - at]
            chosen[variable] = mine or other or ()
            pattern += "(" + "|".join(re.escape(word) for word in chosen[variable]) + ")"
        else:
            pattern += "(0|[1-9][0-9]*)"
    pattern += re.escape(name[end:])
    if "{" in _VARIABLE.sub("", name) or not name:
        raise _error(text, f"{name!r} is no name; variables are written {{i}} or {{p:q,k,v}}")
    return NamePattern(name, re.compile(pattern), tuple(variables), chosen)


def _dims(text: str, dims: str) -> tuple[DimPattern, ...]:
    found: list[DimPattern] = []
    end, stripped = 0, dims.rstrip()
    while end < len(stripped):
        match = _DIM.match(stripped, end)
        if match is None:
            raise _error(text, f"cannot read dims {dims!r} at {stripped[end:]!r}")
        end = match.end()
        axes = (match[1] if match[1] is not None else match[2]).split()
        bad = [axis for axis in axes if not _AXIS.fullmatch(axis)]
        if bad:
            raise _error(text, f"{bad[0]!r} is no axis; use a name with a size in sizes=, or 1")
        window = None if match[3] is None else (int(match[3]), int(match[4]))
        if window is not None and window[0] >= window[1]:
            raise _error(text, f"window [{match[3]}:{match[4]}] is empty")
        found.append(DimPattern(tuple(axis for axis in axes if axis != "1"), window))
    return tuple(found)


def _check_axes(rule: CompiledRule) -> None:
    """Refuse axes that are not once on each side, as part of a dim or of the name.

    Raises:
        ModelMapError: Lists them.
    """
    sides: list[set[str]] = []
    for side in (rule.torch, rule.jax):
        assert side.dims is not None
        axes = [axis for dim in side.dims for axis in dim.axes] + list(side.name.variables)
        twice = sorted({axis for axis in axes if axes.count(axis) > 1})
        if twice:
            raise _error(rule.text, f"{', '.join(twice)}: twice on the side of {side.name.text!r}")
        sides.append(set(axes))
    lonely = sorted(sides[0] ^ sides[1])
    if lonely:
        raise _error(rule.text, f"{', '.join(lonely)}: on one side only")


def _error(text: str, why: str) -> ModelMapError:
    return ModelMapError(f"rule {text}: {why}.")
