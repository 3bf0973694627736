"""Saves and donating steps: exact values, no lost donation, no second copy of the state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardckpt import Staging, UnsupportedStateError
from shardckpt.jax import Checkpointer
from shardckpt.jax.backend import JaxBackend

if TYPE_CHECKING:
    from pathlib import Path

    from shardckpt.jax import Restored


def state_on(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Return arrays that JAX computed itself, so that their memory is its own to reuse."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    make = jax.jit(
        lambda: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape),
        out_shardings=NamedSharding(mesh, PartitionSpec("x", "y")),
    )
    return {"sharded": make(), "single": jax.jit(lambda: jnp.arange(999.0) / 7)()}


@jax.jit
def _heavy(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 200, lambda _, y: y + jnp.sin(y) * 1e-3, x)


_donating = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)


def step(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # One by one: together the small one would be put on every device of the mesh.
    return {key: _donating(array) for key, array in state.items()}


def pointers(state: dict[str, jax.Array]) -> list[int]:
    return [s.data.unsafe_buffer_pointer() for a in state.values() for s in a.addressable_shards]


def restored_equals(restored: Restored | None, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    assert restored is not None
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(restored.state["s"][key]), value)


def test_a_donating_step_right_after_a_save_donates_and_the_save_is_exact(tmp_path: Path) -> None:
    state = state_on((512, 256))
    expected = {k: np.array(v) for k, v in state_on((512, 256)).items()}
    blank = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(tmp_path, timeout_s=30) as ckpt:
        for number in range(3):
            before = pointers(state)
            ckpt.save(number, {"s": state})
            old, state = state, step(state)
            jax.block_until_ready(state)
            assert all(array.is_deleted() for array in old.values())
            assert pointers(state) == before, "the step took new memory"
        for number in range(3):
            restored_equals(ckpt.restore({"s": blank}, step=number), expected)
            expected = {k: v * 2 + 1 for k, v in expected.items()}


def test_no_copy_of_an_array_is_cached_on_it_by_a_save(tmp_path: Path) -> None:
    """JAX would keep what np.asarray copied for as long as the array lives."""
    small = jnp.arange(-4, 4).astype("int4")
    state = {**state_on((64, 64)), "packed": small}
    with Checkpointer(tmp_path, timeout_s=30) as ckpt:
        ckpt.save(1, {"s": state})
    for array in state.values():
        for part in [array, *(s.data for s in array.addressable_shards)]:
            assert part._npy_value is None


def test_a_save_waits_for_values_that_are_still_being_computed(tmp_path: Path) -> None:
    state = state_on((512, 512))
    expected = np.array(_heavy(state["sharded"]))
    with Checkpointer(tmp_path, timeout_s=30) as ckpt:
        pending = {"sharded": _heavy(state["sharded"])}
        ckpt.save(1, {"s": pending})
        restored_equals(ckpt.restore({"s": pending}), {"sharded": expected})


@pytest.mark.parametrize("fenced", [False, True])
def test_with_overlap_a_step_is_exact_and_donates_after_a_fence(
    tmp_path: Path, fenced: bool
) -> None:
    state = {"sharded": state_on((2048, 3072))["sharded"]}
    expected = {k: np.array(v) for k, v in state_on((2048, 3072)).items() if k == "sharded"}
    blank = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(tmp_path, timeout_s=30, staging=Staging(overlap=True)) as ckpt:
        engine = ckpt._core._saver._engine
        engine.set_paused(True)  # Only a fence copies.
        handle = ckpt.save(1, {"s": state})
        assert not handle.staged.done()
        before = pointers(state)
        if fenced:
            ckpt.fence()
            assert handle.staged.done()
        old, state = state, step(state)
        jax.block_until_ready(state)
        assert old["sharded"].is_deleted() is fenced
        assert (pointers(state) == before) is fenced
        engine.set_paused(False)
        handle.wait()
        restored_equals(ckpt.restore({"s": blank}), expected)
        # Nothing is held once it is copied.
        old, state = state, step(state)
        assert old["sharded"].is_deleted()


def test_a_donated_array_is_refused_by_name_and_may_still_be_a_target(tmp_path: Path) -> None:
    state = state_on((64, 64))
    with Checkpointer(tmp_path, timeout_s=30) as ckpt:
        ckpt.save(1, {"s": state})
        expected = {k: np.array(v) for k, v in state.items()}
        step(state)
        with pytest.raises(UnsupportedStateError, match=r"s/sharded: the array was deleted.*donat"):
            ckpt.save(2, {"s": state})
        restored_equals(ckpt.restore({"s": state}), expected)


def test_what_is_described_does_not_keep_a_step_from_donating() -> None:
    state = state_on((64, 64))
    backend = JaxBackend()
    tree = backend.describe({"s": state})
    held = [backend.host_array(s.data) for leaf in tree.leaves for s in leaf.shards]
    before = pointers(state)
    new = step(state)
    assert pointers(new) == before
    assert len(held) == 9
