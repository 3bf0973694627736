"""Read: run a load plan with a few threads, verify every chunk that is used, place the bytes.

Layer: load. The bytes verified are the bytes used: native code takes the checksum of what it copies
to the target, or of the target itself where the read went straight into it. Python hands out the
reads, in the order of the files, and says what is wrong.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from shardckpt import native
from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.load.plan import LoadPlan, Read, copy_rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence


# However few the cores: threads wait for the disk most of the time, and each keeps it busy while
# another copies.
NUM_READERS: Final = 4


def run_load(plan: LoadPlan, *, first_file: int = 0, num_readers: int = NUM_READERS) -> None:
    """Fill every target of the plan.

    Args:
        plan: What to read.
        first_file: Which file of the plan comes first, counted round and round; ranks that give
            their number do not all begin with one file.
        num_readers: Threads that read.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum; names file, key and rank.
        StorageError: A read failed.
    """
    stop = threading.Event()

    def work(read: Read) -> None:
        if stop.is_set():
            return
        try:
            run_read(read)
        except BaseException:
            stop.set()
            raise

    reads = _from_file(plan.reads, first_file)
    with ThreadPoolExecutor(num_readers, thread_name_prefix="shardckpt-read") as pool:
        errors = [f.exception() for f in [pool.submit(work, read) for read in reads]]
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first


def run_read(read: Read) -> None:
    """Read one range, verify its chunks and put them into their targets.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum.
        StorageError: The read failed.
    """
    pieces = array("q")
    rows = array("q")
    for piece in read.pieces:
        payload = piece.payload
        pieces.extend((
            payload.offset + piece.start,
            piece.stop - piece.start,
            payload.first_chunk + piece.start // CHUNK_BYTES,
            piece.direct_address,
        ))  # fmt: skip
        if not piece.direct_address:
            for row in copy_rows_of(piece, piece.file_start - read.start):
                rows.extend(row)
    _run(read, pieces, rows)


def read_to(read: Read, address: int) -> None:
    """Read one range into memory at `address` and verify the chunks of its pieces there.

    Byte `b` of the file lands at `address + b - read.start`. Bytes between pieces stay as they are.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum.
        StorageError: The read failed.
    """
    pieces = array("q")
    for piece in read.pieces:
        pieces.extend((
            piece.file_start,
            piece.stop - piece.start,
            piece.payload.first_chunk + piece.start // CHUNK_BYTES,
            address + piece.file_start - read.start,
        ))  # fmt: skip
    _run(read, pieces, array("q"))


def _from_file(reads: Sequence[Read], first_file: int) -> list[Read]:
    """Return the reads in their order, begun at another file."""
    begins = [at for at, read in enumerate(reads) if at == 0 or read.file is not reads[at - 1].file]
    begin = begins[first_file % len(begins)] if begins else 0
    return [*reads[begin:], *reads[:begin]]


def _run(read: Read, pieces: array[int], rows: array[int]) -> None:
    file = read.file
    wanted = native.ChunkRange(
        read.start, read.stop, pieces, rows, file.crcs, file.seed, CHUNK_BYTES
    )
    lent = file.reader.lend()
    if lent is None:
        buffer = ctypes.create_string_buffer(read.stop - read.start)
        address = ctypes.addressof(buffer)
        file.reader.read_into(read.start, address, read.stop - read.start)
        outcome = native.place_chunks(address, wanted)
    else:
        with lent as source:
            outcome = native.read_chunks(source.fd, source.direct_fd, source.calls, wanted)
    if outcome.end < read.stop:
        raise StorageError(
            f"cannot read bytes {read.start} to {read.stop} of {file.key}: it ends at byte "
            f"{outcome.end}. The file was cut while it was read; restore another step."
        )
    if outcome.bad_offset >= 0:
        raise _mismatch(read, outcome)


def _mismatch(read: Read, outcome: native.ChunkOutcome) -> CorruptCheckpointError:
    file, at = read.file, outcome.bad_offset
    payload = next(p.payload for p in read.pieces if p.file_start <= at < p.file_stop)
    chunk = payload.first_chunk + (at - payload.offset) // CHUNK_BYTES
    saved = int.from_bytes(file.crcs[4 * chunk : 4 * chunk + 4], "little")
    return CorruptCheckpointError(
        f"{file.key} (saved by rank {file.rank}), key {payload.key!r}: the chunk at byte {at} has "
        f"checksum {outcome.found_crc:08x}, saved was {saved:08x}. The file changed after it was "
        "saved."
    )
