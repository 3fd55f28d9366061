"""What each of the processes of test_neighbours.py runs: values through shared memory. Arguments: scenario."""

from __future__ import annotations

import os
import sys
import time
from unittest.mock import Mock

import torch
import torch.distributed as dist

from distributed.processes import report
from graphshard.execution import Ref, TensorType
from graphshard.mesh import Mesh
from graphshard.runtime import neighbours
from graphshard.runtime.collectives import TorchCommunicator
from graphshard.runtime.groups import make_groups
from graphshard.runtime.machine import Communicator
from graphshard.runtime.neighbours import Neighbours, PeerGone, TookTooLong
from graphshard.runtime.shared_memory import SharedMemoryCommunicator

RANK = int(os.environ["RANK"])
OTHER = RANK ^ 1
MANY = 3000


def _take(link: Neighbours, channel: int, dtype: torch.dtype, seconds: float = 20.0) -> torch.Tensor:
    arrival, deadline = link.expect(OTHER, channel), time.monotonic() + seconds
    while arrival.value is None:
        link.wait_for([OTHER], deadline)
    value = arrival.value.view(dtype).clone()
    link.release(arrival)
    return value


def values(link: Neighbours) -> dict[str, object]:
    """Every dtype and size, nothing included; two channels, each in its own order."""
    sent = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        for size in (0, 1, 5, 4096, 100_000):
            sent.append(torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)).to(dtype))
    for value in sent:
        link.put([OTHER], 7, value)
        link.put([OTHER], 8, value.flip(0))
    flipped = [_take(link, 8, value.dtype) for value in sent]
    taken = [_take(link, 7, value.dtype) for value in sent]
    same = all(torch.equal(a, b) and torch.equal(a.flip(0), c) for a, b, c in zip(sent, taken, flipped, strict=True))
    return {"same": same}


def many(link: Neighbours) -> dict[str, object]:
    """More values than the sockets hold, while the other side does not listen; then one at a time."""
    if RANK == 0:
        for index in range(MANY):
            link.put([OTHER], 0, torch.tensor([index]))
    else:
        time.sleep(0.5)
    taken = [int(_take(link, 0, torch.int64)) for _ in range(MANY)] if RANK else list(range(MANY))
    blocks = len(link._blocks)
    for _ in range(50):
        link.put([OTHER], 1, torch.ones(1000))
        _take(link, 1, torch.float32)
    return {"in_order": taken == list(range(MANY)), "more_blocks": len(link._blocks) - blocks}


def one_more(link: Neighbours) -> dict[str, object]:
    """One note more than the socket holds: when it has gone, nothing but what comes wakes this rank."""
    count = torch.zeros(1, dtype=torch.int64)
    while RANK == 0 and not link.is_behind:
        link.tell_gone([OTHER], 0)
        count += 1
    dist.broadcast(count, 0)
    while RANK == 1 and link.let_go([OTHER], 0) < count:
        link.listen(20.0)
    while link.is_behind:
        link.listen(20.0)
    return {"woken": len(link._poll.poll(0.0))}


def ends(link: Neighbours) -> dict[str, object]:
    """Rank 1 leaves: what it had put in arrives, and nothing after that."""
    if RANK:
        link.put([OTHER], 0, torch.ones(3))
        link.close()
        return {}
    found: dict[str, object] = {}
    time.sleep(0.5)
    found["taken"] = _take(link, 0, torch.float32).tolist()
    for what in ("take", "put"):
        try:
            _take(link, 0, torch.float32) if what == "take" else link.put([OTHER], 0, torch.ones(1))
        except PeerGone as error:
            found[what] = str(error)
    return found


def common(link: Neighbours) -> dict[str, object]:
    """Values that are gathered one over the other: none is written before the slower rank has read what was there."""
    communicator = SharedMemoryCommunicator(Mesh((("shard", 2),)), RANK, link, Mock(spec=Communicator), timeout_s=20.0)
    shared = communicator.shared["shard"]
    alike = [shared.agree("one layout"), shared.agree(f"that of rank {RANK}")]
    before = len(link._blocks)
    arena = shared.gathered
    kind = TensorType((1000,), torch.float32, (1,))
    places = arena.tensors([(256, kind)])
    arena.reserve(256 + kind.nbytes)
    found, copied = [], 0
    for index in range(50):
        (output,) = places
        gather = communicator.all_gather("shard", output, torch.full((500,), 2.0 * index + RANK))
        gather.wait()
        if index % 2 == RANK:
            time.sleep(0.002)  # the other one is in the next turn
        found.append(output.view(2, 500).unique(dim=1).flatten().tolist())
        arena.let_go()
        copied += len(link._blocks) - before
    own = shared.own.tensors([(64 * 3, kind)])
    for given in shared.given:
        given.reserve(8192)
    totals = []
    for index in range(50):
        own[0].copy_(torch.arange(1000.0) + index * (RANK + 1))  # the other one has read what was there
        total = torch.empty(500)
        reduction = communicator.reduce_scatter("shard", total, own[0])
        if index % 2 == RANK:
            time.sleep(0.002)
        reduction.wait()
        totals.append(torch.equal(total, 2 * torch.arange(1000.0)[500 * RANK : 500 * (RANK + 1)] + 3 * index))
    elsewhere = ""
    (output,) = arena.tensors([(64 * RANK, kind)])
    try:
        communicator.all_gather("shard", output, torch.ones(500)).wait()
    except PeerGone as error:
        elsewhere = str(error)
    right = found == [[2.0 * i, 2.0 * i + 1] for i in range(50)]
    return {"alike": alike, "right": right, "totals": all(totals), "copied": copied, "elsewhere": elsewhere}


def resident(link: Neighbours) -> dict[str, object]:
    """A value of which each rank keeps its part: none writes to its own before the slower rank has read it, and none
    reads before it is written."""
    communicator = SharedMemoryCommunicator(Mesh((("shard", 2),)), RANK, link, Mock(spec=Communicator), timeout_s=20.0)
    shared, part_kind = communicator.shared["shard"], TensorType((500,), torch.float32, (1,))
    kept = shared.residents
    for name in ("first", "second"):  # as of two plans
        kept.reserve({Ref("first"): 4000, Ref(name): 4000})
    values = [kept.value(Ref(name), TensorType((1000,), torch.float32, (1,))) for name in ("first", "second")]
    parts = [kept.part(Ref(name), part_kind) for name in ("first", "second")]
    before, found = len(link._blocks), []
    for index in range(50):
        unread = shared.unread()
        if not unread.done():
            unread.wait()
        for part in parts:
            part.fill_(2.0 * index + RANK)
        if index % 3 == RANK:
            time.sleep(0.002)  # the other one asks for what is not there yet
        gathers = [communicator.all_gather("shard", v, p) for v, p in zip(values, parts, strict=True)]
        for gather in gathers:
            gather.wait()
        if index % 2 == RANK:
            time.sleep(0.002)  # the other one is in the next turn
        found.append([value.view(2, 500).unique(dim=1).flatten().tolist() for value in values])
        for _ in values:
            kept.let_go()
    right = found == [[[2.0 * i, 2.0 * i + 1]] * 2 for i in range(50)]
    elsewhere = ""
    try:
        communicator.all_gather("shard", values[RANK], parts[RANK]).wait()
    except PeerGone as error:
        elsewhere = str(error)
    return {"right": right, "copied": len(link._blocks) - before, "elsewhere": elsewhere}


def far(link: Neighbours) -> dict[str, object]:
    """What lies behind 4 GiB of memory in common."""
    places = [2**32 - 64, 2**32, 2**40 + 64]
    for place in places:
        link.tell_part([OTHER], 0, place, 2**33)
    told = [link.expect(OTHER, 0) for _ in places]
    while told[-1].value is None:
        link.wait_for([OTHER], time.monotonic() + 20.0)
    return {"right": [arrival.block for arrival in told] == places}


def late(link: Neighbours) -> dict[str, object]:
    """Rank 1 lets go of what was gathered while rank 0, which is to write there, puts in something for rank 2; nothing
    comes from anybody after that."""
    mesh = Mesh((("dp", 2), ("shard", 2)))
    communicator = SharedMemoryCommunicator(mesh, RANK, link, Mock(spec=Communicator), timeout_s=5.0)
    if RANK == 3:
        return {}
    total = torch.full((10,), float(RANK))
    if RANK == 2:
        time.sleep(0.5)  # rank 0 waits by then
        communicator.all_reduce("dp", total)
        sys.stdin.read()  # until the others have ended
        return {}
    kind = TensorType((20,), torch.float32, (1,))
    arena = communicator.shared["shard"].gathered
    arena.reserve(kind.nbytes)
    (output,) = arena.tensors([(0, kind)])
    communicator.all_gather("shard", output, total).wait()
    put = link.put

    def put_late(peers: list[int], channel: int, value: torch.Tensor) -> None:
        if channel % 4 == 1:  # the second half of an all-reduce
            put([OTHER], 99, value)
            time.sleep(0.5)
        put(peers, channel, value)

    if RANK == 1:
        _take(link, 99, torch.float32)
        arena.let_go()
    else:
        arena.let_go()
        link.put = put_late  # type: ignore[assignment, method-assign]
        communicator.all_reduce("dp", torch.ones(10))
    gather, began = communicator.all_gather("shard", output, total + 2), time.monotonic()
    gather.wait()
    return {"value": output.unique().tolist(), "in_time": time.monotonic() - began < 4.0}


def silent(link: Neighbours) -> dict[str, object]:
    """Nothing comes: that is an error where it was waited for, and none where a rank only looks for it."""
    if RANK:
        sys.stdin.read()
        return {}
    communicator = SharedMemoryCommunicator(Mesh((("pp", 2),)), RANK, link, Mock(spec=Communicator), timeout_s=0.2)
    communicator.progress(0.0)
    try:
        _take(link, 0, torch.float32, seconds=0.2)
    except TookTooLong as error:
        return {"message": str(error)}
    return {}


def machines(link: Neighbours) -> dict[str, object]:
    """Rank 2 waits for rank 0 of the other machine, which waits for rank 1, which waits for rank 3 there; and that for
    what rank 2 has begun."""
    mesh = Mesh((("pp", 2), ("shard", 2)))
    beyond = TorchCommunicator(mesh, RANK, make_groups(mesh, torch.device("cpu"), 20.0), True, 20.0)
    communicator = SharedMemoryCommunicator(mesh, RANK, link, beyond, timeout_s=20.0)
    value = torch.full((10,), float(RANK))
    if RANK < 2:
        if RANK == 1:
            communicator.recv(1, value).wait()
        communicator.broadcast("shard", value, 1).wait()
        if RANK == 0:
            communicator.send(1, value).wait()
        return {"value": value.tolist()}
    if RANK == 3:
        time.sleep(0.3)
    total = value.clone()
    reduced = communicator.all_reduce("shard", total)
    if RANK == 3:
        reduced.wait()
        communicator.send(0, total).wait()
    else:
        communicator.recv(0, value).wait()
        reduced.wait()
    return {"value": total.tolist()}


def apart(link: Neighbours) -> dict[str, object]:
    """Rank 0 has begun an all-reduce over another axis, in which rank 2 takes part once it has heard of what rank 0
    makes with rank 1: a single element, of which rank 1 adds up nothing."""
    mesh = Mesh((("pp", 2), ("shard", 2)))
    communicator = SharedMemoryCommunicator(mesh, RANK, link, Mock(spec=Communicator), timeout_s=5.0)
    over_stages, total = torch.full((1,), float(RANK)), torch.full((1,), float(RANK + 1))
    if RANK == 2:
        communicator.recv(0, total).wait()
    first = communicator.all_reduce("pp", over_stages)
    if RANK != 0:
        first.wait()
    if RANK < 2:
        communicator.all_reduce("shard", total).wait()
    if RANK == 0:
        communicator.send(1, total).wait()
        first.wait()
    return {"total": total.item(), "over_stages": over_stages.item()}


_ALL = (values, many, one_more, ends, silent, common, resident, far, late, machines, apart)
SCENARIOS = {scenario.__name__: scenario for scenario in _ALL}


def main() -> None:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    if sys.argv[1] == "machines":
        neighbours._place = lambda: f"machine {RANK // 2}"
    link = Neighbours(dist.group.WORLD, 20.0)
    assert link.ranks == ({OTHER} if sys.argv[1] == "machines" else set(range(dist.get_world_size())) - {RANK})
    report(SCENARIOS[sys.argv[1]], link)


if __name__ == "__main__":
    main()
