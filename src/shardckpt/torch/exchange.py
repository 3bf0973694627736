"""Bytes between hosts during a load, through a gloo group of the job's ranks.

Layer: torch. The group is made for one load and gone with it: whatever the default group can do
(NCCL cannot move host memory), and whatever a failed load leaves half-way, the trainer's own
traffic never meets it.
"""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.load.between import Exchange

_NEVER_SENT: Final = (1 << 31) - 1


def default_exchange(timeout_s: float) -> Exchange | None:
    """Return how the ranks of torch's default group exchange; None where they cannot.

    Args:
        timeout_s: Seconds that one message may take.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_world_size() == 1 or not distributed.is_gloo_available():
        return None
    return GlooExchange(timeout_s)


# Calls of failed loads that their other side may still be in, until the deadline of its call; the
# next load lets go of them.
_unended: Final[list[tuple[float, dict[Any, torch.Tensor]]]] = []


@final
class GlooExchange:
    """Sends and receives between the ranks of torch's default group."""

    def __init__(self, timeout_s: float) -> None:
        """Prepare nothing yet.

        Args:
            timeout_s: Seconds that one message may take.
        """
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None
        # gloo stops reading a connection when the memory of a message is gone, which would keep its
        # sender inside a call until its deadline: what was begun is kept.
        self._begun: dict[Any, torch.Tensor] = {}

    def connect(self) -> None:
        """Make the group; all ranks of the job call it at the same time.

        Raises:
            RuntimeError: Not all ranks came, or they cannot reach each other.
        """
        now = time.monotonic()
        _unended[:] = [(deadline, begun) for deadline, begun in _unended if deadline > now]
        self._group = distributed.new_group(backend="gloo", timeout=self._timeout)

    def send(self, rank: int, data: memoryview, tag: int) -> Callable[[], None]:
        """Begin to send to a rank that receives with the same tag; return what ends it.

        Raises:
            RuntimeError: The other rank is gone.
        """
        tensor = _tensor(data)
        return self._ending(distributed.isend(tensor, rank, self._group, tag), tensor)

    def receive(self, rank: int, data: memoryview, tag: int) -> Callable[[], None]:
        """Begin to fill memory, its last byte last; return what ends it, once all has come.

        Raises:
            RuntimeError: The other rank is gone.
        """
        tensor = _tensor(data)
        return self._ending(distributed.irecv(tensor, rank, self._group, tag), tensor)

    def check(self, rank: int) -> None:
        """See whether a rank is still there: gloo refuses to receive from one that is gone.

        Raises:
            RuntimeError: It is gone.
        """
        distributed.irecv(torch.empty(1, dtype=torch.uint8), rank, self._group, _NEVER_SENT)

    def close(self) -> None:
        """Take the group apart. Never raises.

        Where a load failed, others may still send what this rank has begun to receive.
        """
        group, self._group = self._group, None
        if self._begun:
            deadline = time.monotonic() + self._timeout.total_seconds()
            _unended.append((deadline, self._begun))
            self._begun = {}
        if group is not None:
            distributed.destroy_process_group(group)

    def _ending(self, work: Any, tensor: torch.Tensor) -> Callable[[], None]:
        self._begun[work] = tensor

        def end() -> None:
            work.wait(self._timeout)
            del self._begun[work]

        return end


def _tensor(data: memoryview) -> torch.Tensor:
    with warnings.catch_warnings():
        # The memory of a message may be read-only: it is only sent.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=torch.uint8)
