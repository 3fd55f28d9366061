"""The driver: runs passes in order, and it alone times, verifies, dumps and records them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import time
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from graphshard.autocast import HALVES
from graphshard.errors import GraphshardError, PassFailed, PassOptionError, UnknownPass
from graphshard.mesh import Mesh
from graphshard.program import Bucket, PassRecord, Phase, Program, Role, info
from graphshard.region import operations_of
from graphshard.rewrite import copied
from graphshard.text.spelling import first_line
from graphshard.verify import verify

PASSES: Mapping[str, str] = {
    "normalize": "graphshard.passes.normalize:Normalize",
    "precision": "graphshard.passes.precision:Precision",
    "pipeline-cut": "graphshard.passes.pipeline_cut:PipelineCut",
    "memory-policy": "graphshard.passes.memory_policy:MemoryPolicy",
    "recompute": "graphshard.passes.recompute:Recompute",
    "zero": "graphshard.passes.zero:Zero",
    "bucket": "graphshard.passes.bucket:BucketCollectives",
    "hoist": "graphshard.passes.hoist:Hoist",
    "overlap": "graphshard.passes.overlap:Overlap",
    "offload": "graphshard.passes.offload:Offload",
    "fuse": "graphshard.passes.fuse:Fuse",
}
"""The table of passes, name to import path; default_passes gives their order."""


@dataclass(frozen=True)
class Placement:
    """Where parameters live, as a first program of a model decided it. Later programs of the same model (evaluation,
    other shapes) obey it, because they share its storage."""

    # Parameter or buffer to the stages that hold it.
    stages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buckets: Mapping[str, Bucket] = field(default_factory=dict)
    # Parameter to what it is stored in, its master aside.
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    # Origin of a forward operation to its stage, for programs that have the same operations.
    operations: Mapping[str, int] = field(default_factory=dict)


def placement_of(program: Program) -> Placement:
    """Where ``program`` has what."""
    stages = {name: param.stages for name, param in program.params.items()}
    holders: dict[str, set[int]] = {}
    for section in program.sections().values():
        for slot in section.inputs.values():
            if slot.role is Role.BUFFER:
                holders.setdefault(slot.name, set()).add(slot.stage)
    stages |= {name: tuple(sorted(held)) for name, held in holders.items()}
    forward = (info(node) for node in operations_of(program.body) if info(node).phase is Phase.FORWARD)
    operations = {r.origin: r.stage for r in forward if r.origin and r.stage is not None and not r.made_by}
    dtypes = {name: param.dtype for name, param in program.params.items()}
    return Placement(stages, dict(program.buckets), dtypes, operations)


@dataclass(frozen=True)
class Context:
    """What a pass may know beside the program: sizes of mesh axes, never a rank, a process group or a device."""

    mesh: Mesh = field(default_factory=Mesh)
    placement: Placement | None = None
    apart: frozenset[str] = frozenset()  # of evaluation: buffers that training leaves different on data-parallel ranks


class Pass(Protocol):
    """A program rewrite: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    @property
    def exact(self) -> bool:
        """Whether it may not change numerics."""

    def run(self, program: Program, ctx: Context) -> Program:
        """The rewritten program; the argument may be changed in place."""
        ...


Observer = Callable[[int, str, Program], None]
"""Called with (index, pass name, program) before the first pass (0, "capture") and after each pass."""


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context | None = None,
    observe: Observer | None = None,
) -> Program:
    """Run ``passes`` in order; the program is verified before the first and after every one.

    Raises:
        IllegalProgram: the input, or what a pass made of it, breaks a rule of its level.
        PassFailed: a pass raises, or returns no program.
    """
    ctx = ctx or Context(program.mesh)
    verify(program)
    if observe is not None:
        observe(0, "capture", program)
    before = _census(program)
    for index, item in enumerate(passes, 1):
        start = time.perf_counter()
        program = _run(item, program, ctx)
        seconds = time.perf_counter() - start
        verify(program, after=item.name)
        after = _census(program)
        changes = {what: after[what] - before[what] for what in after | before if after[what] != before[what]}
        program.history += (PassRecord(item.name, _options(item), seconds, after["nodes"], changes),)
        before = after
        if observe is not None:
            observe(index, item.name, program)
    return program


def try_passes(program: Program, passes: Sequence[Pass], ctx: Context) -> Program:
    """What :func:`run_passes` makes of a copy, neither verified nor with a history: a trial, which is not going to run.

    Raises:
        PassFailed: as there.
    """
    program = copied(program)
    for item in passes:
        program = _run(item, program, ctx)
    return program


def _run(item: Pass, program: Program, ctx: Context) -> Program:
    try:
        result = item.run(program, ctx)
    except GraphshardError:
        raise
    except Exception as error:  # a pass is anybody's code
        raise PassFailed(item.name, f"raises {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(result, Program):
        raise PassFailed(item.name, f"returns {type(result).__name__}")
    return result


_COUNTED = {
    "all_gather_into_tensor": "all-gathers",
    "reduce_scatter_tensor": "reduce-scatters",
    "all_reduce": "all-reduces",
    "broadcast": "broadcasts",
    "transfer": "transfers",
    "stage_sum": "sums over stages",
    "stage_broadcast": "broadcasts over stages",
    "as_strided": "views of buckets",
}


COMMUNICATION = tuple(what for what in _COUNTED.values() if what != "views of buckets")
"""The changes in a PassRecord that are about communication: not about sizes, unless a pass decides by them."""


def _census(program: Program) -> Counter[str]:
    """How many there are of what passes are about, all graphs."""
    result: Counter[str] = Counter(buckets=len(program.buckets))
    for param in program.params.values():
        if param.dtype in HALVES.values():
            result[f"parameters in {str(param.dtype).removeprefix('torch.')}"] += 1
    for section in program.sections().values():
        for node in section.nodes():
            result["nodes"] += 1
            if isinstance(node.target, torch._ops.OpOverload) and (what := _counted(node.target)):
                result[what] += 1
            if info(node).phase is Phase.WEIGHT:
                result["nodes of phase weight"] += 1
    return result


@functools.cache
def _counted(target: torch._ops.OpOverload) -> str:
    return _COUNTED.get(target._schema.name.rpartition("::")[2], "")


def load_pass(name: str) -> type[Any]:
    """The class of the pass called ``name``, or of ``module:Class`` for one outside the table.

    Raises:
        UnknownPass: no such name, or nothing to import there.
    """
    path = PASSES.get(name, name)
    module_name, colon, attribute = path.partition(":")
    if not colon or (name not in PASSES and importlib.util.find_spec(module_name.partition(".")[0]) is None):
        raise UnknownPass(name, PASSES)
    loaded: type[Any] | None = getattr(importlib.import_module(module_name), attribute, None)
    if loaded is None:
        raise UnknownPass(name, PASSES)
    return loaded


def parse_passes(text: str) -> list[Pass]:
    """Passes from text such as ``"zero:stage=3;module:Class:key=value"``; options are joined by ``,``, lists by ``/``.

    Raises:
        UnknownPass: a name that is not in the table.
        PassOptionError: an option the pass does not have, or a value of the wrong type.
    """
    result: list[Pass] = []
    for token in filter(None, (part.strip() for part in text.split(";"))):
        name, _, rest = token.partition(":")
        attribute, _, options_of_class = rest.partition(":")
        if name not in PASSES and attribute.isidentifier():
            name, rest = f"{name}:{attribute}", options_of_class
        cls = load_pass(name)
        types_of = typing.get_type_hints(cls)
        fields = {f.name: types_of[f.name] for f in dataclasses.fields(cls)}
        options = {}
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if key not in fields:
                raise PassOptionError(name, item, "options: " + (", ".join(fields) or "none"))
            options[key] = _convert(name, item, value, fields[key])
        result.append(cls(**options))
    return result


def _convert(name: str, item: str, value: str, kind: Any) -> Any:
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return (
            None if value == "None" else _convert(name, item, value, next(a for a in arguments if a is not type(None)))
        )
    if typing.get_origin(kind) is tuple:
        return tuple(_convert(name, item, part, arguments[0]) for part in value.split("/"))
    if kind is bool and value in ("True", "False"):
        return value == "True"
    try:
        return {int: int, float: float, str: str}[kind](value)
    except (KeyError, ValueError):
        raise PassOptionError(name, item, f"a value of type {getattr(kind, '__name__', kind)}") from None


def _options(item: Pass) -> str:
    if not dataclasses.is_dataclass(item):
        return ""
    changed = (f for f in dataclasses.fields(item) if getattr(item, f.name) != f.default)
    return ",".join(f"{f.name}={_spelled(getattr(item, f.name))}" for f in changed)


def _spelled(value: Any) -> str:
    """As :func:`parse_passes` reads it."""
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
