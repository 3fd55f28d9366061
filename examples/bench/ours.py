"""graphshard's side of the benchmark."""

from __future__ import annotations

import functools
from typing import Any

import torch

import graphshard
from graphshard.compile import Compiled
from model import Sizes, batch_of, loss_fn, make_part
from peers import LEARNING_RATE


def compile_row(sizes: Sizes, plan: str, dp: int) -> Compiled:
    """The benchmark's model, compiled by ``plan`` for the ranks there are, ``dp`` of them data-parallel."""
    return graphshard.compile(
        make_part(sizes),
        plan=plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=LEARNING_RATE),
        example_inputs=batch_of(sizes, 0, 0, dp),
        executor="distributed",
    )


def step(compiled: Compiled, sizes: Sizes, index: int) -> float:
    """One training step on batch ``index``; the global mean loss."""
    return compiled.step(*batch_of(sizes, index, compiled.dp_rank, compiled.dp_size)).item()


def account(compiled: Compiled) -> dict[str, Any]:
    """What the plan says of itself: bytes a rank sends a step (mean over ranks), gathers, simulated peak."""
    report = compiled.report()
    ranks = report["ranks"]
    return {
        "plan": report["plan"],
        "sent_bytes": sum(sum(rank["sent_bytes"].values()) for rank in ranks) / len(ranks),
        "gathers_per_microbatch": max(rank.get("gathers_per_microbatch", 0.0) for rank in ranks),
        "simulated_peak_bytes": [rank["peak_bytes"] for rank in ranks],
        "bubble_fraction": report["bubble_fraction"],
    }
