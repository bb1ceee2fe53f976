"""A small decoder-only transformer in plain PyTorch: rotary positions, RMS norms, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The size of a transformer."""

    layers: int
    width: int
    heads: int


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, heads, L, d], cos and sin [L, d / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each after a norm and added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.feed_norm = nn.RMSNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d]
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class Transformer(nn.Module):
    """A causal language model: token ids [B, L] -> logits [B, L, V].

    Args:
        vocab: V.
        context: The longest L.
        shape: Layers, width and heads.
        prior: Probabilities [V] that an untrained model predicts, about; uniform where None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, vocab: int, context: int, shape: Shape, prior: Tensor | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, shape.width)
        self.bias = nn.Parameter(torch.zeros(vocab) if prior is None else prior.log())
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(context), 10_000.0 ** (-torch.arange(half) / half))  # [L, d / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What writes into the residual stream starts smaller: its variance mustn't grow with depth.
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if writes else 0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, width]: what the head is applied to, final norm included."""
        # Normed: embeddings small enough to be tied to the head would be drowned by the first block's output.
        x = F.rms_norm(self.embed(ids), (self.embed.embedding_dim,))
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, V]."""
        return F.linear(self.hidden(ids), self.embed.weight, self.bias)
