"""Memory that a rank frees leaves its process, where that is asked for; what the environment says of malloc wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")

RESIDENT = """
import sys, torch
from graphshard.runtime import memory
done = sys.argv[1] == "asked" and memory.return_freed_memory()
memory.reset_peak_rss()
before = memory.peak_rss_bytes()
for megabytes in (24, 16, 16, 8):
    torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
memory.reset_peak_rss()
print(done, memory.peak_rss_bytes() - before)
"""


def run(asked: bool, **environment: str) -> tuple[str, bool]:
    """What return_freed_memory said, and whether the largest block that was freed stays with the process: the first one
    that is freed raises glibc's own limit for what is given back."""
    command = [sys.executable, "-c", RESIDENT, "asked" if asked else ""]
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    done, grown = process.stdout.split()
    return done, int(grown) > 8 << 20


def test_freed_memory_leaves_the_process() -> None:
    assert run(asked=False) == ("False", True)
    assert run(asked=True) == ("True", False)


KEPT = {"mmap_threshold": 1 << 25, "trim_threshold": 1 << 28}


@pytest.mark.parametrize(
    "environment",
    [
        {f"MALLOC_{name.upper()}_": str(nbytes) for name, nbytes in KEPT.items()},
        {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={nbytes}" for name, nbytes in KEPT.items())},
    ],
    ids=["variables", "tunables"],
)
def test_the_environment_wins(environment: dict[str, str]) -> None:
    assert run(asked=True, **environment) == ("False", True)
