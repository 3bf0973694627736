"""A model of a cluster that saves and restores with the engine's own plans, messages and protocol.

Modelled: time. A key-value store that answers one request after the other, nodes whose ranks share
a network card, a storage with limits in bytes, requests and latency, and stragglers. Real: every
message and wait (`coord.session` on modelled clocks), who writes how much (`save.plan`), what the
coordinator does (`save.commit`, `catalog`), and what ranks do when one of them fails or dies
(`save.agree`). The seconds of planning and committing are those that `scale` measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from cluster_parts import Clock, ModelCoord, Server, Store, fluid
from harness import GIB
from scale_ours import PREFIX, SimulatedJob

from shardckpt.coord.session import Round, RoundFailedError
from shardckpt.errors import DeadlineError, StorageError
from shardckpt.load.loader import Ok, Placed
from shardckpt.save.agree import Agreement
from shardckpt.save.commit import Planner, commit_round
from shardckpt.save.messages import Answer, Hello, Outcome, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scale_layouts import Job
    from scale_ours import Case

TIMEOUT_S: Final = 600.0
SEED: Final = 7
GRACE: Final = 1.1


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the cluster consists of; speeds in bytes per second.

    Attributes:
        ranks_per_node: GPUs of a node.
        node_bytes_per_s: Of a node's network card towards the storage (200 Gb/s).
        rank_bytes_per_s: What one rank writes or reads at most: one file, a few threads.
        round_trip_s: Between two nodes.
        store_requests_per_s: Of the key-value store, which is one thread.
        store_bytes_per_s: Of its network card.
        arrival_s: Spread of the ranks' calls of `save`.
        num_slow_nodes: Nodes that reach only a quarter of their speed.
        read_share_of_node: How much of a node's replicas' bytes reading once leaves.
    """

    ranks_per_node: int = 8
    node_bytes_per_s: float = 25e9
    rank_bytes_per_s: float = 3e9
    round_trip_s: float = 60e-6
    store_requests_per_s: float = 100_000.0
    store_bytes_per_s: float = 5e9
    arrival_s: float = 0.1
    slow_share: float = 0.005
    slow_factor: float = 0.25


PFS: Final = Store("parallel file system", 1e12, 2e12, 50_000.0, 0.001)
OBJECTS: Final = Store("object store", 4e11, 1e12, 3_500.0 * 64, 0.06)


@dataclass(slots=True)
class Told:
    """What the measurements hand over.

    Attributes:
        job: The job that saves.
        seconds: Of planning and committing, as measured.
        rank_bytes: Bytes that each rank writes, from the real plans of some ranks.
        manifest_bytes: Size of the manifest.
        read_bytes: Bytes of its shards that a rank needs in a restore.
    """

    job: Job
    plan_s: float
    commit_s: float
    rank_bytes: dict[int, int]
    manifest_bytes: int
    needed_bytes: int


@dataclass(slots=True)
class Event:
    """Something that a run of the model tells: when, who, what."""

    at_s: float
    who: str
    what: str


@dataclass(slots=True)
class Scenario:
    """One run: what it was, what it told, how it ended.

    Attributes:
        name: Of the scenario.
        events: In order of time.
        durable_s: When the root was durable; None where the step was not committed.
        outcomes: How many ranks ended with which outcome.
        waited_s: Median and most seconds that ordinary ranks waited, by what for.
        requests: Requests to the key-value store per rank.
    """

    name: str
    events: list[Event] = field(default_factory=list)
    durable_s: float | None = None
    outcomes: dict[str, int] = field(default_factory=dict)
    last_rank_s: float = 0.0
    waited_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    requests: float = 0.0

    def tell(self, at_s: float, who: str, what: str) -> None:
        """Note an event."""
        self.events.append(Event(at_s, who, what))


@dataclass(frozen=True, slots=True)
class Failing:
    """A rank that fails while it writes, with an error or without a word."""

    rank: int
    dies: bool
    kind: str


def told_by(case: Case) -> Told:
    """Return what the model takes from a measured case; some ranks' plans are made here."""
    simulated = SimulatedJob(case.job)
    simulated.first_structures()
    simulated.say_hello(is_new=True)
    simulated.plan_round()
    world_size = case.job.world_size
    probes = sorted({world_size * i // 16 for i in range(16)} | {world_size - 1})
    rank_bytes = {rank: sum(f.nbytes for f in simulated.files_of(rank)) for rank in probes}
    own = simulated.own_plan(probes[1])
    needed = sum(
        shard.box.num_elements * leaf.spec.itemsize_bytes
        for leaf in own.tree.leaves for shard in leaf.shards
    )  # fmt: skip
    return Told(
        case.job, case.steady_plan_s, case.commit_s, rank_bytes, case.manifest_bytes, needed
    )


class ModelledJob:
    """All ranks of one job, each with its clock, on one modelled cluster."""

    def __init__(self, told: Told, hardware: Hardware, storage: Store) -> None:
        """Open a store and let the job plan; that is not timed."""
        self.told = told
        self.hardware = hardware
        self.storage = storage
        self.world_size = told.job.world_size
        self.random = np.random.default_rng(SEED)
        self.real = SimulatedJob(told.job)
        self.real.first_structures()
        self.real.say_hello(is_new=True)
        self.real.plan_round()
        self.server = Server(
            hardware.store_requests_per_s, hardware.store_bytes_per_s, hardware.round_trip_s
        )
        num_nodes = -(-self.world_size // hardware.ranks_per_node)
        self.node_of = np.arange(self.world_size) // hardware.ranks_per_node
        self.speed_of_node = np.full(num_nodes, hardware.node_bytes_per_s)
        num_slow = max(1, round(hardware.slow_share * num_nodes))
        self.slow_nodes = sorted(self.random.choice(num_nodes, num_slow, replace=False).tolist())
        self.speed_of_node[self.slow_nodes] *= hardware.slow_factor
        probes = sorted(told.rank_bytes)
        nearest = np.searchsorted(probes, np.arange(self.world_size), side="right") - 1
        self.bytes_of_rank = np.array([told.rank_bytes[probes[i]] for i in nearest], float)

    def save(self, failing: Failing | None) -> Scenario:
        """Save once, in the steady state."""
        name = f"save to the {self.storage.name}"
        scenario = Scenario(name if failing is None else f"{name}, {failing.kind}")
        arrivals = np.sort(self.random.exponential(self.hardware.arrival_s, self.world_size))
        self.random.shuffle(arrivals)
        clocks = [Clock(at + self.told.plan_s) for at in arrivals.tolist()]
        rounds = [self._round(rank, clock) for rank, clock in enumerate(clocks)]
        digests = self._digests()
        for rank in np.argsort(arrivals).tolist():
            hello = Hello(step=1, structure=digests[rank])
            rounds[rank].publish(f"hello/{rank}", hello)
        scenario.tell(max(c.now_s for c in clocks), "all ranks", "have said hello")
        answer = self._answer(rounds[0], clocks[0])
        scenario.tell(clocks[0].now_s, "rank 0", "has named the attempt")
        waits = self._wait_all(rounds, clocks, "answer", Answer)
        scenario.waited_s["the attempt's name (slowest call of save)"] = waits
        ready = np.array([clock.now_s for clock in clocks])
        done = self._write(ready)
        slowest = int(np.argmax(done))
        scenario.tell(float(np.median(done)), "median rank", "has its files durable")
        scenario.tell(
            float(done[slowest]), f"rank {slowest}",
            f"is the last; node {self.node_of[slowest]} is slow"
            if self.node_of[slowest] in self.slow_nodes else "is the last",
        )  # fmt: skip
        silent: set[int] = set()
        for rank in np.argsort(done).tolist():
            clocks[rank].now_s = max(clocks[rank].now_s, float(done[rank]))
            if failing is not None and rank == failing.rank:
                clocks[rank].now_s = float(ready[rank] + 0.5 * (done[rank] - ready[rank]))
                scenario.tell(clocks[rank].now_s, f"rank {rank}", failing.kind)
                silent.add(rank)
                continue
            report = Report(
                structure=digests[rank], files=self._files(rank), objects_digest="", objects={}
            )
            rounds[rank].publish(f"report/{rank}", report)
        self._finish(scenario, rounds, clocks, answer, failing, silent)
        return scenario

    def _finish(
        self,
        scenario: Scenario,
        rounds: list[Round],
        clocks: list[Clock],
        answer: Answer,
        failing: Failing | None,
        silent: set[int],
    ) -> None:
        """Let the coordinator commit or give up, and every rank learn of it."""
        real = self.real
        agreements = [
            Agreement(ModelCoord(rank, self.server, clock, self.world_size), real.catalog,
                      real.writer)
            for rank, clock in enumerate(clocks)
        ]  # fmt: skip
        outcomes: dict[int, Outcome] = {}
        if failing is not None and not failing.dies:
            error = StorageError("no space left on device")
            # It publishes its error before it waits; the coordinator must be heard first.
            rounds[failing.rank].fail(error)
        try:
            outcome, _ = commit_round(
                rounds[0], real.catalog, real.writer, answer, real.planner, real.described, {},
                {}, [], lambda _: (),
            )  # fmt: skip
            clocks[0].now_s += self.told.commit_s + 3 * self.storage.latency_s
            scenario.durable_s = clocks[0].now_s
            scenario.tell(clocks[0].now_s, "rank 0", "has the root durable: the step exists")
            agreements[0].publish(rounds[0], outcome)
        except (DeadlineError, RoundFailedError) as error:
            scenario.tell(clocks[0].now_s, "rank 0", f"gives up: {error}"[:160])
            outcome = agreements[0].failed(rounds[0], 1, answer.attempt, error)
        outcomes[0] = outcome
        began = np.array([clock.now_s for clock in clocks])
        order = [rank for rank in np.argsort(began).tolist() if rank != 0]
        for rank in order:
            if rank in silent and failing is not None and failing.dies:
                continue
            try:
                outcomes[rank] = agreements[rank].told(rounds[rank])
            except DeadlineError as error:
                outcomes[rank] = agreements[rank].failed(rounds[rank], 1, answer.attempt, error)
        ended = np.array([clock.now_s for clock in clocks])
        others = np.array(order)
        waited = ended[others] - began[others]
        scenario.waited_s["the outcome (slowest rank)"] = (
            float(np.median(waited)), float(waited.max())
        )  # fmt: skip
        scenario.last_rank_s = float(ended.max())
        for outcome in outcomes.values():
            words = "committed" if outcome.committed else f"{outcome.kind}: {outcome.message}"
            scenario.outcomes[words[:160]] = scenario.outcomes.get(words[:160], 0) + 1
        scenario.requests = self.server.num_requests / self.world_size

    def restore(self) -> Scenario:
        """Restore on as many ranks: what several need, one of them reads."""
        scenario = Scenario(f"restore from the {self.storage.name}")
        clocks = [Clock(at) for at in self.random.exponential(0.05, self.world_size).tolist()]
        rounds = [self._round(rank, clock, "restore") for rank, clock in enumerate(clocks)]
        clocks[0].now_s += 6 * self.storage.latency_s
        rounds[0].publish("chosen", Ok())
        scenario.waited_s["the coordinator's choice"] = self._wait_all(rounds, clocks, "chosen", Ok)
        # The manifest and the tables: one after the other, each a request of its own.
        opened = fluid(
            np.array([clock.now_s for clock in clocks]) + 4 * self.storage.latency_s,
            np.full(self.world_size, float(self.told.manifest_bytes)),
            self.node_of, self.speed_of_node, self.hardware.rank_bytes_per_s,
            self.storage.read_bytes_per_s,
        )  # fmt: skip
        for clock, at in zip(clocks, opened.tolist(), strict=True):
            clock.now_s = at + self.told.plan_s
        scenario.tell(float(opened.max()), "last rank", "has the manifest")
        self._agree(scenario, rounds, clocks, "checked", Ok())
        unique = float(self.told.needed_bytes) * self._unique_share()
        done = fluid(
            np.array([clock.now_s for clock in clocks]), np.full(self.world_size, unique),
            self.node_of, self.speed_of_node, self.hardware.rank_bytes_per_s,
            self.storage.read_bytes_per_s,
        )  # fmt: skip
        # What other ranks read comes over the same card, behind it.
        passed = (self.told.needed_bytes - unique) / (
            self.hardware.node_bytes_per_s / self.hardware.ranks_per_node
        )
        for clock, at in zip(clocks, done.tolist(), strict=True):
            clock.now_s = at + passed
        scenario.tell(float(np.median(done)), "median rank", "has read its part")
        scenario.tell(float(done.max()), "last rank", "has read its part")
        self._agree(scenario, rounds, clocks, "placed", Placed(int(unique)))
        scenario.last_rank_s = max(clock.now_s for clock in clocks)
        scenario.durable_s = scenario.last_rank_s
        scenario.outcomes = {"restored": self.world_size}
        scenario.requests = self.server.num_requests / self.world_size
        return scenario

    def _unique_share(self) -> float:
        written = float(self.bytes_of_rank.sum())
        return written / (self.told.needed_bytes * self.world_size)

    def _agree(
        self, scenario: Scenario, rounds: list[Round], clocks: list[Clock], phase: str, mine: Any
    ) -> None:
        order = np.argsort([clock.now_s for clock in clocks]).tolist()
        for rank in order:
            rounds[rank].publish(f"{phase}/{rank}", mine)
        rounds[0].gather(phase, type(mine), what=phase)
        rounds[0].publish(phase, mine)
        waits = self._wait_all(rounds, clocks, phase, type(mine))
        scenario.waited_s[f"all ranks to have {phase}"] = waits
        scenario.tell(clocks[0].now_s, "rank 0", f"knows that all have {phase}")

    def _wait_all(
        self, rounds: list[Round], clocks: list[Clock], topic: str, kind: type[Any]
    ) -> tuple[float, float]:
        """Let every rank but the coordinator wait for its word; return median and most seconds."""
        began = np.array([clock.now_s for clock in clocks])
        for rank in np.argsort(began).tolist():
            if rank != 0:
                rounds[rank].wait(topic, kind, what=topic, grace=GRACE)
        waited = np.array([clock.now_s for clock in clocks]) - began
        return float(np.median(waited)), float(waited.max())

    def _answer(self, round_: Round, clock: Clock) -> Answer:
        planner = self.real.planner
        attempt = self.real.catalog.new_attempt(self.real.writer, 1)
        modelled = Planner(
            ModelCoord(0, self.server, clock, self.world_size), f"{PREFIX}/plans", TIMEOUT_S,
            planner.structures, planner.of_ranks, planner.plan, planner.plan_digest,
        )  # fmt: skip
        return modelled.plan_round(round_, 1, attempt)

    def _write(self, ready: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return when each rank's files are durable."""
        created = ready + self.storage.latency_s
        order = np.argsort(created)
        slots = np.maximum.accumulate(
            created[order] - np.arange(len(order)) / self.storage.requests_per_s
        ) + np.arange(len(order)) / self.storage.requests_per_s  # fmt: skip
        created[order] = slots
        done = fluid(
            created, self.bytes_of_rank, self.node_of, self.speed_of_node,
            self.hardware.rank_bytes_per_s, self.storage.write_bytes_per_s,
        )  # fmt: skip
        return done + 2 * self.storage.latency_s  # Flush of the file, then of its name.

    def _round(self, rank: int, clock: Clock, kind: str = "save") -> Round:
        coord = ModelCoord(rank, self.server, clock, self.world_size)
        return Round(
            coord, f"{PREFIX}/{kind}/model", "step 1", TIMEOUT_S,
            monotonic=clock.monotonic,
        )  # fmt: skip

    def _digests(self) -> list[str]:
        digests = [""] * self.world_size
        for group, digest in zip(self.told.job.groups, self.real.digest_of_group, strict=True):
            for rank in group.ranks:
                digests[rank] = digest
        return digests

    def _files(self, rank: int) -> list[Any]:
        known = self.real.files
        probe = self.told.job.group_of(rank).ranks[0]
        if probe not in known:
            known[probe] = self.real.files_of(probe)
        return [msgspec.structs.replace(f, digest=f"{rank:032x}") for f in known[probe]]


def run(told: Told) -> list[Scenario]:
    """Save to both storages, let ranks fail, restore."""
    hardware = Hardware()
    world_size = told.job.world_size
    failures = [
        Failing(world_size // 2 + 1, dies=False, kind="one rank's disk is full"),
        Failing(world_size // 2 + 1, dies=True, kind="one rank dies"),
    ]
    scenarios = [ModelledJob(told, hardware, storage).save(None) for storage in (PFS, OBJECTS)]
    scenarios += [ModelledJob(told, hardware, PFS).save(failing) for failing in failures]
    scenarios += [ModelledJob(told, hardware, storage).restore() for storage in (PFS, OBJECTS)]
    return scenarios


def lines(scenarios: Sequence[Scenario]) -> list[str]:
    """Return what the scenarios tell, as text."""
    hardware = Hardware()
    told = [
        "",
        f"model: {hardware.ranks_per_node} ranks a node, {hardware.node_bytes_per_s / 1e9:g} GB/s a"
        f" node, {hardware.rank_bytes_per_s / 1e9:g} GB/s a rank, key-value store"
        f" {hardware.store_requests_per_s:g} requests/s, {hardware.slow_share:.1%} of the nodes at"
        f" {hardware.slow_factor:g} of their speed; "
        + "; ".join(
            f"{s.name}: write {s.write_bytes_per_s / 1e12:g} TB/s, read"
            f" {s.read_bytes_per_s / 1e12:g} TB/s, {s.requests_per_s:g} files/s,"
            f" {1e3 * s.latency_s:g} ms"
            for s in (PFS, OBJECTS)
        ),
    ]
    for scenario in scenarios:
        told += ["", scenario.name]
        told += [
            f"  {event.at_s:8.2f} s  {event.who}: {event.what}"
            for event in sorted(scenario.events, key=lambda event: event.at_s)
        ]
        told += [
            f"  waited {median:.2f} s (median), {most:.2f} s (most) for {what}"
            for what, (median, most) in scenario.waited_s.items()
        ]
        told += [f"  {count} ranks: {words}" for words, count in scenario.outcomes.items()]
        told.append(
            f"  the last rank knows after {scenario.last_rank_s:.2f} s;"
            f" {scenario.requests:.1f} requests per rank to the key-value store"
        )
    return told


def series(scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """Return the scenarios as they go into the result."""
    return {
        scenario.name: {
            "events": [[round(e.at_s, 3), e.who, e.what] for e in scenario.events],
            "waited_s": scenario.waited_s,
            "outcomes": scenario.outcomes,
            "last_rank_s": scenario.last_rank_s,
            "requests_per_rank": scenario.requests,
        }
        for scenario in scenarios
    }


def figures(scenarios: Sequence[Scenario]) -> dict[str, float]:
    """Return the figures that go into the table."""
    found: dict[str, float] = {}
    for scenario in scenarios:
        name = scenario.name.replace(" ", "_").replace(",", "").replace("'", "")
        found[f"modelled_{name}_s"] = scenario.last_rank_s
        found[f"modelled_{name}_distinct_outcomes"] = len(scenario.outcomes)
    return found


def total_gib(told: Told) -> float:
    """Return the size of a save."""
    return sum(told.rank_bytes.values()) / len(told.rank_bytes) * told.job.world_size / GIB
