"""The commit log keeps its promises under every interleaving; the checker notices broken ones."""

from __future__ import annotations

import pytest
from model import Explorer
from mutants import MUTANTS, Mutant, mutated
from scenarios import (
    collector,
    first_store,
    job,
    keep_last,
    operator_drops,
    operator_pins,
    pruner,
    rank_of_a,
    reader,
    real_protocols,
    slow,
)
from world import Scenario, Violation

_LATE = job("C", after_cut=True)
_A2 = job("A", saves=2, rank=1, to_drop=keep_last(2))

SCENARIOS = [
    Scenario(
        "two jobs, a rank and an operator; a lost reply",
        (job("A", saves=2, rank=1), rank_of_a(), job("B"), operator_drops(1)),
        lost_replies=1,
    ),
    Scenario("two jobs, a rank; two lost replies", (_A2, rank_of_a(), job("B")), lost_replies=2),
    Scenario("three jobs and a rank", (job("A"), rank_of_a(), job("B"), job("C")), lost_replies=1),
    Scenario(
        "branches, retention, a sweep and a collector",
        (
            job("A", saves=2, to_drop=keep_last(2), sweeps=True),
            job("B", restores_old=True),
            operator_drops(1),
            collector(1),
        ),
    ),
    Scenario("torn roots", (job("A"), job("B"), operator_drops(1), pruner(1)), torn=2),
    Scenario("pruning", (job("A"), job("B"), operator_pins(2), pruner(2))),
    Scenario(
        "slow writers",
        (slow(job("A")), slow(job("B")), slow(rank_of_a())),
        lost_replies=1,
    ),
    Scenario(
        "a reader, a job and pruning",
        (reader(), job("B"), operator_pins(2), pruner(1)),
    ),
    Scenario(
        "a power cut",
        (job("A"), rank_of_a(), job("B"), operator_drops(1), _LATE),
        power_cut=True,
    ),
    Scenario(
        "a power cut and a lost reply",
        (job("A"), rank_of_a(), job("B"), _LATE),
        power_cut=True,
        lost_replies=1,
    ),
    Scenario(
        "a power cut, a sweep and a collector",
        (job("A", saves=2, to_drop=keep_last(2), sweeps=True), rank_of_a(), collector(1), _LATE),
        power_cut=True,
    ),
    Scenario(
        "a power cut and pruning",
        (job("A"), operator_pins(1), pruner(1), _LATE),
        power_cut=True,
    ),
]

LARGE_SCENARIOS = [
    Scenario(
        "three jobs, a rank and a collector",
        (job("A"), rank_of_a(), job("B"), job("C"), collector(1)),
        lost_replies=1,
    ),
    Scenario(
        "two jobs, a rank and a busy operator",
        (_A2, rank_of_a(), job("B", saves=2), operator_drops(2)),
        lost_replies=1,
    ),
    Scenario(
        "slow jobs and pruning",
        (slow(job("A")), slow(job("B")), operator_pins(1), slow(pruner(1))),
    ),
    Scenario(
        "a reader, a job and pruning, all of them slow",
        (slow(job("B")), slow(operator_pins(2)), slow(pruner(1)), reader()),
    ),
    Scenario(
        "two jobs, pruning and a power cut",
        (job("A"), job("B"), operator_pins(1), pruner(1), _LATE),
        power_cut=True,
    ),
    Scenario(
        "a power cut, a collector, an operator and a lost reply",
        (
            job("A", saves=2, rank=1, sweeps=True),
            rank_of_a(),
            operator_drops(1),
            collector(1),
            _LATE,
        ),
        power_cut=True,
        lost_replies=1,
    ),
]


def _explored(scenario: Scenario, most_states: int) -> int:
    states = Explorer(scenario, real_protocols(), first_store()).run(most_states)
    print(f"{scenario.name}: {states} states")
    return states


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_log_keeps_its_promises_in_every_state(scenario: Scenario) -> None:
    assert _explored(scenario, 1_000_000) > 1_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", LARGE_SCENARIOS, ids=lambda s: s.name)
def test_the_log_keeps_its_promises_in_every_state_of_larger_systems(scenario: Scenario) -> None:
    assert _explored(scenario, 12_000_000) > 100_000


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_checker_notices(mutant: Mutant) -> None:
    # The scenario itself is harmless: only the broken protocol makes it fail.
    Explorer(mutant.scenario, real_protocols(), first_store()).run(1_000_000)
    with pytest.raises(Violation):
        Explorer(mutant.scenario, mutated(mutant), first_store()).run(1_000_000)
