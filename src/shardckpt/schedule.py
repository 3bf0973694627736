"""When to save, decided alike on every rank.

Layer: schedule (with retention). A rule by steps is pure arithmetic. A rule by seconds, and one
that chooses the interval itself, is decided by the coordinator one window of calls ahead: when it
enters a window it announces at which calls of the next one to save, so a rank only ever waits for a
message that was sent a window ago. Windows count calls, not steps, so a program may ask at
whichever steps it likes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.coord.base import Coord, wait_for
from shardckpt.options import Auto
from shardckpt.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardckpt.options import Every
    from shardckpt.policy import Saving

WINDOW_CALLS: Final = 4
_KEPT_WINDOWS: Final = 64


class _Due(msgspec.Struct, frozen=True):
    """The calls of one window at which every rank saves."""

    calls: tuple[int, ...]


class Schedule:
    """Answers `should_save`; called alike on every rank."""

    def __init__(
        self,
        rule: Every | Auto | None,
        coord: Coord,
        *,
        prefix: str,
        timeout_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            rule: When to save; None never.
            coord: The job's key-value store.
            prefix: Namespace of the announcements.
            timeout_s: Deadline of the wait for one.
            monotonic: Clock of the coordinator.
        """
        self._rule = rule
        self._coord = coord
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        self._saved_at = monotonic()
        self._calls = 0
        self._due: tuple[int, ...] = ()
        self._last_due = 0
        self.policy: Policy | None = None
        if isinstance(rule, Auto) and coord.rank == 0:
            self.policy = Policy(rule, coord.world_size, monotonic=monotonic)

    def saving(self) -> None:
        """Note that a save is about to begin."""
        self._saved_at = self._monotonic()
        self._last_due = max(self._last_due, self._calls - 1)

    def began(self, saving: Saving) -> None:
        """Note that a save has begun, to see what it costs."""
        if self.policy is not None:
            self.policy.began(saving)

    @property
    def learned(self) -> dict[str, str]:
        """What a later job may go on with, to be saved; nothing where nothing is chosen."""
        return {} if self.policy is None else self.policy.learned

    def recall(self, saved: Mapping[str, str]) -> None:
        """Go on with what an earlier job learned, out of what was saved beside its state."""
        if self.policy is not None:
            self.policy.recall(saved)

    def should_save(self, step: int) -> bool:
        """Return whether every rank saves at this step.

        Raises:
            DeadlineError: The coordinator's announcement did not come.
        """
        rule = self._rule
        if rule is None:
            return False
        if isinstance(rule, Auto):
            if self.policy is not None:
                self.policy.called()
            return self._is_due()
        by_steps = rule.steps is not None and step > 0 and step % rule.steps == 0
        by_seconds = rule.s is not None and self._is_due()
        return by_steps or by_seconds

    def _is_due(self) -> bool:
        window, position = divmod(self._calls, WINDOW_CALLS)
        self._calls += 1
        if position == 0:
            self._due = self._announced(window) if window else ()
            if self._coord.rank == 0:
                due = _Due(self._calls_due(window + 1))
                self._coord.set(self._key(window + 1), msgspec.json.encode(due))
                if window >= _KEPT_WINDOWS:
                    self._coord.delete(self._key(window - _KEPT_WINDOWS))
        return position in self._due

    def _calls_due(self, window: int) -> tuple[int, ...]:
        """Return at which calls of a window to save; the coordinator, a window before."""
        if self.policy is not None:
            # What the first save costs decides when the second is due.
            is_first_due = self.policy.choice is None and 0 < self._last_due >= self._calls - 1
            if is_first_due or self.policy.is_behind or self.policy.is_recalling:
                return ()
            return self._every(self.policy.calls, window)
        every_s = None if self._rule is None or isinstance(self._rule, Auto) else self._rule.s
        # A save announced for this window restarts the clock, so the next one is judged anew.
        elapsed_s = 0.0 if self._due else self._monotonic() - self._saved_at
        return (0,) if every_s is not None and elapsed_s >= every_s else ()

    def _every(self, num_calls: int, window: int) -> tuple[int, ...]:
        first = window * WINDOW_CALLS
        found: list[int] = []
        call = max(first, self._last_due + num_calls)
        while call < first + WINDOW_CALLS:
            found.append(call - first)
            self._last_due = call
            call += num_calls
        return tuple(found)

    def _announced(self, window: int) -> tuple[int, ...]:
        data = wait_for(
            self._coord,
            self._key(window),
            what=f"the coordinator's word on call {window * WINDOW_CALLS} of should_save()",
            timeout_s=self._timeout_s,
        )
        return msgspec.json.decode(data, type=_Due).calls

    def _key(self, window: int) -> str:
        return f"{self._prefix}/due/{window}"
