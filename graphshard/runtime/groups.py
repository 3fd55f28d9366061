"""Process groups of one rank: one per mesh axis, one for control messages, and the channels between stages."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from graphshard.errors import NoProcessGroup, PlanMismatch, WorldSizeMismatch
from graphshard.mesh import Mesh, ranks_by

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Groups:
    """``axes`` has a group for every axis longer than 1. ``pairs`` has one for every directed pair of stages that this
    rank is an end of; it is empty with gloo, where a tag on the group over the stages is a channel of its own."""

    axes: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    pairs: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict)


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
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
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
    timeout, rank = timedelta(seconds=timeout_s), dist.get_rank()
    long = [(name, size) for name, size in mesh.axes if size > 1]
    axes: dict[str, dist.ProcessGroup] = {}
    if long:
        names, sizes = zip(*long, strict=True)
        device_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        axes = {name: device_mesh.get_group(name) for name in names}
    pairs = {}
    if device.type == "cuda":
        # Everybody creates every group in one order: their names are counted.
        stages = mesh.size("pp")
        for column in (mesh.group(first, "pp") for first in range(mesh.world_size // stages)):
            for source in range(stages):
                for target in (s for s in range(stages) if s != source):
                    group = dist.new_group([column[source], column[target]], timeout=timeout)
                    if rank in (column[source], column[target]):
                        pairs[source, target] = group
        meet(axes, pairs, mesh.coordinates(rank)["pp"], device)
    return Groups(axes, pairs)


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
