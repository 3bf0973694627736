"""Retention proposes exactly what may go, and never the last good steps."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.catalog.log import drop, first_root
from shardckpt.format.root import Entry, Root, attempt_name
from shardckpt.options import Best, Retention
from shardckpt.retention import to_drop


def entry(step: int, number: int, **changes: Any) -> Entry:
    """Return a live step; `number` tells attempts of one step apart."""
    made = Entry(
        step=step,
        attempt=attempt_name(step, 1, f"{number:032x}"),
        parent="",
        manifest="",
        metrics={},
        pinned=False,
        abandoned=False,
        world_size=1,
        nbytes=1,
        saved_unix_s=0.0,
    )
    return msgspec.structs.replace(made, **changes)


def root(*live: Entry) -> Root:
    """Return a root with these live steps."""
    return msgspec.structs.replace(first_root("store", "job", "nonce"), live=list(live))


def line(*steps: int, **changes: Any) -> list[Entry]:
    """Return entries of these steps."""
    return [entry(step, number, **changes) for number, step in enumerate(steps)]


def left(live: list[Entry], retention: Retention) -> list[int]:
    """Return the steps left after retention, by the log's own rules."""
    at = root(*live)
    return [e.step for e in drop(at, to_drop(at, retention)).live]


def test_the_last_steps_stay_by_the_order_of_the_log_not_by_number() -> None:
    assert left(line(50, 60, 70, 10, 20), Retention(last=3)) == [70, 10, 20]


def test_two_steps_stay_even_where_one_is_asked_for() -> None:
    assert left(line(1, 2, 3), Retention(last=1)) == [2, 3]


def test_an_older_save_of_the_same_step_goes_first() -> None:
    live = line(1, 2, 2, 3)
    assert to_drop(root(*live), Retention(last=3)) == [live[1].attempt]


def test_one_step_saved_again_and_again_keeps_its_two_newest_saves() -> None:
    live = line(1, 1, 1, 1)
    assert to_drop(root(*live), Retention(last=3)) == [live[0].attempt, live[1].attempt]


@pytest.mark.parametrize(
    ("mode", "n", "kept"),
    [("min", 1, [2]), ("min", 2, [2, 3]), ("max", 1, [4]), ("max", 2, [1, 4])],
)
def test_the_best_stay_besides_the_last(mode: str, n: int, kept: list[int]) -> None:
    losses = {1: 0.9, 2: 0.1, 3: 0.2, 4: 1.5, 5: 0.5, 6: 0.6}
    live = [entry(step, step, metrics={"loss": loss}) for step, loss in losses.items()]
    best = Best("loss", mode, n=n)
    assert left(live, Retention(last=2, best=best)) == sorted({*kept, 5, 6})


def test_of_equal_metrics_the_newer_is_the_better() -> None:
    live = [entry(step, step, metrics={"loss": 0.5}) for step in range(1, 6)]
    assert left(live, Retention(last=2, best=Best("loss", "min", n=3))) == [3, 4, 5]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_missing_metric_and_nan_are_never_the_best_but_infinity_can_be(mode: str) -> None:
    infinity = -math.inf if mode == "min" else math.inf
    metrics: list[dict[str, float]] = [
        {"loss": math.nan},
        {"loss": infinity},
        {"other": 0.0},
        {},
        {"loss": 0.5},
        {},
        {},
    ]
    live = [entry(step, step, metrics=m) for step, m in enumerate(metrics)]
    assert left(live, Retention(last=2, best=Best("loss", mode, n=9))) == [1, 4, 5, 6]


def test_every_nth_step_stays_for_good() -> None:
    assert left(line(*range(0, 60, 5)), Retention(last=2, every=20)) == [0, 20, 40, 50, 55]


def test_pinned_steps_stay_abandoned_or_not() -> None:
    live = [
        entry(1, 1, pinned=True),
        entry(2, 2, pinned=True, abandoned=True),
        entry(3, 3, abandoned=True),
        *line(4, 5, 6, 7),
    ]
    assert left(live, Retention(last=2)) == [1, 2, 6, 7]


def test_an_abandoned_branch_goes_only_when_the_current_one_is_long_enough() -> None:
    old = [entry(step, step, abandoned=True) for step in (1, 2, 3)]
    assert left([*old, *line(4, 5)], Retention(last=3)) == [1, 2, 3, 4, 5]
    assert left([*old, *line(4, 5, 6)], Retention(last=3)) == [4, 5, 6]
    assert left([*old, *line(4, 4, 4)], Retention(last=3)) == [1, 2, 3, 4, 4]


def test_abandoned_steps_are_never_kept_for_their_metric_or_number() -> None:
    old = [entry(100, 1, abandoned=True, metrics={"loss": -9.0})]
    rule = Retention(last=2, every=100, best=Best("loss", "min"))
    assert left([*old, *line(4, 5)], rule) == [4, 5]


entries = st.lists(
    st.tuples(
        st.integers(0, 8),
        st.booleans(),
        st.booleans(),
        st.none() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 2.0]),
    ),
    max_size=10,
).map(
    lambda rows: [
        entry(
            step,
            number,
            pinned=pinned,
            abandoned=abandoned,
            metrics={} if loss is None else {"loss": loss},
        )
        for number, (step, pinned, abandoned, loss) in enumerate(rows)
    ]
)
rules = st.builds(
    Retention,
    last=st.integers(1, 4),
    best=st.none()
    | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
    every=st.none() | st.integers(1, 4),
)


@given(entries, rules)
def test_what_goes_is_live_once_unpinned_and_leaves_two_good_steps(
    live: list[Entry], rule: Retention
) -> None:
    at = root(*live)
    gone = to_drop(at, rule)
    assert len(set(gone)) == len(gone)
    assert [e.attempt for e in live if e.attempt in gone] == gone
    assert not any(e.pinned for e in live if e.attempt in gone)
    good = [e for e in at.current if e.attempt not in gone]
    assert len(good) >= min(2, len(at.current))
    assert at.latest is None or at.latest.attempt not in gone
    assert {e.step for e in at.current[-1:]} <= {e.step for e in good}


@given(entries, rules)
def test_the_log_takes_the_whole_proposal_and_asking_again_changes_nothing(
    live: list[Entry], rule: Retention
) -> None:
    at = root(*live)
    gone = to_drop(at, rule)
    after = drop(at, gone)
    assert after.retired == gone
    assert to_drop(after, rule) == []


@given(entries, rules, st.integers(0, 8))
def test_each_rule_keeps_what_it_promises(live: list[Entry], rule: Retention, step: int) -> None:
    at = root(*live)
    left_over = [e for e in live if e.attempt not in to_drop(at, rule)]
    newest = {e.step: e.attempt for e in at.current}
    in_order = sorted(newest, key=lambda s: [e.attempt for e in live].index(newest[s]))
    kept = {e.attempt for e in left_over}
    assert {newest[s] for s in in_order[-rule.last :]} <= kept
    if rule.every is not None and step % rule.every == 0 and step in newest:
        assert newest[step] in kept
    if rule.best is not None:
        worth = {
            a: e.metrics["loss"]
            for e in at.current
            if (a := newest[e.step]) == e.attempt
            and not math.isnan(e.metrics.get("loss", math.nan))
        }
        pick = min if rule.best.mode == "min" else max
        if worth:
            assert any(worth.get(a) == pick(worth.values()) for a in kept)
