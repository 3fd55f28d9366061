"""The command line: what each command prints and writes, and that bad input is one line and exit status 2."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphshard
from graphshard import factory
from graphshard.arguments import CHECKS
from graphshard.cli import main
from graphshard.compile import compile as compile_model
from graphshard.errors import (
    BadFactoryResult,
    BadModelReference,
    GraphshardError,
    MissingFactory,
    ModelCodeFailed,
    WrongFactoryEntry,
)

KNOWN = inspect.signature(compile_model).parameters

MODEL = """
import functools
import torch
from torch import nn
import graphshard.rewrite

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    return model, (torch.randn(16, 8), torch.randn(16, 4)), nn.functional.mse_loss

def as_dict():
    model, example_inputs, loss_fn = make()
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    return {"model": model, "example_inputs": example_inputs, "loss_fn": loss_fn, "optimizer": sgd, "plan": "zero3"}

def unknown_key():
    return as_dict() | {"optimiser": None}

def no_inputs():
    return {"model": nn.Linear(2, 2)}

def only_model():
    return nn.Linear(2, 2)

def no_model():
    return 3, (torch.randn(2),)

def four():
    return 1, 2, 3, 4

def with_argument(width):
    return nn.Linear(width, width), (torch.randn(2, width),)

class Forgets:
    name, exact = "forgets", True

    def run(self, program, ctx):
        slots = program.epilogue.input_slots
        kept = {
            slot: slots[slot] if slot.role == "param" and slot.name == "0.bias" else node
            for slot, node in program.epilogue.outputs.items()
        }
        graphshard.rewrite.set_outputs(program.epilogue, kept)
        return program

def faulty():  # a bias is left out of the update
    return as_dict() | {"passes": [Forgets()]}

class Unreduced:
    name, exact = "unreduced", False
    after = "bucket"

    def run(self, program, ctx):
        all_reduce = torch.ops._c10d_functional.all_reduce.default
        for node in program.epilogue.graph.find_nodes(op="call_function", target=all_reduce):
            if node.meta["val"].dim():
                next(iter(node.users)).replace_all_uses_with(node.args[0])
        return program

def unreduced():
    return as_dict() | {"passes": [Unreduced()]}

def fails():
    raise KeyError("two\\nlines")

width = 8
"""

GRAPH = """graphshard 1
param "weight" : f32[4,8] group=0

graph prologue {
  %loss : f32[] = aten.full.default([], 0.0)
  %grad : f32[4,8] = aten.full.default([4, 8], 0.0)
  return carry "loss" %loss, carry "grad:weight" %grad
}

graph body {
  %w : f32[4,8] = param "weight"
  %x : f32[2,4] = batch 0
  %sum : f32[] = carry "loss"
  %grad : f32[4,8] = carry "grad:weight"
  %y : f32[2,8] = aten.mm.default(%x, %w)
  %l : f32[] = aten.sum.default(%y)
  %total : f32[] = aten.add.Tensor(%sum, %l)
  %dy : f32[2,8] = aten.full_like.default(%y, 1.0) {phase=backward}
  %xt : f32[4,2]{1,4} = aten.t.default(%x) {phase=backward}
  %dw : f32[4,8] = aten.mm.default(%xt, %dy) {phase=backward}
  %acc : f32[4,8] = aten.add.Tensor(%grad, %dw) {phase=backward}
  return carry "loss" %total, carry "grad:weight" %acc
}

graph epilogue {
  %sum : f32[] = carry "loss"
  %grad : f32[4,8] = carry "grad:weight"
  %w : f32[4,8] = param "weight"
  %step : f32[4,8] = aten.mul.Tensor(%grad, 0.5)
  %new : f32[4,8] = aten.sub.Tensor(%w, %step)
  return loss "loss" %sum, param "weight" %new
}
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Path of a file of factories."""
    path = tmp_path / "factories.py"
    path.write_text(MODEL)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must refuse ``argv``."""
    try:
        status = main(argv)
    except SystemExit as exit:
        status = int(str(exit.code))
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err[:-1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "graphshard: the following arguments are required: COMMAND"),
        ("dmp", "graphshard: argument COMMAND: invalid choice: 'dmp'"),
        ("dump x.py:f --output=", "argument -o/--output: expected a name, not ''; the current folder is '.'"),
        ("diff a b --html=", "argument --html: expected a name, not ''"),
        ("dump", "graphshard dump: the following arguments are required: -o/--output, MODEL"),
        ("explain x.py:f --world-size none", "expected an integer of at least 1, not 'none'"),
        ("explain x.py:f --world-size 0", "expected an integer of at least 1, not '0'"),
        ("explain x.py:f --device foo", "expected a device such as cpu, cuda or meta, not 'foo'"),
        ("run -n 0 x.py", "expected an integer of at least 1, not '0'"),
        ("run -n 2 missing.py", "graphshard: there is no file 'missing.py'; expected the training script"),
        ("explain x.py:f --plan zero3+ppp4", "plan 'zero3+ppp4', column 7: unknown token 'ppp4'; did you mean 'pp4'?"),
        (
            "explain missing.py:f --plan dp",
            "MODEL 'missing.py:f': there is no file 'missing.py'; expected file.py:",
        ),
        ("diff a.graph b.graph", "there is no file 'a.graph'"),
        ("diff a.graph", "'a.graph' is no directory that `graphshard dump` wrote; expected one, or a second graph"),
        (
            "opt a.graph --passes zero --mesh dp=2pp=2",
            "expected axes in the order pp, dp, shard, tp, such",
        ),
        ("opt a.graph --passes zero --mesh dp=2 --world-size 2", "not allowed with argument"),
        ("opt a.graph --passes zreo", "unknown pass 'zreo'; did you mean 'zero'?"),
        ("opt a.graph --passes zero:stag=3", "pass 'zero' does not take 'stag=3'; expected options: stage"),
        ("opt . --passes zero", "graphshard: .: is a folder; expected a graph, such as 00-capture.graph of a dump"),
        ("opt a.graph --passes zero:stage=3", "there is no file 'a.graph'; expected a graph"),
    ],
)
def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], argv: str, says: str) -> None:
    assert says in refused(capsys, *argv.split())


def test_the_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"graphshard {graphshard.__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("mak", MissingFactory, "there is no function 'mak'; did you mean 'make'?"),
        ("width", MissingFactory, "there is no function 'width'"),
        ("two words", BadModelReference, "no factory is named; expected file.py:factory or package.module:factory"),
        ("", BadModelReference, "no factory is named"),
        ("fails", ModelCodeFailed, "fails() raised KeyError: 'two\\nlines' ("),
        ("with_argument", BadFactoryResult, "with_argument() cannot be called: missing a required argument: 'width'"),
        ("unknown_key", BadFactoryResult, "unknown_key() returned a dict with 'optimiser', no argument of compile"),
        ("no_inputs", BadFactoryResult, "no_inputs() returned no example_inputs"),
        ("only_model", BadFactoryResult, "only_model() returned a Linear; expected a function without"),
        ("no_model", WrongFactoryEntry, "no_model() returned 3 as model; expected a torch.nn.Module"),
        ("four", BadFactoryResult, "four() returned a tuple of 4"),
    ],
)
def test_a_wrong_factory_is_named(model: str, name: str, error: type[GraphshardError], says: str) -> None:
    with pytest.raises(error) as caught:
        factory.load(f"{model}:{name}", KNOWN)
    assert str(caught.value).startswith(f"MODEL '{model}:{name}': ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("'plan': 3", "returned 3 as plan; expected a plan string such as 'zero3+pp4', or a Plan"),
        ("'plan': None", "returned a NoneType as plan; expected a plan string"),
        ("'loss_fn': 'mse'", "returned 'mse' as loss_fn; expected a function"),
        ("'optimizer': 'adam'", "returned 'adam' as optimizer; expected a torch.optim.Optimizer over model"),
        ("'world_size': '4'", "returned '4' as world_size; expected an integer of at least 1"),
        ("'world_size': 0", "returned 0 as world_size; expected an integer of at least 1"),
        ("'device': 'gpu'", "returned 'gpu' as device; expected a torch.device, its name such as 'cuda:0', or None"),
        ("'max_grad_norm': '1'", "returned '1' as max_grad_norm; expected a number, such as 1.0, or None"),
        ("'passes': nn.Linear(2, 2)", "returned a Linear as passes; expected a list of passes"),
        ("'passes': [Forgets]", "returned a type as passes[0]; expected a pass, which has a name"),
        ("'passes': ['zero']", "returned 'zero' as passes[0]; expected a pass, which has a name"),
        ("'debug_nan': 'yes'", "returned 'yes' as debug_nan; expected True or False"),
        ("'timeout_s': None", "returned a NoneType as timeout_s; expected a finite number of seconds above 0"),
        ("'timeout_s': float('inf')", "returned inf as timeout_s; expected a finite number of seconds above 0"),
        ("'seed': 0.5", "returned 0.5 as seed; expected an integer"),
        ("'dump_dir': 3", "returned 3 as dump_dir; expected a folder"),
        ("'cache': 3", "returned 3 as cache; expected True, False or a folder"),
    ],
)
def test_a_wrong_entry_of_the_dict_is_one_line(
    capsys: pytest.CaptureFixture[str], model: str, entry: str, says: str
) -> None:
    Path(model).write_text(f"{MODEL}\ndef wrong():\n    return as_dict() | {{{entry}}}\n")
    assert says in refused(capsys, "explain", f"{model}:wrong")


def test_entries_that_are_as_without_them(model: str) -> None:
    none = ["loss_fn", "optimizer", "world_size", "device", "max_grad_norm", "passes", "dump_dir", "init", "cache"]
    Path(model).write_text(f"{MODEL}\ndef empty():\n    return as_dict() | dict.fromkeys({none!r})\n")
    assert factory.load(f"{model}:empty", KNOWN)["device"] is None


def test_what_compile_takes_a_factory_may_return(model: str) -> None:
    entries = "{'max_grad_norm': 0, 'seed': torch.tensor(3), 'timeout_s': torch.tensor(5.0), 'cache': None}"
    Path(model).write_text(f"{MODEL}\ndef given():\n    return as_dict() | {entries}\n")
    given = factory.load(f"{model}:given", KNOWN)
    assert (given["max_grad_norm"], given["seed"].item(), given["cache"]) == (0, 3, None)


def test_each_argument_of_compile_is_checked() -> None:
    assert CHECKS.keys() == set(KNOWN) - {"example_inputs"}


def test_of_many_functions_eight_are_told(model: str) -> None:
    Path(model).write_text("\n".join(f"def {name}(): pass" for name in ("_private", *(f"f{i}" for i in range(9)))))
    with pytest.raises(MissingFactory, match=r"it defines f0, f1, f2, f3, f4, f5, f6, f7, \.\.\.$"):
        factory.load(f"{model}:zzz", KNOWN)


def test_what_the_users_code_raises_is_told_with_its_line(model: str) -> None:
    with pytest.raises(ModelCodeFailed) as caught:
        factory.load(f"{model}:fails", KNOWN)
    line = MODEL.splitlines().index('    raise KeyError("two\\nlines")') + 1
    assert str(caught.value).endswith(f"({model}:{line})")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nowhere_at_all", "raised ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def make(:", "raised SyntaxError"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
    ],
)
def test_a_module_that_does_not_import(tmp_path: Path, source: str, says: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ModelCodeFailed) as caught:
        factory.load(f"{path}:make", KNOWN)
    assert says in str(caught.value)
    assert str(caught.value).endswith(f"({path}:1)")


@pytest.mark.parametrize("name", ["nowhere_at_all:make", "nowhere.at.all:make", "torch.nowhere:make"])
def test_a_module_that_is_not_there(name: str) -> None:
    with pytest.raises(BadModelReference, match="there is no module"):
        factory.load(name, KNOWN)


def test_a_module_of_the_working_directory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(model).parent)
    arguments = factory.load("factories:make", KNOWN)
    assert list(arguments) == ["optimizer", "model", "example_inputs", "loss_fn"]


def test_adamw_is_assumed_unless_the_dict_says_otherwise(model: str) -> None:
    assert factory.load(f"{model}:make", KNOWN)["optimizer"].func.__name__ == "AdamW"
    assert factory.load(f"{model}:as_dict", KNOWN)["optimizer"].func.__name__ == "SGD"


def test_the_factory_can_run_without_storage(model: str) -> None:
    arguments = factory.load(f"{model}:make", KNOWN, meta=True)
    assert {p.device.type for p in arguments["model"].parameters()} == {"meta"}


def test_dump_writes_every_pass_and_diff_reads_them(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    out = tmp_path / "dump"
    assert main(["dump", f"{model}:make", "--plan", "zero3+pp2", "--world-size", "4", "-o", str(out)]) == 0
    graphs = sorted(path.name for path in out.glob("*.graph"))
    assert graphs[0] == "00-capture.graph"
    assert any(name.endswith("-zero.graph") for name in graphs)
    assert (out / "plan.txt").is_file()
    capsys.readouterr()

    assert main(["diff", str(out), "zero"]) == 0
    of_pass = capsys.readouterr().out
    index = next(i for i, name in enumerate(graphs) if name.endswith("-zero.graph"))
    assert main(["diff", str(out / graphs[index - 1]), str(out / graphs[index])]) == 0
    assert capsys.readouterr().out == of_pass
    assert "all_gather_into_tensor" in of_pass

    said = refused(capsys, "diff", str(out), "zreo")
    assert "did you mean 'zero'?" in said

    assert main(["diff", str(out), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert [step["pass"] for step in whole["steps"]] == [name[3:-6] for name in graphs[1:]]
    blamed = {name for change in whole["changes"] for name in change["by"]}
    assert {"normalize", "pipeline-cut", "zero", "bucket"} <= blamed
    assert not [change for change in whole["changes"] if not change["by"]]


@pytest.fixture
def graph(tmp_path: Path) -> str:
    """Path of a captured training program of one parameter."""
    path = tmp_path / "captured.graph"
    path.write_text(GRAPH)
    return str(path)


def test_opt_runs_passes_over_text(capsys: pytest.CaptureFixture[str], graph: str, tmp_path: Path) -> None:
    assert main(["opt", graph, "--passes", "zero:stage=3", "--world-size", "4"]) == 0
    text = capsys.readouterr().out
    assert 'all_gather_into_tensor.default(%weight, 4, "dp")' in text
    again = tmp_path / "again.graph"
    again.write_text(text)
    assert main(["opt", str(again), "--passes", ""]) == 0
    assert capsys.readouterr().out == text
    for mesh in ("--world-size 2", "--mesh pp=4"):
        said = refused(capsys, "opt", str(again), "--passes", "", *mesh.split())
        assert "it is sharded already, for dp=4" in said


def test_opt_on_what_dump_wrote(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    """As README has it."""
    assert main(["dump", f"{model}:make", "--plan", "zero3", "--world-size", "2", "-o", str(tmp_path / "dump")]) == 0
    captured = str(tmp_path / "dump" / "00-capture.graph")
    assert main(["opt", captured, "--passes", "normalize;zero:stage=3;bucket"]) == 0
    capsys.readouterr()
    assert "; run normalize before zero, which makes" in refused(capsys, "opt", captured, "--passes", "zero:stage=3")


def test_opt_takes_a_mesh(capsys: pytest.CaptureFixture[str], graph: str) -> None:
    passes = "pipeline-cut;zero:stage=3"
    assert main(["opt", graph, "--passes", passes, "--mesh", "pp=1 dp=2 shard=3"]) == 0
    text = capsys.readouterr().out
    assert "mesh dp=2 shard=3\n" in text
    assert 'all_gather_into_tensor.default(%weight, 3, "shard")' in text


def test_diff_of_two_graphs(capsys: pytest.CaptureFixture[str], graph: str, tmp_path: Path) -> None:
    other = tmp_path / "other.graph"
    other.write_text(GRAPH.replace("aten.mul.Tensor(%grad, 0.5)", "aten.mul.Tensor(%grad, 0.25)"))
    assert main(["diff", graph, graph]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", graph, str(other)]) == 0
    assert "other: 0.5 -> 0.25" in capsys.readouterr().out


def test_diff_writes_a_page(capsys: pytest.CaptureFixture[str], graph: str, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    assert main(["diff", graph, graph, "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert main(["diff", graph, graph, "--html", str(page), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["changes"] == []
    assert captured.err == f"wrote {page}\n"


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (".", ".: is a folder; expected the name of a file"),
        ("nowhere/diff.html", "nowhere/diff.html: there is no folder 'nowhere' to write it to"),
        ("captured.graph/diff.html", "captured.graph/diff.html: there is no folder 'captured.graph' to write it to"),
    ],
)
def test_a_page_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, graph: str, page: str, says: str
) -> None:
    monkeypatch.chdir(Path(graph).parent)
    assert refused(capsys, "diff", graph, graph, "--html", page) == f"graphshard: {says}"


def test_diff_is_in_columns_on_a_wide_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, graph: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.graph"
    other.write_text(GRAPH.replace("aten.mul.Tensor(%grad, 0.5)", "aten.mul.Tensor(%grad, 0.25)"))
    printed = {}
    for columns, terminal in (("200", "1"), ("90", "1"), ("200", "0")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("TTY_COMPATIBLE", terminal)
        assert main(["diff", graph, str(other)]) == 0
        printed[columns, terminal] = capsys.readouterr().out
    both = [any(line.count("aten.mul.Tensor") == 2 for line in text.splitlines()) for text in printed.values()]
    assert both == [True, False, False]
    assert ["\x1b[" in text for text in printed.values()] == [True, True, False]


def test_opt_refuses_edited_text_with_its_line(capsys: pytest.CaptureFixture[str], graph: str) -> None:
    Path(graph).write_text(GRAPH.replace("aten.sum.default", "aten.smu.default"))
    line = next(i for i, text in enumerate(GRAPH.splitlines(), 1) if "aten.sum.default" in text)
    assert main(["opt", graph, "--passes", "normalize"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"graphshard: {graph}:{line}:")


def test_explain_prints_a_page_or_json(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["explain", f"{model}:make", "--plan", "zero3+pp2", "--world-size", "4"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("plan zero3+pp2: pp=2 dp=2, 4 micro-batches per step and")
    assert re.search(r"stage 0: \d+\.\d kFLOP a step, sends dp", page)
    assert page[-1] == "\n" != page[-2]
    assert main(["explain", f"{model}:make", "--plan", "zero3+pp2", "--world-size", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["ranks"]) == 4
    assert report["plan"] == "zero3+pp2"


def test_the_plan_of_the_dict_serves_when_none_is_given(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["explain", f"{model}:as_dict", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "zero3"


def test_a_misfit_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    out = tmp_path / "dump"
    said = refused(capsys, "dump", f"{model}:make", "--plan", "zero3+pp2", "--world-size", "3", "-o", str(out))
    assert "plan 'zero3+pp2' does not fit 3 ranks" in said
    assert not out.exists()


def test_traceback_shows_where_an_error_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "missing.py:f", "--plan", "dp", "--traceback"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2", "zero2+pp2:schedule=zb-h1", "dp2+zero3:size=2"])
def test_verify_checks_every_pass_and_the_plan(capsys: pytest.CaptureFixture[str], model: str, plan: str) -> None:
    assert main(["verify", f"{model}:make", "--plan", plan]) == 0
    *lines, proved = capsys.readouterr().out.splitlines()
    passes, evaluation, graphs = lines[:7], lines[7], lines[8:]
    assert evaluation == "evaluation       the same after every pass"
    names = ["normalize", "pipeline-cut", "zero", "bucket", "hoist", "overlap", "fuse"]
    assert [line.split()[0] for line in passes] == names
    assert "graphs           every gradient is reduced exactly once" in graphs
    assert all(line.startswith("graphs  ") for line in graphs)
    assert re.fullmatch(r"plan +proved: \d+ instructions on .*dp=2.*", proved)


def test_verify_names_the_pass_that_is_wrong(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["verify", f"{model}:faulty"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == ["normalize        the same to the bit"]
    assert err.startswith("graphshard verify: pass 'forgets' does not keep the program's meaning: ")
    assert "differs by" in err and len(err.splitlines()) == 1


def test_verify_fails_for_a_pass_that_breaks_a_rule(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["verify", f"{model}:unreduced", "--plan", "dp2"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"graphshard verify: illegal program: the gradient of .* is reduced never over dp, .*'unreduced'.*\n", err
    )


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_is_a_number_above_zero(capsys: pytest.CaptureFixture[str], model: str, limit: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["verify", f"{model}:make", f"--limit-gb={limit}"])
    assert raised.value.code == 2
    assert f"expected a number of gigabytes above 0, not '{limit}'" in capsys.readouterr().err


def test_a_reader_that_has_enough(model: str) -> None:
    """As ``| head`` does."""
    command = [sys.executable, "-m", "graphshard", "explain", f"{model}:make", "--plan", "dp2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_verify_says_what_is_too_large(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["verify", f"{model}:make", "--plan", "dp2", "--limit-gb", "1e-6", "--full-size"]) == 2
    assert re.search(r"takes \d+\.\d kB where the limit is 1\.0 kB; build a smaller model of", capsys.readouterr().err)
