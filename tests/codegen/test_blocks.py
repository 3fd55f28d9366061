"""Regions cut into blocks give what plain evaluation gives, whatever the chain, and update state where it lies."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphshard.codegen import blocks
from graphshard.codegen.blocks import blocks_of, keeps_to_itself
from graphshard.program import Section
from graphshard.region import Region
from segment_code import code, evaluate, run, update

BLOCK = 8
SMALL = patch.object(blocks, "BLOCK", BLOCK)

MOMENTUM = """
  %w : f64[{n}] = shard "w"
  %m : f64[{n}] = state "w" momentum
  %g : f64[{n}] = carry "grad:w"
  %lr : f64[] = lr 0
  %old = aten.mul.Tensor(%m, 0.9)
  %m1 = aten.add.Tensor(%old, %g)
  %down = aten.neg.default(%lr)
  %d = aten.mul.Tensor(%m1, %down)
  %w1 = aten.add.Tensor(%w, %d)
  return shard "w" %w1, state "w" momentum %m1{more}
"""


def values_of(graph: Section, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        node.name: torch.randn(node.meta["val"].shape, generator=generator, dtype=torch.float64).to(
            node.meta["val"].dtype
        )
        for node in graph.inputs
    }


def both(graph: Section, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the generated code and of plain evaluation, which sees the inputs first."""
    values = values_of(graph, seed)
    expected = [value.clone() for value in evaluate(graph, values)]
    return list(run(code(graph, accumulate=False), values)), expected


def regions(graph: Section) -> list[Region]:
    return [node.target for node in graph.nodes() if isinstance(node.target, Region)]


@SMALL
def test_an_update_is_one_region_with_its_scalars_ahead() -> None:
    graph = update(MOMENTUM.format(n=20, more=""))
    scalar, region, *_ = graph.nodes()
    assert scalar.name == "down"
    assert isinstance(region.target, Region)
    assert [node.name for node in region.target.operations] == ["old", "m1", "d", "w1"]


@SMALL
def test_state_is_updated_in_place() -> None:
    graph = update(MOMENTUM.format(n=20, more=""))
    values = values_of(graph)
    expected = evaluate(graph, values)
    w1, m1 = run(code(graph, accumulate=False), values)
    assert w1.data_ptr() == values["w"].data_ptr()
    assert m1.data_ptr() == values["m"].data_ptr()
    torch.testing.assert_close([w1, m1], expected)


READ_LATER = """
  %w : f64[20] = shard "w"
  %m : f64[20] = state "w" m
  %g : f64[20] = carry "grad:w"
  %m1 = aten.add.Tensor(%m, %g)
  %seen = aten.view.default(%m, [20])
  %d = aten.mul.Tensor(%m1, %seen)
  %w1 = aten.add.Tensor(%w, %d)
  return shard "w" %w1, state "w" m %m1
"""


@SMALL
def test_a_block_is_not_overwritten_before_its_last_reader() -> None:
    results, expected = both(update(READ_LATER))
    torch.testing.assert_close(results, expected)


@SMALL
def test_results_are_written_where_they_go() -> None:
    made = code(update(MOMENTUM.format(n=20, more="")), accumulate=False)
    (kernel,) = made.kernels.values()
    assert "out=add0_b)" in kernel.source
    assert "out=add1_b)" in kernel.source
    assert "] = add" not in kernel.source


@SMALL
def test_what_somebody_else_reads_is_not_overwritten() -> None:
    graph = update(
        MOMENTUM.format(n=20, more=", output 0 %m, output 1 %total").replace(
            "  return", "  %total = aten.sum.default(%w)\n  return"
        )
    )
    values = values_of(graph)
    before = {name: value.clone() for name, value in values.items()}
    run(code(graph, accumulate=False), values)
    torch.testing.assert_close([values["m"], values["w"]], [before["m"], before["w"]], rtol=0, atol=0)
    results, expected = both(graph)
    torch.testing.assert_close(results, expected)


@SMALL
def test_a_state_of_another_dtype_gets_storage_of_its_own() -> None:
    graph = update("""
  %m : f32[20] = state "w" m
  %g : f64[20] = batch 0
  %m1 = aten.add.Tensor(%m, %g)
  %m2 = aten.neg.default(%m1)
  return state "w" m %m2
""")
    results, expected = both(graph)
    assert results[0].dtype is torch.float64
    torch.testing.assert_close(results, expected)


@SMALL
def test_what_is_short_is_not_cut() -> None:
    (short,) = regions(update(MOMENTUM.format(n=BLOCK, more="")))
    assert blocks_of(short) is None


SOFTMAX = """
  %x : f64[6,2,5] = batch 0
  %row : f64[6,2,1] = batch 1
  %column : f64[5] = batch 2
  %a = aten.mul.Tensor(%x, %row)
  %b = aten.add.Tensor(%a, %column)
  %p = aten._softmax.default(%b, 2, False)
  %m = aten.mean.dim(%p, [-1])
  %v = aten.view.default(%p, [12, 5])
  %s = aten.sum.dim_IntList(%v, [1], True)
  %d = aten.div.Tensor(%v, %s)
  return output 0 %d, output 1 %m
"""


@SMALL
def test_rows_are_cut_and_not_the_elements_of_one() -> None:
    graph = update(SOFTMAX)
    (region,) = regions(graph)
    cut = blocks_of(region)
    assert cut is not None and cut.rows and (cut.count, cut.step) == (12, 1) and keeps_to_itself(region, cut)
    results, expected = both(graph)
    assert [tuple(result.shape) for result in results] == [(12, 5), (6, 2)]
    torch.testing.assert_close(results, expected)


SQUARE = """
  %x : f64[6,6] = batch 0
  %weight : f64[6] = batch 1
  %n = aten.native_layer_norm.default(%x, [6], %weight, %weight, 1e-05)
  %y = getitem(%n, 0)
  %s = aten.sum.dim_IntList(%y, [1], True)
  %z = aten.div.Tensor(%y, %s)
  return output 0 %z
"""


@SMALL
def test_as_many_rows_as_elements() -> None:
    graph = update(SQUARE)
    (region,) = regions(graph)
    cut = blocks_of(region)
    assert cut is not None and cut.rows and keeps_to_itself(region, cut)
    results, expected = both(graph)
    torch.testing.assert_close(results, expected)
    assert not regions(update(SQUARE.replace(", True", "").replace("div.Tensor(%y, %s)", "neg.default(%s)")))


COLUMN = """
  %x : f64[6,6] = batch 0
  %v : f64[6] = batch 1
  %c = aten.exp.default(%v)
  %y = aten.mul.Tensor(%x, %c)
  %s = aten.sum.dim_IntList(%y, [1], True)
  return output 0 %s
"""


@SMALL
def test_what_every_block_reads_is_not_overwritten_by_rows_of_as_many() -> None:
    graph = update(COLUMN)
    results, expected = both(graph)
    torch.testing.assert_close(results, expected)


DROPOUT = """
  %x : f64[{shape}] = batch 0
  %seed : i64[] = batch 1
  %kept = graphshard.dropout_mask.default(%seed, [{shape}], 0.25)
  %masked = aten.mul.Tensor(%x, %kept)
  %y = aten.mul.Tensor(%masked, 1.5){more}
  return output 0 {results}
"""

NORMED = """
  %n = aten._softmax.default(%y, {dim}, False)"""


@SMALL
@given(st.sampled_from(("20", "17", "7,3", "2,5,7", "4,11")), st.booleans(), st.booleans(), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_each_block_draws_its_part_of_a_mask(shape: str, normed: bool, also: bool, seed: int) -> None:
    more = NORMED.format(dim=shape.count(",")) if normed else ""
    results = ("%n" if normed else "%y") + (", output 1 %kept" if also else "")
    graph = update(DROPOUT.format(shape=shape, more=more, results=results))
    values = values_of(graph, seed) | {"seed": torch.tensor(seed * 2**60 - 1)}
    (region,) = regions(graph)
    assert "kept" in [node.name for node in region.operations]
    if normed and "," not in shape:
        assert blocks_of(region) is None
        return
    made = code(graph, accumulate=False)
    assert made.kernels, "it is cut, not run as it is"
    torch.testing.assert_close(run(made, values), tuple(evaluate(graph, values)), rtol=0, atol=0)


LOSS = """
  %x : {dtype}[{rows},5] = batch 0
  %t : i64[{rows}] = batch 1
  %wide = aten._to_copy.default(%x, dtype=f64)
  %lp = aten._log_softmax.default(%wide, 1, False)
  %u = aten.{target}
  %nll = aten.nll_loss_forward.default(%lp, %u, None, {reduction}, 3)
  %loss = getitem(%nll, 0)
  %count = getitem(%nll, 1)
  return output 0 %loss, output 1 %count{more}
"""


@given(
    st.sampled_from((3, 17, 100)),
    st.sampled_from((1, 2)),
    st.sampled_from(("f64", "bf16")),
    st.sampled_from(("clone.default(%t)", "view.default(%t, [-1])")),
    st.sampled_from(("", ", output 2 %wide")),
    st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_a_loss_over_rows_is_that_of_the_operator_to_the_bit(
    rows: int, reduction: int, dtype: str, target: str, more: str, seed: int
) -> None:
    with SMALL:
        graph = update(LOSS.format(rows=rows, reduction=reduction, dtype=dtype, target=target, more=more))
        generator = torch.Generator().manual_seed(seed)
        values = values_of(graph, seed)
        values["t"] = torch.randint(0, 5, (rows,), generator=generator)  # some are 3, which do not count
        (region,) = regions(graph)
        cut = blocks_of(region)
        assert cut is not None and (cut.count, cut.step) == (rows, 1) and keeps_to_itself(region, cut)
        made = code(graph, accumulate=False)
        assert made.kernels, "it is cut, not run as it is"
        results = run(made, values)
        torch.testing.assert_close(results, tuple(evaluate(graph, values)), rtol=0, atol=0, equal_nan=True)


@SMALL
def test_what_reads_a_loss_over_all_rows_waits_for_the_last() -> None:
    graph = update("""
  %x : f64[20,5] = batch 0
  %t : i64[20] = batch 1
  %lp = aten._log_softmax.default(%x, 1, False)
  %nll = aten.nll_loss_forward.default(%lp, %t, None, 2, -100)
  %count = getitem(%nll, 1)
  %y = aten.mul.Tensor(%lp, %count)
  %z = aten.neg.default(%y)
  return output 0 %z
""")
    assert [[n.name for n in region.operations] for region in regions(graph)] == [["lp", "nll", "count"], ["y", "z"]]


@SMALL
def test_regions_that_share_nothing_are_kernels_of_their_own_and_equal_ones_are_one() -> None:
    graph = update("""
  %a : f32[20] = batch 0
  %b : f32[20] = batch 1
  %a1 = aten.neg.default(%a)
  %b1 = aten.neg.default(%b)
  %a2 = aten.exp.default(%a1)
  %b2 = aten.exp.default(%b1)
  return output 0 %a2, output 1 %b2
""")
    assert [[n.name for n in region.operations] for region in regions(graph)] == [["a1", "a2"], ["b1", "b2"]]
    assert len(code(graph, accumulate=False).kernels) == 1
    results, expected = both(graph)
    torch.testing.assert_close(results, expected)


UNARY = ("neg.default", "tanh.default", "abs.default", "clone.default", "alias.default")
BINARY = ("add.Tensor", "mul.Tensor", "sub.Tensor", "maximum.default", "div.Tensor")


@st.composite
def chains(draw: st.DrawFn) -> str:
    """Pointwise operations on vectors of two lengths and scalars, with sums between them; some results are states."""
    lengths = draw(st.sampled_from([(20, 20), (9, 16), (24, 17)]))
    vectors: dict[int, list[str]] = {length: [] for length in lengths}
    scalars = ["lr"]
    lines: list[str] = []
    state: list[tuple[int, str]] = []
    for index in range(4):
        length = lengths[index % 2]
        role = draw(st.sampled_from(["shard", "state", "carry", "batch"]))
        kind = {"shard": f'shard "p{index}"', "state": f'state "p{index}" m', "batch": f"batch {index}"}.get(
            role, f'carry "c{index}"'
        )
        lines.append(f"  %v{index} : f64[{length}] = {kind}")
        vectors[length].append(f"v{index}")
        if role in ("shard", "state"):
            state.append((length, kind))
    lines.append("  %lr : f64[] = lr 0")
    for index in range(draw(st.integers(1, 10))):
        length = draw(st.sampled_from(lengths))
        have = vectors[length]
        match draw(st.sampled_from(["unary", "binary", "scalar", "reduce", "on scalars"])):
            case "unary":
                lines.append(f"  %n{index} = aten.{draw(st.sampled_from(UNARY))}(%{draw(st.sampled_from(have))})")
            case "binary":
                left, right = draw(st.sampled_from(have)), draw(st.sampled_from(have))
                lines.append(f"  %n{index} = aten.{draw(st.sampled_from(BINARY))}(%{left}, %{right})")
            case "scalar":
                left, right = draw(st.sampled_from(have)), draw(st.sampled_from(scalars))
                lines.append(f"  %n{index} = aten.mul.Tensor(%{left}, %{right})")
            case "reduce":
                lines.append(f"  %n{index} = aten.mean.default(%{draw(st.sampled_from(have))})")
                scalars.append(f"n{index}")
                continue
            case "on scalars":
                lines.append(f"  %n{index} = aten.tanh.default(%{draw(st.sampled_from(scalars))})")
                scalars.append(f"n{index}")
                continue
        have.append(f"n{index}")
    returned = [f"{kind} %{draw(st.sampled_from(vectors[length]))}" for length, kind in state]
    everything = [name for have in (*vectors.values(), scalars) for name in have]
    extra = draw(st.lists(st.sampled_from(everything), max_size=3, unique=True))
    returned += [f"output {index} %{name}" for index, name in enumerate(extra)]
    lines.append("  return " + ", ".join(returned or ["output 9 %lr"]))
    return "\n".join(lines)


@given(chains(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_loops_mean_what_the_graph_means(lines: str, seed: int) -> None:
    with SMALL:
        results, expected = both(update(lines), seed)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=0, equal_nan=True)


@SMALL
def test_blocks_have_no_more_dims_than_what_broadcasts_to_them() -> None:
    graph = update("""
  %x : f64[4,3,5] = batch 0
  %column : f64[1,1,5] = batch 1
  %one : f32[1,1,1] = batch 2
  %a = aten.neg.default(%x)
  %b = aten.copy.default(%a, %column)
  %c = aten.exp.default(%x)
  %d = aten.add.Tensor(%c, %one)
  %e = aten.mul.Tensor(%d, %column)
  return output 0 %b, output 1 %e
""")
    results, expected = both(graph)
    torch.testing.assert_close(results, expected)


@SMALL
def test_one_row_is_not_cut() -> None:
    graph = update("""
  %x : f64[1,20] = batch 0
  %weight : f64[20] = batch 1
  %n = aten.native_layer_norm.default(%x, [20], %weight, %weight, 1e-05)
  %y = getitem(%n, 0)
  %z = aten.neg.default(%y)
  return output 0 %z
""")
    assert [blocks_of(region) for region in regions(graph)] == [None]


@SMALL
def test_what_is_left_of_single_elements_is_no_row_beside_a_square() -> None:
    graph = update("""
  %x : f64[6,1] = batch 0
  %m = aten.amax.default(%x, [1])
  %d = aten.sub.Tensor(%x, %m)
  %y = aten.exp.default(%d)
  return output 0 %y
""")
    results, expected = both(graph)
    torch.testing.assert_close(results, expected)
