"""Copying nodes from graph to graph."""

from __future__ import annotations

import operator

from torch import fx

from graphshard.program import copy_node


def test_a_copy_has_its_arguments_its_name_and_metadata_of_its_own() -> None:
    source, target = fx.Graph(), fx.Graph()
    x = source.placeholder("x")
    total = source.call_function(operator.add, (x, [x, 2]), {"alpha": x})
    total.meta["val"] = 3
    made: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        made[node] = copy_node(target, node, made.__getitem__)
    copy = made[total]
    assert (copy.name, copy.target, copy.meta) == (total.name, operator.add, {"val": 3})
    assert (copy.args, copy.kwargs) == ((made[x], [made[x], 2]), {"alpha": made[x]})
    assert list(made[x].users) == [copy]
    copy.meta["val"] = 4
    assert total.meta["val"] == 3


def test_inputs_that_are_inserted_meanwhile_come_before_the_copy() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(operator.neg, (x,))
    graph.output(doubled)
    with graph.inserting_before(graph.output_node()):
        copy = copy_node(graph, doubled, lambda node: graph.call_function(operator.abs, (node,)))
    graph.lint()
    assert [node.target for node in graph.nodes] == ["x", operator.neg, operator.abs, operator.neg, "output"]
    assert copy.args[0] is list(graph.nodes)[2]
