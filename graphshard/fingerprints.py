"""What ranks must agree on before they run a step or store values, as numbers to compare."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graphshard.execution import ExecutionPlan, Op


def collectives_of(plan: ExecutionPlan) -> int:
    """A hash of what all ranks must agree on: the mesh, and the collectives of each stage in their order."""
    return _hash([str(plan.mesh), *_listed(plan, (Op.GATHER, Op.REDUCE))])


def transfers_of(plan: ExecutionPlan) -> int:
    """A hash of what the ranks of one pipeline must agree on: what they exchange, shapes included."""
    return _hash(_listed(plan, (Op.SEND, Op.RECV)))


def checksum_of(value: Tensor) -> int:
    """A CRC-32 of the bytes of ``value``: they are read once, at about the speed of memory."""
    flat = value.detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    if flat.stride() != (1,):  # one element counts as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def combined(checksums: Mapping[str, int]) -> int:
    """A hash of names with their checksums."""
    return _hash(f"{name} {checksum}" for name, checksum in checksums.items())


def _listed(plan: ExecutionPlan, ops: tuple[Op, ...]) -> list[str]:
    return [
        f"{stage} {ins}"
        for stage, stage_plan in enumerate(plan.stages)
        for first in (False, True)
        for ins in stage_plan.step(first)
        if ins.op in ops
    ]


def _hash(lines: Iterable[str]) -> int:
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
