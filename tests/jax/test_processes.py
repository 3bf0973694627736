"""Real processes: meshes into meshes, who writes what, and processes that are late or die."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import ranks_of_jax as ranks

from shardckpt.jax import Checkpointer, load
from shardckpt.testing.ranks import RankDeath, run_ranks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(180)]


def test_every_mesh_of_two_processes_loads_into_every_other_and_on_one(tmp_path: Path) -> None:
    told = run_ranks(2, ranks.save_and_load_every_mesh, str(tmp_path), timeout_s=120)
    assert not any(isinstance(result, RankDeath) for result in told)
    first, second = told
    assert [first["after"], second["after"]] == [(None, b"3")] * 2
    assert [first["stage_shards"], second["stage_shards"]] == [0, 4]
    for source in ("line", "grid", "cube"):
        for target in ("line", "cube", "quarter"):
            like = ranks.arrays_on(target)
            restored = load(
                tmp_path / source, {"arrays": ranks.blank(like)}, only=["arrays/*"], timeout_s=30
            )
            ranks.check_arrays(restored.state["arrays"], like)
    check_written_once(tmp_path / "large", first["written"], second["written"])


def check_written_once(store: Path, first: int, second: int) -> None:
    """Replicas are shared out by bytes, and the files hold every byte once."""
    payload = 2 * ranks.values(0, ranks.LARGE).nbytes + 9 * ranks.values(0, (64, 64)).nbytes
    overhead = first + second - payload
    assert 0 < overhead < 0.02 * payload
    assert abs(first - second) < 0.05 * payload


def test_two_processes_load_what_one_saved_and_name_a_process_that_does_not_come(
    tmp_path: Path,
) -> None:
    for name in ("grid", "quarter"):
        with Checkpointer(tmp_path / name, timeout_s=30) as ckpt:
            ckpt.save(1, {"arrays": ranks.arrays_on(name)})
    waited_s, _ = run_ranks(2, ranks.load_two, str(tmp_path), timeout_s=90)
    assert isinstance(waited_s, float)
    assert 1.9 < waited_s < 2.2 * 1.1 + 1


@pytest.mark.crash
@pytest.mark.parametrize("victim", [1, 0], ids=["another", "coordinator"])
def test_a_process_killed_in_a_save_costs_that_save_only(tmp_path: Path, victim: int) -> None:
    """Where the coordinator dies the runtime may end the others; the next start finds step 1."""
    store = tmp_path / "store"
    died = run_ranks(
        2, ranks.die_in_a_save, str(store), victim,
        timeout_s=60, may_die=(0, 1), directory=tmp_path / "run",
    )  # fmt: skip
    assert died[victim] == RankDeath(-signal.SIGKILL)
    assert isinstance(died[1 - victim], RankDeath)
    assert died[1 - victim].exit_code != 4, "a save was acknowledged without the victim's report"
    if victim == 1:
        said = (tmp_path / "run" / "shared" / "error-0").read_text()
        assert "DeadlineError" in said
        assert "rank 1 of 2" in said
    # Written down by the victim, since the other process may have swept them.
    assert ".shard" in (tmp_path / "run" / "shared" / "dying").read_text()
    like = ranks.arrays_on("quarter")
    with Checkpointer(store, timeout_s=30) as ckpt:
        restored = ckpt.restore({"arrays": ranks.blank(like), "step": 0})
        assert restored is not None
        assert (restored.step, restored.state["step"]) == (1, 1)
        ranks.check_arrays(restored.state["arrays"], like)
        ckpt.save(2, restored.state)
        ckpt.wait()
        assert ckpt.steps() == [1, 2]


def test_a_store_that_stops_answering_ends_in_a_deadline(tmp_path: Path) -> None:
    run_ranks(2, ranks.store_stops, timeout_s=60, may_die=(0, 1), directory=tmp_path)
    waited_s, said = (tmp_path / "shared" / "said").read_text().split(" ", 1)
    assert "rank 1: the job's key-value store did not answer 'get process' within 0.5 s" in said
    assert 1.0 <= float(waited_s) < 2
