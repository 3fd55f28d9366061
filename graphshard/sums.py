"""The gradient of a parameter that several pipeline stages read: a sum, taken apart by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphshard.dataflow import is_view
from graphshard.program import NodeInfo, Section, Slot, info, set_info, val
from graphshard.rewrite import add_input, call, clone, set_outputs

aten = torch.ops.aten

Place = tuple[int, ...] | None
"""The stages that compute a value. None: all of them, as a value that no stage owns; (): each stage that reads it."""

Places = Mapping[fx.Node, Place]


def summand_stages(total: Any, places: Places) -> set[int]:
    """Stages of the gradients that ``total`` adds up."""
    return {stage for term in _terms(total) for stage in places[term] or ()}


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a sum, looked for through views and casts of partial sums, in order."""
    if _is_sum(node):
        return [term for source in node.args[:2] for term in _terms(source)]  # type: ignore[arg-type]
    if _is_linear_in_sum(node):
        return _terms(node.all_input_nodes[0])
    return [node]


def _is_sum(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    return all(isinstance(a, fx.Node) and val(a).shape == val(node).shape for a in node.args[:2])


def _is_linear_in_sum(node: fx.Node) -> bool:
    """Whether the node is a view or cast, maybe of further ones, of a sum."""
    while (is_view(node) or node.target is aten._to_copy.default) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        if _is_sum(node):
            return True
    return False


def split_sum(
    section: Section, slot: Slot, stages: tuple[int, ...], places: dict[fx.Node, Place], target: Callable[[int], int]
) -> None:
    """Turn ``add(carry, total)`` into one sum with one carry for each of ``stages``.

    ``target`` maps the stage of a term to the one that adds it. The first stage keeps the carry's placeholder.
    """
    carry, added = section.input_slots[slot], section.outputs[slot]
    total: Any = added.args[1]

    def part(node: fx.Node, stage: int) -> fx.Node | None:
        """The terms of ``node`` that ``stage`` adds; None if there are none."""
        if _is_sum(node):
            sides = [p for source in node.args[:2] if (p := part(source, stage)) is not None]  # type: ignore[arg-type]
            if len(sides) < 2:
                return sides[0] if sides else None
            return made(call(section.graph, aten.add.Tensor, tuple(sides), _record(node)), stage)
        if _is_linear_in_sum(node):
            inner = part(node.all_input_nodes[0], stage)
            return None if inner is None else made(clone(node, lambda _: inner, made_by="pipeline-cut"), stage)
        place = places[node] or (stages[0],)
        return node if target(place[0]) == stage else None

    def made(node: fx.Node, stage: int) -> fx.Node:
        places[node] = (stage,)
        return node

    outputs: dict[Slot, fx.Node] = {}
    for stage in stages:
        here = Slot(slot.role, slot.name, slot.key, stage)
        read = carry if stage == stages[0] else add_input(section, here, val(carry), info(carry), carry.name)
        with section.graph.inserting_before(added):
            own = part(total, stage)
            assert own is not None, f"{slot} has no term on stage {stage}"
            if (dtype := val(carry).dtype) != val(own).dtype:  # what the whole sum was promoted to by another term
                own = made(call(section.graph, aten._to_copy.default, (own,), _record(added), dtype=dtype), stage)
                set_info(own, origin="")
            outputs[here] = made(call(section.graph, aten.add.Tensor, (read, own), _record(added)), stage)
        section.inputs[read] = here
        places[read] = (stage,)
    results: dict[Slot, fx.Node] = {}
    for written, node in section.outputs.items():
        results |= outputs if written == slot else {written: node}
    set_outputs(section, results)


def _record(node: fx.Node) -> NodeInfo:
    return replace(info(node), made_by="pipeline-cut")
