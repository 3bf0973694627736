"""Checkpoints of Orbax itself, made once per session by a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIDE = Path(__file__).parent / "orbax_side.py"
sys.path.append(str(SIDE.parent))


def run_side(*arguments: str) -> str:
    """Run a command of `orbax_side.py`: JAX's threads and fork hooks stay out of this process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(SIDE), *arguments], capture_output=True, text=True, timeout=55,
        check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def orbax_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with one Orbax checkpoint per way of writing it."""
    for name in ("jax", "orbax", "optax"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    place = tmp_path_factory.mktemp("orbax")
    run_side("write", str(place))
    return place
