"""A plan directory trains as what was compiled does, without compiling; and is refused where it does not fit."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard import dump_folder
from graphshard.diff.ancestry import ancestry
from graphshard.diff.files import dumped
from graphshard.errors import (
    NeedsCompiling,
    NotAPlanDirectory,
    NotInPlanDirectory,
    NoValue,
    PassFailed,
    PlanDirectoryChanged,
    PlanDirectoryMisfit,
    UnfinishedDump,
    UntrustedCode,
)
from graphshard.pipeline import Context
from graphshard.program import Program
from graphshard.saved import directory as plan_directory
from marks import full
from numerics.cases import OPTIMIZERS, maker
from numerics.reference import rolled
from uncompiled import refuse_compiling

adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
Compiled = graphshard.Compiled


def equal(ours: Any, theirs: Any) -> bool:
    """Whether nested values are the same, tensors bit for bit."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(theirs, Tensor) else bool(ours == theirs)


def trained(compiled: graphshard.Executable, batch: Any, steps: int = 3) -> Any:
    """Everything that training gives: losses, evaluation, values, state."""
    losses = []
    for index in range(steps):
        args, kwargs = rolled(batch, index)
        losses.append(compiled.step(*args, **kwargs))
    return {
        "losses": losses,
        "evaluated": compiled.evaluate(*batch[0], **batch[1]),
        "values": compiled.state_dict(),
        "state": compiled.optimizer.state_dict(),
    }


@pytest.mark.parametrize(
    ("name", "plan", "optimizer"),
    [
        full("gpt", "zero3+pp2", "adamw"),
        ("mlp", "zero3+pp2", "sgd"),
        ("mlp", "pp2:schedule=zb-h1,microbatches=3", "sgd"),
        ("convnet", "dp2", "adamw"),
        ("mlp", "zero1+pp2+fp16:init_scale=1024", "adamw"),
        full("mlp", "zero3:size=2+recompute:policy=full+accum2", "sgd"),
        ("mlp", f"zero3+offload:optimizer=nvme,params=cpu,path={tempfile.gettempdir()}", "adamw"),
        ("mlp", "zero1:size=2", "adagrad"),
    ],
)
def test_training_is_the_same_bit_for_bit(
    name: str, plan: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args, kwargs, loss_fn = maker(name, plan)()
    twin, values = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    made = OPTIMIZERS[optimizer]
    compiled = graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=made(model), max_grad_norm=1.0, seed=3, executor="local"
    )
    compiled.trace(*args, **kwargs)
    compiled.evaluate(*args, **kwargs)
    compiled.dump(tmp_path)
    expected = trained(compiled, (args, kwargs))
    refuse_compiling(monkeypatch)
    with_model = graphshard.load(tmp_path, twin, optimizer=made(twin), trust_code=True, executor="local")
    assert equal(trained(with_model, (args, kwargs)), expected)
    without = graphshard.load(tmp_path, trust_code=True, executor="local")
    without.load_state_dict(values)
    assert equal(trained(without, (args, kwargs)), expected)


@pytest.fixture(scope="module")
def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


BATCH = (torch.linspace(-1, 1, 32).view(8, 4), torch.linspace(1, -1, 24).view(8, 3))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, two_layers: nn.Module) -> Path:
    """A directory with training and a call, but no evaluation."""
    folder = tmp_path_factory.mktemp("plan")
    compiled = compiled_of(two_layers)
    compiled(BATCH[0])
    compiled.dump(folder)
    return folder


def compiled_of(model: nn.Module, **more: Any) -> Compiled:
    arguments: dict[str, Any] = {
        "loss_fn": F.mse_loss,
        "optimizer": adamw,
        "executor": "local",
        "example_inputs": BATCH,
    }
    return graphshard.compile(copy.deepcopy(model), "zero3+pp2:microbatches=2", **(arguments | more))


def loaded(folder: Path, model: nn.Module | None = None, **more: Any) -> graphshard.Loaded:
    arguments: dict[str, Any] = {"trust_code": True, "executor": "local"}
    return graphshard.load(folder, copy.deepcopy(model), **(arguments | more))


@pytest.fixture
def changed(written: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(written, tmp_path / "copy")


# What a loaded model does


def test_a_call_gives_the_output(written: Path, two_layers: nn.Module) -> None:
    assert torch.equal(loaded(written, two_layers)(BATCH[0]), compiled_of(two_layers)(BATCH[0]))


def test_hooks_on_gradients_are_those_that_the_plan_has(two_layers: nn.Module, tmp_path: Path) -> None:
    def model(hooked: bool) -> nn.Module:
        made = copy.deepcopy(two_layers)
        if hooked:
            next(made.parameters()).register_hook(torch.zeros_like)
        return made

    options: dict[str, Any] = {"loss_fn": F.mse_loss, "optimizer": adamw, "executor": "local"}
    for hooked in (True, False):
        compiled = graphshard.compile(model(hooked), "zero3+pp2:microbatches=2", **options)
        loss, folder = compiled.step(*BATCH), tmp_path / str(hooked)
        compiled.dump(folder)
        given: Any = {"optimizer": adamw, "trust_code": True, "executor": "local"}
        with pytest.raises(NotInPlanDirectory, match="a hook on the gradient of"):
            graphshard.load(folder, model(not hooked), **given).step(*BATCH)
        empty = graphshard.load(folder, **given)
        empty.load_state_dict(two_layers.state_dict())
        assert equal(empty.step(*BATCH), loss)
        assert equal(empty.state_dict(), compiled.state_dict())


def test_evaluation_is_what_was_compiled_for_the_training_that_there_is(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

    options: dict[str, Any] = {"loss_fn": nn.functional.mse_loss, "optimizer": adamw, "executor": "local"}
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    model = make().eval()
    compiled = graphshard.compile(model, "dp2", **options)
    compiled.evaluate(x, y)  # of a training that leaves statistics as they are
    model.train()
    compiled.step(x * torch.arange(8)[:, None], y)
    evaluated, output = compiled.evaluate(x, y), compiled(x)
    compiled.dump(tmp_path)
    other = graphshard.load(tmp_path, make(), optimizer=adamw, trust_code=True, executor="local")
    other.step(x * torch.arange(8)[:, None], y)
    assert torch.equal(other.evaluate(x, y), evaluated)
    assert torch.equal(other(x), output)


def test_state_goes_from_one_to_the_other(written: Path, two_layers: nn.Module) -> None:
    first = loaded(written, two_layers)
    first.step(*BATCH)
    second = compiled_of(two_layers)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert equal(first.step(*BATCH), second.step(*BATCH))
    assert equal(first.state_dict(), second.state_dict())
    assert list(first.state_dict()) == list(two_layers.state_dict())


def test_a_scheduler_drives_it(written: Path, two_layers: nn.Module) -> None:
    def run(compiled: graphshard.Executable) -> Any:
        schedule = torch.optim.lr_scheduler.StepLR(compiled.optimizer, 1, gamma=0.1)
        for _ in range(3):
            compiled.step(*BATCH)
            schedule.step()
        return compiled.state_dict(), compiled.optimizer.lrs()

    ours, theirs = run(loaded(written, two_layers)), run(compiled_of(two_layers))
    assert equal(ours, theirs)
    assert ours[1] == pytest.approx([1e-5])


def test_the_learning_rate_is_the_callers(written: Path, two_layers: nn.Module) -> None:
    ours = loaded(written, two_layers, optimizer=functools.partial(torch.optim.AdamW, lr=0.5))
    theirs = compiled_of(two_layers, optimizer=functools.partial(torch.optim.AdamW, lr=0.5))
    assert equal([ours.step(*BATCH), ours.state_dict()], [theirs.step(*BATCH), theirs.state_dict()])


def test_without_a_model_values_are_asked_for(written: Path, two_layers: nn.Module) -> None:
    compiled = loaded(written)
    with pytest.raises(NoValue):
        compiled.step(*BATCH)
    initialised = loaded(written, init=lambda module: module.load_state_dict(two_layers.state_dict()))
    assert equal(initialised.step(*BATCH), compiled_of(two_layers).step(*BATCH))


class Tied(nn.Module):
    """Tied weights, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.arange(4.0), persistent=False)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x))) * self.scale + self.shift
        return out


def test_tied_weights_and_unsaved_buffers_need_no_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Tied(), (torch.randn(8, 4), torch.randn(8, 4))
    values = copy.deepcopy(model.state_dict())
    compiled = compiled_of(model, example_inputs=batch)
    compiled.dump(tmp_path)
    without = loaded(tmp_path)
    without.load_state_dict(values)
    assert equal([without.step(*batch), without.state_dict()], [compiled.step(*batch), compiled.state_dict()])
    assert list(without.state_dict()) == list(values)


def test_accounts_are_the_same(written: Path, two_layers: nn.Module) -> None:
    ours, theirs = loaded(written).report(), compiled_of(two_layers, executor="none").report()
    for account in (ours, theirs):
        account.pop("passes"), account.pop("machine")
    assert ours == theirs
    assert "stage 1" in loaded(written, executor="none").explain()


def test_what_takes_the_passes_is_refused(written: Path, tmp_path: Path) -> None:
    calls: list[Callable[[graphshard.Loaded], object]] = [
        lambda c: c.dump(tmp_path),
        lambda c: c.verify(),
        lambda c: c.bisect("loss"),
    ]
    for call in calls:
        with pytest.raises(NeedsCompiling, match="cannot dump, verify or bisect"):
            call(loaded(written))


def test_inputs_without_a_plan_are_told_with_those_that_have_one(written: Path, two_layers: nn.Module) -> None:
    compiled = loaded(written, two_layers)
    with pytest.raises(NotInPlanDirectory) as caught:
        compiled.step(BATCH[0].repeat(2, 1), BATCH[1].repeat(2, 1))
    assert "no plan for a training step on micro-batches of float32[4,4], float32[4,3]; it has" in str(caught.value)
    assert "a training step on micro-batches of float32[2,4], float32[2,3]" in str(caught.value)
    with pytest.raises(NotInPlanDirectory, match=r"no plan for evaluation on micro-batches of float32\[2,4\]"):
        compiled.evaluate(*BATCH)
    compiled.step(*BATCH)


def test_a_changed_option_is_told(written: Path, two_layers: nn.Module) -> None:
    compiled = loaded(written, two_layers)
    compiled.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(NotInPlanDirectory, match=r"weight_decay of the optimizer's group 0 = 0\.5 instead of 0\.01"):
        compiled.step(*BATCH)
    compiled.optimizer.param_groups[0]["weight_decay"] = 0.01
    compiled.model.eval()
    with pytest.raises(NotInPlanDirectory, match=r"model\.training = False instead of True"):
        compiled.step(*BATCH)


def test_a_changed_flag_of_a_part_of_the_model_is_told(written: Path, two_layers: nn.Module) -> None:
    compiled = loaded(written, two_layers)
    compiled.model[1].eval()  # type: ignore[index]
    with pytest.raises(NotInPlanDirectory, match=r"with 1\.training = False instead of True"):
        compiled.step(*BATCH)
    compiled.model.train()
    compiled.model[0].bias.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(NotInPlanDirectory, match=r"with 0\.bias\.requires_grad = False instead of True"):
        compiled.step(*BATCH)
    compiled.model.requires_grad_()
    compiled.step(*BATCH)


def test_flags_are_as_when_it_was_compiled(tmp_path: Path, two_layers: nn.Module) -> None:
    model = copy.deepcopy(two_layers)
    model[0].requires_grad_(False)  # type: ignore[index]
    model[1].eval()  # type: ignore[index]
    compiled = compiled_of(model)
    compiled.model.train()
    compiled.dump(tmp_path)
    given = copy.deepcopy(two_layers)
    given[0].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(NotInPlanDirectory, match=r"with 1\.training = True instead of False"):
        loaded(tmp_path, given).step(*BATCH)
    without_model = loaded(tmp_path)
    without_model.load_state_dict(two_layers.state_dict())
    assert not without_model.model.get_submodule("1").training
    compiled.model[1].eval()  # type: ignore[index]
    assert torch.equal(without_model.step(*BATCH), compiled.step(*BATCH))


def test_a_dump_has_what_was_compiled_for_all_options_and_shapes(tmp_path: Path, two_layers: nn.Module) -> None:
    compiled = compiled_of(two_layers, dump_dir=tmp_path)
    larger = tuple(t.repeat(2, 1) for t in BATCH)
    compiled.step(*larger)
    compiled.optimizer.param_groups[0]["weight_decay"] = 0.5
    compiled.step(*BATCH)
    again = loaded(tmp_path, two_layers)
    again.step(*larger)
    again.optimizer.param_groups[0]["weight_decay"] = 0.5
    again.step(*BATCH)
    assert equal(again.state_dict(), compiled.state_dict())


# What is refused


def test_code_is_run_only_when_trusted(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_directory, "read", None)
    with pytest.raises(UntrustedCode) as caught:
        graphshard.load(written)
    assert "stage0.py, stage1.py" in str(caught.value) and "trust_code=True" in str(caught.value)


@pytest.mark.parametrize("file", ["stage1.py", "kernels.py", "plan.json", "call-1/stage0.py", "manifest.json"])
def test_a_changed_file_is_named(changed: Path, file: str) -> None:
    path = changed / file
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1') if file == "manifest.json" else text + "\n")
    with pytest.raises(PlanDirectoryChanged, match=file):
        loaded(changed)


def test_a_missing_file_is_named(changed: Path) -> None:
    (changed / "stage0.py").unlink()
    with pytest.raises(NotAPlanDirectory, match=r"its stage0\.py is missing"):
        loaded(changed)


@pytest.mark.parametrize("file", ["stage0.py", "manifest.json"])
def test_a_file_that_cannot_be_read_is_named(changed: Path, file: str) -> None:
    (changed / file).unlink()
    (changed / file).symlink_to(changed / file)
    with pytest.raises(NotAPlanDirectory, match=rf"its {file} cannot be read \(Too many levels"):
        loaded(changed)


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"format": 0}', '{"format": 1, "torch": "2'])
def test_a_manifest_that_is_none_is_told(changed: Path, content: str) -> None:
    (changed / "manifest.json").write_text(content)
    with pytest.raises(NotAPlanDirectory, match=r"its manifest\.json is (not whole|none of format 2)"):
        loaded(changed)


def test_no_directory_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(NotAPlanDirectory, match=r"it has no manifest\.json"):
            loaded(path)


@pytest.mark.parametrize("name", ["torch", "graphshard"])
def test_another_version_is_told(changed: Path, name: str) -> None:
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps(manifest | {name: "1.5.0", "unknown": 0}))
    with pytest.raises(PlanDirectoryMisfit, match=rf"compiled for {name} 1\.5\.\* \(it was written by 1\.5\.0\)"):
        loaded(changed)


def test_another_patch_of_a_version_is_fine(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", ".".join([*torch.__version__.split(".")[:2], "99+other"]))
    loaded(written)


def test_another_number_of_ranks_is_told(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(PlanDirectoryMisfit, match=r"compiled for 4 ranks \(pp=2 dp=2\); given 3 ranks"):
        loaded(written, executor="distributed")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.SGD, r"compiled for torch\.optim\.adamw\.AdamW; given torch\.optim\.sgd\.SGD"),
        (
            functools.partial(adamw, betas=(0.9, 0.9)),
            r"betas of the .* group 0 = \(0\.9, 0\.999\); given \(0\.9, 0\.9\)",
        ),
        (lambda p: adamw([{"params": [q]} for q in p]), "compiled for 1 parameter groups; given 4"),
        (lambda p: adamw(list(p)[::-1]), r"compiled for '0\.weight' in the optimizer's group 0; given '2\.bias'"),
        (lambda p: adamw(list(p)[:-1]), r"compiled for '2\.bias' in the optimizer's group 0; given 'nothing more'"),
    ],
)
def test_another_optimizer_is_told(written: Path, optimizer: Callable[..., Any], message: str) -> None:
    with pytest.raises(PlanDirectoryMisfit, match=message):
        loaded(written, optimizer=optimizer)


class Own(torch.optim.AdamW):
    """No class of torch's."""


def test_an_optimizer_that_is_not_torchs_has_to_be_given(tmp_path: Path, two_layers: nn.Module) -> None:
    compiled_of(two_layers, optimizer=Own).dump(tmp_path)
    with pytest.raises(PlanDirectoryMisfit, match=r"compiled for .*Own; given none"):
        loaded(tmp_path)
    loaded(tmp_path, two_layers, optimizer=Own).step(*BATCH)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)), r"'0\.weight' is float32\[9,4\].* float32\[8,4\]"),
        (nn.Sequential(nn.Linear(4, 8)), r"'2\.weight' is absent"),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), r"'1\.weight' is .* the plan's is absent"),
    ],
)
def test_another_model_is_told(written: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(
        PlanDirectoryMisfit, match=f"compiled for a Sequential; given a model that differs: .*{message}"
    ):
        loaded(written, model)


def test_a_dump_that_ends_early_leaves_nothing_to_load(
    changed: Path, two_layers: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an earlier one too: its manifest goes first."""

    def full(path: Path, data: str | bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    compiled = compiled_of(two_layers)
    monkeypatch.setattr(plan_directory, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        compiled.dump(changed)
    with pytest.raises(NotAPlanDirectory, match=r"it has no manifest\.json"):
        loaded(changed)


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("by_argument", [True, False])
def test_a_dump_leaves_nothing_of_the_one_before_it(
    finished: bool, by_argument: bool, tmp_path: Path, two_layers: nn.Module
) -> None:
    first = graphshard.compile(
        two_layers, "zero3+pp2+bf16+recompute:policy=full", loss_fn=F.mse_loss, optimizer=adamw, executor="local"
    )
    first.trace(*BATCH)
    first.evaluate(*BATCH)
    first(BATCH[0])
    first.dump(tmp_path / "both")
    assert {"evaluate-1", "call-2", "stage1.py", "10-fuse.graph"} < listed(tmp_path / "both")
    if not finished:
        (tmp_path / "both" / dump_folder.MANIFEST).unlink()
        dump_folder.mark(tmp_path / "both")
    mine = {"notes.txt", "stage_of_mine.py", "call-2", "call-2/notes.txt", "10-fuse.txt", "train-1"}
    (tmp_path / "both" / "train-1").mkdir()
    for name in mine - {"call-2", "train-1"}:
        (tmp_path / "both" / name).write_text("mine")

    for name in ("alone", "both"):
        given: dict[str, Any] = {"dump_dir": tmp_path / name} if by_argument else {}
        second = graphshard.compile(
            two_layers, "dp", loss_fn=F.mse_loss, optimizer=adamw, executor="none", example_inputs=BATCH, **given
        )
        if not by_argument:
            second.dump(tmp_path / name)
    assert listed(tmp_path / "both") == listed(tmp_path / "alone") | mine


def test_a_dump_into_a_folder_of_something_else_removes_nothing(tmp_path: Path, two_layers: nn.Module) -> None:
    kept = {"stage7.py", "constants.safetensors", "evaluate-1", "evaluate-1/plan.txt"}
    (tmp_path / "evaluate-1").mkdir()
    for name in kept - {"evaluate-1"}:
        (tmp_path / name).write_text("mine")
    compiled_of(two_layers).dump(tmp_path)
    assert kept < listed(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in kept - {"evaluate-1"})


class Failing:
    name, exact, after = "failing", True, "zero"

    def run(self, program: Program, ctx: Context) -> Program:
        raise ValueError("no")


def test_a_dump_that_fails_does_not_look_whole(
    tmp_path: Path, two_layers: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_of(two_layers).dump(tmp_path)
    with pytest.raises(PassFailed):
        compiled_of(two_layers, dump_dir=tmp_path, passes=[Failing()])
    assert not listed(tmp_path) & {"manifest.json", "stage0.py", "memory.svg", "04-bucket.graph"}
    for span in ("", "normalize.."):
        with pytest.raises(UnfinishedDump, match="it holds capture, normalize, pipeline-cut, zero; dump again, or"):
            dumped(tmp_path, span)
    assert [path.name for path in dumped(tmp_path, "zero")] == ["02-pipeline-cut.graph", "03-zero.graph"]
    ancestry(tmp_path, "addmm")
    assert "the dump has not come to its end; its last graph is 03-zero.graph" in caplog.text

    compiled_of(two_layers).dump(tmp_path)
    assert dumped(tmp_path)[-1].name == "07-fuse.graph"
