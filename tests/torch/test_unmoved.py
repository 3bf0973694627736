"""Leaves that are not made again: used only while all that they follow from is as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn, optim

from shardckpt.torch import Checkpointer, load
from shardckpt.torch.backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, Any]


def trained() -> State:
    """Return a model of two layers with a buffer, its optimizer after a step, and two tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    extra = torch.arange(6.0).reshape(2, 3)
    return {"model": model, "optimizer": optimizer, "extra": extra, "more": torch.ones(4)}


def lasting(backend: TorchBackend, state: State) -> set[str]:
    return {leaf.key for leaf in backend.describe(state).leaves if leaf.is_lasting}


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """Return every tensor of the state, by a name of its own, without the code under test."""
    found = {f"model/{k}": v for k, v in state["model"].state_dict().items()}
    for number, entry in state["optimizer"].state_dict()["state"].items():
        found.update({f"optimizer/{number}/{k}": v for k, v in entry.items()})
    found.update({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    return found


def new_memory(state: State) -> None:
    state["model"][0].weight.data = torch.randn(5, 6)


def same_memory_other_strides(state: State) -> None:
    state["extra"].as_strided_((3, 2), (1, 3))


def same_memory_other_start(state: State) -> None:
    flat = torch.randn(9)
    state["more"].set_(flat.untyped_storage(), 4, (4,), (1,))


def another_dtype(state: State) -> None:
    state["model"][2].bias.data = state["model"][2].bias.data.double()


def another_tensor(state: State) -> None:
    state["more"] = torch.full((4,), 7.0)


def another_parameter(state: State) -> None:
    state["model"][2] = nn.Linear(5, 3)
    state["optimizer"] = optim.AdamW(state["model"].parameters(), lr=0.1)


def state_replaced(state: State) -> None:
    state["optimizer"].load_state_dict(copy.deepcopy(state["optimizer"].state_dict()))
    for entry in state["optimizer"].state.values():
        entry["exp_avg"] += 1


def state_gone(state: State) -> None:
    state["optimizer"].state.pop(state["model"][0].weight)


def another_buffer(state: State) -> None:
    state["model"][1].running_mean = torch.full((5,), 3.0)


def negated_in_place(state: State) -> None:
    # The imaginary part of a conjugate: the same kind of memory, read with the other sign.
    state["more"].data = torch.conj(torch.randn(4, dtype=torch.complex64)).imag


CHANGES = [
    new_memory, same_memory_other_strides, same_memory_other_start, another_dtype, another_tensor,
    another_parameter, state_replaced, state_gone, another_buffer, negated_in_place,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_saved_after_a_change_is_the_state_after_it(
    tmp_path: Path, change: Callable[[State], None]
) -> None:
    state = trained()
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state).wait()
        change(state)
        for step in (4, 5, 6):
            state["more"] += 1
            checkpointer.save(step, state).wait()
    expected = {key: value.clone() for key, value in tensors_of(state).items()}
    restored = copy.deepcopy(state)
    for tensor in tensors_of(restored).values():
        tensor.zero_()
    load(tmp_path, restored)
    for key, value in tensors_of(restored).items():
        assert torch.equal(value, expected[key]), key


def test_only_what_changed_is_made_again() -> None:
    state, backend = trained(), TorchBackend()
    assert not lasting(backend, state)
    everything = {leaf.key for leaf in backend.describe(state).leaves}
    assert lasting(backend, state) == everything
    first = backend.describe(state).leaves
    assert all(a is b for a, b in zip(first, backend.describe(state).leaves, strict=True))
    another_buffer(state)
    assert lasting(backend, state) == {key for key in everything if not key.startswith("model/")}
    assert lasting(backend, state) == everything


def test_values_that_change_in_place_leave_all_as_it_is() -> None:
    state, backend = trained(), TorchBackend()
    backend.describe(state)
    state["model"](torch.randn(4, 6)).sum().backward()
    state["optimizer"].step()
    assert len(lasting(backend, state)) == len(backend.describe(state).leaves)


def test_a_copy_made_by_a_hook_is_looked_at_anew() -> None:
    state, backend = trained(), TorchBackend()

    def copied(module: Any, tensors: dict[str, torch.Tensor], prefix: str, meta: Any) -> None:
        del module, meta
        tensors[f"{prefix}1.running_mean"] = tensors[f"{prefix}1.running_mean"] * 2

    state["model"].register_state_dict_post_hook(copied)
    for _ in range(3):
        assert not any(key.startswith("model/") for key in lasting(backend, state))


def test_no_tensor_is_kept_alive() -> None:
    state, backend = trained(), TorchBackend()
    backend.describe(state)
    backend.describe(state)
    seen = [weakref.ref(tensor) for tensor in (state["model"][0].weight, state["extra"])]
    state.clear()
    gc.collect()
    assert [tensor() for tensor in seen] == [None, None]


def test_a_checkpointer_keeps_no_tensor_alive(tmp_path: Path) -> None:
    state = trained()
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state).wait()
        moments = state["optimizer"].state[state["model"][0].weight]["exp_avg"]
        seen = [weakref.ref(tensor) for tensor in (moments, state["extra"])]
        del moments
        state.clear()
        gc.collect()
        assert [tensor() for tensor in seen] == [None, None]


def test_another_owner_gives_another_fence(tmp_path: Path) -> None:
    state = trained()
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state).wait()
        # From now on two optimizers change the parameters: nothing of the model may be late.
        second = optim.SGD(state["model"].parameters(), lr=1.0)
        state["second"] = second
        handle = checkpointer.save(4, state)
        before = state["model"][0].weight.detach().clone()
        with torch.no_grad():
            state["model"][0].weight += 1
        handle.wait()
    target = {"model": copy.deepcopy(state["model"])}
    load(tmp_path, target, only=["model/*"])
    assert torch.equal(target["model"][0].weight, before)
