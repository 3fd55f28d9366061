"""Memory that a rank frees stays with its process, and what the environment says of malloc wins."""

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
