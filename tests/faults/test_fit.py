"""A state that does not fit: every difference at once, and the ways to load it anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from shardckpt.errors import StateMismatchError, StepNotFoundError
from shardckpt.load.loader import LoadOptions
from shardckpt.state import PerRank
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.jobs import ThreadJob, blank_state, global_arrays, raised, state_at

if TYPE_CHECKING:
    from pathlib import Path

    from shardckpt.state import PerRankRule

pytestmark = pytest.mark.crash


def _job(place: Path, world_size: int) -> ThreadJob:
    return ThreadJob([LocalStorage(place, ops=PosixFileOps(flush=False))] * world_size)


@pytest.fixture
def job(tmp_path: Path) -> ThreadJob:
    """A job of one rank with step 1 saved."""
    job = _job(tmp_path / "store", 1)
    assert job.save(1) == [True]
    return job


def _load(job: ThreadJob, state: dict[str, object], options: LoadOptions | None = None) -> None:
    options = LoadOptions() if options is None else options
    raised(job.each(lambda core, _: core.restore(state, options=options, fallback=False)))


def test_a_mismatch_lists_every_key_with_the_nearest_name_and_changes_nothing(
    job: ThreadJob,
) -> None:
    """Missing, unexpected, another shape, another dtype: all in one error."""
    state = blank_state(0, 1)
    state["layer.wight"] = state.pop("layer.weight")
    state["layer.bias"] = np.full(71, -1, np.float32)
    state["scale"] = np.array(-1, np.float32)
    state["new"] = 5
    del state["progress"]
    kept = np.full(71, -1, np.float32)
    with pytest.raises(StateMismatchError) as caught:
        _load(job, state)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    assert "'layer.wight': not in the checkpoint (nearest is 'layer.weight')" in problems
    assert "'layer.weight': saved, but not in the state (nearest is 'layer.wight')" in problems
    assert "'layer.bias': saved as float32[70], target is float32[71]" in problems
    assert "'scale': saved as float64[], target is float32[]" in problems
    assert "'new': not in the checkpoint" in problems
    assert "'progress': saved, but not in the state" in problems
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    bias = state["layer.bias"]
    assert isinstance(bias, np.ndarray)
    assert (bias == kept).all()
    assert job.close() == [None]


def test_one_ranks_mismatch_is_every_ranks_error(tmp_path: Path) -> None:
    """The others change nothing either."""
    job = _job(tmp_path / "store", 3)
    assert job.save(1) == [True] * 3
    states = [blank_state(rank, 3) for rank in range(3)]
    states[1]["extra"] = np.zeros(3)
    outcomes = job.each(
        lambda core, rank: core.restore(states[rank], options=LoadOptions(), fallback=False)
    )
    assert [type(outcome) for outcome in outcomes] == [StateMismatchError] * 3
    assert all("'extra'" in str(outcome) for outcome in outcomes)
    for state in (states[0], states[2]):
        assert state["progress"] is None
        assert (state["layer.bias"] == -1).all()  # type: ignore[attr-defined]
    assert job.close() == [None] * 3


def test_rename_only_strict_and_cast_load_what_they_say(job: ThreadJob) -> None:
    """And nothing else."""
    saved = global_arrays(1)
    state: dict[str, object] = {"net.bias": np.zeros(70, np.float32), "scale": np.array(-1.0)}
    _load(job, state, LoadOptions(rename={"layer.*": "net.*"}, only=("net.*",), strict=False))
    assert (state["net.bias"] == saved["layer.bias"]).all()  # type: ignore[attr-defined]
    assert state["scale"] == -1
    state = {"layer.bias": np.zeros(70, np.float64), "other": np.array(7.0)}
    _load(job, state, LoadOptions(strict=False, cast=True))
    assert (state["layer.bias"] == saved["layer.bias"].astype(np.float64)).all()  # type: ignore[attr-defined]
    assert state["other"] == 7
    only: dict[str, object] = {"scale": np.array(-1.0)}
    _load(job, only, LoadOptions(only=("sca*",)))
    assert only["scale"] == saved["scale"]
    with pytest.raises(StateMismatchError, match="cast=True"):
        _load(job, {"layer.bias": np.zeros(70)}, LoadOptions(strict=False))
    assert job.close() == [None]


@pytest.mark.parametrize("rule", ["error", "rank0", "drop"])
def test_values_of_one_rank_follow_their_rule_on_another_world_size(
    tmp_path: Path, rule: PerRankRule, caplog: pytest.LogCaptureFixture
) -> None:
    """On the same world size every rank has its own back."""
    place = tmp_path / "store"
    job = _job(place, 2)
    raised(job.each(lambda core, rank: core.save(1, {"seed": PerRank(10 + rank, rule)}).wait()))
    states: list[dict[str, object]] = [{"seed": PerRank(-1, rule)} for _ in range(2)]
    raised(job.each(
        lambda core, rank: core.restore(states[rank], options=LoadOptions(), fallback=False)
    ))  # fmt: skip
    assert [state["seed"] for state in states] == [PerRank(10, rule), PerRank(11, rule)]
    assert job.close() == [None] * 2
    job = _job(place, 3)
    states = [{"seed": PerRank(-1, rule)} for _ in range(3)]
    outcomes = job.each(
        lambda core, rank: core.restore(states[rank], options=LoadOptions(), fallback=False)
    )
    values = [state["seed"].value for state in states]  # type: ignore[attr-defined]
    if rule == "error":
        assert [type(outcome) for outcome in outcomes] == [StateMismatchError] * 3
        assert all("'seed'" in str(o) and "rule" in str(o) for o in outcomes)
        assert values == [-1] * 3
    else:
        raised(outcomes)
        assert values == ([10] * 3 if rule == "rank0" else [-1] * 3)
        assert ("seed" in caplog.text) == (rule == "drop")
    assert job.close() == [None] * 3


def test_a_step_that_is_not_there_lists_those_that_are(job: ThreadJob) -> None:
    """And an empty store is no error: training starts anew."""
    with pytest.raises(StepNotFoundError, match=r"step 7 .*\[1\]"):
        job.restored_step(7)
    assert job.restored_step() == 1
    assert job.close() == [None]


def test_restore_gives_none_where_nothing_was_ever_committed(tmp_path: Path) -> None:
    """On all ranks, with the state untouched."""
    job = _job(tmp_path / "store", 2)
    assert job.restored_step() is None
    assert job.save(1) == [True] * 2
    assert job.close() == [None] * 2
    assert state_at(1, 0, 2)["progress"] == {"step": 1, "seen": (1, 2)}
