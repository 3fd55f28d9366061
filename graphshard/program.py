"""The intermediate representation: a Program is three fx graphs, what their inputs and outputs stand for, and a mesh.

The three graphs are the three places where work can happen in a step: ``prologue`` once before the micro-batches,
``body`` once per micro-batch (forward and backward in one joint graph), ``epilogue`` once after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

import graphshard.ops  # noqa: F401  a graph may hold any of its operators
from graphshard.mesh import Mesh


class Role(StrEnum):
    """What a graph input or output stands for."""

    PARAM = "param"  # a whole parameter of the model, named by its canonical fully qualified name
    MASTER = "master"  # the float32 copy of a parameter or bucket that is computed with in less; the update's
    FLAT = "flat"  # a whole bucket of parameters, flat, replicated over the shard axis
    SHARD = "shard"  # this rank's part of a bucket
    BUFFER = "buffer"  # a buffer of the model
    STATE = "state"  # optimizer state; ``key`` says which ("exp_avg"), ``name`` the parameter or bucket
    SCALER = "scaler"  # of loss scaling: see loss_scaling.py
    CARRY = "carry"  # handed from prologue to body, micro-batch to micro-batch, body to epilogue
    BATCH = "batch"  # a tensor the user gave to step; ``name`` is its index in flattening order
    CONSTANT = "constant"  # a tensor lifted out of the model's code; its value is in Program.constants
    LR = "lr"  # learning rate of a parameter group (``name`` is the index), float64 scalar
    RNG = "rng"  # the random key: int64[4] of (seed, step, data-parallel rank, micro-batch)
    LOSS = "loss"  # the step's loss, a scalar
    OUTPUT = "output"  # a tensor of the model's output; ``name`` is its index in flattening order


@dataclass(frozen=True, order=True)
class Slot:
    """The name of a storage place that a graph reads (as a placeholder) or writes (as an output).

    The same slot as an input of one graph and an output of another is how values get from one to the other.
    ``stage`` tells replicas apart: a tied weight that two stages hold is two slots of one name.
    """

    role: Role
    name: str
    key: str = ""
    stage: int = 0  # pipeline stage that holds it; 0 before pipeline-cut

    def __str__(self) -> str:
        """``param "h.0.weight"``, ``state "h.0.weight" exp_avg @1``."""
        words = [str(self.role), f'"{self.name}"']
        words += [self.key] if self.key else []
        words += [f"@{self.stage}"] if self.stage else []
        return " ".join(words)


class Phase(StrEnum):
    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight"  # backward work that no earlier stage waits for
    UPDATE = "update"  # prologue and epilogue


class MemoryTag(StrEnum):
    SAVE = "save"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    OFFLOAD_TO_FILE = "offload-to-file"


HOST = "host"
"""What ``NodeInfo.device`` says of an operation that the CPU computes, in host memory, whatever the device is."""


@dataclass(frozen=True)
class NodeInfo:
    """The one metadata record of a node, at ``node.meta["info"]``; its fake value is at ``node.meta["val"]``."""

    phase: Phase = Phase.FORWARD
    module: str = ""  # path of the model's module that the node comes from
    origin: str = ""  # the captured node this one stems from; stable through rewrites; "" for nodes a pass made
    forward: str = ""  # for a backward node: origin of the forward node it differentiates; "" where there is none
    stage: int | None = None  # None before pipeline-cut, and for values that every stage has
    tag: MemoryTag | None = None
    layout: str = ""  # how the value is laid out over mesh axes: "", "dp:flat", "dp:partial"; see analysis.py
    device: str = ""  # HOST; "": the rank's device
    as_given: bool = False  # no plan's precision is for it: the model has turned autocast off there, or a hook made it
    made_by: str = ""  # the pass that made the node; "" for captured ones


@dataclass(eq=False)
class Section:
    """One of the graphs with its signature. Placeholders come first; the output node returns a flat tuple."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[fx.Node, Slot] = field(default_factory=dict)
    output_slots: list[Slot] = field(default_factory=list)

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def outputs(self) -> dict[Slot, fx.Node]:
        """Output slot to the node that is written there, in order."""
        values: Any = self.output_node.args[0]
        return dict(zip(self.output_slots, values, strict=True))

    @property
    def input_slots(self) -> dict[Slot, fx.Node]:
        """Input slot to its placeholder, in order."""
        return {slot: node for node, slot in self.inputs.items()}

    def nodes(self) -> Iterator[fx.Node]:
        """The operations: neither placeholders nor the output."""
        return (n for n in self.graph.nodes if n.op == "call_function")


def empty_section() -> Section:
    """A section that reads and returns nothing."""
    section = Section()
    section.graph.output(())
    return section


@dataclass(frozen=True)
class Param:
    """What the compiler knows of one parameter, whatever storage it lives in."""

    name: str  # canonical name
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...] = ()  # further names of the same tensor (tied weights)
    group: int | None = None  # index of its optimizer parameter group; None: not optimized
    has_grad: bool = True  # False: frozen, or unused by the loss: never updated
    stages: tuple[int, ...] = (0,)  # the stages that hold it; the first one counts it in norms and state

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Flat storage of several parameters: each at its offset, padded at the end to a multiple of ``parts``."""

    name: str
    dtype: torch.dtype
    numel: int  # elements, padding included
    members: tuple[tuple[str, int], ...]  # (parameter name, offset in elements), ascending
    axis: str = "dp"  # the mesh axis it is sharded over
    parts: int = 1  # number of shards; 1: replicated
    stage: int = 0
    store: Role = Role.FLAT  # FLAT: every rank of the axis keeps the whole bucket between steps; SHARD: its own part

    @property
    def shard_numel(self) -> int:
        return self.numel // self.parts


class Level(StrEnum):
    """How far a program has come; verify.py says what may exist at each."""

    CAPTURED = "captured"
    STAGED = "staged"
    SHARDED = "sharded"


@dataclass(frozen=True)
class PassRecord:
    """What the driver notes of one pass."""

    name: str
    options: str
    seconds: float
    nodes: int  # operations after it, all graphs
    changes: Mapping[str, int] = field(default_factory=dict, compare=False)  # how many more there are, by kind


@dataclass
class Program:
    """The unit passes work on. ``first_epilogue`` replaces ``epilogue`` when no optimizer state exists yet."""

    body: Section
    prologue: Section = field(default_factory=empty_section)
    epilogue: Section = field(default_factory=empty_section)
    first_epilogue: Section | None = None
    mesh: Mesh = field(default_factory=Mesh)
    level: Level = Level.CAPTURED
    microbatches: int = 1  # per step and data-parallel rank
    params: dict[str, Param] = field(default_factory=dict)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    # Origin of a captured forward node to the line of the model that made it, "model.py:12"; no part of the text.
    sources: Mapping[str, str] = field(default_factory=dict)
    history: tuple[PassRecord, ...] = ()

    @property
    def stages(self) -> int:
        return self.mesh.size("pp")

    def sections(self) -> dict[str, Section]:
        """The graphs by name, in execution order."""
        named = {"prologue": self.prologue, "body": self.body, "epilogue": self.epilogue}
        if self.first_epilogue is not None:
            named["first_epilogue"] = self.first_epilogue
        return named

    def updates(self) -> list[Section]:
        """The epilogue and, where there is one, its first-step variant."""
        return [self.epilogue] + ([self.first_epilogue] if self.first_epilogue is not None else [])


def info(node: fx.Node) -> NodeInfo:
    """The metadata record of ``node``."""
    record: NodeInfo = node.meta["info"]
    return record


def source_line(sources: Mapping[str, str], record: NodeInfo) -> str:
    """Where in the model's code a node comes from, a backward node where its forward node does; "" if nothing says."""
    if record.phase is Phase.UPDATE:
        return ""  # origins of the update are of another trace
    return sources.get(record.origin) or sources.get(record.forward, "")


def set_info(node: fx.Node, **changes: Any) -> None:
    """Replace fields of the metadata record of ``node``."""
    node.meta["info"] = replace(info(node), **changes)


def val(node: fx.Node) -> Any:
    """The fake value of ``node``: a FakeTensor, or a tuple of them for an operator with several results."""
    return node.meta["val"]


def copy_node(graph: fx.Graph, node: fx.Node, remap: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Copy ``node``, with its metadata, to the insertion point of ``graph``; ``remap`` says what its inputs are there,
    and may insert them.

    As ``fx.Graph.node_copy``, in half its time: that looks at all arguments for symbolic numbers, of which a program
    has none, unless a node gets its arguments later.
    """
    args, kwargs = map_arg(node.args, remap), map_arg(node.kwargs, remap)
    copy = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    copy.args = args
    if kwargs:
        copy.kwargs = kwargs
    copy.meta = dict(node.meta)
    return copy


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a value, which may be a nested tuple or list, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in value for leaf in tensors(item)] if isinstance(value, (tuple, list)) else []
