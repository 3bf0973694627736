"""Between hosts: a batch goes from the rank that reads it to one rank of every other host.

Layer: load. One thread sends and one receives, each in the order of the batches. Who receives a
batch says so to its reader, which sends it then; a mark behind the bytes tells that all have come.
So both watch memory and nobody is inside a call that another rank would have to end: a load that
fails here or elsewhere leaves no thread behind.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Final, Protocol, final

from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shardckpt.load.exchange import Batch

MARK: Final = b"\xff" * 8
_AHEAD: Final = 8
_CHECK_EVERY_S: Final = 0.5
_POLL_FIRST_S: Final = 0.0002
_POLL_MOST_S: Final = 0.005


class Exchange(Protocol):
    """Bytes between ranks of different hosts, given by the framework front. Thread-safe.

    Nothing here is waited for that has not come, so that a failed load ends at once: who receives
    watches the memory, and who sends does so when told that the other one receives.
    """

    def connect(self) -> None:
        """Get ready; all ranks of the job call it at the same time.

        Raises:
            Exception: This rank cannot; all ranks then do without.
        """

    def send(self, rank: int, data: memoryview, tag: int) -> Callable[[], None]:
        """Begin to send to a rank that receives with the same tag; return what ends it.

        Raises:
            Exception: The other rank is gone.
        """

    def receive(self, rank: int, data: memoryview, tag: int) -> Callable[[], None]:
        """Begin to fill memory, its last byte last; return what ends it, once all has come.

        Raises:
            Exception: The other rank is gone.
        """

    def check(self, rank: int) -> None:
        """See whether a rank is still there.

        Raises:
            Exception: It is gone.
        """

    def close(self) -> None:
        """Let go of what `connect` made. Never raises."""


@dataclass(slots=True)
class Provided:
    """A batch that a rank provides on its host.

    Attributes:
        batch: The batch.
        number: Position among those of this rank.
        offset: Byte of its memory where the slot is.
        num_open: How many still have to take from it.
        is_free: Set once the slot is its own.
        is_filled: Set once all bytes are there and verified.
    """

    batch: Batch
    number: int
    offset: int
    num_open: int
    is_free: Event = field(default_factory=Event)
    is_filled: Event = field(default_factory=Event)


@final
class Between:
    """One rank's messages to and from other hosts."""

    def __init__(
        self,
        exchange: Exchange,
        rank: int,
        provided: Sequence[Provided],
        *,
        stopped: Event,
        timeout_s: float,
        view: Callable[[Provided], memoryview],
        sent: Callable[[Provided], None],
        received: Callable[[Provided], None],
    ) -> None:
        """Begin nothing yet.

        Args:
            exchange: Moves the bytes.
            rank: This rank.
            provided: All batches that this rank provides, in their order.
            stopped: Set once this rank's load has failed; so are then all events of `provided`.
            timeout_s: Seconds that one message may take.
            view: Gives the bytes of a slot and room for the mark.
            sent: Told for each host that a batch went to.
            received: Told of a batch that lies in its slot, not verified yet.
        """
        self._exchange: Final = exchange
        self._rank: Final = rank
        self._provided: Final = provided
        self._stopped: Final = stopped
        self._timeout_s: Final = timeout_s
        self._view: Final = view
        self._sent: Final = sent
        self._received: Final = received

    def send_all(self) -> None:
        """Send what this rank reads to the hosts that want it, to each once it receives."""
        messages = [
            (provided, other)
            for provided in self._provided
            for other, _ in provided.batch.providers[1:]
            if provided.batch.reader == self._rank
        ]
        begun: deque[tuple[bytearray, Callable[[], None]]] = deque()
        for number, (provided, other) in enumerate(messages):
            for ahead, rank in messages[number + len(begun) : number + _AHEAD]:
                word = bytearray(len(MARK))
                begun.append((word, self._receive(rank, memoryview(word), ahead.batch.index, 1)))
            provided.is_filled.wait()
            word, end = begun.popleft()
            if not self._has_come(memoryview(word), other):
                return
            end()
            data = self._view(provided)
            data[-len(MARK) :] = MARK
            self._send(other, data, provided.batch.index, 0)()
            self._sent(provided)

    def receive_all(self) -> None:
        """Receive what this rank provides on its host and others read."""
        received = [p for p in self._provided if p.batch.reader != self._rank]
        begun: deque[tuple[memoryview, Callable[[], None], Callable[[], None]]] = deque()
        for number, provided in enumerate(received):
            for ahead in received[number + len(begun) :]:
                if begun and not ahead.is_free.is_set():
                    break
                ahead.is_free.wait()
                data, index, reader = self._view(ahead), ahead.batch.index, ahead.batch.reader
                data[-len(MARK) :] = bytes(len(MARK))
                end = self._receive(reader, data, index, 0)
                begun.append((data, end, self._send(reader, memoryview(MARK), index, 1)))
            data, *ends = begun.popleft()
            if not self._has_come(data, provided.batch.reader):
                return
            for end in ends:
                end()
            self._received(provided)

    def _send(self, rank: int, data: memoryview, index: int, kind: int) -> Callable[[], None]:
        with _naming(rank):
            end = self._exchange.send(rank, data, 2 * index + kind)
        return partial(self._end, end, rank)

    def _receive(self, rank: int, data: memoryview, index: int, kind: int) -> Callable[[], None]:
        with _naming(rank):
            end = self._exchange.receive(rank, data, 2 * index + kind)
        return partial(self._end, end, rank)

    def _end(self, end: Callable[[], None], rank: int) -> None:
        with _naming(rank):
            end()

    def _has_come(self, data: memoryview, rank: int) -> bool:
        """Watch memory until the mark behind it has come; False where this rank failed meanwhile.

        Raises:
            DeadlineError: The other rank is gone or nothing came in time.
        """
        started = checked = time.monotonic()
        pause_s = _POLL_FIRST_S
        while data[-len(MARK) :] != MARK:
            if self._stopped.wait(pause_s):
                return False
            pause_s = min(pause_s * 1.5, _POLL_MOST_S)
            now = time.monotonic()
            if now - checked > _CHECK_EVERY_S:
                checked = now
                with _naming(rank):
                    self._exchange.check(rank)
            if now - started > self._timeout_s:
                raise DeadlineError(
                    f"nothing came from rank {rank} within {self._timeout_s:g} s while hosts "
                    "exchanged what they read; look at that rank's log"
                )
        return not self._stopped.is_set()


@contextmanager
def _naming(rank: int) -> Iterator[None]:
    """Say which rank it was that could not be reached.

    Raises:
        DeadlineError: The block failed.
    """
    try:
        yield
    except Exception as error:
        raise DeadlineError(
            f"rank {rank} went away or did not answer in time while hosts exchanged what they read "
            f"({error}); look at that rank's log"
        ) from error
