"""A table whose columns contradict each other is refused, whatever its digest says."""

from __future__ import annotations

from typing import Any

import pytest

from shardckpt.errors import CorruptCheckpointError, FormatError
from shardckpt.format.root import FORMAT_VERSION
from shardckpt.format.shard_file import TRAILER_BYTES, Table, decode_table, encode_tail


def decoded(**changed: Any) -> Table:
    fields: dict[str, Any] = {
        "keys": ["a", "b"], "dtypes": ["uint8"] * 2, "shapes": [[4], [4]], "key_ids": [0, 1],
        "boxes": [0, 4, 0, 4], "starts": [0, 0], "lengths": [4, 4], "offsets": [4096, 4160],
    }  # fmt: skip
    table = Table(
        format=FORMAT_VERSION, features=[], attempt="a", step=1, rank=0, world_size=1, file=0,
        crcs="", per_rank={}, **(fields | changed),
    )  # fmt: skip
    tail, digest = encode_tail(table, 8192)
    return decode_table(
        tail[:-TRAILER_BYTES], table_digest=digest, attempt="a", rank=0, file=0, what="f"
    )


def test_a_table_that_makes_sense_comes_back() -> None:
    assert decoded().offsets == [4096, 4160]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"keys": ["a", "a"]}, "lists a key twice"),
        ({"starts": [0]}, "columns differ in length"),
        ({"key_ids": [0, 2]}, "belongs to no key"),
        ({"boxes": [0, 4, 0]}, "boxes do not fit"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(
    changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(CorruptCheckpointError, match=words):
        decoded(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"shapes": [[4], [4] * 65]},
        {"shapes": [[4], [-4]]},
        {"lengths": [4, -4]},
        {"key_ids": [0, -1]},
        {"offsets": [4096, 1 << 63]},
    ],
)
def test_numbers_that_no_file_has_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=rf"f: table: .*{next(iter(changed))}"):
        decoded(**changed)
