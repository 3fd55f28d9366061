"""Whose fault it is when a step cannot go on: ranks say where they stand, through the store of the process group."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from graphshard.errors import RanksError
from graphshard.mesh import Mesh
from graphshard.runtime.background import in_background

T = TypeVar("T")

_HEARING_S = 3.0  # how long a rank that gives up listens to what the others say
_ANSWER_S = 5.0  # how long the store may take to answer
_FAILED, _GAVE_UP = "failed", "gave up"
_TROUBLE = "trouble"


class Blame:
    """This rank's line to the others; silent where no launcher's environment names a store.

    Args:
        name: what is asked of its executor is said under; the same on all ranks.
    """

    def __init__(self, mesh: Mesh, rank: int, name: str) -> None:
        self._mesh, self._rank = mesh, rank
        self._spoke = False
        self._store: Any = None  # a torch.distributed.Store
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if host and port and mesh.world_size > 1:
            try:
                timeout = timedelta(seconds=_ANSWER_S)
                store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)  # type: ignore[attr-defined]
            except (RuntimeError, ValueError):
                return  # a process group that was set up otherwise
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"graphshard.blame.{attempt}.{name}", store)  # type: ignore[attr-defined]

    def fail(self, reason: str, instruction: str) -> None:
        """Say that this rank failed on its own."""
        self._say(f"{_FAILED}: {reason} in {instruction}")

    def leave(self, error: BaseException) -> None:
        """Say, unless this rank has said why, that it does nothing more with the others."""
        if not self._spoke:
            own = _GAVE_UP if isinstance(error, RanksError) else _FAILED
            self._say(f"{own}: {type(error).__name__}: {first_line(error)}")

    def is_trouble(self) -> bool:
        """Whether any rank has said something."""
        return bool(self._asked(lambda store: store.check([_TROUBLE])))

    def account(self, waits_for: str, instruction: str, ended: Sequence[int]) -> str:
        """Say that this rank waits, hear the others, and put together who is at fault, and a line for every rank.

        Args:
            waits_for: names of ranks.
            ended: ranks that are known to have ended.
        """
        self._say(f"waits for {waits_for} in {instruction}")
        said = self._hear(ended)
        failed, left = ([rank for rank, line in said.items() if line.startswith(k)] for k in (_FAILED, _GAVE_UP))
        silent = [rank for rank in range(self._mesh.world_size) if rank not in said]
        if self._store is None:
            return ""
        names = ", ".join(f"rank {rank}" for rank in failed or left or silent)
        verdict = f"at fault: {names}" if names else "all ranks wait for one another"
        lines = []
        for rank in range(self._mesh.world_size):
            gone = "has ended" if rank in ended else "says nothing: it is dead, stopped or far behind"
            lines.append(f"  rank {rank} (stage {self._mesh.coordinates(rank)['pp']}) {said.get(rank, gone)}")
        return "\n".join([verdict, *lines])

    def _say(self, line: str) -> None:
        self._spoke = True

        def say(store: Any) -> None:
            store.set(str(self._rank), line)
            store.set(_TROUBLE, "")

        self._asked(say)

    def _hear(self, ended: Sequence[int]) -> dict[int, str]:
        """What each rank has said; waits until all have that can, but not long."""
        said: dict[int, str] = {}
        ranks = range(self._mesh.world_size)
        deadline = time.monotonic() + _HEARING_S

        def look(store: Any) -> dict[int, str]:
            new = [rank for rank in ranks if rank not in said and store.check([str(rank)])]
            return {rank: store.get(str(rank)).decode() for rank in new}

        while (new := self._asked(look)) is not None:
            said |= new
            if len(said) + len(set(ended) - said.keys()) >= self._mesh.world_size or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return said

    def _asked(self, ask: Callable[[Any], T]) -> T | None:
        """What ``ask`` gets from the store. None from when on it does not answer: the process that holds it is gone; or
        stopped, which the store's own limits of time do not count."""
        if self._store is None:
            return None
        store = self._store
        try:
            return in_background(lambda: ask(store), "graphshard-blame").result(2 * _ANSWER_S)
        except (RuntimeError, TimeoutError):
            self._store = None
            return None


def first_line(error: BaseException) -> str:
    """Of what an error says; its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
