"""The conformance suite of storages: one test per promise of `shardckpt.storage.base`.

Layer: testing. Subclass `StorageSuite` as `Test...`, give it a `storage` fixture and the two raw
methods, and pytest runs it. Needs pytest, which only this module imports.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from abc import ABC, abstractmethod
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import pytest

from shardckpt import native
from shardckpt.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.storage.base import Storage

_MIB: Final = 1 << 20
_BAD_KEYS: Final = (
    "/etc/passwd",
    "a//b",
    "a/",
    "..",
    "a/../b",
    ".",
    "a/./b",
    ".hidden",
    "a/.hidden",
    "a b",
    "a\0b",
    "a\nb",
    "a\\b",
    "caf\u00e9",
    "n" * 201,
)


class StorageSuite(ABC):
    """What every storage must do. The raw methods go around the storage under test."""

    @abstractmethod
    def raw_set(self, storage: Storage, key: str, data: bytes) -> None:
        """Make the object `key` without the storage's own methods."""

    @abstractmethod
    def raw_get(self, storage: Storage, key: str) -> bytes | None:
        """Return the object `key`, or None, without the storage's own methods."""

    # prepare, url

    def test_preparing_twice_changes_nothing(self, storage: Storage) -> None:
        """Every rank of a job prepares the same store."""
        storage.put_if_absent("a", b"1")
        storage.prepare()
        assert storage.get("a", 9) == b"1"

    def test_the_url_says_something(self, storage: Storage) -> None:
        """Messages name the store."""
        assert storage.url

    # put_if_absent

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * _MIB + 1])
    def test_put_stores_exactly_these_bytes(self, storage: Storage, size: int) -> None:
        """Empty, unaligned and large ones alike."""
        data = random.Random(size).randbytes(size)
        assert storage.put_if_absent("dir/sub/key.json", data) is True
        assert self.raw_get(storage, "dir/sub/key.json") == data

    def test_a_second_put_returns_false_and_changes_nothing(self, storage: Storage) -> None:
        """Committed bytes are never modified."""
        assert storage.put_if_absent("k", b"first")
        assert storage.put_if_absent("k", b"second") is False
        assert self.raw_get(storage, "k") == b"first"

    def test_of_racing_puts_exactly_one_wins(self, storage: Storage) -> None:
        """The one primitive that orders and fences everything."""
        num_threads = 4
        start = threading.Barrier(num_threads)

        def put(thread: int, turn: int) -> bool:
            start.wait(30)
            return storage.put_if_absent(f"race/{turn}", f"{thread}".encode())

        with ThreadPoolExecutor(num_threads) as pool:
            for turn in range(25):
                answers = [pool.submit(put, thread, turn) for thread in range(num_threads)]
                winners = [thread for thread, won in enumerate(answers) if won.result(30)]
                assert len(winners) == 1
                assert self.raw_get(storage, f"race/{turn}") == f"{winners[0]}".encode()

    # create

    @pytest.mark.parametrize("size", [0, 1, 4096, 4097, 2 * _MIB, 17 * _MIB + 13])
    def test_a_committed_object_has_exactly_the_bytes_written(
        self, storage: Storage, size: int
    ) -> None:
        """Written in ranges of odd sizes, out of order."""
        data = random.Random(size).randbytes(size)
        memory = _Memory(data)
        writer = storage.create("step/a.shard", size)
        cuts = sorted({0, size, *(random.Random(1).randrange(size + 1) for _ in range(5))})
        ranges = list(itertools.pairwise(cuts))
        random.Random(2).shuffle(ranges)
        for start, stop in ranges:
            writer.write(start, memory.address + start, stop - start)
        writer.commit(size)
        assert self.raw_get(storage, "step/a.shard") == data

    @pytest.mark.parametrize("offset", [0, 1, 4096, 5000])
    @pytest.mark.parametrize("skew", [0, 1, 512, 4095])
    def test_any_alignment_gives_equal_bytes(
        self, storage: Storage, offset: int, skew: int
    ) -> None:
        """Of the offset, the memory and the size."""
        size = 2 * _MIB + 777
        data = random.Random(skew).randbytes(size)
        memory = _Memory(data, skew=skew)
        writer = storage.create("x", offset + size)
        writer.write(offset, memory.address, size)
        writer.commit(offset + size)
        stored = self.raw_get(storage, "x")
        assert stored is not None
        assert len(stored) == offset + size
        assert stored[offset:] == data

    def test_commit_cuts_the_object_to_its_size(self, storage: Storage) -> None:
        """The size at creation is a guess."""
        memory = _Memory(b"0123456789")
        for key, guess in (("shorter", 4), ("longer", 3 * _MIB)):
            writer = storage.create(key, guess)
            writer.write(0, memory.address, 10)
            writer.commit(7)
            assert self.raw_get(storage, key) == b"0123456"

    def test_threads_may_write_one_object_at_once(self, storage: Storage) -> None:
        """Each its own range."""
        size = 8 * _MIB
        data = random.Random(3).randbytes(size)
        memory = _Memory(data)
        writer = storage.create("many", size)
        part = size // 16
        with ThreadPoolExecutor(4) as pool:
            jobs = [
                pool.submit(writer.write, at * part, memory.address + at * part, part)
                for at in range(16)
            ]
            for job in jobs:
                job.result(30)
        writer.commit(size)
        assert self.raw_get(storage, "many") == data

    def test_creating_an_existing_key_is_an_error(self, storage: Storage) -> None:
        """However it came to exist; its bytes stay."""
        storage.put_if_absent("put", b"bytes")
        writer = storage.create("being-written", 10)
        for key in ("put", "being-written"):
            with pytest.raises(StorageError, match=key):
                storage.create(key, 10)
        writer.abort()
        assert self.raw_get(storage, "put") == b"bytes"

    def test_an_aborted_object_is_never_committed(self, storage: Storage) -> None:
        """Abort may be called twice, and after a commit changes nothing."""
        memory = _Memory(b"garbage")
        writer = storage.create("gone", 7)
        writer.write(0, memory.address, 7)
        writer.abort()
        writer.abort()
        with pytest.raises(StorageError, match="gone"):
            writer.commit(7)
        with pytest.raises(StorageError, match="gone"):
            writer.write(0, memory.address, 7)

        kept = storage.create("kept", 7)
        kept.write(0, memory.address, 7)
        kept.commit(7)
        kept.abort()
        assert self.raw_get(storage, "kept") == b"garbage"

    def test_a_committed_object_takes_no_more_writes(self, storage: Storage) -> None:
        """Neither bytes nor a second commit."""
        memory = _Memory(b"1234")
        writer = storage.create("done", 4)
        writer.write(0, memory.address, 4)
        writer.commit(4)
        with pytest.raises(StorageError, match="done"):
            writer.write(0, memory.address, 4)
        with pytest.raises(StorageError, match="done"):
            writer.commit(2)
        assert self.raw_get(storage, "done") == b"1234"

    # get

    def test_get_returns_what_is_stored(self, storage: Storage) -> None:
        """Whoever stored it."""
        self.raw_set(storage, "raw/key", b"abc")
        self.raw_set(storage, "raw/empty", b"")
        assert storage.get("raw/key", 3) == b"abc"
        assert storage.get("raw/empty", 0) == b""

    def test_an_absent_key_is_file_not_found(self, storage: Storage) -> None:
        """At any depth; and not a StorageError, which means that the store is in trouble."""
        storage.put_if_absent("there/key", b"")
        for read in (lambda key: storage.get(key, 9), storage.open):
            for key in ("absent", "there/absent", "absent/too"):
                with pytest.raises(FileNotFoundError) as caught:
                    read(key)
                assert not isinstance(caught.value, StorageError)

    def test_an_object_larger_than_allowed_is_refused_with_both_sizes(
        self, storage: Storage
    ) -> None:
        """Before memory is taken for it."""
        self.raw_set(storage, "big", b"x" * 12345)
        with pytest.raises(StorageError, match=r"(?s)big.*12345.*678"):
            storage.get("big", 678)

    def test_a_directory_is_not_an_object(self, storage: Storage) -> None:
        """And an object no directory."""
        storage.put_if_absent("dir/key", b"1")
        operations: tuple[Callable[[], object], ...] = (
            lambda: storage.get("dir", 9),
            lambda: storage.open("dir"),
            lambda: storage.create("dir", 9),
            lambda: storage.delete("dir"),
            lambda: storage.put_if_absent("dir/key/below", b""),
            lambda: storage.list("dir/key"),
        )
        for operation in operations:
            with pytest.raises(StorageError, match="dir"):
                operation()
        assert self.raw_get(storage, "dir/key") == b"1"

    # open

    def test_a_reader_fills_exactly_the_range_asked_for(self, storage: Storage) -> None:
        """Nothing before it and nothing after."""
        data = random.Random(4).randbytes(100_000)
        self.raw_set(storage, "a", data)
        reader = storage.open("a")
        assert reader.nbytes == len(data)
        for start, stop in ((0, 100_000), (0, 0), (1, 2), (4095, 8193), (99_999, 100_000)):
            memory = _Memory(b"." * (stop - start + 2))
            reader.read_into(start, memory.address + 1, stop - start)
            assert memory.bytes() == b"." + data[start:stop] + b"."
        reader.close()

    def test_reading_past_the_end_is_an_error(self, storage: Storage) -> None:
        """Never a short answer."""
        self.raw_set(storage, "a", b"12345")
        reader = storage.open("a")
        memory = _Memory(bytes(10))
        for start, nbytes in ((0, 6), (3, 3), (5, 1), (99, 1)):
            with pytest.raises(StorageError, match="a"):
                reader.read_into(start, memory.address, nbytes)
        reader.close()
        reader.close()

    def test_threads_may_read_one_object_at_once(self, storage: Storage) -> None:
        """Each its own range."""
        data = random.Random(5).randbytes(4 * _MIB)
        self.raw_set(storage, "a", data)
        memory = _Memory(bytes(len(data)))
        reader = storage.open("a")
        part = len(data) // 16
        with ThreadPoolExecutor(4) as pool:
            for job in [
                pool.submit(reader.read_into, at * part, memory.address + at * part, part)
                for at in range(16)
            ]:
                job.result(30)
        reader.close()
        assert memory.bytes() == data

    def test_what_a_reader_lends_holds_the_same_bytes(self, storage: Storage) -> None:
        """Native code reads by it, past the page cache or through it."""
        data = random.Random(6).randbytes(2 * _MIB + 5)
        self.raw_set(storage, "a", data)
        reader = storage.open("a")
        lent = reader.lend()
        if lent is not None:
            start, stop = 12_345, len(data)
            memory = _Memory(bytes(stop - start))
            piece = array("q", (start, stop - start, 0, memory.address))
            saved = _Memory(data[start:])
            row = array("q", (saved.address, stop - start, start))
            crcs = native.chunk_crcs(row, 1, _MIB)
            wanted = native.ChunkRange(start, stop, piece, array("q"), crcs, 1, _MIB)
            with lent as file:
                outcome = native.read_chunks(file.fd, file.direct_fd, file.calls, wanted)
            assert outcome == (stop, -1, 0)
            assert memory.bytes() == data[start:]
        reader.close()

    # list

    def test_a_listing_holds_the_names_directly_below_sorted(self, storage: Storage) -> None:
        """Objects and directories, each once."""
        for key in ("b/2", "b/10", "b/sub/x", "b/sub/y", "a", "bb/1"):
            self.raw_set(storage, key, b"")
        assert list(storage.list("")) == ["a", "b", "bb"]
        assert list(storage.list("b")) == ["10", "2", "sub"]
        assert list(storage.list("b/sub")) == ["x", "y"]

    def test_an_absent_prefix_is_empty(self, storage: Storage) -> None:
        """At any depth."""
        storage.put_if_absent("a/b", b"")
        for prefix in ("absent", "absent/too", "a/absent"):
            assert list(storage.list(prefix)) == []

    def test_a_listing_shows_nothing_but_what_was_put(self, storage: Storage) -> None:
        """No temporaries, of lost puts either."""
        storage.put_if_absent("roots/1", b"")
        storage.put_if_absent("roots/1", b"")
        assert list(storage.list("roots")) == ["1"]

    # sync

    def test_sync_takes_any_directory(self, storage: Storage) -> None:
        """The top, a present one, an absent one."""
        storage.put_if_absent("a/b", b"1")
        for prefix in ("", "a", "absent"):
            storage.sync(prefix)
        assert self.raw_get(storage, "a/b") == b"1"

    # delete

    def test_delete_removes_one_object_and_no_other(self, storage: Storage) -> None:
        """An absent key is fine, whatever is missing."""
        for key in ("a/1", "a/2", "a/11"):
            self.raw_set(storage, key, b"")
        storage.delete("a/1")
        storage.delete("a/1")
        storage.delete("absent/1")
        assert list(storage.list("a")) == ["11", "2"]

    def test_delete_tree_removes_everything_below_and_nothing_beside(
        self, storage: Storage
    ) -> None:
        """Twice is fine, absent is fine."""
        for key in ("step-1/a", "step-1/sub/b", "step-1/sub/deep/c", "step-10/a", "step/a"):
            self.raw_set(storage, key, b"")
        storage.delete_tree("step-1")
        storage.delete_tree("step-1")
        storage.delete_tree("absent/too")
        assert list(storage.list("")) == ["step", "step-10"]

    def test_the_whole_store_is_never_deleted_by_an_empty_prefix(self, storage: Storage) -> None:
        """An empty name is a bug of the caller."""
        storage.put_if_absent("a", b"1")
        with pytest.raises(ValueError, match="component ''"):
            storage.delete_tree("")
        assert self.raw_get(storage, "a") == b"1"

    # keys

    @pytest.mark.parametrize("key", _BAD_KEYS, ids=ascii)
    def test_a_key_that_could_leave_the_store_is_refused(self, storage: Storage, key: str) -> None:
        """By every method, as a bad argument."""
        operations: tuple[Callable[[], object], ...] = (
            lambda: storage.put_if_absent(key, b""),
            lambda: storage.create(key, 1),
            lambda: storage.get(key, 1),
            lambda: storage.open(key),
            lambda: storage.list(key),
            lambda: storage.sync(key),
            lambda: storage.delete(key),
            lambda: storage.delete_tree(key),
        )
        for operation in operations:
            with pytest.raises(ValueError, match="is not allowed"):
                operation()

    def test_every_allowed_character_and_length_works(self, storage: Storage) -> None:
        """Up to 200 characters a component."""
        key = "AZaz09._-/" + "n" * 200
        assert storage.put_if_absent(key, b"1")
        assert storage.get(key, 1) == b"1"
        assert list(storage.list("AZaz09._-")) == ["n" * 200]


class _Memory:
    """Bytes at an address, `skew` bytes past a 4 KiB boundary."""

    def __init__(self, data: bytes, *, skew: int = 0) -> None:
        self._nbytes = len(data)
        self._buffer = ctypes.create_string_buffer(len(data) + 2 * 4096)
        start = ctypes.addressof(self._buffer)
        self.address = start + -start % 4096 + skew
        ctypes.memmove(self.address, data, len(data))

    def bytes(self) -> bytes:
        """Return what is there now."""
        return ctypes.string_at(self.address, self._nbytes)
