"""What a plan keeps off the device: how many values of which size, at most."""

from __future__ import annotations

from collections import Counter

from graphshard.execution import (
    ExecutionPlan,
    Op,
    Ref,
    StagePlan,
    TensorType,
    match_waits,
    slot_ref,
    variants,
)
from graphshard.plan_options import PLACES
from graphshard.program import HOST


def span(kind: TensorType) -> int:
    """Bytes from the first element to the last."""
    extent = sum((size - 1) * stride for size, stride in zip(kind.shape, kind.stride, strict=True))
    return (extent + 1) * kind.dtype.itemsize if kind.numel else 0


def offloaded(plan: ExecutionPlan, stage: int, home: str) -> Counter[int]:
    """How many values of each number of bytes a rank of ``stage`` keeps in ``home`` at most."""
    stored = _stored(plan, stage, home)
    most = Counter(stored.values())
    for first in variants(plan):
        most |= _activations(plan.stages[stage], first, home, set(stored)) + Counter(stored.values())
    return most


def offloaded_bytes(plan: ExecutionPlan, stage: int) -> dict[str, int]:
    """By home, what a rank of ``stage`` keeps there at most."""
    counts = {home: offloaded(plan, stage, home) for home in PLACES}
    return {home: sum(n * count for n, count in found.items()) for home, found in counts.items() if found}


def _stored(plan: ExecutionPlan, stage: int, wanted: str) -> dict[Ref, int]:
    slots = plan.reads[stage] | plan.results[stage]
    kept = {slot_ref(slot): kind for slot, kind in slots.items()}
    return {ref: span(kept[ref]) for ref, home in plan.stages[stage].homes.items() if home == wanted and ref in kept}


def _activations(plan: StagePlan, first: bool, home: str, stored: set[Ref]) -> Counter[int]:
    instructions = plan.step(first)
    waits = match_waits(instructions)
    sizes: dict[Ref, int] = {}
    live, most = Counter[int](), Counter[int]()
    for position, ins in enumerate(instructions):
        gone = [ref for ref in ins.inputs if ref in sizes] if ins.op is Op.FREE else []
        if position in waits:  # what was handed over to a reload is read until then
            gone = [ref for ref in instructions[waits[position]].last if ref in sizes]
        for ref in gone:
            live[sizes.pop(ref)] -= 1
        made = ins.outputs if ins.op is Op.RUN and ins.device == HOST and home == "cpu" else ()
        for ref in made:
            if ref not in stored and ref not in sizes:
                sizes[ref] = plan.storages[ref.name].nbytes
                live[sizes[ref]] += 1
                most |= live
        if ins.op is Op.OFFLOAD and ins.name == home and ins.outputs[0] not in stored:
            assert ins.type is not None
            sizes[ins.outputs[0]] = span(ins.type)
            live[span(ins.type)] += 1
            most |= live
    return most
