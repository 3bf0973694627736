"""Stage: hand what this rank writes to the engine, laid out as the files will be.

Layer: save. One table per save for all arrays. When `stage` returns the engine has a ticket, and
copies by itself what may be copied later.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardckpt.state import HOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.backend import Backend
    from shardckpt.native import Engine
    from shardckpt.save.plan import RankPlan
    from shardckpt.state import Leaf


@dataclass(slots=True)
class Staged:
    """A save in the engine's hands.

    Attributes:
        ticket: Its number.
        devices: CUDA devices that hold arrays of it.
        owners: What keeps the memory of its arrays alive; dropped once all are copied.
    """

    ticket: int
    devices: frozenset[int]
    owners: list[object]


def stage(
    engine: Engine,
    plan: RankPlan,
    leaves: Sequence[Leaf],
    backend: Backend,
    *,
    overlap: bool,
    check_copies: bool,
) -> Staged:
    """Queue every payload; nothing needs to be copied yet when this returns.

    Args:
        engine: Has room reserved.
        plan: What goes where.
        leaves: The state's arrays, as planned.
        backend: Knows their memory.
        overlap: Whether arrays with a fence may be copied later; else all belong to group 0.
        check_copies: Compare every late copy with its array as it is now.

    Raises:
        OSError: A device refused.
    """
    rows = array("q")
    owners: list[object] = []
    devices: set[int] = set()
    for payload in plan.payloads:
        leaf = leaves[payload.leaf]
        source = backend.host_array(leaf.shards[payload.shard].data)
        owners.append(source.owner)
        if source.device != HOST:
            devices.add(source.device)
        fence = leaf.fence if overlap else 0
        if source.is_contiguous:
            rows.extend(
                (
                    source.address + payload.start, payload.nbytes, payload.file, payload.offset,
                    fence, source.device, 0, 1, 0,
                )
            )  # fmt: skip
        else:
            rows.extend(
                (
                    source.address, payload.nbytes, payload.file, payload.offset, fence,
                    source.device, payload.start, source.itemsize_bytes, len(source.shape),
                    *source.shape, *source.strides_bytes,
                )
            )  # fmt: skip
    streams = array("q", backend.streams(devices))
    ticket = engine.begin(rows, array("q", plan.file_bytes), check_copies, streams)
    return Staged(ticket, frozenset(devices), owners)
