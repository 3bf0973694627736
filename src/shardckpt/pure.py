"""The pure-Python path of every native call: slow, equal bytes, no dependencies.

Layer: native. Used where the extension is not built, and to check it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

_POLYNOMIAL: Final = 0x82F63B78


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
    """Return the CRC32C of `data`, continuing from `initial`."""
    crc = initial ^ 0xFFFFFFFF
    for byte in memoryview(data).cast("B"):
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def crc32c_at(address: int, nbytes: int, initial: int = 0) -> int:
    """Return the CRC32C of memory."""
    return crc32c(memory(address, nbytes), initial) if nbytes else initial


def chunk_crcs(rows: array[int], seed: int, chunk_bytes: int) -> bytes:
    """Return one little-endian u32 per chunk of every row [address, nbytes, file_offset].

    Raises:
        ValueError: The rows are no triples or hold nonsense.
    """
    if len(rows) % 3 or chunk_bytes < 1:
        raise ValueError(
            "chunk_crcs: rows are not triples [address, nbytes, file_offset], or chunk_bytes < 1"
        )
    out = bytearray()
    for i in range(0, len(rows), 3):
        address, nbytes, offset = rows[i : i + 3]
        if nbytes < 0 or offset < 0 or (address == 0 and nbytes):
            raise ValueError(f"chunk_crcs: row {i // 3} is {[address, nbytes, offset]}")
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
    if num_threads < 1:
        raise ValueError(f"copy_rows: num_threads is {num_threads}; use 1 or more")
    for destination, source, item, shape, to, by in list(_decoded(rows)):
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
    """
    view = memory(address, nbytes)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_full(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Fill memory from `offset`; fewer bytes only at the end of the file.

    Raises:
        OSError: The system refused.
    """
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


_Row: TypeAlias = "tuple[int, int, int, array[int], array[int], array[int]]"


def _decoded(rows: array[int]) -> Iterator[_Row]:
    position = 0
    while position < len(rows):
        head = rows[position : position + 4]
        if len(head) < 4 or head[2] < 1 or not 0 <= head[3] <= 32:
            raise ValueError(f"copy_rows: no row at {position}: {list(head)}")
        destination, source, item, num_dims = head
        body = rows[position + 4 : position + 4 + 3 * num_dims]
        if len(body) != 3 * num_dims or any(n < 0 for n in body[:num_dims]):
            raise ValueError(f"copy_rows: the row at {position} is cut off or has a negative size")
        position += 4 + 3 * num_dims
        shape, to, by = body[:num_dims], body[num_dims : 2 * num_dims], body[2 * num_dims :]
        yield destination, source, item, shape, to, by
