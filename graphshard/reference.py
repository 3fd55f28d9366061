"""The meaning of a program, at any level: its graphs run node by node for all ranks of the mesh in one process.

Slow and plain on purpose: no schedule, no code generation, no executor. What a pass makes of a program must mean the
same (check.py); what codegen and an executor make of it must give the same numbers.

Floating-point values are computed in float64 whatever the graph says, so that what differs is a mistake and not
rounding. Before ``zero`` says how, a step averages loss and gradients over the data-parallel ranks by definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from graphshard.errors import NodeFailed
from graphshard.loss_scaling import SKIPPED, initial
from graphshard.program import Level, Program, Role, Section, Slot, info, val
from graphshard.reference_inputs import Batch, Inputs, members_of
from graphshard.region import Region

gs = torch.ops.graphshard
c10d = torch.ops._c10d_functional

_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}


@dataclass
class Results:
    """What steps end with.

    ``values``: by what it is ("loss of step 0", "param lin.weight", "state lin.weight exp_avg"), a copy for every rank
    that has it; ``ranks`` says which ranks those are. ``seen``: what each node of the first step's first micro-batch
    was, on the lowest rank that has it. ``skipped``: the first step that loss scaling skipped.
    """

    values: dict[str, list[Tensor]] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    seen: dict[fx.Node, Any] = field(default_factory=dict)
    skipped: int | None = None


def run(program: Program, inputs: Inputs, wide: bool = True) -> Results:
    """All steps of ``inputs``, one after the other; ``wide``: in float64 whatever graphs say, else in its dtypes."""
    return _Run(program, inputs, wide).run()


Env = dict[fx.Node, dict[int, Any]]  # what a node is, by rank


class _Run:
    def __init__(self, program: Program, inputs: Inputs, wide: bool) -> None:
        self.program, self.inputs, self.mesh = program, inputs, program.mesh
        self.wide: Mapping[torch.dtype, torch.dtype] = _WIDE if wide else {}
        self.ranks = range(self.mesh.world_size)
        self.stores: dict[int, dict[Slot, Tensor]] = {rank: {} for rank in self.ranks}
        self.results = Results()

    def run(self) -> Results:
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.wide.get(default, default))  # of factories that name none
        try:
            with torch.no_grad():
                for step, batch in enumerate(self.inputs.batches):
                    self._step(step, batch)
        finally:
            torch.set_default_dtype(default)
        self._collect()
        return self.results

    def _step(self, step: int, batch: Batch) -> None:
        program = self.program
        carries = self._section(program.prologue, {}, step, 0, batch)
        for microbatch in range(program.microbatches):
            made = self._section(program.body, carries, step, microbatch, batch)
            for slot, by_rank in made.items():
                if slot.role is Role.CARRY:
                    carries[slot] = by_rank
                elif slot.role is Role.OUTPUT:
                    for rank, value in by_rank.items():
                        where = f"step {step}, micro-batch {microbatch} @{self.mesh.dp_rank(rank)}"
                        self._add(f"output {slot.name} of {where}", {rank: value})
        if program.level is not Level.SHARDED:
            carries = {slot: self._averaged(slot, by_rank) for slot, by_rank in carries.items()}
        has_state = any(slot.role is Role.STATE for store in self.stores.values() for slot in store)
        fresh = program.first_epilogue is not None and not has_state
        update = program.first_epilogue if fresh else program.epilogue
        assert update is not None
        made = self._section(update, carries, step, 0, batch)
        skipped = SKIPPED in made and all(made[SKIPPED].values())
        if skipped and self.results.skipped is None:
            self.results.skipped = step
        for slot, by_rank in made.items():
            if skipped and fresh and slot.role is Role.STATE:
                continue
            if slot.role is Role.LOSS:
                self._add(f"loss of step {step}", by_rank)
            elif slot.role is Role.OUTPUT:
                kind, _, name = slot.name.rpartition(":")  # a gradient, where there is no optimizer
                for rank, value in by_rank.items():
                    for member, part in self._members(name, by_rank, rank, value):
                        self._add(f"output {kind}:{member} of step {step}", {rank: part})
            else:
                for rank, value in by_rank.items():
                    self.stores[rank][slot] = value

    def _averaged(self, slot: Slot, by_rank: dict[int, Tensor]) -> dict[int, Tensor]:
        if slot.name != "loss" and not slot.name.startswith("grad:"):
            return by_rank
        stage_of = {rank: self.mesh.coordinates(rank)["pp"] for rank in by_rank}
        peers = {rank: [by_rank[r] for r in by_rank if stage_of[r] == stage_of[rank]] for rank in by_rank}
        return {rank: sum(values[1:], values[0]) / len(values) for rank, values in peers.items()}

    def _holders(self, node: fx.Node) -> list[int]:
        """The ranks that have the value; before stages are cut those of one stage stand for all."""
        stage = 0 if self.program.level is Level.CAPTURED else info(node).stage
        return [rank for rank in self.ranks if stage is None or self.mesh.coordinates(rank)["pp"] == stage]

    def _section(
        self, section: Section, carries: Mapping[Slot, dict[int, Tensor]], step: int, microbatch: int, batch: Batch
    ) -> dict[Slot, dict[int, Tensor]]:
        env: Env = {}
        for node, slot in section.inputs.items():
            if slot.role is Role.CARRY:
                env[node] = carries[slot]
            else:
                env[node] = {r: self._given(slot, node, r, step, microbatch, batch) for r in self._holders(node)}
        for node in section.nodes():
            env[node] = self._node(node, env)
            if section is not self.program.body or (step, microbatch) == (0, 0):
                self.results.seen.setdefault(node, env[node][min(env[node])])
        return {slot: env[node] for slot, node in section.outputs.items()}

    def _given(self, slot: Slot, node: fx.Node, rank: int, step: int, microbatch: int, batch: Batch) -> Tensor:
        program, dp_rank = self.program, self.mesh.dp_rank(rank)
        match slot.role:
            case Role.BATCH:
                return self._cast(batch[dp_rank][microbatch][int(slot.name)], node)
            case Role.CONSTANT:
                return self._cast(program.constants[slot.name], node)
            case Role.SCALER if slot not in self.stores[rank]:
                return self._cast(program.constants[initial(slot)], node)
            case Role.LR:
                return torch.tensor(self.inputs.lrs[int(slot.name)], dtype=torch.float64)
            case Role.RNG:
                return torch.tensor([self.inputs.seed, step, dp_rank, microbatch])
        if slot in self.stores[rank]:
            return self.stores[rank][slot]
        match slot.role:
            case Role.PARAM:
                return self._cast(self.inputs.params[slot.name], node)
            case Role.BUFFER:
                return self._cast(self.inputs.buffers[slot.name], node)
            case Role.FLAT | Role.SHARD | Role.MASTER:
                return self._packed(slot, node, rank, self.inputs.params)
            case Role.STATE if self.inputs.state:
                state = {name: value for (name, key), value in self.inputs.state.items() if key == slot.key}
                return self._packed(slot, node, rank, state)
        raise AssertionError(f"nothing has made {slot}")

    def _packed(self, slot: Slot, node: fx.Node, rank: int, values: Mapping[str, Tensor]) -> Tensor:
        """What ``rank`` holds in ``slot`` of ``values``, by parameter: a parameter's, or the bucket's or its part."""
        bucket, shape = self.program.buckets.get(slot.name), tuple(val(node).shape)
        # A scalar is everybody's. State of an optimizer that looks at whole parameters keeps their shape.
        if bucket is None or shape not in ((bucket.numel,), (bucket.shard_numel,)):
            return self._cast(values[members_of(self.program, slot)[0]], node)
        parts = [self._cast(values[name], node).contiguous() for name, _ in bucket.members]
        flat = gs.pack(parts, [offset for _, offset in bucket.members], bucket.numel)
        if shape == (bucket.numel,):
            return flat  # type: ignore[no-any-return]
        return flat.chunk(bucket.parts)[self.mesh.coordinates(rank)[bucket.axis]].clone()  # type: ignore[no-any-return]

    def _cast(self, value: Tensor, node: fx.Node) -> Tensor:
        """``value`` in the dtype that ``node``, which it is for, is computed in."""
        dtype: torch.dtype = val(node).dtype
        return value.detach().to("cpu", self.wide.get(dtype, dtype))

    def _node(self, node: fx.Node, env: Env) -> dict[int, Any]:
        target: Any = node.target
        holders = self._holders(node)
        if (special := _ACROSS.get(target)) is not None:
            return {rank: special(self, node, env, rank) for rank in holders}
        result = {}
        for rank in holders:

            def value(leaf: Any, rank: int = rank) -> Any:
                if isinstance(leaf, fx.Node):
                    return env[leaf][rank]
                return self.wide.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

            args, kwargs = map_aggregate((node.args, node.kwargs), value)
            try:
                result[rank] = target.run(args, value) if isinstance(target, Region) else target(*args, **kwargs)
            except Exception as error:  # whatever the operator raises
                raise NodeFailed(node, error) from error
        return result

    # What ranks do together

    def _transfer(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        source, stage = node.args[0], node.args[1]
        return env[source][self.mesh.group(rank, "pp")[stage]]  # type: ignore[index,no-any-return]

    def _stage_sum(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        group = self.mesh.group(rank, "pp")
        parts = [env[part][group[info(part).stage or 0]] for part in node.all_input_nodes]
        return sum(parts[1:], parts[0])  # type: ignore[no-any-return]

    def _group(self, node: fx.Node, env: Env, rank: int) -> tuple[list[Tensor], int]:
        """The values of the ranks along the node's axis, and where ``rank`` is among them."""
        axis: Any = node.args[-1]
        members = self.mesh.group(rank, axis)
        return [env[node.all_input_nodes[0]][member] for member in members], members.index(rank)

    def _gather(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        return torch.cat(self._group(node, env, rank)[0])

    def _broadcast(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        root: int = node.args[1]  # type: ignore[assignment]
        return self._group(node, env, rank)[0][root]

    def _all_reduce(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        values, _ = self._group(node, env, rank)
        return _reduced(values, node.args[1])

    def _reduce_scatter(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        values, at = self._group(node, env, rank)
        return _reduced(values, node.args[1]).chunk(len(values))[at].clone()

    def _local_shard(self, node: fx.Node, env: Env, rank: int) -> Tensor:
        values, at = self._group(node, env, rank)
        return values[at].chunk(len(values))[at]

    # Results

    def _add(self, name: str, by_rank: Mapping[int, Tensor]) -> None:
        self.results.values.setdefault(name, []).extend(by_rank.values())
        self.results.ranks.setdefault(name, []).extend(by_rank)

    def _collect(self) -> None:
        for rank, store in self.stores.items():
            for slot, value in store.items():
                if slot.role is Role.SCALER:
                    continue
                if slot.role is Role.BUFFER:
                    self._add(f"buffer {slot.name} @{self.mesh.dp_rank(rank)}", {rank: value})
                    continue
                what = f"state {{}} {slot.key}" if slot.role is Role.STATE else "param {}"
                by_rank = {peer: other[slot] for peer, other in self.stores.items() if slot in other}
                for name, part in self._members(slot.name, by_rank, rank, value):
                    self._add(what.format(name), {rank: part})

    def _members(self, name: str, by_rank: Mapping[int, Tensor], rank: int, value: Tensor) -> list[tuple[str, Tensor]]:
        """Each parameter's part of what ``rank`` and its peers keep of a bucket; another value is everybody's."""
        bucket = self.program.buckets.get(name)
        if bucket is None:
            return [(name, value)]
        if tuple(value.shape) not in ((bucket.numel,), (bucket.shard_numel,)):
            return [(name, value) for name, _ in bucket.members]
        if value.numel() != bucket.numel:
            value = torch.cat([by_rank[peer] for peer in self.mesh.group(rank, bucket.axis)])
        params, flat = self.program.params, value.reshape(-1)
        return [(name, flat[at : at + params[name].numel].view(params[name].shape)) for name, at in bucket.members]


def _reduced(values: Sequence[Tensor], operation: Any) -> Tensor:
    """What a collective makes of its members' values, in rank order, as torch.distributed names its operations."""
    if operation == "avg":
        return _reduced(values, "sum") / len(values)
    return functools.reduce(_OPERATIONS[operation], values)


_OPERATIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


_ACROSS: dict[Any, Callable[[_Run, fx.Node, Env, int], Tensor]] = {
    gs.transfer.default: _Run._transfer,
    gs.stage_broadcast.default: _Run._transfer,
    gs.stage_sum.default: _Run._stage_sum,
    gs.local_shard.default: _Run._local_shard,
    c10d.all_gather_into_tensor.default: _Run._gather,
    c10d.all_reduce.default: _Run._all_reduce,
    c10d.broadcast.default: _Run._broadcast,
    c10d.reduce_scatter_tensor.default: _Run._reduce_scatter,
    c10d.wait_tensor.default: lambda run, node, env, rank: env[node.all_input_nodes[0]][rank],
}
