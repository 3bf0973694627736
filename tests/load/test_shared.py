"""Loads together, on ranks that are processes."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from shardckpt.load import links
from shardckpt.load.exchange import SLOT_BYTES
from shardckpt.load.links import DONE, Door, LinkError
from shardckpt.load.shared import MOST_SLOTS
from shardckpt.testing.jobs import raised, run_threads
from shardckpt.testing.ranks import RankDeath, run_ranks


def _ranks() -> Any:
    # Spawned children find rank functions by module name, so the module needs an importable one.
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    assert importlib.util.find_spec("ranks_of_load") is not None
    import ranks_of_load

    return ranks_of_load


@pytest.mark.multiproc
def test_the_job_reads_every_byte_once_whatever_the_layouts(tmp_path: Path) -> None:
    ranks = _ranks()
    results = run_ranks(4, ranks.load_each_way, tmp_path)
    for name in results[0]:
        of_ranks = [result[name] for result in results]
        total = sum(stats.read_bytes for stats in of_ranks)
        assert {stats.job_read_bytes for stats in of_ranks} == {total}
        assert total <= ranks.unique_bytes() * 1.05, name
        assert max(stats.read_bytes for stats in of_ranks) <= total / 4 * 1.3, name


@pytest.mark.multiproc
def test_damage_that_one_rank_finds_is_the_same_error_on_all(tmp_path: Path) -> None:
    results = run_ranks(4, _ranks().load_damaged, tmp_path / "store")
    assert {kind for kind, _, _ in results} == {"CorruptCheckpointError"}
    words = {message.partition("step-")[2] for _, message, _ in results}
    assert len(words) == 1
    assert "saved by rank 2" in words.pop()
    # One rank found it; the others say which.
    assert sum(message.startswith("step-") for _, message, _ in results) == 1


@pytest.mark.multiproc
@pytest.mark.crash
def test_a_rank_that_dies_is_named_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    results = run_ranks(4, _ranks().load_while_one_dies, tmp_path / "store", may_die=[2])
    assert isinstance(results[2], RankDeath)
    for kind, message, seconds in (results[0], results[1], results[3]):
        assert kind == "DeadlineError"
        assert "rank 2 went away" in message
        assert seconds < 20
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.multiproc
def test_a_rank_that_hangs_is_named_after_the_deadline(tmp_path: Path) -> None:
    results = run_ranks(4, _ranks().load_while_one_hangs, tmp_path / "store")
    for kind, message, seconds in (results[0], results[1], results[3]):
        assert kind == "DeadlineError"
        assert "from rank 2 within 1 s" in message
        assert seconds < 20
    assert results[2][0] == "DeadlineError"


@pytest.mark.multiproc
@pytest.mark.parametrize("hosts", ["aaaa", "aabb"])
def test_a_host_whose_ranks_share_no_memory_reads_plainly(tmp_path: Path, hosts: str) -> None:
    ranks = _ranks()
    results = run_ranks(4, ranks.load_without_links, tmp_path / "store", list(hosts))
    alone = [stats.read_bytes for rank, stats in enumerate(results) if hosts[rank] == "a"]
    assert all(read_bytes >= results[0].needed_bytes for read_bytes in alone)
    if hosts == "aabb":
        assert results[2].read_bytes + results[3].read_bytes <= ranks.unique_bytes() * 1.05


@pytest.mark.multiproc
def test_shared_memory_stays_within_its_bound(tmp_path: Path) -> None:
    ranks = _ranks()
    most = run_ranks(2, ranks.load_within_memory, tmp_path / "store")
    bound = 2 * MOST_SLOTS * SLOT_BYTES
    assert bound < ranks.unique_bytes(12) / 2
    for of_rank in most:
        assert 0 < of_rank <= bound + (1 << 20)


def test_a_stranger_at_the_door_is_sent_away() -> None:
    """Names of doors can be listed; only ranks of the job know the secret behind one."""
    doors = [Door(), Door()]
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.connect(links._address(doors[0].secret))
    fd = os.memfd_create("stranger")
    os.ftruncate(fd, 4096)
    links._greet(stranger, secrets.token_hex(32), 1, 4096, fd)
    os.close(fd)

    def link(rank: int) -> links.Link:
        other = 1 - rank
        memory, found = doors[rank].link(rank, {other: doors[other].secret}, 4096)
        memory.view(0, 1)[0] = 10 + rank
        found[other].send(DONE, 3, 5)
        return found[other]

    try:
        found = raised(run_threads(2, link))
        for link_ in found:
            assert next(iter(link_.records())) == (DONE, 3, 5)
            assert link_.memory is not None
            assert link_.memory.view(0, 1)[0] == 10 + link_.rank
            with pytest.raises(TypeError, match="read-only"):
                link_.memory.view(0, 1)[0] = 0
        assert stranger.recv(1) == b""
    finally:
        stranger.close()
        for door in doors:
            door.close()
        for link_ in found:
            link_.close()


def test_a_peer_that_never_comes_is_a_link_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LINK_TIMEOUT_S", 0.2)
    door = Door()
    try:
        with pytest.raises(LinkError, match="timed out"):
            door.link(0, {1: secrets.token_hex(32)}, 4096)
        with pytest.raises(LinkError, match="refused"):
            door.link(1, {0: secrets.token_hex(32)}, 4096)
    finally:
        door.close()
