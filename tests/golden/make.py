"""Makes the golden store of this version: `python tests/golden/make.py DIRECTORY`."""

from __future__ import annotations

import sys
import threading
from typing import Any
from unittest import mock

import numpy as np

from shardckpt.checkpointer import CheckpointerCore
from shardckpt.geometry.layout import MeshLayout
from shardckpt.options import Retention, Staging
from shardckpt.state import PerRank
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import ArrayBackend, shard_of
from shardckpt.testing.coords import MemoryCoordHub

WORLD = 2
ROWS = MeshLayout((WORLD,), (0, 1), ((0,),))


def values() -> dict[str, np.ndarray]:
    return {
        "rows": np.arange(35, dtype=np.float32).reshape(7, 5),
        "copies": np.arange(9, dtype=np.int16),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.uint8),
    }


def state(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = dict(values())
    found["rows"] = shard_of(found["rows"], ROWS, rank)
    found["progress"] = {"offset": 12, "betas": (0.9, float("inf"))}
    found["own"] = PerRank({"rank": rank}, "rank0")
    return found


def make(directory: str) -> None:
    hub = MemoryCoordHub(WORLD)

    def run(rank: int) -> None:
        core = CheckpointerCore(
            LocalStorage(directory), ArrayBackend(), hub.coord(rank), save_every=None,
            retention=Retention(), config={"width": 5}, timeout_s=30, on_busy="wait",
            staging=Staging(),
            environment={"made_by": "golden"}, namespace="golden",
        )  # fmt: skip
        core.save(3, state(rank), metrics={"loss": 0.5}).wait()
        core.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    with mock.patch("shardckpt.checkpointer.writer_name", return_value="golden"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    make(sys.argv[1])
