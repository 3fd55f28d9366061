"""Bytes a rank puts on the wire in a step. Plans are static, so this is a function of the plan.

Executors carry collectives out with the least traffic there is: in an all-gather and a reduce-scatter every rank sends
(n-1)/n of the full value; an all-reduce is both.
"""

from __future__ import annotations

from graphshard.execution import MOVES, ExecutionPlan, Instruction, Op
from graphshard.mesh import Mesh


def instruction_bytes(ins: Instruction, mesh: Mesh, coordinate: int) -> int:
    """Bytes that the rank at ``coordinate`` along the axis sends for ``ins``; 0 for what is not communication."""
    if ins.type is None or ins.op in (Op.RECV, *MOVES):
        return 0
    if ins.op is Op.SEND:
        return ins.type.nbytes
    size = mesh.size(ins.axis)
    match ins.name:
        case "all_gather":
            return (size - 1) * ins.type.nbytes
        case "reduce_scatter":
            return (size - 1) * ins.type.nbytes // size
        case "all_reduce":
            return 2 * (size - 1) * ins.type.nbytes // size
        case "broadcast":
            return (size - 1) * ins.type.nbytes if coordinate == ins.peer else 0
        case _:
            return 0


def sent_bytes(plan: ExecutionPlan, rank: int, first: bool = False) -> dict[str, int]:
    """Bytes ``rank`` sends in one step, by mesh axis; transfers between stages count for ``pp``."""
    at = plan.mesh.coordinates(rank)
    result: dict[str, int] = {}
    for ins in plan.of_rank(rank).step(first):
        axis = ins.axis or "pp"
        if count := instruction_bytes(ins, plan.mesh, at.get(axis, 0)):
            result[axis] = result.get(axis, 0) + count
    return result


def moved_bytes(plan: ExecutionPlan, stage: int, first: bool = False) -> dict[str, int]:
    """Bytes a rank of ``stage`` moves in one step from its device and back, by where: "to cpu", "from nvme"."""
    result: dict[str, int] = {}
    for ins in plan.stages[stage].step(first):
        if ins.op in MOVES and ins.type is not None:
            way = f"{'to' if ins.op is Op.OFFLOAD else 'from'} {ins.name}"
            result[way] = result.get(way, 0) + ins.type.nbytes
    return result
