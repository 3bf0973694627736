"""The contract with JAX's private parts: a JAX without them fails here, not in a save."""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from shardckpt.jax import private
from shardckpt.jax.coord import default_coord


def test_without_a_distributed_runtime_there_is_no_client() -> None:
    assert private.client() is None
    assert default_coord(1).world_size == 1


def test_typed_keys_show_their_words_and_their_implementation() -> None:
    for impl, words in (("threefry2x32", (2,)), ("rbg", (4,))):
        keys = jax.random.split(jax.random.key(1, impl=impl), 3)
        found = private.key_words(keys)
        np.testing.assert_array_equal(found, jax.random.key_data(keys))
        assert private.key_impl(keys.dtype) == (impl, words)
        assert str(jax.random.key_impl(keys)) == impl


def test_words_of_described_keys_lie_as_those_of_keys_do() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    keys = jax.random.split(jax.random.key(1), (8, 2))
    for spec in (PartitionSpec("x"), PartitionSpec(None, "y"), PartitionSpec()):
        put = jax.device_put(keys, NamedSharding(mesh, spec))
        described = jax.ShapeDtypeStruct(put.shape, put.dtype, sharding=put.sharding)
        words = private.key_words(put)
        found = private.words_sharding(described, words.shape)
        assert found.is_equivalent_to(words.sharding, 3)


def test_an_array_says_how_its_memory_lies() -> None:
    for _ in range(2):
        for order in ((0, 1), (1, 0)):
            form = Format(Layout(order), SingleDeviceSharding(jax.devices()[0]))
            layout = private.device_layout(jax.device_put(jnp.ones((2, 3)), form))
            assert tuple(layout.major_to_minor) == order
            assert not layout.tiling
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    for order in ((0, 1), (1, 0)):
        form = Format(Layout(order), NamedSharding(mesh, PartitionSpec("x")))
        whole = jax.device_put(jnp.ones((2, 3)), form)
        for array in (whole, *(shard.data for shard in whole.addressable_shards)):
            assert tuple(private.device_layout(array).major_to_minor) == order
    data = jnp.arange(6.0)
    assert np.asarray(data).ctypes.data == data.unsafe_buffer_pointer()


def test_states_of_optax_and_variables_of_nnx_are_known() -> None:
    adam = optax.scale_by_adam().init({"w": jnp.ones(2)})
    assert private.is_optimizer_state(adam)
    assert set(private.ROLES["ScaleByAdamState"]) == set(adam._fields)
    assert private.is_optimizer_state(optax.trace(0.9).init({"w": jnp.ones(2)}))
    assert not private.is_optimizer_state((1, 2))
    assert private.is_variable(nnx.Param(jnp.ones(2)))
    assert not private.is_variable(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
