"""Calls of a remote store that end at a deadline, whatever the store's client does.

Layer: coord. Clients hang where their server is gone, and ignore their own timeouts. So one helper
thread makes the calls; it is left behind, with its connection, when it does not answer in time.
Calls that wait in the store have helpers of their own.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

from shardckpt.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_ABANDONED: Final = 4
T = TypeVar("T")


@final
class BoundedCalls:
    """Makes calls of one job's store, one after the other. Thread-safe."""

    def __init__(self, connect: Callable[[], Any], rank: int, timeout_s: float) -> None:
        """Connect at the first call.

        Args:
            connect: Returns a connection; called in the thread that uses it.
            rank: This rank, for messages.
            timeout_s: Seconds that one call may take.
        """
        self._connect = connect
        self._rank = rank
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._helper: _Helper | None = None
        self._num_abandoned = 0

    def call(self, what: str, call: Callable[[Any], T]) -> T:
        """Return what `call` returns for the connection.

        Args:
            what: Name of the call, for messages.
            call: Takes the connection.

        Raises:
            DeadlineError: The store did not answer in time, or failed.
        """
        with self._lock:
            if self._num_abandoned >= _MAX_ABANDONED:
                raise DeadlineError(
                    self._silent(what) + f"; gave up after {_MAX_ABANDONED} attempts"
                )
            if self._helper is None:
                self._helper = _Helper(self._connect)
            helper = self._helper
        task: _Task[T] = _Task(call)
        helper.put(task)
        if not task.done.wait(self._timeout_s):
            self._abandon(helper)
            raise DeadlineError(self._silent(what))
        if task.error is not None:
            self._abandon(helper, counts=False)
            raise DeadlineError(_failed(self._rank, what, task.error)) from task.error
        with self._lock:
            self._num_abandoned = 0
        return task.result

    def close(self) -> None:
        """Let the helper thread end. Never raises."""
        with self._lock:
            if self._helper is not None:
                self._helper.stop()
            self._helper = None

    def _abandon(self, helper: _Helper, *, counts: bool = True) -> None:
        """Leave a helper that does not answer behind; the next call makes a new connection."""
        with self._lock:
            helper.stop()
            if self._helper is helper:
                self._helper = None
                self._num_abandoned += counts

    def _silent(self, what: str) -> str:
        return (
            f"rank {self._rank}: the job's key-value store did not answer {what!r} within "
            f"{self._timeout_s:g} s; its "
            "server is a process of this job (rank 0 or the launcher): look whether it is alive"
        )


@final
class WaitingCalls:
    """Makes calls that wait in the store, each on a connection that no other call needs meanwhile.

    A wait cannot be taken back, so one whose caller looks elsewhere goes on until its caller comes
    again. There are as many connections as waits have ever been under way at once: one, as a rule.
    Thread-safe.
    """

    def __init__(self, connect: Callable[[], Any], rank: int) -> None:
        """Connect at the first call.

        Args:
            connect: Returns a connection; called in the thread that uses it.
            rank: This rank, for messages.
        """
        self._connect = connect
        self._rank = rank
        self._lock = threading.Lock()
        self._idle: list[_Helper] = []
        self._left: dict[str, tuple[_Helper, _Task[Any]]] = {}

    def has_room(self, what: str) -> bool:
        """Return whether few enough waits were left behind that this one may begin, or goes on."""
        with self._lock:
            self._take_back(what)
            return what in self._left or len(self._left) < _MAX_ABANDONED

    def call(self, what: str, call: Callable[[Any], T], timeout_s: float) -> T | None:
        """Return what `call` returns for a connection, or None while it waits; then ask again.

        Args:
            what: Name of the call; the same name again means the call that is under way.
            call: Takes the connection.
            timeout_s: Seconds until this returns.

        Raises:
            DeadlineError: The store failed.
        """
        with self._lock:
            left = self._left.pop(what, None)
            helper = left[0] if left else self._idle.pop() if self._idle else None
        if helper is None:
            helper = _Helper(self._connect)
        task: _Task[T] = left[1] if left else _Task(call)
        if left is None:
            helper.put(task)
        if not task.done.wait(timeout_s):
            with self._lock:
                self._left[what] = helper, task
            return None
        if task.error is not None:
            helper.stop()
            raise DeadlineError(_failed(self._rank, what, task.error)) from task.error
        with self._lock:
            self._idle.append(helper)
        return task.result

    def _take_back(self, what: str) -> None:
        """Take back the helpers of other waits that are over and that nobody asked for again."""
        for name, (helper, task) in list(self._left.items()):
            if name != what and task.done.is_set():
                del self._left[name]
                if task.error is None:
                    self._idle.append(helper)
                else:
                    helper.stop()

    def close(self) -> None:
        """Let the helper threads end, each once its wait is over. Never raises."""
        with self._lock:
            helpers = [*self._idle, *(helper for helper, _ in self._left.values())]
            self._idle.clear()
            self._left.clear()
        for helper in helpers:
            helper.stop()


def _failed(rank: int, what: str, error: Exception) -> str:
    return (
        f"rank {rank}: the job's key-value store failed at {what!r}: {error}. Its server is a "
        "process of this job (rank 0 or the launcher): look whether it ended."
    )


class _Task(Generic[T]):
    """One call on its way to the helper thread and back."""

    def __init__(self, call: Callable[[Any], T]) -> None:
        self.call = call
        self.done = threading.Event()
        self.result: T
        self.error: Exception | None = None


@final
class _Helper:
    """A thread with its own connection; a daemon, so that a hanging call keeps nobody here."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._tasks: SimpleQueue[_Task[Any] | None] = SimpleQueue()
        thread = threading.Thread(
            target=self._serve, args=(connect,), name="shardckpt-store", daemon=True
        )
        thread.start()

    def put(self, task: _Task[Any]) -> None:
        self._tasks.put(task)

    def stop(self) -> None:
        self._tasks.put(None)

    def _serve(self, connect: Callable[[], Any]) -> None:
        own: Any = None
        while (task := self._tasks.get()) is not None:
            try:
                if own is None:
                    own = connect()
                task.result = task.call(own)
            except Exception as error:  # Handed to the caller.
                task.error = error
            task.done.set()
