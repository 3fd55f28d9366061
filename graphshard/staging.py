"""Which pipeline stage each operation of a body runs on. Decides only; ``placing`` acts.

Forward operations are one line, in the order they were captured, cut at ``stages - 1`` positions. Backward operations
follow the forward operation they differentiate; a sum of gradients goes to the smallest stage among its inputs, so
that one tensor crosses each boundary.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import fx

from graphshard.analysis import cost, flops, has_products, is_random, nbytes, sent_as, weight_views
from graphshard.dataflow import is_getitem
from graphshard.errors import CutSplitsBuffer, StagesOutOfOrder, UnknownStageModule
from graphshard.partition import Line
from graphshard.program import Phase, Program, Role, Slot, info, val
from graphshard.sums import Place, summand_stages

aten = torch.ops.aten

_LOSS = Slot(Role.CARRY, "loss")

Holders = Mapping[str, tuple[int, ...]]
"""Parameter or buffer to the stages that hold it, as a program of the same model decided before."""


class BodyStaging:
    """The stages of one body: the line of its forward is there to be cut, then :meth:`assign` derives the rest."""

    def __init__(self, program: Program, byte_cost: float) -> None:
        self.program, self.body = program, program.body
        self.inputs, self.outputs = program.body.input_slots, program.body.outputs
        self.places: dict[fx.Node, Place] = {}
        self.roots: dict[fx.Node, set[fx.Node]] = {}  # parameters and buffers that unplaced values are made of
        self._find_unplaced(byte_cost)
        forward = [n for n in self.body.nodes() if info(n).phase is Phase.FORWARD and n not in self.places]
        serving = self._serving_buffers(forward)
        self.line: list[fx.Node] = []
        self.index: dict[fx.Node, int] = {}
        for node in forward:
            sources = [self.index[s] for s in node.all_input_nodes if s in self.index]
            if sources and (node in serving or self._follows(node)):
                self.index[node] = max(sources)
            else:
                self.index[node] = len(self.line)
                self.line.append(node)
        self.origins: dict[str, fx.Node] = {}
        for node in forward:
            self.origins.setdefault(info(node).origin, node)
        self.origins.pop("", None)
        self.readers: dict[fx.Node, list[fx.Node]] = {}  # of each parameter and buffer, in the forward line
        for node in self.index:
            for root in {root for s in node.all_input_nodes for root in self.roots.get(s, ())}:
                self.readers.setdefault(root, []).append(node)

    # What runs wherever it is read

    def _find_unplaced(self, byte_cost: float) -> None:
        """Values that are cheaper to compute where they are read than to send: weight views, masks, positions."""
        views = weight_views(self.body)
        for node, slot in self.body.inputs.items():
            if slot.role in (Role.PARAM, Role.BUFFER):
                self.places[node], self.roots[node] = (), {node}
            elif slot.role is not Role.CARRY:
                self.places[node] = None
        for node in self.body.nodes():
            sources = node.all_input_nodes
            if node in views or (all(map(self._is_free, sources)) and self._cheap(node, byte_cost)):
                self.places[node] = ()
                self.roots[node] = {root for s in sources for root in self.roots.get(s, ())}

    def _is_free(self, node: fx.Node) -> bool:
        """Whether every stage can have the value without a parameter, a carry or a random key."""
        if node in self.body.inputs:
            return self.body.inputs[node].role in (Role.BATCH, Role.CONSTANT, Role.BUFFER)
        return node in self.places and not any(self._role(root) is Role.PARAM for root in self.roots[node])

    def _role(self, node: fx.Node) -> Role:
        return self.body.inputs[node].role

    def _cheap(self, node: fx.Node, byte_cost: float) -> bool:
        if is_random(node):
            return False
        return not has_products(node) or flops(node) <= byte_cost * nbytes(val(node))

    def _follows(self, node: fx.Node) -> bool:
        """Forward operations that stay where their input is, wherever a cut falls: picks, the sum over micro-batches,
        views by strides, which a transfer may change, and casts that capture has not seen: what is cut is the line of
        captured operations, the same with another precision or without gradients."""
        if node.target is aten._to_copy.default and info(node).made_by:
            return True
        if is_getitem(node) or node.target is aten.as_strided.default:
            return True
        return any(self.body.inputs.get(s) == _LOSS for s in node.all_input_nodes)

    def _serving_buffers(self, forward: list[fx.Node]) -> set[fx.Node]:
        """Operations whose results only become buffers; capture may put them at the end, far from what they read."""
        stored = {node for slot, node in self.outputs.items() if slot.name.startswith("buffer:")}
        found: set[fx.Node] = set()
        for node in reversed(forward):
            if all(user in found or (user.op == "output" and node in stored) for user in node.users):
                found.add(node)
        return found

    # The line to cut

    def describe_line(self) -> Line:
        """Costs, crossing bytes and parameters of the forward line; an operation's cost includes its backward's."""
        count = len(self.line)
        costs = [cost(node) for node in self.line]
        backward = [n for n in self.body.nodes() if info(n).phase is not Phase.FORWARD]
        for node in backward:
            at = self._differentiated(node)
            if at is not None:
                costs[at] += cost(node)
        crossing = [0.0] * (count + 2)
        last: dict[fx.Node, int] = {}  # readers of what is sent, through the views it is sent for
        later: dict[fx.Node, int] = {}  # the backward may read it on a later stage than the forward did
        for node in self.index:
            if isinstance(val(node), torch.Tensor):
                sent = sent_as(node)
                readers = [self.index[u] for u in node.users if u in self.index]
                last[sent] = max([*readers, self.index[node], last.get(sent, 0)])
                again = [a for u in node.users if (a := self._differentiated(u)) is not None]
                later[sent] = max([*again, later.get(sent, 0)])
        for sent, end in last.items():
            value = val(sent)
            there = nbytes(value) * (2 if backward and value.is_floating_point() else 1)  # its gradient comes back
            crossing[self.index[sent] + 1] += there
            crossing[end + 1] -= there
            if later[sent] > end:
                crossing[end + 1] += nbytes(value)
                crossing[later[sent] + 1] -= nbytes(value)
        allowed = [True] * (count + 1)
        for low, high in self._buffer_spans().values():
            for position in range(low + 1, high + 1):
                allowed[position] = False
        return Line(tuple(costs), tuple(accumulate(crossing[: count + 1])), tuple(allowed), self._parameter_readers())

    def _differentiated(self, node: fx.Node) -> int | None:
        """Index in the line of what a backward node differentiates."""
        if node.op != "call_function" or info(node).phase is Phase.FORWARD:
            return None
        origin = self.origins.get(info(node).forward)
        return self.index[origin] if origin is not None else None

    def _buffer_spans(self) -> dict[str, tuple[int, int]]:
        """First reader and writer of each buffer that changes: one stage holds it, so no cut may fall in between."""
        spans: dict[str, tuple[int, int]] = {}
        for slot, node in self.inputs.items():
            if slot.role is Role.CARRY and slot.name.startswith("buffer:"):
                readers = [self.index[u] for u in node.users if u in self.index]
                writer = self.index.get(self.outputs[slot])
                if readers and writer is not None:
                    spans[slot.name.removeprefix("buffer:")] = (min(readers), writer)
        return spans

    def _parameter_readers(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        return tuple(
            (nbytes(val(root)), tuple(sorted({self.index[node] for node in nodes})))
            for root, nodes in self.readers.items()
            if self._role(root) is Role.PARAM
        )

    def begins(self, paths: Sequence[str]) -> tuple[int, ...]:
        """Positions where the modules ``paths`` begin.

        Raises:
            UnknownStageModule, StagesOutOfOrder, CutSplitsBuffer: what the names say.
        """
        modules = [info(node).module for node in self.line]
        positions = []
        for path in paths:
            position = next((i for i, m in enumerate(modules) if m == path or m.startswith(path + ".")), None)
            if position is None:
                raise UnknownStageModule(path, [m for m in modules if m])
            split = next((name for name, (low, high) in self._buffer_spans().items() if low < position <= high), None)
            if split is not None:
                raise CutSplitsBuffer(path, split)
            positions.append(position)
        for (previous, first), (path, second) in pairwise([("the start", 0), *zip(paths, positions, strict=True)]):
            if second <= first:
                raise StagesOutOfOrder(path, previous)
        return tuple(positions)

    # Stages

    def cut(self, positions: Sequence[int]) -> None:
        """Place the forward line, cut at ``positions``."""
        for node, index in self.index.items():
            self.places[node] = (bisect_right(positions, index),)

    def obey(self, holders: Holders, operations: Mapping[str, int]) -> None:
        """Place the forward line as ``operations`` says by origin, if it is of the same operations. Else where its
        inputs are: on the largest of their stages, a parameter that several stages hold counting as the smallest one
        that is not before the others."""
        known = [operations[origin] for node in self.line if (origin := info(node).origin) in operations]
        if len(known) == len(self.line) and known == sorted(known):
            self.places |= {node: (known[index],) for node, index in self.index.items()}
            if self._as_held(holders):
                return
        for node in self.body.nodes():
            if node not in self.index:
                continue
            stage = max((self.stage(s) for s in node.all_input_nodes if self.places.get(s)), default=0)
            names = {name for s in node.all_input_nodes for name in self._storage(s)}
            for held in sorted((holders[name] for name in names if name in holders), key=len):
                stage = min((h for h in held if h >= stage), default=stage)
            self.places[node] = (stage,)

    def _as_held(self, holders: Holders) -> bool:
        """Whether all that reads a parameter or buffer is on a stage that holds it."""
        stored = ((self.body.inputs[root].name, nodes) for root, nodes in self.readers.items())
        return all(self.stage(node) in holders.get(name, ()) for name, nodes in stored for node in nodes)

    def _storage(self, node: fx.Node) -> set[str]:
        """Names of the parameters and buffers that ``node`` is or is made of."""
        slot = self.body.inputs.get(node)
        if slot is not None and slot.role is Role.CARRY:
            return {slot.name.removeprefix("buffer:")}
        return {self.body.inputs[root].name for root in self.roots.get(node, ())}

    def stage(self, node: fx.Node) -> int:
        """The one stage of a placed node."""
        place = self.places[node]
        assert place is not None and len(place) == 1, f"{node} is not on one stage"
        return place[0]

    def assign(self, holders: Holders) -> None:
        """Place everything else: backward operations, and the holders of parameters, buffers and carries."""
        for node in self.body.nodes():
            if node not in self.places:
                stage = self._backward_stage(node)
                self.places[node] = () if stage is None else (stage,)
        self.holders = holders
        for node, slot in self.body.inputs.items():
            if slot.role is Role.PARAM:
                self.places[node] = holders.get(slot.name) or self._reading_stages(node)
            elif slot.role is Role.BUFFER:
                self.places[node] = holders.get(slot.name, ())
        for slot, node in self.inputs.items():
            if slot.role is Role.CARRY:
                self.places[node] = self._carry_place(slot, self.outputs[slot], holders)

    def _backward_stage(self, node: fx.Node) -> int | None:
        """None: nothing says where, as of a constant, which each stage makes that reads it."""
        if is_getitem(node):
            place = self.places[node.all_input_nodes[0]]
            return place[0] if place else None
        placed = [s for s in node.all_input_nodes if self.places.get(s)]
        # Gradients flow to smaller stages only: the schedule runs the backward of later stages first.
        limit = min((self.stage(s) for s in placed if info(s).phase is not Phase.FORWARD), default=None)
        origin = self.origins.get(info(node).forward)
        if origin is not None:
            own = self.stage(origin)
            return own if limit is None else min(own, limit)
        if limit is not None:
            return limit
        return max((self.stage(s) for s in placed), default=None)

    def _reading_stages(self, root: fx.Node) -> tuple[int, ...]:
        """Stages of the forward operations that read a parameter, and of its gradients."""
        found = {self.stage(node) for node in self.readers.get(root, ())}
        gradient = self.outputs.get(Slot(Role.CARRY, f"grad:{self.body.inputs[root].name}"))
        if gradient is not None:
            found |= summand_stages(gradient.args[1], self.places)
        return tuple(sorted(found)) or (0,)

    def param_stages(self, name: str) -> tuple[int, ...]:
        """The stages that hold a parameter, ascending; one that nothing reads is on the first."""
        node = self.inputs.get(Slot(Role.PARAM, name))
        place = self.places[node] if node is not None else self.holders.get(name)
        return place or (0,)

    def _carry_place(self, slot: Slot, result: fx.Node, holders: Holders) -> Place:
        kind, _, name = slot.name.partition(":")
        if kind == "grad":
            param = self.inputs.get(Slot(Role.PARAM, name))
            held = self.places[param] if param is not None else None
            held = held or self.program.params[name].stages
            stages = {nearest(held, stage) for stage in summand_stages(result.args[1], self.places)}
            return tuple(sorted(stages)) or held[:1]
        if self.places.get(result):
            return (self.stage(result),)
        if name in holders:
            return holders[name][:1]
        old = self.inputs[slot]
        return (min((place[0] for user in old.users if (place := self.places.get(user))), default=0),)


def nearest(held: tuple[int, ...], stage: int) -> int:
    """Which of the stages that hold a parameter adds a gradient made on ``stage``: it, or the closest before."""
    return max((h for h in held if h <= stage), default=held[0])
