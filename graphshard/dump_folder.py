"""Which files of a folder are a dump's: the names that dump.py, saved/directory.py and codegen/emit.py give them. A
dump removes those of the one before it, and a folder says of itself that the dump into it has not come to its end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from graphshard.files import write_atomic

MANIFEST, BUFFERS, SOURCES = "manifest.json", "buffers.safetensors", "sources.json"
MEMORY, PICTURE = "memory.json", "memory.svg"
UNFINISHED = "unfinished"
"""The file that is there while a dump is written, and behind one that failed."""

_GRAPH = re.compile(r"\d+-.+\.graph")
_PLAN = re.compile(r"stage\d+\.py|kernels\.py|plan\.json|plan\.txt|constants\.safetensors")
_FURTHER_PLAN = re.compile(r"(train|evaluate|call)-\d+")
_BESIDE = (MANIFEST, BUFFERS, SOURCES, MEMORY, PICTURE)


def graphs_in(folder: Path) -> list[Path]:
    """The graphs of a dump, in order of the passes."""
    return sorted(path for path in folder.iterdir() if _GRAPH.fullmatch(path.name))


def begin(folder: Path) -> None:
    """Say that a dump into ``folder`` is not at its end, and remove what an earlier one wrote. Files that no dump
    writes stay, and in a folder that no dump was written to so do all but graphs."""
    folder.mkdir(parents=True, exist_ok=True)
    dumped = _is_a_dump(folder)
    mark(folder)
    graphs = graphs_in(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    _remove(graphs)
    _remove(path.with_suffix(".safetensors") for path in graphs)
    if dumped:
        _remove(folder / name for name in _BESIDE)
        _remove(path for path in folder.iterdir() if _PLAN.fullmatch(path.name))
        for further in [path for path in folder.iterdir() if path.is_dir() and _FURTHER_PLAN.fullmatch(path.name)]:
            _remove_plan(further)


def mark(folder: Path) -> None:
    """Say that a dump into ``folder`` is not at its end; it cannot be loaded until :func:`finish`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / UNFINISHED, "a dump was begun here and has not come to its end\n")


def finish(folder: Path) -> None:
    """Say that the dump into ``folder`` is whole."""
    (folder / UNFINISHED).unlink(missing_ok=True)


def is_unfinished(folder: Path) -> bool:
    """Whether a dump into ``folder`` was begun and has not come to its end."""
    return (folder / UNFINISHED).is_file()


def _is_a_dump(folder: Path) -> bool:
    """Whether a dump was written to ``folder``, or begun."""
    if is_unfinished(folder):
        return True
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"graphshard", "format"} <= found.keys()


def _remove_plan(folder: Path) -> None:
    """Remove the files of a plan, and the folder if it had nothing else."""
    files = list(folder.iterdir())
    _remove(path for path in files if _PLAN.fullmatch(path.name))
    if files and not any(folder.iterdir()):
        folder.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)
