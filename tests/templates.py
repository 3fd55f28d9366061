"""The regions that kernels are for, one of each kind, at the sizes of a large model: what compiles for every GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import graphshard.ops  # noqa: F401 - defines graphshard::pack
from graphshard.region import Region
from traced import region_from
from updates import OPTIMIZERS, update_region

aten = torch.ops.aten
gs = torch.ops.graphshard
half = torch.bfloat16

HIDDEN, VOCABULARY = 4096, 128256
Made = tuple[Region, Mapping[int, int]]
"""A region, and which of its results overwrite which inputs, by position."""


def empty(*shape: int, dtype: torch.dtype = half) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


X = empty(2048, HIDDEN)
WEIGHT = empty(HIDDEN)
ROW = empty(2048, 1, dtype=torch.float32)
LOGITS, LABELS = empty(8192, VOCABULARY), empty(8192, dtype=torch.int64)
SCALAR, SEED = empty(dtype=torch.float32), empty(dtype=torch.int64)


def layer_norm(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """Of a sum, which is a result, too."""
    total = x + added
    return total, *aten.native_layer_norm(total, [HIDDEN], weight, bias, 1e-5)


def layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Any:
    """With the sums of weight and bias."""
    return aten.native_layer_norm_backward(grad, x, [HIDDEN], mean, rstd, weight, weight, [True] * 3)


def rms_norm(x: Tensor, weight: Tensor) -> list[Tensor]:
    """As Llama has it: in float32."""
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return [weight * (wide * rstd).to(x.dtype), rstd]


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> list[Tensor]:
    """With the sum of the weight."""
    wide, g = x.float(), (grad * weight).float()
    normal = wide * rstd
    dx = rstd * (g - normal * (g * normal).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (grad * normal.to(x.dtype)).sum(0)]


def cross_entropy(logits: Tensor, labels: Tensor) -> Any:
    """Of logits in bf16."""
    return aten.nll_loss_forward(torch.log_softmax(logits.float(), -1), labels, None, 1, -100)


def cross_entropy_backward(grad: Tensor, logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """From the logits, of which nothing else was kept."""
    logs = torch.log_softmax(logits.float(), -1)
    by_logs = aten.nll_loss_backward(grad, logs, labels, None, 1, -100, count)
    return aten._log_softmax_backward_data(by_logs, logs, 1, torch.float32).to(half)  # type: ignore[no-any-return]


def gelu(x: Tensor, bias: Tensor) -> list[Tensor]:
    """Both kinds, and a transposed operand."""
    return [F.gelu(x + bias), F.gelu(x, approximate="tanh"), F.gelu(x.T)]


def gelu_backward(grad: Tensor, x: Tensor) -> list[Tensor]:
    """Both kinds, and a transposed operand."""
    return [
        aten.gelu_backward(grad, x),
        aten.gelu_backward(grad, x, approximate="tanh"),
        aten.gelu_backward(grad.T, x.T),
    ]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """A gate's activation times what it gates."""
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    """Both gradients."""
    return [aten.silu_backward(grad * up, gate), grad * F.silu(gate)]


def activations(x: Tensor, bias: Tensor) -> list[Tensor]:
    """By torch's decompositions."""
    y = x + bias
    return [F.mish(y), F.hardswish(y), F.softplus(y) * torch.atan2(x, bias)]


def activations_backward(grad: Tensor, x: Tensor) -> list[Tensor]:
    """The same of their gradients."""
    return [
        aten.mish_backward(grad, x),
        aten.hardswish_backward(grad, x),
        aten.softplus_backward(grad, x, 1.0, 20.0),
        aten.elu_backward(grad, 1.0, 1.0, 1.0, False, x),
    ]


def dropout(x: Tensor, bias: Tensor, added: Tensor, seed: Tensor) -> Tensor:
    """Of what a projection gives, and the residual stream."""
    return (x + bias) * gs.dropout_mask(seed, list(x.shape), 0.1) * (1 / 0.9) + added  # type: ignore[no-any-return]


def dropout_norm(x: Tensor, bias: Tensor, added: Tensor, seed: Tensor, weight: Tensor) -> Any:
    """The same and a layer norm behind it."""
    return layer_norm(dropout(x, bias, added, seed), added, weight, weight)


def packing(*parts: Tensor) -> list[Tensor]:
    """The norm of three parts, and their bf16 copies side by side."""
    return [gs.sq_norm(parts), gs.pack([p.to(half) for p in parts], [0, 5000, 10000], 20000)]


def _of(function: Callable[..., Any], *arguments: Tensor) -> Made:
    return region_from(function, *arguments), {}


def _softmax_backward(grad: Tensor, out: Tensor) -> Tensor:
    return aten._softmax_backward_data(grad, out, -1, torch.float32)  # type: ignore[no-any-return]


TEMPLATES: dict[str, Callable[[], Made]] = {
    "layer_norm": partial(_of, layer_norm, X, X, WEIGHT, WEIGHT),
    "layer_norm_backward": partial(_of, layer_norm_backward, X, X, ROW, ROW, WEIGHT),
    "rms_norm": partial(_of, rms_norm, X, WEIGHT),
    "rms_norm_backward": partial(_of, rms_norm_backward, X, X, ROW, WEIGHT),
    "softmax": partial(_of, partial(torch.softmax, dim=-1), empty(4096, 8192, dtype=torch.float32)),
    "softmax_backward": partial(_of, _softmax_backward, *[empty(4096, 8192, dtype=torch.float32)] * 2),
    "cross_entropy": partial(_of, cross_entropy, LOGITS, LABELS),
    "cross_entropy_backward": partial(_of, cross_entropy_backward, SCALAR, LOGITS, LABELS, SCALAR),
    "gelu": partial(_of, gelu, X, WEIGHT),
    "gelu_backward": partial(_of, gelu_backward, X, X),
    "swiglu": partial(_of, swiglu, X, X),
    "swiglu_backward": partial(_of, swiglu_backward, X, X, X),
    "activations": partial(_of, activations, X, WEIGHT),
    "activations_backward": partial(_of, activations_backward, X, X),
    "dropout": partial(_of, dropout, X, WEIGHT, X, SEED),
    "dropout_norm": partial(_of, dropout_norm, X, WEIGHT, X, SEED, WEIGHT),
    "packing": partial(_of, packing, *(empty(n, dtype=torch.float32) for n in (5000, 4096, 10000))),
    **{name: partial(update_region, make, "zero1+bf16", torch.float32) for name, make in OPTIMIZERS.items()},
    **{f"{n}_fp16": partial(update_region, OPTIMIZERS[n], "zero1+fp16", torch.float32) for n in ("adamw", "sgd")},
}
"""By name. Updates clip by the global norm and cast to the precision of the parameters; those of fp16 unscale."""
