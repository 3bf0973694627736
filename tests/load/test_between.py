"""One rank's messages to other hosts, where those do as they like."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from shardckpt.errors import DeadlineError
from shardckpt.load.between import MARK, Between, Provided
from shardckpt.load.exchange import Batch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class _Other:
    """The only other host: says that it receives, and of what it got only what a test lets it."""

    confirms: int
    is_gone: threading.Event = field(default_factory=threading.Event)
    got: list[bytes] = field(default_factory=list)
    ended: int = 0
    waiting: list[memoryview] = field(default_factory=list)

    def connect(self) -> None:
        return

    def send(self, _rank: int, data: memoryview, _tag: int) -> None:
        self.got.append(bytes(data))
        if len(self.got) <= self.confirms:
            self.waiting.pop(0)[:] = MARK
        else:
            self.is_gone.set()

    def receive(self, _rank: int, data: memoryview, tag: int) -> Callable[[], None]:
        if tag % 3 == 1:
            data[:] = MARK
        else:
            self.waiting.append(data)
        return self._end

    def check(self, _rank: int) -> None:
        if self.is_gone.is_set():
            raise RuntimeError("connection reset")

    def close(self) -> None:
        return

    def _end(self) -> None:
        self.ended += 1


def _send(other: _Other, num_batches: int) -> list[int]:
    """Send batches, each filled once the one before was sent; return which were taken."""
    taken: list[int] = []
    provided = [
        Provided(Batch(index, (), ((0, (0,)), (1, (1,)))), index, 0, 2)
        for index in range(num_batches)
    ]
    provided[0].is_filled.set()
    slot = memoryview(bytearray(4 + len(MARK)))

    def view(batch: Provided) -> memoryview:
        slot[:4] = batch.number.to_bytes(4, "big")
        return slot

    def sent(batch: Provided) -> None:
        taken.append(batch.number)
        if batch.number + 1 < num_batches:
            provided[batch.number + 1].is_filled.set()

    Between(
        other, 0, provided, stopped=threading.Event(), timeout_s=30.0, view=view, sent=sent,
        received=lambda _: None,
    ).send_all()  # fmt: skip
    return taken


def test_a_slot_is_used_again_once_the_other_host_has_its_bytes() -> None:
    other = _Other(confirms=3)
    assert _send(other, 3) == [0, 1, 2]
    assert other.got == [number.to_bytes(4, "big") + MARK for number in range(3)]
    assert other.ended == 6


@pytest.mark.timeout(10)
def test_a_host_that_dies_while_it_is_sent_to_is_named_at_once() -> None:
    other = _Other(confirms=1)
    with pytest.raises(DeadlineError, match=r"rank 1 went away .*connection reset"):
        _send(other, 3)
    assert len(other.got) == 2
