"""Every group is used once before the first step, in an order in which no two ranks wait for each other."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from graphshard.runtime.groups import meet

CPU = torch.device("cpu")
Call = tuple[str, object, int]


class Group:
    """Writes down what one rank asks of it; ``place`` is that of the rank in it."""

    def __init__(self, name: object, calls: list[Call]) -> None:
        self.name, self.calls = name, calls

    def wait(self) -> None:
        self.calls.append(("wait", self.name, 0))

    def send(self, values: list[Tensor], peer: int, tag: int) -> Group:
        self.calls.append(("send", self.name, peer))
        return self

    def recv(self, values: list[Tensor], peer: int, tag: int) -> Group:
        self.calls.append(("recv", self.name, peer))
        return self


@pytest.mark.parametrize("stages", [2, 4])
def test_all_ranks_meet_in_one_order(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(value: Tensor, group: Any, async_op: bool) -> Any:
        group.calls.append(("reduce", group.name, 0))
        return group

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    said: dict[int, list[Call]] = {}
    for stage in range(stages):
        calls = said[stage] = []
        pairs: Any = {pair: Group(pair, calls) for pair in permutations(range(stages), 2) if stage in pair}
        axes: Any = {"pp": Group("pp", calls), "dp": Group("dp", calls)}
        meet(axes, dict(reversed(pairs.items())), stage, CPU)
    waiting = {stage: [call for call in calls if call[0] != "wait"] for stage, calls in said.items()}
    for calls in waiting.values():
        assert [name for _, name, _ in calls[:2]] == ["pp", "dp"]
        del calls[:2]
    # As if each call blocked until the other end makes its own.
    for source, target in sorted(permutations(range(stages), 2)):
        assert waiting[source].pop(0) == ("send", (source, target), int(target > source))
        assert waiting[target].pop(0) == ("recv", (source, target), int(source > target))
    assert not any(waiting.values())
