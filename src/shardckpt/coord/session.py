"""One job's messages over the key-value store: typed, namespaced, with named waits.

Layer: coord. Message `topic/rank` of round `n` lives under `<job>/<kind>/<n>/`. The first failure
of any rank is published under `error` of its round and ends every wait of that round.
"""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec

from shardckpt.coord.base import AbortedWaitError, Coord, wait_for
from shardckpt.errors import DeadlineError

M = TypeVar("M", bound=msgspec.Struct)


class Failure(msgspec.Struct, frozen=True):
    """The first error of a round: which class of error, on which rank, in which words."""

    kind: str
    rank: int
    message: str


class RoundFailedError(Exception):
    """Internal: another rank failed this round; carries its failure."""

    def __init__(self, failure: Failure) -> None:
        """Keep the failure."""
        super().__init__(failure.message)
        self.failure = failure


class Round:
    """The messages of one save or one restore."""

    def __init__(self, coord: Coord, prefix: str, what: str, timeout_s: float) -> None:
        """Name the round.

        Args:
            coord: The job's store.
            prefix: Key prefix of this round, equal on all ranks.
            what: What the round is, for messages ("save 3 (step 40)").
            timeout_s: Seconds each wait may take.
        """
        self._coord = coord
        self._prefix = prefix
        self.what = what
        self.timeout_s = timeout_s
        self._topics: set[str] = set()

    @property
    def rank(self) -> int:
        """This rank."""
        return self._coord.rank

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._coord.world_size

    def publish(self, topic: str, message: msgspec.Struct) -> None:
        """Publish this rank's message, or the coordinator's where the topic says so."""
        self._topics.add(topic)
        self._coord.set(self._key(topic), msgspec.json.encode(message))

    def fail(self, error: BaseException) -> Failure:
        """Publish this rank's first error, which ends every other rank's wait; returns it."""
        failure = Failure(type(error).__name__, self.rank, str(error))
        self.publish("error", failure)
        return failure

    def has_failed(self) -> bool:
        """Return whether some rank has published an error, without waiting."""
        return self._get("error") is not None

    def wait(
        self, topic: str, kind: type[M], *, what: str, grace: float = 1.0, heed_errors: bool = True
    ) -> M:
        """Wait for one message.

        Args:
            topic: Its topic.
            kind: Its type.
            what: Name of the wait.
            grace: Factor on the deadline; ranks that wait for the coordinator give it a little
                longer.
            heed_errors: Whether another rank's failure ends the wait.

        Raises:
            DeadlineError: It did not come in time.
            RoundFailedError: A rank failed first.
        """
        try:
            data = wait_for(
                self._coord,
                self._key(topic),
                what=f"{what}, {self.what}",
                timeout_s=self.timeout_s * grace,
                abort_key=self._key("error") if heed_errors else None,
            )
        except AbortedWaitError as aborted:
            raise RoundFailedError(msgspec.json.decode(aborted.value, type=Failure)) from None
        self._topics.add(topic)
        return msgspec.json.decode(data, type=kind)

    def gather(self, topic: str, kind: type[M], *, what: str, hint: str = "") -> list[M]:
        """Wait for the message of every rank; the coordinator's side of a round.

        Args:
            topic: `<topic>/<rank>` is waited for.
            kind: Type of the messages.
            what: Name of the messages ("report").
            hint: What the user most likely did when ranks are missing.

        Raises:
            DeadlineError: Some did not come; names all absent ranks.
            RoundFailedError: A rank failed first.
        """
        messages: list[M] = []
        deadline = time.monotonic() + self.timeout_s
        for rank in range(self.world_size):
            key = self._key(f"{topic}/{rank}")
            try:
                data = wait_for(
                    self._coord,
                    key,
                    what=what,
                    timeout_s=max(0.0, deadline - time.monotonic()),
                    abort_key=self._key("error"),
                )
            except AbortedWaitError as aborted:
                raise RoundFailedError(msgspec.json.decode(aborted.value, type=Failure)) from None
            except DeadlineError:
                absent = [
                    r for r in range(rank, self.world_size) if self._get(f"{topic}/{r}") is None
                ]
                raise DeadlineError(
                    f"{self.what}: no {what} from rank {_listed(absent)} of {self.world_size} "
                    "within "
                    f"{self.timeout_s:g} s. {hint}"
                ) from None
            self._topics.add(f"{topic}/{rank}")
            messages.append(msgspec.json.decode(data, type=kind))
        return messages

    def forget(self) -> None:
        """Delete every key this rank has seen or set in this round."""
        for topic in self._topics:
            self._coord.delete(self._key(topic))

    def _get(self, topic: str) -> bytes | None:
        return self._coord.get(self._key(topic))

    def _key(self, topic: str) -> str:
        return f"{self._prefix}/{topic}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"
