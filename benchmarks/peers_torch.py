"""The side of torch in peers.py: one FSDP2 state on two ranks, saved and loaded by whoever can.

torch.save, safetensors and torchsnapshot know no DTensor: they get what each rank holds, under a
name of its own, which only as many ranks can load. Runs in the ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from blocking import DcpSave, TorchSave
from files import flush_names, flush_share, keep_only, size_of
from harness import drop_from_cache, read_into_cache, say
from save_load import Trainee
from systems import OURS, PEERS, Dcp, Shardckpt
from torch import distributed
from torch_job import join_gloo, together

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from overhead_runs import Saves

    from shardckpt.testing.ranks import RankContext

DCP_SAVE: Final = "dcp.save"
DCP_ASYNC: Final = "dcp.async_save, thread"
TORCH_SAVE: Final = "torch.save, file per rank"
SAFETENSORS: Final = "safetensors, file per rank"
TORCHSNAPSHOT: Final = "torchsnapshot async_take, local shards"
BYTECHECKPOINT: Final = "ByteCheckpoint, default"
NAMES: Final = (
    OURS, DCP_SAVE, DCP_ASYNC, TORCH_SAVE, SAFETENSORS, TORCHSNAPSHOT, BYTECHECKPOINT,
)  # fmt: skip
CHILD_TIMEOUT_S: Final = 10.0
ASYNC_WAY: Final = "dcp thread, cached, staged in background, plan cached"


class Peer:
    """A directory per step; what is the same for the three below."""

    def __init__(self, trainee: Trainee, root: Path) -> None:
        """Take the state and a new directory; all ranks."""
        self.trainee, self.root, self.step = trainee, root, 0
        root.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int) -> Path:
        """Return a new directory for a step."""
        self.step = step
        at = self.root / str(step)
        at.mkdir(exist_ok=True)
        return at

    @property
    def newest(self) -> Path:
        """Return the directory of the last save."""
        return self.root / str(self.step)


@dataclass(frozen=True, slots=True)
class Entry:
    """One system, as it is measured.

    Attributes:
        save: Begin a save; returns when the call does.
        may_change: Return when the state may be changed.
        wait: Return when the save is done.
        load: Fill the state.
        newest: Where the last save lies.
        tidy: Delete older saves; rank 0 alone.
        close: End it.
    """

    save: Callable[[int], object]
    may_change: Callable[[], object]
    wait: Callable[[], object]
    load: Callable[[], object]
    newest: Callable[[], Path]
    tidy: Callable[[], object]
    close: Callable[[], object]


def _nothing() -> None:
    """Stand for what a system need not do."""


def _of_system(system: Saves, newest: Callable[[], Path]) -> Entry:
    return Entry(
        system.save, system.before_update, system.wait, system.load, newest, system.tidy,
        system.close,
    )  # fmt: skip


def open_ours(trainee: Trainee, place: Path) -> Entry:
    """Return shardckpt: the state may change after a fence, which nothing hides here."""
    ours = Shardckpt(trainee, place)
    return Entry(
        ours.save, ours.fence, ours.wait, ours.load,
        lambda: max((place / OURS).glob("step-*")), ours.tidy, ours.close,
    )  # fmt: skip


def open_dcp_save(trainee: Trainee, place: Path) -> Entry:
    """Return `dcp.save`."""
    system = DcpSave(trainee, place)
    return _of_system(system, lambda: system.newest)


def open_dcp_async(trainee: Trainee, place: Path) -> Entry:
    """Return `dcp.async_save` in a thread, in the setting that stalls least."""
    make_stager, kind = PEERS[ASYNC_WAY]
    system = Dcp(trainee, place, ASYNC_WAY, make_stager(), kind)
    return _of_system(system, lambda: system.newest)


def open_torch_save(trainee: Trainee, place: Path) -> Entry:
    """Return `torch.save`."""
    system = TorchSave(trainee, place)
    return _of_system(system, lambda: system.newest)


def open_safetensors(trainee: Trainee, place: Path) -> Entry:
    """Return safetensors: a file per rank; loads copy tensor by tensor into the state."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    peer = Peer(trainee, place / "safetensors")
    tensors = {str(i): value for i, value in enumerate(trainee.locals)}
    name = f"rank-{distributed.get_rank()}.safetensors"

    def save(step: int) -> None:
        save_file(tensors, peer.begin(step) / name)

    def load() -> None:
        with safe_open(peer.newest / name, framework="pt") as file:
            for key, value in tensors.items():
                value.copy_(file.get_tensor(key))

    return Entry(
        save, _nothing, _nothing, load, lambda: peer.newest, lambda: keep_only(peer.newest),
        _nothing,
    )  # fmt: skip


def open_torchsnapshot(trainee: Trainee, place: Path) -> Entry:
    """Return torchsnapshot; its own group is gloo."""
    from torchsnapshot import Snapshot, StateDict

    peer = Peer(trainee, place / "torchsnapshot")
    state = {"state": StateDict(tensors={str(i): v for i, v in enumerate(trainee.locals)})}
    group: Any = distributed.new_group(backend="gloo")
    pending: list[Any] = []

    def save(step: int) -> None:
        pending.append(Snapshot.async_take(str(peer.begin(step)), state, pg=group))

    def load() -> None:
        Snapshot(str(peer.newest), pg=group).restore(state)
        loaded = state["state"]["tensors"]
        for i, value in enumerate(trainee.locals):
            if loaded[str(i)].data_ptr() != value.data_ptr():
                value.copy_(loaded[str(i)])

    return Entry(
        save, _nothing, lambda: pending.pop().wait(), load, lambda: peer.newest,
        lambda: keep_only(peer.newest), _nothing,
    )  # fmt: skip


def open_bytecheckpoint(trainee: Trainee, place: Path) -> Entry:
    """Return ByteCheckpoint for FSDP2."""
    import bytecheckpoint

    peer = Peer(trainee, place / "bytecheckpoint")
    state = {"model": trainee.model, "optimizer": trainee.optimizer}
    return Entry(
        lambda step: bytecheckpoint.save(str(peer.begin(step)), state, framework="fsdp2"),
        _nothing, _nothing,
        lambda: bytecheckpoint.load(str(peer.newest), state, framework="fsdp2"),
        lambda: peer.newest, lambda: keep_only(peer.newest), _nothing,
    )  # fmt: skip


OPENERS: Final[dict[str, Callable[[Trainee, Path], Entry]]] = {
    OURS: open_ours,
    DCP_SAVE: open_dcp_save,
    DCP_ASYNC: open_dcp_async,
    TORCH_SAVE: open_torch_save,
    SAFETENSORS: open_safetensors,
    TORCHSNAPSHOT: open_torchsnapshot,
    BYTECHECKPOINT: open_bytecheckpoint,
}


class Bench:
    """One rank's side."""

    def __init__(self, told: RankContext, place: Path, nbytes: int, names: tuple[str, ...]) -> None:
        """Make the state and open every system; each saves once, loads once and is compared."""
        self._told = told
        self.trainee = Trainee(nbytes, told.world_size)
        self.entries: dict[str, Entry] = {}
        self.unable: dict[str, str] = {}
        self.seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.disk_bytes: dict[str, int] = {}
        for name in names:
            try:
                entry = OPENERS[name](self.trainee, place)
                self._turn(name, entry, 0)
            except Exception as error:  # What cannot run here is told, not left out.
                self.unable[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            else:
                self.entries[name] = entry
        self.seconds.clear()

    def run(self, rounds: int) -> None:
        """Give every system its turns, the order swapped from round to round; all ranks."""
        for round_ in range(1, rounds + 1):
            names = list(self.entries)
            for name in names if round_ % 2 else names[::-1]:
                self._turn(name, self.entries[name], round_)
            if self._told.rank == 0:
                say(f"torch: round {round_} is done")

    def close(self) -> None:
        """End every system; all ranks."""
        for entry in self.entries.values():
            entry.close()
        distributed.destroy_process_group()
        # ByteCheckpoint leaves processes behind that would hold this one's output open.
        for child in multiprocessing.active_children():
            child.terminate()
            child.join(CHILD_TIMEOUT_S)

    def _turn(self, name: str, entry: Entry, step: int) -> None:
        told, seconds = self._told, self.seconds[name]
        distributed.barrier()
        began = time.perf_counter()
        entry.save(step)
        entry.may_change()
        blocked_s = time.perf_counter() - began
        entry.wait()
        distributed.barrier()
        if name != OURS:
            flush_share(entry.newest(), told.rank, told.world_size)
            if told.rank == 0:
                flush_names(entry.newest())
            distributed.barrier()
        seconds["save"].append(time.perf_counter() - began)
        blocks = torch.tensor([blocked_s], dtype=torch.float64)
        distributed.all_reduce(blocks, distributed.ReduceOp.MAX)
        seconds["blocks"].append(float(blocks))
        if told.rank == 0:
            entry.tidy()
            os.sync()
            self.disk_bytes[name] = size_of(entry.newest())
        distributed.barrier()
        for kind, prepare in (("load cold", drop_from_cache), ("load warm", read_into_cache)):
            self.trainee.forget()
            if told.rank == 0:
                prepare(entry.newest())
            seconds[kind].append(together(entry.load))
            self.trainee.check(f"{name}, {kind}")


def measure(
    told: RankContext, place: Path, nbytes: int, rounds: int, names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the seconds of every timed part; all ranks."""
    torch.manual_seed(told.rank)
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    join_gloo(told)
    bench = Bench(told, place, nbytes, names)
    bench.run(rounds)
    bench.close()
    return {
        "seconds": {name: dict(of) for name, of in bench.seconds.items()},
        "unable": bench.unable, "disk_bytes": bench.disk_bytes,
        "rank_bytes": bench.trainee.rank_bytes,
    }  # fmt: skip
