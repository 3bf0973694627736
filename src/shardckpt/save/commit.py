"""Commit: the coordinator's side of a save.

Layer: save.

1. `plan_round`: every rank has come (same step); a structure never seen is asked of one rank that
   has it, and all are merged into a plan; the answer names the attempt and the plan.
2. `commit_round`: a report from exactly ranks 0..N-1, structures as planned; manifest durable; then
   the root.
   Only the commit log says how it ended.
"""

from __future__ import annotations

import logging
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from shardckpt.coord.base import Coord, wait_for
from shardckpt.errors import FencedError, OutcomeUnknownError, SaveFailedError, StorageError
from shardckpt.format.manifest import (
    Files,
    Manifest,
    encode_manifest,
    joined_digests,
    writers_column,
)
from shardckpt.format.root import FORMAT_VERSION, MANIFEST, Entry, Root
from shardckpt.format.sealed import digest
from shardckpt.save.messages import Answer, Asked, Hello, Outcome, Report
from shardckpt.save.plan import GlobalPlan, merge
from shardckpt.save.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from shardckpt.catalog.log import Verdict, Writer
    from shardckpt.catalog.store import Catalog
    from shardckpt.coord.session import Round

_logger = logging.getLogger(__name__)
_PLAN_COMPRESSION: Final = 1
_HINT = (
    "Every rank must call save() for the same steps; a call under `if rank == 0:` is the usual "
    "mistake."
)


@dataclass(slots=True)
class Described:
    """What the coordinator knows of the job besides arrays.

    Attributes:
        framework: Backend's name.
        store_id: Store.
        config: The user's training configuration, tagged JSON.
        environment: Versions, world size, commit.
    """

    framework: str
    store_id: str
    config: msgspec.Raw
    environment: dict[str, str]


@dataclass(slots=True)
class Planner:
    """The coordinator's memory between saves: structures by digest, and the plan made of them."""

    coord: Coord
    prefix: str
    timeout_s: float
    structures: dict[str, Structure] = field(default_factory=dict)
    of_ranks: tuple[str, ...] = ()
    plan: GlobalPlan | None = None
    plan_digest: str = ""

    def plan_round(self, round_: Round, step: int, attempt: str) -> Answer:
        """Gather all ranks, plan where something is new, and publish the answer.

        Raises:
            DeadlineError: Ranks did not come.
            SaveFailedError: Ranks came with different steps.
            StateMismatchError: Their states do not fit together.
            RoundFailedError: A rank failed first.
        """
        hellos = round_.gather("hello", Hello, what="call of save()", hint=_HINT)
        others = {rank: h.step for rank, h in enumerate(hellos) if h.step != step}
        if others:
            raise SaveFailedError(
                f"{round_.what}: rank 0 saves step {step}, but ranks {sorted(others)[:8]} save "
                f"step {sorted(set(others.values()))[:8]}. {_HINT}"
            )
        digests = tuple(h.structure for h in hellos)
        if any(h.is_new for h in hellos):
            # The coordinator offers its own unasked.
            known = {*self.structures, digests[0]}
            first = {d: r for r, d in reversed([*enumerate(digests)]) if d not in known}
            round_.publish("asked", Asked(sorted(first.values())))
        if digests != self.of_ranks:
            self._replan(digests)
        answer = Answer(step=step, attempt=attempt, plan=self.plan_digest, structure=digests[0])
        round_.publish("answer", answer)
        return answer

    def fetch_plan(self, plan_digest: str) -> GlobalPlan:
        """Return a published plan; on any rank.

        Raises:
            DeadlineError: The store does not hold it.
        """
        if self.plan is None or plan_digest != self.plan_digest:
            data = wait_for(
                self.coord,
                self._plan_key(plan_digest),
                what="the save plan",
                timeout_s=self.timeout_s,
            )
            self.plan = msgspec.json.decode(zlib.decompress(data), type=GlobalPlan)
            self.plan_digest = plan_digest
        return self.plan

    def offer_structure(self, data: bytes, structure_digest: str) -> None:
        """Publish this rank's structure under its digest; on any rank that is asked for it."""
        self.coord.set(self._structure_key(structure_digest), data)

    def _replan(self, digests: tuple[str, ...]) -> None:
        for structure_digest in sorted(set(digests) - self.structures.keys()):
            data = wait_for(
                self.coord,
                self._structure_key(structure_digest),
                what=f"the state structure {structure_digest}",
                timeout_s=self.timeout_s,
            )
            self.structures[structure_digest] = msgspec.json.decode(data, type=Structure)
        distinct = sorted(set(digests))
        self.structures = {d: self.structures[d] for d in distinct}
        index = {d: i for i, d in enumerate(distinct)}
        started = time.monotonic()
        plan = merge([self.structures[d] for d in distinct], [index[d] for d in digests])
        # Every rank fetches it from one store, and keys of layers are alike.
        data = zlib.compress(msgspec.json.encode(plan), _PLAN_COMPRESSION)
        old = self.plan_digest
        self.plan, self.plan_digest, self.of_ranks = plan, digest(data), digests
        self.coord.set(self._plan_key(self.plan_digest), data)
        if old and old != self.plan_digest:
            self.coord.delete(self._plan_key(old))
        _logger.debug("planned %d arrays in %.3f s", len(plan.keys), time.monotonic() - started)

    def _structure_key(self, structure_digest: str) -> str:
        return f"{self.prefix}/structure/{structure_digest}"

    def _plan_key(self, plan_digest: str) -> str:
        return f"{self.prefix}/plan/{plan_digest}"


def commit_round(
    round_: Round,
    catalog: Catalog,
    writer: Writer,
    answer: Answer,
    planner: Planner,
    described: Described,
    objects: Mapping[str, msgspec.Raw],
    metrics: Mapping[str, float],
    ancestry: Sequence[str],
    to_drop: Callable[[Root], Collection[str]],
) -> tuple[Outcome, Root]:
    """Gather the reports, write the manifest, commit, and return how the log says it ended.

    Raises:
        DeadlineError: Reports did not come.
        RoundFailedError: A rank failed.
        SaveFailedError: A report does not fit the plan.
        StorageError: The manifest or the log cannot be written.
    """
    reports = round_.gather("report", Report, what="report", hint="Look at that rank's log.")
    wrong = [rank for rank, r in enumerate(reports) if r.structure != planner.of_ranks[rank]]
    if wrong:
        raise SaveFailedError(
            f"{round_.what}: ranks {wrong[:8]} wrote another structure than planned"
        )
    assert planner.plan is not None
    merged = dict(objects)
    for report in reports:
        for key, value in report.objects.items():
            merged.setdefault(key, value)
    differing = [
        r for r, report in enumerate(reports) if report.objects_digest != reports[0].objects_digest
    ]
    if differing and all(not reports[r].objects for r in differing):
        _logger.warning(
            "%s: plain values differ on ranks %s; those of rank 0 are kept. Wrap values that "
            "belong to "
            "one rank in PerRank().",
            round_.what,
            differing[:8],
        )
    manifest = _manifest(planner.plan, answer, described, merged, reports)
    data, manifest_digest = encode_manifest(manifest)
    if not catalog.storage.put_if_absent(f"{answer.attempt}/{MANIFEST}", data):
        raise StorageError(f"{answer.attempt}/{MANIFEST} exists already; attempts are never reused")
    entry = Entry(
        step=answer.step,
        attempt=answer.attempt,
        parent="",
        manifest=manifest_digest,
        metrics=dict(metrics),
        pinned=False,
        abandoned=False,
        world_size=round_.world_size,
        nbytes=sum(f.nbytes for r in reports for f in r.files) + len(data),
        saved_unix_s=time.time(),
    )
    verdict, root = catalog.commit(writer, entry, ancestry, to_drop)
    return outcome_of(verdict, root, answer.step, catalog.storage.url), root


def outcome_of(verdict: Verdict, root: Root, step: int, url: str, why: str = "") -> Outcome:
    """Put the log's verdict in words that are the same on every rank."""
    if verdict == "committed":
        return Outcome(committed=True)
    if verdict == "aborted":
        message = why or f"step {step}: the attempt was given up by a rank that waited too long"
        return Outcome(committed=False, kind=SaveFailedError.__name__, message=message)
    if verdict == "fenced":
        return Outcome(
            committed=False,
            kind=FencedError.__name__,
            message=f"step {step} was not saved: {root.writer} took over {url} "
            f"(epoch {root.epoch}). "
            "Another job writes to this store; this one must stop or use another store.",
        )
    return Outcome(
        committed=False,
        kind=OutcomeUnknownError.__name__,
        message=f"step {step}: the log of {url} has moved on to epoch {root.epoch} and no longer "
        "says how this attempt ended",
    )


def _manifest(
    plan: GlobalPlan,
    answer: Answer,
    described: Described,
    objects: dict[str, msgspec.Raw],
    reports: Sequence[Report],
) -> Manifest:
    files = [f for report in reports for f in report.files]
    digests, packed = joined_digests([f.digest for f in files])
    writers, some = writers_column(plan.writers)
    return Manifest(
        format=FORMAT_VERSION,
        features=[*packed, *some],
        store_id=described.store_id,
        attempt=answer.attempt,
        step=answer.step,
        world_size=len(reports),
        framework=described.framework,
        keys=plan.keys,
        dtypes=plan.dtypes,
        shapes=plan.shapes,
        roles=plan.roles,
        layout_ids=plan.layout_ids,
        owners=plan.owners,
        writers=writers,
        layouts=plan.layouts,
        aliases=plan.aliases,
        objects=objects,
        per_rank=plan.per_rank,
        files=Files(
            counts=[len(report.files) for report in reports],
            sizes=[f.nbytes for f in files],
            table_offsets=[f.table_offset for f in files],
            table_bytes=[f.table_bytes for f in files],
            digests=digests,
        ),
        config=described.config,
        environment=described.environment,
    )
