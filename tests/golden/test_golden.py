"""What predecessors wrote still loads; a change of the bytes on disk shows here first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardckpt.checkpointer import load_once
from shardckpt.cli.main import run
from shardckpt.coord.single import SingleCoord
from shardckpt.load.loader import LoadOptions
from shardckpt.state import PerRank
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.arrays import ArrayBackend

STORES = sorted(Path(__file__).parent.glob("format-*"))


@pytest.mark.parametrize("store", STORES, ids=lambda p: p.name)
def test_a_golden_store_loads(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    state: dict[str, Any] = {
        "rows": np.zeros((7, 5), np.float32),
        "copies": np.zeros(9, np.int16),
        "scalar": np.array(0.0),
        "empty": np.zeros((0, 3), np.uint8),
        "progress": None,
        "own": PerRank(None, "rank0"),
    }
    restored = load_once(
        LocalStorage(copy), ArrayBackend(), SingleCoord(), state, step=None, options=LoadOptions(),
        timeout_s=10, namespace="golden", environment={},
    )  # fmt: skip
    assert restored.step == 3
    assert restored.world_size == 2
    assert restored.config == {"width": 5}
    assert restored.metrics == {"loss": 0.5}
    assert (state["rows"] == np.arange(35, dtype=np.float32).reshape(7, 5)).all()
    assert (state["copies"] == np.arange(9)).all()
    assert state["scalar"] == 2.5
    assert state["progress"] == {"offset": 12, "betas": (0.9, float("inf"))}
    assert state["own"].value == {"rank": 0}
    assert run(["verify", str(copy)]) == 0
