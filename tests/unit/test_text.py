"""Graph text: printing and parsing are inverses, and every mistake is shown where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from graphshard import fake, text
from graphshard.errors import TextError, UnreadableConstants
from graphshard.mesh import Mesh
from graphshard.program import (
    Bucket,
    Level,
    MemoryTag,
    NodeInfo,
    Param,
    PassRecord,
    Phase,
    Program,
    Role,
    Section,
    Slot,
    info,
    val,
)
from graphshard.rewrite import add_input, call, set_outputs

aten = torch.ops.aten

WHOLE = """graphshard 1
mesh pp=2 dp=2
level staged
microbatches 4
param "lin.weight" : f32[4,8] group=0 aliases=["head.weight"] stages=[0, 1]
param "frozen \\"é\\"" : bf16[] has_grad=False
bucket "lin" : f32[64] axis=dp parts=2 stage=0 store=shard {"lin.weight"@0, "frozen \\"é\\""@32}
constant "c0" : f32[2,2]{1,2} = [1.0, 2.5, -inf, nan]
constant "c1" : i64[] = -3
constant "c2" : c64[1] = [complex(1.0, -0.0)]
history "zero" options="stage=3" nodes=812

graph prologue {
  %z : f32[2] = aten.full.default([2], 0.0)
  return carry "m" %z
}

graph body {
  %w : f32[4,8] = param "lin.weight" {stage=0}
  %x : f32[2,4] = batch 0
  %m_1 : f32[2] = carry "m"
  %sum : f32[2,8] = aten.mm.default(%x, %w) {module=h.0.lin, stage=0, tag=recompute}
  %t : f32[8,2]{1,8} = aten.t.default(%sum) {phase=backward, module="0", origin=t_9, forward=sum, layout=dp:flat}
  %c : f32[8,2] = aten.clone.default(%t, memory_format=contiguous_format) {stage=1, made_by=pipeline-cut}
  %v : (f32[2], i64[2]) = aten.max.dim(%sum, -1)
  %m : f32[2] = getitem(%v, 0)
  %r : f32[2,1] = aten.view.default(%m, [2, 1]) {origin=""}
  %n : (f32[2,4], none, none) = aten.native_layer_norm_backward.default(%x, %x, [4], %r, %r, None, None, [True, False, False])
  %e : b8[2,3]@meta = aten.empty.memory_format([2, 3], dtype=b8, layout=strided, device=meta, pin_memory=False)
  %a : f32[2] = aten.add.Tensor(%m_1, %m, alpha=1e-05)
  return carry "m" %a, output 0 %c, state "lin.weight" exp_avg @1 %sum, state "lin.weight" "two words" %sum
}

graph epilogue {
  %m : f32[2] = carry "m"
  return loss "loss" %m
}

graph first_epilogue {
  return
}
"""  # noqa: E501


def test_a_text_that_uses_every_spelling_comes_back_unchanged() -> None:
    assert text.to_text(text.parse(WHOLE)) == WHOLE


def test_what_the_text_says_is_what_the_program_holds() -> None:
    program = text.parse(WHOLE)
    assert program.mesh == Mesh((("pp", 2), ("dp", 2)))
    assert (program.level, program.microbatches) == (Level.STAGED, 4)
    assert program.params == {
        "lin.weight": Param("lin.weight", (4, 8), torch.float32, ("head.weight",), group=0, stages=(0, 1)),
        'frozen "é"': Param('frozen "é"', (), torch.bfloat16, has_grad=False),
    }
    members = (("lin.weight", 0), ('frozen "é"', 32))
    assert program.buckets == {"lin": Bucket("lin", torch.float32, 64, members, "dp", 2, 0, Role.SHARD)}
    assert program.history == (PassRecord("zero", "stage=3", 0.0, 812),)
    assert program.constants["c0"].stride() == (1, 2)
    assert program.constants["c0"].flatten().tolist()[:3] == [1.0, 2.5, -math.inf]
    assert program.first_epilogue is not None

    nodes = {node.name: node for node in program.body.graph.nodes}
    assert nodes["sum"].target is aten.mm.default
    assert nodes["sum"].args == (nodes["x"], nodes["w"])
    assert info(nodes["sum"]) == NodeInfo(Phase.FORWARD, "h.0.lin", origin="sum", stage=0, tag=MemoryTag.RECOMPUTE)
    assert info(nodes["t"]) == NodeInfo(Phase.BACKWARD, "0", origin="t_9", forward="sum", layout="dp:flat")
    assert info(nodes["c"]) == NodeInfo(stage=1, made_by="pipeline-cut")
    assert nodes["c"].kwargs == {"memory_format": torch.contiguous_format}
    assert nodes["e"].kwargs["device"] == torch.device("meta")
    assert (val(nodes["t"]).shape, val(nodes["t"]).stride()) == ((8, 2), (1, 8))
    assert program.body.inputs[nodes["m_1"]] == Slot(Role.CARRY, "m")
    assert list(program.body.outputs) == [
        Slot(Role.CARRY, "m"),
        Slot(Role.OUTPUT, "0"),
        Slot(Role.STATE, "lin.weight", "exp_avg", 1),
        Slot(Role.STATE, "lin.weight", "two words"),
    ]
    assert info(next(iter(program.prologue.nodes()))) == NodeInfo(Phase.UPDATE, origin="z")


def test_a_parsed_program_keeps_its_types_apart_from_the_real_world() -> None:
    body = text.parse(in_body("%y = aten.mul.Tensor(%x, 2)")).body
    modes = {fake.mode_of([val(node)]) for node in body.graph.nodes if node.op != "output"}
    assert len(modes) == 1
    assert None not in modes


def in_body(*statements: str, header: str = "") -> str:
    """A program with input ``%x : f32[2,4]`` whose body consists of ``statements``."""
    lines = "".join(f"  {statement}\n" for statement in statements)
    returns = "" if any("return" in s for s in statements) else "  return\n"
    return f"graphshard 1\n{header}\ngraph body {{\n  %x : f32[2,4] = batch 0\n{lines}{returns}}}\n"


def test_comments_blank_lines_and_loose_layout_are_read() -> None:
    source = """# a comment first
    graphshard 1   # the version


    param "w":f32[ 4 ]   # has a # in the comment
    graph body {   # comment
        %x:f32[4]=param "w"
        # between
        %y = aten.cat.default([
            %x,   # one a line
            %x
        ], dim=0)

        return output 0 %y,
               output 1 %x
    }"""
    assert text.to_text(text.parse(source.replace("\n", "\r\n"))) == text.to_text(text.parse(source))
    assert "%y : f32[8] = aten.cat.default([%x, %x], dim=0)" in text.to_text(text.parse(source))


def test_a_string_may_hold_what_is_a_mark_elsewhere() -> None:
    source = in_body("return output 0 %x").replace("batch 0", r'param "a # %b \\ \" é {\n}"')
    slot = next(iter(text.parse(source).body.inputs.values()))
    assert slot.name == 'a # %b \\ " é {\n}'
    assert text.to_text(text.parse(text.to_text(text.parse(source)))) == text.to_text(text.parse(source))


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("1e-05", 1e-5),
        ("0.1", 0.1),
        ("-0.0", -0.0),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("True", True),
        ("None", None),
        ('"tanh"', "tanh"),
        ("[]", []),
        ("[[1, 2], [None, -1.5]]", [[1, 2], [None, -1.5]]),
        ("(1,)", (1,)),
        ("(1, (2, 3))", (1, (2, 3))),
        ("()", ()),
        ("f32", torch.float32),
        ("b8", torch.bool),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("strided", torch.strided),
        ("sparse_coo", torch.sparse_coo),
        ("channels_last", torch.channels_last),
        ("preserve_format", torch.preserve_format),
        ("cpu", torch.device("cpu")),
        ("cuda:1", torch.device("cuda", 1)),
        ("complex(1.5, -inf)", complex(1.5, -math.inf)),
    ],
)
def test_values_have_one_spelling_each(spelling: str, value: object) -> None:
    from graphshard.text.spelling import spell
    from graphshard.text.tokens import Cursor
    from graphshard.text.values import value as parse_value

    parsed = parse_value(Cursor(spelling, ""), pytest.fail)
    assert spell(value) == spelling
    assert repr(parsed) == repr(value)  # tells 0 from False and -0.0 from 0.0


def test_nan_is_spelled() -> None:
    program = text.parse(in_body("%y = aten.mul.Tensor(%x, nan)"))
    assert "aten.mul.Tensor(%x, nan)" in text.to_text(program)


def test_every_dtype_is_spelled() -> None:
    from graphshard.text.spelling import DTYPES

    assert {d for d in vars(torch).values() if isinstance(d, torch.dtype)} == set(DTYPES.values())


def test_a_long_return_takes_a_line_an_output() -> None:
    outputs = [f'buffer "some.rather.long.name.{i}" %x' for i in range(6)]
    source = in_body("return " + ", ".join(outputs))
    printed = text.to_text(text.parse(source))
    assert "  return " + ",\n         ".join(outputs) in printed
    assert text.to_text(text.parse(printed)) == printed


@pytest.mark.parametrize("name", ["sum", "input", "add_1", "_", "x_0_1", "__y", "torch"])
def test_names_of_nodes_are_kept(name: str) -> None:
    other = [f"%{name} = aten.t.default(%x)", f"%{name}_1 = aten.t.default(%{name})", f"%{name}_2 = aten.t.default(%x)"]
    body = text.parse(in_body(*other)).body
    assert [node.name for node in body.nodes()] == [name, f"{name}_1", f"{name}_2"]
    with body.graph.inserting_before(body.output_node):
        made = call(body.graph, aten.t.default, (next(iter(body.nodes())),), NodeInfo())
    assert made.name not in {name, f"{name}_1", f"{name}_2", "x"}


def test_the_stride_of_a_dim_of_size_one_says_nothing_and_is_kept() -> None:
    source = in_body("%y : f32[4,1] = aten.view.default(%v, [4, 1])").replace("%x : f32[2,4]", "%v : f32[1,4]{1,1}")
    source = source.replace("f32[4,1] =", "f32[4,1]{1,7} =")
    assert "%y : f32[4,1]{1,7} =" in text.to_text(text.parse(source))


# -- files


def with_constants(large: torch.Tensor, small: torch.Tensor) -> Program:
    program = text.parse(in_body("return output 0 %x"))
    program.constants = {"large": large, "small": small}
    return program


@pytest.mark.parametrize(
    "large",
    [
        torch.arange(20.0),
        torch.randn(5, 4).to(torch.bfloat16).t(),
        torch.randn(3, 1, 4).expand(3, 5, 4),
        torch.randn(17, dtype=torch.complex128),
        torch.randn(17, dtype=torch.complex64).conj(),
        torch.arange(30).reshape(5, 6)[::2, ::3].repeat(3, 3).bool(),
        torch.randn(20).to(torch.float8_e4m3fn),
        torch.full((17,), 2**63 + 1, dtype=torch.uint64),
    ],
    ids=lambda t: f"{t.dtype}{list(t.stride())}",
)
def test_large_constants_live_beside_the_text(tmp_path: Path, large: torch.Tensor) -> None:
    small = large.flatten()[:3].clone()
    path = tmp_path / "p.graph"
    text.write(with_constants(large, small), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.graph", "p.safetensors"]
    for name, value in text.read(path).constants.items():
        expected = {"large": large, "small": small}[name]
        assert (value.dtype, value.stride()) == (expected.dtype, expected.stride())
        assert value.tolist() == expected.tolist()
    printed = path.read_text()
    assert text.to_text(text.read(path)) == printed
    text.write(text.read(path), tmp_path / "q.graph")
    assert (tmp_path / "q.graph").read_text() == printed


def test_a_program_without_large_constants_is_one_file(tmp_path: Path) -> None:
    text.write(with_constants(torch.zeros(16), torch.zeros(())), tmp_path / "p.graph")
    assert [p.name for p in tmp_path.iterdir()] == ["p.graph"]


def test_in_memory_constants_go_with_the_text() -> None:
    program = with_constants(torch.arange(20.0), torch.ones(2))
    back = text.parse(text.to_text(program), text.stored_constants(program))
    assert torch.equal(back.constants["large"], torch.arange(20.0))


def test_a_constant_without_data_is_printed_without_value() -> None:
    program = with_constants(torch.empty(20, device="meta"), torch.empty(2, device="meta"))
    back = text.parse(text.to_text(program))
    assert back.constants["large"].device.type == "meta"
    assert text.to_text(back) == text.to_text(program)


def edit_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({name: value + 1 for name, value in tensors.items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "p.safetensors, where its value should be, has none of this hash"),
        (edit_tensor, "p.safetensors is not the one of this hash"),
    ],
)
def test_a_lost_or_edited_value_is_noticed(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    text.write(with_constants(torch.arange(20.0), torch.ones(2)), tmp_path / "p.graph")
    damage(tmp_path / "p.safetensors")
    with pytest.raises(TextError, match=r"p\.graph:4:37: constant 'large' is f32\[20\], but ") as caught:
        text.read(tmp_path / "p.graph")
    assert message in str(caught.value)


def test_a_damaged_file_of_constants_is_refused(tmp_path: Path) -> None:
    text.write(with_constants(torch.arange(20.0), torch.ones(2)), tmp_path / "p.graph")
    (tmp_path / "p.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UnreadableConstants, match=r"p\.safetensors: expected the safetensors file"):
        text.read(tmp_path / "p.graph")


def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "p.graph").write_bytes("graphshard 1\né".encode() + b"\xff\n")
    with pytest.raises(TextError, match=r"p\.graph:2:2: byte 0xff is not UTF-8"):
        text.read(tmp_path / "p.graph")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.graph"
    path.write_text("old")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        text.write(with_constants(torch.ones(2), torch.ones(2)), path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.graph"]
    assert path.read_text() == "old"


# -- any program

LABELS = st.one_of(st.sampled_from(["", "lin", "h.0.attn", "0", "dp:flat", "pipeline-cut"]), st.text(max_size=5))
INFOS = st.builds(
    NodeInfo,
    phase=st.sampled_from(Phase),
    module=LABELS,
    origin=LABELS,
    forward=LABELS,
    stage=st.none() | st.integers(0, 9),
    tag=st.none() | st.sampled_from(MemoryTag),
    layout=LABELS,
    as_given=st.booleans(),
    made_by=LABELS,
)
SLOTS = st.builds(Slot, st.sampled_from(Role), LABELS | st.just("0"), LABELS, st.integers(0, 3))
SCALARS = st.floats(width=64) | st.integers(-(2**40), 2**40)
OPERATIONS = ("add", "mul", "t", "sum", "flatten", "cast", "clone", "cat", "max", "full", "mm")


def operation(draw: st.DrawFn, graph: fx.Graph, nodes: list[fx.Node], record: NodeInfo) -> list[fx.Node]:
    """One more operation of the graph, and the tensors it gives."""
    x = draw(st.sampled_from(nodes))
    value = val(x)
    kind = draw(st.sampled_from(OPERATIONS))
    if kind in ("add", "mul"):
        target = {"add": aten.add.Tensor, "mul": aten.mul.Tensor}[kind]
        return [call(graph, target, (x, x if kind == "add" else draw(SCALARS)), record)]
    if kind == "t" and value.dim() == 2:
        return [call(graph, aten.t.default, (x,), record)]
    if kind == "mm" and value.dim() == 2:
        flipped = call(graph, aten.t.default, (x,), record)
        return [flipped, call(graph, aten.mm.default, (x, flipped), record)]
    if kind == "sum" and value.dim():
        return [call(graph, aten.sum.dim_IntList, (x, [-1], draw(st.booleans())), record)]
    if kind == "cast":
        dtype = draw(st.sampled_from([torch.float64, torch.float32]))
        return [call(graph, aten._to_copy.default, (x,), record, dtype=dtype)]
    if kind == "clone":
        return [call(graph, aten.clone.default, (x,), record, memory_format=torch.contiguous_format)]
    if kind == "cat" and value.dim():
        return [call(graph, aten.cat.default, ([x, x], 0), record)]
    if kind == "max" and value.dim() and value.numel():
        import operator

        pair = call(graph, aten.max.dim, (x, 0, True), record)
        return [call(graph, operator.getitem, (pair, i), record) for i in range(2)]
    if kind == "full":
        size = draw(st.lists(st.integers(0, 3), max_size=3))
        options = {"dtype": value.dtype, "layout": torch.strided, "device": torch.device("cpu"), "pin_memory": False}
        return [call(graph, aten.full.default, (size, draw(SCALARS)), record, **options)]
    return [call(graph, aten.reshape.default, (x, [-1]), record)] if value.numel() else [x]


@st.composite
def sections(draw: st.DrawFn) -> Section:
    section = Section()
    section.graph.output(())
    mode = fake.new_mode()
    for index, slot in enumerate(draw(st.lists(SLOTS, min_size=1, max_size=3, unique=True))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        order = draw(st.permutations(range(len(shape))))
        value = fake.tensor(mode, [shape[i] for i in order], draw(st.sampled_from([torch.float32, torch.float64])))
        with mode:
            value = value.permute(order)
        add_input(section, slot, value, draw(INFOS), draw(st.sampled_from(["x", "input", f"w_{index}"])))
    nodes = list(section.inputs)
    with section.graph.inserting_before(section.output_node):
        for _ in range(draw(st.integers(0, 6))):
            nodes += operation(draw, section.graph, nodes, draw(INFOS))
    slots = draw(st.lists(SLOTS, max_size=3, unique=True))
    set_outputs(section, {slot: draw(st.sampled_from(nodes)) for slot in slots})
    return section


def facts(section: Section) -> list[object]:
    """What must survive a round trip, comparable."""
    result: list[object] = [list(map(str, section.output_slots))]
    for node in section.graph.nodes:
        result.append((node.name, node.op, str(node.args), str(node.kwargs), str(section.inputs.get(node))))
        if node.op == "call_function":
            result.append(node.target)
        if node.op != "output":
            values = val(node) if isinstance(val(node), (tuple, list)) else [val(node)]
            result += [(v.shape, v.dtype, v.stride()) for v in values]
            result.append(info(node))
    return result


@settings(max_examples=60, deadline=None)
@given(body=sections(), epilogue=sections())
def test_any_program_survives_printing_and_parsing(body: Section, epilogue: Section) -> None:
    printed = text.to_text(Program(body=body, epilogue=epilogue))
    back = text.parse(printed)
    assert facts(back.body) == facts(body)
    assert facts(back.epilogue) == facts(epilogue)
    assert text.to_text(back) == printed


@settings(max_examples=100, deadline=None)
@given(
    at=st.integers(0, len(WHOLE)), junk=st.sampled_from(["", "%", '"', "}", "x", "\n", "9", "=", "(", ",", "-", "@"])
)
def test_damaged_text_never_gives_anything_but_a_text_error(at: int, junk: str) -> None:
    try:
        text.parse(WHOLE[:at] + junk + WHOLE[at + 1 :])
    except TextError as error:
        assert 1 <= error.line <= WHOLE.count("\n") + 2
