"""What one process of a JAX job does in the tests; at the top level of a module, to be spawned."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardckpt.coord.base import wait_for
from shardckpt.errors import DeadlineError, ShardckptError
from shardckpt.jax import Checkpointer, load, private
from shardckpt.jax.coord import JaxCoord, default_coord
from shardckpt.save import background
from shardckpt.state import PerRank

if TYPE_CHECKING:
    from shardckpt.testing.ranks import RankContext

DEVICES_PER_PROCESS = 4
SHAPE = (16, 24, 8)
MESHES = {
    "line": ((8,), ("x",)),
    "grid": ((4, 2), ("x", "y")),
    "cube": ((2, 2, 2), ("x", "y", "z")),
    "quarter": ((2, 2), ("x", "y")),
}
SPECS = {
    "line": [("x",), (None, "x"), ()],
    "grid": [("x", "y"), ("y",), (("x", "y"),), (("y", "x"),), (None, None, "y"), ()],
    "cube": [("x", "y", "z"), ("z", None, "x"), (None, ("x", "z")), ("y",), ()],
    "quarter": [("x", "y"), (None, "y"), (("y", "x"),), ()],
}
LARGE = (1024, 1024)


def values(number: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).standard_normal(shape, np.float32)


def mesh_of(name: str, *, reverse: bool = False) -> Mesh:
    shape, axes = MESHES[name]
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return Mesh((devices[::-1] if reverse else devices).reshape(shape), axes)


def arrays_on(name: str, *, reverse: bool = False) -> dict[str, Any]:
    """Return one array for each PartitionSpec, of values that depend on its position only."""
    mesh = mesh_of(name, reverse=reverse)
    found: dict[str, Any] = {}
    for number, spec in enumerate(itertools.islice(itertools.cycle(SPECS[name]), 6)):
        found[f"a{number}"] = put(values(number), NamedSharding(mesh, PartitionSpec(*spec)))
    found["scalar"] = put(np.float32(7), NamedSharding(mesh, PartitionSpec()))
    found["empty"] = put(
        np.zeros((0, 8), np.float32), NamedSharding(mesh, PartitionSpec(None, "x"))
    )
    return found


def put(whole: Any, sharding: NamedSharding) -> jax.Array:
    whole = np.asarray(whole)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def blank(state: dict[str, Any]) -> dict[str, Any]:
    return {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in state.items()
    }


def check_arrays(found: dict[str, Any], like: dict[str, Any]) -> None:
    for number in range(6):
        array = found[f"a{number}"]
        assert array.sharding == like[f"a{number}"].sharding
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), values(number)[shard.index])
    for shard in found["scalar"].addressable_shards:
        assert float(np.asarray(shard.data)) == 7
    assert found["empty"].shape == (0, 8)


def join(told: RankContext, **options: Any) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
    jax.distributed.initialize(
        f"127.0.0.1:{told.port}", told.world_size, told.rank, initialization_timeout=60, **options
    )


def save_and_load_every_mesh(told: RankContext, root: str) -> dict[str, Any]:
    """Save on every mesh, load each into every other; return what this process wrote."""
    join(told)
    names = ["line", "grid", "cube"]
    for name in names:
        with Checkpointer(f"{root}/{name}", timeout_s=30) as ckpt:
            ckpt.save(1, {"arrays": arrays_on(name), "seed": PerRank(told.rank, "error")})
    for source, target in itertools.product(names, names):
        like = arrays_on(target, reverse=True)
        state = {"arrays": blank(like), "seed": PerRank(-1, "error")}
        restored = load(f"{root}/{source}", state, timeout_s=30)
        check_arrays(restored.state["arrays"], like)
        assert restored.state["seed"].value == told.rank
        # Copies of one process are read once; the job reads each byte once but for rounding.
        assert restored.stats.needed_bytes <= 6 * values(0).nbytes + 4
    split = save_large(told, root)
    told_mesh_of_one = one_process_only(told, root)
    coord_check = coordinate(told)
    jax.distributed.shutdown()
    return {**split, **told_mesh_of_one, **coord_check}


def save_large(told: RankContext, root: str) -> dict[str, Any]:
    """Save what all devices hold whole; the bytes are to be shared out."""
    mesh = mesh_of("grid")
    state = {
        f"w{i}": put(values(i, LARGE), NamedSharding(mesh, PartitionSpec())) for i in range(2)
    } | {
        f"s{i}": put(values(i, (64, 64)), NamedSharding(mesh, PartitionSpec("y"))) for i in range(9)
    }
    with Checkpointer(f"{root}/large", timeout_s=30) as ckpt:
        ckpt.save(1, {"p": state})
        ckpt.wait()
    files = Path(f"{root}/large").rglob(f"rank-{told.rank:05d}.*.shard")
    return {"written": sum(file.stat().st_size for file in files)}


def one_process_only(told: RankContext, root: str) -> dict[str, Any]:
    """Host-local copies under one key, and an array that lies on the last process alone."""
    last = Mesh(np.array(jax.devices()[-DEVICES_PER_PROCESS:]), ("x",))
    stage = values(3, (8, 4))
    sharding = NamedSharding(last, PartitionSpec("x"))
    parts = [
        jax.device_put(stage[index], device)
        for device, index in sharding.addressable_devices_indices_map(stage.shape).items()
    ]
    array = jax.make_array_from_single_device_arrays(
        stage.shape, sharding, parts, dtype=stage.dtype
    )
    own = jax.device_put(values(4, (5,)), jax.local_devices()[0])
    state = {"stage": array, "own": own, "host": values(5, (3,))}
    with Checkpointer(f"{root}/one", timeout_s=30) as ckpt:
        ckpt.save(1, state)
        restored = ckpt.restore(state)
    assert restored is not None
    for shard in restored.state["stage"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), stage[shard.index])
    np.testing.assert_array_equal(np.asarray(restored.state["own"]), values(4, (5,)))
    np.testing.assert_array_equal(restored.state["host"], values(5, (3,)))
    return {"stage_shards": len(restored.state["stage"].addressable_shards)}


def coordinate(told: RankContext) -> dict[str, Any]:
    """Keys, large values and deletion over the real store, from this and from another thread."""
    coord = default_coord(10)
    assert isinstance(coord, JaxCoord)
    assert (coord.rank, coord.world_size) == (told.rank, 2)
    other = 1 - told.rank
    assert coord.get("absent") is None
    for size in (0, 1, 9 << 20):
        coord.set(f"a/{size}/{told.rank}", bytes([told.rank]) * size)
        got = wait_for(coord, f"a/{size}/{other}", what="the other's value", timeout_s=20)
        assert got == bytes([other]) * size
    coord.set(f"b/{told.rank}", b"1")
    coord.set(f"b/{told.rank}", b"2")
    coord.set(f"b/{told.rank}/below", b"3")
    coord.delete(f"b/{told.rank}")
    coord.delete(f"b/{told.rank}")
    # Deleting a key leaves alone what looks as if it lay below it.
    return {"after": (coord.get(f"b/{told.rank}"), coord.get(f"b/{told.rank}/below"))}


def load_two(told: RankContext, root: str) -> float:
    """Load what one process saved on other meshes; then be without the other process."""
    join(told)
    for source, target in itertools.product(["grid", "quarter"], ["line", "grid", "cube"]):
        like = arrays_on(target)
        restored = load(f"{root}/{source}", {"arrays": blank(like)}, timeout_s=30)
        check_arrays(restored.state["arrays"], like)
    waited_s = save_alone(told, root)
    jax.distributed.shutdown()
    return waited_s


def save_alone(told: RankContext, root: str) -> float:
    """Process 1 never calls save; the deadline must name it."""
    state = arrays_on("line")
    waited_s = 0.0
    ckpt = Checkpointer(f"{root}/alone", timeout_s=2)
    if told.rank == 0:
        started = time.monotonic()
        handle = ckpt.save(1, {"arrays": state})
        with pytest.raises(DeadlineError, match="rank 1 of 2"):
            handle.wait()
        waited_s = time.monotonic() - started
    try:
        ckpt.close()
    except ShardckptError:
        assert told.rank == 0
    return waited_s


def die_in_a_save(told: RankContext, root: str, victim: int) -> None:
    """Commit step 1; in the save of step 2 the victim dies once its files are written."""
    join(told, shutdown_timeout_seconds=5)
    arrays = arrays_on("grid")
    ckpt = Checkpointer(root, timeout_s=3)
    ckpt.save(1, {"arrays": arrays, "step": 1})
    ckpt.wait()
    if told.rank == victim:
        write = background.write_files

        def write_and_die(*arguments: Any, **options: Any) -> Any:
            write(*arguments, **options)
            written = [str(file) for file in Path(root).glob(f"step-*2.*/rank-{told.rank:05d}.*")]
            (told.directory / "dying").write_text("\n".join(written))
            os.kill(os.getpid(), signal.SIGKILL)

        background.write_files = write_and_die
    handle = ckpt.save(2, {"arrays": arrays, "step": 2})
    try:
        handle.wait(20)
    except ShardckptError as error:
        (told.directory / f"error-{told.rank}").write_text(f"{type(error).__name__}: {error}")
        # The runtime's own shutdown would wait for the dead process.
        os._exit(3)
    os._exit(4)


def store_stops(told: RankContext) -> None:
    """Process 0, which serves the store, stops; a call of process 1 ends at its deadline."""
    join(told, shutdown_timeout_seconds=5)
    coord = JaxCoord(private.client(), told.rank, 2, timeout_s=0.5)
    if told.rank == 0:
        coord.set("process", str(os.getpid()).encode())
        wait_for(coord, "stop", what="the word to stop", timeout_s=20)
        time.sleep(0.3)  # This process is the store, too: its answer to the set goes out first.
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(4)
    server = int(wait_for(coord, "process", what="process 0", timeout_s=20))
    coord.set("stop", b"")
    while Path(f"/proc/{server}/stat").read_text().split()[2] != "T":
        time.sleep(0.01)
    started = time.monotonic()
    try:
        coord.get("process")
    except DeadlineError as error:
        coord.delete("process")
        said = f"{time.monotonic() - started:.1f} {error}"
    else:
        said = "0 it answered"
    (told.directory / "said").write_text(said)
    os.kill(server, signal.SIGKILL)
    os._exit(3)
