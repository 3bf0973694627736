"""Rank functions of the tests of loads together: top level, because spawn finds them by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardckpt.checkpointer import CheckpointerCore, load_once
from shardckpt.coord.file import FileCoord
from shardckpt.errors import ShardckptError
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load import links, shared
from shardckpt.load.loader import LoadOptions, LoadStats
from shardckpt.load.together import Together
from shardckpt.storage.fileops import PosixFileOps
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.open import open_storage
from shardckpt.testing.arrays import ArrayBackend, Sharded, shard_of
from shardckpt.testing.jobs import JobOptions, open_job

if TYPE_CHECKING:
    from shardckpt.coord.base import Coord
    from shardckpt.testing.ranks import RankContext

SHAPES = ((1536, 1000), (3000, 257), (64,))
LAYOUTS = {
    "rows": MeshLayout((4,), (0, 1, 2, 3), ((0,),)),
    "columns": MeshLayout((4,), (0, 1, 2, 3), ((), (0,))),
    "hsdp": MeshLayout((2, 2), (0, 1, 2, 3), ((1,),)),
    "ddp": None,
}


def arrays(num_copies: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f"{i}/{shape}": rng.standard_normal(shape).astype(np.float32)
        for i in range(num_copies)
        for shape in SHAPES
    }


def unique_bytes(num_copies: int = 1) -> int:
    return sum(value.nbytes for value in arrays(num_copies).values())


def state(name: str, rank: int, *, blank: bool, num_copies: int = 1) -> dict[str, Any]:
    layout = LAYOUTS[name]
    found: dict[str, Any] = {}
    for key, value in arrays(num_copies).items():
        if layout is None or value.ndim == 1:
            found[key] = np.full_like(value, -1) if blank else value
        else:
            found[key] = shard_of(value, layout, rank)
            if blank:
                found[key].parts[0][1][...] = -1
    return found


def memory(value: Any) -> np.ndarray:
    return value.parts[0][1] if isinstance(value, Sharded) else value


def coord_of(told: RankContext, job: str) -> Coord:
    storage = LocalStorage(told.directory / "coord", ops=PosixFileOps(flush=False))
    storage.prepare()
    return FileCoord(storage, told.rank, told.world_size, job=job)


def save(told: RankContext, store: Path, name: str, num_copies: int = 1) -> None:
    coord = coord_of(told, f"save {store.name}")
    core: CheckpointerCore = open_job(open_storage(store), coord, JobOptions())
    core.save(1, state(name, told.rank, blank=False, num_copies=num_copies))
    core.close()


def load(
    coord: Coord, store: Path, name: str, together: Together, *, timeout_s: float = 30.0,
    num_copies: int = 1, job: str = "load",
) -> LoadStats:  # fmt: skip
    """Load in a layout, and compare."""
    mine = state(name, coord.rank, blank=True, num_copies=num_copies)
    stats = load_once(
        open_storage(store), ArrayBackend(), coord, mine, step=None, options=LoadOptions(),
        timeout_s=timeout_s, namespace=job, environment={}, together=together,
    ).stats  # fmt: skip
    for key, value in state(name, coord.rank, blank=False, num_copies=num_copies).items():
        assert memory(mine[key]).tobytes() == memory(value).tobytes(), key
    return stats


def load_each_way(told: RankContext, store: Path) -> dict[str, LoadStats]:
    """Save in every layout, and load every save in every layout."""
    found: dict[str, LoadStats] = {}
    for saved in LAYOUTS:
        save(told, store / saved, saved)
        for name in LAYOUTS:
            job = f"{saved} to {name}"
            found[job] = load(coord_of(told, job), store / saved, name, Together(), job=job)
    return found


def outcome(call: Any) -> tuple[str, str, float]:
    """Return which error a call raises, its words, and after how many seconds."""
    started = time.monotonic()
    try:
        call()
    except ShardckptError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "none", "", time.monotonic() - started


def load_damaged(told: RankContext, store: Path) -> tuple[str, str, float]:
    save(told, store, "rows")
    coord = coord_of(told, "load")
    if told.rank == 0:
        damage(store)
        (told.directory / "damaged").touch()
    wait_for(told.directory / "damaged")
    return outcome(lambda: load(coord, store, "ddp", Together()))


def damage(store: Path) -> None:
    """Flip a byte in the middle of one rank's file."""
    path = next(iter(sorted(store.rglob("rank-00002.0.shard"))))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def wait_for(path: Path, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def after_calls(num_calls: int, then: Any) -> None:
    """Let the reader of batches do something before it reads its next one."""
    real = shared.read_to
    calls: list[int] = []

    def read(*args: Any) -> None:
        calls.append(1)
        if len(calls) == num_calls:
            then()
        real(*args)

    shared.read_to = read


def load_while_one_dies(told: RankContext, store: Path) -> tuple[str, str, float]:
    save(told, store, "rows", num_copies=4)
    if told.rank == 2:
        after_calls(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return outcome(lambda: load(coord_of(told, "load"), store, "ddp", Together(), num_copies=4))


def load_while_one_hangs(told: RankContext, store: Path) -> tuple[str, str, float]:
    save(told, store, "rows", num_copies=4)
    given_up = told.directory / "given-up"
    coord = coord_of(told, "load")
    if told.rank == 2:
        after_calls(2, lambda: wait_for(given_up))
    timeout_s = 30.0 if told.rank == 2 else 1.0
    found = outcome(
        lambda: load(coord, store, "ddp", Together(), timeout_s=timeout_s, num_copies=4)
    )
    given_up.touch()
    return found


def load_without_links(told: RankContext, store: Path, hosts: list[str]) -> LoadStats:
    """Rank 1 cannot be reached."""
    save(told, store, "rows")
    if told.rank == 1:
        links.Door._meet = refuse
    links.LINK_TIMEOUT_S = 1.0
    return load(coord_of(told, "load"), store, "ddp", Together(host=hosts[told.rank]))


def refuse(*_args: object) -> None:
    raise OSError("refused")


def load_within_memory(told: RankContext, store: Path) -> int:
    """Return the most shared memory that was resident during a load, in bytes."""
    save(told, store, "ddp", num_copies=12)
    coord = coord_of(told, "load")
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssShmem:"):
                    most = max(most, int(line.split()[1]) * 1024)
            done.wait(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        load(coord, store, "ddp", Together(), num_copies=12)
    finally:
        done.set()
        thread.join()
    return most
