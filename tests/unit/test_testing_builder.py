"""Programs written in Python: the same as those of graph text and of capture, and mistakes are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphshard import text
from graphshard.errors import BadBuild, IllegalProgram
from graphshard.program import Role, Slot
from graphshard.reference_inputs import random_inputs
from graphshard.testing import ProgramBuilder, apply, assert_same_meaning, nodes, run_on_ranks, trainable
from two_layers import two_layers


def built(mesh: str) -> ProgramBuilder:
    """two_layers, but for the update, which is ``sgd``'s."""
    build = ProgramBuilder(mesh, microbatches=2)
    body = build.body
    a, b, x = body.param("a.w", [4, 4]), body.param("b.w", [4, 4]), body.batch(0, [2, 4])
    h = body.op("aten.mm.default", x, a, module="a", name="h")
    y = body.op("aten.mm.default", h, b, module="b")
    loss = body.op(torch.ops.aten.mean.default, y, module="b")
    build.loss(loss)
    gy = body.op("aten.full.default", [2, 4], 0.125, forward=loss)
    build.gradient("b.w", body.op("aten.mm.default", body.op("aten.t.default", h, forward=y), gy, forward=y))
    gh = body.op("aten.mm.default", gy, body.op("aten.t.default", b, forward=y), forward=y)
    build.gradient("a.w", body.op("aten.mm.default", body.op("aten.t.default", x, forward=h), gh, forward=h))
    build.sgd(lr=0.1)
    return build


def test_a_built_program_means_what_its_text_means() -> None:
    program = built("pp=2 dp=2").program()
    assert_same_meaning(text.parse(two_layers("pp=2 dp=2")), program)
    assert text.to_text(text.parse(text.to_text(program))) == text.to_text(program)


def test_a_function_is_captured_with_its_gradients_and_update() -> None:
    def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["a.w"] @ p["b.w"]).mean()

    program = trainable(
        forward,
        [2, 4],
        params={"a.w": [4, 4], "b.w": [4, 4]},
        mesh="pp=2 dp=2",
        microbatches=2,
    )
    expected, inputs = built("pp=2 dp=2").program(), random_inputs(program)
    inputs.lrs = [0.1]
    assert_same_meaning(expected, program, inputs=inputs)
    assert list(program.params) == ["a.w", "b.w"]


def test_a_model_is_captured_with_its_loss_function() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    program = trainable(model, [2, 4], [2, 1], loss_fn=nn.functional.mse_loss, mesh="dp=2", optimizer=torch.optim.Adam)
    assert nodes(program).in_graph("body").module("0").phase("forward").op("addmm").count == 1
    assert program.first_epilogue is not None  # Adam's first step makes its state
    results = run_on_ranks(apply("normalize;pipeline-cut;zero:stage=3", program), steps=2)
    assert {name for name in results[0] if name.startswith("state 0.bias")} == {
        "state 0.bias exp_avg",
        "state 0.bias exp_avg_sq",
        "state 0.bias step",
    }


def test_without_an_optimizer_gradients_are_outputs() -> None:
    program = trainable(lambda p, x: (x @ p["w"]).sum(), [2, 4], params={"w": [4, 1]}, optimizer=None)
    inputs = random_inputs(program, steps=1)
    (result,) = run_on_ranks(program, inputs)
    given = inputs.batches[0][0][0][0]
    assert torch.allclose(result["output grad:w of step 0"], given.sum(0)[:, None])


def wrong_operator(build: ProgramBuilder) -> None:
    build.body.op("aten.mmm.default")


def no_overload(build: ProgramBuilder) -> None:
    build.body.op("aten.mm")


def wrong_arguments(build: ProgramBuilder) -> None:
    build.body.op("aten.mm.default", build.body.batch(0, [2, 4]), build.body.batch(1, [2, 4]))


def another_shape(build: ProgramBuilder) -> None:
    build.body.param("w", [2])
    build.epilogue.param("w", [3])


def loss_of_several(build: ProgramBuilder) -> None:
    build.loss(build.body.batch(0, [2]))


def unknown_gradient(build: ProgramBuilder) -> None:
    build.gradient("v", build.body.param("w", [2]))


def gradient_of_another_shape(build: ProgramBuilder) -> None:
    build.body.param("w", [3])
    build.gradient("w", build.body.batch(0, [2]))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (wrong_operator, "no operator 'aten.mmm.default'; did you mean 'aten.mm"),
        (no_overload, "no operator 'aten.mm'; did you mean 'aten.mm.default'"),
        (wrong_arguments, "aten.mm.default does not take these arguments: "),
        (another_shape, r"parameter 'w' is torch.float32 \[2\], not torch.float32 \[3\]"),
        (loss_of_several, r"has shape \[2\]; a loss is a scalar"),
        (unknown_gradient, "a gradient of 'v', which no graph reads; parameters: w"),
        (gradient_of_another_shape, r"%x has shape \[2\]; a gradient of 'w' has \[3\]"),
    ],
)
def test_a_mistake_is_named(mistake: Callable[[ProgramBuilder], None], message: str) -> None:
    with pytest.raises(BadBuild, match=f"cannot build this program: .*{message}"):
        mistake(ProgramBuilder())


def test_what_is_built_is_verified() -> None:
    build = ProgramBuilder()
    late = build.body.read(Slot(Role.CARRY, "nobody's"), [2])
    build.output(0, late)
    with pytest.raises(IllegalProgram, match="not initialised by the prologue"):
        build.program()
