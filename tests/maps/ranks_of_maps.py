"""What processes of torch and of JAX do in the tests of maps; none of them imports the other.

At the top level of a module, to be spawned. Every rank writes what it holds as plain numpy, and the
test compares that by `plain.py` of examples/cross, which does not use the map.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from gpt_map import gpt_map

from shardckpt import StateMismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from shardckpt.testing.ranks import RankContext

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 2, 24, 4, 8, 256
MAP = gpt_map(HEADS)
STEPS = 3
EPOCHS = 7


def torch_saves(told: RankContext, root: str) -> None:
    """Save the start, then a trained state with a schedule; both ranks hold half of everything."""
    import torch

    from shardckpt.torch import Checkpointer

    _join(told)
    model, optimizer = _sharded_gpt(seed=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    schedule.last_epoch = EPOCHS
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    with Checkpointer(root, timeout_s=30) as checkpointer:
        checkpointer.save(0, state)
        for _ in range(STEPS):
            model(torch.arange(CONTEXT)[None] + told.rank).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpointer.save(STEPS, state)
    _write_torch(model, optimizer, told.directory / "torch.npz")
    _leave(told)


def torch_loads(told: RankContext, root: str) -> None:
    """Load what JAX saved: once cut by rows, once cut along the last dim of every array."""
    from shardckpt.torch import load

    _join(told)
    for name, dim in (("rows", 0), ("columns", -1)):
        model, optimizer = _sharded_gpt(seed=1, dim=dim)
        load(root, {"model": model, "optimizer": optimizer}, map=MAP, timeout_s=30)
        _write_torch(model, optimizer, told.directory / f"{name}.npz")
    _leave(told)


def jax_loads_and_saves(told: RankContext, root: str, back: str) -> None:
    """Load what torch saved on a line and on a grid of devices, and save it as JAX does."""
    import jax
    import optax

    from shardckpt.jax import Checkpointer, load

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for name, shape in (("line", (8,)), ("grid", (4, 2))):
        state = _blank_jax(shape)
        found = load(root, state, map=MAP, timeout_s=30).state
        _write_jax(found, told.directory / f"{name}.npz")
        where = jax.tree.map(lambda x: x.sharding, found)
        assert where == jax.tree.map(lambda x: x.sharding, state)
        # The number of epochs of torch's schedule, not the number of updates.
        assert int(optax.tree_utils.tree_get(found, "ScaleByScheduleState").count) == EPOCHS
    start = load(root, state, step=0, map=MAP, timeout_s=30).state
    _write_jax(start, told.directory / "start.npz")
    with Checkpointer(back, timeout_s=30) as checkpointer:
        checkpointer.save(STEPS, found)
        again = checkpointer.restore(state, map=MAP)
    assert again is not None
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), again.state, found)
    assert all(jax.tree.leaves(same)), "a checkpoint of the own framework went through the map"
    _wrong_maps(root, state, load)
    assert "torch" not in sys.modules


def _wrong_maps(root: str, state: Any, load: Any) -> None:
    with _Mismatch("params/blocks/0/qkv/kernel"):
        load(root, state, map=gpt_map(2 * HEADS), timeout_s=30)
    with _Mismatch("params/tokens/embedding"):
        load(root, state, timeout_s=30)


class _Mismatch:
    """Expects the error that names this key."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        assert isinstance(error, StateMismatchError), error
        assert self._key in str(error)
        return True


def _join(told: RankContext) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{told.port}",
        rank=told.rank, world_size=told.world_size,
    )  # fmt: skip


def _leave(told: RankContext) -> None:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    assert "jax" not in sys.modules


def _sharded_gpt(seed: int, dim: int = 0) -> tuple[Any, Any]:
    import torch
    import torch.distributed as dist
    from gpt import GPT
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    torch.manual_seed(seed)
    model = GPT(LAYERS, WIDTH, HEADS, CONTEXT)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(
            module, mesh=mesh, shard_placement_fn=lambda param: Shard(dim % param.dim())
        )  # fmt: skip
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _blank_jax(mesh_shape: tuple[int, ...]) -> Any:
    """Return shapes and shardings of the twin; of every array as many dims are cut as divide."""
    import gpt_jax
    import jax
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(mesh_shape), ("x", "y")[: len(mesh_shape)])

    def fresh() -> Any:
        params = gpt_jax.blank(VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 0.1))
        return {"params": params, "opt_state": optimizer.init(params)}

    def on_mesh(x: Any) -> Any:
        free = list(mesh.shape.items())
        spec: list[str | None] = []
        for size in x.shape:
            fits = next((axis for axis in free if size % axis[1] == 0), None)
            if fits is not None:
                free.remove(fits)
            spec.append(fits and fits[0])
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    return jax.tree.map(on_mesh, jax.eval_shape(fresh))


def _write_torch(model: Any, optimizer: Any, path: Path) -> None:
    import torch.distributed as dist

    arrays: dict[str, Any] = {}
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        for what, tensor in (
            ("parameter", param), ("moment 1", state["exp_avg"]), ("moment 2", state["exp_avg_sq"])
        ):  # fmt: skip
            arrays[f"{what} {name}"] = tensor.detach().full_tensor().numpy()
        arrays[f"steps {name}"] = np.asarray(int(state["step"]))
    if dist.get_rank() == 0:
        np.savez(path, **arrays)


def _write_jax(state: Any, path: Path) -> None:
    import jax
    import optax

    adam = optax.tree_utils.tree_get(state["opt_state"], "ScaleByAdamState")
    arrays: dict[str, Any] = {"steps": np.asarray(int(adam.count))}
    for what, tree in (
        ("parameter", state["params"]),
        ("moment 1", adam.mu),
        ("moment 2", adam.nu),
    ):
        for at, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            arrays[f"{what} {'.'.join(part.key for part in at)}"] = np.asarray(leaf)
    np.savez(path, **arrays)
