"""The catalog of one store: runs the log's protocol, sweeps garbage, keeps leases.

Layer: catalog. The only module that reads or writes `STORE`, `roots/` and `leases/`.

The protocols themselves are `catalog.log` and `catalog.collect`. A lease is dead when its name has
not changed for `lease_ttl_s` on the sweeper's own clock.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from shardckpt.catalog import log, ops
from shardckpt.catalog.collect import collect_attempts, prune_roots
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
        self.last_proposed = ""
        self._nonce = nonce
        self._monotonic = monotonic
        self._lease_ttl_s = lease_ttl_s
        self._valid_roots: set[str] = set()
        self._leases_seen: dict[str, float] = {}
        self._gone: frozenset[str] = frozenset()
        self._sync_error: StorageError | None = None

    @property
    def storage(self) -> Storage:
        """The store's bytes."""
        return self._storage

    def create(self) -> Root:
        """Make the store where it does not exist yet and return its newest root.

        Raises:
            FormatError: The store is of another version.
            CorruptCheckpointError: Roots are there without STORE, or with another store's.
            StorageError: The place cannot be written.
        """
        self._storage.prepare()
        store_id = self._made_store_id()
        # Another creator may have put STORE and died before the name was durable. Roots that
        # outlived their STORE would belong to nobody, so it is made durable before the first root.
        self._storage.sync("")
        first = log.first_root(store_id, self._name, self._nonce())
        root = self._checked(self._run(log.create(first)), store_id)
        self._storage.sync("")
        return root

    def newest(self) -> Root:
        """Return the newest root without becoming a writer.

        Raises:
            StoreNotFoundError: There is no store here.
            CorruptCheckpointError: The log is damaged or belongs to another store.
        """
        store_id = self._store_id()
        newest = self._run(log.read_newest())
        if newest is None:
            raise StoreNotFoundError(
                f"{self._storage.url}: the store is new and holds no roots yet"
            )
        return self._checked(newest.root, store_id)

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
        self.last_proposed = entry.attempt
        return self._run(log.commit(writer, entry, ancestry, to_drop, self._gone, self._nonce))

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
            StoreNotFoundError: There is no store here.
            CorruptCheckpointError: The log belongs to another store; nothing was deleted.
            StorageError: A removal failed; calling again goes on.
        """
        self.newest()
        damaged = self._run(prune_roots(self._valid_roots))
        if damaged:
            _logger.warning(
                "%s: roots %s are damaged. What they committed is not seen; its directories stay. "
                "Restore these files from a copy, or leave them: later roots push them out.",
                self._storage.url,
                ", ".join(damaged),
            )
        collected = self._run(collect_attempts(keep_undecided=bool(damaged)))
        self._gone = collected.gone
        return list(collected.deleted)

    def find(self, root: Root, step: int | None) -> Entry:
        """Return the entry to restore: the latest, or the newest of one step.

        A step that the current branch lacks is taken from an abandoned one.

        Raises:
            StepNotFoundError: There is none; lists what is there.
        """
        if step is None:
            entry = root.latest
        else:
            same = [e for e in root.live if e.step == step]
            entry = next((e for e in reversed(same) if not e.abandoned), same[-1] if same else None)
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

    def _made_store_id(self) -> str:
        """Return the id in STORE, putting the file where there is no store yet."""
        try:
            return self._store_id()
        except StoreNotFoundError:
            # A new id would orphan roots that are there already.
            roots = self._storage.list(ROOTS)
        failure: StorageError | None = None
        if not roots:
            try:
                self._storage.put_if_absent(STORE_KEY, encode_store(self._nonce()))
            except StorageError as error:
                failure = error
        try:
            return self._store_id()
        except StoreNotFoundError:
            if failure is not None:
                raise failure from None
            raise CorruptCheckpointError(
                f"{self._storage.url}: {STORE_KEY} is missing, but {ROOTS}/ holds {len(roots)} "
                f"names. Put the {STORE_KEY} file back, or choose an empty place for a new store."
            ) from None

    def _store_id(self) -> str:
        try:
            return decode_store(self._storage.get(STORE_KEY, MAX_ROOT_BYTES)).store_id
        except FileNotFoundError:
            raise StoreNotFoundError(
                f"{self._storage.url}: no checkpoint store here (no {STORE_KEY} file). "
                "Check the path."
            ) from None

    def _checked(self, root: Root, store_id: str) -> Root:
        if root.store_id != store_id:
            raise CorruptCheckpointError(
                f"{self._storage.url}: roots belong to store {root.store_id}, {STORE_KEY} says "
                f"{store_id}. Two stores were copied into one directory; separate them."
            )
        return root

    def _run(self, protocol: Generator[ops.LogOp, ops.LogAnswer, T]) -> T:
        answer: ops.LogAnswer = None
        while True:
            try:
                operation = protocol.send(answer)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            answer = self._perform(operation)

    def _perform(self, operation: ops.LogOp) -> ops.LogAnswer:
        match operation:
            case ops.ListRoots():
                return self._storage.list(ROOTS)
            case ops.GetRoot(name):
                try:
                    return self._storage.get(f"{ROOTS}/{name}", MAX_ROOT_BYTES)
                except FileNotFoundError:
                    return None
            case ops.PutRoot(name, data):
                try:
                    return self._storage.put_if_absent(f"{ROOTS}/{name}", data)
                except StorageError as error:
                    return error
            case ops.SyncRoots():
                self._sync_roots()
            case ops.DeleteRoot(name):
                self._storage.delete(f"{ROOTS}/{name}")
            case ops.ListAttempts():
                return self._storage.list("")
            case ops.ListLeased():
                return sorted(self._leased())
            case ops.DeleteAttempt(name):
                self._storage.delete_tree(name)
            case ops.SyncAttempts():
                self._storage.sync("")
        return None

    def _sync_roots(self) -> None:
        # After a failed flush the kernel forgets what was not written, and the next flush succeeds
        # with the name lost. This catalog therefore never acknowledges anything again.
        if self._sync_error is not None:
            raise self._sync_error
        try:
            self._storage.sync(ROOTS)
        except StorageError as error:
            self._sync_error = error
            raise


class Lease:
    """One reader's lease, renewed under a new name, so that only change is observed."""

    def __init__(self, storage: Storage, attempt: str, reader: str) -> None:
        """Name the attempt and the reader; nothing is written yet."""
        self._storage = storage
        self._stem = f"{LEASES}/{attempt}.{reader}"
        self._count = 0
        self._names: list[str] = []

    def renew(self) -> None:
        """Put the next name and remove the one before the last.

        Raises:
            StorageError: The store cannot be written.
        """
        # The last name stays beside the new one: a listing is not atomic, and one that passed the
        # place of the new name before it was there must not find the last one gone either.
        self._count += 1
        name = f"{self._stem}.{self._count}"
        self._storage.put_if_absent(name, b"{}\n")
        self._names.append(name)
        while len(self._names) > 2:
            self._storage.delete(self._names[0])
            del self._names[0]

    def release(self) -> None:
        """Remove the lease; a failure leaves it to expire."""
        try:
            for name in self._names:
                self._storage.delete(name)
        except StorageError as error:
            _logger.debug("lease %s stays until it expires: %s", self._stem, error)
        self._names.clear()
