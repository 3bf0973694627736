"""The closed loop: steps that take longer while a save is written slow the writing down.

Layer: staging. Pure: times come in, a rate comes out. What an undisturbed step takes is the median
of the last steps during which nothing was written.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

_NUM_QUIET: Final = 32
_MIN_QUIET: Final = 4
_NUM_BUSY: Final = 3
_SLOWER: Final = 0.5
_FASTER: Final = 1.5
# Below this a save would take for ever; a disk that disturbs at this rate disturbs anyway.
LEAST_BYTES_PER_S: Final = 16 << 20


class Pacer:
    """Chooses the rate of writing from the times at which training steps begin."""

    def __init__(self, max_inflation: float | None, most_bytes_per_s: int | None) -> None:
        """Start without a measured step.

        Args:
            max_inflation: Steps may take this much longer while a save is written; None: any.
            most_bytes_per_s: The user's own limit; None: none.
        """
        self._max_inflation = max_inflation
        self._most = most_bytes_per_s
        self._rate: float | None = most_bytes_per_s
        self._quiet: deque[float] = deque(maxlen=_NUM_QUIET)
        self._busy: deque[float] = deque(maxlen=_NUM_BUSY)
        self._began: float | None = None
        self._was_writing = False
        self._skips = False

    @property
    def bytes_per_s(self) -> int:
        """The rate to write at; 0 for no limit."""
        return 0 if self._rate is None else max(1, int(self._rate))

    def skip_step(self) -> None:
        """Leave out the step under way: it holds a save or a wait, which is no inflation."""
        self._skips = True

    def step_began(self, now_s: float, *, is_writing: bool, written_bytes_per_s: float) -> bool:
        """Take note that a step begins; return whether the rate changed.

        Args:
            now_s: Monotonic time, in seconds.
            is_writing: Whether a save is being written now.
            written_bytes_per_s: What was written since the step before, 0 where nothing was.
        """
        began, self._began = self._began, now_s
        was_writing, self._was_writing = self._was_writing, is_writing
        skips, self._skips = self._skips, False
        if began is None or skips:
            return False
        seconds = now_s - began
        if not is_writing and not was_writing:
            self._quiet.append(seconds)
            self._busy.clear()
            return False
        if not (is_writing and was_writing):
            return False
        self._busy.append(seconds)
        return self._adjust(written_bytes_per_s)

    def _adjust(self, written_bytes_per_s: float) -> bool:
        if self._max_inflation is None or len(self._quiet) < _MIN_QUIET:
            return False
        if len(self._busy) < _NUM_BUSY:
            return False
        ratio = statistics.median(self._busy) / statistics.median(self._quiet)
        before = self.bytes_per_s
        if ratio > self._max_inflation:
            base = written_bytes_per_s if self._rate is None else self._rate
            self._rate = max(LEAST_BYTES_PER_S, base * _SLOWER)
            if self._most is not None:
                self._rate = min(self._rate, self._most)
        elif self._rate is not None and ratio < 1 + (self._max_inflation - 1) / 2:
            faster = self._rate * _FASTER
            # Where the limit no longer holds the disk back there is none.
            is_free = self._most is None and written_bytes_per_s < self._rate / 2
            self._rate = None if is_free else faster
            if self._most is not None:
                self._rate = min(faster, self._most)
        if self.bytes_per_s == before:
            return False
        # The next judgement is of steps at the new rate only.
        self._busy.clear()
        return True
