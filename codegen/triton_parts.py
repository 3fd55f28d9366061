"""What becomes of a region that holds an operator which kernels do not have: the rest of it, in parts, as kernels.

A kernel ends before such an operator, and another one begins behind it. The parts are *levels*: a value's is how many
operators without a kernel there are, at most, on a way to it. So no way leads from a part back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from graphshard.analysis import nbytes
from graphshard.dataflow import is_getitem
from graphshard.program import val
from graphshard.region import Region, region_of
from graphshard.rows import column_space


def refused(region: Region, refusal: Callable[[Region], str]) -> dict[fx.Node, str]:
    """The operations that even alone are no kernel, each with the reason that ``refusal`` gives; if all are one alone,
    those that sum over rows, of which a kernel with much else has no room for all columns."""
    computing = [node for node in region.operations if not is_getitem(node)]
    found = {node: reason for node in computing if (reason := refusal(_alone(node)))}
    if found or not (reason := refusal(region)):
        return found
    columns = [node for node in computing if column_space(node)]
    return dict.fromkeys(columns, reason) if len(columns) < len(computing) else {}


def parts(region: Region, without: Collection[fx.Node]) -> list[list[fx.Node]]:
    """The operations of a region, but for those ``without`` a kernel, in order and in groups that may be kernels."""
    outside = {node for node in region.operations if node in without or _picked_from(node) in without}
    levels: dict[fx.Node, int] = {}
    for node in region.operations:
        sources = [source for source in node.all_input_nodes if source in levels]
        levels[node] = max((levels[source] + (source in outside) for source in sources), default=0)
    for node in reversed(region.operations):
        may_wait = node not in outside and node not in region.outputs and not is_getitem(node)
        if may_wait and _reads_less(node):
            levels[node] = min(levels[user] for user in node.users)
    groups: dict[int, list[fx.Node]] = {}
    for node in region.operations:
        if node not in outside:
            groups.setdefault(levels[node], []).append(node)
    return [groups[level] for level in sorted(groups)]


def _alone(node: fx.Node) -> Region:
    """A region of the operation, with what picks its results."""
    picks = [user for user in node.users if is_getitem(user)]
    return region_of([node, *picks], node.all_input_nodes, picks or [node])


def _picked_from(node: fx.Node) -> fx.Node | None:
    return node.all_input_nodes[0] if is_getitem(node) else None


def _reads_less(node: fx.Node) -> bool:
    """Whether it moves fewer bytes to compute the value where it is read than to write it and to read that."""
    return sum(nbytes(val(source)) for source in node.all_input_nodes) < 2 * nbytes(val(node))
