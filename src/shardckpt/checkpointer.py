"""The one place that knows the order of both pipelines: open, restore, save, close.

Layer: above save, load, catalog and retention; below the framework fronts, which add nothing but
types.

Opening: the coordinator takes the store's next epoch, then announces it. Restoring: the coordinator
chooses an entry, leases it, reads the log again, announces {attempt, manifest digest, step}; every
rank opens exactly that; the lease ends when all have read. Saving: see `save.saver`.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import msgspec

from shardckpt.catalog.log import Writer
from shardckpt.catalog.store import Catalog, Lease
from shardckpt.coord.session import Round, RoundFailedError
from shardckpt.errors import (
    CorruptCheckpointError,
    PoisonedStateError,
    ShardckptError,
    StepNotFoundError,
    error_named,
)
from shardckpt.format.tagged import decode, encode
from shardckpt.load.choose import Chosen, Renewing, agree_on_step
from shardckpt.load.loader import (
    LoadOptions,
    LoadStats,
    PoisonError,
    describe_differences,
    fail_load,
    load_state,
)
from shardckpt.load.open import OpenCheckpoint
from shardckpt.load.together import Together
from shardckpt.policy import LEARNED
from shardckpt.provenance import writer_name
from shardckpt.retention import to_drop
from shardckpt.save.commit import Described
from shardckpt.save.saver import OnBusy, Saver
from shardckpt.schedule import Schedule
from shardckpt.staging.collector import no_garbage_collection
from shardckpt.staging.engine import EVERY_GROUP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardckpt.backend import Backend
    from shardckpt.coord.base import Coord
    from shardckpt.format.root import Entry
    from shardckpt.load.between import Exchange
    from shardckpt.options import Auto, Every, Retention, Staging
    from shardckpt.save.handle import SaveHandle
    from shardckpt.storage.base import Storage

DEFAULT_TIMEOUT_S: Final = 600.0
_EXIT_AFTER_ERROR_S: Final = 30.0
_GRACE: Final = 1.1
_logger = logging.getLogger("shardckpt")
_opened = itertools.count()
_opened_on: WeakKeyDictionary[Coord, itertools.count[int]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore gave.

    Attributes:
        step: The step restored.
        state: The state: the very one that was passed, filled in place, in torch; a new one in JAX.
        world_size: Ranks that had saved it.
        metrics: Figures saved with it.
        config: The training configuration saved with it.
        differences: One line per fact of the environment or configuration that differs now.
        stats: Bytes read and needed by this rank.
    """

    step: int
    state: Any
    world_size: int
    metrics: Mapping[str, float]
    config: Any
    differences: tuple[str, ...]
    stats: LoadStats


class _Opened(msgspec.Struct, frozen=True):
    epoch: int
    owner: str
    name: str
    store_id: str


class CheckpointerCore:
    """Saves to and restores from one store, for the ranks of one job.

    One thread per rank calls it. Every method marked "all ranks" must be called by all of them in
    the same order.
    """

    def __init__(
        self,
        storage: Storage,
        backend: Backend,
        coord: Coord,
        *,
        save_every: Every | Auto | None,
        retention: Retention,
        config: Any,
        timeout_s: float,
        on_busy: OnBusy,
        staging: Staging,
        environment: Mapping[str, str],
        namespace: str,
        exchange: Exchange | None = None,
    ) -> None:
        """Take the store's epoch; all ranks. A job that was writing here is fenced from now on.

        Args:
            storage: The store.
            backend: The framework.
            coord: The job's key-value store; closed with the checkpointer.
            save_every: When `should_save` says yes.
            retention: Which steps stay.
            config: Plain values saved beside the state.
            timeout_s: Deadline of every wait.
            on_busy: What a save does that finds no room.
            staging: How saves are copied and written.
            environment: Versions and the like, saved beside the state.
            namespace: Prefix of this job's keys, equal on all ranks, never used before.
            exchange: How ranks of different hosts exchange what one of them read.

        Raises:
            StorageError: The store cannot be made or written.
            FencedError: Another job took over at the same moment.
            FormatError: The store is of another version.
        """
        self._storage = storage
        self._backend = backend
        self._coord = coord
        self._timeout_s = timeout_s
        self._exchange = exchange
        self._environment = dict(environment)
        self._config = encode(config, "config")
        self._poison: str | None = None
        self._restores = 0
        self._before: Round | None = None
        self._catalog = Catalog(storage, writer=writer_name())
        self._namespace = namespace
        opened = self._open()
        self._writer = Writer(opened.epoch, opened.owner, opened.name)
        prefix = f"{namespace}/{opened.owner[:16]}"
        self._prefix = prefix
        described = Described(
            backend.name,
            opened.store_id,
            msgspec.Raw(msgspec.json.encode(self._config)),
            self._environment,
        )
        self._saver: Saver | None = Saver(
            backend, self._catalog, self._writer, coord, described,
            prefix=prefix, timeout_s=timeout_s, on_busy=on_busy, staging=staging,
            to_drop=lambda root: to_drop(root, retention),
        )  # fmt: skip
        self._schedule = Schedule(save_every, coord, prefix=prefix, timeout_s=timeout_s)
        self._unrestored = self._unrestored_steps() if coord.rank == 0 else []

    def should_save(self, step: int) -> bool:
        """Return whether to save at this step; the same on all ranks."""
        return self._schedule.should_save(step)

    def save(
        self, step: int, state: Any, *, metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Stage the state and return; the rest happens in the background. All ranks.

        Args:
            step: Training step; saving a step again replaces it once the new one is committed.
            state: What to save.
            metrics: Figures for keep-best, from the coordinator.

        Raises:
            ValueError: A negative step or a metric that is no number.
            PoisonedStateError: The last restore failed half-way.
            ShardckptError: An earlier save failed.
        """
        saver = self._open_saver()
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}; use an int from 0")
        figures = {str(k): float(v) for k, v in (metrics or {}).items()}
        if self._poison is not None:
            raise PoisonedStateError(
                f"step {step} is not saved: the last restore failed half-way ({self._poison}), "
                "so the state is a "
                "mixture. Restore again, or start from fresh objects."
            )
        if self._unrestored:
            _logger.warning(
                "%s holds steps %s, and none was restored: this save starts a new branch, and "
                "retention will drop them. Call restore() first to go on from them.",
                self._storage.url,
                self._unrestored[-8:],
            )
            self._unrestored = []
        self._schedule.saving()
        handle = saver.save(step, state, figures, self._schedule.learned)
        self._schedule.began(handle)
        return handle

    def restore(
        self, state: Any, *, step: int | None = None, options: LoadOptions, fallback: bool
    ) -> Restored | None:
        """Fill `state` from a step; all ranks. None where nothing was ever committed.

        Args:
            state: What to fill.
            step: A committed step; another than the newest starts a branch.
            options: How to load.
            fallback: Where the newest is damaged, take the one before instead of raising.

        Raises:
            StepNotFoundError: That step, or any step of a branch that had some, is not there.
            StateMismatchError: It does not fit; nothing was changed.
            CorruptCheckpointError: It is damaged; names the newest other step.
        """
        saver = self._open_saver()
        saver.finish_all()
        skip: list[str] = []
        while True:
            round_ = self._round("restore", self._restores)
            self._restores += 1
            try:
                chosen, lease = agree_on_step(round_, self._catalog, step, skip, call="restore()")
                if chosen.is_empty:
                    return None
                restored = self._load(round_, chosen, lease, state, options)
            except CorruptCheckpointError as error:
                # A strict load fills the same keys again, so nothing half-loaded outlives it.
                mixes = self._poison is not None and not options.strict
                if step is not None or not fallback or mixes:
                    raise self._with_alternative(error, skip) from error
                _logger.warning("falling back to an older step: %s", error)
                skip.append(chosen.attempt)
                continue
            self._forget_before(round_)
            saver.ancestry[:] = chosen.ancestry
            self._unrestored = []
            return restored

    def steps(self) -> list[int]:
        """Return the committed steps of the current branch, oldest first."""
        return [e.step for e in self._catalog.newest().current]

    def latest(self) -> int | None:
        """Return the newest committed step of the current branch."""
        entry = self._catalog.newest().latest
        return None if entry is None else entry.step

    def pin(self, step: int, *, pinned: bool = True) -> None:
        """Keep a step out of retention, or give it back.

        Raises:
            StepNotFoundError: It is not committed.
        """
        self._catalog.pin(self._catalog.find(self._catalog.newest(), step).attempt, pinned=pinned)

    @property
    def is_staging(self) -> bool:
        """Whether arrays of some save are still to be copied."""
        return self._saver is not None and self._saver.is_staging

    def fence(self, group: int | None = None) -> None:
        """Return once arrays of a fence group (None: any) may be changed; never raises."""
        if self._saver is not None and self._saver.is_staging:
            self._saver.fence(EVERY_GROUP if group is None else group)

    def step_began(self) -> None:
        """Take note that a training step begins; the pace of writing follows the steps' times."""
        if self._saver is not None:
            self._saver.step_began()

    def wait(self) -> None:
        """Wait for the save under way and raise its failure, alike on all ranks.

        Raises:
            ShardckptError: It failed.
        """
        self._open_saver().finish_all()

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the save under way, raise its failure, release everything. All ranks.

        Raises:
            ShardckptError: The last save failed.
        """
        saver, self._saver = self._saver, None
        if saver is None:
            return
        try:
            saver.close(timeout_s)
        finally:
            self._coord.close()

    def leave(self, error: BaseException | None) -> None:
        """Close at the end of a `with` block; after an error a failure is only logged."""
        if error is None:
            self.close()
            return
        try:
            self.close(min(_EXIT_AFTER_ERROR_S, self._timeout_s))
        except ShardckptError as failure:
            _logger.error(  # noqa: TRY400 - the block's own error carries the traceback.
                "while leaving after %s: %s", type(error).__name__, failure
            )

    def _unrestored_steps(self) -> list[int]:
        return [entry.step for entry in self._catalog.newest().current]

    def _open_saver(self) -> Saver:
        if self._saver is None:
            raise ValueError("this checkpointer is closed")
        return self._saver

    def _round(self, kind: str, number: int) -> Round:
        return Round(
            self._coord, f"{self._prefix}/{kind}/{number}", f"{kind} {number}", self._timeout_s
        )

    def _forget_before(self, round_: Round) -> None:
        # All ranks came through this round, so nobody reads the one before any more.
        if self._before is not None:
            self._before.forget()
        self._before = round_

    def _open(self) -> _Opened:
        round_ = Round(
            self._coord, f"{self._namespace}/open", f"opening {self._storage.url}", self._timeout_s
        )
        try:
            if self._coord.rank != 0:
                return round_.wait("opened", _Opened, what="the coordinator (rank 0)", grace=_GRACE)
            root = self._catalog.create()
            writer, root = self._catalog.take_over()
            opened = _Opened(writer.epoch, writer.owner, writer.name, root.store_id)
            round_.publish("opened", opened)
        except RoundFailedError as failed:
            raise error_named(failed.failure.kind, f"rank 0: {failed.failure.message}") from None
        except Exception as error:
            round_.fail(error, "opened")
            raise
        return opened

    def _load(
        self, round_: Round, chosen: Chosen, lease: Lease | None, state: Any, options: LoadOptions
    ) -> Restored:
        started = time.monotonic()
        try:
            checkpoint, filled, stats = _read(
                self._backend, self._storage, state, chosen, lease, round_, options,
                Together(self._exchange),
            )  # fmt: skip
        except PoisonError as failed:
            self._poison = str(failed.error)
            raise failed.error from None
        self._poison = None
        entry = self._entry(chosen.attempt)
        restored = restored_from(checkpoint, entry, filled, stats, self._environment, self._config)
        self._schedule.recall(checkpoint.manifest.environment)
        if self._coord.rank == 0:
            _logger.info(
                "step %d: restored in %.2f s, saved on %d ranks, now %d",
                chosen.step, time.monotonic() - started, restored.world_size,
                self._coord.world_size,
            )  # fmt: skip
            for line in restored.differences:
                _logger.info("since step %d was saved, %s", chosen.step, line)
        return restored

    def _entry(self, attempt: str) -> Entry | None:
        return self._catalog.newest().entry(attempt)

    def _with_alternative(
        self, error: CorruptCheckpointError, skip: list[str]
    ) -> CorruptCheckpointError:
        try:
            others = [
                e.step for e in reversed(self._catalog.newest().current) if e.attempt not in skip
            ][1:]
        except ShardckptError:
            others = []
        hint = (
            f" The newest other step is {others[0]}: restore(step={others[0]}), or fallback=True "
            "to take it."
            if others
            else " There is no other step."
        )
        return CorruptCheckpointError(str(error) + hint)


def next_namespace(coord: Coord | None) -> str:
    """Return the next prefix of keys of a job: counted on its own coord, or on the framework's.

    Alike on all ranks, because they open and load in the same order.
    """
    counter = _opened if coord is None else _opened_on.setdefault(coord, itertools.count())
    return f"shardckpt/{next(counter)}"


def restored_from(
    checkpoint: OpenCheckpoint,
    entry: Entry | None,
    state: Any,
    stats: LoadStats,
    environment: Mapping[str, str],
    config: object,
) -> Restored:
    """Return the report of a restore."""
    manifest = checkpoint.manifest
    saved_config = msgspec.json.decode(manifest.config)
    saved = {k: v for k, v in manifest.environment.items() if k not in LEARNED}
    differences = list(describe_differences(saved, environment))
    if isinstance(saved_config, dict) and isinstance(config, dict):
        before = {f"config {k}": repr(v) for k, v in saved_config.items()}
        now = {f"config {k}": repr(v) for k, v in config.items()}
        differences += describe_differences(before, now)
    metrics = {} if entry is None else entry.metrics
    return Restored(
        manifest.step,
        state,
        manifest.world_size,
        metrics,
        decode(saved_config),
        tuple(differences),
        stats,
    )


def load_once(
    storage: Storage,
    backend: Backend,
    coord: Coord,
    state: Any,
    *,
    step: int | None,
    options: LoadOptions,
    timeout_s: float,
    namespace: str,
    environment: Mapping[str, str],
    together: Together | None = None,
) -> Restored:
    """Load without becoming a writer: fences nobody, takes no epoch. All ranks.

    Raises:
        StoreNotFoundError: There is no store.
        StepNotFoundError: There is no such step.
        StateMismatchError: It does not fit; nothing was changed.
        CorruptCheckpointError: It is damaged.
    """
    catalog = Catalog(storage, writer=writer_name())
    round_ = Round(coord, namespace, f"loading {storage.url}", timeout_s)
    chosen, lease = agree_on_step(round_, catalog, step, [], call="load()")
    if chosen.is_empty:
        raise StepNotFoundError(f"{storage.url}: nothing is committed yet")
    try:
        checkpoint, filled, stats = _read(
            backend, storage, state, chosen, lease, round_, options, together or Together()
        )
    except PoisonError as failed:
        raise failed.error from None
    entry = catalog.newest().entry(chosen.attempt)
    return restored_from(checkpoint, entry, filled, stats, environment, None)


def _read(
    backend: Backend,
    storage: Storage,
    state: Any,
    chosen: Chosen,
    lease: Lease | None,
    round_: Round,
    options: LoadOptions,
    together: Together,
) -> tuple[OpenCheckpoint, Any, LoadStats]:
    """Open what was chosen and fill the state under its lease; the files are closed on return."""
    with Renewing(lease), no_garbage_collection():
        try:
            checkpoint = OpenCheckpoint(storage, chosen.attempt, chosen.manifest)
        except Exception as error:
            fail_load(round_, error, "checked")
            raise
        try:
            loaded = load_state(backend, state, checkpoint, round_, options, together)
            return checkpoint, *loaded
        finally:
            checkpoint.close()
