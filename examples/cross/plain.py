"""The conversion between both frameworks once more, in plain numpy, to judge the map by.

It shares no code with the map: each array of JAX is transposed and reshaped by hand into what torch
must hold, and compared bit by bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing two states.

    Attributes:
        num_arrays: How many arrays each has.
        num_bytes: Their size.
        differing: Names of arrays that are absent on one side or not equal in every bit.
        digest: SHA-256 of the first state, shortened.
    """

    num_arrays: int
    num_bytes: int
    differing: list[str]
    digest: str


def compare(torch_file: Path, jax_file: Path) -> Comparison:
    """Compare what a torch job held with what a JAX job held."""
    with np.load(torch_file) as of_torch, np.load(jax_file) as of_jax:
        return compare_arrays(dict(of_torch), as_torch(dict(of_jax)))


def compare_arrays(one: Mapping[str, Any], other: Mapping[str, Any]) -> Comparison:
    """Compare two states with torch's names and shapes, bit by bit."""
    differing = [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or _bits(one[name]) != _bits(other[name])
    ]
    digest = hashlib.sha256()
    for name in sorted(one):
        digest.update(name.encode() + _bits(one[name])[2])
    size = sum(array.nbytes for array in one.values())
    return Comparison(len(one), size, differing, digest.hexdigest()[:16])


def as_torch(arrays: Arrays) -> Arrays:
    """Return a state as the JAX job writes it in torch's names and shapes.

    optax counts the steps of all parameters together; torch those of each.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        if name == "steps":
            continue
        stem, _, kind = name.rpartition(".")
        value = array
        if kind == "kernel":
            match stem.rsplit(".", 1)[-1]:
                case "qkv":  # (width, 3, heads, head_dim)
                    value = array.transpose(1, 2, 3, 0).reshape(-1, array.shape[0])
                case "mix":  # (heads, head_dim, width)
                    value = array.reshape(-1, array.shape[2]).T
                case _:
                    value = array.T
        found[f"{stem}.weight"] = value
        if name.startswith("parameter ") and "steps" in arrays:
            found[f"steps {stem.removeprefix('parameter ')}.weight"] = arrays["steps"]
    return found


def _bits(array: np.ndarray[Any, Any]) -> tuple[tuple[int, ...], str, bytes]:
    return array.shape, array.dtype.str, array.tobytes()
