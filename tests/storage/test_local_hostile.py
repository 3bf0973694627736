"""What others may have planted in a store never leads out of it and never hangs a reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardckpt.errors import StorageError
from shardckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "store")
    storage.prepare()
    return storage


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    place = tmp_path / "outside"
    place.mkdir()
    (place / "secret").write_bytes(b"secret")
    return place


def test_a_linked_directory_is_followed_by_nothing(store: LocalStorage, outside: Path) -> None:
    Path(store.url, "roots").symlink_to(outside)
    operations: tuple[Callable[[], object], ...] = (
        lambda: store.get("roots/secret", 99),
        lambda: store.open("roots/secret"),
        lambda: store.put_if_absent("roots/new", b"1"),
        lambda: store.create("roots/new", 1),
        lambda: store.list("roots"),
        lambda: store.sync("roots"),
        lambda: store.delete("roots/secret"),
        lambda: store.delete_tree("roots/secret"),
    )
    for operation in operations:
        with pytest.raises(StorageError, match=r"roots.*never followed"):
            operation()
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_a_linked_file_is_neither_read_nor_written(store: LocalStorage, outside: Path) -> None:
    link = Path(store.url, "link")
    link.symlink_to(outside / "secret")
    for operation in (lambda: store.get("link", 99), lambda: store.open("link")):
        with pytest.raises(StorageError, match=r"link.*never followed"):
            operation()
    assert store.put_if_absent("link", b"mine") is False
    with pytest.raises(StorageError, match="EEXIST"):
        store.create("link", 4)
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_dangling_link_is_not_filled(store: LocalStorage, outside: Path) -> None:
    Path(store.url, "link").symlink_to(outside / "absent")
    assert store.put_if_absent("link", b"mine") is False
    with pytest.raises(StorageError, match="EEXIST"):
        store.create("link", 4)
    assert not (outside / "absent").exists()


def test_deleting_removes_links_and_never_what_they_name(
    store: LocalStorage, outside: Path
) -> None:
    root = Path(store.url)
    (root / "step" / "sub").mkdir(parents=True)
    (root / "step" / "dir-link").symlink_to(outside)
    (root / "step" / "sub" / "file-link").symlink_to(outside / "secret")
    (root / "whole").symlink_to(outside)
    (root / "one").symlink_to(outside / "secret")
    store.delete_tree("step")
    store.delete_tree("whole")
    store.delete("one")
    assert store.list("") == []
    assert (outside / "secret").read_bytes() == b"secret"


def test_deleting_does_not_cross_a_mount_point(
    store: LocalStorage, outside: Path, mount: Callable[..., Path]
) -> None:
    mount("store/step/sub/mounted", "--bind", str(outside))
    with pytest.raises(StorageError, match=r"step.*EBUSY.*unmount") as caught:
        store.delete_tree("step")
    assert caught.value.errno == 16
    assert (outside / "secret").read_bytes() == b"secret"


def test_a_fifo_is_refused_at_once(store: LocalStorage) -> None:
    os.mkfifo(Path(store.url, "pipe"))
    for operation in (lambda: store.get("pipe", 99), lambda: store.open("pipe")):
        with pytest.raises(StorageError, match=r"pipe.*not a regular file"):
            operation()


def test_an_endless_device_is_refused(store: LocalStorage) -> None:
    Path(store.url, "zero").symlink_to("/dev/zero")
    with pytest.raises(StorageError, match="never followed"):
        store.get("zero", 99)
    try:
        os.mknod(Path(store.url, "node"), 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this user may not make devices")
    with pytest.raises(StorageError, match="not a regular file"):
        store.get("node", 99)


def test_another_users_file_is_not_read_through_a_hard_link(
    store: LocalStorage, outside: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(outside / "secret", 12345, -1)
    os.link(outside / "secret", Path(store.url, "mine"))
    with pytest.raises(StorageError, match=r"2 names and belongs to user 12345"):
        store.get("mine", 99)


def test_directories_nested_beyond_reason_are_an_error_and_no_crash(store: LocalStorage) -> None:
    Path(store.url, *["d"] * 40).mkdir(parents=True)
    with pytest.raises(StorageError, match="directories deep"):
        store.delete_tree("d")


def test_what_is_created_is_private(store: LocalStorage) -> None:
    store.put_if_absent("dir/a", b"1")
    store.create("dir/b", 1).commit(0)
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (Path(store.url, "dir"), *Path(store.url, "dir").iterdir())
    }
    assert modes == {"dir": 0o700, "a": 0o600, "b": 0o600}


def test_names_that_no_key_can_have_are_not_listed(store: LocalStorage) -> None:
    for name in (".tmp-1", "lost+found", "white space", "caf\u00e9", "ok"):
        Path(store.url, name).write_bytes(b"")
    assert store.list("") == ["ok"]
