"""How long a device takes for something: by its own events behind a cold cache on a GPU, by the clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]

FLUSH_BYTES = 512 * 2**20
"""Written over before each sample: several times any GPU's last cache."""
FLUSHES = 3
"""Of those, so that the host has said all that is to be timed before the device gets to it: its own time is no part."""
SAMPLE_S = 0.05
"""Of each contender in each round, flushes left out."""
LEAST, MOST = 5, 60


class Timer(ABC):
    """Times runs on one device."""

    rounds = 2

    @abstractmethod
    def sample(self, run: Run, count: int) -> list[float]:
        """Seconds of each of ``count`` runs."""

    def compare(self, contenders: Mapping[str, Run]) -> dict[str, float]:
        """Median seconds of each. They take turns, forth and back, so that a drift of the clock touches all of them."""
        counts = {}
        for name, run in contenders.items():
            self.sample(run, 2)  # kernels are compiled and chosen
            estimate = statistics.median(self.sample(run, 3))
            counts[name] = max(LEAST, min(MOST, math.ceil(SAMPLE_S / max(estimate, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(self.rounds):
            order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
            for name in order:
                samples[name] += self.sample(contenders[name], counts[name])
        return {name: statistics.median(found) for name, found in samples.items()}


class CudaTimer(Timer):
    """Time between two events of the current stream, with what is read no longer in the device's cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(self, run: Run, count: int) -> list[float]:
        marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for begin, end in marks:
            for _ in range(FLUSHES):
                self._flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


class WallTimer(Timer):
    """For a CPU, to try the benchmark: two samples of everything, whatever they say."""

    rounds = 1

    def sample(self, run: Run, count: int) -> list[float]:
        seconds = []
        for _ in range(min(count, 2)):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        return seconds


def timer_of(device: torch.device) -> Timer:
    """The timer for ``device``."""
    return CudaTimer(device) if device.type == "cuda" else WallTimer()
