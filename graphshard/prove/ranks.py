"""Proves the plans that ranks were given, one each, against one another.

``prove.prove`` takes one plan that all ranks run, which a job makes sure of by comparing fingerprints before its first
step. Here every rank may have another one: of another version, edited, stale. This says what would go wrong where, for
tests and for who looks into such a job. What depends on a few lists only is checked once for every class of ranks that
are alike:

- Ranks with equal plans are one class. The life of values depends on a rank's own list: once per class and stage.
- A pipeline is the ranks of equal data-parallel coordinates. Pairing sends and receives depends on the lists of its
  ranks: once for every combination of classes that some pipeline has. Likewise a data-parallel group, for the order of
  its collectives.
- If there is one class, prove.py's argument holds: a pipeline of representatives is run. If not, all ranks are.

Process groups are made from the mesh alone, in one order (runtime/groups.py), so that equal meshes are enough for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphshard.errors import PlanMismatch, WorldSizeMismatch
from graphshard.execution import ExecutionPlan, Instruction, Op, match_waits, variants
from graphshard.mesh import DATA_AXES, Mesh, ranks_by
from graphshard.prove import check_values, prove
from graphshard.prove.channels import Channel, Parties, check_collectives, check_progress, check_transfers
from graphshard.prove.memory import check_memory
from graphshard.prove.update import check_update


def prove_ranks(plans: Sequence[ExecutionPlan]) -> None:
    """Check the plans that ranks 0, 1, … were given, for the first step and for later ones.

    Raises:
        PlanMismatch: they are for different meshes or numbers of micro-batches.
        WorldSizeMismatch: there are not as many as the mesh has ranks.
        PlanError: the broken rule, and for each rank involved the instructions around the spot.
    """
    _same_frame(plans)
    mesh = plans[0].mesh
    classes = _Classes(plans)
    if classes.count == 1:
        prove(plans[0])
        return
    for first in (False, True):
        if not any(first in variants(plan) for plan in classes.plans):
            continue
        for rank in classes.representatives():
            stage = mesh.coordinates(rank)["pp"]
            check_values(plans[rank], stage, first, f"rank {rank} (stage {stage})")
        lists = classes.lists(first)
        for pipeline in classes.combinations("pp"):
            parties = _parties(lists, pipeline)
            check_transfers(parties)
            check_collectives(parties, "pp", "over the stages")
        for axis in DATA_AXES:
            for group in classes.combinations(axis):
                check_collectives(_parties(lists, group), axis, f"over axis {axis}")
        everyone = _parties(lists, range(mesh.world_size))
        waits = {id(shared): match_waits(shared) for shared in lists}  # ranks that are alike share a list
        check_progress(everyone, [waits[id(instructions)] for instructions in lists], _Meets(mesh))
        for rank in classes.representatives():
            stage = mesh.coordinates(rank)["pp"]
            check_memory(plans[rank], stage, first, f"rank {rank}")
            check_update(plans[rank], stage, first, f"rank {rank}")


def _same_frame(plans: Sequence[ExecutionPlan]) -> None:
    meshes, microbatches = [str(plan.mesh) for plan in plans], [str(plan.microbatches) for plan in plans]
    for what, given in (("mesh", meshes), ("number of micro-batches", microbatches)):
        if len(set(given)) > 1:
            raise PlanMismatch(what, ranks_by(given))
    if plans[0].mesh.world_size != len(plans):
        raise WorldSizeMismatch(meshes[0], plans[0].mesh.world_size, len(plans))


def _parties(lists: Sequence[tuple[Instruction, ...]], ranks: Sequence[int]) -> Parties:
    return Parties([lists[rank] for rank in ranks], [f"rank {rank}" for rank in ranks])


class _Classes:
    """Which ranks run the same instructions."""

    def __init__(self, plans: Sequence[ExecutionPlan]) -> None:
        self._mesh = plans[0].mesh
        self.plans: list[ExecutionPlan] = []  # one of each class
        known: dict[object, int] = {}
        by_identity: dict[int, int] = {}
        self._of: list[int] = []
        for plan in plans:
            if id(plan) not in by_identity:
                key = tuple((s.prologue, s.body, s.epilogue, s.first_epilogue) for s in plan.stages)
                if key not in known:
                    known[key] = len(self.plans)
                    self.plans.append(plan)
                by_identity[id(plan)] = known[key]
            self._of.append(by_identity[id(plan)])

    @property
    def count(self) -> int:
        return len(self.plans)

    def representatives(self) -> Iterator[int]:
        """A rank of every class and stage."""
        stage_of = [self._mesh.coordinates(rank)["pp"] for rank in range(len(self._of))]
        seen: dict[tuple[int, int], int] = {}
        for rank, stage in enumerate(stage_of):
            seen.setdefault((self._of[rank], stage), rank)
        return iter(seen.values())

    def lists(self, first: bool) -> list[tuple[Instruction, ...]]:
        """What each rank does in a step."""
        made = [[stage.step(first) for stage in plan.stages] for plan in self.plans]
        return [made[kind][self._mesh.coordinates(rank)["pp"]] for rank, kind in enumerate(self._of)]

    def combinations(self, axis: str) -> Iterator[tuple[int, ...]]:
        """A group along ``axis`` for every combination of classes and stages that there is."""
        seen: dict[tuple[tuple[int, int], ...], tuple[int, ...]] = {}
        for rank in range(len(self._of)):
            at = self._mesh.coordinates(rank)
            if at[axis] == 0:
                group = self._mesh.group(rank, axis)
                seen.setdefault(tuple((self._of[r], at["pp"] if axis != "pp" else 0) for r in group), group)
        return iter(seen.values())


class _Meets:
    """Meetings of all ranks of a mesh; see channels.Meets."""

    def __init__(self, mesh: Mesh) -> None:
        self._coordinates = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
        axes = self._coordinates[0]
        self._groups = [{axis: mesh.group(rank, axis) for axis in axes} for rank in range(mesh.world_size)]

    def __call__(self, rank: int, ins: Instruction) -> tuple[Channel, tuple[int, ...]] | None:
        if ins.op in (Op.SEND, Op.RECV):
            assert ins.peer is not None
            peer = self._groups[rank]["pp"][ins.peer]
            pair = (rank, peer) if ins.op is Op.SEND else (peer, rank)
            return ("transfers", *pair), pair
        if ins.op in (Op.GATHER, Op.REDUCE):
            group = self._groups[rank][ins.axis]
            return (ins.axis, *group), group
        return None
