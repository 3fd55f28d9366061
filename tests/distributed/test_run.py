"""``graphshard run``: ranks are started with a rank's environment, and a failed one gives the exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException

from graphshard.runtime.launch import launch

SCRIPT = """
import os, sys
line = [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")] + sys.argv[1:]
os.write(1, (" ".join(line) + "\\n").encode())
if sys.argv[1] == "fail" and os.environ["RANK"] == "1":
    sys.exit("no such data")
"""

MISMATCH = """
import os, sys
from graphshard.errors import PlanMismatch
from graphshard.mesh import Mesh
from graphshard.runtime.distributed import DistributedExecutor
axis = "pp" if os.environ["RANK"] == "0" else "dp"
try:
    DistributedExecutor(Mesh(((axis, 2),)))
except PlanMismatch:
    sys.exit("they differ")
"""


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``script`` as two ranks."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "graphshard", "run", "-n", "2", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [("--plan=zero3", 0, ""), ("fail", 1, "no such data\ngraphshard run: rank 1 ended with exit status 1\n")],
)
def test_run(tmp_path: Path, argument: str, status: int, said: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = run(script, argument)
    assert (done.returncode, done.stderr) == (status, said)
    if status == 0:
        assert sorted(done.stdout.splitlines()) == [f"0 0 2 1 {argument}", f"1 1 2 1 {argument}"]


def test_ranks_whose_executors_are_refused_end_with_that_alone(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(MISMATCH)
    done = run(script)
    assert done.returncode == 1
    assert "they differ" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_to_the_launcher_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_: object) -> None:
        raise SignalException("told to end", signal.SIGTERM)

    monkeypatch.setattr(torchrun, "run", ended)
    assert launch(2, "train.py", []) == (143, "2 ranks were ended by SIGTERM")
