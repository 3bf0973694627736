"""The saver of one rank: `save` stages and returns, one thread does the rest.

Layer: save. Order of one save, on every rank:

1. wait for the outcome of the save before (one in flight), raise its failure on all ranks at the
   same call;
2. describe the state, publish the structure's digest, plan if it is new, stage into the arena,
   return;
3. background: learn the attempt's name, write and flush files, report;
4. the coordinator commits and publishes the outcome; a rank that hears nothing asks the log, by an
   abort root.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from shardckpt.coord.session import Round, RoundFailedError
from shardckpt.errors import (
    DeadlineError,
    FencedError,
    OutcomeUnknownError,
    SaveFailedError,
    ShardckptError,
    StorageError,
    error_named,
)
from shardckpt.format.sealed import digest
from shardckpt.save.commit import Described, Planner, commit_round, outcome_of
from shardckpt.save.messages import Answer, Decision, Hello, Outcome, Report
from shardckpt.save.plan import RankPlan, rank_plan
from shardckpt.save.stage import Staged, stage
from shardckpt.save.structure import encode_structure, structure_of
from shardckpt.save.write import AttemptId, write_files
from shardckpt.staging.arena import Arena
from shardckpt.staging.collector import no_garbage_collection
from shardckpt.state import Leaf

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from shardckpt.backend import Backend
    from shardckpt.catalog.log import Writer
    from shardckpt.catalog.store import Catalog
    from shardckpt.coord.base import Coord
    from shardckpt.format.root import Root

_logger = logging.getLogger("shardckpt")
_GRACE: Final = 1.1
_SWEEP_S: Final = 30.0
OnBusy = Literal["wait", "skip"]


class SaveHandle:
    """One save under way.

    Attributes:
        step: The step.
        staged: Done once the caller may change its arrays.
        committed: True once the step is committed, False where the coordinator skipped it; else its
            error.
    """

    def __init__(self, step: int, timeout_s: float) -> None:
        """Start with nothing done."""
        self.step = step
        self.staged: Future[None] = Future()
        self.committed: Future[bool] = Future()
        self._timeout_s = timeout_s

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the step is committed (True) or was skipped (False).

        Raises:
            ShardckptError: The save failed, with the same error on every rank.
            DeadlineError: It is still under way after `timeout_s`.
        """
        limit_s = timeout_s if timeout_s is not None else 4 * self._timeout_s
        # Not result(timeout): its TimeoutError could not be told from a save that failed with one.
        if not wait_futures([self.committed], limit_s).done:
            raise DeadlineError(f"step {self.step} is still being saved after {limit_s:g} s")
        return self.committed.result()


@dataclass(slots=True)
class _Job:
    round: Round
    handle: SaveHandle
    structure: str
    plan: RankPlan
    plan_digest: str
    leaves: tuple[Leaf, ...]
    staged: Staged
    objects: dict[str, msgspec.Raw]
    per_rank: dict[str, msgspec.Raw]
    metrics: dict[str, float]
    answer: Answer | None
    started: float


class Saver:
    """Saves of one rank, in order. `save` belongs to one thread; the rest has its own."""

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
        to_drop: Callable[[Root], Collection[str]],
    ) -> None:
        """Start the background thread.

        Args:
            backend: The framework.
            catalog: The store's log.
            writer: The epoch this job owns.
            coord: The job's key-value store.
            described: What goes into manifests besides arrays.
            prefix: Namespace of this job's keys.
            timeout_s: Deadline of each wait.
            on_busy: What a save does that finds the one before still under way.
            to_drop: Retention.
        """
        self._backend = backend
        self._catalog = catalog
        self._writer = writer
        self._coord = coord
        self._described = described
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._on_busy: OnBusy = on_busy
        self._to_drop = to_drop
        self._planner = Planner(coord, f"{prefix}/plans", timeout_s)
        self._arena = Arena()
        self._count = 0
        self._structure = ""
        self._rank_plan: RankPlan | None = None
        self._plan_digest = ""
        self._last: SaveHandle | None = None
        self._fenced: str | None = None
        self._before: Round | None = None
        self._doomed: list[str] = []
        self.ancestry: list[str] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="shardckpt-saver", daemon=True)
        self._thread.start()

    @property
    def _is_coordinator(self) -> bool:
        return self._coord.rank == 0

    @property
    def staging_bytes(self) -> int:
        """Host memory held for staging."""
        return self._arena.nbytes

    def save(self, step: int, state: Any, metrics: Mapping[str, float]) -> SaveHandle:
        """Stage `state` and queue it; returns once the caller may change its arrays.

        Raises:
            ShardckptError: An earlier save failed (raised at the same call on every rank), or with
                a single rank this one did.
        """
        if self._fenced is not None:
            raise FencedError(self._fenced)
        round_ = Round(
            self._coord,
            f"{self._prefix}/save/{self._count}",
            f"step {step} (save {self._count})",
            self._timeout_s,
        )
        handle = SaveHandle(step, self._timeout_s)
        if self._on_busy == "skip" and self._skips(round_):
            self._count += 1
            handle.staged.set_result(None)
            handle.committed.set_result(False)
            _logger.log(self._level, "step %d: skipped, the save before is still under way", step)
            return handle
        self.finish_last()
        self._count += 1
        self._last = handle
        started = time.monotonic()
        try:
            job = self._stage(step, state, metrics, round_, handle, started)
        except Exception as error:
            self._give_up_early(round_, handle, error)
            return handle
        handle.staged.set_result(None)
        self._jobs.put(job)
        _logger.log(
            self._level, "step %d: staged %.1f MiB on rank 0 in %.3f s", step,
            job.plan.image_bytes / 2**20, time.monotonic() - started,
        )  # fmt: skip
        return handle

    def finish_last(self) -> None:
        """Wait for the save under way, if any, and raise its failure once.

        Raises:
            ShardckptError: It failed.
        """
        last = self._last
        if last is not None:
            try:
                last.wait()
            finally:
                if last.committed.done():
                    self._last = None

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the save under way, stop the thread, free the arena; raise the last failure.

        Raises:
            ShardckptError: The last save failed.
        """
        try:
            if self._last is not None:
                self._last.wait(timeout_s)
        finally:
            self._last = None
            self._jobs.put(None)
            # The last save's garbage goes after its outcome is known; a slow disk may leave some.
            self._thread.join(min(_SWEEP_S, self._timeout_s))
            if not self._thread.is_alive():
                self._arena.release()

    def _skips(self, round_: Round) -> bool:
        if self._is_coordinator:
            busy = self._last is not None and not self._last.committed.done()
            round_.publish("decision", Decision(busy))
            return busy
        return round_.wait(
            "decision", Decision, what="the coordinator's call of save()", grace=_GRACE
        ).skip

    def _stage(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float],
        round_: Round,
        handle: SaveHandle,
        started: float,
    ) -> _Job:
        with no_garbage_collection():
            tree = self._backend.describe(state)
            data, structure = encode_structure(structure_of(tree))
        answer: Answer | None = None
        is_new = structure != self._structure or self._rank_plan is None
        if is_new:
            self._planner.offer_structure(data, structure)
        round_.publish(f"hello/{round_.rank}", Hello(step=step, structure=structure))
        if is_new:
            answer = self._answer(round_, step)
            plan = self._planner.fetch_plan(answer.plan)
            self._rank_plan = rank_plan(plan, tree.leaves, round_.rank)
            self._structure, self._plan_digest = structure, answer.plan
        assert self._rank_plan is not None
        with no_garbage_collection():
            staged = stage(self._rank_plan, tree.leaves, self._backend.host_array, self._arena)
            # The job keeps specs and boxes for the table, not the caller's memory.
            leaves = tuple(_without_data(leaf) for leaf in tree.leaves)
        return _Job(
            round_, handle, structure, self._rank_plan, self._plan_digest, leaves, staged,
            {key: _raw(value) for key, value in tree.objects.items()},
            {key: _raw(value.value) for key, value in tree.per_rank.items()},
            dict(metrics), answer, started,
        )  # fmt: skip

    def _give_up_early(self, round_: Round, handle: SaveHandle, error: Exception) -> None:
        """Fail a save that was never staged: tell the others, raise if there are none."""
        if not isinstance(error, RoundFailedError):
            round_.fail(error)
        failure = _as_shardckpt(error)
        handle.staged.set_exception(failure)
        handle.committed.set_exception(failure)
        if self._coord.world_size == 1:
            self._last = None
            raise failure from error
        _logger.error(
            "step %d: not saved; save() raises at its next call: %s", handle.step, failure
        )

    def _answer(self, round_: Round, step: int) -> Answer:
        if self._is_coordinator:
            attempt = self._catalog.new_attempt(self._writer, step)
            return self._planner.plan_round(round_, step, attempt)
        answer = round_.wait(
            "answer", Answer, what="the coordinator's call of save()", grace=_GRACE
        )
        if answer.step != step:
            raise SaveFailedError(
                f"{round_.what}: rank 0 saves step {answer.step}. Every rank must call save() "
                "for the same steps."
            )
        return answer

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            outcome = self._run(job)
            if self._before is not None and self._is_coordinator:
                self._before.forget()
            self._before = job.round
            if outcome.kind == FencedError.__name__:
                self._fenced = outcome.message
            seconds = time.monotonic() - job.started
            if outcome.committed:
                _logger.log(self._level, "step %d: committed in %.2f s", job.handle.step, seconds)
                job.handle.committed.set_result(True)
                self._sweep()
            else:
                job.handle.committed.set_exception(error_named(outcome.kind, outcome.message))

    def _run(self, job: _Job) -> Outcome:
        """Bring one save to its outcome; never raises."""
        attempt = ""
        try:
            answer = job.answer or self._answer(job.round, job.handle.step)
            attempt = answer.attempt
            self._check_plan(job, answer)
            self._write(job, answer)
            outcome = self._commit(job, answer) if self._is_coordinator else self._told(job)
        except Exception as error:
            _logger.debug(
                "step %d failed on rank %d", job.handle.step, self._coord.rank, exc_info=True
            )
            return self._failed(job, attempt, error)
        if self._is_coordinator:
            self._publish(job, outcome)
        return outcome

    def _check_plan(self, job: _Job, answer: Answer) -> None:
        if answer.plan == job.plan_digest:
            return
        # Another rank's structure is new. This rank has staged by the old plan; it may go on if its
        # part
        # did not change.
        plan = rank_plan(self._planner.fetch_plan(answer.plan), job.leaves, job.round.rank)
        if plan != job.plan:
            self._rank_plan = None
            raise SaveFailedError(
                f"{job.round.what}: the state's structure changed on other ranks only, so rank "
                f"{job.round.rank} "
                "staged by the old plan. The next save plans anew."
            )
        self._plan_digest = answer.plan

    def _write(self, job: _Job, answer: Answer) -> None:
        attempt = AttemptId(answer.attempt, job.handle.step, job.round.rank, job.round.world_size)
        files = write_files(
            self._catalog.storage, attempt, job.plan, job.leaves, job.staged, job.per_rank
        )
        same = job.structure == answer.structure
        report = Report(
            structure=job.structure,
            files=files,
            objects_digest=digest(msgspec.json.encode(job.objects, order="deterministic")),
            objects={} if same else job.objects,
        )
        job.round.publish(f"report/{job.round.rank}", report)

    def _commit(self, job: _Job, answer: Answer) -> Outcome:
        outcome, _ = commit_round(
            job.round, self._catalog, self._writer, answer, self._planner, self._described,
            job.objects, job.metrics, self.ancestry, self._to_drop,
        )  # fmt: skip
        if outcome.committed:
            self.ancestry.append(answer.attempt)
        return outcome

    def _told(self, job: _Job) -> Outcome:
        return job.round.wait(
            "outcome", Outcome, what="the coordinator's outcome", grace=_GRACE, heed_errors=False
        )

    def _failed(self, job: _Job, attempt: str, error: Exception) -> Outcome:
        """Agree on a failure: the coordinator decides by the log; others are told, or ask it."""
        try:
            if not isinstance(error, RoundFailedError):
                job.round.fail(error)
            if not self._is_coordinator and not isinstance(error, DeadlineError):
                return self._told(job)
        except DeadlineError as late:
            error = late
        outcome = self._ask_log(job, attempt, error)
        if self._is_coordinator:
            self._publish(job, outcome)
        return outcome

    def _ask_log(self, job: _Job, attempt: str, error: Exception) -> Outcome:
        kind, message = _kind_and_message(error)
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
        outcome = outcome_of(verdict, root, job.handle.step, self._catalog.storage.url, message)
        if verdict == "aborted":
            outcome = Outcome(committed=False, kind=kind, message=message)
        return outcome

    def _publish(self, job: _Job, outcome: Outcome) -> None:
        try:
            job.round.publish("outcome", outcome)
        except DeadlineError as error:
            # The others will learn it from the log.
            _logger.warning("%s: the outcome could not be announced: %s", job.round.what, error)

    def _sweep(self) -> None:
        if not self._is_coordinator:
            return
        try:
            while self._doomed:
                self._catalog.abort(self._writer, self._doomed[-1])
                self._doomed.pop()
            gone = self._catalog.sweep()
        except (ShardckptError, FileNotFoundError) as error:
            _logger.warning("garbage stays until the next save: %s", error)
            return
        if gone:
            _logger.info("removed %d old or unfinished attempts", len(gone))

    @property
    def _level(self) -> int:
        return logging.INFO if self._is_coordinator else logging.DEBUG


def _without_data(leaf: Leaf) -> Leaf:
    shards = tuple(type(shard)(shard.box, None) for shard in leaf.shards)
    return Leaf(leaf.key, leaf.spec, leaf.role, leaf.layout, shards)


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _kind_and_message(error: Exception) -> tuple[str, str]:
    if isinstance(error, RoundFailedError):
        failure = error.failure
        return failure.kind, f"rank {failure.rank}: {failure.message}"
    return type(error).__name__, str(error)


def _as_shardckpt(error: Exception) -> ShardckptError:
    if isinstance(error, ShardckptError):
        return error
    return error_named(*_kind_and_message(error))
