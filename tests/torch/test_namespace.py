"""Keys of one job never meet those of another that shares the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shardckpt.checkpointer import next_namespace
from shardckpt.coord.single import SingleCoord
from shardckpt.torch import Checkpointer

if TYPE_CHECKING:
    from pathlib import Path


def test_namespaces_are_counted_on_each_coord() -> None:
    """Ranks that were in different jobs before agree on the next one's keys."""
    one, other = SingleCoord(), SingleCoord()
    assert [next_namespace(one), next_namespace(one), next_namespace(other)] == [
        "shardckpt/0",
        "shardckpt/1",
        "shardckpt/0",
    ]


def test_a_coord_serves_several_checkpointers_in_turn(tmp_path: Path) -> None:
    coord = SingleCoord()
    for step in (1, 2):
        with Checkpointer(tmp_path, coord=coord) as checkpointer:
            state = {"x": torch.zeros(3)}
            checkpointer.restore(state)
            checkpointer.save(step, state)
            checkpointer.wait()
            assert checkpointer.latest() == step
