"""The demo across frameworks: it holds, and its judge would see what does not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLE = Path(__file__).parents[2] / "examples" / "cross"


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cross_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plain = load_module("plain")


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.timeout(240)
def test_one_run_crosses_from_torch_to_jax_and_back(tmp_path: Path) -> None:
    for name in ("torch", "jax", "optax"):
        pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "demo.py"), "--steps", "2"],
        capture_output=True, text=True, timeout=220, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-equal") == 2
    assert "The demo held" in done.stdout
    assert "not converted: optimizer/param_groups" in done.stdout


def test_the_conversion_in_plain_numpy_is_that_of_the_formulas() -> None:
    width, heads, head_dim = 6, 2, 3
    x = np.random.default_rng(0).standard_normal((5, width))
    qkv = np.random.default_rng(1).standard_normal((width, 3, heads, head_dim))
    mix = np.random.default_rng(2).standard_normal((heads, head_dim, width))
    up = np.random.default_rng(3).standard_normal((width, 4 * width))
    made = plain.as_torch(
        {
            "parameter blocks.0.qkv.kernel": qkv,
            "parameter blocks.0.mix.kernel": mix,
            "parameter blocks.0.up.kernel": up,
        }
    )
    parts = (x @ made["parameter blocks.0.qkv.weight"].T).reshape(5, 3, heads, head_dim)
    np.testing.assert_allclose(parts, np.einsum("tw,wphd->tphd", x, qkv))
    heads_out = parts[:, 2]
    np.testing.assert_allclose(
        heads_out.reshape(5, width) @ made["parameter blocks.0.mix.weight"].T,
        np.einsum("thd,hdw->tw", heads_out, mix),
    )
    np.testing.assert_allclose(x @ made["parameter blocks.0.up.weight"].T, x @ up)


@pytest.mark.parametrize("damage", ["bit", "sign of zero", "dtype", "shape", "absent", "extra"])
def test_one_different_bit_is_a_difference(damage: str) -> None:
    one = {"a": np.array([0.0, 1.0], np.float32), "b": np.ones((2, 3), np.float32)}
    other = {name: array.copy() for name, array in one.items()}
    assert not plain.compare_arrays(one, other).differing
    match damage:
        case "bit":
            other["a"].view(np.uint32)[1] ^= 1
        case "sign of zero":
            other["a"][0] = -0.0
        case "dtype":
            other["a"] = other["a"].astype(np.float64)
        case "shape":
            other["a"] = other["a"][None]
        case "absent":
            del other["a"]
        case "extra":
            one.pop("a")
    assert plain.compare_arrays(one, other).differing == ["a"]
