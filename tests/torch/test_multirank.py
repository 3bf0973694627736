"""Real ranks on gloo: layouts, world sizes, and what a save never calls."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(240)]


def _ranks() -> Any:
    # Spawned children find rank functions by module name, so the module needs an importable one.
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    assert importlib.util.find_spec("ranks_of_torch") is not None
    import ranks_of_torch

    return ranks_of_torch


def _run(function: Any, world_size: int, *arguments: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(function, args=(world_size, port, *arguments), nprocs=world_size)


def test_every_layout_loads_into_every_layout_bit_for_bit(tmp_path: Path) -> None:
    _run(_ranks().reshard_everywhere, 4, str(tmp_path))


def test_what_four_ranks_saved_loads_on_three_and_on_one(tmp_path: Path) -> None:
    ranks = _ranks()
    _run(ranks.save_each_layout, 4, str(tmp_path), str(tmp_path / "expected.pt"))
    _run(ranks.load_elsewhere, 3, str(tmp_path), str(tmp_path / "expected.pt"))
    _run(ranks.load_elsewhere, 1, str(tmp_path), str(tmp_path / "expected.pt"))


def test_neither_save_nor_restore_on_one_host_calls_a_collective(tmp_path: Path) -> None:
    _run(_ranks().save_without_collectives, 4, str(tmp_path))


def test_copies_wait_for_steps_in_every_layout() -> None:
    _run(_ranks().copies_wait_for_steps, 4)
