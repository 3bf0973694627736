"""What the model of the commit log is made of: stores, actors, scenarios, and questions.

A store holds names with bytes, and beside them what only the checker knows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.format.root import (
    Root,
    decode_root,
    root_digest,
    root_name,
)

LOST = StorageError("the reply was lost")
TORN = b"{torn"


class Violation(Exception):
    """A promise of the log is broken; the message says which."""


# What a script asks of the model besides the operations of the log.


@dataclass(frozen=True)
class MakeAttempt:
    """The files of an attempt are written and durable; `base` is what it continues from."""

    attempt: str
    base: str


@dataclass(frozen=True)
class Choose:
    """Answered with any one of the options."""

    options: tuple[object, ...]


@dataclass(frozen=True)
class ChooseLive:
    """Answered with any attempt that is live now."""


@dataclass(frozen=True)
class AwaitMade:
    """Answered once the attempt has files."""

    attempt: str


@dataclass(frozen=True)
class AwaitDone:
    """Answered once another actor has finished."""

    actor: int


@dataclass(frozen=True)
class Hear:
    """Answered with another actor's verdict on an attempt, or at any time with "silence"."""

    actor: int
    attempt: str


@dataclass(frozen=True)
class NewestNow:
    """Answered with the number of the newest root, which only the checker can know."""


@dataclass(frozen=True)
class IsStray:
    """Answered with whether the root of this number was put below a newer one."""

    seq: int


Script = Callable[[SimpleNamespace, list[tuple[Any, ...]]], Generator[Any, Any, None]]


@dataclass(frozen=True)
class Actor:
    """One process.

    Attributes:
        name: For traces.
        owner: Owner nonce under which it may commit and abort.
        script: What it does.
        after_cut: It starts only after the power cut.
        coarse: An unbroken run of its reads is one step.
    """

    name: str
    owner: str
    script: Script
    after_cut: bool = False
    coarse: bool = True


@dataclass(frozen=True)
class Scenario:
    """Who takes part and what may go wrong.

    Attributes:
        actors: Everybody.
        power_cut: One power cut: all die but those that start after it; any subset of names that
            were not made durable is lost.
        lost_replies: How many puts are answered with an error, done or not.
        torn: How many roots are torn by a writer that dies.
    """

    name: str
    actors: tuple[Actor, ...]
    power_cut: bool = False
    lost_replies: int = 0
    torn: int = 0


class Ghost(NamedTuple):
    """What the checker knows of the history that a root stands for.

    Attributes:
        committed: Every attempt ever live, in order.
        aborted: Every attempt ever aborted.
        stray: Put below a newer name, so never to be believed.
    """

    committed: tuple[str, ...]
    aborted: frozenset[str]
    stray: bool


class Stored(NamedTuple):
    """One name in `roots/`.

    Attributes:
        seq: The number in its name.
        fate: "new" (a power cut may take it), "kept", or "gone" (a power cut may bring it back).
        data: Its bytes.
        ghost: The history it stands for.
    """

    seq: int
    fate: str
    data: bytes
    ghost: Ghost

    @property
    def root(self) -> Root | None:
        """What it says, or None where it is torn."""
        return root_of(self.data, root_name(self.seq))

    @property
    def valid(self) -> Root:
        """What it says, where it is known to be valid."""
        root = self.root
        assert root is not None
        return root


class Store(NamedTuple):
    """Everything on disk, and the true ancestry of every attempt."""

    roots: tuple[Stored, ...]
    attempts: tuple[tuple[str, str], ...]
    ancestry: tuple[tuple[str, tuple[str, ...]], ...]


@cache
def root_of(data: bytes, name: str) -> Root | None:
    """Return the root in some bytes, or None where they are torn."""
    try:
        return decode_root(data, name)
    except CorruptCheckpointError:
        return None


@cache
def digest_of(data: bytes) -> str:
    """Return the digest by which the next root names this one."""
    return root_digest(data)


def newest_of(store: Store) -> Stored:
    """Return the newest valid root."""
    for stored in reversed(store.roots):
        if stored.fate != "gone" and stored.root is not None:
            return stored
    raise Violation("no valid root is left")


def show_store(store: Store) -> str:
    """Return a store for people."""
    lines = []
    for r in store.roots:
        root = r.root
        if root is None:
            lines.append(f"  root {r.seq} torn")
            continue
        live = [e.attempt[14:21] + ("(abandoned)" if e.abandoned else "") for e in root.live]
        lines.append(
            f"  root {r.seq} {r.fate}{' STRAY' if r.ghost.stray else ''} epoch {root.epoch} "
            f"{root.owner} {root.kind} live {live} retired {len(root.retired)}"
        )
    return "\n".join(lines)
