"""Bytes between hosts during a load, through a gloo group of the job's ranks.

Layer: torch. The group is made for one load and gone with it: whatever the default group can do
(NCCL cannot move host memory), and whatever a failed load leaves half-way, the trainer's own
traffic never meets it.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import distributed

from shardckpt.load.between import CONNECT_SHARE

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
        # The memory of a message must stay as long as gloo may touch it.
        self._begun: dict[Any, torch.Tensor] = {}

    def connect(self) -> None:
        """Make the group; all ranks of the job call it at the same time.

        Raises:
            RuntimeError: Not all ranks came, or they cannot reach each other.
        """
        made: Future[Any] = Future()
        # Where a rank dies meanwhile, gloo tries again several times as long as its timeout.
        threading.Thread(
            target=self._make_group, args=(made,), name="shardckpt-connect", daemon=True
        ).start()
        limit_s = CONNECT_SHARE * self._timeout.total_seconds()
        try:
            self._group = made.result(limit_s)
        except TimeoutError:
            if made.cancel():
                raise RuntimeError(f"the ranks were not connected within {limit_s:g} s") from None
            self._group = made.result()

    def send(self, rank: int, data: memoryview, tag: int) -> None:
        """Begin to send to a rank that receives with the same tag.

        Nobody waits for its end: where the other rank dies meanwhile, gloo does not end it before
        its deadline.

        Raises:
            RuntimeError: The other rank is gone.
        """
        tensor = _tensor(data)
        self._begun[distributed.isend(tensor, rank, self._group, tag)] = tensor

    def receive(self, rank: int, data: memoryview, tag: int) -> Callable[[], None]:
        """Begin to fill memory, its last byte last; return what ends it, once all has come.

        Raises:
            RuntimeError: The other rank is gone.
        """
        tensor = _tensor(data)
        work: Any = distributed.irecv(tensor, rank, self._group, tag)
        self._begun[work] = tensor

        def end() -> None:
            work.wait(self._timeout)
            del self._begun[work]

        return end

    def _make_group(self, made: Future[Any]) -> None:
        try:
            group = distributed.new_group(backend="gloo", timeout=self._timeout)
        except Exception as error:  # Raised by the thread that connects.
            if made.set_running_or_notify_cancel():
                made.set_exception(error)
            return
        if made.set_running_or_notify_cancel():
            made.set_result(group)
        else:
            distributed.destroy_process_group(group)

    def check(self, rank: int) -> None:
        """See whether a rank is still there: gloo refuses to receive from one that is gone.

        Raises:
            RuntimeError: It is gone.
        """
        distributed.irecv(torch.empty(1, dtype=torch.uint8), rank, self._group, _NEVER_SENT)

    def close(self) -> None:
        """Take the group apart. Never raises."""
        group, self._group = self._group, None
        begun, self._begun = self._begun, {}
        tensors = list(begun.values())
        # gloo lets go of the memory before the memory goes.
        begun.clear()
        tensors.clear()
        if group is not None:
            distributed.destroy_process_group(group)


def _tensor(data: memoryview) -> torch.Tensor:
    with warnings.catch_warnings():
        # The memory of a message may be read-only: it is only sent.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=torch.uint8)
