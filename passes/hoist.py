"""Loop-invariant code motion for ZeRO-3: gathers out of the micro-batch loop, their reductions with them.

By default a bucket is gathered in forward and again in backward, per micro-batch: least memory, most traffic. Every
bucket that fits the budget is gathered once per step in the prologue instead, and its gradients are accumulated whole
and reduced once in the epilogue. Where that does not fit but the gathered parameter alone does, only the gather moves.
Parameters do not change within a step, so a gather that moves changes no bit. A reduction that moves sums over
micro-batches before ranks instead of after: the same to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from graphshard import fake
from graphshard.errors import PassOptionError
from graphshard.pipeline import Context
from graphshard.program import Bucket, Level, NodeInfo, Phase, Program, Role, Slot, info
from graphshard.rewrite import add_input, arg, call, drop_dead, first_operation, remove_input, retype, set_outputs

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard


@dataclass(frozen=True)
class Hoist:
    """``budget_gb``: memory per rank, in 10^9 bytes, that whole parameters and whole gradients may take beyond their
    shards, one for each pipeline stage, the last one for the stages left; (): leave every gather where it is."""

    budget_gb: tuple[float, ...] = ()
    name: ClassVar[str] = "hoist"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for budget in self.budget_gb:
            if not 0 <= budget < math.inf:
                raise PassOptionError(self.name, f"budget_gb={budget}", "a finite number of at least 0")

    def run(self, program: Program, ctx: Context) -> Program:
        if not self.budget_gb or program.level is not Level.SHARDED:
            return program
        for stage in range(program.stages):
            left = self.budget_gb[min(stage, len(self.budget_gb) - 1)] * 1e9
            buckets = _sharded(program, stage)
            # A hoisted reduction saves a reduce-scatter per micro-batch, a hoisted gather two gathers: gathers first.
            for bucket in buckets:
                cost = _rest(bucket) * bucket.dtype.itemsize
                if cost <= left and _hoist_gather(program, bucket):
                    left -= cost
            for bucket in buckets:
                cost = _rest(bucket) * _gradient_itemsize(program, bucket)
                if cost <= left and _hoist_reduction(program, bucket):
                    left -= cost
        return program


def hoistable_bytes(program: Program, stage: int) -> tuple[list[int], list[int]]:
    """What the gathers of a stage's sharded buckets take outside of the loop, each, and what the reductions do."""
    buckets = [bucket for bucket in _sharded(program, stage) if bucket.store is Role.SHARD]
    gathers = [_rest(bucket) * bucket.dtype.itemsize for bucket in buckets]
    return gathers, [_rest(bucket) * _gradient_itemsize(program, bucket) for bucket in buckets]


def _sharded(program: Program, stage: int) -> list[Bucket]:
    return [bucket for bucket in program.buckets.values() if bucket.stage == stage and bucket.parts > 1]


def _rest(bucket: Bucket) -> int:
    """Elements of a bucket that are in the shards of others."""
    return bucket.numel - bucket.shard_numel


def _whole(like: fx.Node, bucket: Bucket) -> torch.Tensor:
    value = like.meta["val"]
    return fake.tensor(value.fake_mode, [bucket.numel], value.dtype, device=value.device)


def _gradient_itemsize(program: Program, bucket: Bucket) -> int:
    """Bytes of an element of its accumulated gradient, which may be of another dtype than the parameters."""
    carry = program.body.input_slots.get(Slot(Role.CARRY, f"grad:{bucket.name}", stage=bucket.stage))
    return bucket.dtype.itemsize if carry is None else int(carry.meta["val"].element_size())


def _hoist_gather(program: Program, bucket: Bucket) -> bool:
    """Gather ``bucket`` in the prologue; the body reads it whole from a carry that no micro-batch changes."""
    body, prologue = program.body, program.prologue
    store = Slot(Role.SHARD, bucket.name, stage=bucket.stage)
    shard = body.input_slots.get(store)
    gathers = [] if shard is None else sorted(n for n in shard.users if n.target is c10d.all_gather_into_tensor.default)
    if shard is None or not gathers:
        return False
    record = NodeInfo(phase=Phase.UPDATE, stage=bucket.stage, module=info(gathers[0]).module, made_by="hoist")
    carried = Slot(Role.CARRY, f"whole:{bucket.name}", stage=bucket.stage)

    stored = add_input(prologue, store, shard.meta["val"], replace(info(shard), phase=Phase.UPDATE), bucket.name)
    with prologue.graph.inserting_before(prologue.output_node):
        target = c10d.all_gather_into_tensor.default
        gathered = call(prologue.graph, target, (stored, *gathers[0].args[1:]), record)
        whole = call(prologue.graph, c10d.wait_tensor.default, (gathered,), record)
    set_outputs(prologue, prologue.outputs | {carried: whole})

    value = add_input(body, carried, _whole(shard, bucket), replace(info(shard), layout=""), f"whole.{bucket.name}")
    for gather in gathers:
        (wait,) = gather.users
        wait.replace_all_uses_with(value)
        body.graph.erase_node(wait)
        body.graph.erase_node(gather)
    if not shard.users:
        remove_input(body, shard)
    set_outputs(body, body.outputs | {carried: value})
    return True


def _hoist_reduction(program: Program, bucket: Bucket) -> bool:
    """Accumulate whole gradients over the micro-batches; reduce-scatter them once, at the start of the epilogue."""
    body, prologue = program.body, program.prologue
    carry = Slot(Role.CARRY, f"grad:{bucket.name}", stage=bucket.stage)
    added = body.outputs.get(carry)
    if added is None or (wait := arg(added, 1)).target is not c10d.wait_tensor.default:
        return False
    scatter = arg(wait, 0)
    pack = arg(scatter, 0)
    accumulator = body.input_slots[carry]
    accumulator.meta["val"] = _whole(accumulator, bucket)
    added.args = (accumulator, pack)
    body.graph.erase_node(wait)
    body.graph.erase_node(scatter)
    retype([added])

    zeros = prologue.outputs[carry]
    with prologue.graph.inserting_before(zeros):
        larger = call(prologue.graph, aten.full.default, ([bucket.numel], 0.0), info(zeros), **zeros.kwargs)
    zeros.replace_all_uses_with(larger)
    prologue.graph.erase_node(zeros)

    for section in program.updates():
        gradient = section.input_slots[carry]
        readers = list(gradient.users)
        gradient.meta["val"] = _whole(gradient, bucket)
        record = NodeInfo(phase=Phase.UPDATE, stage=bucket.stage, module=info(scatter).module, made_by="hoist")
        with section.graph.inserting_before(first_operation(section.graph)):
            target = c10d.reduce_scatter_tensor.default
            reduced = call(section.graph, target, (gradient, *scatter.args[1:]), record)
            reduced = call(section.graph, c10d.wait_tensor.default, (reduced,), record)
        for reader in readers:
            reader.replace_input_with(gradient, reduced)
    drop_dead(prologue)
    return True
