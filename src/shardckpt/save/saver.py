"""The saver of one rank: `save` stages and returns, `background` does the rest.

Layer: save. Order of one save, on every rank:

1. wait for the outcome of the save before the last (two in flight), raise its failure on all ranks
   at the same call;
2. describe the state, plan if its structure is new, queue it in the staging engine, wait until all
   is copied that no fence protects, return;
3. background: say hello, learn the attempt's name, write and flush files, report;
4. the coordinator commits and publishes the outcome; a rank that hears nothing asks the log, by an
   abort root.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from array import array
from collections import deque
from concurrent.futures import wait as wait_futures
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from shardckpt.coord.session import Round
from shardckpt.errors import FencedError, SaveFailedError, ShardckptError, error_named
from shardckpt.save.agree import GRACE, kind_and_message
from shardckpt.save.background import Background
from shardckpt.save.commit import Planner
from shardckpt.save.handle import Job, Planned, SaveHandle
from shardckpt.save.messages import Asked, Decision, Hello, Outcome
from shardckpt.save.plan import rank_plan
from shardckpt.save.stage import CopyTable
from shardckpt.save.structure import (
    encode_structure,
    has_structure_of,
    structure_of,
    without_data,
)
from shardckpt.staging.collector import no_garbage_collection
from shardckpt.staging.engine import EVERY_GROUP, SLOT_BYTES, make_room, start_engine
from shardckpt.staging.pace import Pacer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from concurrent.futures import Future

    from shardckpt.backend import Backend
    from shardckpt.catalog.log import Writer
    from shardckpt.catalog.store import Catalog
    from shardckpt.coord.base import Coord
    from shardckpt.format.root import Root
    from shardckpt.options import Staging
    from shardckpt.save.commit import Described
    from shardckpt.save.messages import Answer
    from shardckpt.state import StateTree

_logger = logging.getLogger("shardckpt")
_SWEEP_S: Final = 30.0
_MAX_IN_FLIGHT: Final = 2
_SLICE_MS: Final = 100
_CLOSE_MS: Final = 1000
_EXIT_S: Final = 60.0
EAGER: Final = 0
OnBusy = Literal["wait", "skip"]


class Saver:
    """Saves of one rank, in order. All calls belong to one thread."""

    def __init__(
        self,
        backend: Backend,
        catalog: Catalog,
        writer: Writer,
        coord: Coord,
        described: Described,
        *,
        prefix: str,
        timeout_s: float,
        on_busy: OnBusy,
        staging: Staging,
        to_drop: Callable[[Root], Collection[str]],
    ) -> None:
        """Start the staging engine and the background thread.

        Args:
            backend: The framework.
            catalog: The store's log.
            writer: The epoch this job owns.
            coord: The job's key-value store.
            described: What goes into manifests besides arrays.
            prefix: Namespace of this job's keys.
            timeout_s: Deadline of each wait.
            on_busy: What a save does that finds no room.
            staging: Memory, threads and pace of the engine.
            to_drop: Retention.

        Raises:
            StagingMemoryError: There is no memory for it.
        """
        self._backend = backend
        self._coord = coord
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._on_busy: OnBusy = on_busy
        self._planner = Planner(coord, f"{prefix}/plans", timeout_s)
        self._options = staging
        self._engine = start_engine(staging)
        self._pacer = Pacer(staging.max_inflation, staging.write_bytes_per_s)
        self._written = (time.monotonic(), 0)
        self._told_of_pins = False
        self._told_of_slow_storage = False
        self._count = 0
        self._planned: Planned | None = None
        self._in_flight: deque[SaveHandle] = deque()
        self._staging: tuple[Job, ...] = ()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._background = Background(
            coord, catalog, writer, self._planner, described, self._engine,
            timeout_s=timeout_s, to_drop=to_drop, settle=self._settle_staged,
        )  # fmt: skip
        self._at_exit = partial(_finish_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def _is_coordinator(self) -> bool:
        return self._coord.rank == 0

    @property
    def ancestry(self) -> list[str]:
        """Attempts this run stands on, oldest first; a restore replaces what is in it."""
        return self._background.ancestry

    @property
    def is_staging(self) -> bool:
        """Whether arrays of some save are still to be copied."""
        return bool(self._staging)

    def save(
        self, step: int, state: Any, metrics: Mapping[str, float], remarks: Mapping[str, str]
    ) -> SaveHandle:
        """Queue a save of `state`; returns once all is copied that no fence protects.

        Args:
            step: The step.
            state: What to save.
            metrics: Figures for keep-best.
            remarks: Facts of this save beside those of the environment; the coordinator's count.

        Raises:
            ShardckptError: An earlier save failed (raised at the same call on every rank), or with
                a single rank this one did; or this is a forked child.
        """
        if os.getpid() != self._pid:
            raise SaveFailedError(
                f"step {step}: process {os.getpid()} is a fork of {self._pid}, to which this "
                "checkpointer and its threads belong. Save there, or open a checkpointer here."
            )
        if self._background.fenced is not None:
            raise FencedError(self._background.fenced)
        self._pacer.skip_step()
        started = time.monotonic()
        round_ = Round(
            self._coord,
            f"{self._prefix}/save/{self._count}",
            f"step {step} (save {self._count})",
            self._timeout_s,
        )
        # Before anything can raise: the next call's messages must not be taken for this one's.
        self._count += 1
        handle = SaveHandle(step, self._timeout_s)
        if self._on_busy == "skip" and self._skips(round_):
            handle.staged.set_result(None)
            handle.committed.set_result(False)
            self._tell_of_slow_storage(step, "skipped")
            return handle
        if len(self._in_flight) >= _MAX_IN_FLIGHT and not self._in_flight[0].committed.done():
            self._tell_of_slow_storage(step, "waits")
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._finish_first()
        handle.wait_s = time.monotonic() - started
        self._in_flight.append(handle)
        try:
            job = self._stage(step, state, metrics, remarks, round_, handle, started)
        except Exception as error:
            self._give_up_early(round_, handle, error)
            return handle
        with self._lock:
            self._staging = (*self._staging, job)
        # First, so that a small ring is emptied while this thread waits for room in it.
        self._background.submit(job)
        waited = time.monotonic()
        self._wait_copied(job, EAGER)
        self._settle_staged()
        handle.wait_s += time.monotonic() - waited
        handle.save_s = time.monotonic() - started
        _logger.log(
            self._level, "step %d: queued %.1f MiB on rank 0, save() took %.3f s", step,
            job.planned.plan.image_bytes / 2**20, handle.save_s,
        )  # fmt: skip
        return handle

    def fence(self, group: int = EVERY_GROUP) -> None:
        """Wait until no copy reads arrays of `group` any more, copying here, too; never raises.

        After the deadline the save is given up instead: its failure is raised where saves raise.
        """
        if os.getpid() != self._pid:
            return  # A forked child: its arrays are its own.
        for job in self._staging:
            started = time.monotonic()
            self._wait_copied(job, group)
            job.handle.fence_s += time.monotonic() - started
        if self._staging:
            self._settle_staged()

    def step_began(self) -> None:
        """Take note that a training step begins, to pace the writing; about a microsecond."""
        now, written = time.monotonic(), self._engine.stats()[2]
        before, seen = self._written
        self._written = now, written
        is_writing = any(not handle.committed.done() for handle in self._in_flight)
        rate = (written - seen) / max(now - before, 1e-6)
        if self._pacer.step_began(now, is_writing=is_writing, written_bytes_per_s=rate):
            self._engine.set_rate(self._pacer.bytes_per_s)
            _logger.debug("writing at %d bytes/s (0: no limit)", self._pacer.bytes_per_s)

    def finish_all(self) -> None:
        """Wait for every save under way and raise the first failure; later ones stay for later.

        Raises:
            ShardckptError: A save failed.
        """
        while self._in_flight:
            self._finish_first()

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the saves under way, stop the threads, free the memory; raise the last failure.

        Raises:
            ShardckptError: A save failed.
        """
        atexit.unregister(self._at_exit)
        if os.getpid() != self._pid:
            return  # A forked child: nothing here is its own to end.
        self._engine.set_rate(self._options.write_bytes_per_s or 0)  # There are no more steps.
        try:
            while self._in_flight:
                self._in_flight.popleft().wait(timeout_s)
        finally:
            self._in_flight.clear()
            if self._background.close(min(_SWEEP_S, self._timeout_s)):
                self._engine.close(_CLOSE_MS)

    def finish_at_exit(self) -> None:
        """Give the saves under way a last chance before the process ends; never raises."""
        if os.getpid() != self._pid:
            return
        self._engine.set_rate(self._options.write_bytes_per_s or 0)
        limit_s = min(self._timeout_s, _EXIT_S)
        futures = [handle.committed for handle in self._in_flight]
        wait_futures(futures, limit_s)
        for handle in self._in_flight:
            if not handle.committed.done():
                failure: object = f"it was still under way after {limit_s:g} s"
            else:
                failure = handle.committed.exception()
            if failure is not None:
                _logger.error(
                    "step %d: not saved, and the process ends without close(): %s",
                    handle.step, failure,
                )  # fmt: skip

    def _finish_first(self) -> None:
        first = self._in_flight[0]
        try:
            first.wait()
        finally:
            if first.committed.done():
                self._in_flight.popleft()

    def _wait_copied(self, job: Job, group: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        # Devices do not keep the host waiting: what comes next on these streams waits for them.
        streams = array("q", self._backend.streams(job.staged.devices))
        # In slices, so that a signal's handler runs. A save that is given up is waited for, too: a
        # copy of these arrays may still run.
        while not self._engine.wait_staged(job.staged.ticket, group, _SLICE_MS, streams):
            if time.monotonic() > deadline:
                self._engine.cancel(
                    job.staged.ticket,
                    f"its arrays were not copied within {self._timeout_s:g} s, because its memory "
                    "was not written to disk; training goes on without it",
                )

    def _settle_staged(self) -> None:
        """Let go of the arrays of saves that are copied."""
        with self._lock:
            left = []
            for job in self._staging:
                if self._engine.wait_staged(job.staged.ticket, EVERY_GROUP, 0):
                    job.staged.owners.clear()
                    _resolve(job.handle.staged)
                else:
                    left.append(job)
            self._staging = tuple(left)

    def _tell_of_slow_storage(self, step: int, what: str) -> None:
        """Warn once; later saves that find earlier ones under way are noted at the debug level."""
        level = logging.DEBUG if self._told_of_slow_storage else self._level
        if not self._told_of_slow_storage and self._is_coordinator:
            level = logging.WARNING
        self._told_of_slow_storage = True
        _logger.log(
            level, "step %d: %s, because earlier saves are still under way: the storage takes "
            "longer than the interval between saves. Save less often, or let "
            "save_every=Auto() choose. This is said once.", step, what,
        )  # fmt: skip

    def _skips(self, round_: Round) -> bool:
        if self._is_coordinator:
            busy = self._is_busy()
            round_.publish("decision", Decision(busy))
            return busy
        return round_.wait(
            "decision", Decision, what="the coordinator's call of save()", grace=GRACE
        ).skip

    def _is_busy(self) -> bool:
        under_way = [h for h in self._in_flight if not h.committed.done()]
        if not under_way or self._planned is None:
            return bool(under_way)
        free = self._engine.stats()[1] * SLOT_BYTES
        return len(under_way) >= _MAX_IN_FLIGHT or free < self._planned.plan.image_bytes

    @no_garbage_collection()
    def _stage(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float],
        remarks: Mapping[str, str],
        round_: Round,
        handle: SaveHandle,
        started: float,
    ) -> Job:
        tree = self._backend.describe(state)
        planned, answer = self._planned, None
        if (
            planned is None
            or planned.is_stale
            or not has_structure_of(tree, planned.tree, planned.table.changed(tree.leaves))
        ):
            planned, answer = self._plan(tree, step, round_, handle)
        staged = planned.table.stage(
            self._engine, tree.leaves, self._backend,
            overlap=self._options.overlap is not False and not self._background.saw_torn_copy,
            check_copies=self._options.check_copies,
        )  # fmt: skip
        if staged.devices and not self._told_of_pins:
            self._told_of_pins = True
            if problem := self._engine.pin_problem():
                _logger.warning("staging memory is not pinned, so copies are slower: %s", problem)
        return Job(
            round_, handle, planned, staged, answer,
            {key: _raw(value) for key, value in tree.objects.items()},
            {key: _raw(value.value) for key, value in tree.per_rank.items()},
            dict(metrics), dict(remarks), started,
        )  # fmt: skip

    def _plan(
        self, tree: StateTree, step: int, round_: Round, handle: SaveHandle
    ) -> tuple[Planned, Answer]:
        """Plan a structure that is new with the other ranks, and make room for it."""
        data, structure = encode_structure(structure_of(tree))
        # Planning shares the planner with the saves under way.
        wait_futures([h.committed for h in self._in_flight if h is not handle])
        hello = Hello(step=step, structure=structure, is_new=True)
        round_.publish(f"hello/{round_.rank}", hello)
        if self._is_coordinator or self._is_asked(round_):
            self._planner.offer_structure(data, structure)
        answer = self._background.answer(round_, step)
        plan = rank_plan(self._planner.fetch_plan(answer.plan), tree.leaves, round_.rank)
        # Before anything is kept: where there is no memory now, the next save asks again.
        make_room(self._engine, self._options, plan.file_bytes)
        planned = Planned(structure, answer.plan, without_data(tree), plan, CopyTable(plan))
        self._planned = planned
        return planned, answer

    def _give_up_early(self, round_: Round, handle: SaveHandle, error: Exception) -> None:
        """Fail a save that was never staged: tell the others, raise if there are none."""
        round_.fail(error, "asked", "answer", gathered=("hello", "report"))
        if self._is_coordinator:
            # Ranks that staged wait for an outcome, not for an error.
            kind, message = kind_and_message(error)
            round_.publish("outcome", Outcome(committed=False, kind=kind, message=message))
        failure = _as_shardckpt(error)
        handle.staged.set_exception(failure)
        handle.committed.set_exception(failure)
        if self._coord.world_size == 1:
            self._in_flight.remove(handle)
            raise failure from error
        _logger.error(
            "step %d was not saved, which a later save() raises: %s", handle.step, failure
        )

    def _is_asked(self, round_: Round) -> bool:
        asked = round_.wait("asked", Asked, what="the coordinator's call of save()", grace=GRACE)
        return round_.rank in asked.ranks

    @property
    def _level(self) -> int:
        return logging.INFO if self._is_coordinator else logging.DEBUG


def _finish_at_exit(saver: weakref.ref[Saver]) -> None:
    alive = saver()
    if alive is not None:
        alive.finish_at_exit()


def _resolve(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _as_shardckpt(error: Exception) -> ShardckptError:
    if isinstance(error, ShardckptError):
        return error
    return error_named(*kind_and_message(error))
