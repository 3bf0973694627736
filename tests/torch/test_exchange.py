"""Loads across hosts, through a gloo group."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from shardckpt.testing.ranks import RankDeath, run_ranks
from shardckpt.torch.exchange import default_exchange

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(120)]


def _ranks() -> Any:
    # Spawned children find rank functions by module name, so the module needs an importable one.
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    assert importlib.util.find_spec("ranks_of_exchange") is not None
    import ranks_of_exchange

    return ranks_of_exchange


def test_ranks_of_several_hosts_read_every_byte_once(tmp_path: Path) -> None:
    """Each rank its own host, then two hosts of two ranks; and what cannot be done or read."""
    ranks = _ranks()
    results = run_ranks(4, ranks.load_across_hosts, tmp_path, timeout_s=100)
    for hosts in ("abcd", "aabb"):
        total = sum(result[hosts].read_bytes for result in results)
        assert total <= ranks.unique_bytes() * 1.05, hosts
        assert max(result[hosts].read_bytes for result in results) <= total / 4 * 1.3
    # One rank could not reach the others, so all did without.
    assert all(result["refused"].read_bytes >= ranks.unique_bytes() for result in results)
    damaged = [result["damaged"] for result in results]
    assert {kind for kind, _, _ in damaged} == {"CorruptCheckpointError"}
    assert len({message.partition("step-")[2] for _, message, _ in damaged}) == 1
    assert sum(message.startswith("step-") for _, message, _ in damaged) == 1
    assert max(seconds for _, _, seconds in damaged) < ranks.TIMEOUT_S / 2
    assert {result["sum"] for result in results} == {0 + 1 + 2 + 3}
    assert all(result["threads"] == [] for result in results)


@pytest.mark.crash
def test_a_host_that_dies_is_named(tmp_path: Path) -> None:
    ranks = _ranks()
    results = run_ranks(4, ranks.load_while_a_host_dies, tmp_path, timeout_s=100, may_die=[2])
    assert isinstance(results[2], RankDeath)
    for kind, message, seconds in (results[0], results[1], results[3]):
        assert kind == "DeadlineError"
        assert "rank 2 went away" in message
        assert seconds < ranks.TIMEOUT_S / 2


@pytest.mark.crash
def test_a_host_that_dies_while_all_connect_is_named(tmp_path: Path) -> None:
    """Gloo itself would try for minutes."""
    ranks = _ranks()
    results = run_ranks(
        4, ranks.load_while_hosts_connect_and_one_dies, tmp_path, timeout_s=100, may_die=[2]
    )
    for kind, message, seconds in (results[0], results[1], results[3]):
        assert kind == "DeadlineError"
        assert "from rank 2 of 4" in message
        assert seconds < 20


def test_one_process_has_nobody_to_exchange_with() -> None:
    assert default_exchange(1.0) is None
