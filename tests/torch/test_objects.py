"""Schedulers, scalers, loaders, random numbers and plain values."""

from __future__ import annotations

import collections
import math
import random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torchdata.stateful_dataloader import StatefulDataLoader

from shardckpt import PerRank
from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.torch import RngState
from shardckpt.torch.backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable


def make(scheduler: str) -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    made: Any
    if scheduler == "multistep":
        made = optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3], gamma=0.5)
    elif scheduler == "onecycle":
        made = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=20)
    elif scheduler == "plateau":
        made = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    elif scheduler == "lambda":
        made = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    else:
        warm = optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
        cosine = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        made = optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [3])
    return {"m": model, "o": optimizer, "s": made}


def advance(state: dict[str, Any], steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        state["o"].step()
        plateau = isinstance(state["s"], optim.lr_scheduler.ReduceLROnPlateau)
        state["s"].step(*([1.0] if plateau else []))
        rates.append(state["o"].param_groups[0]["lr"])
    return rates


@pytest.mark.filterwarnings("ignore::UserWarning:torch.optim.lr_scheduler")
@pytest.mark.parametrize("kind", ["multistep", "onecycle", "plateau", "lambda", "sequential"])
def test_a_scheduler_goes_on_where_it_was(kind: str, round_trip: Callable[..., Any]) -> None:
    source, target = make(kind), make(kind)
    advance(source, 4)
    round_trip(source, target)
    assert advance(target, 4) == advance(source, 4)


def test_a_grad_scaler_goes_on_where_it_was(round_trip: Callable[..., Any]) -> None:
    source, target = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    source.load_state_dict({**source.state_dict(), "scale": 128.0, "_growth_tracker": 7})
    round_trip({"s": source}, {"s": target})
    assert target.state_dict() == source.state_dict()


def test_plain_values_are_replaced_in_the_mapping(round_trip: Callable[..., Any]) -> None:
    value = {
        "tuple": (1, [2.5, math.inf]),
        3: {"set": {1, 2}},
        "counter": collections.Counter("aab"),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "array": np.arange(3),
        "none": None,
    }
    source = {"v": value, "n": 7, "deep": {"t": torch.ones(2), "x": "yes"}}
    target: dict[str, Any] = {"v": 0, "n": 0, "deep": {"t": torch.zeros(2), "x": ""}}
    kept = target["deep"]["t"]
    round_trip(source, target)
    assert np.array_equal(target["v"].pop("array"), value.pop("array"))  # type: ignore[arg-type]
    assert target["v"] == value
    assert type(target["v"]["size"]) is torch.Size
    assert target["n"] == 7
    assert target["deep"]["x"] == "yes"
    assert target["deep"]["t"] is kept
    assert torch.equal(kept, torch.ones(2))


class Average:
    """An object whose state holds tensors at some depth."""

    def __init__(self, values: list[torch.Tensor] | None = None) -> None:
        self.state: dict[str, Any] = {"decay": 0.9, "shadow": {"list": values or []}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["decay"] == "bad":
            raise RuntimeError("no such decay")
        self.state = state


def test_tensors_inside_an_object_become_arrays_of_the_checkpoint(
    round_trip: Callable[..., Any],
) -> None:
    source = Average([torch.randn(3), torch.randn(2, 2).to(torch.bfloat16)])
    tree = TorchBackend().describe({"ema": source})
    assert [leaf.key for leaf in tree.leaves] == ["ema/shadow/list/0", "ema/shadow/list/1"]
    target = Average()
    round_trip({"ema": source}, {"ema": target})
    assert target.state["decay"] == 0.9
    for got, want in zip(
        target.state["shadow"]["list"], source.state["shadow"]["list"], strict=True
    ):
        assert torch.equal(got, want)
    # Under another name, the object and its tensors together.
    renamed = Average()
    round_trip({"ema": source}, {"avg": renamed}, rename={"ema": "avg", "ema/*": "avg/*"})
    assert torch.equal(renamed.state["shadow"]["list"][0], source.state["shadow"]["list"][0])
    with pytest.raises(StateMismatchError, match="rename an object together with its tensors"):
        round_trip({"ema": source}, {"avg": Average()}, rename={"ema": "avg"}, strict=False)


def test_an_object_that_refuses_its_state_is_named(round_trip: Callable[..., Any]) -> None:
    source = Average()
    source.state["decay"] = "bad"
    with pytest.raises(StateMismatchError, match=r"ema: .*Average.load_state_dict.*no such decay"):
        round_trip({"ema": source}, {"ema": Average()})


def test_what_cannot_be_stored_is_named_by_path() -> None:
    with pytest.raises(UnsupportedStateError, match=r"^v/a/1: .*object"):
        TorchBackend().describe({"v": {"a": [0, object()]}})


def test_two_parts_with_one_key_are_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="a/b: two parts"):
        TorchBackend().describe({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}})


def test_a_mapping_that_cannot_change_is_refused_for_plain_values_only(
    round_trip: Callable[..., Any],
) -> None:
    target = torch.zeros(2)
    round_trip({"t": torch.ones(2)}, MappingProxyType({"t": target}))
    assert torch.equal(target, torch.ones(2))
    with pytest.raises(UnsupportedStateError, match="n: a int is replaced"):
        round_trip({"n": 1}, MappingProxyType({"n": 0}))


def test_something_other_than_a_mapping_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="pass a mapping"):
        TorchBackend().describe(nn.Linear(1, 1))  # type: ignore[arg-type]


def draw() -> list[Any]:
    return [random.random(), np.random.rand(), torch.rand(2).tolist(), random.gauss(0, 1)]


def test_random_numbers_go_on_where_they_were(round_trip: Callable[..., Any]) -> None:
    random.gauss(0, 1)  # Leaves half a pair behind, which is part of the state.
    source = {"rng": RngState()}
    tree = TorchBackend().describe(source)
    assert not tree.leaves
    assert tree.per_rank["rng"].rule == "drop"
    state = RngState().state_dict()
    want = draw()
    draw()
    RngState().load_state_dict(state)
    assert draw() == want
    RngState().load_state_dict(state)

    class Clumsy(Average):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            draw()

    # Generators are restored after everything else, which may draw numbers while it loads.
    round_trip({"rng": RngState(), "z": Average()}, {"rng": RngState(), "z": Clumsy()})
    assert draw() == want


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of error, rank0, drop"):
        RngState("first")  # type: ignore[arg-type]


def test_per_rank_values_and_objects_come_back(round_trip: Callable[..., Any]) -> None:
    inner = Average([torch.arange(3)])
    source = {"a": PerRank(inner), "b": PerRank({"at": 5}, rule="drop")}
    target: dict[str, Any] = {"a": PerRank(Average()), "b": PerRank(None, rule="drop")}
    assert set(TorchBackend().describe(source).per_rank) == {"a", "b"}
    round_trip(source, target)
    assert torch.equal(target["a"].value.state["shadow"]["list"][0], torch.arange(3))
    assert target["b"] == PerRank({"at": 5}, rule="drop")


@pytest.mark.filterwarnings("ignore::UserWarning:torchdata")
@pytest.mark.filterwarnings("ignore:.set_vital.*:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stateful_loader_belongs_to_its_rank_and_goes_on_where_it_was(
    num_workers: int, round_trip: Callable[..., Any]
) -> None:
    def loader() -> StatefulDataLoader[int]:
        generator = torch.Generator().manual_seed(3)
        return StatefulDataLoader(
            range(20), batch_size=2, shuffle=True, generator=generator, num_workers=num_workers
        )

    source, target = loader(), loader()
    batches = iter(source)
    for _ in range(4):
        next(batches)
    marked = TorchBackend().describe({"loader": source}).per_rank["loader"]
    assert marked.rule == "error"
    round_trip({"loader": source}, {"loader": target})
    rest = [batch.tolist() for batch in batches]
    assert len(rest) == 6
    assert [batch.tolist() for batch in target] == rest
