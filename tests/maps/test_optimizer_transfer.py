"""Optimizer state changes the framework bit for bit, and the next update goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from worlds import blank, load, save

import shardckpt.torch as ours
from shardckpt import ModelMap, Rule, StateMismatchError
from shardckpt.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.storage.base import Storage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NET = ModelMap(
    (Rule("{i}.weight", "{i}/kernel", "out in -> in out"), Rule("{i}.bias", "{i}/bias")),
    ignore=("opt_state/acc_grads/*",),
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def trained(
    make: Callable[[Any], optim.Optimizer], steps: int
) -> tuple[nn.Sequential, optim.Optimizer]:
    model = net()
    optimizer = make(model.parameters())
    for seed in range(steps):
        gradients(model, seed)
        optimizer.step()
    return model, optimizer


def saved_by_torch(state: dict[str, Any]) -> Storage:
    storage = MemoryStorage()
    with ours.Checkpointer(storage, timeout_s=30) as checkpointer:
        checkpointer.save(1, state)
    return storage


def as_jax(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return tensors by name as the tree of the JAX twin: the plain reference of the map."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        layer, kind = name.split(".")
        array = value.detach().numpy()
        leaf = ("kernel", array.T.copy()) if kind == "weight" else ("bias", array.copy())
        tree.setdefault(layer, {})[leaf[0]] = leaf[1]
    return tree


def keyed(**trees: Any) -> dict[str, np.ndarray]:
    """Return the leaves of trees as writable arrays under the keys that a JAX state gives them."""
    from jax import tree_util

    found: dict[str, np.ndarray] = {}
    for path, leaf in tree_util.tree_flatten_with_path(trees)[0]:
        parts = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", "")))) for p in path]
        found["/".join(parts)] = np.array(leaf)
    return found


def rebuilt(tree: Any, name: str, state: dict[str, Any]) -> Any:
    """Return a tree with its leaves taken from a loaded state."""
    from jax import tree_util

    _, structure = tree_util.tree_flatten(tree)
    return tree_util.tree_unflatten(structure, [state[key] for key in keyed(**{name: tree})])


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def moments(model: nn.Module, optimizer: optim.Optimizer, name: str) -> dict[str, torch.Tensor]:
    return {key: optimizer.state[param][name] for key, param in named(model).items()}


def assert_trees_equal(found: Any, wanted: Any) -> None:
    for layer, leaves in wanted.items():
        for name, value in leaves.items():
            assert np.asarray(found[layer][name]).tobytes() == value.tobytes(), (layer, name)


def test_adamw_goes_to_optax_and_its_next_update_is_that_of_torch() -> None:
    optax = pytest.importorskip("optax")
    model, optimizer = trained(lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1), steps=3)
    optimizer.param_groups[0]["lr"] = 0.02
    transform = optax.adamw(lambda _: 0.02, weight_decay=0.1)
    params = as_jax(named(net()))
    opt_state = transform.init(params)
    state = blank(keyed(params=params, opt_state=opt_state))
    load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [state], NET)
    params, opt_state = (
        rebuilt(params, "params", state), rebuilt(opt_state, "opt_state", state)
    )  # fmt: skip
    assert_trees_equal(params, as_jax(named(model)))
    assert_trees_equal(opt_state[0].mu, as_jax(moments(model, optimizer, "exp_avg")))
    assert_trees_equal(opt_state[0].nu, as_jax(moments(model, optimizer, "exp_avg_sq")))
    assert opt_state[0].count == 3
    assert opt_state[0].count.dtype == np.int32
    gradients(model, 9)
    grads = as_jax({k: p.grad for k, p in named(model).items() if p.grad is not None})
    updates, _ = transform.update(grads, opt_state, params)
    optimizer.step()
    for layer, leaves in as_jax(named(model)).items():
        for name, after in leaves.items():
            mine = np.asarray(params[layer][name] + updates[layer][name])
            # torch corrects the bias in float64, optax in float32.
            np.testing.assert_allclose(mine, after, rtol=2e-6, atol=2e-7)


def test_adamw_comes_back_bit_for_bit_and_hyperparameters_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optax = pytest.importorskip("optax")
    model, optimizer = trained(lambda p: optim.AdamW(p, lr=0.01), steps=3)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    state = keyed(params=as_jax(named(net())), opt_state=transform.init(as_jax(named(net()))))
    load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [blank(state)], NET)
    other = net()
    fresh = optim.AdamW(other.parameters(), lr=0.5)
    back = save("jax", 1, lambda _: dict(state))
    ours.load(back, {"model": other, "opt": fresh}, map=NET, timeout_s=30)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][name], fresh.state[b][name])
            assert optimizer.state[a][name].dtype == fresh.state[b][name].dtype
    assert fresh.param_groups[0]["lr"] == 0.5
    assert "kept as the state had them before: opt/param_groups" in caplog.text


def test_momentum_is_the_trace_of_optax_both_ways() -> None:
    optax = pytest.importorskip("optax")
    model, optimizer = trained(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), steps=3)
    transform = optax.sgd(0.1, momentum=0.9)
    opt_state = transform.init(as_jax(named(net())))
    state = blank(keyed(params=as_jax(named(net())), opt_state=opt_state))
    load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [state], NET)
    loaded = rebuilt(opt_state, "opt_state", state)
    assert_trees_equal(loaded[0].trace, as_jax(moments(model, optimizer, "momentum_buffer")))
    other = net()
    fresh = optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    back = save("jax", 1, lambda _: dict(state))
    ours.load(back, {"model": other, "opt": fresh}, map=NET, timeout_s=30)
    for one, opt in ((model, optimizer), (other, fresh)):
        gradients(one, 5)
        opt.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_counters_of_a_chain_stay_and_its_moments_are_found() -> None:
    optax = pytest.importorskip("optax")
    model, optimizer = trained(optim.AdamW, steps=2)
    transform = optax.MultiSteps(optax.chain(optax.clip(1.0), optax.adamw(1e-3)), 4)
    opt_state = transform.init(as_jax(named(net())))
    state = keyed(params=as_jax(named(net())), opt_state=opt_state)
    load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [state], NET)
    assert state["opt_state/mini_step"] == 0
    assert state["opt_state/inner_opt_state/1/0/count"] == 2
    found = rebuilt(opt_state, "opt_state", state).inner_opt_state[1][0]
    assert_trees_equal(found.mu, as_jax(moments(model, optimizer, "exp_avg")))


JAX_ADAM = ("mu", "nu")


def jax_adam(seed: int = 0) -> dict[str, np.ndarray]:
    """Return a JAX state under its keys, without optax."""
    values = {f"params/{k}": v for k, v in flat(as_jax(named(net()))).items()}
    rng = np.random.default_rng(seed)
    for field in JAX_ADAM:
        for key, value in flat(as_jax(named(net()))).items():
            values[f"opt_state/0/{field}/{key}"] = rng.random(value.shape, np.float32)
    return {**values, "opt_state/0/count": np.array(7, np.int32),
            "opt_state/1/count": np.array(7, np.int32)}  # fmt: skip


def flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    return {f"{layer}/{name}": v for layer, leaves in tree.items() for name, v in leaves.items()}


SCHEDULED = {"opt_state/1/count": "schedule"}


def test_state_before_the_first_step_is_zeros_and_count_0() -> None:
    model, optimizer = trained(optim.AdamW, steps=0)
    state = blank(jax_adam())
    load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [state], NET)
    for key, value in state.items():
        if key.startswith("opt_state/"):
            assert not value.any(), key


def test_without_an_optimizer_saved_its_state_is_missing() -> None:
    with pytest.raises(StateMismatchError, match=r"opt_state/0/mu/0/kernel.*not in the checkpoint"):
        load(saved_by_torch({"model": net()}), "jax", [blank(jax_adam())], NET)


def test_unequal_steps_are_refused_and_both_are_named() -> None:
    model, optimizer = trained(optim.AdamW, steps=2)
    optimizer.state[model[2].bias]["step"] += 1
    state = blank(jax_adam())
    before = {key: value.tobytes() for key, value in state.items()}
    with pytest.raises(StateMismatchError) as raised:
        load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [state], NET)
    assert "is 2 and 'opt/state/2.bias/step' is 3" in raised.value.problems[0]
    assert {key: value.tobytes() for key, value in state.items()} == before


def test_a_schedule_goes_on_from_the_scheduler_of_torch() -> None:
    model, optimizer = trained(optim.AdamW, steps=2)
    optimizer.zero_grad()
    scheduler = optim.lr_scheduler.StepLR(optimizer, 10)
    optimizer.step()  # Without gradients: the schedule alone goes on.
    for _ in range(5):
        scheduler.step()
    store = saved_by_torch({"model": model, "opt": optimizer, "sched": scheduler})
    state = blank(jax_adam())
    load(store, "jax", [state], NET, roles=SCHEDULED)
    assert state["opt_state/0/count"] == 2
    assert state["opt_state/1/count"] == 5


def test_streams_schedulers_and_loaders_are_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    optimizer = optim.AdamW(model.parameters())
    key = np.array([0, 7], np.uint32)
    saved = {**jax_adam(), "rng": key, "progress": {"epoch": 3}}
    roles = {**SCHEDULED, "rng": "other"}
    state: dict[str, Any] = {
        "model": model, "opt": optimizer, "rng": ours.RngState(), "progress": None,
        "sched": optim.lr_scheduler.StepLR(optimizer, 10),
    }  # fmt: skip
    ours.load(save("jax", 1, lambda _: dict(saved), roles), state, map=NET, timeout_s=30)
    assert state["progress"] == {"epoch": 3}
    assert optimizer.state[model[0].weight]["step"] == 7
    assert "not converted: opt_state/1/count, rng." in caplog.text
    assert "kept as the state had them before: opt/param_groups, rng, sched." in caplog.text


def test_state_that_only_one_side_knows_is_named_on_both() -> None:
    model, optimizer = trained(lambda p: optim.AdamW(p, amsgrad=True), steps=1)
    with pytest.raises(StateMismatchError) as raised:
        load(saved_by_torch({"model": model, "opt": optimizer}), "jax", [blank(jax_adam())], NET)
    lines = "\n".join(raised.value.problems)
    assert "'opt/state/0.weight/max_exp_avg_sq': saved, but the state has no adam_v_max" in lines
    assert "params/0/kernel" in lines
