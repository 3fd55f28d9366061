"""Training in bf16 and fp16 follows eager training under torch.autocast, and skips the steps that GradScaler skips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import graphshard
from graphshard.errors import NothingToLower, OutOfRange
from graphshard.passes.precision import Precision
from graphshard.pipeline import Context
from graphshard.program import Program
from graphshard.region import operations_of
from marks import full
from numerics.cases import maker, sgd
from numerics.mixed import both, rounding
from numerics.reference import rolled
from numerics.test_memory import agree

PLANS = ("dp2", "zero1:size=2", "zero2:size=2", "zero3:size=2", "pp2", "zero3+pp2", "dp2+zero3:size=2", "dp2+accum2")
# Of a loss near its start: an element of bf16 has 8 bits, of fp16 11; what is summed differs in a fraction of them.
CLOSE = {"bf16": 4e-3, "fp16": 1e-3}


def follow(name: str, plan: str, precision: str, steps: int = 4, **options: Any) -> graphshard.Compiled:
    """Both trained for some steps, with losses alike and weights that have moved alike."""
    compiled, eager, args, kwargs = both(maker(name, plan), f"{plan}+{precision}", max_grad_norm=0.5, **options)
    kind = precision.partition(":")[0]
    before = {n: v.detach().clone() for n, v in eager.model.named_parameters()}
    for index in range(steps):
        batch, named = rolled((args, kwargs), index)
        theirs, ours = eager.step(batch, named), compiled.step(*batch, **named)
        assert ours.dtype is torch.float32
        assert ours.item() == pytest.approx(theirs.item(), rel=CLOSE[kind]), f"step {index}"
    state = compiled.state_dict()
    moved = torch.cat([(state[n].to(old.device) - old).flatten() for n, old in before.items()])
    wanted = torch.cat([(v.detach() - before[n]).flatten() for n, v in eager.model.named_parameters()])
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9
    return compiled


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans_follow_autocast(plan: str, precision: str) -> None:
    follow("gpt", plan, precision, optimizer=sgd)


@pytest.mark.parametrize("precision", ["bf16:reduce=bf16", "fp16:reduce=fp16,init_scale=128"])
@pytest.mark.parametrize("plan", ["zero1:size=2", "zero3+pp2"])
def test_gradients_reduced_in_the_lower_precision(plan: str, precision: str) -> None:
    compiled = follow("gpt", plan, precision, optimizer=sgd)
    half = compiled.report()["ranks"][0]["sent_bytes"]["dp"]
    full = follow("gpt", plan, precision.partition(":")[0], optimizer=sgd).report()["ranks"][0]["sent_bytes"]["dp"]
    assert half < full


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["convnet", "llama", "bert"])
def test_models_follow_autocast(name: str, precision: str) -> None:
    follow(name, "zero3+pp2:microbatches=2", precision, optimizer=sgd)


def signs() -> Tensor:
    return torch.tensor([1.0, -1.0, 1.0, -1.0])


QUANTILE: dict[str, Callable[[Tensor], Tensor]] = {"quantile": lambda y: y.float().quantile(0.3, dim=1).sum()}
if torch.__version__ < "2.12":  # there, what is traced may not ask whether all of a tensor is true
    QUANTILE.clear()
COMPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda y: F.hinge_embedding_loss(y, signs()[:, None].expand(4, 8)),
    "cosine": lambda y: F.cosine_embedding_loss(y[:, :4], y[:, 4:], signs()),
    "ranking": lambda y: F.margin_ranking_loss(y[:, 0], y[:, 1], signs()),
    "poisson": lambda y: F.poisson_nll_loss(y, torch.ones(4, 8)),
    "triplet": lambda y: F.triplet_margin_loss(y, y.flip(0), y.flip(1)),
    "margin": lambda y: F.multi_margin_loss(y.float(), torch.arange(4)),
    "l1": lambda y: F.l1_loss(y, torch.ones(4, 8)),
    "kl": lambda y: F.kl_div(y.log_softmax(-1), torch.full((4, 8), 0.125), reduction="batchmean"),
    **QUANTILE,
    "prelu": lambda y: F.prelu(F.layer_norm(y, (8,)), torch.full((1,), 0.2)).sum(),
}


class Ending(nn.Module):
    """A layer, and what makes a loss of its result."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(8, 8), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.layer(x))


@pytest.mark.parametrize("loss", COMPOSED)
def test_losses_made_of_other_operators_follow_autocast(loss: str) -> None:
    torch.manual_seed(0)
    model, x = Ending(COMPOSED[loss]), torch.randn(4, 8)
    ours, before = copy.deepcopy(model), model.layer.weight.detach().clone()
    compiled, optimizer = graphshard.compile(ours, "dp1+bf16", optimizer=sgd(ours)), sgd(model)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        theirs = model(x)
    theirs.float().backward()
    optimizer.step()
    assert compiled.step(x).item() == pytest.approx(theirs.item(), rel=2e-2, abs=1e-2)
    moved, wanted = compiled.state_dict()["layer.weight"] - before, model.layer.weight.detach() - before
    assert F.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.99
    assert moved.norm().item() == pytest.approx(wanted.norm().item(), rel=5e-2)


def test_a_product_and_what_it_is_given_by_a_norm() -> None:
    """prelu computes in the lower precision, as in torch's list, though a norm gives it float32."""
    model = Ending(COMPOSED["prelu"])
    program = graphshard.compile(
        model, "dp1+bf16", optimizer=sgd(model), example_inputs=(torch.randn(4, 8),), executor="none"
    ).program
    (found,) = [n for n in operations_of(program.body) if n.target is torch.ops.aten._prelu_kernel.default]
    assert found.meta["val"].dtype is torch.bfloat16


@pytest.mark.parametrize("plan", ["dp2+bf16", "zero3+pp2+fp16"])
def test_verify_finds_the_meaning_kept(plan: str) -> None:
    model, args, kwargs, loss_fn = maker("gpt", plan)()
    compiled = graphshard.compile(
        model, plan, loss_fn=loss_fn, optimizer=sgd(model), executor="none", example_inputs=(args, kwargs)
    )
    assert "precision" in [item.name for item in compiled.verify()]


@pytest.mark.parametrize("plan", ["zero2:size=2+accum3+bf16", "zero3+pp2:schedule=zb-h1+fp16"])
def test_simulated_and_measured_peaks_agree(plan: str) -> None:
    agree("gpt", plan)


STEPS, ROWS, WINDOW = 200, 16, 20


@pytest.mark.parametrize(
    "plan",
    ["zero3+pp2+bf16", *(full(p) for p in ("dp2+fp16", "zero3+pp2+fp16", "dp2+bf16"))],
)
def test_the_loss_of_200_steps_stays_in_the_band_between_two_orders_of_the_data(plan: str) -> None:
    """Smoothed, it is nearer to eager training on the same data than that is to eager training on another order."""
    _, *whole, _ = maker("gpt", plan, rows=4 * ROWS)()

    def batches(seed: int) -> list[Any]:
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        order = torch.cat([torch.randperm(4 * ROWS, generator=generator) for _ in range(STEPS // 4)])
        return [tree_map_only(Tensor, partial(torch.index_select, dim=0, index=i), whole) for i in order.split(ROWS)]

    def smoothed(step: Any, seed: int) -> Tensor:
        losses = [step(batch, named).item() for batch, named in batches(seed)]
        return torch.tensor(losses).unfold(0, WINDOW, WINDOW).mean(1)

    make = maker("gpt", plan, rows=ROWS)
    adam = lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)  # noqa: E731
    compiled, eager, *_ = both(make, plan, optimizer=adam)
    _, other, *_ = both(make, plan, optimizer=adam)
    ours = smoothed(lambda batch, named: compiled.step(*batch, **named), seed=1)
    same, different = smoothed(eager.step, seed=1), smoothed(other.step, seed=2)
    assert same[-1] < 0.5 * same[0]
    assert ((ours - same).abs() <= (same - different).abs()).all()


# Loss scaling


def scaling(plan: str, optimizer: Any = sgd, **options: Any) -> Any:
    """A small model under fp16, compiled and eager."""
    return both(maker("mlp", plan), plan, optimizer=optimizer, passes=rounding(), **options)


def spoiled(args: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
    """A batch whose first row overflows float16 on its way, on one data-parallel rank and one micro-batch alone."""
    x = args[0].clone()
    x[0] *= factor
    return (x, *args[1:])


@pytest.mark.parametrize(
    "plan", ["dp2", "zero1:size=2", "zero3:size=2", "pp2", "zero3+pp2:microbatches=2", "dp2+accum2", "accum4"]
)
def test_the_steps_that_gradscaler_skips_are_skipped(plan: str) -> None:
    """The scale begins too large, grows every third step, and a batch overflows in between."""
    compiled, eager, args, kwargs = scaling(f"{plan}+fp16:init_scale=4194304,growth_interval=3", max_grad_norm=0.5)
    compiled.trace(*args, **kwargs)
    scales, skipped = [], []
    for index in range(12):
        batch = spoiled(args, 1e6) if index == 7 else args
        before = compiled.state_dict()
        eager.step(batch, kwargs)
        compiled.step(*batch, **kwargs)
        after = compiled.state_dict()
        skipped.append(all(torch.equal(after[n], before[n]) for n, _ in eager.model.named_parameters()))
        scaler = compiled.optimizer.state_dict()["scaler"]
        assert scaler == eager.scaler.state_dict(), f"step {index}"
        scales.append(scaler["scale"])
    falls = [now < last for last, now in zip([4194304.0, *scales], scales, strict=False)]
    assert skipped == falls
    assert skipped[0] and skipped[7] and not all(skipped[:7])


def test_a_first_step_that_is_skipped_leaves_no_optimizer_state() -> None:
    adam = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)  # noqa: E731
    compiled, eager, args, kwargs = scaling("zero3:size=2+fp16", adam)
    compiled.step(*spoiled(args, 1e6), **kwargs)
    assert compiled.optimizer.state_dict()["state"] == {}
    assert compiled.optimizer.state_dict()["scaler"]["scale"] == 32768.0
    eager.step(spoiled(args, 1e6), kwargs)
    for _ in range(3):
        theirs, ours = eager.step(args, kwargs), compiled.step(*args, **kwargs)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
    steps = {value["step"].item() for value in compiled.optimizer.state_dict()["state"].values()}
    assert steps == {3.0}


# State


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_state_goes_on_under_another_plan(precision: str) -> None:
    compiled, _, args, kwargs = both(maker("gpt", "zero3:size=2"), f"zero3:size=2+{precision}", passes=rounding())
    for _ in range(3):
        compiled.step(*args, **kwargs)
    state, update = compiled.state_dict(), compiled.optimizer.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert any(not torch.equal(v, v.bfloat16().float()) for v in state.values())  # masters, not what is computed with
    assert not any("master" in keys for keys in update["state"].values())
    other, *_ = both(maker("gpt", "zero3:size=2"), f"pp2:microbatches=2+{precision}", passes=rounding())
    other.step(*args, **kwargs)
    other.load_state_dict(state)
    other.optimizer.load_state_dict(update)
    loaded = other.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert other.optimizer.state_dict().get("scaler") == update.get("scaler")
    assert other.evaluate(*args, **kwargs).item() == pytest.approx(compiled.evaluate(*args, **kwargs).item(), rel=1e-4)
    for _ in range(2):
        theirs, ours = compiled.step(*args, **kwargs), other.step(*args, **kwargs)
        assert ours.item() == pytest.approx(theirs.item(), rel=2e-3)


def test_the_scaler_state_is_gradscalers() -> None:
    compiled, eager, args, kwargs = scaling("dp2+fp16:init_scale=512,growth_interval=2")
    for _ in range(3):
        compiled.step(*args, **kwargs)
    state = compiled.optimizer.state_dict()
    eager.scaler.load_state_dict(state["scaler"])
    assert eager.scaler.get_scale() == 1024.0
    given = {**state, "scaler": {**state["scaler"], "scale": 64.0, "_growth_tracker": 0}}
    compiled.optimizer.load_state_dict(given)
    assert compiled.optimizer.state_dict()["scaler"] == given["scaler"]
    compiled.step(*args, **kwargs)
    compiled.step(*args, **kwargs)
    assert compiled.optimizer.state_dict()["scaler"]["scale"] == 128.0
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("growth_factor", {"growth_factor": 3.0}, "given 3.0; expected 2.0, as the plan has it"),
        ("scale", {"scale": None}, "given None; expected a finite number above 0"),
        ("scale", {"scale": -1.0}, "given -1.0; expected a finite number above 0"),
        ("scale", {"scale": float("nan")}, "given nan; expected a finite number above 0"),
        ("_growth_tracker", {"_growth_tracker": -5}, "given -5; expected an integer from 0 to 1"),
    ]
    for key, change, says in wrong:
        with pytest.raises(graphshard.errors.OptimizerStateMismatch, match=f"{key} of the scaler: {says}"):
            compiled.optimizer.load_state_dict({**state, "scaler": {**state["scaler"], **change}})
    with pytest.raises(graphshard.errors.OptimizerStateMismatch, match="growth_factor of the scaler: given nothing"):
        compiled.optimizer.load_state_dict({**state, "scaler": {"scale": 1.0}})


def test_a_frozen_parameter_has_no_master() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    frozen = model.get_submodule("0")
    frozen.requires_grad_(False)
    rounded = frozen.get_parameter("weight").detach().bfloat16().float()
    compiled = graphshard.compile(
        model, "zero3:size=2+bf16", loss_fn=nn.functional.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    compiled.step(torch.randn(4, 8), torch.randn(4, 4))
    assert torch.equal(compiled.state_dict()["0.weight"], rounded)
    masters = {slot.name for slot in compiled.execution_plan.reads[0] if slot.role == "master"}
    assert masters == {"1"}


# Values that a type does not hold


class Ranged(nn.Module):
    """One of its parameters is large."""

    def __init__(self, large: float, trained: bool = False, cast: bool = False) -> None:
        super().__init__()
        self.a, self.cast = nn.Linear(4, 4), cast
        self.scale = nn.Parameter(torch.tensor([1.0, -large, 0.0, 2.0]), requires_grad=trained)
        self.register_buffer("shift", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.float() if self.cast else self.scale
        result: Tensor = self.a(x) + x * (scale / 1e6) + self.shift
        return result


def ranged(model: nn.Module, plan: str, **options: Any) -> graphshard.Compiled:
    optimizer = partial(torch.optim.SGD, lr=0.1)
    options |= {"loss_fn": F.mse_loss, "optimizer": optimizer, "executor": "local"}
    compiled = graphshard.compile(model, plan, **options)
    compiled.trace(torch.ones(4, 4), torch.ones(4, 4))
    return compiled


OUT_OF_RANGE = "scale: its largest magnitude, 100000, would become infinite in float16, which ends at 65504; write bf16"


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("plan", ["dp1+fp16", "zero3:size=2+pp2:microbatches=2+fp16"])
def test_a_parameter_that_float16_does_not_hold_is_refused_before_anything_is_stored(plan: str, trained: bool) -> None:
    with pytest.raises(OutOfRange, match=OUT_OF_RANGE):
        ranged(Ranged(1e5, trained), plan).step(torch.ones(4, 4), torch.ones(4, 4))
    compiled = ranged(Ranged(65510.0, trained), plan)  # which is rounded to the largest
    before = compiled.state_dict()
    if not trained:
        assert before["scale"].tolist() == [1.0, -65504.0, 0.0, 2.0]
    for other in (float("nan"), float("inf"), 0.0):
        values = torch.tensor([1e5, other, 0.0, 2.0])
        with pytest.raises(OutOfRange, match=OUT_OF_RANGE):
            compiled.load_state_dict({name: value + 1 for name, value in before.items()} | {"scale": values})
        assert all(torch.equal(before[name], value) for name, value in compiled.state_dict().items())
    large = torch.tensor(1e39, dtype=torch.float64)
    with pytest.raises(OutOfRange, match="shift: its largest"):  # a buffer
        compiled.load_state_dict({name: value + 1 for name, value in before.items()} | {"shift": large})
    assert all(torch.equal(before[name], value) for name, value in compiled.state_dict().items())
    already = torch.tensor([float("-inf"), 1.0, float("inf"), 2.0])
    compiled.load_state_dict(before | {"scale": already})
    assert torch.equal(compiled.state_dict()["scale"], already)


def test_what_an_init_function_makes_is_looked_at_too() -> None:
    def init(model: nn.Module) -> None:
        model.load_state_dict(Ranged(1e5).state_dict())

    with torch.device("meta"):
        model = Ranged(1.0)
    with pytest.raises(OutOfRange, match=OUT_OF_RANGE):
        ranged(model, "dp1+fp16", init=init, device="cpu").state_dict()


@pytest.mark.parametrize(("plan", "cast"), [("dp1+bf16", False), ("dp1+fp16", True)])
def test_what_holds_it_is_as_the_error_says(plan: str, cast: bool) -> None:
    compiled = ranged(Ranged(1e5, cast=cast), plan)
    assert compiled.step(torch.ones(4, 4), torch.ones(4, 4)).isfinite()
    found = compiled.state_dict()["scale"][1].item()
    assert found == (-1e5 if cast else torch.tensor(-1e5).bfloat16().item())


def test_a_float32_model_refuses_what_only_float64_holds() -> None:
    compiled = ranged(Ranged(1.0), "dp1")
    with pytest.raises(OutOfRange, match=r"in float32, which ends at 3\.40282e\+38; give values that it holds"):
        compiled.load_state_dict(compiled.state_dict() | {"scale": torch.full((4,), 1e39, dtype=torch.float64)})


# Parameters that are in another precision already


@pytest.mark.parametrize("plan", ["dp1+fp16:init_scale=1024", "dp2+bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_without_a_float32_parameter_to_update_the_token_is_refused(plan: str, dtype: torch.dtype) -> None:
    """GradScaler says "Attempting to unscale FP16 gradients"; autocast leaves float64 alone."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)
    token = plan.partition("+")[2][:4]
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NothingToLower, match=f"^{token}: of the .* updated none is float32, they are {name}; "):
        graphshard.compile(
            model, plan, loss_fn=nn.functional.mse_loss, optimizer=sgd(model), example_inputs=rows(dtype)
        )


def test_adapters_in_float16_on_a_frozen_float32_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), Half())
    with pytest.raises(NothingToLower, match="they are float16"):
        graphshard.compile(
            model, "dp1+fp16", loss_fn=nn.functional.mse_loss, optimizer=sgd(model), example_inputs=rows(torch.float32)
        )


class Half(nn.Module):
    """A layer that is in another precision than what is around it."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.to(self.inner.weight.dtype)).float()
        return result


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 8, dtype=dtype), torch.randn(4, 4, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("plan", ["dp1", "zero3:size=2+accum2"])
def test_every_gradient_is_unscaled_and_looked_at(plan: str, dtype: torch.dtype) -> None:
    """A scale of 1024 is no part of what a layer in another precision learns, and a step is skipped for all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Half(dtype))
    trained = {}
    batch = rows(torch.float32)
    for scale in (1, 1024):
        compiled = graphshard.compile(
            copy.deepcopy(model),
            f"{plan}+fp16:init_scale={scale}",
            loss_fn=nn.functional.mse_loss,
            optimizer=partial(torch.optim.SGD, lr=0.1),
        )
        compiled.step(*batch)
        trained[scale] = compiled.state_dict()
    moved = trained[1]["1.inner.weight"] - model.get_parameter("1.inner.weight").detach()
    assert moved.abs().max() > 1e-3
    for name, value in trained[1].items():
        torch.testing.assert_close(trained[1024][name], value, rtol=2e-2, atol=1e-4)
    compiled.step(batch[0] * 1e5, batch[1])
    assert all(torch.equal(value, trained[1024][name]) for name, value in compiled.state_dict().items())
    assert compiled.optimizer.state_dict()["scaler"]["scale"] == 512.0


class Idle(Precision):
    """Stands for the pass, and does nothing."""

    def run(self, program: Program, ctx: Context) -> Program:
        return program


def test_the_scaler_follows_the_program() -> None:
    """Where no pass scales the loss there is no state of it, whatever the plan string says."""
    model = nn.Linear(8, 4)
    compiled = graphshard.compile(
        model, "dp1+fp16", loss_fn=nn.functional.mse_loss, optimizer=sgd(model), passes=[Idle("fp16")]
    )
    compiled.step(*rows(torch.float32))
    assert "scaler" not in compiled.optimizer.state_dict()


def test_a_scaler_that_only_one_side_has_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    run = {}
    for precision in ("fp16:init_scale=256", "bf16"):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        run[precision[:4]] = graphshard.compile(
            model, f"dp1+{precision}", loss_fn=nn.functional.mse_loss, optimizer=sgd(model)
        )
        run[precision[:4]].step(*rows(torch.float32))
    with_one, without = (run[name].optimizer.state_dict() for name in ("fp16", "bf16"))
    run["fp16"].optimizer.load_state_dict(with_one)
    run["bf16"].optimizer.load_state_dict(without)
    assert not any(record.name == "graphshard" for record in caplog.records)
    caplog.clear()
    run["fp16"].optimizer.load_state_dict(without)
    run["bf16"].optimizer.load_state_dict(with_one)
    assert [r.getMessage() for r in caplog.records if r.name == "graphshard"] == [
        "graphshard: the optimizer state has no 'scaler': the loss scale stays what it is here",
        "graphshard: the 'scaler' of the optimizer state is left out: this plan scales no loss",
    ]
    assert run["fp16"].optimizer.state_dict()["scaler"]["scale"] == 256.0
