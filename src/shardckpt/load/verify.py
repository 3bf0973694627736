"""Verify: read every byte of a checkpoint and name every damage, without a target.

Layer: load.
"""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardckpt import native
from shardckpt.errors import CorruptCheckpointError, FormatError, StorageError
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.format.shares import replica_share
from shardckpt.geometry.box import whole
from shardckpt.load.plan import READ_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardckpt.load.open import OpenCheckpoint, OpenFile


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked and what is wrong; no problems means every byte is as it was saved."""

    nbytes: int
    num_files: int
    problems: tuple[str, ...]


def verify_checkpoint(checkpoint: OpenCheckpoint, *, payloads: bool) -> Verified:
    """Check tables, coverage of every array and, with `payloads`, every chunk.

    Never raises for damage: all of it is listed.
    """
    problems: list[str] = []
    files: list[OpenFile] = []
    for rank in range(checkpoint.manifest.world_size):
        try:
            files += checkpoint.files_of(rank)
        except (CorruptCheckpointError, FormatError, StorageError) as error:
            problems.append(str(error))
    nbytes = sum(
        file.table.offsets[-1] + file.table.lengths[-1] for file in files if file.table.offsets
    )
    if not problems:
        problems += _coverage_problems(checkpoint)
    if payloads:
        for file in files:
            try:
                problems += _chunk_problems(file)
            except StorageError as error:
                problems.append(str(error))
    return Verified(nbytes, len(files), tuple(problems))


def _coverage_problems(checkpoint: OpenCheckpoint) -> Iterator[str]:
    """Yield every shard share that no payload holds."""
    try:
        tensors = checkpoint.tensors
    except (CorruptCheckpointError, FormatError) as error:
        yield str(error)
        return
    for tensor in tensors.values():
        shape = tensor.spec.shape
        if 0 in shape:
            continue
        for shard, ranks in tensor.layout.shards_touching(whole(shape), shape):
            for replica, rank in enumerate(ranks):
                nbytes = shard.num_elements * tensor.spec.itemsize_bytes
                start, stop = replica_share(
                    nbytes, len(ranks), tensor.owner, tensor.writers, replica
                )
                held = sum(
                    p.nbytes
                    for f in checkpoint.files_of(rank)
                    for p in f.payloads_of(tensor.key, shard)
                )
                if held != stop - start:
                    yield (
                        f"key {tensor.key!r}: rank {rank} holds {held} of {stop - start} bytes "
                        f"of {shard}"
                    )


def _chunk_problems(file: OpenFile) -> Iterator[str]:
    buffer = ctypes.create_string_buffer(READ_BYTES)
    address = ctypes.addressof(buffer)
    for payload in file.payloads:
        for start in range(0, payload.nbytes, READ_BYTES):
            nbytes = min(READ_BYTES, payload.nbytes - start)
            offset = payload.offset + start
            file.reader.read_into(offset, address, nbytes)
            found = native.chunk_crcs(array("q", (address, nbytes, offset)), file.seed, CHUNK_BYTES)
            first = 4 * (payload.first_chunk + start // CHUNK_BYTES)
            expected = file.crcs[first : first + len(found)]
            for chunk in range(0, len(found), 4):
                if found[chunk : chunk + 4] != expected[chunk : chunk + 4]:
                    at = offset + chunk // 4 * CHUNK_BYTES
                    yield (
                        f"{file.key} (rank {file.rank}), key {payload.key!r}: bytes from {at} "
                        "changed after the save"
                    )
