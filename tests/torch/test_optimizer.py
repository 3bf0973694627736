"""Optimizers by parameter name: state made without a step equals what a step would have made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn, optim

from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.torch.backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def assert_same_state(one: optim.Optimizer, other: optim.Optimizer) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, values in a["state"].items():
        assert values.keys() == b["state"][i].keys()
        for name, value in values.items():
            assert_equal(value, b["state"][i][name])


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert (a.dtype, a.device, a.requires_grad) == (b.dtype, b.device, b.requires_grad)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: optim.SGD(p, lr=0.01),
    "momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.01),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.01, max_iter=3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_made_without_a_step_continues_as_the_original(
    kind: str, round_trip: Callable[..., Any]
) -> None:
    make = OPTIMIZERS[kind]
    model, other = net(), net()
    optimizer, fresh = make(model.parameters()), make(other.parameters())
    train(model, optimizer, steps=3)
    fresh.param_groups[0]["lr"] = 7.0
    before = {p: dict(s) for p, s in fresh.state.items()}
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert not any(before.values()) or kind == "adagrad", "only Adagrad makes state up front"
    assert_same_state(optimizer, fresh)
    train(model, optimizer, steps=2, seed=2)
    train(other, fresh, steps=2, seed=2)
    assert_same_state(optimizer, fresh)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def grouped(model: nn.Sequential, frozen: bool = True) -> optim.Optimizer:
    model[0].bias.requires_grad_(not frozen)
    return optim.AdamW(
        [
            {"params": [model[0].weight, model[0].bias], "lr": 0.1},
            {"params": model[2].parameters(), "weight_decay": 0.0, "betas": (0.8, 0.9)},
        ],
        lr=0.01,
    )


def test_groups_and_frozen_parameters_come_back(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer, fresh = grouped(model), grouped(other)
    train(model, optimizer, steps=2)
    for group in fresh.param_groups:
        group["lr"] = 3.0
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert fresh.param_groups[0]["lr"] == 0.1
    assert fresh.param_groups[1]["betas"] == (0.8, 0.9)
    assert model[0].bias not in optimizer.state or not optimizer.state[model[0].bias]
    assert_same_state(optimizer, fresh)


def test_groups_match_by_parameters_not_by_position(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer = grouped(model, frozen=False)
    fresh = optim.AdamW(
        [
            {"params": other[2].parameters()},
            {"params": [other[0].bias, other[0].weight]},
        ]
    )
    train(model, optimizer, steps=1)
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert [group["lr"] for group in fresh.param_groups] == [0.01, 0.1]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], fresh.state[b]["exp_avg"])


def test_other_groups_are_refused_before_anything_changes(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer = grouped(model)
    train(model, optimizer, steps=1)
    fresh = optim.AdamW(other.parameters())
    before = other[0].weight.clone()
    with pytest.raises(StateMismatchError, match=r"2 parameter groups of \[2, 2\]") as raised:
        round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert raised.value.problems
    assert torch.equal(other[0].weight, before)
    assert not fresh.state


def test_a_parameter_of_no_module_is_refused_by_group_and_position() -> None:
    model = net()
    stray = nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([{"params": model.parameters()}, {"params": [stray]}], lr=0.1)
    with pytest.raises(UnsupportedStateError, match="o: parameter 0 of group 1"):
        TorchBackend().describe({"m": model, "o": optimizer})


def test_an_optimizer_over_two_modules_prefixes_names_and_others_do_not(
    round_trip: Callable[..., Any],
) -> None:
    def make() -> dict[str, Any]:
        g, d = net(), net()
        both = optim.SGD([*g.parameters(), *d.parameters()], lr=0.1, momentum=0.9)
        train(nn.Sequential(g, nn.Linear(3, 6), d), both, steps=1)
        return {"g": g, "d": d, "both": both, "own": optim.AdamW(g.parameters())}

    source, target = make(), make()
    tree = TorchBackend().describe(source)
    found = [leaf.key for leaf in tree.leaves]
    assert "both/state/g.0.weight/momentum_buffer" in found
    assert "both/state/d.0.weight/momentum_buffer" in found
    assert tree.objects["own/param_groups"][0]["params"] == [  # type: ignore[index]
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    round_trip(source, target)
    assert_same_state(source["both"], target["both"])


def test_an_average_of_the_weights_changes_no_optimizer_key() -> None:
    model = net()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    alone = TorchBackend().describe({"m": model, "o": optimizer})
    averaged = optim.swa_utils.AveragedModel(model)
    beside = TorchBackend().describe({"ema": averaged, "m": model, "o": optimizer})
    assert {leaf.key for leaf in alone.leaves} <= {leaf.key for leaf in beside.leaves}


def test_tied_weights_have_one_state(round_trip: Callable[..., Any]) -> None:
    def make() -> tuple[nn.Sequential, optim.Optimizer]:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model, optim.AdamW(model.parameters())

    (model, optimizer), (other, fresh) = make(), make()
    train(model, optimizer, steps=2)
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert_same_state(optimizer, fresh)


def test_a_tensor_learning_rate_is_filled_in_place(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer = optim.Adam(model.parameters(), lr=torch.tensor(0.25))
    lr = torch.tensor(0.5)
    fresh = optim.Adam(other.parameters(), lr=lr)
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert fresh.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_learning_rates_pass_between_numbers_and_tensors(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    number = optim.Adam(model.parameters(), lr=0.125)
    tensor = optim.Adam(other.parameters(), lr=torch.tensor(0.5))
    round_trip({"m": other, "o": tensor}, {"m": model, "o": number})
    assert number.param_groups[0]["lr"] == 0.5
    number.param_groups[0]["lr"] = 0.75
    round_trip({"m": model, "o": number}, {"m": other, "o": tensor})
    assert tensor.param_groups[0]["lr"].item() == 0.75


def test_how_to_step_stays_the_choice_of_the_run(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer = optim.AdamW(model.parameters(), foreach=True)
    train(model, optimizer, steps=1)
    fresh = optim.AdamW(other.parameters(), foreach=False)
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert fresh.param_groups[0]["foreach"] is False


def test_without_its_keys_the_optimizer_stays_as_it_is(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer = optim.AdamW(model.parameters(), lr=0.25)
    train(model, optimizer, steps=1)
    fresh = optim.AdamW(other.parameters(), lr=0.5)
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh}, only=["m/*"])
    assert fresh.param_groups[0]["lr"] == 0.5
    assert not fresh.state
    assert torch.equal(other[0].weight, model[0].weight)


def test_state_that_nobody_saved_is_reported_as_missing(round_trip: Callable[..., Any]) -> None:
    model, other = net(), net()
    optimizer, used = optim.AdamW(model.parameters()), optim.AdamW(other.parameters())
    train(other, used, steps=1)
    with pytest.raises(
        StateMismatchError, match=r"o/state/0.weight/exp_avg.*not in the checkpoint"
    ):
        round_trip({"m": model, "o": optimizer}, {"m": other, "o": used})


def test_a_later_training_step_is_not_needed_and_none_is_run(
    round_trip: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = net(), net()
    optimizer, fresh = optim.AdamW(model.parameters()), optim.AdamW(other.parameters())
    train(model, optimizer, steps=1)

    def refuse(*_args: object, **_keywords: object) -> None:
        raise AssertionError("a step was run")

    monkeypatch.setattr(optim.AdamW, "step", refuse)
    round_trip({"m": model, "o": optimizer}, {"m": other, "o": fresh})
    assert fresh.state[other[0].weight]["step"].item() == 1
