"""What graphshard is compared with, each set up as its documentation advises: eager, DDP, FSDP2, torch's pipelining.

Every function returns ``step(index) -> loss``: forward, backward and a fused AdamW update on batch ``index``; the loss
is the global mean, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble
from torch.nn.parallel import DistributedDataParallel

from model import Part, Sizes, batch_of, cut_points, loss_fn, make_part

LEARNING_RATE = 3e-4
Step = Callable[[int], float]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """The update of every row."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _mean_over_ranks(loss: Tensor) -> float:
    """The mean of ``loss`` over all ranks."""
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def _accumulated(
    model: nn.Module, x: Tensor, y: Tensor, sizes: Sizes, last: Callable[[bool], AbstractContextManager[object]]
) -> Tensor:
    """Gradients of the mean loss, micro-batch by micro-batch; ``last(flag)`` wraps each."""
    count = x.shape[0] // sizes.microbatch
    total = torch.zeros(())
    for i, (xi, yi) in enumerate(zip(x.chunk(count), y.chunk(count), strict=True)):
        with last(i == count - 1):
            loss = loss_fn(model(xi), yi) / count
            loss.backward()
        total += loss.detach()
    return total


def eager(sizes: Sizes) -> Step:
    """One process, gradients accumulated over the same micro-batches."""
    model = make_part(sizes)
    optimizer = adamw(model.parameters())

    def step(index: int) -> float:
        loss = _accumulated(model, *batch_of(sizes, index), sizes, lambda _: nullcontext())
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ddp(sizes: Sizes) -> Step:
    """DistributedDataParallel; all micro-batches but the last under ``no_sync``."""
    model = DistributedDataParallel(make_part(sizes), gradient_as_bucket_view=True)
    optimizer = adamw(model.parameters())
    rank, world = dist.get_rank(), dist.get_world_size()

    def step(index: int) -> float:
        x, y = batch_of(sizes, index, rank, world)
        loss = _accumulated(model, x, y, sizes, lambda last: nullcontext() if last else model.no_sync())
        optimizer.step()
        optimizer.zero_grad()
        return _mean_over_ranks(loss)

    return step


def _shard(model: Part, mesh: DeviceMesh, *, reshard: bool) -> FSDPModule:
    """``fully_shard`` per block, then the rest, in place."""
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    return model


def fsdp2(sizes: Sizes, *, sync: bool, reshard: bool) -> Step:
    """FSDP2, ``fully_shard`` on each block and the root.

    Args:
        sync: reduce gradients after every micro-batch; False: after the last one only.
        reshard: free a block's parameters after its forward; False: keep them until after its backward.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_part(sizes)
    sharded = _shard(model, init_device_mesh("cpu", (world,)), reshard=reshard)
    optimizer = adamw(model.parameters())

    def microbatch(last: bool) -> AbstractContextManager[object]:
        sharded.set_requires_gradient_sync(sync or last)
        sharded.set_is_last_backward(last)
        if not reshard and not sync:
            sharded.set_reshard_after_backward(last)
        return nullcontext()

    def step(index: int) -> float:
        loss = _accumulated(model, *batch_of(sizes, index, rank, world), sizes, microbatch)
        optimizer.step()
        optimizer.zero_grad()
        return _mean_over_ranks(loss)

    return step


def pipeline(sizes: Sizes, *, schedule: str, dp: int = 1) -> Step:
    """torch.distributed.pipelining over the ranks, cut by hand into balanced stages.

    Args:
        schedule: "1f1b": a stage a rank; "zbv": two stages a rank in a V, zero bubble.
        dp: data-parallel ranks of each stage, sharded by FSDP2 (which pipelining keeps whole during a step).
    """
    stages = dist.get_world_size() // dp
    mesh = init_device_mesh("cpu", (stages, dp), mesh_dim_names=("pp", "dp"))
    group, here, dp_rank = mesh.get_group("pp"), mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    parts = 2 * stages if schedule == "zbv" else stages
    held = [here, parts - 1 - here] if schedule == "zbv" else [here]
    cuts = cut_points(sizes, parts)
    modules = [make_part(sizes, cuts[i], cuts[i + 1]) for i in held]
    if dp > 1:
        for module in modules:
            _shard(module, mesh["dp"], reshard=False)
    made: list[Any] = [
        PipelineStage(m, i, parts, torch.device("cpu"), group=group) for i, m in zip(held, modules, strict=True)
    ]
    optimizer = adamw(p for m in modules for p in m.parameters())
    count = sizes.microbatches(dp)
    runner: Schedule1F1B | ScheduleZBVZeroBubble
    if schedule == "zbv":
        runner = ScheduleZBVZeroBubble(made, count, loss_fn=loss_fn)
    else:
        runner = Schedule1F1B(made[0], count, loss_fn=loss_fn)
    last = next((i for i, m in enumerate(modules) if m.last), None)
    source = 0 if schedule == "zbv" else stages - 1

    def step(index: int) -> float:
        x, y = batch_of(sizes, index, dp_rank, dp)
        losses: list[Tensor] = []
        inputs = (x,) if here == 0 else ()
        targets: dict[str, Any] = {} if last is None else {"target": y, "losses": losses}
        runner.step(*inputs, **targets)
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).mean() if losses else torch.zeros(())
        dist.broadcast(loss, group=group, group_src=source)
        return _mean_over_ranks(loss)

    return step
