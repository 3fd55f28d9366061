"""The hand-written plan on gloo processes: same results as in one process, and clear errors instead of hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def launch(scenario: str, world_size: int, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """Run ``rank.py`` as ``world_size`` processes; what each printed. Their input is closed one after the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank.py"), scenario],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
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


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return launch("together", request.param)


def test_processes_end_with_what_one_process_ends_with(together: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(together):
        local, distributed = result["local"], result["distributed"]
        for what in ("losses", "params", "state", "sent"):
            assert distributed[what] == local[what], (rank, what)
        assert result["rank0_only"] == (["w0", "w1"] if rank == 0 else [])


def test_every_communication_gives_what_it_gives_in_one_process(together: list[dict[str, Any]]) -> None:
    for result in together:
        # 5 dtypes gathered, broadcast and, with stages, sent; 4 of them summed two ways.
        assert len(result["names"]) == 23 + 18
        assert result["wrong"] == []


def test_ranks_with_different_plans_all_say_so() -> None:
    for result in launch("mismatch", 2):
        assert result["error"] == "PlanMismatch"
        assert "rank" in result["message"]


def test_a_rank_that_waits_too_long_names_instruction_and_peer() -> None:
    waiting, _ = launch("late", 2)
    assert waiting["error"] == "WaitTimeout"
    assert "rank 0 waited more than 4 s for rank 1 (stage 1) in:" in waiting["message"]
    assert "B0.0 WAIT" in waiting["message"]
