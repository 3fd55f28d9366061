"""Mixed precision: compute in bf16 or fp16, float32 where autocast keeps it, and update in float32.

Micikevicius et al. 2018, "Mixed Precision Training". A float32 parameter is stored in the lower precision, which is
what the body reads, gathers and keeps; its float32 master is state of the update, sharded as such, and the parameter
is the master's cast, made once per step, on the shard. With Adam and gradients reduced in the lower precision that is
the 16 bytes a parameter of Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12. A parameter that is never updated has no
master. One that is read only where the model itself asks for float32 stays in it; see wide.py. Parameters in another
precision stay, unless there would be nothing to do: see NothingToLower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from graphshard import fake
from graphshard.autocast import HALVES
from graphshard.casting import Caster
from graphshard.errors import NothingToLower, PassOptionError, PassTooLate
from graphshard.loss_scaling import SCALE, TRACKER, Scaler, initial, scale_loss
from graphshard.pipeline import Context
from graphshard.program import Level, NodeInfo, Phase, Program, Role, Section, Slot, info, val
from graphshard.rewrite import add_input, after, call, drop_dead, replace_node, set_outputs
from graphshard.wide import wide_parameters

aten = torch.ops.aten


@dataclass(frozen=True)
class Precision:
    """``dtype``: bf16 or fp16. ``reduce``: what gradients are accumulated and reduced in, fp32 or ``dtype``. The other
    options are those of torch.amp.GradScaler, for fp16."""

    dtype: str = "bf16"
    reduce: str = "fp32"
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    name: ClassVar[str] = "precision"
    exact: ClassVar[bool] = False  # it rounds

    def __post_init__(self) -> None:
        for option, known in (("dtype", tuple(HALVES)), ("reduce", ("fp32", self.dtype))):
            if getattr(self, option) not in known:
                raise PassOptionError(self.name, f"{option}={getattr(self, option)}", " or ".join(known))
        for option, above, below in (
            ("init_scale", 0.0, math.inf),
            ("growth_factor", 1.0, math.inf),
            ("backoff_factor", 0.0, 1.0),
        ):
            if not above < getattr(self, option) < below:
                limit = f"above {above:g}" + (f" and below {below:g}" if math.isfinite(below) else "")
                raise PassOptionError(self.name, f"{option}={getattr(self, option)}", f"a finite number {limit}")
        if self.growth_interval < 1:
            raise PassOptionError(self.name, f"growth_interval={self.growth_interval}", "an integer of at least 1")

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is not Level.CAPTURED:
            raise PassTooLate(self.name, str(program.level))
        lower = HALVES[self.dtype]
        reduced = HALVES.get(self.reduce, torch.float32)
        floats = {name for name, param in program.params.items() if param.dtype is torch.float32}
        wide = wide_parameters(program, lower)
        if ctx.placement is not None and ctx.placement.dtypes:
            wide = {name for name in floats if ctx.placement.dtypes.get(name) is torch.float32}
        names = floats - wide
        # The scale is in every gradient, that of a parameter which is not lowered, too.
        gradients = {
            slot: program.params[slot.name.removeprefix("grad:")].dtype
            for slot in program.body.output_slots
            if slot.role is Role.CARRY and slot.name.startswith("grad:")
        }
        carries = {slot for slot in gradients if slot.name.removeprefix("grad:") in names}
        scales = bool(gradients) and self.dtype == "fp16"
        if gradients and not (torch.float32 in gradients.values() if scales else floats):
            # GradScaler, too, refuses to unscale gradients of float16 parameters: there are no masters.
            raise NothingToLower(self.dtype, {str(dtype).removeprefix("torch.") for dtype in gradients.values()})
        if scales:
            scale_loss(program)
            program.constants[initial(SCALE)] = torch.tensor(self.init_scale)
            program.constants[initial(TRACKER)] = torch.tensor(0, dtype=torch.int32)
        _lower_body(program, names, carries, lower, reduced)
        for section in program.updates():
            found = _gradients(section, carries, set(gradients) if scales else carries, reduced)
            if found and scales:
                factors = (self.growth_factor, self.backoff_factor, self.growth_interval)
                Scaler(section, found, *factors, first=section is program.first_epilogue).run()
            _keep_masters(section, names, lower)
        return program


def _lower_body(
    program: Program, names: set[str], carries: set[Slot], lower: torch.dtype, reduced: torch.dtype
) -> None:
    body, changed = program.body, set[fx.Node]()
    for name in names:
        program.params[name] = replace(program.params[name], dtype=lower)
    for node, slot in body.inputs.items():
        if (slot.role is Role.PARAM and slot.name in names) or (slot in carries and reduced is not torch.float32):
            node.meta["val"] = _like(node, lower)
            changed.add(node)
    stored = {slot: val(node).dtype for slot, node in body.input_slots.items() if slot.role is Role.CARRY}
    Caster(body, lower, changed).run({node: stored[s] for s, node in body.outputs.items() if s in stored})
    drop_dead(body)  # what a cast had the precision of, and casts that nothing reads but what casts back
    if reduced is not torch.float32:
        for slot, zeros in program.prologue.outputs.items():
            if slot in carries:
                with after(zeros):
                    options = {**zeros.kwargs, "dtype": reduced}
                    graph = program.prologue.graph
                    replace_node(zeros, call(graph, aten.full.default, zeros.args, info(zeros), **options))


def _like(node: fx.Node, dtype: torch.dtype) -> torch.Tensor:
    value = val(node)
    return fake.tensor(value.fake_mode, value.shape, dtype, device=value.device)


def _gradients(section: Section, carries: set[Slot], wanted: set[Slot], reduced: torch.dtype) -> list[fx.Node]:
    """The gradients of an update that are ``wanted``, in float32 at least. ``carries``: those of lowered parameters,
    which the update reads in float32."""
    found = []
    for slot, node in section.input_slots.items():
        if slot not in wanted:
            continue
        if slot in carries and reduced is not torch.float32:
            node.meta["val"] = _like(node, reduced)
        stored = val(node).dtype
        if stored in HALVES.values():
            readers = list(node.users)
            record = replace(info(node), origin="", made_by="precision")
            with after(node):
                read = wide = call(section.graph, aten._to_copy.default, (node,), record, dtype=torch.float32)
            if slot not in carries:  # its parameter is updated in that precision
                with after(wide):
                    read = call(section.graph, aten._to_copy.default, (wide,), record, dtype=stored)
            for reader in readers:
                reader.replace_input_with(node, read)
            node = wide
        found.append(node)
    return found


def _keep_masters(section: Section, names: set[str], lower: torch.dtype) -> None:
    """The update reads and writes masters; a parameter becomes what is left of its master in the lower precision."""
    for node, slot in section.inputs.items():
        if slot.role is Role.PARAM and slot.name in names:
            section.inputs[node] = replace(slot, role=Role.MASTER)
    results: dict[Slot, fx.Node] = {}
    for slot, node in section.outputs.items():
        if slot.role is not Role.PARAM or slot.name not in names:
            results[slot] = node
            continue
        record = NodeInfo(Phase.UPDATE, slot.name.rpartition(".")[0], made_by="precision")
        stored = add_input(section, slot, _like(node, lower), record, f"{slot.name}.{lower}".replace("torch.", ""))
        with section.graph.inserting_before(section.output_node):
            # Written over the old one: nothing else holds it, and what failed before has lost nothing.
            rounded = call(section.graph, aten.copy.default, (stored, node), record)
        results |= {slot: rounded, replace(slot, role=Role.MASTER): node}
    set_outputs(section, results)
