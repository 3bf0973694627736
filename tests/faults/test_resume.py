"""What a resumed job is told: differences, unrestored steps, damaged roots, failures."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from shardckpt.catalog.store import Catalog
from shardckpt.checkpointer import CheckpointerCore, load_once
from shardckpt.errors import CorruptCheckpointError, ShardckptError
from shardckpt.load.loader import LoadOptions
from shardckpt.options import Retention, Staging
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import ArrayBackend
from shardckpt.testing.coords import MemoryCoordHub
from shardckpt.testing.faults import Fault, FaultyFileOps

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TIMEOUT_S = 10.0


def core(place: Path, config: Any = None, **environment: str) -> CheckpointerCore:
    return CheckpointerCore(
        LocalStorage(place), ArrayBackend(), MemoryCoordHub(1).coord(0), save_every=None,
        retention=Retention(), config=config, timeout_s=TIMEOUT_S, on_busy="wait",
        staging=Staging(),
        environment=environment, namespace="job",
    )  # fmt: skip


def test_differences_of_configuration_and_environment_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = core(tmp_path, {"lr": 0.1, "width": 8}, torch="2.13.0", world_size="1")
    first.save(1, {"x": 1}).wait()
    first.close()
    second = core(tmp_path, {"lr": 0.2, "width": 8}, torch="2.14.0", world_size="1")
    with caplog.at_level("INFO", "shardckpt"):
        restored = second.restore({"x": 0}, options=LoadOptions(), fallback=False)
    second.close()
    assert restored is not None
    assert restored.config == {"lr": 0.1, "width": 8}
    assert set(restored.differences) == {"torch: 2.13.0 -> 2.14.0", "config lr: 0.1 -> 0.2"}
    assert "torch: 2.13.0 -> 2.14.0" in caplog.text


def test_saving_into_a_store_without_restoring_warns_of_the_branch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = core(tmp_path)
    first.save(1, {"x": 1}).wait()
    first.close()
    assert "new branch" not in caplog.text
    second = core(tmp_path)
    second.save(2, {"x": 2}).wait()
    second.close()
    assert "holds steps [1], and none was restored" in caplog.text


def test_what_a_damaged_root_committed_is_not_swept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of the root brings the step back; without one, older steps go on."""
    first = core(tmp_path)
    for step in (1, 2, 3):
        first.save(step, {"x": step}).wait()
    first.close()
    newest = sorted((tmp_path / "roots").iterdir())[-1]
    good = newest.read_bytes()
    lost = Catalog(LocalStorage(tmp_path), writer="test").newest().latest
    assert lost is not None
    newest.write_bytes(good[:100] + b"\0" + good[101:])
    second = core(tmp_path)
    restored = second.restore({"x": 0}, options=LoadOptions(), fallback=False)
    assert restored is not None
    assert restored.step == 2
    second.save(4, {"x": 4}).wait()
    second.close()
    assert (tmp_path / lost.attempt / "MANIFEST.json").exists()
    assert f"{newest.name} are damaged" in caplog.text
    newest.write_bytes(good)
    third = core(tmp_path)
    third.restore({"x": 0}, options=LoadOptions(), fallback=False)
    third.save(5, {"x": 5}).wait()
    third.close()
    assert not (tmp_path / lost.attempt).exists(), "garbage stays once nothing is damaged"


def test_a_rank_that_cannot_open_the_checkpoint_fails_the_load_of_all(tmp_path: Path) -> None:
    first = core(tmp_path)
    first.save(1, {"x": 1}).wait()
    first.close()
    hub = MemoryCoordHub(2)
    broken = FaultyFileOps(Fault(5, op="read_at", path="*MANIFEST.json"))
    found: dict[int, BaseException] = {}

    def load(rank: int) -> None:
        storage = LocalStorage(tmp_path, ops=broken) if rank == 1 else LocalStorage(tmp_path)
        try:
            load_once(
                storage, ArrayBackend(), hub.coord(rank), {"x": 0}, step=None,
                options=LoadOptions(), timeout_s=TIMEOUT_S, namespace="load", environment={},
            )  # fmt: skip
        except ShardckptError as error:
            found[rank] = error

    threads = [threading.Thread(target=load, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S / 2)
    assert found.keys() == {0, 1}, "a rank still waits"
    assert "MANIFEST.json" in str(found[1])
    assert "rank 1" in str(found[0])
    assert not isinstance(found[0], CorruptCheckpointError)
