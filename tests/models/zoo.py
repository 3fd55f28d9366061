"""Models to capture and train: tiny, deterministic, every size an argument.

Each builder returns ``(model, batch, loss_fn)``: ``compiled.step(*batch[0], **batch[1])`` with that loss function. The
batch's ``rows`` split into micro-batches. Dropout is off unless asked for, so that a step can be compared with eager
training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Case = tuple[nn.Module, Batch, Callable[..., Tensor] | None]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of [batch, seq, vocabulary] against [batch, seq]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class MLP(nn.Module):
    """Linear layers with GELU between."""

    def __init__(self, width: int, hidden: int, classes: int, depth: int, dropout: float) -> None:
        super().__init__()
        sizes = [width, *[hidden] * depth, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.dropout(F.gelu(layer(x)))
        result: Tensor = self.layers[-1](x)
        return result


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result


class GPT(nn.Module):
    """A decoder whose output weight is the token embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.h:
            y = block(y)
        result: Tensor = self.head(self.norm(y))
        return result


class ConvNet(nn.Module):
    """Convolutions with BatchNorm and a residual."""

    def __init__(self, channels: int, classes: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        result: Tensor = self.head(F.max_pool2d(x, 2).mean((2, 3)))
        return result


class Nested(nn.Module):
    """Takes keyword and nested arguments, has a parameter without a gradient, a frozen one and a constant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.unused = nn.Linear(width, 2)
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.table = torch.linspace(-1, 1, width)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]], *, scale: float, target: Tensor) -> dict[str, Tensor]:
        a, rest = pair
        self.steps = self.steps + 1
        y = self.left(a) * scale + self.right(rest["b"]) * self.table.to(a.dtype) + self.frozen
        return {"loss": ((y - target) ** 2).mean(), "y": y}


def _generator(seed: int = 1) -> torch.Generator:
    device = torch.get_default_device()
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def _ids(vocabulary: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(vocabulary, shape, generator=_generator(seed))


def _floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))


def mlp(
    rows: int = 8, width: int = 8, hidden: int = 16, classes: int = 5, depth: int = 3, dropout: float = 0.0
) -> Case:
    torch.manual_seed(0)
    batch = (_floats(rows, width), _ids(classes, rows))
    return MLP(width, hidden, classes, depth, dropout), (batch, {}), F.cross_entropy


def gpt(
    rows: int = 8,
    length: int = 8,
    vocabulary: int = 32,
    width: int = 16,
    depth: int = 2,
    heads: int = 2,
    dropout: float = 0.0,
) -> Case:
    torch.manual_seed(0)
    model = GPT(vocabulary, length, width, depth, heads, dropout)
    return model, ((_ids(vocabulary, rows, length), _ids(vocabulary, rows, length, seed=2)), {}), token_loss


def convnet(rows: int = 8, size: int = 8, channels: int = 6, classes: int = 5, depth: int = 2) -> Case:
    torch.manual_seed(0)
    model = ConvNet(channels, classes, depth)
    return model, ((_floats(rows, 3, size, size), _ids(classes, rows)), {}), F.cross_entropy


def encoder(
    rows: int = 8, length: int = 6, width: int = 16, depth: int = 2, heads: int = 2, dropout: float = 0.0
) -> Case:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True)
    model = nn.TransformerEncoder(layer, depth)
    return model, ((_floats(rows, length, width), _floats(rows, length, width, seed=2)), {}), F.mse_loss


def nested(rows: int = 8, width: int = 6) -> Case:
    torch.manual_seed(0)
    pair = (_floats(rows, width), {"b": _floats(rows, width, seed=2)})
    return Nested(width), ((pair,), {"scale": 0.5, "target": _floats(rows, width, seed=3)}), None


def gpt2(
    rows: int = 8, length: int = 8, vocabulary: int = 32, width: int = 16, depth: int = 2, dropout: float = 0.0
) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=depth, n_head=2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    ids = _ids(vocabulary, rows, length)
    return GPT2LMHeadModel(config).train(), ((), {"input_ids": ids, "labels": ids}), None


def llama(
    rows: int = 8, length: int = 8, vocabulary: int = 32, width: int = 16, depth: int = 2, heads: int = 4
) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=length,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = _ids(vocabulary, rows, length)
    return LlamaForCausalLM(config).train(), ((), {"input_ids": ids, "labels": ids}), None


def bert(
    rows: int = 8, length: int = 8, vocabulary: int = 32, width: int = 16, depth: int = 2, dropout: float = 0.0
) -> Case:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=length,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    ids = _ids(vocabulary, rows, length)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[::2, length - 2 :] = 0
    model = BertForMaskedLM(config).train()
    return model, ((), {"input_ids": ids, "attention_mask": mask, "labels": ids}), None


def t5(
    rows: int = 8, length: int = 6, vocabulary: int = 32, width: int = 16, depth: int = 2, dropout: float = 0.0
) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=2 * width, num_layers=depth, num_heads=2,
        dropout_rate=dropout, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    ids, labels = _ids(vocabulary, rows, length), _ids(vocabulary, rows, length + 1, seed=2)
    return T5ForConditionalGeneration(config).train(), ((), {"input_ids": ids, "labels": labels}), None


def vit(rows: int = 8, size: int = 8, width: int = 16, depth: int = 2, classes: int = 5, dropout: float = 0.0) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=2 * width,
        image_size=size, patch_size=size // 2, num_labels=classes,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    batch = {"pixel_values": _floats(rows, 3, size, size), "labels": _ids(classes, rows)}
    return ViTForImageClassification(config).train(), ((), batch), None


def resnet(rows: int = 8, size: int = 32, width: int = 8, depth: int = 1, classes: int = 5) -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(  # type: ignore[call-arg]
        embedding_size=width, hidden_sizes=[width, 2 * width], depths=[depth, depth], layer_type="basic",
        num_labels=classes,
    )  # fmt: skip
    batch = {"pixel_values": _floats(rows, 3, size, size), "labels": _ids(classes, rows)}
    return ResNetForImageClassification(config).train(), ((), batch), None


MODELS: dict[str, Callable[..., Case]] = {
    "mlp": mlp,
    "gpt": gpt,
    "convnet": convnet,
    "encoder": encoder,
    "nested": nested,
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
}
"""Name to builder; called without arguments it gives a small case."""
