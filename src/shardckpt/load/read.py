"""Read: run a load plan with a few threads, verify every chunk that is used, place the bytes.

Layer: load. The bytes verified are the bytes used: native code takes the checksum of what it copies
to the target, or of the target itself where the read went straight into it. Python hands out the
reads, in the order of the files, and says what is wrong.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from typing import TYPE_CHECKING, Final, TypeAlias

from shardckpt import native
from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.load.plan import LoadPlan, Read, copy_rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shardckpt.load.open import OpenFile, SavedPayload

Chunks: TypeAlias = "tuple[SavedPayload, int, int]"  # First byte in it, and one past the last.

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
    left = iter(reads_from(plan.reads, first_file))
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            with lock:
                read = next(left, None)
            if read is None:
                return
            try:
                run_read(read)
            except BaseException as error:  # Raised by the thread that loads.
                errors.append(error)

    lock = threading.Lock()
    threads = [
        threading.Thread(target=work, name=f"shardckpt-read-{i}")
        for i in range(min(num_readers, len(plan.reads)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def run_read(read: Read) -> None:
    """Read one range, verify its chunks and put them into their targets.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum.
        StorageError: The read failed.
    """
    rows = array("q")
    for piece in read.pieces:
        if not piece.direct_address:
            for row in copy_rows_of(piece, piece.file_start - read.start):
                rows.extend(row)
    pieces = ((p.payload, p.start, p.stop, p.direct_address) for p in read.pieces)
    _run(read.file, _range(read.file, read.start, read.stop, pieces, rows))


def read_to(file: OpenFile, chunks: Sequence[Chunks], address: int) -> None:
    """Read neighbouring chunks of a file into memory and verify them there.

    Args:
        file: The file.
        chunks: What is read, ascending; bytes between them may be read, too, and stay unverified.
        address: Where the first byte goes; the others lie as far from it as in the file.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum.
        StorageError: The read failed.
    """
    start, stop = span_of(chunks)
    pieces = ((p, low, high, address + p.offset + low - start) for p, low, high in chunks)
    _run(file, _range(file, start, stop, pieces, array("q")))


def verify_at(file: OpenFile, chunks: Sequence[Chunks], address: int) -> None:
    """Verify neighbouring chunks of a file that lie in memory; as `read_to` without the read.

    Raises:
        CorruptCheckpointError: A chunk does not match its checksum.
    """
    start, stop = span_of(chunks)
    pieces = ((payload, low, high, 0) for payload, low, high in chunks)
    _check(file, native.place_chunks(address, _range(file, start, stop, pieces, array("q"))))


def span_of(chunks: Sequence[Chunks]) -> tuple[int, int]:
    """Return first byte and one past the last of ascending chunks in their file."""
    (first, low, _), (last, _, high) = chunks[0], chunks[-1]
    return first.offset + low, last.offset + high


def reads_from(reads: Sequence[Read], first_file: int) -> list[Read]:
    """Return the reads in their order, begun at another file."""
    begins = [at for at, read in enumerate(reads) if at == 0 or read.file is not reads[at - 1].file]
    begin = begins[first_file % len(begins)] if begins else 0
    return [*reads[begin:], *reads[:begin]]


def _range(
    file: OpenFile,
    start: int,
    stop: int,
    pieces: Iterable[tuple[SavedPayload, int, int, int]],
    rows: array[int],
) -> native.ChunkRange:
    fields = array("q")
    for payload, low, high, address in pieces:
        first = payload.first_chunk + low // CHUNK_BYTES
        fields.extend((payload.offset + low, high - low, first, address))
    return native.ChunkRange(start, stop, fields, rows, file.crcs, file.seed, CHUNK_BYTES)


def _run(file: OpenFile, wanted: native.ChunkRange) -> None:
    nbytes = wanted.stop - wanted.start
    lent = file.reader.lend()
    if lent is None:
        buffer = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(buffer)
        file.reader.read_into(wanted.start, address, nbytes)
        outcome = native.place_chunks(address, wanted)
    else:
        with lent as source:
            outcome = native.read_chunks(source.fd, source.direct_fd, source.calls, wanted)
    if outcome.end < wanted.stop:
        raise StorageError(
            f"cannot read bytes {wanted.start} to {wanted.stop} of {file.key}: it ends at byte "
            f"{outcome.end}. The file was cut while it was read; restore another step."
        )
    _check(file, outcome)


def _check(file: OpenFile, outcome: native.ChunkOutcome) -> None:
    at = outcome.bad_offset
    if at < 0:
        return
    payload = next(p for p in file.payloads if p.offset <= at < p.offset + p.nbytes)
    chunk = payload.first_chunk + (at - payload.offset) // CHUNK_BYTES
    saved = int.from_bytes(file.crcs[4 * chunk : 4 * chunk + 4], "little")
    raise CorruptCheckpointError(
        f"{file.key} (saved by rank {file.rank}), key {payload.key!r}: the chunk at byte {at} has "
        f"checksum {outcome.found_crc:08x}, saved was {saved:08x}. The file changed after it was "
        "saved."
    )
