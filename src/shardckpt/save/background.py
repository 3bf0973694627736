"""What becomes of a staged save: one thread names it, writes it, reports it and commits it.

Layer: save. Saves end in the order of their calls. The thread owns the catalog while a save is
under way.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, final

import msgspec

from shardckpt.errors import (
    FencedError,
    SaveFailedError,
    ShardckptError,
    TornCopyError,
    error_named,
)
from shardckpt.format.sealed import digest
from shardckpt.save.agree import GRACE, Agreement
from shardckpt.save.commit import commit_round
from shardckpt.save.messages import Answer, Hello, Outcome, Report
from shardckpt.save.plan import rank_plan
from shardckpt.save.write import AttemptId, write_files

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from shardckpt.catalog.log import Writer
    from shardckpt.catalog.store import Catalog
    from shardckpt.coord.base import Coord
    from shardckpt.coord.session import Round
    from shardckpt.format.root import Root
    from shardckpt.native import Engine
    from shardckpt.save.commit import Described, Planner
    from shardckpt.save.handle import Job

_logger = logging.getLogger("shardckpt")
_RELEASE_MS: Final = 1000


@final
class Background:
    """Brings the saves of one rank to their outcomes.

    Attributes:
        fenced: Why this job may save no more; None while it may.
        saw_torn_copy: Whether an array changed while it was copied late.
        ancestry: Attempts committed so far, those restored from included.
    """

    def __init__(
        self,
        coord: Coord,
        catalog: Catalog,
        writer: Writer,
        planner: Planner,
        described: Described,
        engine: Engine,
        *,
        timeout_s: float,
        to_drop: Callable[[Root], Collection[str]],
        settle: Callable[[], None],
    ) -> None:
        """Start the thread.

        Args:
            coord: The job's key-value store.
            catalog: The store's log.
            writer: The epoch this job owns.
            planner: Plans; the caller's while no save is under way.
            described: What goes into manifests besides arrays.
            engine: Holds what was staged.
            timeout_s: Deadline of each wait.
            to_drop: Retention.
            settle: Lets go of arrays that are copied.
        """
        self.fenced: str | None = None
        self.saw_torn_copy = False
        self.ancestry: list[str] = []
        self._coord = coord
        self._catalog = catalog
        self._writer = writer
        self._planner = planner
        self._described = described
        self._engine = engine
        self._timeout_s = timeout_s
        self._to_drop = to_drop
        self._settle = settle
        self._before: Round | None = None
        self._agreement = Agreement(coord, catalog, writer)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._serve, name="shardckpt-background", daemon=True
        )
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a staged save over."""
        self._jobs.put(job)

    def close(self, timeout_s: float) -> bool:
        """End the thread after the saves it has; return False where it still runs."""
        self._jobs.put(None)
        # The last save's garbage goes after its outcome is known; a slow disk may leave some.
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def answer(self, round_: Round, step: int) -> Answer:
        """Return the attempt's name and the plan: the coordinator's answer to all ranks.

        Raises:
            SaveFailedError: The coordinator saves another step.
            ShardckptError: It failed, or a rank did not come.
        """
        if self._is_coordinator:
            attempt = self._catalog.new_attempt(self._writer, step)
            return self._planner.plan_round(round_, step, attempt)
        answer = round_.wait("answer", Answer, what="the coordinator's call of save()", grace=GRACE)
        if answer.step != step:
            raise SaveFailedError(
                f"{round_.what}: rank 0 saves step {answer.step}. Every rank must call save() "
                "for the same steps."
            )
        return answer

    @property
    def _is_coordinator(self) -> bool:
        return self._coord.rank == 0

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            outcome = self._run(job)
            if outcome.kind == FencedError.__name__:
                self.fenced = outcome.message
            if outcome.kind == TornCopyError.__name__:
                self.saw_torn_copy = True
            seconds = time.monotonic() - job.started
            if outcome.committed:
                level = logging.INFO if self._is_coordinator else logging.DEBUG
                _logger.log(level, "step %d: committed in %.2f s", job.handle.step, seconds)
                job.handle.committed.set_result(True)
            else:
                if self._is_coordinator:
                    _logger.error("step %d was not saved: %s", job.handle.step, outcome.message)
                job.handle.committed.set_exception(error_named(outcome.kind, outcome.message))
            if self._before is not None:
                self._before.forget()
            self._before = job.round
            # After a failure, too: what it left may be what keeps the disk full.
            if self.fenced is None:
                self._sweep()

    def _run(self, job: Job) -> Outcome:
        """Bring one save to its outcome; never raises."""
        attempt = ""
        try:
            answer = job.answer
            if answer is None:
                hello = Hello(step=job.handle.step, structure=job.planned.structure)
                job.round.publish(f"hello/{job.round.rank}", hello)
                answer = self.answer(job.round, job.handle.step)
            attempt = answer.attempt
            self._check_plan(job, answer)
            self._write(job, answer)
            outcome = (
                self._commit(job, answer)
                if self._is_coordinator
                else self._agreement.told(job.round)
            )
        except Exception as error:
            _logger.debug(
                "step %d failed on rank %d", job.handle.step, self._coord.rank, exc_info=True
            )
            return self._agreement.failed(job.round, job.handle.step, attempt, error)
        finally:
            # False: a write hangs; its slot and the ticket are lost, the others go on.
            self._engine.release(job.staged.ticket, _RELEASE_MS)
            self._settle()
        if self._is_coordinator:
            self._agreement.publish(job.round, outcome)
        return outcome

    def _check_plan(self, job: Job, answer: Answer) -> None:
        planned = job.planned
        if answer.plan == planned.digest:
            return
        # Another rank's structure is new. This rank has staged by the old plan; it may go on if its
        # part did not change.
        plan = rank_plan(self._planner.fetch_plan(answer.plan), planned.tree.leaves, job.round.rank)
        if plan != planned.plan:
            planned.is_stale = True
            raise SaveFailedError(
                f"{job.round.what}: the state's structure changed on other ranks only, so rank "
                f"{job.round.rank} staged by the old plan. The next save plans anew."
            )
        planned.digest = answer.plan

    def _write(self, job: Job, answer: Answer) -> None:
        planned = job.planned
        attempt = AttemptId(answer.attempt, job.handle.step, job.round.rank, job.round.world_size)
        files = write_files(
            self._catalog.storage, self._engine, attempt, planned.plan, planned.tree.leaves,
            job.staged.ticket, job.per_rank, timeout_s=self._timeout_s,
            while_waiting=self._settle,
        )  # fmt: skip
        same = planned.structure == answer.structure
        report = Report(
            structure=planned.structure,
            files=files,
            objects_digest=digest(msgspec.json.encode(job.objects, order="deterministic")),
            objects={} if same else job.objects,
        )
        job.round.publish(f"report/{job.round.rank}", report)

    def _commit(self, job: Job, answer: Answer) -> Outcome:
        facts = self._described.environment | job.remarks
        outcome, _ = commit_round(
            job.round, self._catalog, self._writer, answer, self._planner,
            replace(self._described, environment=facts),
            job.objects, job.metrics, self.ancestry, self._to_drop,
        )  # fmt: skip
        if outcome.committed:
            self.ancestry.append(answer.attempt)
        return outcome

    def _sweep(self) -> None:
        if not self._is_coordinator:
            return
        try:
            self._agreement.abort_doomed()
            gone = self._catalog.sweep()
        except (ShardckptError, FileNotFoundError) as error:
            _logger.warning("garbage stays until the next save: %s", error)
            return
        if gone:
            _logger.info("removed %d old or unfinished attempts", len(gone))
