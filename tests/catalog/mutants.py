"""Breakages of the commit log that the model checker must notice, in their smallest scenarios."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from scenarios import (
    collector,
    job,
    operator_drops,
    operator_pins,
    pruner,
    rank_of_a,
    reader,
)
from world import Scenario

from shardckpt.catalog import collect, log


@dataclass(frozen=True)
class Mutant:
    """One edit of one protocol and the scenario in which it does harm."""

    name: str
    file: Literal["log", "collect"]
    old: str
    new: str
    scenario: Scenario
    also: tuple[tuple[str, str, str], ...] = ()


def mutated(mutant: Mutant) -> SimpleNamespace:
    """Return the protocols with one of them broken.

    Raises:
        LookupError: The text to break is not there exactly once, so the mutant needs an update.
    """
    source = {"log": inspect.getsource(log), "collect": inspect.getsource(collect)}
    for file, old, new in ((mutant.file, mutant.old, mutant.new), *mutant.also):
        if source[file].count(old) != 1:
            raise LookupError(f"{mutant.name}: its text is not in {file}.py exactly once")
        source[file] = source[file].replace(old, new)
    broken_log = _executed("mutant_log", source["log"])
    broken_collect = _executed("mutant_collect", source["collect"])
    # The collector reads by the same, maybe broken, protocol.
    imported = ("list_roots", "read_newest", "valid_root")
    broken_collect.update({name: broken_log[name] for name in imported})
    return SimpleNamespace(**{**broken_log, **broken_collect, "__name__": "mutant"})


def _executed(name: str, source: str) -> dict[str, Any]:
    module = ModuleType(name)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    exec(compile(source, name, "exec"), vars(module))
    return vars(module)


_LATE = job("C", after_cut=True)
_PAIR = Scenario("two jobs", (job("A"), job("B")))
_RANK = Scenario("a rank", (job("A"), rank_of_a()))
_CUT_RANK = Scenario("a rank and a power cut", (job("A"), rank_of_a(), _LATE), power_cut=True)
_TORN = Scenario("a torn root", (job("A"), job("B")), torn=1)
_LOST = Scenario("a lost reply", (job("A"),), lost_replies=1)
_LOST_PAIR = Scenario("a lost reply, two jobs", (job("A"), job("B")), lost_replies=1)
_SLOW = Scenario("a slow writer", (job("A"), operator_pins(3), pruner(1)))
_SLOW_OPEN = Scenario("a slow opener", (job("B"), operator_pins(3), pruner(1)))
_OPERATOR = Scenario("an operator", (job("A"), operator_pins(1)))
_OPERATOR_PAIR = Scenario("an operator, two jobs", (job("A"), job("B"), operator_pins(1)))
_OPERATOR_RANK = Scenario("an operator, a rank", (job("A"), rank_of_a(), operator_pins(1)))
_DROPS = Scenario("drops", (job("A", saves=2), operator_drops(1)))
_MANY_DROPS = Scenario("many drops", (job("A"), operator_drops(2)))
_BRANCH = Scenario("a branch", (job("A"), job("B", restores_old=True)))
_BRANCH_DROPS = Scenario(
    "drops on a branch", (job("B", restores_old=True, saves=2), operator_drops(2))
)
_RETIRED = Scenario("a retired step", (job("A"), operator_drops(1)), lost_replies=1)
_FORGOTTEN = Scenario(
    "an old verdict",
    (job("A"), rank_of_a(), job("B", saves=2, sweeps=True), operator_drops(1)),
)
_READ = Scenario("a reader", (operator_pins(3), pruner(1), reader()))
_READ_SLOW = Scenario(
    "a reader and a slow writer", (job("A"), operator_pins(3), pruner(1), reader())
)
_CUT_PRUNE = Scenario(
    "pruning and a power cut", (job("A"), operator_pins(1), pruner(1), _LATE), power_cut=True
)
_CUT_COLLECT = Scenario(
    "collecting and a power cut", (operator_drops(1), job("A"), collector(1), _LATE), power_cut=True
)
_CUT_SWEEP = Scenario(
    "a sweep and a power cut",
    (job("A", saves=2, sweeps=True), operator_drops(1), _LATE),
    power_cut=True,
)
_COLLECT = Scenario("collecting", (job("A"), collector(1)))
_TORN_PRUNE = Scenario("pruning torn roots", (job("A"), job("B"), job("C"), pruner(1)), torn=2)
_SUPERSEDED = Scenario("two openers", (job("B"), job("C")))
_OPENER_OPERATOR = Scenario("an opener and an operator", (job("B"), operator_pins(1)))

_DECIDE_MINE = (
    "    if root.epoch == writer.epoch and root.owner == writer.owner:\n        return None\n"
)
_DECIDE_THERE = (
    "    if root.entry(attempt) is not None or attempt in root.retired or attempt in root.last:\n"
    '        return "committed"\n'
)
_DECIDE_ABORTED = '    if attempt in root.aborted:\n        return "aborted"\n'
_PUT = "    puts.note((yield PutRoot(root_name(root.seq), encode_root(root))))\n    return None\n"
_LISTED_AGAIN = "if not again or again[-1] != names[-1]:"
_MAINTAIN_BUILD = (
    "        return msgspec.structs.replace(stamped, live=changed.live, retired=changed.retired)\n"
)

MUTANTS = [
    Mutant(
        "no sync before the verdict",
        "log",
        "        yield SyncRoots()\n        return verdict, newest.root\n",
        "        return verdict, newest.root\n",
        _CUT_RANK,
    ),
    Mutant(
        "next number above the newest valid root", "log", "newest_seq + 1)", "root.seq + 1)", _TORN
    ),
    Mutant("neither epoch nor owner compared", "log", _DECIDE_MINE, "    return None\n", _PAIR),
    Mutant(
        "a later epoch counts as mine",
        "log",
        _DECIDE_MINE,
        "    if root.epoch >= writer.epoch:\n        return None\n",
        _PAIR,
    ),
    Mutant("aborted not looked at", "log", _DECIDE_ABORTED, "", _RANK),
    Mutant(
        "epoch looked at before the attempt",
        "log",
        _DECIDE_THERE,
        '    if root.epoch != writer.epoch:\n        return "fenced"\n' + _DECIDE_THERE,
        _LOST_PAIR,
    ),
    Mutant(
        "retired not looked at",
        "log",
        "or attempt in root.retired or attempt in root.last",
        "",
        _RETIRED,
    ),
    Mutant(
        "a put that succeeded believed",
        "log",
        _PUT,
        "    answer = yield PutRoot(root_name(root.seq), encode_root(root))\n"
        "    puts.note(answer)\n"
        '    return ("committed", root) if answer is True else None\n',
        _SLOW,
    ),
    Mutant(
        "a put that failed believed",
        "log",
        _PUT,
        "    answer = yield PutRoot(root_name(root.seq), encode_root(root))\n"
        "    puts.note(answer)\n"
        '    return ("aborted", root) if isinstance(answer, StorageError) else None\n',
        _LOST,
    ),
    Mutant(
        "a takeover believes its put",
        "log",
        'return "fenced" if puts.succeeded else None',
        'return "committed" if puts.succeeded else None',
        _SUPERSEDED,
    ),
    Mutant(
        "a takeover looks at the newest root's kind",
        "log",
        "        if root.owner == owner:\n",
        '        if root.owner == owner and root.kind == "takeover":\n',
        _OPENER_OPERATOR,
    ),
    Mutant("a takeover opens no epoch", "log", "epoch=root.epoch + 1,", "epoch=root.epoch,", _PAIR),
    Mutant(
        "maintain keeps the epoch it first read",
        "log",
        _MAINTAIN_BUILD,
        "        first.setdefault(0, root.epoch)\n"
        "        return msgspec.structs.replace(\n"
        "            stamped, live=changed.live, retired=changed.retired, epoch=first[0]\n"
        "        )\n",
        _OPERATOR_PAIR,
        also=(
            (
                "log",
                "    def build(root: Root) -> Root:\n        changed = change(root)\n",
                "    first: dict[int, int] = {}\n\n"
                "    def build(root: Root) -> Root:\n        changed = change(root)\n",
            ),
        ),
    ),
    Mutant(
        "an operator fences the job",
        "log",
        _MAINTAIN_BUILD,
        "        return msgspec.structs.replace(\n"
        "            stamped, live=changed.live, retired=changed.retired, epoch=root.epoch + 1\n"
        "        )\n",
        _OPERATOR,
    ),
    Mutant(
        "maintain forgets what was aborted",
        "log",
        _MAINTAIN_BUILD,
        "        return msgspec.structs.replace(\n"
        "            stamped, live=changed.live, retired=changed.retired, aborted=[]\n"
        "        )\n",
        _OPERATOR_RANK,
    ),
    Mutant(
        "drop ignores may_drop",
        "log",
        "if entry is None or not may_drop(live, entry):",
        "if entry is None:",
        _MANY_DROPS,
    ),
    Mutant(
        "one step is enough",
        "log",
        "len(live) > 2 and (entry.abandoned or current > 2)",
        "len(live) > 1 and (entry.abandoned or current > 1)",
        _MANY_DROPS,
    ),
    Mutant(
        "abandoned steps count as good ones",
        "log",
        "len(live) > 2 and (entry.abandoned or current > 2)",
        "len(live) > 2",
        _BRANCH_DROPS,
    ),
    Mutant(
        "parents not inherited",
        "log",
        "msgspec.structs.replace(e, parent=entry.parent) if e.parent == attempt else e",
        "e",
        _DROPS,
    ),
    Mutant(
        "parent is the newest step, not the nearest ancestor",
        "log",
        'parent = next((a for a in reversed(ancestry) if root.entry(a) is not None), "")',
        "parent = root.live[-1].attempt",
        _BRANCH,
    ),
    Mutant(
        "abandoned not recomputed",
        "log",
        "live=_mark_abandoned([*root.live, child], child.attempt)",
        "live=[*root.live, child]",
        _BRANCH,
    ),
    Mutant(
        "a dropped step not called retired",
        "log",
        "retired=[*root.retired, *gone])",
        "retired=[*root.retired])",
        _DROPS,
    ),
    Mutant(
        "a commit does not write down that it was the last",
        "log",
        "last=(child.attempt, root.last[1])",
        "last=root.last",
        _FORGOTTEN,
    ),
    Mutant(
        "a takeover forgets the last commit",
        "log",
        'last=("", root.last[0])',
        'last=("", "")',
        _FORGOTTEN,
    ),
    Mutant(
        "an older root taken where the newest vanished",
        "log",
        '            return "vanished"\n',
        "            continue\n",
        _READ,
        # Harmless alone: the second listing notices, and pruning leaves nothing older to take.
        also=(
            ("log", _LISTED_AGAIN, "if not again:"),
            ("collect", "for name in reversed(old):", "for name in old:"),
        ),
    ),
    Mutant(
        "no second listing",
        "log",
        _LISTED_AGAIN,
        "if not again:",
        _READ_SLOW,
    ),
    Mutant(
        "pruning counts names, not valid roots",
        "collect",
        "elif (yield from _is_valid(name, valid)):",
        "elif (yield from _is_valid(name, valid)) or True:",
        _TORN_PRUNE,
    ),
    Mutant(
        "pruning without a sync",
        "collect",
        "    if old:\n        yield SyncRoots()\n",
        "",
        _CUT_PRUNE,
    ),
    Mutant(
        "collecting without a sync of the root",
        "collect",
        "    yield SyncRoots()\n    names = yield from _list_attempts()\n",
        "    names = yield from _list_attempts()\n",
        _CUT_COLLECT,
    ),
    Mutant(
        "a removal forgotten before it is durable",
        "collect",
        "        yield SyncAttempts()\n",
        "        pass\n",
        _CUT_SWEEP,
    ),
    Mutant(
        "an undecided attempt collected",
        "collect",
        "parts[1] < root.epoch\n",
        "parts[1] <= root.epoch\n",
        _COLLECT,
    ),
    Mutant(
        "a live step collected",
        "collect",
        "if parts is None or root.entry(attempt) is not None:",
        "if parts is None:",
        Scenario("collecting, two jobs", (job("B"), collector(1))),
    ),
]
