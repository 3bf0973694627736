"""An explicit-state checker for the commit log: runs the real protocols under every interleaving.

The actors are the generators of `shardckpt.catalog.log` and `catalog.collect`, not a description of
them. A generator cannot be copied, so an actor's state is named by what its frames hold (code
position and locals of the whole `yield from` chain) and reached again by replaying the answers that
led there first. Everything is interned, and what one actor can do in one store is computed once, so
a state of the whole system is a short tuple of numbers.

Two frames that look equal behave equally because the protocols keep all that matters in locals with
a full `repr`, and loop over distinct names. A local called `_` counts towards bounds that no
scenario reaches and is left out.

The reads of a `coarse` actor are one step as long as nothing else comes between. That list, get,
list deserves this is what the scenarios with other actors show. A process that dies is one that
never steps again, so every state reached is also checked as the last one of anybody.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from promises import (
    check_delete,
    check_put,
    check_said,
    check_store,
    check_together,
)
from world import (
    LOST,
    TORN,
    AwaitDone,
    AwaitMade,
    Choose,
    ChooseLive,
    Hear,
    IsStray,
    MakeAttempt,
    NewestNow,
    Scenario,
    Store,
    Stored,
    Violation,
    newest_of,
    root_of,
    show_store,
)

from shardckpt.catalog import ops
from shardckpt.errors import CorruptCheckpointError, StorageError
from shardckpt.format.root import (
    Root,
    root_name,
    root_seq,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from types import SimpleNamespace

_ALONE_STEPS = 300


@dataclass
class _Node:
    """One state of one actor."""

    actor: int
    history: tuple[Any, ...]
    operation: Any
    said: tuple[tuple[Any, ...], ...]
    live: Generator[Any, Any, None] | None = field(repr=False, default=None)
    dead: bool = False


class Step(NamedTuple):
    """One way on for one actor: store, actor state, lost replies used, torn roots used."""

    store: int
    actor_state: int
    lost: int
    torn: int


class Explorer:
    """Explores one scenario with one set of protocols."""

    def __init__(self, scenario: Scenario, protocols: SimpleNamespace, first: Store) -> None:
        self.scenario = scenario
        self.protocols = protocols
        self.weak = scenario.power_cut
        self._stores: list[Store] = []
        self._store_ids: dict[Store, int] = {}
        self._nodes: list[_Node] = []
        self._node_ids: dict[tuple[Any, ...], int] = {}
        self._next: dict[tuple[int, Any], int] = {}
        self._steps: dict[tuple[int, int, bool, bool], list[Step]] = {}
        self._ends_alone: set[tuple[int, int]] = set()
        self._pairs_checked: set[tuple[int, int]] = set()
        self._said_checked: set[tuple[Any, ...]] = set()
        self._newest_of: dict[int, Stored] = {}
        self._first = self._intern(first)
        # What no other actor can tell from doing it at once. There are no leases here, and without
        # a power cut nothing depends on what is durable.
        syncs = () if self.weak else (ops.SyncRoots, ops.SyncAttempts)
        self._quiet: tuple[type, ...] = (*syncs, ops.ListLeased, IsStray)

    # -- the search ------------------------------------------------------------------------------

    def run(self, most_states: int = 100_000_000) -> int:
        """Visit every state and return how many there are.

        Raises:
            Violation: With the shortest trace to it.
        """
        actors = range(len(self.scenario.actors))
        begin = (
            self._first,
            self.scenario.lost_replies,
            self.scenario.torn,
            int(self.scenario.power_cut),
            *(2 * self._start(actor) for actor in actors),
        )
        came_from: dict[tuple[int, ...], tuple[int, ...] | None] = {begin: None}
        queue = deque([begin])
        state = begin
        try:
            self._check(begin)
            while queue:
                state = queue.popleft()
                for following in self._successors(state):
                    if following in came_from:
                        continue
                    came_from[following] = state
                    try:
                        self._check(following)
                    except Violation:
                        state = following
                        raise
                    queue.append(following)
                if len(came_from) > most_states:
                    raise AssertionError(f"{self.scenario.name}: more than {most_states} states")
        except Violation as violation:
            raise Violation(f"{violation}\n{self._trace(came_from, state)}") from None
        return len(came_from)

    def _successors(self, state: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        _, lost, torn, cut = state[:4]
        for actor, actor_state in enumerate(state[4:]):
            if self.scenario.actors[actor].after_cut and cut:
                continue
            for step in self._steps_of(state, actor, actor_state):
                yield (
                    step.store,
                    lost - step.lost,
                    torn - step.torn,
                    cut,
                    *state[4 : 4 + actor],
                    step.actor_state,
                    *state[5 + actor :],
                )
        if cut:
            yield from self._power_cuts(state)

    def _check(self, state: tuple[int, ...]) -> None:
        store = state[0]
        said = tuple(self._nodes[s >> 1].said for s in state[4:])
        for actor_state in state[4:]:
            if (store, actor_state) not in self._pairs_checked:
                check_said(self.newest(store), self._nodes[actor_state >> 1].said)
                self._check_ends_alone(store, actor_state)
                self._pairs_checked.add((store, actor_state))
        if said not in self._said_checked:
            check_together(said)
            self._said_checked.add(said)

    def _trace(
        self, came_from: dict[tuple[int, ...], tuple[int, ...] | None], state: tuple[int, ...]
    ) -> str:
        lines: list[str] = []
        at: tuple[int, ...] | None = state
        while at is not None:
            before = came_from.get(at)
            if before is not None:
                lines.append(self._describe(before, at))
            at = before
        return "\n".join([*reversed(lines), "", show_store(self._stores[state[0]])])

    def _describe(self, before: tuple[int, ...], after: tuple[int, ...]) -> str:
        if before[3] != after[3]:
            return "POWER CUT"
        for actor, (a, b) in enumerate(zip(before[4:], after[4:], strict=True)):
            if a != b:
                operation = self._nodes[a >> 1].operation
                new = set(self._nodes[b >> 1].said) - set(self._nodes[a >> 1].said)
                text = type(operation).__name__
                if isinstance(operation, ops.PutRoot):
                    root = root_of(operation.data, operation.name)
                    text += f" {root.seq} {root.kind}" if root else ""
                    text += " (becomes durable)" if a & 1 else ""
                elif isinstance(operation, (ops.DeleteAttempt, ops.DeleteRoot, MakeAttempt)):
                    text += f" {operation}"
                fault = " LOST" if before[1] != after[1] else ""
                return f"  {self.scenario.actors[actor].name}: {text}{fault} {sorted(new) or ''}"
        return "  nothing"

    # -- actors ----------------------------------------------------------------------------------

    def _start(self, actor: int) -> int:
        return self._node(actor, (), None)

    def _node(self, actor: int, history: tuple[Any, ...], parent: _Node | None) -> int:
        said: list[tuple[Any, ...]] = []
        if parent is not None and parent.live is not None:
            # The generator of the parent is still where it was: use it instead of a replay.
            generator, parent.live = parent.live, None
            said = _locals(generator)["said"]
            operation = self._resume(generator, history[-1])
        else:
            generator = self.scenario.actors[actor].script(self.protocols, said)
            operation = self._resume(generator, None)
            for answer in history:
                operation = self._resume(generator, answer)
        key = (actor, tuple(said), _frames(generator))
        known = self._node_ids.get(key)
        if known is None:
            known = len(self._nodes)
            self._node_ids[key] = known
            live = generator if operation is not None else None
            self._nodes.append(_Node(actor, history, operation, tuple(said), live))
        return known

    def _resume(self, generator: Generator[Any, Any, None], answer: Any) -> Any:
        try:
            return generator.send(answer)
        except StopIteration:
            return None
        except (StorageError, CorruptCheckpointError, AssertionError) as error:
            raise Violation(f"an actor failed: {error!r}") from error

    def _answered(self, node: int, answer: Any) -> int:
        key = (node, answer)
        known = self._next.get(key)
        if known is None:
            parent = self._nodes[node]
            known = self._node(parent.actor, (*parent.history, answer), parent)
            self._next[key] = known
        return known

    def _dead(self, actor_state: int) -> int:
        node = self._nodes[actor_state >> 1]
        if node.operation is None:
            return actor_state & ~1
        key = (node.actor, node.said, "dead")
        if key not in self._node_ids:
            self._node_ids[key] = len(self._nodes)
            self._nodes.append(_Node(node.actor, (), None, node.said, dead=True))
        return 2 * self._node_ids[key]

    # -- what one actor can do -------------------------------------------------------------------

    def _steps_of(self, state: tuple[int, ...], actor: int, actor_state: int) -> list[Step]:
        operation = self._nodes[actor_state >> 1].operation
        if operation is None:
            return []
        store = state[0]
        if isinstance(operation, (AwaitDone, Hear)):
            other = self._nodes[state[4 + operation.actor] >> 1]
            return [
                self._go(store, actor_state >> 1, answer) for answer in _heard(operation, other)
            ]
        key = (store, actor_state, state[1] > 0, state[2] > 0)
        known = self._steps.get(key)
        if known is None:
            known = list(self._work(store, actor_state, lost=key[2], torn=key[3]))
            self._steps[key] = known
        return known

    def _go(self, store: int, node: int, answer: Any, *, lost: int = 0, torn: int = 0) -> Step:
        """Answer an actor, and everything it asks next that no other actor can tell apart."""
        node = self._answered(node, answer)
        while isinstance(self._nodes[node].operation, self._quiet):
            store, answer = self._performed(store, self._nodes[node].operation)
            node = self._answered(node, answer)
        return Step(store, 2 * node, lost, torn)

    def _work(self, store: int, actor_state: int, *, lost: bool, torn: bool) -> Iterator[Step]:
        node = actor_state >> 1
        operation = self._nodes[node].operation
        match operation:
            case ops.PutRoot():
                yield from self._puts(store, actor_state, operation, lost=lost, torn=torn)
            case Choose(options):
                yield from (self._go(store, node, option) for option in options)
            case ChooseLive():
                root = self.newest_root(store)
                yield from (self._go(store, node, e.attempt) for e in root.live)
            case AwaitMade(attempt):
                if attempt in dict(self._stores[store].ancestry):
                    yield self._go(store, node, None)
            case NewestNow():
                yield self._go(store, node, self.newest(store).seq)
            case ops.ListRoots() if self.scenario.actors[self._nodes[node].actor].coarse:
                yield self._read_run(store, node)
            case _:
                store, answer = self._performed(store, operation)
                yield self._go(store, node, answer)

    def _read_run(self, store: int, node: int) -> Step:
        """List, get, list in one step: up to the first operation that is no read."""
        reads = (*self._quiet, ops.ListRoots, ops.GetRoot)
        while isinstance(self._nodes[node].operation, reads):
            store, answer = self._performed(store, self._nodes[node].operation)
            node = self._answered(node, answer)
        return Step(store, 2 * node, 0, 0)

    def _puts(
        self, store: int, actor_state: int, put: ops.PutRoot, *, lost: bool, torn: bool
    ) -> Iterator[Step]:
        node = actor_state >> 1
        if actor_state & 1:
            yield self._go(self._synced(store), node, True)
            return
        owner = self.scenario.actors[self._nodes[node].actor].owner
        seq = root_seq(put.name)
        assert seq is not None
        if any(r.seq == seq and r.fate != "gone" for r in self._stores[store].roots):
            yield self._go(store, node, False)
            return
        done = self._with_root(store, seq, put.data, owner)
        if self.weak:
            yield Step(done, actor_state | 1, 0, 0)
        else:
            yield self._go(done, node, True)
        if lost:
            yield self._go(done, node, LOST, lost=1)
            yield self._go(store, node, LOST, lost=1)
        if torn:
            yield Step(self._with_root(store, seq, TORN, owner), self._dead(actor_state), 0, 1)

    def _performed(self, store_id: int, operation: Any) -> tuple[int, Any]:
        store = self._stores[store_id]
        match operation:
            case ops.ListRoots():
                names = tuple(root_name(r.seq) for r in store.roots if r.fate != "gone")
                return store_id, names
            case ops.GetRoot(name):
                found = (
                    r.data for r in store.roots if root_name(r.seq) == name and r.fate != "gone"
                )
                return store_id, next(found, None)
            case ops.SyncRoots():
                return self._synced(store_id), None
            case ops.DeleteRoot(name):
                return self._without_root(store_id, name), None
            case ops.ListAttempts():
                return store_id, tuple(a for a, fate in store.attempts if fate != "gone")
            case ops.ListLeased():
                return store_id, ()
            case IsStray(seq):
                return store_id, any(r.seq == seq and r.ghost.stray for r in store.roots)
            case ops.DeleteAttempt(name):
                return self._without_attempt(store_id, name), None
            case ops.SyncAttempts():
                kept = tuple(a for a in store.attempts if a[1] != "gone")
                return self._intern(store._replace(attempts=kept)), None
            case MakeAttempt(attempt, base):
                known = dict(store.ancestry)
                line = (*known[base], base) if base else ()
                return self._intern(
                    store._replace(
                        attempts=tuple(sorted((*store.attempts, (attempt, "kept")))),
                        ancestry=tuple(sorted((*store.ancestry, (attempt, line)))),
                    )
                ), None
        raise AssertionError(operation)

    def _check_ends_alone(self, store: int, actor_state: int) -> None:
        """Whoever is left alone, without further faults, must finish or be waiting for somebody."""
        seen: list[tuple[int, int]] = []
        for _ in range(_ALONE_STEPS):
            at = (store, actor_state)
            operation = self._nodes[actor_state >> 1].operation
            if (
                at in self._ends_alone
                or operation is None
                or isinstance(operation, (AwaitDone, AwaitMade, Hear, Choose, ChooseLive))
            ):
                self._ends_alone.update(seen)
                return
            seen.append(at)
            key = (store, actor_state, False, False)
            if key not in self._steps:
                self._steps[key] = list(self._work(store, actor_state, lost=False, torn=False))
            (step,) = self._steps[key]
            store, actor_state = step.store, step.actor_state
        raise Violation(
            f"{self.scenario.actors[self._nodes[actor_state >> 1].actor].name} alone never ends"
        )

    # -- the store -------------------------------------------------------------------------------

    def _intern(self, store: Store) -> int:
        known = self._store_ids.get(store)
        if known is None:
            known = len(self._stores)
            self._store_ids[store] = known
            self._stores.append(store)
            self._newest_of[known] = newest_of(store)
            check_store(store, self._newest_of[known])
        return known

    def newest(self, store: int) -> Stored:
        """Return the newest valid root there is."""
        return self._newest_of[store]

    def newest_root(self, store: int) -> Root:
        """Return it decoded."""
        return self.newest(store).valid

    def _with_root(self, store_id: int, seq: int, data: bytes, owner: str) -> int:
        store = self._stores[store_id]
        names = [r.seq for r in store.roots if r.fate != "gone"]
        before = self.newest(store_id)
        root = root_of(data, root_name(seq))
        stray = seq < max(names)
        ghost = before.ghost._replace(stray=stray)
        if root is not None and not stray:
            ghost = check_put(before, root, owner, dict(store.ancestry))
        stored = Stored(seq, "new" if self.weak else "kept", data, ghost)
        roots = (*(r for r in store.roots if r.seq != seq), stored)
        return self._intern(store._replace(roots=tuple(sorted(roots, key=lambda r: r.seq))))

    def _without_root(self, store_id: int, name: str) -> int:
        store = self._stores[store_id]
        roots = []
        for r in store.roots:
            if root_name(r.seq) != name:
                roots.append(r)
            elif self.weak and r.fate == "kept":
                roots.append(r._replace(fate="gone"))
        return self._intern(store._replace(roots=tuple(roots)))

    def _without_attempt(self, store_id: int, name: str) -> int:
        store = self._stores[store_id]
        if (name, "kept") not in store.attempts:
            # Another collector was here first.
            return store_id
        check_delete(self.newest(store_id), name)
        kept = [a for a in store.attempts if a[0] != name]
        if self.weak:
            kept.append((name, "gone"))
        return self._intern(store._replace(attempts=tuple(sorted(kept))))

    def _synced(self, store_id: int) -> int:
        store = self._stores[store_id]
        roots = tuple(r._replace(fate="kept") for r in store.roots if r.fate != "gone")
        return self._intern(store._replace(roots=roots))

    def _power_cuts(self, state: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        store = self._stores[state[0]]
        dead = tuple(
            actor_state if self.scenario.actors[i].after_cut else self._dead(actor_state)
            for i, actor_state in enumerate(state[4:])
        )
        open_roots = [r.seq for r in store.roots if r.fate != "kept"]
        open_attempts = [a for a, fate in store.attempts if fate != "kept"]
        for roots_kept in _subsets(open_roots):
            for attempts_kept in _subsets(open_attempts):
                left = Store(
                    tuple(
                        r._replace(fate="kept")
                        for r in store.roots
                        if r.fate == "kept" or r.seq in roots_kept
                    ),
                    tuple(
                        (a, "kept")
                        for a, fate in store.attempts
                        if fate == "kept" or a in attempts_kept
                    ),
                    store.ancestry,
                )
                yield (self._intern(left), state[1], state[2], 0, *dead)


def _heard(operation: AwaitDone | Hear, other: _Node) -> list[Any]:
    if isinstance(operation, AwaitDone):
        return [None] if other.operation is None and not other.dead else []
    verdicts = ("committed", "aborted", "fenced", "unknown")
    heard = [s[0] for s in other.said if s[0] in verdicts and s[1] == operation.attempt]
    return ["silence", *heard]


def _subsets(items: Sequence[Any]) -> Iterator[frozenset[Any]]:
    for size in range(len(items) + 1):
        yield from map(frozenset, itertools.combinations(items, size))


def _locals(generator: Any) -> dict[str, Any]:
    names: dict[str, Any] = generator.gi_frame.f_locals
    return names


def _frames(generator: Any) -> tuple[Any, ...]:
    frames: list[Any] = []
    while generator is not None and getattr(generator, "gi_frame", None) is not None:
        frame = generator.gi_frame
        frames.append((frame.f_code.co_name, frame.f_lasti, _shown(frame.f_locals)))
        generator = generator.gi_yieldfrom
    return tuple(frames)


def _shown(names: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, repr(sorted(value) if isinstance(value, (set, frozenset)) else value))
        for name, value in sorted(names.items())
        # Functions are the same for every state of an actor; what they close over is a local too.
        if name not in ("_", "said", "protocols") and not callable(value)
    )
