"""Read once: fill a rank's targets together with the ranks that want the same chunks.

Layer: load. A provider fills a slot of its memory with a batch, from storage or from the batch's
reader on another host, and says so to the ranks of its host; they copy their pieces out and say
when they are done, which frees the slot.

The k-th batch a rank provides waits for the one that was in its slot before, and messages between
hosts follow the order of the batches, so the first batch that is not done can always go on.
Consumers need nothing but their targets, so no order is asked of them. A rank that fails says so on
every link, which ends the wait of the others.
"""

from __future__ import annotations

import queue
import selectors
import socket
import threading
import time
from array import array
from functools import partial
from typing import TYPE_CHECKING, Final, final

from shardckpt import native
from shardckpt.errors import DeadlineError
from shardckpt.load.between import MARK, Between, Exchange, Provided
from shardckpt.load.exchange import (
    SLOT_BYTES,
    Batch,
    chunks_in,
    files_of,
    split_plan,
)
from shardckpt.load.links import DONE, FAILED, READY, Link, Memory
from shardckpt.load.plan import copy_rows_of
from shardckpt.load.read import (
    NUM_READERS,
    Chunks,
    read_to,
    reads_from,
    run_read,
    span_of,
    verify_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from shardckpt.coord.session import Round
    from shardckpt.load.open import OpenFile
    from shardckpt.load.plan import LoadPlan, Read

MOST_SLOTS: Final = 8
_LOOK_FOR_FAILURE_S: Final = 0.5
_COPY, _PROVIDE, _READ, _STOP = range(4)


class PeersFailedError(Exception):
    """Internal: another rank failed during the exchange; the round tells with what."""


@final
class Running:
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
        """Part the plan into what is read alone and what is exchanged.

        Args:
            plan: What this rank wants.
            rank: This rank.
            batches: Those that hold some of it.
            memory: Slots for the batches that this rank provides.
            links: To the ranks of this host that share a batch with it.
            exchange: Between hosts; None where no batch has to go there.
        """
        self._rank: Final = rank
        self._files: Final = files_of(plan)
        self._plan, self._pieces = split_plan(plan, batches)
        self._memory: Final = memory
        self._links: Final = links
        self._exchange: Final = exchange
        self._tasks: Final[queue.PriorityQueue[tuple[int, int, Callable[[], None]]]] = (
            queue.PriorityQueue()
        )
        self._lock: Final = threading.Lock()
        self._error: BaseException | None = None
        self._has_failed: Final = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._num_tasks = 0
        self._progress = time.monotonic()
        self.read_bytes = 0
        # Records that each linked rank still has to send.
        self._owed: Final = dict.fromkeys(links, 0)
        self._provided: Final[list[Provided]] = []
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
        if self._exchange is not None:
            between = Between(
                self._exchange, self._rank, self._provided, stopped=self._has_failed,
                timeout_s=round_.timeout_s, view=self._view, sent=self._taken,
                received=self._is_received,
            )  # fmt: skip
            workers += [
                threading.Thread(target=partial(self._guard, move), name=name)
                for move, name in (
                    (between.send_all, "shardckpt-send"),
                    (between.receive_all, "shardckpt-receive"),
                )
            ]
        for read in reads_from(self._plan.reads, self._rank):
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
        run_read(read)
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

    def _slot_is_free(self, provided: Provided) -> None:
        provided.is_free.set()
        if provided.batch.reader == self._rank:
            self._put(_PROVIDE, partial(self._read_batch, provided))

    def _read_batch(self, provided: Provided) -> None:
        """Read a batch into its slot and verify it there."""
        nbytes = 0
        for file, chunks, address in self._parts(provided):
            read_to(file, chunks, address)
            start, stop = span_of(chunks)
            nbytes += stop - start
        with self._lock:
            self.read_bytes += nbytes
        self._is_filled(provided)

    def _is_received(self, provided: Provided) -> None:
        """Verify a batch that came from another host: a network is no memory."""
        for file, chunks, address in self._parts(provided):
            verify_at(file, chunks, address)
        self._is_filled(provided)

    def _is_filled(self, provided: Provided) -> None:
        """Let the others copy, then copy."""
        for rank in self._local(provided.batch):
            self._links[rank].send(READY, provided.batch.index, provided.offset)
        provided.is_filled.set()
        self._copy(provided.batch.index, self._address(provided))
        self._taken(provided)

    def _taken(self, provided: Provided) -> None:
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

    def _provide_later(self, batch: Batch) -> None:
        assert self._memory is not None
        local = self._local(batch)
        for rank in local:
            self._owed[rank] += 1
        sends = len(batch.providers) - 1 if batch.reader == self._rank else 0
        number = len(self._provided)
        offset = number % self._num_slots() * SLOT_BYTES
        self._provided.append(Provided(batch, number, offset, 1 + len(local) + sends))

    def _local(self, batch: Batch) -> list[int]:
        """Return the other ranks of this host that copy from this rank's slot."""
        ranks = next(ranks for provider, ranks in batch.providers if provider == self._rank)
        return [rank for rank in ranks if rank != self._rank]

    def _parts(self, provided: Provided) -> Iterator[tuple[OpenFile, Sequence[Chunks], int]]:
        """Yield file, chunks and address of every extent."""
        base = self._address(provided)
        for extent in provided.batch.extents:
            file = self._files[extent.file]
            chunks = chunks_in(file, extent)
            if chunks:
                start, _ = span_of(chunks)
                yield file, chunks, base + extent.at + start - extent.start

    def _view(self, provided: Provided) -> memoryview:
        assert self._memory is not None
        *_, (_, chunks, address) = self._parts(provided)
        start, stop = span_of(chunks)
        nbytes = address + stop - start - self._address(provided)
        return self._memory.view(provided.offset, nbytes + len(MARK))

    def _address(self, provided: Provided) -> int:
        assert self._memory is not None
        return self._memory.address + provided.offset

    def _num_slots(self) -> int:
        return 0 if self._memory is None else self._memory.nbytes // SLOT_BYTES
