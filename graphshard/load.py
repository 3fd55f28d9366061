"""``graphshard.load``: from a plan directory to an object that trains, without tracing, passes or lowering."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphshard import trace
from graphshard.arguments import device_of, init_of, model_of, seed_of, timeout_of
from graphshard.built import Asked, Built
from graphshard.errors import (
    NeedsCompiling,
    NotAPlanDirectory,
    NotInPlanDirectory,
    PlanDirectoryMisfit,
    UntrustedCode,
)
from graphshard.executable import Executable
from graphshard.mesh import Mesh
from graphshard.model_flags import other_flags, set_flags
from graphshard.optim import spell_options
from graphshard.plan import Plan
from graphshard.program import Program
from graphshard.runtime.nvme import check_folder
from graphshard.saved.directory import Manifest, PlanDirectory, read, read_manifest
from graphshard.saved.model import describe, difference, skeleton
from graphshard.saved.optimizer import other_optimizer, other_options, remade
from graphshard.surroundings import device_for, distributed_world_size, executor_kind, offload_folder
from graphshard.update import OptimizerLike, make_optimizer

_WORDS = {"train": "a training step", "evaluate": "evaluation", "call": "a call"}


def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    optimizer: OptimizerLike | None = None,
    trust_code: bool = False,
    executor: str = "auto",
    device: torch.device | str | None = None,
    timeout_s: float = 600.0,
    measure_memory: bool = False,
    init: Callable[[nn.Module], object] | None = None,
    seed: int | None = None,
) -> Loaded:
    """What :meth:`Compiled.dump` wrote into ``directory``, ready to run; every rank calls it.

    The directory has Python code, which steps run: load only what you would run as a script, and say so by
    ``trust_code``. Nothing is unpickled.

    Args:
        model: has the first values, under the names and of the shapes and types of the compiled one; taken over as by
            :func:`compile`. None: values come from ``load_state_dict`` or ``init``.
        optimizer: as for :func:`compile`, of the class, groups and options that the plan was compiled for; the learning
            rate is free. None: such a one, if it is of torch.optim, with the learning rate of the compiled one.
        trust_code: run the directory's code.
        executor, device, timeout_s, measure_memory, init: as for :func:`compile`.
        seed: None: that of the compiled one.

    Raises:
        NotAPlanDirectory: it is none, or not whole.
        UntrustedCode: without ``trust_code``; says what would be run.
        PlanDirectoryChanged: a file is not as it was written.
        PlanDirectoryMisfit: it is for other versions, ranks, another model or optimizer.
    """
    model = None if model is None else model_of(model)
    device, timeout_s = device_of(device), timeout_of(timeout_s)
    init = init_of(init)
    seed = None if seed is None else seed_of(seed)
    folder = Path(directory)
    manifest = read_manifest(folder)
    kind = executor_kind(executor)
    if kind == "distributed" and (ranks := distributed_world_size()) != manifest.mesh.world_size:
        raise PlanDirectoryMisfit(str(folder), _ranks(manifest.mesh), f"{ranks} ranks")
    if not trust_code:
        raise UntrustedCode(str(folder), manifest.code)
    found = read(folder, manifest)
    builds = found.builds()
    if not builds:
        raise NotAPlanDirectory(str(folder), "it has no plan")
    if model is None:
        model = skeleton(manifest.model)
        set_flags(model, next((built.flags for built in builds if built.mode == "train"), builds[0].flags))
    elif (other := difference(describe(model), manifest.model)) is not None:
        raise PlanDirectoryMisfit(str(folder), f"a {manifest.model.kind}", f"a model that differs: {other}")
    plan = Plan.parse(manifest.plan)
    offloads_to = offload_folder(plan)
    if kind != "none" and offloads_to is not None:
        check_folder(offloads_to)
    loaded = Loaded(
        directory=found,
        builds=builds,
        model=model,
        plan=plan,
        mesh=manifest.mesh,
        optimizer=_optimizer(folder, manifest, builds, model, optimizer),
        executor=kind,
        device=device_for(kind, device, model),
        timeout_s=timeout_s,
        measure_memory=measure_memory,
        init=init,
        seed=manifest.seed if seed is None else seed,
        folder=offloads_to,
    )
    _check_options(folder, loaded)
    return loaded


def _ranks(mesh: Mesh) -> str:
    return f"{mesh.world_size} ranks ({mesh})" if mesh.axes else "1 rank"


def _optimizer(
    folder: Path, manifest: Manifest, builds: list[Built], model: nn.Module, given: OptimizerLike | None
) -> Optimizer | None:
    """The optimizer to run with, which is the one that the plans were compiled for."""
    record, made = manifest.optimizer, None
    if given is not None:
        made = make_optimizer(model, given)
    elif record is not None:
        options = next((built.options for built in builds if built.mode == "train"), tuple({} for _ in record.params))
        made = remade(record, options, model)
    if (other := other_optimizer(record, made, trace.parameter_names(model))) is not None:
        raise PlanDirectoryMisfit(str(folder), *other)
    return made


def _check_options(folder: Path, loaded: Loaded) -> None:
    if loaded.optimizer is None:
        return
    given = spell_options(loaded.optimizer.hyperparameters_key())
    others = [other_options(built.options, given) for built in loaded.builds if built.mode == "train"]
    if others and all(others):
        what, expected, found = next(filter(None, others))
        raise PlanDirectoryMisfit(str(folder), f"{what} = {expected}", found)


@dataclass(kw_only=True)
class Loaded(Executable):
    """What :func:`load` returns: it runs the plans of its directory and compiles nothing.

    Inputs of other shapes, or an option of the optimizer that changes, raise NotInPlanDirectory; ``dump``, ``verify``
    and ``bisect`` raise NeedsCompiling.
    """

    directory: PlanDirectory
    builds: list[Built]
    _program: Program | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._main = self.builds[0]

    @property
    def program(self) -> Program:
        """The program after the last pass, read from the directory's text; times that passes took are not in it."""
        if self._program is None:
            self._program = self.directory.program()
        return self._program

    @property
    def passes(self) -> NoReturn:
        """Raises NeedsCompiling."""
        raise NeedsCompiling(str(self.directory.path))

    def dump(self, *_: object) -> NoReturn:
        """Raises NeedsCompiling."""
        raise NeedsCompiling(str(self.directory.path))

    def verify(self, *_: object, **__: object) -> NoReturn:
        """Raises NeedsCompiling."""
        raise NeedsCompiling(str(self.directory.path))

    def bisect(self, *_: object, **__: object) -> NoReturn:
        """Raises NeedsCompiling."""
        raise NeedsCompiling(str(self.directory.path))

    def _make(self, asked: Asked) -> Built:
        """The plan of the directory for that."""
        inputs, options = trace.spell_signature(*asked.example.arguments()), asked.spelled_options()
        fitting = [built for built in self.builds if built.mode == asked.mode and built.inputs == inputs]
        flags = asked.named_flags()
        for built in fitting:
            if built.options == options and built.flags == flags and built.apart == asked.apart:
                return built
        told = f"{_WORDS[asked.mode]} on {_spelled(inputs)}"
        if fitting:
            other = other_options(fitting[0].options, options) or other_flags(fitting[0].flags, flags)
            updated = "the buffers that training updates", *_listed(fitting[0].apart, asked.apart)
            what, expected, given = other or updated
            told += f" with {what} = {given} instead of {expected}"
        raise NotInPlanDirectory(str(self.directory.path), told, sorted({_told(built) for built in self.builds}))

    def _known(self) -> list[Built]:
        return self.builds

    def _scaler_factors(self) -> dict[str, float]:
        record = self.directory.manifest.optimizer
        return {} if record is None else record.scaler

    def _unsaved_buffers(self) -> dict[str, Tensor]:
        empty = {name for name, buffer in self.model.named_buffers() if buffer.is_meta}
        return {name: value for name, value in self.directory.buffers().items() if name in empty}


def _listed(*names: Iterable[str]) -> list[str]:
    return [", ".join(sorted(given)) or "none" for given in names]


def _told(built: Built) -> str:
    return f"{_WORDS[built.mode]} on {_spelled(built.inputs)}"


def _spelled(inputs: tuple[str, ...]) -> str:
    """``micro-batches of float32[2,4], int64[2]``."""
    return f"micro-batches of {', '.join(inputs[1:])}"
