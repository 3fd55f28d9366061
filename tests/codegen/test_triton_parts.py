"""A region with an operator that kernels do not have becomes kernels around it, and means what it meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import graphshard
from graphshard import text
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.triton import supports
from graphshard.dataflow import is_getitem
from graphshard.passes.fuse import Fuse
from graphshard.pipeline import Context
from graphshard.program import Program
from graphshard.region import Region, kind
from graphshard.verify import verify

NO_KERNEL = "aten.special_i0e.default"


def fused(*lines: str, returned: Sequence[str]) -> Program:
    """A program of these operations of ``%x : f32[6,8]`` and ``%h : bf16[6,8]``, in regions."""
    outputs = ", ".join(f"output {at} {name}" for at, name in enumerate(returned))
    body = ["%x : f32[6,8] = batch 0", "%h : bf16[6,8] = batch 1", *lines, f"return {outputs}"]
    program = text.parse("graphshard 1\n\ngraph body {\n" + "".join(f"  {line}\n" for line in body) + "}\n")
    return Fuse().run(program, Context())


def operators(nodes: Iterable[fx.Node]) -> list[str]:
    """The operators in order, those of a region in one text; what picks results is not among them."""
    return [
        " ".join(operators(node.target.operations)) if isinstance(node.target, Region) else kind(node)
        for node in nodes
        if not is_getitem(node)
    ]


def test_the_rest_of_a_region_becomes_kernels() -> None:
    program = fused(
        "%a = aten.exp.default(%x)",
        "%b = aten.mul.Tensor(%a, 2.0)",
        f"%c = {NO_KERNEL}(%b)",
        "%d = aten.add.Tensor(%c, %a)",
        "%e = aten.tanh.default(%d)",
        returned=["%e"],
    )
    assert operators(program.body.nodes()) == ["exp mul special_i0e add tanh"]
    kernels = Kernels(on_gpu=True)
    chosen = kernels.chosen(program)
    assert operators(chosen.body.nodes())[0] == "exp mul" and operators(chosen.body.nodes())[-1] == "add tanh"
    (said,) = kernels.left
    assert "in parts, fused_exp_mul and fused_add_tanh, around" in said and NO_KERNEL in said
    graphshard.check(program, chosen, exact=True)


def test_a_sum_over_rows_for_which_a_kernel_has_no_room_is_by_itself() -> None:
    wide = "f32[6,16384]"
    lines = [f"%x : {wide} = batch 0", f"%h : {wide} = batch 1", "%a = aten.mul.Tensor(%x, %h)"]
    lines += ["%b = aten.add.Tensor(%a, %x)", "%s = aten.sum.dim_IntList(%b, [0], True)"]
    lines += ["return output 0 %b, output 1 %s"]
    source = "graphshard 1\n\ngraph body {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    program = Fuse(on_gpu=True).run(text.parse(source), Context())
    assert operators(program.body.nodes()) == ["mul add sum"]
    kernels = Kernels(on_gpu=True)
    assert operators(kernels.chosen(program).body.nodes()) == ["mul add", "sum"]
    (said,) = kernels.left
    assert "a sum over rows of 16384 columns" in said


def test_what_reads_less_than_it_makes_is_computed_behind() -> None:
    """A cast that only the second kernel reads: the first one would write twice as much as there is to be read."""
    program = fused(
        "%wide = aten._to_copy.default(%h, dtype=f32)",
        "%b = aten.mul.Tensor(%wide, 3.0)",
        "%y = aten.exp.default(%x)",
        "%a = aten.neg.default(%y)",
        f"%c = {NO_KERNEL}(%a)",
        "%d = aten.add.Tensor(%c, %b)",
        "%e = aten.neg.default(%d)",
        returned=["%e"],
    )
    chosen = Kernels(on_gpu=True).chosen(program)
    assert operators(chosen.body.nodes()) == ["exp neg", "special_i0e", "to_copy mul add neg"]
    graphshard.check(program, chosen, exact=True)


def test_single_operators_are_no_kernels() -> None:
    program = fused("%a = aten.exp.default(%x)", f"%b = {NO_KERNEL}(%a)", "%c = aten.neg.default(%b)", returned=["%c"])
    kernels = Kernels(on_gpu=True)
    assert operators(kernels.chosen(program).body.nodes()) == ["exp", "special_i0e", "neg"]
    assert list(kernels.left) == [
        f"fused_exp_special_i0e_neg: no Triton kernel: {NO_KERNEL} is no operator that kernels have"
    ]


def test_a_part_that_is_no_kernel_runs_operator_by_operator() -> None:
    program = text.parse("""graphshard 1

graph body {
  %x : f32[6,8] = batch 0
  %all = region(%x) {
    %a = aten.exp.default(%x)
    %b = aten.mul.Tensor(%a, %x)
    %c = aten.special_i0e.default(%b)
    %d = aten._softmax.default(%c, 1, False)
    %e = aten.view.default(%c, [8, 6])
    %f = aten._softmax.default(%e, 1, False)
    %g = aten.view.default(%f, [6, 8])
    %all = aten.add.Tensor(%d, %g)
    return %all
  }
  return output 0 %all
}
""")
    kernels = Kernels(on_gpu=True)
    chosen = kernels.chosen(program)
    assert operators(chosen.body.nodes()) == ["exp mul", "special_i0e", "softmax", "view", "softmax", "view", "add"]
    apart = [line for line in kernels.left if line.startswith("fused_softmax_add: no Triton kernel: ")]
    assert len(apart) == 1 and "reductions of different shapes" in apart[0]
    graphshard.check(program, chosen, exact=True)


def test_results_are_picked_beside_what_makes_them() -> None:
    program = text.parse("""graphshard 1

graph body {
  %x : f32[6,8] = batch 0
  %all = region(%x) {
    %a = aten.exp.default(%x)
    %b = aten.mul.Tensor(%a, %x)
    %c = aten.frexp.Tensor(%b)
    %d = getitem(%c, 0)
    %e = aten.neg.default(%d)
    %all = aten.add.Tensor(%e, %a)
    return %all
  }
  return output 0 %all
}
""")
    chosen = Kernels(on_gpu=True).chosen(program)
    assert operators(chosen.body.nodes()) == ["exp mul", "frexp", "neg add"]
    graphshard.check(program, chosen, exact=True)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Operations on rows, with and without a kernel, that read one another and whose results others read."""
    lines, known = [], ["%x"]
    for at in range(draw(st.integers(3, 14))):
        one, other = draw(st.sampled_from(known[-4:])), draw(st.sampled_from(known))
        made = f"%v{at}"
        lines += draw(
            st.sampled_from(
                [
                    [f"{made} = {NO_KERNEL}({one})"],
                    [f"{made} = aten.erfinv.default({one})"],
                    [f"{made} = aten.tanh.default({one})"],
                    [f"{made} = aten.mul.Tensor({one}, {other})"],
                    [f"{made} = aten.add.Tensor({one}, {other})"],
                    [f"{made} = aten._softmax.default({one}, 1, False)"],
                    [
                        f"{made}s = aten.sum.dim_IntList({one}, [1], True)",
                        f"{made} = aten.add.Tensor({other}, {made}s)",
                    ],
                    [
                        f"{made}n = aten.native_layer_norm.default({one}, [8], None, None, 1e-05)",
                        f"{made}r = getitem({made}n, 2)",
                        f"{made}o = getitem({made}n, 0)",
                        f"{made} = aten.mul.Tensor({made}o, {made}r)",
                    ],
                    [
                        f"{made}v = aten.view.default({one}, [2, 3, 8])",
                        f"{made}w = aten.sin.default({made}v)",
                        f"{made} = aten.view.default({made}w, [6, 8])",
                    ],
                ]
            )
        )
        known.append(made)
    return fused(*lines, returned=[known[-1], *draw(st.lists(st.sampled_from(known[1:]), max_size=2, unique=True))])


@settings(deadline=None, max_examples=40)
@given(programs())
def test_programs_mean_the_same(program: Program) -> None:
    chosen = Kernels(on_gpu=True).chosen(program)
    verify(chosen)
    assert not any(supports(node.target) for node in chosen.body.nodes() if isinstance(node.target, Region))
    graphshard.check(program, chosen, exact=True)


class Odd(nn.Module):
    """A layer whose middle is in no kernel, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 48), nn.LayerNorm(48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        gate = torch.sigmoid(h) * 2 + h.exp()
        result: Tensor = self.second(self.norm(torch.special.i0e(gate) * h.tanh() + gate))
        return result


def test_what_each_part_became_is_listed() -> None:
    with torch.device("meta"):
        model = Odd()
    compiled = graphshard.compile(
        model,
        loss_fn=F.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        executor="none",
        device="cuda",
        example_inputs=(torch.empty(8, 16, device="meta"), torch.empty(8, 24, device="meta")),
    )
    page = compiled.explain()
    _, _, apart = page.partition("regions that run operator by operator, in whole or in part\n")
    line = next(line for line in apart.splitlines() if NO_KERNEL in line)
    parts = line.partition("in parts, ")[2].partition(",")[0].split(" and ")
    assert len(parts) == 2
    assert all(any(name.startswith(part) for name in compiled.execution_plan.kernels) for part in parts)
    assert all(name in page for name in compiled.execution_plan.kernels)
