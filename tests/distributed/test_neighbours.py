"""Values through shared memory between processes."""

from __future__ import annotations

from unittest.mock import Mock

import torch

from distributed.processes import launch
from graphshard.runtime.neighbours import Arrival
from graphshard.runtime.shared_memory import Exchange


def test_values_arrive_in_the_order_of_their_channel() -> None:
    assert launch("neighbours_rank.py", 2, "values") == [{"same": True}] * 2


def test_nothing_blocks_when_the_other_side_does_not_listen_and_blocks_are_used_again() -> None:
    for result in launch("neighbours_rank.py", 2, "many"):
        assert result["in_order"]
        assert result["more_blocks"] <= 2  # the other side may be one value behind


def test_a_rank_that_was_behind_by_one_note_waits_again_when_that_has_gone() -> None:
    assert launch("neighbours_rank.py", 2, "one_more") == [{"woken": 0}] * 2


def test_a_peer_that_has_ended() -> None:
    waiting, _ = launch("neighbours_rank.py", 2, "ends")
    assert waiting == {"taken": [1.0] * 3, "take": "rank 1 has ended", "put": "rank 1 has ended"}


def test_memory_in_common_is_written_when_nobody_reads_it() -> None:
    for rank, result in enumerate(launch("neighbours_rank.py", 2, "common")):
        told = f"rank {1 - rank} puts its part of what is gathered elsewhere"
        assert result.pop("alike") == [True, False]
        assert result == {"right": True, "totals": True, "copied": 0, "elsewhere": told}


def test_a_part_that_lies_in_memory_in_common_is_written_when_nobody_reads_it() -> None:
    for rank, result in enumerate(launch("neighbours_rank.py", 2, "resident")):
        told = f"rank {1 - rank} puts its part of what is gathered elsewhere"
        assert result == {"right": True, "copied": 0, "elsewhere": told}


def test_places_in_memory_in_common_may_be_behind_4_gib() -> None:
    assert launch("neighbours_rank.py", 2, "far") == [{"right": True}] * 2


def test_what_comes_while_a_rank_puts_something_in_is_gone_on_with() -> None:
    assert launch("neighbours_rank.py", 4, "late")[:2] == [{"value": [2.0, 3.0], "in_time": True}] * 2


def test_all_reduces_over_two_axes_do_not_wait_for_each_other_and_are_whole_when_they_end() -> None:
    found = launch("neighbours_rank.py", 4, "apart")
    assert [result["total"] for result in found[:3]] == [3.0] * 3
    assert [result["over_stages"] for result in found] == [2.0, 4.0, 2.0, 4.0]


def test_an_exchange_is_not_complete_before_the_one_that_it_is_behind() -> None:
    """Of an all-reduce, the others' parts may be taken in while this rank's own waits for what comes next."""
    added_up, gathered = list[str](), list[str]()
    late, value = Arrival(1), torch.zeros(4, dtype=torch.uint8)
    own = Exchange(Mock(), [late], lambda values: added_up.append("own part"))
    others = Exchange(Mock(), [Arrival(1, value)], lambda values: gathered.append("other parts"), own)
    assert not others.complete() and not others.done() and not gathered
    late.value = value
    assert own.complete() and others.complete() and others.done()
    assert added_up == ["own part"] and gathered == ["other parts"]


def test_who_waits_for_another_machine_serves_its_neighbours() -> None:
    assert launch("neighbours_rank.py", 4, "machines") == [{"value": [5.0] * 10}] * 4


def test_nothing_in_time() -> None:
    waiting, _ = launch("neighbours_rank.py", 2, "silent")
    assert waiting == {"message": "nothing from ranks [1] in time"}
