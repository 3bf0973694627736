"""The protocol of the commit log, free of I/O: generators that yield log operations.

Layer: catalog. The same code runs on a real store (`catalog.store`) and under a model checker that
tries every interleaving (`tests/catalog`). The protocol:

1. Read the newest root: list, get, list. The same name is newest in both lists, else read again; a
   root that vanished means list again, never an older one; a torn or flipped root is passed over.
2. Decide from that root alone: already there, lost, fenced, or still open.
3. Still open: put the next root, numbered one above every existing name, and go to 1. The outcome
   is what the newest root says, never what the put said.
4. Before anybody acts on a decision, `roots/` is made durable after it was read.

A takeover opens an epoch; commit and abort belong to one; maintain keeps whichever epoch is
current, so an operator never fences a job.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import msgspec

from shardckpt.catalog.ops import GetRoot, ListRoots, LogAnswer, LogOp, PutRoot, SyncRoots
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

_MAX_PUT_ERRORS: Final = 3
# Bounds for a storage that contradicts itself; a busy but honest one comes nowhere near.
_MAX_READS: Final = 64
_MAX_PUTS: Final = 256

Verdict: TypeAlias = Literal["committed", "aborted", "fenced", "unknown"]
Decide: TypeAlias = Callable[[Root], "Verdict | None"]
Build: TypeAlias = Callable[[Root], Root]


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


@dataclass(slots=True)
class Puts:
    """What the puts of one proposal answered so far.

    Attributes:
        succeeded: Whether one was answered with True.
        failures: How many failed in a row.
        error: The last failure.
    """

    succeeded: bool = False
    failures: int = 0
    error: StorageError | None = None

    def note(self, answer: LogAnswer) -> None:
        """Count one answer."""
        if isinstance(answer, StorageError):
            self.failures += 1
            self.error = answer
        else:
            self.failures = 0
            self.succeeded = self.succeeded or answer is True

    def check(self) -> None:
        """Give up after several failures in a row; called only when the log was read since.

        Raises:
            StorageError: The last failure.
        """
        if self.failures >= _MAX_PUT_ERRORS:
            assert self.error is not None
            raise self.error


def read_newest() -> Generator[LogOp, LogAnswer, Newest | None]:
    """Return the newest valid root, or None for an empty log.

    Raises:
        CorruptCheckpointError: Roots exist and none is valid.
        FormatError: The newest root is of another version.
        StorageError: The listing and the roots keep contradicting each other.
    """
    for _ in range(_MAX_READS):
        found = yield from _read_once()
        if found != "changed":
            return found
    raise StorageError(
        f"the commit log changed during each of {_MAX_READS} readings: the storage lists roots "
        "that it does not hold, or something rewrites roots/ without end. Check the storage."
    )


def create(first: Root) -> Generator[LogOp, LogAnswer, Root]:
    """Return the newest root, durable, after putting `first` into an empty log.

    Raises:
        StorageError: Several puts failed in a row.
    """
    puts = Puts()
    for _ in range(_MAX_PUTS):
        newest = yield from read_newest()
        if newest is not None:
            yield SyncRoots()
            return newest.root
        puts.check()
        puts.note((yield PutRoot(root_name(first.seq), encode_root(first))))
    raise _contradiction()


def takeover(
    owner: str, name: str, nonce: Callable[[], str]
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Open the next epoch for `owner`; verdict `committed` when it holds, `fenced` when superseded.

    Raises:
        StorageError: Several puts failed in a row.
    """
    puts = Puts()

    def holds(root: Root) -> Verdict | None:
        if root.owner == owner:
            return "committed"
        return "fenced" if puts.succeeded else None

    def build(root: Root) -> Root:
        return msgspec.structs.replace(
            _stamped(root, "takeover", name, nonce()),
            epoch=root.epoch + 1,
            owner=owner,
            aborted=[],
            last=("", root.last[0]),
        )

    return (yield from _propose(holds, build, puts))


def commit(
    writer: Writer,
    entry: Entry,
    ancestry: Sequence[str],
    to_drop: Callable[[Root], Collection[str]],
    gone: Collection[str],
    nonce: Callable[[], str],
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Make `entry` a live step, dropping in the same root what retention lets go.

    Args:
        writer: The job, which owns an epoch.
        entry: The new step; its parent is set here.
        ancestry: Attempts this one descends from, oldest first.
        to_drop: Pure retention: which attempts of a root may go.
        gone: Retired attempts whose directory is durably gone; they leave `retired`.
        nonce: Fresh text per call.

    Raises:
        StorageError: Several puts failed in a row.
    """

    def build(root: Root) -> Root:
        parent = next((a for a in reversed(ancestry) if root.entry(a) is not None), "")
        child = msgspec.structs.replace(entry, parent=parent)
        grown = msgspec.structs.replace(
            _stamped(root, "commit", writer.name, nonce()),
            live=_mark_abandoned([*root.live, child], child.attempt),
            last=(child.attempt, root.last[1]),
            ever=True,
        )
        shrunk = drop(grown, [a for a in to_drop(grown) if a != child.attempt])
        return msgspec.structs.replace(shrunk, retired=[a for a in shrunk.retired if a not in gone])

    return (yield from _propose(lambda root: decide(root, entry.attempt, writer), build, Puts()))


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

    return (yield from _propose(lambda root: decide(root, attempt, writer), build, Puts()))


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
        stamped = _stamped(root, "maintain", name, nonce())
        return msgspec.structs.replace(stamped, live=changed.live, retired=changed.retired)

    def done(root: Root) -> Verdict | None:
        return "committed" if change(root) is None else None

    _, root = yield from _propose(done, build, Puts())
    return root


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


def list_roots() -> Generator[LogOp, LogAnswer, list[str]]:
    """Return the names of all roots, torn ones included, ascending."""
    names = yield ListRoots()
    assert isinstance(names, (list, tuple))
    return sorted(name for name in names if root_seq(name) is not None)


def valid_root(data: bytes, name: str) -> Root | None:
    """Return the root, or None where the bytes are torn or flipped.

    Raises:
        FormatError: A root of another version.
    """
    try:
        return decode_root(data, name)
    except CorruptCheckpointError:
        return None


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


def _propose(
    decide: Decide, build: Build, puts: Puts
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root]]:
    """Bring a change into the log or learn that it was decided otherwise; durable on return."""
    for _ in range(_MAX_PUTS):
        decided = yield from _propose_once(decide, build, puts)
        if decided is not None:
            return decided
    raise _contradiction()


def _propose_once(
    decide: Decide, build: Build, puts: Puts
) -> Generator[LogOp, LogAnswer, tuple[Verdict, Root] | None]:
    newest = yield from read_newest()
    if newest is None:
        raise CorruptCheckpointError(
            "the commit log is empty: the store was emptied under a running job. Stop the job."
        )
    verdict = decide(newest.root)
    if verdict is not None:
        yield SyncRoots()
        return verdict, newest.root
    # Only here, after reading again: the last put may have failed with the root in place.
    puts.check()
    root = msgspec.structs.replace(build(newest.root), seq=newest.next_seq, before=newest.digest)
    puts.note((yield PutRoot(root_name(root.seq), encode_root(root))))
    return None


def _read_once() -> Generator[LogOp, LogAnswer, Newest | Literal["changed"] | None]:
    names = yield from list_roots()
    if not names:
        return None
    found = yield from _newest_valid(names)
    if found == "vanished":
        return "changed"
    again = yield from list_roots()
    if not again or again[-1] != names[-1]:
        return "changed"
    if found is None:
        raise CorruptCheckpointError(
            f"none of the {len(names)} roots of the commit log is valid, newest {names[-1]}. "
            "Restore the roots/ directory from a copy."
        )
    root, digest = found
    newest_seq = root_seq(names[-1])
    assert newest_seq is not None
    return Newest(root, digest, newest_seq + 1)


def _newest_valid(
    names: Sequence[str],
) -> Generator[LogOp, LogAnswer, tuple[Root, str] | Literal["vanished"] | None]:
    for name in reversed(names):
        data = yield GetRoot(name)
        if data is None:
            return "vanished"
        assert isinstance(data, bytes)
        root = valid_root(data, name)
        if root is not None:
            return root, root_digest(data)
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


def _contradiction() -> StorageError:
    return StorageError(
        f"{_MAX_PUTS} puts of the next root brought no decision: the storage says that names exist "
        "which it does not list, so it cannot be trusted with a commit log. Use another one."
    )
