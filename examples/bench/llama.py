"""A Llama in plain PyTorch, of the sizes of Llama 3.2 1B: grouped queries, rotary positions, gated feed-forward, the
head tied to the embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peak_flops import model_flops


@dataclass(frozen=True)
class LlamaSizes:
    """Of the model and of a step."""

    layers: int = 16
    width: int = 2048
    heads: int = 32
    kv_heads: int = 8
    inner: int = 8192
    vocabulary: int = 128256
    sequence: int = 2048
    batch: int = 4  # sequences

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @property
    def parameters(self) -> int:
        """All but the norms' multiply: an embedding that is also the head does."""
        head_width = self.width // self.heads
        attention = self.width * (2 * self.width + 2 * self.kv_heads * head_width)
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocabulary * self.width

    @property
    def flops(self) -> float:
        """Of a step, as peak_flops.py counts."""
        return model_flops(self.tokens, self.parameters, self.layers, self.width, self.sequence)


class RmsNorm(nn.Module):
    """Root mean square norm over the last dim, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """As transformers' Llama has it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm; [batch, seq, width] both ways."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        kv_width = sizes.width // sizes.heads * sizes.kv_heads
        self.norm1, self.norm2 = RmsNorm(sizes.width), RmsNorm(sizes.width)
        self.q = nn.Linear(sizes.width, sizes.width, bias=False)
        self.k = nn.Linear(sizes.width, kv_width, bias=False)
        self.v = nn.Linear(sizes.width, kv_width, bias=False)
        self.o = nn.Linear(sizes.width, sizes.width, bias=False)
        self.gate = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        mixed: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + mixed

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, length, heads, width // self.heads).transpose(1, 2)

        q = rotated(split(self.q(x), self.heads), cos, sin)
        k, v = rotated(split(self.k(x), self.kv_heads), cos, sin), split(self.v(x), self.kv_heads)
        k, v = (self._repeated(y) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        return out

    def _repeated(self, x: Tensor) -> Tensor:
        """Each key and value head for all queries of its group."""
        batch, heads, length, head_width = x.shape
        times = self.heads // heads
        return x[:, :, None].expand(batch, heads, times, length, head_width).reshape(batch, -1, length, head_width)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021); ``x`` is [batch, head, seq, head width]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Llama(nn.Module):
    """Token ids [batch, seq] to logits [batch, seq, vocabulary]. ``checkpointed``: layers are computed again in the
    backward, by torch's own means."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: LlamaSizes, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.token = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList([Layer(sizes) for _ in range(sizes.layers)])
        self.norm = RmsNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.head.weight = self.token.weight
        head_width = sizes.width // sizes.heads
        speeds = 500000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        angles = torch.outer(torch.arange(sizes.sequence, dtype=torch.float32), speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_llama(sizes: LlamaSizes, device: torch.device, checkpointed: bool = False) -> Llama:
    """In bf16, with the same weights each time on one kind of device."""
    torch.manual_seed(0)
    with device:
        model = Llama(sizes, checkpointed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter.data, std=0.02)
    return model.to(torch.bfloat16)


def batch_of(sizes: LlamaSizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and those that follow, [batch, seq] each."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.sequence + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
