"""Who takes part in the model of the commit log: jobs, ranks, operators, collectors.

Each script runs the real protocols it is given (`protocols`, maybe a broken copy) and writes down
in `said` what it would have told its caller.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
from world import (
    Actor,
    AwaitDone,
    AwaitMade,
    Choose,
    ChooseLive,
    Ghost,
    Hear,
    IsStray,
    MakeAttempt,
    NewestNow,
    Store,
    Stored,
)

from shardckpt.catalog import collect, log
from shardckpt.format.root import Entry, Root, attempt_name, encode_root, root_digest
from shardckpt.load.choose import ancestry_of

Script = Generator[Any, Any, None]
Said = list[tuple[Any, ...]]
KEPT = 2

OLD = [attempt_name(step, 0, f"{step:032x}") for step in (0, 1)]
A_WRITER = log.Writer(1, "owner-A", "A")


def real_protocols() -> SimpleNamespace:
    """Return the protocols as they are shipped."""
    return SimpleNamespace(**{**vars(log), **vars(collect)})


def attempt_of(job: str, number: int, epoch: int) -> str:
    """Return the name of a job's attempt; the step tells the job."""
    letter = format(ord(job), "x")
    return attempt_name(10 * (ord(job) - ord("A") + 1) + number, epoch, f"{letter}{number:030x}")


A1 = attempt_of("A", 1, 1)


def entry_of(attempt: str) -> Entry:
    """Return what a job proposes for an attempt."""
    return Entry(
        step=int(attempt[5:17]),
        attempt=attempt,
        parent="",
        manifest="",
        metrics={},
        pinned=False,
        abandoned=False,
        world_size=1,
        nbytes=1,
        saved_unix_s=0.0,
    )


def first_store() -> Store:
    """Return a store with two steps of a job long gone, just taken over by job A."""
    live = [
        entry_of(OLD[0]),
        msgspec.structs.replace(entry_of(OLD[1]), parent=OLD[0]),
    ]
    before = msgspec.structs.replace(
        log.first_root("store", "old", "old"),
        kind="commit",
        owner="owner-old",
        live=live,
        last=(OLD[1], ""),
        ever=True,
    )
    taken = msgspec.structs.replace(
        before,
        seq=1,
        kind="takeover",
        epoch=1,
        owner=A_WRITER.owner,
        before=root_digest(encode_root(before)),
        last=("", OLD[1]),
    )
    ghost = Ghost((OLD[0], OLD[1]), frozenset(), stray=False)
    return Store(
        roots=tuple(Stored(r.seq, "kept", encode_root(r), ghost) for r in (before, taken)),
        attempts=tuple((a, "kept") for a in OLD),
        ancestry=((OLD[0], ()), (OLD[1], (OLD[0],))),
    )


# -- scripts --


def _saves(
    job: str,
    *,
    saves: int,
    to_drop: Callable[[Root], Collection[str]],
    sweeps: bool,
    rank: int | None,
    restores_old: bool,
    owned: log.Writer | None,
    protocols: SimpleNamespace,
    said: Said,
) -> Script:
    line = list(OLD)
    if owned is None:
        opened = yield from _open(job, protocols, said, restores_old)
        if opened is None:
            return
        owned, line = opened
    gone: Collection[str] = ()
    for number in range(1, saves + 1):
        attempt = attempt_of(job, number, owned.epoch)
        yield MakeAttempt(attempt, line[-1])
        verdict = yield from _verdict(
            protocols.commit(owned, entry_of(attempt), line, to_drop, gone, lambda: job)
        )
        said.append((verdict, attempt))
        if verdict == "committed":
            line.append(attempt)
        elif verdict != "aborted":
            return
        if rank is not None:
            # A rank asks about an attempt before it reports for the next one.
            yield AwaitDone(rank)
        if sweeps:
            gone = yield from _swept(protocols)


def _open(
    job: str, protocols: SimpleNamespace, said: Said, restores_old: bool
) -> Generator[Any, Any, tuple[log.Writer, list[str]] | None]:
    owner = f"owner-{job}"
    verdict, root = yield from protocols.takeover(owner, job, lambda: job)
    if verdict != "committed":
        said.append(("superseded", owner))
        return None
    said.append(("owns", owner, root.epoch))
    bases = [root.latest.attempt]
    if restores_old:
        bases = [e.attempt for e in root.live]
    base = yield Choose(tuple(bases))
    return log.Writer(root.epoch, owner, job), ancestry_of(root, base)


def _verdict(protocol: Generator[Any, Any, tuple[Any, Root]]) -> Generator[Any, Any, Any]:
    # A frame of its own, so that the root is forgotten with it.
    verdict, _ = yield from protocol
    return verdict


def _swept(protocols: SimpleNamespace) -> Generator[Any, Any, Collection[str]]:
    collected: collect.Collected = yield from protocols.collect_attempts()
    return collected.gone


def _rank(actor: int, protocols: SimpleNamespace, said: Said) -> Script:
    yield AwaitMade(A1)
    verdict = yield Hear(actor, A1)
    if verdict == "silence":
        verdict = yield from _verdict(protocols.abort(A_WRITER, A1, lambda: "rank"))
    said.append((verdict, A1))


def _drops(times: int, protocols: SimpleNamespace, said: Said) -> Script:
    for number in range(times):
        attempt = yield ChooseLive()

        def change(root: Root, attempt: str = attempt) -> Root | None:
            dropped = protocols.drop(root, [attempt])
            return None if dropped.live == root.live else dropped

        if (yield from _maintained(protocols, change, attempt)) is None:
            said.append(("dropped", attempt, number))


def _pins(times: int, protocols: SimpleNamespace, said: Said) -> Script:
    for number in range(times):
        pinned = (times - number) % 2 == 1

        def change(root: Root, pinned: bool = pinned) -> Root | None:
            entry = root.entry(OLD[1])
            if entry is None or entry.pinned == pinned:
                return None
            other = msgspec.structs.replace(entry, pinned=pinned)
            live = [other if e is entry else e for e in root.live]
            return msgspec.structs.replace(root, live=live)

        yield from _maintained(protocols, change, OLD[1])
    said.append(("pinned", OLD[1]))


def _maintained(
    protocols: SimpleNamespace, change: Callable[[Root], Root | None], attempt: str
) -> Generator[Any, Any, Entry | None]:
    root = yield from protocols.maintain("operator", change, lambda: "operator")
    entry: Entry | None = root.entry(attempt)
    return entry


def _prunes(times: int, protocols: SimpleNamespace, said: Said) -> Script:
    valid: set[str] = set()
    while times:
        times -= 1
        yield from protocols.prune_roots(valid, kept=KEPT)


def _collects(times: int, protocols: SimpleNamespace, said: Said) -> Script:
    while times:
        times -= 1
        yield from _swept(protocols)


def _reads(protocols: SimpleNamespace, said: Said) -> Script:
    start = yield NewestNow()
    seq = yield from _seq_read(protocols)
    said.append(("read", start, seq, (yield IsStray(seq))))


def _seq_read(protocols: SimpleNamespace) -> Generator[Any, Any, int]:
    newest = yield from protocols.read_newest()
    seq: int = newest.root.seq
    return seq


# -- actors --


def keep_last(count: int) -> Callable[[Root], list[str]]:
    """Return a retention that lets the oldest of the current branch go."""
    return lambda root: [e.attempt for e in root.current[:-count]]


def keep_all(root: Root) -> list[str]:
    """Let nothing go."""
    return []


def job(
    name: str,
    *,
    saves: int = 1,
    to_drop: Callable[[Root], Collection[str]] = keep_all,
    sweeps: bool = False,
    rank: int | None = None,
    restores_old: bool = False,
    after_cut: bool = False,
) -> Actor:
    """Return a job: A owns epoch 1 already, the others take over first."""
    script = partial(
        _saves,
        name,
        saves=saves,
        to_drop=to_drop,
        sweeps=sweeps,
        rank=rank,
        restores_old=restores_old,
        owned=A_WRITER if name == "A" else None,
    )
    return _actor(name, f"owner-{name}", script, after_cut=after_cut)


def rank_of_a(actor: int = 0) -> Actor:
    """Return a rank of job A, which is told how A's first save ended, or gives it up."""
    return _actor("rank", A_WRITER.owner, partial(_rank, actor))


def operator_drops(times: int = 1) -> Actor:
    """Return an operator who drops any live step."""
    return _actor("operator", "", partial(_drops, times))


def operator_pins(times: int = 1) -> Actor:
    """Return an operator who pins and unpins."""
    return _actor("operator", "", partial(_pins, times))


def pruner(times: int = 1) -> Actor:
    """Return somebody who prunes old roots."""
    return _actor("pruner", "", partial(_prunes, times))


def collector(times: int = 1) -> Actor:
    """Return somebody who deletes dead attempts."""
    return _actor("collector", "", partial(_collects, times))


def reader() -> Actor:
    """Return somebody who reads the newest root once, overtaken between any two reads."""
    return slow(_actor("reader", "", _reads))


def slow(actor: Actor) -> Actor:
    """Return the same actor, overtaken between any two of its reads."""
    return replace(actor, coarse=False)


def _actor(name: str, owner: str, script: Any, *, after_cut: bool = False) -> Actor:
    def run(protocols: SimpleNamespace, said: Said) -> Script:
        started: Script = script(protocols=protocols, said=said)
        return started

    return Actor(name, owner, run, after_cut)
