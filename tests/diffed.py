"""A small program as text, and the diff of two edits of it."""

from __future__ import annotations

from graphshard import text
from graphshard.diff import diff
from graphshard.diff.difference import Diff

BODY = """
  %w : f32[4,8] = param "w"
  %x : f32[2,4] = batch 0
  %y : f32[2,8] = aten.mm.default(%x, %w) {module=lin}
  %z : f32[2,8] = aten.relu.default(%y)
  return output 0 %z
"""


def program(body: str = BODY, header: str = "", others: str = "") -> str:
    return f'graphshard 1\nparam "w" : f32[4,8]\n{header}\ngraph body {{{body}}}\n{others}'


def compare(before: str, after: str) -> Diff:
    return diff(text.parse(before), text.parse(after))
