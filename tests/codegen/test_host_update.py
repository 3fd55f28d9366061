"""State that is kept in host memory is updated by the CPU where that costs less than to move it; to the same bits."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from graphshard import text
from graphshard.codegen.lower import lower
from graphshard.codegen.schedule import make
from graphshard.compile import Compiled
from graphshard.errors import IllegalProgram, PlanError
from graphshard.execution import ExecutionPlan, Instruction, Op, TensorType
from graphshard.homes import on_host
from graphshard.passes.offload import Offload
from graphshard.program import HOST, Program, info, set_info
from graphshard.prove import prove
from graphshard.rewrite import after, call
from graphshard.runtime.offload import Homes, HostWork
from graphshard.verify import verify
from layers import compiled_layers

WIDTH = 512
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


def compiled(
    plan: str, optimizer: Callable[..., Any] = ADAMW, update: str = "host", executor: str = "none", **options: Any
) -> tuple[Compiled, torch.Tensor]:
    torch.manual_seed(0)
    params = "cpu" if "params=cpu" in plan else None
    options |= {
        "optimizer": optimizer,
        "executor": executor,
        "passes": [Offload(optimizer="cpu", params=params, update=update)],
    }
    return compiled_layers(plan, layers=3, rows=8, width=WIDTH, **options)


@functools.cache
def program_text(plan: str = "zero3+bf16+offload:optimizer=cpu") -> str:
    return text.to_text(compiled(plan)[0].program)


def program() -> Program:
    return text.parse(program_text())


CHOICES = [
    ("zero3+offload:optimizer=cpu", SGD, False),
    ("zero3+offload:optimizer=cpu", ADAMW, False),  # parameters would go there and back, too
    ("zero3+offload:optimizer=cpu,params=cpu", ADAMW, True),
    ("zero3+bf16+offload:optimizer=cpu", ADAMW, True),
    ("zero1+bf16+offload:optimizer=cpu", ADAMW, True),
    ("dp2+bf16+offload:optimizer=cpu", ADAMW, True),
    ("zero3+pp2+fp16+offload:optimizer=cpu", ADAMW, True),
]


@pytest.mark.parametrize(("plan", "optimizer", "by_cpu"), CHOICES)
def test_the_cheaper_side_updates(plan: str, optimizer: Callable[..., Any], by_cpu: bool) -> None:
    made, _ = compiled(plan, optimizer, "cheaper")
    assert any(map(on_host, made.program.epilogue.nodes())) is by_cpu
    assert not any(map(on_host, made.program.body.nodes()))


def test_gradients_and_parameters_are_all_that_moves() -> None:
    by_cpu, by_device = (compiled("zero3+bf16+offload:optimizer=cpu", update=where)[0] for where in ("host", "device"))
    count = 3 * WIDTH * WIDTH // 2  # of a rank's part
    scalars = 8 * (3 + 1)  # the numbers of the step, and the learning rate
    assert by_device.report()["ranks"][0]["moved_bytes"] == {"from cpu": 12 * count, "to cpu": 12 * count}
    assert by_cpu.report()["ranks"][0]["moved_bytes"] == {"from cpu": 2 * count, "to cpu": 4 * count + scalars}
    assert by_cpu.report()["ranks"][0]["peak_bytes"] <= by_device.report()["ranks"][0]["peak_bytes"]


def test_explain_says_who_updates() -> None:
    made, _ = compiled("zero3+bf16+offload:optimizer=cpu")
    assert "updated by the CPU, in host memory: 4.7 MB" in made.explain()
    made, _ = compiled("zero3+bf16+offload:optimizer=cpu", update="device")
    assert "updated by the CPU" not in made.explain()


def test_text_says_where_an_operation_runs() -> None:
    assert "device=host" in program_text()
    assert text.to_text(program()) == program_text()


def on_cpu(program: Program) -> fx.Node:
    return next(node for node in program.epilogue.nodes() if on_host(node))


def test_the_cpu_reads_what_is_in_host_memory() -> None:
    broken = program()
    node = on_cpu(broken)
    away = next(source for source in node.all_input_nodes if source.op == "call_function")
    (given,) = away.all_input_nodes
    with after(given):
        made = call(node.graph, torch.ops.aten.neg.default, (given,), info(away))
    node.replace_input_with(away, made)
    with pytest.raises(IllegalProgram, match=r"an operation in host memory reads %\w+, which is on the device"):
        verify(broken)


def test_the_device_does_not_read_what_the_cpu_makes() -> None:
    broken = program()
    reload = next(n for n in broken.epilogue.nodes() if "reload" in n.name and on_host(n.all_input_nodes[0]))
    (wait,) = reload.users
    wait.replace_all_uses_with(reload.all_input_nodes[0])
    with pytest.raises(IllegalProgram, match=r"is kept in cpu|offloaded to cpu"):
        verify(broken)


def test_there_are_two_devices() -> None:
    broken = program()
    set_info(on_cpu(broken), device="tpu")
    with pytest.raises(IllegalProgram, match="'tpu' is no device; there is host"):
        verify(broken)


@functools.cache
def gpu_plan() -> ExecutionPlan:
    made, _ = compiled("zero3+bf16+offload:optimizer=cpu")
    return lower(made.program, make("1f1b", 1, 1), on_gpu=True)


def test_the_cpu_has_kernels_of_its_own_beside_a_gpu() -> None:
    plan = gpu_plan()
    prove(plan)
    (stage,) = plan.stages
    by_cpu = [ins for ins in stage.step() if ins.device]
    assert len(by_cpu) == 3
    assert all(ins.device == HOST and " on host " in str(ins) for ins in by_cpu)
    called = {name for ins in by_cpu for name in re.findall(r"kernels\.(\w+)", stage.segments[ins.name].source)}
    assert {(plan.kernels[name].language, plan.kernels[name].how) for name in called} == {
        ("torch", "its fused Adam, in place")
    }


def test_updates_do_not_wait_for_one_another() -> None:
    """Gradients leave during the backward, and no parameter comes back before the last update has begun."""
    step = gpu_plan().stages[0].step()
    updates = [at for at, ins in enumerate(step) if ins.device]
    backs = [at for at, ins in enumerate(step) if ins.op is Op.RELOAD]
    last = max(at for at, ins in enumerate(step) if ins.op is Op.RUN and ins.action == "B0.0")
    assert updates[0] < last
    assert updates[-1] < backs[0]


def damaged(edit: Callable[[Instruction], Instruction]) -> ExecutionPlan:
    plan = gpu_plan()
    (stage,) = plan.stages
    epilogue = tuple(edit(ins) for ins in stage.epilogue)
    return replace(plan, stages=(replace(stage, epilogue=epilogue, first_epilogue=None),), peak_bytes=())


def test_a_plan_that_runs_it_on_the_device_is_refused() -> None:
    with pytest.raises(PlanError, match="is read while it is offloaded to cpu"):
        prove(damaged(lambda ins: replace(ins, device="")))


def test_a_plan_that_runs_other_work_on_the_host_is_refused() -> None:
    with pytest.raises(PlanError, match="is read by the CPU, but it is on the device"):
        prove(damaged(lambda ins: replace(ins, device=HOST) if ins.op is Op.RUN else ins))


TRAINED = [
    ("zero3+offload:optimizer=cpu", ADAMW, {}),
    ("zero3+offload:optimizer=cpu,params=cpu", ADAMW, {"max_grad_norm": 0.01}),
    ("zero1+bf16+accum2+offload:optimizer=cpu", ADAMW, {}),
    ("dp2+offload:optimizer=cpu", SGD, {}),
    ("zero3+pp2+fp16+offload:optimizer=cpu", ADAMW, {"max_grad_norm": 0.1}),
    ("zero3+bf16+offload:optimizer=cpu,params=cpu", ADAMW, {}),
    ("zero3+fp16+accum2+offload:optimizer=cpu,params=cpu", ADAMW, {"max_grad_norm": 0.1}),
]


@pytest.mark.parametrize(("plan", "optimizer", "options"), TRAINED)
def test_the_bits_are_the_same(plan: str, optimizer: Callable[..., Any], options: dict[str, Any]) -> None:
    found = []
    for update in ("device", "host"):
        made, x = compiled(plan, optimizer, update, "local", **options)
        losses = [made.step(x, x) for _ in range(4)]
        state = made.optimizer.state_dict()["state"]
        found.append([*losses, *made.state_dict().values(), *(v for of in state.values() for v in of.values())])
        assert any(ins.device for s in made.execution_plan.stages for ins in s.step()) is (update == "host")
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(*found, strict=True))


def test_what_fails_on_the_cpu_fails_where_it_is_read() -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no such update")

    homes = Homes(torch.device("cpu"))
    kept = homes.keep(torch.ones(4), "cpu")
    (made,) = homes.compute(HostWork(fails, {}, [TensorType((4,), torch.float32, (1,))], {}), [kept], [None])
    with pytest.raises(RuntimeError, match="no such update"):
        homes.fetch(made)
    homes.close()


def test_what_failed_is_not_built_on() -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no such update")

    homes = Homes(torch.device("cpu"))
    kept = homes.keep(torch.ones(4), "cpu")
    for function in (fails, lambda values, *_: (values[0],)):
        (kept,) = homes.compute(HostWork(function, {}, [kept.kind], {0: 0}), [kept], [None])
    with pytest.raises(RuntimeError, match="no such update"):
        homes.fetch(kept)
    homes.close()


def test_work_on_the_cpu_is_done_in_order() -> None:
    def doubled(values: list[torch.Tensor], *_: object) -> tuple[torch.Tensor, ...]:
        return (values[0].mul_(2),)

    homes = Homes(torch.device("cpu"))
    kept = homes.keep(torch.ones(4), "cpu")
    for _ in range(5):
        (kept,) = homes.compute(HostWork(doubled, {}, [kept.kind], {0: 0}), [kept], [None])
    assert homes.fetch(kept).tolist() == [32.0] * 4
    homes.close()
