"""Who wrote which bytes of a shard that several ranks hold: one closed rule for savers and loaders.

Layer: format. `writers` replicas from `owner` on, round and round, write a share each; where
`owner` is -1 all do. Shares are cut at chunk multiples, so each chunk has one writer and one
checksum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardckpt.format.manifest import SPLIT
from shardckpt.format.shard_file import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence


def replicas_of(
    nbytes: int, num_replicas: int, owner: int, writers: int, first: int, last: int
) -> Sequence[int]:
    """Return the replicas that write any of the bytes `[first, last)` of a shard, and few others.

    Args:
        nbytes: Bytes of the shard.
        num_replicas: Equal copies of it.
        owner: First replica that writes, or -1 where every replica writes its share.
        writers: How many write from there on.
        first: First byte asked for.
        last: One past the last.

    >>> replicas_of(200_000, 3, -1, 1, 70_000, 80_000), replicas_of(200_000, 9, 8, 2, 0, 140_000)
    (range(1, 2), [8, 0])
    """
    begin_at, count = _writers(num_replicas, owner, writers)
    chunks = max(1, -(-nbytes // CHUNK_BYTES))
    low, high = first // CHUNK_BYTES, -(-last // CHUNK_BYTES)
    # Writer w begins with chunk w * chunks // count; these are the last that begins no later than
    # `low`, and the first that begins no earlier than `high`.
    begin = max(0, ((low + 1) * count - 1) // chunks)
    found = range(begin, min(count, -(-high * count // chunks)))
    return [(begin_at + i) % num_replicas for i in found] if begin_at else found


def replica_share(
    nbytes: int, num_replicas: int, owner: int, writers: int, replica: int
) -> tuple[int, int]:
    """Return the bytes `[start, stop)` of a shard that one of its replicas writes.

    Args:
        nbytes: Bytes of the shard.
        num_replicas: Equal copies of it.
        owner: First replica that writes, or -1 where every replica writes its share.
        writers: How many write from there on.
        replica: Index of the replica asking.

    >>> [replica_share(200_000, 3, -1, 1, i) for i in range(3)]
    [(0, 65536), (65536, 131072), (131072, 200000)]
    >>> [replica_share(200_000, 3, 2, 2, i) for i in range(3)]
    [(131072, 200000), (0, 0), (0, 131072)]
    """
    begin_at, count = _writers(num_replicas, owner, writers)
    place = (replica - begin_at) % num_replicas
    if place >= count:
        return 0, 0
    chunks = -(-nbytes // CHUNK_BYTES)
    start = place * chunks // count * CHUNK_BYTES
    stop = (place + 1) * chunks // count * CHUNK_BYTES
    return min(start, nbytes), min(stop, nbytes)


def _writers(num_replicas: int, owner: int, writers: int) -> tuple[int, int]:
    """Return the first replica that writes and how many do."""
    if owner == SPLIT:
        return 0, num_replicas
    return owner % num_replicas, min(writers, num_replicas)
