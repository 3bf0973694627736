"""Stage: hand what this rank writes to the engine, laid out as the files will be.

Layer: save. One table per save for all arrays, made anew only for arrays that changed place since
the save before. Once it is handed over the engine has a ticket, and copies by itself what may be
copied later.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from shardckpt.state import HOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.backend import Backend
    from shardckpt.native import Engine
    from shardckpt.save.plan import Payload, RankPlan
    from shardckpt.state import HostArray, Leaf


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


@final
class CopyTable:
    """What the engine copies under one plan: a few numbers per payload. Keeps no array alive."""

    def __init__(self, plan: RankPlan) -> None:
        """Start with no row known.

        Args:
            plan: What goes where.
        """
        self._plan = plan
        self._payloads: dict[int, list[int]] = {}
        for number, payload in enumerate(plan.payloads):
            self._payloads.setdefault(payload.leaf, []).append(number)
        self._rows: list[bytes] = [b""] * len(plan.payloads)
        self._devices: list[int] = [HOST] * len(plan.payloads)
        self._leaves: list[Leaf | None] = []
        self._overlap = False

    def changed(self, leaves: Sequence[Leaf]) -> Sequence[int]:
        """Return the indexes of the leaves that may differ from those staged last time."""
        if len(leaves) != len(self._leaves):
            return range(len(leaves))
        pairs = enumerate(zip(leaves, self._leaves, strict=True))
        return [index for index, (leaf, known) in pairs if known is not leaf]

    def stage(
        self,
        engine: Engine,
        leaves: Sequence[Leaf],
        backend: Backend,
        *,
        overlap: bool,
        check_copies: bool,
    ) -> Staged:
        """Queue every payload; nothing needs to be copied yet when this returns.

        Args:
            engine: Has room reserved.
            leaves: The state's arrays, as planned.
            backend: Knows their memory.
            overlap: Whether arrays with a fence may be copied later; else all belong to group 0.
            check_copies: Compare every late copy with its array as it is now.

        Raises:
            OSError: A device refused.
        """
        changed = self.changed(leaves) if overlap is self._overlap else range(len(leaves))
        is_changed = set(changed)
        owners = backend.owners([x for i, x in enumerate(leaves) if i not in is_changed])
        # Nothing counts as known where a row cannot be made.
        self._leaves = []
        for index in changed:
            leaf = leaves[index]
            for number in self._payloads.get(index, ()):
                payload = self._plan.payloads[number]
                source = backend.host_array(leaf.shards[payload.shard].data)
                owners.append(source.owner)
                self._devices[number] = source.device
                self._rows[number] = _row(payload, source, leaf.fence if overlap else 0)
        self._leaves = [leaf if leaf.is_lasting else None for leaf in leaves]
        self._overlap = overlap
        devices = frozenset(self._devices) - {HOST}
        ticket = engine.begin(
            array("q", b"".join(self._rows)), array("q", self._plan.file_bytes), check_copies,
            array("q", backend.streams(devices)),
        )  # fmt: skip
        return Staged(ticket, devices, owners)


def _row(payload: Payload, source: HostArray, fence: int) -> bytes:
    if source.is_contiguous:
        numbers: tuple[int, ...] = (
            source.address + payload.start, payload.nbytes, payload.file, payload.offset,
            fence, source.device, 0, 1, 0,
        )  # fmt: skip
    else:
        numbers = (
            source.address, payload.nbytes, payload.file, payload.offset, fence,
            source.device, payload.start, source.itemsize_bytes, len(source.shape),
            *source.shape, *source.strides_bytes,
        )  # fmt: skip
    return array("q", numbers).tobytes()
