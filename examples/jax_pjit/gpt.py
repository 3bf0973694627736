"""The small GPT of the torch example as plain JAX functions, and how it lies on a mesh.

Parameters have the names and shapes of the torch model: a linear layer's weight is (out, in).
"""

from __future__ import annotations

from typing import Any, Final

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

Params = dict[str, Any]
_EPS: Final = float(jnp.finfo(jnp.float32).eps)
# Tensor parallel over "model", and what that leaves is cut over "data" (FSDP). A layer that widens
# is cut by its outputs, the one after it by its inputs.
_SPECS: Final = {
    "tokens": PartitionSpec("data", "model"),
    "positions": PartitionSpec(None, "data"),
    "qkv": PartitionSpec("model", "data"),
    "mix": PartitionSpec("data", "model"),
    "up": PartitionSpec("model", "data"),
    "down": PartitionSpec("data", "model"),
}


def init(key: jax.Array, layers: int, width: int, context: int, vocabulary: int) -> Params:
    """Return fresh parameters, the same on every mesh."""
    keys = iter(jax.random.split(key, 2 + 4 * layers))
    shrink = (2 * layers) ** -0.5

    def matrix(*shape: int, scale: float = 1.0) -> Params:
        return {"weight": 0.02 * scale * jax.random.normal(next(keys), shape)}

    def gain() -> Params:
        return {"weight": jnp.ones(width)}

    params: Params = {"tokens": matrix(vocabulary, width), "positions": matrix(context, width)}
    params["blocks"] = {
        str(layer): {
            "norm_attention": gain(),
            "qkv": matrix(3 * width, width),
            "mix": matrix(width, width, scale=shrink),
            "norm_mlp": gain(),
            "up": matrix(4 * width, width),
            "down": matrix(width, 4 * width, scale=shrink),
        }
        for layer in range(layers)
    }
    params["norm"] = gain()
    return params


def specs(params: Params) -> Params:
    """Return the PartitionSpec of every parameter."""
    return jax.tree.map_with_path(lambda path, _: _SPECS.get(path[-2].key, PartitionSpec()), params)


def logits(params: Params, tokens: jax.Array, heads: int) -> jax.Array:
    """Return logits of shape (batch, context, vocabulary) for int32 tokens (batch, context)."""
    x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][: tokens.shape[1]]
    for layer in range(len(params["blocks"])):
        block = params["blocks"][str(layer)]
        x = x + _attention(block, _norm(x, block["norm_attention"]), heads)
        hidden = jax.nn.gelu(_linear(_norm(x, block["norm_mlp"]), block["up"]), approximate=False)
        x = x + _linear(hidden, block["down"])
    return _linear(_norm(x, params["norm"]), params["tokens"])


def _attention(block: Params, x: jax.Array, heads: int) -> jax.Array:
    batch, context, width = x.shape
    parts = _linear(x, block["qkv"]).reshape(batch, context, 3, heads, width // heads)
    query, key, value = (parts[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
    causal = jnp.tril(jnp.ones((context, context), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return _linear(attended.reshape(batch, context, width), block["mix"])


def _linear(x: jax.Array, layer: Params) -> jax.Array:
    return x @ layer["weight"].T


def _norm(x: jax.Array, layer: Params) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + _EPS) * layer["weight"]
