"""Tensors on a GPU go through host memory and come back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(("fused", "capturable"), [(True, False), (False, True), (False, False)])
def test_a_model_on_a_gpu_and_its_lazy_optimizer_state_come_back(
    fused: bool, capturable: bool, round_trip: Callable[..., Any]
) -> None:
    def make() -> dict[str, Any]:
        model = nn.Linear(8, 8).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused, capturable=capturable)
        return {"m": model, "o": optimizer}

    source, target = make(), make()
    for _ in range(2):
        source["m"](torch.ones(4, 8, device="cuda")).square().sum().backward()
        source["o"].step()
    round_trip(source, target)
    ours = target["o"].state_dict()["state"]
    for i, values in source["o"].state_dict()["state"].items():
        for name, value in values.items():
            assert ours[i][name].device == value.device, name
            assert torch.equal(ours[i][name], value), name
    assert torch.equal(target["m"].weight, source["m"].weight)


def test_a_permuted_tensor_on_a_gpu_comes_back(round_trip: Callable[..., Any]) -> None:
    source = torch.randn(3, 4, 5, device="cuda").permute(2, 0, 1)
    target = torch.zeros(4, 5, 3, device="cuda").permute(1, 2, 0)
    round_trip({"t": source}, {"t": target})
    assert torch.equal(source, target)
