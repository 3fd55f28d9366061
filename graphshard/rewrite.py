"""Graph mutation. Passes go through these functions, so that values and metadata are never lost."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphshard import fake
from graphshard.program import NodeInfo, Program, Section, Slot, copy_node, info, tensors, val
from graphshard.region import Region, region_of, results_of, title


def arg(node: fx.Node, index: int) -> fx.Node:
    """The positional argument at ``index``, which is a node."""
    value = node.args[index]
    assert isinstance(value, fx.Node), f"argument {index} of {node} is no node"
    return value


def list_arg(node: fx.Node, index: int) -> list[Any]:
    """The positional argument at ``index``, which is a list: of nodes or of numbers."""
    value = node.args[index]
    assert isinstance(value, (list, tuple)), f"argument {index} of {node} is no list"
    return list(value)


def call(
    graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], record: NodeInfo, **kwargs: Any
) -> fx.Node:
    """Insert an operation at the graph's insertion point; its value is derived from its arguments'."""
    node: fx.Node = graph.call_function(target, args, kwargs)
    mode = fake.mode_of([n.meta["val"] for n in node.all_input_nodes]) or fake.graph_mode(graph) or fake.new_mode()
    node.meta["val"] = fake.infer(mode, target, args, kwargs)
    node.meta["info"] = record
    return node


def after(node: fx.Node) -> AbstractContextManager[Any]:
    """Insert right after ``node``; after the last placeholder if ``node`` is one."""
    if node.op == "placeholder":
        return node.graph.inserting_before(_operation_after(node))
    return node.graph.inserting_before(node.next)


def first_operation(graph: fx.Graph) -> fx.Node:
    """The first node that is not a placeholder; the output node of an empty graph."""
    node: fx.Node = next(n for n in graph.nodes if n.op != "placeholder")
    return node


def _operation_after(node: fx.Node) -> fx.Node:
    while node.op == "placeholder":
        node = node.next
    return node


def add_input(section: Section, slot: Slot, value: torch.Tensor, record: NodeInfo, name: str | None = None) -> fx.Node:
    """A new placeholder, last of the placeholders, that reads ``slot``; ``value`` is its fake tensor.

    ``slot`` must be new to the section, which the driver's verification checks.
    """
    graph = section.graph
    last = next(reversed(section.inputs), None)  # from there it is never far, however many inputs there are
    with graph.inserting_before(first_operation(graph) if last is None else _operation_after(last)):
        node = graph.placeholder(name or slot.name)
    node.meta["val"], node.meta["info"] = value, record
    section.inputs[node] = slot
    return node


def remove_input(section: Section, node: fx.Node) -> None:
    """Erase a placeholder without users."""
    del section.inputs[node]
    section.graph.erase_node(node)


def replace_input(section: Section, old: fx.Node, slot: Slot, value: torch.Tensor, name: str) -> fx.Node:
    """A placeholder for ``slot`` of type ``value`` instead of ``old``; every reader of ``old`` reads it."""
    del section.inputs[old]
    new = add_input(section, slot, value, info(old), name)
    old.replace_all_uses_with(new)
    section.graph.erase_node(old)
    return new


def set_outputs(section: Section, outputs: dict[Slot, fx.Node]) -> None:
    """Make the section return exactly ``outputs``, in that order."""
    section.output_slots = list(outputs)
    section.output_node.args = (tuple(outputs.values()),)


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Every user of ``old`` reads ``new`` instead; ``old`` is erased, its origin kept if ``new`` has none."""
    old.replace_all_uses_with(new)
    if not info(new).origin:
        new.meta["info"] = replace(info(new), origin=info(old).origin)
    old.graph.erase_node(old)


def clone(node: fx.Node, remap: Callable[[fx.Node], fx.Node], **changes: Any) -> fx.Node:
    """Copy ``node`` to the insertion point with its inputs mapped; ``changes`` go into its NodeInfo."""
    copy = copy_node(node.graph, node, remap)
    copy.meta["info"] = replace(info(node), **changes)
    return copy


def into_region(
    section: Section, nodes: Sequence[fx.Node], results: Sequence[fx.Node], made_by: str, autotune: bool = False
) -> dict[fx.Node, fx.Node]:
    """Insert, right behind the last of ``nodes``, a region that computes what they do; they stay.

    ``nodes`` are in order, of one phase and stage. Returns each of ``results`` to the new node that has its value.
    """
    inside, records = set(nodes), [info(node) for node in nodes]
    inputs = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside))
    region = region_of(nodes, inputs, results, autotune)
    module = ".".join(_common_prefix([record.module.split(".") for record in records]))
    record = replace(
        records[-1], origin="", forward="", module=module, tag=None, layout="", as_given=False, made_by=made_by
    )
    with after(nodes[-1]):
        node = section.graph.create_node("call_function", region, tuple(inputs), {}, title(region))
        node.meta = {"val": tuple(val(result) for result in results), "info": record}
        if len(results) == 1:
            (result,) = results
            node.meta = {"val": val(result), "info": replace(info(result), made_by=made_by)}
            return {result: node}
        made = {}
        for index, result in enumerate(results):
            made[result] = section.graph.call_function(operator.getitem, (node, index))
            made[result].meta = {"val": val(result), "info": replace(info(result), made_by=made_by)}
    return made


def inline(section: Section, node: fx.Node) -> dict[fx.Node, fx.Node]:
    """The operations of a region's ``node`` in its place, by those of the region."""
    region: Region = node.target  # type: ignore[assignment]
    made = dict(zip(region.inputs, node.all_input_nodes, strict=True))
    with section.graph.inserting_before(node):
        for inner in region.operations:
            made[inner] = copy_node(section.graph, inner, made.__getitem__)
    for index, result in results_of(node).items():
        result.replace_all_uses_with(made[region.outputs[index]])
        if result is not node:
            section.graph.erase_node(result)
    section.graph.erase_node(node)
    return made


def _common_prefix(paths: Sequence[Sequence[str]]) -> Sequence[str]:
    """What all paths begin with."""
    same = [len(set(parts)) == 1 for parts in zip(*paths, strict=False)]
    return paths[0][: same.index(False) if False in same else len(same)]


def retype(nodes: Iterable[fx.Node]) -> None:
    """Derive again the values of ``nodes``, which must be in order, from their inputs' values."""
    for node in nodes:
        mode = fake.mode_of([n.meta["val"] for n in node.all_input_nodes])
        if mode is None:
            continue  # a constant
        node.meta["val"] = fake.infer(mode, node.target, node.args, dict(node.kwargs))


def retype_from(changed: Iterable[fx.Node]) -> None:
    """Derive again the values of what is behind ``changed``, as far as types do change, but not of those themselves."""
    pending = set(changed)
    for node in next(iter(pending)).graph.nodes if pending else ():
        retype_behind(node, pending)


def retype_behind(node: fx.Node, changed: set[fx.Node]) -> None:
    """Derive the value of ``node`` again if it reads any of ``changed``, to which it is added if its type changes."""
    if node.op == "call_function" and any(source in changed for source in node.all_input_nodes):
        before = _strides(node)
        retype([node])
        if _strides(node) != before:
            changed.add(node)


def _strides(node: fx.Node) -> list[tuple[Any, ...]]:
    """Shapes, strides and dtypes of a node's values."""
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors(val(node))]


def drop_dead(section: Section) -> int:
    """Erase operations nobody reads; returns how many. Placeholders stay: they are the signature."""
    dropped = 0
    for node in reversed(list(section.graph.nodes)):
        if node.op == "call_function" and not node.users:
            section.graph.erase_node(node)
            dropped += 1
    return dropped


def copy_section(section: Section) -> Section:
    """A section with its own graph: same nodes, values, records and signature."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in section.graph.nodes:
        made[node] = copy_node(graph, node, made.__getitem__)
    return Section(graph, {made[n]: slot for n, slot in section.inputs.items()}, list(section.output_slots))


def copied(program: Program) -> Program:
    """A program of its own: passes change the one they are given."""
    first = program.first_epilogue
    return replace(
        program,
        prologue=copy_section(program.prologue),
        body=copy_section(program.body),
        epilogue=copy_section(program.epilogue),
        first_epilogue=None if first is None else copy_section(first),
        params=dict(program.params),
        buckets=dict(program.buckets),
        constants=dict(program.constants),
    )
