"""The pure-Python path of every native call: slow, equal bytes, no dependencies.

Layer: native. Used where the extension is not built, and to check it.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import os
import struct
from array import array
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

# What native threads call; `ssize_t pread(int fd, void *data, size_t size, off_t offset)` and back.
TRANSFER_CALL: Final = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, use_errno=True
)
WAIT_CALL: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)

_POLYNOMIAL: Final = 0x82F63B78
_INT64_END: Final = 1 << 63
_MAX_DIMS: Final = 32
_MAX_THREADS: Final = 64
_PAYLOAD_FIELDS: Final = 9
_PAGE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 64 * 1024
_SLOT_BYTES: Final = 8 << 20
_MAX_STALLS: Final = 100
_MAX_RANGE_BYTES: Final = 64 << 20


class FileCalls(ctypes.Structure):
    """`shardckpt::FileOps` of csrc/core/file.h: the C functions that files are read and written by.

    A call that fails returns -1 and leaves its reason in errno.
    """

    _fields_ = (
        ("pwrite", TRANSFER_CALL),
        ("pread", TRANSFER_CALL),
        ("wait_ready", WAIT_CALL),
        # Null: writes go straight or through the page cache, and nothing else is tried.
        ("pwrite_uncached", ctypes.c_void_p),
        ("start_writeout", ctypes.c_void_p),
    )


def _make_table() -> tuple[int, ...]:
    table: list[int] = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE: Final = _make_table()


def crc32c(data: bytes | bytearray | memoryview, initial: int = 0) -> int:
    """Return the CRC32C of `data`, continuing from `initial`.

    Raises:
        BufferError: The bytes do not lie in one stretch.
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise BufferError("crc32c: the buffer is not C-contiguous; pass a copy of it.")
    crc = initial ^ 0xFFFFFFFF
    for byte in view.cast("B"):
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def crc32c_at(address: int, nbytes: int, initial: int = 0) -> int:
    """Return the CRC32C of memory.

    Raises:
        ValueError: A null address with bytes.
    """
    if address == 0 and nbytes:
        raise ValueError("crc32c_at: a null address with bytes; pass memory that exists.")
    return crc32c(memory(address, nbytes), initial) if nbytes else initial


def chunk_crcs(rows: array[int], seed: int, chunk_bytes: int) -> bytes:
    """Return one little-endian u32 per chunk of every row [address, nbytes, file_offset].

    Raises:
        ValueError: The rows are no triples or hold nonsense.
    """
    fields = _int64_fields(rows)
    if len(fields) % 3:
        raise ValueError("chunk_crcs: rows are not triples [address, nbytes, file_offset].")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_crcs: chunk_bytes is {chunk_bytes}; it must be at least 1.")
    triples = [fields[i : i + 3] for i in range(0, len(fields), 3)]
    for i, (address, nbytes, offset) in enumerate(triples):
        is_null = address == 0 and nbytes > 0
        if nbytes < 0 or offset < 0 or is_null or offset + nbytes >= _INT64_END:
            raise ValueError(
                f"chunk_crcs: row {i} is [address {address}, nbytes {nbytes}, file_offset "
                f"{offset}]; pass memory that exists and a place in a file."
            )
    out = bytearray()
    for address, nbytes, offset in triples:
        for start in range(0, nbytes, chunk_bytes):
            crc = crc32c_at(address + start, min(chunk_bytes, nbytes - start))
            place = crc32c(struct.pack("<Q", offset + start), seed)
            out += struct.pack("<I", crc ^ place)
    return bytes(out)


def copy_rows(rows: array[int], num_threads: int) -> None:
    """Copy a table of strided arrays; see `native.copy_rows`.

    Raises:
        ValueError: The table is no such encoding; nothing was copied.
    """
    if not 1 <= num_threads <= _MAX_THREADS:
        raise ValueError(
            f"copy_rows: num_threads is {num_threads}; allowed are 1 to {_MAX_THREADS}."
        )
    _copy(_int64_fields(rows), 0)


def read_chunks(
    fd: int,
    direct_fd: int,
    calls: int,
    start: int,
    stop: int,
    pieces: array[int],
    rows: array[int],
    crcs: bytes,
    seed: int,
    chunk_bytes: int,
) -> tuple[int, int, int]:
    """Read a range through the page cache, check it and put it into place.

    Raises:
        OSError: The system refused.
        ValueError: The range makes no sense.
    """
    del direct_fd
    _check_pieces(start, stop, _int64_fields(pieces), len(crcs) // 4, chunk_bytes)
    buffer = ctypes.create_string_buffer(stop - start)
    address = ctypes.addressof(buffer)
    if calls:
        got = _read_by(FileCalls.from_address(calls), fd, address, stop - start, start)
    else:
        got = read_full(fd, address, stop - start, start)
    if got < stop - start:
        return start + got, -1, 0
    return place_chunks(address, start, stop, pieces, rows, crcs, seed, chunk_bytes)


def place_chunks(
    address: int,
    start: int,
    stop: int,
    pieces: array[int],
    rows: array[int],
    crcs: bytes,
    seed: int,
    chunk_bytes: int,
) -> tuple[int, int, int]:
    """Check the chunks of a range in memory and put them into place; see `native.ChunkRange`.

    Raises:
        ValueError: The range makes no sense.
    """
    fields = _int64_fields(pieces)
    _check_pieces(start, stop, fields, len(crcs) // 4, chunk_bytes)
    for at in range(0, len(fields), 4):
        offset, nbytes, first, target = fields[at : at + 4]
        source = address + offset - start
        found = chunk_crcs(type(pieces)("q", (source, nbytes, offset)), seed, chunk_bytes)
        for chunk in range(0, len(found), 4):
            if found[chunk : chunk + 4] != crcs[4 * first + chunk : 4 * first + chunk + 4]:
                bad = offset + chunk // 4 * chunk_bytes
                return stop, bad, int.from_bytes(found[chunk : chunk + 4], "little")
        if target:
            ctypes.memmove(target, source, nbytes)
    _copy(_int64_fields(rows), address)
    return stop, -1, 0


def write_full(fd: int, address: int, nbytes: int, offset: int) -> None:
    """Write all of the memory at `offset`.

    Raises:
        OSError: The system refused.
        ValueError: No range of a file, or null memory.
    """
    _check_range("write_full", address, nbytes, offset)
    view = memory(address, nbytes)
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:  # It names no reason and would be tried for ever.
            raise OSError(errno.EIO, f"write_full at offset {offset} of fd {fd} wrote 0 bytes")
        view, offset = view[written:], offset + written


def read_full(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Fill memory from `offset`; fewer bytes only at the end of the file.

    Raises:
        OSError: The system refused.
        ValueError: No range of a file, or null memory.
    """
    _check_range("read_full", address, nbytes, offset)
    view = memory(address, nbytes)
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def _read_by(calls: FileCalls, fd: int, address: int, nbytes: int, offset: int) -> int:
    """As `read_full`, by C functions."""
    done = stalls = 0
    while done < nbytes:
        got = calls.pread(fd, address + done, nbytes - done, offset + done)
        if got > 0:
            done += got
            stalls = 0
            continue
        if got == 0:
            break
        code = ctypes.get_errno()
        stalls += 1
        if code not in (errno.EINTR, errno.EAGAIN) or stalls == _MAX_STALLS:
            raise OSError(code, os.strerror(code))
    return done


def memory(address: int, nbytes: int) -> memoryview:
    """Return a writable view of memory that the caller keeps alive."""
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


_Row: TypeAlias = "tuple[int, int, int, list[int], list[int], list[int]]"


def _int64_fields(rows: array[int]) -> list[int]:
    view = memoryview(rows)
    if view.format not in ("q", "l") or view.itemsize != 8:
        raise ValueError("rows are not 64-bit integers; pass an array('q').")
    return view.tolist()


def _check_range(operation: str, address: int, nbytes: int, offset: int) -> None:
    if offset < 0 or offset + nbytes >= _INT64_END or (address == 0 and nbytes):
        raise ValueError(
            f"{operation}: {nbytes} bytes at offset {offset} of memory at {address} is no range of "
            "a file; pass an offset >= 0 and memory that exists."
        )


def _check_pieces(
    start: int, stop: int, fields: list[int], num_crcs: int, chunk_bytes: int
) -> None:
    if len(fields) % 4:
        raise ValueError("chunks: pieces are not rows of [offset, nbytes, first_chunk, address].")
    if not 0 <= start <= stop <= start + _MAX_RANGE_BYTES or chunk_bytes < 1:
        raise ValueError(
            f"read_chunks: bytes {start} to {stop} in chunks of {chunk_bytes} are no range of at "
            f"most {_MAX_RANGE_BYTES} bytes."
        )
    for at in range(0, len(fields), 4):
        offset, nbytes, first, _ = fields[at : at + 4]
        if offset < start or nbytes < 0 or nbytes > stop - offset:
            raise ValueError(
                f"read_chunks: piece {at // 4}, {nbytes} bytes at {offset}, is not inside bytes "
                f"{start} to {stop}."
            )
        num_chunks = -(-nbytes // chunk_bytes)
        if first < 0 or first > num_crcs - num_chunks:
            raise ValueError(
                f"read_chunks: piece {at // 4} has {num_chunks} chunks from {first}, there are "
                f"{num_crcs} checksums."
            )


def _copy(fields: list[int], src_base: int) -> None:
    # All rows are checked before the first byte moves.
    for destination, source, item, shape, to, by in list(_decoded(fields, src_base)):
        if 0 in shape:
            continue
        inner = item
        dims = len(shape)
        while dims and to[dims - 1] == inner and by[dims - 1] == inner:
            inner *= shape[dims - 1]
            dims -= 1
        for index in itertools.product(*(range(n) for n in shape[:dims])):
            ctypes.memmove(
                destination + sum(i * s for i, s in zip(index, to[:dims], strict=True)),
                source + sum(i * s for i, s in zip(index, by[:dims], strict=True)),
                inner,
            )


def _decoded(fields: list[int], src_base: int) -> Iterator[_Row]:
    position = 0
    row = 0
    while position < len(fields):
        head = fields[position : position + 4]
        if len(head) < 4 or head[2] < 1 or not 0 <= head[3] <= _MAX_DIMS:
            raise ValueError(
                f"copy_rows: row {row} begins {head}; it needs address, address, "
                f"itemsize >= 1, ndim 0 to {_MAX_DIMS}."
            )
        head[1] += src_base
        destination, source, item, num_dims = head
        body = fields[position + 4 : position + 4 + 3 * num_dims]
        if len(body) != 3 * num_dims:
            raise ValueError(
                f"copy_rows: row {row}: ndim {num_dims} needs {3 * num_dims} more "
                f"fields, the table has {len(body)} left."
            )
        shape, to, by = body[:num_dims], body[num_dims : 2 * num_dims], body[2 * num_dims :]
        _check_row(row, head, shape, to, by)
        yield destination, source, item, shape, to, by
        position += 4 + 3 * num_dims
        row += 1


def _check_row(row: int, head: list[int], shape: list[int], to: list[int], by: list[int]) -> None:
    for dim, (size, *strides) in enumerate(zip(shape, to, by, strict=True)):
        is_wild = any(not -_INT64_END <= size * stride < _INT64_END for stride in strides)
        if size < 0 or is_wild or (size > 1 and strides[0] == 0 and 0 not in shape):
            raise ValueError(
                f"copy_rows: row {row}: dim {dim} has size {size} and strides {strides}; sizes are "
                ">= 0, a destination must not overwrite itself, and all must fit into memory."
            )
    if 0 in shape:
        return
    if head[2] * math.prod(shape) >= _INT64_END:
        raise ValueError(f"copy_rows: row {row}: more than 2^63 bytes.")
    if 0 in head[:2]:
        raise ValueError(f"copy_rows: row {row}: a null address with bytes to copy.")


class Engine:
    """The staging engine without threads: `begin` copies everything, `attach` writes it.

    Same calls and bytes as the compiled one; memory is that of the saves in flight.
    """

    def __init__(self, num_copy_threads: int, num_flush_threads: int, cpus: list[int]) -> None:
        """Start with nothing in flight; the arguments are for threads, of which there are none."""
        del num_copy_threads, num_flush_threads, cpus
        self._tickets: dict[int, _Ticket] = {}
        self._next = 1
        self._nbytes = 0
        self._written_bytes = 0

    def close(self, timeout_ms: int) -> bool:
        """Forget everything."""
        del timeout_ms
        self._tickets.clear()
        return True

    def reserve(self, nbytes: int, most_bytes: int = 0) -> None:
        """Note how much memory saves may take."""
        self._nbytes = max(self._nbytes, nbytes, most_bytes)

    def begin(
        self,
        rows: array[int],
        file_bytes: array[int],
        check_all: bool,
        streams: array[int] | None = None,
    ) -> int:
        """Copy every payload of the table; see `shardckpt/csrc/core/ticket.h` for its rows.

        Raises:
            ValueError: The table is no such encoding.
        """
        del check_all, streams  # Nothing runs beside the copy.
        ticket = _Ticket([bytearray(nbytes) for nbytes in file_bytes], [[] for _ in file_bytes])
        fields = _int64_fields(rows)
        position = 0
        while position < len(fields):
            head = fields[position : position + _PAYLOAD_FIELDS]
            if len(head) < _PAYLOAD_FIELDS or not 0 <= head[8] <= _MAX_DIMS * 2:
                raise ValueError(f"payload row {head} is cut; this is an error of the caller.")
            source, nbytes, file, offset, _, _, start, item, num_dims = head
            body = fields[position + _PAYLOAD_FIELDS :][: 2 * num_dims]
            image = memoryview(ticket.images[file])[offset : offset + nbytes]
            if num_dims == 0:
                image[:] = memory(source, nbytes)
            else:
                shape, strides = body[:num_dims], body[num_dims:]
                image[:] = _c_order(source, shape, strides, item)[start : start + nbytes]
            ticket.payloads[file].append((offset, nbytes))
            position += _PAYLOAD_FIELDS + 2 * num_dims
        number, self._next = self._next, self._next + 1
        self._tickets[number] = ticket
        return number

    def wait_staged(
        self, ticket: int, group: int, timeout_ms: int, streams: array[int] | None = None
    ) -> bool:
        """Return True: `begin` copied everything."""
        del ticket, group, timeout_ms, streams
        return True

    def pin_problem(self) -> str:
        """Return "": there is no device."""
        return ""

    def attach(self, ticket: int, file: int, fd: int, direct_fd: int, calls: int) -> None:
        """Write a file's payloads."""
        del direct_fd
        image = self._tickets[ticket].images[file]
        start = _PAGE_BYTES
        address = _address_of(image) + start
        nbytes = len(image) - start
        code, words = 0, ""
        if nbytes and calls:
            if FileCalls.from_address(calls).pwrite(fd, address, nbytes, start) < 0:
                code = ctypes.get_errno()
        elif nbytes:
            try:
                write_full(fd, address, nbytes, start)
            except OSError as error:
                code, words = error.errno or errno.EIO, str(error)
        if code:
            self._tickets[ticket].failure = ("write", -1, file, code, words)
        self._written_bytes += nbytes

    def wait_flushed(self, ticket: int, file: int, timeout_ms: int) -> bool:
        """Return True: `attach` wrote everything."""
        del ticket, file, timeout_ms
        return True

    def take(self, ticket: int, file: int, timeout_ms: int) -> tuple[int, int, int, int] | None:
        """Return the file's payloads as one extent, once: (extent, address, nbytes, offset)."""
        del timeout_ms
        held = self._tickets[ticket]
        image = held.images[file]
        if file in held.taken or len(image) == _PAGE_BYTES:
            return None
        held.taken.add(file)
        return file, _address_of(image) + _PAGE_BYTES, len(image) - _PAGE_BYTES, _PAGE_BYTES

    def give(self, ticket: int, extent: int) -> None:
        """Take note that an extent was written."""
        self._written_bytes += len(self._tickets[ticket].images[extent])

    def chunk_crcs(self, ticket: int, file: int, seed: int) -> bytes:
        """Return the checksums of a file's chunks."""
        held = self._tickets[ticket]
        address = _address_of(held.images[file])
        triples = [n for at, nbytes in held.payloads[file] for n in (address + at, nbytes, at)]
        return chunk_crcs(array("q", triples), seed, _CHUNK_BYTES)

    def failure(self, ticket: int) -> tuple[str, int, int, int, str]:
        """Return kind ("" none), payload, file, errno and message of a save's first failure."""
        held = self._tickets.get(ticket)
        return ("", -1, -1, 0, "") if held is None else held.failure

    def cancel(self, ticket: int, why: str) -> None:
        """End a save early."""
        if ticket in self._tickets:
            self._tickets[ticket].failure = ("cancelled", -1, -1, 0, why)

    def release(self, ticket: int, timeout_ms: int) -> bool:
        """Forget a save."""
        del timeout_ms
        self._tickets.pop(ticket, None)
        return True

    def set_rate(self, bytes_per_s: int) -> None:
        """Do nothing: there is no thread to slow down."""

    def set_paused(self, is_paused: bool) -> None:
        """Do nothing: there is no thread to pause."""

    def stats(self) -> tuple[int, int, int]:
        """Return slots of 8 MiB, slots free, and bytes written so far."""
        num_slots = -(-self._nbytes // _SLOT_BYTES)
        return num_slots, num_slots, self._written_bytes


class _Ticket:
    def __init__(self, images: list[bytearray], payloads: list[list[tuple[int, int]]]) -> None:
        self.images = images
        self.payloads = payloads
        self.taken: set[int] = set()
        self.failure: tuple[str, int, int, int, str] = ("", -1, -1, 0, "")


def memory_limit() -> int:
    """Return the bytes of memory this machine has; the compiled path knows control groups, too."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_NO_CUDA: Final = "CUDA arrays need the compiled extension, which this process does not use."


def cuda_probe() -> tuple[int, int, str]:
    """Return that there is no CUDA on this path."""
    return 0, 0, _NO_CUDA


class DeviceStage:
    """What CUDA arrays would be copied by."""

    def __init__(self, ordinal: int, piece_bytes: int, num_in_flight: int) -> None:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(_NO_CUDA)


def _address_of(image: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(image))


def _c_order(source: int, shape: list[int], strides: list[int], item: int) -> bytes:
    """Return the bytes of a strided array in C order."""
    return b"".join(
        bytes(memory(source + sum(i * s for i, s in zip(index, strides, strict=True)), item))
        for index in itertools.product(*(range(n) for n in shape))
    )
