"""Which of several equal copies is written: big arrays by share, small ones by one.

Layer: save. Only the coordinator runs this; the result is written down, so no loader repeats it.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

from shardckpt.format.manifest import SPLIT
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.geometry.layout import BoxLayout, Layout, MeshLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.geometry.array_spec import ArraySpec

_SPLIT_FROM_CHUNKS: Final = 16


def choose_owners(arrays: Sequence[tuple[Layout, ArraySpec, str]]) -> list[int]:
    """Return for each array the replica that writes it, or -1 where every replica writes a share.

    An array is split when a whole shard has at least 16 chunks (1 MiB). The rest goes, largest
    first, to the replica with the fewest bytes so far, counted per layout.
    """
    owners = [0] * len(arrays)
    small: dict[int, list[tuple[int, int]]] = {}
    layouts: dict[int, Layout] = {}
    for index, (layout, spec, role) in enumerate(arrays):
        # Buffers (running statistics) do differ between data-parallel ranks: one replica's, whole.
        if _num_replicas(layout) == 1 or role == "buffer":
            continue
        nbytes = _largest_shard_bytes(layout, spec)
        if nbytes >= _SPLIT_FROM_CHUNKS * CHUNK_BYTES:
            owners[index] = SPLIT
        else:
            small.setdefault(id(layout), []).append((nbytes, index))
            layouts[id(layout)] = layout
    for layout_id, members in small.items():
        loads = [(0, replica) for replica in range(_num_replicas(layouts[layout_id]))]
        for nbytes, index in sorted(members, key=lambda m: (-m[0], m[1])):
            load, replica = loads[0]
            owners[index] = replica
            # An empty array counts too: a thousand of them on replica 0 would be no balance.
            heapq.heapreplace(loads, (load + max(nbytes, 1), replica))
    return owners


def _num_replicas(layout: Layout) -> int:
    if isinstance(layout, MeshLayout):
        return layout.num_replicas
    return max((len(ranks) for ranks in layout.ranks), default=1)


def _largest_shard_bytes(layout: Layout, spec: ArraySpec) -> int:
    if isinstance(layout, BoxLayout):
        return max((box.num_elements for box in layout.boxes), default=0) * spec.itemsize_bytes
    first = layout.box_at((0,) * len(layout.mesh_shape), spec.shape)
    return first.num_elements * spec.itemsize_bytes
