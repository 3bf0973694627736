"""Stage: copy what this rank writes into the arena, laid out as the files will be.

Layer: save. When this returns the caller may change its arrays.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardckpt import native
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.runs import c_strides_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardckpt.save.plan import RankPlan
    from shardckpt.staging.arena import Arena
    from shardckpt.state import HostArray, Leaf

NUM_THREADS: Final = max(1, min(4, len(os.sched_getaffinity(0))))


@dataclass(frozen=True, slots=True)
class Staged:
    """A private copy of one rank's payloads.

    Attributes:
        address: Where the image of file 0 starts.
        file_addresses: Where the image of each file starts.
    """

    address: int
    file_addresses: tuple[int, ...]


def stage(
    plan: RankPlan,
    leaves: Sequence[Leaf],
    host_array: Callable[[object], HostArray],
    arena: Arena,
    num_threads: int = NUM_THREADS,
) -> Staged:
    """Copy every payload to its place in the arena.

    Args:
        plan: What goes where.
        leaves: The state's arrays, as planned.
        host_array: The backend's view of a shard on the host.
        arena: Free to use.
        num_threads: Threads that copy.

    Raises:
        MemoryError: The arena cannot grow to the image.
    """
    base = arena.reserve(plan.image_bytes)
    addresses: list[int] = []
    for nbytes in plan.file_bytes:
        addresses.append(base)
        base += nbytes
    rows = array("q")
    owners: list[object] = []
    for payload in plan.payloads:
        source = host_array(leaves[payload.leaf].shards[payload.shard].data)
        owners.append(source)
        destination = addresses[payload.file] + payload.offset
        if source.is_contiguous:
            rows.extend((destination, source.address + payload.start, 1, 1, payload.nbytes, 1, 1))
        else:
            _strided_rows(rows, destination, source, payload.start, payload.nbytes)
    native.copy_rows(rows, num_threads)
    return Staged(addresses[0] if addresses else 0, tuple(addresses))


def _strided_rows(
    rows: array[int], destination: int, source: HostArray, start: int, nbytes: int
) -> None:
    """Append copies of bytes `[start, start + nbytes)` of a strided array's C-order bytes."""
    item = source.itemsize_bytes
    first, last = start // item, (start + nbytes) // item
    for box in ranges_to_boxes(first, last, source.shape):
        address = source.address + sum(
            o * s for o, s in zip(box.offsets, source.strides_bytes, strict=True)
        )
        packed = c_strides_bytes(box.shape, item)
        rows.extend((destination, address, item, len(box.shape)))
        rows.extend(box.shape)
        rows.extend(packed)
        rows.extend(source.strides_bytes)
        destination += box.num_elements * item
