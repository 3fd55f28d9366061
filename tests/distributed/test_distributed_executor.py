"""The hand-written plan on gloo processes: same results as in one process, and clear errors instead of hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distributed.processes import launch

GLOO = {"GRAPHSHARD_SHARED_MEMORY": "0"}


@pytest.fixture(scope="module", params=[(2, "shared memory"), (2, "gloo"), (4, "shared memory"), (4, "gloo")])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    world_size, exchange = request.param
    results = launch("rank.py", world_size, "together", environment=GLOO if exchange == "gloo" else None)
    if torch.get_default_device().type == "cuda":
        assert [result["exchange"] for result in results] == ["NCCL"] * world_size
        return results
    assert [result["exchange"] for result in results] == [exchange] * world_size
    # Each group of gloo's has a thread that polls: there are no more than for the world and for control messages.
    # Before torch 2.13 it has no name.
    more, groups = exchange == "gloo" and world_size > 2, [result["groups"] for result in results]
    assert all((count > 2) is more for count in groups) or not any(groups), groups
    return results


def test_processes_end_with_what_one_process_ends_with(together: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(together):
        local, distributed = result["local"], result["distributed"]
        for what in ("losses", "params", "state", "sent", "peak_bytes"):
            assert distributed[what] == local[what], (rank, what)
        assert result["rank0_only"] == (["w0", "w1"] if rank == 0 else [])


def test_every_communication_gives_what_it_gives_in_one_process(together: list[dict[str, Any]]) -> None:
    for result in together:
        # Twice: 5 dtypes gathered, broadcast and, with stages, sent; 4 of them summed two ways.
        assert len(result["names"]) == 2 * (23 + 18)
        assert result["wrong"] == []


def test_ranks_with_different_plans_all_say_so() -> None:
    for result in launch("rank.py", 2, "mismatch"):
        assert result["error"] == "PlanMismatch"
        assert "rank" in result["message"]


def test_ranks_measure_memory_all_or_none() -> None:
    for result in launch("rank.py", 2, "measures"):
        assert result["error"] == "PlanMismatch"
        assert "ranks disagree on the measure_memory: ranks 0 have False; ranks 1 have True" in result["message"]


@pytest.mark.only_cpu("on a GPU the process ends; see test_failures.py")
@pytest.mark.parametrize("environment", [{}, GLOO], ids=["shared memory", "gloo"])
def test_a_rank_that_waits_too_long_names_instruction_and_peer(environment: dict[str, str]) -> None:
    waiting, _ = launch("rank.py", 2, "late", environment=environment)
    assert waiting["error"] == "WaitTimeout"
    assert "rank 0 waited more than 4 s for rank 1 (stage 1) in:" in waiting["message"]
    assert "B0.0 WAIT" in waiting["message"]


@pytest.mark.only_cpu("on a GPU it is noticed when the limit is over")
def test_a_rank_that_ends_is_noticed_at_once() -> None:
    waiting, ended = launch("rank.py", 2, "ends")
    assert ended == {}
    assert waiting["error"] == "PeerFailed"
    assert "rank 1 has ended" in waiting["message"]
    assert "B0.0 WAIT" in waiting["message"]
    assert waiting["seconds"] < 10  # and the limit is 30
