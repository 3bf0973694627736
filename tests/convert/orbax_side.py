"""What Orbax itself writes and reads, in a process of its own, on 8 CPU devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STEPS = (10, 20, 30)
VARIANTS = {
    "ocdbt-zarr2": (True, False),
    "ocdbt-zarr3": (True, True),
    "files-zarr2": (False, False),
    "files-zarr3": (False, True),
}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays of the state by key; bits are random where the dtype allows it."""
    rng = np.random.default_rng(seed)

    def bits(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        kind = np.dtype(dtype)
        raw = rng.integers(0, 256, (*shape, kind.itemsize), np.uint8)
        return raw.reshape(-1).view(kind).reshape(shape)

    found = {
        "key": bits((2,), np.uint32),
        "opt/0/count": np.array(12, np.int32),
        "params/a%2Fb/c.d": np.array(3.5, np.float32),
        "params/bf16": bits((10, 3), ml_dtypes.bfloat16),
        # Too large to lie inside of a database's nodes.
        "params/big": bits((128, 128), np.int32),
        "params/bool": rng.integers(0, 2, (5,)).astype(bool),
        "params/c64": rng.standard_normal((3, 4)).astype(np.complex64),
        "params/f8": bits((7,), ml_dtypes.float8_e5m2),
        "params/int4": rng.integers(-8, 8, (9,)).astype(ml_dtypes.int4),
        "params/list/0": bits((2, 2), np.int32),
        "params/list/1": bits((3,), np.int8),
        "params/w": rng.standard_normal((64, 32)).astype(np.float32),
        "params/zeros": np.zeros((16, 8), np.float32),
    }
    for moment in ("mu", "nu"):
        found[f"opt/0/{moment}/w"] = rng.standard_normal((64, 32)).astype(np.float32)
    return found


def tree(seed: int = 0) -> dict[str, Any]:
    """Return the state as a JAX user holds it."""
    import jax
    import optax

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    one = {
        key: jax.device_put(value, cut) if value.shape == (64, 32) else jax.numpy.asarray(value)
        for key, value in arrays(seed).items()
    }
    params = {
        key.removeprefix("params/"): value
        for key, value in one.items()
        if key.startswith("params/") and "%" not in key and "list" not in key
    }
    params |= {
        "list": [one["params/list/0"], one["params/list/1"]],
        "a/b": {"c.d": one["params/a%2Fb/c.d"]},
    }
    adam = optax.ScaleByAdamState(
        one["opt/0/count"], {"w": one["opt/0/mu/w"]}, {"w": one["opt/0/nu/w"]}
    )
    return {
        "params": params, "opt": (adam, optax.EmptyState()), "key": one["key"],
        "step": 7, "lr": 0.5, "on": True, "nothing": None, "empty": {},
    }  # fmt: skip


def write(place: Path) -> None:
    """Write the state in every way."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place / "standard", tree())
        keys = {
            "plain": jax.random.key(0),
            "many": jax.random.split(jax.random.key(1, impl="rbg"), 4),
        }
        checkpointer.save(place / "keys", keys)
    for name, (ocdbt, zarr3) in VARIANTS.items():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        with ocp.Checkpointer(handler) as checkpointer:
            state = {**tree(), "text": "hello"}
            checkpointer.save(place / name, args=ocp.args.PyTreeSave(state))
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with ocp.CheckpointManager(place / "manager", options=options) as manager:
        for step in STEPS:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(tree(step)), data=ocp.args.JsonSave({"at": step})
            )
            manager.save(step, args=items, metrics={"loss": 1 / step})


def same(found: Any, wanted: Any) -> None:
    """Assert that two trees are equal, bit for bit.

    Raises:
        AssertionError: They are not.
    """
    import jax

    ours = jax.tree_util.tree_flatten_with_path(found)[0]
    theirs = jax.tree_util.tree_flatten_with_path(wanted)[0]
    names = [
        [jax.tree_util.keystr(path, simple=True) for path, _ in side] for side in (ours, theirs)
    ]
    assert names[0] == names[1], names
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        if isinstance(b, (bool, int, float, str)):
            assert (type(a), a) == (type(b), b), path
        else:
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            assert a.tobytes() == b.tobytes(), path


def restore(item: Path) -> None:
    """Restore an item that should hold `tree()`, as it is and onto 8 devices cut otherwise."""
    import jax
    import orbax.checkpoint as ocp

    wanted = tree()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    copies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def target(value: Any) -> Any:
        if not isinstance(value, jax.Array):
            return value
        sharding = rows if value.ndim == 2 and value.shape[0] % 8 == 0 else copies
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    with ocp.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(item, jax.tree.map(target, wanted)), wanted)
        plain = checkpointer.restore(item)
    same(plain["params"], wanted["params"])


def restore_manager(root: Path) -> None:
    """Restore every step of a manager that should equal the one `write` made."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(root) as manager:
        assert manager.all_steps() == list(STEPS)
        assert manager.latest_step() == STEPS[-1]
        for step in STEPS:
            wanted = ocp.args.Composite(
                state=ocp.args.StandardRestore(tree(step)), data=ocp.args.JsonRestore()
            )
            found = manager.restore(step, args=wanted)
            same(found.state, tree(step))
            assert found.data == {"at": step}
            assert manager.metrics(step) == {"loss": 1 / step}


def restore_keys(item: Path) -> None:
    """Restore typed random keys."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(item)
    many = jax.random.split(jax.random.key(1, impl="rbg"), 4)
    for name, wanted in (("plain", jax.random.key(0)), ("many", many)):
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape), name
        assert (jax.random.key_data(found[name]) == jax.random.key_data(wanted)).all(), name


def resume(store: Path, target: Any, wanted: Any) -> None:
    """Restore a store by shardckpt.jax and compare."""
    import jax

    from shardckpt.jax import Checkpointer

    def words(value: Any) -> Any:
        is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(
            value.dtype, jax.dtypes.prng_key
        )
        return jax.random.key_data(value) if is_key else value

    with Checkpointer(store) as checkpointer:
        found = checkpointer.restore(target)
    assert found is not None
    same(jax.tree.map(words, found.state), jax.tree.map(words, wanted))


def resume_standard(store: Path) -> None:
    """Restore what was `tree()` in Orbax."""
    resume(store, tree(seed=5), tree())


def resume_keys(store: Path) -> None:
    """Restore what were typed random keys in Orbax."""
    import jax

    def keys(seed: int) -> dict[str, Any]:
        many = jax.random.split(jax.random.key(seed + 1, impl="rbg"), 4)
        return {"plain": jax.random.key(seed), "many": many}

    resume(store, keys(7), keys(0))


def restore_odd(item: Path) -> None:
    """Restore what Orbax itself refuses to save, and what only other frameworks save."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(item)
    assert found["none"].shape == (0, 4)
    assert found["layer.bias"].shape == (70,)
    assert found["progress"] == {"step": 3, "seen": [3, 4]}, found["progress"]


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    commands = {
        "write": write, "restore": restore, "restore_manager": restore_manager,
        "restore_keys": restore_keys, "restore_odd": restore_odd,
        "resume_standard": resume_standard, "resume_keys": resume_keys,
    }  # fmt: skip
    commands[sys.argv[1]](Path(sys.argv[2]))
