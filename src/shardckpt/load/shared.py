"""Read once: fill a rank's targets together with the ranks that want the same chunks.

Layer: load. Order on every rank, after the plans are agreed on:

1. derive the batches, link with the ranks of this host, connect the hosts; tell all ranks whether
   that worked, before anything is read. A host whose ranks cannot be linked counts as one host per
   rank; where hosts cannot be connected every rank reads for itself.
2. a provider fills a slot of its memory with a batch, from storage or from the batch's
   reader on another host, and says so to the ranks of its host; they copy their pieces out and say
   when they are done, which frees the slot.

The k-th batch a rank provides waits for the one that was in its slot before, and messages between
hosts follow the order of the batches, so the first batch that is not done can always go on. Who
receives asks for it, and a mark behind the bytes tells that all have come.
Consumers need nothing but their targets, so no order is asked of them. A rank that fails says so on
every link, which ends the wait of the others.
"""

from __future__ import annotations

import logging
import mmap
import queue
import selectors
import socket
import threading
import time
from array import array
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, final

import msgspec

from shardckpt import native
from shardckpt.errors import DeadlineError
from shardckpt.load.exchange import (
    SLOT_BYTES,
    Batch,
    Wants,
    assign,
    chunks_in,
    files_of,
    split_plan,
    wants_of,
)
from shardckpt.load.links import DONE, FAILED, READY, Door, Link, LinkError, Memory, host_name
from shardckpt.load.plan import copy_rows_of
from shardckpt.load.read import NUM_READERS, run_read, verify_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from shardckpt.coord.session import Round
    from shardckpt.load.open import OpenFile, SavedPayload
    from shardckpt.load.plan import LoadPlan, Read

MOST_SLOTS: Final = 8
_MOST_WANTS_BYTES: Final = 32 << 20
_LOOK_FOR_FAILURE_S: Final = 0.5
_POLL_FIRST_S: Final = 0.0002
_POLL_MOST_S: Final = 0.005
_MARK: Final = b"\xff" * 8
_COPY, _PROVIDE, _READ, _STOP = range(4)
_logger = logging.getLogger("shardckpt")


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


@dataclass(frozen=True, slots=True)
class Together:
    """How this rank can exchange with others.

    Attributes:
        exchange: Between hosts; None where only ranks of one host exchange.
        host: Where this rank runs; ranks that give the same name share memory if they can.
    """

    exchange: Exchange | None = None
    host: str = field(default_factory=host_name)


class Visitor(msgspec.Struct, frozen=True):
    """What a rank tells all others before anything is read."""

    host: str
    secret: str
    spans: bool
    wants: msgspec.Raw


class Visitors(msgspec.Struct, frozen=True):
    """What all ranks told; equal wants, those of replicas, are told once."""

    hosts: list[str]
    secrets: list[str]
    spans: bool
    lists: list[Wants]
    list_of_rank: list[int]


class Linked(msgspec.Struct, frozen=True):
    """Whether a rank shares memory with those of its host, and reaches other hosts."""

    linked: bool
    connected: bool


class AllLinked(msgspec.Struct, frozen=True):
    """Ranks that share no memory, and whether all reach other hosts."""

    unlinked: list[int]
    connected: bool


class PeersFailedError(Exception):
    """Internal: another rank failed during the exchange; the round tells with what."""


def gathered(told: Sequence[Visitor]) -> Visitors:
    """Return what the coordinator tells all ranks; no wants where they are too many to tell."""
    lists: dict[bytes, int] = {}
    list_of_rank = [lists.setdefault(bytes(visitor.wants), len(lists)) for visitor in told]
    wants = [msgspec.json.decode(raw, type=Wants) for raw in lists]
    if sum(map(len, lists)) > _MOST_WANTS_BYTES:
        _logger.warning("the ranks' plans are too different to be exchanged; each reads its own")
        wants = [Wants([], [], [], []) for _ in lists]
    return Visitors(
        [visitor.host for visitor in told],
        [visitor.secret for visitor in told],
        all(visitor.spans for visitor in told),
        wants,
        list_of_rank,
    )


def all_linked(told: Sequence[Linked]) -> AllLinked:
    """Return what the coordinator tells all ranks."""
    unlinked = [rank for rank, message in enumerate(told) if not message.linked]
    return AllLinked(unlinked, all(message.connected for message in told))


@final
class Meeting:
    """One rank's part: `visitor`, `meet`, and if that says so `link` and `settle`; then `run`.

    After each of the first three all ranks agree; `close` comes last, whatever failed.
    """

    def __init__(self, plan: LoadPlan, rank: int, together: Together) -> None:
        """Open a door for the ranks of this host."""
        self._plan: Final = plan
        self._rank: Final = rank
        self._together: Final = together
        self._door: Final = Door()
        self._told: Visitors | None = None
        self._batches: tuple[Batch, ...] = ()
        self._memory: Memory | None = None
        self._links: dict[int, Link] = {}
        self._is_connected = False

    def visitor(self) -> Visitor:
        """Return what the others must know."""
        wants = msgspec.Raw(msgspec.json.encode(wants_of(self._plan)))
        spans = self._together.exchange is not None
        return Visitor(self._together.host, self._door.secret, spans, wants)

    def meet(self, told: Visitors) -> bool:
        """Learn what is exchanged; False where nothing is, alike on all ranks."""
        self._told = told
        self._assign(told.hosts)
        return bool(self._batches)

    def link(self) -> Linked:
        """Link with the ranks of this host and connect the hosts; tell whether that worked."""
        assert self._told is not None
        hosts, secrets = self._told.hosts, self._told.secrets
        peers: set[int] = set()
        for batch in self._batches:
            ranks = [r for _, local in batch.providers for r in local]
            if self._rank in ranks:
                peers.update(r for r in ranks if hosts[r] == hosts[self._rank])
        peers.discard(self._rank)
        linked = connected = True
        try:
            if peers:
                self._memory, self._links = self._door.link(
                    self._rank, {peer: secrets[peer] for peer in peers}, self._memory_bytes()
                )
        except LinkError as error:
            linked = False
            _logger.warning(
                "rank %d cannot share memory with ranks %s: %s", self._rank, sorted(peers), error
            )
        if _spans(self._batches):
            assert self._together.exchange is not None
            try:
                self._together.exchange.connect()
                self._is_connected = True
            except Exception as error:  # Whatever a framework's group raises.
                connected = False
                _logger.warning("rank %d cannot reach other hosts: %s", self._rank, error)
        return Linked(linked, connected)

    def settle(self, met: AllLinked) -> None:
        """Do without what some rank could not do, alike on all ranks."""
        assert self._told is not None
        hosts = self._told.hosts
        spanned = _spans(self._batches)
        lost = {hosts[rank] for rank in met.unlinked}
        if lost:
            # The readers stay the same where the hosts do, so links that were made still fit.
            self._assign([f"{h}#{r}" if h in lost else h for r, h in enumerate(hosts)])
        if not met.connected or (_spans(self._batches) and not spanned):
            self._batches = ()
        if hosts[self._rank] in lost:
            self._part()

    def run(self, round_: Round) -> int:
        """Fill every target of the plan and return the bytes read from storage.

        Raises:
            CorruptCheckpointError: A chunk does not match its checksum; names file, key and rank.
            StorageError: A read failed.
            DeadlineError: Another rank went away, or none has answered in time; names it.
            PeersFailedError: Another rank failed.
        """
        mine = [b for b in self._batches if b.provider_for(self._rank) is not None]
        if mine and self._memory is None:
            self._memory = Memory(mmap.mmap(-1, self._memory_bytes()))
        exchange = self._together.exchange if self._is_connected else None
        running = _Running(self._plan, self._rank, mine, self._memory, self._links, exchange)
        try:
            running.run(round_)
        except DeadlineError as error:
            # A rank that fails tells so before it goes.
            if round_.has_failed():
                raise PeersFailedError from error
            raise
        return running.read_bytes

    def close(self) -> None:
        """Part from all other ranks. Never raises."""
        self._door.close()
        self._part()
        if self._is_connected and self._together.exchange is not None:
            self._together.exchange.close()
            self._is_connected = False

    def _part(self) -> None:
        for link in self._links.values():
            link.close()
        self._links, self._memory = {}, None

    def _assign(self, hosts: Sequence[str]) -> None:
        assert self._told is not None
        told = self._told
        self._batches = assign(told.lists, told.list_of_rank, hosts, spans=told.spans)

    def _memory_bytes(self) -> int:
        provided = sum(any(p == self._rank for p, _ in batch.providers) for batch in self._batches)
        return SLOT_BYTES * max(1, min(MOST_SLOTS, provided))


def _spans(batches: Sequence[Batch]) -> bool:
    return any(len(batch.providers) > 1 for batch in batches)


@dataclass(slots=True)
class _Provided:
    """A batch this rank provides: its slot, and who still has to take from it."""

    batch: Batch
    number: int
    offset: int
    num_open: int
    is_free: threading.Event = field(default_factory=threading.Event)
    is_filled: threading.Event = field(default_factory=threading.Event)


@final
class _Running:
    """The threads of one load; ends with the first error of any of them."""

    def __init__(
        self,
        plan: LoadPlan,
        rank: int,
        batches: Sequence[Batch],
        memory: Memory | None,
        links: Mapping[int, Link],
        exchange: Exchange | None,
    ) -> None:
        self._rank: Final = rank
        self._files: Final = files_of(plan)
        self._plan, self._pieces = split_plan(plan, batches)
        self._batches: Final = {batch.index: batch for batch in batches}
        self._memory: Final = memory
        self._links: Final = links
        self._exchange: Final = exchange
        self._tasks: Final[queue.PriorityQueue[tuple[int, int, Callable[[], None]]]] = (
            queue.PriorityQueue()
        )
        self._lock: Final = threading.Lock()
        self._error: BaseException | None = None
        self._has_failed: Final = threading.Event()
        self._timeout_s = 0.0
        self._wake, self._woken = socket.socketpair()
        self._num_tasks = 0
        self._progress = time.monotonic()
        self.read_bytes = 0
        self._scratch: Final = threading.local()
        # Records that each linked rank still has to send.
        self._owed: Final = dict.fromkeys(links, 0)
        self._provided: Final[list[_Provided]] = []
        num_copies = 0
        for batch in batches:
            provider = batch.provider_for(rank)
            if provider == rank:
                self._provide_later(batch)
            elif provider is not None:
                self._owed[provider] += 1
                num_copies += 1
        self._by_index: Final = {p.batch.index: p for p in self._provided}
        self._num_left = len(self._provided) + num_copies + len(self._plan.reads)

    def run(self, round_: Round) -> None:
        """Do all work of this rank.

        Raises:
            DeadlineError: Another rank went away, or none has answered in time; names it.
            PeersFailedError: Another rank failed.
        """
        workers = [
            threading.Thread(target=self._work, name=f"shardckpt-read-{i}")
            for i in range(NUM_READERS)
        ]
        self._timeout_s = round_.timeout_s
        if self._exchange is not None:
            workers += [
                threading.Thread(
                    target=partial(self._guard, self._send_all), name="shardckpt-send"
                ),
                threading.Thread(
                    target=partial(self._guard, self._receive_all), name="shardckpt-receive"
                ),
            ]
        for read in self._plan.reads:
            self._put(_READ, partial(self._read_own, read))
        slots = self._num_slots()
        for provided in self._provided[:slots]:
            self._slot_is_free(provided)
        for worker in workers:
            worker.start()
        try:
            self._listen(round_)
        except BaseException as error:
            self._fail(error)
            for link in self._links.values():
                link.send(FAILED)
            raise
        finally:
            for _ in workers:
                self._put(_STOP, lambda: None)
            for worker in workers:
                worker.join()
            self._wake.close()
            self._woken.close()

    def _listen(self, round_: Round) -> None:
        """Take in what other ranks say until all is done."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for link in self._links.values():
                selector.register(link, selectors.EVENT_READ, link)
            look_at = time.monotonic() + _LOOK_FOR_FAILURE_S
            while not self._is_done():
                for key, _ in selector.select(max(0.0, look_at - time.monotonic())):
                    if key.data is None:
                        self._woken.recv(4096)
                        continue
                    for record in key.data.records():
                        if record is None:
                            selector.unregister(key.data)
                            self._is_gone(key.data.rank)
                        else:
                            self._hear(key.data, *record)
                if time.monotonic() >= look_at:
                    # Ranks of other hosts cannot say on a link that they failed.
                    look_at = time.monotonic() + _LOOK_FOR_FAILURE_S
                    if round_.has_failed():
                        raise PeersFailedError
                    self._check_deadline(round_)

    def _is_done(self) -> bool:
        with self._lock:
            if self._error is not None:
                raise self._error
            return self._num_left == 0

    def _hear(self, link: Link, kind: bytes, index: int, offset: int) -> None:
        if kind == FAILED:
            raise PeersFailedError
        self._owed[link.rank] -= 1
        self._progress = time.monotonic()
        if kind == READY:
            assert link.memory is not None
            address = link.memory.address + offset
            self._put(_COPY, partial(self._copy_from, link, index, address))
        elif kind == DONE:
            self._taken(self._by_index[index])

    def _is_gone(self, rank: int) -> None:
        if self._owed[rank]:
            raise DeadlineError(
                f"rank {rank} went away while the ranks of its host exchanged what they read; look "
                "at that rank's log"
            )

    def _check_deadline(self, round_: Round) -> None:
        # Where no linked rank owes anything, storage is slow or a host: these have deadlines of
        # their own.
        silent = sorted(rank for rank, owed in self._owed.items() if owed)
        if not silent or time.monotonic() - self._progress <= round_.timeout_s:
            return
        raise DeadlineError(
            f"{round_.what}: nothing came from rank {', '.join(map(str, silent))} within "
            f"{round_.timeout_s:g} s while ranks exchanged what they read; look at that rank's log"
        )

    def _work(self) -> None:
        while True:
            priority, _, task = self._tasks.get()
            if priority == _STOP:
                return
            if not self._has_failed.is_set():
                self._guard(task)

    def _guard(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # Raised by the thread that runs the load.
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            first, self._error = self._error is None, self._error or error
        if first:
            self._has_failed.set()
            for provided in self._provided:
                provided.is_free.set()
                provided.is_filled.set()
            self._wake.send(b".")

    def _put(self, priority: int, task: Callable[[], None]) -> None:
        with self._lock:
            self._num_tasks += 1
            number = self._num_tasks
        self._tasks.put((priority, number, task))

    def _finished(self, read_bytes: int = 0) -> None:
        with self._lock:
            self.read_bytes += read_bytes
            self._num_left -= 1
            self._progress = time.monotonic()
            is_last = self._num_left == 0
        if is_last:
            self._wake.send(b".")

    def _read_own(self, read: Read) -> None:
        run_read(read, self._scratch)
        self._finished(read.stop - read.start)

    def _copy_from(self, link: Link, index: int, address: int) -> None:
        self._copy(index, address)
        link.send(DONE, index)
        self._finished()

    def _copy(self, index: int, address: int) -> None:
        """Copy this rank's pieces of a batch from where its slot lies."""
        rows = array("q")
        for piece, place in self._pieces.get(index, ()):
            if piece.direct_address:
                nbytes = piece.stop - piece.start
                rows.extend((piece.direct_address, address + place, 1, 1, nbytes, 1, 1))
                continue
            for row in copy_rows_of(piece, address + place):
                rows.extend(row)
        native.copy_rows(rows, 1)

    def _slot_is_free(self, provided: _Provided) -> None:
        provided.is_free.set()
        if provided.batch.reader == self._rank:
            self._put(_PROVIDE, partial(self._read_batch, provided))

    def _read_batch(self, provided: _Provided) -> None:
        """Read a batch into its slot and verify it there."""
        nbytes = 0
        for file, chunks, start, stop, address in self._parts(provided):
            file.reader.read_into(start, address, stop - start)
            verify_chunks(file, chunks, address, start)
            nbytes += stop - start
        with self._lock:
            self.read_bytes += nbytes
        self._is_filled(provided)

    def _is_filled(self, provided: _Provided) -> None:
        """Let the others copy, then copy."""
        for rank in self._local(provided.batch):
            self._links[rank].send(READY, provided.batch.index, provided.offset)
        provided.is_filled.set()
        self._copy(provided.batch.index, self._address(provided))
        self._taken(provided)

    def _taken(self, provided: _Provided) -> None:
        """Note that one of those who take from a slot is done; the last one frees it."""
        with self._lock:
            provided.num_open -= 1
            is_free = provided.num_open == 0
        if not is_free:
            return
        following = provided.number + self._num_slots()
        if following < len(self._provided):
            self._slot_is_free(self._provided[following])
        self._finished()

    def _send_all(self) -> None:
        """Send what this rank reads to the hosts that want it, to each once it receives."""
        messages = [
            (provided, other)
            for provided in self._provided
            for other, _ in provided.batch.providers[1:]
            if provided.batch.reader == self._rank
        ]
        begun: deque[tuple[bytearray, Callable[[], None]]] = deque()
        for number, (provided, other) in enumerate(messages):
            for ahead, rank in messages[number + len(begun) : number + MOST_SLOTS]:
                word = bytearray(len(_MARK))
                begun.append((word, self._receive(rank, memoryview(word), ahead.batch.index, 1)))
            provided.is_filled.wait()
            word, end = begun.popleft()
            if not self._has_come(memoryview(word), other):
                return
            end()
            data = self._view(provided)
            data[-len(_MARK) :] = _MARK
            self._send(other, data, provided.batch.index, 0)()
            self._taken(provided)

    def _receive_all(self) -> None:
        """Receive what this rank provides on its host and others read."""
        received = [p for p in self._provided if p.batch.reader != self._rank]
        begun: deque[tuple[memoryview, Callable[[], None], Callable[[], None]]] = deque()
        for number, provided in enumerate(received):
            for ahead in received[number + len(begun) :]:
                if begun and not ahead.is_free.is_set():
                    break
                ahead.is_free.wait()
                data, index, reader = self._view(ahead), ahead.batch.index, ahead.batch.reader
                data[-len(_MARK) :] = bytes(len(_MARK))
                end = self._receive(reader, data, index, 0)
                begun.append((data, end, self._send(reader, memoryview(_MARK), index, 1)))
            data, *ends = begun.popleft()
            if not self._has_come(data, provided.batch.reader):
                return
            for end in ends:
                end()
            # The bytes verified are the bytes used, and a network is no memory.
            for file, chunks, start, _, address in self._parts(provided):
                verify_chunks(file, chunks, address, start)
            self._is_filled(provided)

    def _send(self, rank: int, data: memoryview, index: int, kind: int) -> Callable[[], None]:
        assert self._exchange is not None
        with _naming(rank):
            end = self._exchange.send(rank, data, 2 * index + kind)
        return partial(self._end, end, rank)

    def _receive(self, rank: int, data: memoryview, index: int, kind: int) -> Callable[[], None]:
        assert self._exchange is not None
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
        assert self._exchange is not None
        started = checked = time.monotonic()
        pause_s = _POLL_FIRST_S
        while data[-len(_MARK) :] != _MARK:
            if self._has_failed.wait(pause_s):
                return False
            pause_s = min(pause_s * 1.5, _POLL_MOST_S)
            now = time.monotonic()
            if now - checked > _LOOK_FOR_FAILURE_S:
                checked = now
                with _naming(rank):
                    self._exchange.check(rank)
            if now - started > self._timeout_s:
                raise DeadlineError(
                    f"nothing came from rank {rank} within {self._timeout_s:g} s while hosts "
                    "exchanged what they read; look at that rank's log"
                )
        return not self._has_failed.is_set()

    def _provide_later(self, batch: Batch) -> None:
        assert self._memory is not None
        local = self._local(batch)
        for rank in local:
            self._owed[rank] += 1
        sends = len(batch.providers) - 1 if batch.reader == self._rank else 0
        number = len(self._provided)
        offset = number % self._num_slots() * SLOT_BYTES
        self._provided.append(_Provided(batch, number, offset, 1 + len(local) + sends))

    def _local(self, batch: Batch) -> list[int]:
        """Return the other ranks of this host that copy from this rank's slot."""
        ranks = next(ranks for provider, ranks in batch.providers if provider == self._rank)
        return [rank for rank in ranks if rank != self._rank]

    def _parts(
        self, provided: _Provided
    ) -> Iterator[tuple[OpenFile, list[tuple[SavedPayload, int, int]], int, int, int]]:
        """Yield file, chunks, first byte and one past the last, and address of every extent."""
        base = self._address(provided)
        for extent in provided.batch.extents:
            file = self._files[extent.file]
            chunks = chunks_in(file, extent)
            if chunks:
                (first, low, _), (last, _, high) = chunks[0], chunks[-1]
                start, stop = first.offset + low, last.offset + high
                yield file, chunks, start, stop, base + extent.at + start - extent.start

    def _view(self, provided: _Provided) -> memoryview:
        assert self._memory is not None
        *_, (_, _, start, stop, address) = self._parts(provided)
        nbytes = address + stop - start - self._address(provided)
        return self._memory.view(provided.offset, nbytes + len(_MARK))

    def _address(self, provided: _Provided) -> int:
        assert self._memory is not None
        return self._memory.address + provided.offset

    def _num_slots(self) -> int:
        return 0 if self._memory is None else self._memory.nbytes // SLOT_BYTES


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
