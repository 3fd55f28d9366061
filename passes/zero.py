"""ZeRO: shard optimizer state (1), gradients (2) and parameters (3) over the data-parallel axis; 0 replicates.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", sections 5 and 6. Every
parameter becomes a flat bucket of its own; the pass ``bucket`` merges them. A stage differs from the next in which
values are shards and which graph holds the collective:

====== ============== ================================= =====================================
stage  parameters     gradients                         update
====== ============== ================================= =====================================
0      whole          all-reduce in the epilogue        on whole parameters
1      whole          reduce-scatter in the epilogue    on the shard, then an all-gather
2      whole          reduce-scatter per micro-batch    on the shard, then an all-gather
3      shards,        reduce-scatter per micro-batch    on the shard
       gathered once
       per phase
====== ============== ================================= =====================================
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from graphshard import fake
from graphshard.dataflow import COMPLEX_PARTS, downstream, is_pointwise, is_pooled
from graphshard.errors import OptimizerNotElementwise, PassOptionError, StagesNotCut
from graphshard.loss_gradient import share_loss
from graphshard.mesh import DATA_AXES
from graphshard.pipeline import Context
from graphshard.program import Bucket, Level, NodeInfo, Param, Phase, Program, Role, Section, Slot, info, set_info, val
from graphshard.rewrite import (
    add_input,
    after,
    arg,
    call,
    first_operation,
    list_arg,
    remove_input,
    replace_input,
    retype,
    set_outputs,
)

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

_CREATION = (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
_ALLOWED = (
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    gs.transfer.default,
    *COMPLEX_PARTS,
)


@dataclass(frozen=True)
class Zero:
    """Insert the storage and the collectives of data parallelism; ``stage`` is the ZeRO stage, 0 plain replication."""

    stage: int = 3
    name: ClassVar[str] = "zero"
    exact: ClassVar[bool] = False  # sums over ranks associate differently

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise PassOptionError(self.name, f"stage={self.stage}", "1, 2 or 3, or 0 for plain replication")

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is Level.SHARDED:
            return program
        if program.level is Level.CAPTURED and program.stages > 1:
            raise StagesNotCut(self.name, program.stages)
        ranks = program.mesh.dp_size
        parts = 1 if ranks > 1 and share_loss(program.body, ranks) else ranks
        shardings = [
            _Sharding(program, Slot(Role.PARAM, param.name, stage=stage), self.stage, parts)
            for param in program.params.values()
            for stage in param.stages
        ]
        _shard_body(program, shardings)
        for section in program.updates():
            _shard_update(section, shardings)
            _average_loss(program, section)
        for slot in _apart(program, ctx.apart):
            _share(program, slot)
        program.level = Level.SHARDED
        return program


# The signature of a section is taken once and given back once: with every parameter, the time would be quadratic.


def _shard_body(program: Program, shardings: list[_Sharding]) -> None:
    inputs, totals, zeros = program.body.input_slots, program.body.outputs, program.prologue.outputs
    for sharding in shardings:
        sharding.body(inputs, totals, zeros)
    for section, made in (
        (program.body, {s.carry: s.total for s in shardings if s.total is not None}),
        (program.prologue, {s.carry: s.zeros for s in shardings if s.zeros is not None}),
    ):
        accumulators = {s.carry: s.accumulator for s in shardings if s.carry in made}
        outputs = section.outputs
        set_outputs(section, {accumulators.get(slot, slot): made.get(slot, node) for slot, node in outputs.items()})
        for slot in made:
            section.graph.erase_node(outputs[slot])


def _shard_update(section: Section, shardings: list[_Sharding]) -> None:
    inputs, outputs = section.input_slots, section.outputs
    states: dict[tuple[str, int], list[Slot]] = {}
    for slot in inputs:
        if slot.role in (Role.MASTER, Role.STATE):
            states.setdefault((slot.name, slot.stage), []).append(slot)
    for sharding in shardings:
        sharding.examine(inputs, outputs, states.get((sharding.slot.name, sharding.slot.stage), []))
    # A replica of a tied weight may get all its gradient from another stage.
    active = [sharding for sharding in shardings if sharding.carry in inputs or sharding.slot in inputs]
    owners: dict[tuple[Role, str, int], _Sharding] = {}
    for sharding in reversed(active):  # the first stage that holds a tied weight hands out its gradient
        name, stage = sharding.slot.name, sharding.slot.stage
        owners |= {(Role.PARAM, name, stage): sharding, (Role.MASTER, name, stage): sharding}
        owners[Role.STATE, name, stage] = sharding
        owners |= {(Role.OUTPUT, f"grad:{name}", held): sharding for held in sharding.param.stages}

    def owner(slot: Slot) -> _Sharding | None:
        return owners.get((slot.role, slot.name, slot.stage))

    for sharding in active:
        sharding.follow_shape(section, inputs)
    for slot, node in section.outputs.items():  # states that start as constants are not downstream of anything
        if (sharding_or_none := owner(slot)) is not None:
            sharding_or_none.start_flat(section, node, inputs)
    changed = [node for sharding in active for node in sharding.update(section, inputs)]
    results: dict[Slot, fx.Node] = {}
    for slot, node in section.outputs.items():
        found = owner(slot)
        new_slot, new_node = (slot, node) if found is None else found.result(section, slot, node)
        results[new_slot] = new_node
    set_outputs(section, results)
    retype(downstream(changed))  # once all are flat: replicas of a tied weight are added to one another


def _average_loss(program: Program, section: Section) -> None:
    """The step's loss is the mean over data-parallel ranks."""
    loss = next((n for n, s in section.inputs.items() if s.role is Role.CARRY and s.name == "loss"), None)
    if loss is None or program.mesh.dp_size == 1:
        return
    readers = list(loss.users)
    record = NodeInfo(phase=Phase.UPDATE, stage=info(loss).stage, made_by="zero")
    with section.graph.inserting_before(first_operation(section.graph)):
        total = _over_data_axes(program, c10d.all_reduce.default, loss, "sum", record)
        mean = call(section.graph, aten.mul.Tensor, (total, 1.0 / program.mesh.dp_size), record)
    for reader in readers:
        reader.replace_input_with(loss, mean)


class _Sharding:
    """Rewrites everything about one parameter on one stage of the pipeline; ``divisor``: of its gradient's sum over
    ranks, 1 where the backward has been divided."""

    def __init__(self, program: Program, slot: Slot, stage: int, divisor: int) -> None:
        mesh, self.divisor = program.mesh, divisor
        self.program, self.slot, self.zero = program, slot, stage
        self.param: Param = program.params[slot.name]
        self.axis, self.parts = mesh.shard_axis, mesh.size(mesh.shard_axis)
        # Hybrid sharding: shards are replicated over dp, their gradients summed over it once per step.
        self.replicas = mesh.size("dp") if self.axis != "dp" else 1
        numel = -(-max(self.param.numel, 1) // self.parts) * self.parts
        name = slot.name if slot.stage == self.param.stages[0] else f"{slot.name}@{slot.stage}"
        store = Role.SHARD if stage == 3 else Role.FLAT
        members = ((slot.name, 0),)
        self.bucket = Bucket(name, self.param.dtype, numel, members, self.axis, self.parts, slot.stage, store)
        self.record = NodeInfo(
            phase=Phase.UPDATE, stage=slot.stage, module=slot.name.rpartition(".")[0], made_by="zero"
        )

        self.carry = Slot(Role.CARRY, f"grad:{slot.name}", stage=slot.stage)

    def body(self, inputs: dict[Slot, fx.Node], totals: dict[Slot, fx.Node], zeros: dict[Slot, fx.Node]) -> None:
        """Storage, gathers and the reduction of gradients, where it is per micro-batch.

        Given are the body's inputs and outputs and the prologue's outputs; ``total`` and ``zeros`` replace the carry's.
        """
        self.program.buckets[self.bucket.name] = self.bucket
        self.total: fx.Node | None = None
        self.zeros: fx.Node | None = None
        self._parameter_reads(inputs.get(self.slot))
        if self.carry in inputs:
            self._gradient(inputs[self.carry], totals[self.carry], zeros[self.carry])

    @property
    def store(self) -> Slot:
        """Where the parameter lives between steps."""
        return Slot(self.bucket.store, self.bucket.name, stage=self.slot.stage)

    @property
    def accumulator(self) -> Slot:
        return Slot(Role.CARRY, f"grad:{self.bucket.name}", stage=self.slot.stage)

    def _flat(self, like: fx.Node, sharded: bool) -> torch.Tensor:
        """The fake 1-D value of the bucket or of one shard of it."""
        value = like.meta["val"]
        numel = self.bucket.shard_numel if sharded else self.bucket.numel
        return fake.tensor(value.fake_mode, [numel], value.dtype, device=value.device)

    def _parameter_reads(self, old: fx.Node | None) -> None:
        body = self.program.body
        if old is None:
            return
        placed = replace(info(old), layout=f"{self.axis}:flat" if self.zero == 3 else "")
        stored = add_input(body, self.store, self._flat(old, self.zero == 3), placed, self.bucket.name)
        for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT):
            users = sorted(n for n in old.users if info(n).phase is phase)
            if not users:
                continue
            record = replace(self.record, phase=phase)
            with body.graph.inserting_before(users[0]):
                whole = stored
                if self.zero == 3 and self.parts > 1:
                    gathered = call(
                        body.graph, c10d.all_gather_into_tensor.default, (stored, self.parts, self.axis), record
                    )
                    whole = call(body.graph, c10d.wait_tensor.default, (gathered,), record)
                shape, stride = list(self.param.shape), _contiguous(self.param.shape)
                view = call(body.graph, aten.as_strided.default, (whole, shape, stride, 0), record)
            for user in users:
                user.replace_input_with(old, view)
        assert not old.users, f"{self.slot} is read outside the phases of the body"
        remove_input(body, old)

    def _gradient(self, old: fx.Node, added: fx.Node, zeros: fx.Node) -> None:
        body, per_microbatch = self.program.body, self.zero >= 2
        accumulates = added.target is aten.add.Tensor and added.args[0] is old
        assert accumulates, f"{self.carry} is not accumulated by add(carry, …)"
        gradient = arg(added, 1)
        assert gradient.meta["val"].dtype == old.meta["val"].dtype, f"{self.carry} is of another dtype than {gradient}"
        record = replace(self.record, phase=info(added).phase)
        value = self._flat(old, sharded=per_microbatch)
        accumulator = replace_input(body, old, self.accumulator, value, f"grad.{self.bucket.name}")
        with after(gradient):  # as soon as it is final
            flat = call(body.graph, gs.pack.default, ([gradient], [0], self.bucket.numel), record)
            if per_microbatch:
                flat = self._reduce_scatter(body, flat, record)
            total = replace(record, origin=info(added).origin)
            self.total = call(body.graph, aten.add.Tensor, (accumulator, flat), total)

        prologue = self.program.prologue
        with prologue.graph.inserting_before(zeros):
            options = {"dtype": value.dtype, "device": value.device}
            self.zeros = call(prologue.graph, aten.full.default, (list(value.shape), 0.0), info(zeros), **options)

    def _reduce_scatter(self, section: Section, flat: fx.Node, record: NodeInfo) -> fx.Node:
        if self.parts == 1:
            return flat
        target = c10d.reduce_scatter_tensor.default
        return self._wait(section, call(section.graph, target, (flat, "sum", self.parts, self.axis), record), record)

    def _all_reduce(self, section: Section, value: fx.Node, axis: str, record: NodeInfo) -> fx.Node:
        return self._wait(section, call(section.graph, c10d.all_reduce.default, (value, "sum", axis), record), record)

    def _wait(self, section: Section, pending: fx.Node, record: NodeInfo) -> fx.Node:
        return call(section.graph, c10d.wait_tensor.default, (pending,), record)

    def examine(self, inputs: dict[Slot, fx.Node], outputs: dict[Slot, fx.Node], states: list[Slot]) -> None:
        """Find the update's operators and whether they may run on flat storage, before anything of it is rewritten."""
        self.states = states
        self.flat_states = self._flat_states(inputs, outputs)
        own = [inputs[s] for s in (self.carry, self.slot, *self.states) if s in inputs]
        self.cone = downstream(own, stop=is_pooled)
        offending = next((n for n in self.cone if not (is_pointwise(n) or n.target in _ALLOWED)), None)
        self.elementwise = offending is None
        if offending is not None and self.zero > 0 and self.parts > 1:
            raise OptimizerNotElementwise(str(offending.target), self.slot.name)

    def _flat_states(self, inputs: dict[Slot, fx.Node], outputs: dict[Slot, fx.Node]) -> set[Slot]:
        """The states that have a value for each of the parameter's elements. Without dims a parameter's shape is also
        that of a step count or a product of momenta: such a scalar is none whatever the gradient and the parameter
        are, and stays one for the whole bucket, as it is for parameters with dims."""
        shaped = {slot for slot in self.states if tuple(inputs[slot].meta["val"].shape) == self.param.shape}
        if self.param.shape != ():
            return shaped
        flat = {slot for slot in shaped if slot.role is Role.MASTER}
        # All of a replica's gradient may come from another stage.
        carries = [replace(self.carry, stage=stage) for stage in self.param.stages]
        while True:
            own = [inputs[slot] for slot in (*carries, self.slot, *flat) if slot in inputs]
            changed = downstream(own, stop=is_pooled)
            found = {slot for slot in shaped if outputs.get(slot) in changed}
            if found <= flat:
                return flat
            flat |= found

    def follow_shape(self, section: Section, inputs: dict[Slot, fx.Node]) -> None:
        """What is created at the parameter's shape follows the parameter's value, which becomes flat, instead."""
        for node in self.cone if self.elementwise else ():
            for source in node.all_input_nodes:
                if self._is_created(source):
                    self._create_like(section, source, inputs.get(self.slot) or inputs[self.carry])

    def start_flat(self, section: Section, node: fx.Node, inputs: dict[Slot, fx.Node]) -> None:
        """The same for a result that is a constant."""
        if self.elementwise and self._is_created(node):
            self._create_like(section, node, inputs.get(self.carry) or inputs[self.slot])

    def update(self, section: Section, inputs: dict[Slot, fx.Node]) -> list[fx.Node]:
        """Rewrite the update; returns the nodes whose type changed, for what is behind them to be typed again."""
        if self.elementwise:
            return self._update_flat(section, inputs)
        self._update_whole(section, inputs)
        return []

    def result(self, section: Section, slot: Slot, node: fx.Node) -> tuple[Slot, fx.Node]:
        """Where the update's result ``slot`` goes instead, and what goes there."""
        with section.graph.inserting_before(section.output_node):
            if slot == self.slot and not self.elementwise:
                return self.store, call(section.graph, gs.pack.default, ([node], [0], self.bucket.numel), self.record)
            if slot == self.slot and self.zero in (1, 2) and self.parts > 1:
                args = (node, self.parts, self.axis)
                gathered = call(section.graph, c10d.all_gather_into_tensor.default, args, self.record)
                node = self._wait(section, gathered, self.record)
        return self._renamed(slot) if self.elementwise else slot, node

    def _update_flat(self, section: Section, inputs: dict[Slot, fx.Node]) -> list[fx.Node]:
        """The update on flat storage: elementwise, so the same operators on other shapes."""
        sharded = self.zero >= 1
        changed: list[fx.Node] = []
        if self.carry in inputs:
            changed.append(self._reduced_gradient(section, inputs[self.carry]))
        for slot in self.states:
            old = inputs[slot]
            value = self._flat(old, sharded) if slot in self.flat_states else old.meta["val"]
            name = f"{self.bucket.name}.{slot.key}"
            changed.append(replace_input(section, old, self._renamed(slot), value, name))
        if self.slot in inputs:
            old = inputs[self.slot]
            stored = add_input(section, self.store, self._flat(old, self.zero == 3), info(old), self.bucket.name)
            if self.zero in (1, 2) and self.parts > 1:
                with after(stored):
                    mine = call(section.graph, gs.local_shard.default, (stored, self.parts, self.axis), self.record)
                stored = mine
            old.replace_all_uses_with(stored)
            remove_input(section, old)
            changed.append(stored)
        self._reduce_norms(section, changed)
        return changed

    def _reduced_gradient(self, section: Section, old: fx.Node) -> fx.Node:
        """The gradient summed over data-parallel ranks and divided; a shard of it for stages 1 to 3."""
        value = self._flat(old, sharded=self.zero >= 2)
        readers = list(old.users)
        node = accumulated = replace_input(section, old, self.accumulator, value, f"grad.{self.bucket.name}")
        record = self.record
        with after(accumulated):
            if self.zero == 1:
                node = self._reduce_scatter(section, node, record)
            if self.zero == 0 and self.parts > 1:
                node = self._all_reduce(section, node, self.axis, record)
            if self.replicas > 1:
                node = self._all_reduce(section, node, "dp", record)
            # Reduced in a lower precision it is widened first, so that it is not rounded once more.
            widened = len(readers) == 1 and readers[0].target is aten._to_copy.default
            if self.divisor > 1 and not widened:
                node = call(section.graph, aten.mul.Tensor, (node, 1.0 / self.divisor), record)
        if self.divisor > 1 and widened:
            scaled = list(readers[0].users)
            with after(readers[0]):
                mean = call(section.graph, aten.mul.Tensor, (readers[0], 1.0 / self.divisor), record)
            for reader in scaled:
                reader.replace_input_with(readers[0], mean)
        for reader in readers:
            reader.replace_input_with(accumulated, node)
        return node

    def _reduce_norms(self, section: Section, sharded: list[fx.Node]) -> None:
        """A sum of squares over shards is a partial sum: reduce it, once for all parameters of a norm."""
        if self.zero == 0 or self.parts == 1:
            return
        for norm in downstream(sharded, stop=is_pooled, include_stop=True):
            if not is_pooled(norm) or info(norm).layout:
                continue
            readers = list(norm.users)
            with after(norm):
                total = self._all_reduce(section, norm, self.axis, replace(self.record, stage=info(norm).stage))
            for reader in readers:
                reader.replace_input_with(norm, total)
            set_info(norm, layout=f"{self.axis}:partial")

    def _update_whole(self, section: Section, inputs: dict[Slot, fx.Node]) -> None:
        """The update on whole parameters, for an optimizer that is not elementwise: views of the bucket."""
        graph, shape, stride = section.graph, list(self.param.shape), _contiguous(self.param.shape)
        if self.carry in inputs:
            readers = list(inputs[self.carry].users)
            reduced = self._reduced_gradient(section, inputs[self.carry])
            with after(reduced):
                view = call(graph, aten.as_strided.default, (reduced, shape, stride, 0), self.record)
            for reader in readers:
                reader.replace_input_with(reduced, view)
        if self.slot in inputs:
            old = inputs[self.slot]
            stored = add_input(section, self.store, self._flat(old, False), info(old), self.bucket.name)
            with after(stored):
                view = call(graph, aten.as_strided.default, (stored, shape, stride, 0), self.record)
            old.replace_all_uses_with(view)
            remove_input(section, old)

    def _renamed(self, slot: Slot) -> Slot:
        if slot.role is Role.PARAM:
            return self.store
        if slot.role is Role.OUTPUT:
            return replace(slot, name=f"grad:{self.bucket.name}")
        return replace(slot, name=self.bucket.name)

    def _is_created(self, node: fx.Node) -> bool:
        """Whether ``node`` makes a tensor of the parameter's shape out of nothing. A scalar needs no change."""
        return node.target in _CREATION and self.param.shape != () and tuple(list_arg(node, 0)) == self.param.shape

    def _create_like(self, section: Section, node: fx.Node, like: fx.Node) -> None:
        fill = node.args[1] if node.target is aten.full.default else int(node.target is aten.ones.default)
        dtype = node.meta["val"].dtype
        with section.graph.inserting_before(node):
            new = call(section.graph, aten.full_like.default, (like, fill), info(node), dtype=dtype)
        node.replace_all_uses_with(new)
        section.graph.erase_node(node)


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    stride, result = 1, []
    for size in reversed(shape):
        result.append(stride)
        stride *= max(size, 1)
    return result[::-1]


def _apart(program: Program, names: Collection[str]) -> list[Slot]:
    """The buffers of ``names`` that the program reads. In training each rank's are its own, as with BatchNorm's
    statistics: rank 0's are the model's, which a checkpoint has and evaluation is to be with."""
    read = {*program.prologue.inputs.values(), *program.body.inputs.values()}
    return sorted(slot for slot in read if slot.role is Role.BUFFER and slot.name in names)


def _share(program: Program, stored: Slot) -> None:
    """Read data-parallel rank 0's, once a step: from a carry, as if the body changed it."""
    body, prologue = program.body, program.prologue
    carry = Slot(Role.CARRY, f"buffer:{stored.name}", stage=stored.stage)
    old = body.input_slots.get(stored)
    if old is not None:
        record = info(old)
        given = add_input(prologue, stored, val(old), replace(record, phase=Phase.UPDATE), old.name)
        carried = add_input(body, carry, val(old), record, f"carried_{old.name}")
        old.replace_all_uses_with(carried)
        remove_input(body, old)
        set_outputs(body, body.outputs | {carry: carried})
        set_outputs(prologue, prologue.outputs | {carry: given})
    given = prologue.input_slots[stored]
    record = NodeInfo(phase=Phase.UPDATE, module=info(given).module, stage=stored.stage, made_by="zero")
    readers = list(given.users)
    with prologue.graph.inserting_before(first_operation(prologue.graph)):
        value = _over_data_axes(program, c10d.broadcast.default, given, 0, record)
    for reader in readers:
        reader.replace_input_with(given, value)


def _over_data_axes(program: Program, collective: Any, value: fx.Node, option: object, record: NodeInfo) -> fx.Node:
    """What a collective that keeps the type makes of ``value`` over all data-parallel ranks, axis by axis."""
    for axis in DATA_AXES:
        if program.mesh.size(axis) > 1:
            value = call(value.graph, collective, (value, option, axis), record)
            value = call(value.graph, c10d.wait_tensor.default, (value,), record)
    return value
