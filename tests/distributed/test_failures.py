"""A rank that is killed, stopped or fails at a random instruction: the others end in time and name it.

FAILURES in the environment sets how often each way is tried.
"""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from distributed.processes import start
from distributed.template import Rank

RANKS = 4
LIMIT_S = 4.0
GRACE_S = 25.0  # on top of it: hearing what the others say, and leaving, on a machine that does more


@pytest.mark.parametrize("how", ["kill", "stop", "raise"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("FAILURES", "1"))))
def test_the_others_end_and_name_it(how: str, seed: int) -> None:
    victim = random.Random(f"{how} {seed}").randrange(RANKS)
    # The launcher holds the store, as torchrun does, so that any rank may die.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    processes = start(
        "failing_rank.py",
        RANKS,
        store.port,
        *(str(victim), how, str(seed), str(LIMIT_S)),
        environment={"TORCHELASTIC_USE_AGENT_STORE": "True"},
    )
    try:
        failed_at = _failed(processes[victim], how)
        for rank, process in enumerate(processes):
            if rank == victim:
                continue
            out, err = process.communicate(timeout=max(failed_at + LIMIT_S + GRACE_S - time.monotonic(), 0.1))
            assert process.returncode not in (0, None)
            assert "finished" not in out
            assert f"at fault: rank {victim}\n" in err, err
            assert f"  rank {victim} (stage {victim // 2}) " in err
            if how == "raise":
                assert "failed: ValueError: out of luck in " in err
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.only_cpu("common memory")
def test_where_there_is_no_memory_to_share_the_others_name_it() -> None:
    """The first of its stage, for which the other one waits before the first step."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = start("failing_rank.py", RANKS, store.port, "2", "share", "0", str(LIMIT_S), environment=environment)
    try:
        for rank, process in enumerate(processes):
            _, err = process.communicate(timeout=120)
            assert process.returncode not in (0, None)
            what = "OSError: [Errno 28] no memory left" if rank == 2 else "PeerFailed"
            assert what in err and (rank == 2 or "at fault: rank 2\n" in err), err
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _failed(process: Rank, how: str) -> float:
    """Wait until the victim has failed; when that was."""
    if how == "stop":
        process.wait_stopped(timeout=120)
    else:
        assert process.wait(timeout=120) == (-signal.SIGKILL if how == "kill" else 1)
    return time.monotonic()
