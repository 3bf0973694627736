"""Parts of the modelled cluster: clocks, a key-value store with a queue, storage as a fluid."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(slots=True)
class Clock:
    """One rank's time."""

    now_s: float

    def monotonic(self) -> float:
        """Return the time."""
        return self.now_s


@dataclass(frozen=True, slots=True)
class Store:
    """A storage: bytes per second of all ranks together, new files per second, latency."""

    name: str
    write_bytes_per_s: float
    read_bytes_per_s: float
    requests_per_s: float
    latency_s: float


@final
class Server:
    """The job's key-value store: one thread that answers requests in their order.

    Ranks are run one after the other, so each request finds the queue as it was at its own time:
    what the store was busy with is kept by slices of a millisecond.
    """

    def __init__(self, requests_per_s: float, bytes_per_s: float, round_trip_s: float) -> None:
        """Start idle and empty."""
        self._request_s = 1 / requests_per_s
        self._bytes_per_s = bytes_per_s
        self._round_trip_s = round_trip_s
        self._busy_s: dict[int, float] = {}
        self.values: dict[str, tuple[float, bytes]] = {}
        self.num_requests = 0

    def answer_s(self, at_s: float, nbytes: int, requests: int = 1) -> float:
        """Return when a request that is sent at `at_s` is answered."""
        self.num_requests += requests
        work_s = requests * self._request_s + nbytes / self._bytes_per_s
        arrived_s = at_s + self._round_trip_s / 2
        slot = int(arrived_s * 1e3)
        while self._busy_s.get(slot, 0.0) + min(work_s, 1e-3) > 1e-3:
            slot += 1
        done_s = max(arrived_s, slot / 1e3) + self._busy_s.get(slot, 0.0) + work_s
        left_s = work_s
        while left_s > 0:
            room_s = 1e-3 - self._busy_s.get(slot, 0.0)
            self._busy_s[slot] = self._busy_s.get(slot, 0.0) + min(left_s, room_s)
            left_s -= room_s
            slot += 1
        return done_s + self._round_trip_s / 2


@final
class ModelCoord:
    """One rank's view of the server; what takes time moves the rank's clock."""

    def __init__(self, rank: int, server: Server, clock: Clock, world_size: int) -> None:
        """Join as `rank`."""
        self._rank = rank
        self._server = server
        self._clock = clock
        self._world_size = world_size

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self._world_size

    def set(self, key: str, value: bytes) -> None:
        """Publish a value."""
        at_s = self._server.answer_s(self._clock.now_s, len(value))
        self._server.values[key] = (at_s, bytes(value))
        self._clock.now_s = at_s

    def get(self, key: str) -> bytes | None:
        """Return the value if it was there at this rank's time."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values that were there at this rank's time, all or none as a c10d store."""
        found = [self._server.values.get(key) for key in keys]
        now_s = self._clock.now_s
        if all(entry is not None and entry[0] <= now_s for entry in found):
            values: list[bytes | None] = [entry[1] for entry in found if entry is not None]
            nbytes = sum(len(value or b"") for value in values)
            self._clock.now_s = self._server.answer_s(now_s, nbytes, requests=2)
            return values
        self._clock.now_s = self._server.answer_s(now_s, 0)
        return [None] * len(keys)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """Wait in the server."""
        entry = self._server.values.get(key)
        end_s = self._clock.now_s + timeout_s
        if entry is None or entry[0] > end_s:
            self._clock.now_s = end_s
            return None
        at_s = max(entry[0], self._clock.now_s)
        self._clock.now_s = self._server.answer_s(at_s, len(entry[1]))
        return entry[1]

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._clock.now_s = self._server.answer_s(self._clock.now_s, 0)
        self._server.values.pop(key, None)

    def close(self) -> None:
        """Do nothing."""


def fluid(
    starts_s: np.ndarray[Any, Any],
    nbytes: np.ndarray[Any, Any],
    node_of: np.ndarray[Any, Any],
    node_bytes_per_s: np.ndarray[Any, Any],
    rank_bytes_per_s: float,
    total_bytes_per_s: float,
) -> np.ndarray[Any, Any]:
    """Return when each rank has moved its bytes, with every limit shared fairly.

    Nodes are the unit: their ranks begin with the last of them and share its speed evenly. At
    every event (a node begins or is done) the storage's total is dealt anew, to those that can
    take more first (max-min fairness).
    """
    num_nodes = len(node_bytes_per_s)
    ranks_of_node = np.bincount(node_of, minlength=num_nodes)
    start = np.zeros(num_nodes)
    np.maximum.at(start, node_of, starts_s)
    left = np.bincount(node_of, weights=nbytes, minlength=num_nodes)
    limit = np.minimum(node_bytes_per_s, ranks_of_node * rank_bytes_per_s)
    done = np.array(start)
    waiting = [(float(s), n) for n, s in enumerate(start)]
    heapq.heapify(waiting)
    active = np.zeros(num_nodes, bool)
    now = 0.0
    while waiting or active.any():
        speed = _dealt(limit, active, total_bytes_per_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.where(active, left / speed, np.inf)
        next_end = float(ends.min())
        next_start = waiting[0][0] - now if waiting else np.inf
        passed = min(next_end, next_start)
        left = np.where(active, left - speed * passed, left)
        now += passed
        if next_start <= next_end:
            # Beginnings within a millisecond are one event.
            while waiting and waiting[0][0] <= now + 1e-3:
                active[heapq.heappop(waiting)[1]] = True
        # As are ends.
        over = active & (left <= speed * 1e-3)
        done[over] = now
        active &= ~over
    return done[node_of]


def _dealt(
    limit: np.ndarray[Any, Any], active: np.ndarray[Any, Any], total: float
) -> np.ndarray[Any, Any]:
    """Return each active node's speed under its own limit and the total of all."""
    speed = np.where(active, limit, 0.0)
    if speed.sum() <= total:
        return speed
    wanted = np.sort(limit[active])
    count = len(wanted)
    before = np.concatenate([[0.0], np.cumsum(wanted)[:-1]])
    level = (total - before) / (count - np.arange(count))
    fits = np.nonzero(wanted > level)[0]
    return np.where(active, np.minimum(limit, level[fits[0]] if len(fits) else np.inf), 0.0)
