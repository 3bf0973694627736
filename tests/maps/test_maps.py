"""A map that contradicts itself, the checkpoint or the state says so, and names both sides."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import blank, load, save

from shardckpt import ModelMap, ModelMapError, Rule, StateMismatchError

UP = Rule("layers.{i}.up.weight", "layers/{i}/up/kernel", "out in -> in out")


def weights(*names: str, shape: tuple[int, ...] = (3, 2)) -> dict[str, np.ndarray]:
    return {n: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i
            for i, n in enumerate(names)}  # fmt: skip


def problems(
    saved: dict[str, np.ndarray], target: dict[str, np.ndarray], *rules: Rule, **fields: object
) -> str:
    store = save("torch", 1, lambda _: dict(saved))
    state = blank(target)
    before = {key: value.tobytes() for key, value in state.items()}
    with pytest.raises(StateMismatchError) as raised:
        load(store, "jax", [state], ModelMap(rules, **fields))  # type: ignore[arg-type]
    assert {key: value.tobytes() for key, value in state.items()} == before
    return "\n".join(raised.value.problems)


def test_json_keeps_a_map() -> None:
    model_map = ModelMap((UP,), sizes={"h": 4}, torch="net", ignore=("ema/*",))
    assert ModelMap.from_json(model_map.to_json()) == model_map


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not the JSON of a model map"),
        ('{"rules": [], "code": "import os"}', "unknown field"),
        ('{"rules": [{"torch": "a", "jax": "b", "dims": "x"}]}', "torch dims -> jax dims"),
    ],
)
def test_what_is_no_map_is_refused(text: str, words: str) -> None:
    with pytest.raises(ModelMapError, match=words):
        ModelMap.from_json(text)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("a", "b", "x y -> x"), "y: on one side only"),
        (("a", "b", "x x -> x"), "x: twice"),
        (("a.{i}", "b"), "in one name only"),
        (("a.{i}", "b", "x -> x"), "i: on one side only"),
        (("a.{i}.{i}", "b/{i}"), "twice in"),
        (("{p:q,k}", "{p:q,k,v}"), "2 words on one side, 3 on the other"),
        (("{p:q,q}", "{p}"), "empty or equal"),
        (("a.{0}", "b"), "is no name"),
        (("", "b"), "is no name"),
        (("a", "b", "x -> x!"), "cannot read dims"),
        (("a", "b", "(3 x) -> x"), "'3' is no axis"),
        (("a", "b", "x[4:4] -> x"), "is empty"),
    ],
)
def test_a_malformed_rule_is_named(rule: tuple[str, ...], words: str) -> None:
    with pytest.raises(ModelMapError, match=words):
        ModelMap((Rule(*rule),))


def test_sizes_and_names_are_checked() -> None:
    with pytest.raises(ModelMapError, match="h must be at least 1"):
        ModelMap((), sizes={"h": 0})
    with pytest.raises(ModelMapError, match="is empty"):
        ModelMap((), torch="")


def test_arrays_that_the_map_forgets_are_all_named() -> None:
    found = problems(
        weights("model/layers.0.up.weight", "model/one", "model/two"),
        weights("params/layers/0/up/kernel", "params/three", shape=(2, 3)),
        UP,
    )
    assert "'one' (float32[3, 2]): saved, but no rule names it" in found
    assert "'two'" in found
    assert "'params/three': not in the checkpoint" in found


def test_an_array_that_two_rules_use_is_named_on_both_sides() -> None:
    found = problems(
        weights("model/a"), weights("params/b", "params/c"), Rule("a", "b"), Rule("a", "c")
    )
    assert "'a' (float32[3, 2]): the rules do not use it exactly once" in found
    found = problems(
        weights("model/a", "model/c"), weights("params/b"), Rule("a", "b"), Rule("c", "b")
    )
    assert "'b' cannot be made of 'a', 'c'" in found
    assert "overlap" in found


def test_another_size_names_both_sides() -> None:
    found = problems(weights("model/layers.0.up.weight"), weights("params/layers/0/up/kernel"), UP)
    assert found.startswith("'params/layers/0/up/kernel' (saved as 'model/layers.0.up.weight')")
    assert "float32[2, 3], target is float32[3, 2]" in found


def test_a_missing_layer_of_a_stack_is_named() -> None:
    found = problems(
        weights("model/layers.0.up.weight", "model/layers.2.up.weight"),
        {"params/up": np.zeros((3, 2, 3), np.float32)},
        Rule("layers.{i}.up.weight", "up", "out in -> i in out"),
    )
    assert "2 of 3 arrays of rule" in found
    assert "'params/up': not in the checkpoint" in found


def test_layers_of_different_dtypes_do_not_stack() -> None:
    saved = weights("model/layers.0.up.weight", "model/layers.1.up.weight")
    saved["model/layers.1.up.weight"] = saved["model/layers.1.up.weight"].astype(np.float64)
    found = problems(
        saved, {"params/up": np.zeros((2, 2, 3), np.float32)},
        Rule("layers.{i}.up.weight", "up", "out in -> i in out"),
    )  # fmt: skip
    assert "saved as float32 and float64" in found


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ("(h d) in -> in h d", "does not tell the sizes of h, d"),
        ("(two d) in -> in two d", "3 of 3 indexes do not divide into two=2 x d"),
        ("x -> x", "is about 1 dims"),
        ("x[0:9] y -> x y", "9 of 3 indexes do not divide"),
        ("x[0:2] y -> x y", "the boxes hold 4 of 6 elements"),
    ],
)
def test_a_rule_that_does_not_fit_an_array_is_named(dims: str, words: str) -> None:
    found = problems(
        weights("model/a"), weights("params/b"), Rule("a", "b", dims), sizes={"two": 2}
    )
    assert words in found


def test_a_checkpoint_of_the_own_framework_needs_no_map() -> None:
    store = save("jax", 1, lambda _: weights("params/b"))
    state = blank(weights("params/b"))
    load(store, "jax", [state], ModelMap((Rule("nothing", "else"),)))
    assert np.array_equal(state["params/b"], weights("params/b")["params/b"])


def test_a_part_of_the_target_needs_only_its_rules() -> None:
    store = save("torch", 1, lambda _: weights("model/a", "model/unknown"))
    state = blank(weights("params/b", "params/c"))
    kept = state["params/c"].tobytes()
    load(store, "jax", [state], ModelMap((Rule("a", "b"),)), only=("params/b",))
    assert np.array_equal(state["params/b"], weights("model/a")["model/a"])
    assert state["params/c"].tobytes() == kept


def test_renamed_keys_go_through_the_map_under_their_new_names() -> None:
    store = save("torch", 1, lambda _: weights("module/a"))
    state = blank(weights("params/b"))
    load(store, "jax", [state], ModelMap((Rule("a", "b"),)), rename={"module/*": "model/*"})
    assert np.array_equal(state["params/b"], weights("model/a")["model/a"])
