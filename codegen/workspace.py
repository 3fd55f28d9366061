"""What a segment's code holds in memory, line by line: names hold storages, and ``del`` lets go of them.

Counted by storage, so that views, results written in place and products written into a bucket cost nothing. What an
operator takes for itself while it runs is not known here.

From when to when a result is needed is known, too: code can ask for its memory, which then lies where others were.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from graphshard.dataflow import is_getitem, is_view, resolve
from graphshard.execution import Place, TensorType, Workspace, type_of
from graphshard.program import val

_NONE = -1  # in place of a storage: a result that is not a tensor


class Ledger:
    """Keeps book while a segment is emitted. A *position* is one item of the segment, its ``del`` included."""

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        self._sizes = [0] * len(inputs)  # of each storage; those of inputs are not the segment's to count
        self._born = [0] * len(inputs)
        self._ends: dict[int, int] = {}
        self._holders = [1] * len(inputs)
        self._held: dict[fx.Node, list[int]] = {node: [index] for index, node in enumerate(inputs)}
        self._inputs = len(inputs)
        self._asked: dict[fx.Node, tuple[TensorType, int]] = {}  # with the storage, once it is defined
        self._position = 0

    def ask(self, node: fx.Node) -> int:
        """The code asks for memory for ``node``, one tensor, which it defines next; the number of the place."""
        self._asked[node] = type_of(val(node)), _NONE
        return len(self._asked) - 1

    def result(self, node: fx.Node) -> None:
        """``node`` is defined by calling its operator."""
        if is_getitem(node):
            source, index = node.args
            storages = self._held[source]  # type: ignore[index]
            picks_view = is_view(source)  # type: ignore[arg-type]
            self._hold(node, storages if picks_view else [storages[index]])  # type: ignore[index]
        elif is_view(node):
            self.shares(node, node.all_input_nodes[0])
        else:
            self.makes(node)

    def makes(self, node: fx.Node) -> None:
        """``node`` is defined and has storage of its own, one for each of its results."""
        value = val(node)
        results = value if isinstance(value, (tuple, list)) else [value]
        self._hold(node, [self._new(storage_bytes(r)) if isinstance(r, torch.Tensor) else _NONE for r in results])
        if node in self._asked:
            self._asked[node] = self._asked[node][0], self._held[node][0]

    def shares(self, node: fx.Node, source: fx.Node) -> None:
        """``node`` is defined and lives in the storage of ``source``."""
        self._hold(node, self._held[resolve(source)])

    def temporary(self, nbytes: int) -> None:
        """Memory that is taken and given back within this position."""
        self._ends[self._new(nbytes)] = self._position

    def drop(self, nodes: Iterable[fx.Node]) -> None:
        """The names of ``nodes`` are deleted."""
        for node in nodes:
            for storage in self._held.pop(node):
                if storage == _NONE:
                    continue
                self._holders[storage] -= 1
                if not self._holders[storage]:
                    self._ends[storage] = self._position

    def advance(self) -> None:
        """The next item begins."""
        self._position += 1

    def workspace(self) -> Workspace:
        """The account, when all that is left is to return what names still hold."""
        ends = self.ends()
        cuts = sorted({end for end in ends if end < self._position})
        change = [0] * (self._position + 2)
        for storage in range(self._inputs, len(self._sizes)):
            change[self._born[storage]] += self._sizes[storage]
            change[self._ends.get(storage, self._position) + 1] -= self._sizes[storage]
        held = [0] * (len(cuts) + 1)
        total = 0
        for position in range(self._position + 1):
            total += change[position]
            interval = bisect_left(cuts, position)
            held[interval] = max(held[interval], total)
        released = [bisect_left(cuts, end) if index in self._ends else len(held) for index, end in enumerate(ends)]
        return Workspace(tuple(held), tuple(released))

    def ends(self) -> tuple[int, ...]:
        """The position at which each input is let go."""
        return tuple(self._ends.get(index, self._position) for index in range(self._inputs))

    def aliases(self, outputs: Sequence[fx.Node]) -> tuple[tuple[int, int], ...]:
        """Which of ``outputs``, about to be returned, live in the storage of which input."""
        held = [(index, storage) for index, node in enumerate(outputs) for storage in self._held[resolve(node)]]
        return tuple((index, storage) for index, storage in held if 0 <= storage < self._inputs)

    def places(self, outputs: Sequence[fx.Node]) -> tuple[Place, ...]:
        """What was asked for, when all that is left is to return ``outputs``."""
        living: dict[int, list[int]] = {}
        for index, node in enumerate(outputs):
            for storage in self._held[resolve(node)]:
                living.setdefault(storage, []).append(index)
        return tuple(
            Place(kind, self._born[storage], self._ends.get(storage, self._position), tuple(living.get(storage, ())))
            for kind, storage in self._asked.values()
        )

    def _new(self, nbytes: int) -> int:
        self._sizes.append(nbytes)
        self._born.append(self._position)
        self._holders.append(0)
        return len(self._sizes) - 1

    def _hold(self, node: fx.Node, storages: list[int]) -> None:
        assert node not in self._held, f"{node} is defined twice"
        self._held[node] = list(storages)
        for storage in storages:
            if storage != _NONE:
                self._holders[storage] += 1


def storage_bytes(value: torch.Tensor) -> int:
    """Bytes of the storage that an operator makes for a result with the sizes and strides of ``value``."""
    return type_of(value).storage_bytes
