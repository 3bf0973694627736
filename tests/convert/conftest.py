"""Checkpoints of Orbax itself, made once per session by a process of their own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def orbax_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with one Orbax checkpoint per way of writing it."""
    for name in ("jax", "orbax", "optax"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    from orbax_process import run_side

    place = tmp_path_factory.mktemp("orbax")
    run_side("write", str(place))
    return place
