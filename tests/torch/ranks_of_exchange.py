"""Rank functions of the tests of loads across hosts: ranks of one machine say they are apart."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from shardckpt.checkpointer import load_once
from shardckpt.errors import ShardckptError
from shardckpt.load import shared
from shardckpt.load.loader import LoadOptions, LoadStats
from shardckpt.load.together import Together
from shardckpt.storage.open import open_storage
from shardckpt.testing.arrays import ArrayBackend
from shardckpt.testing.jobs import JobOptions, open_job
from shardckpt.torch.coord import default_coord
from shardckpt.torch.exchange import GlooExchange, default_exchange

if TYPE_CHECKING:
    from pathlib import Path

    from shardckpt.testing.ranks import RankContext

TIMEOUT_S = 30.0


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {f"a{i}": rng.standard_normal((1536, 1000)).astype(np.float32) for i in range(6)}


def unique_bytes() -> int:
    return sum(value.nbytes for value in arrays().values())


def join(told: RankContext) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{told.port}", rank=told.rank,
        world_size=told.world_size, timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip


def save(store: Path) -> None:
    coord = default_coord(TIMEOUT_S)
    core = open_job(open_storage(store), coord, JobOptions(timeout_s=TIMEOUT_S))
    core.save(1, arrays())
    core.close()


def load(
    store: Path,
    job: str,
    host: str,
    timeout_s: float = TIMEOUT_S,
    began: list[float] | None = None,
) -> LoadStats:
    """Load, and say when the connection stood and the load itself began."""
    mine: dict[str, Any] = {key: np.full_like(value, -1) for key, value in arrays().items()}
    coord = default_coord(timeout_s)
    # A new connection to torch's store may take seconds here, which is no time of the load.
    coord.set(f"here/{job}/{dist.get_rank()}", b"1")
    if began is not None:
        began.append(time.monotonic())
    try:
        stats = load_once(
            open_storage(store), ArrayBackend(), coord, mine, step=None, options=LoadOptions(),
            timeout_s=timeout_s, namespace=job, environment={},
            together=Together(default_exchange(timeout_s), host),
        ).stats  # fmt: skip
    finally:
        coord.close()
    for key, value in arrays().items():
        assert mine[key].tobytes() == value.tobytes(), key
    return stats


def outcome(call: Any) -> tuple[str, str, float]:
    """Return the error of `call(began)` and the seconds it took from the time it says it began."""
    began: list[float] = []
    try:
        call(began)
    except ShardckptError as error:
        return type(error).__name__, str(error), time.monotonic() - began[0]
    return "none", "", time.monotonic() - began[0]


def load_across_hosts(told: RankContext, store: Path) -> dict[str, Any]:
    join(told)
    save(store)
    found: dict[str, Any] = {}
    for hosts in ("abcd", "aabb"):
        found[hosts] = load(store, hosts, f"{store}/{hosts[told.rank]}")
    connect = GlooExchange.connect
    if told.rank == 1:
        GlooExchange.connect = _refuse
    # The others' half of making a group must not wait for the one that refuses.
    else:
        GlooExchange.connect = _pass
    found["refused"] = load(store, "refused", f"{store}/{told.rank}")
    GlooExchange.connect = connect
    dist.barrier()
    if told.rank == 0:
        path = sorted(store.rglob("rank-00002.0.shard"))[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    found["damaged"] = outcome(
        lambda began: load(store, "damaged", f"{store}/{told.rank}", began=began)
    )
    # The trainer's own group has not noticed.
    total = torch.tensor([told.rank])
    dist.all_reduce(total)
    found["sum"] = int(total)
    found["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("shardckpt-")]
    dist.barrier()
    dist.destroy_process_group()
    return found


def _refuse(_self: GlooExchange) -> None:
    raise RuntimeError("no route")


def _pass(_self: GlooExchange) -> None:
    return


def load_while_a_host_dies(told: RankContext, store: Path) -> tuple[str, str, float]:
    join(told)
    save(store)
    if told.rank == 2:
        real = shared.read_to
        calls: list[int] = []

        def read(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        shared.read_to = read
    found = outcome(lambda began: load(store, "dies", f"{store}/{told.rank}", began=began))
    sys.stdout.flush()
    return found


def load_while_hosts_connect_and_one_dies(told: RankContext, store: Path) -> tuple[str, str, float]:
    join(told)
    save(store)
    if told.rank == 2:
        GlooExchange.connect = lambda _self: os.kill(os.getpid(), signal.SIGKILL)
    return outcome(
        lambda began: load(store, "dies", f"{store}/{told.rank}", timeout_s=8.0, began=began)
    )
