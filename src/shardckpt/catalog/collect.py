"""The protocol of garbage: which attempt directories and which old roots go, and in which order.

Layer: catalog; free of I/O like `catalog.log`.

Attempts:
1. Read the newest root and make `roots/` durable: nothing is deleted on the strength of a root that
   a power cut could take back.
2. An attempt may go when that root does not name it and it is aborted, retired or of an earlier
   epoch. An undecided attempt of the current epoch stays, whatever its age.
3. List the leases now, after the root is durable: a reader that put its lease and then still saw
   its step live is always seen.
4. Delete, make the removals durable, and only then call a retired attempt gone, so that the log
   forgets it.

While a root is damaged, attempts of earlier epochs of which the log says nothing stay, too: the
damaged root may have been the one that committed them, and a copy of it brings them back.

Roots: every name with `kept` valid roots above it goes, after those above are durable.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final

from shardckpt.catalog.log import list_roots, read_newest, valid_root
from shardckpt.catalog.ops import (
    DeleteAttempt,
    DeleteRoot,
    GetRoot,
    ListAttempts,
    ListLeased,
    LogAnswer,
    LogOp,
    SyncAttempts,
    SyncRoots,
)
from shardckpt.format.root import Root, attempt_parts

KEPT_ROOTS: Final = 16


@dataclass(frozen=True, slots=True)
class Collected:
    """What one collection did.

    Attributes:
        deleted: Attempts whose directory it removed.
        gone: Retired attempts whose directory is durably gone, by whose hand ever.
    """

    deleted: tuple[str, ...]
    gone: frozenset[str]


def collect_attempts(*, keep_undecided: bool = False) -> Generator[LogOp, LogAnswer, Collected]:
    """Delete every attempt directory that no reader sees and no writer can still commit.

    Args:
        keep_undecided: Leave attempts of earlier epochs of which the log says nothing: a root is
            damaged, and it may have been the one that committed them.
    """
    newest = yield from read_newest()
    if newest is None:
        return Collected((), frozenset())
    yield SyncRoots()
    names = yield from _list_attempts()
    dead = [name for name in names if may_delete(newest.root, name)]
    if keep_undecided:
        dead = [n for n in dead if n in newest.root.aborted or n in newest.root.retired]
    leased = (yield ListLeased()) if dead else ()
    assert isinstance(leased, Sequence)
    deleted = [name for name in dead if name not in leased]
    for name in deleted:
        yield DeleteAttempt(name)
    left = set(names) - set(deleted)
    gone = frozenset(newest.root.retired) - left
    if deleted or gone:
        # Also where this call deleted nothing: another collector's removal may not be durable yet,
        # and a directory that came back after the log forgot it would stay until the next epoch.
        yield SyncAttempts()
    return Collected(tuple(deleted), gone)


def prune_roots(
    valid: set[str], *, kept: int = KEPT_ROOTS
) -> Generator[LogOp, LogAnswer, tuple[str, ...]]:
    """Delete every root that has `kept` valid ones above it; return the damaged ones left.

    Args:
        valid: Names known to be valid roots; roots are immutable, so the set is kept between calls.
        kept: Valid roots to leave.
    """
    names = yield from list_roots()
    above = 0
    old: list[str] = []
    damaged: list[str] = []
    for name in reversed(names):
        if above >= kept:
            old.append(name)
        elif (yield from _is_valid(name, valid)):
            above += 1
        else:
            damaged.append(name)
    if old:
        yield SyncRoots()
    # Oldest first: names never go missing between two that are there.
    for name in reversed(old):
        yield DeleteRoot(name)
        valid.discard(name)
    return tuple(damaged)


def may_delete(root: Root, attempt: str) -> bool:
    """Say whether `root` lets the directory of `attempt` go."""
    parts = attempt_parts(attempt)
    if parts is None or root.entry(attempt) is not None:
        return False
    return attempt in root.aborted or attempt in root.retired or parts[1] < root.epoch


def _is_valid(name: str, valid: set[str]) -> Generator[LogOp, LogAnswer, bool]:
    if name in valid:
        return True
    data = yield GetRoot(name)
    if not isinstance(data, bytes) or valid_root(data, name) is None:
        return False
    valid.add(name)
    return True


def _list_attempts() -> Generator[LogOp, LogAnswer, list[str]]:
    names = yield ListAttempts()
    assert isinstance(names, (list, tuple))
    return sorted(name for name in names if attempt_parts(name) is not None)
