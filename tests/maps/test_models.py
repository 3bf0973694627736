"""Real models: what one framework saved computes the same in the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpt import GPT
from gpt_map import gpt_map
from worlds import blank, load, save

import shardckpt.torch as ours
from shardckpt.geometry.array_spec import ArraySpec
from shardckpt.load.maps import translate
from shardckpt.storage.memory import MemoryStorage

pytestmark = [pytest.mark.filterwarnings("ignore")]
TOKENS = np.array([[1, 5, 96, 2, 7, 7, 30, 0], [3, 3, 3, 50, 61, 2, 8, 9]])


def test_the_example_goes_to_jax_and_back_with_its_tied_head(tmp_path: Any) -> None:
    torch.manual_seed(0)
    one, other = (GPT(layers=2, width=24, heads=4, context=8) for _ in range(2))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (one, other)]
    one(torch.zeros((1, 8), dtype=torch.int64)).square().mean().backward()
    optimizers[0].step()
    with ours.Checkpointer(tmp_path, timeout_s=30) as checkpointer:
        checkpointer.save(1, {"model": one, "optimizer": optimizers[0]})
    specs = {
        name: ArraySpec(tuple(value.shape), "float32") for name, value in one.named_parameters()
    }
    made = translate(gpt_map(4), specs, "torch")
    assert not made.unused
    assert made.arrays["blocks/1/qkv/kernel"].spec.shape == (24, 3, 4, 6)
    state = {
        f"{place}/{name}": np.zeros(array.spec.shape, np.float32)
        for place in ("params", "opt_state/0/mu", "opt_state/0/nu")
        for name, array in made.arrays.items()
    }
    state["opt_state/0/count"] = np.zeros((), np.int32)
    load(ours_storage(tmp_path), "jax", [blank(state)], gpt_map(4))
    qkv = dict(one.named_parameters())["blocks.1.qkv.weight"].detach().numpy()
    expected = qkv.reshape(3, 4, 6, 24).transpose(3, 0, 1, 2)
    assert np.array_equal(state["params/blocks/1/qkv/kernel"], expected)
    back = save("jax", 1, lambda _: dict(state))
    ours.load(back, {"model": other, "optimizer": optimizers[1]}, map=gpt_map(4), timeout_s=30)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizers[0].state[a]["exp_avg"], optimizers[1].state[b]["exp_avg"])
        assert optimizers[1].state[b]["step"] == 1


def ours_storage(place: Any) -> Any:
    from shardckpt.storage.open import open_storage

    return open_storage(place)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scanned", [False, True])
def test_llama_computes_the_same_in_both_frameworks(tied: bool, scanned: bool) -> None:
    pytest.importorskip("flax")
    transformers = pytest.importorskip("transformers")
    from flax import nnx
    from llama_nnx import Llama, LlamaConfig, llama_map

    config = LlamaConfig(97, 32, 48, 3, 4, 2, tied=tied, scanned=scanned)
    hugging = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(hugging).eval() for _ in range(2)]
    storage = MemoryStorage()
    with ours.Checkpointer(storage, timeout_s=30) as checkpointer:
        checkpointer.save(1, {"model": models[0]})
    model = Llama(config, nnx.Rngs(0))
    graph, variables = nnx.split(model)
    pure = nnx.to_pure_dict(variables)
    state = blank(flat(pure, "params"))
    load(storage, "jax", [state], llama_map(config))
    nnx.replace_by_pure_dict(variables, filled(pure, "params", state))
    assert_same_logits(models[0], nnx.merge(graph, variables))
    back = save("jax", 1, lambda _: dict(state))
    ours.load(back, {"model": models[1]}, map=llama_map(config), timeout_s=30)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def assert_same_logits(model: Any, twin: Any) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(np.asarray(twin(TOKENS)), expected, rtol=1e-5, atol=1e-5)


def flat(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Return the leaves of nested dicts by path."""
    if not isinstance(tree, dict):
        return {prefix: np.array(tree)}
    return {
        k: v for name, inner in tree.items() for k, v in flat(inner, f"{prefix}/{name}").items()
    }


def filled(tree: Any, prefix: str, state: dict[str, np.ndarray]) -> Any:
    """Return nested dicts with leaves from a state."""
    if not isinstance(tree, dict):
        return state[prefix]
    return {name: filled(inner, f"{prefix}/{name}", state) for name, inner in tree.items()}
