"""Choose: which committed step is read, and a lease so that it stays while it is.

Layer: load. The coordinator chooses an entry, leases it, reads the log again, and announces
{attempt, manifest digest, step}; every rank opens exactly that.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.catalog.store import LEASE_TTL_S
from shardckpt.coord.session import RoundFailedError
from shardckpt.errors import ShardckptError, error_named

if TYPE_CHECKING:
    from types import TracebackType

    from shardckpt.catalog.store import Catalog, Lease
    from shardckpt.coord.session import Round
    from shardckpt.format.root import Root

_GRACE: Final = 1.1
_logger = logging.getLogger("shardckpt")


class Chosen(msgspec.Struct, frozen=True):
    """What the coordinator announces; `is_empty` where nothing was ever committed."""

    attempt: str
    manifest: str
    step: int
    ancestry: list[str]
    is_empty: bool


def agree_on_step(
    round_: Round, catalog: Catalog, step: int | None, skip: list[str], *, call: str
) -> tuple[Chosen, Lease | None]:
    """Learn which step is read; the coordinator chooses, and holds the lease it returns.

    Args:
        round_: The round of this restore or load.
        catalog: The store's log.
        step: The step asked for; None the newest.
        skip: Attempts found damaged.
        call: What the user called, for messages.

    Raises:
        DeadlineError: The coordinator's word did not come.
        StepNotFoundError: There is no such step.
    """
    try:
        if round_.rank != 0:
            what = f"the coordinator's call of {call}"
            return round_.wait("chosen", Chosen, what=what, grace=_GRACE), None
        chosen, lease = choose(catalog, step, skip)
        round_.publish("chosen", chosen)
    except RoundFailedError as failed:
        raise error_named(failed.failure.kind, f"rank 0: {failed.failure.message}") from None
    except Exception as error:
        round_.fail(error, "chosen")
        raise
    return chosen, lease


def choose(catalog: Catalog, step: int | None, skip: list[str]) -> tuple[Chosen, Lease | None]:
    """Choose an entry, lease it, and see that it is still live.

    Raises:
        StepNotFoundError: There is none, though there was one.
    """
    while True:
        root = catalog.newest()
        if step is None and not root.live and not root.ever:
            return Chosen("", "", -1, [], is_empty=True), None
        visible = msgspec.structs.replace(
            root, live=[e for e in root.live if e.attempt not in skip]
        )
        entry = catalog.find(visible, step)
        lease = catalog.lease(entry.attempt)
        if catalog.newest().entry(entry.attempt) is not None:
            # Of the root that was chosen from: an operator may drop the step while it is read, and
            # the next commit still descends from its ancestors.
            line = ancestry_of(root, entry.attempt)
            return Chosen(entry.attempt, entry.manifest, entry.step, line, is_empty=False), lease
        if lease is not None:
            lease.release()


def ancestry_of(root: Root, attempt: str) -> list[str]:
    """Return the live ancestors of an attempt and itself, oldest first."""
    parents = {e.attempt: e.parent for e in root.live}
    line: list[str] = []
    while attempt and attempt not in line:
        line.append(attempt)
        attempt = parents.get(attempt, "")
    return line[::-1]


class Renewing:
    """Renews a lease in a thread while the block runs, and releases it."""

    def __init__(self, lease: Lease | None) -> None:
        """Take a lease, or None where there is nothing to renew."""
        self._lease = lease
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        """Start renewing."""
        if self._lease is not None:
            self._thread = threading.Thread(target=self._run, name="shardckpt-lease", daemon=True)
            self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop renewing and release."""
        self._done.set()
        if self._thread is not None and self._lease is not None:
            self._thread.join()
            self._lease.release()

    def _run(self) -> None:
        assert self._lease is not None
        while not self._done.wait(LEASE_TTL_S / 4):
            try:
                self._lease.renew()
            except ShardckptError as error:
                _logger.warning("the reader's lease could not be renewed: %s", error)
