"""Disks, processes and forks that go wrong while native threads write."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from shardckpt import native
from shardckpt.catalog.store import Catalog
from shardckpt.errors import DeadlineError, StorageError
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.verify import verify_checkpoint
from shardckpt.options import Staging
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import Fenced
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.testing.jobs import JobOptions, ThreadJob, raised

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shardckpt.checkpointer import CheckpointerCore

pytestmark = [
    pytest.mark.crash,
    pytest.mark.skipif(not native.IS_NATIVE, reason="the pure path has no threads"),
]
_WAIT_S = 20.0
_MIB = 1 << 20


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB; skips where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class _Without:
    """The system's calls, some of which the file system does not know; writes stay native."""

    def __init__(self, *, direct: bool = True, fallocate: bool = True) -> None:
        self._ops = PosixFileOps(flush=False)
        self._has_direct, self._has_fallocate = direct, fallocate

    def __getattr__(self, name: str) -> object:
        return getattr(self._ops, name)

    def open(self, name: str, flags: int, *, dir_fd: int | None, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT and not self._has_direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        return self._ops.open(name, flags, dir_fd=dir_fd, mode=mode)

    def fallocate(self, fd: int, nbytes: int) -> None:
        if not self._has_fallocate:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._ops.fallocate(fd, nbytes)


def _storage(place: Path, *, direct: bool = True, fallocate: bool = True) -> LocalStorage:
    return LocalStorage(place, ops=_Without(direct=direct, fallocate=fallocate))  # type: ignore[arg-type]


def _state(nbytes: int, rank: int = 0) -> dict[str, object]:
    """A state of which every rank writes about `nbytes`."""
    key = f"weight {rank}"
    return {key: Fenced(np.arange(nbytes // 8, dtype=np.int64)), f"bias {rank}": np.ones(5)}


def _free_slots(core: CheckpointerCore, _: int) -> bool:
    assert core._saver is not None
    num_slots, num_free, _written = core._saver._engine.stats()
    return num_slots == num_free


def _live_steps(place: Path) -> list[int]:
    """The committed steps, each verified to the last byte."""
    storage = LocalStorage(place)
    live = Catalog(storage, writer="test").newest().live
    for entry in live:
        checkpoint = OpenCheckpoint(storage, entry.attempt, entry.manifest)
        assert verify_checkpoint(checkpoint, payloads=True).problems == ()
        checkpoint.close()
    return [entry.step for entry in live]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("fallocate", [True, False])
def test_file_systems_that_lack_calls_hold_the_same_bytes(
    tmp_path: Path, direct: bool, fallocate: bool
) -> None:
    place = tmp_path / "store"
    job = ThreadJob([_storage(place, direct=direct, fallocate=fallocate)] * 2)
    handles = raised(job.each(lambda core, rank: core.save(1, _state(9 * _MIB, rank))))
    assert [handle.wait() for handle in handles] == [True] * 2
    assert job.close() == [None] * 2
    assert _live_steps(place) == [1]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("fallocate", [True, False])
def test_a_disk_that_fills_up_under_native_threads_fails_on_all_ranks_and_frees_the_slots(
    tmpfs: Path, direct: bool, fallocate: bool
) -> None:
    """Without fallocate a native write is the first to hear of it."""
    place = tmpfs / "store"
    job = ThreadJob([_storage(place, direct=direct, fallocate=fallocate)] * 2)
    raised(job.each(lambda core, rank: core.save(1, _state(_MIB, rank)).wait()))
    raised(job.each(lambda core, rank: core.save(2, _state(24 * _MIB, rank))))
    outcomes = job.each(lambda core, _: core.wait())
    assert [type(outcome) for outcome in outcomes] == [StorageError] * 2, outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert os.strerror(errno.ENOSPC) in str(outcomes[0])
    assert raised(job.each(_free_slots)) == [True] * 2
    saved = raised(job.each(lambda core, rank: core.save(3, _state(10 * _MIB, rank)).wait()))
    assert saved == [True] * 2
    assert job.close() == [None] * 2
    assert _live_steps(place) == [1, 3]


def test_a_disk_that_hangs_is_a_deadline_on_all_ranks_and_close_does_not_hang(
    tmp_path: Path,
) -> None:
    """The write is never joined; once the disk comes back the threads go on and nothing breaks."""
    place = tmp_path / "store"
    reached, gate = threading.Event(), threading.Event()

    def hang(call: Call) -> None:
        del call
        reached.set()
        gate.wait(_WAIT_S)

    # The first write of a shard is its header, by the saver itself.
    fault = Fault(hang, op="write_at", path="*/step-*2.*/rank-00001.0.shard", first=2)
    storages = [
        LocalStorage(place, ops=FaultyFileOps(*([fault] if rank == 1 else []))) for rank in range(2)
    ]
    job = ThreadJob(storages, JobOptions(timeout_s=2.0))
    raised(job.each(lambda core, rank: core.save(1, _state(9 * _MIB, rank)).wait()))
    started = time.monotonic()
    raised(job.each(lambda core, rank: core.save(2, _state(9 * _MIB, rank))))
    assert reached.wait(_WAIT_S)
    outcomes = job.each(lambda core, _: core.wait())
    assert [type(outcome) for outcome in outcomes] == [DeadlineError] * 2, outcomes
    assert job.close() == [None] * 2
    # Two deadlines one after the other, and the last waits for the write; far from the 20 s.
    assert time.monotonic() - started < 4 * 2.0
    gate.set()
    assert _live_steps(place) == [1]


_SCRIPT = """
import logging, os, signal, sys, time
import numpy as np
from shardckpt.coord.single import SingleCoord
from shardckpt.options import Staging
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import Fenced
from shardckpt.testing.jobs import JobOptions, open_job

logging.basicConfig()
core = open_job(LocalStorage(sys.argv[1]), SingleCoord(), JobOptions(timeout_s=float(sys.argv[2])))
engine = core._saver._engine
weight = np.arange(3 << 20)  # 24 MiB: three extents.
state = {"weight": Fenced(weight), "bias": np.ones(9)}
core.save(1, state).wait()
"""


def _run(
    script: str, place: Path, *, timeout_s: float = 20.0, kill_at: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a script on a store; SIGTERM it once it says `kill_at`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT + script, str(place), str(timeout_s)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        if kill_at:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == kill_at
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(script, process.returncode, out, err)


def test_an_interpreter_that_ends_without_close_finishes_its_save(tmp_path: Path) -> None:
    done = _run("engine.set_rate(64 << 20)\ncore.save(2, state)\nprint('end')", tmp_path / "s")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    assert _live_steps(tmp_path / "s") == [1, 2]


def test_an_interpreter_that_ends_after_an_error_finishes_its_save(tmp_path: Path) -> None:
    done = _run("core.save(2, state)\nraise SystemExit(7)", tmp_path / "s")
    assert (done.returncode, done.stderr) == (7, "")
    assert _live_steps(tmp_path / "s") == [1, 2]


def test_a_save_that_cannot_be_finished_at_exit_is_logged_and_the_process_ends(
    tmp_path: Path,
) -> None:
    """Its copies are held up for ever."""
    done = _run("engine.set_paused(True)\ncore.save(2, state)", tmp_path / "s", timeout_s=3.0)
    assert done.returncode == 0, done.stderr
    assert "step 2: not saved" in done.stderr
    assert "without close()" in done.stderr
    assert _live_steps(tmp_path / "s") == [1]


def test_a_term_signal_during_a_flush_leaves_the_step_before_and_the_next_job_sweeps(
    tmp_path: Path,
) -> None:
    place = tmp_path / "s"
    script = """
engine.set_rate(1000)
core.save(2, state)
written = engine.stats()[2]
while engine.stats()[2] == written:
    time.sleep(0.001)
print("writing", flush=True)
signal.pause()
"""
    done = _run(script, place, kill_at="writing")
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert len(list(place.glob("step-*2.*"))) == 1
    assert _live_steps(place) == [1]
    job = ThreadJob([LocalStorage(place)])
    assert raised(job.each(lambda core, _: core.save(3, _state(_MIB)).wait())) == [True]
    assert job.close() == [None]
    assert _live_steps(place) == [1, 3]
    assert len(list(place.glob("step-*"))) == 2


def test_a_forked_child_cannot_save_leaves_cleanly_and_its_parent_commits(tmp_path: Path) -> None:
    """As a data loader's workers do, while arrays are copied."""
    script = """
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)

def child():
    try:
        core.save(3, state)
    except RuntimeError as error:
        assert "fork" in str(error), error
    else:
        raise AssertionError("a child saved")
    core.fence()
    weight[:] = 0
    core.close()

engine.set_paused(True)
handle = core.save(2, state)
worker = multiprocessing.get_context("fork").Process(target=child)
worker.start()
worker.join(20)
assert worker.exitcode == 0, worker.exitcode
pid = os.fork()
if pid == 0:
    sys.exit(0)  # Runs what is registered for the exit.
assert os.waitpid(pid, 0)[1] == 0
engine.set_paused(False)
assert core.is_staging or handle.staged.done()
assert handle.wait()
# Forks at whatever moment of a save.
for step in range(4, 10):
    handle = core.save(step, state)
    pids = [os.fork() for _ in range(1)]
    if 0 in pids:
        core.fence()
        sys.exit(0)
    assert os.waitpid(pids[0], 0)[1] == 0
    core.fence()
    weight += 1
assert handle.wait()
core.close()
print("end")
"""
    done = _run(script, tmp_path / "s")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", ""), done.stderr
    assert _live_steps(tmp_path / "s")[-1] == 9


def test_closing_does_not_wait_for_the_pace_of_steps_that_no_longer_come(tmp_path: Path) -> None:
    """Writing that was slowed down for the training's sake goes at full speed once it ended."""
    job = ThreadJob([LocalStorage(tmp_path / "store")], JobOptions(staging=Staging()))

    def save(core: CheckpointerCore, _: int) -> None:
        assert core._saver is not None
        core._saver._engine.set_rate(1000)
        core.save(1, _state(24 * _MIB))
        core.close()

    raised(job.each(save))
    assert _live_steps(tmp_path / "store") == [1]
