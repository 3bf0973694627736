"""Open: one committed checkpoint, its manifest and the tables that are needed, all checked.

Layer: load. Nothing here trusts what it reads: sizes, digests, names and ranges are compared before
use.
"""

from __future__ import annotations

import ctypes
import operator
from bisect import bisect_left, bisect_right
from functools import cached_property
from itertools import count
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
    MAX_TABLE_BYTES,
    TRAILER_BYTES,
    Table,
    check_header,
    chunk_starts,
    crc_seed,
    decode_crcs,
    decode_table,
    decode_trailer,
    dims_before,
)
from shardckpt.geometry.box import Box
from shardckpt.geometry.layout import BoxLayout
from shardckpt.geometry.regions import coverage_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.storage.base import Reader, Storage


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


class OpenFile:
    """One shard file, open, its table checked.

    Of most tables a loader wants few payloads, so these are made when they are asked for.
    """

    def __init__(
        self, key: str, record: FileRecord, reader: Reader, table: Table, what: str
    ) -> None:
        """Take over a reader and a table that `decode_table` returned.

        Raises:
            CorruptCheckpointError: A payload lies outside of the file, or a checksum is missing.
        """
        self.key: Final = key
        self.rank: Final = record.rank
        self.number: Final = record.number
        self.reader: Final = reader
        self.table: Final = table
        self._chunk_at = chunk_starts(table.lengths)
        self.crcs: Final = decode_crcs(table, self._chunk_at[-1], what)
        self.seed: Final = crc_seed(table.attempt, record.rank, record.number)
        _check_places(table, record, what)
        self._dims_before = dims_before(table)
        self._key_ids = dict(zip(table.keys, count(), strict=False))
        # Payloads in the order of their keys, which is the order of the table as a rule.
        self._rows: Sequence[int] = range(len(table.key_ids))
        self._ids_of_rows = sorted(table.key_ids)
        if self._ids_of_rows != table.key_ids:
            self._rows = sorted(self._rows, key=table.key_ids.__getitem__)
        self._boxes: dict[tuple[int, ...], Box] = {}
        self._made: dict[str, list[SavedPayload]] = {}

    @cached_property
    def payloads(self) -> list[SavedPayload]:
        """All payloads, by offset."""
        return sorted(
            (payload for key in self.table.keys for payload in self._of_key(key)),
            key=attrgetter("offset"),
        )

    def payloads_of(self, key: str, shard: Box) -> Sequence[SavedPayload]:
        """Return the payloads of one shard, in the order of the table."""
        made = self._made.get(key)
        if made is None:
            made = self._of_key(key)
        if len(made) == 1 and made[0].box == shard:
            return made
        return [payload for payload in made if payload.box == shard]

    def _of_key(self, key: str) -> list[SavedPayload]:
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = [self._payload(key, row) for row in self._rows_of(key)]
        return made

    def _rows_of(self, key: str) -> Sequence[int]:
        key_id = self._key_ids.get(key)
        if key_id is None:
            return ()
        first = bisect_left(self._ids_of_rows, key_id)
        return self._rows[first : bisect_right(self._ids_of_rows, key_id, first)]

    def _payload(self, key: str, row: int) -> SavedPayload:
        table = self.table
        start, stop = self._dims_before[row], self._dims_before[row + 1]
        numbers = tuple(table.boxes[2 * start : 2 * stop])
        box = self._boxes.get(numbers)
        if box is None:
            num_dims = stop - start
            box = self._boxes[numbers] = Box(numbers[:num_dims], numbers[num_dims:])
        return SavedPayload(
            row, key, box, table.starts[row], table.lengths[row], table.offsets[row],
            self._chunk_at[row],
        )  # fmt: skip


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
        # At once: the table, as the manifest says, and the trailer, which says so, too.
        tail_bytes = min(record.table_bytes, MAX_TABLE_BYTES) + TRAILER_BYTES
        begin = max(0, record.nbytes - tail_bytes)
        tail = read_bytes(reader, begin, record.nbytes - begin)
        trailer = tail[-TRAILER_BYTES:]
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
        data = tail[:nbytes]
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
    return OpenFile(key, record, reader, table, what)


def _check_places(table: Table, record: FileRecord, what: str) -> None:
    ends = map(operator.add, table.offsets, table.lengths)
    if (
        min(table.offsets, default=HEADER_BYTES) < HEADER_BYTES
        or max(ends, default=0) > record.table_offset
        or any(start % CHUNK_BYTES for start in set(table.starts))
    ):
        raise CorruptCheckpointError(f"{what}: a payload points outside the payloads of its file")
