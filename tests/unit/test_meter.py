"""The meter sees storages come and go, whoever holds them."""

from __future__ import annotations

import pytest
import torch

from graphshard.runtime.meter import LiveStorages, Measured, make_meter

KB = torch.ones(256)  # of float32


def test_storages_count_once_and_until_they_are_freed() -> None:
    meter, weight = LiveStorages(), KB.clone()
    meter.begin([(weight, "parameters"), (weight[:10], "parameters")])
    with meter.running(watched=True):
        a = weight * 2
        b = a.view(2, 128)
        del a
        c = b.exp_().sum()
        d = torch.cat([b, b])
        del b, d
    meter.ran([(c, "gradients")])
    with meter.running(watched=True):
        pass
    meter.ran([])
    assert meter.rows == [
        {"parameters": 1024, "workspace": 1024 + 4 + 2048},
        {"parameters": 1024, "workspace": 0, "gradients": 4},
    ]


def test_what_an_instruction_leaves_gets_its_category_when_it_ends() -> None:
    meter = LiveStorages()
    meter.begin([])
    with meter.running(watched=True):
        kept = KB.clone()
    meter.ran([(kept, "saved activations")])
    with meter.running(watched=True):
        kept = kept.neg()
    meter.ran([(kept, "workspace")])
    assert meter.rows == [{"workspace": 1024}, {"saved activations": 1024, "workspace": 1024}]


def test_what_is_not_watched_is_seen_when_it_is_left() -> None:
    meter = LiveStorages()
    meter.begin([])
    with meter.running(watched=False):
        received, scratch = KB.clone(), KB.clone()
    meter.ran([(received, "transfers")])
    assert meter.rows == [{"transfers": 1024}] and scratch.numel() == 256


def test_ranks_of_one_process_are_told_apart() -> None:
    mine, other = LiveStorages(), LiveStorages()
    mine.begin([])
    other.begin([])
    with mine.running(watched=True):
        a = KB.clone()
    mine.ran([])
    with other.running(watched=True):
        del a  # whoever frees it
    other.ran([])
    with mine.running(watched=True):
        pass
    mine.ran([])
    assert mine.rows == [{"workspace": 1024}, {"workspace": 0}] and other.rows == [{}]


def test_values_that_live_from_step_to_step_are_known_again() -> None:
    meter = LiveStorages()
    meter.begin([])
    with meter.running(watched=True):
        state = KB.clone()
    meter.ran([(state, "optimizer state")])
    meter.begin([(state, "optimizer state")])
    with meter.running(watched=True):
        pass
    meter.ran([])
    assert meter.rows == [{"optimizer state": 1024}]


def test_what_was_handed_out_before_a_step_is_not_the_steps() -> None:
    """An evaluation leaves an output to its caller and a statistic to the rank, both of which outlive it."""
    meter = LiveStorages()
    meter.begin([])
    with meter.running(watched=True):
        output, statistic = KB.clone(), KB.clone()
    meter.ran([(statistic, "parameters")])
    meter.begin([(statistic, "parameters")])
    with meter.running(watched=True):
        made = KB.clone()
        del output  # whoever kept it may let it go at any time
    meter.ran([])
    with meter.running(watched=True):
        del made
    meter.ran([])
    assert [sum(row.values()) for row in meter.rows] == [2048, 2048]
    assert meter.rows[0] == {"parameters": 1024, "workspace": 1024}


def test_the_peak_is_the_fullest_instruction() -> None:
    measured = Measured(({"batch": 3}, {"batch": 1, "workspace": 4}, {}), first=False)
    assert measured.fullest == {"batch": 1, "workspace": 4} and measured.peak_bytes == 5
    assert Measured((), first=True).peak_bytes == 0


class Allocator:
    """Stands for torch.cuda's: what it says now, and of the peaks since it was asked to forget the one before."""

    def __init__(self, current: int, *peaks: int) -> None:
        self.current, self.peaks, self.resets = current, list(peaks), 0

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        return {"requested_bytes.all.current": self.current, "requested_bytes.all.peak": self.peaks[0]}

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.resets += 1
        self.peaks.pop(0)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """Others hold 100 bytes there, and the step begins with 1,024."""
    found = Allocator(1124, 0, 1124 + 1024 + 500, 1124 + 1024 + 80, 1124)
    for name in ("memory_stats", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    return found


def test_an_accelerator_is_asked_after_every_instruction(allocator: Allocator) -> None:
    """What has no category is workspace, and a result of an instruction until it ends."""
    meter, weight = make_meter(torch.device("cuda", 0), ranks=1), KB.clone()
    meter.begin([(weight, "parameters"), (weight[:3], "parameters")])
    with meter.running(watched=True):
        made = KB.clone()
    meter.ran([(made, "saved activations")])
    with meter.running(watched=True):
        pass
    meter.ran([])
    del made
    with meter.running(watched=True):
        pass
    meter.ran([])
    assert meter.rows == [
        {"parameters": 1024, "workspace": 1524},
        {"parameters": 1024, "saved activations": 1024, "workspace": 80},
        {"parameters": 1024, "saved activations": 0, "workspace": 0},
    ]
    assert allocator.resets == 3


def test_the_allocator_knows_of_no_ranks() -> None:
    assert type(make_meter(torch.device("cuda", 0), ranks=2)) is LiveStorages
