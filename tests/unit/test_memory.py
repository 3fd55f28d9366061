"""Memory that a rank frees stays with its process, or leaves it; what the environment says of malloc wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")

FAULTS = """
import resource, torch
from graphshard.runtime.memory import keep_freed_memory
kept = keep_freed_memory()
def fill():
    for _ in range(3):
        torch.empty(24 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = fill()
print(kept, fill() - before)
"""


def run(**environment: str) -> tuple[str, int]:
    """What keep_freed_memory said, and the page faults of writing 24 MB three times."""
    process = subprocess.run(
        [sys.executable, "-c", FAULTS], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    kept, faults = process.stdout.split()
    return kept, int(faults)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = run()
    assert kept == "True" and faults < 1000


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_the_environment_wins(environment: dict[str, str]) -> None:
    kept, faults = run(**environment)
    assert kept == "False" and faults > 3 * 5000


RESIDENT = """
import torch
from graphshard.runtime import memory
done = memory.{what}()
memory.reset_peak_rss()
before = memory.peak_rss_bytes()
for megabytes in (24, 16, 16, 8):
    torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
memory.reset_peak_rss()
print(done, memory.peak_rss_bytes() - before)
"""


@pytest.mark.parametrize(("what", "stays"), [("keep_freed_memory", True), ("return_freed_memory", False)])
def test_what_stays_resident(what: str, stays: bool) -> None:
    """The first block that is freed would raise glibc's own limit for what is given back."""
    code = RESIDENT.format(what=what)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    done, grown = process.stdout.split()
    assert done == "True"
    assert (int(grown) > 8 << 20) is stays
