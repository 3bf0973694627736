"""The load plan: which bytes of which files go where. Pure once the tables are open.

Layer: load. Every wanted box is met with the saved shards; the bytes needed are rounded to checksum
chunks; neighbours in a file are read together. Where whole chunks lie contiguously in the target
they go there as they are, the rest by rows of a strided copy. Coverage is proved here,
before the first byte is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from shardckpt.errors import CorruptCheckpointError
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.format.shares import replica_share
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.runs import element_runs, element_strides, inner_run, single_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardckpt.format.manifest import SavedTensor
    from shardckpt.geometry.box import Box, Shape
    from shardckpt.load.open import OpenCheckpoint, OpenFile, SavedPayload
    from shardckpt.state import HostArray

READ_BYTES: Final = 8 << 20
# Fewer bytes are not worth pieces of their own between the ends of a range.
_DIRECT_FROM_BYTES: Final = 256 * 1024
_MERGE_GAP_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Wanted:
    """One box of a saved array and the host memory it goes to.

    Attributes:
        tensor: The saved array.
        box: Region wanted, in global coordinates.
        target: Memory of the saved dtype; `target.shape == box.shape`.
    """

    tensor: SavedTensor
    box: Box
    target: HostArray


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole chunks of one payload.

    Attributes:
        payload: The payload.
        start: First byte in the payload, a chunk multiple.
        stop: One past the last; a chunk multiple or the payload's end.
        wanted: Where they go.
        inner: The part of the shard that is wanted, in coordinates of the shard.
        direct_address: Where all of them go as they are, or 0 where `copy_rows_of` says what goes
            where.
    """

    payload: SavedPayload
    start: int
    stop: int
    wanted: Wanted
    inner: Box
    direct_address: int

    @property
    def file_start(self) -> int:
        """First byte in the file."""
        return self.payload.offset + self.start

    @property
    def file_stop(self) -> int:
        """One past the last byte in the file."""
        return self.payload.offset + self.stop


@dataclass(slots=True)
class Read:
    """One ranged read: contiguous pieces of a file, at most about 8 MiB."""

    file: OpenFile
    start: int
    stop: int
    pieces: list[Piece] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All reads of one rank, in file order, and what they cost.

    Attributes:
        reads: Ranged reads.
        read_bytes: Bytes that will be read, chunk rounding included.
        needed_bytes: Bytes that are wanted.
    """

    reads: tuple[Read, ...]
    read_bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class _Met:
    """One saved shard that a wanted box meets; many arrays of one shape and layout share it.

    Attributes:
        shard: The saved shard.
        ranks: Who holds its replicas.
        inner: The wanted part, in coordinates of the shard.
        span: First and one past the last element of `inner` in the shard.
        run: The same where `inner` is one contiguous range, else None.
        target_run: Where that range starts in a contiguous target, or None where it is cut there.
    """

    shard: Box
    ranks: tuple[int, ...]
    inner: Box
    span: tuple[int, int]
    run: tuple[int, int] | None
    target_run: int | None


def plan_load(checkpoint: OpenCheckpoint, wanted: Sequence[Wanted]) -> LoadPlan:
    """Return the reads that fill every wanted box exactly once.

    Raises:
        CorruptCheckpointError: Some byte is in no file, or in two.
        StorageError: A table cannot be read.
    """
    pieces: dict[str, list[Piece]] = {}
    files: dict[str, OpenFile] = {}
    known: dict[tuple[int, Box, Shape], list[_Met]] = {}
    needed = 0
    for want in wanted:
        spec = want.tensor.spec
        needed += want.box.num_elements * spec.itemsize_bytes
        case = (id(want.tensor.layout), want.box, spec.shape)
        if case not in known:
            known[case] = list(_met(want))
        for met in known[case]:
            for file, piece in _pieces(checkpoint, want, met):
                files[file.key] = file
                pieces.setdefault(file.key, []).append(piece)
    reads: list[Read] = []
    for key in sorted(pieces):
        reads += _reads(files[key], pieces[key])
    return LoadPlan(tuple(reads), sum(r.stop - r.start for r in reads), needed)


def _met(want: Wanted) -> Iterator[_Met]:
    """Yield the saved shards that a wanted box meets."""
    for shard, ranks in want.tensor.layout.shards_touching(want.box, want.tensor.spec.shape):
        common = shard.intersect(want.box)
        if common is None:
            continue
        inner = common.relative_to(shard)
        run = single_run(inner, shard.shape)
        target_run = single_run(common.relative_to(want.box), want.box.shape)
        yield _Met(
            shard,
            ranks,
            inner,
            _span(inner, shard.shape),
            run,
            None if target_run is None else target_run[0],
        )


def _pieces(
    checkpoint: OpenCheckpoint, want: Wanted, met: _Met
) -> Iterator[tuple[OpenFile, Piece]]:
    tensor = want.tensor
    item = tensor.spec.itemsize_bytes
    first, last = met.span[0] * item, met.span[1] * item
    nbytes = met.shard.num_elements * item
    for replica, rank in enumerate(met.ranks):
        start, stop = replica_share(nbytes, len(met.ranks), tensor.owner, replica)
        if max(start, first) >= min(stop, last):
            continue
        for file, payload in _payloads(checkpoint, tensor.key, met.shard, rank, start, stop):
            for piece in _chunks(payload, met, want, item):
                yield file, piece


def _payloads(
    checkpoint: OpenCheckpoint, key: str, shard: Box, rank: int, start: int, stop: int
) -> list[tuple[OpenFile, SavedPayload]]:
    """Return the payloads that hold bytes `[start, stop)` of a shard, proved to tile it."""
    found = [(f, p) for f in checkpoint.files_of(rank) for p in f.by_shard.get((key, shard), ())]
    found.sort(key=lambda fp: fp[1].start)
    position = start
    for _, payload in found:
        if payload.start != position:
            break
        position += payload.nbytes
    if position != stop or not found:
        raise CorruptCheckpointError(
            f"{checkpoint.manifest.attempt}, key {key!r}: the files of rank {rank} should hold "
            "bytes "
            f"[{start}, {stop}) of {shard}, their tables list "
            f"{[(p.start, p.start + p.nbytes) for _, p in found]}"
        )
    return found


def _chunks(payload: SavedPayload, met: _Met, want: Wanted, item: int) -> Iterator[Piece]:
    """Yield the chunk-rounded pieces of one payload that hold elements wanted of its shard."""
    run, inner = met.run, met.inner
    if run is None:
        for start, stop in _chunk_ranges(payload, met.shard, inner, item):
            for cut in range(start, stop, READ_BYTES):
                yield Piece(payload, cut, min(stop, cut + READ_BYTES), want, inner, 0)
        return
    first = max(run[0] * item - payload.start, 0)
    last = min(run[1] * item - payload.start, payload.nbytes)
    if first >= last:
        return
    start, stop = _round_out(first, last, payload.nbytes)
    direct = _direct_base(payload, met, want, item)
    inside_start = -(-first // CHUNK_BYTES) * CHUNK_BYTES
    inside_stop = last if last == payload.nbytes else last // CHUNK_BYTES * CHUNK_BYTES
    is_short = inside_stop - inside_start < _DIRECT_FROM_BYTES
    if direct is None or (is_short and (inside_start, inside_stop) != (start, stop)):
        inside_start = inside_stop = stop
    for low, high, base in (
        (start, inside_start, None),
        (inside_start, inside_stop, direct),
        (inside_stop, stop, None),
    ):
        for cut in range(low, high, READ_BYTES):
            address = 0 if base is None else base + cut
            yield Piece(payload, cut, min(high, cut + READ_BYTES), want, inner, address)


def _direct_base(payload: SavedPayload, met: _Met, want: Wanted, item: int) -> int | None:
    """Return where byte 0 of the payload would lie, if the target is as contiguous."""
    if met.run is None or met.target_run is None or not want.target.is_contiguous:
        return None
    return want.target.address + (met.target_run - met.run[0]) * item + payload.start


def _chunk_ranges(
    payload: SavedPayload, shard: Box, inner: Box, item: int
) -> Iterator[tuple[int, int]]:
    """Yield ascending ranges of whole chunks that hold any run of `inner`."""
    current: tuple[int, int] | None = None
    for run_start, run_stop in _runs_or_span(inner, shard, item):
        first = max(run_start * item - payload.start, 0)
        last = min(run_stop * item - payload.start, payload.nbytes)
        if first >= last:
            continue
        start, stop = _round_out(first, last, payload.nbytes)
        if current is not None and start <= current[1]:
            current = (current[0], max(stop, current[1]))
        else:
            if current is not None:
                yield current
            current = (start, stop)
    if current is not None:
        yield current


def _runs_or_span(inner: Box, shard: Box, item: int) -> Iterator[tuple[int, int]]:
    """Yield runs; one span where every chunk between them is needed anyway."""
    runs = element_runs(inner, shard.shape)
    first = next(runs, None)
    second = next(runs, None)
    if first is None:
        return
    if second is None:
        yield first
        return
    # With a single outer dim all gaps are equal; more outer dims have larger gaps between groups.
    outer_dims, _ = inner_run(inner, shard.shape)
    if outer_dims == 1 and (second[0] - first[1]) * item < CHUNK_BYTES:
        yield _span(inner, shard.shape)
        return
    yield first
    yield second
    yield from runs


def _span(inner: Box, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return first and one past the last element of a box in an array of `shape`, in elements."""
    if inner.num_elements == 0:
        return 0, 0
    strides = element_strides(shape)
    first = sum(o * s for o, s in zip(inner.offsets, strides, strict=True))
    last = sum((o + n - 1) * s for o, n, s in zip(inner.offsets, inner.shape, strides, strict=True))
    return first, last + 1


def _round_out(first: int, last: int, nbytes: int) -> tuple[int, int]:
    return first // CHUNK_BYTES * CHUNK_BYTES, min(-(-last // CHUNK_BYTES) * CHUNK_BYTES, nbytes)


def _reads(file: OpenFile, pieces: list[Piece]) -> list[Read]:
    """Group pieces of one file into ranged reads, in file order."""
    reads: list[Read] = []
    pieces.sort(key=attrgetter("file_start"))
    last: Read | None = None
    for piece in pieces:
        if (
            last is None
            or piece.file_start > last.stop + _MERGE_GAP_BYTES
            or piece.file_stop - last.start > READ_BYTES + CHUNK_BYTES
        ):
            last = Read(file, piece.file_start, piece.file_stop)
            reads.append(last)
        last.stop = max(last.stop, piece.file_stop)
        last.pieces.append(piece)
    return reads


def copy_rows_of(piece: Piece, scratch_address: int) -> Iterator[tuple[int, ...]]:
    """Yield `native.copy_rows` rows that move a piece from memory to its target.

    Args:
        piece: A piece that is not direct.
        scratch_address: Address of the piece's first byte.
    """
    tensor = piece.wanted.tensor
    item = tensor.spec.itemsize_bytes
    shard, want, target = piece.payload.box, piece.wanted.box, piece.wanted.target
    nbytes = piece.stop - piece.start
    if nbytes == shard.num_elements * item and want == shard and target.is_contiguous:
        yield (target.address, scratch_address, 1, 1, nbytes, 1, 1)
        return
    strides = element_strides(shard.shape)
    base = (piece.payload.start + piece.start) // item
    last = (piece.payload.start + piece.stop) // item
    for part in ranges_to_boxes(base, last, shard.shape):
        common = part.intersect(piece.inner) if part.shape else part
        if common is None:
            continue
        source = sum(o * s for o, s in zip(common.offsets, strides, strict=True)) - base
        outer = [
            o + s - w for o, s, w in zip(common.offsets, shard.offsets, want.offsets, strict=True)
        ]
        address = target.address + sum(
            o * s for o, s in zip(outer, target.strides_bytes, strict=True)
        )
        yield (
            address, scratch_address + source * item, item, len(common.shape), *common.shape,
            *target.strides_bytes, *(s * item for s in strides),
        )  # fmt: skip
