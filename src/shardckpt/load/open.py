"""Open: one committed checkpoint, its manifest and the tables that are needed, all checked.

Layer: load. Nothing here trusts what it reads: sizes, digests, names and ranges are compared before
use.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.format.manifest import (
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    SavedTensor,
    decode_manifest,
    file_records,
    shard_key,
    tensors,
)
from shardckpt.format.root import MANIFEST
from shardckpt.format.sealed import digest
from shardckpt.format.shard_file import (
    CHUNK_BYTES,
    HEADER_BYTES,
    TRAILER_BYTES,
    Table,
    check_header,
    crc_seed,
    decode_crcs,
    decode_table,
    decode_trailer,
    payload_num_chunks,
)
from shardckpt.geometry.box import Box
from shardckpt.geometry.layout import BoxLayout
from shardckpt.geometry.regions import coverage_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.geometry.box import Shape
    from shardckpt.storage.base import Reader, Storage

_MAX_TABLES_PROBLEM: Final = "points outside the payloads of its file"


class SavedPayload(msgspec.Struct, frozen=True, gc=False):
    """One payload of an open shard file.

    Attributes:
        index: Position in the table.
        key: Array it belongs to.
        box: Box of the shard it belongs to.
        start: First byte of that box's C-order bytes.
        nbytes: Bytes.
        offset: Byte of the file.
        first_chunk: Position of its first checksum.
    """

    index: int
    key: str
    box: Box
    start: int
    nbytes: int
    offset: int
    first_chunk: int


@dataclass(slots=True)
class OpenFile:
    """One shard file, open, its table checked; payloads by offset."""

    key: str
    rank: int
    number: int
    reader: Reader
    table: Table
    crcs: bytes
    seed: int
    payloads: list[SavedPayload]
    by_shard: dict[tuple[str, Shape, Shape], list[SavedPayload]] = field(default_factory=dict)

    def payloads_of(self, key: str, shard: Box) -> Sequence[SavedPayload]:
        """Return the payloads of one shard, in the order of the table."""
        return self.by_shard.get((key, shard.offsets, shard.shape), ())


class OpenCheckpoint:
    """A committed checkpoint open for reading; close it when done."""

    def __init__(self, storage: Storage, attempt: str, manifest_digest: str) -> None:
        """Read and check the manifest.

        Raises:
            CorruptCheckpointError: The manifest is missing, damaged or not the committed one.
            FormatError: It is of another version.
            StorageError: It cannot be read.
        """
        key = f"{attempt}/{MANIFEST}"
        try:
            data = storage.get(key, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise CorruptCheckpointError(
                f"{storage.url}/{key} is missing, though the step is committed"
            ) from None
        found = digest(data)
        if found != manifest_digest:
            raise CorruptCheckpointError(
                f"{storage.url}/{key}: digest is {found}, the commit log says {manifest_digest}"
            )
        self.storage = storage
        self.manifest: Manifest = decode_manifest(data, key)
        if self.manifest.attempt != attempt:
            raise CorruptCheckpointError(f"{key} describes {self.manifest.attempt}")
        self._files: dict[tuple[int, int], OpenFile] = {}
        self._by_rank: dict[int, list[OpenFile]] = {}

    @cached_property
    def tensors(self) -> dict[str, SavedTensor]:
        """Every saved array; irregular boxes are known to cover theirs exactly once.

        Raises:
            FormatError: A layout does not make sense.
            CorruptCheckpointError: Boxes do not cover their array exactly once.
        """
        found = tensors(self.manifest)
        for tensor in found.values():
            if isinstance(tensor.layout, BoxLayout):
                problem = coverage_problem(tensor.spec.shape, tensor.layout.boxes)
                if problem:
                    raise CorruptCheckpointError(
                        f"{self.manifest.attempt}, key {tensor.key!r}: {problem}"
                    )
        return found

    @cached_property
    def records(self) -> list[list[FileRecord]]:
        """The files of each rank."""
        return file_records(self.manifest)

    def files_of(self, rank: int) -> list[OpenFile]:
        """Return the open files of one rank.

        Raises:
            CorruptCheckpointError: A file is missing, of another size, or damaged.
            StorageError: A file cannot be read.
        """
        files = self._by_rank.get(rank)
        if files is None:
            files = self._by_rank[rank] = [self._open(record) for record in self.records[rank]]
        return files

    def close(self) -> None:
        """Close every file that was opened."""
        for file in self._files.values():
            file.reader.close()
        self._files.clear()
        self._by_rank.clear()

    def _open(self, record: FileRecord) -> OpenFile:
        known = self._files.get((record.rank, record.number))
        if known is not None:
            return known
        manifest = self.manifest
        key = shard_key(manifest.attempt, record.rank, record.number, manifest.world_size)
        what = f"{self.storage.url}/{key}"
        try:
            reader = self.storage.open(key)
        except FileNotFoundError:
            raise CorruptCheckpointError(
                f"{what} is missing, though the step is committed"
            ) from None
        try:
            file = _read_table(reader, record, manifest.attempt, key, what)
        except BaseException:
            reader.close()
            raise
        self._files[(record.rank, record.number)] = file
        return file


def read_bytes(reader: Reader, offset: int, nbytes: int) -> bytes:
    """Return `nbytes` of an object from `offset`.

    Raises:
        StorageError: The object ends before.
    """
    buffer = ctypes.create_string_buffer(nbytes)
    reader.read_into(offset, ctypes.addressof(buffer), nbytes)
    return buffer.raw


def _read_table(reader: Reader, record: FileRecord, attempt: str, key: str, what: str) -> OpenFile:
    if reader.nbytes != record.nbytes:
        raise CorruptCheckpointError(
            f"{what} has {reader.nbytes} bytes, the manifest says {record.nbytes} (rank "
            f"{record.rank}); "
            "the file was truncated, extended or swapped"
        )
    try:
        header = read_bytes(reader, 0, HEADER_BYTES)
        trailer = read_bytes(reader, record.nbytes - TRAILER_BYTES, TRAILER_BYTES)
        check_header(header, attempt=attempt, rank=record.rank, file=record.number, what=what)
        offset, nbytes, table_digest = decode_trailer(trailer, record.nbytes, what)
        if (offset, nbytes, table_digest) != (
            record.table_offset,
            record.table_bytes,
            record.digest,
        ):
            raise CorruptCheckpointError(
                f"{what}: the trailer and the manifest disagree about the table"
            )
        data = read_bytes(reader, offset, nbytes)
    except (StorageError, ValueError) as error:
        if isinstance(error, CorruptCheckpointError | StorageError):
            raise
        raise CorruptCheckpointError(f"{what}: {error}") from error
    table = decode_table(
        data,
        table_digest=record.digest,
        attempt=attempt,
        rank=record.rank,
        file=record.number,
        what=what,
    )
    file = OpenFile(
        key, record.rank, record.number, reader, table, decode_crcs(table, what),
        crc_seed(attempt, record.rank, record.number), [],
    )  # fmt: skip
    _index_payloads(file, record, what)
    return file


def _index_payloads(file: OpenFile, record: FileRecord, what: str) -> None:
    table = file.table
    boxes: dict[tuple[int, ...], Box] = {}
    position = chunk = 0
    columns = zip(table.key_ids, table.starts, table.lengths, table.offsets, strict=True)
    for index, (key_id, start, nbytes, offset) in enumerate(columns):
        num_dims = len(table.shapes[key_id])
        numbers = tuple(table.boxes[position : position + 2 * num_dims])
        position += 2 * num_dims
        if offset < HEADER_BYTES or offset + nbytes > record.table_offset or start % CHUNK_BYTES:
            raise CorruptCheckpointError(f"{what}: payload {index} {_MAX_TABLES_PROBLEM}")
        box = boxes.get(numbers)
        if box is None:
            box = boxes[numbers] = Box(numbers[:num_dims], numbers[num_dims:])
        key = table.keys[key_id]
        payload = SavedPayload(index, key, box, start, nbytes, offset, chunk)
        chunk += payload_num_chunks(nbytes)
        file.payloads.append(payload)
        file.by_shard.setdefault((key, box.offsets, box.shape), []).append(payload)
    file.payloads.sort(key=attrgetter("offset"))
