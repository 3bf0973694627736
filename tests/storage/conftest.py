"""Small file systems to run into the walls of."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount things below `tmp_path` for one test; skips where this user may not mount.

    Yields:
        A function of a name below `tmp_path` and the options of mount(8); returns the place.
    """
    mounted: list[Path] = []

    def do(name: str, *options: str) -> Path:
        place = tmp_path / name
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
        if place not in mounted:
            mounted.append(place)
        return place

    yield do
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", str(place)], check=True)
