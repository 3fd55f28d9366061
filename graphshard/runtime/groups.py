"""Process groups of one rank: one per mesh axis, one for control messages, and the channels between stages."""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from graphshard.errors import NoProcessGroup, PlanMismatch, WorldSizeMismatch
from graphshard.mesh import Mesh, ranks_by

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NCCL_TIMES, _NCCL_MORE_S = 2.0, 30.0
"""How many times the limit NCCL waits before it ends the process, and how much longer than that. It counts from the
host's call, which may come a step before the device gets there; overdue.py notices first, and hears what others say."""


@dataclass(frozen=True)
class Groups:
    """``axes`` has a group for every axis longer than 1. ``pairs`` has one for every directed pair of stages that this
    rank is an end of; it is empty with gloo, where a tag on the group over the stages is a channel of its own."""

    axes: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    pairs: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict)

    def own(self) -> list[dist.ProcessGroup]:
        """Those that were made here: an axis may have the world's."""
        return [group for group in (*self.axes.values(), *self.pairs.values()) if group is not dist.group.WORLD]


def join_world(device: torch.device, timeout_s: float) -> None:
    """Make sure that this process is in a process group; it leaves one that is set up here, from the launcher's
    environment, when Python ends.

    Raises:
        NoProcessGroup: no launcher set the environment.
    """
    if dist.is_initialized():
        return
    if missing := [name for name in _ENVIRONMENT if name not in os.environ]:
        raise NoProcessGroup(missing)
    dist.init_process_group(_BACKENDS[device.type], timeout=_limit(device, timeout_s))
    atexit.register(leave_world)


def leave_world() -> None:
    """Destroy all process groups, if nobody has."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_control(mesh: Mesh, timeout_s: float, measure_memory: bool) -> dist.ProcessGroup:
    """Create the group of all ranks for control messages, on gloo; every rank must call it at the same point with the
    same mesh, and measure memory if all do: those that do tell each other after every step.

    Raises:
        WorldSizeMismatch: the running process group has another size than the mesh.
        PlanMismatch: another rank was given another mesh, or ``measure_memory``.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size != mesh.world_size:
        raise WorldSizeMismatch(str(mesh), mesh.world_size, world_size)
    control: dist.ProcessGroup = dist.new_group(
        backend="gloo", timeout=timedelta(seconds=timeout_s), group_desc="control"
    )
    given = [(str(mesh), str(measure_memory))] * world_size
    dist.all_gather_object(given, given[rank], group=control)
    for what, by_rank in zip(("mesh", "measure_memory"), zip(*given, strict=True), strict=True):
        if len(set(by_rank)) > 1:
            raise PlanMismatch(what, ranks_by(by_rank))
    return control


def make_groups(mesh: Mesh, device: torch.device, timeout_s: float) -> Groups:
    """Create this rank's groups over the axes of the mesh; every rank must call it at the same point."""
    rank, stages = dist.get_rank(), mesh.size("pp")
    axes: dict[str, dist.ProcessGroup] = {}
    # Everybody creates every group in one order: their names are counted.
    for axis in (name for name, size in mesh.axes if size > 1):
        for members in sorted({mesh.group(member, axis) for member in range(mesh.world_size)}):
            group = _group(members, device, timeout_s)
            if rank in members:
                axes[axis] = group
    pairs = {}
    if device.type == "cuda":
        for column in (mesh.group(first, "pp") for first in range(mesh.world_size // stages)):
            for source, target in itertools.permutations(range(stages), 2):
                group = _group((column[source], column[target]), device, timeout_s, shared=False)
                if rank in (column[source], column[target]):
                    pairs[source, target] = group
        meet(axes, pairs, mesh.coordinates(rank)["pp"], device)
    return Groups(axes, pairs)


def _group(members: tuple[int, ...], device: torch.device, timeout_s: float, shared: bool = True) -> dist.ProcessGroup:
    """A group that carries tensors of ``device``, whatever the world's does; ``shared``: it may be the world's."""
    backend = _BACKENDS[device.type]
    if shared and len(members) == dist.get_world_size() and dist.get_backend() == backend:
        world = dist.group.WORLD
        assert world is not None
        return world
    made: dist.ProcessGroup = dist.new_group(members, _limit(device, timeout_s), backend)
    return made


def _limit(device: torch.device, timeout_s: float) -> timedelta:
    """How long a group's members wait for one another."""
    return timedelta(seconds=_NCCL_TIMES * timeout_s + _NCCL_MORE_S if device.type == "cuda" else timeout_s)


def meet(
    axes: Mapping[str, dist.ProcessGroup],
    pairs: Mapping[tuple[int, int], dist.ProcessGroup],
    stage: int,
    device: torch.device,
) -> None:
    """Use every group once, in one order. NCCL makes a communicator when it is first used, and the host then waits for
    the other ranks: within a step, whose ranks come to their transfers in different orders, they could wait in a
    circle."""
    one = torch.ones(1, device=device)
    works = [dist.all_reduce(one.clone(), group=group, async_op=True) for group in axes.values()]
    for source, target in sorted(pairs):
        group = pairs[source, target]
        # Ranks of a column ascend with the stage, and groups sort their ranks.
        place = int(source < target) if stage == source else int(target < source)
        works.append(group.send([one], place, 0) if stage == source else group.recv([one.clone()], place, 0))
    for work in works:
        work.wait()
