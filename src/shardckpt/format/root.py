"""Roots: the entries of the commit log, each with the full state of the store.

Layer: format. See docs/FORMAT.md for the fields and catalog.py for the protocol.
"""

from __future__ import annotations

import math
import re
from typing import Final, Literal

import msgspec

from shardckpt.errors import FormatError, StorageError
from shardckpt.format.sealed import digest, seal, unseal

FORMAT_VERSION: Final = 1
PACKED_DIGESTS: Final = "packed-digests"
SOME_WRITERS: Final = "some-writers"
KNOWN_FEATURES: Final = frozenset({PACKED_DIGESTS, SOME_WRITERS})
MAX_ROOT_BYTES: Final = 1 << 20
# What only a commit may not use: a takeover, a drop or an abort must fit behind the largest commit.
_RESERVED_BYTES: Final = 1 << 16
STORE_KEY: Final = "STORE"
ROOTS: Final = "roots"
LEASES: Final = "leases"
MANIFEST: Final = "MANIFEST.json"
NO_DIGEST: Final = ""

_ROOT_NAME: Final = re.compile(r"[0-9]{20}\.json")
_ATTEMPT_NAME: Final = re.compile(r"step-([0-9]{12,18})\.([0-9]{1,18})\.([0-9a-f]{32})")

RootKind = Literal["takeover", "commit", "maintain", "abort"]
_NonFinite = Literal["nan", "inf", "-inf"]


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """The STORE file: which store this is, written once."""

    format: int
    features: list[str]
    store_id: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One live step of the store.

    Attributes:
        step: Training step.
        attempt: Directory that holds it.
        parent: Attempt this one continued from, or "".
        manifest: Digest of its MANIFEST.json.
        metrics: The user's figures, for keep-best; on disk `nan`, `inf` and `-inf` are text.
        pinned: Never dropped by retention.
        abandoned: Off the current branch: kept, never latest.
        world_size: Ranks that saved it.
        nbytes: Bytes of its files.
        saved_unix_s: Wall clock of the commit, for people only.
    """

    step: int
    attempt: str
    parent: str
    manifest: str
    metrics: dict[str, float]
    pinned: bool
    abandoned: bool
    world_size: int
    nbytes: int
    saved_unix_s: float


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """One numbered entry of the commit log: the whole state of the store at that moment.

    Attributes:
        store_id: Id from STORE.
        seq: Its number.
        epoch: Which writer owns the store.
        kind: Why it was written.
        writer: Free text that names the job, for messages.
        nonce: Fresh for every put.
        owner: Nonce of the takeover that opened this epoch.
        before: Digest of the root before.
        live: Live steps in commit order.
        aborted: Attempts of this epoch that can never commit.
        retired: Attempts dropped from `live` whose directory may still exist.
        last: Last attempt committed in this epoch and in the one before ("" where none).
        ever: Whether an un-abandoned step ever existed.
    """

    store_id: str
    seq: int
    epoch: int
    kind: RootKind
    writer: str
    nonce: str
    owner: str
    before: str
    live: list[Entry]
    aborted: list[str]
    retired: list[str]
    last: tuple[str, str]
    ever: bool

    def entry(self, attempt: str) -> Entry | None:
        """Return the live entry of an attempt, or None."""
        return next((e for e in self.live if e.attempt == attempt), None)

    @property
    def current(self) -> list[Entry]:
        """Live entries of the current branch, in commit order."""
        return [e for e in self.live if not e.abandoned]

    @property
    def latest(self) -> Entry | None:
        """The newest step of the current branch, by the log's order."""
        return next((e for e in reversed(self.live) if not e.abandoned), None)


def root_name(seq: int) -> str:
    """Return the file name of root `seq`."""
    return f"{seq:020d}.json"


def root_seq(name: str) -> int | None:
    """Return the number in a root's file name, or None where the name is not a root's."""
    return int(name[:20]) if _ROOT_NAME.fullmatch(name) else None


def attempt_name(step: int, epoch: int, random_hex: str) -> str:
    """Return the directory of one attempt."""
    return f"step-{step:012d}.{epoch}.{random_hex}"


def attempt_parts(name: str) -> tuple[int, int] | None:
    """Return `(step, epoch)` of an attempt directory, or None for another name."""
    match = _ATTEMPT_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def encode_root(root: Root) -> bytes:
    """Return the bytes of a root.

    Raises:
        StorageError: The root would be larger than a reader accepts.
    """
    # JSON has no nan and no inf, and a root that cannot be read back stops the whole store.
    live = [
        msgspec.structs.replace(e, metrics={k: _stored(v) for k, v in e.metrics.items()})
        for e in root.live
    ]
    data = seal(msgspec.structs.replace(root, live=live))
    most = MAX_ROOT_BYTES - (_RESERVED_BYTES if root.kind == "commit" else 0)
    if len(data) > most:
        raise StorageError(
            f"{ROOTS}/{root_name(root.seq)}: {len(data)} bytes for {len(root.live)} live and "
            f"{len(root.retired)} retired steps, but a root holds {most}. Drop steps, keep fewer "
            "(Retention), or save fewer metrics."
        )
    return data


def decode_root(data: bytes, name: str) -> Root:
    """Return the root in `data`.

    Raises:
        CorruptCheckpointError: Torn or flipped.
        FormatError: A root this version does not read, or one under another's name.
    """
    what = f"{ROOTS}/{name}"
    stored = unseal(data, _StoredRoot, what=what)
    fields = msgspec.structs.asdict(stored)
    root = Root(**{**fields, "live": [_entry(e) for e in stored.live]})
    if root_name(root.seq) != name:
        raise FormatError(f"{what}: holds root {root.seq}")
    for entry in root.live:
        parts = attempt_parts(entry.attempt)
        if parts is None or parts[0] != entry.step:
            raise FormatError(f"{what}: {entry.attempt!r} is not an attempt at step {entry.step}")
    attempts = [e.attempt for e in root.live]
    for attempt in (*root.aborted, *root.retired, *filter(None, root.last)):
        if attempt_parts(attempt) is None:
            raise FormatError(f"{what}: {attempt!r} is not an attempt")
    if len(set(attempts)) != len(attempts):
        raise FormatError(f"{what}: an attempt is live twice")
    return root


class _StoredEntry(Entry, frozen=True, kw_only=True):
    metrics: dict[str, float | _NonFinite]  # type: ignore[assignment]


class _StoredRoot(Root, frozen=True, kw_only=True):
    live: list[_StoredEntry]  # type: ignore[assignment]


def _stored(metric: float) -> float | str:
    return metric if math.isfinite(metric) else str(float(metric))


def _entry(stored: _StoredEntry) -> Entry:
    metrics = {key: float(metric) for key, metric in stored.metrics.items()}
    return Entry(**{**msgspec.structs.asdict(stored), "metrics": metrics})


def root_digest(data: bytes) -> str:
    """Return the digest by which the next root names this one."""
    return digest(data)


def encode_store(store_id: str) -> bytes:
    """Return the bytes of STORE."""
    return seal(Store(format=FORMAT_VERSION, features=[], store_id=store_id))


def decode_store(data: bytes) -> Store:
    """Return what STORE says.

    Raises:
        CorruptCheckpointError: Torn or flipped.
        FormatError: Another version, or a feature this one does not know.
    """
    store = unseal(data, Store, what=STORE_KEY)
    check_version(store.format, store.features, STORE_KEY)
    return store


def check_version(version: int, features: list[str], what: str) -> None:
    """Refuse what this version cannot read.

    Raises:
        FormatError: Another version, or a required feature this one does not know.
    """
    unknown = sorted(set(features) - KNOWN_FEATURES)
    if version != FORMAT_VERSION or unknown:
        raise FormatError(
            f"{what}: format {version} with features {features}; this version of shardckpt reads "
            f"format {FORMAT_VERSION} with features {sorted(KNOWN_FEATURES)}. Read it with a newer "
            "shardckpt."
        )
