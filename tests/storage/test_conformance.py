"""Every store keeps every promise of the seam."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import FaultyFileOps
from shardckpt.testing.storage_suite import StorageSuite


class _InDirectory(StorageSuite):
    def raw_set(self, storage: LocalStorage, key: str, data: bytes) -> None:
        path = Path(storage.url) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_get(self, storage: LocalStorage, key: str) -> bytes | None:
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
    def storage(self, tmp_path: Path):
        ops = FaultyFileOps(inner=PosixFileOps(flush=False))
        storage = LocalStorage(tmp_path / "store", ops=ops)
        storage.prepare()
        yield storage
        assert ops.open_paths() == []


class TestMemoryStorage(StorageSuite):
    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return MemoryStorage()

    def raw_set(self, storage: MemoryStorage, key: str, data: bytes) -> None:
        storage._objects[key] = data

    def raw_get(self, storage: MemoryStorage, key: str) -> bytes | None:
        return storage._objects.get(key)
