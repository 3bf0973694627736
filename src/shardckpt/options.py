"""Frozen, validated options of the public API.

Layer: options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

PerRankRule: TypeAlias = Literal["error", "rank0", "drop"]
"""What another world size does with per-rank values: raise, give all that of rank 0,
or leave the target as it is."""

MIN_STAGING_BYTES: Final = 16 << 20
MIN_WRITE_BYTES_PER_S: Final = 1 << 20

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
        if (self.steps is not None and self.steps < 1) or (self.s is not None and not self.s > 0):
            raise ValueError(f"Every(steps={self.steps}, s={self.s}): both must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """When to save: as often as loses the least time, given what saves of this job cost.

    The coordinator measures stalls, slower steps and the time until a save is durable, and chooses
    the interval by Young's and Daly's formulas. It begins early, to measure, and follows when the
    storage gets slower or faster. A program calls `should_save` at every step, or at every so many.

    Attributes:
        max_overhead: Most of the training's time that saves may cost, from 0 to 1.
        mtbf_s: Mean seconds between failures of the whole job; None takes what is usual for so many
            ranks (one failure in 5.8 years of an accelerator).
        restart_s: Seconds from a failure to the first step again; only for the forecast that is
            logged.
    """

    max_overhead: float = 0.01
    mtbf_s: float | None = None
    restart_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse bounds that nothing could keep.

        Raises:
            ValueError: A bound is not a number of its range.
        """
        if not 0 < self.max_overhead < 1:
            raise ValueError(
                f"Auto max_overhead is {self.max_overhead}; use a part of the time such as 0.01"
            )
        if self.mtbf_s is not None and not 0 < self.mtbf_s < float("inf"):
            raise ValueError(f"Auto mtbf_s is {self.mtbf_s}; use seconds above 0, or None")
        if not 0 <= self.restart_s < float("inf"):
            raise ValueError(f"Auto restart_s is {self.restart_s}; use seconds from 0")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """How saves are copied and written beside the training.

    Attributes:
        overlap: Copy late what a fence guards, while training goes on; False copies all of the
            state before `save` returns. None is the default of the front: True in torch, where
            every optimizer is a fence, False in JAX, where an array to be copied cannot be donated.
        staging_bytes: Host memory of this rank for copies, in bytes; less than the state makes it a
            ring, and `save` or the fence waits for the disk. None: what one save takes, but at most
            40 % of the memory limit, shared by the ranks of the host as torchrun, Open MPI or Slurm
            counts them (elsewhere set LOCAL_WORLD_SIZE, or this).
        check_copies: For debugging: compare every copy with the arrays as they were when the save
            began, at the price of reading them once more inside `save`.
        write_bytes_per_s: Most bytes per second that this rank writes, at least 1 MiB; None for no
            limit.
        max_inflation: How much longer steps may take while a save is written; above it the writing
            is slowed down. None never slows it down.
        cpus: Processors the background threads may run on; empty for all.
    """

    overlap: bool | None = None
    staging_bytes: int | None = None
    check_copies: bool = False
    write_bytes_per_s: int | None = None
    max_inflation: float | None = 1.05
    cpus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse nonsense.

        Raises:
            ValueError: A bound is too small, or a processor is negative.
        """
        if self.staging_bytes is not None and self.staging_bytes < MIN_STAGING_BYTES:
            raise ValueError(
                f"staging_bytes is {self.staging_bytes}; a ring needs at least "
                f"{MIN_STAGING_BYTES} (two extents of 8 MiB)"
            )
        if self.write_bytes_per_s is not None and self.write_bytes_per_s < MIN_WRITE_BYTES_PER_S:
            raise ValueError(
                f"write_bytes_per_s is {self.write_bytes_per_s}; use at least "
                f"{MIN_WRITE_BYTES_PER_S}: slower, one extent of 8 MiB looks like a disk that hangs"
            )
        if self.max_inflation is not None and self.max_inflation <= 1:
            raise ValueError(f"max_inflation is {self.max_inflation}; use a ratio above 1")
        if any(cpu < 0 for cpu in self.cpus):
            raise ValueError(f"cpus is {list(self.cpus)}; use numbers from 0")
