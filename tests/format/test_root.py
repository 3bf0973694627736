"""Roots and STORE come back exactly, and what no writer of this version wrote is refused."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import CorruptCheckpointError, FormatError, StorageError
from shardckpt.format.root import (
    FORMAT_VERSION,
    MAX_ROOT_BYTES,
    Entry,
    Root,
    attempt_name,
    attempt_parts,
    decode_root,
    decode_store,
    encode_root,
    encode_store,
    root_digest,
    root_name,
    root_seq,
)
from shardckpt.format.sealed import seal


def hex32(number: int) -> str:
    """Return 32 hex digits."""
    return f"{number:032x}"


def entry(step: int, number: int = 0, **changes: Any) -> Entry:
    """Return a live step."""
    made = Entry(
        step=step,
        attempt=attempt_name(step, 1, hex32(number or step)),
        parent="",
        manifest=hex32(9),
        metrics={},
        pinned=False,
        abandoned=False,
        world_size=4,
        nbytes=1 << 40,
        saved_unix_s=1.5,
    )
    return msgspec.structs.replace(made, **changes)


def root(*live: Entry, **changes: Any) -> Root:
    """Return a root with these live steps."""
    made = Root(
        store_id=hex32(1),
        seq=7,
        epoch=2,
        kind="commit",
        writer="job on host \u20ac",
        nonce=hex32(2),
        owner=hex32(3),
        before=hex32(4),
        live=list(live),
        aborted=[],
        retired=[],
        last=("", ""),
        ever=True,
    )
    return msgspec.structs.replace(made, **changes)


ROOT = root(
    entry(5, pinned=True),
    entry(7, parent=entry(5).attempt, abandoned=True, metrics={"val_loss": 0.1}),
    entry(6, parent=entry(5).attempt),
    aborted=[entry(8).attempt],
    retired=[entry(1).attempt, entry(2).attempt],
    last=(entry(6).attempt, entry(5).attempt),
)


def read_back(value: Root) -> Root:
    """Return what a reader sees of a root."""
    return decode_root(encode_root(value), root_name(value.seq))


def test_a_root_comes_back() -> None:
    assert read_back(ROOT) == ROOT


@given(st.dictionaries(st.text(), st.floats() | st.integers(-(2**53), 2**53)))
def test_every_metric_comes_back_even_where_json_has_no_number_for_it(
    metrics: dict[str, float],
) -> None:
    (found,) = read_back(root(entry(1, metrics=metrics))).live
    assert found.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        both_nan = math.isnan(value) and math.isnan(found.metrics[name])
        assert both_nan or (found.metrics[name] == value and type(found.metrics[name]) is float)


def test_latest_and_current_follow_the_log_and_pass_over_abandoned_steps() -> None:
    assert [e.step for e in ROOT.current] == [5, 6]
    assert ROOT.latest == ROOT.live[2]
    assert root(entry(9), entry(3)).latest == entry(3)
    assert root(entry(9, abandoned=True)).latest is None
    assert ROOT.entry(entry(7).attempt) == ROOT.live[1]
    assert ROOT.entry("step") is None


def test_every_flipped_bit_is_found() -> None:
    data = encode_root(ROOT)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptCheckpointError):
            decode_root(bytes(flipped), root_name(7))


def test_a_root_under_another_number_is_refused() -> None:
    with pytest.raises(FormatError, match=r"00008\.json: holds root 7"):
        decode_root(encode_root(ROOT), root_name(8))


@pytest.mark.parametrize(
    "change",
    [
        {"live": [{"attempt": "../../etc/passwd"}]},
        {"live": [{"attempt": "step-" + "9" * 5000 + ".1." + hex32(1)}]},
        {"live": [{"attempt": entry(6).attempt, "step": 5}]},
        {"live": [{"attempt": entry(5).attempt}, {"attempt": entry(5).attempt}]},
        {"live": [{"metrics": {"a": "1.5"}}]},
        {"live": [{"metrics": {"a": None}}]},
        {"live": [{"metrics": {"a": "NaN"}}]},
        {"live": [{"step": 2**70}]},
        {"live": {}},
        {"aborted": ["roots"]},
        {"retired": ["step-000000000005.1." + "A" * 32]},
        {"retired": [""]},
        {"last": ["leases", ""]},
        {"last": [""]},
        {"kind": "rename"},
        {"seq": "7"},
        {"seq": -7},
        {"seq": 10**30},
        {"epoch": 1.5},
        {"owner": None},
    ],
    ids=lambda change: str(change)[:50],
)
def test_a_well_sealed_root_that_no_writer_made_is_refused(change: dict[str, Any]) -> None:
    raw = msgspec.to_builtins(root(entry(5)))
    live = change.get("live")
    if isinstance(live, list):
        change = {"live": [{**raw["live"][0], **fields} for fields in live]}
    with pytest.raises(FormatError, match="roots/"):
        decode_root(seal({**raw, **change}), root_name(7))


@pytest.mark.parametrize("field", Root.__struct_fields__)
def test_a_root_without_one_of_its_fields_is_refused(field: str) -> None:
    raw = msgspec.to_builtins(ROOT)
    del raw[field]
    with pytest.raises(FormatError, match=field):
        decode_root(seal(raw), root_name(7))


def test_fields_of_a_later_version_are_passed_over() -> None:
    raw = msgspec.to_builtins(ROOT)
    assert decode_root(seal({**raw, "later": {"a": [1]}}), root_name(7)) == ROOT


def test_a_root_too_large_to_be_read_is_never_written() -> None:
    fits = [entry(step) for step in range(1, 2_000)]
    assert len(encode_root(root(*fits))) <= MAX_ROOT_BYTES
    too_many = [entry(step) for step in range(1, 6_000)]
    with pytest.raises(StorageError, match=r"5999 live and 0 retired steps.*Drop steps"):
        encode_root(root(*too_many))


def test_whatever_a_commit_filled_up_a_takeover_a_drop_and_an_abort_still_fit() -> None:
    full = [entry(step) for step in range(1, 5_000)]
    while True:
        try:
            encode_root(root(*full))
            break
        except StorageError:
            del full[-50:]
    for kind in ("takeover", "maintain", "abort"):
        grown = root(*full, kind=kind, writer="w" * 1000, aborted=[entry(9_999).attempt] * 99)
        assert len(encode_root(grown)) <= MAX_ROOT_BYTES


@given(st.integers(0, 10**20 - 1))
def test_names_of_roots_sort_by_number_and_give_it_back(seq: int) -> None:
    assert root_seq(root_name(seq)) == seq
    assert root_name(seq) < root_name(seq + 1) or seq == 10**20 - 1


@pytest.mark.parametrize(
    "name", ["1.json", "0" * 20, ".tmp-0", "0" * 21 + ".json", "x" * 20 + ".json"]
)
def test_other_names_are_no_roots(name: str) -> None:
    assert root_seq(name) is None


@given(st.integers(0, 10**15), st.integers(0, 10**9))
def test_names_of_attempts_give_back_step_and_epoch(step: int, epoch: int) -> None:
    assert attempt_parts(attempt_name(step, epoch, hex32(1))) == (step, epoch)


@pytest.mark.parametrize(
    "name",
    [
        "step-1.1." + hex32(1),
        "step-000000000001.1." + "g" * 32,
        "step-000000000001.1." + hex32(1) + "\n",
        "step-000000000001.1." + hex32(1) + "/..",
        "step-000000000001.-1." + hex32(1),
        "step-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661.1."
        + hex32(1),
        "step-" + "9" * 5000 + ".1." + hex32(1),
        "roots",
    ],
)
def test_other_names_are_no_attempts(name: str) -> None:
    assert attempt_parts(name) is None


def test_store_comes_back_and_another_version_is_refused() -> None:
    assert decode_store(encode_store(hex32(5))).store_id == hex32(5)
    with pytest.raises(FormatError, match=f"format {FORMAT_VERSION + 1} .* newer shardckpt"):
        decode_store(seal({"format": FORMAT_VERSION + 1, "features": [], "store_id": hex32(5)}))
    with pytest.raises(FormatError, match="features \\['chunk-refs'\\]"):
        decode_store(seal({"format": FORMAT_VERSION, "features": ["chunk-refs"], "store_id": "a"}))
    with pytest.raises(FormatError):
        decode_store(seal({"format": FORMAT_VERSION}))
    with pytest.raises(CorruptCheckpointError):
        decode_store(encode_store(hex32(5))[:-5])


def test_the_digest_of_a_root_is_that_of_its_bytes() -> None:
    data = encode_root(ROOT)
    assert root_digest(data) == hashlib.sha256(data).hexdigest()[:32]
