"""AdamW on 1 GB of parameters: graphshard's update of flat shards against torch's fused one and against copying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from generated import update_code
from kernel_rows import checked, compare, copying
from speed_rows import COPY, FUSED, OURS, Record, Row, Setting, forget
from timing import Run, timer_of

PLANS = {"fp32 shards": "zero1", "fp32 masters, bf16 shards": "zero1+bf16"}
PARAMETERS = {"full": [(8192, 8192)] * 8, "quick": [(2048, 2048)] * 8, "tiny": [(16, 16)] * 2}
"""Of two ranks: half of each is a rank's."""
LEARNING_RATE = 1e-3


def update_rows(setting: Setting, record: Record) -> None:
    """A row for each kind of shards."""
    device, timer = setting.device, timer_of(setting.device)
    shapes = PARAMETERS[setting.scale]
    sizes = [rows * cols // 2 for rows, cols in shapes]
    for title, plan in PLANS.items():
        if not record.has_time(title):
            continue
        row = record.row(f"{title}, {4 * sum(sizes) / 1e9:.2g} GB of parameters")
        makers: dict[str, Callable[[], Run]] = {
            OURS: partial(_ours, plan, shapes, row, device),
            FUSED: partial(_fused, sizes, "bf16" in plan, device),
        }
        made = {contender: record.attempt(row, contender, make) for contender, make in makers.items()}
        runs = {contender: run for contender, run in made.items() if run is not None}
        per_element = 30 if "bf16" in plan else 28  # parameter, gradient, two states read; all but one written
        row.facts["bytes"] = per_element * sum(sizes)
        runs[COPY] = copying(row.facts["bytes"], device)
        compare(timer, runs, row, record)
        made.clear()
        runs.clear()
        forget(device)


def _ours(plan: str, shapes: Sequence[tuple[int, int]], row: Row, device: torch.device) -> Run:
    written = update_code(shapes, plan, partial(torch.optim.AdamW, lr=LEARNING_RATE))
    row.facts[OURS] = written.told
    return checked(written, device)


def _fused(sizes: list[int], halves: bool, device: torch.device) -> Run:
    """torch's own update of float32 parameters of these sizes, and copies of them in bf16."""
    params = [torch.rand(size, device=device).requires_grad_() for size in sizes]
    for param in params:
        param.grad = torch.rand_like(param)
    optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)
    shards = [torch.empty_like(param, dtype=torch.bfloat16) for param in params] if halves else []

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            for shard, param in zip(shards, params, strict=bool(shards)):
                shard.copy_(param)

    return step
