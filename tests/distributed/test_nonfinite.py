"""debug_nan over processes: all ranks raise the same error, none hangs, and they can go on."""

from __future__ import annotations

import pytest

from distributed.processes import launch


@pytest.mark.parametrize(("plan", "shared"), [("zero3:size=2+pp2", "1"), ("dp2+pp2", "0")])
def test_all_ranks_name_the_node_and_the_rank(plan: str, shared: str) -> None:
    ranks = launch("nonfinite_rank.py", 4, plan, environment={"GRAPHSHARD_SHARED_MEMORY": shared})
    message = ranks[0]["message"]
    assert [rank["message"] for rank in ranks] == [message] * 4
    assert "first made by %exp" in message
    assert "stage 1, micro-batch 3, data-parallel rank 1 of 2" in message
    assert all(rank["same"] for rank in ranks)
    assert len({tuple(rank["losses"]) for rank in ranks}) == 1
    assert ranks[0]["losses"][1] < ranks[0]["losses"][0]
