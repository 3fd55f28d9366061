"""Translation validation: every pass keeps the meaning of its input, and each seeded fault is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import graphshard
from graphshard import text
from graphshard.check import check, check_passes
from graphshard.errors import NotEquivalent
from graphshard.pipeline import Context, Pass, parse_passes
from graphshard.program import Program
from graphshard.rewrite import copied, list_arg
from two_layers import two_layers

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    "passes",
    ["zero:stage=0;bucket", "zero:stage=1;bucket", "zero:stage=2;bucket", "zero:stage=3;bucket;hoist:budget_gb=1"],
)
def test_every_pass_keeps_the_meaning(passes: str, stages: int, microbatches: int) -> None:
    program = text.parse(two_layers("dp=2" if stages == 1 else "pp=2 dp=2", microbatches))
    listed = parse_passes(f"normalize;pipeline-cut;{passes};overlap")
    assert list(check_passes(program, listed, Context(program.mesh))) == listed


# Faults: what a wrong pass could leave behind.


def nodes(program: Program, target: Any) -> list[fx.Node]:
    return [node for section in program.sections().values() for node in section.nodes() if node.target is target]


def first(program: Program, target: Any) -> fx.Node:
    return nodes(program, target)[0]


def changed(node: fx.Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def wrong_scale(p: Program) -> None:
    changed(next(n for n in nodes(p, aten.mul.Tensor) if n.args[1] == 0.5 and "mul_tensor" in n.name), 1, 0.25)


def no_reduction(p: Program) -> None:
    reduced = first(p, c10d.all_reduce.default)
    (wait,) = reduced.users
    wait.replace_all_uses_with(reduced.all_input_nodes[0])


def reduced_twice(p: Program) -> None:
    reduced = first(p, c10d.all_reduce.default)
    (wait,) = reduced.users
    with wait.graph.inserting_after(wait):
        again = wait.graph.node_copy(reduced, lambda n: wait)
    with wait.graph.inserting_after(again):
        wait_again = wait.graph.node_copy(wait, lambda n: again)
    wait.replace_all_uses_with(wait_again, delete_user_cb=lambda user: user not in (again, wait_again))


def shifted_parameter(p: Program) -> None:
    changed(first(p, aten.as_strided.default), 2, [1, 4])


def shifted_gradient(p: Program) -> None:
    pack = first(p, gs.pack.default)
    changed(pack, 0, [slightly_more(part) for part in list_arg(pack, 0)])


def slightly_more(node: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        more = node.graph.call_function(aten.mul.Tensor, (node, 1.0000001))
    more.meta = dict(node.meta)
    return more


def not_accumulated(p: Program) -> None:
    total = next(n for n in p.body.nodes() if n.target is aten.add.Tensor and "grad" in str(n.args[0]))
    total.replace_all_uses_with(total.args[1])  # type: ignore[arg-type]


def another_parameter(p: Program) -> None:
    one, other, *_ = nodes(p, c10d.all_gather_into_tensor.default)
    changed(one, 0, other.args[0])


def not_updated(p: Program) -> None:
    update = first(p, aten.sub.Tensor)
    update.replace_all_uses_with(update.args[0])  # type: ignore[arg-type]


def wrong_order_of_parts(p: Program) -> None:
    node = first(p, gs.local_shard.default)
    with node.graph.inserting_before(node):
        flipped = node.graph.call_function(aten.flip.default, (node.args[0], [0]))
    flipped.meta = dict(node.args[0].meta)  # type: ignore[union-attr]
    changed(node, 0, flipped)


def sent_something_else(p: Program) -> None:
    transfer = first(p, gs.transfer.default)
    source: Any = transfer.args[0]
    with transfer.graph.inserting_before(transfer):
        other = transfer.graph.call_function(aten.neg.default, (source,))
    other.meta = dict(source.meta)
    changed(transfer, 0, other)


def loss_of_another_scale(p: Program) -> None:
    changed(next(n for n in p.epilogue.nodes() if n.name == "mean"), 1, 1.0)


FAULTS: dict[str, tuple[str, Callable[[Program], None]]] = {
    "the mean over ranks is wrong": ("zero:stage=0", wrong_scale),
    "a gradient is not reduced": ("zero:stage=0", no_reduction),
    "a gradient is reduced twice": ("zero:stage=0", reduced_twice),
    "a parameter is read in other strides": ("zero:stage=3", shifted_parameter),
    "a gradient is off by a part in ten million": ("zero:stage=3", shifted_gradient),
    "a gradient is not accumulated": ("zero:stage=3", not_accumulated),
    "another parameter is gathered": ("zero:stage=3", another_parameter),
    "a parameter is not updated": ("zero:stage=2", not_updated),
    "a rank updates another one's part": ("zero:stage=1", wrong_order_of_parts),
    "another value is sent": ("pipeline-cut", sent_something_else),
    "the loss has another scale": ("normalize", loss_of_another_scale),
}


def faulty(inner: Pass, fault: Callable[[Program], None]) -> Pass:
    """A pass that does what ``inner`` does, and then the fault."""

    class Faulty:
        name: ClassVar[str] = inner.name
        exact: ClassVar[bool] = False

        def run(self, program: Program, ctx: Context) -> Program:
            program = inner.run(program, ctx)
            fault(program)
            return program

    return Faulty()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_pass_named(name: str) -> None:
    option, fault = FAULTS[name]
    pass_name = option.partition(":")[0]
    mesh = "pp=2 dp=2" if pass_name == "pipeline-cut" else "dp=2"
    program = text.parse(two_layers(mesh))
    good = parse_passes("normalize;pipeline-cut")
    before = (
        good[: [item.name for item in good].index(pass_name)] if pass_name in ("normalize", "pipeline-cut") else good
    )
    (inner,) = parse_passes(option)
    listed = [*before, faulty(inner, fault), *parse_passes("overlap")]
    checked: list[str] = []
    with pytest.raises(NotEquivalent, match=f"pass '{pass_name}' does not keep the program's meaning: .* differs by"):
        checked.extend(item.name for item in check_passes(program, listed, Context(program.mesh)))
    assert checked == [item.name for item in before]


def test_the_first_node_that_differs_is_named() -> None:
    program = text.parse(two_layers("dp=2"))
    broken = copied(program)
    changed(
        next(n for n in broken.body.nodes() if n.name == "gh"), 0, next(n for n in broken.body.nodes() if n.name == "y")
    )
    with pytest.raises(NotEquivalent, match=r"differs by .*; first at %gh = aten.mm.default of module b, graph body"):
        check(program, broken)


def test_exact_means_every_bit() -> None:
    program = text.parse(two_layers("dp=2"))
    other = text.parse(
        two_layers("dp=2")
        .replace(
            "%da = aten.mul.Tensor(%ga, 0.05)", "%da0 = aten.mul.Tensor(%ga, 0.1)\n  %da = aten.mul.Tensor(%da0, 0.5)"
        )
        .replace(
            "%db = aten.mul.Tensor(%gb, 0.05)", "%db0 = aten.mul.Tensor(%gb, 0.15)\n  %db = aten.div.Tensor(%db0, 3.0)"
        )
    )
    graphshard.check(program, other)
    with pytest.raises(NotEquivalent):
        graphshard.check(program, other, exact=True)
