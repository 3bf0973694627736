"""Whatever a map renames, transposes, reshapes, stacks or splits: the elements stay, both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import blank, cut, load, memory_of, save

from shardckpt.format.shard_file import CHUNK_BYTES
from shardckpt.geometry import factors
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.geometry.box import Box
from shardckpt.geometry.layout import MeshLayout
from shardckpt.load.maps import ModelMap, Rule, translate

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = ("float32", "int16", "float64", "uint8")


@dataclass(frozen=True)
class Case:
    """A rule, its sizes, and the same elements written by both sides."""

    model_map: ModelMap
    torch: dict[str, np.ndarray]
    jax: dict[str, np.ndarray]


@st.composite
def sides(draw: st.DrawFn, axes: list[str], named: list[str]) -> tuple[str, str, Any]:
    """Draw how one side writes the elements: name, dims, and what makes its arrays."""
    order = draw(st.permutations([axis for axis in axes if axis not in named]))
    groups: list[list[str]] = []
    for axis in order:
        if groups and draw(st.booleans()):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    if draw(st.integers(0, 4)) == 0:
        groups.insert(draw(st.integers(0, len(groups))), [])
    name = "w" + "".join(f".{{{axis}}}" for axis in named)
    dims = " ".join(f"({' '.join(group)})" if group else "1" for group in groups)

    def arrays(elements: np.ndarray, sizes: dict[str, int]) -> dict[str, np.ndarray]:
        shape = [math.prod(sizes[axis] for axis in group) for group in groups]
        found: dict[str, np.ndarray] = {}
        for index in np.ndindex(*(sizes[axis] for axis in named)):
            at = dict(zip(named, index, strict=True))
            part = np.asarray(elements[tuple(at.get(axis, slice(None)) for axis in axes)])
            rest = [axis for axis in axes if axis not in named]
            moved = part.transpose([rest.index(axis) for axis in order])
            found["w" + "".join(f".{i}" for i in index)] = np.array(moved).reshape(shape)
        return found

    return name, dims, arrays


@st.composite
def cases(draw: st.DrawFn, most: int = 5) -> Case:
    """Draw up to five axes, each in the dims or the name of either side."""
    axes = list("abcde"[: draw(st.integers(1, 5))])
    sizes = {axis: draw(st.integers(1, most)) for axis in axes}
    where = {axis: draw(st.sampled_from(["dims", "dims", "torch", "jax"])) for axis in axes}
    # At most one number of each side can be counted from the names that are there.
    names = {side: [a for a in axes if where[a] == side][:2] for side in ("torch", "jax")}
    written = {side: draw(sides(axes, names[side])) for side in names}
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(sizes.values())
    elements = np.arange(1, count + 1).astype(dtype).reshape([sizes[a] for a in axes])
    model_map = ModelMap(
        (Rule(written["torch"][0], written["jax"][0],
              f"{written['torch'][1]} -> {written['jax'][1]}"),), sizes=sizes,
    )  # fmt: skip
    return Case(
        model_map,
        {f"model/{k}": v for k, v in written["torch"][2](elements, sizes).items()},
        {f"params/{k}": v for k, v in written["jax"][2](elements, sizes).items()},
    )


@st.composite
def layouts(draw: st.DrawFn, arrays: dict[str, np.ndarray], world_size: int) -> Any:
    """Draw how every array is cut over all ranks: not, or over one dim or two."""
    found: dict[str, MeshLayout | None] = {}
    for key, value in arrays.items():
        cuts: list[tuple[int, ...]] = [()] * value.ndim
        mesh = draw(st.sampled_from([(world_size,), (1, world_size)]))
        for axis in range(len(mesh)):
            if value.ndim and draw(st.booleans()):
                dim = draw(st.integers(0, value.ndim - 1))
                cuts[dim] = (*cuts[dim], axis)
        layout = MeshLayout(mesh, tuple(range(world_size)), tuple(cuts))
        # A rank without a part leaves the key out, which numpy states of a target cannot.
        parts = [layout.box_at(layout.coordinate(r), value.shape) for r in range(world_size)]
        is_cut = value.ndim and all(part.num_elements for part in parts)
        found[key] = layout if is_cut else None
    return found


def transfer(
    case: Case, source: str, draw: Callable[[Any], Any], world_size: int, target_size: int
) -> None:
    target = "jax" if source == "torch" else "torch"
    arrays = {"torch": case.torch, "jax": case.jax}
    saved_as = draw(layouts(arrays[source], world_size))
    wanted_as = draw(layouts(arrays[target], target_size))
    store = save(source, world_size, lambda rank: cut(arrays[source], saved_as, rank))
    expected = [cut(arrays[target], wanted_as, rank) for rank in range(target_size)]
    states = [blank(cut(arrays[target], wanted_as, rank)) for rank in range(target_size)]
    stats = load(store, target, states, case.model_map)
    for state, one in zip(states, expected, strict=True):
        for key, value in one.items():
            for found, right in zip(memory_of(state[key]), memory_of(value), strict=True):
                assert found.tobytes() == right.tobytes(), key
    total = sum(value.nbytes for value in arrays[source].values())
    for one_rank in stats:
        assert one_rank.read_bytes <= total + CHUNK_BYTES * len(arrays[source])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), source=st.sampled_from(["torch", "jax"]), ranks=st.tuples(
    st.integers(1, 3), st.integers(1, 3)), data=st.data())  # fmt: skip
def test_any_rule_carries_every_element_to_its_place_in_any_layout(
    case: Case, source: str, ranks: tuple[int, int], data: st.DataObject
) -> None:
    transfer(case, source, data.draw, *ranks)


@settings(max_examples=40, deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # fmt: skip
@given(case=cases(), source=st.sampled_from(["torch", "jax"]), data=st.data())
def test_what_has_no_strides_goes_through_a_buffer_to_the_same_place(
    case: Case, source: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "MAX_BOXES", 1)
    transfer(case, source, data.draw, 2, 2)


@settings(max_examples=150, deadline=None)
@given(case=cases(most=4), data=st.data())
def test_views_are_disjoint_and_hold_just_the_box(case: Case, data: st.DataObject) -> None:
    """Each element of a box is written once, and none outside of it."""
    specs = {k[6:]: ArraySpec(v.shape, v.dtype.name) for k, v in case.torch.items()}
    made = translate(case.model_map, specs, "torch")
    assert not made.unused
    assert not made.unmade
    for name, target in made.arrays.items():
        assert target.spec.shape == case.jax[f"params/{name}"].shape
        starts = tuple(data.draw(st.integers(0, n - 1)) for n in target.spec.shape)
        lengths = tuple(
            data.draw(st.integers(1, n - start))
            for n, start in zip(target.spec.shape, starts, strict=True)
        )
        memory = np.zeros(lengths, np.int8)
        for _, link in target.sources:
            for view in factors.views(link, Box(starts, lengths), memory.strides):
                shape = view.box.shape if view.is_direct else [a[0] for a in view.axes]
                steps = view.strides_bytes if view.is_direct else [a[2] for a in view.axes]
                for index in np.ndindex(*shape):
                    at = view.offset_bytes + sum(i * s for i, s in zip(index, steps, strict=True))
                    memory.reshape(-1)[at] += 1
        assert (memory == 1).all()


def test_a_transposed_part_of_a_large_array_reads_only_its_chunks() -> None:
    weight = np.arange(4096 * 512, dtype=np.float32).reshape(4096, 512)
    store = save("torch", 1, lambda _: {"model/up.weight": weight})
    layout = MeshLayout((8,), tuple(range(8)), ((), (0,)))
    # In JAX the outputs are columns: one eighth of them is one eighth of torch's rows.
    states = [
        blank(cut({"params/up/kernel": weight.T}, {"params/up/kernel": layout}, rank))
        for rank in range(8)
    ]
    rule = Rule("up.weight", "up/kernel", "out in -> in out")
    for rank, stats in enumerate(load(store, "jax", states, ModelMap((rule,)))):
        assert stats.needed_bytes == weight.nbytes // 8
        assert stats.read_bytes <= stats.needed_bytes + 2 * CHUNK_BYTES
        part = memory_of(states[rank]["params/up/kernel"])[0]
        assert np.array_equal(part, weight.T[:, rank * 512 : rank * 512 + 512])


def test_interleaved_columns_are_read_once_and_picked_from_memory() -> None:
    gate_up = np.arange(64 * 6000, dtype=np.float32).reshape(64, 6000)
    store = save("torch", 1, lambda _: {"model/gate_up": gate_up})
    state = {"params/gate": np.zeros((64, 3000), np.float32),
             "params/up": np.zeros((64, 3000), np.float32)}  # fmt: skip
    rule = Rule("gate_up", "{p:gate,up}", "w (f p) -> w f")
    (stats,) = load(store, "jax", [state], ModelMap((rule,)))
    assert np.array_equal(state["params/gate"], gate_up[:, ::2])
    assert np.array_equal(state["params/up"], gate_up[:, 1::2])
    assert stats.read_bytes <= gate_up.nbytes + CHUNK_BYTES


def test_windows_join_parts_of_different_sizes_and_take_them_apart() -> None:
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((2 * 8 + 2 * 4 * 2, 6)).astype(np.float32)
    parts = {"params/q": fused[:16].T, "params/k": fused[16:24].T, "params/v": fused[24:].T}
    model_map = ModelMap(
        (
            Rule("qkv", "q", "out[0:16] w -> w out"),
            Rule("qkv", "k", "out[16:24] w -> w out"),
            Rule("qkv", "v", "out[24:32] w -> w out"),
        )
    )
    state = blank({key: np.ascontiguousarray(value) for key, value in parts.items()})
    load(save("torch", 1, lambda _: {"model/qkv": fused}), "jax", [state], model_map)
    for key, value in parts.items():
        assert np.array_equal(state[key], value)
    back = blank({"model/qkv": fused.copy()})
    load(save("jax", 1, lambda _: dict(state)), "torch", [back], model_map)
    assert np.array_equal(back["model/qkv"], fused)


@pytest.mark.parametrize("transactional", [False, True])
def test_a_cast_rounds_after_the_elements_are_in_place(transactional: bool) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float64).reshape(3, 4)
    state = {"params/k": np.zeros((4, 3), np.float32)}
    model_map = ModelMap((Rule("w", "k", "o i -> i o"),))
    store = save("torch", 1, lambda _: {"model/w": values})
    load(store, "jax", [state], model_map, cast=True, transactional=transactional)
    assert np.array_equal(state["params/k"], values.T.astype(np.float32))
