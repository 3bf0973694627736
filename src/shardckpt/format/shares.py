"""Who wrote which bytes of a shard that several ranks hold: one closed rule for savers and loaders.

Layer: format. Shares are cut at chunk multiples, so each chunk has one writer and one checksum.
"""

from __future__ import annotations

from shardckpt.format.manifest import SPLIT
from shardckpt.format.shard_file import CHUNK_BYTES


def replicas_of(nbytes: int, num_replicas: int, owner: int, first: int, last: int) -> range:
    """Return the replicas that write any of the bytes `[first, last)` of a shard, and few others.

    Args:
        nbytes: Bytes of the shard.
        num_replicas: Equal copies of it.
        owner: Replica that writes all of it, or -1 where every replica writes its share.
        first: First byte asked for.
        last: One past the last.

    >>> replicas_of(200_000, 3, -1, 70_000, 80_000), replicas_of(200_000, 3, 1, 70_000, 80_000)
    (range(1, 2), range(1, 2))
    """
    if owner != SPLIT:
        return range(owner % num_replicas, owner % num_replicas + 1)
    chunks = -(-nbytes // CHUNK_BYTES)
    low, high = first // CHUNK_BYTES, -(-last // CHUNK_BYTES)
    # Replica r begins with chunk r * chunks // num_replicas; these are the last that begins no
    # later than `low`, and the first that begins no earlier than `high`.
    begin = max(0, ((low + 1) * num_replicas - 1) // max(1, chunks))
    return range(begin, min(num_replicas, -(-high * num_replicas // max(1, chunks))))


def replica_share(nbytes: int, num_replicas: int, owner: int, replica: int) -> tuple[int, int]:
    """Return the bytes `[start, stop)` of a shard that one of its replicas writes.

    Args:
        nbytes: Bytes of the shard.
        num_replicas: Equal copies of it.
        owner: Replica that writes all of it, or -1 where every replica writes its share.
        replica: Index of the replica asking.

    >>> [replica_share(200_000, 3, -1, i) for i in range(3)]
    [(0, 65536), (65536, 131072), (131072, 200000)]
    """
    if owner != SPLIT:
        return (0, nbytes) if replica == owner % num_replicas else (0, 0)
    chunks = -(-nbytes // CHUNK_BYTES)
    start = replica * chunks // num_replicas * CHUNK_BYTES
    stop = (replica + 1) * chunks // num_replicas * CHUNK_BYTES
    return min(start, nbytes), min(stop, nbytes)
