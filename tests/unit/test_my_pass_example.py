"""How to test a pass: graph text in, graph text out. No tracer, no device, no process group."""

from __future__ import annotations

import pytest

from graphshard import text
from graphshard.errors import UnknownPass
from graphshard.pipeline import parse_passes, run_passes
from my_pass import TanhGelu

GRAPH = """graphshard 1
level captured

graph prologue {
  %z : f32[] = aten.full.default([], 0.0)
  return carry "loss" %z
}

graph body {
  %x : f32[2,4] = batch 0
  %loss : f32[] = carry "loss"
  %h : f32[2,4] = aten.gelu.default(%x) {module=mlp.act}
  %y : f32[2,4] = aten.gelu.default(%h) {module=head}
  %s : f32[] = aten.sum.default(%y) {module=head}
  %l : f32[] = aten.add.Tensor(%loss, %s)
  %g : f32[2,4]{0,0} = aten.expand.default(%s, [2, 4]) {phase=backward, module=head}
  %gh : f32[2,4] = aten.gelu_backward.default(%g, %h) {phase=backward, module=head}
  %gx : f32[2,4] = aten.gelu_backward.default(%gh, %x) {phase=backward, module=mlp.act}
  return carry "loss" %l
}

graph epilogue {
  %loss : f32[] = carry "loss"
  return loss "loss" %loss
}
"""


def approximated(below: str) -> list[str]:
    """Names of the nodes that are approximate after the pass."""
    after = text.to_text(run_passes(text.parse(GRAPH), [TanhGelu(below)]))
    return [line.split()[0] for line in after.splitlines() if 'approximate="tanh"' in line]


@pytest.mark.parametrize(
    ("below", "names"),
    [("", ["%h", "%y", "%gh", "%gx"]), ("mlp", ["%h", "%gx"]), ("head", ["%y", "%gh"]), ("ml", [])],
)
def test_gelu_is_approximated_forward_and_backward(below: str, names: list[str]) -> None:
    assert approximated(below) == names


def test_what_is_approximate_already_is_left_alone() -> None:
    once = run_passes(text.parse(GRAPH), [TanhGelu()])
    again = run_passes(text.parse(text.to_text(once)), [TanhGelu()])
    assert text.to_text(again).count("made_by=tanh-gelu") == 4
    assert [record.name for record in again.history] == ["tanh-gelu", "tanh-gelu"]


def test_the_command_line_finds_it() -> None:
    assert parse_passes("my_pass:TanhGelu;my_pass:TanhGelu:below=mlp") == [TanhGelu(), TanhGelu("mlp")]
    with pytest.raises(UnknownPass, match="did you mean 'zero'"):
        parse_passes("zeroo:stage=3")
