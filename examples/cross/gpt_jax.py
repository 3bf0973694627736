"""The GPT of the torch example as JAX writes it: the names and shapes that `gpt_map` tells.

It computes what `../torch_fsdp/gpt.py` does: RMSNorm with the same eps, exact GELU, causal
attention, a head that shares the token embedding.
"""

from __future__ import annotations

from typing import Any, Final

import jax
from jax import numpy as jnp

Params = dict[str, Any]
_EPS: Final = float(jnp.finfo(jnp.float32).eps)


def blank(vocabulary: int, context: int, layers: int, width: int, heads: int) -> Params:
    """Return parameters that are all zero; their shapes are what a restore needs."""

    def zeros(name: str, *shape: int) -> Params:
        return {name: jnp.zeros(shape)}

    head_dim = width // heads
    return {
        "tokens": zeros("embedding", vocabulary, width),
        "positions": zeros("embedding", context, width),
        "blocks": {
            str(layer): {
                "norm_attention": zeros("scale", width),
                "qkv": zeros("kernel", width, 3, heads, head_dim),
                "mix": zeros("kernel", heads, head_dim, width),
                "norm_mlp": zeros("scale", width),
                "up": zeros("kernel", width, 4 * width),
                "down": zeros("kernel", 4 * width, width),
            }
            for layer in range(layers)
        },
        "norm": zeros("scale", width),
    }


def logits(params: Params, tokens: jax.Array) -> jax.Array:
    """Return logits of shape (batch, context, vocabulary) for int32 tokens (batch, context)."""
    embedding = params["tokens"]["embedding"]
    x = embedding[tokens] + params["positions"]["embedding"][: tokens.shape[1]]
    for layer in range(len(params["blocks"])):
        block = params["blocks"][str(layer)]
        x = x + _attention(block, _norm(x, block["norm_attention"]))
        hidden = _norm(x, block["norm_mlp"]) @ block["up"]["kernel"]
        x = x + jax.nn.gelu(hidden, approximate=False) @ block["down"]["kernel"]
    return _norm(x, params["norm"]) @ embedding.T


def _attention(block: Params, x: jax.Array) -> jax.Array:
    parts = jnp.einsum("btw,wphd->pbthd", x, block["qkv"]["kernel"])
    query, key, value = parts
    scores = jnp.einsum("bshd,bthd->bhst", query, key) * query.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    attended = jnp.einsum("bhst,bthd->bshd", weights, value)
    return jnp.einsum("bshd,hdw->bsw", attended, block["mix"]["kernel"])


def _norm(x: jax.Array, layer: Params) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + _EPS) * layer["scale"]
