"""Which live steps may go. Pure: a root and a rule in, attempts out.

Layer: retention.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardckpt.format.root import Entry, Root
    from shardckpt.options import Best, Retention


def to_drop(root: Root, retention: Retention) -> list[str]:
    """Return the attempts that retention lets go, oldest first.

    Pinned steps stay. Of a step saved twice only the newest counts, unless fewer than two would be
    left. Abandoned branches go once the current one has `max(2, last)` steps. The log itself keeps
    two good ones whatever this says (`catalog.log.may_drop`).
    """
    newest: dict[int, Entry] = {entry.step: entry for entry in root.current}
    current = [entry for entry in root.current if newest[entry.step] is entry]
    kept = {entry.attempt for entry in current[-max(2, retention.last) :]}
    if retention.every is not None:
        kept |= {entry.attempt for entry in current if entry.step % retention.every == 0}
    if retention.best is not None:
        kept |= _best(current, retention.best)
    kept |= {entry.attempt for entry in root.current if entry.pinned}
    for entry in reversed(root.current):
        if len(kept) >= 2:
            break
        kept.add(entry.attempt)
    drop_abandoned = len(current) >= max(2, retention.last)
    return [
        entry.attempt
        for entry in root.live
        if not entry.pinned
        and entry.attempt not in kept
        and (drop_abandoned or not entry.abandoned)
    ]


def _best(entries: list[Entry], best: Best) -> set[str]:
    """Return the attempts with the best values; of equal ones the newer."""
    measured = [
        (entry.metrics[best.metric], position, entry.attempt)
        for position, entry in enumerate(entries)
        if not math.isnan(entry.metrics.get(best.metric, math.nan))
    ]
    sign = 1.0 if best.mode == "min" else -1.0
    measured.sort(key=lambda m: (sign * m[0], -m[1]))
    return {attempt for _, _, attempt in measured[: best.n]}
