"""The c10d store as coordination: large values, absent keys, a server that stopped answering."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from shardckpt.coord.base import wait_for
from shardckpt.coord.single import SingleCoord
from shardckpt.errors import DeadlineError
from shardckpt.torch.coord import PART_BYTES, C10dCoord, default_coord

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVER = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                 timeout=timedelta(seconds=30))
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.communicate()


def client(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=30))


def test_values_of_any_size_pass_and_absent_keys_do_not_wait(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = server
    one = C10dCoord(client(port), 0, 2, timeout_s=20)
    two = C10dCoord(client(port), 1, 2, timeout_s=20)
    started = time.monotonic()
    assert two.get("absent") is None
    assert time.monotonic() - started < 5
    # More than 8 MiB in one value would end the connection.
    for size in (0, 1, PART_BYTES - 1, PART_BYTES, 3 * PART_BYTES + 5):
        value = os.urandom(size)
        # TCPStore's set returns before the server has the value, so the other side waits for it;
        # the engine never sets a key twice.
        one.set(f"key{size}", value)
        assert wait_for(two, f"key{size}", what="the value", timeout_s=20) == value
        two.delete(f"key{size}")
        two.delete(f"key{size}")
        assert two.get(f"key{size}") is None
    assert client(port).num_keys() <= 1, "parts of a deleted value stayed behind"
    one.close()
    two.close()


def test_keys_keep_out_of_the_way_of_the_trainer(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = server
    store = client(port)
    coord = C10dCoord(store, 0, 1, timeout_s=20)
    store.set("key", "trainer")
    assert coord.get("key") is None
    coord.set("key", b"ours")
    assert store.get("key") == b"trainer"
    coord.close()


def test_a_server_that_stops_answering_ends_in_a_deadline(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = server
    coord = C10dCoord(client(port), 1, 2, timeout_s=0.5)
    coord.set("key", b"value")
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # Until it has stopped: it may still answer before.
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rank 1: .*did not answer 'get key' within 0.5 s"):
        coord.get("key")
    coord.delete("key")
    assert time.monotonic() - started < 3
    process.send_signal(signal.SIGCONT)
    coord.close()


def test_a_server_that_ended_is_reported_as_such(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = server
    coord = C10dCoord(client(port), 0, 2, timeout_s=5)
    coord.set("key", b"value")
    process.kill()
    process.wait()
    with pytest.raises(DeadlineError, match=r"key-value store (failed|did not answer)"):
        coord.get("key")
    coord.close()


def test_a_wait_is_one_request_that_keeps_no_other_call_waiting(
    server: tuple[subprocess.Popen[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    _, port = server
    one = C10dCoord(client(port), 0, 2, timeout_s=20)
    two = C10dCoord(client(port), 1, 2, timeout_s=20)
    assert two.wait("key", 0.05) is None
    assert two.wait("other", 0.05) is None
    assert two.get("absent") is None
    value = os.urandom(PART_BYTES + 7)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(two.wait, key, 60.0) for key in ("key", "other")]
        one.set("other", b"2")
        assert answers[1].result(30) == b"2"
        one.set("key", value)
        assert answers[0].result(30) == value
    assert two.get_many(["key", "other", "absent"]) == [None] * 3
    assert two.get_many(["key", "other"]) == [value, b"2"]
    assert "timed out" not in capfd.readouterr().err, "the store's client warned"
    one.close()
    two.close()


def test_more_waits_than_connections_are_kept_are_asked_for(
    server: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = server
    coord = C10dCoord(client(port), 0, 2, timeout_s=20)
    for number in range(8):
        assert coord.wait(f"key{number}", 0.01) is None
    for number in range(8):
        coord.set(f"key{number}", b"value")
        assert coord.wait(f"key{number}", 20.0) == b"value"
    coord.close()


def test_a_wait_ends_when_the_server_does(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    coord = C10dCoord(client(port), 1, 2, timeout_s=5)
    assert coord.wait("key", 0.05) is None
    process.kill()
    process.wait()
    with pytest.raises(DeadlineError, match=r"rank 1: .*key-value store failed at 'wait key'"):
        coord.wait("key", 20.0)
    coord.close()


def test_a_file_store_serves_as_well(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    one = C10dCoord(dist.FileStore(path, 2), 0, 2, timeout_s=20)
    two = C10dCoord(dist.FileStore(path, 2), 1, 2, timeout_s=20)
    assert two.get("key") is None
    one.set("key", b"\0\xff value")
    assert two.get("key") == b"\0\xff value"
    assert two.wait("key", 20.0) == b"\0\xff value"
    assert two.wait("absent", 0.05) is None
    assert two.get_many(["key", "absent"]) == [b"\0\xff value", None]
    one.close()
    two.close()


def test_one_process_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(default_coord(1.0), SingleCoord)


def test_ranks_without_torch_distributed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 4.*init_process_group"):
        default_coord(1.0)
