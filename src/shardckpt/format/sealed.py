"""Sealed JSON: a small document with its own SHA-256; a torn one is never believed.

Layer: format. On disk: `{"sha256":"<64 hex digits>","body":<canonical JSON>}` and one newline. The
digest is of the bytes of `body` exactly as written, so a reader hashes what it parses.
"""

from __future__ import annotations

import hashlib
from typing import Final, TypeVar

import msgspec

from shardckpt.errors import CorruptCheckpointError, FormatError

DIGEST_BYTES: Final = 16
_PREFIX: Final = b'{"sha256":"'
_MIDDLE: Final = b'","body":'
_HEX: Final = 64

T = TypeVar("T")


def digest(data: bytes) -> str:
    """Return the digest one document keeps of another: 16 bytes of SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()[: 2 * DIGEST_BYTES]


def seal(document: object) -> bytes:
    """Return the sealed bytes of a msgspec Struct or plain JSON value."""
    body = msgspec.json.encode(document, order="deterministic")
    checksum = hashlib.sha256(body).hexdigest().encode()
    return _PREFIX + checksum + _MIDDLE + body + b"}\n"


def unseal(data: bytes, kind: type[T], *, what: str) -> T:
    """Check the seal and decode the body.

    Args:
        data: The bytes of the whole file.
        kind: Type to decode into; unknown fields are ignored, wrong types refused.
        what: Name of the file for messages.

    Raises:
        CorruptCheckpointError: The checksum does not match or the frame is broken.
        FormatError: The checksum matches but the content is not what this version reads.
    """
    start = len(_PREFIX) + _HEX + len(_MIDDLE)
    if (
        len(data) < start + 2
        or not data.startswith(_PREFIX)
        or data[len(_PREFIX) + _HEX : start] != _MIDDLE
        or not data.endswith(b"}\n")
    ):
        raise CorruptCheckpointError(f"{what}: not a sealed document ({len(data)} bytes)")
    body = data[start:-2]
    said = data[len(_PREFIX) : len(_PREFIX) + _HEX].decode("ascii", "replace")
    found = hashlib.sha256(body).hexdigest()
    if said != found:
        raise CorruptCheckpointError(f"{what}: SHA-256 is {found}, the file says {said}")
    try:
        return msgspec.json.decode(body, type=kind)
    except (
        msgspec.DecodeError,
        msgspec.ValidationError,
        RecursionError,
        UnicodeDecodeError,
    ) as error:
        raise FormatError(f"{what}: {error}") from error
