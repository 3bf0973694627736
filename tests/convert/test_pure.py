"""The pure parts: boxes, chunks, keys."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from shardckpt.convert.boxes import boxes_along_chunks, chunk_shape
from shardckpt.convert.paths import key_of, path_of, roles_of, sequences_of
from shardckpt.geometry.layout import MeshLayout
from shardckpt.geometry.regions import coverage_problem

DIMS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), max_size=3)


@given(DIMS, st.integers(1, 4000))
def test_boxes_cover_the_array_once_in_whole_chunks_within_the_bound(
    dims: list[tuple[int, int]], max_bytes: int
) -> None:
    shape, chunk = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
    boxes = boxes_along_chunks(shape, chunk, 4, max_bytes)
    if shape:
        assert coverage_problem(shape, boxes) is None
    one = math.prod(min(c, n) for c, n in zip(chunk, shape, strict=True)) * 4
    for box in boxes:
        assert box.num_elements * 4 <= max(max_bytes, one)
        assert all(o % c == 0 for o, c in zip(box.offsets, chunk, strict=True))


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 7), st.integers(16, 4000))
def test_chunks_never_exceed_the_bound(rows: int, columns: int, ranks: int, bound: int) -> None:
    layout = MeshLayout((ranks,), tuple(range(ranks)), ((0,),))
    chunk = chunk_shape((rows, columns), layout, 4, bound)
    assert math.prod(chunk) * 4 <= bound
    assert chunk[0] <= -(-rows // ranks)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_a_key_says_its_path_exactly(path: list[str]) -> None:
    assert path_of(key_of(path)) == tuple(path)


def test_moments_are_known_by_both_names_together() -> None:
    paths = [
        ("params", "mu"),
        ("opt", "0", "mu", "w"),
        ("opt", "0", "nu", "w"),
        ("opt", "0", "count"),
    ]
    assert list(roles_of(paths).values()) == ["param", "adam_m", "adam_v", "count"]


def test_numbers_with_a_gap_are_no_sequence() -> None:
    paths = [("a", "0"), ("a", "1"), ("b", "0"), ("b", "2")]
    assert sequences_of(paths) == {("a",)}
