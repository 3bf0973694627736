"""How the example's GPT is written in torch and in JAX.

The JAX tree, with `width` features, `heads` heads of `head_dim = width / heads`:

    params/tokens/embedding                 (vocabulary, width); the head shares it
    params/positions/embedding              (context, width)
    params/blocks/<i>/norm_attention/scale  (width,)
    params/blocks/<i>/qkv/kernel            (width, 3, heads, head_dim)
    params/blocks/<i>/mix/kernel            (heads, head_dim, width)
    params/blocks/<i>/norm_mlp/scale        (width,)
    params/blocks/<i>/up/kernel             (width, 4 * width)
    params/blocks/<i>/down/kernel           (4 * width, width)
    params/norm/scale                       (width,)
"""

from __future__ import annotations

from shardckpt import ModelMap, Rule


def gpt_map(heads: int) -> ModelMap:
    """Return the map of a GPT with `heads` attention heads; any number of layers."""
    return ModelMap(
        (
            Rule("tokens.weight", "tokens/embedding"),
            Rule("positions.weight", "positions/embedding"),
            Rule("blocks.{i}.norm_attention.weight", "blocks/{i}/norm_attention/scale"),
            Rule("blocks.{i}.qkv.weight", "blocks/{i}/qkv/kernel", "(p h d) w -> w p h d"),
            Rule("blocks.{i}.mix.weight", "blocks/{i}/mix/kernel", "w (h d) -> h d w"),
            Rule("blocks.{i}.norm_mlp.weight", "blocks/{i}/norm_mlp/scale"),
            Rule("blocks.{i}.{m:up,down}.weight", "blocks/{i}/{m}/kernel", "out in -> in out"),
            Rule("norm.weight", "norm/scale"),
        ),
        sizes={"p": 3, "h": heads},
    )
