"""SIGKILL at every file operation of a save: what was acknowledged is there, garbage goes.

The ranks are forked, so that their memory dies with them as a real job's does. A killed process
leaves the page cache behind, so a power cut is not tried here; the order of flushes that one relies
on is asserted in tests/storage/test_local_durability.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardckpt.catalog.store import Catalog
from shardckpt.coord.file import FileCoord
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import ShardckptError
from shardckpt.format.root import attempt_parts
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.verify import verify_checkpoint
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import Call, Fault, FaultyFileOps
from shardckpt.testing.jobs import (
    LOAD,
    JobOptions,
    ThreadJob,
    blank_state,
    open_job,
    state_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.checkpointer import CheckpointerCore
    from shardckpt.coord.base import Coord

pytestmark = pytest.mark.crash

_STEP = struct.Struct("<q")
# Retention drops a step and prune drops a root in the save that is killed.
_NUM_SAVES_BEFORE = 17


@dataclass(frozen=True)
class Death:
    """How a forked rank ended."""

    signal: int
    acknowledged: tuple[int, ...]
    error: str


def _storage(place: Path, *faults: Fault) -> tuple[LocalStorage, FaultyFileOps]:
    # A flush changes nothing that a SIGKILL could show, and costs most of a save's time.
    ops = FaultyFileOps(*faults, inner=PosixFileOps(flush=False))
    return LocalStorage(place, ops=ops), ops


def _fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Run `work(pipe)` in a forked process; return its pid and the pipe's reading end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Other tests of this process may have left idle threads; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        os.close(reading)
        work(writing)
        status = 0
    except BaseException:
        os.write(writing, _STEP.pack(-1) + traceback.format_exc().encode()[-8000:])
    finally:
        os._exit(status)


def _reap(pid: int, reading: int) -> Death:
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    steps: list[int] = []
    while said:
        (step,) = _STEP.unpack(said[: _STEP.size])
        said = said[_STEP.size :]
        if step < 0:
            return Death(
                os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, tuple(steps), said.decode()
            )
        steps.append(step)
    return Death(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, tuple(steps), "")


def _train(core: CheckpointerCore, coord: Coord, pipe: int) -> None:
    """Restore, then save the next step, and tell the parent that it was acknowledged."""
    state = blank_state(coord.rank, coord.world_size)
    found = core.restore(state, options=LOAD, fallback=False)
    step = 1 if found is None else found.step + 1
    if core.save(step, state_at(step, coord.rank, coord.world_size)).wait():
        os.write(pipe, _STEP.pack(step))
    core.close()


def _one_rank_job(place: Path, *faults: Fault) -> Callable[[int], None]:
    def work(pipe: int) -> None:
        coord = SingleCoord()
        _train(open_job(_storage(place, *faults)[0], coord, JobOptions()), coord, pipe)

    return work


def _what(call: Call) -> str:
    """Name an operation by what it does to which kind of file."""
    path = Path(call.target or call.path)
    kinds = {"roots": "root", "leases": "lease", "STORE": "STORE", "MANIFEST.json": "manifest"}
    if path.suffix == ".shard":
        kind = "shard"
    elif attempt_parts(path.name) is not None:
        kind = "attempt directory"
    elif path.name in ("roots", "leases"):
        kind = f"{path.name} directory"
    elif path.name in kinds:
        kind = kinds[path.name]
    elif path.parent.name in kinds:
        kind = kinds[path.parent.name]
    elif attempt_parts(path.parent.name) is not None:
        kind = "manifest temporary"
    else:
        kind = "store directory"
    return f"{call.op} {kind}"


_POINTS = frozenset({
    "before the first operation",
    "half-way through write_at shard", "half-way through write_at manifest temporary",
    "half-way through write_at root", "half-way through write_at lease",
    *(
        f"after {what}"
        for what in (
            "mkdir attempt directory", "open shard", "fallocate shard", "write_at shard",
            "fdatasync shard", "fsync_dir attempt directory", "fsync_dir store directory",
            "open manifest temporary", "write_at manifest temporary",
            "fdatasync manifest temporary", "link manifest", "unlink manifest temporary",
            "open root", "write_at root", "fdatasync root", "link root",
            "fsync_dir roots directory", "unlink root", "unlink shard", "unlink manifest",
            "rmdir attempt directory", "open lease", "link lease", "unlink lease",
        )
    ),
})  # fmt: skip
_CHANGING = frozenset({
    "mkdir", "link", "unlink", "rmdir", "write_at", "truncate", "fallocate", "fdatasync",
    "fsync_dir",
})  # fmt: skip


def _points_of(place: Path, job: Callable[..., Callable[[int], None]]) -> list[tuple[str, Fault]]:
    """Return a point of death for every state that a job's run leaves the disk in, named.

    What only reads is left out: a death after it leaves what a death before it leaves.
    """
    copy = place.with_name("recorded")
    shutil.copytree(place, copy)
    succeeded: set[int] = set()
    noted = Fault(lambda call: succeeded.add(call.number), times=None, when="after")
    storage, ops = _storage(copy, noted)
    with open(os.devnull, "wb") as pipe:
        coord = SingleCoord()
        _train(open_job(storage, coord, JobOptions()), coord, pipe.fileno())
    shutil.rmtree(copy)
    written = {call.path for call in ops.calls if call.op == "write_at"}
    seen: Counter[tuple[str, str]] = Counter()
    points: list[tuple[str, Fault]] = [("before the first operation", Fault("kill"))]
    for call in ops.calls:
        # Names differ from run to run, and two threads may change places, so a call is known by
        # its operation, the shape of its path, and how many like it came before.
        path = (call.target or call.path).replace(str(copy), str(place.with_name("killed")))
        path = re.sub("[0-9a-f]{16,}", "*", path)
        seen[call.op, path] += 1
        if call.number not in succeeded:
            continue
        first = seen[call.op, path]
        if call.op in _CHANGING or (call.op == "open" and call.path in written):
            fault = Fault("kill", op=call.op, path=path, first=first, when="after")
            points.append((f"after {_what(call)}", fault))
        if call.op == "write_at":
            fault = Fault("kill", op=call.op, path=path, first=first, when="half-way")
            points.append((f"half-way through {_what(call)}", fault))
    return points


def _check_store(place: Path, acknowledged: int) -> int | None:
    """Reopen a store whose job was killed; return the step that came back.

    Everything committed verifies, the newest step is bit for bit there and not older than what was
    acknowledged, and after the next save no garbage is left.
    """
    storage, _ = _storage(place)
    job = ThreadJob([storage])
    catalog = Catalog(storage, writer="test")
    for entry in catalog.newest().live:
        with_problems = OpenCheckpoint(storage, entry.attempt, entry.manifest)
        try:
            assert verify_checkpoint(with_problems, payloads=True).problems == ()
        finally:
            with_problems.close()
    step = job.restored_step()
    assert (step or 0) >= acknowledged, f"step {acknowledged} was acknowledged, {step} came back"
    following = (step or 0) + 1
    assert job.save(following) == [True]
    assert job.close() == [None]
    newest = catalog.newest()
    assert newest.latest is not None
    assert newest.latest.step == following
    attempts = {name for name in os.listdir(place) if attempt_parts(name) is not None}
    assert attempts == {entry.attempt for entry in newest.live}
    return step


@pytest.fixture(scope="module")
def old_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with several steps, and what an earlier killed job left behind."""
    place = tmp_path_factory.mktemp("crash") / "store"
    job = ThreadJob([_storage(place)[0]])
    for step in range(1, _NUM_SAVES_BEFORE + 1):
        assert job.save(step) == [True]
    assert job.close() == [None]
    pid, reading = _fork(_one_rank_job(place, Fault("kill", op="link", path="*/MANIFEST.json")))
    assert _reap(pid, reading).signal == signal.SIGKILL
    return place


@pytest.mark.timeout(300)
def test_a_save_killed_at_any_operation_loses_nothing_acknowledged(old_store: Path) -> None:
    """Opening, restore, a save, its retention and its sweep, killed after each change on disk."""
    points = _points_of(old_store, _one_rank_job)
    missing = _POINTS - {name for name, _ in points}
    assert not missing, sorted(missing)
    _kill_at_each(old_store, points, _NUM_SAVES_BEFORE)


def test_the_first_save_of_a_store_killed_at_any_operation_can_be_done_again(
    tmp_path: Path,
) -> None:
    """Making the store is no exception: whatever was made is taken up by the next job."""
    place = tmp_path / "store"
    place.mkdir()
    _kill_at_each(place, _points_of(place, _one_rank_job), 0)


def _kill_at_each(template: Path, points: list[tuple[str, Fault]], newest: int) -> None:
    came_back: set[int] = set()
    for name, fault in points:
        place = template.with_name("killed")
        shutil.copytree(template, place)
        death = _reap(*_fork(_one_rank_job(place, fault)))
        what = f"killed {name} (call {fault.first} of {fault.op} {fault.path})"
        assert (death.signal, death.error) == (signal.SIGKILL, ""), (what, death)
        acknowledged = max(death.acknowledged, default=newest)
        try:
            step = _check_store(place, acknowledged)
        except (AssertionError, ShardckptError) as error:
            raise AssertionError(f"{what}: {error}") from error
        came_back.add(step or 0)
        shutil.rmtree(place)
    assert came_back == {newest, newest + 1}


@dataclass(frozen=True)
class Scene:
    """Who dies at which operation of a job of three ranks.

    Attributes:
        victim: The rank whose operation it is.
        fault: The operation.
        all_die: Whether the whole job dies with the victim, as when a node goes.
        names: What the survivors' error must contain; "" where they learn that it committed.
    """

    name: str
    victim: int
    fault: Fault
    all_die: bool = False
    names: str = ""


_SHARD = "*/step-000000000003.*/rank-00002.0.shard"
_ABSENT = "rank 2 of 3"
_GONE = "coordinator"
_SCENES = (
    Scene("a rank restores", 2, Fault("kill", "read_at", "*/rank-0*.shard"), names=_ABSENT),
    Scene("a rank creates its shard", 2, Fault("kill", "open", _SHARD), names=_ABSENT),
    Scene("a rank is half-way in its shard", 2, Fault("kill", "write_at", _SHARD, when="half-way"),
          names=_ABSENT),
    Scene("a rank flushes its shard", 2, Fault("kill", "fdatasync", _SHARD), names=_ABSENT),
    Scene("the coordinator creates its shard", 0,
          Fault("kill", "open", "*/step-000000000003.*/rank-00000.0.shard"),
          names=_GONE),
    Scene("the coordinator writes the manifest", 0,
          Fault("kill", "link", "*/MANIFEST.json"), names=_GONE),
    Scene("the coordinator has written the manifest", 0,
          Fault("kill", "link", "*/MANIFEST.json", when="after"), names=_GONE),
    Scene("the coordinator links the root", 0, Fault("kill", "link", "*/roots/*", first=2),
          names=_GONE),
    # The root is there, so the survivors learn from the log that the step is committed.
    Scene("the coordinator has linked the root", 0,
          Fault("kill", "link", "*/roots/*", first=2, when="after")),
    Scene("all die in a shard", 1,
          Fault("kill", "write_at", "*/rank-00001.0.shard", when="half-way"), all_die=True),
    Scene("all die at the manifest", 0, Fault("kill", "link", "*/MANIFEST.json"), all_die=True),
    Scene("all die before the root's name", 0, Fault("kill", "link", "*/roots/*", first=2),
          all_die=True),
    Scene("all die after the root's name", 0,
          Fault("kill", "link", "*/roots/*", first=2, when="after"), all_die=True),
)  # fmt: skip


def _kill_job(call: Call) -> None:
    del call
    os.killpg(0, signal.SIGKILL)


def _rank_of_three(place: Path, rank: int, scene: Scene) -> Callable[[int], None]:
    faults: tuple[Fault, ...] = ()
    if rank == scene.victim:
        faults = (replace(scene.fault, action=_kill_job) if scene.all_die else scene.fault,)

    def work(pipe: int) -> None:
        keys = LocalStorage(place.with_name("keys"), ops=PosixFileOps(flush=False))
        keys.prepare()
        coord = FileCoord(keys, rank, 3, job="job")
        core = open_job(_storage(place, *faults)[0], coord, JobOptions(timeout_s=2.0))
        _train(core, coord, pipe)

    return work


def _fork_three(place: Path, scene: Scene) -> list[tuple[int, int]]:
    """Fork the ranks into a process group of their own."""
    leader = 0
    ranks: list[tuple[int, int]] = []
    for rank in range(3):
        work = _rank_of_three(place, rank, scene)
        group = leader

        def in_group(pipe: int, work: Callable[[int], None] = work, group: int = group) -> None:
            os.setpgid(0, group)
            work(pipe)

        pid, reading = _fork(in_group)
        leader = leader or pid
        # Both sides do it, so that it is done before either goes on. Never mind who was first.
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, leader)
        ranks.append((pid, reading))
    return ranks


@pytest.mark.multiproc
def test_three_ranks_lose_one_or_all_and_the_survivors_say_whom(tmp_path: Path) -> None:
    """Survivors raise a typed error in time or learn the truth from the log; nothing is lost."""
    template = tmp_path / "template"
    job = ThreadJob([_storage(template)[0] for _ in range(3)])
    assert job.save(1) == [True] * 3
    assert job.save(2) == [True] * 3
    assert job.close() == [None] * 3
    # All at once: they only wait for deadlines.
    running: list[tuple[Scene, Path, list[tuple[int, int]]]] = []
    for number, scene in enumerate(_SCENES):
        place = tmp_path / str(number) / "store"
        shutil.copytree(template, place)
        running.append((scene, place, _fork_three(place, scene)))
    for scene, place, ranks in running:
        deaths = [_reap(pid, reading) for pid, reading in ranks]
        for rank, death in enumerate(deaths):
            if rank == scene.victim or scene.all_die:
                assert (death.signal, death.error) == (signal.SIGKILL, ""), (scene.name, death)
            elif scene.names:
                assert scene.names in death.error, (scene.name, death)
                assert "DeadlineError" in death.error, (scene.name, death)
            else:
                assert (death.acknowledged, death.error) == ((3,), ""), (scene.name, death)
        acknowledged = max([2, *(step for death in deaths for step in death.acknowledged)])
        try:
            _check_store(place, acknowledged)
        except (AssertionError, ShardckptError) as error:
            raise AssertionError(f"{scene.name}: {error}") from error
