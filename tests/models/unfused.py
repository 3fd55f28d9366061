"""A GPT whose attention is written out: the layer that Korthikanti et al. (2022) count the activations of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention by matrix products and a softmax."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril().logical_not())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = self.dropout(scores.masked_fill(self.mask, float("-inf")).softmax(-1))
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, length, dropout)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return result


class UnfusedGPT(nn.Module):
    """Takes [batch, length, width] and gives the same."""

    def __init__(self, width: int, heads: int, length: int, depth: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(width, heads, length, dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return x
