"""Which optimizer guards which tensor, and that its step waits for exactly these."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import schedulefree
import torch
from torch import nn, optim
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

from shardckpt.torch.backend import TorchBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardckpt.torch.fences import OptimizerFences


class Net(nn.Module):
    """Large enough for several tensors, with a buffer that changes in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def backward(model: nn.Module, batches: int = 1) -> None:
    for _ in range(batches):
        model(torch.randn(8, 6)).square().mean().backward()


def trained(
    make: Callable[[Any], optim.Optimizer] = lambda p: optim.AdamW(p, lr=0.1),
) -> dict[str, Any]:
    """Return a model and its optimizer after a first step."""
    model = Net()
    optimizer = make(model.parameters())
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def owned_keys(late_save: Any) -> set[str]:
    return {key for key, group in late_save.groups.items() if group}


PARAMS = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}
KINDS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "plain": lambda p: optim.AdamW(p, lr=0.1, foreach=False),
    "foreach": lambda p: optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_nothing_that_is_still_to_be_copied(kind: str, late_save: Any) -> None:
    state = trained(KINDS[kind])
    late_save.save(state)
    assert {f"model/{name}" for name in PARAMS} <= late_save.late()
    assert any(key.startswith("optimizer/state/") for key in late_save.late())
    backward(state["model"])
    assert late_save.fenced == [], "forward and backward wait for nothing"
    state["optimizer"].step()
    assert late_save.fenced == [late_save.groups["model/first.weight"]]
    assert late_save.torn() == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_hook_a_step_tears_what_is_still_to_be_copied(
    kind: str, late_save: Any
) -> None:
    state = trained(KINDS[kind])
    late_save.save(state)
    late_save.fences.close()
    backward(state["model"])
    state["optimizer"].step()
    assert {"model/first.weight", "model/last.weight", "model/last.bias"} <= set(late_save.torn())


def test_what_no_step_changes_is_copied_at_once(late_save: Any) -> None:
    state = trained(lambda p: optim.AdamW(p, lr=torch.tensor(0.1), foreach=False))
    scheduler = optim.lr_scheduler.StepLR(state["optimizer"], 1, gamma=0.5)
    state["optimizer"].step()
    average = optim.swa_utils.AveragedModel(state["model"])
    state |= {"average": average, "scheduler": scheduler, "loose": torch.ones(3)}
    late_save.save(state)
    eager = late_save.groups.keys() - owned_keys(late_save)
    assert {key for key in eager if key.partition("/")[0] in ("loose", "model", "optimizer")} == {
        "loose",
        "model/norm.num_batches_tracked",
        "model/norm.running_mean",
        "model/norm.running_var",
        "optimizer/param_groups/0/initial_lr",
        "optimizer/param_groups/0/lr",
    }
    assert {f"average/module.{name}" for name in PARAMS} <= eager
    # The learning rate changes in place, outside of the step; so do averages and buffers.
    state["model"](torch.randn(8, 6))
    scheduler.step()
    average.update_parameters(state["model"])
    state["loose"].zero_()
    assert late_save.torn() == []


def test_only_the_optimizer_that_steps_is_waited_for(late_save: Any) -> None:
    one, other = trained(), trained()
    late_save.save({"generator": one, "critic": other})
    backward(other["model"])
    other["optimizer"].step()
    assert late_save.fenced == [late_save.groups["critic/model/first.weight"]]
    assert {f"generator/model/{name}" for name in PARAMS} <= late_save.late()
    assert not any(key.startswith("critic/") for key in late_save.late())
    backward(one["model"])
    one["optimizer"].step()
    assert late_save.torn() == []


def test_the_steps_of_the_first_optimizer_are_the_steps_of_the_training(late_save: Any) -> None:
    one, other = trained(), trained()
    late_save.save({"a": one, "b": other})
    for _ in range(3):
        other["optimizer"].step()
        one["optimizer"].step()
        other["optimizer"].step()
    assert late_save.num_steps == 3


def test_groups_stay_the_same_from_save_to_save(late_save: Any) -> None:
    one, other = trained(), trained()
    late_save.save({"a": one, "b": other})
    first = dict(late_save.groups)
    late_save.fence()
    late_save.save({"a": one, "b": other})
    assert late_save.groups == first


def test_accumulating_and_clipping_gradients_waits_for_nothing(late_save: Any) -> None:
    state = trained()
    late_save.save(state)
    backward(state["model"], batches=4)
    nn.utils.clip_grad_norm_(state["model"].parameters(), 0.1)
    assert late_save.fenced == []
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    assert late_save.torn() == []


def test_a_parameter_of_two_optimizers_is_copied_at_once(late_save: Any) -> None:
    model = Net()
    whole = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    head = optim.AdamW(model.last.parameters(), lr=0.1)
    backward(model)
    whole.step()
    head.step()
    late_save.save({"model": model, "whole": whole, "head": head})
    assert late_save.groups["model/last.weight"] == late_save.groups["model/last.bias"] == 0
    assert late_save.groups["model/first.weight"] != 0
    backward(model)
    head.step()
    assert "model/first.weight" in late_save.late()
    whole.step()
    assert late_save.torn() == []


def test_an_optimizer_under_two_names_is_one_owner(late_save: Any) -> None:
    state = trained()
    late_save.save(state | {"again": state["optimizer"]})
    assert late_save.groups["model/first.weight"] != 0
    backward(state["model"])
    state["optimizer"].step()
    assert late_save.torn() == []


def test_an_optimizer_for_each_parameter_waits_for_its_own(late_save: Any) -> None:
    """Optimizers in backward: each parameter steps as soon as its gradient is there."""
    model = Net()
    optimizers = {
        name.replace(".", "_"): optim.AdamW([param], lr=0.1)
        for name, param in model.named_parameters()
    }
    by_param = dict(zip(model.parameters(), optimizers.values(), strict=True))
    seen: list[int] = []

    def step(param: torch.Tensor) -> None:
        by_param[param].step()
        by_param[param].zero_grad()
        seen.append(len(late_save.late()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    backward(model)
    late_save.save({"model": model, "optimizers": optimizers})
    assert len({group for group in late_save.groups.values() if group}) == len(PARAMS)
    before = len(late_save.late())
    seen.clear()
    backward(model)
    assert seen == [before - 4 * (i + 1) for i in range(len(PARAMS))]
    assert late_save.torn() == []


def test_tied_parameters_go_by_their_only_owner(late_save: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    late_save.save({"model": model, "optimizer": optimizer})
    assert late_save.groups["model/0.weight"] != 0
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert late_save.torn() == []


def test_an_optimizer_outside_the_state_waits_where_it_shares_memory(late_save: Any) -> None:
    state = trained()
    late_save.save(state)
    stranger = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    stranger.param_groups[0]["params"][0].grad = torch.ones(2)
    stranger.step()
    assert late_save.fenced == []
    # A parameter of its own over the same memory.
    shared = nn.Parameter(state["model"].first.weight.detach())
    shared.grad = torch.ones_like(shared)
    optim.SGD([shared], lr=0.1).step()
    assert late_save.fenced == [None]
    assert late_save.torn() == []


def test_an_optimizer_of_an_earlier_save_still_waits_for_shared_parameters(late_save: Any) -> None:
    state = trained()
    second = optim.SGD(state["model"].parameters(), lr=0.1)
    late_save.save({"model": state["model"], "second": second})
    late_save.fence()
    late_save.save(state)
    backward(state["model"])
    second.step()
    assert late_save.torn() == []


def test_a_new_optimizer_waits_where_the_old_one_is_gone(late_save: Any) -> None:
    state = trained()
    late_save.save(state)
    del state["optimizer"]
    fresh = optim.AdamW(state["model"].parameters(), lr=0.1)
    backward(state["model"])
    fresh.step()
    assert late_save.torn() == []


class Unhooked(optim.SGD):
    """Replaces the step that torch has wrapped, after the class was used."""


class Wrapper(optim.Optimizer):
    """Perturbs parameters around the step of an inner optimizer, as SAM does."""

    def __init__(self, inner: optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_what_no_hook_guards_is_copied_at_once(late_save: Any) -> None:
    def unhooked(params: Any) -> optim.Optimizer:
        optimizer = Unhooked(params, lr=0.1, momentum=0.9)
        Unhooked.step = lambda self, closure=None: optim.SGD.step.__wrapped__(self, closure)
        return optimizer

    def captured(params: Any) -> optim.Optimizer:
        optimizer = optim.SGD(params, lr=0.1)
        optimizer.param_groups[0]["capturable"] = True
        return optimizer

    for make in (unhooked, captured, lambda p: Wrapper(optim.SGD(p, lr=0.1))):
        state = trained(make)
        late_save.save(state)
        assert owned_keys(late_save) == set(), make
        backward(state["model"])
        state["optimizer"].step()
        assert late_save.torn() == []


def test_a_schedule_free_optimizer_swaps_weights_outside_of_its_step(late_save: Any) -> None:
    model = Net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    for _ in range(2):
        backward(model)
        optimizer.step()
    before = copy.deepcopy(model.first.weight)
    late_save.save({"model": model, "optimizer": optimizer})
    optimizer.eval()
    assert not torch.equal(model.first.weight, before)
    assert late_save.torn() == []


def test_an_exception_inside_a_step_tears_nothing(late_save: Any) -> None:
    class Breaks(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].add_(1)
            raise FloatingPointError

    state = trained(lambda p: optim.SGD(p, lr=0.1))
    state["optimizer"] = Breaks(state["model"].parameters(), lr=0.1)
    late_save.save(state)
    assert late_save.groups["model/first.weight"] != 0
    with pytest.raises(FloatingPointError):
        state["optimizer"].step()
    assert late_save.torn() == []
    late_save.save(state)
    assert late_save.torn() == []


def test_a_gradient_scaler_waits_only_where_it_steps(late_save: Any) -> None:
    state = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    late_save.save(state | {"scaler": scaler})
    state["model"].last.weight.grad = torch.full_like(state["model"].last.weight, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(state["optimizer"])
    scaler.update()
    assert late_save.fenced == []
    state["optimizer"].zero_grad()
    scaler.scale(state["model"](torch.randn(8, 6)).sum()).backward()
    scaler.step(state["optimizer"])
    scaler.update()
    assert late_save.fenced != []
    assert late_save.torn() == []


def test_a_closure_runs_after_the_wait(late_save: Any) -> None:
    state = trained(lambda p: optim.SGD(p, lr=0.1))
    state["optimizer"] = optim.LBFGS(state["model"].parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        state["optimizer"].zero_grad()
        loss = state["model"](torch.randn(8, 6)).square().mean()
        loss.backward()
        return loss

    state["optimizer"].step(closure)
    late_save.save(state)
    state["optimizer"].step(closure)
    assert late_save.torn() == []


def test_new_memory_under_a_parameter_leaves_the_copy_alone(late_save: Any) -> None:
    state = trained()
    weight = state["model"].first.weight
    late_save.save(state)
    weight.data = torch.zeros_like(weight)
    state["optimizer"].load_state_dict(copy.deepcopy(state["optimizer"].state_dict()))
    assert late_save.torn() == []


def test_memory_may_be_freed_after_a_fence(late_save: Any) -> None:
    state = trained()
    late_save.save(state)
    late_save.fence()
    for param in state["model"].parameters():
        param.untyped_storage().resize_(0)
    assert late_save.torn() == []


@pytest.mark.parametrize("whole", [False, True], ids=["step", "whole iteration"])
def test_a_compiled_step_waits_and_is_not_compiled_again(whole: bool, late_save: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    state = trained(lambda p: optim.AdamW(p, lr=0.1, foreach=True))
    model, optimizer = state["model"], state["optimizer"]

    def iteration(forward: Any, step: Any, x: torch.Tensor) -> None:
        forward(x).square().mean().backward()
        step()

    if whole:
        compiled = torch.compile(iteration, backend=counter)
        forward, step = model, optimizer.step
    else:
        compiled = iteration
        forward = torch.compile(model, backend=counter)
        step = torch.compile(optimizer.step, backend=counter)
    try:
        for _ in range(3):
            compiled(forward, step, torch.randn(8, 6))
            late_save.save(state)
        frames = counter.frame_count
        assert frames > 0
        for _ in range(12):
            compiled(forward, step, torch.randn(8, 6))
            assert late_save.fenced == [late_save.groups["model/first.weight"]]
            assert late_save.torn() == []
            late_save.save(state)
        assert counter.frame_count == frames
    finally:
        torch._dynamo.reset()


def test_loader_workers_forked_during_a_save_leave_it_alone(late_save: Any) -> None:
    state = trained()
    late_save.save(state)
    loader = DataLoader(
        torch.randn(8, 6), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    for batch in loader:
        state["model"](batch).sum().backward()
    assert late_save.fenced == []
    state["optimizer"].step()
    assert late_save.torn() == []


def test_a_step_in_a_forked_child_waits_for_nobody(late_save: Any) -> None:
    state = trained(lambda p: optim.SGD(p, lr=0.1))
    late_save.save(state)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            state["optimizer"].step()
            code = len(late_save.fenced) + late_save.num_steps
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_closing_removes_the_hook_and_lets_go_of_the_parameters(late_save: Any) -> None:
    hooks = len(_global_optimizer_pre_hooks)
    gone = weakref.ref(described(late_save.fences))
    assert gone() is not None, "an optimizer made anew may step over it while copies are made"
    late_save.fences.close()
    assert len(_global_optimizer_pre_hooks) == hooks - 1
    gc.collect()
    assert gone() is None
    late_save.fences.close()


def described(fences: OptimizerFences) -> torch.Tensor:
    """Describe a state that nobody keeps, and return one of its parameters."""
    state = trained()
    TorchBackend(fences).describe(state)
    return state["model"].first.weight


def test_the_next_step_lets_go_of_parameters_whose_copies_are_made(late_save: Any) -> None:
    gone = weakref.ref(described(late_save.fences))
    trained()
    gc.collect()
    assert gone() is None


def test_what_is_remembered_of_a_tensor_follows_the_tensor() -> None:
    backend = TorchBackend()
    tensor = torch.zeros(2, 3)

    def spec(tensor: torch.Tensor) -> str:
        (leaf,) = backend.describe({"t": tensor}).leaves
        assert backend.host_array(leaf.shards[0].data).address == tensor.data_ptr()
        assert leaf.shards[0].box.shape == tuple(tensor.shape)
        return str(leaf.spec)

    assert spec(tensor) == spec(tensor) == "float32[2, 3]"
    tensor.data = torch.zeros(5)
    assert spec(tensor) == "float32[5]"
    tensor.data = torch.zeros(5, dtype=torch.bfloat16)
    assert spec(tensor) == "bfloat16[5]"
    tensor.resize_(7)
    assert spec(tensor) == "bfloat16[7]"
    tensor = torch.zeros(7, dtype=torch.int8)
    assert spec(tensor) == "int8[7]"
    tensor = torch.zeros(0)
    assert backend.describe({"t": tensor}).leaves[0].shards == ()
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None
