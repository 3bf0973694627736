"""Run a function on several ranks, each a process of its own, and hear of the first failure first.

Layer: testing. Knows no framework: a rank gets its number, the world size, a directory and a free
port, and sets up what it needs from these.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import io
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast, final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

T = TypeVar("T")

_GRACE_AFTER_TERM_S: Final = 5.0
_TAIL_BYTES: Final = 4000
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True)
class RankContext:
    """What a rank is told.

    Attributes:
        rank: Its number.
        world_size: How many there are.
        directory: Shared by all ranks, new for this run.
        port: A TCP port that was free on this machine when the run began.
    """

    rank: int
    world_size: int
    directory: Path
    port: int


@dataclass(frozen=True, slots=True)
class RankDeath:
    """Stands for the result of a rank that was allowed to die, and did.

    Attributes:
        exit_code: As of `Process.exitcode`: negative for a signal.
    """

    exit_code: int


class RanksFailedError(AssertionError):
    """At least one rank failed; the message begins with the first one's traceback."""


def run_ranks(
    num_ranks: int,
    fn: Callable[..., T],
    *args: object,
    timeout_s: float = 60.0,
    may_die: Collection[int] = (),
    directory: Path | None = None,
) -> list[T | RankDeath]:
    """Run `fn(RankContext, *args)` on every rank and return what each returned.

    No rank begins before all are up, and none leaves before all are done, so a rank that serves the
    others outlives them.

    Args:
        num_ranks: How many processes.
        fn: A function at the top level of its module.
        args: Further arguments, equal on all ranks.
        timeout_s: Seconds until all must be done.
        may_die: Ranks that may end without an answer; their result is a `RankDeath`.
        directory: Where the ranks' directory and logs go, kept afterwards; by default a temporary
            one that is kept only on failure.

    Raises:
        RanksFailedError: A rank raised, died, or did not reach a barrier in time.
    """
    place = Path(tempfile.mkdtemp(prefix="ranks-")) if directory is None else directory
    (place / "shared").mkdir(parents=True, exist_ok=True)
    team = _Team(num_ranks, place, may_die, timeout_s)
    try:
        team.start(fn, args)
        results = cast("list[T | RankDeath]", team.results())
    finally:
        team.stop()
    if directory is None:
        shutil.rmtree(place, ignore_errors=True)
    return results


@dataclass(slots=True)
class _Rank:
    number: int
    process: BaseProcess
    pipe: Connection
    log: Path
    barrier: str = "start"
    is_waiting: bool = False
    result: object = None


@final
class _Team:
    """The processes of one run, seen from the parent."""

    def __init__(
        self, num_ranks: int, place: Path, may_die: Collection[int], timeout_s: float
    ) -> None:
        self._num_ranks: Final = num_ranks
        self._place: Final = place
        self._may_die: Final = may_die
        self._timeout_s: Final = timeout_s
        self._deadline: Final = time.monotonic() + timeout_s
        self._ranks: Final[list[_Rank]] = []

    def start(self, fn: Callable[..., object], args: tuple[object, ...]) -> None:
        """Start every process; they wait at the start barrier."""
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        source = (fn.__module__, fn.__code__.co_filename)
        for number in range(self._num_ranks):
            ours, theirs = context.Pipe()
            log = self._place / f"rank-{number}.log"
            told = RankContext(number, self._num_ranks, self._place / "shared", port)
            process = context.Process(
                target=_rank_main,
                args=(told, source, theirs, str(log), os.getpid()),
                name=f"rank {number}",
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(number, process, ours, log))
            # Sent, not passed to the process: opened only after the rank has redirected its output,
            # a failing import of the test's module is logged and reported like any other failure.
            with suppress(BrokenPipeError):  # It died already, which the start barrier finds.
                ours.send((fn, args))

    def results(self) -> list[object]:
        """See all ranks through both barriers and return their results.

        Raises:
            RanksFailedError: A rank raised, died, or came too late.
        """
        for barrier in ("start", "end"):
            for rank in self._living():
                rank.barrier, rank.is_waiting = barrier, False
            while any(not rank.is_waiting for rank in self._living()):
                self._hear(barrier)
            for rank in self._living():
                self._answer(rank)
        for rank in self._ranks:
            rank.process.join(max(0.0, self._deadline - time.monotonic()))
            if rank.process.exitcode is None:
                self._fail(rank, "did not exit after the end barrier")
            if rank.process.exitcode != 0 and not isinstance(rank.result, RankDeath):
                self._fail(rank, f"exited with {rank.process.exitcode} after the end barrier")
        return [rank.result for rank in self._ranks]

    def stop(self) -> None:
        """End what still runs: TERM, some seconds, KILL."""
        for rank in self._ranks:
            if rank.process.is_alive():
                rank.process.terminate()
        limit = time.monotonic() + _GRACE_AFTER_TERM_S
        for rank in self._ranks:
            rank.process.join(max(0.0, limit - time.monotonic()))
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()
            rank.pipe.close()
            rank.process.close()

    def _living(self) -> list[_Rank]:
        return [rank for rank in self._ranks if not isinstance(rank.result, RankDeath)]

    def _hear(self, barrier: str) -> None:
        """Take in what the ranks say next."""
        waiting_for = {rank.pipe: rank for rank in self._living() if not rank.is_waiting}
        remaining_s = self._deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting_for), max(0.0, remaining_s))
        if not ready:
            late = list(waiting_for.values())
            names = ", ".join(str(rank.number) for rank in late)
            self._fail(
                late[0],
                f"is late: after {self._timeout_s:g} s the {barrier} barrier still waits for "
                f"rank(s) {names}",
            )
        failures: list[tuple[float, str, _Rank]] = []
        for rank in [rank for pipe, rank in waiting_for.items() if pipe in ready]:
            try:
                kind, value = rank.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._mourn(rank)
                continue
            if kind == "failed":
                failures.append((*value, rank))
            else:
                rank.is_waiting, rank.result = True, value
        if failures:
            _, text, first = min(failures, key=lambda failure: failure[0])
            self._fail(first, f"failed:\n{text}")

    def _mourn(self, rank: _Rank) -> None:
        """Take note of a rank that went away without a word."""
        rank.process.join(_GRACE_AFTER_TERM_S)
        exit_code = rank.process.exitcode
        if rank.number not in self._may_die or exit_code is None:
            self._fail(rank, f"ended with exit code {exit_code} before the {rank.barrier} barrier")
        assert exit_code is not None
        rank.result = RankDeath(exit_code)

    def _answer(self, rank: _Rank) -> None:
        try:
            rank.pipe.send("go")
        except BrokenPipeError:
            self._mourn(rank)

    def _fail(self, first: _Rank, what: str) -> None:
        """Stop everybody, which makes a hanging rank log its stacks, and raise.

        Raises:
            RanksFailedError: Always.
        """
        for rank in self._ranks:
            if rank.process.is_alive():
                rank.process.terminate()
        for rank in self._ranks:
            rank.process.join(_GRACE_AFTER_TERM_S)
        others = [rank for rank in self._ranks if rank is not first]
        logs = "\n".join(_tail(rank) for rank in [first, *others])
        raise RanksFailedError(
            f"rank {first.number} of {self._num_ranks} {what}\n{logs}\nlogs: {self._place}"
        )


def _rank_main(
    told: RankContext,
    source: tuple[str, str],
    pipe: Connection,
    log: str,
    parent: int,
) -> None:
    """Be a rank: redirect output, wait for all, work, wait for all."""
    _die_with(parent)
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # A rank may be killed before it flushes.
    # Chained: after the stacks are logged the signal ends the process as it would have.
    faulthandler.register(signal.SIGTERM, file=2, all_threads=True, chain=True)
    try:
        if source[0] != "__main__":
            _make_importable(*source)
        fn, args = pipe.recv()
        _barrier(pipe, None)
        result = fn(told, *args)
    except BaseException:
        pipe.send(("failed", (time.monotonic(), traceback.format_exc())))
        raise
    _barrier(pipe, result)
    if "torch" in sys.modules:
        # Its gloo threads may abort a process that takes Python down.
        sys.stdout.flush()
        os._exit(0)


def _barrier(pipe: Connection, value: object) -> None:
    pipe.send(("reached", value))
    pipe.recv()


def _make_importable(module: str, file: str) -> None:
    """Put the directory that `module` is found from on the path; test collection may not have."""
    tail = os.path.join(*module.split(".")) + ".py"
    if file.endswith(tail):
        sys.path.append(file.removesuffix(tail))
    importlib.import_module(module)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(rank: _Rank) -> str:
    try:
        text = rank.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
    except FileNotFoundError:
        text = ""
    return f"--- log of rank {rank.number} ---\n{text or '(empty)'}"
