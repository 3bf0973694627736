"""Boxes, layouts, runs and coverage against numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.geometry.box import Box, whole
from shardckpt.geometry.flat import ranges_to_boxes
from shardckpt.geometry.layout import MeshLayout
from shardckpt.geometry.regions import coverage_problem
from shardckpt.geometry.runs import element_runs, inner_run, single_run

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, n)) for n in shape]
    return Box(
        tuple(starts),
        tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, starts, strict=True)),
    )


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(box.offsets, box.stop, strict=True))


def index_array(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


@given(st.data(), shapes)
def test_runs_are_exactly_the_elements_of_a_box(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    box = data.draw(boxes_in(shape))
    expected = index_array(shape)[slices(box)].ravel().tolist()
    runs = list(element_runs(box, shape))
    assert [i for a, b in runs for i in range(a, b)] == expected
    assert (
        all(b < c for (_, b), (c, _) in itertools.pairwise(runs)) or inner_run(box, shape)[1] <= 1
    )
    single = single_run(box, shape)
    if single is not None and expected:
        assert list(range(*single)) == expected


@given(st.data(), shapes)
def test_flat_ranges_are_cut_into_boxes_in_order(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    boxes = ranges_to_boxes(start, stop, shape)
    found = [i for box in boxes for i in index_array(shape)[slices(box)].ravel().tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@st.composite
def mesh_layouts(draw: st.DrawFn) -> tuple[MeshLayout, tuple[int, ...]]:
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    axes = draw(st.permutations(range(len(mesh))))
    cuts: list[list[int]] = [[] for _ in shape]
    for axis in axes[: draw(st.integers(0, len(axes)))]:
        cuts[draw(st.integers(0, len(shape) - 1))].append(axis)
    ranks = draw(st.permutations(range(math.prod(mesh))))
    return MeshLayout(mesh, tuple(ranks), tuple(tuple(c) for c in cuts)), shape


@given(mesh_layouts())
def test_every_layout_covers_its_array_once_per_replica(
    case: tuple[MeshLayout, tuple[int, ...]],
) -> None:
    layout, shape = case
    counts = np.zeros(shape, int)
    for rank in layout.ranks:
        coordinate = layout.coordinate(rank)
        assert coordinate is not None
        counts[slices(layout.box_at(coordinate, shape))] += 1
    assert (counts == layout.num_replicas).all()


@given(st.data(), mesh_layouts())
def test_shards_that_touch_a_box_are_found_with_the_ranks_that_hold_them(
    data: st.DataObject, case: tuple[MeshLayout, tuple[int, ...]]
) -> None:
    layout, shape = case
    wanted = data.draw(boxes_in(shape))
    expected: dict[Box, dict[int, int]] = {}
    for rank in layout.ranks:
        coordinate = layout.coordinate(rank)
        assert coordinate is not None
        box = layout.box_at(coordinate, shape)
        if box.intersect(wanted) is not None:
            expected.setdefault(box, {})[layout.replica_index(coordinate)] = rank
    found = {
        box: dict(enumerate(ranks))
        for box, ranks in layout.shards_touching(wanted, shape)
        if box.intersect(wanted) is not None
    }
    assert found == expected


@given(st.data(), shapes.filter(lambda s: math.prod(s) > 1))
def test_a_gap_or_an_overlap_is_a_coverage_problem(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    middle = data.draw(st.integers(1, math.prod(shape) - 1))
    first = ranges_to_boxes(0, middle, shape)
    second = ranges_to_boxes(middle, math.prod(shape), shape)
    assert coverage_problem(shape, [*first, *second]) is None
    assert coverage_problem(shape, first) is not None
    assert coverage_problem(shape, [*first, *second, first[0]]) is not None


def test_boxes_outside_the_array_are_a_coverage_problem() -> None:
    assert coverage_problem((2, 2), [Box((0, 0), (2, 3))]) is not None
    assert coverage_problem((), [whole(())]) is None
    assert coverage_problem((), []) is not None


@pytest.mark.parametrize(
    ("mesh", "ranks", "cuts"),
    [((2,), (0,), ()), ((2,), (0, 0, 0), ()), ((2,), (0, 1), ((1,),)), ((2, 1), (0, 1), ((0, 0),))],
)
def test_a_mesh_that_contradicts_itself_is_refused(
    mesh: tuple[int, ...], ranks: tuple[int, ...], cuts: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ValueError, match="mesh"):
        MeshLayout(mesh, ranks, cuts)
