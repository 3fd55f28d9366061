"""Where a node comes from, which passes touched it, and where it runs."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard import text
from graphshard.cli import main
from graphshard.diff.alignment import Alignment
from graphshard.diff.ancestry import Ancestry, ancestry
from graphshard.errors import AmbiguousNode, NotADump, UnknownNode
from graphshard.program import Program, info, source_line
from graphshard.trace import capture
from models import zoo

HERE = Path(__file__)


class Net(nn.Module):
    """Two layers with a function between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.tanh(h)
        result: Tensor = self.second(h)
        return result


def line_of(code: str, function: Any = Net.forward) -> int:
    """Number of the line of ``function`` that is ``code``."""
    assert isinstance(function, FunctionType)
    lines, begin = inspect.getsourcelines(function)
    return begin + [line.strip() for line in lines].index(code)


def captured(model: nn.Module, loss_fn: Any, *args: Tensor) -> Program:
    return capture(model, loss_fn, args, {}, mode="train").program


def sources_of(program: Program, target: Any) -> set[str]:
    return {source_line(program.sources, info(n)) for n in program.body.nodes() if n.target is target}


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    batch = (torch.randn(8, 4), torch.randn(8, 2))
    options: dict[str, Any] = {"loss_fn": F.mse_loss, "optimizer": torch.optim.AdamW, "example_inputs": batch}
    graphshard.compile(Net(), "zero3+pp2", **options, world_size=4, executor="none", dump_dir=folder)
    return folder


def did(found: Ancestry) -> list[tuple[str, str]]:
    return [(touch.pass_name.partition("-")[2], touch.did) for touch in found.touches]


def test_layers_have_the_line_that_calls_them_and_backward_nodes_that_of_their_forward() -> None:
    aten = torch.ops.aten
    program = captured(Net(), F.mse_loss, torch.randn(8, 4), torch.randn(8, 2))
    layers = {f"{HERE}:{line_of('h = self.first(x)')}", f"{HERE}:{line_of('result: Tensor = self.second(h)')}"}
    assert sources_of(program, aten.addmm.default) == layers
    assert sources_of(program, aten.mm.default) == layers
    tanh = {f"{HERE}:{line_of('h = torch.tanh(h)')}"}
    assert sources_of(program, aten.tanh.default) == sources_of(program, aten.tanh_backward.default) == tanh


def test_where_no_line_is_the_users_it_is_the_librarys_not_that_of_who_compiles() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    program = captured(model, F.mse_loss, torch.randn(8, 4), torch.randn(8, 4))
    for target, function in (
        (torch.ops.aten.addmm.default, nn.Linear.forward),
        (torch.ops.aten.native_layer_norm.default, nn.LayerNorm.forward),
        (torch.ops.aten.mse_loss.default, F.mse_loss),
    ):
        (found,) = sources_of(program, target)
        file, _, line = found.rpartition(":")
        lines, begin = inspect.getsourcelines(function)
        assert file == inspect.getsourcefile(function)
        assert begin <= int(line) < begin + len(lines)


def test_a_transformers_model_has_lines_of_its_own_file() -> None:
    model, (args, kwargs), loss_fn = zoo.MODELS["llama"]()
    program = capture(model, loss_fn, args, kwargs, mode="train").program
    files = [source_line(program.sources, info(n)).rpartition(":")[0] for n in program.body.nodes()]
    assert sum(file.endswith("modeling_llama.py") for file in files) > 0.5 * len(files)
    assert not any(str(HERE) in file for file in files)


def test_the_text_of_a_program_does_not_hold_the_lines() -> None:
    program = captured(Net(), F.mse_loss, torch.randn(8, 4), torch.randn(8, 2))
    assert program.sources
    assert str(HERE.name) not in text.to_text(program)


def test_a_dump_says_lines_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent.parent)
    batch = (torch.randn(8, 4), torch.randn(8, 2))
    graphshard.compile(Net(), "dp", loss_fn=F.mse_loss, example_inputs=batch, executor="none", dump_dir=tmp_path)
    lines = json.loads((tmp_path / "sources.json").read_text())
    assert lines["tanh"] == f"unit{os.sep}{HERE.name}:{line_of('h = torch.tanh(h)')}"


def test_a_forward_node(dump: Path) -> None:
    found = ancestry(dump, "%addmm")
    assert found.text.startswith("%addmm : f32[1,8] = aten.addmm.default(")
    assert (found.graph, found.section, found.module, found.phase, found.stage) == (
        "07-fuse",
        "body",
        "first",
        "forward",
        0,
    )
    assert (found.source.rpartition(":")[2], found.code) == (str(line_of("h = self.first(x)")), "h = self.first(x)")
    assert did(found)[:2] == [("capture", "made: captured from the model"), ("pipeline-cut", "put on stage 0")]
    assert did(found)[2][0] == "zero" and did(found)[2][1].startswith("changed self: %first_bias -> %as_strided")
    (place,) = found.places
    assert place.stage == 0 and place.what.startswith("segment s0_F_") and place.actions[:2] == ("F0.0", "F0.1")
    name = place.what.split()[1]
    code = (dump / "stage0.py").read_text()
    assert "addmm = torch.ops.aten.addmm" in code[code.index(f"def {name}(") :].split("\ndef ")[0]


def test_a_backward_node_names_what_it_differentiates(dump: Path) -> None:
    found = ancestry(dump, "tanh_backward")
    assert found.forward.startswith("%tanh : f32[1,8] = aten.tanh.default(%transfer_default)")
    assert found.code == "h = torch.tanh(h)"
    assert found.phase == "backward"


def test_a_removed_node_is_told_up_to_its_end(dump: Path) -> None:
    aligned = Alignment(text.read(dump / "03-zero.graph"), text.read(dump / "04-bucket.graph"))
    gathers = [i.node for i in aligned.before if i.section == "body" and "all_gather" in str(i.node.target)]
    gone = next(node.name for node in gathers if node not in aligned.successor)
    found = ancestry(dump, f"zero:body:{gone}")
    assert found.graph == "03-zero"
    assert did(found) == [("zero", "made"), ("bucket", "removed")]
    assert found.places == ()
    assert found.source == ""


def test_what_a_pass_made_runs_where_the_plan_says(dump: Path) -> None:
    found = ancestry(dump, "transfer_default")
    assert did(found)[0] == ("pipeline-cut", "made")
    assert {(place.stage, place.what) for place in found.places} >= {(1, "RECV transfer_default")}


def test_what_is_written_into_a_bucket_runs_in_the_segment_that_fills_it(dump: Path) -> None:
    program = text.read(dump / "06-overlap.graph")
    pack = next(n for n in program.body.nodes() if n.target is torch.ops.graphshard.pack.default)
    product = next(n for n in pack.all_input_nodes if n.target is torch.ops.aten.mm.default)
    assert ancestry(dump, product.name).places == ancestry(dump, pack.name).places != ()


def test_moves_copies_and_stages_are_told(tmp_path: Path) -> None:
    head = "graphshard 1\nmesh pp=2\n"
    node = "%{0} : f32[2] = aten.neg.default(%x) {{origin=neg, stage={1}}}"
    for file, lines, returned in (
        ("00-capture", [node.format("neg", 0)], "neg"),
        ("01-homes", [node.format("neg", 1)], "neg"),
        ("02-copies", [node.format("neg", 1), node.format("again", 1)], "again"),
        ("03-names", [node.format("neg", 1), node.format("other", 1)], "other"),
    ):
        body = "\n".join(["graph body {", "%x : f32[2] = batch 0", *lines, f"return output 0 %{returned}", "}"])
        (tmp_path / f"{file}.graph").write_text(f"{head}\n{body}\n")
    assert did(ancestry(tmp_path, "neg")) == [
        ("capture", "made: captured from the model"),
        ("homes", "re-homed from stage 0 to stage 1"),
        ("copies", "duplicated as %again in graph body"),
    ]
    assert did(ancestry(tmp_path, "copies:again")) == [
        ("capture", "made: captured from the model"),
        ("homes", "re-homed from stage 0 to stage 1"),
        ("copies", "made: a copy of %neg in graph body"),
        ("names", "renamed from %again"),
    ]


def test_a_move_to_another_graph(tmp_path: Path) -> None:
    full = "%c : f32[] = aten.full.default([], 2.0) {origin=full, phase=update}"
    head = "graphshard 1\nlevel sharded\n"
    prologue = 'graph prologue {{\n{0}\nreturn carry "c" %{1}\n}}'
    body = "graph body {{\n{0}\nreturn output 0 %{1}\n}}"
    first = body.format(full, "c")
    second = f"{prologue.format(full, 'c')}\n\n" + body.format('%r : f32[] = carry "c"', "r")
    for file, graphs in (("00-capture", first), ("01-lift", second)):
        (tmp_path / f"{file}.graph").write_text(f"{head}\n{graphs}\n")
    found = ancestry(tmp_path, "c")
    assert did(found)[1] == ("lift", "moved from graph body to prologue")
    assert found.section == "prologue"


def test_names_that_are_none_or_several(dump: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNode, match="no graph has node '%tanhh'; near it are %tanh"):
        ancestry(dump, "%tanhh")
    with pytest.raises(UnknownNode, match="no graph has node 'epilogue:tanh'"):
        ancestry(dump, "epilogue:tanh")
    with pytest.raises(AmbiguousNode, match="say body:first_weight or epilogue:first_weight"):
        ancestry(dump, "capture:first_weight")
    with pytest.raises(NotADump, match="expected a directory of graphs"):
        ancestry(tmp_path, "tanh")
    (tmp_path / "sources.json").write_text("[")
    (tmp_path / "00-capture.graph").write_text((dump / "00-capture.graph").read_text())
    with pytest.raises(NotADump, match=r"sources\.json: expected"):
        ancestry(tmp_path, "tanh")


def test_the_command_prints_it(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(dump), "tanh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("%tanh : f32[1,8] = aten.tanh.default(%transfer_default)")
    assert any(line.endswith(f"{HERE.name}:{line_of('h = torch.tanh(h)')}: h = torch.tanh(h)") for line in lines)
    assert main(["blame", str(dump), "tanh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["touches"][0]["did"] == "made: captured from the model"
    assert main(["blame", str(dump / "nothing"), "tanh"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class Chain(nn.Module):
    """Pointwise operations that are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h = h * h
        result: Tensor = torch.tanh(h)
        return result


def test_an_operation_that_was_fused_is_followed_into_its_region(tmp_path: Path) -> None:
    batch = (torch.randn(8, 4), torch.randn(8, 8))
    made = graphshard.compile(Chain(), "dp", loss_fn=F.mse_loss, example_inputs=batch, executor="none", world_size=2)
    made.dump(tmp_path)
    found = ancestry(tmp_path, "%mul")
    assert did(found)[-1] == ("fuse", "made part of region %fused_mul_tanh")
    assert "= region(" in found.text
    assert found.code == "h = h * h"
    assert [place.stage for place in found.places] == [0], "it runs where the region's kernel is called"
