"""The benchmark's own arithmetic: which steps count, what a row has to send, how stages are cut."""

from __future__ import annotations

import errno
import importlib
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from graphshard.runtime import nvme
from model import Sizes, batch_of, cut_points, make_part
from rows import GROUPS, ROWS, rows_of
from run import Limits, compare, fastest_probes, summarize

SIZES = Sizes(layers=3, width=16, heads=2, vocabulary=32, sequence=8, batch=8, microbatch=2)
PARAMETERS = 1000


LIMITS = Limits(foreign=0.03, slow=0.25, probes={2: 0.1})


def step(seconds: float, foreign: float, probe: float = 0.1, faults: int = 0) -> dict[str, float]:
    cpu = {"foreign_cpu_seconds": foreign, "own_cpu_seconds": seconds, "probe_seconds": probe}
    return {"seconds": seconds, "loopback_bytes": 10, "page_faults": faults, **cpu}


def measured(*steps: dict[str, float], losses: list[float]) -> dict[str, Any]:
    memory = {"peak_rss_bytes": [5, 7], "setup_peak_rss_bytes": [9, 9]}
    return {"steps": list(steps), "losses": losses, "ready_seconds": 1.0, "report": {}, **memory}


def test_disturbed_steps_are_left_out() -> None:
    cores = os.cpu_count() or 1
    runs = [
        measured(step(1.0, 0.0), step(9.0, 9.0 * cores), step(8.0, 0.0, 0.13), step(3.0, 0.01, 0.12), losses=[1.0, 1.5])
    ]
    row = summarize("FSDP2", runs, [1.0, 1.25], SIZES, PARAMETERS, LIMITS)
    assert (row["seconds"], row["steps_kept"], row["disturbed"]) == (2.0, 2, False)
    assert (row["loss_difference"], row["peak_rss_bytes"]) == (0.25, 7)


def test_page_faults_of_a_row_are_those_of_its_usual_step() -> None:
    runs = [measured(step(1.0, 0.0, faults=9), step(1.0, 0.0, faults=2), step(1.0, 0.0, faults=4), losses=[1.0])]
    assert summarize("DDP", runs, [], SIZES, PARAMETERS, LIMITS)["page_faults"] == 4


def test_a_row_without_quiet_steps_counts_all_and_says_so() -> None:
    runs = [measured(step(2.0, 1e6), step(4.0, 1e6), losses=[1.0])]
    row = summarize("DDP", runs, [], SIZES, PARAMETERS, LIMITS)
    assert (row["seconds"], row["disturbed"], row["loss_difference"]) == (3.0, True, None)


def test_probes_are_compared_among_rows_with_as_many_ranks() -> None:
    one = [measured(step(1.0, 0.0), losses=[])]
    two = [measured(step(1.0, 0.0, 0.3), step(1.0, 0.0, 0.2), losses=[])]
    assert fastest_probes({"eager": one, "DDP": two, "FSDP2": two}) == {
        1: 0.1,
        2: 0.2,
    }


def test_the_faster_peer_is_compared() -> None:
    """Turn by turn: what slows one turn down slows both."""
    rows = [
        {
            "name": name,
            "seconds": sorted(seconds)[1],
            "fastest_seconds": min(seconds),
            "all_steps": [step(taken, 0.0) for taken in seconds],
            "peak_rss_bytes": 4,
        }
        for name, *seconds in (
            ("FSDP2", 4.0, 2.0, 5.0),
            ("FSDP2 no sync", 3.0, 6.0, 2.5),
            ("graphshard zero3", 2.4, 4.2, 1.5),
        )
    ]
    result = compare(GROUPS["zero3"][1], rows)
    assert result is not None
    assert (result["peer"], result["ratio"]) == ("FSDP2 no sync", pytest.approx(0.7))
    assert result["fastest_ratio"] == pytest.approx(0.75)
    assert compare(GROUPS["dp"][0], rows) is None


def test_minimum_bytes() -> None:
    whole = PARAMETERS * 4
    assert ROWS["graphshard zero3"].minimum_bytes(SIZES, PARAMETERS) == 3 * 2 * whole / 2
    assert ROWS["DDP"].minimum_bytes(SIZES, PARAMETERS) == 2 * whole / 2
    hidden = SIZES.microbatch * SIZES.sequence * SIZES.width * 4
    assert ROWS["torch 1F1B"].minimum_bytes(SIZES, PARAMETERS) == 4 * hidden  # one of two ranks sends, each way
    assert ROWS["eager"].minimum_bytes(SIZES, PARAMETERS) == 0


def test_every_row_is_in_a_group() -> None:
    assert {name for group in GROUPS for name in rows_of(group)} == set(ROWS)


def test_parts_make_up_the_model() -> None:
    x, _ = batch_of(SIZES, 0)
    cuts = cut_points(SIZES, 2)
    out = x
    for begin, end in itertools.pairwise(cuts):
        out = make_part(SIZES, begin, end)(out)
    assert torch.equal(out, make_part(SIZES)(x))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_no_stage_is_empty(parts: int) -> None:
    for vocabulary in (1, 10_000):
        cuts = cut_points(Sizes(layers=3, width=16, vocabulary=vocabulary), parts)
        assert (cuts[0], cuts[-1]) == (0, 3)
        assert all(begin < end for begin, end in itertools.pairwise(cuts))


def test_a_second_start_is_measured_against_torch_compiles_first() -> None:
    def start(seconds: float) -> dict[str, float]:
        return {"start_s": seconds + 1, "start_wall_s": 9.0, "compile_s": seconds, "loss": 1.0}

    module = importlib.import_module("compile")
    kinds = [(what, turn) for what in (module.PEER, module.ONE) for turn in ("cold", "cached")]
    times = dict(zip(kinds, ((20.0, 22.0), (9.0, 9.0), (8.0, 6.0, 7.0), (2.0, 2.1)), strict=True))
    rows = module.summarised({kind: [start(seconds) for seconds in found] for kind, found in times.items()})
    assert [row["reach"] for row in rows] == [None, None, 1.0, pytest.approx(1 / 3)]
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 9 / 21, 7 / 21, 2.05 / 21])
    assert rows[3]["own_ratio"] == pytest.approx(2.05 / 7)


def test_a_disk_that_is_not_accessed_directly_is_not_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides would be of the page cache."""

    def buffered(path: str, flags: int, unnamed: Any = nvme._unnamed) -> int:
        if flags:
            raise OSError(errno.EINVAL, "Invalid argument")
        made: int = unnamed(path, flags)
        return made

    monkeypatch.setattr(nvme, "_unnamed", buffered)
    assert offload.main(["--path", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"disk: buffered in {tmp_path}; the page cache would be measured instead")
