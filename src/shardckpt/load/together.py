"""Read once: the ranks of a load agree on who reads what several of them want.

Layer: load. After the plans are agreed on, every rank derives the batches, links with the ranks of
its host and connects with the other hosts, and tells all ranks whether that worked, before anything
is read. A host whose ranks cannot be linked counts as one host per rank; where hosts cannot be
connected every rank reads for itself. What follows is `load.shared`.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

import msgspec

from shardckpt.errors import DeadlineError
from shardckpt.load.exchange import SLOT_BYTES, Batch, Wants, assign, wants_of
from shardckpt.load.links import Door, Link, LinkError, Memory, host_name
from shardckpt.load.read import run_load
from shardckpt.load.shared import MOST_SLOTS, PeersFailedError, Running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardckpt.coord.session import Round
    from shardckpt.load.between import Exchange
    from shardckpt.load.plan import LoadPlan

_MOST_WANTS_BYTES: Final = 32 << 20
_logger = logging.getLogger("shardckpt")


@dataclass(frozen=True, slots=True)
class Together:
    """How this rank can exchange with others.

    Attributes:
        exchange: Between hosts; None where only ranks of one host exchange.
        host: Where this rank runs; ranks that give the same name share memory if they can.
    """

    exchange: Exchange | None = None
    host: str = field(default_factory=host_name)


class Visitor(msgspec.Struct, frozen=True):
    """What a rank tells all others before anything is read."""

    host: str
    secret: str
    spans: bool
    wants: msgspec.Raw


class Visitors(msgspec.Struct, frozen=True):
    """What all ranks told; equal wants, those of replicas, are told once."""

    hosts: list[str]
    secrets: list[str]
    spans: bool
    lists: list[Wants]
    list_of_rank: list[int]


class Linked(msgspec.Struct, frozen=True):
    """Whether a rank shares memory with those of its host, and reaches other hosts."""

    linked: bool
    connected: bool


class AllLinked(msgspec.Struct, frozen=True):
    """Ranks that share no memory, and whether all reach other hosts."""

    unlinked: list[int]
    connected: bool


def gathered(told: Sequence[Visitor]) -> Visitors:
    """Return what the coordinator tells all ranks; no wants where they are too many to tell."""
    lists: dict[bytes, int] = {}
    list_of_rank = [lists.setdefault(bytes(visitor.wants), len(lists)) for visitor in told]
    wants = [msgspec.json.decode(raw, type=Wants) for raw in lists]
    if sum(map(len, lists)) > _MOST_WANTS_BYTES:
        _logger.warning("the ranks' plans are too different to be exchanged; each reads its own")
        wants = [Wants([], [], [], []) for _ in lists]
    return Visitors(
        [visitor.host for visitor in told],
        [visitor.secret for visitor in told],
        all(visitor.spans for visitor in told),
        wants,
        list_of_rank,
    )


def all_linked(told: Sequence[Linked]) -> AllLinked:
    """Return what the coordinator tells all ranks."""
    unlinked = [rank for rank, message in enumerate(told) if not message.linked]
    return AllLinked(unlinked, all(message.connected for message in told))


@final
class Meeting:
    """One rank's part: `visitor`, `meet`, and if that says so `link` and `settle`; then `run`.

    After each of the first three all ranks agree; `close` comes last, whatever failed.
    """

    def __init__(self, plan: LoadPlan, rank: int, together: Together) -> None:
        """Open a door for the ranks of this host."""
        self._plan: Final = plan
        self._rank: Final = rank
        self._together: Final = together
        self._door: Final = Door()
        self._told: Visitors | None = None
        self._batches: tuple[Batch, ...] = ()
        self._memory: Memory | None = None
        self._links: dict[int, Link] = {}
        self._is_connected = False

    def visitor(self) -> Visitor:
        """Return what the others must know."""
        wants = msgspec.Raw(msgspec.json.encode(wants_of(self._plan)))
        spans = self._together.exchange is not None
        return Visitor(self._together.host, self._door.secret, spans, wants)

    def meet(self, told: Visitors) -> bool:
        """Learn what is exchanged; False where nothing is, alike on all ranks."""
        self._told = told
        self._assign(told.hosts)
        return bool(self._batches)

    def link(self) -> Linked:
        """Link with the ranks of this host and connect the hosts; tell whether that worked."""
        assert self._told is not None
        hosts, secrets = self._told.hosts, self._told.secrets
        peers: set[int] = set()
        for batch in self._batches:
            ranks = [r for _, local in batch.providers for r in local]
            if self._rank in ranks:
                peers.update(r for r in ranks if hosts[r] == hosts[self._rank])
        peers.discard(self._rank)
        linked = connected = True
        try:
            if peers:
                self._memory, self._links = self._door.link(
                    self._rank, {peer: secrets[peer] for peer in peers}, self._memory_bytes()
                )
        except LinkError as error:
            linked = False
            _logger.warning(
                "rank %d cannot share memory with ranks %s: %s", self._rank, sorted(peers), error
            )
        if _spans(self._batches):
            assert self._together.exchange is not None
            try:
                self._together.exchange.connect()
                self._is_connected = True
            except Exception as error:  # Whatever a framework's group raises.
                connected = False
                _logger.warning("rank %d cannot reach other hosts: %s", self._rank, error)
        return Linked(linked, connected)

    def settle(self, met: AllLinked) -> None:
        """Do without what some rank could not do, alike on all ranks."""
        assert self._told is not None
        hosts = self._told.hosts
        spanned = _spans(self._batches)
        lost = {hosts[rank] for rank in met.unlinked}
        if lost:
            # The readers stay the same where the hosts do, so links that were made still fit.
            self._assign([f"{h}#{r}" if h in lost else h for r, h in enumerate(hosts)])
        if not met.connected or (_spans(self._batches) and not spanned):
            self._batches = ()
        if hosts[self._rank] in lost:
            self._part()

    def run(self, round_: Round) -> int:
        """Fill every target of the plan and return the bytes read from storage.

        Raises:
            CorruptCheckpointError: A chunk does not match its checksum; names file, key and rank.
            StorageError: A read failed.
            DeadlineError: Another rank went away, or none has answered in time; names it.
            PeersFailedError: Another rank failed.
        """
        mine = [b for b in self._batches if b.provider_for(self._rank) is not None]
        if not mine:
            run_load(self._plan, first_file=self._rank)
            return self._plan.read_bytes
        if self._memory is None:
            self._memory = Memory(mmap.mmap(-1, self._memory_bytes()))
        exchange = self._together.exchange if self._is_connected else None
        running = Running(self._plan, self._rank, mine, self._memory, self._links, exchange)
        try:
            running.run(round_)
        except DeadlineError as error:
            # A rank that fails tells so before it goes.
            if round_.has_failed():
                raise PeersFailedError from error
            raise
        return running.read_bytes

    def close(self) -> None:
        """Part from all other ranks. Never raises."""
        self._door.close()
        self._part()
        if self._is_connected and self._together.exchange is not None:
            self._together.exchange.close()
            self._is_connected = False

    def _part(self) -> None:
        for link in self._links.values():
            link.close()
        self._links, self._memory = {}, None

    def _assign(self, hosts: Sequence[str]) -> None:
        assert self._told is not None
        told = self._told
        self._batches = assign(told.lists, told.list_of_rank, hosts, spans=told.spans)

    def _memory_bytes(self) -> int:
        provided = sum(any(p == self._rank for p, _ in batch.providers) for batch in self._batches)
        return SLOT_BYTES * max(1, min(MOST_SLOTS, provided))


def _spans(batches: Sequence[Batch]) -> bool:
    return any(len(batch.providers) > 1 for batch in batches)
