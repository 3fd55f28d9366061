"""Normalising and cutting captured models changes no result: loss, gradients, buffers, updated weights and state."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from graphshard.analysis import weight_views_cross
from graphshard.codegen.schedule import make, simulate
from graphshard.mesh import Mesh
from graphshard.partition import Line, search, times
from graphshard.passes.normalize import Normalize
from graphshard.passes.pipeline_cut import PipelineCut, for_schedule
from graphshard.pipeline import Context, Placement
from graphshard.program import Phase, Program, Role, Section, Slot, info, val
from graphshard.rewrite import call, copy_section, drop_dead
from graphshard.trace import Mode, capture, parameter_names
from graphshard.update import add_update
from graphshard.verify import verify
from marks import full
from models import interpret, zoo

aten = torch.ops.aten
gs = torch.ops.graphshard

MICROBATCHES = 2
DROPOUT = {"gpt": 0.1, "gpt2": 0.1, "t5": 0.1}


def part_of(index: int, tensor: Tensor) -> Tensor:
    """The part of a batch tensor that a micro-batch gets."""
    return tensor.chunk(MICROBATCHES)[index]


def programs(name: str, mode: Mode = "train", rows: int = 8) -> tuple[nn.Module, Program, list[dict[Slot, Tensor]]]:
    """A model in float64, its captured program, and the batch slots of each micro-batch."""
    sizes = {"dropout": DROPOUT[name]} if name in DROPOUT else {}
    model, batch, loss_fn = zoo.MODELS[name](rows=rows, **sizes)
    model.double()
    batch = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
    parts = [tree_map_only(Tensor, partial(part_of, i), batch) for i in range(MICROBATCHES)]
    args, kwargs = parts[0]
    program = capture(model, loss_fn, args, kwargs, mode=mode, microbatches=MICROBATCHES).program
    if mode == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        add_update(program, optimizer, parameter_names(model), max_grad_norm=0.5)
    slots = [
        {Slot(Role.BATCH, str(i)): leaf for i, leaf in enumerate(tree_flatten(part)[0]) if isinstance(leaf, Tensor)}
        for part in parts
    ]
    return model, program, slots


def copied(program: Program) -> Program:
    sections: dict[str, Any] = {name: copy_section(section) for name, section in program.sections().items()}
    return replace(program, **sections, params=dict(program.params))


def cut(program: Program, stages: int, placement: Placement | None = None) -> Program:
    result = PipelineCut().run(copied(program), Context(Mesh((("pp", stages),)), placement))
    verify(result)
    return result


def in_one_process(section: Section) -> Section:
    """What goes between stages, as operations that one process can run."""
    section = copy_section(section)
    for node in list(section.nodes()):
        arguments: Any = node.args
        with section.graph.inserting_before(node):
            if node.target is gs.transfer.default:
                assert info(node).stage == arguments[2]
                new = call(section.graph, aten.clone.default, arguments[:1], info(node))
            elif node.target is gs.stage_broadcast.default:
                new = call(section.graph, aten.alias.default, arguments[:1], info(node))
            elif node.target is gs.stage_sum.default:
                new, *others = arguments[0]
                for other in others:
                    new = call(section.graph, aten.add.Tensor, (new, other), info(node))
            else:
                continue
        node.replace_all_uses_with(new)
    drop_dead(section)
    return section


def results(program: Program, model: nn.Module, batches: list[dict[Slot, Tensor]]) -> dict[Slot, Tensor]:
    """What one step leaves, optimizer state being there; or the outputs of a program without a loss."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    stored: dict[Slot, Tensor] = {}
    for section in program.sections().values():
        for node, slot in section.inputs.items():
            if slot.role in (Role.PARAM, Role.BUFFER):
                stored[slot] = named[slot.name].detach().clone()
            elif slot.role is Role.STATE:
                stored[slot] = torch.full(val(node).shape, 0.25, dtype=val(node).dtype)
            elif slot.role is Role.LR:
                stored[slot] = torch.tensor(0.1, dtype=torch.float64)
    sections: dict[str, Any] = {name: in_one_process(section) for name, section in program.sections().items()}
    left, outputs = interpret.step(replace(program, **sections), stored, batches)
    return left | outputs[0]


def assert_same(program: Program, expected: dict[Slot, Tensor], found: dict[Slot, Tensor]) -> None:
    """Every replica has the value that the one place had before; gradients of tied weights are partial sums."""
    assert {replace(slot, stage=0) for slot in found} == set(expected)
    for slot, value in found.items():
        param = program.params.get(slot.name.removeprefix("grad:"))
        if slot.role is Role.CARRY and param is not None and len(param.stages) > 1:
            continue
        want = expected[replace(slot, stage=0)]
        assert torch.allclose(value, want, rtol=1e-9, atol=1e-12), f"{slot}: off by {(value - want).abs().max()}"


def transfers(program: Program) -> list[tuple[Any, int, int, Phase]]:
    nodes = (n for n in program.body.nodes() if n.target is gs.transfer.default)
    return [(n.args[0], n.args[1], n.args[2], info(n).phase) for n in nodes]  # type: ignore[misc]


def placement_of(program: Program) -> Placement:
    stages = {name: param.stages for name, param in program.params.items()}
    for section in program.sections().values():
        for slot in section.inputs.values():
            if slot.role is Role.BUFFER:
                stages[slot.name] = tuple(sorted({*stages.get(slot.name, ()), slot.stage}))
    return Placement(stages)


def storage_of(program: Program) -> set[Slot]:
    slots = [s for section in program.sections().values() for s in (*section.inputs.values(), *section.output_slots)]
    return {slot for slot in slots if slot.role in (Role.PARAM, Role.BUFFER, Role.STATE)}


@pytest.mark.parametrize("name", [full(name) if name in ("t5", "gpt2") else name for name in zoo.MODELS])
def test_training_gives_the_same(name: str) -> None:
    model, captured, batches = programs(name)
    expected = results(captured, model, batches)
    normal = Normalize().run(copied(captured), Context())
    verify(normal)
    assert not weight_views_cross(normal)
    assert_same(normal, expected, results(normal, model, batches))
    for stages in (2, 4):
        staged = cut(normal, stages)
        assert_same(staged, expected, results(staged, model, batches))
        assert {info(n).stage for n in staged.body.nodes()} == set(range(stages))
        moved = transfers(staged)
        assert all((src < dst) == (phase is Phase.FORWARD) for _, src, dst, phase in moved), (
            "against the schedule's order"
        )
        assert max(Counter((source, dst) for source, _, dst, _ in moved).values()) == 1, "a value is sent twice"
        late = {info(n).stage for n in staged.body.nodes() if info(n).phase is Phase.WEIGHT}
        assert late == {slot.stage for slot in staged.body.output_slots if slot.name.startswith("grad:")} - {0}


@pytest.mark.parametrize("name", ["convnet", full("gpt2"), full("t5")])
def test_later_programs_obey_the_first(name: str) -> None:
    model, captured, _ = programs(name)
    first = cut(Normalize().run(captured, Context()), 3)
    placement = placement_of(first)
    other: list[tuple[Mode, int]] = [("evaluate", 8), ("call", 8), ("train", 12)]
    for mode, rows in other:
        _, captured, batches = programs(name, mode, rows)
        expected = results(captured, model, batches)
        staged = cut(Normalize().run(captured, Context()), 3, placement)
        assert all(slot.stage in placement.stages[slot.name] for slot in storage_of(staged))
        assert_same(staged, expected, results(staged, model, batches))
        if mode == "call":
            assert {info(node).stage for node in staged.body.outputs.values()} == {2}, "results are on the last stage"
        if mode == "train":
            assert storage_of(staged) == storage_of(first)


def test_a_tied_weight_has_a_replica_on_each_stage_that_reads_it() -> None:
    _, captured, _ = programs("gpt2")
    staged = cut(Normalize().run(captured, Context()), 4)
    assert staged.params["transformer.wte.weight"].stages == (0, 3)
    slots = {slot.stage for slot in staged.body.output_slots if slot.name == "grad:transformer.wte.weight"}
    assert slots == {0, 3}, "each accumulates its own gradients: none is sent per micro-batch"


class Layers(nn.Module):
    """``count`` layers, of which every one takes as long as any other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def layers_a_stage(count: int, stages: int, schedule: str, microbatches: int, mode: Mode = "train") -> list[int]:
    model, x = Layers(count), torch.randn(64, 64)
    program = capture(model, nn.functional.mse_loss, (x, x), {}, mode=mode, microbatches=microbatches).program
    staged = PipelineCut(schedule=schedule).run(program, Context(Mesh((("pp", stages),))))
    held = Counter(param.stages[0] for param in staged.params.values())
    return [held[stage] for stage in range(stages)]


def test_stages_are_unequal_only_where_a_schedule_gains_by_it() -> None:
    assert layers_a_stage(20, 2, "", 4) == [10, 10]
    assert layers_a_stage(20, 2, "gpipe", 4) == [10, 10]
    first, second = layers_a_stage(20, 2, "1f1b", 4)
    assert first > second
    assert layers_a_stage(20, 2, "1f1b", 64) == [10, 10], "of many micro-batches the slowest stage decides"
    assert layers_a_stage(20, 2, "1f1b", 4, mode="evaluate") == [10, 10], "there is no backward to wait for"


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_cut_for_a_schedule_is_never_slower_than_the_equal_one(stages: int, name: str) -> None:
    """Whole layers: those nearest to the best shares may be worse than equal ones, as of 1F1B with 14 layers."""
    schedule = make(name, stages, 2 * stages)
    for count in range(stages, 33):
        line = Line((1.0,) * count, (0.0,) * (count + 1), (True,) * (count + 1))
        equal = search(line, stages, 0.0)
        assert equal is not None
        found = for_schedule(schedule, line, equal, 0.0)
        slow, fast = (simulate(schedule, *[times(line, cut, 0.0)] * 3).makespan for cut in (equal, found))
        assert fast <= slow
