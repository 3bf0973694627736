"""How much memory saves may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from shardckpt import native
from shardckpt.options import Staging
from shardckpt.staging.engine import SLOT_BYTES, make_room

if TYPE_CHECKING:
    from shardckpt.native import Engine

_GIB = 1 << 30


class _Room:
    """Stands for an engine without memory and notes what it is asked to take."""

    def __init__(self) -> None:
        self.nbytes = self.most_bytes = 0

    def stats(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def reserve(self, nbytes: int, most_bytes: int) -> None:
        self.nbytes, self.most_bytes = nbytes, most_bytes


def _room(*file_bytes: int) -> _Room:
    room = _Room()
    make_room(cast("Engine", room), Staging(), file_bytes)
    return room


@pytest.mark.parametrize(
    ("environment", "num_ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "many"}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x16)"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x16),8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "LOCAL_WORLD_SIZE": "8"}, 8),
    ],
)
def test_the_ranks_of_a_host_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], num_ranks: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native, "memory_limit", lambda: 10 * _GIB)
    assert _room(8 * _GIB).most_bytes == 4 * _GIB // num_ranks
    assert _room(100).most_bytes == SLOT_BYTES


def test_a_large_save_begins_with_less_memory_than_the_state_and_may_take_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "memory_limit", lambda: 100 * _GIB)
    room = _room(_GIB + 4096)
    assert room.nbytes < _GIB < room.most_bytes
    small = _room(SLOT_BYTES, 3 * SLOT_BYTES)
    assert small.nbytes == small.most_bytes == 4 * SLOT_BYTES
