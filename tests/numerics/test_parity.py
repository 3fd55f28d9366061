"""Training by a plan is training on one device: every loss, and at the end weights, optimizer state and buffers, agree
with eager PyTorch that saw the same micro-batches. ``-m full`` runs the whole matrix, instead of a selection."""

from __future__ import annotations

import pytest
import torch

from numerics.cases import OPTIMIZERS, PLANS, SPLITS, ZERO_GRADIENT, adamw, maker, sgd
from numerics.reference import TOLERANCE, Tolerance, check_parity

DTYPES = {"f64": torch.float64, "f32": torch.float32}
FLOAT32_INSIDE = {"gpt2": TOLERANCE[torch.float32], "llama": TOLERANCE[torch.float32], "t5": (1e-4, 1e-5)}
"""Models that compute norms or the loss in float32 whatever they are in: there a gradient's third rounds otherwise than
its whole, which Adam makes more of where a gradient is near zero."""


def tolerance_of(name: str) -> Tolerance | None:
    """On a GPU, whose kernels round otherwise than eager operators, these models are as far off without a third."""
    return None if torch.get_default_device().type == "cpu" else FLOAT32_INSIDE.get(name)


ZOO = ("mlp", "gpt", "convnet", "gpt2", "llama", "bert", "t5", "vit", "resnet", "nested", "encoder")


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2"])
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_ten_steps_in_float32(name: str, plan: str) -> None:
    check_parity(maker(name, plan), plan, adamw, dtype=torch.float32, steps=10, max_grad_norm=0.5, noisy=ZERO_GRADIENT)


@pytest.mark.parametrize("plan", ["zero3+pp2", "zero2+pp2"])
def test_ten_steps_in_float64(plan: str) -> None:
    check_parity(maker("gpt", plan), plan, adamw, dtype=torch.float64, steps=10, max_grad_norm=0.5)


@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan: str) -> None:
    check_parity(maker("gpt", plan), plan, adamw, dtype=torch.float64, max_grad_norm=0.5)


@pytest.mark.parametrize("plan", SPLITS)
def test_micro_batch_counts_schedules_and_budgets(plan: str) -> None:
    check_parity(maker("mlp", plan), plan, sgd, dtype=torch.float64)


@pytest.mark.parametrize("plan", ["zero3+pp2", "zero2:size=3"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str, plan: str) -> None:
    check_parity(maker("mlp", plan), plan, OPTIMIZERS[optimizer], dtype=torch.float64, steps=4, max_grad_norm=0.1)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("mlp", "gpt")])
def test_models(name: str) -> None:
    plan = "zero3+pp2:microbatches=2"
    tolerance = tolerance_of(name)
    check_parity(maker(name, plan), plan, adamw, dtype=torch.float64, steps=2, max_grad_norm=0.5, tolerance=tolerance)


@pytest.mark.parametrize(("name", "plan"), [("convnet", "dp2+accum2"), ("resnet", "pp4:microbatches=2"), ("t5", "pp4")])
def test_models_with_buffers_or_many_skips(name: str, plan: str) -> None:
    check_parity(maker(name, plan), plan, sgd, dtype=torch.float64, steps=2, tolerance=tolerance_of(name))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS + SPLITS)
@pytest.mark.parametrize("name", ZOO)
def test_everything(name: str, plan: str, optimizer: str, dtype: str) -> None:
    noisy = ZERO_GRADIENT if dtype == "f32" and optimizer != "sgd" else ()
    check_parity(
        maker(name, plan),
        plan,
        OPTIMIZERS[optimizer],
        dtype=DTYPES[dtype],
        steps=10,
        max_grad_norm=0.5,
        noisy=noisy,
        tolerance=FLOAT32_INSIDE.get(name),
    )
