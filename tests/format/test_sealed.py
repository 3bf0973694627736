"""A sealed document is read back whole, or refused with a typed error."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import CorruptCheckpointError, FormatError
from shardckpt.format.sealed import digest, seal, unseal


class Note(msgspec.Struct, frozen=True):
    """A document."""

    text: str
    numbers: list[int]
    sizes: dict[str, float]


NOTE = Note("a \u20ac \n \x00", [1, 2**63, -5], {"b": 0.1, "a": -0.0})


def sealed_body(body: bytes) -> bytes:
    """Return the seal of any bytes."""
    checksum = hashlib.sha256(body).hexdigest().encode()
    return b'{"sha256":"' + checksum + b'","body":' + body + b"}\n"


@given(st.builds(Note, st.text(), st.lists(st.integers(-(2**63), 2**63)), st.just({})))
def test_a_document_comes_back(note: Note) -> None:
    assert unseal(seal(note), Note, what="NOTE") == note


def test_equal_documents_have_equal_bytes_and_are_plain_json() -> None:
    other = Note(NOTE.text, list(NOTE.numbers), dict(reversed(NOTE.sizes.items())))
    assert seal(other) == seal(NOTE)
    assert seal(NOTE) == sealed_body(msgspec.json.encode(NOTE, order="deterministic"))
    assert msgspec.json.decode(seal(NOTE))["body"]["numbers"] == NOTE.numbers


def test_every_flipped_bit_is_found() -> None:
    data = seal(NOTE)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptCheckpointError, match="NOTE"):
            unseal(bytes(flipped), Note, what="NOTE")


def test_every_truncation_and_every_extension_is_found() -> None:
    data = seal(NOTE)
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            unseal(data[:length], Note, what="NOTE")
        with pytest.raises(CorruptCheckpointError):
            unseal(data[:length] + bytes(len(data) - length), Note, what="NOTE")
    for more in (b"\n", b" ", b"\x00", data):
        with pytest.raises(CorruptCheckpointError):
            unseal(data + more, Note, what="NOTE")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"text":1,"numbers":[],"sizes":{}}',
        b'{"text":"","numbers":[1.5],"sizes":{}}',
        b'{"text":"","numbers":[],"sizes":{"a":1e999}}',
        b'{"text":"","numbers":[],"sizes":{"a":NaN}}',
        b'{"text":"","numbers":[],"sizes":{"a":null}}',
        b'{"text":"","numbers":[],"sizes":{}',
        b'{"text":"","numbers":[],"sizes":{}}]',
        b'{"text":"\xff","numbers":[],"sizes":{}}',
        b'{"text":"\\ud800","numbers":[],"sizes":{}}',
        b'{"text":"","sizes":{},"numbers":' + b"[" * 100_000,
        b'{"text":"","sizes":{},"numbers":[],"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text":"","sizes":{},"numbers":[' + b"9" * 5000 + b"]}",
        b"\x80\x04K\x01.",
    ],
    ids=lambda body: body[:48].decode("ascii", "replace"),
)
def test_a_good_seal_around_nonsense_is_a_format_error(body: bytes) -> None:
    with pytest.raises(FormatError, match="NOTE"):
        unseal(sealed_body(body), Note, what="NOTE")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        unseal(data, Note, what="NOTE")


@given(st.binary(max_size=60))
def test_random_bytes_under_a_good_seal_are_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        unseal(sealed_body(body), Note, what="NOTE")


def test_the_digest_is_the_first_half_of_a_sha256() -> None:
    assert digest(b"abc") == hashlib.sha256(b"abc").hexdigest()[:32]
