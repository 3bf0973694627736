"""Places that are no good for a store are refused in words that say what to do."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardckpt.errors import StorageError
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import Fault, FaultyFileOps
from shardckpt.testing.ranks import RankContext, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

_MIB = 1 << 20


@pytest.mark.parametrize("below", ["", "/below", "/far/below"])
def test_a_file_in_place_of_the_store_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"file.*name a directory"):
        LocalStorage(f"{tmp_path}/file{below}").prepare()
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_store_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage = LocalStorage(tmp_path / "link")
    storage.prepare()
    storage.put_if_absent("a", b"1")
    assert (tmp_path / "real" / "a").read_bytes() == b"1"


def test_a_store_whose_link_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(StorageError, match="link"):
        LocalStorage(tmp_path / "link").prepare()


def test_a_relative_path_stays_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("store")
    monkeypatch.chdir("/")
    storage.prepare()
    assert (tmp_path / "store").is_dir()


def test_an_absent_store_reads_as_empty_and_takes_no_objects(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "absent")
    assert storage.list("") == []
    with pytest.raises(FileNotFoundError):
        storage.get("a", 9)
    with pytest.raises(StorageError, match=r"absent.*missing or was removed"):
        storage.put_if_absent("a", b"1")
    assert not (tmp_path / "absent").exists()


def test_a_read_only_store_is_refused_and_can_be_read(
    tmp_path: Path, mount: Callable[..., Path]
) -> None:
    place = mount("ro", "-t", "tmpfs", "-o", "size=1m", "none")
    storage = LocalStorage(place / "store")
    storage.prepare()
    storage.put_if_absent("a", b"1")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    operations: tuple[Callable[[], object], ...] = (
        storage.prepare,
        LocalStorage(place / "another").prepare,
        lambda: storage.put_if_absent("b", b"1"),
        lambda: storage.create("b", 1),
        lambda: storage.delete("a"),
        lambda: storage.delete_tree("a"),
    )
    for operation in operations:
        with pytest.raises(StorageError, match=r"ro/.*mounted read-only; remount it") as caught:
            operation()
        assert caught.value.errno == errno.EROFS
    assert storage.get("a", 9) == b"1"


def test_a_full_disk_shows_at_creation_and_gives_its_space_back(
    mount: Callable[..., Path],
) -> None:
    storage = LocalStorage(mount("full", "-t", "tmpfs", "-o", "size=1m", "none"))
    storage.prepare()
    free = os.statvfs(storage.url).f_bfree
    for start in (
        lambda: storage.create("big", 2 * _MIB),
        lambda: storage.put_if_absent("big", bytes(2 * _MIB)),
    ):
        with pytest.raises(StorageError, match=r"big.*Free space") as caught:
            start()
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(storage.url) == []
        assert os.statvfs(storage.url).f_bfree == free
    assert storage.put_if_absent("small", b"1")


def test_a_disk_that_fills_while_writing_gives_its_space_back(mount: Callable[..., Path]) -> None:
    storage = LocalStorage(
        mount("full", "-t", "tmpfs", "-o", "size=1m", "none"),
        ops=FaultyFileOps(Fault(errno.EOPNOTSUPP, "fallocate", times=None)),
    )
    storage.prepare()
    buffer = ctypes.create_string_buffer(2 * _MIB)
    writer = storage.create("big", 2 * _MIB)
    with pytest.raises(StorageError, match=r"big.*Free space") as caught:
        writer.write(0, ctypes.addressof(buffer), 2 * _MIB)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError, match="earlier operation"):
        writer.commit(2 * _MIB)
    writer.abort()
    assert os.listdir(storage.url) == []
    assert storage.put_if_absent("small", bytes(512 * 1024))


_NUM_ROUNDS = 100


def _race(told: RankContext, root: str) -> list[int]:
    storage = LocalStorage(root)
    storage.prepare()
    won = []
    for turn in range(_NUM_ROUNDS):
        if storage.put_if_absent(f"roots/{turn}", str(told.rank).encode()):
            won.append(turn)
        else:
            # Until the winner's answer is known nobody moves on, so that all meet at every number.
            assert storage.get(f"roots/{turn}", 9)
    return won


@pytest.mark.multiproc
def test_of_racing_processes_exactly_one_wins_every_round(tmp_path: Path) -> None:
    """Four processes, a hundred numbers."""
    results = run_ranks(4, _race, str(tmp_path / "store"), timeout_s=50)
    storage = LocalStorage(tmp_path / "store")
    assert sorted(turn for won in results for turn in won) == list(range(_NUM_ROUNDS))
    for rank, won in enumerate(results):
        for turn in won:
            assert storage.get(f"roots/{turn}", 9) == str(rank).encode()
    assert len(os.listdir(Path(storage.url, "roots"))) == _NUM_ROUNDS
