"""The one door to csrc: native code where it is built, else the pure path with equal bytes.

Layer: native. `SHARDCKPT_PURE_PYTHON=1` chooses the pure path.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Final

from shardckpt import pure

if TYPE_CHECKING:
    from array import array
    from types import ModuleType


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
