"""Damaged stores: found, named by file, key and rank, and never taken for good."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from shardckpt.catalog.store import Catalog
from shardckpt.errors import CorruptCheckpointError, PoisonedStateError
from shardckpt.load.loader import LoadOptions
from shardckpt.load.open import OpenCheckpoint
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.jobs import ThreadJob, blank_state, raised, same_state, state_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardckpt.checkpointer import CheckpointerCore, Restored

pytestmark = pytest.mark.crash

_SHARD = "rank-00001.0.shard"


@dataclass(frozen=True)
class Spot:
    """Where the parts of the newest step's second shard file lie.

    Attributes:
        shard: The file.
        payload: A byte of an array in it, and which key it belongs to.
        table: First byte of its table.
        nbytes: Its size.
    """

    shard: Path
    payload: tuple[int, str]
    table: int
    nbytes: int


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.chmod(0o600)
    path.write_bytes(data)


def _swap(spot: Spot) -> None:
    other = spot.shard.with_name("rank-00000.0.shard")
    # The same size, so that only the header can tell.
    data = bytearray(other.read_bytes()[: spot.nbytes].ljust(spot.nbytes, b"\0"))
    spot.shard.write_bytes(data)


def _older(spot: Spot) -> None:
    (older,) = spot.shard.parent.parent.glob(f"step-000000000001.*/{_SHARD}")
    shutil.copy(older, spot.shard)


# What is done to the file, and whether it is found before the first byte of the state changes.
_DAMAGES: dict[str, tuple[Callable[[Spot], object], bool]] = {
    "truncated": (lambda s: os.truncate(s.shard, s.nbytes - 1), True),
    "cut to nothing": (lambda s: os.truncate(s.shard, 0), True),
    "extended": (lambda s: os.truncate(s.shard, s.nbytes + 4096), True),
    "missing": (lambda s: s.shard.unlink(), True),
    "swapped with another rank's": (_swap, True),
    "replaced by an older step's": (_older, True),
    "magic flipped": (lambda s: _flip(s.shard, 0), True),
    "header flipped": (lambda s: _flip(s.shard, 12), True),
    "end of header flipped": (lambda s: _flip(s.shard, 4095), True),
    "payload flipped": (lambda s: _flip(s.shard, s.payload[0]), False),
    "table flipped": (lambda s: _flip(s.shard, s.table + 40), True),
    "trailer flipped": (lambda s: _flip(s.shard, s.nbytes - 40), True),
    "last byte flipped": (lambda s: _flip(s.shard, s.nbytes - 1), True),
}


def _storage(place: Path) -> LocalStorage:
    return LocalStorage(place, ops=PosixFileOps(flush=False))


@pytest.fixture
def spot(tmp_path: Path) -> Spot:
    """A store of two ranks with steps 1 and 2."""
    storage = _storage(tmp_path / "store")
    job = ThreadJob([storage] * 2)
    assert job.save(1) == [True] * 2
    assert job.save(2) == [True] * 2
    assert job.close() == [None] * 2
    latest = Catalog(storage, writer="test").newest().latest
    assert latest is not None
    checkpoint = OpenCheckpoint(storage, latest.attempt, latest.manifest)
    (file,) = checkpoint.files_of(1)
    payload = max(file.payloads, key=lambda payload: payload.nbytes)
    (record,) = checkpoint.records[1]
    checkpoint.close()
    return Spot(
        tmp_path / "store" / latest.attempt / _SHARD,
        (payload.offset + payload.nbytes // 2, payload.key),
        record.table_offset,
        record.nbytes,
    )


def _job(spot: Spot) -> ThreadJob:
    return ThreadJob([_storage(spot.shard.parent.parent)] * 2)


def _restore(
    job: ThreadJob, options: LoadOptions, *, fallback: bool = False
) -> list[tuple[dict[str, object], Restored | BaseException | None]]:
    """Return each rank's state after a restore, and what the restore gave."""

    def restore(
        core: CheckpointerCore, rank: int
    ) -> tuple[dict[str, object], Restored | BaseException | None]:
        state = blank_state(rank, 2)
        try:
            return state, core.restore(state, options=options, fallback=fallback)
        except CorruptCheckpointError as error:
            return state, error

    return raised(job.each(restore))


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("transactional", [False, True])
def test_damage_raises_on_all_ranks_names_the_file_and_changes_nothing_unsaid(
    spot: Spot, damage: str, transactional: bool
) -> None:
    """Found before reading: nothing changed. Found while reading: the state may not be saved."""
    harm, is_found_early = _DAMAGES[damage]
    harm(spot)
    job = _job(spot)
    for rank, (state, error) in enumerate(_restore(job, LoadOptions(transactional=transactional))):
        assert isinstance(error, CorruptCheckpointError), damage
        assert _SHARD in str(error)
        assert "restore(step=1)" in str(error)
        if not is_found_early:
            assert repr(spot.payload[1]) in str(error)
            assert "saved by rank 1" in str(error)
        if is_found_early or transactional:
            assert same_state(state, blank_state(rank, 2))
    outcomes = job.save(3)
    if is_found_early or transactional:
        assert outcomes == [True] * 2
    else:
        assert [type(outcome) for outcome in outcomes] == [PoisonedStateError] * 2
        assert job.restored_step(1) == 1
        assert job.save(3) == [True] * 2
    assert job.close() == [None] * 2


@pytest.mark.parametrize("damage", _DAMAGES)
def test_fallback_takes_the_step_before_and_the_job_goes_on_from_it(
    spot: Spot, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Loudly: a warning says what was wrong with the newest."""
    _DAMAGES[damage][0](spot)
    job = _job(spot)
    for rank, (state, restored) in enumerate(_restore(job, LoadOptions(), fallback=True)):
        assert restored is not None
        assert not isinstance(restored, BaseException)
        assert restored.step == 1
        assert same_state(state, state_at(1, rank, 2))
    assert _SHARD in caplog.text
    assert job.save(2) == [True] * 2
    assert job.restored_step() == 2
    assert job.close() == [None] * 2


def test_a_flip_anywhere_in_the_manifest_is_found(spot: Spot) -> None:
    """The commit log holds its digest, so no byte of it is free."""
    manifest = spot.shard.with_name("MANIFEST.json")
    good = manifest.read_bytes()
    job = _job(spot)
    for offset in range(0, len(good), max(1, len(good) // 40)):
        _flip(manifest, offset)
        for _, error in _restore(job, LoadOptions()):
            assert isinstance(error, CorruptCheckpointError)
            assert "MANIFEST.json" in str(error)
            assert "restore(step=1)" in str(error)
        manifest.write_bytes(good)
    assert job.restored_step() == 2
    manifest.unlink()
    for _, error in _restore(job, LoadOptions()):
        assert isinstance(error, CorruptCheckpointError)
        assert "is missing" in str(error)
    assert job.close() == [None] * 2


def test_a_flipped_newest_root_never_brings_back_half_of_what_it_said(spot: Spot) -> None:
    """A torn root is passed over for the one before it, whole, and its number is not used again."""
    roots = spot.shard.parent.parent / "roots"
    names = sorted(os.listdir(roots))
    _flip(roots / names[-1], 100)
    job = _job(spot)
    # The newest root was that of step 2's commit: without it the log ends at step 1.
    assert job.restored_step() == 1
    assert job.save(2) == [True] * 2
    assert job.restored_step() == 2
    assert job.close() == [None] * 2
    assert (roots / names[-1]).exists()
    assert sorted(os.listdir(roots))[: len(names)] == names


def test_a_log_without_one_valid_root_says_so_instead_of_starting_anew(spot: Spot) -> None:
    """An unreadable store is never taken for an empty one."""
    for root in (spot.shard.parent.parent / "roots").iterdir():
        _flip(root, 50)
    with pytest.raises(CorruptCheckpointError, match="roots"):
        _job(spot)
    assert spot.shard.exists()
