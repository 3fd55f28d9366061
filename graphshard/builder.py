"""How a model becomes plans: captured, run through the passes and lowered; or its plan is in the cache on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphshard import ambient, fake, trace
from graphshard.autocast import HALVES
from graphshard.batch import MicroBatch
from graphshard.built import Asked, Built
from graphshard.codegen import schedule as schedules
from graphshard.codegen.lower import lower
from graphshard.errors import NotHashable, RanksError, TrainedParametersChanged
from graphshard.execution import ExecutionPlan
from graphshard.fingerprints import collectives_of
from graphshard.memory.planner import fit
from graphshard.mesh import Mesh
from graphshard.moment import Moment, now
from graphshard.passes.precision import Precision
from graphshard.pipeline import Context, Observer, Pass, Placement, placement_of, run_passes, try_passes
from graphshard.plan import Plan
from graphshard.program import Param, Program, Role
from graphshard.rewrite import copied
from graphshard.saved.cache import PlanCache
from graphshard.saved.key import digest, of_optimizer, of_passes, versions
from graphshard.text.spelling import first_line
from graphshard.trace import Captured, Mode
from graphshard.trace.batch_norm import check_own_statistics
from graphshard.trace.call import LossFn, Output
from graphshard.trace.key import seen
from graphshard.update import add_update, check_elementwise

logger = logging.getLogger("graphshard")


@dataclass(frozen=True)
class Graphs:
    """What a plan is lowered from."""

    program: Program
    passes: list[Pass]
    output: Output
    source: Program | None  # the program before the first pass; kept where accounts are all that is asked for


@dataclass(frozen=True)
class Found:
    """What the cache has."""

    key: str = ""  # "": it was not looked up
    plan: ExecutionPlan | None = None
    output: Output | None = None  # of the run that the key is from
    told: str = ""  # for people


@dataclass(kw_only=True)
class Build(Built):
    """One compiled program. Where the plan came from the cache, graphs are made when somebody asks for them."""

    asked: Asked
    moment: Moment  # when it was built
    make: Callable[[], Graphs]
    found: Found

    @cached_property
    def graphs(self) -> Graphs:
        """The program and the passes that made it."""
        with self.moment.again():
            return self.make()

    @cached_property
    def placement(self) -> Placement:
        """Where it has what."""
        return placement_of(self.graphs.program)


def _itself(example: MicroBatch) -> MicroBatch:
    return example


def _growing(part: tuple[int, ...], whole: tuple[int, ...], ranks: int) -> int | None:
    """The dim that is longer for the parts of all ranks, if it is one alone, and by as much."""
    longer = [dim for dim, (one, all_) in enumerate(zip(part, whole, strict=True)) if one != all_]
    return longer[0] if len(longer) == 1 and whole[longer[0]] == ranks * part[longer[0]] else None


@dataclass(kw_only=True)
class Builder:
    """Makes the plans of one model: for training, evaluation and calls, and for whatever shapes are asked for.

    Args:
        optimizer: the user's; None: nothing is trained.
        on_gpu: the plans are for a GPU.
        passes: with options that a budget decides as they are before the first training program.
        observe: is told of every pass of the first program.
        accounts: nothing is going to run: what is asked for is the program.
        widest: of a micro-batch that this rank trains on first, the largest of all ranks', for choices that all of them
            must make alike.
    """

    model: nn.Module
    plan: Plan
    mesh: Mesh
    loss_fn: LossFn | None
    optimizer: Optimizer | None
    max_grad_norm: float | None
    passes: list[Pass]
    on_gpu: bool
    debug_nan: bool
    cache: PlanCache | None
    accounts: bool
    observe: Observer | None = None
    widest: Callable[[MicroBatch], MicroBatch] = _itself
    _builds: list[Build] = field(default_factory=list)
    _assumed: MicroBatch | None = None  # what ``widest`` said

    def __post_init__(self) -> None:
        self._params = trace.describe_params(self.model)

    def fresh(self) -> Builder:
        """One that has made nothing yet, for a run in one process."""
        return replace(self, accounts=False, observe=None, widest=_itself, _builds=[], _assumed=None)

    def make(self, asked: Asked) -> Build:
        """Compile what was not asked before."""
        mode = asked.mode
        if known := [build for build in self._builds if build.mode == mode]:
            logger.warning("graphshard: %s: tracing %s again", asked.news(known[-1].asked), mode)
        moment = now(self.model, self.optimizer)
        before = self._before(mode)
        make: Callable[[], Graphs] = partial(self._graphs, asked, before)
        found = self._look_up(asked)
        plan, output = found.plan, found.output
        if plan is None:
            if found.told:
                logger.info("graphshard: %s", found.told)
            made = make()
            make, output = lambda: made, made.output
            watch = self.debug_nan and mode == "train"
            plan = lower(made.program, self.schedule(mode, asked.microbatches), watch, self.on_gpu)
            if self.cache is not None and found.key:
                self.cache.write(found.key, plan)
        assert output is not None
        build = Build(
            plan=plan,
            mode=mode,
            inputs=trace.spell_signature(*asked.example.arguments()),
            flags=asked.named_flags(),
            apart=asked.apart,
            options=asked.spelled_options(),
            out_spec=output.spec,
            output_leaves=output.leaves,
            output_dims=self._output_dims(asked, plan, len(output.leaves)),
            asked=asked,
            moment=moment,
            make=make,
            found=found,
        )
        self._builds.append(build)
        return build

    def before_passes(self, build: Build) -> tuple[Program, list[Pass], Context]:
        """The program that ``build`` began with, and what to run on it to get where ``build`` is."""
        graphs = build.graphs
        if graphs.source is not None:
            program = copied(graphs.source)
        else:
            with build.moment.again():
                program = self.capture(build.mode, build.asked.example, build.plan.microbatches).program
        return program, graphs.passes, Context(self.mesh)

    @ambient.off()
    def capture(self, mode: Mode, example: MicroBatch, microbatches: int) -> Captured:
        """The program before the first pass."""
        if mode == "train" and self.mesh.dp_size > 1:
            check_own_statistics(self.model)
        args, kwargs = example.arguments()
        captured = trace.capture(
            self.model,
            self.loss_fn,
            args,
            kwargs,
            mode=mode,
            microbatches=microbatches,
            group_of=self._groups(),
            lower=self._lower(),
        )
        captured.program.mesh = self.mesh
        if mode == "train":
            add_update(captured.program, self.optimizer, trace.parameter_names(self.model), self.max_grad_norm)
            if self.optimizer is not None and self.plan.zero_stage and self.mesh.size(self.mesh.shard_axis) > 1:
                check_elementwise(captured.program, type(self.optimizer).__name__)
        return captured

    def _output_dims(self, asked: Asked, plan: ExecutionPlan, leaves: int) -> tuple[int | None, ...]:
        """See :class:`Built`: what the model returns for the whole batch tells, on fake tensors; of a model that takes
        one batch size alone, its first dim where that is as long as the batch."""
        ranks = self.mesh.dp_size
        if asked.mode != "call" or ranks == 1:
            return (None,) * leaves
        slots = [(slot, kind) for results in plan.results for slot, kind in results.items()]
        part = {int(slot.name): kind.shape for slot, kind in slots if slot.role is Role.OUTPUT}
        try:
            whole = asked.example.like(asked.example.times(ranks))
            joined = trace.output_shapes(self.model, self.loss_fn, *whole.arguments())
        except Exception:
            rows = asked.example.rows()
            dims = {leaf: 0 for leaf, shape in part.items() if shape and shape[0] == rows}
        else:
            grown = ((leaf, _growing(shape, joined[leaf], ranks)) for leaf, shape in part.items())
            dims = {leaf: dim for leaf, dim in grown if dim is not None}
        return tuple(dims.get(leaf) for leaf in range(leaves))

    def schedule(self, mode: Mode, microbatches: int) -> schedules.Schedule:
        """The order of work on the stages."""
        stages = self.mesh.size("pp")
        if mode == "train":
            return schedules.make(self.plan.schedule, stages, microbatches)
        return schedules.forward_only(stages, microbatches)

    def forget(self, build: Build) -> None:
        """Let go of a build that is not the first one of its mode: nobody is going to run it."""
        assert build is not self._builds[0] and build is not self._before(build.mode)
        self._builds = [other for other in self._builds if other is not build]

    def _before(self, mode: Mode) -> Build | None:
        """The build whose passes the next one of a mode takes over: the first one of all, of training the first of
        these if there is one."""
        trained = [build for build in self._builds if build.mode == mode == "train"]
        return next(iter(trained or self._builds), None)

    @ambient.off()
    @fake.default_device()
    def _graphs(self, asked: Asked, before: Build | None) -> Graphs:
        """Capture, and run the passes; ``before``: see :meth:`_before`; None: nothing else was built."""
        captured = self.capture(asked.mode, asked.example, asked.microbatches)
        if before is not None and before.mode == asked.mode == "train":
            _check_trained(before.plan.params, captured.program.params)
        source = copied(captured.program) if self.accounts else None
        # Where parameters and state live is settled by the first program: later ones share its storage.
        ctx = Context(self.mesh, None if before is None else self._builds[0].placement, asked.apart)
        passes = self.passes if before is None else before.graphs.passes
        if asked.mode == "train":
            passes = self._fitted(captured.program, asked.example, passes, ctx, before)
            self.passes = passes if before is None else self.passes
        program = run_passes(captured.program, passes, ctx, self.observe if before is None else None)
        return Graphs(program, passes, Output(captured.out_spec, captured.output_leaves), source)

    def _fitted(
        self, program: Program, example: MicroBatch, passes: list[Pass], ctx: Context, before: Build | None
    ) -> list[Pass]:
        """``passes`` with what a budget leaves open chosen. Ranks may have different shapes, and meet new ones at
        different steps: what changes collectives is chosen once, for the largest of the first shapes of all."""
        schedule = self.schedule("train", program.microbatches)
        again = partial(fit, program, ctx=ctx, plan=self.plan, schedule=schedule, on_gpu=self.on_gpu, settled=True)
        if before is not None and before.mode == "train":
            return again(passes, collectives=collectives_of(before.plan))
        wide, assumed = program, self._largest(example)
        if assumed is not example and self.plan.budget_per_rank_bytes is not None:
            wide = self.capture("train", assumed, program.microbatches).program
        passes = fit(wide, passes, ctx, self.plan, schedule, on_gpu=self.on_gpu, settled=before is not None)
        if wide is program:
            return passes
        lowered = lower(try_passes(wide, passes, ctx), schedule, on_gpu=self.on_gpu)
        return again(passes, collectives=collectives_of(lowered))

    def _largest(self, example: MicroBatch) -> MicroBatch:
        """What ``widest`` says, which is asked once the model was seen to take ``example``: not of one that fails."""
        if self._assumed is None:
            self._assumed = self.widest(example)
        return self._assumed

    def _look_up(self, asked: Asked) -> Found:
        """The plan of the cache, if there is a cache, and graphs are not what is asked for."""
        if self.cache is None or self.accounts:
            return Found()
        try:
            key, output = self._key(asked)
        except RanksError:
            raise
        except NotHashable as error:
            return Found(told=f"the plan is compiled at every start: {error}")
        except Exception as error:  # of anybody's model: capture raises it, too, and says where
            return Found(told=f"the plan is compiled at every start: {type(error).__name__}: {first_line(error)}")
        plan = self.cache.read(key)
        told = f"the plan is from the cache, {self.cache.path(key)}; passes ran for this account alone"
        return Found(key, plan, output, told if plan is not None else "")

    def _key(self, asked: Asked) -> tuple[str, Output]:
        """Equal only if the plan is; and how the model's output is put together.

        Raises:
            NotHashable: something it depends on is known by nothing but its code.
        """
        args, kwargs = asked.example.arguments()
        trains = asked.mode == "train"
        before: object = of_passes(self.passes)
        if (taken := self._before(asked.mode)) is not None:
            before = [build.found.key for build in (self._builds[0], taken)]
            if "" in before:
                raise NotHashable("what was compiled first")
        names = trace.parameter_names(self.model)
        optimizer: Any = of_optimizer(self.optimizer, asked.spelled_options(), names) if trains else ()
        model = seen(self.model, self.loss_fn, args, kwargs, asked.mode, self._lower())
        if trains:
            before = before, trace.spell_signature(*self._largest(asked.example).arguments())
        settings = self.plan, self.mesh, asked.microbatches, self.max_grad_norm, self.debug_nan, self.on_gpu
        inputs = trace.spell_signature(args, kwargs)
        types = torch.get_default_dtype(), self._params, self._groups()
        settled = sorted(asked.apart), before
        return digest(versions(), asked.mode, model.digest, inputs, settings, types, optimizer, settled), model.output

    def _lower(self) -> torch.dtype | None:
        """What the passes compute in instead of float32."""
        return next((HALVES[item.dtype] for item in self.passes if isinstance(item, Precision)), None)

    def _groups(self) -> dict[str, int]:
        """By parameter, the index of its group of the optimizer."""
        if self.optimizer is None:
            return {}
        names = trace.parameter_names(self.model)
        groups = enumerate(self.optimizer.param_groups)
        return {names[id(p)]: i for i, group in groups for p in group["params"] if id(p) in names}


def _check_trained(before: Mapping[str, Param], now: Mapping[str, Param]) -> None:
    """Whether a training program trains the parameters that the first one does.

    Raises:
        TrainedParametersChanged: it trains others.
    """
    first, later = ([p.name for p in each.values() if p.has_grad and p.group is not None] for each in (before, now))
    if set(first) != set(later):
        raise TrainedParametersChanged(
            [name for name in first if name not in later], [name for name in later if name not in first]
        )
