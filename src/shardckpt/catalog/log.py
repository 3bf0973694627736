"""The protocol of the commit log, free of I/O: generators that yield log operations.

Layer: catalog. The same code runs on a real store (`catalog.store`) and under a model checker that
tries every interleaving (`tests/catalog`). The protocol:

1. Read the newest root: list, get, list. The same name is newest in both lists, else read again; a
   root
   that vanished means list again, never an older one; a torn or flipped root is passed over.
2. Decide from that root alone: already there, lost, fenced, or still open.
3. Still open: put the next root, numbered one above every existing name, and go to 1. The outcome
   is what the
   newest root says, never what the put said.
4. Before anybody acts on a decision, `roots/` is made durable after it was read.

A takeover opens an epoch; commit and abort belong to one; maintain keeps whichever epoch is
current, so an operator never fences a job.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import msgspec

from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.format.root import (
    NO_DIGEST,
    Entry,
    Root,
    RootKind,
    decode_root,
    encode_root,
    root_digest,
    root_name,
    root_seq,
)

KEPT_ROOTS: Final = 16
_MAX_PUT_ERRORS: Final = 3


@dataclass(frozen=True, slots=True)
class ListRoots:
    """Answered with every name in `roots/`."""


@dataclass(frozen=True, slots=True)
class GetRoot:
    """Answered with the bytes, or None where the name is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class PutRoot:
    """Answered with True, False (the name exists) or the StorageError."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class SyncRoots:
    """Answered with None once every name a listing shows is durable."""


@dataclass(frozen=True, slots=True)
class DeleteRoot:
    """Answered with None."""

    name: str


LogOp: TypeAlias = ListRoots | GetRoot | PutRoot | SyncRoots | DeleteRoot
LogAnswer: TypeAlias = "Sequence[str] | bytes | bool | StorageError | None"


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest valid root, its digest, and the next free number."""

    root: Root
    digest: str
    next_seq: int


@dataclass(frozen=True, slots=True)
class Writer:
    """A job that owns an epoch."""

    epoch: int
    owner: str
    name: str


Verdict: TypeAlias = Literal["committed", "aborted", "fenced", "unknown"]
Decide: TypeAlias = Callable[[Root], "Verdict | None"]
Build: TypeAlias = Callable[[Root], Root]


def read_newest() -> Generator[LogOp, LogAnswer, Newest | None]:
    """Return the newest valid root, or None for an empty log.

    Raises:
        CorruptCheckpointError: Roots exist and none is valid.
        FormatError: The newest root is of another version.
    """
    while True:
        names = yield from _list()
        if not names:
            return None
        found = yield from _newest_valid(names)
        if isinstance(found, str):
            continue
        again = yield from _list()
        if not again or again[-1] != names[-1]:
            continue
        if found is None:
            raise CorruptCheckpointError(
                f"none of the {len(names)} roots of the commit log is valid, newest {names[-1]}. "
                "Restore the roots/ directory from a copy."
            )
        root, digest = found
        newest_seq = root_seq(names[-1])
        assert newest_seq is not None
        return Newest(root, digest, newest_seq + 1)


def propose(decide: Decide, build: Build) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Bring a change into the log, or learn that it was decided otherwise; durable on return.

    Raises:
        StorageError: Several puts failed in a row and the log does not hold the change.
    """
    errors = 0
    while True:
        newest = yield from read_newest()
        if newest is None:
            raise CorruptCheckpointError(
                "the commit log is empty; the store was emptied under a running job"
            )
        verdict = decide(newest.root)
        if verdict is not None:
            yield SyncRoots()
            return verdict, newest.root
        root = msgspec.structs.replace(
            build(newest.root), seq=newest.next_seq, before=newest.digest
        )
        answer = yield PutRoot(root_name(root.seq), encode_root(root))
        if isinstance(answer, StorageError):
            errors += 1
            if errors >= _MAX_PUT_ERRORS:
                raise answer


def create(first: Root) -> Generator[LogOp, LogAnswer, Root]:
    """Return the newest root, after putting `first` into an empty log.

    Raises:
        StorageError: Several puts failed in a row.
    """
    errors = 0
    while True:
        newest = yield from read_newest()
        if newest is not None:
            return newest.root
        answer = yield PutRoot(root_name(first.seq), encode_root(first))
        if isinstance(answer, StorageError):
            errors += 1
            if errors >= _MAX_PUT_ERRORS:
                raise answer


def takeover(
    owner: str, name: str, nonce: Callable[[], str]
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Open the next epoch for `owner`; verdict `committed` when it holds, `fenced` when superseded.

    Raises:
        StorageError: Several puts failed in a row.
    """
    created = False
    errors = 0
    while True:
        newest = yield from read_newest()
        if newest is None:
            raise CorruptCheckpointError(
                "the commit log is empty; the store was emptied under this job"
            )
        root = newest.root
        if root.owner == owner or created:
            yield SyncRoots()
            return ("committed" if root.owner == owner else "fenced"), root
        proposal = msgspec.structs.replace(
            _stamped(root, "takeover", name, nonce()),
            seq=newest.next_seq,
            before=newest.digest,
            epoch=root.epoch + 1,
            owner=owner,
            aborted=[],
            last=("", root.last[0]),
        )
        answer = yield PutRoot(root_name(proposal.seq), encode_root(proposal))
        created = answer is True
        if isinstance(answer, StorageError):
            errors += 1
            if errors >= _MAX_PUT_ERRORS:
                raise answer


def commit(
    writer: Writer,
    entry: Entry,
    ancestry: Sequence[str],
    to_drop: Callable[[Root], Collection[str]],
    existing: Callable[[str], bool],
    nonce: Callable[[], str],
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Make `entry` a live step, dropping in the same root what retention lets go.

    Args:
        writer: The job, which owns an epoch.
        entry: The new step; its parent is set here.
        ancestry: Attempts this one descends from, oldest first.
        to_drop: Pure retention: which attempts of a root may go.
        existing: Whether an attempt's directory may still exist; others leave `retired`.
        nonce: Fresh text per call.

    Raises:
        StorageError: Several puts failed in a row.
    """

    def build(root: Root) -> Root:
        live = root.live
        parents = [e.attempt for e in live if e.attempt in set(ancestry)]
        child = msgspec.structs.replace(entry, parent=parents[-1] if parents else "")
        grown = msgspec.structs.replace(
            _stamped(root, "commit", writer.name, nonce()),
            live=_mark_abandoned([*live, child], child.attempt),
            last=(child.attempt, root.last[1]),
            ever=True,
        )
        return _trim_retired(drop(grown, to_drop(grown)), existing)

    return (yield from propose(lambda root: decide(root, entry.attempt, writer), build))


def abort(
    writer: Writer, attempt: str, nonce: Callable[[], str]
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Make sure that `attempt` never commits, unless it already has.

    Raises:
        StorageError: Several puts failed in a row.
    """

    def build(root: Root) -> Root:
        stamped = _stamped(root, "abort", writer.name, nonce())
        return msgspec.structs.replace(stamped, aborted=[*root.aborted, attempt])

    return (yield from propose(lambda root: decide(root, attempt, writer), build))


def maintain(
    name: str, change: Callable[[Root], Root | None], nonce: Callable[[], str]
) -> Generator[LogOp, LogAnswer, Root]:
    """Apply an operator's change to whatever the newest root is; `change` returns None when done.

    Raises:
        StorageError: Several puts failed in a row.
    """

    def build(root: Root) -> Root:
        changed = change(root)
        assert changed is not None
        return msgspec.structs.replace(
            _stamped(root, "maintain", name, nonce()), live=changed.live, retired=changed.retired
        )

    _, root = yield from propose(lambda root: "committed" if change(root) is None else None, build)
    return root


def prune(valid: set[str]) -> Generator[LogOp, LogAnswer, None]:
    """Delete every root that has `KEPT_ROOTS` valid ones above it.

    Args:
        valid: Names known to be valid roots; roots are immutable, so the set is kept between calls.
    """
    names = yield from _list()
    above = 0
    synced = False
    for name in reversed(names):
        if above >= KEPT_ROOTS:
            if not synced:
                yield SyncRoots()
                synced = True
            yield DeleteRoot(name)
            valid.discard(name)
            continue
        if name not in valid:
            data = yield GetRoot(name)
            if not isinstance(data, bytes) or _decoded(data, name) is None:
                continue
            valid.add(name)
        above += 1


def decide(root: Root, attempt: str, writer: Writer) -> Verdict | None:
    """Say what `root` means for an attempt of `writer`; None while it is open."""
    if root.entry(attempt) is not None or attempt in root.retired or attempt in root.last:
        return "committed"
    if attempt in root.aborted:
        return "aborted"
    if root.epoch == writer.epoch and root.owner == writer.owner:
        return None
    return "fenced" if root.epoch <= writer.epoch + 1 else "unknown"


def drop(root: Root, attempts: Collection[str]) -> Root:
    """Return `root` without `attempts`; their children inherit their parents.

    Attempts without which fewer than two would be left are kept (`may_drop`).
    """
    live = list(root.live)
    gone: list[str] = []
    for attempt in attempts:
        entry = next((e for e in live if e.attempt == attempt), None)
        if entry is None or not may_drop(live, entry):
            continue
        live.remove(entry)
        live = [
            msgspec.structs.replace(e, parent=entry.parent) if e.parent == attempt else e
            for e in live
        ]
        gone.append(attempt)
    return msgspec.structs.replace(root, live=live, retired=[*root.retired, *gone])


def may_drop(live: Sequence[Entry], entry: Entry) -> bool:
    """Whether at least two steps, and two of the current branch, are left without `entry`."""
    current = sum(not e.abandoned for e in live)
    return len(live) > 2 and (entry.abandoned or current > 2)


def _list() -> Generator[LogOp, LogAnswer, list[str]]:
    names = yield ListRoots()
    assert isinstance(names, (list, tuple))
    return sorted(name for name in names if root_seq(name) is not None)


def _newest_valid(
    names: Sequence[str],
) -> Generator[LogOp, LogAnswer, tuple[Root, str] | str | None]:
    """Return the newest valid root and its digest, "vanished", or None where none is valid."""
    for name in reversed(names):
        data = yield GetRoot(name)
        if data is None:
            return "vanished"
        assert isinstance(data, bytes)
        root = _decoded(data, name)
        if root is not None:
            return root, root_digest(data)
    return None


def _decoded(data: bytes, name: str) -> Root | None:
    try:
        return decode_root(data, name)
    except CorruptCheckpointError:
        return None


def _stamped(root: Root, kind: RootKind, writer: str, nonce: str) -> Root:
    return msgspec.structs.replace(root, kind=kind, writer=writer, nonce=nonce)


def _mark_abandoned(live: list[Entry], newest: str) -> list[Entry]:
    """Mark every entry off the ancestry of `newest`."""
    parents = {e.attempt: e.parent for e in live}
    line: set[str] = set()
    attempt = newest
    while attempt in parents and attempt not in line:
        line.add(attempt)
        attempt = parents[attempt]
    return [msgspec.structs.replace(e, abandoned=e.attempt not in line) for e in live]


def _trim_retired(root: Root, existing: Callable[[str], bool]) -> Root:
    kept = [a for a in root.retired if existing(a) or a in root.last]
    return msgspec.structs.replace(root, retired=kept)


def first_root(store_id: str, writer: str, nonce: str) -> Root:
    """Return root 0 of a new store: nobody's epoch, nothing live."""
    return Root(
        store_id=store_id,
        seq=0,
        epoch=0,
        kind="maintain",
        writer=writer,
        nonce=nonce,
        owner="",
        before=NO_DIGEST,
        live=[],
        aborted=[],
        retired=[],
        last=("", ""),
        ever=False,
    )
