"""Which names a store accepts; the same for every store, so a checkpoint can move between them.

Layer: storage.
"""

from __future__ import annotations

import re
from typing import Final

_COMPONENT: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def is_name(name: str) -> bool:
    """Return whether `name` may be one component of a key."""
    return _COMPONENT.fullmatch(name) is not None


def split_key(key: str) -> tuple[str, ...]:
    """Return the components of a key.

    Raises:
        ValueError: A component is empty, too long, begins with a dot, or has other characters.
    """
    parts = tuple(key.split("/"))
    for part in parts:
        if not is_name(part):
            raise ValueError(
                f"storage key {key!r}: component {part!r} is not allowed; a component is 1 to 200 "
                "characters of A-Z a-z 0-9 . _ - and does not begin with a dot"
            )
    return parts


def split_prefix(prefix: str) -> tuple[str, ...]:
    """Return the components of a directory key; "" is the top of the store.

    Raises:
        ValueError: As for `split_key`.
    """
    return split_key(prefix) if prefix else ()
