"""Write a committed step whose arrays never are in memory all at once.

Layer: convert. The engine's own plan, tables, manifest and commit; only the copying differs: boxes
are read from elsewhere, a few at a time, and written in the order of the file.
"""

from __future__ import annotations

import contextlib
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from shardckpt import native
from shardckpt.coord.session import Round
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import ShardckptError, error_named
from shardckpt.format.manifest import shard_key
from shardckpt.format.shard_file import (
    CHUNK_BYTES,
    TRAILER_BYTES,
    crc_seed,
    encode_crcs,
    encode_header,
    encode_tail,
)
from shardckpt.save.commit import Described, Planner, commit_round
from shardckpt.save.messages import Hello, Report
from shardckpt.save.plan import rank_plan
from shardckpt.save.structure import encode_structure, structure_of
from shardckpt.save.write import AttemptId, FileReport, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from shardckpt.catalog.log import Writer
    from shardckpt.catalog.store import Catalog
    from shardckpt.save.plan import Payload, RankPlan
    from shardckpt.state import Leaf, Shard, StateTree

    Read = Callable[[Sequence[tuple[Leaf, Shard]]], list[np.ndarray[Any, Any]]]

_TIMEOUT_S: Final = 600.0


@dataclass(slots=True)
class StepWriter:
    """Writes steps into one store, as its only rank.

    Attributes:
        catalog: The store.
        writer: The epoch taken.
        described: What goes into manifests besides arrays.
        budget_bytes: Most bytes of boxes in memory at once.
    """

    catalog: Catalog
    writer: Writer
    described: Described
    budget_bytes: int
    _planner: Planner = field(init=False)
    _coord: SingleCoord = field(default_factory=SingleCoord)
    _ancestry: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Plan alone."""
        self._planner = Planner(self._coord, "convert/plans", _TIMEOUT_S)

    def write(self, step: int, tree: StateTree, read: Read, metrics: Mapping[str, float]) -> None:
        """Write and commit one step.

        Args:
            step: Its number.
            tree: What it holds; `read` knows what the shards' data mean.
            read: Returns the values of a few shards, each C-order and of the leaf's dtype.
            metrics: Figures of the step.

        Raises:
            ShardckptError: It was not committed; nothing of it will be.
        """
        round_ = Round(self._coord, f"convert/{step}", f"step {step}", _TIMEOUT_S)
        data, structure = encode_structure(structure_of(tree))
        self._planner.offer_structure(data, structure)
        round_.publish("hello/0", Hello(step=step, structure=structure))
        attempt = self.catalog.new_attempt(self.writer, step)
        answer = self._planner.plan_round(round_, step, attempt)
        plan = rank_plan(self._planner.fetch_plan(answer.plan), tree.leaves, 0)
        try:
            files = self._write_files(AttemptId(attempt, step, 0, 1), plan, tree.leaves, read)
        except BaseException:
            with contextlib.suppress(ShardckptError):
                self.catalog.abort(self.writer, attempt)
                self.catalog.sweep()
            raise
        round_.publish(
            "report/0", Report(structure=structure, files=files, objects_digest="", objects={})
        )
        objects = {key: msgspec.Raw(msgspec.json.encode(v)) for key, v in tree.objects.items()}
        outcome, _ = commit_round(
            round_, self.catalog, self.writer, answer, self._planner, self.described, objects,
            metrics, self._ancestry, lambda _: (),
        )  # fmt: skip
        round_.forget()
        if not outcome.committed:
            raise error_named(outcome.kind, outcome.message)
        self._ancestry.append(attempt)

    def _write_files(
        self, attempt: AttemptId, plan: RankPlan, leaves: Sequence[Leaf], read: Read
    ) -> list[FileReport]:
        reports: list[FileReport] = []
        for file, nbytes in enumerate(plan.file_bytes):
            payloads = [p for p in plan.payloads if p.file == file]
            key = shard_key(attempt.attempt, attempt.rank, file, attempt.world_size)
            writer = self.catalog.storage.create(key, nbytes)
            try:
                header = encode_header(attempt.attempt, attempt.rank, file)
                _write_bytes(writer.write, 0, header)
                seed = crc_seed(attempt.attempt, attempt.rank, file)
                crcs = bytearray()
                for batch in self._batches(payloads):
                    shards = [(leaves[p.leaf], leaves[p.leaf].shards[p.shard]) for p in batch]
                    for payload, values in zip(batch, read(shards), strict=True):
                        part = values.reshape(-1).view(np.uint8)[payload.start :][: payload.nbytes]
                        address = part.__array_interface__["data"][0]
                        writer.write(payload.offset, address, payload.nbytes)
                        row = array("q", (address, payload.nbytes, payload.offset))
                        crcs += native.chunk_crcs(row, seed, CHUNK_BYTES)
                table = table_of(attempt, file, payloads, leaves, {})
                table = msgspec.structs.replace(table, crcs=encode_crcs(bytes(crcs)))
                tail, table_digest = encode_tail(table, nbytes)
                _write_bytes(writer.write, nbytes, tail)
                writer.commit(nbytes + len(tail))
            except BaseException:
                writer.abort()
                raise
            table_bytes = len(tail) - TRAILER_BYTES
            reports.append(FileReport(nbytes + len(tail), nbytes, table_bytes, table_digest))
        return reports

    def _batches(self, payloads: Sequence[Payload]) -> Iterator[list[Payload]]:
        batch: list[Payload] = []
        nbytes = 0
        for payload in payloads:
            if batch and nbytes + payload.nbytes > self.budget_bytes:
                yield batch
                batch, nbytes = [], 0
            batch.append(payload)
            nbytes += payload.nbytes
        if batch:
            yield batch


def _write_bytes(write: Callable[[int, int, int], None], offset: int, data: bytes) -> None:
    view = np.frombuffer(data, np.uint8)
    write(offset, view.__array_interface__["data"][0], len(data))
