"""Segments: what the code says is what the graph means, and gradients are written where they belong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from graphshard.codegen import segments
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.segments import emit
from segment_code import code, evaluate, parts, run, section

GRADIENTS = """
  %x : f32[2,3] = batch 0
  %gy : f32[2,4] = batch 1
  %total : f32[32] = carry "grad:w"
  %xt = aten.t.default(%x)
  %weight = aten.mm.default(%xt, %gy)
  %bias = aten.sum.dim_IntList(%gy, [0])
  %flat = graphshard.pack.default([%weight, %bias], [0, 16], 32)
  %total1 = aten.add.Tensor(%total, %flat)
  return carry "grad:w" %total1
"""


TWO = """
  %x : f32[2,3] = batch 0
  %gy : f32[2,4] = batch 1
  %total : f32[32] = carry "grad:w"
  %transposed = aten.t.default(%x)
  %a = aten.mm.default(%transposed, %gy)
  %b = aten.mm.default(%transposed, %gy)
  %flat = graphshard.pack.default([%a, %b], [0, 16], 32)
  %total1 = aten.add.Tensor(%total, %flat)
  return carry "grad:w" %total1
"""


@pytest.fixture(autouse=True)
def garbage() -> Iterator[None]:
    """What is allocated and not written is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, size, generator=generator) for name, size in (("x", 3), ("gy", 4))}


def packed(values: dict[str, Tensor]) -> Tensor:
    flat = torch.zeros(32)
    flat[:12] = (values["x"].t() @ values["gy"]).reshape(-1)
    flat[16:20] = values["gy"].sum(0)
    return flat


def test_the_first_micro_batch_overwrites() -> None:
    made = code(section(GRADIENTS), first=True)
    assert "total" not in made.segment.inputs
    values = inputs()
    (result,) = run(made, values)
    torch.testing.assert_close(result, packed(values))  # zero where no gradient lies


def test_later_micro_batches_accumulate_in_place() -> None:
    made = code(section(GRADIENTS))
    assert {str(slot) for slot in made.accumulators} == {'carry "grad:w"'}
    values, before = inputs(), torch.full((32,), 2.0)
    accumulator = before.clone()
    (result,) = run(made, values | {"total": accumulator})
    assert result.data_ptr() == accumulator.data_ptr()
    torch.testing.assert_close(result, before + packed(values))


def test_a_product_is_written_to_its_place() -> None:
    graph = section(GRADIENTS)
    assert "torch.mm(xt, gy, out=flat[0:12].view([3, 4]))" in code(graph, first=True).segment.source
    later = code(graph).segment.source
    assert "total[0:12].view([3, 4]).addmm_(xt, gy)" in later
    assert "torch.empty" not in later


@pytest.mark.parametrize("first", [True, False])
def test_a_product_of_an_earlier_segment_is_written_to_its_place(first: bool) -> None:
    """The first time that segment makes the accumulator, zero where no gradient lies."""
    graph = section(GRADIENTS)
    transposed, weight, *rest = graph.nodes()
    earlier, later = parts(graph, [[transposed, weight], rest], first=first)
    assert (earlier.segment.outputs, later.segment.outputs) == (("total",), ("total1",))
    assert ("total" in earlier.segment.inputs) is not first and "weight" not in later.segment.inputs
    values = inputs()
    before = torch.zeros(32) if first else torch.full((32,), 2.0)
    (total,) = run(earlier, values | {"total": before.clone()})
    (result,) = run(later, values | {"total": total})
    assert result.data_ptr() == total.data_ptr()
    torch.testing.assert_close(result, before + packed(values))


def test_only_the_first_of_the_earlier_segments_makes_the_accumulator() -> None:
    graph = section(TWO)
    transposed, weight, other, *rest = graph.nodes()
    made = parts(graph, [[transposed, weight], [other], rest], first=True)
    assert ["total" in segment.segment.inputs for segment in made] == [False, True, True]
    values = inputs()
    (total,) = run(made[0], values)
    for segment in made[1:]:
        (total,) = run(segment, values | {"total": total, "transposed": values["x"].t()})
    gradient = values["x"].t() @ values["gy"]
    assert torch.equal(total, torch.cat([gradient.flatten(), torch.zeros(4), gradient.flatten(), torch.zeros(4)]))


def test_a_product_that_is_read_elsewhere_is_copied() -> None:
    shared = GRADIENTS.replace("%total1\n", "%total1, output 0 %weight\n")
    for first in (True, False):
        values = inputs()
        given = values | {"total": torch.ones(32)}
        total, weight = run(code(section(shared), first=first), given)
        torch.testing.assert_close(total, packed(values) + (0 if first else 1))
        torch.testing.assert_close(weight, values["x"].t() @ values["gy"])


SUM = """
  %x : f32[4] = batch 0
  %total : f32[4] = carry "sum"
  %value = {value}
  %total1 = aten.add.Tensor(%total, %value)
  %other = aten.neg.default({read})
  return carry "sum" %total1, output 0 %other{more}
"""


def test_a_carry_that_is_read_elsewhere_keeps_its_value() -> None:
    graph = section(SUM.format(value="aten.mul.Tensor(%x, 2)", read="%total", more=""))
    x, total = torch.arange(4.0), torch.ones(4)
    result, other = run(code(graph), {"x": x, "total": total})
    torch.testing.assert_close(result, 2 * x + 1)
    torch.testing.assert_close(other, -torch.ones(4))


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("aten.mul.Tensor(%x, 2)", "%value"),  # somebody else reads it
        ("aten.view.default(%x, [4])", "%x"),  # it shares storage with an input
    ],
)
def test_an_accumulator_shares_storage_with_nothing(value: str, read: str) -> None:
    graph = section(SUM.format(value=value, read=read, more=""))
    x = torch.arange(4.0)
    total, other = run(code(graph, first=True), {"x": x})
    before = x.clone(), other.clone()
    total.add_(1)
    torch.testing.assert_close((x, other), before)


def test_a_value_that_is_only_accumulated_is_not_copied() -> None:
    graph = section(SUM.format(value="aten.mul.Tensor(%x, 2)", read="%x", more=""))
    assert "clone" not in code(graph, first=True).segment.source


def test_values_die_at_their_last_use() -> None:
    lines = code(
        section("""
  %x : f32[4] = batch 0
  %a = aten.exp.default(%x)
  %b = aten.neg.default(%a)
  %c = aten.mul.Tensor(%b, %b)
  return output 0 %c
""")
    ).segment.source.splitlines()
    assert [line.strip() for line in lines[3:]] == [
        "a = torch.ops.aten.exp.default(x)",
        "del x",
        "b = torch.ops.aten.neg.default(a)",
        "del a",
        "c = torch.ops.aten.mul.Tensor(b, b)",
        "del b",
        "return (c,)",
    ]


def test_local_shard_is_this_ranks_part() -> None:
    graph = section("""
  %flat : f32[8] = flat "w"
  %mine = graphshard.local_shard.default(%flat, 4, "dp")
  return output 0 %mine
""")
    (mine,) = run(code(graph), {"flat": torch.arange(8.0)}, {"dp": 2})
    assert mine.tolist() == [4.0, 5.0]


def test_a_wait_is_the_collectives_buffer() -> None:
    graph = section("""
  %shard : f32[2] = shard "w"
  %g = _c10d_functional.all_gather_into_tensor.default(%shard, 2, "dp")
  %w = _c10d_functional.wait_tensor.default(%g)
  %y = aten.neg.default(%w)
  return output 0 %y
""")
    compute = [n for n in graph.nodes() if n.name == "y"]
    made = emit("f", compute, compute, graph, Kernels())
    assert made.segment.inputs == ("g",)


def test_arguments_of_every_kind() -> None:
    graph = section("""
  %x : f32[4,2] = batch 0
  %m = aten.max.dim(%x, 0)
  %values : f32[2] = getitem(%m, 0)
  %index = getitem(%m, 1)
  %low = aten.full.default([2, 2], -inf, dtype=f32, device=cpu)
  %all = aten.cat.default([%x, %low])
  %c = aten.clamp.default(%all, None, 0.5)
  %d = aten._to_copy.default(%c, dtype=f64)
  %e = aten.clone.default(%d, memory_format=contiguous_format)
  return output 0 %e, output 1 %values, output 2 %index
""")
    x = torch.randn(4, 2)
    for result, expected in zip(run(code(graph), {"x": x}), evaluate(graph, {"x": x}), strict=True):
        torch.testing.assert_close(result, expected)


def test_the_runtime_chooses_who_computes_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = section(GRADIENTS)
    monkeypatch.setattr(segments, "LARGE_PRODUCT", 2 * 3 * 4)
    values = inputs()
    made = code(graph, first=True)
    assert "products.mm_into(flat[0:12].view([3, 4]), xt, gy)" in made.segment.source
    torch.testing.assert_close(run(made, values)[0], packed(values))
    made = code(graph)
    assert "products.add_mm(total[0:12].view([3, 4]), xt, gy)" in made.segment.source
    torch.testing.assert_close(run(made, values | {"total": torch.ones(32)})[0], 1 + packed(values))
    on_gpu = code(graph, on_gpu=True).segment
    assert "products" not in on_gpu.source  # there is one library
    assert max(on_gpu.workspace.held) < max(made.segment.workspace.held)
    monkeypatch.setattr(segments, "LARGE_PRODUCT", 2 * 3 * 4 + 1)
    assert "products" not in code(graph).segment.source


@pytest.mark.parametrize(
    ("dtype", "bias", "options", "chosen"),
    [
        ("f32", "[4]", "", True),
        ("f64", "[4]", "", False),
        ("f32", "[3,4]", "", False),
        ("f32", "[1]", "", False),
        ("f32", "[4]", ", alpha=2", False),
    ],
)
def test_a_large_product_with_a_bias(
    dtype: str, bias: str, options: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LARGE_PRODUCT", 1)
    graph = section(f"""
      %b : {dtype}{bias} = batch 0
      %x : {dtype}[3,2] = batch 1
      %w : {dtype}[2,4] = batch 2
      %y = aten.addmm.default(%b, %x, %w{options})
      %z = aten.mm.default(%x, %w)
      return output 0 %y, output 1 %z
    """)
    values = {
        name: value.to(torch.float64 if dtype == "f64" else torch.float32)
        for name, value in {
            "b": torch.randn([int(size) for size in bias[1:-1].split(",")]),
            "x": torch.randn(3, 2),
            "w": torch.randn(2, 4),
        }.items()
    }
    made = code(graph)
    assert ("products.addmm(b, x, w)" in made.segment.source) == chosen
    assert ("products.mm(x, w)" in made.segment.source) == (dtype == "f32")
    torch.testing.assert_close(list(run(made, dict(values))), evaluate(graph, values))


EMBEDDING = """
  %gy : f32[2,3,4] = batch 0
  %tokens : i64[2,3] = batch 1
  %total : f32[40] = carry "grad:w"
  %rows = aten.embedding_dense_backward.default(%gy, %tokens, 8, PADDING, False)
  %flat = graphshard.pack.default([%rows], [4], 40)
  %total1 = aten.add.Tensor(%total, %flat)
  return carry "grad:w" %total1
"""


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("padding", [-1, 5])
@pytest.mark.parametrize("dense", [True, False])
def test_of_an_embedding_the_rows_that_were_looked_up_are_added(padding: int, first: bool, dense: bool) -> None:
    text = EMBEDDING.replace("PADDING", str(padding))
    if not dense:
        text = text.replace("f32[2,3,4] =", "f32[2,3,4]{12,1,3} =")
    made = code(section(text), first=first)
    assert "embedding_dense_backward" not in made.segment.source
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2, 3, 4, generator=generator)
    if not dense:
        gradient = torch.randn(2, 4, 3, generator=generator).transpose(1, 2)
    tokens = torch.tensor([[5, 1, 1], [7, 5, 0]])  # some more than once
    expected = torch.full((40,), 0.0 if first else 2.0)
    rows = torch.ops.aten.embedding_dense_backward(gradient, tokens, 8, padding, False)
    expected[4:36] += rows.reshape(-1)
    values = {"gy": gradient, "tokens": tokens} | ({} if first else {"total": torch.full((40,), 2.0)})
    (result,) = run(made, values)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("scaled", "dtype"), [("True", "f32"), ("False", "bf16")])
def test_an_embedding_s_gradient_that_is_more_than_a_sum_of_rows_is_its_operator_s(scaled: str, dtype: str) -> None:
    text = EMBEDDING.replace("PADDING, False", f"-1, {scaled}").replace("f32", dtype)
    assert "embedding_dense_backward" in code(section(text)).segment.source


STRIDED = """
  %grad : f64[8,6] = batch 0
  %shares : f64[8,6] = batch 1
  %rows = aten.t.default(%grad)
  %of = aten.t.default(%shares)
  %y = aten.{operator}(%rows, %of{options})
  return output 0 %y
"""


@pytest.mark.parametrize(
    ("operator", "options"), [("_log_softmax_backward_data.default", ", 1, f64"), ("add.Tensor", "")]
)
def test_what_is_not_contiguous_is_written_with_its_strides(operator: str, options: str) -> None:
    graph = section(STRIDED.format(operator=operator, options=options))
    values = {node.name: torch.rand(8, 6, dtype=torch.float64) for node in graph.inputs}
    (result,) = run(code(graph), values)
    torch.testing.assert_close((result,), tuple(evaluate(graph, values)))
    assert result.stride() == (1, 6)  # as views of it were told


def test_a_view_copies_what_has_other_strides_than_was_told() -> None:
    graph = section("""
  %x : f64[4,6] = batch 0
  %y = aten.view.default(%x, [24])
  %z = aten.neg.default(%y)
  return output 0 %z
""")
    x = torch.rand(6, 4, dtype=torch.float64).t()
    (result,) = run(code(graph), {"x": x})
    torch.testing.assert_close(result, -x.reshape(24))
