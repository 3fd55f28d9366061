"""Operations of a section as a region, in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from graphshard.dataflow import is_getitem, is_view, upstream
from graphshard.program import Section
from graphshard.rewrite import clone, into_region
from graphshard.rows import sums_rows


def computing(nodes: Iterable[fx.Node]) -> int:
    """How many do more than show another's result."""
    return sum(not (is_view(node) or is_getitem(node)) for node in nodes)


def make_region(section: Section, nodes: Iterable[fx.Node], autotune: bool, least: int = 2) -> fx.Node | None:
    """A region of the group that ``nodes`` are, where the last of them is; None, if fewer than ``least`` do what others
    read. No path leads from one to another through what is no member."""
    group = set(nodes)
    # No other node of the group reads a sum over all rows, which is there behind the last of them.
    group |= {pick for node in group if sums_rows(node) for pick in node.users}
    members = sorted(group)
    for node in reversed(members):
        if not node.users:
            section.graph.erase_node(node)
            members.remove(node)
    read = [node for node in members if any(user not in group for user in node.users)]
    results = dict.fromkeys(base for node in read if (base := _shown(node, group)) in group)
    needed = upstream(results, stop=lambda node: node not in group)
    kept = [node for node in members if node in needed]
    if computing(kept) < least:
        return None  # nobody reads the others
    inside = set(kept)
    # What reads the region, views of its results too, waits until the last of its nodes is there.
    behind: dict[fx.Node, None] = {}
    node = kept[0]
    while node is not kept[-1]:
        node = node.next
        if node not in inside and any(source in inside or source in behind for source in node.all_input_nodes):
            behind[node] = None
    made = into_region(section, kept, list(results), "fuse", autotune)
    next_one = list(made.values())[-1].next
    for node in behind:
        next_one.prepend(node)
    for node in kept:
        if is_view(node) and any(user not in inside for user in node.users):
            made[node] = _again(node, made, inside, next(iter(behind), next_one))
    for old, new in made.items():
        old.replace_all_uses_with(new, lambda user: user not in inside)
    for node in reversed(kept):
        section.graph.erase_node(node)
    result = next(iter(made.values()))
    return result.all_input_nodes[0] if is_getitem(result) else result


def _shown(node: fx.Node, group: Collection[fx.Node]) -> fx.Node:
    """What ``node``, if it is a view, shows of the group's own, or of what the group reads."""
    while node in group and is_view(node):
        (node,) = node.all_input_nodes
    return node


def _again(view: fx.Node, made: dict[fx.Node, fx.Node], inside: Collection[fx.Node], before: fx.Node) -> fx.Node:
    """A view that the region itself reads, once more outside of it: as a result it would be a copy."""
    if view in made or view not in inside:
        return made.get(view, view)
    source = _again(view.all_input_nodes[0], made, inside, before)
    with view.graph.inserting_before(before):
        made[view] = clone(view, lambda _: source)
    return made[view]
