"""What each process of test_failures.py runs: steps of a small model, in one of which the victim fails.

Arguments: the victim's rank, how it fails (kill, stop, raise, or share: before the first step), a number that chooses
the instruction, and timeout_s.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import sys
from typing import Any, NoReturn

import torch

import graphshard
from graphshard.runtime import neighbours
from graphshard.runtime.machine import Machine
from models import zoo

RANK = int(os.environ["RANK"])


def fail(how: str) -> None:
    if how == "raise":
        raise ValueError("out of luck")
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def break_at(machine: Machine, position: int, how: str) -> None:
    """From now on the machine fails at that instruction of a step."""
    action = machine._code[False][position]

    def failing(environment: Any, handles: Any) -> Any:
        fail(how)
        return action(environment, handles)

    machine._code[False][position] = failing


def out_of_memory(*arguments: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "no memory left")


def main() -> None:
    victim, how, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    model, (args, kwargs), loss_fn = zoo.MODELS["mlp"](rows=16)
    if how == "share" and victim == RANK:
        neighbours.Neighbours.common = out_of_memory  # type: ignore[assignment, method-assign]
    compiled = graphshard.compile(
        model,
        "zero3:size=2+pp2",
        loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        timeout_s=float(sys.argv[4]),
    )
    rows = 16 // compiled.dp_size
    mine = [value[compiled.dp_rank * rows : (compiled.dp_rank + 1) * rows] for value in args]
    for step in range(4):
        if step == 2 and victim == RANK and how != "share":
            assert compiled._runtime is not None
            machine = compiled._runtime.load(compiled.execution_plan).machines[RANK]
            break_at(machine, random.Random(seed).randrange(len(machine._code[False])), how)
        compiled.step(*mine, **kwargs)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
