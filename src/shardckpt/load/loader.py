"""The loader of one rank: structure first, agreement of all ranks, then bytes.

Layer: load. Order of one load, on every rank:

1. open the announced checkpoint, build targets, list every problem; plan the reads (coverage is
   proved);
2. all ranks agree that nobody found a problem: until here nothing has changed;
3. read, verify, place; all ranks agree again; then objects are handed over.

A failure in 3 leaves the state poisoned, unless `transactional` kept the bytes aside until all had
succeeded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from shardckpt.backend import Backend, SavedLeaf, SavedState, Targets
from shardckpt.coord.session import Failure, Round, RoundFailedError
from shardckpt.errors import DeadlineError, ShardckptError, error_named
from shardckpt.geometry.layout import BoxLayout, Layout
from shardckpt.load.cast import Temporary, allocate
from shardckpt.load.check import is_wanted, mismatches, raise_mismatch, target_names
from shardckpt.load.plan import LoadPlan, Wanted, plan_load
from shardckpt.load.read import run_load
from shardckpt.staging.collector import no_garbage_collection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardckpt.load.open import OpenCheckpoint
    from shardckpt.state import HostArray, Shard

_logger = logging.getLogger("shardckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load.

    Attributes:
        strict: Missing and unexpected keys are errors.
        only: Globs of target keys to load; empty means all.
        rename: Saved name to target name, one `*` allowed.
        cast: Convert to the target's dtype.
        transactional: Keep the bytes aside until every rank has all of them; costs the state's
            memory again.
    """

    strict: bool = True
    only: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    cast: bool = False
    transactional: bool = False


class Ok(msgspec.Struct, frozen=True):
    """A rank, or all of them, came through a phase."""


@dataclass(slots=True)
class LoadStats:
    """What a load cost this rank."""

    read_bytes: int = 0
    needed_bytes: int = 0


class PoisonError(Exception):
    """Internal: the load failed after the first change; carries the error."""

    def __init__(self, error: Exception) -> None:
        """Keep the error."""
        super().__init__(str(error))
        self.error = error


def load_state(
    backend: Backend, state: Any, checkpoint: OpenCheckpoint, round_: Round, options: LoadOptions
) -> LoadStats:
    """Fill `state` from an open checkpoint, on all ranks or none.

    Raises:
        StateMismatchError: It does not fit; nothing was changed.
        CorruptCheckpointError: Damaged, found before anything changed.
        PoisonError: Any failure after the first change.
    """
    try:
        with no_garbage_collection():
            saved, refused = saved_state(checkpoint, round_.rank, round_.world_size, options)
            targets = backend.targets(state, saved, only=options.only)
            step, url = checkpoint.manifest.step, checkpoint.storage.url
            raise_mismatch(
                step, url,
                mismatches(
                    saved, targets, strict=options.strict, cast=options.cast, only=options.only,
                    refused_per_rank=refused,
                ),
            )  # fmt: skip
            filling = _Filling(backend, targets, saved, checkpoint, options)
    except Exception as error:
        _agree(round_, "checked", error)
        raise
    _agree(round_, "checked", None)
    for key in saved.per_rank_dropped:
        if key in targets.per_rank_keys:
            _logger.warning("%s: saved by another world size; the target's own value is kept", key)
    try:
        with no_garbage_collection():
            filling.read(round_.rank)
    except Exception as error:
        _agree_poisoned(round_, "read", error, poisons=not options.transactional)
        raise
    _agree_poisoned(round_, "read", None, poisons=not options.transactional)
    try:
        filling.place()
        backend.finish(targets, saved)
    except Exception as error:
        _agree_poisoned(round_, "placed", error, poisons=True)
        raise
    _agree_poisoned(round_, "placed", None, poisons=True)
    return LoadStats(filling.plan.read_bytes, filling.plan.needed_bytes)


def saved_state(
    checkpoint: OpenCheckpoint, rank: int, world_size: int, options: LoadOptions
) -> tuple[SavedState, dict[str, str]]:
    """Return what the checkpoint holds under the target's names, and per-rank keys refused here.

    Raises:
        CorruptCheckpointError: A table is damaged.
        ValueError: `rename` does not make sense.
    """
    manifest = checkpoint.manifest
    names = target_names(
        [*manifest.keys, *manifest.objects, *manifest.per_rank, *manifest.aliases], options.rename
    )
    leaves: dict[str, SavedLeaf] = {}
    for key, tensor in checkpoint.tensors.items():
        leaves[names[key]] = SavedLeaf(tensor.spec, tensor.role, _is_sharded(tensor.layout))
    same_world = manifest.world_size == world_size
    per_rank: dict[str, object] = {}
    dropped: list[str] = []
    refused: dict[str, str] = {}
    for key, rule in manifest.per_rank.items():
        name = names[key]
        if not is_wanted(name, options.only):
            continue
        if same_world or rule == "rank0":
            per_rank[name] = _per_rank_value(checkpoint, rank if same_world else 0, key)
        elif rule == "drop":
            dropped.append(name)
        else:
            refused[name] = (
                f"belongs to one rank each of the {manifest.world_size} that saved, this job has "
                f"{world_size}, and "
                "its rule is 'error'. Wrap it as PerRank(..., rule='drop') or rule='rank0', or "
                "leave it out by only="
            )
    aliases = {
        names[key]: names[stored] for key, stored in manifest.aliases.items() if stored in names
    }
    objects = {names[k]: msgspec.json.decode(v) for k, v in manifest.objects.items()}
    return SavedState(leaves, objects, per_rank, aliases, tuple(dropped)), refused


def _is_sharded(layout: Layout) -> bool:
    return isinstance(layout, BoxLayout) or any(layout.cuts)


def _per_rank_value(checkpoint: OpenCheckpoint, rank: int, key: str) -> object:
    for file in checkpoint.files_of(rank):
        if key in file.table.per_rank:
            return msgspec.json.decode(file.table.per_rank[key])
    return None


class _Filling:
    """The targets of one load, the memory they are read into, and the plan."""

    def __init__(
        self,
        backend: Backend,
        targets: Targets,
        saved: SavedState,
        checkpoint: OpenCheckpoint,
        options: LoadOptions,
    ) -> None:
        self._backend = backend
        self._temporaries: list[Temporary] = []
        self._placed: list[tuple[Shard, HostArray]] = []
        stored = target_names(checkpoint.tensors, options.rename)
        by_name = {name: checkpoint.tensors[key] for key, name in stored.items()}
        wanted: list[Wanted] = []
        for key, leaf in targets.leaves.items():
            tensor = by_name.get(saved.aliases.get(key, key))
            if tensor is None or not is_wanted(key, options.only):
                continue
            for shard in leaf.shards:
                if shard.box.num_elements == 0:
                    continue
                host = backend.host_target(shard.data)
                self._placed.append((shard, host))
                aside = options.transactional or leaf.spec.dtype != tensor.spec.dtype
                if aside:
                    source = allocate(shard.box.shape, tensor.spec.dtype)
                    self._temporaries.append(
                        Temporary(source, tensor.spec.dtype, host, leaf.spec.dtype)
                    )
                    host = source
                wanted.append(Wanted(tensor, shard.box, host))
        self.plan: LoadPlan = plan_load(checkpoint, wanted)

    def read(self, rank: int) -> None:
        run_load(self.plan, first_file=rank)

    def place(self) -> None:
        for temporary in self._temporaries:
            temporary.finish()
        for shard, host in self._placed:
            self._backend.placed(shard.data, host)


def _agree(round_: Round, phase: str, error: Exception | None) -> None:
    """Learn that all ranks came through a phase, or raise the first failure; publishes this rank's.

    Raises:
        ShardckptError: Another rank failed.
        DeadlineError: Another rank did not come; names it.
    """
    if error is not None:
        round_.fail(error)
        return
    try:
        round_.publish(f"{phase}/{round_.rank}", Ok())
        if round_.rank == 0:
            round_.gather(
                phase,
                Ok,
                what=f"{phase} message",
                hint="Every rank must call restore(); look at that rank's log.",
            )
            round_.publish(phase, Ok())
        else:
            round_.wait(phase, Ok, what=f"all ranks to have {phase} the checkpoint", grace=1.1)
    except RoundFailedError as failed:
        raise _from_rank(failed.failure) from None
    except DeadlineError as late:
        if round_.rank == 0:
            # Only the coordinator knows who is missing; without this the others could not say it.
            round_.fail(late)
        raise


def _agree_poisoned(round_: Round, phase: str, error: Exception | None, *, poisons: bool) -> None:
    """As `_agree`; failures become PoisonError where the state was changed.

    Raises:
        PoisonError: The state holds half-loaded data.
        ShardckptError: A failure that changed nothing.
    """
    try:
        _agree(round_, phase, error)
    except ShardckptError as failed:
        if poisons:
            raise PoisonError(failed) from failed
        raise
    if error is not None and poisons:
        raise PoisonError(error) from error


def _from_rank(failure: Failure) -> ShardckptError:
    return error_named(failure.kind, f"rank {failure.rank}: {failure.message}")


def describe_differences(saved: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    """Return one line per fact of the environment that changed between save and restore."""
    return [
        f"{name}: {saved.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
