"""What a segment holds while it runs is known from its code, by storage, and is what torch really holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphshard.codegen import blocks, segments
from graphshard.dataflow import is_view
from graphshard.execution import Workspace
from graphshard.program import Section
from graphshard.runtime import products
from graphshard.runtime.arena import Placing
from graphshard.runtime.meter import LiveStorages
from graphshard.runtime.segments import compile_segments
from segment_code import CPU, code, run, section, update

aten = torch.ops.aten

X = 4 * 64 * 64  # bytes of an f32[64,64]


def measured(graph: Section, accumulate: bool = True, first: bool = False) -> tuple[Workspace, list[int]]:
    """The account, and the most that is held while it runs: by the segment alone, and with inputs that go."""
    made = code(graph, accumulate=accumulate, first=first)
    function = compile_segments({"f": made.segment}, made.kernels)["f"]
    peaks = []
    for keep in (True, False):
        values: list[Tensor] = [
            torch.ones(kind.shape, dtype=kind.dtype).as_strided(kind.shape, kind.stride)
            for kind in made.segment.input_types
        ]
        given = sum(value.untyped_storage().nbytes() for value in values)
        kept = list(values) if keep else []
        meter = LiveStorages()
        meter.begin([(value, "batch") for value in values])
        with meter.running(watched=True):
            results = function(values, {}, CPU, Placing(CPU).of_run(0, made.segment.places))
        meter.ran([])
        peaks.append(sum(meter.rows[0].values()) - given)
        del results, kept
    return made.segment.workspace, peaks


def peak(workspace: Workspace, sizes: list[int]) -> int:
    """The most that is held when inputs of ``sizes`` go as soon as they can, beyond their sum."""
    return max(
        held - sum(size for size, end in zip(sizes, workspace.released, strict=True) if end < interval)
        for interval, held in enumerate(workspace.held)
    )


def test_views_and_dead_values() -> None:
    graph = section("""
  %x : f32[64,64] = batch 0
  %t = aten.t.default(%x)
  %a = aten.mm.default(%t, %t)
  %v = aten.view.default(%a, [4096])
  %b = aten.neg.default(%v)
  %c = aten.exp.default(%b)
  %d = aten.sum.default(%c)
  return output 0 %d
""")
    workspace, (alone, handed) = measured(graph)
    assert workspace == Workspace((X, 2 * X), (0,)), "the view keeps %x until the product, then %a and %b are held"
    assert alone == 2 * X and handed == peak(workspace, [X]) == X


def test_an_output_that_views_an_input_keeps_it() -> None:
    graph = section("""
  %x : f32[64,64] = batch 0
  %a = aten.neg.default(%x)
  %t = aten.t.default(%x)
  return output 0 %t, output 1 %a
""")
    workspace, (alone, handed) = measured(graph)
    assert workspace == Workspace((X,), (1,)) and alone == handed == X


@pytest.mark.only_cpu
@pytest.mark.parametrize(("inner", "beside"), [(64, X), (600, X + 4 * 512 * 64)])
def test_a_large_product_takes_a_part_of_it_and_of_the_right_matrix(
    inner: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LARGE_PRODUCT", 1)
    monkeypatch.setattr(products, "library", lambda: products.Library.ONEDNN)
    graph = section(f"""
  %x : f32[64,{inner}] = batch 0
  %w : f32[64,{inner}] = batch 1
  %t = aten.t.default(%w)
  %a = aten.mm.default(%x, %t)
  return output 0 %a
""")
    workspace, (alone, _) = measured(graph)
    assert alone == max(workspace.held) == X + beside


def test_operators_with_several_results() -> None:
    graph = section("""
  %x : f32[64,64] = batch 0
  %n = aten.native_layer_norm.default(%x, [64], None, None, 1e-05)
  %y = getitem(%n, 0)
  %mean = getitem(%n, 1)
  %parts = aten.split.Tensor(%y, 32)
  %p = getitem(%parts, 0)
  %z = aten.neg.default(%p)
  return output 0 %z, output 1 %mean
""")
    workspace, (alone, handed) = measured(graph)
    assert workspace.held == (X + 2 * 256, X + 256 + X // 2), "what nobody picks goes when the others are picked"
    assert alone == X + X // 2 + 256 and handed == peak(workspace, [X])


def test_gradients_cost_nothing_where_they_belong() -> None:
    gradients = """
  %x : f32[64,64] = batch 0
  %g : f32[64,64] = batch 1
  %total : f32[4096] = carry "grad:w"
  %weight = aten.mm.default(%x, %g)
  %flat = graphshard.pack.default([%weight], [0], 4096)
  %total1 = aten.add.Tensor(%total, %flat)
  return carry "grad:w" %total1
"""
    later, (alone, _) = measured(section(gradients))
    assert later.held[0] == 0 == alone
    first, (alone, _) = measured(section(gradients), first=True)
    assert first.held[-1] == X == alone, "the first micro-batch makes the buffer"


def test_a_loop_holds_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 1024)
    graph = update("""
  %m : f32[4096] = state "w" m
  %g : f32[4096] = batch 0
  %a = aten.mul.Tensor(%m, 0.9)
  %b = aten.exp.default(%g)
  %m1 = aten.add.Tensor(%a, %b)
  return state "w" m %m1
""")
    workspace, (alone, _) = measured(graph, accumulate=False)
    assert max(workspace.held) == alone == 2 * 4096, "two blocks of 1,024, and their sum is written over the state"


def test_a_mean_does_not_keep_what_it_is_the_mean_of() -> None:
    graph = section("""
  %x : f32[64,64] = batch 0
  %y : f32[64,64] = batch 1
  %loss = aten.mse_loss.default(%x, %y)
  return output 0 %loss
""")
    workspace, (alone, _) = measured(graph)
    assert workspace == Workspace((X + 4, 4), (0, 0)) and alone == X + 4
    (loss,) = run(code(graph), {"x": torch.ones(64, 64), "y": torch.zeros(64, 64)})
    assert loss == 1 and loss.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    "operator",
    [aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default],
)
def test_views_that_do_not_say_so(operator: torch._ops.OpOverload) -> None:
    x = torch.randn(4)
    graph = torch.fx.Graph()
    argument = {aten.unsafe_split.Tensor: 2}.get(operator, [4])
    result = operator(x, argument)
    first = result[0] if isinstance(result, (list, tuple)) else result
    assert first.data_ptr() == x.data_ptr()
    assert is_view(graph.call_function(operator, (graph.placeholder("x"), argument)))
