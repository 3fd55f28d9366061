"""What each process of test_distributed_executor.py runs: one rank of the hand-written plan. Arguments: scenario."""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

import handmade
from distributed.processes import report
from graphshard.errors import PeerFailed
from graphshard.execution import ExecutionPlan
from graphshard.mesh import Mesh
from graphshard.runtime import shared_memory
from graphshard.runtime.distributed import DistributedExecutor
from graphshard.runtime.executor import Executor
from graphshard.runtime.local import LocalExecutor
from graphshard.runtime.storage import Storage

RANK = int(os.environ["RANK"])
DEVICE = torch.get_default_device()
LAST = int(os.environ["WORLD_SIZE"]) == RANK + 1
STEPS = 3


def train(plan: ExecutionPlan) -> dict[str, object]:
    """Train on both executors, then go on from what was saved; all they end with."""
    found: dict[str, object] = {}
    for name, executor in (
        ("local", LocalExecutor(plan.mesh, DEVICE, measure_memory=True)),
        ("distributed", DistributedExecutor(plan.mesh, DEVICE, timeout_s=30.0, measure_memory=True)),
    ):
        storage = Storage(executor, plan)
        storage.write_model(handmade.weights(), {})
        losses = [_step(executor, plan, step) for step in range(STEPS)]
        params, state = storage.read_params(), storage.read_state()
        storage.write_model(params, {})
        storage.write_state(state)
        losses.append(_step(executor, plan, STEPS))
        found[name] = {
            "losses": losses,
            "params": {key: value.tolist() for key, value in storage.read_params().items()},
            "state": {key: value["momentum"].tolist() for key, value in storage.read_state().items()},
            "sent": executor.sent_bytes[RANK],
            "peak_bytes": [executor.measured(plan)[rank].peak_bytes for rank in range(plan.mesh.world_size)],
        }
        found["exchange"] = executor.choices().get("exchange")
        found["groups"] = _threads("gloo_tcp_loop")
        found["rank0_only"] = sorted(storage.read_params(rank0_only=True))
    return found


def _threads(name: str) -> int:
    """How many threads of this process have the name."""
    return sum(path.read_text().strip() == name for path in Path("/proc/self/task").glob("*/comm"))


def _step(executor: Executor, plan: ExecutionPlan, step: int) -> float:
    loss = executor.step(plan, handmade.batches(plan, step), step=step, lrs=[0.1]).loss
    assert loss is not None
    return loss.item()


def communicate(plan: ExecutionPlan) -> dict[str, object]:
    """Names of what arrived, and of what arrived otherwise than in one process, for two meshes, whole and in pieces of
    16 bytes."""
    names, wrong = [], []
    for mesh in (plan.mesh, Mesh((("dp", plan.mesh.world_size),))):
        every = handmade.every_communication(mesh)
        local, distributed = LocalExecutor(mesh, DEVICE), DistributedExecutor(mesh, DEVICE, timeout_s=30.0)
        expected = local.step(every, {}).outputs[mesh.dp_rank(RANK)]
        for whole in (True, False):
            in_pieces = patch.multiple(shared_memory, _PIECE_BYTES=16, _SMALL_BYTES=0)
            with nullcontext() if whole else in_pieces:
                found = distributed.step(every, {}).outputs[mesh.dp_rank(RANK)]
            for name, (value,) in found.items():
                names.append(name)
                other = expected[name][0]
                if not torch.equal(value, other) or value.stride() != other.stride():
                    wrong.append(name if whole else f"{name} in pieces")
    return {"names": names, "wrong": wrong}


def mismatch(plan: ExecutionPlan) -> dict[str, object]:
    """The last rank was given a plan with other collectives."""
    executor = DistributedExecutor(plan.mesh, DEVICE, timeout_s=30.0)
    Storage(executor, plan).write_model(handmade.weights(), {})
    if LAST:
        plan = handmade.two_stages(plan.mesh.dp_size, ("F0 B0", "F0 B0"))
    executor.step(plan, handmade.batches(plan, 0), lrs=[0.1])
    return {}


def measures(plan: ExecutionPlan) -> dict[str, object]:
    """The last rank alone is to measure memory."""
    DistributedExecutor(plan.mesh, DEVICE, timeout_s=30.0, measure_memory=LAST)
    return {}


def late(plan: ExecutionPlan) -> dict[str, object]:
    """After a step together the last rank does nothing until its input is closed."""
    executor = DistributedExecutor(plan.mesh, DEVICE, timeout_s=4.0)
    Storage(executor, plan).write_model(handmade.weights(), {})
    _step(executor, plan, 0)
    if LAST:
        sys.stdin.read()
    else:
        _step(executor, plan, 1)
    return {}


def ends(plan: ExecutionPlan) -> dict[str, object]:
    """After a step together the last rank ends."""
    executor = DistributedExecutor(plan.mesh, DEVICE, timeout_s=30.0)
    Storage(executor, plan).write_model(handmade.weights(), {})
    _step(executor, plan, 0)
    if LAST:
        return {}
    began = time.monotonic()
    try:
        _step(executor, plan, 1)
    except PeerFailed as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    return {}


def main() -> None:
    torch.set_num_threads(1)
    scenarios = {
        "together": lambda plan: train(plan) | communicate(plan),
        "mismatch": mismatch,
        "measures": measures,
        "late": late,
        "ends": ends,
    }
    plan = handmade.two_stages(int(os.environ["WORLD_SIZE"]) // 2)
    report(scenarios[sys.argv[1]], plan)


if __name__ == "__main__":
    main()
