"""Turn what a user writes as the place of a store into a `Storage`.

Layer: storage.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from shardckpt.storage.local import LocalStorage

if TYPE_CHECKING:
    from shardckpt.storage.base import Storage

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_storage(url: str | os.PathLike[str] | Storage) -> Storage:
    """Return the store at `url`; nothing is touched yet.

    Args:
        url: A path, or `file:///absolute/path`; a storage is returned as it is.

    Raises:
        ValueError: The scheme is not supported, or the URL names another machine or no path.
    """
    if not isinstance(url, (str, os.PathLike)):
        return url
    place = os.fspath(url)
    scheme = _SCHEME.match(place)
    if scheme is None:
        if not place:
            raise ValueError("the place of the store is empty; give a directory")
        return LocalStorage(place)
    if scheme[1].lower() != "file":
        raise ValueError(
            f"store {_without_credentials(place)!r}: scheme {scheme[1]!r} is not supported; give a "
            "path of a local or shared directory, or file:///absolute/path"
        )
    parsed = urlsplit(place)
    if parsed.netloc not in {"", "localhost"} or not parsed.path:
        raise ValueError(
            f"store {place!r}: a file URL names a path on this machine, as in file:///absolute/path"
        )
    return LocalStorage(unquote(parsed.path))


def _without_credentials(url: str) -> str:
    parsed = urlsplit(url)
    return f"{parsed.scheme}://{parsed.netloc.rpartition('@')[2]}{parsed.path}"
