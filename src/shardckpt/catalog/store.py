"""The catalog of one store: runs the log's protocol, sweeps garbage, keeps leases.

Layer: catalog. The only module that reads or writes `STORE`, `roots/` and `leases/`.

Sweep: only directories that the newest *durable* root does not name, that are aborted, retired or
of an earlier epoch, and that no lease names. Leases are listed after that root is durable, so a
reader that put its lease and then still saw its step live is always seen. A lease is dead when its
name has not changed for `lease_ttl_s` on the sweeper's own clock.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from shardckpt.catalog import log
from shardckpt.errors import (
    CorruptCheckpointError,
    FencedError,
    StepNotFoundError,
    StorageError,
    StoreNotFoundError,
)
from shardckpt.format.root import (
    LEASES,
    MAX_ROOT_BYTES,
    ROOTS,
    STORE_KEY,
    Entry,
    Root,
    attempt_name,
    attempt_parts,
    decode_store,
    encode_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Sequence

    from shardckpt.storage.base import Storage

LEASE_TTL_S: Final = 120.0
_logger = logging.getLogger(__name__)
T = TypeVar("T")


class Catalog:
    """The commit log of one store. Not thread-safe: one thread of one process at a time."""

    def __init__(
        self,
        storage: Storage,
        *,
        writer: str,
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
        monotonic: Callable[[], float] = time.monotonic,
        lease_ttl_s: float = LEASE_TTL_S,
    ) -> None:
        """Take a storage; nothing is read or written yet.

        Args:
            storage: The store's bytes.
            writer: Names this job in roots and in others' errors.
            nonce: Fresh 32 hex digits per call.
            monotonic: Clock for leases.
            lease_ttl_s: Seconds without renewal after which a lease is dead.
        """
        self._storage = storage
        self._name = writer
        self._nonce = nonce
        self._monotonic = monotonic
        self._lease_ttl_s = lease_ttl_s
        self._valid_roots: set[str] = set()
        self._leases_seen: dict[str, float] = {}
        self._attempts_seen: frozenset[str] | None = None

    @property
    def storage(self) -> Storage:
        """The store's bytes."""
        return self._storage

    def create(self) -> Root:
        """Make the store where it does not exist yet and return its newest root.

        Raises:
            FormatError: The store is of another version.
            StorageError: The place cannot be written.
        """
        self._storage.prepare()
        try:
            data = self._storage.get(STORE_KEY, MAX_ROOT_BYTES)
        except FileNotFoundError:
            self._storage.put_if_absent(STORE_KEY, encode_store(self._nonce()))
            data = self._storage.get(STORE_KEY, MAX_ROOT_BYTES)
        store = decode_store(data)
        first = log.first_root(store.store_id, self._name, self._nonce())
        return self._checked(self._run(log.create(first)), store.store_id)

    def newest(self) -> Root:
        """Return the newest root without becoming a writer.

        Raises:
            StoreNotFoundError: There is no store here.
            CorruptCheckpointError: The log is damaged or belongs to another store.
        """
        try:
            store = decode_store(self._storage.get(STORE_KEY, MAX_ROOT_BYTES))
        except FileNotFoundError:
            raise StoreNotFoundError(
                f"{self._storage.url}: no checkpoint store here (no {STORE_KEY} file). Check the "
                "path."
            ) from None
        newest = self._run(log.read_newest())
        if newest is None:
            raise StoreNotFoundError(
                f"{self._storage.url}: the store is new and holds no roots yet"
            )
        return self._checked(newest.root, store.store_id)

    def take_over(self) -> tuple[log.Writer, Root]:
        """Become the store's writer; a job that was writing is fenced from now on.

        Raises:
            FencedError: Another job took over at the same moment.
        """
        owner = self._nonce()
        verdict, root = self._run(log.takeover(owner, self._name, self._nonce))
        if verdict != "committed":
            raise FencedError(
                f"{self._storage.url}: {root.writer} took over (epoch {root.epoch}) while this "
                "job was "
                "opening the store. Two jobs write to one store; stop one of them."
            )
        return log.Writer(root.epoch, owner, self._name), root

    def new_attempt(self, writer: log.Writer, step: int) -> str:
        """Return the name of a fresh attempt directory."""
        return attempt_name(step, writer.epoch, self._nonce())

    def commit(
        self,
        writer: log.Writer,
        entry: Entry,
        ancestry: Sequence[str],
        to_drop: Callable[[Root], Collection[str]],
    ) -> tuple[log.Verdict, Root]:
        """Propose a step and return the log's verdict, durable.

        Raises:
            StorageError: The log cannot be read or written.
        """
        seen = self._attempts_seen

        def existing(attempt: str) -> bool:
            return seen is None or attempt in seen

        return self._run(log.commit(writer, entry, ancestry, to_drop, existing, self._nonce))

    def abort(self, writer: log.Writer, attempt: str) -> tuple[log.Verdict, Root]:
        """Make sure that an attempt never commits; returns what the log says of it.

        Raises:
            StorageError: The log cannot be read or written.
        """
        return self._run(log.abort(writer, attempt, self._nonce))

    def pin(self, attempt: str, *, pinned: bool) -> Root:
        """Pin or unpin a live step.

        Raises:
            StepNotFoundError: The attempt is not live.
        """

        def change(root: Root) -> Root | None:
            entry = root.entry(attempt)
            if entry is None:
                raise StepNotFoundError(f"{self._storage.url}: {attempt} is not a live step")
            if entry.pinned == pinned:
                return None
            live = [
                msgspec.structs.replace(e, pinned=pinned) if e.attempt == attempt else e
                for e in root.live
            ]
            return msgspec.structs.replace(root, live=live)

        return self._run(log.maintain(self._name, change, self._nonce))

    def drop(self, attempts: Collection[str]) -> Root:
        """Retire live steps, as far as two good ones stay; their files go with the next sweep."""

        def change(root: Root) -> Root | None:
            dropped = log.drop(root, attempts)
            return None if dropped.live == root.live else dropped

        return self._run(log.maintain(self._name, change, self._nonce))

    def sweep(self) -> list[str]:
        """Delete dead attempts and old roots; return the attempts deleted.

        Raises:
            StorageError: A removal failed; calling again goes on.
        """
        newest = self._run(log.read_newest())
        if newest is None:
            return []
        self._storage.sync(ROOTS)
        names = [name for name in self._storage.list("") if attempt_parts(name) is not None]
        dead = [name for name in names if _may_delete(newest.root, name)]
        leased = self._leased() if dead else set()
        gone: list[str] = []
        for name in dead:
            if name in leased:
                _logger.debug("%s is leased by a reader and stays", name)
                continue
            self._storage.delete_tree(name)
            gone.append(name)
        if gone:
            self._storage.sync("")
        self._attempts_seen = frozenset(set(names) - set(gone))
        self._run(log.prune(self._valid_roots))
        return gone

    def find(self, root: Root, step: int | None) -> Entry:
        """Return the entry to restore: the latest, or the newest of one step.

        Raises:
            StepNotFoundError: There is none; lists what is there.
        """
        if step is None:
            entry = root.latest
        else:
            entry = next((e for e in reversed(root.live) if e.step == step), None)
        if entry is None:
            steps = [e.step for e in root.live]
            wanted = (
                "no step of the current branch" if step is None else f"step {step} is not committed"
            )
            raise StepNotFoundError(f"{self._storage.url}: {wanted}; committed steps are {steps}")
        return entry

    def lease(self, attempt: str) -> Lease | None:
        """Ask that an attempt stays while it is read; None where this store cannot be written.

        The caller re-reads the newest root afterwards: only a step still live then is protected.
        """
        lease = Lease(self._storage, attempt, self._nonce()[:16])
        try:
            lease.renew()
        except StorageError as error:
            _logger.debug("reading %s without a lease: %s", attempt, error)
            return None
        return lease

    def _leased(self) -> set[str]:
        now = self._monotonic()
        names = set(self._storage.list(LEASES))
        self._leases_seen = {n: self._leases_seen.get(n, now) for n in names}
        leased: set[str] = set()
        for name, since in self._leases_seen.items():
            if now - since > self._lease_ttl_s:
                self._storage.delete(f"{LEASES}/{name}")
            else:
                leased.add(name.rsplit(".", 2)[0])
        return leased

    def _checked(self, root: Root, store_id: str) -> Root:
        if root.store_id != store_id:
            raise CorruptCheckpointError(
                f"{self._storage.url}: roots belong to store {root.store_id}, {STORE_KEY} says "
                f"{store_id}. "
                "Two stores were copied into one directory."
            )
        return root

    def _run(self, protocol: Generator[log.LogOp, log.LogAnswer, T]) -> T:
        answer: log.LogAnswer = None
        while True:
            try:
                operation = protocol.send(answer)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            answer = self._perform(operation)

    def _perform(self, operation: log.LogOp) -> log.LogAnswer:
        match operation:
            case log.ListRoots():
                return self._storage.list(ROOTS)
            case log.GetRoot(name):
                try:
                    return self._storage.get(f"{ROOTS}/{name}", MAX_ROOT_BYTES)
                except FileNotFoundError:
                    return None
            case log.PutRoot(name, data):
                try:
                    return self._storage.put_if_absent(f"{ROOTS}/{name}", data)
                except StorageError as error:
                    return error
            case log.SyncRoots():
                self._storage.sync(ROOTS)
                return None
            case log.DeleteRoot(name):
                self._storage.delete(f"{ROOTS}/{name}")
                return None


class Lease:
    """One reader's lease, renewed under a new name, so that only change is observed."""

    def __init__(self, storage: Storage, attempt: str, reader: str) -> None:
        """Name the attempt and the reader; nothing is written yet."""
        self._storage = storage
        self._stem = f"{LEASES}/{attempt}.{reader}"
        self._count = 0

    def renew(self) -> None:
        """Put the next name and remove the one before.

        Raises:
            StorageError: The store cannot be written.
        """
        self._storage.put_if_absent(f"{self._stem}.{self._count + 1}", b"{}\n")
        if self._count:
            self._storage.delete(f"{self._stem}.{self._count}")
        self._count += 1

    def release(self) -> None:
        """Remove the lease; a failure leaves it to expire."""
        try:
            self._storage.delete(f"{self._stem}.{self._count}")
        except StorageError as error:
            _logger.debug("lease %s stays until it expires: %s", self._stem, error)


def _may_delete(root: Root, attempt: str) -> bool:
    parts = attempt_parts(attempt)
    if parts is None or root.entry(attempt) is not None:
        return False
    return attempt in root.aborted or attempt in root.retired or parts[1] < root.epoch
