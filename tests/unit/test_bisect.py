"""The pass that is responsible is found by running a growing prefix of the passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphshard
from graphshard.bisect import Seen
from graphshard.cli import main
from graphshard.errors import NotFinite, RoundsTooMuch
from graphshard.passes.bucket import BucketCollectives
from graphshard.passes.zero import Zero
from graphshard.pipeline import Context, Pass
from graphshard.program import Program
from graphshard.rewrite import after, call
from graphshard.runtime.local import LocalExecutor

aten = torch.ops.aten
NAMES = ["normalize", "pipeline-cut", "zero", "bucket", "hoist", "overlap", "fuse"]


class Logarithm(nn.Module):
    """Of what a ReLU cut to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.log(self.first(x).relu()))
        return result


def compiled(model: nn.Module | None = None, *passes: Pass, **given: Any) -> graphshard.Compiled:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    arguments: dict[str, Any] = {
        "plan": "zero3+pp2",
        "loss_fn": nn.functional.mse_loss,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        "example_inputs": BATCH,
        "executor": "none",
        "passes": passes,
    }
    return graphshard.compile(model, **(arguments | given))


class Huge(nn.Module):
    """Overflows float16 and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        big: Tensor = self.linear(x) * 1e6
        result: Tensor = big - big + self.linear(x)
        return result


@pytest.mark.parametrize("until", ["loss", "verify"])
def test_what_overflows_the_lower_precision_is_seen(until: Any) -> None:
    found = compiled(Huge(), plan="dp2+fp16", passes=())
    if until == "verify":
        with pytest.raises(RoundsTooMuch, match="in fp16, on random inputs, the loss of step 0 is nan instead of "):
            found.verify()
    else:
        last = list(found.bisect("loss", BATCH))[-1]
        assert last.name == "precision"
        assert re.match(r"in fp16 the loss of step 0 is nan instead of \d", last.wrong)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp16:init_scale=1e30"])
def test_what_rounds_as_it_should_is_not_blamed(precision: str) -> None:
    lines: list[str] = []
    found = compiled(plan=f"zero3+pp2+{precision}")
    found.verify(report=lines.append)
    kind = precision.partition(":")[0]
    assert any(re.fullmatch(rf"rounding +losses in {kind} within 0\.\d+ of those in float64", line) for line in lines)
    assert any(re.fullmatch(r"zero +the same within 1e-09, in float64: rounding aside", line) for line in lines)
    assert not any(seen.wrong for seen in found.bisect("loss", BATCH))


BATCH = (torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(8, 8))


def bad(inner: Pass, fault: Callable[[Program], None]) -> Pass:
    class Bad:
        name: ClassVar[str] = inner.name
        exact: ClassVar[bool] = False

        def run(self, program: Program, ctx: Context) -> Program:
            program = inner.run(program, ctx)
            fault(program)
            return program

    return Bad()


def doubled(program: Program) -> None:
    """The mean of the gradients is twice as large."""
    for node in program.epilogue.nodes():
        if node.target is aten.mul.Tensor and isinstance(node.args[1], float):
            node.args = (node.args[0], node.args[1] * 2)


def divided_by_zero(program: Program) -> None:
    tanh = next(n for n in program.body.nodes() if n.target is aten.tanh.default)
    readers = list(tanh.users)
    with after(tanh):
        quotient = call(program.body.graph, aten.div.Tensor, (tanh, 0.0), tanh.meta["info"])
    for reader in readers:
        reader.replace_input_with(tanh, quotient)


def wasteful(program: Program) -> None:
    """A large value that the end of the body keeps alive."""
    graph, last = program.body.graph, next(reversed(list(program.body.nodes())))
    with after(last):
        large = call(graph, aten.full.default, ([1000, 1000], 0.0), last.meta["info"], dtype=torch.float32)
    with after(large):
        call(graph, aten.sum.default, (large,), last.meta["info"])


def seen(of: graphshard.Compiled, until: Any, **given: Any) -> list[Seen]:
    return list(of.bisect(until, BATCH, **given))


def names(found: list[Seen]) -> list[str]:
    return [item.name for item in found]


def test_nobody_is_responsible() -> None:
    fine = compiled()
    for until, extra in (("loss", ["codegen"]), ("nan", ["codegen"]), ("memory", [])):
        found = seen(fine, until)
        assert names(found) == ["capture", *NAMES, *extra]
        assert not any(item.wrong for item in found)
    assert names(seen(fine, "verify")) == NAMES


def test_the_losses_are_those_of_training() -> None:
    losses = [item.what for item in seen(compiled(), "loss", steps=3)]
    trained = compiled(executor="local")
    expected = [trained.step(*BATCH).item() for _ in range(3)]
    assert losses[-1] == "loss " + ", ".join(f"{loss:.9g}" for loss in expected)
    assert len(set(losses[:-1])) == 1


@pytest.mark.parametrize(("inner", "name"), [(Zero(stage=3), "zero"), (BucketCollectives(), "bucket")])
def test_the_first_pass_that_changes_the_loss(inner: Pass, name: str) -> None:
    *before, last = seen(compiled(None, bad(inner, doubled)), "loss")
    assert names(before) == ["capture", *NAMES[: NAMES.index(name)]]
    assert (last.name, last.blamed) == (name, f"pass '{name}'")
    assert last.wrong.startswith("the loss of step 1 is")


def test_the_first_pass_that_makes_a_value_infinite() -> None:
    *before, last = seen(compiled(None, bad(Zero(stage=3), divided_by_zero)), "nan")
    assert names(before) == ["capture", "normalize", "pipeline-cut"]
    assert last.name == "zero"
    assert last.wrong == "first at %div_tensor = aten.div.Tensor of module 1"


def test_the_first_pass_that_takes_too_much_memory() -> None:
    faulty = compiled(None, bad(BucketCollectives(), wasteful))
    *before, last = seen(faulty, "memory")
    assert names(before) == ["capture", "normalize", "pipeline-cut", "zero"]
    assert last.name == "bucket"
    assert "takes 4.0 MB by estimate, more than" in last.wrong
    assert not any(item.wrong for item in seen(faulty, "memory", limit_gb=0.01))


def test_padding_is_not_too_much_memory() -> None:
    """Of parameters of an odd number of elements, replicated."""
    model = nn.Linear(301, 101)
    batch = (torch.randn(8, 301), torch.zeros(8, 101))
    odd = compiled(model, plan="dp2", example_inputs=batch)
    assert not any(item.wrong for item in odd.bisect("memory"))


def test_the_first_pass_that_a_check_fails() -> None:
    *before, last = seen(compiled(None, bad(Zero(stage=3), doubled)), "verify")
    assert names(before) == ["normalize", "pipeline-cut"]
    assert last.name == "zero"
    assert "differs by" in last.wrong


def test_a_model_that_is_wrong_by_itself() -> None:
    (loss,) = seen(compiled(Logarithm()), "loss")
    assert (loss.blamed, loss.wrong) == ("the model, before any pass", "the loss is not finite; see --until nan")
    (nan,) = seen(compiled(Logarithm()), "nan")
    assert (nan.what, nan.wrong) == ("loss of step 0 is not finite", "first at %log = aten.log.default")
    with pytest.raises(NotFinite, match=r"on random inputs the loss is \S+, so that nothing can be compared"):
        seen(compiled(Logarithm()), "verify")


def test_what_only_the_executor_does_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    step = LocalExecutor.step

    def wrong(self: LocalExecutor, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        assert result.loss is not None
        result.loss.add_(1.0)
        return result

    monkeypatch.setattr(LocalExecutor, "step", wrong)
    last = seen(compiled(), "loss")[-1]
    assert last.blamed == "code generation or the executor, after all passes"
    assert last.wrong.startswith("the loss of step 0 is")


FACTORY = """
from torch import nn, zeros, randn
from graphshard.passes.zero import Zero

class Skewed:
    name, exact = "zero", False

    def run(self, program, ctx):
        program = Zero(stage=3).run(program, ctx)
        for node in program.epilogue.nodes():
            if "mul" in str(node.target) and isinstance(node.args[1], float):
                node.args = (node.args[0], node.args[1] * 2)
        return program

def model():
    return {"model": nn.Linear(4, 4), "example_inputs": (randn(8, 4), zeros(8, 4)), "loss_fn": nn.functional.mse_loss}

def faulty():
    return model() | {"passes": [Skewed()]}
"""


@pytest.mark.parametrize("until", ["loss", "verify"])
def test_the_command_line(until: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bisected.py"
    file.write_text(FACTORY)
    assert main(["bisect", f"{file}:model", "--plan", "zero3:size=2", "--until", until]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("no pass is responsible: ")
    assert err == ""
    assert main(["bisect", f"{file}:faulty", "--plan", "zero3:size=2", "--until", until]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("zero ")
    assert err.startswith("graphshard bisect: pass 'zero': ")
