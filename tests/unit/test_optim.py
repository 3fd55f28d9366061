"""The optimizer as part of the graph: the traced update against torch.optim, and what schedulers see of it."""

from __future__ import annotations

import functools
import importlib
import linecache
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils._pytree import tree_map_only

import graphshard
from graphshard import fake
from graphshard.errors import (
    NotAnOptimizer,
    OptimizerForeignParameter,
    OptimizerNeedsClosure,
    OptimizerNotElementwise,
    OptimizerNotTraceable,
    OptimizerStateMismatch,
    UpdateIsPartOfStep,
)
from graphshard.optim import CompiledOptimizer, NamedState, given_state
from graphshard.program import NodeInfo, Param, Phase, Program, Role, Section, Slot, empty_section, info
from graphshard.rewrite import add_input, call, set_outputs
from graphshard.update import add_update, check_elementwise, is_elementwise, make_optimizer
from graphshard.verify import verify

aten = torch.ops.aten

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (3, 4), "a.bias": (3,), "scale": (), "b.weight": (3, 4)}


def captured(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, microbatches: int = 2) -> Program:
    """A program whose gradients are the parameters themselves, as capture would leave it: no update yet."""
    mode, body, prologue = fake.new_mode(), empty_section(), empty_section()
    forward, backward, update = (NodeInfo(phase=p) for p in (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE))
    sums: dict[Slot, fx.Node] = {}
    zeros: dict[Slot, fx.Node] = {}
    for name, shape in shapes.items():
        slot, value = Slot(Role.CARRY, f"grad:{name}"), fake.tensor(mode, shape, dtype)
        param = add_input(body, Slot(Role.PARAM, name), value, forward)
        carry = add_input(body, slot, value, backward)
        with body.graph.inserting_before(body.output_node):
            sums[slot] = call(body.graph, aten.add.Tensor, (carry, param), backward)
        with prologue.graph.inserting_before(prologue.output_node):
            zeros[slot] = call(prologue.graph, aten.full.default, (list(shape), 0.0), update, dtype=dtype)
    set_outputs(body, sums)
    set_outputs(prologue, zeros)
    params = {name: Param(name, shape, dtype) for name, shape in shapes.items()}
    return Program(body, prologue, params=params, microbatches=microbatches)


def interpret(section: Section, values: Mapping[Slot, torch.Tensor]) -> dict[Slot, torch.Tensor]:
    made: dict[fx.Node, Any] = {node: values[slot] for node, slot in section.inputs.items()}
    for node in section.nodes():
        args, kwargs = tree_map_only(fx.Node, made.__getitem__, (node.args, dict(node.kwargs)))
        made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        assert made[node].dtype == node.meta["val"].dtype and made[node].shape == node.meta["val"].shape
    return {slot: made[node] for slot, node in section.outputs.items()}


Parameters = dict[str, nn.Parameter]


def parameters(dtype: torch.dtype) -> Parameters:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in SHAPES.items()}


def two_groups(params: Parameters, make: Callable[..., Optimizer]) -> Optimizer:
    """The second group has a learning rate and, where there is one, a weight decay of its own."""
    groups: list[dict[str, Any]] = [
        {"params": [params["a.weight"], params["scale"]]},
        {"params": [params["a.bias"], params["b.weight"]], "lr": 0.03},
    ]
    optimizer = make(groups)
    if "weight_decay" in optimizer.defaults:
        optimizer.param_groups[1]["weight_decay"] = 0.05
    return optimizer


GRADIENT = Slot(Role.CARRY, "grad:w")


def names_of(params: Parameters) -> dict[int, str]:
    return {id(p): name for name, p in params.items()}


class Signed(Optimizer):
    """A user's own optimizer: step count as a Python number, learning rate as a number, masked assignment."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta = group["beta"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["mean"], state["name"] = 0, torch.zeros_like(p), "signed"
                state["step"] += 1
                state["mean"] = state["mean"] * beta + p.grad * (1 - beta)
                direction = torch.sign(state["mean"] / (1 - beta ** state["step"]))
                direction[direction == 0] = 0.5
                lr = group["lr"].item() if isinstance(group["lr"], torch.Tensor) else group["lr"]
                p.mul_(1 - lr * 0.1).sub_(direction, alpha=2 * lr / (1 + lr))
                p.data.lerp_(p.grad, lr * 0.1)


O = torch.optim  # noqa: E741
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(O.SGD, lr=0.1),
    "sgd-momentum": functools.partial(O.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd-nesterov": functools.partial(O.SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam-amsgrad": functools.partial(O.Adam, amsgrad=True, weight_decay=0.1),
    "adamw": functools.partial(O.AdamW, weight_decay=0.1),
    "asgd": functools.partial(O.ASGD, t0=3),
    "radam": functools.partial(O.RAdam, decoupled_weight_decay=True),
    "nadam": functools.partial(O.NAdam, weight_decay=0.1),
    "adamax": O.Adamax,
    "adadelta": O.Adadelta,
    "rmsprop": O.RMSprop,
    "rmsprop-centered": functools.partial(O.RMSprop, momentum=0.9, centered=True),
    "rprop": functools.partial(O.Rprop, etas=(0.3, 1.3)),
    "adagrad": functools.partial(O.Adagrad, initial_accumulator_value=0.1, lr_decay=0.1),
    "custom": Signed,
}


def train_both(make: Callable[..., Optimizer], dtype: torch.dtype, clip: float | None) -> float:
    """Ten steps of the graph beside ten of torch.optim on the same gradients; the largest relative difference of any
    parameter or state. The first learning rate is zero, as in a warm-up, and one step's gradients are zero."""
    params = parameters(dtype)
    optimizer = two_groups(params, make)
    program = captured(SHAPES, dtype)
    add_update(program, optimizer, names_of(params), clip)
    verify(program)
    assert is_elementwise(program)
    values = {Slot(Role.PARAM, name): p.detach().clone() for name, p in params.items()}
    worst = 0.0
    for i in range(10):
        optimizer.param_groups[0]["lr"] = 0.1 * i / 10
        gradients = {name: torch.randn(p.shape, dtype=dtype) * (i != 3) for name, p in params.items()}
        first = i == 0 and program.first_epilogue is not None
        inputs = values | {Slot(Role.CARRY, f"grad:{name}"): g for name, g in gradients.items()}
        for j, group in enumerate(optimizer.param_groups):
            inputs[Slot(Role.LR, str(j))] = torch.tensor(group["lr"], dtype=torch.float64)
        values |= interpret(program.first_epilogue if first else program.epilogue, inputs)  # type: ignore[arg-type]
        for name, p in params.items():
            p.grad = gradients[name].clone()
        if clip is not None:
            nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
    for name, p in params.items():
        expected = {Slot(Role.PARAM, name): p.detach()}
        for key, item in optimizer.state[p].items():
            if not isinstance(item, str):
                expected[Slot(Role.STATE, name, key)] = torch.as_tensor(item)
        assert {s for s in values if s.name == name} == set(expected)
        for slot, item in expected.items():
            assert values[slot].shape == item.shape
            worst = max(worst, float((values[slot] - item).abs().max() / item.abs().max().clamp(min=1e-6)))
    return worst


@pytest.mark.parametrize("name", MAKERS)
def test_traced_update_equals_torch_optim(name: str) -> None:
    assert train_both(MAKERS[name], torch.float32, clip=None) < 1e-6
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torch.optim keeps scalar state in the default dtype
    try:
        assert train_both(MAKERS[name], torch.float64, clip=None) < 1e-12
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_clipping_equals_clip_grad_norm(norm: float) -> None:
    assert train_both(MAKERS["adamw"], torch.float32, norm) < 2e-6
    assert train_both(MAKERS["sgd-momentum"], torch.float64, norm) < 1e-12


def test_untouched_elements_survive_a_learning_rate_of_zero() -> None:
    """Adam's capturable form divides by the learning rate."""
    program = captured({"w": (2,)}, torch.float32, 1)
    w = nn.Parameter(torch.ones(2))
    add_update(program, O.Adam([w]), {id(w): "w"}, None)
    inputs = {Slot(Role.PARAM, "w"): w.detach(), Slot(Role.CARRY, "grad:w"): torch.tensor([0.0, 1.0])}
    assert program.first_epilogue is not None
    result = interpret(program.first_epilogue, inputs | {Slot(Role.LR, "0"): torch.zeros((), dtype=torch.float64)})
    assert result[Slot(Role.PARAM, "w")].tolist() == [1.0, 1.0]


def test_only_optimized_parameters_are_updated_but_all_gradients_count_in_the_norm() -> None:
    params = parameters(torch.float32)
    for clip in (None, 1.0):
        program = captured(SHAPES, torch.float32)
        add_update(program, O.SGD([params["scale"]], lr=0.1), names_of(params), clip)
        assert program.first_epilogue is None
        assert list(program.epilogue.output_slots) == [Slot(Role.PARAM, "scale")]
        assert {n: p.group for n, p in program.params.items()} == {n: 0 if n == "scale" else None for n in SHAPES}
        read = sum(slot.role is Role.CARRY for slot in program.epilogue.inputs.values())
        assert read == (1 if clip is None else len(SHAPES))


def test_without_optimizer_the_gradients_are_outputs() -> None:
    program = captured({"w": (2,)}, torch.float32)
    add_update(program, None, {}, None)
    assert program.epilogue.outputs[Slot(Role.OUTPUT, "grad:w")] is program.epilogue.input_slots[GRADIENT]


def test_existing_epilogue_is_kept_in_both_variants() -> None:
    program = captured({"w": (2,)}, torch.float32)
    value = fake.tensor(fake.graph_mode(program.body.graph) or fake.new_mode(), (), torch.float32)
    loss = add_input(program.epilogue, Slot(Role.CARRY, "loss"), value, NodeInfo(phase=Phase.UPDATE))
    set_outputs(program.epilogue, {Slot(Role.LOSS, "loss"): loss})
    w = nn.Parameter(torch.ones(2))
    add_update(program, O.Adagrad([w]), {id(w): "w"}, None)
    assert [s.role for s in program.epilogue.output_slots][:2] == [Role.LOSS, Role.PARAM]
    assert program.first_epilogue is not None
    assert program.first_epilogue.output_slots == program.epilogue.output_slots
    assert not any(slot.role is Role.STATE for slot in program.first_epilogue.inputs.values())


def test_constructor_made_state_is_traced_after_it_was_released() -> None:
    program, w = captured({"w": (2,)}, torch.float32), nn.Parameter(torch.ones(2))
    optimizer = O.Adagrad([w], initial_accumulator_value=0.5)
    optimizer.state.clear()
    add_update(program, optimizer, {id(w): "w"}, None)
    assert program.first_epilogue is not None
    assert [s.key for s in program.first_epilogue.output_slots] == ["", "step", "sum"]


def test_nodes_carry_phase_module_and_an_origin_of_their_own() -> None:
    params = parameters(torch.float32)
    program = captured(SHAPES, torch.float32)
    add_update(program, two_groups(params, MAKERS["adamw"]), names_of(params), 1.0)
    records = [info(node) for node in program.epilogue.nodes()]
    assert all(r.phase is Phase.UPDATE and r.origin for r in records)
    assert len({r.origin for r in records}) == len(records)
    assert {r.module for r in records} == {"", "a", "b"}


def test_a_bfloat16_parameter_stays_one() -> None:
    program = captured({"w": (2,), "s": ()}, torch.bfloat16)
    params = {"w": nn.Parameter(torch.ones(2).bfloat16()), "s": nn.Parameter(torch.ones(()).bfloat16())}
    add_update(program, O.AdamW(params.values()), names_of(params), 1.0)
    for section in program.updates():
        for slot, node in section.outputs.items():
            expected = torch.float64 if slot.key == "step" else torch.bfloat16
            assert node.meta["val"].dtype == expected, slot


def test_optimizer_that_is_not_elementwise_is_found_on_the_graph() -> None:
    muon = getattr(O, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    program, w = captured({"w": (4, 4)}, torch.float32), nn.Parameter(torch.randn(4, 4))
    add_update(program, muon([w], lr=0.1), {id(w): "w"}, None)
    assert not is_elementwise(program)
    with pytest.raises(OptimizerNotElementwise, match=r"Muon is not elementwise: its update of 'w' uses aten\."):
        check_elementwise(program, "Muon")


class _Plain(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, group: dict[str, Any], p: Any) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.update(group, p)


class RowWise(_Plain):
    def update(self, group: dict[str, Any], p: Any) -> None:
        p.add_(p.grad * torch.arange(p.shape[-1]), alpha=-0.1)


class Branching(_Plain):
    def update(self, group: dict[str, Any], p: Any) -> None:
        if p.grad.norm() > 1:
            p.sub_(p.grad * group["lr"])


class PythonMath(_Plain):
    def update(self, group: dict[str, Any], p: Any) -> None:
        self.state[p]["step"] = self.state[p].get("step", 0) + 1
        p.add_(p.grad, alpha=-math.sqrt(self.state[p]["step"]))


class GroupCounter(_Plain):
    def update(self, group: dict[str, Any], p: Any) -> None:
        group["k"] = group.get("k", 0) + 1
        p.add_(p.grad, alpha=-0.1)


class OwnCounter(_Plain):
    calls = 0

    def update(self, group: dict[str, Any], p: Any) -> None:
        self.calls += 1
        p.add_(p.grad, alpha=-0.1)


class ListState(_Plain):
    def update(self, group: dict[str, Any], p: Any) -> None:
        self.state[p]["history"] = [p.grad.clone()]


def test_broadcasting_a_row_is_not_elementwise() -> None:
    program, w = captured({"w": (4, 4)}, torch.float32), nn.Parameter(torch.randn(4, 4))
    add_update(program, RowWise([w]), {id(w): "w"}, None)
    assert not is_elementwise(program)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Branching, r"test_optim\.py:\d+: if p\.grad\.norm\(\) > 1.*decides something by the value of a tensor"),
        (PythonMath, r"test_optim\.py:\d+: .*math\.sqrt"),
        (GroupCounter, "changes 'k' of its parameter group"),
        (OwnCounter, "changes its attribute 'calls'"),
        (ListState, "state 'history' is a list"),
        (O.SparseAdam, "does not support dense gradients"),
    ],
)
def test_untraceable_steps_say_why_and_leave_the_program_alone(make: Callable[..., Optimizer], reason: str) -> None:
    program, w = captured({"w": (4,)}, torch.float32), nn.Parameter(torch.randn(4))
    with pytest.raises(OptimizerNotTraceable, match=reason):
        add_update(program, make([w]), {id(w): "w"}, None)
    assert not list(program.epilogue.nodes()) and program.first_epilogue is None


def test_step_hooks_are_refused() -> None:
    program, w = captured({"w": (4,)}, torch.float32), nn.Parameter(torch.randn(4))
    optimizer = O.SGD([w])
    optimizer.register_step_pre_hook(lambda *args: None)
    with pytest.raises(OptimizerNotTraceable, match="hooks"):
        add_update(program, optimizer, {id(w): "w"}, None)


def test_what_may_be_given_as_optimizer() -> None:
    model = nn.Linear(2, 2)
    given = O.SGD(model.parameters())
    assert make_optimizer(model, given) is given
    assert isinstance(make_optimizer(model, functools.partial(O.AdamW, lr=3e-4)), O.AdamW)
    assert isinstance(make_optimizer(model, O.Adagrad), O.Adagrad)
    with pytest.raises(OptimizerNeedsClosure, match="LBFGS"):
        make_optimizer(model, O.LBFGS)
    with pytest.raises(NotAnOptimizer, match="'adam'"):
        make_optimizer(model, "adam")  # type: ignore[arg-type]
    with pytest.raises(OptimizerForeignParameter, match=r"parameter 0 of the optimizer's group 0, of shape \[2, 2\]"):
        add_update(captured({"w": (2, 2)}, torch.float32), given, {}, None)


class Store:
    """Stands for the compiled model, which keeps the state."""

    def __init__(self) -> None:
        self.state: NamedState = {}

    def read(self) -> NamedState:
        return self.state

    def write(self, state: NamedState) -> None:
        self.state = state


def compiled(make: Callable[..., Optimizer] = MAKERS["adamw"]) -> tuple[CompiledOptimizer, Store, Parameters]:
    params, store = parameters(torch.float32), Store()
    return CompiledOptimizer(two_groups(params, make), names_of(params), store.read, store.write), store, params


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.StepLR(o, 2)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_learning_rate_as_in_eager_training(name: str) -> None:
    optimizer, _, _ = compiled()
    eager = two_groups(parameters(torch.float32), MAKERS["adamw"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*optimizer.step.*")
        ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](eager)
        metric = (1.0,) if name == "plateau" else ()
        for _ in range(6):
            optimizer.note_step()
            eager.step()
            ours.step(*metric)
            theirs.step(*metric)
            assert optimizer.lrs() == [group["lr"] for group in eager.param_groups]


def test_a_scheduler_over_the_original_optimizer_drives_it_too() -> None:
    params, store = parameters(torch.float32), Store()
    original = two_groups(params, MAKERS["adamw"])
    scheduler = lr_scheduler.ExponentialLR(original, 0.5)
    optimizer = CompiledOptimizer(original, names_of(params), store.read, store.write)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.note_step()
        scheduler.step()
    assert optimizer.lrs() == [0.0005, 0.015]


def test_what_the_original_optimizer_loads_drives_the_step() -> None:
    params, store = parameters(torch.float32), Store()
    original, other = (two_groups(params, MAKERS["adamw"]) for _ in range(2))
    other.param_groups[0]["lr"], other.param_groups[1]["weight_decay"] = 0.25, 0.5
    optimizer = CompiledOptimizer(original, names_of(params), store.read, store.write)
    early, key = lr_scheduler.ExponentialLR(optimizer, 0.5), optimizer.hyperparameters_key()
    original.load_state_dict(other.state_dict())  # gives the original other dicts
    assert optimizer.lrs() == [0.25, 0.03]
    assert optimizer.hyperparameters_key() != key
    optimizer.note_step()
    early.step()
    lr_scheduler.ExponentialLR(original, 0.5).step()
    assert optimizer.lrs() == [0.0625, 0.0075]
    original.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(UpdateIsPartOfStep, match=r"before graphshard\.compile"):
        optimizer.lrs()


def test_hyperparameters_key_ignores_the_learning_rate_only() -> None:
    optimizer, _, _ = compiled()
    key = optimizer.hyperparameters_key()
    optimizer.param_groups[0]["lr"] = 7.0
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    assert optimizer.hyperparameters_key() == key
    optimizer.param_groups[1]["weight_decay"] = 0.5
    assert optimizer.hyperparameters_key() != key
    optimizer.param_groups[1]["weight_decay"] = 0.05
    assert hash(optimizer.hyperparameters_key()) == hash(key)
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)  # cycles betas
    assert optimizer.hyperparameters_key() != key


def test_state_dict_names_parameters_and_loads_again() -> None:
    optimizer, store, _ = compiled()
    store.state = {name: {"exp_avg": torch.ones(shape)} for name, shape in SHAPES.items()}
    optimizer.param_groups[0]["lr"] = 0.5
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [["a.weight", "scale"], ["a.bias", "b.weight"]]
    assert set(saved["state"]) == set(SHAPES)
    other, other_store, params = compiled()
    other.load_state_dict(saved)
    assert other_store.state.keys() == store.state.keys()
    assert other.lrs() == [0.5, 0.03]
    assert other.param_groups[0]["params"] == [params["a.weight"], params["scale"]]


def test_an_eager_state_dict_loads_by_position() -> None:
    params = parameters(torch.float32)
    eager = two_groups(params, MAKERS["adamw"])
    for p in params.values():
        p.grad = torch.ones_like(p)
    eager.step()
    optimizer, store, _ = compiled()
    optimizer.load_state_dict(eager.state_dict())
    for name, p in params.items():
        assert torch.equal(store.state[name]["exp_avg"], eager.state[p]["exp_avg"])
    assert given_state(eager, names_of(params)).keys() == store.state.keys()


def test_a_foreign_state_dict_is_refused_before_anything_changes() -> None:
    optimizer, store, _ = compiled()
    good = optimizer.state_dict()
    groups = good["param_groups"]
    renamed = [groups[0] | {"params": ["a.weight", "other"]}, groups[1]]
    bad = [
        ({"state": {}, "param_groups": groups[:1]}, "number of parameter groups: given 1; expected 2"),
        ({"state": {}, "param_groups": renamed}, "parameters of group 0"),
        ({"state": {"x": {}}, "param_groups": groups}, "'x'"),
        ({"state": {"scale": {"step": [1]}}, "param_groups": groups}, "state 'step' of 'scale': given list"),
        ({"param_groups": groups}, "'state': given nothing; expected a dict"),
        (None, "the state dict: given nothing; expected a dict"),
        ({"state": {"scale": None}, "param_groups": groups}, "state of 'scale': given nothing; expected a dict"),
        ({**good, "param_groups": [{"lr": 1.0}, groups[1]]}, "'params' of group 0: given nothing; expected a list"),
        ({**good, "param_groups": [None, groups[1]]}, "group 0: given nothing; expected a dict"),
        ({**good, "param_groups": [groups[0], groups[1] | {"lr": "1e-3"}]}, "'lr' of group 1: given '1e-3'; .* number"),
        ({**good, "steps": -1}, "'steps': given -1; expected the number of steps taken"),
    ]
    for state_dict, message in bad:
        with pytest.raises(OptimizerStateMismatch, match=message):
            optimizer.load_state_dict(state_dict)  # type: ignore[arg-type]
    assert store.state == {} and optimizer.lrs() == [0.001, 0.03]


def test_calls_that_belong_to_the_compiled_step() -> None:
    optimizer, _, _ = compiled()
    optimizer.zero_grad()
    with pytest.raises(UpdateIsPartOfStep, match=r"remove optimizer\.step\(\)"):
        optimizer.step()
    with pytest.raises(UpdateIsPartOfStep, match=r"before graphshard\.compile"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_tracing_again_says_what_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(4, 3)
    compiled = graphshard.compile(
        torch.nn.Linear(3, 3),
        "dp2",
        loss_fn=torch.nn.functional.mse_loss,
        optimizer=functools.partial(O.SGD, lr=0.1),
        executor="local",
    )
    compiled.step(x, x)
    compiled.optimizer.param_groups[0]["weight_decay"] = 0.1
    compiled.step(x, x)
    compiled.step(torch.ones(8, 3), torch.ones(8, 3))
    assert [record.getMessage() for record in caplog.records if "tracing" in record.getMessage()] == [
        "graphshard: weight_decay of group 0 is 0.1 now: tracing train again",
        "graphshard: new input shapes [4, 3], [4, 3]: tracing train again",
    ]


def stepped(plan: str, scheduler: Callable[[Optimizer], Any], steps: int) -> graphshard.Compiled:
    torch.manual_seed(0)
    compiled = graphshard.compile(
        torch.nn.Linear(3, 3),
        plan,
        loss_fn=torch.nn.functional.mse_loss,
        optimizer=functools.partial(O.AdamW, lr=0.1),
        executor="local",
        cache=False,
    )
    made = scheduler(compiled.optimizer)
    for _ in range(steps):
        compiled.step(torch.ones(4, 3), torch.zeros(4, 3))
        made.step()
    return compiled


def test_options_that_change_at_every_step_are_told_once_and_kept_in_small_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def cycle(optimizer: Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30)

    lines, plans = linecache.cache, list[Any]()

    class Noting:
        def __init__(self, optimizer: Optimizer) -> None:
            self.inner = cycle(optimizer)

        def step(self) -> None:
            self.inner.step()
            plans.append(sum(str(name).startswith("<s0_") for name in lines))

    lines.clear()
    compiled = stepped("dp2", Noting, 8)
    told = [record.getMessage() for record in caplog.records if "kept" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("graphshard: betas of group 0 had 3 values so far, and each is compiled into a program")
    assert "cycle_momentum=False" in told[0]
    assert len(compiled._builds) == len(compiled.builder._builds) == 4
    assert compiled._runtime is not None and len(compiled._runtime._loaded) == 4
    assert plans[-1] == plans[3]  # the lines for tracebacks
    assert compiled._builds[next(iter(compiled._builds))] is compiled._main


def test_an_option_of_a_program_that_was_let_go_is_compiled_again() -> None:
    compiled = stepped("dp2", lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), 0)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    eager = O.AdamW(model.parameters(), lr=0.1)
    for decay in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.0):
        for group in (*compiled.optimizer.param_groups, *eager.param_groups):
            group["weight_decay"] = decay
        loss = torch.nn.functional.mse_loss(model(torch.ones(4, 3)), torch.zeros(4, 3))
        torch.testing.assert_close(compiled.step(torch.ones(4, 3), torch.zeros(4, 3)), loss.detach())
        eager.zero_grad()
        loss.backward()
        eager.step()
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert len(compiled._builds) == 4


def traces_of(make: Callable[..., Optimizer], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the update of three parameters of one group is traced in."""
    module, shapes = importlib.import_module("graphshard.update"), list[tuple[int, ...]]()
    trace_step = module.trace_step

    def noted(subject: Any, *given: Any) -> Any:
        shapes.append(tuple(subject.param.shape))
        return trace_step(subject, *given)

    monkeypatch.setattr(module, "trace_step", noted)
    sizes: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in sizes.items()}
    add_update(captured(sizes, torch.float32), make(params.values()), names_of(params), None)
    return shapes


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adamax", "Adadelta"])
def test_an_update_that_looks_at_no_shape_is_traced_in_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(traces_of(getattr(torch.optim, name), monkeypatch)) == {(3, 4)}


class Sized(Optimizer):
    """Steps by what ``size`` says of the parameter."""

    def __init__(self, params: Any, size: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.size = size

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * self.size(p))


@pytest.mark.parametrize(
    "size",
    [
        torch.Tensor.numel,
        torch.numel,
        len,
        lambda p: p.shape[0],
        lambda p: p.size(-1),
        lambda p: p.ndim,
        lambda p: 2.0 if p.dim() > 1 else 1.0,
        lambda p: p.stride(0),
        lambda p: p.nbytes,
        lambda p: torch.zeros_like(p).flatten().shape[0],
        lambda p: p.sum(),
        lambda p: torch.ones_like(p).mean() if p.is_contiguous() else 0.0,
    ],
)
def test_an_update_that_looks_at_a_shape_is_traced_in_each(
    size: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = traces_of(functools.partial(Sized, size=size), monkeypatch)
    assert found == [(3, 4), (5,), (2, 2, 2)]


def test_an_update_of_torch_optims_own_is_recorded_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of equal values and other types are others; what an optimizer of somebody's own does is not known."""
    module, recorded = importlib.import_module("graphshard.update.trace"), list[str]()
    trace = module._trace

    def noted(subject: Any, *given: Any) -> Any:
        recorded.append(subject.name)
        return trace(subject, *given)

    class Own(torch.optim.SGD):
        pass

    monkeypatch.setattr(module, "_trace", noted)
    monkeypatch.setattr(module, "_known", {})
    makers: list[Callable[..., Optimizer]] = [
        functools.partial(torch.optim.SGD, lr=0.1),
        functools.partial(torch.optim.SGD, lr=0.2),  # an input of the graph
        functools.partial(torch.optim.SGD, lr=0.1, weight_decay=1),
        functools.partial(torch.optim.SGD, lr=0.1, weight_decay=1.0),
        functools.partial(torch.optim.SGD, lr=0.1, maximize=True),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),  # with state: the first step, and later ones
        functools.partial(Own, lr=0.1),
        functools.partial(Own, lr=0.1),
    ]
    counts = []
    for make in makers:
        before = len(recorded)
        for _ in range(2):
            params = {"a": nn.Parameter(torch.ones(3, 4))}
            program = captured({"a": (3, 4)}, torch.float32)
            add_update(program, make(params.values()), names_of(params), None)
        counts.append(len(recorded) - before)
    assert counts == [1, 0, 1, 1, 1, 2, 2, 2]
