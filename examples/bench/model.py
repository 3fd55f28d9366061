"""The benchmark's model and data: a plain GPT whose blocks can be handed to stages by hand, as the peers need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step; the defaults are what results are quoted for."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 256
    batch: int = 8  # sequences per step, all data-parallel ranks together
    microbatch: int = 2  # sequences

    def microbatches(self, dp: int) -> int:
        """Per step, on each of ``dp`` data-parallel ranks."""
        return self.batch // (self.microbatch * dp)


class Block(nn.Module):
    """Pre-norm attention and a feed-forward of four times the width; [batch, seq, width] both ways."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class Part(nn.Module):
    """Blocks ``begin`` to ``end``; with the first comes the embedding, with the last the head. All of them: the model.

    Names are those of the whole model, whichever part it is.
    """

    def __init__(self, sizes: Sizes, begin: int = 0, end: int | None = None) -> None:
        super().__init__()
        end = sizes.layers if end is None else end
        self.first, self.last = begin == 0, end == sizes.layers
        if self.first:
            self.token = nn.Embedding(sizes.vocabulary, sizes.width)
            self.position = nn.Embedding(sizes.sequence, sizes.width)
        self.blocks = nn.ModuleDict({str(i): Block(sizes) for i in range(begin, end)})
        if self.last:
            self.norm = nn.LayerNorm(sizes.width)
            self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [batch, seq] or hidden states [batch, seq, width] to hidden states or logits."""
        if self.first:
            x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if self.last else x


def make_part(sizes: Sizes, begin: int = 0, end: int | None = None) -> Part:
    """A part with the weights it has in the whole model, whatever the split."""
    torch.manual_seed(0)
    whole = Part(sizes).state_dict()
    part = Part(sizes, begin, end)
    part.load_state_dict({name: whole[name] for name in part.state_dict()})
    return part


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; logits [batch, seq, vocabulary], targets [batch, seq]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch_of(sizes: Sizes, step: int, dp_rank: int = 0, dp: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [batch / dp, seq] each, of one data-parallel rank in one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.sequence + 1), generator=generator)
    tokens = tokens.chunk(dp)[dp_rank]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def cut_points(sizes: Sizes, parts: int) -> Sequence[int]:
    """Where to begin each of ``parts`` stages, and the end: blocks and the head shared out by their multiplications.

    The head counts as many blocks as its matrix has more elements than a block's 12 width².
    """
    head = sizes.vocabulary / (12 * sizes.width)
    share = (sizes.layers + head) / parts
    inner = [max(i, min(round(i * share), sizes.layers - parts + i)) for i in range(1, parts)]
    return [0, *inner, sizes.layers]
