"""``graphshard.compile``: from a model and a plan to an object that trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphshard import ambient, dump, fake, report
from graphshard.arguments import (
    cache_of,
    debug_nan_of,
    device_of,
    executor_of,
    folder_of,
    init_of,
    loss_of,
    measure_memory_of,
    model_of,
    norm_of,
    optimizer_of,
    passes_of,
    plan_of,
    seed_of,
    timeout_of,
    world_size_of,
)
from graphshard.batch import MicroBatch, largest, split_batch
from graphshard.bisect import Seen, Until, bisect
from graphshard.builder import Build, Builder
from graphshard.built import Asked, Built
from graphshard.check import require_fits
from graphshard.duplicates import CPU_FUNCTION_FLOPS, GPU_FUNCTION_FLOPS
from graphshard.executable import Executable
from graphshard.optim import Steps, options_that_differ
from graphshard.passes import default_passes, with_passes
from graphshard.passes.fuse import Fuse
from graphshard.passes.offload import Offload
from graphshard.passes.precision import Precision
from graphshard.pipeline import Pass, run_passes
from graphshard.plan import Plan
from graphshard.program import Program, Role
from graphshard.reference_inputs import Inputs, random_inputs
from graphshard.runtime.nvme import check_folder
from graphshard.saved import directory as plan_directory
from graphshard.saved.cache import open_cache
from graphshard.saved.directory import Manifest
from graphshard.saved.model import describe, unsaved_buffers
from graphshard.saved.optimizer import record_of
from graphshard.surroundings import device_for, distributed_world_size, executor_kind, offload_folder
from graphshard.trace import Mode
from graphshard.update import OptimizerLike, make_optimizer
from graphshard.verification import CHECK_GB, Subject, sized, verify_all
from graphshard.version import __version__

logger = logging.getLogger("graphshard")

_OPTIONS_TOLD = 3
"""So many programs that differ in options of the optimizer alone are worth a warning."""
_OPTIONS_KEPT = 4
"""So many of them are kept."""


def compile(
    model: nn.Module,
    plan: str | Plan = "dp",
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: OptimizerLike | None = None,
    example_inputs: Any = None,
    world_size: int | None = None,
    device: torch.device | str | None = None,
    executor: str = "auto",
    max_grad_norm: float | None = None,
    timeout_s: float = 600.0,
    passes: Sequence[Pass] | None = None,
    dump_dir: str | Path | None = None,
    debug_nan: bool = False,
    measure_memory: bool = False,
    init: Callable[[nn.Module], object] | None = None,
    seed: int = 0,
    cache: bool | str | Path | None = True,
) -> Compiled:
    """Compile ``model`` for training by ``plan``.

    Args:
        model: on CPU, GPU or the meta device. The compiled object copies its parameters, and in a distributed run takes
            them over: the module is left on the meta device. Values must be the same on all ranks, or ValuesDiffer is
            raised before any is stored. After the first step the module and the optimizer are not updated.
        plan: a plan string such as ``"zero3+pp4"``, or a Plan.
        loss_fn: ``loss = loss_fn(model(x), *targets)`` for ``step(x, *targets)``; a tuple x is ``model(*x)``, a dict
            ``model(**x)``. None: ``step(*args, **kwargs)`` is ``model(*args, **kwargs)``, which returns the loss or an
            object or dict that holds it as ``loss``.
        optimizer: over ``model.parameters()``, or a factory such as ``functools.partial(torch.optim.AdamW, lr=3e-4)``.
        example_inputs: what ``step`` will be given, a tuple of its arguments or a pair (tuple, dict): trace now.
        world_size: number of ranks; None: the process group's, else what the plan says, 2 for an axis without a size.
        device: where to run; None: the model's, for a meta model the executor's.
        executor: "distributed", "local", "none" (compile only), or "auto": distributed under torchrun, else local.
        max_grad_norm: clip the global gradient norm to this.
        timeout_s: distributed: how long a rank may wait in one instruction.
        passes: replacements (by name) for passes of the plan, or extra ones, which run behind the pass that their
            attribute ``after`` names, ``normalize`` without one.
        dump_dir: write every pass's graph here.
        debug_nan: look at every value of ``step``'s forward and backward; when the loss or a gradient is NaN or
            infinite, raise NonFiniteStep on every rank before the update, which names the node that made it first. With
            fp16 the loss alone: a gradient of the scaled loss that is not finite skips the step. Steps take longer.
        measure_memory: follow what every rank holds while it runs a step, for ``report``, ``explain`` and ``dump``; a
            warning says if that is more than the plan states by over 5%, or than its budget. Steps take longer.
        init: gives a meta model its first parameters: called with the model, moved to the CPU without values.
        seed: of dropout and other random operators.
        cache: take a plan from the cache on disk if it is there, and keep a new one there: in this folder, or for True
            in ``~/.cache/graphshard/plans`` unless GRAPHSHARD_CACHE=0 is in the environment. It is the plan that would
            be compiled: its key holds all it depends on. False or None: neither.

    Raises:
        GraphshardError: a subclass that names the mistake.
    """
    model, passes, cache = model_of(model), passes_of(passes), cache_of(cache)
    device, timeout_s = device_of(device), timeout_of(timeout_s)
    seed, max_grad_norm = seed_of(seed), norm_of(max_grad_norm)
    debug_nan, measure_memory = debug_nan_of(debug_nan), measure_memory_of(measure_memory)
    loss_fn, init, dump_folder = loss_of(loss_fn), init_of(init), folder_of(dump_dir)
    optimizer, world_size = optimizer_of(optimizer), world_size_of(world_size)
    parsed = plan_of(plan)
    kind = executor_kind(executor_of(executor))
    folder = offload_folder(parsed)
    if kind != "none" and folder is not None:
        check_folder(folder)
    where = device_for(kind, device, model)
    on_gpu = where.type == "cuda"
    memory = parsed.memory
    if memory is not None and memory.path is not None and memory.host_gb is None and on_gpu:
        logger.warning("graphshard: memory: without host_gb host memory has no limit, and nothing goes to its path")
    if world_size is None and kind == "distributed":
        world_size = distributed_world_size()
    mesh = parsed.mesh(world_size)
    made = None if optimizer is None else make_optimizer(model, optimizer)
    builder = Builder(
        model=model,
        plan=parsed,
        mesh=mesh,
        loss_fn=loss_fn,
        optimizer=made,
        max_grad_norm=max_grad_norm,
        passes=with_passes(_passes_of(parsed, debug_nan, on_gpu), passes),
        on_gpu=on_gpu,
        debug_nan=debug_nan,
        cache=open_cache(cache) if dump_dir is None else None,
        accounts=kind == "none",
    )
    compiled = Compiled(
        model=model,
        plan=parsed,
        mesh=mesh,
        optimizer=made,
        executor=kind,
        device=where,
        timeout_s=timeout_s,
        dump_dir=dump_folder,
        measure_memory=measure_memory,
        init=init,
        seed=seed,
        folder=folder,
        builder=builder,
    )
    builder.observe, builder.widest = compiled._observe, compiled._agreed
    if example_inputs is not None:
        args, kwargs = example_arguments(example_inputs)
        compiled.trace(*args, **kwargs)
    return compiled


def _passes_of(plan: Plan, debug_nan: bool, on_gpu: bool) -> list[Pass]:
    """The plan's passes; a value inside a region could not be looked at."""
    flops = GPU_FUNCTION_FLOPS if on_gpu else CPU_FUNCTION_FLOPS
    passes = default_passes(plan)
    # Without a GPU the CPU updates everything anyway.
    offloads = [replace(item, update="cheaper") for item in passes if isinstance(item, Offload) and on_gpu]
    return with_passes(passes, [Fuse(body=not debug_nan, function_flops=flops, on_gpu=on_gpu), *offloads])


def example_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``step`` is given, from what ``example_inputs`` may be: (args, kwargs)."""
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@dataclass(kw_only=True)
class Compiled(Executable):
    """What :func:`compile` returns; made by it alone."""

    builder: Builder
    dump_dir: Path | None
    _told_of_options: bool = False

    @property
    def passes(self) -> list[Pass]:
        """What runs on the captured program, in order; what a budget leaves open is chosen by the first training
        step."""
        return self.builder.passes

    @property
    def program(self) -> Program:
        """The training program after the last pass."""
        return self._compiled().graphs.program

    def _compiled(self) -> Build:
        """What was built first, with its graphs."""
        build = self._built()
        assert isinstance(build, Build)
        return build

    def _make(self, asked: Asked) -> Built:
        """What was not asked before."""
        return self.builder.make(asked)

    def _build(self, mode: Mode, example: MicroBatch, microbatches: int) -> Built:
        known = len(self._builds)
        build = super()._build(mode, example, microbatches)
        if len(self._builds) > known:
            if mode == "train":
                self._bound(next(reversed(self._builds)))
            if self.dump_dir is not None and self.rank == 0:
                self._write(self.dump_dir)
        return build

    def _bound(self, latest: Asked) -> None:
        """Keep a few of the programs that differ from ``latest`` in options of the optimizer alone: a schedule of an
        option would add one at every step. The first one stays, since later ones take over its passes."""
        alike = [asked for asked in self._builds if asked.but_options() == latest.but_options()]
        if len(alike) == _OPTIONS_TOLD and not self._told_of_options:
            self._told_of_options = True
            names = options_that_differ([asked.options for asked in alike])
            logger.warning(
                "graphshard: %s had %d values so far, and each is compiled into a program of its own, of which %d are "
                "kept: change no option of the optimizer but the learning rate; OneCycleLR and CyclicLR do not with "
                "cycle_momentum=False",
                names,
                len(alike),
                _OPTIONS_KEPT,
            )
        for asked in alike[1 : len(alike) - _OPTIONS_KEPT + 1]:
            build = self._builds.pop(asked)
            assert isinstance(build, Build)
            self.builder.forget(build)
            if self._runtime is not None:
                self._runtime.forget(build.plan)

    def _observe(self, index: int, name: str, program: Program) -> None:
        """Write what a pass has made of the first program, where that is asked for."""
        if self.dump_dir is not None and self.rank == 0:
            dump.writer(self.dump_dir)(index, name, program)

    def _agreed(self, example: MicroBatch) -> MicroBatch:
        """The largest of the micro-batches that ranks train on first, for choices that all of them must make alike."""
        if self.executor != "distributed" or self.plan.budget_per_rank_bytes is None:
            return example
        return example.like(largest(self._made_executor().told(example.shapes(), "comparing shapes")))

    def _scaler_factors(self) -> dict[str, float]:
        """The options of loss scaling, if the program scales the loss: before there is one, if fp16 is asked for."""
        scaled = next((p for p in self.passes if isinstance(p, Precision)), None)
        if scaled is None:
            return {}
        if self._main is None:
            scales = scaled.dtype == "fp16" and any(param.requires_grad for param in self._parameters)
        else:
            scales = any(slot.role is Role.SCALER for read in self._main.plan.reads for slot in read)
        if not scales:
            return {}
        return {name: getattr(scaled, name) for name in ("growth_factor", "backoff_factor", "growth_interval")}

    # Accounts

    @ambient.off()
    @fake.default_device()
    def dump(self, path: str | Path) -> None:
        """Write every pass's graph and a picture of memory into folder ``path``, and the plans that were compiled so
        far, of evaluation and calls too: all that :func:`load` needs."""
        folder, build = Path(path), self._compiled()
        run_passes(*self.builder.before_passes(build), dump.writer(folder))
        self._write(folder)

    def _write(self, folder: Path) -> None:
        """Write all but the graphs, which are there."""
        build = self._compiled()
        passes = build.graphs.passes
        measured = {} if self._runtime is None else report.measured_timelines(build.plan, self._runtime)
        dump.write_memory(folder, build.plan, self._title(), measured)
        with build.moment.again():
            model = describe(self.model)
        manifest = Manifest(
            graphshard=__version__,
            torch=torch.__version__,
            plan=str(self.plan),
            mesh=self.mesh,
            seed=self.seed,
            model=model,
            optimizer=None if self.optimizer is None else record_of(self.optimizer, self._scaler_factors()),
            program=dump.graph_file(len(passes), passes[-1].name if passes else "capture"),
        )
        plan_directory.write(folder, manifest, self._builds.values(), unsaved_buffers(self.model))

    def _title(self) -> str:
        return f"{type(self.model).__name__}, plan {self.plan}: memory of a rank over a step"

    @ambient.off()
    @fake.default_device()
    def verify(
        self, full_size: bool = False, limit_gb: float = CHECK_GB, report: Callable[[str], object] | None = None
    ) -> list[Pass]:
        """Run the passes once more, for training and for evaluation, each checked against the program before it on
        random inputs (check.py), and prove the plan.

        Where the model's own sizes do not fit, sizes and ranks are as small as its structure allows (shrink.py), with
        parameters on the stages where the model has them. A pass that decides by size, such as by a byte budget, may
        then do something else than it did: a warning says so.

        Args:
            full_size: never at smaller sizes.
            limit_gb: most memory, in 10^9 bytes, that all ranks in one process may take.
            report: is told a line about each thing that is found right.

        Returns:
            The passes, all of them.

        Raises:
            TooLargeToCheck: the ranks take more memory.
            NotEquivalent: a pass does not keep the program's meaning.
            IllegalProgram: a pass leaves a program that breaks a rule, or a postcondition.
            NotFinite, NodeFailed: the program cannot be run on random inputs.
            PlanError: the plan cannot run.
        """
        build = self._compiled()
        program, passes, ctx = self.builder.before_passes(build)
        result = build.graphs.program
        evaluation = self.builder.capture("evaluate", build.asked.example, build.plan.microbatches).program
        subject = Subject(program, evaluation, passes, ctx, result, build.plan)
        verify_all(subject, full_size, limit_gb, report or (lambda line: None))
        return passes

    def bisect(self, until: Until, batch: Any = None, steps: int = 2, limit_gb: float | None = None) -> Iterator[Seen]:
        """What is seen after each prefix of the passes, the pass that is responsible last; see bisect.py.

        Args:
            until: "loss", "nan", "memory" or "verify".
            batch: "loss", "nan": a global batch in the form of ``example_inputs``; without one, and for a meta model,
                values are random. "verify" runs on random values always, at sizes as for :meth:`verify`.
            steps: how many steps are run on that batch.
            limit_gb: "memory": what a rank may hold, in 10^9 bytes; None: as much as before all passes.
        """
        build = self._compiled()
        program, passes, ctx = self.builder.before_passes(build)
        if until == "verify":
            program, ctx = sized(program, ctx, build.graphs.program, False, CHECK_GB)
        elif until != "memory":
            require_fits(program, CHECK_GB)
        inputs = self._inputs(program, until, batch, steps)
        runs = until in ("loss", "nan") and batch is not None and not any(p.is_meta for p in self.model.parameters())
        execute = partial(self._losses, batch, steps) if runs else None
        return bisect(program, passes, ctx, until, inputs, limit_gb=limit_gb, execute=execute)

    def _losses(self, batch: Any, steps: int) -> list[float]:
        """What the local executor makes of some steps on one batch, from the model's own values on."""
        args, kwargs = example_arguments(batch)
        fresh: dict[str, Any] = {"_builds": {}, "_main": None, "_runtime": None, "_storage": None, "_steps": Steps()}
        fresh |= {"_given": {}, "_later": {}}
        builder = self.builder.fresh()
        twin = replace(self, executor="local", optimizer=self._user_optimizer, dump_dir=None, builder=builder, **fresh)
        return [twin.step(*args, **kwargs).item() for _ in range(steps)]

    def _inputs(self, program: Program, until: Until, batch: Any, steps: int) -> Inputs:
        """What bisect runs programs on: the model's own values where it has any and they fit."""
        inputs = random_inputs(program, steps, self.seed)
        if until not in ("loss", "nan") or any(p.is_meta for p in self.model.parameters()):
            return inputs
        inputs.params = {name: p.detach() for name, p in self.model.named_parameters()}
        inputs.buffers |= dict(self.model.named_buffers())
        inputs.lrs = inputs.lrs if self.optimizer is None else self.optimizer.lrs()
        if batch is not None:
            args, kwargs = example_arguments(batch)
            rows = split_batch(args, kwargs, self.dp_size, self.microbatches, dict(self.plan.batch_dims))
            inputs.batches = [[[part.leaves for part in row] for row in rows]] * steps
        return inputs

    def _told(self) -> str:
        """What the cache had to do with the plan; "": nothing."""
        return self._compiled().found.told
