"""Check: does what is saved fit what is wanted? All problems at once. Pure.

Layer: load.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import TYPE_CHECKING, Final

from shardckpt.errors import StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from shardckpt.backend import SavedLeaf, SavedState, Targets
    from shardckpt.load.mapped import Mapped

_MAX_SHOWN: Final = 50
_MAX_FOR_NEAREST: Final = 200


def target_names(keys: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """Return the target's name of every saved key.

    Args:
        keys: Saved keys.
        rename: Saved name to target name; one `*` on both sides stands for any text.

    Raises:
        ValueError: A pattern has several stars, or two keys get one name.

    >>> target_names(["model/a.w", "model/b"], {"model/a.*": "model/c.*"})
    {'model/a.w': 'model/c.w', 'model/b': 'model/b'}
    """
    rules: list[tuple[re.Pattern[str], str]] = []
    for old, new in rename.items():
        if old.count("*") != new.count("*") or old.count("*") > 1:
            raise ValueError(f"rename {old!r} -> {new!r}: use one '*' on both sides, or none")
        rules.append((re.compile(re.escape(old).replace(r"\*", "(.*)")), new))
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        name = key
        for pattern, new in rules:
            match = pattern.fullmatch(key)
            if match:
                name = new.replace("*", match[1]) if "*" in new else new
                break
        if name in taken:
            raise ValueError(f"rename gives both {taken[name]!r} and {key!r} the name {name!r}")
        taken[name] = key
        names[key] = name
    return names


def is_wanted(key: str, only: Collection[str]) -> bool:
    """Whether a key matches one of the globs; no globs means all."""
    return not only or any(fnmatch.fnmatchcase(key, glob) for glob in only)


def mismatches(
    saved: SavedState,
    targets: Targets,
    *,
    strict: bool,
    cast: bool,
    only: Collection[str],
    refused_per_rank: Mapping[str, str],
    mapped: Mapped | None = None,
) -> list[str]:
    """Return one line per key that does not fit.

    Args:
        saved: What the checkpoint holds, under the target's names.
        targets: What the state wants.
        strict: Whether missing and unexpected keys count.
        cast: Whether another dtype of the same kind is converted.
        only: Globs of keys wanted.
        refused_per_rank: Per-rank keys that this world size may not have, with the reason.
        mapped: What a model map told of the saved names; None where none is used.
    """
    problems: list[str] = []
    notes: Mapping[str, str] = {}
    if mapped is not None:
        problems += mapped.problems
        notes = mapped.notes
    missing: list[str] = []
    for key, leaf in targets.leaves.items():
        if only and not is_wanted(key, only):
            continue
        found = saved.leaves.get(saved.aliases.get(key, key))
        if found is None:
            missing.append(key)
        elif found.spec.shape != leaf.spec.shape:
            problems.append(_shape_problem(key, found, leaf.spec.shape, str(leaf.spec), notes))
        elif found.spec.dtype != leaf.spec.dtype and not cast:
            problems.append(
                f"{key!r}{notes.get(key, '')}: saved as {found.spec}, target is {leaf.spec}; "
                "cast the target, or pass cast=True to convert while reading"
            )
    for keys, have in (
        (targets.object_keys, saved.objects.keys()),
        (
            targets.per_rank_keys,
            saved.per_rank.keys() | set(saved.per_rank_dropped) | refused_per_rank.keys(),
        ),
    ):
        missing += [key for key in sorted(keys) if key not in have and is_wanted(key, only)]
    problems += [
        f"{k!r}: {why}" for k, why in refused_per_rank.items() if k in targets.per_rank_keys
    ]
    if not strict:
        return problems
    unexpected = _unexpected(saved, targets, only)
    every_saved = [*saved.leaves, *saved.objects, *saved.per_rank]
    every_target = [*targets.leaves, *targets.object_keys, *targets.per_rank_keys]
    problems += [f"{key!r}: not in the checkpoint{_nearest(key, every_saved)}" for key in missing]
    problems += [
        f"{key!r}{notes.get(key, '')}: saved, but not in the state{_nearest(key, every_target)}"
        for key in unexpected
    ]
    return problems


def raise_mismatch(step: int, url: str, problems: list[str]) -> None:
    """Raise one error that lists every problem.

    Raises:
        StateMismatchError: Always, where there is a problem.
    """
    if not problems:
        return
    shown = "\n  ".join(problems[:_MAX_SHOWN])
    more = len(problems) - _MAX_SHOWN
    tail = f"\n  and {more} more (see .problems)" if more > 0 else ""
    raise StateMismatchError(
        f"step {step} of {url} does not fit the state: {len(problems)} keys differ. Nothing was "
        "changed.\n"
        f"  {shown}{tail}\n"
        "Pass rename={saved: target} for renamed keys, strict=False to skip missing and "
        "unexpected ones, "
        "or only=[globs] to load a part.",
        tuple(problems),
    )


def _unexpected(saved: SavedState, targets: Targets, only: Collection[str]) -> list[str]:
    used = {saved.aliases.get(key, key) for key in targets.leaves}
    unexpected = [k for k in saved.leaves if k not in used and k not in targets.leaves]
    unexpected += [k for k in saved.objects if k not in targets.object_keys]
    unexpected += [k for k in saved.per_rank if k not in targets.per_rank_keys]
    return sorted(key for key in unexpected if is_wanted(key, only))


def _shape_problem(
    key: str, found: SavedLeaf, shape: tuple[int, ...], target: str, notes: Mapping[str, str]
) -> str:
    if len(found.spec.shape) != len(shape):
        hint = "another architecture" if found.role in ("param", "buffer") else "another optimizer"
    elif found.role in ("param", "buffer"):
        hint = "another size of model"
    else:
        hint = "the optimizer's state belongs to another size of model"
    return f"{key!r}{notes.get(key, '')}: saved as {found.spec}, target is {target} ({hint})"


def _nearest(key: str, candidates: list[str]) -> str:
    # difflib is quadratic; the last part of a key narrows the candidates first.
    tail = key.rsplit(".", 1)[-1]
    close = [c for c in candidates if c.rsplit(".", 1)[-1] == tail][:_MAX_FOR_NEAREST]
    found = difflib.get_close_matches(key, close or candidates[:_MAX_FOR_NEAREST], n=1, cutoff=0.6)
    return f" (nearest is {found[0]!r})" if found and found[0] != key else ""
