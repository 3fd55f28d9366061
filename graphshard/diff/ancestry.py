"""Where a node of a dump comes from in the model, which passes touched it, and where it runs."""

from __future__ import annotations

import json
import linecache
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx

from graphshard import text
from graphshard.diff import diff
from graphshard.diff.alignment import Alignment, Item
from graphshard.diff.difference import Kind
from graphshard.dump_folder import SOURCES, graphs_in, is_unfinished
from graphshard.errors import AmbiguousNode, NotADump, UnknownNode
from graphshard.program import Phase, Program, Section, info, source_line
from graphshard.region import Region, is_region, results_of

logger = logging.getLogger("graphshard")

_BODY_FIRST = ("body", "prologue", "epilogue", "first_epilogue")
_PREFIX = {"body": "", "prologue": "p.", "epilogue": "e.", "first_epilogue": "e1."}
"""What stands before a node's name in plan.txt."""


@dataclass(frozen=True)
class Touch:
    """What one pass did to the node; ``name`` and ``section``: where it was afterwards, or before it was removed."""

    pass_name: str
    did: str
    section: str
    name: str


@dataclass(frozen=True)
class Place:
    """Instructions of one stage that compute the node: a segment's name, or a communication, and the actions of the
    schedule that hold it."""

    stage: int
    what: str
    actions: tuple[str, ...]


@dataclass(frozen=True)
class Ancestry:
    """The account of one node. ``text`` is its last form, in ``section`` of the graph that ``graph`` made. ``source``:
    line of the model's code as ``file:line``, ``code`` what it says; "" where there is none. ``forward``: of a backward
    node, text of the node it differentiates."""

    text: str
    graph: str
    section: str
    source: str
    code: str
    module: str
    forward: str
    phase: str
    stage: int | None
    touches: tuple[Touch, ...]
    places: tuple[Place, ...]

    def render(self) -> str:
        """Readable lines."""
        lines = [self.text, f"  in graph {self.section} after {self.graph}"]
        lines += [f"from {self.source}" + (f": {self.code}" if self.code else "")] if self.source else []
        lines += [f"  module {self.module}"] if self.module else []
        lines += [f"  differentiates {self.forward}"] if self.forward else []
        lines.append("passes")
        width = max(len(touch.pass_name) for touch in self.touches)
        lines += [f"  {touch.pass_name:<{width}}  {touch.did}" for touch in self.touches]
        lines.append(f"runs in phase {self.phase}" + ("" if self.stage is None else f" on stage {self.stage}"))
        for place in self.places:
            shown = [*place.actions[:3], "...", place.actions[-1]] if len(place.actions) > 4 else place.actions
            lines.append(f"  stage {place.stage}: {place.what} in {', '.join(shown)}")
        return "\n".join(lines)


def ancestry(folder: Path, name: str) -> Ancestry:
    """The account of a node of the dump in ``folder``.

    Args:
        name: of the node, with or without ``%``, in the last graph that has it; ``zero:name``, ``body:name`` or
            ``zero:body:name`` for the one of that pass, or of that graph of the program.

    Raises:
        NotADump: ``folder`` holds no graphs.
        UnknownNode: no graph has it.
        AmbiguousNode: several graphs of the program have it.
    """
    paths = graphs_in(folder) if folder.is_dir() else []
    if not paths:
        raise NotADump(str(folder))
    if is_unfinished(folder):
        logger.warning("graphshard: %s: the dump has not come to its end; its last graph is %s", folder, paths[-1].name)
    sources = _sources(folder)
    return _Search(paths, sources, folder).run(name)


def _sources(folder: Path) -> Mapping[str, str]:
    path = folder / SOURCES
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise NotADump(str(path))
    return found


@dataclass(frozen=True)
class _Search:
    """``paths``: of the graphs of the dump, in order."""

    paths: list[Path]
    sources: Mapping[str, str]
    folder: Path
    read: dict[int, Program] = field(default_factory=dict)  # the graphs that were needed, by index

    @property
    def names(self) -> list[str]:
        return [path.stem for path in self.paths]

    def program(self, index: int) -> Program:
        if index not in self.read:
            self.read[index] = text.read(self.paths[index])
        return self.read[index]

    def run(self, name: str) -> Ancestry:
        at, section, node = self._find(name)
        earlier = list(self._before(at, section, node))[::-1]
        later, (at, section, node), own = self._after(at, section, node)
        program = self.program(at)
        graph = program.sections()[section]
        final, record = next(n for n in graph.graph.nodes if n.name == node), info(own)
        source = source_line(self.sources, record)
        file, _, line = source.rpartition(":")
        forward = next((n for n in program.body.nodes() if record.forward and _is_forward(n, record.forward)), None)
        return Ancestry(
            text=text.node_text(final, section, graph),
            graph=self.names[at],
            section=section,
            source=source,
            code=linecache.getline(file, int(line)).strip() if source else "",
            module=record.module,
            forward=text.node_text(forward, "body", program.body) if forward is not None else record.forward,
            phase=record.phase,
            stage=record.stage,
            touches=(*earlier, *later),
            places=tuple(_places(self.folder, section, own, final)) if at == len(self.names) - 1 else (),
        )

    def _find(self, given: str) -> tuple[int, str, str]:
        """Index of the graph, section and name of the node meant."""
        *words, last = given.split(":")
        name = last.removeprefix("%")
        known: set[str] = set()
        for at in reversed(range(len(self.names))):
            passed = (self.names[at], self.names[at].partition("-")[2])
            sections = _names(self.paths[at])
            found = []
            for section in _BODY_FIRST:
                nodes = sections.get(section, set())
                known |= nodes
                if name in nodes and all(word == section or word in passed for word in words):
                    found.append(section)
            # The update of a first step repeats that of the others.
            if len(found) > 1 and found != ["epilogue", "first_epilogue"]:
                raise AmbiguousNode(given, self.names[at], [f"{section}:{name}" for section in found])
            if found:
                return at, found[0], name
        raise UnknownNode(given, str(self.folder), known)

    def _before(self, at: int, section: str, name: str) -> Iterator[Touch]:
        """What made the node and changed it up to graph ``at``, the last one first."""
        for index in range(at, 0, -1):
            old = self._partner(index, section, name)
            touch = self._touch(index, section, name, old)
            if touch is not None:
                yield touch
            if old is None:
                return
            section, name = old.section, old.node.name
        yield Touch(self.names[0], "made: captured from the model", section, name)

    def _partner(self, index: int, section: str, name: str) -> Item | None:
        """What the node of graph ``index`` was, or is a copy of, in the graph before."""
        alignment = Alignment(self.program(index - 1), self.program(index))
        item = next(i for i in alignment.after if (i.section, i.node.name) == (section, name))
        return alignment.partner.get(item.node) or alignment.copied.get(item.node)

    def _after(self, at: int, section: str, name: str) -> tuple[list[Touch], tuple[int, str, str], fx.Node]:
        """What changed the node after graph ``at``; index, section and name of its last form, which may be the region
        that it is part of; the last form of its own."""
        touches: list[Touch] = []
        own = next(n for n in self.program(at).sections()[section].graph.nodes if n.name == name)
        for index in range(at + 1, len(self.names)):
            alignment = Alignment(self.program(index - 1), self.program(index))
            item = next(i for i in alignment.before if (i.section, i.node.name) == (section, name))
            new = alignment.successor.get(item.node)
            region = _region_with(self.program(index).sections()[section], item.node)
            if region is not None:
                touches.append(Touch(self.names[index], f"made part of region %{region.name}", section, name))
                name = region.name
                continue
            if new is None:
                touches.append(Touch(self.names[index], "removed", section, name))
                return touches, (index - 1, section, name), own
            section, name, own = new.section, new.node.name, new.node
            touch = self._touch(index, section, name, item)
            touches += [touch] if touch is not None else []
        return touches, (len(self.names) - 1, section, name), own

    def _touch(self, index: int, section: str, name: str, old: Item | None) -> Touch | None:
        """What pass ``index`` did to what is ``name`` afterwards and was ``old``; None: nothing."""
        found = diff(self.program(index - 1), self.program(index))
        key = (section, name)
        did: list[str] = []
        copied = False
        for copy in found.of(Kind.DUPLICATED):
            assert copy.before is not None and copy.after is not None
            if copy.after.key == key:
                copied = True
                did.append(f"made: a copy of %{copy.before.name} in graph {copy.before.section}")
            elif old is not None and copy.before.key == (old.section, old.node.name):
                did.append(f"duplicated as %{copy.after.name} in graph {copy.after.section}")
        if old is None:
            did.append("made")
        elif not copied:
            did += [f"moved from graph {old.section} to {section}"] if old.section != section else []
            did += [f"renamed from %{old.node.name}"] if old.node.name != name else []
        for change in found.entries:
            if change.after is not None and change.after.key == key and change.before is not None and not copied:
                did += [_worded(line) for line in change.what if not line.startswith("graph:")]  # said above
        return Touch(self.names[index], "; ".join(did), section, name) if did else None


def _region_with(section: Section, node: fx.Node) -> fx.Node | None:
    """The region of ``section`` that ``node``, of the graph before, has become part of."""
    for found in section.nodes():
        if isinstance(found.target, Region) and not isinstance(node.target, Region):
            for inner in found.target.operations:
                if (inner.name, inner.target, info(inner)) == (node.name, node.target, info(node)):
                    return found
    return None


def _is_forward(node: fx.Node, origin: str) -> bool:
    record = info(node)
    return record.origin == origin and record.phase is Phase.FORWARD


def _worded(what: str) -> str:
    """A difference as diff words it; of stages, as a sentence."""
    if not (stage := re.fullmatch(r"stage: (\w+) -> (\w+)", what)):
        return f"changed {what}"
    return f"put on stage {stage[2]}" if stage[1] == "None" else f"re-homed from stage {stage[1]} to stage {stage[2]}"


def _names(path: Path) -> dict[str, set[str]]:
    """The nodes of each graph in a file of graph text. To read a large one as a program takes seconds."""
    found: dict[str, set[str]] = {}
    names = set[str]()
    statement = r"^graph (\w+)|^\s*%(\w+).*?(= region\(.*\{$|$)|^\s*(\})"
    within = False  # a region, whose names are its own
    for section, name, opens, closes in re.findall(statement, path.read_text(), re.MULTILINE):
        if section:
            names = found.setdefault(section, set())
        elif name and not within:
            names.add(name)
        within = bool(opens) or (within and not closes)
    return found


def _defined(node: fx.Node) -> str:
    """The variable that code which computes the node defines: of a region with several results one of those."""
    return next(iter(results_of(node).values())).name if is_region(node) else node.name


def _pack_of(node: fx.Node) -> str:
    """Name of the pack that is all that reads the node, which may be written there without a name of its own; or ""."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return reader.name if reader is not None and reader.target is torch.ops.graphshard.pack.default else ""


def _places(folder: Path, section: str, node: fx.Node, final: fx.Node) -> Iterator[Place]:
    """The instructions of plan.txt that compute ``node``, which is ``final`` or in that region."""
    plan, name = folder / "plan.txt", node.name
    files = sorted(folder.glob("stage*.py"))
    segments: set[str] = set()
    for defined in (name, _defined(final), _pack_of(final)):
        if defined and not segments:
            segments = {segment for path in files for segment in _segments(path, section, defined)}
    made = re.compile(rf"(?:->|{re.escape(name)}) .*%{re.escape(_PREFIX[section] + name)}(?:\.\d+)?(?![\w.])")
    found: dict[tuple[int, str], dict[str, None]] = {}
    stage, part = 0, ""
    for line in plan.read_text().splitlines() if plan.is_file() else ():
        if heading := re.fullmatch(r"stage (\d+) (\w+):", line):
            stage, part = int(heading[1]), heading[2]
            continue
        words = line.split()
        if part != section or len(words) < 3:
            continue
        action, operation, argument = words[:3]
        if operation == "RUN" and argument in segments:
            found.setdefault((stage, f"segment {argument} of stage{stage}.py"), {})[action] = None
        elif operation in ("GATHER", "REDUCE", "RECV", "SEND") and made.search(line):
            found.setdefault((stage, f"{operation} {argument}"), {})[action] = None
    for (stage, what), actions in found.items():
        yield Place(stage, what, tuple(actions))


def _segments(path: Path, section: str, name: str) -> Iterator[str]:
    """Names of the segments in a file of segments that define ``name``."""
    kinds = {"body": "[FBW]", "prologue": "p", "epilogue": "e", "first_epilogue": "e1"}
    segment = ""
    for line in path.read_text().splitlines():
        if line.startswith("def "):
            segment = line.removeprefix("def ").partition("(")[0]
        elif re.match(rf"\s+(?:\w+, )*{re.escape(name)}(?:, \w+)* = ", line) and re.match(
            rf"s\d+_{kinds[section]}_", segment
        ):
            yield segment
