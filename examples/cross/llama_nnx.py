"""A Llama in Flax nnx that computes what transformers' LlamaForCausalLM does, and its model map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardckpt import ModelMap, Rule


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama.

    Attributes:
        kv_heads: Heads of keys and values; each serves `heads / kv_heads` heads of queries.
        tied: The head shares the token embedding.
        scanned: Layers are one stack of arrays that `lax.scan` walks through.
    """

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    scanned: bool = False
    rope_theta: float = 10000.0
    eps: float = 1e-6


def llama_map(config: LlamaConfig) -> ModelMap:
    """Return how LlamaForCausalLM and this Llama correspond."""

    def layer(torch: str, jax_path: str, dims: str) -> Rule:
        here, there = dims.split(" -> ")
        name = f"model.layers.{{i}}.{torch}.weight"
        if config.scanned:
            return Rule(name, f"layers/{jax_path}", f"{here} -> i {there}")
        return Rule(name, f"layers/{{i}}/{jax_path}", dims)

    rules = [
        Rule("model.embed_tokens.weight", "tokens/embedding"),
        layer("input_layernorm", "norm_attention/scale", "w -> w"),
        layer("self_attn.q_proj", "attention/q/kernel", "(h d) w -> w h d"),
        layer("self_attn.{p:k,v}_proj", "attention/{p}/kernel", "(g d) w -> w g d"),
        layer("self_attn.o_proj", "attention/o/kernel", "w (h d) -> h d w"),
        layer("post_attention_layernorm", "norm_mlp/scale", "w -> w"),
        layer("mlp.{m:gate,up,down}_proj", "mlp/{m}/kernel", "out in -> in out"),
        Rule("model.norm.weight", "norm/scale"),
    ]
    if not config.tied:
        rules.append(Rule("lm_head.weight", "head/kernel", "v w -> w v"))
    return ModelMap(tuple(rules), sizes={"h": config.heads, "g": config.kv_heads})


class Kernel(nnx.Module):
    """A matrix or its like, drawn from a normal distribution."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Draw the values."""
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class RMSNorm(nnx.Module):
    """Divides by the root of the mean square and scales."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        """Start at one."""
        self.scale = nnx.Param(jnp.ones(shape))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale[...] * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)


class Attention(nnx.Module):
    """Causal attention with grouped keys and values and rotary positions."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Draw every kernel; `stack` leads their shapes."""
        head = config.width // config.heads
        self.q = Kernel((*stack, config.width, config.heads, head), rngs)
        self.k = Kernel((*stack, config.width, config.kv_heads, head), rngs)
        self.v = Kernel((*stack, config.width, config.kv_heads, head), rngs)
        self.o = Kernel((*stack, config.heads, head, config.width), rngs)
        self.theta = config.rope_theta

    def __call__(self, x: jax.Array) -> jax.Array:
        q = rotated(jnp.einsum("btw,wgd->btgd", x, self.q.kernel[...]), self.theta)
        k = rotated(jnp.einsum("btw,wgd->btgd", x, self.k.kernel[...]), self.theta)
        v = jnp.einsum("btw,wgd->btgd", x, self.v.kernel[...])
        k, v = (jnp.repeat(part, q.shape[2] // part.shape[2], 2) for part in (k, v))
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        mixed = jnp.einsum("bhst,bthd->bshd", weights, v)
        return jnp.einsum("bshd,hdw->bsw", mixed, self.o.kernel[...])


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Draw every kernel; `stack` leads their shapes."""
        self.gate = Kernel((*stack, config.width, config.hidden), rngs)
        self.up = Kernel((*stack, config.width, config.hidden), rngs)
        self.down = Kernel((*stack, config.hidden, config.width), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gated = jax.nn.silu(x @ self.gate.kernel[...]) * (x @ self.up.kernel[...])
        return gated @ self.down.kernel[...]


class Layer(nnx.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: LlamaConfig, stack: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Build the parts; `stack` leads the shapes of their arrays."""
        self.norm_attention = RMSNorm((*stack, config.width), config.eps)
        self.attention = Attention(config, stack, rngs)
        self.norm_mlp = RMSNorm((*stack, config.width), config.eps)
        self.mlp = MLP(config, stack, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Embedding(nnx.Module):
    """Token vectors."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Draw the vectors."""
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


class Llama(nnx.Module):
    """The language model."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        """Build the whole model with fresh weights."""
        self.tokens = Embedding((config.vocabulary, config.width), rngs)
        self.layers: Any = (
            Layer(config, (config.layers,), rngs)
            if config.scanned
            else nnx.List([Layer(config, (), rngs) for _ in range(config.layers)])
        )
        self.norm = RMSNorm((config.width,), config.eps)
        self.head = None if config.tied else Kernel((config.width, config.vocabulary), rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return logits of shape (batch, context, vocabulary)."""
        x = self.tokens.embedding[...][tokens]
        if isinstance(self.layers, Layer):
            graph, stacked = nnx.split(self.layers)

            def one(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
                return nnx.merge(graph, layer)(x), None

            x, _ = jax.lax.scan(one, x, stacked)
        else:
            for layer in self.layers:
                x = layer(x)
        x = self.norm(x)
        if self.head is None:
            return x @ self.tokens.embedding[...].T
        return x @ self.head.kernel[...]


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """Return heads of shape (batch, context, heads, dims), turned as transformers does: by halves.

    Args:
        x: The heads.
        theta: Base of the wave lengths.
    """
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    one, other = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], -1)
