"""What a dump has for people: every pass's graph, as text that can be diffed, and a picture of memory. The plans are
beside it; see saved/directory.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from graphshard import dump_folder, text
from graphshard.dump_folder import MEMORY, PICTURE, SOURCES
from graphshard.execution import ExecutionPlan
from graphshard.files import write_atomic
from graphshard.memory.picture import stage_memory, to_svg
from graphshard.memory.timeline import Timeline
from graphshard.pipeline import Observer
from graphshard.program import Program


def writer(folder: Path) -> Observer:
    """An observer for run_passes that writes ``00-capture.graph``, ``01-<pass>.graph``, … into ``folder``, and
    ``sources.json``: by origin, the lines of the model's code that captured nodes come from. What an earlier dump left
    there is removed first. Until plan_directory.write has come to its end, the folder says that it is unfinished."""

    def observe(index: int, name: str, program: Program) -> None:
        if not index:
            dump_folder.begin(folder)
            lines = {origin: _relative(line) for origin, line in program.sources.items()}
            write_atomic(folder / SOURCES, json.dumps(lines, indent=0) + "\n")
        text.write(program, folder / graph_file(index, name))

    return observe


def graph_file(index: int, name: str) -> str:
    """The file with what the pass ``name``, number ``index`` from 1, made; 0 is the capture."""
    return f"{index:02}-{name}.graph"


def write_memory(
    folder: Path, plan: ExecutionPlan, title: str, measured: Mapping[int, tuple[Timeline, bool]] | None = None
) -> None:
    """``memory.json`` and ``memory.svg`` with what the ranks of every stage hold over a step.

    Args:
        title: of the picture.
        measured: by stage, what was measured, and whether that was a first step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stages = stage_memory(plan, measured or {})
    accounts = [
        {
            "stage": item.stage,
            "peak_bytes": item.simulated.peak_bytes,
            "timeline": item.simulated.to_json(),
            "measured_peak_bytes": None if item.measured is None else item.measured.peak_bytes,
            "measured_timeline": None if item.measured is None else item.measured.to_json(),
            "measured_first_step": item.first_step,
        }
        for item in stages
    ]
    write_atomic(folder / MEMORY, json.dumps({"stages": accounts}) + "\n")
    write_atomic(folder / PICTURE, to_svg(stages, title))


def _relative(line: str) -> str:
    """``file:line`` as seen from the working directory, if the file is inside it."""
    here = Path.cwd()
    return str(Path(line).relative_to(here)) if Path(line).is_relative_to(here) else line
