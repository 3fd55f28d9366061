"""Hypothesis strategies: random programs that are valid, and lists of passes to bring them further.

::

    @given(programs(meshes=["dp=2"]))
    def test_my_pass_keeps_the_meaning(program: Program) -> None:
        assert_same_meaning(program, apply([MyPass()], program))
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import note, reject
from hypothesis import strategies as st

from graphshard import text
from graphshard.errors import StageTooSmall, TooManyStages
from graphshard.program import Level, Program
from graphshard.testing.meaning import apply
from graphshard.testing.random_model import (
    BINARY,
    UNARY,
    WITH_PARAMETERS,
    Layer,
    ModelSpec,
    RandomModel,
    accepts,
    parameter_shapes,
)
from graphshard.testing.trainable import Factory, trainable

_SIZES = st.integers(1, 4)
_OPTIMIZERS: dict[str, Factory | None] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
    "none": None,
}


_POLICIES = (
    "policy=full",
    "policy=selective",
    "policy=cut,levels=20,blocks=1",
    "policy=cut,levels=20,blocks=1,instead=all",
    "policy=full,offload_activations=True",
)


@st.composite
def model_specs(draw: st.DrawFn, max_ops: int = 6) -> ModelSpec:
    """Models of at most ``max_ops`` layers; the first is linear and trained, so that there is a gradient."""
    rows = draw(_SIZES)
    batch = tuple((rows, columns) for columns in draw(st.lists(_SIZES, min_size=1, max_size=2)))
    layers = [Layer("linear", (0,), draw(_widths(batch[0][1])))]
    for _ in range(draw(st.integers(0, max_ops - 1))):
        layers.append(draw(_layers(ModelSpec(batch, tuple(layers)))))
    return ModelSpec(batch, tuple(layers))


@st.composite
def _layers(draw: st.DrawFn, before: ModelSpec) -> Layer:
    shapes = before.shapes()
    # Counted from the end: what is simplest, 0, makes a chain.
    first = len(shapes) - 1 - draw(st.integers(0, len(shapes) - 1))
    kind = draw(st.sampled_from([*UNARY, *WITH_PARAMETERS, *BINARY]))
    if kind in UNARY:
        return Layer(kind, (first,))
    if kind in BINARY:
        fitting = [i for i, shape in enumerate(shapes) if accepts(kind, shapes[first], shape)]
        return Layer(kind, (first, draw(st.sampled_from(fitting))))
    layer = Layer(kind, (first,), draw(_widths(shapes[first][1])), frozen=draw(st.integers(0, 7)) == 7)
    wanted = parameter_shapes(layer, shapes[first][1])
    alike = [
        i
        for i, other in enumerate(before.layers)
        if other.tied is None and parameter_shapes(other, shapes[other.reads[0]][1]) == wanted
    ]
    tied = draw(st.sampled_from([None, *alike]))
    return layer if tied is None else Layer(kind, (first,), layer.width, tied)


def _widths(columns: int) -> st.SearchStrategy[int]:
    """Often the width that is there: parameters of one shape can be tied and merge alike."""
    return st.one_of(st.just(columns), _SIZES)


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    levels: Sequence[Level | str] = (Level.CAPTURED,),
    meshes: Sequence[str] = ("", "dp=2", "pp=2", "pp=2 dp=2"),
    max_ops: int = 6,
) -> Program:
    """Training programs of random models: legal, printed and parsed alike, run by :func:`run_on_ranks`.

    Args:
        levels: captured; staged and sharded ones are made by the passes of :func:`pass_lists`.
        meshes: as in graph text.
        max_ops: layers of a model.
    """
    spec = draw(model_specs(max_ops))
    mesh, microbatches = draw(st.sampled_from(list(meshes))), draw(st.integers(1, 2))
    optimizer = _OPTIMIZERS[draw(st.sampled_from(list(_OPTIMIZERS)))]
    level = Level(draw(st.sampled_from(list(levels))))
    passes = draw(pass_lists(level))
    model = RandomModel(spec)
    program = trainable(model, *spec.batch, optimizer=optimizer, mesh=mesh, microbatches=microbatches)
    try:
        program = apply(passes, program)
    except (TooManyStages, StageTooSmall):
        reject()
    note(text.to_text(program))
    return program


@st.composite
def pass_lists(draw: st.DrawFn, level: Level | str = Level.SHARDED, *, fuse: bool = False) -> str:
    """Passes, as on the command line, that bring a captured program to ``level``; "" for captured. ``fuse``: to the
    end, where operations may be in regions."""
    if level == Level.CAPTURED:
        return ""
    precision = draw(st.sampled_from(["", "precision;", "precision:dtype=fp16,reduce=fp16;"]))
    saving = draw(st.sampled_from(["", *(f";memory-policy:{policy};recompute" for policy in _POLICIES)]))
    staged = f"normalize;{precision}pipeline-cut{saving}"
    if level == Level.STAGED:
        return staged
    passes = [staged, f"zero:stage={draw(st.integers(0, 3))}"]
    optional: dict[str, Any] = {
        "bucket": st.just("bucket"),
        "hoist": st.sampled_from(["hoist:budget_gb=0.0000001", "hoist:budget_gb=1"]),
        "overlap": st.just("overlap"),
        "offload": st.sampled_from(
            ["offload:optimizer=cpu,params=nvme", "offload:optimizer=nvme", "offload:params=cpu"]
        ),
    }
    passes += [draw(choice) for choice in optional.values() if draw(st.booleans())]
    passes += [draw(st.sampled_from(["fuse", "fuse:most=3"]))] if fuse else []
    return ";".join(passes)
