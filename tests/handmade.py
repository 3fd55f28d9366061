"""A two-layer linear model trained with sharded parameters over two stages, as an ExecutionPlan written by hand.

``y = (x @ w0) @ w1``, loss is the mean of ``(y - t)**2``, the update is SGD with momentum. Stage 0 holds w0, stage 1
holds w1. Tests change single instructions and see what notices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

import torch

from graphshard.execution import ExecutionPlan, Instruction, Op, Ref, Segment, StagePlan, TensorType
from graphshard.mesh import Mesh
from graphshard.program import Bucket, Param, Role, Slot

WIDTH, ROWS = 4, 3
F32 = torch.float32
Part = list[Instruction]


def kind(*shape: int, dtype: torch.dtype = F32) -> TensorType:
    """A contiguous type."""
    return TensorType(shape, dtype, tuple(prod(shape[dim + 1 :]) for dim in range(len(shape))))


def segment(name: str, inputs: str, outputs: str, *lines: str) -> Segment:
    """Inputs and outputs by name, separated by blanks."""
    unpack = [f"{', '.join(inputs.split())}, = args", "args.clear()"] if inputs else []
    body = [*unpack, *lines, f"return ({', '.join(outputs.split())},)"]
    source = f"def {name}(args, coordinates, device, memory):\n" + "".join(f"    {line}\n" for line in body)
    return Segment(name, source, tuple(inputs.split()), tuple(outputs.split()))


SEGMENTS = [
    segment("zeros", "", "loss", "loss = torch.zeros((), device=device)"),
    segment("forward0", "x w", "h", f"h = (x @ w.view({WIDTH}, {WIDTH})).t().contiguous().t()"),
    segment("backward0", "x gh", "g", "g = (x.t() @ gh).reshape(-1)"),
    segment(
        "forward1",
        "h t w loss",
        "d loss",
        f"y = h @ w.view({WIDTH}, {WIDTH})",
        "d = y - t",
        "loss = loss + (d * d).mean()",
    ),
    segment(
        "backward1",
        "h d w",
        "gh g",
        "gy = d * (2 / d.numel())",
        f"gh = gy @ w.view({WIDTH}, {WIDTH}).t()",
        "g = (h.t() @ gy).reshape(-1)",
    ),
    segment("add", "a b", "c", "c = a + b"),
    segment("copy", "a", "c", "c = a.clone()"),
    segment("average", "loss factor", "mean", "mean = loss * factor"),
    segment("update_first", "w g lr factor", "w2 m", "m = g * factor", "w2 = w - lr * m"),
    segment("update", "w g lr m factor", "w2 m2", "m2 = 0.9 * m + g * factor", "w2 = w - lr * m2"),
]


def run(name: str, inputs: str, outputs: str, action: str, last: str = "") -> Instruction:
    """RUN with refs written ``x.0`` or ``x``."""
    return Instruction(Op.RUN, name, refs(inputs), refs(outputs), frozenset(refs(last)), action=action)


def refs(text: str) -> tuple[Ref, ...]:
    """``"x.0 y"`` is two refs, the first of micro-batch 0."""
    result = []
    for word in text.split():
        name, dot, microbatch = word.rpartition(".")
        result.append(Ref(name, int(microbatch)) if dot and microbatch.isdecimal() else Ref(word))
    return tuple(result)


def wait(ref: str, action: str, peer: int | None = None) -> Instruction:
    return Instruction(Op.WAIT, inputs=refs(ref), action=action, peer=peer)


def free(text: str, action: str) -> Instruction:
    return Instruction(Op.FREE, inputs=refs(text), action=action)


def send(ref: str, peer: int, what: TensorType, action: str) -> Instruction:
    return Instruction(Op.SEND, inputs=refs(ref), peer=peer, type=what, action=action)


def recv(ref: str, peer: int, what: TensorType, action: str) -> Instruction:
    return Instruction(Op.RECV, outputs=refs(ref), peer=peer, type=what, action=action)


def collective(op: Op, name: str, source: str, target: str, what: TensorType, action: str, axis: str) -> Instruction:
    return Instruction(op, name, refs(source), refs(target), axis=axis, type=what, action=action)


TRANSPOSED = TensorType((ROWS, WIDTH), F32, (1, ROWS))  # h is column-major: strides must survive the transfer
GH = kind(ROWS, WIDTH)


class Builder:
    """Instructions of one stage, action by action."""

    def __init__(self, stage: int, dp: int, microbatches: int) -> None:
        self.stage, self.dp, self.microbatches = stage, dp, microbatches
        self.shard = kind(WIDTH * WIDTH // dp)
        self.full = kind(WIDTH * WIDTH)
        self.weight = f"shard:b{stage}"

    def gather(self, mb: int, action: str) -> Part:
        return [
            collective(Op.GATHER, "all_gather", self.weight, f"w.{mb}", self.shard, action, "dp"),
            wait(f"w.{mb}", action),
        ]

    def reduce(self, mb: int, action: str) -> Part:
        return [
            collective(Op.REDUCE, "reduce_scatter", f"g.{mb}", f"gs.{mb}", self.full, action, "dp"),
            wait(f"gs.{mb}", action),
            free(f"g.{mb}", action),
            run("add", f"carry:g gs.{mb}", "carry:g", action, last=f"gs.{mb}")
            if mb
            else run("copy", "gs.0", "carry:g", action, last="gs.0"),
        ]

    def forward(self, mb: int) -> Part:
        action = f"F{self.stage}.{mb}"
        if self.stage == 0:
            return [
                *self.gather(mb, action),
                run("forward0", f"batch:0.{mb} w.{mb}", f"h.{mb}", action, last=f"w.{mb}"),
                send(f"h.{mb}", 1, TRANSPOSED, action),
            ]
        return [
            recv(f"h.{mb}", 0, TRANSPOSED, action),
            *self.gather(mb, action),
            wait(f"h.{mb}", action),
            run(
                "forward1",
                f"h.{mb} batch:1.{mb} w.{mb} carry:loss",
                f"d.{mb} carry:loss",
                action,
                last=f"batch:1.{mb} w.{mb}",
            ),
        ]

    def backward(self, mb: int) -> Part:
        action = f"B{self.stage}.{mb}"
        if self.stage == 0:
            return [
                recv(f"gh.{mb}", 1, GH, action),
                wait(f"h.{mb}", action, peer=1),
                free(f"h.{mb}", action),
                wait(f"gh.{mb}", action),
                run("backward0", f"batch:0.{mb} gh.{mb}", f"g.{mb}", action, last=f"batch:0.{mb} gh.{mb}"),
                *self.reduce(mb, action),
            ]
        return [
            *self.gather(mb, action),
            run("backward1", f"h.{mb} d.{mb} w.{mb}", f"gh.{mb} g.{mb}", action, last=f"h.{mb} d.{mb} w.{mb}"),
            send(f"gh.{mb}", 0, GH, action),
            *self.reduce(mb, action),
            wait(f"gh.{mb}", action),
            free(f"gh.{mb}", action),
        ]

    def epilogue(self, first: bool) -> Part:
        loss: Part = [run("zeros", "", "carry:loss", "epilogue")] if self.stage == 0 else []
        loss += [
            collective(Op.REDUCE, "all_reduce", "carry:loss", "sum1", kind(), "epilogue", "dp"),
            wait("sum1", "epilogue"),
            collective(Op.REDUCE, "all_reduce", "sum1", "sum2", kind(), "epilogue", "pp"),
            wait("sum2", "epilogue"),
            run("average", "sum2 constant:factor", "loss:loss", "epilogue", last="sum2"),
            free("carry:loss sum1", "epilogue"),
        ]
        weight, state = self.weight, f"state:b{self.stage}:momentum"
        given = f"{weight} carry:g lr:0" + ("" if first else f" {state}") + " constant:factor"
        handed = f"{weight} carry:g" + ("" if first else f" {state}")
        return [
            *loss,
            run("update_first" if first else "update", given, "new m", "epilogue", last=handed),
            Instruction(Op.BIND, inputs=refs("new m"), outputs=refs(f"{weight} {state}"), action="epilogue"),
            free("new m", "epilogue"),
        ]

    def plan(self, schedule: str) -> StagePlan:
        body: Part = []
        for word in schedule.split():
            body += (self.forward if word[0] == "F" else self.backward)(int(word[1:]))
        prologue = [run("zeros", "", "carry:loss", "prologue")] if self.stage == 1 else []
        return StagePlan(
            tuple(prologue),
            tuple(body),
            tuple(self.epilogue(first=False)),
            tuple(self.epilogue(first=True)),
            {item.name: item for item in SEGMENTS},
        )


GPIPE = ("F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2")
ONE_F_ONE_B = ("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2")


def two_stages(dp: int = 2, schedule: tuple[str, str] = ONE_F_ONE_B) -> ExecutionPlan:
    """The plan: ``2 * dp`` ranks, three micro-batches."""
    microbatches = schedule[0].count("F")
    mesh = Mesh((("pp", 2), ("dp", dp)))
    shard = kind(WIDTH * WIDTH // dp)
    reads, results = [], []
    for stage in (0, 1):
        weight, state = Slot(Role.SHARD, f"b{stage}", stage=stage), Slot(Role.STATE, f"b{stage}", "momentum", stage)
        reads.append(
            {
                weight: shard,
                state: shard,
                Slot(Role.BATCH, str(stage)): kind(ROWS, WIDTH),
                Slot(Role.LR, "0"): kind(dtype=torch.float64),
                Slot(Role.CONSTANT, "factor"): kind(),
            }
        )
        results.append({weight: shard, state: shard, Slot(Role.LOSS, "loss"): kind()})
    return ExecutionPlan(
        mesh=mesh,
        stages=tuple(Builder(stage, dp, microbatches).plan(schedule[stage]) for stage in (0, 1)),
        microbatches=microbatches,
        schedule="\n".join(schedule),
        reads=tuple(reads),
        results=tuple(results),
        params={f"w{s}": Param(f"w{s}", (WIDTH, WIDTH), F32, group=0, stages=(s,)) for s in (0, 1)},
        buckets={
            f"b{s}": Bucket(f"b{s}", F32, WIDTH * WIDTH, ((f"w{s}", 0),), "dp", dp, s, Role.SHARD) for s in (0, 1)
        },
        constants={"factor": torch.tensor(1.0 / (microbatches * dp))},
    )


def weights() -> dict[str, torch.Tensor]:
    """Initial values of w0 and w1."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return {name: torch.randn(WIDTH, WIDTH, generator=generator) * 0.5 for name in ("w0", "w1")}


def batches(plan: ExecutionPlan, step: int) -> dict[int, list[list[torch.Tensor]]]:
    """(x, t) for each data-parallel rank and micro-batch."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(100 + step)
    return {
        dp_rank: [[torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2)] for _ in range(plan.microbatches)]
        for dp_rank in range(plan.mesh.dp_size)
    }


def eager(plan: ExecutionPlan, steps: int, lr: float = 0.1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of the same training by autograd."""
    params = {name: value.clone().requires_grad_() for name, value in weights().items()}
    optimizer = torch.optim.SGD(params.values(), lr=lr, momentum=0.9)
    losses = []
    for step in range(steps):
        every = [mb for ranks in batches(plan, step).values() for mb in ranks]
        parts = [((x @ params["w0"] @ params["w1"] - t) ** 2).mean() for x, t in every]
        loss = torch.stack(parts).mean()
        for param, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            param.grad = grad
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in params.items()}


def edited(plan: ExecutionPlan, stage: int, edit: Iterable[Instruction]) -> ExecutionPlan:
    """``plan`` with another body on one stage."""
    stages = list(plan.stages)
    stages[stage] = replace(stages[stage], body=tuple(edit))
    return replace(plan, stages=tuple(stages))


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


def every_communication(mesh: Mesh) -> ExecutionPlan:
    """Every kind of communication with several dtypes; what arrives is the output, named after dtype and kind."""
    stages, results = [], []
    for stage in range(mesh.size("pp")):
        parts: Part = []
        outputs: dict[Slot, TensorType] = {}
        segments = []
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            size = mesh.size("dp")
            fill = "3 * coordinates['dp'] + 7 * coordinates['pp']"
            line = f"x = ((torch.arange({size * 6}) + {fill}) % 5).to({dtype}).view(-1, 3)"
            segments.append(segment(f"make_{name}", "", "x", line))
            made, x = kind(2 * size, 3, dtype=dtype), f"x_{name}"
            parts.append(run(f"make_{name}", "", x, "F0"))
            todo = [
                (Op.GATHER, "all_gather", kind(2 * size * size, 3, dtype=dtype)),
                (Op.REDUCE, "broadcast", made),
            ]
            if dtype is not torch.bool:
                todo += [
                    (Op.REDUCE, "reduce_scatter", kind(2, 3, dtype=dtype)),
                    (Op.REDUCE, "all_reduce", made),
                ]
            for op, collective_name, what in todo:
                slot = Slot(Role.OUTPUT, f"{name} {collective_name} {stage}", stage=stage)
                ins = collective(op, collective_name, x, "y", made, "F0", "dp")
                root = size - 1 if collective_name == "broadcast" else None
                parts.append(replace(ins, outputs=(Ref(f"output:{slot.name}"),), peer=root))
                outputs[slot] = what
            transposed = TensorType((3, 2 * size), dtype, (1, 3))
            segments.append(segment(f"t_{name}", "x", "t", "t = x.t()"))
            if mesh.size("pp") > 1:
                peer, slot = 1 - stage, Slot(Role.OUTPUT, f"{name} transfer {stage}", stage=stage)
                outputs[slot] = transposed
                parts += [
                    run(f"t_{name}", x, f"t_{name}", "F0"),
                    replace(recv("y", peer, transposed, "F0"), outputs=(Ref(f"output:{slot.name}"),)),
                    send(f"t_{name}", peer, transposed, "F0"),
                    wait(f"t_{name}", "F0"),
                    free(f"t_{name}", "F0"),
                ]
            mine = [Ref(f"output:{slot.name}") for slot in outputs if slot.name.split()[0] == name]
            parts += [Instruction(Op.WAIT, inputs=(ref,)) for ref in mine]
            parts.append(free(x, "F0"))
        stages.append(StagePlan((), tuple(parts), (), None, {item.name: item for item in segments}))
        results.append(outputs)
    return ExecutionPlan(mesh, tuple(stages), 1, "", ({},) * len(stages), tuple(results), {}, {}, {})
