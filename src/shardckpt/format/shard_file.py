"""Shard files: one rank's bytes, with a header, a table and a trailer.

Layer: format. `header (4096 B) | payloads | table | trailer (64 B)`, see docs/FORMAT.md. All
offsets are known before the first byte is written, so nothing is written back. A payload is a byte
range of one box of one array, in C order. Each 64 KiB chunk of a payload has a CRC32C, XORed with
the CRC32C of (attempt, rank, file number, file offset), so bytes that are right but in the wrong
place are found too.
"""

from __future__ import annotations

import base64
import binascii
import struct
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec

from shardckpt import native
from shardckpt.errors import CorruptCheckpointError, FormatError
from shardckpt.format.root import FORMAT_VERSION, check_version
from shardckpt.format.sealed import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_BYTES: Final = 64 * 1024
PAGE_BYTES: Final = 4096
ALIGNED_FROM_BYTES: Final = 1 << 20
SMALL_ALIGN_BYTES: Final = 64
HEADER_BYTES: Final = PAGE_BYTES
TRAILER_BYTES: Final = 64
MAX_FILE_BYTES: Final = 16 << 30
MAX_TABLE_BYTES: Final = 256 << 20
MAX_DIMS: Final = 64

_HEADER_MAGIC: Final = b"SHARDCK\x01"
_TRAILER_MAGIC: Final = b"KCDRAHS\x01"
# magic, version, rank, file number, attempt (padded with zeros), crc of everything before
_HEADER: Final = struct.Struct("<8sIIQ128sI")
# magic, table offset, table bytes, digest of the table (hex), crc of everything before
_TRAILER: Final = struct.Struct("<8sQQ32sI")
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Shape: TypeAlias = Annotated[list[Count], msgspec.Meta(max_length=MAX_DIMS)]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What lies where in one shard file, in columns; enough to rebuild the manifest.

    Attributes:
        format: Version of the format.
        features: Features a reader must know.
        attempt: Directory name of the attempt.
        step: Training step.
        rank: Rank that wrote the file.
        world_size: Ranks of the attempt.
        file: Number of this file among the rank's files.
        keys: Arrays that have payloads here.
        dtypes: Canonical dtype of each key.
        shapes: Global shape of each key.
        key_ids: For each payload the index into `keys`.
        boxes: For each payload offsets and then shape of its box, all in one list.
        starts: For each payload the first byte of the box it holds.
        lengths: Bytes of each payload.
        offsets: Byte of the file where each payload starts.
        crcs: One u32 (little-endian) per chunk of every payload, base64.
        per_rank: This rank's own values, tagged JSON by key.
    """

    format: int
    features: list[str]
    attempt: str
    step: int
    rank: int
    world_size: int
    file: int
    keys: list[str]
    dtypes: list[str]
    shapes: list[_Shape]
    key_ids: list[Count]
    boxes: list[Count]
    starts: list[Count]
    lengths: list[Count]
    offsets: list[Count]
    crcs: str
    per_rank: dict[str, msgspec.Raw]


def encode_header(attempt: str, rank: int, file: int) -> bytes:
    """Return the first 4096 bytes of a shard file."""
    head = _HEADER.pack(_HEADER_MAGIC, FORMAT_VERSION, rank, file, attempt.encode(), 0)[:-4]
    return (head + native.crc32c(head).to_bytes(4, "little")).ljust(HEADER_BYTES, b"\0")


def check_header(data: bytes, *, attempt: str, rank: int, file: int, what: str) -> None:
    """Check that a file says it is the one that was opened.

    Raises:
        CorruptCheckpointError: Another file's header, or a damaged one.
        FormatError: Another version.
    """
    if len(data) < HEADER_BYTES or data[:8] != _HEADER_MAGIC:
        raise CorruptCheckpointError(f"{what}: not a shard file (no header)")
    head = data[: _HEADER.size]
    _, version, said_rank, said_file, said_attempt, crc = _HEADER.unpack(head)
    if native.crc32c(head[:-4]) != crc or data[_HEADER.size : HEADER_BYTES].strip(b"\0"):
        raise CorruptCheckpointError(f"{what}: the header's checksum does not match")
    check_version(version, [], what)
    said = (said_attempt.rstrip(b"\0").decode("ascii", "replace"), said_rank, said_file)
    if said != (attempt, rank, file):
        raise CorruptCheckpointError(
            f"{what}: the header says attempt {said[0]}, rank {said[1]}, file {said[2]}; "
            f"expected {attempt}, rank {rank}, file {file}. The file was swapped or copied here."
        )


def encode_tail(table: Table, table_offset: int) -> tuple[bytes, str]:
    """Return the bytes of table and trailer, and the table's digest."""
    body = msgspec.json.encode(table)
    table_digest = digest(body)
    trailer = _TRAILER.pack(_TRAILER_MAGIC, table_offset, len(body), table_digest.encode(), 0)[:-4]
    trailer += native.crc32c(trailer).to_bytes(4, "little")
    return body + trailer.ljust(TRAILER_BYTES, b"\0"), table_digest


def decode_trailer(data: bytes, file_bytes: int, what: str) -> tuple[int, int, str]:
    """Return `(table_offset, table_bytes, table_digest)` from the last 64 bytes of a file.

    Raises:
        CorruptCheckpointError: Truncated, extended or damaged.
    """
    parts = data[: _TRAILER.size]
    if len(data) != TRAILER_BYTES or parts[:8] != _TRAILER_MAGIC:
        raise CorruptCheckpointError(
            f"{what}: no trailer at the end of {file_bytes} bytes; truncated or extended"
        )
    _, offset, nbytes, table_digest, crc = _TRAILER.unpack(parts)
    if native.crc32c(parts[:-4]) != crc or data[_TRAILER.size :].strip(b"\0"):
        raise CorruptCheckpointError(f"{what}: the trailer's checksum does not match")
    if offset + nbytes + TRAILER_BYTES != file_bytes or nbytes > MAX_TABLE_BYTES:
        raise CorruptCheckpointError(
            f"{what}: the trailer puts the table at {offset}+{nbytes} of {file_bytes} bytes"
        )
    return offset, nbytes, table_digest.decode("ascii", "replace")


def decode_table(
    data: bytes, *, table_digest: str, attempt: str, rank: int, file: int, what: str
) -> Table:
    """Return a table after checking everything that can be checked without the payloads.

    Raises:
        CorruptCheckpointError: The digest differs, or the columns contradict each other.
        FormatError: Another version.
    """
    found = digest(data)
    if found != table_digest:
        raise CorruptCheckpointError(
            f"{what}: the table's digest is {found}, expected {table_digest}"
        )
    try:
        table = msgspec.json.decode(data, type=Table)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise FormatError(f"{what}: table: {error}") from error
    check_version(table.format, table.features, what)
    if (table.attempt, table.rank, table.file) != (attempt, rank, file):
        raise CorruptCheckpointError(
            f"{what}: the table is of {table.attempt}, rank {table.rank}, file {table.file}"
        )
    _check_columns(table, what)
    return table


def chunk_starts(lengths: Sequence[int]) -> list[int]:
    """Return the position of the first chunk of each payload, and how many chunks there are."""
    return list(accumulate([-(-nbytes // CHUNK_BYTES) for nbytes in lengths], initial=0))


def dims_before(table: Table) -> list[int]:
    """Return for each payload how many dims the boxes before it have, and their sum."""
    num_dims = list(map(len, table.shapes))
    return list(accumulate(map(num_dims.__getitem__, table.key_ids), initial=0))


def crc_seed(attempt: str, rank: int, file: int) -> int:
    """Return the CRC that binds every chunk's checksum to its file."""
    return native.crc32c(f"{attempt}/{rank}/{file}".encode())


def encode_crcs(crcs: bytes) -> str:
    """Return chunk checksums as the table holds them."""
    return base64.b64encode(crcs).decode()


def decode_crcs(table: Table, num_chunks: int, what: str) -> bytes:
    """Return chunk checksums of all payloads, four bytes each.

    Args:
        table: The table.
        num_chunks: Chunks of all its payloads.
        what: The file, for messages.

    Raises:
        CorruptCheckpointError: Not base64, or not one per chunk.
    """
    try:
        crcs = base64.b64decode(table.crcs, validate=True)
    except binascii.Error as error:
        raise CorruptCheckpointError(f"{what}: checksums: {error}") from error
    if len(crcs) != 4 * num_chunks:
        raise CorruptCheckpointError(
            f"{what}: {len(crcs)} bytes of checksums, expected {4 * num_chunks}"
        )
    return crcs


def _check_columns(table: Table, what: str) -> None:
    payloads = len(table.key_ids)
    columns = (table.starts, table.lengths, table.offsets)
    if any(len(column) != payloads for column in columns) or not (
        len(table.keys) == len(table.dtypes) == len(table.shapes)
    ):
        raise CorruptCheckpointError(f"{what}: the table's columns differ in length")
    if len(set(table.keys)) != len(table.keys):
        raise CorruptCheckpointError(f"{what}: the table lists a key twice")
    if max(table.key_ids, default=-1) >= len(table.keys):
        raise CorruptCheckpointError(f"{what}: a payload belongs to no key of the table")
    num_dims = list(map(len, table.shapes))
    if len(table.boxes) != 2 * sum(map(num_dims.__getitem__, table.key_ids)):
        raise CorruptCheckpointError(f"{what}: the table's boxes do not fit its payloads")
