"""Bytes between hosts during a load, through a gloo group of the job's ranks.

Layer: torch. The group is made for one load and gone with it: whatever the default group can do
(NCCL cannot move host memory), and whatever a failed load leaves half-way, the trainer's own
traffic never meets it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch
from torch import distributed

if TYPE_CHECKING:
    from shardckpt.load.shared import Exchange


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

    def connect(self) -> None:
        """Make the group; all ranks of the job call it at the same time.

        Raises:
            RuntimeError: Not all ranks came, or they cannot reach each other.
        """
        self._group = distributed.new_group(backend="gloo", timeout=self._timeout)

    def send(self, rank: int, data: memoryview, tag: int) -> None:
        """Send to a rank, which receives as many bytes with the same tag.

        Raises:
            RuntimeError: The other rank is gone or did not come in time.
        """
        distributed.send(torch.frombuffer(data, dtype=torch.uint8), rank, self._group, tag)

    def receive(self, rank: int, data: memoryview, tag: int) -> None:
        """Fill `data` with what a rank sends.

        Raises:
            RuntimeError: The other rank is gone or did not come in time.
        """
        distributed.recv(torch.frombuffer(data, dtype=torch.uint8), rank, self._group, tag)

    def close(self, *, is_broken: bool) -> None:
        """Take the group apart; one with calls under way is left alone, since that would hang."""
        group, self._group = self._group, None
        if group is not None and not is_broken:
            distributed.destroy_process_group(group)
