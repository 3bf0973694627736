"""Turn a failed system call into an error that says what failed, where, and what to do now.

Layer: storage.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from shardckpt.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEVER_FOLLOWED: Final = (
    "A part of the path is a file or a symbolic link, and links are never followed inside a store; "
    "remove it or name another store."
)
_ADVICE: Final[dict[int, str]] = {
    errno.EACCES: "Check the owner and permissions of the directory, or name another store.",
    errno.EPERM: "Check the owner and permissions of the directory, or name another store.",
    errno.EDQUOT: "Free space within the quota, keep fewer steps, or name another store.",
    errno.EEXIST: "An existing object is never overwritten; remove it, or use another name.",
    errno.EIO: "The device or its server is failing; write anew what was not acknowledged.",
    errno.ELOOP: _NEVER_FOLLOWED,
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or write fewer files at once.",
    errno.ENFILE: "The machine has too many open files; close some programs.",
    errno.ENOENT: "The directory of the store is missing or was removed while in use.",
    errno.ENOSPC: "Free space on this file system, keep fewer steps, or name another store.",
    errno.ENOTDIR: _NEVER_FOLLOWED,
    errno.EISDIR: "There is a directory where an object was expected.",
    errno.EROFS: "The file system is mounted read-only; remount it, or name another store.",
    errno.EBUSY: "A file system is mounted there; unmount it first, it is never crossed.",
    errno.ENOTEMPTY: "Something was added meanwhile; do it again.",
}


def storage_error(
    operation: str, path: str, error: OSError, advice: str | None = None
) -> StorageError:
    """Return a `StorageError` for `error`, with its `errno` kept.

    Args:
        operation: What was tried, as a verb ("write").
        path: Where.
        error: The system's error.
        advice: What to do now; by default chosen by the error number.
    """
    code = error.errno
    words = os.strerror(code) if code is not None else str(error)
    name = f" [{errno.errorcode.get(code, code)}]" if code is not None else ""
    advice = advice or _ADVICE.get(code or 0, "")
    failure = StorageError(f"cannot {operation} {path}: {words}{name}. {advice}".rstrip())
    failure.errno = code
    return failure


@contextmanager
def storage_errors(operation: str, path: str) -> Iterator[None]:
    """Raise every `OSError` of the block as a `StorageError` naming `operation` and `path`.

    Raises:
        StorageError: The block raised an `OSError`.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(operation, path, error) from error
