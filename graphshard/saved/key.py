"""The key of a plan in the cache: a hash of everything that the plan is made from.

The model counts by what it computes (trace/key.py), not by its code. The rest is text: the plan, the mesh, the passes,
the optimizer and its options, the versions of what compiles, graphshard's own sources among them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.optim import Optimizer

import graphshard
from graphshard.errors import NotHashable
from graphshard.pipeline import Pass
from graphshard.saved.optimizer import is_torchs, kind_of

FORMAT = 1


def digest(*parts: object) -> str:
    """A hash of ``parts``, which print all that they are."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def versions() -> tuple[object, ...]:
    """Whatever compiles: the same sources make the same plan of the same program."""
    sources = hashlib.sha256()
    for path in _sources():
        sources.update(path.name.encode() + path.read_bytes())
    installed = [importlib.metadata.version(name) for name in ("networkx", "sympy")]
    return FORMAT, sources.hexdigest(), sys.version, torch.__version__, torch.version.git_version, _triton(), *installed


def _sources() -> list[Path]:
    from graphshard import codegen, passes

    folders = (graphshard, codegen, passes)
    return sorted(path for package in folders for root in package.__path__ for path in Path(root).rglob("*.py"))


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def of_passes(passes: Sequence[Pass]) -> tuple[str, ...]:
    """The passes with their options.

    Raises:
        NotHashable: one is not graphshard's own: what it does may depend on anything.
    """
    for item in passes:
        if not (dataclasses.is_dataclass(item) and type(item).__module__.startswith("graphshard.passes.")):
            raise NotHashable(f"what pass {item.name!r} does")
    return tuple(map(repr, passes))


def of_optimizer(
    optimizer: Optimizer | None, options: Sequence[Mapping[str, str]], names: Mapping[int, str]
) -> tuple[object, ...]:
    """The optimizer with everything that its traced update depends on; ``names``: of parameters, by id.

    Raises:
        NotHashable: it is not one of torch.optim: its update may depend on anything.
    """
    if optimizer is None:
        return ()
    if not is_torchs(optimizer):
        raise NotHashable(f"what optimizer {kind_of(optimizer)} does")
    groups = [[(names.get(id(p)), bool(optimizer.state.get(p))) for p in g["params"]] for g in optimizer.param_groups]
    return kind_of(optimizer), list(map(dict, options)), groups
