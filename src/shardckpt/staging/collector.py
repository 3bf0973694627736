"""Pause Python's cycle collector while many objects are made that all stay alive.

Layer: staging. With 20,000 arrays the collector walks a heap that holds a whole framework dozens of
times and frees nothing.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the cycle collector of the process for the block, waits for other ranks included.

    For whole loads and for what `save` does before it returns: plans of many arrays are large and
    acyclic, and a pause for parts of it would make the next part pay for all.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
