"""A region: a group of ATen operators that code generation turns into one kernel. Its graph is its meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from graphshard.dataflow import is_getitem, is_view
from graphshard.program import Section, copy_node


@dataclass(frozen=True, eq=False)
class Region:
    """The target of a ``call_function`` node: called with tensors, it computes its graph, operator by operator.

    ``graph`` holds a placeholder for each argument, in order, then operations, with the metadata of any Program's nodes
    (``info``, ``val``), and an output node with a flat tuple of the results. It is never changed once made: copies of a
    program share it. ``autotune``: a kernel for a GPU is to search its block sizes and warps, when it first runs.
    """

    graph: fx.Graph
    autotune: bool = False
    __name__: str = field(default="region", init=False)  # what fx names the node after

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def operations(self) -> list[fx.Node]:
        """The nodes that compute something."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes whose values are the results."""
        values: Any = self.graph.output_node().args[0]
        return list(values)

    def __call__(self, *arguments: Any) -> Any:
        """The result: one value, or a tuple of several."""
        return self.run(arguments, lambda leaf: leaf)

    def run(self, arguments: Sequence[Any], constant: Callable[[Any], Any]) -> Any:
        """The result for ``arguments``, with ``constant`` of every argument of an operation that is no node."""
        known = dict(zip(self.inputs, arguments, strict=True))

        def value(leaf: Any) -> Any:
            return known[leaf] if isinstance(leaf, fx.Node) else constant(leaf)

        for node in self.operations:
            target: Any = node.target
            args, kwargs = map_aggregate((node.args, node.kwargs), value)
            known[node] = target(*args, **kwargs)
        results = tuple(known[node] for node in self.outputs)
        return results[0] if len(results) == 1 else results


def kind(node: fx.Node) -> str:
    """``softmax`` for ``aten._softmax.default``."""
    return str(node.target).split(".")[1].strip("_")


def title(region: Region) -> str:
    """``fused_add_layer_norm``: after the first four kinds of operators that do more than show another's result."""
    compute = (node for node in region.operations if not (is_getitem(node) or is_view(node)))
    return "_".join(["fused", *list(dict.fromkeys(map(kind, compute)))[:4]])


def region_of(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], autotune: bool = False
) -> Region:
    """The region that computes ``outputs``, some of ``nodes``, which are in order, from ``inputs``."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = {"val": node.meta["val"], "info": replace(node.meta["info"], made_by="")}
    for node in nodes:
        made[node] = copy_node(graph, node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    return Region(graph, autotune)


def is_region(node: fx.Node) -> bool:
    """Whether the node computes a region."""
    return isinstance(node.target, Region)


def operations_of(section: Section) -> Iterator[fx.Node]:
    """All operations of a graph; of a region those in it."""
    for node in section.nodes():
        yield from node.target.operations if isinstance(node.target, Region) else (node,)


def results_of(node: fx.Node) -> dict[int, fx.Node]:
    """The nodes that have the results of ``node``, a region's, by position: itself, if there is one result."""
    if isinstance(node.meta["val"], tuple):
        return {user.args[1]: user for user in node.users}  # type: ignore[misc]
    return {0: node}
