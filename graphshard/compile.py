"""``graphshard.compile``: from a model and a plan to an object that trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from graphshard import dump, fake, plan_directory, report, trace
from graphshard.batch import MicroBatch, largest, split_batch
from graphshard.bisect import Seen, Until, bisect
from graphshard.builder import Build, Builder
from graphshard.built import Asked, Built, assemble
from graphshard.check import require_fits
from graphshard.duplicates import CPU_FUNCTION_FLOPS, GPU_FUNCTION_FLOPS
from graphshard.errors import (
    ExecutorNone,
    NeedsExampleInputs,
    StateMismatch,
    UnexpectedTensor,
    UnknownExecutor,
)
from graphshard.execution import ExecutionPlan
from graphshard.mesh import Mesh
from graphshard.model_record import describe, unsaved_buffers
from graphshard.optim import CompiledOptimizer, ScalerState, Steps, given_state
from graphshard.optimizer_record import record_of
from graphshard.passes import default_passes, with_passes
from graphshard.passes.fuse import Fuse
from graphshard.passes.offload import Offload
from graphshard.passes.precision import Precision
from graphshard.pipeline import Pass, run_passes
from graphshard.plan import Plan
from graphshard.plan_cache import open_cache
from graphshard.plan_directory import Manifest
from graphshard.program import Program, Role
from graphshard.reference_inputs import Inputs, random_inputs
from graphshard.runtime.executor import Executor
from graphshard.runtime.nvme import check_folder
from graphshard.runtime.storage import Storage
from graphshard.trace import Mode
from graphshard.update import make_optimizer
from graphshard.verification import CHECK_GB, Subject, sized, verify_all
from graphshard.version import __version__

logger = logging.getLogger("graphshard")

OptimizerLike = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]


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
    cache: bool | str | Path = True,
) -> Compiled:
    """Compile ``model`` for training by ``plan``.

    Args:
        model: on CPU, GPU or the meta device. The compiled object copies its parameters, and in a distributed run takes
            them over: the module is left on the meta device.
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
            be compiled: its key holds all it depends on.

    Raises:
        GraphshardError: a subclass that names the mistake.
    """
    parsed = plan if isinstance(plan, Plan) else Plan.parse(plan)
    kind = executor_kind(executor)
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
        passes=with_passes(_passes_of(parsed, debug_nan, on_gpu), passes or ()),
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
        dump_dir=None if dump_dir is None else Path(dump_dir),
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
    return with_passes(passes, [Fuse(body=not debug_nan, function_flops=flops), *offloads])


def offload_folder(plan: Plan) -> str | None:
    """Where the plan lets ranks keep files: an absolute path with ``~`` expanded, since the first step, which makes
    them, may be in another working directory."""
    given = (token.path for token in (plan.offload, plan.memory) if token is not None)
    path = next((path for path in given if path is not None), None)
    # Unlike Path's this leaves the name of an unknown user, which is then no folder.
    return None if path is None else str(Path(os.path.expanduser(path)).absolute())  # noqa: PTH111


def executor_kind(executor: str) -> str:
    """``executor``, with "auto" decided.

    Raises:
        UnknownExecutor: there is none of that name.
    """
    if executor not in ("auto", "distributed", "local", "none"):
        raise UnknownExecutor(executor)
    if executor != "auto":
        return executor
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    return "distributed" if (dist.is_available() and dist.is_initialized()) or launched else "local"


def distributed_world_size() -> int:
    """The ranks of this job."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def example_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``step`` is given, from what ``example_inputs`` may be: (args, kwargs)."""
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@dataclass
class Compiled:
    """What :func:`compile` returns; made by it alone."""

    model: nn.Module
    plan: Plan
    mesh: Mesh
    executor: str
    device: torch.device
    timeout_s: float
    dump_dir: Path | None
    seed: int
    folder: str | None = None  # for files of what is offloaded
    measure_memory: bool = False
    init: Callable[[nn.Module], object] | None = None
    optimizer: Any = None
    builder: Builder | None = None
    _builds: dict[Asked, Built] = field(default_factory=dict)
    _main: Built | None = None
    _runtime: Executor | None = None
    _storage: Storage | None = None
    _steps: Steps = field(default_factory=Steps)
    _over_peak: str = ""  # what was said of a step that held more than its plan states

    def __post_init__(self) -> None:
        self._params = trace.describe_params(self.model)
        self._parameters = list(self.model.parameters())  # every step asks them for hooks: the model is walked once
        self._user_optimizer: Optimizer | None = self.optimizer
        if self._user_optimizer is not None:
            self.optimizer = CompiledOptimizer(
                self._user_optimizer,
                trace.parameter_names(self.model),
                self._read_state,
                self._write_state,
                self._scaler_state,
                self._steps,
            )

    # Facts

    @property
    def microbatches(self) -> int:
        """Micro-batches a step runs on each data-parallel rank."""
        return self.plan.microbatch_count(self.mesh)

    @property
    def rank(self) -> int:
        """This process's rank; 0 for the local executor."""
        if self.executor != "distributed":
            return 0
        # The process group may be set up only at the first step, but a sampler asks before that.
        return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.mesh.dp_size

    @property
    def dp_rank(self) -> int:
        """This process's index among the data-parallel ranks."""
        return self.mesh.dp_rank(self.rank)

    @property
    def passes(self) -> list[Pass]:
        """What runs on the captured program, in order; what a budget leaves open is chosen by the first training
        step."""
        return self._builder().passes

    @property
    def program(self) -> Program:
        """The training program after the last pass."""
        return self._compiled().graphs.program

    @property
    def execution_plan(self) -> ExecutionPlan:
        """Every rank's instructions for a training step."""
        return self._built().plan

    # Running

    def step(self, *batch: Any, **kwargs: Any) -> Tensor:
        """Forward, backward and update.

        Args:
            batch: distributed: this data-parallel rank's part of the batch; local: the global batch.

        Returns:
            The loss, averaged over data-parallel ranks and micro-batches: a 0-d tensor.

        Raises:
            BatchDoesNotSplit: the batch does not split into the plan's micro-batches.
            NonFiniteStep: with ``debug_nan``, the loss or a gradient is NaN or infinite; nothing was updated.
        """
        with self._getting_ready():
            parts = self._split(batch, kwargs, self.microbatches)
            build = self._build("train", parts[0][0], self.microbatches)
        lrs = [] if self.optimizer is None else self.optimizer.lrs()
        loss: Tensor | None = self._run(build, parts, lrs).loss
        self._check_peak(build.plan)
        self._steps.taken += 1
        if self.optimizer is not None:
            self.optimizer.note_step()
        assert loss is not None
        return loss.clone()

    def evaluate(self, *batch: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch in evaluation mode, without an update; arguments and result as for :meth:`step`."""
        with self._getting_ready():
            parts = self._split(batch, kwargs, self.microbatches)
            if self._main is None:
                self._build("train", parts[0][0], self.microbatches)
            build = self._build("evaluate", parts[0][0], self.microbatches)
        loss: Tensor | None = self._run(build, parts, []).loss
        assert loss is not None
        return loss.clone()

    def __call__(self, *batch: Any, **kwargs: Any) -> Any:
        """The model's output in evaluation mode, without the loss.

        Returns:
            What the model returns; data-parallel parts are joined along dim 0. Distributed: None on ranks that are not
            of the last stage.

        Raises:
            NeedsExampleInputs: nothing was traced before that says where parameters live.
        """
        with self._getting_ready():
            if self._main is None and self._user_optimizer is not None:
                raise NeedsExampleInputs()
            parts = self._split(batch, kwargs, 1)
            build = self._build("call", parts[0][0], 1)
        outputs = self._run(build, parts, []).outputs
        return assemble(build, parts, outputs)

    def trace(self, *batch: Any, **kwargs: Any) -> None:
        """Compile the training step for arguments like these without running it."""
        parts = self._split(batch, kwargs, self.microbatches)
        self._build("train", parts[0][0], self.microbatches)

    def _split(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int) -> list[list[MicroBatch]]:
        ranks = 1 if self.executor == "distributed" else self.dp_size
        return split_batch(args, kwargs, ranks, microbatches, dict(self.plan.batch_dims))

    def _getting_ready(self) -> AbstractContextManager[None]:
        """Around what may be refused on this rank alone: the others learn that it does not come."""
        return self._made_executor().getting_ready() if self.executor == "distributed" else nullcontext()

    def _run(self, build: Built, parts: list[list[MicroBatch]], lrs: list[float]) -> Any:
        runtime, _ = self._started()
        first = self.dp_rank if self.executor == "distributed" else 0
        batches = {first + i: [part.leaves for part in row] for i, row in enumerate(parts)}
        return runtime.step(build.plan, batches, seed=self.seed, step=self._steps.taken, lrs=lrs)

    def _check_peak(self, plan: ExecutionPlan) -> None:
        """Say once if a step is seen to hold more than the plan states."""
        if not self.measure_memory or self._over_peak or self._runtime is None:
            return
        self._over_peak = report.over_peak(plan, self.plan, self._runtime)
        if self._over_peak:
            logger.warning("graphshard: %s; explain shows of what", self._over_peak)

    # Building

    def _built(self) -> Built:
        """What was built first."""
        if self._main is None:
            raise NeedsExampleInputs()
        return self._main

    def _compiled(self) -> Build:
        """What was built first, with its graphs."""
        build = self._built()
        assert isinstance(build, Build)
        return build

    def _builder(self) -> Builder:
        """What compiles."""
        assert self.builder is not None
        return self.builder

    @fake.default_device()
    def _build(self, mode: Mode, example: MicroBatch, microbatches: int) -> Built:
        inputs = trace.input_signature(*example.arguments())
        options = self.optimizer.hyperparameters_key() if self.optimizer is not None and mode == "train" else None
        hooks = trace.gradient_hooks(self._parameters) if mode == "train" else ()
        asked = Asked(mode, inputs, options, self.model.training, hooks, example, microbatches)
        if asked not in self._builds:
            build = self._make(asked)
            if self._storage is not None:
                self._storage.learn(build.plan)  # there may be no room for it
            self._builds[asked] = build
            self._main = self._main or build
            if self.dump_dir is not None and self.rank == 0:
                self._write(self.dump_dir)
        return self._builds[asked]

    def _make(self, asked: Asked) -> Built:
        """What was not asked before."""
        return self._builder().make(asked)

    def _observe(self, index: int, name: str, program: Program) -> None:
        """Write what a pass has made of the first program, where that is asked for."""
        if self.dump_dir is not None and self.rank == 0:
            dump.writer(self.dump_dir)(index, name, program)

    def _agreed(self, example: MicroBatch) -> MicroBatch:
        """The largest of the micro-batches that ranks train on first, for choices that all of them must make alike."""
        if self.executor != "distributed" or self.plan.budget_per_rank_bytes is None:
            return example
        return example.like(largest(self._made_executor().told(example.shapes(), "comparing shapes")))

    # State

    def _start(self) -> tuple[Executor, Storage]:
        """The executor and what it stores: at first the model's parameters and buffers, if they have values."""
        if self._runtime is not None and self._storage is not None:
            return self._runtime, self._storage
        if self.executor == "none":
            raise ExecutorNone()
        self._built()
        runtime = self._made_executor()
        storage = Storage(runtime, *self._plans())
        self._state_names = list(self.model.state_dict(keep_vars=True))
        user = self._user_optimizer
        holders = [o for o in (user, self.optimizer) if o is not None]
        if self.init is not None:
            _move(self.model, holders, lambda t: torch.empty_like(t, device="cpu"))
            self.init(self.model)
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        if not any(p.is_meta for p in params.values()):
            storage.write_model(params, dict(self.model.named_buffers()))
        state = given_state(user, trace.parameter_names(self.model)) if user is not None else {}
        if state:
            storage.write_state(state)
        self._storage = storage  # nothing was refused
        if self.executor == "distributed":
            # The ranks hold the parameters now: the model need not.
            _move(self.model, holders, lambda t: t.to("meta"))
            for holder in holders:
                holder.state.clear()
        self._parameters = list(self.model.parameters())
        return runtime, storage

    def _started(self) -> tuple[Executor, Storage]:
        """The same before what ranks do together: one that cannot start tells the others."""
        with self._getting_ready():
            return self._start()

    def _plans(self) -> list[ExecutionPlan]:
        """All that there are."""
        return [build.plan for build in self._builds.values()]

    def _made_executor(self) -> Executor:
        """The executor, which is made when it is first needed."""
        if self._runtime is None:
            self._runtime = self._make_executor()
        return self._runtime

    def _make_executor(self) -> Executor:
        options: dict[str, Any] = {
            "measure_memory": self.measure_memory,
            "path": self.folder,
            "cudagraphs": self.plan.cudagraphs,
        }
        if self.executor == "distributed":
            from graphshard.runtime.distributed import DistributedExecutor

            return DistributedExecutor(self.mesh, self.device, timeout_s=self.timeout_s, **options)
        from graphshard.runtime.local import LocalExecutor

        return LocalExecutor(self.mesh, self.device, **options)

    def state_dict(self, rank0_only: bool = False) -> dict[str, Tensor]:
        """Full parameters and buffers under the model's own names, tied names included, in the model's own dtypes: with
        bf16 or fp16 the float32 masters, and a parameter that is never updated as it was rounded. Collective: all ranks
        call it.

        Args:
            rank0_only: only rank 0 gets the tensors, the others an empty dict.
        """
        _, storage = self._started()
        values = storage.read_params(rank0_only) | storage.read_buffers(rank0_only)
        if rank0_only and self.rank != 0:
            return {}
        stored = self._stored_names()
        dtypes = {name: param.dtype for name, param in self._params.items()}
        full = {name: value.to(dtypes.get(name, value.dtype)) for name, value in values.items()}
        return {name: full[stored[name]] for name in self._state_names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace parameters and buffers by full tensors, as ``model.state_dict()`` or :meth:`state_dict` give them.

        Of names that are tied one is enough.

        Raises:
            StateMismatch: a tensor is missing, has another shape, or a name is none of the model's; nothing is changed.
        """
        _, storage = self._start()
        stored = self._stored_names()
        expected = self.model.state_dict(keep_vars=True)
        given: dict[str, Tensor] = {}
        for name, value in state.items():
            if name not in expected:
                raise UnexpectedTensor(name, expected)
            if value.shape != expected[name].shape:
                raise StateMismatch(name, f"shape {list(value.shape)}", f"shape {list(expected[name].shape)}")
            given[stored[name]] = value
        for name, tensor in expected.items():
            if stored[name] not in given:
                raise StateMismatch(name, "nothing", f"a tensor of shape {list(tensor.shape)}")
        params = {name: value for name, value in given.items() if name in self._params}
        storage.write_model(params, {name: value for name, value in given.items() if name not in params})

    def _stored_names(self) -> dict[str, str]:
        """Every name of a parameter or buffer to the one that its value is stored under."""
        first: dict[int, str] = {}
        buffers = self.model.named_buffers(remove_duplicate=False)
        names = {name: first.setdefault(id(buffer), name) for name, buffer in buffers}
        return names | {alias: p.name for p in self._params.values() for alias in (p.name, *p.aliases)}

    def _read_state(self) -> dict[str, dict[str, Tensor]]:
        return self._started()[1].read_state()

    def _write_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._start()[1].write_state(state)

    def _scaler_factors(self) -> dict[str, float]:
        """The options of loss scaling, if the program scales the loss."""
        scaled = next((p for p in self.passes if isinstance(p, Precision)), None)
        if scaled is None or not any(slot.role is Role.SCALER for read in self._built().plan.reads for slot in read):
            return {}
        return {name: getattr(scaled, name) for name in ("growth_factor", "backoff_factor", "growth_interval")}

    def _scaler_state(self) -> ScalerState | None:
        """What there is of loss scaling between steps."""
        factors = self._scaler_factors()
        if not factors:
            return None
        return ScalerState(
            factors,
            read=lambda: self._start()[1].read_scaler(),
            write=lambda values: self._start()[1].write_scaler(values),
        )

    # Accounts

    @fake.default_device()
    def dump(self, path: str | Path) -> None:
        """Write every pass's graph and a picture of memory into folder ``path``, and the plans that were compiled so
        far, of evaluation and calls too: all that :func:`load` needs."""
        folder, build = Path(path), self._compiled()
        run_passes(*self._builder().before_passes(build), dump.writer(folder))
        self._write(folder)

    def _write(self, folder: Path) -> None:
        """Write all but the graphs, which are there."""
        build = self._compiled()
        passes = build.graphs.passes
        measured = {} if self._runtime is None else report.measured_timelines(build.plan, self._runtime)
        dump.write_memory(folder, build.plan, self._title(), measured)
        manifest = Manifest(
            graphshard=__version__,
            torch=torch.__version__,
            plan=str(self.plan),
            mesh=self.mesh,
            seed=self.seed,
            model=describe(self.model),
            optimizer=None if self.optimizer is None else record_of(self.optimizer, self._scaler_factors()),
            program=dump.graph_file(len(passes), passes[-1].name if passes else "capture"),
        )
        plan_directory.write(folder, manifest, self._builds.values(), unsaved_buffers(self.model))

    def _title(self) -> str:
        return f"{type(self.model).__name__}, plan {self.plan}: memory of a rank over a step"

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
        program, passes, ctx = self._builder().before_passes(build)
        result = build.graphs.program
        evaluation = self._builder().capture("evaluate", build.asked.example, build.plan.microbatches).program
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
        program, passes, ctx = self._builder().before_passes(build)
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
        builder = self._builder().fresh()
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

    def explain(self) -> str:
        """What each pass did, bytes per rank, collectives, bubble: one page of text."""
        return report.explain(self.report())

    @fake.default_device()
    def report(self) -> dict[str, Any]:
        """The same as data that json can write."""
        build = self._built()
        return report.report(self.program, build.plan, self.plan, self._runtime, self._told())

    def _told(self) -> str:
        """What the cache had to do with the plan; "": nothing."""
        return self._compiled().found.told


def device_for(executor: str, device: torch.device | str | None, model: nn.Module) -> torch.device:
    """Where to run: where the user said, else where the model is; a meta model on a GPU if each rank has a process of
    its own and there is one."""
    tensors = [*model.parameters(), *model.buffers()]
    places = (t.device for t in tensors if t.device.type != "meta")
    default = "cuda" if executor == "distributed" and torch.cuda.is_available() else "cpu"
    return torch.device(device) if device is not None else next(places, torch.device(default))


def _move(model: nn.Module, optimizers: Sequence[Optimizer], make: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters, in the optimizers' groups too, and buffers by what ``make`` gives for them; tied ones stay
    tied, which to_empty forgets, and hooks stay."""
    new: dict[Tensor, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if old not in new:
                    new[old] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
                    if old.requires_grad:
                        new[old]._backward_hooks = old._backward_hooks  # one dict, so that handles remove them still
                module._parameters[name] = new[old]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = new.setdefault(buffer, make(buffer))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new.get(p, p) for p in group["params"]]
