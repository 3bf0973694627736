"""The file calls of conversions: small text files, durable names, and a rename that commits.

Layer: convert. Orbax's own protocol needs a rename, which the engine's table of file operations
lacks on purpose; array data goes through tensorstore, which flushes what it writes.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from shardckpt.errors import CorruptCheckpointError, FormatError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_JSON_BYTES: Final = 1 << 30


def names_in(folder: Path) -> list[str]:
    """Return the names in a directory, sorted; none where it is absent or no directory.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"cannot list {folder}: {error.strerror}") from error


def is_folder(path: Path) -> bool:
    """Return whether a directory lies at `path`."""
    return path.is_dir()


def is_there(path: Path) -> bool:
    """Return whether anything lies at `path`."""
    return os.path.lexists(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CorruptCheckpointError: The file is missing or empty.
        FormatError: It is not JSON.
        StorageError: It cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise FormatError(f"{path} has more than {_MAX_JSON_BYTES} bytes; it is no metadata")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CorruptCheckpointError(
            f"{path} is missing. Without it the checkpoint cannot be read; take another step."
        ) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if not text:
        raise CorruptCheckpointError(
            f"{path} is empty (0 bytes): the machine stopped before it was on disk, though the "
            "step looks committed. Take another step."
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error


def free_bytes(path: Path) -> int:
    """Return the bytes that may still be written where `path` is or will be.

    Raises:
        StorageError: The file system does not say.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError as error:
        raise StorageError(f"cannot ask {place} for its free space: {error.strerror}") from error
    return found.f_bavail * found.f_frsize


def make_folder(path: Path) -> None:
    """Make a directory and its parents, the names durable.

    Raises:
        StorageError: It cannot be made.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            _sync_names(folder.parent)
    except OSError as error:
        raise StorageError(f"cannot make {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a new file; its bytes are durable, its name is with `sync_tree`.

    Raises:
        StorageError: It exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def sync_tree(folder: Path) -> None:
    """Make every file and name below `folder` durable.

    Raises:
        StorageError: A flush failed.
    """
    try:
        for place, _, files in os.walk(folder):
            for name in files:
                _sync(os.path.join(place, name), os.O_RDONLY)
            _sync(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StorageError(f"cannot flush {folder}: {error.strerror}") from error


def commit_folder(temporary: Path, final: Path) -> None:
    """Give a finished directory its final name, durably.

    Raises:
        StorageError: The name is taken, or the rename failed.
    """
    if is_there(final):
        raise StorageError(f"{final} exists already; it is not replaced")
    try:
        temporary.rename(final)
        _sync_names(final.parent)
    except OSError as error:
        raise StorageError(f"cannot rename {temporary} to {final}: {error.strerror}") from error


def _sync_names(folder: Path) -> None:
    _sync(str(folder), os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
