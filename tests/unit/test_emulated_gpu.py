"""Plans for a GPU train on one that the CPU emulates; see tests/emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a torch built with CUDA has devices of its own"),
]

CHOSEN = (
    "distributed/test_compile_distributed.py::test_where_no_rank_has_begun_all_go_on_once_values_are_loaded",
    "gpu/test_cuda.py",
    "numerics/test_gradient_hooks.py",
    "numerics/test_offload.py::test_a_lower_precision_is_the_same_to_the_bit",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, in which torch has not been imported."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS.parent, text=True, capture_output=True, timeout=280
    )


def test_a_gpu_trains() -> None:
    chosen = [str(TESTS / name) for name in CHOSEN]
    done = run("-m", "pytest", "-q", "-p", "emulated.gpu", "--device", "cuda", "-p", "no:cacheprovider", *chosen)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and " 4 deselected" in done.stdout  # what needs a real one


ORDERS = {
    "nothing": ("", "aten::copy_ in stream 1 does not wait for aten::mul in stream 0"),
    "the copy": ("side.wait_stream(now)", "aten::add in stream 0 does not wait for aten::copy_ in stream 1"),
    "both": ("side.wait_stream(now); after = lambda: now.wait_stream(side)", ""),
}


@pytest.mark.parametrize("waiting", ORDERS)
def test_streams_that_race_are_told_of(waiting: str) -> None:
    """A copy to the host beside what writes to its source."""
    before, told = ORDERS[waiting]
    code = f"""
import emulated.gpu
import torch
side, now, after = torch.cuda.Stream(), torch.cuda.current_stream(), lambda: None
x, host = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
x.mul_(2)
{before}
with torch.cuda.stream(side):
    host.copy_(x, non_blocking=True)
after()
x.add_(1)
print(torch.ops.emulated_gpu.races(0))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert (told in done.stdout) if told else done.stdout.strip() == "[]"


def test_what_ranks_exchange_is_not_read_before_it_arrives() -> None:
    code = """
import emulated.gpu
import torch
import torch.distributed as dist
store = dist.HashStore()
dist.init_process_group("nccl", store=store, rank=0, world_size=1)
x = torch.ones(4, device="cuda")
work = dist.all_reduce(x, async_op=True)
early = x + 1
work.wait()
late = x + 1
print(torch.ops.emulated_gpu.races(0))
"""
    done = run("-c", code)
    assert done.stdout.count("aten::add in stream 0 does not wait for a transfer in stream 1") == 1, done.stderr


def test_memory_is_not_freed_under_a_copy() -> None:
    code = """
import emulated.gpu
import torch
side = torch.cuda.Stream()
x, host = torch.ones(4, device="cuda"), torch.empty(4, pin_memory=True)
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    host.copy_(x, non_blocking=True)
del x
print(torch.ops.emulated_gpu.races(0))
"""
    assert "freeing it in stream 0 does not wait for aten::copy_ in stream 1" in run("-c", code).stdout
