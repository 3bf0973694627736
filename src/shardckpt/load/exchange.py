"""Read once: which rank reads the chunks that several ranks want. Pure.

Layer: load. Every rank says which ranges of which files it wants; from these every rank derives the
same batches. What one rank alone wants stays with its plan. What the same set of ranks wants is cut
into batches of at most 2 MiB, dealt to these ranks by bytes; one rank of each further host gets the
batch from its reader and hands it on there.

A range is cut without knowing where chunks begin: a chunk belongs to the extent that holds its
first byte. Only the last extent of a batch can be cut short that way, so a slot has room for one
chunk more than a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.load.plan import LoadPlan, Piece, load_plan_of, piece_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shardckpt.load.open import OpenFile, SavedPayload

# Small enough that what was read is still in a core's cache when the others copy it.
BATCH_BYTES: Final = 2 << 20
# A batch, the rest of its last chunk, and room for a mark behind it.
SLOT_BYTES: Final = BATCH_BYTES + CHUNK_BYTES + 4096
_LEAST_BATCH_BYTES: Final = 4 * CHUNK_BYTES
_ALIGN_BYTES: Final = 4096
# Exchanging costs a round of messages, some milliseconds. Below either bound that is more than it
# saves: a few chunks read twice come from the cache of the store or of the host.
_LEAST_SAVED_BYTES: Final = 4 * CHUNK_BYTES
_LEAST_SAVED_PERCENT: Final = 2

FileName = tuple[int, int]


class Wants(msgspec.Struct, frozen=True):
    """What one rank wants, in columns: file `numbers[i]` of the rank that saved it, and a range.

    Ranges of a file ascend and never touch; they begin and end where chunks do.
    """

    ranks: list[int]
    numbers: list[int]
    starts: list[int]
    stops: list[int]


@dataclass(frozen=True, slots=True)
class Extent:
    """The chunks of a file whose first byte lies in `[start, stop)`.

    Attributes:
        file: Rank that saved it, and number.
        start: First byte in the file.
        stop: One past the last; the last chunk may go on behind it.
        at: Byte of the batch's slot where `start` lies.
    """

    file: FileName
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that the same ranks want, read by one of them.

    Attributes:
        index: Position in the order that all ranks share.
        extents: What is read.
        providers: One rank of each host that wants it, the reader first, and the ranks of its host
            that want it, itself included.
    """

    index: int
    extents: tuple[Extent, ...]
    providers: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def reader(self) -> int:
        """The rank that reads it from storage."""
        return self.providers[0][0]

    def provider_for(self, rank: int) -> int | None:
        """Return from whose slot a rank copies; None where it wants nothing of it."""
        return next((provider for provider, ranks in self.providers if rank in ranks), None)


def wants_of(plan: LoadPlan) -> Wants:
    """Return the ranges that a rank's plan reads.

    Only neighbours are joined: a range never holds a payload that this rank does not want.
    """
    wants = Wants([], [], [], [])
    last: Piece | None = None
    for file, pieces in sorted(_pieces(plan).values(), key=lambda found: _name(found[0])):
        last = None
        for piece in pieces:
            if last is not None and _joins(last, piece):
                wants.stops[-1] = max(wants.stops[-1], piece.file_stop)
            else:
                wants.ranks.append(file.rank)
                wants.numbers.append(file.number)
                wants.starts.append(piece.file_start)
                wants.stops.append(piece.file_stop)
            if last is None or piece.file_stop >= last.file_stop:
                last = piece
    return wants


def assign(
    lists: Sequence[Wants], list_of_rank: Sequence[int], hosts: Sequence[str], *, spans: bool
) -> tuple[Batch, ...]:
    """Return what is exchanged, in the order that all ranks share; nothing where it does not pay.

    Args:
        lists: The different wants of the job.
        list_of_rank: Which of these each rank has.
        hosts: Where each rank runs; equal names share memory.
        spans: Whether ranks of different hosts can exchange, too.
    """
    ranks_of: list[list[int]] = [[] for _ in lists]
    for rank, index in enumerate(list_of_rank):
        ranks_of[index].append(rank)
    shared: dict[tuple[int, ...], list[tuple[FileName, int, int]]] = {}
    known: dict[int, list[tuple[int, ...]]] = {}
    loads = [0] * len(list_of_rank)
    plain = once = 0
    for file, start, stop, mask in _intervals(lists):
        if mask not in known:
            wanting = sorted(rank for index in _bits(mask) for rank in ranks_of[index])
            known[mask] = _domains(wanting, hosts, spans=spans)
        for ranks in known[mask]:
            plain += len(ranks) * (stop - start)
            once += stop - start
            if len(ranks) == 1:
                loads[ranks[0]] += stop - start
            else:
                shared.setdefault(ranks, []).append((file, start, stop))
    saved = plain - once
    if saved < _LEAST_SAVED_BYTES or saved * 100 < once * _LEAST_SAVED_PERCENT:
        return ()
    dealt: list[tuple[int, int, tuple[Extent, ...], tuple[tuple[int, tuple[int, ...]], ...]]] = []
    for number, (ranks, ranges) in enumerate(shared.items()):
        by_host = [tuple(r for r in ranks if hosts[r] == h) for h in _hosts(ranks, hosts)]
        order = sorted(ranks, key=lambda r: (loads[r], r))
        for turn, extents in enumerate(_cut(ranges, len(ranks))):
            reader = order[turn % len(order)]
            loads[reader] += sum(e.stop - e.start for e in extents)
            dealt.append((turn, number, extents, _providers(reader, by_host, turn)))
    # Turn by turn, so that no set of ranks waits until another one has all it wants.
    dealt.sort(key=lambda entry: entry[:2])
    return tuple(Batch(i, entry[2], entry[3]) for i, entry in enumerate(dealt))


def split_plan(
    plan: LoadPlan, batches: Iterable[Batch]
) -> tuple[LoadPlan, dict[int, list[tuple[Piece, int]]]]:
    """Part a rank's plan into what it reads for itself alone and what it copies out of batches.

    Args:
        plan: The rank's plan.
        batches: Those that this rank wants.

    Returns:
        The plan that is left, and by index of a batch pieces with their place in its slot.
    """
    extents: dict[FileName, list[tuple[Extent, int]]] = {}
    for batch in batches:
        for extent in batch.extents:
            extents.setdefault(extent.file, []).append((extent, batch.index))
    for found in extents.values():
        found.sort(key=lambda entry: entry[0].start)
    left: dict[str, tuple[OpenFile, list[Piece]]] = {}
    copied: dict[int, list[tuple[Piece, int]]] = {}
    for file, pieces in _pieces(plan).values():
        mine = extents.get(_name(file), [])
        starts = [extent.start for extent, _ in mine]
        for piece in pieces:
            position = piece.start
            index = max(0, bisect_right(starts, piece.file_start) - 1)
            for extent, number in mine[index:]:
                if extent.start >= piece.file_stop:
                    break
                low, high = _inside(piece.payload, extent.start, extent.stop)
                low, high = max(low, position), min(high, piece.stop)
                if low >= high:
                    continue
                if low > position:
                    left.setdefault(file.key, (file, []))[1].append(_part(piece, position, low))
                part = _part(piece, low, high)
                place = extent.at + part.file_start - extent.start
                copied.setdefault(number, []).append((part, place))
                position = high
            if position < piece.stop:
                left.setdefault(file.key, (file, []))[1].append(_part(piece, position, piece.stop))
    return load_plan_of(left, plan.needed_bytes), copied


def chunks_in(file: OpenFile, extent: Extent) -> list[tuple[SavedPayload, int, int]]:
    """Return the chunks of an extent: payload, first byte in it, one past the last."""
    found: list[tuple[SavedPayload, int, int]] = []
    first = bisect_right(file.payloads, extent.start, key=lambda payload: payload.offset)
    for payload in file.payloads[max(0, first - 1) :]:
        if payload.offset >= extent.stop:
            break
        low, high = _inside(payload, extent.start, extent.stop)
        if low < high:
            found.append((payload, low, high))
    return found


def files_of(plan: LoadPlan) -> Mapping[FileName, OpenFile]:
    """Return the files that a plan reads."""
    return {_name(read.file): read.file for read in plan.reads}


def _name(file: OpenFile) -> FileName:
    return file.rank, file.number


def _pieces(plan: LoadPlan) -> dict[str, tuple[OpenFile, list[Piece]]]:
    found: dict[str, tuple[OpenFile, list[Piece]]] = {}
    for read in plan.reads:
        found.setdefault(read.file.key, (read.file, []))[1].extend(read.pieces)
    return found


def _joins(last: Piece, piece: Piece) -> bool:
    """Return whether nothing but padding lies between two pieces of a file."""
    if piece.file_start <= last.file_stop:
        return True
    return (
        piece.start == 0
        and last.stop == last.payload.nbytes
        and piece.payload.index == last.payload.index + 1
        and piece.file_start - last.file_stop < _ALIGN_BYTES
    )


def _inside(payload: SavedPayload, start: int, stop: int) -> tuple[int, int]:
    """Return the range of a payload whose chunks begin in bytes `[start, stop)` of the file."""
    low = max(0, -(-(start - payload.offset) // CHUNK_BYTES) * CHUNK_BYTES)
    return low, min(-(-(stop - payload.offset) // CHUNK_BYTES) * CHUNK_BYTES, payload.nbytes)


def _part(piece: Piece, start: int, stop: int) -> Piece:
    if (start, stop) == (piece.start, piece.stop):
        return piece
    direct = piece.direct_address and piece.direct_address + start - piece.start
    return piece_of(piece.payload, start, stop, piece.wanted, piece.inner, direct)


def _intervals(lists: Sequence[Wants]) -> Iterator[tuple[FileName, int, int, int]]:
    """Yield the parts of files that the same lists want: file, start, stop, bits of the lists."""
    events: dict[FileName, list[tuple[int, int]]] = {}
    for index, wants in enumerate(lists):
        columns = zip(wants.ranks, wants.numbers, wants.starts, wants.stops, strict=True)
        for rank, number, start, stop in columns:
            events.setdefault((rank, number), []).extend(((start, 1 << index), (stop, 1 << index)))
    for file in sorted(events):
        mask = before = 0
        for position, bit in sorted(events[file]):
            if mask and position > before:
                yield file, before, position, mask
            mask ^= bit
            before = position


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _domains(ranks: list[int], hosts: Sequence[str], *, spans: bool) -> list[tuple[int, ...]]:
    """Return the sets of ranks that can exchange with each other."""
    if spans:
        return [tuple(ranks)]
    return [tuple(r for r in ranks if hosts[r] == host) for host in _hosts(ranks, hosts)]


def _hosts(ranks: Iterable[int], hosts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(hosts[rank] for rank in ranks))


def _providers(
    reader: int, by_host: list[tuple[int, ...]], turn: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    first = [(reader, ranks) for ranks in by_host if reader in ranks]
    others = [(r[turn % len(r)], r) for r in by_host if reader not in r]
    return (*first, *others)


def _cut(ranges: list[tuple[FileName, int, int]], num_ranks: int) -> Iterator[tuple[Extent, ...]]:
    """Cut ranges into batches, so many that each of the ranks gets about the same bytes."""
    total = sum(stop - start for _, start, stop in ranges)
    num_batches = -(-total // (BATCH_BYTES * num_ranks)) * num_ranks
    size = max(_LEAST_BATCH_BYTES, -(-total // (num_batches * CHUNK_BYTES)) * CHUNK_BYTES)
    batch: list[Extent] = []
    used = 0
    for file, first, stop in ranges:
        start = first
        while start < stop:
            # As far from a page as in the file, so that direct I/O can fill the slot.
            at = -(-used // _ALIGN_BYTES) * _ALIGN_BYTES + start % _ALIGN_BYTES
            room = size - at
            end = stop if stop - start <= room else start + room // CHUNK_BYTES * CHUNK_BYTES
            if end > start:
                batch.append(Extent(file, start, end, at))
                used, start = at + end - start, end
            if start < stop:
                yield tuple(batch)
                batch, used = [], 0
    if batch:
        yield tuple(batch)
