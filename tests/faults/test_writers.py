"""Several who work on one store, and ranks that do not do the same."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from shardckpt.catalog.store import Catalog
from shardckpt.checkpointer import load_once
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError, FencedError, SaveFailedError, StepNotFoundError
from shardckpt.load.loader import LoadOptions
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.verify import verify_checkpoint
from shardckpt.options import Retention
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import ArrayBackend
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.testing.jobs import JobOptions, ThreadJob, blank_state, raised, same_state, state_at

if TYPE_CHECKING:
    from pathlib import Path

    from shardckpt.checkpointer import CheckpointerCore
    from shardckpt.save.handle import SaveHandle

pytestmark = pytest.mark.crash
_WAIT_S = 20.0


def _storage(place: Path, *faults: Fault) -> LocalStorage:
    return LocalStorage(place, ops=FaultyFileOps(*faults, inner=PosixFileOps(flush=False)))


def _job(place: Path, world_size: int = 2, options: JobOptions | None = None) -> ThreadJob:
    return ThreadJob([_storage(place) for _ in range(world_size)], options)


def _assert_verifies(place: Path) -> None:
    storage = _storage(place)
    for entry in Catalog(storage, writer="test").newest().live:
        checkpoint = OpenCheckpoint(storage, entry.attempt, entry.manifest)
        assert verify_checkpoint(checkpoint, payloads=True).problems == ()
        checkpoint.close()


class _Gate:
    """A fault's action that waits inside an operation until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, call: Call) -> None:
        del call
        self.reached.set()
        assert self.open.wait(_WAIT_S)


def test_an_older_job_is_fenced_by_a_newer_one_and_told_by_whom(tmp_path: Path) -> None:
    """No bytes are mixed, and the older job stays fenced."""
    place = tmp_path / "store"
    older = _job(place)
    assert older.save(1) == [True] * 2
    newer = _job(place, 3)
    assert newer.restored_step() == 1
    for step in (2, 3):
        outcomes = older.save(step)
        assert [type(outcome) for outcome in outcomes] == [FencedError] * 2
        assert len({str(outcome) for outcome in outcomes}) == 1
        writer = Catalog(_storage(place), writer="test").newest().writer
        assert writer in str(outcomes[0])
        assert "epoch 2" in str(outcomes[0])
    assert newer.save(2) == [True] * 3
    assert newer.restored_step() == 2
    assert older.close() == [None] * 2
    assert newer.close() == [None] * 3
    _assert_verifies(place)


@pytest.mark.parametrize(
    ("op", "path", "first"),
    [
        ("write_at", "*/step-*2.*/rank-00000.0.shard", 1),
        ("link", "*/step-*2.*/MANIFEST.json", 1),
        ("open", "*/roots/.*", 4),
        ("link", "*/roots/*", 4),
    ],
)
def test_a_zombie_that_wakes_after_a_take_over_is_fenced(
    tmp_path: Path, op: str, path: str, first: int
) -> None:
    """Paused before its shard, its manifest, its root; what the newer job saved meanwhile stays."""
    place = tmp_path / "store"
    gate = _Gate()
    zombie = ThreadJob([_storage(place, Fault(gate, op=op, path=path, first=first))])
    assert zombie.save(1) == [True]
    handles: list[SaveHandle] = raised(zombie.each(lambda core, _: core.save(2, state_at(2, 0, 1))))
    assert gate.reached.wait(_WAIT_S)
    newer = _job(place, 1)
    assert newer.restored_step() == 1
    assert newer.save(7) == [True]
    gate.open.set()
    with pytest.raises(FencedError):
        handles[0].wait()
    assert newer.restored_step() == 7
    assert newer.save(8) == [True]
    assert [type(outcome) for outcome in zombie.close()] == [FencedError]
    assert newer.close() == [None]
    assert [e.step for e in Catalog(_storage(place), writer="test").newest().live] == [7, 8]
    _assert_verifies(place)


def test_an_operator_pins_and_drops_beside_a_running_job_that_goes_on(tmp_path: Path) -> None:
    """Maintenance fences nobody; a pinned step outlives retention, a dropped one goes."""
    place = tmp_path / "store"
    job = _job(place, options=JobOptions(retention=Retention(last=3)))
    for step in (1, 2, 3):
        assert job.save(step) == [True] * 2
    operator = Catalog(_storage(place), writer="operator")
    attempts = {entry.step: entry.attempt for entry in operator.newest().live}
    operator.pin(attempts[1], pinned=True)
    operator.drop([attempts[2]])
    for step in (4, 5, 6):
        assert job.save(step) == [True] * 2
    assert [entry.step for entry in operator.newest().live] == [1, 4, 5, 6]
    assert not (place / attempts[2]).exists()
    assert (place / attempts[1]).exists()
    assert job.close() == [None] * 2
    _assert_verifies(place)


def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path) -> None:
    """The first one stays until the second is committed, then goes."""
    place = tmp_path / "store"
    job = _job(place)
    for step in (1, 2, 3):
        assert job.save(step) == [True] * 2
    before = Catalog(_storage(place), writer="test").newest().latest
    assert before is not None
    assert job.save(3) == [True] * 2
    assert job.restored_step() == 3
    newest = Catalog(_storage(place), writer="test").newest()
    assert [entry.step for entry in newest.live] == [2, 3]
    assert newest.latest is not None
    assert newest.latest.attempt != before.attempt
    assert job.close() == [None] * 2
    assert not (place / before.attempt).exists()


def test_a_branch_from_an_older_step_abandons_what_followed_for_good(tmp_path: Path) -> None:
    """Abandoned steps are never the latest again, whatever their number."""
    place = tmp_path / "store"
    job = _job(place, options=JobOptions(retention=Retention(last=4)))
    for step in (10, 20, 30):
        assert job.save(step) == [True] * 2
    assert job.close() == [None] * 2
    job = _job(place, options=JobOptions(retention=Retention(last=4)))
    assert job.restored_step(10) == 10
    # Nothing is abandoned by a mere restore.
    assert raised(job.each(lambda core, _: core.latest())) == [30] * 2
    assert job.save(11) == [True] * 2
    assert raised(job.each(lambda core, _: core.steps())) == [[10, 11]] * 2
    assert job.close() == [None] * 2
    job = _job(place, options=JobOptions(retention=Retention(last=4)))
    assert job.restored_step() == 11
    assert job.restored_step(30) == 30
    assert job.close() == [None] * 2


def test_load_takes_no_epoch_and_disturbs_no_job(tmp_path: Path) -> None:
    """A reader beside a job: the job's next save commits, and the reader has whole values."""
    place = tmp_path / "store"
    job = _job(place)
    assert job.save(1) == [True] * 2
    epoch = Catalog(_storage(place), writer="test").newest().epoch
    state = blank_state(0, 1)
    load_once(
        _storage(place), ArrayBackend(), SingleCoord(), state, step=None, options=LoadOptions(),
        timeout_s=10, namespace="reader", environment={},
    )  # fmt: skip
    assert same_state(state, state_at(1, 0, 1))
    assert job.save(2) == [True] * 2
    assert Catalog(_storage(place), writer="test").newest().epoch == epoch
    assert job.close() == [None] * 2
    with pytest.raises(StepNotFoundError, match=r"step 9 .*\[1, 2\]"):
        load_once(
            _storage(place), ArrayBackend(), SingleCoord(), state, step=9, options=LoadOptions(),
            timeout_s=10, namespace="again", environment={},
        )  # fmt: skip


def test_a_reader_keeps_its_step_while_retention_wants_it(tmp_path: Path) -> None:
    """A step that a slow reader holds goes only after it has been read."""
    place = tmp_path / "store"
    job = _job(place, 1)
    assert job.save(1) == [True]
    gate = _Gate()
    slow = _storage(place, Fault(gate, op="read_at", path="*.shard"))
    state = blank_state(0, 1)
    reader = threading.Thread(
        target=load_once,
        args=(slow, ArrayBackend(), SingleCoord(), state),
        kwargs={
            "step": 1, "options": LoadOptions(), "timeout_s": 10, "namespace": "reader",
            "environment": {},
        },
    )  # fmt: skip
    reader.start()
    assert gate.reached.wait(_WAIT_S)
    for step in (2, 3, 4):
        assert job.save(step) == [True]
    assert len(list(place.glob("step-000000000001.*"))) == 1
    gate.open.set()
    reader.join()
    assert same_state(state, state_at(1, 0, 1))
    assert job.save(5) == [True]
    assert job.close() == [None]
    assert list(place.glob("step-000000000001.*")) == []


def test_a_save_that_only_some_ranks_call_names_the_absent_ones(tmp_path: Path) -> None:
    """The commonest mistake is `if rank == 0`."""
    job = _job(tmp_path / "store", 4, JobOptions(timeout_s=0.5))
    assert job.save(1) == [True] * 4

    def save(core: CheckpointerCore, rank: int) -> bool:
        return rank in (1, 3) or core.save(2, state_at(2, rank, 4)).wait()

    outcomes = job.each(save)
    assert outcomes[1] is outcomes[3] is True
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome, (DeadlineError, SaveFailedError))
        assert "rank 1, 3 of 4" in str(outcome)
        assert "if rank == 0" in str(outcome)
    assert Catalog(_storage(tmp_path / "store"), writer="test").newest().latest.step == 1  # type: ignore[union-attr]


def test_ranks_that_save_different_steps_are_told_so(tmp_path: Path) -> None:
    """Nothing is committed, and all ranks raise."""
    job = _job(tmp_path / "store", 3)
    assert job.save(1) == [True] * 3
    outcomes = job.each(
        lambda core, rank: core.save(3 if rank == 2 else 2, state_at(2, rank, 3)).wait()
    )
    assert [type(outcome) for outcome in outcomes] == [SaveFailedError] * 3
    assert all("step 2" in str(o) and "3" in str(o) for o in outcomes)
    assert [type(o) for o in job.each(lambda core, _: core.wait())] == [SaveFailedError] * 3
    assert job.save(4) == [True] * 3
    assert job.restored_step() == 4
    assert job.close() == [None] * 3


def test_skip_on_busy_skips_on_all_ranks_or_none(tmp_path: Path) -> None:
    """The coordinator alone decides, though a rank may see its own save done earlier."""
    gate = _Gate()
    faulty = _storage(tmp_path / "store", Fault(gate, op="link", path="*/MANIFEST.json"))
    storages = [faulty, *(_storage(tmp_path / "store") for _ in range(2))]
    job = ThreadJob(storages, JobOptions(on_busy="skip"))
    first = raised(job.each(lambda core, rank: core.save(1, state_at(1, rank, 3))))
    assert gate.reached.wait(_WAIT_S)
    # There is room for two at once.
    second = raised(job.each(lambda core, rank: core.save(2, state_at(2, rank, 3))))
    skipped = raised(job.each(lambda core, rank: core.save(3, state_at(3, rank, 3)).wait()))
    assert skipped == [False] * 3
    gate.open.set()
    assert [handle.wait() for handle in (*first, *second)] == [True] * 6
    assert job.save(3) == [True] * 3
    assert job.restored_step() == 3
    assert job.close() == [None] * 3


def test_a_sweep_spares_the_save_that_other_ranks_are_already_writing(tmp_path: Path) -> None:
    """Rank 1 is ahead: its file of step 2 is there while rank 0 still sweeps after step 1."""
    place = tmp_path / "store"
    gate, written = _Gate(), threading.Event()
    sweep = Fault(gate, op="names", path=str(place))
    ahead = Fault(lambda _: written.set(), op="fsync_dir", path="*/step-*2.*", when="after")
    job = ThreadJob([_storage(place, sweep), _storage(place, ahead)])
    assert job.save(1) == [True] * 2
    assert gate.reached.wait(_WAIT_S)
    # A new structure is planned at once, not after the sweep.
    handles = raised(
        job.each(lambda core, rank: core.save(2, state_at(2, rank, 2) | {"new": np.ones(3)}))
    )
    assert written.wait(_WAIT_S)
    gate.open.set()
    assert [handle.wait() for handle in handles] == [True] * 2
    assert job.close() == [None] * 2
    assert [e.step for e in Catalog(_storage(place), writer="test").newest().live] == [1, 2]
    _assert_verifies(place)


def test_a_step_dropped_while_it_is_restored_leaves_its_ancestors_on_the_branch(
    tmp_path: Path,
) -> None:
    """The next save descends from what came before the dropped step, and abandons nothing."""
    place = tmp_path / "store"
    job = _job(place, options=JobOptions(retention=Retention(last=5)))
    for step in (1, 2, 3):
        assert job.save(step) == [True] * 2
    assert job.close() == [None] * 2
    job = _job(place, options=JobOptions(retention=Retention(last=5)))
    assert job.restored_step() == 3
    operator = Catalog(_storage(place), writer="operator")
    latest = operator.newest().latest
    assert latest is not None
    operator.drop([latest.attempt])
    assert job.save(4) == [True] * 2
    assert [entry.step for entry in operator.newest().current] == [1, 2, 4]
    assert job.close() == [None] * 2
