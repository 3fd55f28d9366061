"""What a rank finds when a step begins, sorted once by where it comes from, so that a step need not ask each slot."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from graphshard.execution import Ref, TensorType
from graphshard.program import Role, Slot

STORED = frozenset(Role) - {Role.BATCH, Role.RNG, Role.LR, Role.CONSTANT}
"""What the store of a rank keeps from step to step."""


@dataclass(frozen=True)
class Part:
    """One tensor of a micro-batch; ``index`` is its place in flattening order."""

    ref: Ref
    slot: Slot
    kind: TensorType
    microbatch: int
    index: int


@dataclass(frozen=True)
class Feed:
    """Of one rank, and of first steps or later ones. ``kept`` stay in the store, ``taken`` the step replaces."""

    dp_rank: int
    parts: tuple[Part, ...]
    keys: tuple[tuple[Ref, int], ...]  # random keys, with the micro-batch
    lrs: tuple[tuple[Ref, int], ...]  # with the parameter group
    constants: tuple[tuple[Ref, str], ...]
    kept: tuple[tuple[Ref, Slot], ...]
    taken: tuple[tuple[Ref, Slot], ...]


def sort_feed(dp_rank: int, reads: Mapping[Ref, tuple[Slot, TensorType]], results: Collection[Ref]) -> Feed:
    """The feed of a rank whose step reads ``reads`` and defines ``results``."""
    parts, keys = [], []
    for ref, (slot, kind) in reads.items():
        if slot.role in (Role.BATCH, Role.RNG):
            assert ref.microbatch is not None
            if slot.role is Role.BATCH:
                parts.append(Part(ref, slot, kind, ref.microbatch, int(slot.name)))
            else:
                keys.append((ref, ref.microbatch))
    stored = [(ref, slot) for ref, (slot, _) in reads.items() if slot.role in STORED]
    return Feed(
        dp_rank,
        tuple(parts),
        tuple(keys),
        tuple((ref, int(slot.name)) for ref, (slot, _) in reads.items() if slot.role is Role.LR),
        tuple((ref, slot.name) for ref, (slot, _) in reads.items() if slot.role is Role.CONSTANT),
        tuple((ref, slot) for ref, slot in stored if ref not in results),
        tuple((ref, slot) for ref, slot in stored if ref in results),
    )
