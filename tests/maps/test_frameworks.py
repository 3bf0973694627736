"""Both real frameworks: what one saved, the other loads in its own processes, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import ranks_of_maps as ranks
from plain import compare

from shardckpt.testing.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store that two ranks of torch made, and what they held."""
    for name in ("torch", "jax"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("frameworks")
    run_ranks(2, ranks.torch_saves, str(folder / "of-torch"), directory=folder)
    return folder


@pytest.fixture(scope="module")
def back(place: Path) -> Path:
    """Return the store that JAX made of it; what it held lies beside the other."""
    stores = (str(place / "of-torch"), str(place / "of-jax"))
    run_ranks(1, ranks.jax_loads_and_saves, *stores, directory=place)
    return place / "of-jax"


def test_jax_loads_fsdp2_with_its_optimizer_on_a_line_and_on_a_grid_of_devices(
    place: Path, back: Path
) -> None:
    held = place / "shared"
    for mesh in ("line", "grid"):
        found = compare(held / "torch.npz", held / f"{mesh}.npz")
        assert found.num_arrays == 4 * (3 + 6 * ranks.LAYERS)
        assert not found.differing
    assert back.exists()


def test_moments_before_torch_made_a_step_are_zeros_in_jax(place: Path, back: Path) -> None:
    assert back.exists()
    with np.load(place / "shared" / "start.npz") as start:
        assert start["steps"] == 0
        moments = [name for name in start if name.startswith("moment")]
        assert len(moments) == 2 * (3 + 6 * ranks.LAYERS)
        assert not any(start[name].any() for name in moments)
        assert start["parameter tokens.embedding"].any()


def test_fsdp2_loads_what_jax_saved_cut_along_rows_and_along_columns(
    place: Path, back: Path
) -> None:
    run_ranks(2, ranks.torch_loads, str(back), directory=place)
    held = place / "shared"
    for cut in ("rows", "columns"):
        assert not compare(held / f"{cut}.npz", held / "grid.npz").differing
