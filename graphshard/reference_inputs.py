"""What a program is given to run on: parameters, buffers, optimizer state and batches, by the model's own names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphshard.program import Program, Role, Slot, val

Batch = Sequence[Sequence[Sequence[Tensor]]]
"""Of one step: per data-parallel rank, per micro-batch, the tensors in flattening order."""


@dataclass
class Inputs:
    """What steps begin with, by the model's own names, and what each is given."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    batches: list[Batch]  # per step
    lrs: list[float] = field(default_factory=lambda: [1e-2] * 8)
    state: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # by parameter and key; without a first epilogue
    seed: int = 0


def random_inputs(program: Program, steps: int = 2, seed: int = 0, positive: bool = False) -> Inputs:
    """Inputs of the right shapes. Integers are 0 or 1, which index every table; buffers and state are positive, with
    ``positive`` all floats are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Sequence[int], dtype: torch.dtype, positive: bool = positive) -> Tensor:
        if not dtype.is_floating_point:
            return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)
        if positive:
            return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.5
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    params = {p.name: draw(p.shape, p.dtype) * 0.3 for p in program.params.values()}
    slots = {
        slot: val(node) for section in program.sections().values() for node, slot in section.inputs.items()
    }  # of a slot that several graphs read, any
    buffers = {s.name: draw(v.shape, v.dtype, positive=True) for s, v in slots.items() if s.role is Role.BUFFER}
    state = {
        (name, s.key): draw(v.shape if v.dim() == 0 else program.params[name].shape, v.dtype, positive=True)
        for s, v in slots.items()
        if s.role is Role.STATE and program.first_epilogue is None
        for name in members_of(program, s)
    }
    given = {int(slot.name): value for slot, value in slots.items() if slot.role is Role.BATCH}
    absent = torch.empty(0)
    batches: list[Batch] = [
        [
            [
                [
                    draw(given[i].shape, given[i].dtype) if i in given else absent
                    for i in range(max(given, default=-1) + 1)
                ]
                for _ in range(program.microbatches)
            ]
            for _ in range(program.mesh.dp_size)
        ]
        for _ in range(steps)
    ]
    return Inputs(params, buffers, batches, seed=seed, state=state)


def members_of(program: Program, slot: Slot) -> list[str]:
    """The parameters a slot of the optimizer is about: those of a bucket, or the one it is named after."""
    bucket = program.buckets.get(slot.name)
    return [slot.name] if bucket is None else [name for name, _ in bucket.members]
