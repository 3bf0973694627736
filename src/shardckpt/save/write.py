"""Write: this rank's shard files, checksummed, flushed and named durably.

Layer: save. Files are written by a few threads while another one checksums the same memory; the
table with the checksums goes last. A file is only reported once its flush, close and directory
flush succeeded.
"""

from __future__ import annotations

import ctypes
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt import native
from shardckpt.format.manifest import shard_key
from shardckpt.format.root import FORMAT_VERSION
from shardckpt.format.shard_file import (
    CHUNK_BYTES,
    TRAILER_BYTES,
    Table,
    crc_seed,
    encode_crcs,
    encode_header,
    encode_tail,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardckpt.save.plan import Payload, RankPlan
    from shardckpt.save.stage import Staged
    from shardckpt.state import Leaf
    from shardckpt.storage.base import Storage, Writer

_EXTENT_BYTES: Final = 8 << 20
_NUM_WRITERS: Final = 2


class FileReport(msgspec.Struct, frozen=True):
    """One file as its writer reports it; enough for the manifest."""

    nbytes: int
    table_offset: int
    table_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class AttemptId:
    """Which attempt, and who writes for it."""

    attempt: str
    step: int
    rank: int
    world_size: int


def write_files(
    storage: Storage,
    attempt: AttemptId,
    plan: RankPlan,
    leaves: Sequence[Leaf],
    staged: Staged,
    per_rank: Mapping[str, msgspec.Raw],
) -> list[FileReport]:
    """Write and flush every file of this rank; return them in order.

    Raises:
        StorageError: A write or flush failed in any thread; the attempt must fail.
    """
    reports: list[FileReport] = []
    by_file: list[list[Payload]] = [[] for _ in plan.file_bytes]
    for payload in plan.payloads:
        by_file[payload.file].append(payload)
    with ThreadPoolExecutor(_NUM_WRITERS + 1, thread_name_prefix="shardckpt-write") as pool:
        for file, payloads in enumerate(by_file):
            table = _table(attempt, file, payloads, leaves, per_rank if file == 0 else {})
            reports.append(
                _write_file(
                    pool,
                    storage,
                    attempt,
                    file,
                    payloads,
                    table,
                    staged.file_addresses[file],
                    plan.file_bytes[file],
                )
            )
    return reports


def _write_file(
    pool: ThreadPoolExecutor,
    storage: Storage,
    attempt: AttemptId,
    file: int,
    payloads: Sequence[Payload],
    table: Table,
    address: int,
    nbytes: int,
) -> FileReport:
    key = shard_key(attempt.attempt, attempt.rank, file, attempt.world_size)
    header = encode_header(attempt.attempt, attempt.rank, file)
    ctypes.memmove(address, header, len(header))
    seed = crc_seed(attempt.attempt, attempt.rank, file)
    checksums = pool.submit(_checksums, payloads, address, seed)
    writer = storage.create(key, nbytes)
    try:
        _write_extents(pool, writer, address, nbytes)
        table = msgspec.structs.replace(table, crcs=encode_crcs(checksums.result()))
        tail, table_digest = encode_tail(table, nbytes)
        writer.write(nbytes, _address_of(tail), len(tail))
        writer.commit(nbytes + len(tail))
    except BaseException:
        checksums.cancel()
        writer.abort()
        raise
    table_bytes = len(tail) - TRAILER_BYTES
    return FileReport(nbytes + len(tail), nbytes, table_bytes, table_digest)


def _write_extents(pool: ThreadPoolExecutor, writer: Writer, address: int, nbytes: int) -> None:
    """Write the image in extents; raise the first error once all threads have stopped."""
    starts = range(0, nbytes, _EXTENT_BYTES)

    def run(first: int) -> None:
        for start in starts[first::_NUM_WRITERS]:
            writer.write(start, address + start, min(_EXTENT_BYTES, nbytes - start))

    running: list[Future[None]] = [pool.submit(run, i) for i in range(_NUM_WRITERS)]
    errors = [error for error in (future.exception() for future in running) if error is not None]
    if errors:
        raise errors[0]


def _checksums(payloads: Sequence[Payload], address: int, seed: int) -> bytes:
    rows = array("q")
    for payload in payloads:
        rows.extend((address + payload.offset, payload.nbytes, payload.offset))
    return native.chunk_crcs(rows, seed, CHUNK_BYTES)


def _table(
    attempt: AttemptId,
    file: int,
    payloads: Sequence[Payload],
    leaves: Sequence[Leaf],
    per_rank: Mapping[str, msgspec.Raw],
) -> Table:
    key_ids: dict[int, int] = {}
    boxes: list[int] = []
    for payload in payloads:
        key_ids.setdefault(payload.leaf, len(key_ids))
        box = leaves[payload.leaf].shards[payload.shard].box
        boxes += box.offsets
        boxes += box.shape
    held = [leaves[i] for i in key_ids]
    return Table(
        format=FORMAT_VERSION,
        features=[],
        attempt=attempt.attempt,
        step=attempt.step,
        rank=attempt.rank,
        world_size=attempt.world_size,
        file=file,
        keys=[leaf.key for leaf in held],
        dtypes=[leaf.spec.dtype for leaf in held],
        shapes=[list(leaf.spec.shape) for leaf in held],
        key_ids=[key_ids[p.leaf] for p in payloads],
        boxes=boxes,
        starts=[p.start for p in payloads],
        lengths=[p.nbytes for p in payloads],
        offsets=[p.offset for p in payloads],
        crcs="",
        per_rank=dict(per_rank),
    )


def _address_of(data: bytes) -> int:
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert address is not None
    return address
