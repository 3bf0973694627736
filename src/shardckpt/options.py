"""Frozen, validated options of the public API.

Layer: options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

PerRankRule: TypeAlias = Literal["error", "rank0", "drop"]
"""What another world size does with per-rank values: raise, give all that of rank 0,
or leave the target as it is."""

PER_RANK_RULES: Final[tuple[PerRankRule, ...]] = ("error", "rank0", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """When to save: every `steps` steps, every `s` seconds, or whichever comes first.

    The rule by steps is pure. The rule by seconds is decided by the coordinator's clock and
    announced a few steps ahead, so that every rank saves at the same step.
    """

    steps: int | None = None
    s: float | None = None

    def __post_init__(self) -> None:
        """Refuse a rule that never or always fires.

        Raises:
            ValueError: Neither is given, or one is not positive.
        """
        if self.steps is None and self.s is None:
            raise ValueError("Every() needs steps= or s=")
        if (self.steps is not None and self.steps < 1) or (self.s is not None and self.s <= 0):
            raise ValueError(f"Every(steps={self.steps}, s={self.s}): both must be positive")


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `n` best steps by one metric given to `save(metrics=...)`.

    Attributes:
        metric: Name of the metric.
        mode: "min" or "max".
        n: How many.
    """

    metric: str
    mode: str
    n: int = 1

    def __post_init__(self) -> None:
        """Refuse nonsense.

        Raises:
            ValueError: Another mode, or n below 1.
        """
        if self.mode not in ("min", "max"):
            raise ValueError(f"Best mode is {self.mode!r}; use 'min' or 'max'")
        if self.n < 1:
            raise ValueError(f"Best n is {self.n}; keep at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which committed steps stay; never fewer than two good ones.

    Attributes:
        last: The newest steps of the current branch.
        best: The best by a metric, besides.
        every: Every step divisible by this, besides.
    """

    last: int = 3
    best: Best | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        """Refuse nonsense.

        Raises:
            ValueError: `last` or `every` below 1.
        """
        if self.last < 1:
            raise ValueError(f"Retention last is {self.last}; keep at least 1")
        if self.every is not None and self.every < 1:
            raise ValueError(f"Retention every is {self.every}; use 1 or more")
