"""Write: this rank's shard files, checksummed, flushed and named durably.

Layer: save. The engine's threads write the payloads as they are copied; header and table are
written here, the table with the checksums last. A file is only reported once its flush, close and
directory flush succeeded.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.errors import DeadlineError, SaveFailedError, TornCopyError
from shardckpt.format.manifest import shard_key
from shardckpt.format.root import FORMAT_VERSION
from shardckpt.format.shard_file import (
    TRAILER_BYTES,
    Table,
    crc_seed,
    encode_crcs,
    encode_header,
    encode_tail,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardckpt.native import Engine
    from shardckpt.save.plan import Payload, RankPlan
    from shardckpt.state import Leaf
    from shardckpt.storage.base import Storage, Writer

_SLICE_MS: Final = 100
_TAKE_MS: Final = 10
_LAST_WAIT_MS: Final = 1000


class FileReport(msgspec.Struct, frozen=True):
    """One file as its writer reports it; enough for the manifest."""

    nbytes: int
    table_offset: int
    table_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class AttemptId:
    """Which attempt, and who writes for it."""

    attempt: str
    step: int
    rank: int
    world_size: int


def write_files(
    storage: Storage,
    engine: Engine,
    attempt: AttemptId,
    plan: RankPlan,
    leaves: Sequence[Leaf],
    ticket: int,
    per_rank: Mapping[str, msgspec.Raw],
    *,
    timeout_s: float,
    while_waiting: Callable[[], None],
) -> list[FileReport]:
    """Write and flush every file of this rank; return them in order.

    Args:
        storage: The store.
        engine: Holds the save.
        attempt: Where to.
        plan: What goes where.
        leaves: The state's arrays, as planned.
        ticket: The save.
        per_rank: Values of this rank alone.
        timeout_s: How long nothing at all may be written.
        while_waiting: Called ten times a second.

    Raises:
        StorageError: A write or flush failed in any thread; the attempt must fail.
        TornCopyError: An array changed while it was copied.
        DeadlineError: The disk hangs.
        SaveFailedError: The save was given up.
    """
    by_file: list[list[Payload]] = [[] for _ in plan.file_bytes]
    for payload in plan.payloads:
        by_file[payload.file].append(payload)
    reports: list[FileReport] = []
    writers: list[Writer] = []
    try:
        for file, nbytes in enumerate(plan.file_bytes):
            key = shard_key(attempt.attempt, attempt.rank, file, attempt.world_size)
            writers.append(storage.create(key, nbytes))
            header = encode_header(attempt.attempt, attempt.rank, file)
            writers[file].write(0, _address_of(header), len(header))
        # All at once: in a small ring, extents of a later file may hold the slots.
        _write_extents(engine, ticket, writers, timeout_s, while_waiting)
        _raise_failure(engine, ticket, plan, leaves)
        for file, (writer, nbytes) in enumerate(zip(writers, plan.file_bytes, strict=True)):
            table = table_of(attempt, file, by_file[file], leaves, per_rank if file == 0 else {})
            crcs = _chunk_crcs(engine, ticket, attempt, file, plan, leaves)
            tail, table_digest = encode_tail(msgspec.structs.replace(table, crcs=crcs), nbytes)
            writer.write(nbytes, _address_of(tail), len(tail))
            writer.commit(nbytes + len(tail))
            table_bytes = len(tail) - TRAILER_BYTES
            reports.append(FileReport(nbytes + len(tail), nbytes, table_bytes, table_digest))
    except BaseException:
        for writer in writers[len(reports) :]:
            writer.abort()
        raise
    return reports


def _write_extents(
    engine: Engine,
    ticket: int,
    writers: Sequence[Writer],
    timeout_s: float,
    while_waiting: Callable[[], None],
) -> None:
    """Have all extents written; a save that failed otherwise is told by `_raise_failure` alone."""
    is_late = False
    with ExitStack() as held:
        for file, writer in enumerate(writers):
            lent = writer.lend()
            if lent is None:
                _write_taken(engine, ticket, writers, while_waiting)
                return
            target = held.enter_context(lent)
            engine.attach(ticket, file, target.fd, target.direct_fd, target.calls)
        progress = _Progress(engine, timeout_s)
        for file in range(len(writers)):
            while not is_late and not engine.wait_flushed(ticket, file, _SLICE_MS):
                while_waiting()
                is_late = progress.is_late()
        if is_late:
            engine.cancel(ticket, "the disk hangs")
            if not all(engine.wait_flushed(ticket, f, _LAST_WAIT_MS) for f in range(len(writers))):
                # A thread sits in a write and may use the descriptors for ever, so they are never
                # closed; a list would let go of them when the interpreter ends.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(held.pop_all()))
    if is_late:
        raise DeadlineError(
            f"this rank wrote nothing for more than {timeout_s:g} s: the file system hangs. Look "
            "at the storage; a slow one needs a longer timeout_s."
        )
    kind, _, file, code, message = engine.failure(ticket)
    if kind == "write":
        writers[file].fail(OSError(code, os.strerror(code), message))


def _write_taken(
    engine: Engine, ticket: int, writers: Sequence[Writer], while_waiting: Callable[[], None]
) -> None:
    """Write what is staged here, where no descriptors lead to the files."""
    left = set(range(len(writers)))
    while left:
        while_waiting()
        for file in sorted(left):
            extent = engine.take(ticket, file, _TAKE_MS)
            if extent is None:
                left.discard(file)
                continue
            number, address, nbytes, offset = extent
            if nbytes:
                try:
                    writers[file].write(offset, address, nbytes)
                finally:
                    engine.give(ticket, number)


def _chunk_crcs(
    engine: Engine,
    ticket: int,
    attempt: AttemptId,
    file: int,
    plan: RankPlan,
    leaves: Sequence[Leaf],
) -> str:
    seed = crc_seed(attempt.attempt, attempt.rank, file)
    try:
        return encode_crcs(engine.chunk_crcs(ticket, file, seed))
    except ValueError:
        # With check_copies: only now was a copy found to differ.
        _raise_failure(engine, ticket, plan, leaves)
        raise


class _Progress:
    """Tells a disk that hangs from one that is slow."""

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        """Start the clock."""
        self._engine = engine
        self._timeout_s = timeout_s
        self._seen = -1
        self._since = time.monotonic()

    def is_late(self) -> bool:
        """Return whether the engine wrote nothing for the whole timeout."""
        written = self._engine.stats()[2]
        now = time.monotonic()
        if written != self._seen:
            self._seen, self._since = written, now
        return now - self._since > self._timeout_s


def _raise_failure(engine: Engine, ticket: int, plan: RankPlan, leaves: Sequence[Leaf]) -> None:
    kind, payload, _, _, message = engine.failure(ticket)
    if kind in ("torn", "gone"):
        key = leaves[plan.payloads[payload].leaf].key
        what = "was freed" if kind == "gone" else "changed"
        raise TornCopyError(
            f"key {key!r}: its memory {what} while it was being copied. Call fence() before code "
            "that changes saved arrays outside of optimizer.step(). Until the end of this run, "
            "saves now copy everything before save() returns."
        )
    if kind:
        raise SaveFailedError(f"the save was given up: {message or kind}")


def table_of(
    attempt: AttemptId,
    file: int,
    payloads: Sequence[Payload],
    leaves: Sequence[Leaf],
    per_rank: Mapping[str, msgspec.Raw],
) -> Table:
    """Return the table of one file, without checksums."""
    key_ids: dict[int, int] = {}
    boxes: list[int] = []
    for payload in payloads:
        key_ids.setdefault(payload.leaf, len(key_ids))
        box = leaves[payload.leaf].shards[payload.shard].box
        boxes += box.offsets
        boxes += box.shape
    held = [leaves[i] for i in key_ids]
    # Equal shapes share a list: a list for every array would wake the cycle collector.
    lists = {leaf.spec.shape: list(leaf.spec.shape) for leaf in held}
    return Table(
        format=FORMAT_VERSION,
        features=[],
        attempt=attempt.attempt,
        step=attempt.step,
        rank=attempt.rank,
        world_size=attempt.world_size,
        file=file,
        keys=[leaf.key for leaf in held],
        dtypes=[leaf.spec.dtype for leaf in held],
        shapes=[lists[leaf.spec.shape] for leaf in held],
        key_ids=[key_ids[p.leaf] for p in payloads],
        boxes=boxes,
        starts=[p.start for p in payloads],
        lengths=[p.nbytes for p in payloads],
        offsets=[p.offset for p in payloads],
        crcs="",
        per_rank=dict(per_rank),
    )


def _address_of(data: bytes) -> int:
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert address is not None
    return address
