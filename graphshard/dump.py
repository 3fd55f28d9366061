"""The dump folder: every pass's graph, the plan, and the code of each stage, as text that can be diffed; and a picture
of its memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from graphshard import text
from graphshard.execution import ExecutionPlan
from graphshard.files import write_atomic
from graphshard.memory_picture import stage_memory, to_svg
from graphshard.pipeline import Observer
from graphshard.program import Program
from graphshard.units import human

SOURCES = "sources.json"


def writer(folder: Path) -> Observer:
    """An observer for run_passes that writes ``00-capture.graph``, ``01-<pass>.graph``, … into ``folder``, and
    ``sources.json``: by origin, the lines of the model's code that captured nodes come from."""

    def observe(index: int, name: str, program: Program) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not index:
            lines = {origin: _relative(line) for origin, line in program.sources.items()}
            write_atomic(folder / SOURCES, json.dumps(lines, indent=0) + "\n")
        text.write(program, folder / f"{index:02}-{name}.graph")

    return observe


_WATCH = '''

def watch(name, value):
    """With debug_nan the runtime looks at the value here."""
'''


def write_plan(folder: Path, plan: ExecutionPlan, title: str, measured: Mapping[int, int] | None = None) -> None:
    """``plan.txt``; ``stage<k>.py`` with the segments of every stage; ``memory.json`` and ``memory.svg`` with what its
    ranks hold over a step. ``title``: of the picture; ``measured``: peaks by stage, in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "plan.txt", str(plan))
    kernels = "\n\n".join(f"# By {kernel.how}.\n{kernel.source}" for kernel in plan.kernels.values())
    write_atomic(folder / "kernels.py", f'"""Kernels that segments call."""\n\nimport torch\n\n\n{kernels}')
    for index, stage in enumerate(plan.stages):
        code = "\n\n".join(
            f"# Holds {human(max(segment.workspace.held))} at most, beside its inputs.\n{segment.source}"
            for segment in stage.segments.values()
        )
        imports = "import torch\n" + ("\nimport kernels\n" if "kernels." in code else "")
        imports += "\nfrom graphshard.runtime import products\n" if "products." in code else ""
        watched = (
            "\n\ndef watch(name, value):\n    pass  # with debug_nan: looks at the value\n" if stage.watched else ""
        )
        source = f'"""Segments of stage {index}."""\n\n{imports}{watched}\n\n{code}'
        write_atomic(folder / f"stage{index}.py", source)
    _write_memory(folder, plan, title, measured or {})


def _write_memory(folder: Path, plan: ExecutionPlan, title: str, measured: Mapping[int, int]) -> None:
    stages = stage_memory(plan, measured)
    accounts = [
        {
            "stage": item.stage,
            "peak_bytes": item.simulated.peak_bytes,
            "measured_peak_bytes": item.measured_peak_bytes,
            "timeline": item.simulated.to_json(),
        }
        for item in stages
    ]
    write_atomic(folder / "memory.json", json.dumps({"stages": accounts}) + "\n")
    write_atomic(folder / "memory.svg", to_svg(stages, title))


def _relative(line: str) -> str:
    """``file:line`` as seen from the working directory, if the file is inside it."""
    here = Path.cwd()
    return str(Path(line).relative_to(here)) if Path(line).is_relative_to(here) else line
