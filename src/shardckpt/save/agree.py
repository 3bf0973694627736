"""How all ranks of a save come to one outcome when something fails.

Layer: save.

1. A rank that fails publishes its error, which ends every wait of that save.
2. The coordinator puts an abort root and publishes what the log says; all others are told.
3. A rank that is not told in time asks the log itself, by an abort root: whoever wins decides.
4. Only where the log cannot be asked either may the outcome of a rank be that it is unknown.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, final

from shardckpt.coord.session import Round, RoundFailedError
from shardckpt.errors import DeadlineError, OutcomeUnknownError, ShardckptError, StorageError
from shardckpt.save.commit import outcome_of
from shardckpt.save.messages import Outcome

if TYPE_CHECKING:
    from shardckpt.catalog.log import Writer
    from shardckpt.catalog.store import Catalog
    from shardckpt.coord.base import Coord

_logger = logging.getLogger("shardckpt")
# Others wait a little longer than the coordinator, who knows more.
GRACE: Final = 1.1


@final
class Agreement:
    """One rank's part in it, for all saves of a run."""

    def __init__(self, coord: Coord, catalog: Catalog, writer: Writer) -> None:
        """Take what the saves share.

        Args:
            coord: The job's key-value store.
            catalog: The store's log.
            writer: The epoch this job owns.
        """
        self._coord = coord
        self._catalog = catalog
        self._writer = writer
        self._doomed: list[str] = []

    @property
    def _is_coordinator(self) -> bool:
        return self._coord.rank == 0

    def told(self, round_: Round) -> Outcome:
        """Wait for the coordinator's word.

        Raises:
            DeadlineError: It did not come.
        """
        return round_.wait(
            "outcome", Outcome, what="the coordinator's outcome", grace=GRACE, heed_errors=False
        )

    def publish(self, round_: Round, outcome: Outcome) -> None:
        """Tell all ranks; the coordinator's part."""
        try:
            round_.publish("outcome", outcome)
        except DeadlineError as error:
            # The others will learn it from the log.
            _logger.warning("%s: the outcome could not be announced: %s", round_.what, error)

    def failed(self, round_: Round, step: int, attempt: str, error: Exception) -> Outcome:
        """Agree on a failure: the coordinator decides by the log; others are told, or ask it."""
        try:
            round_.fail(error, "asked", "answer", gathered=("hello", "report"))
            if not self._is_coordinator and not isinstance(error, DeadlineError):
                return self.told(round_)
        except DeadlineError as late:
            error = late
        outcome = self._ask_log(step, attempt, error)
        if self._is_coordinator:
            self.publish(round_, outcome)
        return outcome

    def abort_doomed(self) -> None:
        """Put the abort roots for which the log had no room.

        Raises:
            StorageError: It still has none.
        """
        while self._doomed:
            self._catalog.abort(self._writer, self._doomed[-1])
            self._doomed.pop()

    def _ask_log(self, step: int, attempt: str, error: Exception) -> Outcome:
        kind, message = kind_and_message(error)
        if not attempt:
            return Outcome(committed=False, kind=kind, message=message)
        try:
            verdict, root = self._catalog.abort(self._writer, attempt)
        except (StorageError, ShardckptError, FileNotFoundError) as lost:
            if self._is_coordinator and self._catalog.last_proposed != attempt:
                # Nobody else commits, and this rank never proposed it: a full disk that has no
                # room for the abort root either leaves no doubt.
                self._doomed.append(attempt)
                return Outcome(committed=False, kind=kind, message=message)
            return Outcome(
                committed=False,
                kind=OutcomeUnknownError.__name__,
                message=f"{message}; and the commit log cannot be asked: {lost}",
            )
        if verdict == "aborted":
            return Outcome(committed=False, kind=kind, message=message)
        return outcome_of(verdict, root, step, self._catalog.storage.url, message)


def kind_and_message(error: Exception) -> tuple[str, str]:
    """Return the class and the words by which all ranks are told of an error."""
    if isinstance(error, RoundFailedError):
        failure = error.failure
        return failure.kind, f"rank {failure.rank}: {failure.message}"
    return type(error).__name__, str(error)
