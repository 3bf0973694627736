"""The loader of one rank: structure first, agreement of all ranks, then bytes.

Layer: load. Order of one load, on every rank:

1. open the announced checkpoint, build targets, list every problem; plan the reads (coverage is
   proved);
2. all ranks agree that nobody found a problem, and learn what several of them want: that is read
   once and exchanged (`load.shared`); until here nothing has changed;
3. read, verify, place, hand objects over; all ranks agree again. Where nothing of the state has
   changed until all is read (it is not filled in place, or `transactional` keeps the bytes aside),
   they agree before they place, too.

A failure after the first change leaves the state poisoned.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from shardckpt.backend import Backend, SavedLeaf, SavedState, Targets
from shardckpt.coord.session import Failure, Round, RoundFailedError
from shardckpt.errors import DeadlineError, ShardckptError, error_named
from shardckpt.geometry.layout import BoxLayout, Layout
from shardckpt.load.between import CONNECT_SHARE
from shardckpt.load.cast import Temporary, allocate
from shardckpt.load.check import is_wanted, mismatches, raise_mismatch, target_names
from shardckpt.load.expand import Source, expand, filled
from shardckpt.load.mapped import applies, map_state
from shardckpt.load.plan import LoadPlan, Wanted, plan_load
from shardckpt.load.scalars import read_scalars
from shardckpt.load.shared import PeersFailedError
from shardckpt.load.together import (
    AllLinked,
    Meeting,
    Together,
    Visitors,
    all_linked,
    gathered,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from shardckpt.format.manifest import SavedTensor
    from shardckpt.geometry.box import Box
    from shardckpt.load.mapped import Mapped
    from shardckpt.load.maps import ModelMap
    from shardckpt.load.open import OpenCheckpoint
    from shardckpt.state import HostArray, Shard

M = TypeVar("M", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)
_GRACE: Final = 1.1
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
        model_map: How to read a checkpoint of the other framework; unused for one of the own.
    """

    strict: bool = True
    only: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    cast: bool = False
    transactional: bool = False
    model_map: ModelMap | None = None


def load_options(
    *,
    strict: bool,
    only: Sequence[str],
    rename: Mapping[str, str] | None,
    cast: bool,
    transactional: bool = False,
    model_map: ModelMap | None = None,
) -> LoadOptions:
    """Return the options as a user gives them.

    Raises:
        TypeError: `only` is one string, which would be taken for a list of letters.
    """
    if isinstance(only, str):
        raise TypeError(f"only={only!r}: pass a list of globs")
    return LoadOptions(
        strict=strict,
        only=tuple(only),
        rename=dict(rename or {}),
        cast=cast,
        transactional=transactional,
        model_map=model_map,
    )


class Ok(msgspec.Struct, frozen=True):
    """A rank, or all of them, came through a phase."""


class Placed(msgspec.Struct, frozen=True):
    """A rank, or all of them together, filled the state with so many bytes of storage."""

    read_bytes: int


@dataclass(slots=True)
class LoadStats:
    """What a load cost.

    Attributes:
        read_bytes: Bytes this rank read from storage.
        needed_bytes: Bytes this rank needed.
        job_read_bytes: Bytes all ranks read from storage.
    """

    read_bytes: int = 0
    needed_bytes: int = 0
    job_read_bytes: int = 0


class PoisonError(Exception):
    """Internal: the load failed after the first change; carries the error."""

    def __init__(self, error: Exception) -> None:
        """Keep the error."""
        super().__init__(str(error))
        self.error = error


def load_state(
    backend: Backend,
    state: Any,
    checkpoint: OpenCheckpoint,
    round_: Round,
    options: LoadOptions,
    together: Together,
) -> tuple[Any, LoadStats]:
    """Fill `state` from an open checkpoint, on all ranks or none; return it, or what replaces it.

    Raises:
        StateMismatchError: It does not fit; nothing was changed.
        CorruptCheckpointError: Damaged, found before anything changed.
        PoisonError: Any failure after the first change.
    """
    try:
        saved, refused = saved_state(checkpoint, round_.rank, round_.world_size, options)
        mapped = _mapped(backend, state, saved, checkpoint, options)
        if mapped is not None:
            saved, refused = mapped.saved, {}
        targets = backend.targets(state, saved, only=options.only)
        if mapped is not None:
            targets = mapped.wanted(targets)
        step, url = checkpoint.manifest.step, checkpoint.storage.url
        raise_mismatch(
            step, url,
            mismatches(
                saved, targets, strict=options.strict, cast=options.cast, only=options.only,
                refused_per_rank=refused, mapped=mapped,
            ),
        )  # fmt: skip
        filling = _Filling(backend, targets, saved, checkpoint, options, mapped)
        meeting = Meeting(filling.plan, round_.rank, together)
    except Exception as error:
        fail_load(round_, error, "checked")
        raise
    try:
        _meet(meeting, round_)
        if mapped is not None and round_.rank == 0:
            for remark in mapped.remarks:
                _logger.warning("step %d, read through a model map: %s", step, remark)
        for key in saved.per_rank_dropped:
            if key in targets.per_rank_keys:
                _logger.warning(
                    "%s: saved by another world size; the target's own value is kept", key
                )
        in_place = backend.fills_in_place and not options.transactional
        with _poisoning(poisons=in_place):
            read_bytes = _read(meeting, round_)
            if not in_place:
                _agree(round_, "read", Ok(), _all_ok, Ok)
        with _poisoning(poisons=True):
            try:
                filling.place()
                restored = backend.finish(targets, saved)
            except Exception as error:
                fail_load(round_, error, "placed")
                raise
            told = _agree(round_, "placed", Placed(read_bytes), _summed, Placed)
    finally:
        # Not before all have read: what this rank has sent to another host may be on its way.
        meeting.close()
    return restored, LoadStats(read_bytes, filling.plan.needed_bytes, told.read_bytes)


def fail_load(round_: Round, error: Exception, *phases: str) -> None:
    """Tell all ranks, which will not come through these phases."""
    round_.fail(error, *phases, gathered=phases)


def _meet(meeting: Meeting, round_: Round) -> None:
    """Agree that nobody found a problem, and on what one rank reads for several.

    Raises:
        ShardckptError: Another rank found one.
    """
    if round_.world_size == 1:
        return
    if meeting.meet(_agree(round_, "checked", meeting.visitor(), gathered, Visitors)):
        grace = _GRACE + CONNECT_SHARE  # The coordinator may begin to gather that much later.
        meeting.settle(
            _agree(round_, "prepared", meeting.link(), all_linked, AllLinked, grace=grace)
        )


def _read(meeting: Meeting, round_: Round) -> int:
    """Fill the targets and return the bytes that this rank read from storage.

    Raises:
        ShardckptError: A read failed here or elsewhere.
    """
    try:
        return meeting.run(round_)
    except PeersFailedError:
        failure = round_.wait(
            "error", Failure, what="the error of the rank that failed", heed_errors=False
        )
        fail_load(round_, RoundFailedError(failure), "read", "placed")
        raise _from_rank(failure) from None
    except Exception as error:
        fail_load(round_, error, "read", "placed")
        raise


def _all_ok(told: list[Ok]) -> Ok:
    return told[0]


def _summed(told: list[Placed]) -> Placed:
    return Placed(sum(message.read_bytes for message in told))


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


def _mapped(
    backend: Backend,
    state: Any,
    saved: SavedState,
    checkpoint: OpenCheckpoint,
    options: LoadOptions,
) -> Mapped | None:
    """Return the saved state in the other framework's terms, where there is a map and a need."""
    saved_by = checkpoint.manifest.framework
    if options.model_map is None or not applies(saved_by, backend.name):
        return None
    stored = target_names(checkpoint.tensors, options.rename)
    return map_state(
        options.model_map, saved_by,
        {name: checkpoint.tensors[key] for key, name in stored.items()}, saved,
        backend.targets(state, SavedState({}, {}, {}, {}), only=options.only),
        lambda tensors: read_scalars(checkpoint, tensors),
        strict=options.strict, only=options.only,
    )  # fmt: skip


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
        mapped: Mapped | None,
    ) -> None:
        self._backend = backend
        self._temporaries: list[Temporary] = []
        self._placed: list[tuple[Shard, HostArray]] = []
        stored = target_names(checkpoint.tensors, options.rename)
        by_name = {name: checkpoint.tensors[key] for key, name in stored.items()}
        wanted: list[Wanted] = []
        for key, leaf in targets.leaves.items():
            if options.only and not is_wanted(key, options.only):
                continue
            name = saved.aliases.get(key, key)
            fill = None if mapped is None else mapped.fills.get(key)
            source = by_name.get(name) if mapped is None else mapped.sources.get(name)
            if source is None and fill is None:
                continue
            for shard in leaf.shards:
                if shard.box.num_elements == 0:
                    continue
                host = backend.host_target(shard.data)
                self._placed.append((shard, host))
                if source is None:
                    self._temporaries.append(filled(fill or 0, host, leaf.spec.dtype))
                else:
                    aside = options.transactional or leaf.spec.dtype != source.spec.dtype
                    wanted += self._wanted(source, shard.box, host, leaf.spec.dtype, aside=aside)
        self.plan: LoadPlan = plan_load(checkpoint, wanted)

    def _wanted(
        self, source: SavedTensor | Source, box: Box, host: HostArray, dtype: str, *, aside: bool
    ) -> list[Wanted]:
        """Return what fills a target, by way of a buffer where it is not filled in place."""
        memory = allocate(box.shape, source.spec.dtype) if aside else host
        if isinstance(source, Source):
            wanted, copies = expand(source, box, memory)
            self._temporaries += copies
        else:
            wanted = [Wanted(source, box, memory)]
        if aside:
            self._temporaries.append(Temporary(memory, source.spec.dtype, host, dtype))
        return wanted

    def place(self) -> None:
        for temporary in self._temporaries:
            temporary.finish()
        for shard, host in self._placed:
            self._backend.placed(shard.data, host)


def _agree(
    round_: Round,
    phase: str,
    mine: M,
    merge: Callable[[list[M]], R],
    kind: type[R],
    *,
    grace: float = _GRACE,
) -> R:
    """Learn that all ranks came through a phase.

    Args:
        round_: The round of this load.
        phase: What they came through.
        mine: What this rank tells.
        merge: What the coordinator makes of what all ranks told; every rank learns it.
        kind: Type of that.
        grace: Factor on the deadline of those who wait for the coordinator.

    Raises:
        ShardckptError: Another rank failed.
        DeadlineError: Another rank did not come; names it.
    """
    try:
        round_.publish(f"{phase}/{round_.rank}", mine)
        if round_.rank != 0:
            what = f"all ranks to have {phase} the checkpoint"
            return round_.wait(phase, kind, what=what, grace=grace)
        told = round_.gather(
            phase,
            type(mine),
            what=f"{phase} message",
            hint="Every rank must call restore(); look at that rank's log.",
        )
        merged = merge(told)
        round_.publish(phase, merged)
    except RoundFailedError as failed:
        fail_load(round_, failed, phase)
        raise _from_rank(failed.failure) from None
    except DeadlineError as late:
        if round_.rank == 0:
            # Only the coordinator knows who is missing; without this the others could not say it.
            fail_load(round_, late, phase)
        raise
    return merged


@contextmanager
def _poisoning(*, poisons: bool) -> Iterator[None]:
    """Make failures of the block PoisonError where it changes the state.

    Raises:
        PoisonError: The state holds half-loaded data.
    """
    try:
        yield
    except Exception as error:
        if poisons:
            raise PoisonError(error) from error
        raise


def _from_rank(failure: Failure) -> ShardckptError:
    return error_named(failure.kind, f"rank {failure.rank}: {failure.message}")


def describe_differences(saved: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    """Return one line per fact of the environment that changed between save and restore."""
    return [
        f"{name}: {saved.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
