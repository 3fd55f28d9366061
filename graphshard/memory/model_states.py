"""What model states take: parameters, gradients, the optimizer's state and float32 masters.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 3.1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graphshard.execution import ExecutionPlan
from graphshard.program import Program, Role, val

KINDS: Mapping[str, tuple[Role, ...]] = {
    "parameters": (Role.PARAM, Role.FLAT, Role.SHARD),
    "gradients": (),  # what they accumulate in
    "optimizer state": (Role.STATE,),
    "masters": (Role.MASTER,),
}


def model_states(program: Program, plan: ExecutionPlan, stage: int) -> dict[str, int]:
    """Bytes that a rank of ``stage`` holds, by kind."""
    result = dict.fromkeys(KINDS, 0)
    for kind, _, _, nbytes in _pieces(program, plan, stage):
        result[kind] += nbytes
    return result


def bytes_per_parameter(program: Program, plan: ExecutionPlan) -> dict[str, float]:
    """Bytes of each kind per parameter of the model, were nothing sharded and nothing padded; a stage's replica of a
    tied weight counts once more."""
    result = dict.fromkeys(KINDS, 0.0)
    count = sum(param.numel for param in program.params.values()) or 1
    for stage in range(program.stages):
        for kind, name, numel, nbytes in _pieces(program, plan, stage):
            bucket = program.buckets.get(name)
            if bucket is None or numel not in (bucket.numel, bucket.shard_numel):
                result[kind] += nbytes / count
            else:
                members = sum(program.params[member].numel for member, _ in bucket.members)
                result[kind] += nbytes / numel * members / count
    return result


def explain_bytes(per_parameter: Mapping[str, float]) -> list[str]:
    """:func:`bytes_per_parameter` as lines of an account."""
    parts = " + ".join(f"{size:.3g} {kind}" for kind, size in per_parameter.items() if size)
    lines = ["", f"model states: {sum(per_parameter.values()):.3g} bytes a parameter before sharding: {parts}"]
    if per_parameter["masters"] and per_parameter["gradients"] > per_parameter["parameters"]:
        lines.append(
            "              gradients are accumulated and reduced in float32; in the parameters' precision (option "
            "reduce) they take 2 bytes less"
        )
    return lines


def _pieces(program: Program, plan: ExecutionPlan, stage: int) -> Iterator[tuple[str, str, int, int]]:
    """Kind, bucket or parameter, elements and bytes of each value that a rank of ``stage`` holds."""
    for slot, kind in (plan.reads[stage] | plan.results[stage]).items():
        for what, roles in KINDS.items():
            if slot.role in roles:
                yield what, slot.name, kind.numel, kind.nbytes
    for node, slot in program.body.inputs.items():
        if slot.role is Role.CARRY and slot.name.startswith("grad:") and slot.stage == stage:
            value = val(node)
            yield "gradients", slot.name.removeprefix("grad:"), value.numel(), value.numel() * value.element_size()
