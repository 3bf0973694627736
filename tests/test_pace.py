"""The closed loop that paces the writing by the time that training steps take."""

from __future__ import annotations

from typing import Final

import pytest

from shardckpt.staging.pace import LEAST_BYTES_PER_S, Pacer

_MIB: Final = 1 << 20
_QUIET_S: Final = 0.1


class _Training:
    """Steps whose time depends on how fast the save is written."""

    def __init__(self, pacer: Pacer, *, disk: float, slowdown: float) -> None:
        self.pacer = pacer
        self._disk = disk
        self._slowdown = slowdown  # Inflation per byte/s written.
        self._now = 0.0

    @property
    def written(self) -> float:
        limit = self.pacer.bytes_per_s
        return min(self._disk, limit) if limit else self._disk

    def steps(self, count: int, *, writing: bool) -> float:
        """Run steps; return the inflation of the last one."""
        inflation = 0.0
        for _ in range(count):
            inflation = self.written * self._slowdown if writing else 0.0
            self._now += _QUIET_S * (1 + inflation)
            self.pacer.step_began(
                self._now, is_writing=writing, written_bytes_per_s=self.written if writing else 0
            )
        return inflation


def test_a_save_that_disturbs_is_slowed_down_until_it_does_not() -> None:
    training = _Training(Pacer(1.05, None), disk=2048 * _MIB, slowdown=0.5 / (2048 * _MIB))
    training.steps(10, writing=False)
    assert training.steps(3, writing=True) == pytest.approx(0.5)
    assert training.steps(60, writing=True) <= 0.05
    # Not further than it has to be.
    assert training.written >= 64 * _MIB


def test_a_save_that_disturbs_nobody_is_written_at_full_speed() -> None:
    training = _Training(Pacer(1.05, None), disk=2048 * _MIB, slowdown=0)
    training.steps(10, writing=False)
    training.steps(50, writing=True)
    assert training.pacer.bytes_per_s == 0


def test_the_speed_comes_back_when_the_disturbance_is_over() -> None:
    pacer = Pacer(1.05, None)
    disturbed = _Training(pacer, disk=2048 * _MIB, slowdown=0.5 / (2048 * _MIB))
    disturbed.steps(10, writing=False)
    disturbed.steps(40, writing=True)
    assert pacer.bytes_per_s
    calm = _Training(pacer, disk=2048 * _MIB, slowdown=0)
    pacer.skip_step()
    calm.steps(60, writing=True)
    assert pacer.bytes_per_s == 0


def test_it_never_goes_below_the_least_rate_nor_above_the_users_own() -> None:
    hopeless = _Training(Pacer(1.05, None), disk=2048 * _MIB, slowdown=1)
    hopeless.steps(10, writing=False)
    hopeless.steps(100, writing=True)
    assert hopeless.pacer.bytes_per_s == LEAST_BYTES_PER_S
    limited = _Training(Pacer(1.05, 100 * _MIB), disk=2048 * _MIB, slowdown=0)
    limited.steps(10, writing=False)
    limited.steps(100, writing=True)
    assert limited.pacer.bytes_per_s == 100 * _MIB


def test_steps_with_a_save_in_them_and_steps_before_a_baseline_are_no_reason() -> None:
    pacer = Pacer(1.05, None)
    young = _Training(pacer, disk=2048 * _MIB, slowdown=1)
    young.steps(50, writing=True)
    assert pacer.bytes_per_s == 0
    pacer = Pacer(1.05, None)
    stalls = _Training(pacer, disk=2048 * _MIB, slowdown=1)
    stalls.steps(10, writing=False)
    for _ in range(20):
        pacer.skip_step()
        stalls.steps(1, writing=True)
    assert pacer.bytes_per_s == 0


def test_without_a_bound_nothing_is_slowed_down() -> None:
    training = _Training(Pacer(None, None), disk=2048 * _MIB, slowdown=1)
    training.steps(10, writing=False)
    training.steps(50, writing=True)
    assert training.pacer.bytes_per_s == 0
