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

import msgspec

from shardckpt.errors import CorruptCheckpointError
from shardckpt.format.manifest import SavedTensor
from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.format.shares import replica_share, replicas_of
from shardckpt.geometry.box import Box
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.runs import element_runs, element_strides, inner_run, single_run
from shardckpt.load.open import SavedPayload
from shardckpt.state import HostArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardckpt.load.open import OpenCheckpoint, OpenFile

READ_BYTES: Final = 8 << 20
# Fewer bytes are not worth pieces of their own between the ends of a range.
_DIRECT_FROM_BYTES: Final = 256 * 1024
_MERGE_GAP_BYTES: Final = 4096


# Structs, because one of each is made for every array, and a frozen dataclass takes ten times as
# long to make.
class Wanted(msgspec.Struct, frozen=True, gc=False):
    """One box of a saved array and the host memory it goes to.

    Attributes:
        tensor: The saved array.
        box: Region wanted, in global coordinates.
        target: Memory of the saved dtype; `target.shape == box.shape`.
    """

    tensor: SavedTensor
    box: Box
    target: HostArray


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Whole chunks of one payload.

    Attributes:
        payload: The payload.
        start: First byte in the payload, a chunk multiple.
        stop: One past the last; a chunk multiple or the payload's end.
        wanted: Where they go.
        inner: The part of the shard that is wanted, in coordinates of the shard.
        direct_address: Where all of them go as they are, or 0 where `copy_rows_of` says what goes
            where.
        file_start: First byte in the file.
        file_stop: One past the last byte in the file.
    """

    payload: SavedPayload
    start: int
    stop: int
    wanted: Wanted
    inner: Box
    direct_address: int
    file_start: int
    file_stop: int


def piece_of(
    payload: SavedPayload, start: int, stop: int, wanted: Wanted, inner: Box, direct_address: int
) -> Piece:
    """Return the piece of a payload's bytes `[start, stop)`."""
    offset = payload.offset
    return Piece(payload, start, stop, wanted, inner, direct_address, offset + start, offset + stop)


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
class _Share:
    """What one rank holds of a saved shard that a wanted box meets.

    Many arrays of one shape and layout share it. Bytes count from the start of the shard.

    Attributes:
        shard: The saved shard.
        rank: Who holds bytes `[start, stop)` of it.
        start: First byte held, of the whole shard in C order.
        stop: One past the last.
        inner: The wanted part, in coordinates of the shard.
        run: First and one past the last byte of `inner`, where it is one contiguous range, else
            None.
        target_start: Where that range begins in a contiguous target, or None where it is cut there.
    """

    shard: Box
    rank: int
    start: int
    stop: int
    inner: Box
    run: tuple[int, int] | None
    target_start: int | None


def plan_load(checkpoint: OpenCheckpoint, wanted: Sequence[Wanted]) -> LoadPlan:
    """Return the reads that fill every wanted box exactly once.

    Raises:
        CorruptCheckpointError: Some byte is in no file, or in two.
        StorageError: A table cannot be read.
    """
    pieces: dict[str, tuple[OpenFile, list[Piece]]] = {}
    known: dict[tuple[object, ...], list[_Share]] = {}
    needed = 0
    for want in wanted:
        tensor = want.tensor
        item = tensor.spec.itemsize_bytes
        needed += want.box.num_elements * item
        box = want.box
        case = (
            id(tensor.layout),
            box.offsets,
            box.shape,
            tensor.spec.shape,
            item,
            tensor.owner,
            tensor.writers,
        )
        shares = known.get(case)
        if shares is None:
            shares = known[case] = list(_shares(want, item))
        for share in shares:
            for file, payload in _payloads(checkpoint, tensor.key, share):
                of_file = pieces.get(file.key)
                if of_file is None:
                    of_file = pieces[file.key] = (file, [])
                piece = _whole_piece(payload, share, want)
                if piece is not None:
                    of_file[1].append(piece)
                else:
                    of_file[1].extend(_chunks(payload, share, want, item))
    return load_plan_of(pieces, needed)


def load_plan_of(pieces: Mapping[str, tuple[OpenFile, list[Piece]]], needed_bytes: int) -> LoadPlan:
    """Return the reads that fetch pieces, by key of their file."""
    reads = [read for key in sorted(pieces) for read in _reads(*pieces[key])]
    return LoadPlan(tuple(reads), sum(r.stop - r.start for r in reads), needed_bytes)


def _shares(want: Wanted, item: int) -> Iterator[_Share]:
    """Yield what holds the bytes of the saved shards that a wanted box meets."""
    tensor = want.tensor
    for shard, ranks in tensor.layout.shards_touching(want.box, tensor.spec.shape):
        common = shard.intersect(want.box)
        if common is None:
            continue
        inner = common.relative_to(shard)
        first, last = (n * item for n in _span(inner, shard.shape))
        run = single_run(inner, shard.shape)
        target_run = single_run(common.relative_to(want.box), want.box.shape)
        nbytes = shard.num_elements * item
        for replica in replicas_of(nbytes, len(ranks), tensor.owner, tensor.writers, first, last):
            start, stop = replica_share(nbytes, len(ranks), tensor.owner, tensor.writers, replica)
            if max(start, first) < min(stop, last):
                yield _Share(
                    shard, ranks[replica], start, stop, inner,
                    None if run is None else (run[0] * item, run[1] * item),
                    None if run is None or target_run is None else target_run[0] * item,
                )  # fmt: skip


def _payloads(
    checkpoint: OpenCheckpoint, key: str, share: _Share
) -> list[tuple[OpenFile, SavedPayload]]:
    """Return the payloads that hold the bytes of a share, proved to tile it."""
    shard, position = share.shard, share.start
    found = [
        (file, payload)
        for file in checkpoint.files_of(share.rank)
        for payload in file.payloads_of(key, shard)
    ]
    if len(found) > 1:
        found.sort(key=lambda fp: fp[1].start)
    for _, payload in found:
        if payload.start != position:
            break
        position += payload.nbytes
    if position != share.stop or not found:
        raise CorruptCheckpointError(
            f"{checkpoint.manifest.attempt}, key {key!r}: the files of rank {share.rank} should "
            f"hold bytes [{share.start}, {share.stop}) of {shard}, their tables list "
            f"{[(p.start, p.start + p.nbytes) for _, p in found]}"
        )
    return found


def _whole_piece(payload: SavedPayload, share: _Share, want: Wanted) -> Piece | None:
    """Return the one piece of a payload that is wanted whole, as it is, and read at once."""
    run, nbytes, start = share.run, payload.nbytes, payload.start
    if (
        run is None
        or share.target_start is None
        or run[0] > start
        or run[1] < start + nbytes
        or nbytes > READ_BYTES
        or not want.target.is_contiguous
    ):
        return None
    address = want.target.address + share.target_start - run[0] + start
    return piece_of(payload, 0, nbytes, want, share.inner, address)


def _chunks(payload: SavedPayload, share: _Share, want: Wanted, item: int) -> Iterator[Piece]:
    """Yield the chunk-rounded pieces of one payload that hold elements wanted of its shard."""
    run, inner = share.run, share.inner
    if run is None:
        for start, stop in _chunk_ranges(payload, share.shard, inner, item):
            for cut in range(start, stop, READ_BYTES):
                yield piece_of(payload, cut, min(stop, cut + READ_BYTES), want, inner, 0)
        return
    first = max(run[0] - payload.start, 0)
    last = min(run[1] - payload.start, payload.nbytes)
    if first >= last:
        return
    start, stop = _round_out(first, last, payload.nbytes)
    inside_start = -(-first // CHUNK_BYTES) * CHUNK_BYTES
    inside_stop = last if last == payload.nbytes else last // CHUNK_BYTES * CHUNK_BYTES
    is_all_inside = inside_start == start and inside_stop == stop
    base = 0
    if share.target_start is None or not want.target.is_contiguous:
        inside_start = inside_stop = stop
    elif is_all_inside or inside_stop - inside_start >= _DIRECT_FROM_BYTES:
        # Where byte 0 of the payload would lie.
        base = want.target.address + share.target_start - run[0] + payload.start
    else:
        inside_start = inside_stop = stop
    for low, high in ((start, inside_start), (inside_start, inside_stop), (inside_stop, stop)):
        is_inside = inside_start <= low < inside_stop
        for cut in range(low, high, READ_BYTES):
            address = base + cut if is_inside else 0
            yield piece_of(payload, cut, min(high, cut + READ_BYTES), want, inner, address)


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
