"""What the parity tests are made of: models of the zoo with a batch that fits a plan, optimizers, plans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from graphshard.plan import Plan
from models.zoo import MODELS
from numerics.reference import Make

PLANS = (
    "dp2",
    "zero1:size=2",
    "zero2:size=2",
    "zero3:size=2",
    "pp2",
    "pp4",
    "zero1+pp2",
    "zero2+pp2",
    "zero3+pp2",
    "zero3+pp4",
    "dp2+zero3:size=2",
)
SPLITS = (  # more micro-batches than stages, as many, fewer
    "zero3+pp2:microbatches=3",
    "zero3+pp2:microbatches=1",
    "pp4:microbatches=2",
    "pp2:schedule=gpipe,microbatches=2",
    "pp2:schedule=zb-h1,microbatches=3",
    "pp4:schedule=zb-h1,microbatches=2",
    "pp2:schedule=zb-h2",
    "zero3+pp4:schedule=zb-h2,microbatches=6",
    "zero3+pp2:schedule=zb-h1",
    "zero3+pp2:schedule=gpipe",
    "zero3+pp2:microbatches=2+accum2",
    "zero2:size=2+accum3",
    "zero3:size=2+accum2",
    "dp2+accum2",
    "zero3:size=2,budget_gb=1+accum2",
    "zero3:budget_gb=1+pp2",
    "zero3:budget_gb=0.00001+pp2",
)
ZERO_GRADIENT = ("key.bias", "k_proj.bias", "qkv.bias", "c_attn.bias", "in_proj_bias")
"""Parts of names of parameters that hold an attention key's bias: softmax ignores it, its true gradient is zero."""


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.1)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=1e-3)


def adamw(model: nn.Module) -> Optimizer:
    """Matrices decay and learn faster than vectors.

    An ordinary learning rate: Adam moves an element by about that, however small its gradient. At ten times as much,
    eager PyTorch in float32 differs from itself by two tolerances when its micro-batches come in another order.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return AdamW([
        {"params": matrices, "lr": 1e-3, "weight_decay": 0.1},
        {"params": vectors, "lr": 3e-4, "weight_decay": 0.0},
    ])  # fmt: skip


def adagrad(model: nn.Module) -> Optimizer:
    """Adam's learning rate, for its reason, and its eps: with Adagrad's own, 1e-10, the rounding noise of a zero
    gradient (1e-18 in float64) moves a parameter by 1e-10, and eager PyTorch differs from itself by ten tolerances when
    its micro-batches are reordered."""
    return Adagrad(model.parameters(), lr=1e-3, eps=1e-8)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {"sgd": sgd, "adam": adam, "adamw": adamw, "adagrad": adagrad}


def rows_of(plan: str, per_microbatch: int = 2) -> int:
    """Rows of a global batch whose every micro-batch has ``per_microbatch``."""
    parsed = Plan.parse(plan)
    mesh = parsed.mesh(None)
    return per_microbatch * mesh.dp_size * parsed.microbatch_count(mesh)


def maker(name: str, plan: str, **sizes: object) -> Make:
    """Builds the model ``name`` of the zoo, the same at every call, with a batch for ``plan``."""

    def make() -> tuple[nn.Module, tuple[object, ...], dict[str, object], Callable[..., torch.Tensor] | None]:
        model, (args, kwargs), loss_fn = MODELS[name](**({"rows": rows_of(plan)} | sizes))
        return model, args, kwargs, loss_fn

    return make
