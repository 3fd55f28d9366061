"""A rank that is killed while it writes to its file: the job ends, and the folder is as if it had never run."""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from distributed.processes import launch, start

RANKS = 2
LIMIT_S = 100.0  # far above what hearing of it takes


def test_a_rank_killed_in_a_transfer_leaves_nothing(tmp_path: Path) -> None:
    plan = f"zero3+offload:optimizer=nvme,params=nvme,path={tmp_path}"
    # The launcher holds the store, as torchrun does, so that any rank may die.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = start("train_rank.py", RANKS, store.port, "killed_writing", plan, environment=environment)
    try:
        ends = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    victim, survivor = processes[-1], ends[0]
    assert victim.returncode == -signal.SIGKILL, ends[-1]
    assert "finished" not in survivor[0]
    assert f"at fault: rank {RANKS - 1}" in "".join(survivor)
    assert not list(tmp_path.iterdir())

    for result in launch("train_rank.py", RANKS, "against_resident", plan):
        assert result.get("same") is True, result
        assert result["losses"][0] > result["losses"][-1]
    assert not list(tmp_path.iterdir())
