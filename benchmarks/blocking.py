"""Who saves while training waits: `dcp.save`, and `torch.save` of what a rank holds.

`dcp.save` flushes its files by its own default. `torch.save` does not, so its file and directory
are flushed here, and that time counts. It gathers nothing: each rank writes its own shards to a
file of its own, which only as many ranks can load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from files import flush, keep_only
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from pathlib import Path

    from systems import Saved


class DcpSave:
    """`dcp.save`."""

    in_flight: Final = 1

    def __init__(self, trainee: Saved, place: Path) -> None:
        """Make its process group; all ranks."""
        self._trainee, self._place, self._step = trainee, place / "dcp-save", 0
        self._group: Any = distributed.new_group(backend="gloo")

    def step_began(self, step: int) -> None:
        """Do nothing."""

    def make_room(self) -> None:
        """Do nothing: nothing is under way."""

    def save(self, step: int) -> None:
        """Save; the files are flushed on return."""
        self._step = step
        dcp.save(
            self._trainee.state_dict, checkpoint_id=self._place / str(step),
            process_group=self._group,
        )  # fmt: skip

    def before_update(self) -> None:
        """Do nothing."""

    def is_durable(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Do nothing."""

    def tidy(self) -> None:
        """Delete all checkpoints but the last; rank 0 alone."""
        keep_only(self.newest)

    @property
    def newest(self) -> Path:
        """Return where the last save lies."""
        return self._place / str(self._step)

    def load(self) -> None:
        """Fill the state from the last save."""
        dcp.load(
            self._trainee.state_dict, checkpoint_id=self._place / str(self._step),
            process_group=self._group,
        )  # fmt: skip

    def close(self) -> None:
        """Do nothing."""


class TorchSave:
    """`torch.save`, a file per rank, flushed."""

    in_flight: Final = 1

    def __init__(self, trainee: Saved, place: Path) -> None:
        """Take the state; all ranks."""
        self._trainee, self._place, self._step = trainee, place / "torch-save", 0
        self._file = f"rank-{distributed.get_rank()}.pt"

    def step_began(self, step: int) -> None:
        """Do nothing."""

    def make_room(self) -> None:
        """Do nothing: nothing is under way."""

    def save(self, step: int) -> None:
        """Save and flush; no rank returns before all have."""
        self._step = step
        path = self._path()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(locals_in(self._trainee.state_dict), path)
        for name in (path, path.parent, self._place):
            flush(name)
        distributed.barrier()

    def before_update(self) -> None:
        """Do nothing."""

    def is_durable(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Do nothing."""

    def tidy(self) -> None:
        """Delete all checkpoints but the last; rank 0 alone."""
        keep_only(self.newest)

    @property
    def newest(self) -> Path:
        """Return where the last save lies."""
        return self._place / str(self._step)

    def load(self) -> None:
        """Fill the state from the last save, without a second copy of it in memory."""
        fill(self._trainee.state_dict, torch.load(self._path(), mmap=True, weights_only=True))

    def close(self) -> None:
        """Do nothing."""

    def _path(self) -> Path:
        return self.newest / self._file


def locals_in(state: Any) -> Any:
    """Return nested dicts with this rank's part of every tensor in place of the tensor."""
    if isinstance(state, dict):
        return {key: locals_in(value) for key, value in state.items()}
    return state.to_local() if isinstance(state, DTensor) else state


def fill(state: Any, loaded: Any) -> None:
    """Copy what was loaded into this rank's part of every tensor."""
    for key, value in state.items():
        if isinstance(value, dict):
            fill(value, loaded[key])
        elif isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            local.detach().copy_(loaded[key])
