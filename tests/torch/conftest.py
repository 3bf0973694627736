"""Shared by the torch tests: save one state, restore another from it, with the engine."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shardckpt.torch import Checkpointer, Restored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def round_trip(tmp_path: Path) -> Callable[..., Restored]:
    """Return a function that saves its first state and restores its second one from it."""
    numbers = itertools.count()

    def run(source: dict[str, Any], target: dict[str, Any], **options: Any) -> Restored:
        with Checkpointer(tmp_path / str(next(numbers)), timeout_s=30) as checkpointer:
            checkpointer.save(1, source)
            restored = checkpointer.restore(target, **options)
        assert restored is not None
        return restored

    return run


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
