"""What compile.py uses of an executor, whichever it is: load plans, run steps, read and write what outlives a step.

Several plans (training, evaluation, other input shapes) share one executor and with it one store per rank, as long as
they put parameters, buffers and optimizer state into the same slots.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from graphshard.errors import GraphshardError, NoValue, ValueLost
from graphshard.execution import ExecutionPlan, Ref, TensorType, slot_ref, variants
from graphshard.loss_scaling import SKIPPED
from graphshard.memory.arena import Layout, lay_out
from graphshard.mesh import Mesh
from graphshard.offloaded import offloaded
from graphshard.plan_options import PLACES
from graphshard.program import Bucket, Role, Slot
from graphshard.prove import prove
from graphshard.runtime.arena import Arena, Placing, Shared
from graphshard.runtime.cuda_graphs import SegmentGraphs, graphs_of, recorder_of, uncaptured
from graphshard.runtime.feed import STORED, Feed, sort_feed
from graphshard.runtime.machine import Communicator, Machine, Value
from graphshard.runtime.memory import return_freed_memory
from graphshard.runtime.meter import Measured, make_meter
from graphshard.runtime.offload import Homes, Offloaded
from graphshard.runtime.products import library
from graphshard.runtime.segments import SegmentFunction, compile_segments, forget_segments
from graphshard.runtime.traffic import sent_bytes
from graphshard.runtime.watch import Watch
from graphshard.units import human

logger = logging.getLogger("graphshard")

T = TypeVar("T")

Batches = Mapping[int, Sequence[Sequence[Tensor]]]
"""Per data-parallel rank, per micro-batch: the tensors of the batch in flattening order."""


@dataclass(frozen=True)
class StepResult:
    """What a step hands to the caller.

    ``loss`` is the 0-d loss of the lowest rank here that has one. ``outputs[dp_rank][name]`` has a tensor per
    micro-batch, or one if the epilogue made it; distributed, only ranks of the stages that make an output have it.
    """

    loss: Tensor | None = None
    outputs: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)


class Executor(ABC):
    """Runs plans over one mesh. ``ranks`` are those that live in this process; ``path`` is a folder for what they
    offload to files; ``cudagraphs``: segments are captured as CUDA graphs, where the device has such."""

    cure: ClassVar[str] = ValueLost.CURE  # what helps when a step has lost values

    def __init__(
        self,
        mesh: Mesh,
        ranks: Sequence[int],
        device: torch.device,
        measure_memory: bool = False,
        path: str | None = None,
        cudagraphs: bool = False,
    ) -> None:
        if device.type == "cpu" and path is not None:  # who moves values to files has no memory for gaps
            return_freed_memory()
        self.mesh = mesh
        self.ranks = tuple(ranks)
        self.device = device
        self.homes = Homes(device, path)
        self.stores: dict[int, dict[Ref, Value]] = {rank: {} for rank in self.ranks}
        self.lost: dict[int, dict[Ref, str]] = {rank: {} for rank in self.ranks}  # what is not whole, and why
        self.sent_bytes: dict[int, dict[str, int]] = {rank: {} for rank in self.ranks}  # by axis, all steps so far
        self.state_keys: frozenset[str] = frozenset()  # the optimizer state that exists, the same on every rank
        self.meters = {rank: make_meter(device, len(self.ranks)) for rank in self.ranks} if measure_memory else {}
        self.recorder = recorder_of(device) if cudagraphs else None
        if cudagraphs and self.recorder is None:
            logger.warning("graphshard: plan token 'cudagraphs' has no effect on %s; it needs a CUDA device", device)
        # On an accelerator torch keeps what is freed; and where memory is measured each value has some of its own.
        alone = device.type != "cpu" or measure_memory or self.recorder is not None
        self.arenas = {} if alone else {rank: Arena() for rank in self.ranks}
        self._shared: Mapping[str, Shared] = {}  # by axis, memory that ranks along it have in common
        self._loaded: dict[int, Loaded] = {}

    def choices(self) -> dict[str, str]:
        """What was chosen on this machine, for ``explain``."""
        graphs = [machine.graphs for loaded in self._loaded.values() for machine in loaded.machines.values()]
        told = {"CUDA graphs": "; ".join(one.told() for one in graphs if one is not None)} if any(graphs) else {}
        if self.device.type != "cpu":
            return self.homes.choices() | told
        return (self.homes.choices() | told) | {
            "large float32 products": library().value,
            "what a step makes": self._laid_out(),
        }

    def _laid_out(self) -> str:
        if not self.arenas:
            return "each value has memory of its own, to be measured"
        largest = max(arena.nbytes for arena in self.arenas.values())
        common = sum(shared.nbytes for shared in self._shared.values())
        told = f", and what is gathered or reduced in {human(common)} that ranks share" if common else ""
        return (
            f"in one block of {human(largest)} a rank{told}, laid out before the step; see graphshard/memory/arena.py"
        )

    def measured(self, plan: ExecutionPlan) -> dict[int, Measured]:
        """By rank, the memory that the last step of ``plan`` took, on ranks of other processes too; empty unless it was
        measured."""
        loaded = self._loaded.get(id(plan))
        return {} if loaded is None else dict(loaded.measured)

    def uncaptured(self, plan: ExecutionPlan) -> dict[str, str]:
        """The segments of ``plan`` that ranks here do not run as CUDA graphs though they were asked to, with the
        reason."""
        loaded = self._loaded.get(id(plan))
        machines = [] if loaded is None else loaded.machines.values()
        return uncaptured(machine.graphs for machine in machines if machine.graphs is not None)

    def told(self, mine: T, at: str) -> list[T]:
        """What each process has of something; collective: all processes call it. In one process, that one's alone.

        Args:
            at: what for, in a message about a process that does not come.
        """
        return [mine]

    @contextmanager
    def getting_ready(self) -> Iterator[None]:
        """Around what comes before a step, which does not follow if that fails: other processes need not wait."""
        try:
            yield
        except Exception as error:
            self._cannot_begin(error)
            raise

    def _cannot_begin(self, error: Exception) -> None:  # noqa: B027 - in one process nobody waits
        """Tell the other processes that this one does not take part in the step that they may be about to begin."""

    def load(self, plan: ExecutionPlan) -> Loaded:
        """Prove and prepare ``plan``; a plan loaded before is not prepared again.

        Raises:
            PlanError: the plan cannot run.
            OffloadSpace, OffloadPath: there is no room for what it offloads to files.
        """
        loaded = self._loaded.get(id(plan))
        if loaded is None:
            assert plan.mesh == self.mesh, f"the plan is for mesh {plan.mesh}, the executor for {self.mesh}"
            prove(plan)
            self.reserve(plan)
            functions: dict[int, dict[str, SegmentFunction]] = {}
            layouts: dict[tuple[int, bool], Layout] = {}
            machines = {}
            for rank in self.ranks:
                stage = self.mesh.coordinates(rank)["pp"]
                watch = Watch(plan.stages[stage].watched) if plan.watched else None
                if stage not in functions or watch is not None:  # each rank has a watch of its own
                    functions[stage] = self._functions(plan, stage, watch)
                machines[rank] = Machine(
                    plan,
                    rank,
                    self._communicator(rank),
                    functions[stage],
                    self.device,
                    self.homes,
                    self._placing(plan, rank, layouts),
                    meter=self.meters.get(rank),
                    watch=watch,
                    graphs=self._graphs(plan, rank),
                )
            constants = {name: value.to(self.device) for name, value in plan.constants.items()}
            feeds = {
                first: {
                    rank: sort_feed(self.mesh.dp_rank(rank), machine.reads[first], machine.results)
                    for rank, machine in machines.items()
                }
                for first in (False, True)
            }
            loaded = self._loaded[id(plan)] = Loaded(plan, machines, feeds, constants, plan.state_keys)
        return loaded

    def forget(self, plan: ExecutionPlan) -> None:
        """Let go of what :meth:`load` has prepared for ``plan``, which is not going to run any more."""
        loaded = self._loaded.pop(id(plan), None)
        if loaded is not None:
            forget_segments(loaded.plan, [other.plan for other in self._loaded.values()])

    def _placing(self, plan: ExecutionPlan, rank: int, layouts: dict[tuple[int, bool], Layout]) -> dict[bool, Placing]:
        """Where the rank's values lie, in the first step and in later ones; ``layouts`` by stage, for other ranks."""
        if rank not in self.arenas:
            return dict.fromkeys((False, True), Placing(self.device))
        stage = self.mesh.coordinates(rank)["pp"]
        for first in variants(plan):
            if (stage, first) not in layouts:
                layouts[stage, first] = lay_out(plan, stage, first, self._shared)
        placing = {
            first: Placing(self.device, self.arenas[rank], layouts[stage, first], self._shared)
            for first in variants(plan)
        }
        return {True: placing[False]} | placing

    def _graphs(self, plan: ExecutionPlan, rank: int) -> SegmentGraphs | None:
        """What records the segments of a rank."""
        if self.recorder is None:
            return None
        return graphs_of(plan, self.mesh.coordinates(rank)["pp"], self.recorder, rank in self.meters)

    def reserve(self, plan: ExecutionPlan) -> None:
        """Room for all that the ranks here ever keep off the device at once, before anything is stored there.

        Raises:
            OffloadSpace, OffloadPath: there is none in files.
        """
        stages = [self.mesh.coordinates(rank)["pp"] for rank in self.ranks]
        self.homes.reserve(
            {home: sum((offloaded(plan, stage, home) for stage in stages), Counter[int]()) for home in PLACES}
        )

    def step(
        self, plan: ExecutionPlan, batches: Batches, *, seed: int = 0, step: int = 0, lrs: Sequence[float] = ()
    ) -> StepResult:
        """Run one step on the data-parallel ranks of this process.

        Args:
            batches: for every data-parallel rank here its micro-batches.
            seed, step: with the data-parallel rank and the micro-batch they are the random key.
            lrs: learning rate of each parameter group.

        Raises:
            PlanError: the plan cannot run (first use).
            NoValue: a parameter or buffer has no value.
            ValueLost: it has none since a step before failed during its update, or loading did.
            NonFiniteStep: the plan is watched, and the loss or a gradient is not finite; what is stored is as it was.

        After any other error what the step had not begun to replace is stored as it was. The rest is lost, and the
        error says so.
        """
        with self.getting_ready():
            loaded = self.load(plan)
            # All ranks decide alike, also those that keep no state: the two epilogues may order collectives otherwise.
            first = not loaded.state_keys <= self.state_keys
            feeds = loaded.feeds[first]
            values = {
                rank: self._values(loaded, rank, feeds[rank], batches, (seed, step), lrs) for rank in self.ranks
            }  # before anything is taken from a store, so that a missing value leaves all as it was
        try:
            with self.getting_ready():
                for rank in self.ranks:
                    self._take(loaded.machines[rank], feeds[rank], values[rank])
            with torch.no_grad():
                results = self._run(loaded, values, first)
        except BaseException as error:
            self.homes.settle()
            if lost := self._put_back(loaded, values, first):
                add = error.add if isinstance(error, GraphshardError) else error.add_note
                add(ValueLost.of_step(lost, self.cure))
            raise
        for rank in self.ranks:
            totals = self.sent_bytes[rank]
            for axis, count in loaded.traffic(rank, first).items():
                totals[axis] = totals.get(axis, 0) + count
        kept = self._keep(loaded, results, first)
        if self.meters:
            self._compare(loaded)
        return kept

    def _compare(self, loaded: Loaded) -> None:
        """Learn what ranks of all processes have measured, where they run what the plan has for their stage: other
        shapes may be kept to a budget by other instructions."""
        mine = {rank: machine.measured for rank, machine in loaded.machines.items() if machine.measured is not None}
        for others in self.told(mine, "comparing what was measured"):
            for rank, step in others.items():
                stage = loaded.plan.stages[self.mesh.coordinates(rank)["pp"]]
                if len(step.rows) == len(stage.step(step.first)):
                    loaded.measured[rank] = step

    @abstractmethod
    def read(self, ref: Ref, stage: int, kind: TensorType, axis: str = "", everywhere: bool = True) -> Tensor | None:
        """The full value that the ranks of ``stage`` store under ``ref``; all ranks of the mesh call it together.

        Args:
            kind: the type of one rank's part.
            axis: the axis whose ranks hold one part each, joined along dim 0; "": data-parallel rank 0's is the value.
            everywhere: False: only rank 0 needs it, the others get None.
        """

    def stored(self, rank: int, ref: Ref) -> Tensor:
        """What a rank of this process stores under ``ref``, brought back if it is offloaded.

        Raises:
            NoValue, ValueLost: it stores nothing.
        """
        if ref not in self.stores[rank]:
            raise absent(ref.name, self.lost[rank].get(ref))
        value = self.stores[rank][ref]
        return self.homes.fetch(value) if isinstance(value, Offloaded) else value

    def lose(self, ref: Ref, stage: int) -> None:
        """Drop what the ranks of ``stage`` store under ``ref``: until it is written it counts as lost. Who writes
        several values that belong together loses all of them first, so that no failure leaves old beside new ones."""
        for rank in self._ranks_of(stage):
            self.stores[rank].pop(ref, None)
            self.lost[rank][ref] = ValueLost.LOADING

    def write(self, ref: Ref, stage: int, value: Tensor, axis: str = "", home: str = "") -> None:
        """Store a full value on the ranks of ``stage``: all of it, or over ``axis`` each its part of dim 0. ``home``:
        where it is kept; "": on the device."""
        for rank in self._ranks_of(stage):
            at = self.mesh.coordinates(rank)
            part = (value.chunk(self.mesh.size(axis))[at[axis]] if axis else value).detach()
            self.stores[rank][ref] = (
                self.homes.keep(part.to(self.device), home) if home else part.to(self.device, copy=True)
            )
            self.lost[rank].pop(ref, None)

    def _ranks_of(self, stage: int) -> list[int]:
        """The ranks of ``stage`` in this process."""
        return [rank for rank in self.ranks if self.mesh.coordinates(rank)["pp"] == stage]

    def close(self) -> None:
        """Give back what the executor holds outside of memory."""
        self.homes.close()

    @abstractmethod
    def _communicator(self, rank: int) -> Communicator:
        """The end of a rank of this process."""

    def _functions(self, plan: ExecutionPlan, stage: int, watch: Watch | None) -> dict[str, SegmentFunction]:
        """What the segments of a stage are called with; every value goes by ``watch``."""
        return compile_segments(plan.stages[stage].segments, plan.kernels, watch)

    @abstractmethod
    def _run(self, loaded: Loaded, values: dict[int, dict[Ref, Value]], first: bool) -> dict[int, dict[Ref, Value]]:
        """Run all ranks here to the end; ``values`` are emptied. ``first``: there is no optimizer state yet."""

    def _values(
        self, loaded: Loaded, rank: int, feed: Feed, batches: Batches, key: tuple[int, int], lrs: Sequence[float]
    ) -> dict[Ref, Value]:
        """What comes from outside the store; checks that the store has the rest."""
        values: dict[Ref, Value] = {}
        for part in feed.parts:
            values[part.ref] = self._typed(batches[feed.dp_rank][part.microbatch][part.index], part.kind, part.slot)
        for ref, microbatch in feed.keys:
            values[ref] = torch.tensor([*key, feed.dp_rank, microbatch], device="cpu")
        for ref, group in feed.lrs:
            values[ref] = torch.full((), lrs[group], dtype=torch.float64, device=self.device)  # a copy would block
        for ref, name in feed.constants:
            values[ref] = loaded.constants[name]
        store = self.stores[rank]
        for stored in (feed.kept, feed.taken):
            for ref, slot in stored:
                if ref not in store:
                    raise absent(_told(slot, loaded.plan.buckets), self.lost[rank].get(ref))
        return values

    def _put_back(self, loaded: Loaded, values: Mapping[int, dict[Ref, Value]], first: bool) -> str:
        """Store again what a failed step has not begun to replace; the rest in words, "" if there is none."""
        lost: set[Role] = set()
        for rank, machine in loaded.machines.items():
            reads, store = machine.reads[first], self.stores[rank]
            left = machine.abandon() | values[rank]
            store.update((ref, value) for ref, value in left.items() if reads[ref][0].role in STORED)
            gone = {ref: slot.role for ref, slot in loaded.feeds[first][rank].taken if ref not in store}
            self.lost[rank] |= dict.fromkeys(gone, ValueLost.UPDATE)
            lost |= set(gone.values())
        named = {Role.STATE: "optimizer state", Role.BUFFER: "buffers", Role.SCALER: "the loss scale"}
        return " and ".join(sorted({named.get(role, "parameters") for role in lost}))

    def _typed(self, value: Tensor, kind: TensorType, slot: Slot) -> Tensor:
        assert tuple(value.shape) == kind.shape and value.dtype == kind.dtype, f"{slot} is {kind}, given {value.shape}"
        # A view may only note that it is a conjugate or negative, which no graph knows of its inputs.
        value = value.detach().resolve_conj().resolve_neg()
        # Measured, a part of the batch has storage of its own, which goes when the step is done with it.
        if self.meters or value.device != self.device:
            value = value.to(self.device, non_blocking=True, copy=bool(self.meters))
        if value.stride() != kind.stride:
            value = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self.device).copy_(value)
        return value

    def _take(self, machine: Machine, feed: Feed, values: dict[Ref, Value]) -> None:
        """Add to ``values`` what the store holds. A value that the step replaces leaves the store, so that its last use
        frees it."""
        store = self.stores[machine.rank]
        for ref, home in machine.homes.items():  # it may have been stored before any plan said where
            value = store.get(ref)
            if isinstance(value, Tensor):
                store[ref] = self.homes.keep(value, home)
        for ref, _ in feed.kept:
            values[ref] = store[ref]
        for ref, _ in feed.taken:
            values[ref] = store.pop(ref)

    def _keep(self, loaded: Loaded, results: Mapping[int, Mapping[Ref, Value]], first: bool) -> StepResult:
        loss: Tensor | None = None
        outputs: dict[int, dict[str, list[Tensor]]] = {}
        # A first step that loss scaling skips was none for the optimizer: the next one begins its state.
        made = first and not any(bool(results[rank].get(slot_ref(SKIPPED), False)) for rank in self.ranks)
        for rank in self.ranks:
            mine: dict[str, list[Tensor]] = {}
            for ref, slot in loaded.machines[rank].results.items():
                value = results[rank][ref]
                if slot.role is Role.LOSS and isinstance(value, Tensor):
                    loss = value if loss is None else loss
                elif slot.role is Role.OUTPUT and isinstance(value, Tensor):
                    mine.setdefault(slot.name, []).append(value)  # micro-batches are listed in order
                elif made or not first or slot.role is not Role.STATE:
                    self.stores[rank][ref] = value
            dp_rank = loaded.feeds[first][rank].dp_rank
            outputs[dp_rank] = mine | outputs.get(dp_rank, {})  # several stages may have it: the first one's counts
        loaded.steps += 1
        self.state_keys |= loaded.state_keys if made else frozenset()
        return StepResult(loss, outputs)


def absent(name: str, why: str | None) -> GraphshardError:
    """What to raise where a store lacks a value. ``why``: what has lost it; None: it never had one."""
    return NoValue(name) if why is None else ValueLost(name, why)


def _told(slot: Slot, buckets: Mapping[str, Bucket]) -> str:
    """The slot, and of a bucket a parameter that a user knows it by."""
    if slot.name not in buckets:
        return str(slot)
    (name, _), *others = buckets[slot.name].members
    return f"{slot} ({name}{f' and {len(others)} more' if others else ''})"


@dataclass
class Loaded:
    """A plan made ready: a machine for each rank of this process."""

    plan: ExecutionPlan
    machines: dict[int, Machine]
    feeds: dict[bool, dict[int, Feed]]  # by whether it is a first step, then by rank
    constants: dict[str, Tensor]
    state_keys: frozenset[str]  # the optimizer state that its first-step epilogue makes; empty without one
    steps: int = 0  # how often it ran
    measured: dict[int, Measured] = field(default_factory=dict)  # the last step, by rank; those of all processes
    _traffic: dict[tuple[int, bool], dict[str, int]] = field(default_factory=dict)

    def traffic(self, rank: int, first: bool) -> dict[str, int]:
        """Bytes ``rank`` sends in a step, by axis."""
        if (rank, first) not in self._traffic:
            self._traffic[rank, first] = sent_bytes(self.plan, rank, first)
        return self._traffic[rank, first]

    def instruction_of(self, rank: int) -> str:
        """The instruction ``rank`` is at."""
        return self.machines[rank].describe()
