"""Which values regions compute again rather than read from memory.

A group that reads what another group makes may repeat the operations behind it, up to values that are in memory anyway:
a cast instead of what it made, or in the backward the log-softmax of logits instead of log-probabilities that the
forward kept. The same operators on the same rows give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphshard.analysis import FLOPS_PER_BYTE, flops, nbytes, weight_views
from graphshard.carried import replaced_carries
from graphshard.communication import MOVES
from graphshard.dataflow import is_getitem, is_view, storage_root
from graphshard.program import MemoryTag, Phase, Section, info, val
from graphshard.region import kind
from graphshard.rewrite import clone
from graphshard.rows import Space, common, space

aten = torch.ops.aten

CPU_FUNCTION_FLOPS, GPU_FUNCTION_FLOPS = 100.0, 20.0
"""What an exponential or the like costs, in FLOPs. A core that does 90 in a nanosecond takes one for it, three for
an element of a log-softmax; a GPU has units of its own for it, an eighth as many as for multiply-adds."""

_FUNCTIONS = frozenset(
    (
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sigmoid", "erf", "erfc", "erfinv", "lgamma"),
        *("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "atan2", "asinh", "acosh", "atanh"),
        *("gelu", "gelu_backward", "silu", "silu_backward", "mish", "mish_backward", "softplus", "softplus_backward"),
        *("elu", "elu_backward", "logit", "softmax", "log_softmax", "log_softmax_backward_data", "logsumexp"),
    )
)

_RANDOM_WORD_FUNCTIONS = 10.0
"""What a random word costs, in exponentials: ten rounds of two products of integers."""

_BROUGHT = (torch.ops._c10d_functional.all_gather_into_tensor.default, *MOVES)
"""What is released after its last use in a phase, and brought again for the next."""

_Time = tuple[bool, fx.Node]
"""When something runs in a micro-batch: weight actions are behind all others, whatever the order of nodes."""


@dataclass(eq=False)
class Group:
    """Operations of one phase and stage that are to be a region."""

    space: Space
    nodes: dict[fx.Node, None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Repeat:
    """What ``reader`` would compute again, in order, and which more values it would read for that."""

    reader: Group
    operations: list[fx.Node]
    leaves: list[fx.Node]


def repeat_cheap(section: Section, groups: Sequence[Group], most: int, function_flops: float) -> None:
    """Where that costs less than the bytes moved, groups get copies of what they read of one another, up to ``most``
    operations in all; nothing is kept in memory for that which is larger than what no longer is, but for one number a
    row. ``function_flops``: what an exponential or the like costs."""
    decided = _Decisions(section, groups, most, function_flops)
    decided.run()
    made = {group: _copies(group, sorted(nodes)) for group, nodes in decided.again.items()}
    for group, copies in made.items():
        group.nodes |= dict.fromkeys(copies.values())
        for node in group.nodes:
            for source in node.all_input_nodes:
                if source in copies:
                    node.replace_input_with(source, copies[source])
    for group in groups:
        for node in sorted(group.nodes, reverse=True):
            if not node.users:
                del group.nodes[node]
                section.graph.erase_node(node)


class _Decisions:
    def __init__(self, section: Section, groups: Sequence[Group], most: int, function_flops: float) -> None:
        self.groups, self.most, self.function_flops = groups, most, function_flops
        self.home = {node: group for group in groups for node in group.nodes}
        self.weights, self.replaced = weight_views(section), replaced_carries(section)
        self.again: dict[Group, set[fx.Node]] = {group: set() for group in groups}  # what each repeats
        self.leaf_of: dict[fx.Node, dict[Group, None]] = {}  # and reads for that
        self.ends = {group: _time(max(group.nodes)) for group in groups}
        self.needed: dict[fx.Node, _Time] = {}  # until when storage is
        for node in section.graph.nodes:
            for source in node.all_input_nodes:
                self._need(source, self._time(node))

    def run(self) -> None:
        for group in self.groups:
            for node in sorted(group.nodes):
                if isinstance(val(node), torch.Tensor) and not is_view(node):
                    self._decide(node, group)

    def _decide(self, node: fx.Node, group: Group) -> None:
        """All groups that read ``node`` compute it again, or the later ones of them, or none."""
        readers, others = self._readers(node, group)
        found = [repeat for reader in readers if (repeat := self._repeat(node, group, reader)) is not None]
        found.sort(key=lambda repeat: self.ends[repeat.reader])
        for start in range(len(found)):
            chosen = found[start:]
            left = [self.ends[reader] for reader in readers if all(reader is not repeat.reader for repeat in chosen)]
            if self._pays(node, chosen, left + others):
                for repeat in chosen:
                    self.again[repeat.reader].update(repeat.operations)
                    for leaf in repeat.leaves:
                        self.leaf_of.setdefault(leaf, {})[repeat.reader] = None
                        self._need(leaf, self.ends[repeat.reader])
                return

    def _readers(self, node: fx.Node, group: Group) -> tuple[list[Group], list[_Time]]:
        """The groups outside of its own that read ``node``, or a view of it there; until when others do."""
        readers = dict(self.leaf_of.get(node, {}))
        others: list[_Time] = []
        pending = [node]
        while pending:
            for user in pending.pop().users:
                home = self.home.get(user)
                shows = is_view(user)
                if home is group:
                    pending += [user] if shows else []
                elif home is None or (shows and any(self.home.get(reader) is not home for reader in user.users)):
                    others.append(max(self._shown(user)))
                else:
                    readers[home] = None
        return [reader for reader in readers if reader is not group], others

    def _shown(self, node: fx.Node) -> Iterator[_Time]:
        """When ``node`` runs, and, if it is a view, what reads it."""
        yield self._time(node)
        if is_view(node):
            for user in node.users:
                yield from self._shown(user)

    def _repeat(self, node: fx.Node, group: Group, reader: Group) -> _Repeat | None:
        """How ``reader`` would get ``node``; None: it cannot."""
        inside = reader.nodes.keys() | self.again[reader]
        reads = {source for n in inside for source in n.all_input_nodes if source not in inside}
        operations, leaves = set[fx.Node](), dict[fx.Node, None]()
        pending = [node, *(source for source in reads if source in group.nodes and _is_view_of(source, node, group))]
        wanted = set(pending)
        while pending:
            at = pending.pop()
            if at in inside or at in operations:
                continue
            is_own = at in group.nodes or at in self.again[group]
            if at.target is aten.logsumexp.default and at not in wanted:
                leaves[at] = None  # another pass over what it reduces would cost more than its one number a row
            elif is_own and (at in wanted or at not in reads):
                operations.add(at)
                pending += at.all_input_nodes
            elif at not in reads:
                leaves[at] = None
        spaces = [space(at) for at in operations if not is_getitem(at)]
        fits = all(found is not None and common(found, reader.space) == reader.space for found in spaces)
        crosses = info(node).phase is not info(next(iter(reader.nodes))).phase
        if not fits or len(inside) + len(operations) > self.most:
            return None
        if not all(self._stays(leaf, crosses) for leaf in leaves):
            return None
        return _Repeat(reader, sorted(operations), list(leaves))

    def _stays(self, leaf: fx.Node, crosses: bool) -> bool:
        """Whether others may read ``leaf``, later than those that do now; ``crosses``: in another phase."""
        root = storage_root(leaf)
        if root.target in _BROUGHT or (crosses and root in self.replaced):
            return False
        tags = {info(leaf).tag, info(root).tag}
        return not crosses or (leaf not in self.weights and tags <= {None, MemoryTag.SAVE})

    def _pays(self, node: fx.Node, chosen: Sequence[_Repeat], left: Sequence[_Time]) -> bool:
        """Whether fewer bytes are moved, and none more kept, if all but ``left``, by when they run, repeat ``node``."""
        size = nbytes(val(node))
        moved = sum(nbytes(val(leaf)) for repeat in chosen for leaf in repeat.leaves)
        moved -= size * (len(chosen) + (not left))  # what nobody reads is not written
        work = sum(self._work(operation) for repeat in chosen for operation in repeat.operations)
        ends = [self.ends[repeat.reader] for repeat in chosen]
        freed = size if all(time < min(ends) for time in left) else 0
        kept = {
            root
            for repeat, end in zip(chosen, ends, strict=True)
            for root in map(storage_root, repeat.leaves)
            if root.op != "placeholder" and self.needed[root] < end and root.target is not aten.logsumexp.default
        }
        return FLOPS_PER_BYTE * moved + work < 0 and sum(nbytes(val(root)) for root in kept) <= freed

    def _work(self, node: fx.Node) -> float:
        if is_getitem(node):
            return flops(node)
        functions = _RANDOM_WORD_FUNCTIONS if kind(node) == "dropout_mask" else float(kind(node) in _FUNCTIONS)
        return flops(node) * (functions * self.function_flops or 1.0)

    def _need(self, node: fx.Node, time: _Time) -> None:
        root = storage_root(node)
        self.needed[root] = max(self.needed.get(root, time), time)

    def _time(self, node: fx.Node) -> _Time:
        """When ``node`` runs: a region where the last of its operations is."""
        home = self.home.get(node)
        return _time(node) if home is None else self.ends[home]


def _time(node: fx.Node) -> _Time:
    return node.op == "output" or info(node).phase is Phase.WEIGHT, node


def _is_view_of(node: fx.Node, source: fx.Node, group: Group) -> bool:
    """Whether ``node`` shows ``source`` by views in ``group`` alone."""
    while node is not source and is_view(node) and node in group.nodes:
        (node,) = node.all_input_nodes
    return node is source


def _copies(group: Group, nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copies of ``nodes``, each before what of ``group``, or of them, is first to read it; nothing reads them yet."""
    place = info(next(iter(group.nodes)))
    made: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        readers = [made.get(user, user) for user in node.users if user in group.nodes or user in made]
        with node.graph.inserting_before(min(readers)):
            made[node] = clone(node, lambda n: n, phase=place.phase, stage=place.stage, tag=None, made_by="fuse")
    return made
