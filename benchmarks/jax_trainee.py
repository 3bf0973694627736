"""A transformer's parameters under AdamW in JAX, sharded over a mesh, in steps that donate.

A step updates all of the state and donates it. A **compute-bound** step multiplies matrices first;
after a **device-bound** one the host waits, as if a device computed the next gradients.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

Mode = Literal["device", "compute"]
DEPTH: Final = 12
WIDTH_MULTIPLE: Final = 64
BYTES_PER_PARAMETER: Final = 12  # Itself and two moments, all of 4 bytes.
WAIT_S: Final = 0.2
MATRIX: Final = 1024
NUM_PRODUCTS: Final = 24


def shapes_for(state_bytes: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters' shapes of a model whose state has about so many bytes."""
    width = (state_bytes / BYTES_PER_PARAMETER / DEPTH / 12) ** 0.5
    width = max(1, round(width / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE
    found: dict[str, tuple[int, ...]] = {}
    for i in range(DEPTH):
        block = f"blocks/{i}"
        found |= {
            f"{block}/norm_1/scale": (width,), f"{block}/norm_1/bias": (width,),
            f"{block}/qkv/kernel": (width, 3 * width), f"{block}/qkv/bias": (3 * width,),
            f"{block}/out/kernel": (width, width), f"{block}/out/bias": (width,),
            f"{block}/norm_2/scale": (width,), f"{block}/norm_2/bias": (width,),
            f"{block}/up/kernel": (width, 4 * width), f"{block}/up/bias": (4 * width,),
            f"{block}/down/kernel": (4 * width, width), f"{block}/down/bias": (width,),
        }  # fmt: skip
    return found


def mesh_of(shape: Sequence[int]) -> Mesh:
    """Return a mesh of all devices."""
    return jax.make_mesh(tuple(shape), ("data", "model")[: len(shape)])


def abstract(shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> dict[str, Any]:
    """Return the state without values: the rows over the first axis, columns over the second."""

    def like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*mesh.axis_names[: len(shape)])
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    params = {key: like(shape) for key, shape in shapes.items()}
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return {"params": params, "mu": dict(params), "nu": dict(params), "count": count}


class Trainee:
    """The state of one process's devices, and its steps."""

    def __init__(self, state_bytes: int, mesh: Mesh) -> None:
        """Make the state and compile the steps; all processes."""
        self.abstract = abstract(shapes_for(state_bytes), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.state = jax.block_until_ready(_random(self.abstract))
        self.nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        replicated = NamedSharding(mesh, PartitionSpec())
        # Every device multiplies for itself: no collective is part of a step.
        self._matrix = jax.jit(
            lambda: jnp.full((MATRIX, MATRIX), 1e-3, jnp.float32), out_shardings=replicated
        )()
        self._update = jax.jit(_update, donate_argnums=0, out_shardings=shardings)
        self._compute = jax.jit(partial(_compute, NUM_PRODUCTS // mesh.size + 1))
        for mode in ("device", "compute"):
            self.step(mode)

    def step(self, mode: Mode) -> tuple[float, float]:
        """Take a step that donates the state; return when it began and when it was done."""
        began = time.perf_counter()
        gain = self._compute(self._matrix) if mode == "compute" else None
        self.state = self._update(self.state, gain)
        jax.block_until_ready(self.state)
        done = time.perf_counter()
        if mode == "device":
            time.sleep(WAIT_S)
        return began, done


def _random(like: dict[str, Any]) -> dict[str, Any]:
    def values(shape: tuple[int, ...], dtype: Any, salt: jax.Array) -> jax.Array:
        if dtype == jnp.int32:
            return jnp.zeros(shape, dtype)
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), salt), shape, dtype)

    # One program for each kind of array: one for all of them takes minutes to compile.
    makers: dict[Any, Any] = {}

    def make(leaf: jax.ShapeDtypeStruct, salt: int) -> Any:
        kind = (leaf.shape, leaf.dtype, leaf.sharding)
        if kind not in makers:
            makers[kind] = jax.jit(
                partial(values, leaf.shape, leaf.dtype), out_shardings=leaf.sharding
            )
        return makers[kind](np.int32(salt))

    leaves, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, [make(leaf, i) for i, leaf in enumerate(leaves)])


def _compute(num_products: int, matrix: jax.Array) -> jax.Array:
    product = matrix
    for _ in range(num_products):
        product = jnp.tanh(product @ matrix)
    return product[0, 0]


def _update(state: dict[str, Any], gain: jax.Array | None) -> dict[str, Any]:
    rate = 1e-4 if gain is None else 1e-4 + 0 * gain
    mu = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * p, state["mu"], state["params"])
    nu = jax.tree.map(lambda v, p: 0.99 * v + 0.01 * p * p, state["nu"], state["params"])
    params = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(jnp.abs(v)) + 1e-8), state["params"], mu, nu
    )
    return {"params": params, "mu": mu, "nu": nu, "count": state["count"] + 1}
