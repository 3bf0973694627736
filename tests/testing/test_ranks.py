"""The rank harness reports the first failure first and leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import pytest

from shardckpt.testing import ranks
from shardckpt.testing.ranks import RankContext, RankDeath, RanksFailedError, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.multiproc


def _describe(told: RankContext, word: str) -> tuple[int, int, bool, str, int]:
    (told.directory / f"from-{told.rank}").write_text(str(os.getpid()))
    return told.rank, told.world_size, told.directory.is_dir(), word, told.port


def test_results_come_back_in_order_of_rank(tmp_path: Path) -> None:
    results = run_ranks(3, _describe, "word", directory=tmp_path)
    assert [result[:4] for result in results] == [(rank, 3, True, "word") for rank in range(3)]
    assert len({result[4] for result in results}) == 1
    pids = {(tmp_path / "shared" / f"from-{rank}").read_text() for rank in range(3)}
    assert len(pids) == 3


def _serve(told: RankContext) -> str:
    if told.rank == 0:
        with socket.create_server(("127.0.0.1", told.port)) as server:
            (told.directory / "up").touch()
            server.accept()[0].close()
        return "served"
    _wait_for(told.directory / "up")
    socket.create_connection(("127.0.0.1", told.port), timeout=30).close()
    return "connected"


def test_the_port_is_free_for_a_rank_to_listen_on() -> None:
    assert run_ranks(2, _serve) == ["served", "connected"]


def _fail_on_two(told: RankContext) -> None:
    print(f"rank {told.rank} prints")
    if told.rank == 2:
        raise KeyError("the cause")
    signal.pause()


def test_the_first_failing_ranks_traceback_comes_first() -> None:
    """The others are waiting for it and would never end."""
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(3, _fail_on_two)
    message = str(caught.value)
    assert message.startswith("rank 2 of 3 failed:\nTraceback")
    assert message.index("KeyError: 'the cause'") < message.index("--- log of rank 0")
    assert "_fail_on_two" in message
    assert "rank 2 prints" in message


def _print_and_warn(told: RankContext) -> None:
    print(f"out {told.rank}", flush=True)
    os.write(2, f"err {told.rank}\n".encode())


def test_every_rank_has_a_log_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, _print_and_warn, directory=tmp_path)
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}.log").read_text() == f"out {rank}\nerr {rank}\n"
    assert capfd.readouterr() == ("", "")


def _die(told: RankContext) -> str:
    if told.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(
        RanksFailedError, match=r"^rank 1 of 2 ended with exit code -9 before the end"
    ):
        run_ranks(2, _die)


def test_a_rank_that_may_die_stands_in_the_results() -> None:
    assert run_ranks(2, _die, may_die=[1]) == ["alive", RankDeath(-9)]


@pytest.fixture
def deadline_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return what makes the harness believe that an hour passes once a file is there."""
    real = time.monotonic

    def arm(sign: Path) -> None:
        monkeypatch.setattr(ranks.time, "monotonic", lambda: real() + 3600 * sign.exists())

    return arm


def _hang_on_zero(told: RankContext) -> None:
    if told.rank == 0:
        _a_telling_name(told)
    _wait_for(told.directory / "hanging")


def _a_telling_name(told: RankContext) -> None:
    (told.directory / "hanging").write_text(str(os.getpid()))
    signal.pause()


def _wait_for(sign: Path) -> None:
    while not sign.exists():
        os.sched_yield()


def test_a_rank_that_hangs_is_named_with_its_barrier_and_its_stack(
    tmp_path: Path, deadline_after: Callable[[Path], None]
) -> None:
    deadline_after(tmp_path / "shared" / "hanging")
    with pytest.raises(
        RanksFailedError, match=r"^rank 0 of 2 is late: .* the end barrier"
    ) as caught:
        run_ranks(2, _hang_on_zero, directory=tmp_path)
    assert "in _a_telling_name" in str(caught.value)


def _ignore_term(told: RankContext) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _hang_on_zero(told)


def test_a_rank_that_ignores_term_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline_after: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(ranks, "_GRACE_AFTER_TERM_S", 0.2)
    deadline_after(tmp_path / "shared" / "hanging")
    with pytest.raises(RanksFailedError, match="rank 0 of 2 is late"):
        run_ranks(2, _ignore_term, directory=tmp_path)
    pid = int((tmp_path / "shared" / "hanging").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _exit_quietly(told: RankContext) -> None:
    sys.exit(0)


def test_a_rank_that_exits_early_has_not_succeeded() -> None:
    with pytest.raises(RanksFailedError, match=r"^rank 0 of 1 failed:\n(?s:.)*SystemExit"):
        run_ranks(1, _exit_quietly)


def _return_a_lambda(told: RankContext) -> object:
    return lambda: told


def test_a_result_that_cannot_travel_is_a_failure_and_no_hang() -> None:
    with pytest.raises(RanksFailedError, match=r"^rank 0 of 1 (?s:.)*lambda"):
        run_ranks(1, _return_a_lambda, timeout_s=30)


def test_a_temporary_directory_is_removed_on_success_and_kept_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_ranks(1, _print_and_warn)
    assert list(tmp_path.glob("ranks-*")) == []
    with pytest.raises(RanksFailedError):
        run_ranks(1, _exit_quietly)
    (kept,) = tmp_path.glob("ranks-*")
    assert (kept / "rank-0.log").exists()
