"""An execution plan as files that a person can read and a process can run: Python, JSON and safetensors, and back.

``stage<k>.py`` has the segments of stage k, ``kernels.py`` the kernels that they call, ``constants.safetensors`` the
tensors that the model's code made, and ``plan.json`` everything else, with the first and last line of each source.
``plan.txt`` is the plan for people; nothing reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from safetensors.torch import load, save

from graphshard.execution import ExecutionPlan, StagePlan, TensorType, type_of
from graphshard.saved.typed_json import decode, encode
from graphshard.text.spelling import TypeText, from_stored, to_stored
from graphshard.units import human

PLAN, KERNELS, CONSTANTS = "plan.json", "kernels.py", "constants.safetensors"


@dataclass(frozen=True)
class _Written:
    """What ``plan.json`` holds: the plan with lines in place of sources, and types in place of constants."""

    plan: ExecutionPlan
    constants: dict[str, TensorType]


def files(plan: ExecutionPlan) -> dict[str, bytes]:
    """The files of ``plan`` by name. The same plan always gives the same bytes."""
    kernel_lines, kernels = _module(
        '"""Kernels that segments call."""\n\nimport torch\n\n\n',
        ((kernel.name, f"By {kernel.language}: {kernel.how}.", kernel.source) for kernel in plan.kernels.values()),
    )
    result = {"plan.txt": str(plan), KERNELS: kernels}
    stages = []
    for index, stage in enumerate(plan.stages):
        lines, result[stage_file(index)] = _stage_module(index, stage)
        segments = {name: replace(segment, source=lines[name]) for name, segment in stage.segments.items()}
        stages.append(replace(stage, segments=segments))
    listed = {name: replace(kernel, source=kernel_lines[name]) for name, kernel in plan.kernels.items()}
    types = {name: type_of(value) for name, value in plan.constants.items()}
    bare = replace(plan, stages=tuple(stages), kernels=listed, constants={})
    result[PLAN] = json.dumps(encode(_Written(bare, types)), separators=(",", ":")) + "\n"
    written = {name: text.encode() for name, text in result.items()}
    if plan.constants:
        written[CONSTANTS] = save({name: to_stored(value) for name, value in plan.constants.items()})
    return written


def parse(given: Mapping[str, bytes]) -> ExecutionPlan:
    """Inverse of :func:`files`. Runs nothing: sources stay text."""
    written = decode(_Written, json.loads(given[PLAN]))
    plan = written.plan
    stages = []
    for index, stage in enumerate(plan.stages):
        lines = _lines(given[stage_file(index)])
        segments = {name: replace(s, source=_cut(lines, s.source)) for name, s in stage.segments.items()}
        stages.append(replace(stage, segments=segments))
    lines = _lines(given[KERNELS])
    kernels = {name: replace(kernel, source=_cut(lines, kernel.source)) for name, kernel in plan.kernels.items()}
    stored = load(given[CONSTANTS]) if written.constants else {}
    constants = {
        name: from_stored(stored[name], TypeText(kind.dtype, kind.shape, kind.stride))
        for name, kind in written.constants.items()
    }
    return replace(plan, stages=tuple(stages), kernels=kernels, constants=constants)


def stage_file(stage: int) -> str:
    """The name of the file with the segments of ``stage``."""
    return f"stage{stage}.py"


def _stage_module(index: int, stage: StagePlan) -> tuple[dict[str, str], str]:
    code = [segment.source for segment in stage.segments.values()]
    head = f'"""Segments of stage {index}."""\n\nimport torch\n'
    head += "\nimport kernels\n" if any("kernels." in source for source in code) else ""
    head += "\nfrom graphshard.runtime import products\n" if any("products." in source for source in code) else ""
    head += "\n\ndef watch(name, value):\n    pass  # with debug_nan: looks at the value\n" if stage.watched else ""
    functions = (
        (s.name, f"Holds {human(max(s.workspace.held))} at most, beside its inputs.", s.source)
        for s in stage.segments.values()
    )
    return _module(f"{head}\n\n", functions)


def _module(head: str, functions: Iterable[tuple[str, str, str]]) -> tuple[dict[str, str], str]:
    """Functions (name, comment, source) behind ``head``: the lines of each, "first-last" from 1, and the text."""
    parts, lines = [head], dict[str, str]()
    at = head.count("\n")
    for name, comment, source in functions:
        assert source.endswith("\n"), f"the source of {name} is not whole lines"
        blank = "\n\n" if lines else ""
        parts.append(f"{blank}# {comment}\n{source}")
        first = at + len(blank) + comment.count("\n") + 2
        at = first - 1 + source.count("\n")
        lines[name] = f"{first}-{at}"
    return lines, "".join(parts)


def _lines(module: bytes) -> list[str]:
    return module.decode().split("\n")


def _cut(lines: list[str], span: str) -> str:
    first, last = map(int, span.split("-"))
    return "\n".join(lines[first - 1 : last]) + "\n"
