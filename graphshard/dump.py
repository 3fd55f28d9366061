"""The dump folder: every pass's graph, the plan, and the code of each stage, as text that can be diffed."""

from __future__ import annotations

from pathlib import Path

from graphshard import text
from graphshard.execution import ExecutionPlan
from graphshard.files import write_atomic
from graphshard.pipeline import Observer
from graphshard.program import Program


def writer(folder: Path) -> Observer:
    """An observer for run_passes that writes ``00-capture.graph``, ``01-<pass>.graph``, … into ``folder``."""

    def observe(index: int, name: str, program: Program) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text.write(program, folder / f"{index:02}-{name}.graph")

    return observe


def write_plan(folder: Path, plan: ExecutionPlan) -> None:
    """``plan.txt``, and ``stage<k>.py`` with the segments of every stage."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "plan.txt", str(plan))
    for index, stage in enumerate(plan.stages):
        code = "\n\n".join(segment.source for segment in stage.segments.values())
        imports = "import torch\n" + ("\nfrom graphshard.runtime import products\n" if "products." in code else "")
        write_atomic(folder / f"stage{index}.py", f'"""Segments of stage {index}."""\n\n{imports}\n\n{code}')
