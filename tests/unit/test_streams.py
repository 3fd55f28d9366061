"""What is said to a device's lanes when values are moved, in which order, and what is kept until then."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphshard.runtime.nvme import PIECE, Disk
from graphshard.runtime.offload import Homes, HostBlock, HostMemory
from graphshard.runtime.streams import Lane, NoStreams, Streams, streams_of

CPU = torch.device("cpu")


class Recorder(Streams):
    """Writes down what it is told; copies are made at once. Events are numbers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self._events = itertools.count()

    def record(self, lane: Lane) -> int:
        event = next(self._events)
        self.calls.append((f"record {lane}", event))
        return event

    def hold(self, lane: Lane, event: int) -> None:
        self.calls.append((f"hold {lane}", event))

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        self.calls.append((f"copy {lane}", target.numel()))
        target.copy_(source)

    def passed(self, event: int) -> bool:
        return ("passed", event) in self.calls

    def block(self, event: int) -> None:
        self.calls.append(("block", event))


def test_a_copy_out_begins_behind_what_was_computed_and_holds_what_comes_after_its_wait() -> None:
    lanes = Recorder()
    homes = Homes(CPU, streams=lanes)
    _, transfer = homes.offload(torch.ones(3), "cpu")
    issued = [("record compute", 0), ("hold out", 0), ("copy out", 3), ("record out", 1)]
    assert lanes.calls == issued and not transfer.done()
    transfer.wait()
    assert lanes.calls == [*issued, ("hold compute", 1)], "the host does not block"
    lanes.calls.append(("passed", 1))
    assert transfer.done()


def test_a_copy_in_uses_memory_behind_what_was_computed() -> None:
    lanes = Recorder()
    homes = Homes(CPU, streams=lanes)
    kept = homes.keep(torch.arange(4.0), "cpu")
    lanes.calls.clear()
    value, transfer = homes.reload(kept)
    transfer.wait()
    assert torch.equal(value, torch.arange(4.0))
    assert lanes.calls == [
        ("record compute", 2),
        ("hold in", 2),
        ("copy in", 4),
        ("record in", 3),
        ("hold compute", 3),
    ]


def test_a_source_stays_until_somebody_has_waited_for_its_copy() -> None:
    homes = Homes(CPU, streams=Recorder())
    value = torch.ones(3)
    alive = weakref.ref(value.untyped_storage())
    kept, transfer = homes.offload(value, "cpu")
    del value
    gc.collect()
    assert alive() is not None
    transfer.wait()
    gc.collect()
    assert alive() is None

    assert isinstance(kept.place, HostBlock)
    block = weakref.ref(kept.place)
    back, transfer = homes.reload(kept)
    del kept
    assert block() is not None, "the copy reads it"
    transfer.wait()
    assert block() is None and torch.equal(back, torch.ones(3))


def test_after_a_failure_all_copies_have_ended() -> None:
    lanes = Recorder()
    homes = Homes(CPU, streams=lanes)
    homes.settle()
    assert lanes.calls == [("record out", 0), ("block", 0), ("record in", 1), ("block", 1)]


def test_host_memory_is_allocated_once() -> None:
    host = HostMemory(pinned=False)
    host.reserve({64: 2, 32: 1})
    first, second = host.allocate(64), host.allocate(64)
    addresses = {first.memory.data_ptr(), second.memory.data_ptr()}
    assert len(addresses) == 2 and host.nbytes == 160
    del first
    assert host.allocate(64).memory.data_ptr() in addresses
    host.reserve({64: 2})
    assert host.nbytes == 160
    third = [host.allocate(64) for _ in range(2)]
    assert host.nbytes == 224 and second.memory.data_ptr() not in {block.memory.data_ptr() for block in third}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_any_dense_layout_goes_out_and_comes_back(dtype: torch.dtype) -> None:
    homes = Homes(CPU)
    value = torch.randint(0, 2, (7, 5)).to(dtype).t()
    back = homes.fetch(homes.keep(value, "cpu"))
    assert torch.equal(back, value) and back.stride() == value.stride()
    assert homes.fetch(homes.keep(torch.empty(0, 3), "cpu")).shape == (0, 3)


def test_a_replaced_value_takes_the_place_of_the_old_one() -> None:
    homes = Homes(CPU)
    old = homes.keep(torch.zeros(4), "cpu")
    new, transfer = homes.offload(torch.ones(4), "cpu", old)
    transfer.wait()
    assert new is old and torch.equal(homes.fetch(new), torch.ones(4))


def test_pieces_of_a_file_go_through_the_host_in_a_lane_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device: each piece is in host memory before it is written, and on the device before it is waited for."""
    disk, lanes = Disk(str(tmp_path), CPU), Recorder()
    monkeypatch.setattr(disk, "_streams", lanes)
    monkeypatch.setattr(disk, "_is_aligned", lambda piece: False)
    value = torch.rand(PIECE // 4)
    region = disk.allocate(value.nbytes)
    disk.write(value, region).wait()
    found = torch.empty_like(value)
    disk.read(region, found).wait()
    assert torch.equal(found, value)
    moved = [("copy file", PIECE), ("record file", 1), ("block", 1)]
    assert lanes.calls[:5] == [("record compute", 0), ("hold file", 0), *moved]
    assert [call for call, _ in lanes.calls[5:]] == [call for call, _ in lanes.calls[:5]]


def test_a_cpu_needs_no_lanes() -> None:
    assert isinstance(streams_of(CPU), NoStreams) and not streams_of(CPU).pins
