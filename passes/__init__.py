"""The passes, one per file, and their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphshard.codegen.schedule import UNEVEN
from graphshard.errors import UnknownPass
from graphshard.passes.bucket import BucketCollectives
from graphshard.passes.fuse import Fuse
from graphshard.passes.hoist import Hoist
from graphshard.passes.memory_policy import MemoryPolicy
from graphshard.passes.normalize import Normalize
from graphshard.passes.offload import Offload
from graphshard.passes.overlap import Overlap
from graphshard.passes.pipeline_cut import PipelineCut
from graphshard.passes.precision import Precision
from graphshard.passes.recompute import Recompute
from graphshard.passes.zero import Zero
from graphshard.pipeline import Pass
from graphshard.plan import Plan


def default_passes(plan: Plan) -> list[Pass]:
    """The passes of a plan, in order."""
    chosen: list[Pass | None] = [
        Normalize(),  # weight views per phase, or zero could not free weights between forward and backward
        _precision(plan),  # before all that counts bytes; behind normalize, which knows no casts of parameters yet
        _pipeline_cut(plan),  # before sharding: which parameters share a bucket depends on the stage
        _memory_policy(plan),  # before sharding: what is gathered is never kept, but gathered again for the backward
        Recompute() if plan.recompute or plan.memory else None,  # obeys it
        Zero(stage=plan.zero_stage),  # one bucket per parameter, the simplest thing that is right
        BucketCollectives(),  # merges what zero made
        Hoist(budget_gb=() if plan.budget_gb is None else (plan.budget_gb,)),  # by the sizes of merged buckets
        Overlap(),  # order depends on which collectives are left
        _offload(plan),  # the update in one piece is cut again where state comes and goes
        Fuse(),  # last: what stands between two of an operation's neighbours is known now
    ]
    return [item for item in chosen if item is not None]


# What a budget leaves open is the planner's to choose; see memory/planner.py.


def _pipeline_cut(plan: Plan) -> PipelineCut:
    return PipelineCut(plan.stage_starts, plan.schedule if plan.schedule in UNEVEN else "")


def _memory_policy(plan: Plan) -> MemoryPolicy | None:
    offloads = plan.offload is not None and plan.offload.activations is not None
    if plan.recompute is not None and plan.recompute.policy != "auto":
        asked = plan.recompute
        return MemoryPolicy(asked.policy, asked.modules, asked.ops, offload_activations=offloads)
    return MemoryPolicy(offload_activations=offloads) if offloads or plan.recompute or plan.memory else None


def _offload(plan: Plan) -> Offload | None:
    if plan.offload is None:
        return Offload() if plan.memory else None
    return Offload(plan.offload.optimizer, plan.offload.params, plan.offload.activations)


def _precision(plan: Plan) -> Precision | None:
    return None if plan.precision is None else Precision(**dataclasses.asdict(plan.precision))


def with_passes(passes: list[Pass], given: Sequence[Pass]) -> list[Pass]:
    """``passes`` with those of ``given`` in place of the ones they are named like; any other runs behind the pass that
    its attribute ``after`` names, ``normalize`` if it has none.

    Raises:
        UnknownPass: ``after`` names none of ``passes``.
    """
    replacements = {item.name: item for item in given}
    result = [replacements.pop(item.name, item) for item in passes]
    for item in reversed(given):  # each right behind its place: of two at one place the first given comes first
        if item.name in replacements:
            names = [other.name for other in result]
            after = getattr(item, "after", "normalize")
            if after not in names:
                raise UnknownPass(after, names)
            result.insert(names.index(after) + 1, item)
    return result
