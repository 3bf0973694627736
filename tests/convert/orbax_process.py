"""Runs commands of `orbax_side.py`, so that JAX's threads and fork hooks stay out of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SIDE = Path(__file__).parent / "orbax_side.py"


def run_side(*arguments: str) -> str:
    """Run a command in a process of its own and return what it printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(SIDE), *arguments], capture_output=True, text=True, timeout=55,
        check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
