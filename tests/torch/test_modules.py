"""Modules: which keys they get, what is tied, what is refused."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from shardckpt.errors import StateMismatchError, UnsupportedStateError
from shardckpt.torch.backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable


class Net(nn.Module):
    """Layers, a persistent and a transient buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3, bias=False)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.kept


KEYS = ["m/first.bias", "m/first.weight", "m/kept", "m/second.weight"]


def keys(state: dict[str, Any]) -> list[str]:
    return [leaf.key for leaf in TorchBackend().describe(state).leaves]


def test_keys_are_those_of_state_dict_and_transient_buffers_stay_out() -> None:
    tree = TorchBackend().describe({"m": Net()})
    assert [leaf.key for leaf in tree.leaves] == KEYS
    assert [leaf.role for leaf in tree.leaves] == ["param", "param", "buffer", "param"]
    assert all(leaf.layout is None for leaf in tree.leaves)


def test_compile_and_activation_checkpointing_leave_no_trace_in_keys() -> None:
    net = Net()
    net.first = checkpoint_wrapper(net.first)
    assert keys({"m": torch.compile(net)}) == KEYS
    net = Net()
    net.second = torch.compile(net.second)
    assert keys({"m": net}) == KEYS


def test_a_nested_mapping_of_modules_joins_its_names() -> None:
    assert keys({"a": {"b": Net()}})[0] == "a/b/first.bias"


def test_tied_tensors_are_stored_once_and_fill_both_names(round_trip: Callable[..., Any]) -> None:
    def tied() -> nn.ModuleDict:
        net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
        net["head"].weight = net["embed"].weight
        return net

    source, target = tied(), tied()
    tree = TorchBackend().describe({"m": source})
    assert [leaf.key for leaf in tree.leaves] == ["m/embed.weight"]
    assert tree.aliases == {"m/head.weight": "m/embed.weight"}
    round_trip({"m": source}, {"m": target})
    assert torch.equal(target["head"].weight, source["embed"].weight)
    # A model that does not tie them takes the same bytes for both.
    loose = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    round_trip({"m": source}, {"m": loose})
    assert torch.equal(loose["head"].weight, source["embed"].weight)
    assert torch.equal(loose["embed"].weight, source["embed"].weight)


def test_tensors_that_are_equal_views_of_one_memory_are_tied() -> None:
    net = nn.Module()
    net.register_buffer("a", torch.zeros(4))
    net.register_buffer("b", net.a.view(4))
    net.register_buffer("part", net.a[:2])
    tree = TorchBackend().describe({"m": net})
    assert [leaf.key for leaf in tree.leaves] == ["m/a", "m/part"]
    assert tree.aliases == {"m/b": "m/a"}


def test_a_tie_saved_under_its_other_name_is_found(round_trip: Callable[..., Any]) -> None:
    class Tied(nn.Module):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            shared = nn.Parameter(torch.randn(3))
            for name in names:
                self.register_parameter(name, shared)

    plain = nn.Module()
    plain.z = nn.Parameter(torch.randn(3))
    target = Tied(("a", "z"))
    round_trip({"m": plain}, {"m": target})
    assert torch.equal(target.a, plain.z)


class WithExtra(nn.Module):
    """A module with extra state of a kind that JSON does not know."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> object:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        if state == "refused":
            raise ValueError("not this one")
        self.value = state


def test_extra_state_goes_back_to_its_module(round_trip: Callable[..., Any]) -> None:
    amax = torch.tensor([1.5, 2.5], dtype=torch.bfloat16)
    source = nn.Sequential(WithExtra({"amax": amax, "raw": io.BytesIO(b"xyz")}), WithExtra((1, 2)))
    target = nn.Sequential(WithExtra(None), WithExtra(None))
    round_trip({"m": source}, {"m": target})
    assert torch.equal(target[0].value["amax"], amax)
    assert target[0].value["raw"].getvalue() == b"xyz"
    assert target[1].value == (1, 2)


def test_a_module_that_refuses_its_extra_state_is_named(round_trip: Callable[..., Any]) -> None:
    with pytest.raises(StateMismatchError, match=r"m/_extra_state: WithExtra.*not this one"):
        round_trip({"m": WithExtra("refused")}, {"m": WithExtra(None)})


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.eye(3).to_sparse(), "make it dense"),
        (torch.empty(3, device="meta"), "to_empty"),
    ],
)
def test_a_tensor_without_plain_memory_is_refused_by_name(tensor: torch.Tensor, says: str) -> None:
    net = nn.Module()
    net.register_buffer("odd", tensor)
    with pytest.raises(UnsupportedStateError, match=f"m/odd: .*({says})"):
        TorchBackend().describe({"m": net})


def test_a_copy_made_by_a_state_dict_hook_is_refused_as_a_target(
    round_trip: Callable[..., Any],
) -> None:
    def doubled() -> nn.Linear:
        net = nn.Linear(2, 2)

        def hook(_m: nn.Module, found: dict[str, Any], prefix: str, _meta: object) -> None:
            found[prefix + "weight"] = found[prefix + "weight"] * 2

        net.register_state_dict_post_hook(hook)
        return net

    with pytest.raises(UnsupportedStateError, match=r"m/weight: .*copy that a hook made"):
        round_trip({"m": doubled()}, {"m": doubled()})


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool, torch.int8,
        torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
)  # fmt: skip
def test_every_dtype_and_stride_comes_back_bit_for_bit(
    dtype: torch.dtype, round_trip: Callable[..., Any]
) -> None:
    raw = torch.randint(0, 2, (6, 4, 5 * dtype.itemsize), dtype=torch.uint8)
    source = raw.view(dtype).permute(2, 0, 1)
    target = torch.zeros((4, 5, 6), dtype=torch.uint8).repeat(1, 1, dtype.itemsize).view(dtype)
    target = target.permute(1, 2, 0)
    assert not source.is_contiguous()
    assert not target.is_contiguous()
    round_trip({"t": source}, {"t": target})
    assert torch.equal(target.contiguous().view(torch.uint8), source.contiguous().view(torch.uint8))


def test_a_conjugate_view_is_saved_as_its_values_and_refused_as_target(
    round_trip: Callable[..., Any],
) -> None:
    source = torch.randn(4, dtype=torch.complex64).conj()
    target = torch.zeros(4, dtype=torch.complex64)
    round_trip({"t": source}, {"t": target})
    assert torch.equal(target, source)
    with pytest.raises(UnsupportedStateError, match=r"resolve_conj"):
        round_trip({"t": source}, {"t": target.conj()})


def test_an_expanded_target_is_refused(round_trip: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedStateError, match=r"expanded"):
        round_trip({"t": torch.ones(3)}, {"t": torch.zeros(1).expand(3)})
