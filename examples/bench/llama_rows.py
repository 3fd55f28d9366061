"""A training step of a Llama of 1.2 billion parameters in bf16 with AdamW on one device, against eager and
torch.compile; with recomputation all three compute layers again."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import graphshard
from device import reset_peak
from graphshard.runtime.memory import peak_device_bytes
from llama import LlamaSizes, batch_of, loss_fn, make_llama
from peak_flops import peak_flops
from speed_rows import EAGER, INDUCTOR, OURS, Record, Setting, forget

SIZES = {
    "full": LlamaSizes(),
    "quick": LlamaSizes(layers=2, sequence=1024, batch=1),
    "tiny": LlamaSizes(1, 32, 4, 2, 64, 128, 16, 2),
}
LEARNING_RATE = 1e-4
WARMUP, REPEATS, STEPS = 5, 3, 4
"""A graph of CUDA is captured in the third step; each repeat times so many steps together."""
LOSS_OFF = 0.05
"""Losses after the warm-up agree to this: bf16 rounds differently in different kernels."""

Step = Callable[[], Tensor]


def llama_rows(plans: dict[str, str], checkpointed: bool, setting: Setting, record: Record) -> None:
    """One row; ``plans`` by contender. ``checkpointed``: the peers compute layers again by torch's own means."""
    sizes, device = SIZES[setting.scale], setting.device
    title = f"{sizes.parameters / 1e9:.2f} G parameters, {sizes.batch} x {sizes.sequence} tokens"
    title += ", layers checkpointed" if checkpointed else ""
    if not record.has_time(title):
        return
    row = record.row(title)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    row.facts |= {"flops": sizes.flops, "tokens": sizes.tokens, "plans": plans, "losses": {}, "peak_bytes": {}}
    row.facts["peak_flops"] = peak_flops(name)
    makers: dict[str, Callable[[], Step]] = {
        contender: functools.partial(_ours, sizes, plan, device) for contender, plan in plans.items()
    }
    makers[EAGER] = functools.partial(_theirs, sizes, checkpointed, False, device)
    makers[INDUCTOR] = functools.partial(_theirs, sizes, checkpointed, True, device)

    def measure(contender: str, make: Callable[[], Step]) -> None:
        step = make()
        for _ in range(WARMUP if device.type == "cuda" else 1):
            loss = step()
        row.facts["losses"][contender] = loss.item()
        reset_peak(device)
        row.seconds[contender] = step_seconds(step, device)
        row.facts["peak_bytes"][contender] = peak_device_bytes(device)

    for contender, make in makers.items():
        if record.has_time(f"{title}: {contender}"):
            record.attempt(row, contender, functools.partial(measure, contender, make))
            forget(device)
    record.attempt(row, OURS, functools.partial(_agree, row.facts["losses"]))


def step_seconds(step: Step, device: torch.device) -> float:
    """Of a step among others: the host may be ahead, as it is in training."""
    repeats, steps = (REPEATS, STEPS) if device.type == "cuda" else (1, 1)
    found = []
    for _ in range(repeats):
        _settle(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        _settle(device)
        found.append((time.perf_counter() - begin) / steps)
    return statistics.median(found)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _agree(losses: dict[str, float]) -> None:
    """The same training on all sides."""
    if EAGER in losses:
        off = {name: loss for name, loss in losses.items() if abs(loss - losses[EAGER]) > LOSS_OFF}
        assert not off, f"losses differ from eager's {losses[EAGER]:.4f}: {off}"


def _ours(sizes: LlamaSizes, plan: str, device: torch.device) -> Step:
    x, y = batch_of(sizes, device)
    compiled = graphshard.compile(
        make_llama(sizes, device),
        plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=LEARNING_RATE),
        example_inputs=(x, y),
        executor="local",
        device=device,
    )
    return lambda: compiled.step(x, y)


def _theirs(sizes: LlamaSizes, checkpointed: bool, by_inductor: bool, device: torch.device) -> Step:
    x, y = batch_of(sizes, device)
    model = make_llama(sizes, device, checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(model(x), y)

    if by_inductor:
        torch._dynamo.reset()
        loss_of = torch.compile(loss_of, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")

    def step() -> Tensor:
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
