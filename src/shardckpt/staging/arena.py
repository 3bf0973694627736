"""One page-aligned host buffer per process, reused by every save.

Layer: staging. Fresh pages cost up to seconds per GiB on virtual machines, so the buffer is touched
once and kept; it grows only when the state does.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

_ALIGN_BYTES: Final = 2 << 20
_MADV_POPULATE_WRITE: Final = 23


class Arena:
    """A reusable anonymous mapping. One owner at a time: the caller orders its uses."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._map: mmap.mmap | None = None
        self._address = 0
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._nbytes

    def reserve(self, nbytes: int) -> int:
        """Return the address of at least `nbytes`, 4 KiB-aligned; contents are undefined.

        Raises:
            MemoryError: The system has no room; the old buffer is kept.
        """
        if nbytes > self._nbytes:
            size = -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
            try:
                # Private, because shared memory gets no huge pages on most machines.
                fresh = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise MemoryError(f"no room for {size} bytes of staging memory: {error}") from error
            for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK, _MADV_POPULATE_WRITE):
                try:
                    fresh.madvise(advice)
                except OSError:
                    continue  # Each is a hint: an older kernel just takes the pages later.
            # The old mapping is dropped, not closed: whoever still holds its address keeps it
            # alive.
            self._map = fresh
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(fresh))
            self._nbytes = size
        return self._address

    def release(self) -> None:
        """Give the memory back to the system."""
        self._map, self._address, self._nbytes = None, 0, 0
