"""The catalog of one store: who may write, what is committed, and what may be deleted."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec
import pytest

from shardckpt.catalog.collect import KEPT_ROOTS
from shardckpt.catalog.store import LEASE_TTL_S, Catalog
from shardckpt.errors import (
    CorruptCheckpointError,
    FencedError,
    FormatError,
    ShardckptError,
    StepNotFoundError,
    StorageError,
    StoreNotFoundError,
)
from shardckpt.format.root import Entry, Root, encode_root, encode_store, root_name
from shardckpt.format.sealed import seal
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardckpt.catalog import log
    from shardckpt.storage.base import Reader, Storage, Writer


class Clock:
    """A monotonic clock that moves when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Watched:
    """A storage that counts calls, and calls a hook before each of them."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[..., None] = lambda call, key: None

    @property
    def url(self) -> str:
        return self.inner.url

    def prepare(self) -> None:
        self.inner.prepare()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._note("put", key)
        return self.inner.put_if_absent(key, data)

    def get(self, key: str, max_bytes: int) -> bytes:
        self._note("get", key)
        return self.inner.get(key, max_bytes)

    def list(self, prefix: str) -> Sequence[str]:
        self._note("list", prefix)
        return self.inner.list(prefix)

    def sync(self, prefix: str) -> None:
        self._note("sync", prefix)
        self.inner.sync(prefix)

    def delete(self, key: str) -> None:
        self._note("delete", key)
        self.inner.delete(key)

    def delete_tree(self, prefix: str) -> None:
        self._note("delete_tree", prefix)
        self.inner.delete_tree(prefix)

    def create(self, key: str, nbytes: int) -> Writer:
        raise NotImplementedError("the catalog writes no large objects")

    def open(self, key: str) -> Reader:
        raise NotImplementedError("the catalog reads no large objects")

    def _note(self, call: str, key: str) -> None:
        self.calls.append((call, key))
        self.before(call, key)


@pytest.fixture(params=["memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Return an empty place of every kind."""
    return MemoryStorage() if request.param == "memory" else LocalStorage(tmp_path / "store")


class Job:
    """One job: a catalog, its epoch, and what it has committed."""

    def __init__(self, storage: Storage, name: str = "job", clock: Clock | None = None) -> None:
        self.catalog = Catalog(storage, writer=name, monotonic=clock or Clock())
        self.catalog.create()
        self.writer, root = self.catalog.take_over()
        self.line = [] if root.latest is None else [e.attempt for e in root.current]

    def attempt(self, step: int) -> str:
        """Write the files of an attempt."""
        attempt = self.catalog.new_attempt(self.writer, step)
        self.catalog.storage.put_if_absent(f"{attempt}/MANIFEST.json", b"{}")
        return attempt

    def propose(
        self, attempt: str, metrics: dict[str, float] | None = None, keep: int = 99
    ) -> tuple[log.Verdict, Root]:
        """Propose an attempt, keeping the newest `keep` steps."""
        entry = Entry(
            step=int(attempt[5:17]),
            attempt=attempt,
            parent="",
            manifest="",
            metrics=metrics or {},
            pinned=False,
            abandoned=False,
            world_size=1,
            nbytes=1,
            saved_unix_s=0.0,
        )
        return self.catalog.commit(
            self.writer, entry, self.line, lambda root: [e.attempt for e in root.current[:-keep]]
        )

    def save(self, step: int, metrics: dict[str, float] | None = None, keep: int = 99) -> str:
        """Save a step and return its attempt."""
        attempt = self.attempt(step)
        verdict, _ = self.propose(attempt, metrics, keep)
        assert verdict == "committed"
        self.line.append(attempt)
        return attempt


def steps(root: Root) -> list[int]:
    """Return the steps of the current branch."""
    return [e.step for e in root.current]


def directories(storage: Storage) -> set[str]:
    """Return the attempt directories that are there."""
    return {name for name in storage.list("") if name.startswith("step-")}


# -- making and finding a store --


def test_a_store_is_made_once_and_found_again(storage: Storage) -> None:
    with pytest.raises(StoreNotFoundError, match="Check the path"):
        Catalog(storage, writer="reader").newest()
    first = Catalog(storage, writer="one").create()
    assert Catalog(storage, writer="two").create() == first
    assert Catalog(storage, writer="reader").newest() == first
    assert (first.seq, first.epoch, first.owner, first.latest) == (0, 0, "", None)


def test_two_creators_at_any_point_of_each_other_make_one_store() -> None:
    for point in itertools.count():
        storage = Watched(MemoryStorage())
        made: list[Root] = []

        def race(
            call: str,
            key: str,
            storage: Watched = storage,
            point: int = point,
            made: list[Root] = made,
        ) -> None:
            if len(storage.calls) == point + 1 and not made:
                made.append(Catalog(storage.inner, writer="other").create())

        storage.before = race
        mine = Catalog(storage, writer="mine").create()
        if not made:
            assert point > 8
            break
        assert mine == made[0]
        assert storage.list("roots") == [root_name(0)]


def test_a_creator_that_died_at_any_point_is_finished_by_the_next_one() -> None:
    class Died(BaseException):
        pass

    for point in itertools.count():
        storage = Watched(MemoryStorage())

        def die(call: str, key: str, storage: Watched = storage, point: int = point) -> None:
            if len(storage.calls) == point + 1:
                raise Died

        storage.before = die
        try:
            Catalog(storage, writer="dies").create()
        except Died:
            job = Job(storage.inner)
            job.save(1)
            assert steps(job.catalog.newest()) == [1]
        else:
            assert point > 8
            break


def test_store_is_durable_before_the_first_root_and_both_before_create_returns() -> None:
    storage = Watched(MemoryStorage())
    Catalog(storage, writer="job").create()
    puts_and_syncs = [c for c in storage.calls if c[0] in ("put", "sync")]
    assert puts_and_syncs == [
        ("put", "STORE"),
        ("sync", ""),
        ("put", f"roots/{root_name(0)}"),
        ("sync", "roots"),
        ("sync", ""),
    ]


def test_a_lost_reply_to_the_put_of_store_is_read_back() -> None:
    storage = Watched(MemoryStorage())

    def lose(call: str, key: str) -> None:
        if (call, key) == ("put", "STORE"):
            storage.inner.put_if_absent(key, encode_store("a" * 32))
            raise StorageError("the reply was lost")

    storage.before = lose
    assert Catalog(storage, writer="job").create().store_id == "a" * 32


def test_a_place_that_cannot_be_written_is_an_error_that_names_the_cause() -> None:
    storage = Watched(MemoryStorage())

    def refuse(call: str, key: str) -> None:
        if call == "put":
            raise StorageError(f"cannot put {key}: no space left")

    storage.before = refuse
    with pytest.raises(StorageError, match="no space left"):
        Catalog(storage, writer="job").create()


def test_a_store_of_another_version_is_refused(storage: Storage) -> None:
    storage.prepare()
    storage.put_if_absent("STORE", seal({"format": 2, "features": [], "store_id": "a"}))
    for call in (Catalog.create, Catalog.newest):
        with pytest.raises(FormatError, match="newer shardckpt"):
            call(Catalog(storage, writer="job"))
    assert storage.list("roots") == []


def test_roots_of_another_store_are_refused_and_nothing_is_deleted(storage: Storage) -> None:
    job = Job(storage)
    job.attempt(1)
    other = Job(storage)
    before = directories(storage)
    storage.delete("STORE")
    with pytest.raises(CorruptCheckpointError, match="STORE is missing, but roots/ holds 3"):
        other.catalog.create()
    storage.put_if_absent("STORE", encode_store("f" * 32))
    for call in (other.catalog.newest, other.catalog.create, other.catalog.sweep):
        with pytest.raises(CorruptCheckpointError, match="Two stores were copied"):
            call()
    assert directories(storage) == before


def test_a_torn_newest_root_is_passed_over_and_its_number_is_not_used(storage: Storage) -> None:
    job = Job(storage)
    attempt = job.save(1)
    newest = job.catalog.newest()
    good = encode_root(newest)
    storage.put_if_absent(f"roots/{root_name(newest.seq + 1)}", good[: len(good) // 2])
    storage.put_if_absent("roots/leftover", b"")
    assert job.catalog.newest() == newest
    job.save(2)
    assert job.catalog.newest().seq == newest.seq + 2
    assert job.catalog.newest().live[1].parent == attempt


def test_a_log_without_one_valid_root_says_so(storage: Storage) -> None:
    storage.prepare()
    storage.put_if_absent("STORE", encode_store("a" * 32))
    storage.put_if_absent(f"roots/{root_name(0)}", b"torn")
    with pytest.raises(CorruptCheckpointError, match="none of the 1 roots"):
        Catalog(storage, writer="job").newest()


# -- epochs --


def test_a_zombie_is_fenced_and_changes_nothing(storage: Storage) -> None:
    zombie = Job(storage, "zombie")
    kept = zombie.save(1)
    late = zombie.attempt(2)
    owner = Job(storage, "owner")
    assert owner.writer.epoch == zombie.writer.epoch + 1
    verdict, root = zombie.propose(late)
    assert verdict == "fenced"
    assert (root.writer, root.owner) == ("owner", owner.writer.owner)
    assert zombie.catalog.abort(zombie.writer, late)[0] == "fenced"
    assert steps(owner.catalog.newest()) == [1]
    assert zombie.catalog.abort(zombie.writer, kept)[0] == "committed"
    owner.save(3)
    assert [e.parent for e in owner.catalog.newest().live] == ["", kept]


def test_two_takeovers_later_an_undecided_outcome_is_unknown(storage: Storage) -> None:
    first = Job(storage)
    late = first.attempt(1)
    Job(storage)
    Job(storage)
    assert first.propose(late)[0] == "unknown"


def test_an_opener_overtaken_after_its_put_raises_and_names_the_other(storage: Storage) -> None:
    watched = Watched(storage)
    loser = Catalog(watched, writer="loser")
    loser.create()
    puts = [0]

    def overtake(call: str, key: str) -> None:
        # The listing that follows the takeover's put.
        if puts[0] == 1 and call == "list":
            puts[0] = 2
            Catalog(storage, writer="winner").take_over()
        if call == "put" and key.startswith("roots/"):
            puts[0] += puts[0] == 0

    watched.before = overtake
    with pytest.raises(FencedError, match=r"winner took over \(epoch 2\)"):
        loser.take_over()


def test_an_aborted_attempt_never_commits_and_a_committed_one_never_aborts(
    storage: Storage,
) -> None:
    job, rank = Job(storage), Catalog(storage, writer="rank")
    given_up, kept = job.attempt(1), job.attempt(2)
    assert rank.abort(job.writer, given_up)[0] == "aborted"
    assert job.propose(given_up)[0] == "aborted"
    assert job.propose(kept)[0] == "committed"
    assert rank.abort(job.writer, kept)[0] == "committed"
    assert steps(job.catalog.newest()) == [2]


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
def test_a_put_whose_reply_is_lost_is_decided_by_the_log(done: bool) -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    attempt = job.attempt(1)
    lost = [0]

    def put(key: str, data: bytes) -> bool:
        if key.startswith("roots/") and not lost[0]:
            lost[0] = 1
            if done:
                storage.inner.put_if_absent(key, data)
            raise StorageError("the reply was lost")
        return storage.inner.put_if_absent(key, data)

    storage.put_if_absent = put  # type: ignore[method-assign]
    verdict, root = job.propose(attempt)
    assert (verdict, steps(root), root.seq) == ("committed", [1], 2)


def test_three_lost_replies_are_still_read_back_before_the_error() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    attempt = job.attempt(1)
    lost = [0]

    def put(key: str, data: bytes) -> bool:
        lost[0] += 1
        if lost[0] == 3:
            storage.inner.put_if_absent(key, data)
        raise StorageError(f"reply {lost[0]} was lost")

    storage.put_if_absent = put  # type: ignore[method-assign]
    assert job.propose(attempt)[0] == "committed"
    lost[0] = 3
    with pytest.raises(StorageError, match="reply 6 was lost"):
        job.propose(job.catalog.new_attempt(job.writer, 2))


def test_a_failed_flush_is_never_believed_later() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    attempt = job.attempt(1)
    failures = [0]

    def fail_once(call: str, key: str) -> None:
        if (call, key) == ("sync", "roots"):
            failures[0] += 1
            if failures[0] == 1:
                raise StorageError("fsync of roots: input/output error")

    storage.before = fail_once
    for _ in range(2):
        with pytest.raises(StorageError, match="fsync of roots"):
            job.propose(attempt)
    with pytest.raises(StorageError, match="fsync of roots"):
        job.catalog.abort(job.writer, attempt)
    assert failures == [1]


# -- the operator --


def test_pin_and_drop_go_through_the_log_and_fence_nobody(storage: Storage) -> None:
    job, operator = Job(storage), Catalog(storage, writer="operator")
    attempts = [job.save(step) for step in (1, 2, 3, 4)]
    assert [e.pinned for e in operator.pin(attempts[1], pinned=True).live] == [False, True] + [
        False
    ] * 2
    assert steps(operator.drop([attempts[0], attempts[2]])) == [2, 4]
    seq = operator.newest().seq
    assert operator.pin(attempts[1], pinned=True).seq == seq
    assert operator.drop([attempts[0]]).seq == seq
    job.save(5)
    root = job.catalog.newest()
    assert [e.parent for e in root.live] == ["", attempts[1], attempts[3]]
    assert root.entry(attempts[1]) == msgspec.structs.replace(root.live[0], pinned=True)


def test_two_good_steps_stay_whatever_the_operator_drops(storage: Storage) -> None:
    job = Job(storage)
    attempts = [job.save(step) for step in (1, 2, 3)]
    assert len(job.catalog.drop(attempts).live) == 2
    assert len(job.catalog.drop(attempts).live) == 2


def test_what_is_not_live_cannot_be_pinned(storage: Storage) -> None:
    job = Job(storage)
    with pytest.raises(StepNotFoundError, match="is not a live step"):
        job.catalog.pin(job.attempt(1), pinned=True)


# -- branches --


def test_a_job_that_restored_an_older_step_starts_a_branch(storage: Storage) -> None:
    job = Job(storage)
    first, second, third = (job.save(step) for step in (10, 20, 30))
    job.line = [first]
    fourth = job.save(20)
    root = job.catalog.newest()
    assert [(e.step, e.abandoned) for e in root.live] == [
        (10, False),
        (20, True),
        (30, True),
        (20, False),
    ]
    assert root.latest is not None
    assert root.latest.attempt == fourth
    assert root.latest.parent == first
    find = job.catalog.find
    assert find(root, None).attempt == fourth
    assert find(root, 20).attempt == fourth
    assert find(root, 30).attempt == third
    job.catalog.drop([second])
    with pytest.raises(StepNotFoundError, match=r"step 25 .* committed steps are \[10, 30, 20\]"):
        find(job.catalog.newest(), 25)


def test_a_step_of_the_branch_is_preferred_to_a_newer_abandoned_one(storage: Storage) -> None:
    job = Job(storage)
    first = job.save(10)
    job.save(10)
    job.line = [first]
    job.save(11)
    root = job.catalog.newest()
    assert [e.abandoned for e in root.live] == [False, True, False]
    assert job.catalog.find(root, 10).attempt == first


def test_an_empty_store_has_no_latest_step(storage: Storage) -> None:
    job = Job(storage)
    with pytest.raises(StepNotFoundError, match=r"no step of the current branch.* \[\]"):
        job.catalog.find(job.catalog.newest(), None)


# -- garbage --


def test_sweep_deletes_what_is_aborted_retired_or_of_an_earlier_epoch_and_nothing_else(
    storage: Storage,
) -> None:
    before = Job(storage)
    orphan = before.attempt(9)
    job = Job(storage)
    aborted = job.attempt(1)
    job.catalog.abort(job.writer, aborted)
    kept = [job.save(step, keep=2) for step in (2, 3, 4)]
    undecided = job.attempt(5)
    storage.put_if_absent("notes.txt", b"mine")
    storage.put_if_absent("step-5/file", b"mine")
    assert set(job.catalog.sweep()) == {orphan, aborted, kept[0]}
    assert directories(storage) == {kept[1], kept[2], undecided, "step-5"}
    assert job.catalog.sweep() == []
    assert job.propose(undecided)[0] == "committed"


def test_sweep_makes_roots_durable_before_it_deletes_and_removals_before_it_forgets() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    for step in (1, 2, 3):
        job.save(step, keep=2)
    storage.calls.clear()
    (gone,) = job.catalog.sweep()
    calls = storage.calls
    assert calls.index(("sync", "roots")) < calls.index(("list", "leases"))
    assert calls.index(("list", "leases")) < calls.index(("delete_tree", gone))
    assert calls.index(("delete_tree", gone)) < len(calls) - calls[::-1].index(("sync", ""))


def test_a_retired_step_is_forgotten_only_when_its_files_are_gone(storage: Storage) -> None:
    job = Job(storage)
    job.catalog.sweep()
    # Saved and dropped since the last sweep: the log must not forget it before the next one.
    attempts = [job.save(step, keep=2) for step in (1, 2, 3, 4)]
    assert job.catalog.newest().retired == attempts[:2]
    assert set(job.catalog.sweep()) == set(attempts[:2])
    attempts.append(job.save(5, keep=2))
    assert job.catalog.newest().retired == [attempts[2]]
    other = Catalog(storage, writer="another collector")
    assert other.sweep() == [attempts[2]]
    assert job.catalog.sweep() == []
    job.save(6, keep=2)
    assert job.catalog.newest().retired == [attempts[3]]


def test_a_sweep_that_failed_half_way_goes_on_when_called_again() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    attempts = [job.save(step, keep=2) for step in (1, 2, 3, 4)]
    failures = [0]

    def fail(call: str, key: str) -> None:
        if key == attempts[1] and not failures[0]:
            failures[0] = 1
            raise StorageError("cannot remove")

    storage.before = fail
    with pytest.raises(StorageError, match="cannot remove"):
        job.catalog.sweep()
    assert job.catalog.sweep() == [attempts[1]]
    assert directories(storage) == set(attempts[2:])


def test_only_the_newest_valid_roots_are_kept(storage: Storage) -> None:
    job = Job(storage)
    torn = job.catalog.newest().seq + 1
    storage.put_if_absent(f"roots/{root_name(torn)}", b"torn")
    for step in range(KEPT_ROOTS + 3):
        job.save(step, keep=2)
    newest = job.catalog.newest()
    job.catalog.sweep()
    names = [name for name in storage.list("roots") if name.endswith(".json")]
    assert names == [root_name(newest.seq - back) for back in reversed(range(KEPT_ROOTS))]
    assert job.catalog.newest() == newest


# -- leases --


@pytest.fixture
def leased(storage: Storage) -> tuple[Job, Clock, str]:
    """Return a job, its clock, and a step that it can do without."""
    clock = Clock()
    job = Job(storage, clock=clock)
    attempts = [job.save(step) for step in (1, 2, 3)]
    return job, clock, attempts[0]


def test_a_leased_step_stays_while_the_lease_is_renewed(
    storage: Storage, leased: tuple[Job, Clock, str]
) -> None:
    job, clock, attempt = leased
    lease = Catalog(storage, writer="reader").lease(attempt)
    assert lease is not None
    job.catalog.drop([attempt])
    for _ in range(5):
        assert job.catalog.sweep() == []
        clock.now_s += 0.9 * LEASE_TTL_S
        lease.renew()
    assert job.catalog.sweep() == []
    lease.release()
    assert storage.list("leases") == []
    assert job.catalog.sweep() == [attempt]


def test_a_lease_that_is_not_renewed_dies_on_the_sweepers_own_clock(
    storage: Storage, leased: tuple[Job, Clock, str]
) -> None:
    job, clock, attempt = leased
    assert Catalog(storage, writer="reader").lease(attempt) is not None
    job.catalog.drop([attempt])
    clock.now_s += 10 * LEASE_TTL_S
    # First seen now, however old it is.
    assert job.catalog.sweep() == []
    clock.now_s += LEASE_TTL_S
    assert job.catalog.sweep() == []
    clock.now_s += 1
    assert job.catalog.sweep() == [attempt]
    assert storage.list("leases") == []


def test_a_renewal_never_leaves_a_moment_in_which_a_listing_could_miss_the_lease(
    storage: Storage, leased: tuple[Job, Clock, str]
) -> None:
    _, _, attempt = leased
    watched = Watched(storage)
    lease = Catalog(watched, writer="reader").lease(attempt)
    assert lease is not None
    for _ in range(4):
        before = set(storage.list("leases"))
        lease.renew()
        # A listing during the renewal sees at least what was there before it and is there after it.
        assert before & set(storage.list("leases"))
        assert len(storage.list("leases")) <= 2


def test_one_reader_s_lease_protects_nothing_else(
    storage: Storage, leased: tuple[Job, Clock, str]
) -> None:
    job, _, attempt = leased
    reader = Catalog(storage, writer="reader")
    assert reader.lease(job.line[1]) is not None
    mine, other = reader.lease(attempt), reader.lease(attempt)
    assert mine is not None
    assert other is not None
    job.catalog.drop([attempt])
    mine.release()
    assert job.catalog.sweep() == []
    other.release()
    assert job.catalog.sweep() == [attempt]


def test_without_write_permission_a_reader_reads_unleased() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    attempt = job.save(1)

    def refuse(call: str, key: str) -> None:
        if call == "put":
            raise StorageError("read-only file system")

    storage.before = refuse
    reader = Catalog(storage, writer="reader")
    assert reader.lease(attempt) is None
    assert reader.find(reader.newest(), None).attempt == attempt


# -- storages that contradict themselves --


def test_a_storage_that_lists_roots_it_does_not_hold_is_an_error_not_a_hang() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    real_list = storage.list

    def ghosts(prefix: str) -> Sequence[str]:
        return [*real_list(prefix), root_name(99)] if prefix == "roots" else real_list(prefix)

    storage.list = ghosts  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="lists roots that it does not hold"):
        job.catalog.newest()


def test_a_storage_that_refuses_names_it_does_not_list_is_an_error_not_a_hang() -> None:
    storage = Watched(MemoryStorage())
    job = Job(storage)
    attempt = job.attempt(1)
    storage.put_if_absent = lambda key, data: False  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="cannot be trusted with a commit log"):
        job.propose(attempt)


# -- what must never stop the store --


def test_a_metric_that_json_has_no_number_for_does_not_stop_the_store(storage: Storage) -> None:
    job = Job(storage)
    job.save(1, metrics={"loss": float("nan"), "best": float("-inf")})
    job.save(2, metrics={"loss": 0.5})
    found = Catalog(storage, writer="reader").newest().live[0].metrics
    assert found["best"] == float("-inf")
    assert found["loss"] != found["loss"]


def test_a_log_too_full_for_another_step_says_what_to_do_and_can_still_be_emptied() -> None:
    job = Job(MemoryStorage())
    first = job.save(1)
    job.save(2)
    third = job.attempt(3)
    with pytest.raises(ShardckptError, match="save fewer metrics"):
        job.propose(third, metrics={f"metric {i}": 0.1 for i in range(100_000)})
    assert steps(job.catalog.newest()) == [1, 2]
    assert job.propose(third)[0] == "committed"
    assert steps(job.catalog.drop([first])) == [2, 3]
