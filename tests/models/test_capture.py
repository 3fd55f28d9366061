"""A captured program computes what eager training computes: loss, gradients and buffers over two micro-batches."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from graphshard.program import Phase, Role, Slot, info
from graphshard.trace import Captured, Mode, caches, capture
from graphshard.trace.key import seen
from graphshard.verify import verify
from models import interpret, zoo

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
}
MICROBATCHES = 2
MODES: tuple[Mode, ...] = ("evaluate", "call")


def case(name: str, dtype: torch.dtype, **sizes: Any) -> tuple[nn.Module, list[zoo.Batch], Any]:
    """A model and its batch, cut into micro-batches, in ``dtype``."""
    model, batch, loss_fn = zoo.MODELS[name](**sizes)
    batch = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
    leaves, spec = tree_flatten(batch)
    rows = [[x.chunk(MICROBATCHES)[i] if isinstance(x, Tensor) else x for x in leaves] for i in range(MICROBATCHES)]
    return model.to(dtype), [tree_unflatten(row, spec) for row in rows], loss_fn


def slots_of(batch: zoo.Batch) -> dict[Slot, Tensor]:
    leaves = tree_flatten(batch)[0]
    return {Slot(Role.BATCH, str(i)): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def stored(model: nn.Module) -> dict[Slot, Tensor]:
    params = {Slot(Role.PARAM, name): p.detach().clone() for name, p in model.named_parameters()}
    return params | {Slot(Role.BUFFER, name): b.clone() for name, b in model.named_buffers()}


def eager_loss(model: nn.Module, batch: zoo.Batch, loss_fn: Any) -> Tensor:
    args, kwargs = batch
    if loss_fn is not None:
        result: Tensor = loss_fn(model(args[0]), *args[1:])
        return result
    output = model(*args, **kwargs)
    return output if isinstance(output, Tensor) else output["loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_parity(name: str, dtype: torch.dtype) -> None:
    # Both depths and both precisions are covered, at half the price of all four.
    deep = dtype is torch.float64 or name in ("mlp", "nested")
    model, parts, loss_fn = case(name, dtype, **({} if deep else {"depth": 1}))
    captured = capture(model, loss_fn, *parts[0], mode="train", microbatches=MICROBATCHES)
    verify(captured.program)
    before = stored(model)
    results, _ = interpret.step(captured.program, before, [slots_of(part) for part in parts])

    losses = [eager_loss(model, part, loss_fn) for part in parts]
    torch.stack(losses).sum().backward()
    close = TOLERANCE[dtype]
    torch.testing.assert_close(results[Slot(Role.LOSS, "loss")], torch.stack(losses).mean().detach(), **close)
    for path, parameter in model.named_parameters():
        gradient = results.get(Slot(Role.CARRY, f"grad:{path}"))
        assert captured.program.params[path].has_grad == (parameter.grad is not None) == (gradient is not None), path
        if parameter.grad is not None:
            torch.testing.assert_close(gradient, parameter.grad / MICROBATCHES, **close, msg=f"{path}: {{}}".format)
    for path, buffer in model.named_buffers():
        after = results.get(Slot(Role.BUFFER, path), before[Slot(Role.BUFFER, path)])
        torch.testing.assert_close(after, buffer, **close)


@pytest.mark.parametrize("name", ["mlp", "convnet", "encoder", "nested", "gpt2"])
def test_evaluation_and_call(name: str) -> None:
    model, parts, loss_fn = case(name, torch.float64, **({} if name == "nested" else {"depth": 1}))
    model.train()
    model.get_submodule(next(path for path, _ in model.named_children())).eval()  # a mixture, to be given back
    flags = [module.training for module in model.modules()]
    programs = {mode: capture(model, loss_fn, *parts[0], mode=mode) for mode in MODES}
    assert [module.training for module in model.modules()] == flags

    before = stored(model)
    model.eval()
    with torch.no_grad():
        loss = eager_loss(model, parts[0], loss_fn)
        args, kwargs = parts[0]
        expected = model(args[0]) if loss_fn is not None else model(*args, **kwargs)
    for captured in programs.values():
        verify(captured.program)
        assert all(info(node).phase is Phase.FORWARD for node in captured.program.body.nodes())
        assert set(captured.program.params) == {path for path, _ in model.named_parameters()}
    results, _ = interpret.step(programs["evaluate"].program, before, [slots_of(parts[0])])
    torch.testing.assert_close(results[Slot(Role.LOSS, "loss")], loss)
    _, outputs = interpret.step(programs["call"].program, before, [slots_of(parts[0])])
    check_output(programs["call"], outputs[0], expected)


def check_output(captured: Captured, outputs: dict[Slot, Tensor], expected: Any) -> None:
    """The output tensors, put where they belong, are the model's output but for its caches."""
    assert captured.out_spec is not None
    leaves = list(captured.output_leaves)
    for slot, value in outputs.items():
        leaves[int(slot.name)] = value
    result = captured.out_spec.unflatten(leaves)
    assert type(result) is type(expected)
    wanted = tree_flatten(expected)[0]
    assert len(wanted) == len(leaves)
    for have, want in zip(leaves, wanted, strict=True):
        if isinstance(want, Tensor):
            torch.testing.assert_close(have, want)


def test_tied_weights_are_one_parameter() -> None:
    model, parts, loss_fn = case("gpt", torch.float32)
    program = capture(model, loss_fn, *parts[0], mode="train").program
    assert program.params["tokens.weight"].aliases == ("head.weight",)
    assert "head.weight" not in program.params
    read = [slot.name for slot in program.body.inputs.values() if slot.role is Role.PARAM]
    assert read.count("tokens.weight") == 1
    assert "head.weight" not in read


def test_gradients_are_accumulated_onto_the_carry() -> None:
    model, parts, loss_fn = case("gpt", torch.float32)
    body = capture(model, loss_fn, *parts[0], mode="train").program.body
    inputs = body.input_slots
    for slot, node in body.outputs.items():
        assert node.target is torch.ops.aten.add.Tensor
        assert node.args[0] is inputs[slot]


def test_nodes_know_their_module_and_what_they_differentiate() -> None:
    model, parts, loss_fn = case("gpt", torch.float32)
    body = capture(model, loss_fn, *parts[0], mode="train").program.body
    origins = {info(node).origin: node for node in body.nodes()}
    assert len(origins) == sum(1 for _ in body.nodes())
    attention = [node for node in body.nodes() if node.target is torch.ops.graphshard.attention.default]
    assert [info(node).module for node in attention] == ["h.0.attention", "h.1.attention"]
    for node in body.nodes():
        record = info(node)
        assert record.phase in (Phase.FORWARD, Phase.BACKWARD)
        if record.phase is Phase.BACKWARD and record.forward in origins:
            assert info(origins[record.forward]).phase is Phase.FORWARD
            assert info(origins[record.forward]).module == record.module
    backward = [node for node in body.nodes() if node.target is torch.ops.graphshard.attention_backward.default]
    assert {info(node).forward for node in backward} == {info(node).origin for node in attention}
    # What only sums gradients differentiates nothing.
    loose = {n.target for n in body.nodes() if info(n).phase is Phase.BACKWARD and not info(n).forward}
    assert loose == {torch.ops.aten.add.Tensor, torch.ops.aten.full.default}


def test_meta_model_is_captured_without_memory() -> None:
    with torch.device("meta"):
        model, (args, kwargs), loss_fn = zoo.llama(rows=1, length=512, vocabulary=32000, width=2048, heads=16)
    program = capture(model, loss_fn, args, kwargs, mode="train").program
    verify(program)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {val.device.type for val in (node.meta["val"] for node in program.body.inputs)} == {"cpu"}


def test_model_is_left_as_it_was() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.last: Tensor | None = None
            self.count: Tensor
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            assert self.last is None, "capture runs the model on a model that was run before"
            self.last = self.linear(x)
            self.count = self.count + 1
            return self.last.sum()

    model = Remembers()
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    capture(model, None, (torch.zeros(2, 4),), {}, mode="train")
    assert model.last is None
    assert all(model.get_parameter(n) is t for n, t in tensors.items() if isinstance(t, nn.Parameter))
    assert model.count is tensors["count"]
    assert not model._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.compiler.is_compiling()


class Scaled(nn.Module):
    """A linear layer, then ``scaled``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.linear(x)).square().mean()

    def scaled(self, y: Tensor) -> Tensor:
        return y


class Hooked(Scaled):
    """The first forward pass installs a hook."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            self.linear.register_forward_hook(lambda module, given, y: y * 2)
            self.hooked = True
        return super().forward(x)


class Nested(Scaled):
    """Numbers in containers of containers, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"scales": [1.0, deque([3.0])], "seen": {1}}

    def scaled(self, y: Tensor) -> Tensor:
        scales = self.state["scales"]
        scales[0] *= 2
        scales[1].append(scales[0])
        self.state["seen"].add(len(self.state["seen"]) + 1)
        return torch.mul(y, scales[0] * scales[1][-1] * max(self.state["seen"]))


class Remembered(Scaled):
    """Results are kept in a list, and a table in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []

    def scaled(self, y: Tensor) -> Tensor:
        self.seen.append(y)
        if 4 not in self.tables:
            self.tables[4] = torch.linspace(0, 1, 4)
        return y * self.tables[4] * len(self.seen)


class Seeded(Scaled):
    """Random numbers that are the same each time."""

    def scaled(self, y: Tensor) -> Tensor:
        rng = np.random.RandomState(0)
        np.random.seed(1)
        return torch.mul(y, rng.rand() * random.Random(0).random() * np.random.rand())


class Checkpointed(Remembered):
    """The backward runs it again."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return result


@functools.lru_cache
def cached_table() -> Tensor:
    return torch.linspace(0, 1, 4)


@functools.cache
def cached_pair() -> tuple[Tensor, int]:
    return torch.linspace(0, 1, 4), 2


TABLES: dict[int, Tensor] = {}


class Cached(Scaled):
    """Tables in functools caches, in a class, in a global and in an object."""

    tables: ClassVar[dict[int, Tensor]] = {}

    class Box:
        table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.box = self.Box()

    @staticmethod
    @functools.lru_cache
    def own_table() -> Tensor:
        return torch.linspace(0, 1, 4)

    def scaled(self, y: Tensor) -> Tensor:
        for tables in (TABLES, self.tables):
            if 4 not in tables:
                tables[4] = torch.linspace(0, 1, 4)
            y = y + tables[4]
        if self.box.table is None:
            self.box.table = torch.linspace(0, 1, 4)
        pair = cached_pair()
        return (y + self.box.table) * cached_table() * pair[0] * pair[1] * self.own_table()


def forget() -> None:
    for cache in (cached_table, cached_pair, Cached.own_table):
        cache.cache_clear()
    TABLES.clear()
    Cached.tables.clear()


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("kind", [Hooked, Nested, Remembered, Checkpointed, Seeded, Cached])
def test_each_run_sees_the_model_as_it_was(kind: type[Scaled], mode: Mode) -> None:
    model, x = kind(), torch.randn(2, 4)
    untouched = copy.deepcopy(model)
    np.random.seed(1)
    for _ in range(2):
        seen(model, None, (x,), {}, mode)
        program = capture(model, None, (x,), {}, mode=mode).program
        results, _ = interpret.step(program, stored(model), [{Slot(Role.BATCH, "0"): x}])
        torch.testing.assert_close(results[Slot(Role.LOSS, "loss")], copy.deepcopy(untouched)(x).detach())
        forget()
    torch.testing.assert_close(model(x), untouched(x))
    assert len(model.linear._forward_hooks) == len(untouched.linear._forward_hooks)


def test_hooks_that_transformers_installs_run_once_and_are_not_left() -> None:
    model, parts, _ = case("llama", torch.float32, depth=2)
    _, kwargs = parts[0]
    untouched = copy.deepcopy(model)
    captured = capture(model, None, (), {**kwargs, "output_hidden_states": True}, mode="call")
    assert not any(module._forward_hooks for module in model.modules())
    outputs = [slot for slot in captured.program.body.outputs if slot.role is Role.OUTPUT]
    result = untouched(**kwargs, output_hidden_states=True)
    assert len(outputs) == len([result.loss, result.logits, *result.hidden_states])


def test_a_cache_that_holds_real_values_is_kept() -> None:
    forget()
    table = cached_table()
    model = Cached()
    program = capture(model, None, (torch.randn(2, 4),), {}, mode="train").program
    assert cached_table() is table
    assert any(value is table or torch.equal(value, table) for value in program.constants.values())
    assert cached_pair.cache_info().currsize == 0
    assert not TABLES
    assert not Cached.tables
    assert model.box.table is None


STATE: dict[str, Any] = {"scale": torch.ones(4), "nested": {"shift": [torch.zeros(4)]}}
HISTORY = [torch.zeros(4), torch.ones(4)]
MANY = list(range(20_000))


class Replaces(Scaled):
    """Tensors of the user's in globals and in a class are replaced, moved and added."""

    averages: ClassVar[dict[str, Tensor]] = {"scale": torch.ones(4)}

    def scaled(self, y: Tensor) -> Tensor:
        mean = y.detach().mean(0)
        result: Tensor = y * STATE["scale"] * self.averages["scale"] + STATE["nested"]["shift"][0] + HISTORY[1]
        STATE["scale"] = self.averages["scale"] = mean
        STATE["nested"]["shift"][0] = mean
        HISTORY.pop(0)
        HISTORY.append(mean)
        MANY.append(mean)  # type: ignore[arg-type]
        return result


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_data_outside_of_the_model_that_it_replaces_is_put_back(mode: Mode) -> None:
    def contents() -> list[Any]:
        return [*STATE.values(), *STATE["nested"]["shift"], *HISTORY, *Replaces.averages.values(), *MANY]

    before = contents()
    captured = capture(Replaces(), None, (torch.ones(2, 4),), {}, mode=mode)
    after = contents()
    assert len(after) == len(before)
    assert all(one is other for one, other in zip(after, before, strict=True))
    verify(captured.program)


class Lazy(Mapping[int, int]):
    """Computes its values."""

    def __getitem__(self, key: int) -> int:
        raise AssertionError("capture looks at data of the user's that the model does not change")

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


DATA: dict[str, Any] = {"lazy": Lazy(), "rows": [[0] * 8 for _ in range(300)]}


def test_data_outside_of_the_model_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is the content of a cache that is not filled."""
    looked: list[object] = []

    def holds(value: Any, *given: Any) -> bool:
        looked.append(value)
        return before(value, *given)

    before = caches._holds
    monkeypatch.setattr(caches, "_holds", holds)
    forget()
    table = cached_table()
    capture(Scaled(), None, (torch.ones(2, 4),), {}, mode="train")
    assert not looked
    assert cached_table() is table


class Weighted:
    """A loss with a cache of its own."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.cache: dict[str, Tensor] = {}

    def __call__(self, y: Tensor, target: Tensor) -> Tensor:
        if self.weight is None:
            self.weight = torch.ones(4)
        return self.loss(y * self.weight, target)

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        return torch.mean((y * self.cache.setdefault("table", torch.ones(4)) - target) ** 2)


@pytest.mark.parametrize("of", [lambda one: one, lambda one: one.loss, lambda one: functools.partial(one.loss)])
def test_what_the_object_of_a_loss_keeps_is_taken_out(of: Callable[[Weighted], Any]) -> None:
    one = Weighted()
    for _ in range(2):
        capture(nn.Linear(4, 4), of(one), (torch.ones(2, 4), torch.ones(2, 4)), {}, mode="train")
        assert one.weight is None
        assert not one.cache


def test_dropout_differs_between_microbatches_and_repeats_with_the_key() -> None:
    model, parts, loss_fn = case("gpt", torch.float32, dropout=0.2)
    program = capture(model, loss_fn, *parts[0], mode="train").program
    verify(program)
    same = [slots_of(parts[0])] * 2
    first, _ = interpret.step(program, stored(model), same, seed=1)
    again, _ = interpret.step(program, stored(model), same, seed=1)
    other, _ = interpret.step(program, stored(model), same, seed=2)
    one, _ = interpret.step(program, stored(model), same[:1], seed=1)
    assert all(torch.equal(first[slot], again[slot]) for slot in first)
    loss = Slot(Role.CARRY, "loss")
    assert first[loss] != other[loss]
    assert first[loss] != 2 * one[loss]


def test_the_backward_uses_the_mask_of_the_forward() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.weight * x, 0.5).sum()

    model = Dropped()
    x = torch.ones(64)
    program = capture(model, None, (x,), {}, mode="train").program
    results, _ = interpret.step(program, stored(model), [{Slot(Role.BATCH, "0"): x}])
    gradient = results[Slot(Role.CARRY, "grad:weight")]
    assert set(gradient.tolist()) == {0.0, 2.0}
    torch.testing.assert_close((gradient * model.weight).sum(), results[Slot(Role.LOSS, "loss")])


def test_random_operators_are_numbered() -> None:
    model, parts, loss_fn = case("gpt", torch.float32, dropout=0.1)
    body = capture(model, loss_fn, *parts[0], mode="train").program.body
    ids = [node.args[-1] for node in body.nodes() if node.target is torch.ops.graphshard.seed.default]
    assert ids == list(range(len(ids)))
    assert len(ids) == 6


def test_transformer_encoder_in_evaluation_mode_does_not_take_the_fast_path() -> None:
    model, parts, loss_fn = case("encoder", torch.float32)
    program = capture(model, loss_fn, *parts[0], mode="call").program
    targets = {str(node.target) for node in program.body.nodes()}
    assert "graphshard.attention.default" in targets
    assert not any("_transformer_encoder" in target or "_native_multi_head" in target for target in targets)


def test_a_function_under_torch_compile_is_captured_as_it_is_written() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        @torch.compile
        def forward(self, x: Tensor) -> Any:
            return self.linear(x).relu().sum()

    program = capture(Compiled(), None, (torch.zeros(2, 4),), {}, mode="train").program
    assert torch.ops.aten.relu.default in {node.target for node in program.body.nodes()}


def test_a_constant_is_lifted_with_its_value() -> None:
    model, parts, loss_fn = case("nested", torch.float32)
    program = capture(model, loss_fn, *parts[0], mode="train").program
    names = [slot.name for slot in program.body.inputs.values() if slot.role is Role.CONSTANT]
    assert sorted(names) == sorted(program.constants)
    assert isinstance(model, zoo.Nested)
    assert any(torch.equal(value, model.table) for value in program.constants.values())
