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
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from array import array
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


class FileCalls(ctypes.Structure):
    """`shardckpt::FileOps` of csrc/core/file.h: the C functions that files are read and written by.

    A call that fails returns -1 and leaves its reason in errno.
    """

    _fields_ = (
        ("pwrite", TRANSFER_CALL),
        ("pread", TRANSFER_CALL),
        ("wait_ready", WAIT_CALL),
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
    # All rows are checked before the first byte moves.
    for destination, source, item, shape, to, by in list(_decoded(_int64_fields(rows))):
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


def _decoded(fields: list[int]) -> Iterator[_Row]:
    position = 0
    row = 0
    while position < len(fields):
        head = fields[position : position + 4]
        if len(head) < 4 or head[2] < 1 or not 0 <= head[3] <= _MAX_DIMS:
            raise ValueError(
                f"copy_rows: row {row} begins {head}; it needs address, address, "
                f"itemsize >= 1, ndim 0 to {_MAX_DIMS}."
            )
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
