"""The passes, one per file, and their order."""

from __future__ import annotations

from collections.abc import Sequence

from graphshard.passes.bucket import BucketCollectives
from graphshard.passes.hoist import Hoist
from graphshard.passes.normalize import Normalize
from graphshard.passes.overlap import Overlap
from graphshard.passes.pipeline_cut import PipelineCut
from graphshard.passes.zero import Zero
from graphshard.pipeline import Pass
from graphshard.plan import Plan


def default_passes(plan: Plan) -> list[Pass]:
    """The passes of a plan, in order."""
    return [
        Normalize(),  # weight views per phase, or zero could not free weights between forward and backward
        PipelineCut(stages=plan.stage_starts),  # before sharding: which parameters share a bucket depends on the stage
        Zero(stage=plan.zero_stage),  # one bucket per parameter, the simplest thing that is right
        BucketCollectives(),  # merges what zero made
        Hoist(budget_gb=plan.budget_gb),  # by the sizes of merged buckets
        Overlap(),  # last: order depends on which collectives are left
    ]


def with_passes(passes: list[Pass], given: Sequence[Pass]) -> list[Pass]:
    """``passes`` with those of ``given`` in place of the ones they are named like; others run after ``normalize``."""
    replacements = {item.name: item for item in given}
    result = [replacements.pop(item.name, item) for item in passes]
    at = next((i for i, item in enumerate(result, 1) if item.name == "normalize"), 0)
    result[at:at] = [item for item in given if item.name in replacements]
    return result
