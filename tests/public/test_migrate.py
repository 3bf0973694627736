"""What docs/MIGRATE.md shows runs as it stands, block after block."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import shardckpt

PAGE = Path(__file__).parents[2] / "docs" / "MIGRATE.md"
_BLOCK = re.compile(r"(?:<!-- run: (\w+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
_NEEDS = {"orbax": ("orbax", "optax", "tensorstore"), "jax": ("orbax", "optax"), "dcp": ("torch",)}
_FRONT = "shardckpt.jax"


def blocks() -> dict[str, list[tuple[str, str]]]:
    """Return language and text of every block, by the name of its run."""
    found: dict[str, list[tuple[str, str]]] = {}
    for run, language, text in _BLOCK.findall(PAGE.read_text()):
        found.setdefault(run, []).append((language, text))
    return found


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def program(run: str, *, with_front: bool) -> str:
    """Return all blocks of a run as one program; lines of shell become calls of the command."""
    lines = ["import subprocess, sys"]
    for language, text in blocks()[run]:
        if language == "sh":
            for command in text.splitlines():
                name, *arguments = shlex.split(command, comments=True)
                assert name == "shardckpt"
                lines.append(
                    f"subprocess.run([sys.executable, '-m', 'shardckpt', *{arguments}], check=True)"
                )
        elif with_front or not (_FRONT in text or "ckpt." in text):
            lines.append(text)
    return "\n".join(lines)


def run_program(source: str, place: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    # The blocks run elsewhere, and may be of a package that is not installed.
    environment["PYTHONPATH"] = str(Path(shardckpt.__file__).absolute().parents[1])
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=place, env=environment, capture_output=True, text=True,
        timeout=55, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_block_belongs_to_a_run() -> None:
    assert blocks().keys() == _NEEDS.keys()


@pytest.mark.parametrize("run", sorted(_NEEDS))
def test_the_blocks_that_need_no_front_of_jax_run(run: str, tmp_path: Path) -> None:
    for module in _NEEDS[run]:
        if not has(module):
            pytest.skip(f"{module} is not installed")
    run_program(program(run, with_front=run == "dcp"), tmp_path)


def test_the_blocks_of_both_sides_run_in_jax(tmp_path: Path) -> None:
    if not has(_FRONT):
        pytest.skip(f"{_FRONT} is not here")
    run_program(program("jax", with_front=True), tmp_path)
