"""What the executor's Python costs: a step of a small model without its operators.

After some whole steps, segments return what they returned before instead of computing it: what a step takes then is the
executor's, but for the buffers and copies that communication cannot do without. Those are timed by themselves and
subtracted, and the rest is divided by the number of instructions. All times are of the processor, medians of steps.
The limit is for all ranks in this process. With a process for each rank, system calls that carry notes between them
count as well: they are shown beside it.

    python examples/bench/overhead.py --steps 100
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphshard
from graphshard.execution import ExecutionPlan, Instruction, Op, made_type
from graphshard.mesh import Mesh
from graphshard.runtime.distributed import DistributedExecutor
from graphshard.runtime.executor import Executor
from graphshard.runtime.local import LocalExecutor
from graphshard.runtime.segments import SegmentFunction
from graphshard.runtime.storage import Storage
from graphshard.runtime.watch import Watch
from model import Sizes, batch_of, loss_fn, make_part

SIZES = Sizes(layers=4, width=32, heads=2, vocabulary=64, sequence=16, batch=8, microbatch=2)
PLANS = {"accum4": 1, "zero3+accum2": 2, "zero3+pp2:microbatches=2": 4}
"""Ranks by plan."""
LIMIT_US = 10.0
HERE = "this process"
WARMUP = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if an instruction costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each plan")
    parser.add_argument("--rank-of", metavar="PLAN", help=argparse.SUPPRESS)  # this process is one rank of PLAN
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.rank_of:
        plan = compiled(options.rank_of)
        measured = measure(plan, ReplayingRank(plan.mesh), options.steps)
        if dist.get_rank() == 0:
            options.output.write_text(json.dumps(measured))
        return 0
    rows: list[dict[str, Any]] = []
    for name, ranks in PLANS.items():
        plan = compiled(name)
        rows.append({"plan": name, "run": HERE, **measure(plan, ReplayingAll(plan.mesh), options.steps)})
        if ranks > 1:
            rows.append({"plan": name, "run": f"{ranks} processes", **launched(name, ranks, options.steps)})
    show(rows)
    return int(any(row["instruction_us"] > LIMIT_US for row in rows if row["run"] == HERE))


def compiled(plan: str) -> ExecutionPlan:
    """The small model's plan."""
    return graphshard.compile(
        make_part(SIZES),
        plan=plan,
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        example_inputs=batch_of(SIZES, 0),
        executor="none",
        world_size=PLANS[plan],
    ).execution_plan


class Replaying(Executor):
    """While ``replays``, a segment returns what it did the last time it ran."""

    replays = False

    def _functions(self, plan: ExecutionPlan, stage: int, watch: Watch | None) -> dict[str, SegmentFunction]:
        return {name: self._replayed(f) for name, f in super()._functions(plan, stage, watch).items()}

    def _replayed(self, function: SegmentFunction) -> SegmentFunction:
        made: tuple[Tensor, ...] = ()

        def call(
            given: list[Tensor], coordinates: Mapping[str, int], device: torch.device, memory: Callable[[int], Tensor]
        ) -> tuple[Tensor, ...]:
            nonlocal made
            if not self.replays:
                made = function(given, coordinates, device, memory)
            given.clear()
            return made

        return call


class ReplayingAll(Replaying, LocalExecutor):
    """All ranks in this process."""


class ReplayingRank(Replaying, DistributedExecutor):
    """This process's rank."""


def measure(plan: ExecutionPlan, executor: Replaying, steps: int) -> dict[str, float]:
    """Of the ranks in this process: instructions and communications in a step, microseconds of a whole step, of one
    without segments and of the copies in that, and of what is left for each instruction."""
    storage = Storage(executor, plan)
    storage.write_model({name: value.detach() for name, value in make_part(SIZES).named_parameters()}, {})
    mesh, m = plan.mesh, plan.microbatches
    parts = list(zip(*(tensor.chunk(mesh.dp_size * m) for tensor in batch_of(SIZES, 0)), strict=True))
    batches = {d: parts[d * m : (d + 1) * m] for d in {mesh.dp_rank(rank) for rank in executor.ranks}}
    instructions = [ins for rank in executor.ranks for ins in plan.of_rank(rank).step()]
    exchanges = [bare(ins, mesh) for ins in instructions if ins.type is not None]

    def step() -> None:
        executor.step(plan, batches, lrs=[1e-3])

    def copies() -> None:
        for exchange in exchanges:
            exchange()

    for _ in range(WARMUP):
        step()
    whole = statistics.median(seconds(step) for _ in range(WARMUP))
    executor.replays = True
    with torch.no_grad():
        taken = [(seconds(step), seconds(copies)) for _ in range(steps)]
    bare_step, copied = (statistics.median(column) for column in zip(*taken, strict=True))
    return {
        "instructions": len(instructions),
        "communications": len(exchanges),
        "step_us": 1e6 * whole,
        "without_segments_us": 1e6 * bare_step,
        "copies_us": 1e6 * copied,
        "instruction_us": 1e6 * (bare_step - copied) / len(instructions),
    }


def seconds(work: Callable[[], None]) -> float:
    """Processor time of this process for ``work``."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def bare(ins: Instruction, mesh: Mesh) -> Callable[[], object]:
    """What a rank's part in a communication takes at least: a buffer for what it makes, and the copies and sums."""
    assert ins.type is not None
    kind, made = ins.type, made_type(ins, ins.type, mesh)
    source, size = torch.zeros(kind.shape, dtype=kind.dtype), mesh.size(ins.axis) if ins.axis else 1
    parts = source.view(-1).chunk(size)

    def all_gather() -> None:
        torch.cat([source] * size, out=torch.empty(made.shape, dtype=made.dtype))

    def reduce_scatter() -> None:
        total = torch.empty(made.shape, dtype=made.dtype).copy_(parts[0].view(made.shape))
        for part in parts[1:]:
            total.add_(part.view(made.shape))

    def all_reduce() -> None:
        total = source.clone()
        for _ in range(size - 1):
            total.add_(source)

    def copy() -> None:
        torch.empty(kind.shape, dtype=kind.dtype).copy_(source)

    def nothing() -> None:
        pass

    if ins.op is Op.SEND:  # the one who receives copies
        return nothing
    return {"all_gather": all_gather, "reduce_scatter": reduce_scatter, "all_reduce": all_reduce}.get(ins.name, copy)


def launched(plan: str, ranks: int, steps: int) -> dict[str, float]:
    """What rank 0 measures, with a process for every rank."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launch, __file__, "--rank-of", plan, f"--steps={steps}", f"--output={output}"]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, timeout=600)
        measured: dict[str, float] = json.loads(output.read_text())
        return measured


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table."""
    table = Table(title=f"Python around operators, {SIZES.layers} layers of width {SIZES.width}")
    columns = ("plan", "run in", "instr.", "comm.", "step ms", "no segments", "copies", "us/instr.", "at most")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["plan"],
            row["run"],
            str(row["instructions"]),
            str(row["communications"]),
            *(f"{row[key] / 1e3:.2f}" for key in ("step_us", "without_segments_us", "copies_us")),
            f"{row['instruction_us']:.1f}",
            f"{LIMIT_US:.0f}" if row["run"] == HERE else "",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
