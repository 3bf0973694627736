"""A small GPT in plain torch, and how it is cut over ranks with FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from corpus import VOCABULARY
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Block(nn.Module):
    """Causal self-attention and an MLP, each after an RMSNorm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        """Build a block of `width` features and `heads` attention heads."""
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features of shape (batch, context, width)."""
        batch, context, width = x.shape
        parts = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, context, width))
        hidden: torch.Tensor = self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x + hidden


class GPT(nn.Module):
    """Byte-level GPT; the head shares its weight with the token embedding."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        """Build the whole model with fresh weights, drawn from torch's global generator.

        Raises:
            ValueError: The width does not divide by the number of heads.
        """
        if width % heads:
            raise ValueError(f"a width of {width} does not divide by {heads} heads")
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                shrink = (
                    (2 * layers) ** -0.5 if name.endswith(("mix.weight", "down.weight")) else 1.0
                )
                nn.init.normal_(parameter, std=0.02 * shrink)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (batch, context, vocabulary) for int64 tokens (batch, context)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def cut_over(mesh: DeviceMesh, model: GPT) -> None:
    """Shard the model in place: every block is a unit of its own, the rest belongs to the root."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
