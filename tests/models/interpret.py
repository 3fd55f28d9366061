"""Runs the graphs of a Program on real tensors, node by node: the plainest meaning a Program has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from graphshard.program import Program, Role, Section, Slot, val


def run(section: Section, values: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    """Execute a section; every value must have the shape, strides and dtype that the graph says."""
    env: dict[fx.Node, Any] = {node: values[slot] for node, slot in section.inputs.items()}
    with torch.no_grad():
        for node in section.nodes():
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            check_type(node, env[node])
    return {slot: env[node] for slot, node in section.outputs.items()}


def check_type(node: fx.Node, actual: Any) -> None:
    """Strides count: what reads a value was captured for them."""
    expected, given = tree_flatten(val(node))[0], tree_flatten(actual)[0]
    for want, have in zip(expected, given, strict=True):
        if isinstance(want, Tensor):
            assert (want.shape, want.dtype) == (have.shape, have.dtype), f"{node} {node.target}"
            strides = zip(want.shape, want.stride(), have.stride(), strict=True)
            assert not want.numel() or all(a == b for size, a, b in strides if size > 1), (
                f"{node} {node.target}: strides {have.stride()}, graph {want.stride()}"
            )


def step(
    program: Program, stored: Mapping[Slot, Tensor], microbatches: Sequence[Mapping[Slot, Tensor]], seed: int = 0
) -> tuple[dict[Slot, Tensor], list[dict[Slot, Tensor]]]:
    """One step: the epilogue's outputs and the remaining carries, and each micro-batch's other outputs."""
    constants = {Slot(Role.CONSTANT, name): value for name, value in program.constants.items()}
    stored = {**stored, **constants}
    carries = run(program.prologue, stored)
    outputs: list[dict[Slot, Tensor]] = []
    for index, batch in enumerate(microbatches):
        key = {Slot(Role.RNG, "key"): torch.tensor([seed, 0, 0, index])}
        results = run(program.body, {**stored, **carries, **batch, **key})
        carries |= {slot: value for slot, value in results.items() if slot.role is Role.CARRY}
        outputs.append({slot: value for slot, value in results.items() if slot.role is not Role.CARRY})
    return carries | run(program.epilogue, {**stored, **carries}), outputs
