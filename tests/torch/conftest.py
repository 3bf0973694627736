"""Shared by the torch tests: save one state, restore another from it, with the engine."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shardckpt.torch import Checkpointer, Restored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


@pytest.fixture
def late_save() -> Iterator[Any]:
    """Return a save that copies as late as its fences allow."""
    # Rank functions import it, too, and spawned children find modules by name only.
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import late_copies

    save = late_copies.LateSave()
    yield save
    save.fences.close()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
