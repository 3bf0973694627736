"""The promises of the commit log, as checks of what the model checker reaches.

Every check raises `Violation`. They look at stores and at what actors were told, never at how it
came about.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from world import (
    Ghost,
    Store,
    Stored,
    Violation,
    digest_of,
)

from shardckpt.format.root import (
    Root,
    attempt_parts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_put(
    before: Stored, root: Root, owner: str, ancestry: dict[str, tuple[str, ...]]
) -> Ghost:
    """Check a root that becomes the newest against the one before; return its history."""
    previous = before.valid
    _must(
        root.before == digest_of(before.data),
        "a root that does not follow the newest became newest",
    )
    _must(root.epoch >= previous.epoch, "the epoch went back")
    if root.kind == "takeover":
        _must(
            root.epoch == previous.epoch + 1 and root.owner == owner, "a takeover opened no epoch"
        )
    else:
        same = (root.epoch, root.owner) == (previous.epoch, previous.owner)
        _must(same, f"a {root.kind} changed epoch or owner")
    if root.kind in ("commit", "abort"):
        _must(previous.owner == owner, "a fenced writer changed what readers see")
    was, now = _names(previous), _names(root)
    new = [a for a in now if a not in was]
    _must(not set(new) & set(before.ghost.committed), "a retired attempt came back")
    _must(len(new) == (root.kind == "commit"), f"a {root.kind} made {len(new)} steps live")
    committed = (*before.ghost.committed, *new)
    aborted = before.ghost.aborted | frozenset(root.aborted)
    _must(not aborted & set(committed), "an attempt is both committed and aborted")
    grown = [*was, *new]
    _must(len(now) >= min(2, len(grown)), "fewer than two steps are live")
    branch = _line(committed[-1], ancestry)
    good = sum(a in branch for a in grown)
    _must(sum(a in branch for a in now) >= min(2, good), "fewer than two good steps are live")
    gone = set(grown) - set(now)
    _must(gone <= set(root.retired), "a step left the log without being retired")
    return Ghost(committed, aborted, stray=False)


def check_store(store: Store, newest: Stored) -> None:
    """Check what anybody who opens this store finds."""
    root = newest.valid
    ghost = newest.ghost
    _must(not ghost.stray, "a root put below a newer one is the newest")
    ancestry = dict(store.ancestry)
    names = _names(root)
    order = [a for a in ghost.committed if a in names]
    _must(order == names, f"live steps are not in commit order: {names}")
    branch = _line(ghost.committed[-1], ancestry)
    for entry in root.live:
        off = entry.attempt not in branch
        _must(entry.abandoned == off, f"{entry.attempt} is marked abandoned={entry.abandoned}")
        nearest = next((a for a in reversed(ancestry[entry.attempt]) if a in names), "")
        _must(
            entry.parent == nearest, f"{entry.attempt} has parent {entry.parent!r}, not {nearest!r}"
        )
    latest = root.latest
    _must(latest is not None and latest.attempt in branch, "latest is no step of the branch")
    _must(not set(root.retired) & set(names), "a step is live and retired")
    there = {a for a, fate in store.attempts if fate != "gone"}
    _must(set(names) <= there, "a live step has no files")
    decided = set(ghost.committed) | ghost.aborted
    for attempt in there - set(names):
        parts = attempt_parts(attempt)
        assert parts is not None
        kept = attempt in root.retired or attempt in root.aborted or parts[1] < root.epoch
        _must(kept or attempt not in decided, f"nobody may ever delete {attempt}")
    # One unreadable newest root must leave a good one.
    below = [r for r in store.roots if r.seq < newest.seq and r.fate != "gone"]
    valid = [r for r in below if r.root is not None]
    _must(bool(valid) and not valid[-1].ghost.stray, "one bad root and no good one is left")


def check_delete(newest: Stored, attempt: str) -> None:
    """Check that an attempt's files may go."""
    root = newest.valid
    parts = attempt_parts(attempt)
    assert parts is not None
    _must(attempt not in _names(root), "files that the newest root names were deleted")
    decided = attempt in newest.ghost.committed or attempt in newest.ghost.aborted
    _must(decided or parts[1] < root.epoch, "an undecided attempt of the owner was deleted")


def check_said(newest: Stored, said: Sequence[tuple[Any, ...]]) -> None:
    """Check what an actor was told against what the store says now."""
    root = newest.valid
    ghost = newest.ghost
    for what, *about in said:
        subject = about[0]
        match what:
            case "committed":
                _must(subject in ghost.committed, f"{subject} was acknowledged and is lost")
            case "aborted" | "fenced":
                _must(subject not in ghost.committed, f"{subject} was called {what}, but committed")
            case "owns":
                stands = root.epoch > about[1] or (root.epoch, root.owner) == (about[1], subject)
                _must(stands, f"{subject} owns epoch {about[1]}, but the log does not say so")
            case "superseded":
                _must(root.owner != subject, f"{subject} owns the epoch, but raised Fenced")
            case "dropped":
                _must(root.entry(subject) is None, f"{subject} was dropped and is live")
            case "pinned":
                entry = root.entry(subject)
                _must(entry is None or entry.pinned, f"{subject} was pinned and is not")
            case "read":
                start, seq, stray = about
                _must(not stray, "a reader believed a stray root")
                _must(
                    seq >= start, f"a reader took root {seq} for the newest when {start} was there"
                )
            case "unknown":
                pass
            case _:
                raise AssertionError(what)


def check_together(said: Sequence[Sequence[tuple[Any, ...]]]) -> None:
    """Check that what several actors were told fits together."""
    verdicts: dict[str, set[str]] = {}
    owners: dict[int, set[str]] = {}
    for what, *about in itertools.chain(*said):
        if what in ("committed", "aborted", "fenced"):
            verdicts.setdefault(about[0], set()).add(
                "committed" if what == "committed" else "failed"
            )
        if what == "owns":
            owners.setdefault(about[1], set()).add(about[0])
    for attempt, outcomes in verdicts.items():
        _must(len(outcomes) == 1, f"ranks disagree on {attempt}")
    for epoch, who in owners.items():
        _must(len(who) == 1, f"{sorted(who)} all own epoch {epoch}")


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)


def _names(root: Root) -> list[str]:
    return [e.attempt for e in root.live]


def _line(attempt: str, ancestry: dict[str, tuple[str, ...]]) -> set[str]:
    return {*ancestry[attempt], attempt}
