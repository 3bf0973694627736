"""What saves and loads of a large job cost one rank and the coordinator, in the engine's code.

The ranks are simulated as far as their messages go: each publishes its hello and report through the
engine's own rounds, into a dictionary. Planning, merging, committing and opening are the real ones.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from counted import CountedCoord
from harness import timed
from scale_layouts import DTYPE, Job, Mesh, boxes_of

from shardckpt.catalog.store import Catalog
from shardckpt.coord.session import Round
from shardckpt.format import manifest as manifests
from shardckpt.format.manifest import SavedTensor, shard_key
from shardckpt.format.root import MANIFEST
from shardckpt.format.shard_file import (
    CHUNK_BYTES,
    TRAILER_BYTES,
    encode_crcs,
    encode_header,
    encode_tail,
)
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.plan import LoadPlan, Wanted, _shares, plan_load
from shardckpt.save.commit import Described, Planner, commit_round
from shardckpt.save.messages import Answer, Hello, Report
from shardckpt.save.plan import RankPlan, rank_plan
from shardckpt.save.stage import CopyTable
from shardckpt.save.structure import encode_structure, has_structure_of, structure_of, without_data
from shardckpt.save.write import AttemptId, FileReport, table_of
from shardckpt.staging.collector import no_garbage_collection
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.arrays import ArrayBackend
from shardckpt.testing.coords import MemoryCoordHub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardckpt.geometry.box import Box
    from shardckpt.geometry.layout import MeshLayout
    from shardckpt.state import Leaf, StateTree

TIMEOUT_S: Final = 60.0
PREFIX: Final = "job"
BACKEND: Final = ArrayBackend()


@dataclass(slots=True)
class Case:
    """One job's figures; times are medians.

    Attributes:
        first_plan_s: A rank's own first plan, beside what it waits for.
        steady_plan_s: Its plan when nothing has changed.
        coordinator_first_s: The coordinator's round that plans for all.
        commit_s: The coordinator's work of a later save: hellos, reports, manifest, root.
        first_save_bytes: Bytes through the key-value store of the first save, both directions.
        steady_save_bytes: Of a later one.
        manifest_bytes: Size of the manifest.
        plan_memory_bytes: Most memory that a rank's first plan held.
        commit_memory_bytes: Most memory that the coordinator's round held, the messages included.
        rank_file_bytes: Bytes that one rank writes, the tables of its files included.
    """

    job: Job
    first_plan_s: float = 0.0
    steady_plan_s: float = 0.0
    coordinator_first_s: float = 0.0
    commit_s: float = 0.0
    first_save_bytes: int = 0
    steady_save_bytes: int = 0
    manifest_bytes: int = 0
    plan_memory_bytes: int = 0
    commit_memory_bytes: int = 0
    rank_file_bytes: int = 0


@dataclass(slots=True)
class Own:
    """What one rank knows after its first plan."""

    tree: StateTree
    digest: str
    plan: RankPlan
    seconds: float


@dataclass
class SimulatedJob:
    """The coordinator of one job, and any rank that is asked for."""

    job: Job
    storage: MemoryStorage = field(default_factory=MemoryStorage)

    def __post_init__(self) -> None:
        """Open the store, as the first save finds it."""
        self.hub = MemoryCoordHub(self.job.world_size)
        self.coord = CountedCoord(self.hub.coord(0))
        self.catalog = Catalog(self.storage, writer="benchmark")
        store_id = self.catalog.create().store_id
        self.writer, _ = self.catalog.take_over()
        self.planner = Planner(self.coord, f"{PREFIX}/plans", TIMEOUT_S)
        self.described = Described("numpy", store_id, msgspec.Raw(b"{}"), {})
        self.digest_of_group: list[str] = []
        self.answer: Answer | None = None
        self.files: dict[int, list[FileReport]] = {}
        self.manifest_digest = ""
        self._samples: dict[int, list[FileReport]] = {}
        self._layouts: dict[int, MeshLayout] = {}
        self._saves = 0

    def round_of(self, rank: int) -> Round:
        """Return one rank's side of the save under way."""
        coord = self.coord if rank == 0 else self.hub.coord(rank)
        what = f"step {self._saves}"
        return Round(coord, f"{PREFIX}/save/{self._saves}", what, TIMEOUT_S)

    def layout_of(self, mesh: Mesh) -> MeshLayout:
        """Return the layout of a mesh, made once."""
        if id(mesh) not in self._layouts:
            self._layouts[id(mesh)] = mesh.layout()
        return self._layouts[id(mesh)]

    def first_structures(self) -> int:
        """Publish each distinct structure, and return the bytes."""
        nbytes = 0
        for group in self.job.groups:
            rank = group.ranks[0]
            tree = BACKEND.describe(self.job.state_of(rank, self._layouts))
            data, digest = encode_structure(structure_of(tree))
            Planner(self.hub.coord(rank), f"{PREFIX}/plans", TIMEOUT_S).offer_structure(
                data, digest
            )
            self.digest_of_group.append(digest)
            nbytes += 2 * len(data)
        return nbytes

    def say_hello(self, *, is_new: bool) -> int:
        """Let every rank come to the save, and return the bytes of that."""
        nbytes = 0
        for group, digest in zip(self.job.groups, self.digest_of_group, strict=True):
            hello = Hello(step=self._saves, structure=digest, is_new=is_new)
            for rank in group.ranks:
                self.round_of(rank).publish(f"hello/{rank}", hello)
            nbytes += 2 * len(group.ranks) * len(msgspec.json.encode(hello))
        return nbytes

    def plan_round(self) -> Answer:
        """Do the coordinator's part until all know the attempt's name."""
        attempt = self.catalog.new_attempt(self.writer, self._saves)
        self.answer = self.planner.plan_round(self.round_of(0), self._saves, attempt)
        return self.answer

    def report(self) -> int:
        """Let every rank report its files, and return the bytes of that."""
        nbytes = 0
        for group, digest in zip(self.job.groups, self.digest_of_group, strict=True):
            first = group.ranks[0]
            if first not in self._samples:
                self._samples[first] = self.files_of(first)
            sample = self._samples[first]
            for rank in group.ranks:
                files = self.files.get(rank) or [
                    msgspec.structs.replace(f, digest=f"{rank:032x}") for f in sample
                ]
                report = Report(structure=digest, files=files, objects_digest="", objects={})
                self.round_of(rank).publish(f"report/{rank}", report)
            nbytes += 2 * len(group.ranks) * len(msgspec.json.encode(report))
        return nbytes

    def commit(self) -> None:
        """Do the coordinator's part from the reports to the root."""
        assert self.answer is not None
        outcome, root = commit_round(
            self.round_of(0), self.catalog, self.writer, self.answer, self.planner,
            self.described, {}, {}, [], lambda _: (),
        )  # fmt: skip
        assert outcome.committed
        self.manifest_digest = root.live[-1].manifest
        self._saves += 1

    def own_plan(self, rank: int) -> Own:
        """Time what one rank does for its first plan; the job has been planned."""
        assert self.answer is not None
        group = self.job.group_of(rank)
        meshes = {id(t.mesh): t.mesh for t in group.tensors}
        planner = Planner(self.hub.coord(rank), f"{PREFIX}/plans", TIMEOUT_S)
        manifests._runs_cached.cache_clear()
        with no_garbage_collection():
            started = time.perf_counter()
            layouts = {key: mesh.layout() for key, mesh in meshes.items()}
            seconds = time.perf_counter() - started
            state = self.job.state_of(rank, layouts)
            started = time.perf_counter()
            tree = BACKEND.describe(state)
            _, digest = encode_structure(structure_of(tree))
            plan = rank_plan(planner.fetch_plan(self.answer.plan), tree.leaves, rank)
            known = without_data(tree)
            CopyTable(plan)
            seconds += time.perf_counter() - started
        assert digest in self.digest_of_group
        return Own(known, digest, plan, seconds)

    def steady_plan_s(self, rank: int, own: Own) -> float:
        """Time a rank's plan where nothing has changed."""
        state = self.job.state_of(rank, self._layouts)
        table = CopyTable(own.plan)
        known = without_data(BACKEND.describe(state))
        with no_garbage_collection():
            started = time.perf_counter()
            tree = BACKEND.describe(state)
            is_same = has_structure_of(tree, known, table.changed(tree.leaves))
            seconds = time.perf_counter() - started
        assert is_same
        return seconds

    def files_of(self, rank: int) -> list[FileReport]:
        """Return the report of one rank's files, from its real plan and tables."""
        return [report for report, _, _ in self.shard_files(rank)]

    def shard_files(self, rank: int) -> list[tuple[FileReport, bytes, bytes]]:
        """Return report, header and tail of one rank's files; between them lie the payloads."""
        assert self.answer is not None
        own = self.own_plan(rank)
        attempt = AttemptId(self.answer.attempt, self._saves, rank, self.job.world_size)
        found = []
        for file, nbytes in enumerate(own.plan.file_bytes):
            payloads = [p for p in own.plan.payloads if p.file == file]
            leaves: tuple[Leaf, ...] = own.tree.leaves
            table = table_of(attempt, file, payloads, leaves, {})
            # What the checksums are has no bearing here, how many there are has.
            num_chunks = sum(-(-p.nbytes // CHUNK_BYTES) for p in payloads)
            table = msgspec.structs.replace(table, crcs=encode_crcs(bytes(4 * num_chunks)))
            tail, digest = encode_tail(table, nbytes)
            report = FileReport(nbytes + len(tail), nbytes, len(tail) - TRAILER_BYTES, digest)
            found.append((report, encode_header(attempt.attempt, rank, file), tail))
        return found


def measure(job: Job, rounds: int, *, with_memory: bool) -> Case:
    """Return the figures of a job's saves."""
    case = Case(job)
    simulated = SimulatedJob(job)
    nbytes = simulated.first_structures() + simulated.say_hello(is_new=True)
    case.coordinator_first_s = timed(simulated.plan_round)
    probes = sorted({0, job.world_size // 3, job.world_size - 1})
    owns = {rank: [simulated.own_plan(rank) for _ in range(rounds)] for rank in probes}
    case.first_plan_s = max(statistics.median(o.seconds for o in own) for own in owns.values())
    case.steady_plan_s = max(
        statistics.median(simulated.steady_plan_s(rank, own[0]) for _ in range(rounds))
        for rank, own in owns.items()
    )
    nbytes += simulated.report()
    simulated.commit()
    answer = simulated.answer
    assert answer is not None
    plan_key = f"{PREFIX}/plans/plan/{answer.plan}"
    told = len(simulated.hub.values[plan_key]) + len(msgspec.json.encode(answer))
    case.first_save_bytes = nbytes + job.world_size * told
    case.commit_s = statistics.median(
        sum(_later_save(simulated, case, timed)) for _ in range(rounds)
    )
    case.manifest_bytes = len(simulated.storage.get(_manifest_key(simulated), 1 << 30))
    case.rank_file_bytes = sum(f.nbytes for f in simulated.files_of(probes[1]))
    if with_memory:
        case.commit_memory_bytes = max(_later_save(simulated, case, _memory))
        case.plan_memory_bytes = _memory(lambda: simulated.own_plan(probes[1]))
    return case


def _later_save(
    simulated: SimulatedJob, case: Case, cost: Callable[[Callable[[], object]], float]
) -> tuple[float, float]:
    """Save once more and return what the coordinator's two rounds cost it."""
    nbytes = simulated.say_hello(is_new=False)
    with no_garbage_collection():
        planning = cost(simulated.plan_round)
    nbytes += simulated.report()
    round_ = simulated.round_of(0)
    with no_garbage_collection():
        committing = cost(simulated.commit)
    assert simulated.answer is not None
    nbytes += simulated.job.world_size * len(msgspec.json.encode(simulated.answer))
    case.steady_save_bytes = nbytes
    for rank in range(simulated.job.world_size):
        for topic in ("hello", "report"):
            simulated.hub.coord(rank).delete(f"{PREFIX}/save/{simulated._saves - 1}/{topic}/{rank}")
    round_.forget()
    return planning, committing


def _memory(call: Callable[[], object]) -> int:
    """Return the most bytes that a call held at once, beyond what there was."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _manifest_key(simulated: SimulatedJob) -> str:
    assert simulated.answer is not None
    return f"{simulated.answer.attempt}/{MANIFEST}"


@dataclass(slots=True)
class LoadCase:
    """One rank's load plan in another world: medians, and what it opened."""

    seconds: float
    num_files: int
    read_bytes: int
    needed_bytes: int


def measure_load(job: Job, target: Job, rounds: int, place: Path) -> LoadCase:
    """Time the load plan of one rank of another job, from a save of `job`.

    The shard files that it opens are there, with real headers, tables and trailers; their payloads
    are holes.
    """
    simulated = SimulatedJob(job)
    simulated.first_structures()
    simulated.say_hello(is_new=True)
    answer = simulated.plan_round()
    arrays = {
        tensor.key: (box, np.empty(box.shape, DTYPE))
        for tensor, box in boxes_of(target, target.world_size // 3, {}) if box.num_elements
    }  # fmt: skip
    for source in sorted(_sources(simulated, arrays)):
        files = simulated.shard_files(source)
        simulated.files[source] = [report for report, _, _ in files]
        for number, (report, header, tail) in enumerate(files):
            path = place / shard_key(answer.attempt, source, number, job.world_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(header)
                file.seek(report.table_offset)
                file.write(tail)
    storage = LocalStorage(place)
    storage.prepare()
    simulated.report()
    simulated.commit()
    key = _manifest_key(simulated)
    assert storage.put_if_absent(key, simulated.storage.get(key, 1 << 30))
    plans: list[tuple[float, LoadPlan]] = []
    for _ in range(rounds):
        with no_garbage_collection():
            started = time.perf_counter()
            checkpoint = OpenCheckpoint(storage, answer.attempt, simulated.manifest_digest)
            tensors = checkpoint.tensors
            wanted = [
                Wanted(tensors[name], box, BACKEND.host_array(array))
                for name, (box, array) in arrays.items()
            ]
            found = plan_load(checkpoint, wanted)
            plans.append((time.perf_counter() - started, found))
        num_files = len(checkpoint._files)
        checkpoint.close()
    last = plans[-1][1]
    seconds = statistics.median(s for s, _ in plans)
    return LoadCase(seconds, num_files, last.read_bytes, last.needed_bytes)


def _sources(
    simulated: SimulatedJob, arrays: dict[str, tuple[Box, np.ndarray[Any, Any]]]
) -> set[int]:
    """Return the ranks whose files the load plan will open."""
    plan = simulated.planner.plan
    assert plan is not None
    writers_of = dict(zip(plan.keys, zip(plan.owners, plan.writers, strict=True), strict=True))
    sources: set[int] = set()
    for tensor in (t for group in simulated.job.groups for t in group.tensors):
        if tensor.key in arrays:
            box, array = arrays[tensor.key]
            spec = ArraySpec(tensor.shape, DTYPE)
            layout = simulated.layout_of(tensor.mesh)
            saved = SavedTensor(tensor.key, spec, "param", layout, *writers_of[tensor.key])
            want = Wanted(saved, box, BACKEND.host_array(array))
            sources.update(share.rank for share in _shares(want, spec.itemsize_bytes))
    return sources
