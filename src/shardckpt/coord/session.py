"""One job's messages over the key-value store: typed, namespaced, with named waits.

Layer: coord. Message `topic/rank` of round `n` lives under `<job>/<kind>/<n>/`. The first failure
of any rank is published under `error` of its round and ends every wait of that round, and under the
topics that others wait for, or will: the coordinator's word, or this rank's message to the
coordinator, which hears of it at once where it waits for this one and else within the second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from shardckpt.coord.base import AbortedWaitError, Coord, wait_for
from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

M = TypeVar("M", bound=msgspec.Struct)
_FAILED: Final = b"!"  # No JSON begins with it.
# Asked for at once: few requests for thousands of ranks, and none that a store could not answer.
_GATHER: Final = 256
# How long the coordinator waits for one rank before it looks whether another one has failed.
_LOOK_FIRST_S: Final = 0.05
_LOOK_MOST_S: Final = 0.4


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

    def __init__(
        self,
        coord: Coord,
        prefix: str,
        what: str,
        timeout_s: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Name the round.

        Args:
            coord: The job's store.
            prefix: Key prefix of this round, equal on all ranks.
            what: What the round is, for messages ("save 3 (step 40)").
            timeout_s: Seconds each wait may take.
            monotonic: Clock.
        """
        self._coord = coord
        self._monotonic = monotonic
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

    def fail(self, error: BaseException, *topics: str, gathered: Collection[str] = ()) -> Failure:
        """Publish this rank's first error, which ends every other rank's wait; return it.

        Args:
            error: The error; where it came from another rank, that one's failure is passed on.
            topics: What the other ranks wait for, or will, from the coordinator.
            gathered: What the coordinator gathers, or will, from all ranks.
        """
        if isinstance(error, RoundFailedError):
            failure = error.failure
        else:
            failure = Failure(type(error).__name__, self.rank, str(error))
            self.publish("error", failure)
        for topic in topics if self.rank == 0 else [f"{name}/{self.rank}" for name in gathered]:
            if topic not in self._topics:
                self._topics.add(topic)
                self._coord.set(self._key(topic), _FAILED + msgspec.json.encode(failure))
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
                monotonic=self._monotonic,
            )
        except AbortedWaitError as aborted:
            raise RoundFailedError(msgspec.json.decode(aborted.value, type=Failure)) from None
        _raise_failed(data)
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
        decode = msgspec.json.Decoder(kind).decode
        deadline = self._monotonic() + self.timeout_s
        messages: list[M] = []
        look_s = _LOOK_FIRST_S
        while len(messages) < self.world_size:
            first = len(messages)
            ranks = range(first, min(first + _GATHER, self.world_size))
            for data in self._coord.get_many([self._key(f"{topic}/{rank}") for rank in ranks]):
                if data is None:
                    break
                _raise_failed(data)
                messages.append(decode(data))
            if len(messages) > first:
                look_s = _LOOK_FIRST_S
                continue
            error = self._get("error")
            if error is not None:
                self._topics.add("error")
                raise RoundFailedError(msgspec.json.decode(error, type=Failure))
            remaining_s = deadline - self._monotonic()
            if remaining_s <= 0:
                raise self._absent(topic, what, hint)
            data = self._coord.wait(self._key(f"{topic}/{first}"), min(look_s, remaining_s))
            if data is not None:
                _raise_failed(data)
                messages.append(decode(data))
            look_s = min(2 * look_s, _LOOK_MOST_S)
        return messages

    def forget(self) -> None:
        """Delete every key that this rank has set in this round."""
        for topic in self._topics:
            self._coord.delete(self._key(topic))

    def _absent(self, topic: str, what: str, hint: str) -> DeadlineError:
        ranks = range(self.world_size)
        absent = [rank for rank in ranks if self._get(f"{topic}/{rank}") is None]
        return DeadlineError(
            f"{self.what}: no {what} from rank {_listed(absent)} of {self.world_size} within "
            f"{self.timeout_s:g} s. {hint}"
        )

    def _get(self, topic: str) -> bytes | None:
        return self._coord.get(self._key(topic))

    def _key(self, topic: str) -> str:
        return f"{self._prefix}/{topic}"


def _raise_failed(data: bytes) -> None:
    if data[:1] == _FAILED:
        raise RoundFailedError(msgspec.json.decode(data[1:], type=Failure))


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"
