"""When to save, decided alike on every rank.

Layer: schedule (with retention). A rule by steps is pure arithmetic. A rule by seconds is decided
by the coordinator one window of calls ahead: when it enters a window it announces whether the next
one begins with a save, so a rank only ever waits for a message that was sent a window ago. Windows
count calls, not steps, so a program may ask at whichever steps it likes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.coord.base import Coord, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.options import Every

WINDOW_CALLS: Final = 4
_KEPT_WINDOWS: Final = 64


class _Due(msgspec.Struct, frozen=True):
    due: bool


class Schedule:
    """Answers `should_save`; called alike on every rank."""

    def __init__(
        self,
        rule: Every | None,
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

    def saved(self) -> None:
        """Note that a save has begun."""
        self._saved_at = self._monotonic()

    def should_save(self, step: int) -> bool:
        """Return whether every rank saves at this step.

        Raises:
            DeadlineError: The coordinator's announcement did not come.
        """
        rule = self._rule
        if rule is None:
            return False
        by_steps = rule.steps is not None and step > 0 and step % rule.steps == 0
        by_seconds = rule.s is not None and self._by_seconds(rule.s)
        return by_steps or by_seconds

    def _by_seconds(self, every_s: float) -> bool:
        window, position = divmod(self._calls, WINDOW_CALLS)
        self._calls += 1
        if position:
            return False
        is_due = self._announced(window) if window else False
        if self._coord.rank == 0:
            # A save announced for this window restarts the clock, so the next one is judged anew.
            elapsed_s = 0.0 if is_due else self._monotonic() - self._saved_at
            self._coord.set(self._key(window + 1), msgspec.json.encode(_Due(elapsed_s >= every_s)))
            if window >= _KEPT_WINDOWS:
                self._coord.delete(self._key(window - _KEPT_WINDOWS))
        return is_due

    def _announced(self, window: int) -> bool:
        data = wait_for(
            self._coord,
            self._key(window),
            what=f"the coordinator's word on call {window * WINDOW_CALLS} of should_save()",
            timeout_s=self._timeout_s,
        )
        return msgspec.json.decode(data, type=_Due).due

    def _key(self, window: int) -> str:
        return f"{self._prefix}/due/{window}"
