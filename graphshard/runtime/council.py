"""Ranks tell one another what they saw in a step, so that all of them come to the same verdict."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from graphshard.runtime.nonfinite import Account
from graphshard.runtime.watch import Bad, Seen

_TURN_S = 0.001  # how long one look at the other ranks may take


class Council(Protocol):
    """One step's exchange between all ranks; each tells once."""

    def tell(self, rank: int, account: Account) -> None:
        """Give what ``rank`` saw; nothing blocks."""
        ...

    def done(self) -> bool:
        """Whether all have told, so that nobody has to wait."""
        ...

    def wait(self) -> None:
        """Return when all have told."""
        ...

    def accounts(self) -> dict[int, Account]:
        """What all ranks saw; only when all have told."""
        ...


class LocalCouncil:
    """Of ranks in one process."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._accounts: dict[int, Account] = {}

    def tell(self, rank: int, account: Account) -> None:
        self._accounts[rank] = account

    def done(self) -> bool:
        return len(self._accounts) == self._world_size

    def wait(self) -> None:
        assert self.done(), "the scheduler goes on with a rank only when what it waits for is complete"

    def accounts(self) -> dict[int, Account]:
        return self._accounts


class TorchCouncil:
    """Of ranks in processes, one of them here.

    Args:
        control: a group of all ranks, where messages take the CPU.
        progress: serve what other ranks wait for, at most this many seconds; raises RuntimeError where some rank
            cannot go on.
    """

    def __init__(self, control: dist.ProcessGroup, timeout_s: float, progress: Callable[[float], None]) -> None:
        self._control, self._timeout_s, self._progress = control, timeout_s, progress
        self._told = b""
        self._all: list[bytes] | None = None
        rank = dist.get_rank(control)
        self.peers = [other for other in range(dist.get_world_size(control)) if other != rank]

    def tell(self, rank: int, account: Account) -> None:
        self._told = json.dumps([dataclasses.asdict(bad) for bad in account]).encode() if account else b""

    def done(self) -> bool:
        return self._all is not None

    def wait(self) -> None:
        """Return when all have told.

        Raises:
            RuntimeError: some rank is gone, or does not tell in time.
        """
        lengths = [int(length) for length in self._gather(torch.tensor([len(self._told)], device="cpu"))]
        told = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        told[: len(self._told)] = torch.frombuffer(bytearray(self._told), dtype=torch.uint8) if self._told else 0
        gathered = self._gather(told) if max(lengths) else [told] * len(lengths)
        self._all = [bytes(part[:n].tolist()) for part, n in zip(gathered, lengths, strict=True)]

    def accounts(self) -> dict[int, Account]:
        assert self._all is not None
        return {rank: [_bad(entry) for entry in json.loads(told or b"[]")] for rank, told in enumerate(self._all)}

    def _gather(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(len(self.peers) + 1)]
        work = dist.all_gather(parts, mine, group=self._control, async_op=True)
        deadline = time.monotonic() + self._timeout_s
        # A rank that only waited here could be what the others wait for.
        while not work.is_completed():
            self._progress(_TURN_S)
            if time.monotonic() > deadline:
                raise RuntimeError("not all ranks came to the end of the backward pass")
        work.wait()
        return parts


def _bad(entry: dict[str, Any]) -> Bad:
    reads = {name: Seen(**seen) for name, seen in entry["reads"].items()}
    return Bad(entry["name"], entry["microbatch"], Seen(**entry["seen"]), reads)
