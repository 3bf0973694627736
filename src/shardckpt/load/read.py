"""Read: run a load plan with a few threads, verify every chunk that is used, place the bytes.

Layer: load. The bytes verified are the bytes used: checksums are taken of the memory the values are
copied from, or of the target itself where the read went straight into it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from shardckpt import native
from shardckpt.errors import CorruptCheckpointError
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.load.plan import LoadPlan, Piece, Read, copy_rows_of

if TYPE_CHECKING:
    from shardckpt.load.open import OpenFile

NUM_READERS: Final = max(2, min(4, len(os.sched_getaffinity(0))))


def run_load(plan: LoadPlan, num_readers: int = NUM_READERS) -> None:
    """Fill every target of the plan.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum; names file, key and rank.
        StorageError: A read failed.
    """
    scratch = threading.local()
    stop = threading.Event()

    def work(read: Read) -> None:
        if stop.is_set():
            return
        try:
            _run_read(read, scratch)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(num_readers, thread_name_prefix="shardckpt-read") as pool:
        errors = [f.exception() for f in [pool.submit(work, read) for read in plan.reads]]
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first


def _run_read(read: Read, scratch: threading.local) -> None:
    nbytes = read.stop - read.start
    direct = read.pieces[0].direct_address
    address = direct or _scratch(scratch, nbytes)
    read.file.reader.read_into(read.start, address, nbytes)
    _verify(read, address)
    if direct:
        return
    rows = array("q")
    for piece in read.pieces:
        for row in copy_rows_of(piece, address + piece.file_start - read.start):
            rows.extend(row)
    native.copy_rows(rows, 1)


def _verify(read: Read, address: int) -> None:
    rows = array("q")
    expected: list[bytes] = []
    for piece in read.pieces:
        rows.extend(
            (address + piece.file_start - read.start, piece.stop - piece.start, piece.file_start)
        )
        first = piece.payload.first_chunk + piece.start // CHUNK_BYTES
        count = -(-(piece.stop - piece.start) // CHUNK_BYTES)
        expected.append(read.file.crcs[4 * first : 4 * (first + count)])
    found = native.chunk_crcs(rows, read.file.seed, CHUNK_BYTES)
    if found != b"".join(expected):
        raise _mismatch(read.file, read.pieces, found, expected)


def _mismatch(
    file: OpenFile, pieces: list[Piece], found: bytes, expected: list[bytes]
) -> CorruptCheckpointError:
    position = 0
    for piece, crcs in zip(pieces, expected, strict=True):
        part = found[position : position + len(crcs)]
        position += len(crcs)
        for chunk in range(0, len(crcs), 4):
            if part[chunk : chunk + 4] != crcs[chunk : chunk + 4]:
                at = piece.file_start + chunk // 4 * CHUNK_BYTES
                return CorruptCheckpointError(
                    f"{file.key} (saved by rank {file.rank}), key {piece.payload.key!r}: the "
                    f"chunk at byte {at} has "
                    f"checksum {part[chunk : chunk + 4][::-1].hex()}, saved was "
                    f"{crcs[chunk : chunk + 4][::-1].hex()}. The file changed after it was saved."
                )
    raise AssertionError("checksums differ, but no chunk does")


def _scratch(local: threading.local, nbytes: int) -> int:
    buffer = getattr(local, "buffer", None)
    if buffer is None or len(buffer) < nbytes:
        buffer = ctypes.create_string_buffer(nbytes)
        local.buffer = buffer
    return ctypes.addressof(buffer)
