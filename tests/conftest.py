"""Pass tests written as graph text, tests/cases/<pass>/<what>.graph, are collected by the kit's plugin.

``--device cuda`` runs the tests of ON_DEVICE, and those in GPU, there: it is the default device of each, so that
models, batches and eager training are on it. The others are left out, since a device is nothing to them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch._functorch.aot_autograd  # pytester forgets what a test imports, and Triton aborts when it comes twice

from graphshard.saved.cache import SWITCH

pytest_plugins = ["graphshard.testing.plugin", "pytester"]

ON_DEVICE = {
    "distributed/test_compile_distributed.py": "processes, each of which has a device",
    "distributed/test_distributed_executor.py": "processes that run a plan written by hand",
    "distributed/test_failures.py": "processes that fail",
    "distributed/test_killed_offload.py": "a process that is killed",
    "numerics": "training against eager training, precision, recomputation, offloading, peaks, state",
    "unit/test_attention.py": "kernels of attention against torch's",
    "unit/test_debug_nan.py": "what is looked at while a step runs",
    "unit/test_devices.py": "capture and default devices",
    "unit/test_grouped.py": "products of groups against one for each",
    "unit/test_local_executor.py": "plans written by hand",
    "unit/test_random_ops.py": "what keys draw",
    "unit/test_whole_parameters.py": "optimizers that look at whole parameters",
}
"""Folders and files of tests that train or compute on a device, and what they are about. What is left out is about
graphs and text, which no device knows, or about the CPU alone: shared memory, processes that end, oneDNN, loops."""

GPU = "gpu"
"""The folder of tests for which there has to be a GPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", metavar="D", help="run the tests that train on this device, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    # A test finds nothing that another one compiled, and leaves nothing in the user's folders.
    os.environ[SWITCH] = "0"
    # Graphs are bursts of objects: as often as Python looks for garbage by itself, that takes a tenth of the time.
    gc.set_threshold(20_000, 50, 50)
    device = config.getoption("--device")
    if device is not None and (problem := _problem(device)):
        pytest.exit(f"--device {device}: {problem}", returncode=pytest.ExitCode.USAGE_ERROR)


def _problem(device: str) -> str:
    """Why nothing can run on ``device``; "" if it can."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        return "no such device; give cuda, cuda:1 or cpu"
    if kind.type not in ("cpu", "cuda"):
        return f"tests do not run on {kind.type}; give cuda, cuda:1 or cpu"
    if kind.type == "cuda" and (count := torch.cuda.device_count()) <= (kind.index or 0):
        return f"torch {torch.__version__} sees {count} CUDA devices here"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    left_out = [item for item in items if not _runs_on(item, device)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _runs_on(item, device)]


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("--device")
    if device is None:
        return []
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return [
        f"device: {name}; tests that are about text, or about the CPU alone, are left out (ON_DEVICE in conftest.py)"
    ]


def _runs_on(item: pytest.Item, device: str | None) -> bool:
    if _is_within(item, GPU):
        return device is not None and torch.device(device).type == "cuda"
    if device is None:
        return True
    return any(_is_within(item, place) for place in ON_DEVICE) and item.get_closest_marker("only_cpu") is None


def _is_within(item: pytest.Item, place: str) -> bool:
    return item.path.is_relative_to(Path(__file__).parent / place)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    device = request.config.getoption("--device")
    if device is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.device(device))
        # Both sides of a comparison choose the same kernels, and these compute in the precision that they say.
        stack.enter_context(torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False))
        yield
