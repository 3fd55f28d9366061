"""The rows of the benchmark, and what is compared with what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
from model import Sizes

ITEM_BYTES = 4  # float32


@dataclass
class Runner:
    """A row being run; ``report`` is what it says of itself once it has run."""

    step: peers.Step
    report: Callable[[], dict[str, Any]] = dict


Start = Callable[[Sizes, int], Runner]
Times = Callable[[int], float]
"""How often per step, from the micro-batches of a data-parallel rank."""


@dataclass(frozen=True)
class Row:
    """One configuration on ``dp * pp`` ranks.

    ``gathers`` and ``reduces``: how often a step must bring parameters together and gradients apart, each of which
    sends (dp-1)/dp of their bytes; an all-reduce of gradients counts as two. ``crossings``: pairs of neighbouring
    stages on different ranks.
    """

    start: Start
    dp: int = 1
    pp: int = 1
    gathers: Times = lambda m: 0
    reduces: Times = lambda m: 0
    crossings: int = 0

    @property
    def world(self) -> int:
        return self.dp * self.pp

    def minimum_bytes(self, sizes: Sizes, parameters: int) -> float:
        """What a rank has to send a step, mean over ranks; a crossing sends a hidden state on and its gradient back."""
        m = sizes.microbatches(self.dp)
        moved = (self.gathers(m) + self.reduces(m)) * (self.dp - 1) / self.dp * parameters / self.pp
        sent = 2 * m * self.crossings * sizes.microbatch * sizes.sequence * sizes.width / self.pp
        return (moved + sent) * ITEM_BYTES


def _peer(make: Callable[..., peers.Step], **options: Any) -> Start:
    return lambda sizes, dp: Runner(make(sizes, **options))


def _ours(plan: str) -> Start:
    def start(sizes: Sizes, dp: int) -> Runner:
        import ours  # only here, so that peers are measured without graphshard in memory

        compiled = ours.compile_row(sizes, plan.format(m=sizes.microbatches(dp)), dp)
        return Runner(functools.partial(ours.step, compiled, sizes), lambda: ours.account(compiled))

    return start


def _once(m: int) -> float:
    return 1


def _all_reduce(m: int) -> float:
    return 2


def _each(m: int) -> float:
    return m


def _twice_each(m: int) -> float:
    return 2 * m


_fsdp2 = functools.partial(_peer, peers.fsdp2)

ROWS: dict[str, Row] = {
    "eager": Row(_peer(peers.eager)),
    "graphshard one": Row(_ours("accum{m}")),
    "DDP": Row(_peer(peers.ddp), dp=2, reduces=_all_reduce),
    "graphshard dp": Row(_ours("dp+accum{m}"), dp=2, reduces=_all_reduce),
    "FSDP2": Row(_fsdp2(sync=True, reshard=True), dp=2, gathers=_twice_each, reduces=_each),
    "FSDP2 no sync": Row(_fsdp2(sync=False, reshard=True), dp=2, gathers=_twice_each, reduces=_once),
    "FSDP2 no reshard": Row(_fsdp2(sync=True, reshard=False), dp=2, gathers=_each, reduces=_each),
    "FSDP2 no reshard, no sync": Row(_fsdp2(sync=False, reshard=False), dp=2, gathers=_once, reduces=_once),
    "graphshard zero3": Row(_ours("zero3+accum{m}"), dp=2, gathers=_twice_each, reduces=_each),
    "graphshard zero3 hoisted": Row(_ours("zero3:budget_gb=1+accum{m}"), dp=2, gathers=_once, reduces=_once),
    "torch 1F1B": Row(_peer(peers.pipeline, schedule="1f1b"), pp=2, crossings=1),
    "graphshard pp2 1f1b": Row(_ours("pp2:schedule=1f1b,microbatches={m}"), pp=2, crossings=1),
    "torch ZBV": Row(_peer(peers.pipeline, schedule="zbv"), pp=2, crossings=2),
    "graphshard pp2 zb-h2": Row(_ours("pp2:schedule=zb-h2,microbatches={m}"), pp=2, crossings=1),
    "FSDP2 in torch 1F1B": Row(
        _peer(peers.pipeline, schedule="1f1b", dp=2), dp=2, pp=2, gathers=_once, reduces=_once, crossings=1
    ),
    "graphshard zero3+pp2": Row(
        _ours("zero3+pp2:microbatches={m}"), dp=2, pp=2, gathers=_twice_each, reduces=_each, crossings=1
    ),
    "graphshard zero3+pp2 hoisted": Row(
        _ours("zero3:budget_gb=1+pp2:microbatches={m}"), dp=2, pp=2, gathers=_once, reduces=_once, crossings=1
    ),
}


@dataclass(frozen=True)
class Comparison:
    """``row`` against the faster of ``peers``; ``reach`` is the ratio of step times to get to."""

    row: str
    peers: tuple[str, ...]
    reach: float


_FSDP2 = ("FSDP2", "FSDP2 no sync")

GROUPS: dict[str, tuple[Comparison, ...]] = {
    "one": (Comparison("graphshard one", ("eager",), 0.95),),
    "dp": (Comparison("graphshard dp", ("DDP",), 1.0),),
    "zero3": (
        Comparison("graphshard zero3", ("FSDP2",), 0.76),  # which gathers and reduces as often
        Comparison("graphshard zero3", _FSDP2, 0.82),
        Comparison("graphshard zero3 hoisted", _FSDP2, 0.70),
        Comparison("graphshard zero3 hoisted", ("FSDP2 no reshard", "FSDP2 no reshard, no sync"), 1.0),
    ),
    "pipeline": (
        Comparison("graphshard pp2 1f1b", ("torch 1F1B",), 0.87),
        Comparison("graphshard pp2 zb-h2", ("torch 1F1B", "torch ZBV"), 0.92),
    ),
    "zero3+pp2": (
        Comparison("graphshard zero3+pp2", ("FSDP2 in torch 1F1B",), 0.82),
        Comparison("graphshard zero3+pp2 hoisted", ("FSDP2 in torch 1F1B",), 0.82),
    ),
}
"""What runs interleaved, by the name that ``--only`` takes."""


def rows_of(group: str) -> list[str]:
    """The rows a group runs, peers first, each once."""
    comparisons = GROUPS[group]
    names = [name for c in comparisons for name in c.peers] + [c.row for c in comparisons]
    return list(dict.fromkeys(names))
