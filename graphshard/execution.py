"""The execution plan: what every rank does in a step, as data. codegen makes it, runtime runs it, prove.py proves it.

All data-parallel ranks of a stage run the same instructions, so a plan holds one list per stage. Values live in a
rank's environment under a :class:`Ref`; storage that outlives a step (parameters, state, buffers) is a Ref too, named
by its slot, with no micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch

from graphshard.mesh import Mesh
from graphshard.program import Bucket, Param, Role, Slot


class Op(StrEnum):
    RUN = "RUN"  # run a segment
    GATHER = "GATHER"  # start an all-gather
    REDUCE = "REDUCE"  # start a reduce-scatter, an all-reduce or a broadcast
    SEND = "SEND"  # start sending to another stage
    RECV = "RECV"  # start receiving from another stage
    WAIT = "WAIT"  # block until the communication that makes this value (for a send: that reads it) is complete
    OFFLOAD = "OFFLOAD"  # start moving a value from the device to where it is kept meanwhile
    RELOAD = "RELOAD"  # start bringing it back
    FREE = "FREE"  # forget values
    BIND = "BIND"  # give a value a second name: what a carry or a slot becomes; costs nothing


MOVES = (Op.OFFLOAD, Op.RELOAD)


class Ref(tuple[str, int | None]):
    """A value in a rank's environment: its name, and its micro-batch, None for values that are not per micro-batch."""

    __slots__ = ()

    def __new__(cls, name: str, microbatch: int | None = None) -> Ref:
        return super().__new__(cls, (name, microbatch))

    @property
    def name(self) -> str:
        return self[0]

    @property
    def microbatch(self) -> int | None:
        return self[1]

    def __str__(self) -> str:
        return f"%{self[0]}" if self[1] is None else f"%{self[0]}.{self[1]}"


@dataclass(frozen=True)
class TensorType:
    """Shape, dtype and strides (in elements) of a value; static."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        result = 1
        for size in self.shape:
            result *= size
        return result

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def storage_bytes(self) -> int:
        """Bytes from the first element to behind the last."""
        if not self.numel:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}".replace(" ", "")


def type_of(value: torch.Tensor) -> TensorType:
    """The type of a tensor, fake ones included."""
    return TensorType(tuple(value.shape), value.dtype, tuple(value.stride()))


@dataclass(frozen=True)
class Instruction:
    """One step of one rank.

    RUN: ``name`` is the segment; it reads ``inputs`` and defines ``outputs``; those in ``last`` are read for the last
    time and are handed over; with ``device`` "host" these are kept in host memory, where the CPU computes. GATHER and
    REDUCE: ``name`` is the collective ("all_gather", "reduce_scatter", "all_reduce", "broadcast"), over ``axis``; one
    input, one output; ``peer`` is a broadcast's source coordinate. SEND has one input and RECV one output; ``peer`` is
    the other stage. WAIT: ``inputs`` holds the one value waited for (of a SEND, what is sent). A collective's or RECV's
    output may be read only after its WAIT; a SEND's input may be freed only after its WAIT. OFFLOAD and RELOAD:
    ``name`` is where to, or where from ("cpu", "nvme"); one input, one output, under the same rules; of an OFFLOAD's
    output nothing but RELOAD and the host read. If it, or an output of the host, names an offloaded value that is
    there, it replaces that in its place. FREE: ``inputs`` are forgotten. BIND: the value of ``inputs[i]`` becomes that
    of ``outputs[i]``, all at once.
    """

    op: Op
    name: str = ""
    inputs: tuple[Ref, ...] = ()
    outputs: tuple[Ref, ...] = ()
    last: frozenset[Ref] = frozenset()
    axis: str = ""
    peer: int | None = None
    type: TensorType | None = None  # of what is sent or received; of a collective's input
    action: str = ""  # the schedule's action this belongs to: "F0.3", "B1.2", "epilogue"
    bucket: str = ""  # the parameter bucket a GATHER or REDUCE is for, for messages
    made_by: str = ""  # the pass or schedule that put it there
    device: str = ""  # of a RUN: program.HOST, or the rank's device

    def __str__(self) -> str:
        words = [str(self.op)]
        words += [self.name] if self.name else []
        words += [f"on {self.device}"] if self.device else []
        words += [",".join(map(str, self.inputs))] if self.inputs else []
        words += ["->", ",".join(map(str, self.outputs))] if self.outputs else []
        words += [f"over {self.axis}"] if self.axis else []
        words += [f"stage {self.peer}"] if self.peer is not None else []
        words += [str(self.type)] if self.type is not None else []
        return f"{self.action:10} " + " ".join(words)


@dataclass(frozen=True)
class Workspace:
    """What a segment holds beside its inputs while it runs, outputs included, in bytes of storages.

    Its run is cut into intervals where it lets go of inputs: ``held[i]`` is the most in interval i, and input k, where
    nobody else holds it, goes at the end of interval ``released[k]``; ``len(held)``: not before the segment ends, or an
    output lives in its storage. Without an account, (): none is released.
    """

    held: tuple[int, ...] = (0,)
    released: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """Memory that a segment's code asks for as a tensor of ``type``: it is written from item ``born`` of the code on,
    and not read behind item ``died``; the last item is the return. ``outputs``: those that live in it from then on."""

    type: TensorType
    born: int
    died: int
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Straight-line compute code: Python source of one function ``def <name>(args, coordinates, device, memory)``.

    ``args`` is a list of the inputs in order, which the function empties; it returns a tuple of the outputs;
    ``coordinates`` maps mesh axis to this rank's coordinate; ``memory(k)`` is a tensor for the k-th of ``places``, with
    any contents. Types are in the order of the names; (): not declared. Input k is read until item ``ends[k]`` of the
    code; (): any of them may be to the end. ``aliases``: pairs of an output and the input whose storage it lives in.
    """

    name: str
    source: str
    inputs: tuple[str, ...]  # value names, as in the graph
    outputs: tuple[str, ...]
    input_types: tuple[TensorType, ...] = ()
    output_types: tuple[TensorType, ...] = ()
    workspace: Workspace = Workspace()
    places: tuple[Place, ...] = ()
    ends: tuple[int, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()

    @property
    def items(self) -> int:
        """How many items the code has, as far as places and inputs tell."""
        return 1 + max((*(place.died for place in self.places), *self.ends), default=0)


@dataclass(frozen=True)
class Kernel:
    """A region as code: Python source that defines a function ``name``, which takes the inputs and returns the result,
    or a tuple of several. Segments call it as ``kernels.<name>``; one of torch's operators takes memory for result i
    as ``out<i>``, too."""

    name: str
    source: str
    language: str = "torch"  # what the source is written in: torch's operators, or "triton"
    how: str = ""  # by what blocks, for people
    workspace_bytes: int = 0  # what it takes while it runs, beside inputs and results


CATEGORIES = (
    "parameters",
    "gathered parameters",
    "gradients",
    "optimizer state",
    "saved activations",
    "transfers",
    "workspace",
    "batch",
)
"""What a rank's memory is for. Saved activations: made by the forward and read by the backward. Workspace: all that no
other names, such as what a segment makes for itself, and its results until it ends."""


OFFLOADED = "offloaded to "
"""How the category of what is kept off the device begins; its home follows."""


@dataclass(frozen=True)
class Storage:
    """The memory a value lives in: values of one ``root`` share it."""

    root: Ref  # with micro-batch 0 where there is one per micro-batch
    nbytes: int
    category: str  # one of CATEGORIES; of what is not on the device, OFFLOADED and its home

    def of(self, microbatch: int | None) -> Ref:
        """The root for one micro-batch."""
        return self.root if self.root.microbatch is None else Ref(self.root.name, microbatch)


SUM = "a sum of losses or gradients"


@dataclass(frozen=True)
class Watched:
    """A value of the body that a plan with ``debug_nan`` looks at, and what its values are made of.

    ``reads``: (stage, name) of the values that it is computed from on the same data-parallel rank. ``given``: what it
    is when the step did not compute it, such as ``parameter 'lin.weight'``. ``result``: what it is to the step, such as
    ``the loss``. ``carried``: of what one micro-batch leaves to the next, the name of the value it left.
    """

    text: str
    phase: str
    module: str = ""
    source: str = ""  # line of the model's code, "file:line"
    reads: tuple[tuple[int, str], ...] = ()
    infinite: bool = False  # the program itself says so: an operand is written as infinity
    given: str = ""
    result: str = ""
    carried: str = ""


@dataclass(frozen=True)
class StagePlan:
    """What the ranks of one pipeline stage do.

    A step is ``prologue``, ``body``, then ``epilogue``, or ``first_epilogue`` (None: the same) while the optimizer has
    no state.
    """

    prologue: tuple[Instruction, ...]
    body: tuple[Instruction, ...]
    epilogue: tuple[Instruction, ...]
    first_epilogue: tuple[Instruction, ...] | None = None
    segments: dict[str, Segment] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)  # by the name of a value's Ref
    homes: dict[Ref, str] = field(default_factory=dict)  # slots that are kept off the device: where, see homes.py
    watched: dict[str, Watched] = field(default_factory=dict)  # what segments show to ``watch``, by name

    def step(self, first: bool = False) -> tuple[Instruction, ...]:
        """All instructions of a step in order."""
        end = self.first_epilogue if first and self.first_epilogue is not None else self.epilogue
        return self.prologue + self.body + end


@dataclass(frozen=True)
class ExecutionPlan:
    """Every rank's instructions and what they read and leave behind.

    ``reads``: the slots a stage reads that outlive the step or come from outside (parameters, buffers, state, batch,
    lr, rng, constants), with their types. The Ref of a slot is :func:`slot_ref`. ``results``: slots the step defines:
    LOSS and OUTPUT ones are handed to the caller, the others replace what was stored.
    """

    mesh: Mesh
    stages: tuple[StagePlan, ...]
    microbatches: int
    schedule: str  # the schedule's text form
    reads: tuple[dict[Slot, TensorType], ...]  # per stage
    results: tuple[dict[Slot, TensorType], ...]  # per stage
    params: dict[str, Param]
    buckets: dict[str, Bucket]
    constants: dict[str, torch.Tensor]
    kernels: dict[str, Kernel] = field(default_factory=dict)  # what segments call, by name
    unfused: dict[str, int] = field(default_factory=dict)  # regions without a kernel: what and why, how many
    peak_bytes: tuple[int, ...] = ()  # per stage: the most a rank holds, see memory/simulate.py; (): not stated

    @property
    def state_keys(self) -> frozenset[str]:
        """What the first-step epilogue makes for later steps, on any stage: "exp_avg", "step", …; empty without one."""
        if all(stage.first_epilogue is None for stage in self.stages):
            return frozenset()
        return frozenset(slot.key for slots in self.reads for slot in slots if slot.role is Role.STATE)

    @property
    def watched(self) -> bool:
        """Whether segments show their values; see runtime/watch.py."""
        return any(stage.watched for stage in self.stages)

    def of_rank(self, rank: int) -> StagePlan:
        """The plan of one rank."""
        return self.stages[self.mesh.coordinates(rank)["pp"]]

    def __str__(self) -> str:
        lines = [f"mesh {self.mesh}", f"microbatches {self.microbatches}"]
        lines += [f"stage {stage}: at most {peak} bytes a rank" for stage, peak in enumerate(self.peak_bytes)]
        for i, stage_plan in enumerate(self.stages):
            for part in ("prologue", "body", "epilogue", "first_epilogue"):
                instructions = getattr(stage_plan, part)
                if instructions:
                    lines += [f"stage {i} {part}:", *(f"  {ins}" for ins in instructions)]
        return "\n".join(lines) + "\n"


def slot_ref(slot: Slot, microbatch: int | None = None) -> Ref:
    """Where the value of ``slot`` lives in a rank's environment. ``microbatch`` is given for BATCH and RNG slots, and
    for OUTPUT ones."""
    return Ref(f"{slot.role}:{slot.name}" + (f":{slot.key}" if slot.key else ""), microbatch)


def owner_of(move: Instruction) -> str:
    """The bucket that is offloaded or reloaded, or the activation."""
    kept = (move.outputs if move.op is Op.OFFLOAD else move.inputs)[0]
    return kept.name.split(":")[1] if ":" in kept.name else str(kept)


def made_type(ins: Instruction, given: TensorType, mesh: Mesh) -> TensorType:
    """The type of what a communication makes; ``given`` is the instruction's own."""
    if not ins.axis or ins.name in ("all_reduce", "broadcast"):
        return given
    size = mesh.size(ins.axis)
    head = given.shape[0] * size if ins.op is Op.GATHER else given.shape[0] // size
    return replace(given, shape=(head, *given.shape[1:]))


def match_waits(instructions: Sequence[Instruction]) -> dict[int, int]:
    """Position of each WAIT to that of the communication it completes: the oldest one outstanding that makes the value,
    or sends it (to the WAIT's ``peer``, if it names one). A WAIT for nothing is left out."""
    outstanding: dict[Ref, list[int]] = {}
    result: dict[int, int] = {}
    for position, ins in enumerate(instructions):
        if ins.op in (Op.GATHER, Op.REDUCE, Op.RECV, *MOVES):
            outstanding.setdefault(ins.outputs[0], []).append(position)
        elif ins.op is Op.SEND:
            outstanding.setdefault(ins.inputs[0], []).append(position)
        elif ins.op is Op.WAIT:
            candidates = outstanding.get(ins.inputs[0], [])
            chosen = next((at for at in candidates if ins.peer is None or instructions[at].peer == ins.peer), None)
            if chosen is not None:
                candidates.remove(chosen)
                result[position] = chosen
    return result


def variants(plan: ExecutionPlan) -> tuple[bool, ...]:
    """The steps there are: later ones (False), and the first one (True) if it ends otherwise."""
    return (False, True) if any(stage.first_epilogue is not None for stage in plan.stages) else (False,)


def read_refs(plan: ExecutionPlan, stage: int, first: bool) -> dict[Ref, tuple[Slot, TensorType]]:
    """What a stage finds in its environment when a step begins; without optimizer state in the first one."""
    result = {}
    for slot, kind in plan.reads[stage].items():
        if slot.role is Role.STATE and first:
            continue
        for microbatch in range(plan.microbatches) if slot.role in (Role.BATCH, Role.RNG) else (None,):
            result[slot_ref(slot, microbatch)] = (slot, kind)
    return result


def result_refs(plan: ExecutionPlan, stage: int) -> dict[Ref, Slot]:
    """What a stage must have defined when a step ends. An OUTPUT is one value per micro-batch if the body makes it, one
    value (a gradient that the epilogue hands out) otherwise."""
    made = {ref for ins in plan.stages[stage].body for ref in ins.outputs}
    result = {}
    for slot in plan.results[stage]:
        per_microbatch = slot.role is Role.OUTPUT and slot_ref(slot, 0) in made
        for microbatch in range(plan.microbatches) if per_microbatch else (None,):
            result[slot_ref(slot, microbatch)] = slot
    return result
