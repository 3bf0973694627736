"""One save under way: what its caller sees of it, and what the threads hand on.

Layer: save.
"""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    import msgspec

    from shardckpt.coord.session import Round
    from shardckpt.save.messages import Answer
    from shardckpt.save.plan import RankPlan
    from shardckpt.save.stage import CopyTable, Staged
    from shardckpt.state import StateTree


class SaveHandle:
    """One save under way.

    Attributes:
        step: The step.
        staged: Done once all arrays are copied; until then code that changes them calls `fence()`.
        committed: True once the step is committed, False where the coordinator skipped it; else its
            error.
        save_s: Seconds that `save` took.
        wait_s: Seconds of those in which it waited for earlier saves or for room.
        fence_s: Seconds that the training waited at fences for this save's copies.
    """

    def __init__(self, step: int, timeout_s: float) -> None:
        """Start with nothing done."""
        self.step = step
        self.save_s = self.wait_s = self.fence_s = 0.0
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
class Planned:
    """The plan of one structure, used by every save until the structure changes.

    Attributes:
        structure: Digest of this rank's structure.
        digest: Digest of the plan of all ranks; another one where others changed and this rank's
            part did not.
        tree: This rank's state, without the caller's memory.
        plan: This rank's part.
        table: What the engine copies under it.
        is_stale: Whether other ranks changed so that this rank's part did, too.
    """

    structure: str
    digest: str
    tree: StateTree
    plan: RankPlan
    table: CopyTable
    is_stale: bool = False


@dataclass(slots=True)
class Job:
    """A staged save.

    Attributes:
        round: Its messages.
        handle: What the caller holds.
        planned: The plan by which it was staged.
        staged: Its arrays, in the engine's hands.
        answer: The coordinator's answer, where the structure was new and it was waited for.
        objects: Plain values, by key.
        per_rank: Values of this rank alone, by key.
        metrics: Figures for keep-best.
        remarks: Facts of this save beside those of the environment.
        started: When `save` was called, as `time.monotonic` counts.
    """

    round: Round
    handle: SaveHandle
    planned: Planned
    staged: Staged
    answer: Answer | None
    objects: dict[str, msgspec.Raw]
    per_rank: dict[str, msgspec.Raw]
    metrics: dict[str, float]
    remarks: dict[str, str]
    started: float
