"""What passes leave behind is looked for in the graphs: each way of breaking it is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx

from graphshard import text
from graphshard.errors import IllegalProgram
from graphshard.pipeline import Context, parse_passes, run_passes
from graphshard.postconditions import of
from graphshard.program import MemoryTag, Program, set_info
from graphshard.rewrite import call
from graphshard.verify import verify
from two_layers import two_layers

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

TIED = Path(__file__).parent.parent / "cases" / "zero" / "tied_weight.graph"


def passed(passes: str, mesh: str = "dp=2", source: str = "") -> Program:
    program = text.parse(source or two_layers(mesh))
    return run_passes(program, parse_passes(f"normalize;pipeline-cut;{passes}"), Context(program.mesh))


def found(program: Program, target: object, user_of: str = "") -> fx.Node:
    nodes = [n for section in program.sections().values() for n in section.nodes() if n.target is target]
    return next(n for n in nodes if user_of in str(n.all_input_nodes))


def not_reduced(program: Program) -> None:
    reduction = found(program, c10d.reduce_scatter_tensor.default)
    flat = reduction.all_input_nodes[0]
    (wait,) = reduction.users
    with wait.graph.inserting_after(flat):
        part = call(wait.graph, gs.local_shard.default, (flat, 2, "dp"), flat.meta["info"])
    wait.replace_all_uses_with(part)


def reduced_again(program: Program) -> None:
    wait = next(iter(found(program, c10d.reduce_scatter_tensor.default).users))
    with wait.graph.inserting_after(wait):
        again = call(wait.graph, c10d.all_reduce.default, (wait, "sum", "dp"), wait.meta["info"])
    with wait.graph.inserting_after(again):
        done = call(wait.graph, c10d.wait_tensor.default, (again,), wait.meta["info"])
    wait.replace_all_uses_with(done, delete_user_cb=lambda user: user is not again)


def partly_reduced(program: Program) -> None:
    """The local gradient is added to the reduced one."""
    wait = next(iter(found(program, c10d.reduce_scatter_tensor.default).users))
    flat = wait.all_input_nodes[0].all_input_nodes[0]
    with wait.graph.inserting_after(wait):
        part = call(wait.graph, gs.local_shard.default, (flat, 2, "dp"), wait.meta["info"])
    with wait.graph.inserting_after(part):
        total = call(wait.graph, aten.add.Tensor, (wait, part), wait.meta["info"])
    wait.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def kept_for_backward(program: Program) -> None:
    gathers = [n for n in program.body.nodes() if n.target is c10d.all_gather_into_tensor.default]
    first, again = next((a, b) for a in gathers for b in gathers if a is not b and a.args[0] is b.args[0])
    again.replace_all_uses_with(first)


def a_view_kept_for_backward(program: Program) -> None:
    view = next(n for n in program.body.nodes() if n.target is aten.t.default and "b" in str(n.args[0]))
    set_info(
        view, phase=program.body.graph.find_nodes(op="call_function", target=aten.mm.default)[0].meta["info"].phase
    )


def overlapping_members(program: Program) -> None:
    name, bucket = next((name, b) for name, b in program.buckets.items() if len(b.members) > 1)
    (first, at), (second, _), *rest = bucket.members
    program.buckets[name] = replace(bucket, members=((first, at), (second, at + 1), *rest))


def uneven_shards(program: Program) -> None:
    name, bucket = next(iter(program.buckets.items()))
    program.buckets[name] = replace(bucket, numel=bucket.numel + 1)


def recomputed_transfer(program: Program) -> None:
    set_info(found(program, gs.transfer.default), tag=MemoryTag.RECOMPUTE)


def transfer_again(program: Program) -> None:
    forward = found(program, gs.transfer.default)
    backward = next(n for n in program.body.nodes() if n.target is gs.transfer.default and n is not forward)
    set_info(forward, origin="h")
    set_info(backward, origin="h")


def a_stage_left_out(program: Program) -> None:
    """Of two replicas' gradients, one stage adds its own to itself."""
    total = next(n for n in program.epilogue.nodes() if any(s.target is gs.transfer.default for s in n.all_input_nodes))
    own = next(s for s in total.all_input_nodes if s.target is not gs.transfer.default)
    sent = next(s for s in total.all_input_nodes if s.target is gs.transfer.default)
    total.replace_input_with(sent, own)


BROKEN: dict[str, tuple[str, str, Callable[[Program], None]]] = {
    "is reduced never over dp, instead of once": ("dp=2", "zero:stage=3", not_reduced),
    "is reduced more than once over dp, instead of once": ("dp=2", "zero:stage=2;bucket", reduced_again),
    "is reduced never or once over dp, instead of once": ("dp=2", "zero:stage=3;bucket", partly_reduced),
    "is kept from forward to backward": ("dp=2", "zero:stage=3", kept_for_backward),
    "a view of a parameter is kept from forward to backward": ("dp=2", "", a_view_kept_for_backward),
    "'b.w' begins at element 1, before 'a.w' ends at 16": ("dp=2", "zero:stage=1;bucket", overlapping_members),
    "33 elements do not make 2 equal shards": ("dp=2", "zero:stage=1;bucket", uneven_shards),
    "a communication is part of what is recomputed": ("pp=2", "", recomputed_transfer),
    "a communication is part of what is recomputed ": ("pp=2", "", transfer_again),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_broken_is_named(message: str) -> None:
    mesh, passes, fault = BROKEN[message]
    program = passed(passes, mesh)
    verify(program)
    fault(program)
    with pytest.raises(IllegalProgram, match=message.strip()):
        verify(program)


def test_a_gradient_of_a_replica_that_is_left_out_is_named() -> None:
    program = passed("zero:stage=0", source=TIED.read_text())
    verify(program)
    a_stage_left_out(program)
    with pytest.raises(IllegalProgram, match=r'the gradient of flat "w.* leaves out that of stage \d'):
        verify(program)


def test_conditions_grow_with_the_level_and_the_passes() -> None:
    captured = text.parse(two_layers("pp=2 dp=2"))
    assert of(captured) == []
    normal = run_passes(captured, parse_passes("normalize"))
    assert [item.what for item in of(normal)] == ["no view of a parameter crosses from forward to backward"]
    everything = [item.what for item in of(passed("zero:stage=3;bucket;overlap", "pp=2 dp=2"))]
    assert {
        "every gradient is reduced exactly once",
        "a gathered parameter is released after its last use in a phase",
        "no communication is part of what is recomputed",
    } < set(everything)
