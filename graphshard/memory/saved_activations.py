"""What the forward of a micro-batch keeps on the device for its backward: bytes by dtype, and, where the plan computes
in a lower precision, which operators' results are in float32 all the same.

Autocast computes some operators in float32 (autocast.py), and what promotes takes the widest it is given: that is the
difference to a model in float16, whose layers keep what Korthikanti et al. 2022 count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from graphshard.codegen.storages import category, saved_roots
from graphshard.codegen.workspace import storage_bytes
from graphshard.dataflow import is_getitem
from graphshard.program import Program, Role, info, val
from graphshard.region import is_region, kind
from graphshard.rewrite import copied, inline


@dataclass(frozen=True)
class SavedActivations:
    """Bytes of one micro-batch. ``float32``: of those in float32 by the operator that makes them, largest first, in a
    program that computes in a lower precision."""

    by_dtype: dict[str, int]
    float32: dict[str, int]


def saved_activations(program: Program) -> list[SavedActivations]:
    """Of every stage."""
    program = copied(program)
    body = program.body
    for node in list(body.nodes()):
        if is_region(node):
            inline(body, node)
    lowered = any(slot.role is Role.MASTER for section in program.updates() for slot in section.input_slots)
    result = []
    for stage in range(program.stages):
        saved = saved_roots([node for node in body.nodes() if _is_on(node, stage)], {})
        by_dtype, wide = Counter[str](), Counter[str]()
        for root in sorted(saved):
            if category(root, body, saved) == "saved activations":
                value: torch.Tensor = val(root)
                by_dtype[str(value.dtype).removeprefix("torch.")] += storage_bytes(value)
                if lowered and value.dtype is torch.float32:
                    wide[_maker(root)] += storage_bytes(value)
        result.append(SavedActivations(dict(by_dtype.most_common()), dict(wide.most_common())))
    return result


def _is_on(node: fx.Node, stage: int) -> bool:
    if node.target is torch.ops.graphshard.transfer.default:
        return stage in node.args[1:]
    return info(node).stage in (stage, None)


def _maker(node: fx.Node) -> str:
    source = node.args[0] if is_getitem(node) else node
    assert isinstance(source, fx.Node)
    return kind(source)
