"""Arrays that some of their replicas write: saved by threads, loaded by others, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from shardckpt.catalog.store import Catalog
from shardckpt.format.root import SOME_WRITERS
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.verify import verify_checkpoint
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.arrays import shard_of
from shardckpt.testing.coords import MemoryCoordHub
from shardckpt.testing.jobs import LOAD, JobOptions, open_job, raised, run_threads, same_state

if TYPE_CHECKING:
    from shardckpt.storage.base import Storage

RANKS = 6


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"three": 3, "two": 2, "all": 7, "one": 1}
    whole = {name: rng.integers(0, 255, mib << 20, np.uint8) for name, mib in sizes.items()}
    # 1.9 to 2.9 MiB on each half of the ranks: cut by one axis, three replicas along the other.
    return whole | {f"cut{i}": rng.standard_normal((7 + i, 70_000)) for i in range(3)}


def layout_of(key: str, world_size: int) -> MeshLayout | None:
    if not key.startswith("cut"):
        return None
    return MeshLayout((world_size // 2, 2), tuple(range(world_size)), ((1,),))


def state_of(values: dict[str, np.ndarray], rank: int, world_size: int) -> dict[str, object]:
    return {
        key: value if (layout := layout_of(key, world_size)) is None
        else shard_of(value, layout, rank)
        for key, value in values.items()
    }  # fmt: skip


def opened(storage: Storage) -> OpenCheckpoint:
    entry = Catalog(storage, writer="test").newest().latest
    assert entry is not None
    return OpenCheckpoint(storage, entry.attempt, entry.manifest)


@pytest.mark.parametrize("load_ranks", [2, 6, 8])
def test_what_some_replicas_wrote_any_world_loads(load_ranks: int) -> None:
    storage = MemoryStorage()
    hub = MemoryCoordHub(RANKS)

    def save(rank: int) -> None:
        core = open_job(storage, hub.coord(rank), JobOptions())
        core.save(1, state_of(arrays(), rank, RANKS)).wait()
        core.close()

    raised(run_threads(RANKS, save))
    checkpoint = opened(storage)
    assert SOME_WRITERS in checkpoint.manifest.features
    writers = {key: (t.owner, t.writers) for key, t in checkpoint.tensors.items()}
    assert {count for _, count in writers.values()} == {1, 2, 3}
    assert writers["all"] == (-1, 1)
    verified = verify_checkpoint(checkpoint, payloads=True)
    assert verified.problems == ()
    assert sum(value.nbytes for value in arrays().values()) <= verified.nbytes
    checkpoint.close()
    others = MemoryCoordHub(load_ranks)

    def load(rank: int) -> None:
        core = open_job(storage, others.coord(rank), JobOptions())
        blank = state_of({k: np.zeros_like(v) for k, v in arrays().items()}, rank, load_ranks)
        restored = core.restore(blank, step=1, options=LOAD, fallback=False)
        core.close()
        assert restored is not None
        wanted = state_of(arrays(), rank, load_ranks)
        assert same_state(blank, wanted)

    raised(run_threads(load_ranks, load))
