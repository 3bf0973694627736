"""Every kind of leaf and container, round and back, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardckpt import PerRank, StateMismatchError, UnsupportedStateError
from shardckpt.geometry.dtypes import ITEMSIZE_BYTES
from shardckpt.jax import Checkpointer, load
from shardckpt.jax.backend import JaxBackend
from shardckpt.jax.leaves import escaped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardckpt.jax import Restored

    RoundTrip = Callable[..., Restored]

TORCH_ONLY = {"complex32", "float4_e2m1fn_x2"}
WIDE = {"int64", "uint64", "float64", "complex128"}


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclass
class Record:
    left: Any
    right: Any


class Loader:
    """Gives and takes its state as torch's loaders do."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position, "seen": (1, b"x"), "array": np.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["seen"] == (1, b"x")
        np.testing.assert_array_equal(state["array"], np.arange(3))
        self.position = state["position"]


class Iterator:
    """Gives and takes its state as grain's iterators do."""

    def __init__(self, position: int) -> None:
        self.position = position

    def get_state(self) -> bytes:
        return str(self.position).encode()

    def set_state(self, state: bytes) -> None:
        self.position = int(state)


def keys_of(state: dict[str, Any]) -> dict[str, str]:
    return {leaf.key: leaf.role for leaf in JaxBackend().describe(state).leaves}


def is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def same(one: Any, other: Any) -> bool:
    if is_key(one):
        words = [np.asarray(jax.random.key_data(key)) for key in (one, other)]
        return one.dtype == other.dtype and words[0].tobytes() == words[1].tobytes()
    if isinstance(one, (jax.Array, np.ndarray, np.generic)):
        return (
            (one.dtype, one.shape) == (other.dtype, other.shape)
            and np.asarray(one).tobytes() == np.asarray(other).tobytes()
            and isinstance(other, jax.Array) == isinstance(one, jax.Array)
            and getattr(one, "sharding", None) == getattr(other, "sharding", None)
            and getattr(one, "committed", None) == getattr(other, "committed", None)
        )
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE_BYTES.keys() - TORCH_ONLY))
def test_every_dtype_comes_back_bit_for_bit(round_trip: RoundTrip, dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(0).integers(0, 256, (8, 6, kind.itemsize), np.uint8)
    if dtype == "bool":
        raw &= 1
    if kind.itemsize == 1 and jax.dtypes.itemsize_bits(kind) < 8:
        raw &= (1 << jax.dtypes.itemsize_bits(kind)) - 1
    host = raw.view(kind).reshape(8, 6)
    state: dict[str, Any] = {"host": host, "scalar": host[1, 2]}
    with jax.enable_x64(dtype in WIDE):
        mesh = jax.make_mesh((4, 2), ("x", "y"))
        state["sharded"] = jax.device_put(host, NamedSharding(mesh, PartitionSpec("x", "y")))
        state["single"] = jnp.asarray(host[:, :3])
        restored = round_trip({"s": state}, {"s": state})
        assert {key: same(value, restored.state["s"][key]) for key, value in state.items()} == (
            dict.fromkeys(state, True)
        )


def test_every_kind_of_leaf_and_container_comes_back_as_it_was(round_trip: RoundTrip) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 8)
    optimizer = optax.MultiSteps(
        optax.chain(
            optax.masked(optax.adamw(optax.constant_schedule(1e-3)), {"w": True, "b": False}),
            optax.trace(0.9),
        ),
        every_k_schedule=2,
    )
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4, jnp.bfloat16)}
    state = {
        "params": params,
        "opt": optimizer.init(params),
        "keys": jax.device_put(keys, NamedSharding(mesh, PartitionSpec("x"))),
        "key": jax.random.key(1),
        "mixed": [
            Pair(1, (2.5, None)),
            Record({"deep": [True, "text", b"\xff"]}, 1 + 2j),
            float("nan"),
        ],
        "numpy": {
            "strided": np.arange(20).reshape(4, 5)[::2, ::-1],
            "swapped": np.arange(4, dtype=">i4"),
        },
        "scalars": (np.float16(1.5), ml_dtypes.bfloat16(2), np.bool_(True)),
        "empty": {"array": jnp.zeros((0, 3)), "dict": {}, "tuple": ()},
        "nnx": nnx.state(nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
        "zero": jnp.float32(3),
    }
    restored = round_trip(state, state).state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert np.isnan(restored["mixed"].pop())
    state["mixed"].pop()
    swapped = restored["numpy"].pop("swapped")
    np.testing.assert_array_equal(swapped, state["numpy"].pop("swapped"))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
    assert [pair for pair in pairs if not same(*pair)] == []
    assert isinstance(restored["nnx"], nnx.State)


def test_keys_name_paths_and_optax_fields_have_roles() -> None:
    params = {"w": jnp.ones((2, 2)), "ids": jnp.arange(3)}
    optimizer = optax.chain(optax.adam(optax.constant_schedule(0.1)), optax.trace(0.5))
    state = {"params": params, "train": {"opt": optimizer.init(params), "ema": params}}
    assert keys_of(state) == {
        "params/w": "param",
        "params/ids": "other",
        "train/ema/w": "param",
        "train/ema/ids": "other",
        "train/opt/0/0/count": "count",
        "train/opt/0/0/mu/w": "adam_m",
        "train/opt/0/0/mu/ids": "adam_m",
        "train/opt/0/0/nu/w": "adam_v",
        "train/opt/0/0/nu/ids": "adam_v",
        "train/opt/0/1/count": "schedule",
        "train/opt/1/trace/w": "momentum",
        "train/opt/1/trace/ids": "momentum",
    }


def test_nnx_states_modules_and_plain_dicts_share_their_keys(round_trip: RoundTrip) -> None:
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    plain = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    expected = {"m/kernel": "param", "m/bias": "param"}
    for value in (layer, nnx.state(layer), plain):
        assert keys_of({"m": value}) == expected
    restored = round_trip({"m": nnx.state(layer)}, {"m": plain})
    np.testing.assert_array_equal(restored.state["m"]["kernel"], layer.kernel[...])
    other = nnx.Linear(3, 2, rngs=nnx.Rngs(5))
    found = round_trip({"m": nnx.state(layer)}, {"m": nnx.state(other)}).state["m"]
    nnx.update(other, found)
    np.testing.assert_array_equal(other.kernel[...], layer.kernel[...])


def test_containers_are_no_part_of_the_key(round_trip: RoundTrip) -> None:
    a, b = jnp.arange(3.0), jnp.arange(4.0)
    zero = jnp.zeros
    for source, target in (
        (Pair(a, b), {"left": zero(3), "right": zero(4)}),
        (Record(a, b), Pair(zero(3), zero(4))),
        ({"left": a, "right": b}, Record(zero(3), zero(4))),
        ((a, b), [zero(3), zero(4)]),
        ([a, b], {0: zero(3), 1: zero(4)}),
    ):
        found = round_trip({"s": source}, {"s": target}).state["s"]
        assert type(found) is type(target)
        assert [x.tolist() for x in jax.tree.leaves(found)] == [a.tolist(), b.tolist()]


def test_odd_names_are_escaped_and_stay_apart(round_trip: RoundTrip) -> None:
    odd = {"a/b": 1.0, "a": {"b": 2.0}, "a%2Fb": 3.0, "": 4.0, "\n": 5.0, "\ud800": 6.0, "é.*": 7.0}
    state = {name: jax.tree.map(jnp.float32, value) for name, value in odd.items()}
    assert len(keys_of({"s": state})) == len(odd)
    restored = round_trip({"s": state}, {"s": jax.tree.map(jnp.zeros_like, state)})
    assert jax.tree.map(float, restored.state["s"]) == odd
    assert [escaped(part) for part in ("a/b", "a%2Fb", "plain.name-1")] == [
        "a%2Fb", "a%252Fb", "plain.name-1",
    ]  # fmt: skip


@dataclass
class Custom:
    one: Any
    two: Any


jax.tree_util.register_pytree_with_keys(
    Custom,
    lambda c: (((jax.tree_util.DictKey(1), c.one), (jax.tree_util.DictKey("1"), c.two)), None),
    lambda _, children: Custom(*children),
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Custom(jnp.zeros(1), jnp.ones(1)), r"s/1: two parts of the state have this key"),
        ({1: 0, "a": 0}, r"s: JAX cannot take this value apart"),
        (object(), r"s: a builtins.object cannot be stored exactly"),
        ([np.array(["x"], object)], r"s/0: arrays of object cannot be stored"),
        ([np.ma.masked_array([1.0], [True])], r"s/0: a numpy.ma.*MaskedArray means more"),
        (jax.ShapeDtypeStruct((2,), np.float32), r"s: a ShapeDtypeStruct has no values"),
    ],
    ids=["same key", "unsortable", "object", "dtype", "masked", "abstract"],
)
def test_what_cannot_be_stored_is_refused_by_key(value: Any, message: str) -> None:
    with pytest.raises(UnsupportedStateError, match=message):
        JaxBackend().describe({"s": value})


def test_unreduced_and_traced_arrays_are_refused_by_key() -> None:
    mesh = jax.make_mesh((2,), ("x",))
    summed = jax.make_array_from_single_device_arrays(
        (2,),
        NamedSharding(mesh, PartitionSpec(None, unreduced={"x"})),
        [jax.device_put(jnp.ones(2), device) for device in jax.devices()[:2]],
    )
    with pytest.raises(UnsupportedStateError, match=r"s/w: the array is unreduced over \['x'\]"):
        JaxBackend().describe({"s": {"w": summed}})

    def save(x: jax.Array) -> jax.Array:
        JaxBackend().describe({"s": {"w": x}})
        return x

    with pytest.raises(UnsupportedStateError, match=r"s/w: a traced value.*outside of jit"):
        jax.jit(save)(jnp.ones(2))


def test_abstract_targets_need_no_arrays(round_trip: RoundTrip) -> None:
    def init() -> dict[str, Any]:
        return {"w": jnp.ones((8, 4)), "key": jax.random.key(7), "count": jnp.int32(3)}

    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    abstract = jax.eval_shape(init)
    placed = dict(abstract)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    placed["w"] = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)
    for target in (abstract, placed):
        found = round_trip({"s": init()}, {"s": target}).state["s"]
        np.testing.assert_array_equal(found["w"], np.ones((8, 4)))
        assert jax.random.key_data(found["key"]).tolist() == [0, 7]
        # What has no sharding is placed by JAX, so that it goes with arrays of any mesh.
        assert not found["count"].committed
        jax.jit(lambda s: s["w"] * s["count"])(found)
    assert found["w"].sharding == sharding


def test_all_mismatches_are_told_at_once(round_trip: RoundTrip) -> None:
    saved = {"a": jnp.zeros(3), "b": jnp.zeros(3), "c": 1, "key": jax.random.key(0)}
    target = {"a": jnp.zeros(4), "b": jnp.zeros(3, jnp.int32), "d": 1, "key": jax.random.key(0)}
    with pytest.raises(StateMismatchError) as caught:
        round_trip({"s": saved}, {"s": target})
    assert len(caught.value.problems) == 4
    for word in ("s/a", "s/b", "s/c", "s/d"):
        assert any(f"'{word}'" in problem for problem in caught.value.problems)
    saved["key"] = jax.random.key(0, impl="unsafe_rbg")
    with pytest.raises(StateMismatchError, match=r"'s/key': saved as random keys of 'unsafe_rbg'"):
        round_trip(
            {"s": saved},
            {"s": jax.tree.map(lambda x: x, saved) | {"key": jax.random.key(0, impl="rbg")}},
        )


def test_only_rename_cast_and_strict_choose_what_is_loaded(round_trip: RoundTrip) -> None:
    saved = {"w": jnp.arange(4.0), "old": jnp.ones(2), "n": 5}
    target = {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16), "new": jnp.zeros(2), "n": 0}
    found = round_trip({"s": saved}, {"s": target}, rename={"s/old": "s/new"}, cast=True).state["s"]
    assert found["w"].dtype == jnp.bfloat16
    assert found["w"].tolist() == [0, 1, 2, 3]
    assert (found["new"].tolist(), found["n"]) == ([1, 1], 5)
    found = round_trip({"s": saved}, {"s": target}, only=["s/n"]).state["s"]
    assert found["w"] is target["w"], "what is not loaded stays what it was"
    assert found["new"] is target["new"]
    assert found["n"] == 5
    found = round_trip({"s": saved}, {"s": {"w": jnp.zeros(4), "x": 7}}, strict=False).state["s"]
    assert (found["w"].tolist(), found["x"]) == ([0, 1, 2, 3], 7)


def test_64_bits_are_not_truncated_silently(round_trip: RoundTrip) -> None:
    saved = {"w": np.arange(3.0)}
    wide = {"w": jax.ShapeDtypeStruct((3,), np.float64)}
    with pytest.raises(UnsupportedStateError, match=r"s/w: the target is float64.*enable_x64"):
        round_trip({"s": saved}, {"s": wide})
    narrow = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
    with pytest.raises(StateMismatchError, match="float64"):
        round_trip({"s": saved}, {"s": narrow})
    assert round_trip({"s": saved}, {"s": narrow}, cast=True).state["s"]["w"].tolist() == [0, 1, 2]


def test_objects_and_per_rank_values_take_their_state(round_trip: RoundTrip) -> None:
    own = jax.random.key(5)
    saved = {
        "loader": Loader(7),
        "data": PerRank(Iterator(8)),
        "rank": PerRank({"key": own, "x": jnp.arange(2), "b": np.ones(2, ml_dtypes.bfloat16)}),
    }
    target = {"loader": Loader(0), "data": PerRank(Iterator(0)), "rank": PerRank({})}
    found = round_trip(saved, target).state
    assert found["loader"] is target["loader"]
    assert (found["loader"].position, found["data"].value.position) == (7, 8)
    values = found["rank"].value
    assert same(values["key"], own)
    assert values["x"].tolist() == [0, 1]
    assert values["b"].dtype == ml_dtypes.bfloat16


@pytest.mark.filterwarnings("ignore:.*set_vital:UserWarning")
def test_a_torchdata_loader_goes_on_where_it_was(round_trip: RoundTrip) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return torchdata.StatefulDataLoader(list(range(20)), batch_size=2, shuffle=True)

    first, second = loader(), loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    restored = round_trip({"data": first}, {"data": second})
    assert restored.state["data"] is second
    assert [b.tolist() for b in second] == [b.tolist() for b in batches]


def test_a_grain_iterator_goes_on_where_it_was(round_trip: RoundTrip) -> None:
    def batches() -> Any:
        dataset = grain.MapDataset.range(40).shuffle(seed=3).batch(4)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))

    first, second = batches(), batches()
    for _ in range(3):
        next(first)
    restored = round_trip({"data": first}, {"data": second})
    assert restored.state["data"] is second
    assert [b.tolist() for b in second] == [b.tolist() for b in first]


def test_saving_and_restoring_heed_no_mesh_in_use(tmp_path: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    spread = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("x")))
    state = {"w": spread, "one": jnp.ones(3), "key": jax.random.key(2)}
    with jax.set_mesh(mesh), Checkpointer(tmp_path, timeout_s=30) as ckpt:
        ckpt.save(1, {"s": state})
        restored = ckpt.restore({"s": state})
        assert restored is not None
    assert all(same(state[key], restored.state["s"][key]) for key in state)


def test_a_failed_load_leaves_the_state_fit_to_be_saved(tmp_path: Path) -> None:
    """Nothing is filled in place, so a damaged file poisons nothing."""
    from shardckpt import CorruptCheckpointError

    state = {"w": jnp.arange(1000.0)}
    with Checkpointer(tmp_path, timeout_s=30) as ckpt:
        ckpt.save(1, {"s": state})
        ckpt.wait()
        (file,) = tmp_path.rglob("*.shard")
        data = bytearray(file.read_bytes())
        data[4096 + 100] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)
        with pytest.raises(CorruptCheckpointError):
            ckpt.restore({"s": state})
        ckpt.save(2, {"s": state})
    assert load(tmp_path, {"s": state}).step == 2


@pytest.mark.parametrize(("front", "other"), [("jax", "torch"), ("torch", "jax")])
def test_neither_front_imports_the_other_framework(front: str, other: str) -> None:
    code = f"import sys, shardckpt.{front}; sys.exit({other!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
