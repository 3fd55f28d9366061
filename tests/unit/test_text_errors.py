"""Every mistake in graph text is shown where it is."""

from __future__ import annotations

import pytest

from graphshard import text
from graphshard.errors import TextError


def in_body(*statements: str, header: str = "") -> str:
    """A program with input ``%x : f32[2,4]`` whose body consists of ``statements``."""
    lines = "".join(f"  {statement}\n" for statement in statements)
    returns = "" if any("return" in s for s in statements) else "  return\n"
    return f"graphshard 1\n{header}\ngraph body {{\n  %x : f32[2,4] = batch 0\n{lines}{returns}}}\n"


def position(marked: str) -> tuple[str, int, int]:
    """The text without its ``^``, and the line and column of what it stands before."""
    before, mark, after = marked.partition("^")
    assert mark
    return before + after, before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1


def header(line: str) -> str:
    return in_body("return", header=line)


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        ("^", "graph text begins with 'graphshard 1', not with end of text"),
        ("^graph body {\n  return\n}", "graph text begins with 'graphshard 1', not with 'graph'"),
        ("graphshard ^2\n", "the text is of version 2; expected version 1"),
        ("graphshard 1\n^", "a program needs a graph body"),
        (header("^levle staged"), "unknown statement 'levle'; did you mean level?"),
        (header("level ^stagd"), "unknown level 'stagd'; did you mean staged?"),
        (header("level ^3"), "expected level, one of captured, staged, sharded, not '3'"),
        (header("microbatches ^0"), "expected the number of micro-batches, an integer of at least 1, not '0'"),
        (header("mesh dp=2 ^pp=2"), "mesh axes are given once each, in the order pp, dp, shard, tp"),
        (header("mesh ^ddp=2"), "unknown mesh axis 'ddp'; did you mean dp?"),
        (header("mesh dp=^two"), "expected the size of the axis, an integer of at least 1, not 'two'"),
        (header('param "w" : ^f33[4]'), "unknown dtype 'f33'"),
        (header('param "w" : f32^'), "expected '[' before the shape, not end of line"),
        (header('param "w" : f32[4, ^-1]'), "expected a size, an integer of at least 0, not '-1'"),
        (header('param "w" : f32[4] ^grup=0'), "unknown parameter attribute 'grup'; did you mean group?"),
        (header('param "w" : f32[4] group=0 ^group=1'), "group is given twice"),
        (header('param "w" : f32[4]\nparam ^"w" : f32[4]'), "parameter 'w' is declared twice"),
        (header('param ^"w : f32[4]'), "this string does not end on its line"),
        (header("param ^w : f32[4]"), "expected the quoted name of the parameter, not 'w'"),
        (header('param ^"a\\q" : f32[4]'), "a string has JSON's escapes"),
        (header('bucket "b" : f32[8] {^"w"@0}'), "unknown parameter 'w'"),
        (
            header('param "w" : f32[4]\nbucket "b" : f32[8] {^"w"@6}'),
            "'w' ends at element 10, beyond the bucket's f32[8]",
        ),
        (header('bucket "b" : ^f32[8,2] {}'), "a bucket is flat"),
        (header('bucket "b" : f32[8]^'), "expected '{' before the bucket's members, not end of line"),
        (header('constant "c" : f32[3] = ^[1.0, 2.0]'), "constant 'c' is f32[3], but 3 values are needed, 2 are given"),
        (header('constant "c" : i64[1] = ^[1.5, 2]'), "1 values are needed, 2 are given"),
        (header('constant "c" : i64[1] = ^["a"]'), "the values do not fit i64"),
        (
            header('constant "c" : f32[99] = sha256 ^"12ab"'),
            "constants, where its value should be, has none of this hash",
        ),
        (header("^$"), "unexpected character '$'"),
        (
            in_body("%y = ^aten.mmm.default(%x, %x)"),
            "unknown operator 'aten.mmm.default'; did you mean aten.mm.default?",
        ),
        (in_body("%y = ^aten.mm(%x, %x)"), "aten.mm needs its overload, such as aten.mm.d"),
        (in_body("%y = ^nothing.mm.default(%x)"), "unknown operator 'nothing.mm.default'"),
        (in_body("%y = ^mm(%x)"), "unknown operator 'mm'"),
        (in_body("%y = ^aten.mm.default(%x)"), "aten.mm.default does not take these arguments: "),
        (in_body("%y = ^aten.mm.default(%x, %x)"), "aten.mm.default does not take these arguments: "),
        (in_body("%y = aten.mm.default^"), "expected '(' and arguments after aten.mm.default, not end of line"),
        (in_body("%y = aten.mm.default(%x, ^%z)"), "unknown node in graph body '%z'; known: %x"),
        (in_body("%yy = aten.t.default(%x)", "%z = aten.t.default(^%y)"), "did you mean %yy?"),
        (in_body("%y = aten.t.default(^%y)"), "unknown node in graph body '%y'"),
        (in_body("%y = aten.t.default(%x^"), "expected ',' or ')' in the arguments of aten.t.default, not end of line"),
        (in_body("%y = aten.t.default(%x) ^%x"), "expected the end of the line after the statement, not '%x'"),
        (in_body("%y = aten.mm.default(%x ^%x)"), "expected ',' or ')' in the arguments of aten.mm.default, not '%x'"),
        (in_body("%y = aten.mul.Tensor(self=%x, ^2)"), "an argument without a name comes after one with a name"),
        (in_body("%y = aten.sum.default(%x, dtype=^f23)"), "unknown value 'f23'; did you mean"),
        (
            in_body("%y : ^f32[2,5] = aten.t.default(%x)"),
            "says f32[2,5], but aten.t.default of these arguments gives f32[4,2]{1,4}",
        ),
        (
            in_body("%y : ^f32[4,2] = aten.t.default(%x)"),
            "says f32[4,2], but aten.t.default of these arguments gives f32[4,2]{1,4}",
        ),
        (
            in_body("%y : ^f64[2,4] = aten.neg.default(%x)"),
            "says f64[2,4], but aten.neg.default of these arguments gives f32[2,4]",
        ),
        (
            in_body("%y : ^(f32[2]) = aten.max.dim(%x, 1)"),
            "says (f32[2]), but aten.max.dim of these arguments gives (f32[2], i64[2])",
        ),
        (in_body("%y : f32[2,4]^{4} = aten.neg.default(%x)"), "a stride for each dim is needed, 2; 1 are given"),
        (in_body("^%x = aten.neg.default(%x)"), "%x is defined twice in graph body"),
        (in_body("^%class = aten.neg.default(%x)"), "%class is a keyword of Python"),
        (in_body("^% y = aten.neg.default(%x)"), "expected a node name"),
        (in_body("%y ^aten.neg.default(%x)"), "expected '=' after the name, not 'aten.neg.default'"),
        (in_body("^y = aten.neg.default(%x)"), "expected '%name = ...' or 'return' in graph body, not 'y'"),
        (in_body("%y : f32[2] = ^parm 1"), "unknown kind of input 'parm'; did you mean param?"),
        (in_body("^%y = batch 1"), "an input needs its type: %y : f32[4,8] = batch 1"),
        (in_body("%y : f32[2] = batch ^x"), "expected the index of the batch, not 'x'"),
        (in_body("%y : f32[2,4] = ^batch 0"), "batch 0 is read twice"),
        (in_body("%y = aten.neg.default(%x)", "%b : f32[2] = ^batch 1"), "all inputs of a graph come first"),
        (
            in_body('%b : ^f32[5] = param "w"', header='param "w" : f32[4]'),
            'param "w" is f32[4] by the header, not f32[5]',
        ),
        (in_body("%y = aten.t.default(%x) {^phaze=forward}"), "unknown attribute 'phaze'; did you mean phase?"),
        (
            in_body("%y = aten.t.default(%x) {phase=^fwd}"),
            "unknown phase 'fwd'; did you mean forward?",
        ),
        (in_body("%y = aten.t.default(%x) {stage=^one}"), "expected a stage, an integer of at least 0, not 'one'"),
        (in_body("return output 0 ^%y"), "unknown node in graph body '%y'"),
        (in_body("return output 0 %x, ^output 0 %x"), "output 0 is returned twice"),
        (in_body("return ^outptu 0 %x"), "unknown kind of output 'outptu'; did you mean output?"),
        (
            in_body("return output 0 %x", "^%y = aten.t.default(%x)"),
            "expected '}' after the return of graph body, not '%y'",
        ),
        (in_body() + "graph ^body {\n  return\n}\n", "graph body is given twice"),
        (in_body() + "graph ^middle {\n  return\n}\n", "unknown graph 'middle'; known: prologue, body, epilogue"),
        (in_body() + "^level staged\n", "level belongs before the graphs"),
        (
            "graphshard 1\ngraph body {\n  %x : f32[2] = batch 0\n^}\n",
            "expected '%name = ...' or 'return' in graph body, not '}'",
        ),
    ],
)
def test_a_mistake_is_shown_at_its_line_and_column(marked: str, message: str) -> None:
    source, line, column = position(marked)
    with pytest.raises(TextError) as caught:
        text.parse(source)
    assert message in caught.value.problem
    assert (caught.value.line, caught.value.column) == (line, column), str(caught.value)


def test_the_message_shows_the_line_and_a_marker() -> None:
    with pytest.raises(TextError) as caught:
        text.parse(in_body("%y : f32[2,8] = aten.mmm.default(%x, %x)"))
    assert str(caught.value).splitlines() == [
        "line 5, column 19: unknown operator 'aten.mmm.default'; did you mean aten.mm.default?",
        "    %y : f32[2,8] = aten.mmm.default(%x, %x)",
        "                    ^",
    ]


def test_the_message_shows_a_part_of_a_very_long_line() -> None:
    source = in_body(f"%y = aten.cat.default([{'%x, ' * 300}%z, {'%x, ' * 300}%x])")
    with pytest.raises(TextError) as caught:
        text.parse(source)
    _, excerpt, marker = str(caught.value).splitlines()
    assert len(excerpt) < 200
    assert excerpt[marker.index("^") :].startswith("%z,")
