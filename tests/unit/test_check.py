"""Translation validation: every pass keeps the meaning of its input, and each seeded fault is found and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import graphshard
from graphshard import text
from graphshard.check import check, check_passes
from graphshard.errors import IllegalProgram, NotEquivalent, PassFailed
from graphshard.loss_gradient import loss_gradient
from graphshard.passes.normalize import Normalize
from graphshard.passes.zero import Zero
from graphshard.pipeline import Context, Pass, parse_passes
from graphshard.program import Phase, Program, info
from graphshard.rewrite import after, arg, call, copied, list_arg
from graphshard.testing import mutants, nodes
from two_layers import two_layers

aten = torch.ops.aten
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

Fault = Callable[[Program], Program]


def broken(kind: str) -> Fault:
    """The first mutant of that kind."""
    return lambda program: next(mutants(program, kinds=[kind])).program


def first(program: Program, target: Any) -> fx.Node:
    sections = program.sections().values()
    return next(node for section in sections for node in section.nodes() if node.target is target)


def changed(node: fx.Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def other_strides(p: Program) -> Program:
    changed(first(p, aten.as_strided.default), 2, [1, 4])
    return p


def slightly_more(p: Program) -> Program:
    pack = first(p, gs.pack.default)
    changed(pack, 0, [_instead(part, aten.mul.Tensor, 1.0000001) for part in list_arg(pack, 0)])
    return p


def another_parameter(p: Program) -> Program:
    one, other = nodes(p).op("all_gather").phase("forward")
    changed(one, 0, other.args[0])
    return p


def wrong_order_of_parts(p: Program) -> Program:
    node = first(p, gs.local_shard.default)
    changed(node, 0, _instead(arg(node, 0), aten.flip.default, [0]))
    return p


def no_transfer(p: Program) -> Program:
    transfer = first(p, gs.transfer.default)
    transfer.replace_all_uses_with(arg(transfer, 0))
    return p


def uneven_shards(p: Program) -> Program:
    name, bucket = next(iter(p.buckets.items()))
    p.buckets[name] = replace(bucket, numel=bucket.numel + 1)
    return p


def off_by_one(p: Program) -> Program:
    """Of the storage alone: gradients and updates find the parameter where it was."""
    name, bucket = next(iter(p.buckets.items()))
    (member, at), *rest = bucket.members
    p.buckets[name] = replace(bucket, members=((member, at + 1), *rest))
    return p


def drawn_again(p: Program) -> Program:
    """The backward draws its mask anew, under another id."""
    mask = first(p, gs.dropout_mask.default)
    seed = mask.all_input_nodes[0]
    backward = next(user for user in mask.users if info(user).phase is not Phase.FORWARD)
    record = replace(info(mask), phase=info(backward).phase)
    with backward.graph.inserting_before(backward):
        other = call(backward.graph, gs.seed.default, (seed.args[0], 8), record, **seed.kwargs)
        kept = call(backward.graph, gs.dropout_mask.default, (other, *mask.args[1:]), record)
    backward.replace_input_with(mask, kept)
    return p


def with_dropout(source: str) -> str:
    """Between the two layers."""
    drawn = """%seed = graphshard.seed.default(%key, 7, device=cpu) {module=a}
  %kept = graphshard.dropout_mask.default(%seed, [2, 4], 0.5) {module=a}
  %masked = aten.mul.Tensor(%h, %kept) {module=a}
  %hd = aten.mul.Tensor(%masked, 2.0) {module=a}
  %y = aten.mm.default(%hd, %b)"""
    back = """%gd = aten.mm.default(%gy, %bt) {phase=backward, module=b, forward=y}
  %gm = aten.mul.Tensor(%gd, %kept) {phase=backward, module=a, forward=masked}
  %gh = aten.mul.Tensor(%gm, 2.0) {phase=backward, module=a, forward=hd}"""
    source = source.replace("%y = aten.mm.default(%h, %b)", drawn).replace("aten.t.default(%h)", "aten.t.default(%hd)")
    source = source.replace("%gh = aten.mm.default(%gy, %bt) {phase=backward, module=b, forward=y}", back)
    return source.replace("%x : f32[2,4] = batch 0", '%x : f32[2,4] = batch 0\n  %key : i64[4] = rng "key"')


def _instead(node: fx.Node, target: Any, value: Any) -> fx.Node:
    with after(node):
        return call(node.graph, target, (node, value), info(node))


FAULTS: dict[str, tuple[str, Fault]] = {
    "the mean over ranks is wrong": ("zero:stage=0", broken("scale")),
    "a gradient is not reduced": ("zero:stage=0", broken("drop-collective")),
    "a gradient is reduced twice": ("zero:stage=0", broken("reduce-twice")),
    "a parameter is read in other strides": ("zero:stage=3", other_strides),
    "a gradient is off by a part in ten million": ("zero:stage=3", slightly_more),
    "a gradient is not accumulated": ("zero:stage=3", broken("drop-term")),
    "another parameter is gathered": ("zero:stage=3", another_parameter),
    "a parameter is not updated": ("zero:stage=2", broken("drop-update")),
    "a rank updates another one's part": ("zero:stage=1", wrong_order_of_parts),
    "another value is sent": ("pipeline-cut", broken("read-another")),
    "the loss has another scale": ("normalize", broken("scale")),
    "a value crosses stages without a transfer": ("pipeline-cut", no_transfer),
    "a bucket is padded to uneven shards": ("bucket", uneven_shards),
    "a member of a bucket is off by one": ("bucket", off_by_one),
    "a random operator is computed again": ("pipeline-cut", drawn_again),
}


def faulty(inner: Pass, fault: Fault) -> Pass:
    """A pass that does what ``inner`` does, and then the fault."""

    class Faulty:
        name: ClassVar[str] = inner.name
        exact: ClassVar[bool] = False

        def run(self, program: Program, ctx: Context) -> Program:
            return fault(inner.run(program, ctx))

    return Faulty()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_pass_named(name: str) -> None:
    option, fault = FAULTS[name]
    pass_name = option.partition(":")[0]
    mesh = "pp=2 dp=2" if pass_name == "pipeline-cut" else "dp=2"
    program = text.parse(with_dropout(two_layers(mesh)))
    good = parse_passes("normalize;pipeline-cut;zero:stage=3;bucket")
    before = good[: [item.name for item in good].index(pass_name)]
    (inner,) = parse_passes(option)
    listed = [*before, faulty(inner, fault), *parse_passes("overlap")]
    checked: list[str] = []
    # Some are found without running anything: a value that crosses stages, a gradient that is not reduced.
    found = f"pass '{pass_name}' does not keep the program's meaning: .* differs by|illegal .* after pass '{pass_name}'"
    with pytest.raises((NotEquivalent, IllegalProgram), match=found):
        checked.extend(item.name for item in check_passes(program, listed, Context(program.mesh)))
    assert checked == [item.name for item in before]


def test_the_first_node_that_differs_is_named() -> None:
    program = text.parse(two_layers("dp=2"))
    wrong = copied(program)
    by_name = {node.name: node for node in wrong.body.nodes()}
    changed(by_name["gh"], 0, by_name["y"])
    with pytest.raises(NotEquivalent, match=r"differs by .*; first at %gh = aten.mm.default of module b, graph body"):
        check(program, wrong)


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


def scaled(p: Program) -> Program:
    """Every gradient is half of what it should be."""
    share = loss_gradient(p.body)
    assert share is not None
    changed(share, 1, share.args[1] / 2)  # type: ignore[operator]
    return p


def other_evaluation(p: Program) -> Program:
    """Right for training alone: without a backward, the hidden layer has the other sign."""
    if not any(info(node).phase is Phase.BACKWARD for node in p.body.nodes()):
        tanh = first(p, aten.tanh.default)
        for reader in list(tanh.users):
            reader.replace_input_with(tanh, _instead(tanh, aten.mul.Tensor, -1.0))
    return p


class Raises:
    name: ClassVar[str] = "raises"
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> Program:
        raise KeyError("oops")


class ReturnsNothing(Raises):
    name: ClassVar[str] = "returns"

    def run(self, program: Program, ctx: Context) -> Program:
        return None  # type: ignore[return-value]


def compiled(*passes: Pass, positive: bool = False, **given: Any) -> graphshard.Compiled:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(torch.tanh(self.first(torch.log(x) if positive else x)))
            return result

    arguments: dict[str, Any] = {
        "loss_fn": torch.nn.functional.mse_loss,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "example_inputs": (torch.ones(8, 4), torch.ones(8, 4)),
        "executor": "none",
        "passes": passes,
    }
    return graphshard.compile(Model(), "dp2", **(arguments | given))


def test_a_scale_that_clipping_hides_from_the_parameters_is_found_in_the_gradients() -> None:
    with pytest.raises(NotEquivalent, match=r"pass 'zero' does not keep .*: output grad:first.weight of step 0"):
        compiled(faulty(Zero(stage=0), scaled), max_grad_norm=1e-6).verify()


def test_programs_for_evaluation_are_checked_too() -> None:
    assert compiled().verify()
    with pytest.raises(NotEquivalent, match="pass 'normalize' does not keep the program's meaning: loss of step 0"):
        compiled(faulty(Normalize(), other_evaluation)).verify()


def test_a_model_that_takes_positive_numbers_alone() -> None:
    assert compiled(positive=True).verify()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Raises(), "pass 'raises' raises KeyError: 'oops'; expected it to return the rewritten Program"),
        (ReturnsNothing(), "pass 'returns' returns NoneType; expected it to return the rewritten Program"),
    ],
)
def test_a_pass_that_fails_is_named(bad: Pass, said: str) -> None:
    with pytest.raises(PassFailed) as raised:
        compiled(bad)
    assert str(raised.value) == said
