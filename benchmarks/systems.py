"""Who saves in the background: shardckpt and every way of `dcp.async_save`.

Each DCP system is used as its documentation says: a process group of its own, a stager that lives
as long as the job where it caches, and the staging awaited before the optimizer's update. DCP gets
its state dict for free.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from typing import TYPE_CHECKING, Any, Final, Protocol

from files import keep_only
from harness import wait_for_retention
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import (
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
)

from shardckpt.options import Retention, Staging
from shardckpt.torch import Checkpointer, load

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from torch.distributed.checkpoint.staging import AsyncStager

    from shardckpt.torch import SaveHandle

OURS: Final = "shardckpt"
KEPT_STEPS: Final = 2  # Retention never leaves fewer than two good steps.


class Saved(Protocol):
    """What is saved.

    Attributes:
        state: As shardckpt takes it.
        state_dict: As DCP takes it.
    """

    state: dict[str, Any]
    state_dict: dict[str, Any]


class System(Protocol):
    """One way to save a training state in the background."""

    def wait(self) -> None:
        """Return when the save before is durable: back-pressure, where it was not yet."""

    def save(self, step: int) -> None:
        """Begin a save; all ranks."""

    def before_update(self) -> None:
        """Return when the optimizer may change the state."""

    def is_durable(self) -> bool:
        """Return whether the last save is durable, as this rank knows."""

    def is_drained(self) -> bool:
        """Return whether nothing goes on in the background any more."""

    def child_cpu_s(self) -> float:
        """Return the processor seconds of the system's own processes."""

    def tidy(self) -> None:
        """Delete what is not needed, untimed; rank 0 alone."""

    def close(self) -> None:
        """End it; all ranks."""


class Shardckpt:
    """What is judged."""

    in_flight: Final = 2

    def __init__(self, trainee: Saved, place: Path, *, overlap: bool = True) -> None:
        """Open the store; all ranks."""
        self._trainee = trainee
        self._place = place / (OURS if overlap else f"{OURS}-block")
        self._checkpointer = Checkpointer(
            self._place, retention=Retention(last=KEPT_STEPS), staging=Staging(overlap=overlap)
        )
        self._handle: SaveHandle | None = None
        self._before: SaveHandle | None = None

    def step_began(self, step: int) -> None:
        """Tell the checkpointer, as a training loop does."""
        self._checkpointer.should_save(step)

    def make_room(self) -> None:
        """Return when the save before the last is committed: two may be in flight."""
        if self._before is not None:
            self._before.wait()

    def wait(self) -> None:
        """Return when the save before is committed."""
        if self._handle is not None:
            self._handle.wait()

    def save(self, step: int) -> None:
        """Begin a save."""
        self._before = self._handle
        self._handle = self._checkpointer.save(step, self._trainee.state)

    def before_update(self) -> None:
        """Do nothing: the checkpointer has a hook of its own."""

    def fence(self) -> None:
        """Return when the state may change, without an optimizer that asks for it."""
        self._checkpointer.fence()

    def is_durable(self) -> bool:
        """Return whether the step is committed."""
        return self._handle is None or self._handle.committed.done()

    def is_drained(self) -> bool:
        """Return whether the step that fell out of retention is gone, too."""
        return self.is_durable() and len(list(self._place.glob("step-*"))) <= KEPT_STEPS

    def child_cpu_s(self) -> float:
        """Return 0: it has none."""
        return 0.0

    def tidy(self) -> None:
        """Return when retention has deleted what is not needed."""
        wait_for_retention(self._place, KEPT_STEPS)

    def close(self) -> None:
        """Wait for the last save."""
        self._checkpointer.close()

    def load(self) -> None:
        """Fill the state from the newest step."""
        load(self._place, self._trainee.state)


class Dcp:
    """`dcp.async_save` in one of its ways."""

    in_flight: Final = 1

    def __init__(
        self,
        trainee: Saved,
        place: Path,
        name: str,
        stager: AsyncStager | None,
        kind: AsyncCheckpointerType,
    ) -> None:
        """Make its process group; all ranks."""
        self._trainee = trainee
        self._place = place / name
        self._stager = stager
        self._kind = kind
        self._caches_plan = name.endswith("plan cached")
        self._group: Any = distributed.new_group(backend="gloo")
        self._staged: Future[None] | None = None
        self._durable: Future[Any] | None = None
        self._step = 0

    def step_began(self, step: int) -> None:
        """Do nothing."""

    def make_room(self) -> None:
        """Return when the save before is flushed."""
        self.wait()

    def wait(self) -> None:
        """Return when the last save is flushed."""
        if self._durable is not None:
            self._durable.result()

    def load(self) -> None:
        """Fill the state from the last save."""
        dcp.load(self._trainee.state_dict, checkpoint_id=self._place / str(self._step))

    def save(self, step: int) -> None:
        """Begin a save."""
        self._step = step
        answer = dcp.async_save(
            self._trainee.state_dict,
            checkpoint_id=self._place / str(step),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
            # The cache is the class's: only one system of a process may use it.
            planner=DefaultSavePlanner(enable_plan_caching=self._caches_plan),
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staged, self._durable = answer.staging_completion, answer.upload_completion
        else:
            self._staged, self._durable = None, answer

    def before_update(self) -> None:
        """Wait for asynchronous staging."""
        if self._staged is not None:
            self._staged.result()

    def is_durable(self) -> bool:
        """Return whether the files are flushed."""
        return self._durable is None or self._durable.done()

    def is_drained(self) -> bool:
        """Return the same: nothing else goes on."""
        return self.is_durable()

    def child_cpu_s(self) -> float:
        """Return what the kernel counts for the processes that this one started."""
        if self._kind is not AsyncCheckpointerType.PROCESS:
            return 0.0
        return sum(_cpu_s_of(child.pid) for child in multiprocessing.active_children())

    def tidy(self) -> None:
        """Delete all checkpoints but the last."""
        keep_only(self.newest)

    @property
    def newest(self) -> Path:
        """Return where the last save lies."""
        return self._place / str(self._step)

    def close(self) -> None:
        """Wait for the last save and release the stager's memory."""
        self.wait()
        if self._stager is not None:
            self._stager.close()


def _cpu_s_of(pid: int | None) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stager(*, shared: bool = False, background: bool = False) -> Callable[[], AsyncStager]:
    """Return what makes a stager that keeps its copies' memory from save to save."""
    return lambda: DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=background,
            use_non_blocking_copy=False,
        )
    )


THREAD: Final = AsyncCheckpointerType.THREAD
PROCESS: Final = AsyncCheckpointerType.PROCESS
PEERS: Final[dict[str, tuple[Callable[[], AsyncStager | None], AsyncCheckpointerType]]] = {
    "dcp thread": (lambda: None, THREAD),
    "dcp thread, cached": (_stager(), THREAD),
    "dcp thread, cached, staged in background, plan cached": (_stager(background=True), THREAD),
    "dcp process": (lambda: None, PROCESS),
    "dcp process, cached in shared memory": (_stager(shared=True), PROCESS),
    "dcp process, cached in shared memory, staged in background, plan cached": (
        _stager(shared=True, background=True),
        PROCESS,
    ),
    "dcp thread, pinned, not blocking": (lambda: DefaultStager(StagingOptions()), THREAD),
    "dcp thread, BlockingAsyncStager, cached": (
        lambda: BlockingAsyncStager(cache_staged_state_dict=True),
        THREAD,
    ),
}


def open_peers(
    trainee: Saved, place: Path, names: tuple[str, ...], step: int
) -> tuple[dict[str, System], dict[str, str]]:
    """Open every peer and let it save once; all ranks.

    Returns:
        Those that run here, and of each other one why it does not.
    """
    able: dict[str, System] = {}
    unable: dict[str, str] = {}
    for name in names:
        make_stager, kind = PEERS[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = Dcp(trainee, place, name, make_stager(), kind)
                peer.save(step)
                peer.before_update()
                peer.wait()
        except Exception as error:
            unable[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            able[name] = peer
    return able, unable
