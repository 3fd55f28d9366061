"""Decide which forward values the backward finds kept and which it computes again; recompute and offload obey.

``full``: of each module block, only what enters it is kept (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
Cost"). ``selective``: results of matrix products and attention, which are dear, are kept too. ``custom``: what the
patterns name is computed again. ``cut``: a minimum cut at a price per byte, or for some stages another policy
``instead``, as the planner found it; see saving.py. What enters a block is kept by all, unless ``custom`` names
operators: else more than one block would be computed again at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, TypeVar

import torch
from torch import fx

from graphshard.analysis import nbytes
from graphshard.blocks import blocks, forward_of, stages_of
from graphshard.dataflow import is_getitem
from graphshard.errors import NothingMatches, PassOptionError
from graphshard.pipeline import Context
from graphshard.program import Level, MemoryTag, Phase, Program, info, set_info, val
from graphshard.saving import POLICIES, PRICES, Ladder, Rung, can_repeat, divide, storages

_T = TypeVar("_T")

_OFFLOADED_BYTES = 4096
"""Smaller values than a page are not worth a transfer."""


@dataclass(frozen=True)
class MemoryPolicy:
    """Tag forward operations.

    ``levels`` and ``blocks``, for ``cut``: a rung of the ladder for each stage; the last one is for the stages left.
    ``instead``: for each stage what takes the place of the cut, ``full``, ``selective`` or ``all``; or ``cut``.
    ``offload_activations``: what is kept goes out of the device between forward and backward; ``offload_blocks``: of
    the first blocks alone, so many for each stage; ``file_blocks``: of so many behind those it goes to a file.
    """

    policy: str = ""
    modules: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    instead: tuple[str, ...] = ()
    offload_activations: bool = False
    offload_blocks: tuple[int, ...] = ()
    file_blocks: tuple[int, ...] = ()
    name: ClassVar[str] = "memory-policy"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.policy not in ("", "full", "selective", "custom", "cut"):
            raise PassOptionError(self.name, f"policy={self.policy}", "full, selective, custom or cut")
        if self.policy == "custom" and not (self.modules or self.ops):
            raise PassOptionError(self.name, "policy=custom", "modules= or ops= with it")
        if self.policy == "cut" and not (self.levels and self.blocks):
            raise PassOptionError(self.name, "policy=cut", "levels= and blocks= with it")
        for policy in self.instead:
            if policy not in ("cut", *POLICIES):
                raise PassOptionError(self.name, f"instead={policy}", "cut, full, selective or all")
        for level in self.levels:
            if not 0 <= level <= len(PRICES):
                raise PassOptionError(self.name, f"levels={level}", f"integers from 0 to {len(PRICES)}")
        for option in ("blocks", "offload_blocks", "file_blocks"):
            for count in getattr(self, option):
                if count < 0:
                    raise PassOptionError(self.name, f"{option}={count}", "integers of at least 0")
        for option in ("modules", "ops"):
            if "" in getattr(self, option):
                raise PassOptionError(self.name, f"{option}={'/'.join(getattr(self, option))}", "patterns of names")

    def run(self, program: Program, ctx: Context) -> Program:
        if program.level is Level.SHARDED:
            return program
        repeats = False
        stages = stages_of(program)
        for position, stage in enumerate(stages):
            forward = forward_of(program, stage)
            block_of = blocks(forward)
            first, end = self._leaving(block_of, position, last=position == len(stages) - 1)
            again = set(self._again(program, stage, position))
            if self.policy == "cut":  # a block's values leave or are computed again, not both
                again = {node for node in again if block_of.get(node, 0) >= end}
            kept, repeated = divide(forward, again)
            repeats = repeats or bool(repeated)
            for node in repeated:
                set_info(node, tag=MemoryTag.RECOMPUTE)
            for node in storages(kept):
                block = block_of.get(node, 0)
                if block < end and nbytes(val(node)) >= _OFFLOADED_BYTES:
                    set_info(node, tag=MemoryTag.OFFLOAD if block < first else MemoryTag.OFFLOAD_TO_FILE)
        trained = any(info(node).phase is not Phase.FORWARD for node in program.body.nodes())
        if self.policy == "custom" and trained:
            modules, ops = self._idle([node for stage in stages for node in forward_of(program, stage)])
            if modules or ops or not repeats:
                raise NothingMatches(modules or (() if ops else self.modules), ops or (() if modules else self.ops))
        return program

    def _idle(self, forward: list[fx.Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The patterns of modules, and of operators, that no operation has; else those that none has which one of the
        others matches, too."""
        paths = {(info(node).module, _operator(node)) for node in forward if can_repeat(node)}
        for alone in (True, False):
            modules = tuple(
                p
                for p in self.modules
                if not any(_inside(path, p) and (alone or self._has_op(op)) for path, op in paths)
            )
            ops = tuple(
                p
                for p in self.ops
                if not any(fnmatchcase(op, p) and (alone or self._has_path(path)) for path, op in paths)
            )
            if modules or ops:
                break
        return modules, ops

    def _again(self, program: Program, stage: int | None, position: int) -> Iterable[fx.Node]:
        """What the backward of a stage computes again."""
        if not self.policy:
            return ()
        ladder = Ladder(program, stage)
        if self.policy == "cut":
            policy = _of_stage(self.instead or ("cut",), position)
            rung = Rung(_of_stage(self.levels, position), _of_stage(self.blocks, position))
            return ladder.recomputed(rung) if policy == "cut" else ladder.named(policy)
        if self.policy in POLICIES:
            return ladder.named(self.policy)
        forward = [node for node in forward_of(program, stage) if can_repeat(node)]
        kept = set() if self.ops else ladder.kept  # operators are named one by one
        return [node for node in forward if node not in kept and self._named(node)]

    def _leaving(self, block_of: dict[fx.Node, int], position: int, last: bool) -> tuple[int, int]:
        """What is kept of the blocks before the second number goes out of the device, from the first one on to a
        file."""
        if self.offload_blocks or self.file_blocks:
            first = _of_stage(self.offload_blocks or (0,), position)
            return first, first + _of_stage(self.file_blocks or (0,), position)
        count = max(block_of.values(), default=0)  # the last block of all is differentiated at once
        end = count + (not last) if self.offload_activations else 0
        return end, end

    def _named(self, node: fx.Node) -> bool:
        return self._has_path(info(node).module) and self._has_op(_operator(node))

    def _has_path(self, path: str) -> bool:
        return not self.modules or any(_inside(path, pattern) for pattern in self.modules)

    def _has_op(self, op: str) -> bool:
        return not self.ops or any(fnmatchcase(op, pattern) for pattern in self.ops)


def _inside(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def _operator(node: fx.Node) -> str:
    target = (node.all_input_nodes[0] if is_getitem(node) else node).target
    assert isinstance(target, torch._ops.OpOverload)
    return target._schema.name.rpartition("::")[2]


def _of_stage(given: tuple[_T, ...], position: int) -> _T:
    """One for each stage, the last one for the stages left."""
    return given[min(position, len(given) - 1)]
