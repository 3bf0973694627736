"""Who of several equal copies writes: big arrays by share, small ones by one.

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

# A share of fewer bytes is not worth a read of its own when it is loaded.
_SHARE_BYTES: Final = 16 * CHUNK_BYTES


def choose_writers(arrays: Sequence[tuple[Layout, ArraySpec, str]]) -> tuple[list[int], list[int]]:
    """Return the owner of each array and how many replicas write a share, from the owner on.

    As many replicas write an array as get 1 MiB each of a whole shard; where these are all, the
    owner is -1. Those that some write are dealt round and round, largest first, so that neighbours
    in this order have shares of nearly one size. What one replica writes goes, largest first, to
    that with the fewest bytes so far. Both are counted per layout.
    """
    owners, writers = [0] * len(arrays), [1] * len(arrays)
    shared: dict[int, list[tuple[int, int]]] = {}
    layouts: dict[int, Layout] = {}
    for index, (layout, spec, role) in enumerate(arrays):
        num_replicas = _num_replicas(layout)
        # Buffers (running statistics) do differ between data-parallel ranks: one replica's, whole.
        if num_replicas == 1 or role == "buffer":
            continue
        nbytes = _largest_shard_bytes(layout, spec)
        if nbytes >= num_replicas * _SHARE_BYTES:
            owners[index] = SPLIT
        else:
            shared.setdefault(id(layout), []).append((nbytes, index))
            layouts[id(layout)] = layout
    for layout_id, members in shared.items():
        num_replicas, turn = _num_replicas(layouts[layout_id]), 0
        members.sort(key=lambda m: (-m[0], m[1]))
        whole = []
        for nbytes, index in members:
            writers[index] = max(1, nbytes // _SHARE_BYTES)
            if writers[index] == 1:
                whole.append((nbytes, index))
                continue
            owners[index] = turn
            turn = (turn + writers[index]) % num_replicas
        loads = [(0, place) for place in range(num_replicas)]
        for nbytes, index in whole:
            load, place = loads[0]
            owners[index] = (turn + place) % num_replicas
            # An empty array counts too: a thousand of them on replica 0 would be no balance.
            heapq.heapreplace(loads, (load + max(nbytes, 1), place))
    return owners, writers


def _num_replicas(layout: Layout) -> int:
    if isinstance(layout, MeshLayout):
        return layout.num_replicas
    return max((len(ranks) for ranks in layout.ranks), default=1)


def _largest_shard_bytes(layout: Layout, spec: ArraySpec) -> int:
    if isinstance(layout, BoxLayout):
        return max((box.num_elements for box in layout.boxes), default=0) * spec.itemsize_bytes
    first = layout.box_at((0,) * len(layout.mesh_shape), spec.shape)
    return first.num_elements * spec.itemsize_bytes
