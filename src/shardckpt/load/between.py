"""Between hosts: a batch goes from the rank that reads it to one rank of every other host.

Layer: load. One thread sends and one receives, each in the order of the batches. Who receives a
batch says so to its reader, which sends it then; a mark behind the bytes tells that all have come,
and a last word that the reader may use that memory again. So both watch memory and nobody is inside
a call that another rank would have to end: a load that fails here or elsewhere leaves no thread
behind.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from threading import Event
from typing import TYPE_CHECKING, Final, Protocol, final

from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shardckpt.load.exchange import Batch

MARK: Final = b"\xff" * 8
# How much of a round's deadline connecting the hosts may take: then it is said who did not come.
CONNECT_SHARE: Final = 0.5
_AHEAD: Final = 8
# Messages of one batch: its bytes, "I receive it", "I have received it".
_DATA, _READY, _DONE = range(3)
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

    def send(self, rank: int, data: memoryview, tag: int) -> None:
        """Begin to send to a rank that receives with the same tag.

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
        left = deque(
            (provided, other)
            for provided in self._provided
            for other, _ in provided.batch.providers[1:]
            if provided.batch.reader == self._rank
        )
        ready: deque[_Coming] = deque()
        sent: deque[tuple[Provided, _Coming]] = deque()
        patience = self._patience()
        while left or sent:
            for provided, other in islice(left, len(ready), _AHEAD):
                ready.append(self._word(other, provided.batch.index, _READY))
            if not sent and not left[0][0].is_filled.is_set():
                left[0][0].is_filled.wait()
                patience = self._patience()
            is_filled = bool(left) and left[0][0].is_filled.is_set()
            if self._stopped.is_set():
                return
            goes_on = False
            if sent and sent[0][1].has_come():
                provided, word = sent.popleft()
                word.end()
                self._sent(provided)
                goes_on = True
            if is_filled and ready[0].has_come():
                provided, other = left.popleft()
                ready.popleft().end()
                done = self._word(other, provided.batch.index, _DONE)
                data = self._view(provided)
                data[-len(MARK) :] = MARK
                self._send(other, data, provided.batch.index, _DATA)
                sent.append((provided, done))
                goes_on = True
            if goes_on:
                patience = self._patience()
            elif not patience.wait(sent[0][1].rank if sent else ready[0].rank):
                return

    def receive_all(self) -> None:
        """Receive what this rank provides on its host and others read."""
        left = deque(p for p in self._provided if p.batch.reader != self._rank)
        begun: deque[_Coming] = deque()
        while left:
            for provided in islice(left, len(begun), None):
                if begun and not provided.is_free.is_set():
                    break
                provided.is_free.wait()
                index, reader = provided.batch.index, provided.batch.reader
                begun.append(self._receive(reader, self._view(provided), index, _DATA))
                self._send(reader, memoryview(MARK), index, _READY)
            patience = self._patience()
            while not begun[0].has_come():
                if not patience.wait(begun[0].rank):
                    return
            if self._stopped.is_set():
                return
            begun.popleft().end()
            provided = left.popleft()
            self._send(provided.batch.reader, memoryview(MARK), provided.batch.index, _DONE)
            self._received(provided)

    def _word(self, rank: int, index: int, kind: int) -> _Coming:
        """Begin to receive a mark and nothing else."""
        return self._receive(rank, memoryview(bytearray(len(MARK))), index, kind)

    def _receive(self, rank: int, data: memoryview, index: int, kind: int) -> _Coming:
        data[-len(MARK) :] = bytes(len(MARK))
        with _naming(rank):
            return _Coming(rank, data, self._exchange.receive(rank, data, 3 * index + kind))

    def _send(self, rank: int, data: memoryview, index: int, kind: int) -> None:
        """Begin to send; that it has come is known by what the other rank sends next."""
        with _naming(rank):
            self._exchange.send(rank, data, 3 * index + kind)

    def _patience(self) -> _Patience:
        return _Patience(self._exchange, self._stopped, self._timeout_s)


@final
class _Coming:
    """Bytes on their way to memory of this rank; their mark comes last."""

    def __init__(self, rank: int, data: memoryview, end: Callable[[], None]) -> None:
        self.rank = rank
        self._data = data
        self._end = end

    def has_come(self) -> bool:
        return self._data[-len(MARK) :] == MARK

    def end(self) -> None:
        with _naming(self.rank):
            self._end()


@final
class _Patience:
    """Waits for other ranks as long as they are there and the deadline has not passed."""

    def __init__(self, exchange: Exchange, stopped: Event, timeout_s: float) -> None:
        self._exchange = exchange
        self._stopped = stopped
        self._timeout_s = timeout_s
        self._started = self._checked = time.monotonic()
        self._pause_s = _POLL_FIRST_S

    def wait(self, rank: int) -> bool:
        """Pause; False where this rank's load has failed meanwhile.

        Raises:
            DeadlineError: The other rank is gone or nothing came in time.
        """
        if self._stopped.wait(self._pause_s):
            return False
        self._pause_s = min(self._pause_s * 1.5, _POLL_MOST_S)
        now = time.monotonic()
        if now - self._checked > _CHECK_EVERY_S:
            self._checked = now
            with _naming(rank):
                self._exchange.check(rank)
        if now - self._started > self._timeout_s:
            raise DeadlineError(
                f"nothing came from rank {rank} within {self._timeout_s:g} s while hosts "
                "exchanged what they read; look at that rank's log"
            )
        return True


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
