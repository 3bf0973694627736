"""The one door to csrc: native code where it is built, else the pure path with equal bytes.

Layer: native. `SHARDCKPT_PURE_PYTHON=1` chooses the pure path.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from shardckpt import pure

if TYPE_CHECKING:
    from array import array
    from types import ModuleType

    from shardckpt._native import DeviceStage as DeviceStage
    from shardckpt._native import Engine as Engine


class ChunkRange(NamedTuple):
    """Bytes of one file: what is read, what it must be, and where it goes.

    Attributes:
        start: First byte in the file.
        stop: One past the last; at most 64 MiB further.
        pieces: `array('q')` of [file_offset, nbytes, first_chunk, address] per stretch of whole
            chunks: `first_chunk` is the position of its first checksum in `crcs`, `address` is
            where its bytes go, or 0 where `rows` take them.
        rows: Table for `copy_rows` whose src_address counts from `start`; copied when every chunk
            has passed.
        crcs: One little-endian u32 per chunk of the file, as `chunk_crcs` gives them.
        seed: See `chunk_crcs`.
        chunk_bytes: Bytes of a chunk; the last one of a piece may be short.
    """

    start: int
    stop: int
    pieces: array[int]
    rows: array[int]
    crcs: bytes
    seed: int
    chunk_bytes: int


class ChunkOutcome(NamedTuple):
    """What became of a range.

    Attributes:
        end: `stop`, or where the file ended before it.
        bad_offset: Place in the file of the first chunk that is not as it was saved; -1 for none.
        found_crc: What its checksum is now.
    """

    end: int
    bad_offset: int
    found_crc: int


def _load() -> ModuleType | None:
    if os.environ.get("SHARDCKPT_PURE_PYTHON", "") not in ("", "0"):
        return None
    # Only an extension that is not there means the pure path: one that is there but does not load
    # (a half-written file) must say so, not make every save a thousand times slower.
    if importlib.util.find_spec("shardckpt._native") is None:
        return None
    from shardckpt import _native

    return _native


_module = _load()
IS_NATIVE: Final = _module is not None
_impl: Final = pure if _module is None else _module


def crc32c(data: bytes | bytearray | memoryview, initial: int = 0) -> int:
    """Return the CRC32C of `data`, continuing from `initial`, the CRC before it."""
    value: int = _impl.crc32c(data, initial)
    return value


def crc32c_at(address: int, nbytes: int, initial: int = 0) -> int:
    """Return the CRC32C of `nbytes` of memory at `address`, continuing from `initial`."""
    value: int = _impl.crc32c_at(address, nbytes, initial)
    return value


def chunk_crcs(rows: array[int], seed: int, chunk_bytes: int) -> bytes:
    """Return one little-endian u32 per chunk: its CRC32C XOR the CRC32C of its place.

    Args:
        rows: `array('q')` of [address, nbytes, file_offset] per piece of memory.
        seed: CRC that names the file; the place is the CRC of the chunk's file offset continued
            from it.
        chunk_bytes: Bytes of a chunk; the last one of a row may be short.

    Raises:
        ValueError: The rows are no triples or hold nonsense.
    """
    value: bytes = _impl.chunk_crcs(rows, seed, chunk_bytes)
    return value


def copy_rows(rows: array[int], num_threads: int) -> None:
    """Copy a table of strided arrays.

    Args:
        rows: `array('q')`, per array [dst_address, src_address, itemsize_bytes, ndim, shape[ndim],
            dst_strides_bytes[ndim], src_strides_bytes[ndim]].
        num_threads: Threads that copy, 1 to 64.

    Raises:
        ValueError: The table is no such encoding; nothing was copied.
    """
    _impl.copy_rows(rows, num_threads)


def read_chunks(fd: int, direct_fd: int, calls: int, wanted: ChunkRange) -> ChunkOutcome:
    """Read a range, check every chunk of it and put it into place; without the GIL.

    What is checked is what is placed. Bytes in the page cache are taken from there, others past it.
    Stops at the first chunk that is wrong or missing: the places may then hold anything.

    Args:
        fd: Descriptor of the file.
        direct_fd: The same file opened with O_DIRECT; -1 where it cannot be.
        calls: Address of the `pure.FileCalls` to read by; 0 for the system's own.
        wanted: What to read and where it goes.

    Raises:
        OSError: The system refused.
        ValueError: The range makes no sense; nothing was touched.
    """
    return ChunkOutcome(*_impl.read_chunks(fd, direct_fd, calls, *wanted))


def place_chunks(address: int, wanted: ChunkRange) -> ChunkOutcome:
    """As `read_chunks`, for a range that is in memory already, its first byte at `address`.

    Raises:
        ValueError: The range makes no sense; nothing was touched.
    """
    return ChunkOutcome(*_impl.place_chunks(address, *wanted))


def write_full(fd: int, address: int, nbytes: int, offset: int) -> None:
    """Write `nbytes` of memory at `offset`, carrying on after short writes; without the GIL.

    Raises:
        OSError: The system refused; any part may be written.
    """
    _impl.write_full(fd, address, nbytes, offset)


def read_full(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Fill memory from `offset`; returns fewer bytes only at the end of the file.

    Raises:
        OSError: The system refused.
    """
    value: int = _impl.read_full(fd, address, nbytes, offset)
    return value


def memory_limit() -> int:
    """Return how many bytes of memory this process may use: its control group's limit, or all."""
    value: int = _impl.memory_limit()
    return value


def staging_engine(num_copy_threads: int, num_flush_threads: int, cpus: list[int]) -> Engine:
    """Start a staging engine: copies arrays and writes them to files in threads of its own.

    Calls, all but `set_*` and `stats` without the GIL:

    - `reserve(nbytes, most_bytes)` grows its memory, and lets it grow further: whoever waits for a
      copy adds to it rather than wait for the disk. OSError where there is no room.
    - `begin(rows, file_bytes, check_all, streams)` queues a save and returns its ticket. `rows`: an
      `array('q')` with, per payload in file order, [source_address, nbytes, file, file_offset,
      group, CUDA device or -1, first byte in C order (of strided arrays), itemsize_bytes, ndim (0:
      contiguous), shape[ndim], strides_bytes[ndim]]; `streams` pairs of device and the stream on
      which its arrays are used.
    - `wait_staged(ticket, group, timeout_ms, streams)` copies with the others until nothing reads
      arrays of `group` (-1: any) any more; False after the timeout, with 0 it only looks. With
      `streams` the host does not wait for devices: what comes next on those streams does.
    - `attach(ticket, file, fd, direct_fd, calls)` gives a file to the flush threads (`calls`: the
      address of a `pure.FileCalls`, or 0), `wait_flushed(ticket, file, timeout_ms)` waits for them.
    - `take(ticket, file, timeout_ms)` lends a staged extent instead: (extent, address, nbytes,
      file_offset); nbytes 0: none is ready; None: no more. `give(ticket, extent)` returns it.
    - `chunk_crcs(ticket, file, seed)` is as above, for the chunks of a written file.
    - `failure(ticket)`: (kind, payload, file, errno, message); kind is "" for none, "torn", "gone",
      "write" or "cancelled".
    - `release(ticket, timeout_ms)` forgets a save; False where a write of it still runs.

    Args:
        num_copy_threads: Threads that copy; whoever waits helps them.
        num_flush_threads: Threads that write, at low priority.
        cpus: Processors they may run on; empty for all.

    Raises:
        OSError: The system gives no threads.
    """
    engine: Engine = _impl.Engine(num_copy_threads, num_flush_threads, cpus)
    return engine


def cuda_probe() -> tuple[int, int, str]:
    """Look for the CUDA driver, without making a context.

    Returns:
        (version, as 12040 for CUDA 12.4; devices that this process sees; what is wrong, or "").
    """
    value: tuple[int, int, str] = _impl.cuda_probe()
    return value


def device_stage(ordinal: int, piece_bytes: int, num_in_flight: int) -> DeviceStage:
    """Open a stage that copies from one CUDA device to host memory, in a thread of its own.

    Calls, all without the GIL, streams as the framework numbers them:

    - `pin(address, nbytes)` locks host memory (MemoryError: not allowed; unpinned memory works,
      too, but slower), `unpin(address)` waits for copies and unlocks it.
    - `after(stream)`: copies added from now on see what is queued on the stream now. ValueError
      where the stream captures a graph.
    - `add(rows)` queues copies; `rows` is an `array('q')` of [dst_address, src_address, nbytes].
      The caller keeps both ends alive until `wait` returned.
    - `fence(stream)` submits what is left and makes the stream wait for all copies; it returns at
      once.
    - `wait(timeout_ms)` waits for what was added; TimeoutError, or RuntimeError for the first error
      of the device.
    - `close(timeout_ms)` ends what was not submitted; False where the device hangs.

    Args:
        ordinal: The device, as CUDA numbers those that this process sees.
        piece_bytes: Bytes that are submitted at once.
        num_in_flight: Pieces at the device at a time; with 1 there is a gap between them, for the
            copies of others.

    Raises:
        RuntimeError: No driver, or it fails.
        ValueError: No such device.
    """
    stage: DeviceStage = _impl.DeviceStage(ordinal, piece_bytes, num_in_flight)
    return stage
