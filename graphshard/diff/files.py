"""The diff of graphs in files: two of them, or the graphs of a dump from one pass to another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from graphshard import text
from graphshard.diff import diff
from graphshard.diff.difference import Diff
from graphshard.diff.provenance import attribute
from graphshard.dump_folder import graphs_in, is_unfinished
from graphshard.errors import MissingFile, UnfinishedDump, UnknownDump


def diff_files(paths: Sequence[Path]) -> Diff:
    """The first against the last of ``paths``, with the pass responsible for each entry where those between tell it.

    Raises:
        MissingFile: a path is no file.
        TextError, UnreadableConstants, OSError: as text.read raises them.
    """
    for path in paths:
        if not path.is_file():
            raise MissingFile(str(path), "a graph, or a directory that `graphshard dump` wrote")
    programs = [text.read(path) for path in paths]
    if len(paths) < 3:
        # Only neighbours in a dump have one pass between them.
        return diff(programs[0], programs[-1], _pass_between(paths[0], paths[-1]))
    steps = [
        (pass_name(path), diff(before, after, pass_name(path)))
        for path, before, after in zip(paths[1:], programs, programs[1:], strict=False)
    ]
    return attribute(diff(programs[0], programs[-1]), steps)


def dumped(directory: Path, span: str = "") -> list[Path]:
    """The graphs of a dump that a diff of ``span`` reads, in order.

    ``zero``: those before and after that pass (``03-zero`` where it ran twice). ``zero..hoist``: from after the one to
    after the other; without a name there, from the capture or to the last pass. "": all.

    Raises:
        UnknownDump: no such pass, none before it, or several.
        UnfinishedDump: ``span`` goes to the last pass, and the dump has not come to it.
    """
    graphs = graphs_in(directory)
    first, dots, last = span.partition("..")
    if graphs and not last and (dots or not span) and is_unfinished(directory):
        raise UnfinishedDump(str(directory), map(pass_name, graphs))
    if not span or dots:
        begin = _position(graphs, directory, first) if first else 0
        end = _position(graphs, directory, last) if last else len(graphs) - 1
        if begin >= end:
            raise UnknownDump(str(directory), span, map(pass_name, graphs))
        return graphs[begin : end + 1]
    after = _position(graphs, directory, span)
    if not after:
        raise UnknownDump(str(directory), span, map(pass_name, graphs[1:]))
    return graphs[after - 1 : after + 1]


def pass_name(path: Path) -> str:
    """``zero`` of ``03-zero.graph``."""
    return path.stem.partition("-")[2]


def _position(graphs: Sequence[Path], directory: Path, name: str) -> int:
    found = [i for i, path in enumerate(graphs) if name in (path.stem, pass_name(path), path.name)]
    if len(found) != 1:
        raise UnknownDump(str(directory), name, map(pass_name, graphs))
    return found[0]


def _pass_between(before: Path, after: Path) -> str:
    numbers = [re.match(r"(\d+)-", path.name) for path in (before, after)]
    if before.parent != after.parent or None in numbers:
        return ""
    first, second = (int(number[1]) for number in numbers if number)
    return pass_name(after) if second == first + 1 else ""
