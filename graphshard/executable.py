"""What a model's plans are run by, whether they were just compiled or loaded: steps, state and accounts."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from graphshard import ambient, fake, report, trace
from graphshard.autocast import HALVES
from graphshard.batch import MicroBatch, check_batch, split_batch
from graphshard.built import Asked, Built, assemble
from graphshard.errors import Closed, ExecutorNone, GraphshardError, NeedsExampleInputs, RanksOutOfStep
from graphshard.execution import ExecutionPlan
from graphshard.mesh import Mesh
from graphshard.model_flags import flags_of, names_of
from graphshard.optim import CompiledOptimizer, ScalerState, Steps, given_state
from graphshard.plan import Plan
from graphshard.program import Program
from graphshard.runtime.executor import Executor
from graphshard.runtime.same_values import require_same
from graphshard.runtime.storage import Storage
from graphshard.state_entries import IncompatibleKeys, check_same_parameters, entries_of, saved_with
from graphshard.trace import Mode

logger = logging.getLogger("graphshard")


@dataclass(kw_only=True)
class Executable(ABC):
    """Runs a model's plans, which a subclass finds."""

    model: nn.Module
    plan: Plan
    mesh: Mesh
    executor: str
    device: torch.device
    timeout_s: float
    seed: int
    folder: str | None = None  # for files of what is offloaded
    measure_memory: bool = False
    init: Callable[[nn.Module], object] | None = None
    optimizer: Any = None
    _builds: dict[Asked, Built] = field(default_factory=dict)
    _main: Built | None = None
    _runtime: Executor | None = None
    _storage: Storage | None = None
    _closed: bool = False
    _steps: Steps = field(default_factory=Steps)
    _compared: bool = False  # whether all ranks have the same first values
    _given: dict[str, Tensor] = field(default_factory=dict)  # loaded before there was where to store it
    _later: dict[str, Callable[[Storage], None]] = field(default_factory=dict)  # what else was, by what it is of
    _over_peak: str = ""  # what was said of a step that held more than its plan states

    def __post_init__(self) -> None:
        self._params = trace.describe_params(self.model)
        # Every step asks how these are set: the model is walked once.
        self._parameters = list(self.model.parameters())
        self._modules = list(self.model.modules())
        self._names = names_of(self.model)
        self._user_optimizer: Optimizer | None = self.optimizer
        if self._user_optimizer is not None:
            self.optimizer = CompiledOptimizer(
                self._user_optimizer,
                trace.parameter_names(self.model),
                self._read_state,
                self._write_state,
                self._scaler_state,
                self._steps,
                self._getting_ready,
                self._require_same,
            )

    # What a subclass knows

    @property
    @abstractmethod
    def program(self) -> Program:
        """The training program after the last pass."""

    @abstractmethod
    def _make(self, asked: Asked) -> Built:
        """The plan for what was not asked before."""

    @abstractmethod
    def _scaler_factors(self) -> dict[str, float]:
        """The options of loss scaling, if the program scales the loss."""

    def _told(self) -> str:
        """What is to be said of where the plan is from; "": nothing."""
        return ""

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
            BatchDoesNotSplit, BadBatchDims, UnsupportedInput: the batch does not split into the plan's micro-batches.
            AmbientAutocast: torch.autocast is on, in another precision than the plan's.
            TrainedParametersChanged: other parameters would be trained than by the first step.
            NonFiniteStep: with ``debug_nan``, the loss or a gradient is NaN or infinite; nothing was updated.
        """
        with self._undisturbed():
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
        with self._undisturbed():
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
            What the model returns: parts of data-parallel ranks are joined along the dim that grows with the batch, and
            numbers that differ, such as a loss, are averaged. Distributed: this data-parallel rank's part; None on
            ranks that are not of the last stage.

        Raises:
            OutputNotJoined: a tensor of the output is neither.
            NeedsExampleInputs: nothing was traced before that says where parameters live.
        """
        with self._undisturbed():
            with self._getting_ready():
                if self._main is None and self._user_optimizer is not None:
                    raise NeedsExampleInputs()
                parts = self._split(batch, kwargs, None)
                build = self._build("call", parts[0][0], 1)
            return assemble(build, self._run(build, parts, []).outputs)

    def trace(self, *batch: Any, **kwargs: Any) -> None:
        """Compile the training step for arguments like these without running it."""
        # Only what is traced first under a budget is compared over ranks: else nobody waits for this one.
        compared = self._main is None and self.plan.budget_per_rank_bytes is not None
        with self._undisturbed(), self._getting_ready() if compared else nullcontext():
            parts = self._split(batch, kwargs, self.microbatches, has_values=False)
            self._build("train", parts[0][0], self.microbatches)

    def close(self) -> None:
        """Give back parameters, optimizer state, files, threads and the connections to other ranks. All ranks call it;
        what was compiled can still be explained, dumped and diffed. At the end of ``with compiled:`` it is called.

        Raises:
            RanksError: other ranks do something else.
        """
        self._give_back(together=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._give_back(together=kind is None)  # after an error the others may not come

    def _give_back(self, together: bool) -> None:
        runtime, self._runtime, self._storage, self._closed = self._runtime, None, None, True
        if runtime is None:
            return
        try:
            if together:
                with suppress(RanksOutOfStep):  # nobody waits for this rank then
                    runtime.told(None, "closing")  # nobody is in a step any more that needs it
        finally:
            runtime.close()

    def _split(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], microbatches: int | None, has_values: bool = True
    ) -> list[list[MicroBatch]]:
        """The batch in parts. ``microbatches`` None: that of a call, which has no targets, and is one micro-batch;
        ``has_values``: it is going to be run on."""
        dims = dict(self.plan.batch_dims)
        check_batch(args, kwargs, {} if microbatches is None else dims, has_values)
        ranks = 1 if self.executor == "distributed" else self.dp_size
        return split_batch(args, kwargs, ranks, microbatches or 1, dims)

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Around all that is done with a batch, whatever the caller has switched on."""
        if not ambient.is_on():
            return nullcontext()
        with self._getting_ready():
            ambient.check_precision(None if self.plan.precision is None else HALVES[self.plan.precision.dtype])
        return ambient.off()

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

    @fake.default_device()
    def _build(self, mode: Mode, example: MicroBatch, microbatches: int) -> Built:
        inputs = trace.input_signature(*example.arguments())
        options = self.optimizer.hyperparameters_key() if self.optimizer is not None and mode == "train" else None
        flags = flags_of(self._modules, self._parameters) if mode == "train" else None
        apart = self._apart() if mode != "train" else frozenset[str]()
        asked = Asked(mode, inputs, options, flags, apart, example, microbatches, self._names)
        build = self._builds.get(asked)
        if build is None:
            build = self._make(asked)
            if self._storage is not None:
                self._storage.learn(build.plan)  # there may be no room for it
            self._builds[asked] = build
            self._main = self._main or build
        return build

    def _apart(self) -> frozenset[str]:
        """Buffers that training leaves different on data-parallel ranks."""
        trained = (built.updated for built in self._known() if built.mode == "train" and self.dp_size > 1)
        return frozenset[str]().union(*trained)

    def _known(self) -> Iterable[Built]:
        """All plans that there are so far."""
        return self._builds.values()

    # State

    def _start(self, given: Mapping[str, Tensor] | None = None) -> tuple[Executor, Storage]:
        """The executor and what it stores: at first ``given`` by the names they are stored under, what was loaded
        before, and the model's other parameters and buffers, if they have values.

        Raises:
            ValuesDiffer: they are not the same on all ranks; nothing is stored.
            StateMismatch: ``init`` has left the model with other parameters; likewise.
        """
        if self._runtime is not None and self._storage is not None:
            return self._runtime, self._storage
        self._require_executor()
        self._built()
        runtime, given = self._made_executor(), self._given | dict(given or {})
        storage = Storage(runtime, *(built.plan for built in self._known()))
        user = self._user_optimizer
        holders = [o for o in (user, self.optimizer) if o is not None]
        unsaved = self._unsaved_buffers()
        if self.init is not None:
            _move(self.model, holders, lambda t: torch.empty_like(t, device="cpu"))
            self.init(self.model)
            check_same_parameters(self.model, self._params)
        first = dict(self.model.named_parameters()) | dict(self.model.named_buffers()) | unsaved | given
        first = {name: value.detach() for name, value in first.items() if not value.is_meta}
        if self.init is None and not given and not self._params.keys() <= first.keys():
            first = unsaved
        state = given_state(user, trace.parameter_names(self.model)) if user is not None else {}
        if not self._compared:
            require_same(runtime, first | _spelled(state))
            self._compared = True
        params = {name: value for name, value in first.items() if name in self._params}
        buffers = {name: value for name, value in first.items() if name not in params}
        if params or not self._params:
            storage.write_model(params, buffers)
        else:
            storage.write_buffers(buffers)
        if state:
            storage.write_state(state)
        for write in self._later.values():
            write(storage)
        self._storage = storage  # nothing was refused
        self._given, self._later = {}, {}
        if self.executor == "distributed":
            # The ranks hold the parameters now: the model need not.
            _move(self.model, holders, lambda t: t.to("meta"))
            for holder in holders:
                holder.state.clear()
        self._parameters = list(self.model.parameters())
        return runtime, storage

    def _unsaved_buffers(self) -> dict[str, Tensor]:
        """Values of buffers that the model lacks and no state dict has."""
        return {}

    def _started(self) -> tuple[Executor, Storage]:
        """The same before what ranks do together: one that cannot start tells the others."""
        with self._getting_ready():
            return self._start()

    def _require_executor(self) -> None:
        if self.executor == "none":
            raise ExecutorNone()

    def _made_executor(self) -> Executor:
        """The executor, which is made when it is first needed."""
        if self._closed:
            raise Closed()
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

    def state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """Full parameters and buffers under the model's own names, tied names included, in the model's own dtypes: with
        bf16 or fp16 the float32 masters, and a parameter that is never updated as it was rounded. Hooks of the model on
        its state dict run on these values; what else they or the model give, such as extra state, is the module's own
        now. Collective: all ranks call it.

        Args:
            rank0_only: only rank 0 gets the tensors, the others an empty dict.
        """
        _, storage = self._started()
        values = storage.read_params(rank0_only) | storage.read_buffers(rank0_only)
        if rank0_only and self.rank != 0:
            return {}
        dtypes = {name: param.dtype for name, param in self._params.items()}
        full = {name: value.to(dtypes.get(name, value.dtype)) for name, value in values.items()}
        return saved_with(self.model, full)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Replace parameters and buffers by full tensors, as ``model.state_dict()`` or :meth:`state_dict` give them; of
        names that are tied one is enough. Extra state goes to its modules. Collective: all ranks call it, with the same
        state. Unless all have traced something, values are kept until the first step.

        Args:
            strict: False: names that are missing keep their values, and what is unexpected is left out.

        Returns:
            The names that were missing and unexpected, as torch.nn.Module.load_state_dict does.

        Raises:
            StateMismatch: a tensor is missing, has another shape, or a name is none of the model's; nothing is changed.
            ValuesDiffer: ranks are given different states; likewise.
        """
        self._require_executor()
        entries = entries_of(self.model, self._params)
        with self._getting_ready():
            given = entries.fit(state, strict)
            require_same(self._made_executor(), given.values)
            if self._storage is None and (self._later or not self._traced_everywhere()):
                self._given |= {name: value.detach().clone() for name, value in given.values.items()}
                entries.load_extra(given.extra)
                return given.keys
            begun = self._storage is not None
            _, storage = self._start(given.values)
        entries.load_extra(given.extra)
        if begun:
            kept = storage.read_params() if self._params.keys() - given.values.keys() else {}
            params = kept | {name: value for name, value in given.values.items() if name in self._params}
            storage.write_model(params, {name: v for name, v in given.values.items() if name not in params})
        return given.keys

    def _traced_everywhere(self) -> bool:
        """Whether all ranks know what they store; trace() may be called by one of them alone."""
        return all(self._made_executor().told(self._main is not None, "comparing what was traced"))

    def _read_state(self) -> dict[str, dict[str, Tensor]]:
        return self._started()[1].read_state()

    def _write_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._require_executor()
        with self._getting_ready():
            require_same(self._made_executor(), _spelled(state))
            if self._storage is None:
                kept = {name: {key: v.detach().clone() for key, v in found.items()} for name, found in state.items()}
                before = self._later
                self._later = before | {"optimizer": lambda storage: storage.write_state(kept)}
                try:
                    if self._traced_everywhere():
                        self._start()
                except GraphshardError:
                    self._later = before
                    raise
                return
        self._storage.write_state(state)

    def _write_scaler(self, values: Mapping[str, float]) -> None:
        if self._storage is None:
            self._later["scaler"] = lambda storage: storage.write_scaler(values)
        else:
            self._storage.write_scaler(values)

    def _require_same(self, numbers: Mapping[str, Tensor]) -> None:
        require_same(self._made_executor(), numbers)

    def _scaler_state(self) -> ScalerState | None:
        """What there is of loss scaling between steps."""
        factors = self._scaler_factors()
        if not factors:
            return None
        return ScalerState(
            factors,
            read=lambda: self._start()[1].read_scaler(),
            write=self._write_scaler,
        )

    # Accounts

    def explain(self) -> str:
        """What each pass did, bytes per rank, collectives, bubble: one page of text."""
        return report.explain(self.report())

    @ambient.off()
    @fake.default_device()
    def report(self) -> dict[str, Any]:
        """The same as data that json can write."""
        build = self._built()
        return report.report(self.program, build.plan, self.plan, self._runtime, self._told())


def _spelled(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Optimizer state by names for people."""
    return {f"state {key} of {name}": value for name, found in state.items() for key, value in found.items()}


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
