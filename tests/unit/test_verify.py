"""Every rule of legality, broken by graph text or, where text cannot say it, by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from graphshard import text
from graphshard.errors import IllegalProgram
from graphshard.program import MemoryTag, NodeInfo, Program, Role, Slot, set_info
from graphshard.rewrite import call
from graphshard.verify import verify

aten = torch.ops.aten

BODY = """graphshard 1
{header}
param "w" : f32[4,4] group=0
bucket "b" : f32[16] axis=dp parts=1 stage=0 {{"w"@0}}

graph prologue {{
  %zero = aten.full.default([4, 4], 0.0)
  return carry "grad:w" %zero
}}

graph body {{
  %w : f32[4,4] = param "w"
  %x : f32[4,4] = batch 0
  %g : f32[4,4] = carry "grad:w"
{lines}
  %y = aten.mm.default(%x, %w) {{{stage}}}
  %gw = aten.mm.default(%x, %y) {{phase=backward, {stage}}}
  %g1 = aten.add.Tensor(%g, %gw) {{phase=backward, {stage}}}
  return carry "grad:w" %g1
}}

graph epilogue {{
  %g : f32[4,4] = carry "grad:w"
  %w : f32[4,4] = param "w"
  %w1 = aten.sub.Tensor(%w, %g)
  return param "w" %w1
}}
"""


def program(*lines: str, header: str = "", stage: str = "module=m") -> Program:
    """A small training program with further ``lines`` in its body."""
    return text.parse(BODY.format(header=header, lines="\n".join(f"  {line}" for line in lines), stage=stage))


def refused(broken: Program, message: str) -> None:
    with pytest.raises(IllegalProgram, match=re.escape(message)):
        verify(broken)


def test_legal() -> None:
    verify(program())


def test_names_the_graph_the_node_and_the_pass() -> None:
    broken = program("%b = aten.relu_.default(%x)")
    with pytest.raises(IllegalProgram, match=r"%b = aten.relu_.default, graph body after pass 'mine'"):
        verify(broken, after="mine")


CAPTURED, STAGED, SHARDED = "", "mesh pp=2\nlevel staged", "level sharded"
BY_TEXT = {
    "graphs are functional; this operator writes to its arguments": (CAPTURED, "%b = aten.add_.Tensor(%x, %x)"),
    "operators of namespace '_c10d_functional' do not exist at level captured": (
        CAPTURED,
        '%b = _c10d_functional.all_reduce.default(%x, "sum", "dp")',
    ),
    "operators of namespace '_c10d_functional' do not exist at level staged": (
        STAGED,
        '%b = _c10d_functional.all_reduce.default(%x, "sum", "dp") {stage=0}',
    ),
    "graphshard::transfer does not exist at level captured": (
        CAPTURED,
        "%b = graphshard.transfer.default(%x, 0, 1)",
    ),
    "graphshard::stage_sum does not exist at level captured": (
        CAPTURED,
        '%b = graphshard.stage_sum.default([%x], "pp")',
    ),
    "graphshard::local_shard does not exist at level staged": (
        STAGED,
        '%b = aten.view.default(%x, [16])\n  %c = graphshard.local_shard.default(%b, 2, "dp") {stage=0}',
    ),
    "stage 2 is outside 0..1": (STAGED, "%b = aten.neg.default(%x) {stage=2}"),
    "a value crosses stages without a transfer: %b of stage 0 read on stage 1": (
        STAGED,
        "%b = aten.neg.default(%x) {stage=0}\n  %c = aten.neg.default(%b) {stage=1}",
    ),
    "a forward operation reads %b of phase backward": (
        CAPTURED,
        "%b = aten.neg.default(%x) {phase=backward}\n  %c = aten.neg.default(%b)",
    ),
    "an operation of phase backward reads %b of phase weight": (
        CAPTURED,
        "%b = aten.neg.default(%x) {phase=weight}\n  %c = aten.neg.default(%b) {phase=backward}",
    ),
}


@pytest.mark.parametrize("message", BY_TEXT)
def test_operations(message: str) -> None:
    header, line = BY_TEXT[message]
    refused(program(line, header=header, stage="stage=0" if header is STAGED else "module=m"), message)


def test_a_transfer_may_cross_stages() -> None:
    lines = (
        "%b = aten.neg.default(%x) {stage=0}",
        "%t = graphshard.transfer.default(%b, 0, 1) {stage=1}",
        "%c = aten.neg.default(%t) {stage=1}",
    )
    verify(program(*lines, header=STAGED, stage="stage=0"))


GATHER = (
    '%a = _c10d_functional.all_gather_into_tensor.default(%x, 2, "dp")',
    "%b = _c10d_functional.wait_tensor.default(%a)",
    "%c = aten.view.default(%b, [2, 16])",
    "%d = aten.neg.default(%c) {phase=backward}",
)


def test_a_gathered_parameter_is_not_kept_for_backward() -> None:
    refused(
        program(*GATHER, header=SHARDED),
        "gathered parameter %a is kept from forward to backward, where %d reads it; run normalize before zero",
    )


def test_unless_the_gather_says_so() -> None:
    kept = program(*GATHER, header=SHARDED)
    gather = next(n for n in kept.body.nodes() if n.name == "a")
    set_info(gather, tag=MemoryTag.SAVE)
    verify(kept)


def test_a_copy_of_a_gathered_parameter_may_be_kept() -> None:
    copied = [line.replace("aten.view.default(%b, [2, 16])", "aten.neg.default(%b)") for line in GATHER]
    verify(program(*copied, header=SHARDED))


def unknown_operation(broken: Program) -> None:
    node = next(broken.body.nodes())
    node.target = torch.relu


def foreign_kind(broken: Program) -> None:
    graph = broken.body.graph
    with graph.inserting_before(graph.output_node()):
        graph.get_attr("weight")


def used_too_early(broken: Program) -> None:
    first, second, *_ = broken.body.nodes()
    second.append(first)


def late_placeholder(broken: Program) -> None:
    first = next(broken.body.nodes())
    first.append(next(iter(broken.body.inputs)))


def unknown_placeholder(broken: Program) -> None:
    node = next(n for n, slot in broken.body.inputs.items() if slot.role is Role.BATCH)
    del broken.body.inputs[node]


def no_type(broken: Program) -> None:
    del next(broken.body.nodes()).meta["val"]


def no_info(broken: Program) -> None:
    del next(broken.body.nodes()).meta["info"]


def read_twice(broken: Program) -> None:
    first, second, *_ = broken.body.inputs
    broken.body.inputs[second] = broken.body.inputs[first]


def written_twice(broken: Program) -> None:
    section = broken.epilogue
    section.output_slots *= 2
    section.output_node.args = (section.output_node.args[0] * 2,)  # type: ignore[operator]


def signature_too_short(broken: Program) -> None:
    broken.epilogue.output_slots = []


def carry_without_start(broken: Program) -> None:
    broken.prologue.output_slots = [Slot(Role.CARRY, "loss")]


def carry_not_read(broken: Program) -> None:
    broken.body.output_slots = [Slot(Role.CARRY, "other")]


def carry_from_nowhere(broken: Program) -> None:
    node = next(n for n, slot in broken.epilogue.inputs.items() if slot.role is Role.CARRY)
    broken.epilogue.inputs[node] = Slot(Role.CARRY, "other")


def unknown_parameter(broken: Program) -> None:
    del broken.params["w"]


def unknown_bucket(broken: Program) -> None:
    node = next(n for n, slot in broken.body.inputs.items() if slot.role is Role.PARAM)
    broken.body.inputs[node] = Slot(Role.SHARD, "w")


def namespace(broken: Program) -> None:
    graph = broken.body.graph
    with graph.inserting_before(graph.output_node()):
        x = next(n for n, slot in broken.body.inputs.items() if slot.role is Role.BATCH)
        node = call(graph, aten.neg.default, (x,), NodeInfo())
        node.target = torch.ops.prim.device.default


BY_HAND: dict[Callable[[Program], None], str] = {
    unknown_operation: "only ATen, functional collective and graphshard operators are part of the IR",
    namespace: "operators of namespace 'prim' do not exist at level captured",
    foreign_kind: "node kind 'get_attr' is not part of the IR",
    used_too_early: "%y is used before it is defined",
    late_placeholder: "is used before it is defined",
    unknown_placeholder: "a placeholder has no slot in the signature",
    no_type: "a node has no type or no NodeInfo",
    no_info: "a node has no type or no NodeInfo",
    read_twice: 'slot param "w" is read by 2 placeholders; one is allowed',
    written_twice: 'slot param "w" is written 2 times; once is allowed',
    signature_too_short: "the signature and the output node differ in length",
    carry_without_start: 'carry "grad:w" is read by the body but not initialised by the prologue',
    carry_not_read: 'carry "other" is returned by the body but not read by it',
    carry_from_nowhere: 'carry "other" is read by the epilogue but nothing produces it',
    unknown_parameter: 'param "w" is not in the table of parameters',
    unknown_bucket: 'shard "w" is not in the table of buckets',
}


@pytest.mark.parametrize("break_it", BY_HAND, ids=lambda f: f.__name__)
def test_structure(break_it: Callable[[Program], None]) -> None:
    broken = program()
    break_it(broken)
    refused(broken, BY_HAND[break_it])


def test_a_placeholder_comes_first() -> None:
    broken = program()
    first = next(broken.body.nodes())
    unread = next(n for n, slot in broken.body.inputs.items() if slot.role is Role.CARRY)
    first.append(unread)
    refused(broken, "a placeholder comes after an operation")


def test_storage_belongs_to_sharded_programs() -> None:
    refused(program('%f : f32[16] = flat "b"'), 'flat "b" exists before parameters are sharded')
    verify(program('%f : f32[16] = flat "b"', header=SHARDED))


def test_a_slot_is_of_one_type_in_all_graphs() -> None:
    broken = text.parse(
        BODY.format(header="", lines="", stage="module=m").replace("sub.Tensor(%w, %g)", "sum.default(%g)")
    )
    refused(broken, 'param "w" is f32[4,4] in graph body and f32[] here (at %w1')


def test_a_collective_is_waited_for() -> None:
    started = '%r = _c10d_functional.all_reduce.default(%x, "sum", "dp")'
    verify(program(started, "%done = _c10d_functional.wait_tensor.default(%r)", header=SHARDED))
    refused(program(started, "%early = aten.neg.default(%r)", header=SHARDED), "%early reads the collective %r without")


def test_members_of_buckets_are_parameters() -> None:
    broken = program(header=SHARDED)
    del broken.params["w"]
    for section in broken.sections().values():
        for node, slot in section.inputs.items():
            if slot.role is Role.PARAM:
                section.inputs[node] = Slot(Role.BUFFER, "w")
    refused(broken, "bucket member 'w' is not in the table of parameters")
