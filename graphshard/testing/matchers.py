"""Find nodes of a program and count them; a failed assertion shows the lines of the graph it was about.

::

    gathers = nodes(program).in_graph("body").op("all_gather").axis("dp")
    assert gathers.phase("forward").count == 2
    assert nodes(program).op("mm").reads(gathers).count == 2
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphshard.dataflow import is_getitem, is_view
from graphshard.program import Phase, Program, Section, info
from graphshard.text import node_text
from graphshard.text.spelling import spell_target

_LIMIT = 40  # lines shown of a graph


class Count(int):
    """How many nodes a selection has; knows which, so that pytest can show them when an assertion on it fails."""

    selection: Nodes

    @classmethod
    def of(cls, selection: Nodes) -> Count:
        result = cls(len(selection.found))
        result.selection = selection
        return result


@dataclass(frozen=True)
class Nodes:
    """Operations of a program, in order of their graphs; each method selects some of them."""

    program: Program
    found: tuple[fx.Node, ...]
    said: str = "nodes(program)"  # how they were selected
    before: tuple[fx.Node, ...] = ()  # what the last selection chose from

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.found)

    def __repr__(self) -> str:
        """How they were selected."""
        return self.said

    def __str__(self) -> str:
        """Their lines of graph text, under the names of their graphs."""
        result: list[str] = []
        for name, section in self.program.sections().items():
            own = [f"  {node_text(node, name, section)}" for node in self.found if node.graph is section.graph]
            result += [f"graph {name}", *own] if own else []
        return "\n".join(result)

    @property
    def count(self) -> Count:
        return Count.of(self)

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.found]

    def one(self) -> fx.Node:
        """The only node.

        Raises:
            AssertionError: there is none, or more than one.
        """
        assert len(self.found) == 1, "\n".join([f"expected one node, found {len(self.found)}: {self!r}", *self.lines()])
        return self.found[0]

    def op(self, name: str) -> Nodes:
        """Of the operator ``name``: whole words of it (``all_gather``, ``mm``, ``aten.add``; ``gelu`` is not
        ``gelu_backward``), or with ``*`` and ``?`` all of it (``aten.*.Tensor``)."""
        words = re.compile(rf"(?:^|[._]){re.escape(name)}(?!_backward)(?:$|[._])")

        def matches(target: str) -> bool:
            return fnmatch.fnmatchcase(target, name) if set(name) & set("*?") else words.search(target) is not None

        return self._where(f"op({name!r})", lambda node: matches(spell_target(node.target)))

    def in_graph(self, name: str) -> Nodes:
        """Of the graph ``prologue``, ``body``, ``epilogue`` or ``first_epilogue``."""
        section = self.program.sections().get(name)
        return self._where(f"in_graph({name!r})", lambda node: section is not None and node.graph is section.graph)

    def module(self, path: str) -> Nodes:
        """Of the module ``path`` or one below it."""
        return self._where(f"module({path!r})", lambda node: f"{info(node).module}.".startswith(f"{path}."))

    def phase(self, name: str) -> Nodes:
        """Of phase ``forward``, ``backward``, ``weight`` or ``update``."""
        return self._where(f"phase({name!r})", lambda node: info(node).phase is Phase(name))

    def stage(self, index: int | None) -> Nodes:
        """Of a pipeline stage; None: of all of them."""
        return self._where(f"stage({index})", lambda node: info(node).stage == index)

    def made_by(self, name: str) -> Nodes:
        """Made by the pass ``name``; ``""``: captured."""
        return self._where(f"made_by({name!r})", lambda node: info(node).made_by == name)

    def axis(self, name: str) -> Nodes:
        """Collectives and shards over a mesh axis."""
        return self._where(f"axis({name!r})", lambda node: mesh_axis(node) == name)

    def reads(self, others: Nodes) -> Nodes:
        """Those that read one of ``others``: its value, waited for, or a view of it."""
        return self._where(f"reads({others!r})", lambda node: any(_behind(s, others) for s in node.all_input_nodes))

    def follows(self, others: Nodes) -> Nodes:
        """Those that come after all of ``others`` that are in their graph, of which there must be one."""
        last = {node.graph: i for i, node in self._numbered() if node in others.found}
        place = {node: i for i, node in self._numbered()}
        return self._where(f"follows({others!r})", lambda node: place[node] > last.get(node.graph, len(place)))

    def _numbered(self) -> Iterator[tuple[int, fx.Node]]:
        return enumerate(node for section in self.program.sections().values() for node in section.nodes())

    def _where(self, said: str, matches: Callable[[fx.Node], bool]) -> Nodes:
        found = tuple(node for node in self.found if matches(node))
        return Nodes(self.program, found, f"{self.said}.{said}", self.found)

    def lines(self) -> list[str]:
        """The graphs' lines of what was found, marked ``>``, and of what the last selection left out."""
        result: list[str] = []
        for name, section in self.program.sections().items():
            result += self._lines_of(name, section)
        return result

    def _left_out(self) -> tuple[fx.Node, ...]:
        """What the last selection chose from, unless that is most of a graph and something was found."""
        return self.before if not self.found or len(self.before) <= _LIMIT else ()

    def _lines_of(self, name: str, section: Section) -> list[str]:
        listed = [node for node in section.graph.nodes if node.op != "output"]
        shown = [i for i, node in enumerate(listed) if node in self.found or node in self._left_out()]
        lines, previous = [f"graph {name}"] if shown else [], -1
        for i in shown[:_LIMIT]:
            lines += ["    ..."] if i > previous + 1 else []
            lines.append(f"  {'>' if listed[i] in self.found else ' '} {node_text(listed[i], name, section)}")
            previous = i
        left_out = len(shown) - _LIMIT
        return [*lines, f"    ... {left_out} more"] if left_out > 0 else lines


def nodes(program: Program) -> Nodes:
    """All operations of a program."""
    found = tuple(node for section in program.sections().values() for node in section.nodes())
    return Nodes(program, found, before=found)


def mesh_axis(node: fx.Node) -> str:
    """The mesh axis that ``node`` communicates or shards over; "" for one that does not."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    if target is torch.ops.graphshard.transfer.default:
        return "pp"
    named = [argument.name for argument in target._schema.arguments]
    for name in ("group_name", "axis"):
        if name in named and target.namespace in ("graphshard", "_c10d_functional"):
            index = named.index(name)
            return str(node.args[index] if index < len(node.args) else node.kwargs[name])
    return ""


def _behind(node: fx.Node, others: Nodes) -> bool:
    """Whether ``node`` is one of ``others``, or shows the value of one."""
    while node not in others.found:
        waits = node.target is torch.ops._c10d_functional.wait_tensor.default
        if node.op != "call_function" or not (waits or is_getitem(node) or is_view(node)):
            return False
        node = node.all_input_nodes[0]
    return True
