"""Scripts that run as several ranks, and what each rank printed."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
import torch

from distributed.template import DEVICE, Rank, Template
from graphshard.errors import GraphshardError

Plan = TypeVar("Plan")

HERE = Path(__file__).resolve().parent


@functools.cache
def _template() -> Template:
    """One for all tests of this process."""
    made = Template()
    atexit.register(made.close)
    return made


def start(
    script: str, world_size: int, port: int, *arguments: str, environment: Mapping[str, str] | None = None
) -> list[Rank]:
    """``script`` of this folder as ``world_size`` processes that meet at ``port``.

    With ``--device cuda`` each has a GPU, and the test is skipped where there are not as many.
    """
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict(environment or {})
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    if (device := torch.get_default_device()).type == "cuda":
        if (count := torch.cuda.device_count()) < world_size:
            pytest.skip(f"{world_size} ranks need as many GPUs; there are {count}")
        own = [rank | {DEVICE: f"{device.type}:{rank['RANK']}"} for rank in own]
    return [_template().fork(str(HERE / script), arguments, common | rank) for rank in own]


def launch(
    script: str,
    world_size: int,
    *arguments: str,
    timeout_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run ``script`` of this folder as ``world_size`` processes; the JSON in the last line of each.

    Their input is closed one after the other, in the order of ranks, each when the one before has ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = start(script, world_size, port, *arguments, environment=environment)
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, err
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


def report(scenario: Callable[[Plan], Mapping[str, Any]], plan: Plan) -> NoReturn:
    """Run ``scenario`` in a rank, print what it found, or the user's error it met, for :func:`launch`, and end."""
    try:
        result = scenario(plan)
    except GraphshardError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    if (emulated := sys.modules.get("emulated.gpu")) is not None:
        emulated.check_races()
    print(json.dumps(result), flush=True)
    os._exit(0)  # peers may be gone: leaving the process group in order would wait for them
