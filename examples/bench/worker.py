"""One rank of one measured run, started by run.py: steps of one row, their times, losses and memory."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from model import Sizes
from rows import ROWS
from turns import Turns

Number = TypeVar("Number", int, float)

TICKS = os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the row named on the command line; rank 0 writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("--sizes", type=json.loads, default={}, help="a JSON object of model.Sizes' fields")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--turns", required=True, help="the socket over which turns.py says when to make a step")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        turns = Turns(options.turns) if dist.get_rank() == 0 else None
        measured = measure(options.row, Sizes(**options.sizes), options.warmup, options.steps, turns)
        if dist.get_rank() == 0:
            options.output.write_text(json.dumps(measured))
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort some runs of peers while Python ends, after all has been measured


def measure(name: str, sizes: Sizes, warmup: int, steps: int, turns: Turns | None) -> dict[str, Any]:
    """Per step: seconds, foreign CPU seconds, bytes on the loopback device, loss, page faults of the rank with most;
    and what the run took in memory.

    A step is timed between two barriers, so it is the slowest rank's. ``probe_seconds`` is what the same small piece of
    work took the slowest rank right before or right after it: other machines on the same host slow the processors down
    without a trace in this one's counters. ``turns``, on rank 0: what each step, but those to warm up, waits for.
    """
    begin = time.perf_counter()
    runner = ROWS[name].start(sizes, ROWS[name].dp)
    losses = [runner.step(index) for index in range(warmup)]
    ready_seconds = time.perf_counter() - begin
    setup_peak = _peak_rss_bytes()
    _reset_peak_rss()
    processes = _gather(os.getpid())
    taken: list[dict[str, float]] = []
    probe = _Probe()
    for index in range(warmup, warmup + steps):
        if turns is not None:
            turns.take()
        dist.barrier()
        probe_before = probe.seconds()
        before, faults = _Clock.read(processes), _page_faults()
        losses.append(runner.step(index))
        faults = _page_faults() - faults
        dist.barrier()
        taken.append(_Clock.read(processes).since(before))
        taken[-1]["page_faults"] = max(_gather(faults))
        taken[-1]["probe_seconds"] = max(probe_before, probe.seconds())
    return {
        "row": name,
        "world": len(processes),
        "losses": losses,
        "ready_seconds": ready_seconds,
        "steps": taken,
        "peak_rss_bytes": _gather(_peak_rss_bytes()),
        "setup_peak_rss_bytes": _gather(setup_peak),
        "report": runner.report(),
    }


@dataclass(frozen=True)
class _Clock:
    """Counters at one moment: wall and CPU seconds, bytes sent over the loopback device since the machine started."""

    seconds: float
    busy_seconds: float  # of all processors, whoever used them
    own_seconds: float  # of this run's ranks
    loopback_bytes: int

    @classmethod
    def read(cls, processes: Sequence[int]) -> _Clock:
        own = sum(_cpu_seconds(pid) for pid in processes)
        return cls(time.perf_counter(), _busy_seconds(), own, _loopback_bytes())

    def since(self, before: _Clock) -> dict[str, float]:
        own = self.own_seconds - before.own_seconds
        return {
            "seconds": self.seconds - before.seconds,
            "own_cpu_seconds": own,
            "foreign_cpu_seconds": max(0.0, self.busy_seconds - before.busy_seconds - own),
            "loopback_bytes": self.loopback_bytes - before.loopback_bytes,
        }


class _Probe:
    """The same small piece of work, again and again. Its memory is taken once: what it would give back between steps
    would change how the C library gets memory for the next one."""

    def __init__(self) -> None:
        self._left, self._right, self._product = torch.ones(512, 2048), torch.ones(2048, 512), torch.empty(512, 512)
        self._source = torch.ones(4, 512, 2048)
        self._copy = torch.empty_like(self._source)

    def seconds(self) -> float:
        """CPU seconds for a matrix product and a copy, the best of a few, on the slowest rank while all do the same."""
        dist.barrier()
        times = []
        for _ in range(3):
            begin = time.thread_time()
            torch.mm(self._left, self._right, out=self._product)
            self._copy.copy_(self._source)
            times.append(time.thread_time() - begin)
        return max(_gather(min(times)))


def _busy_seconds() -> float:
    # user nice system idle iowait irq softirq steal: what is left without idle and iowait was used or taken away.
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _page_faults() -> int:
    """Pages that the system has given to this process so far, without reading them from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), 0)


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def _reset_peak_rss() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _gather(value: Number) -> list[Number]:
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main()
