"""Where a model runs: the ranks of this job, the device, the folder for files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from graphshard.errors import UnknownExecutor
from graphshard.plan import Plan


def executor_kind(executor: str) -> str:
    """``executor``, with "auto" decided.

    Raises:
        UnknownExecutor: there is none of that name.
    """
    if executor not in ("auto", "distributed", "local", "none"):
        raise UnknownExecutor(executor)
    if executor != "auto":
        return executor
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    return "distributed" if (dist.is_available() and dist.is_initialized()) or launched else "local"


def distributed_world_size() -> int:
    """The ranks of this job."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def offload_folder(plan: Plan) -> str | None:
    """Where the plan lets ranks keep files: an absolute path with ``~`` expanded, since the first step, which makes
    them, may be in another working directory."""
    given = (token.path for token in (plan.offload, plan.memory) if token is not None)
    path = next((path for path in given if path is not None), None)
    # Unlike Path's this leaves the name of an unknown user, which is then no folder.
    return None if path is None else str(Path(os.path.expanduser(path)).absolute())  # noqa: PTH111


def device_for(executor: str, device: torch.device | str | None, model: nn.Module) -> torch.device:
    """Where to run: where the user said, else where the model is; a meta model on a GPU if each rank has a process of
    its own and there is one."""
    tensors = [*model.parameters(), *model.buffers()]
    places = (t.device for t in tensors if t.device.type != "meta")
    default = "cuda" if executor == "distributed" and torch.cuda.is_available() else "cpu"
    return torch.device(device) if device is not None else next(places, torch.device(default))
