"""Every store keeps every promise of the seam."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import FaultyFileOps
from shardckpt.testing.storage_suite import StorageSuite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardckpt.storage.base import Storage


class _InDirectory(StorageSuite):
    def raw_set(self, storage: Storage, key: str, data: bytes) -> None:
        path = Path(storage.url) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_get(self, storage: Storage, key: str) -> bytes | None:
        path = Path(storage.url) / key
        return path.read_bytes() if path.is_file() else None


class TestLocalStorage(_InDirectory):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        storage = LocalStorage(tmp_path / "above" / "store")
        storage.prepare()
        return storage


class TestLocalStorageOnFaultyFileOps(_InDirectory):
    """Without a fault the recorder changes nothing, and no descriptor stays open."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[LocalStorage]:
        ops = FaultyFileOps(inner=PosixFileOps(flush=False))
        storage = LocalStorage(tmp_path / "store", ops=ops)
        storage.prepare()
        yield storage
        assert ops.open_paths() == []


class TestMemoryStorage(StorageSuite):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage()

    def raw_set(self, storage: Storage, key: str, data: bytes) -> None:
        assert isinstance(storage, MemoryStorage)
        storage._objects[key] = data

    def raw_get(self, storage: Storage, key: str) -> bytes | None:
        assert isinstance(storage, MemoryStorage)
        return storage._objects.get(key)
