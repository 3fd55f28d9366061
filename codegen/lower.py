"""From a sharded Program and a schedule to an ExecutionPlan.

Every stage's share of the body is split by phase into the streams of its schedule actions (F, B, W), each stream is cut
into segments at its communication nodes, and the schedule's actions instantiate the streams once per micro-batch.
Liveness is computed last, over the finished list, so that a value is handed over or freed exactly at its last use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from graphshard.analysis import cost, flops_per_moved_byte
from graphshard.codegen.accumulation import Sums, sums_of
from graphshard.codegen.distance import Clock
from graphshard.codegen.kernels import Kernels
from graphshard.codegen.order import Memory, Parts, order
from graphshard.codegen.schedule import Schedule
from graphshard.codegen.segments import emit
from graphshard.codegen.sends import Ahead, sent_ahead
from graphshard.codegen.storages import category, saved_roots
from graphshard.codegen.watched import watched
from graphshard.codegen.workspace import storage_bytes
from graphshard.communication import MOVES
from graphshard.dataflow import is_getitem, resolve, storage_root, upstream
from graphshard.execution import (
    OFFLOADED,
    ExecutionPlan,
    Instruction,
    Op,
    Ref,
    Segment,
    StagePlan,
    Storage,
    TensorType,
    Workspace,
    slot_ref,
    type_of,
    variants,
)
from graphshard.homes import homes, on_host
from graphshard.memory.simulate import simulate_memory, simulated
from graphshard.program import HOST, Level, Phase, Program, Role, Section, Slot, info, val

c10d = torch.ops._c10d_functional
gs = torch.ops.graphshard

_COLLECTIVES = {
    c10d.all_gather_into_tensor.default: (Op.GATHER, "all_gather"),
    c10d.reduce_scatter_tensor.default: (Op.REDUCE, "reduce_scatter"),
    c10d.all_reduce.default: (Op.REDUCE, "all_reduce"),
    c10d.broadcast.default: (Op.REDUCE, "broadcast"),
}
_STAGE_COLLECTIVES = (gs.stage_sum.default, gs.stage_broadcast.default)
_KEPT = (Role.PARAM, Role.MASTER, Role.STATE, Role.FLAT, Role.SHARD)
_PER_MICROBATCH = (Role.BATCH, Role.RNG, Role.OUTPUT)


def lower(program: Program, schedule: Schedule, watch: bool = False, on_gpu: bool = False) -> ExecutionPlan:
    """The plan of ``program`` run by ``schedule``; shapes, sizes and peers are all fixed here. ``watch``: segments of
    the body show their values, so that what makes a NaN can be told. ``on_gpu``: regions become Triton kernels."""
    assert program.level is Level.SHARDED, f"lowering needs a sharded program, not a {program.level} one"
    kernels = Kernels(on_gpu)
    program = kernels.chosen(program)
    moved = (node for node in program.body.nodes() if node.target is gs.transfer.default)
    ahead = sent_ahead(schedule, Counter((_kind(node), *node.args[1:]) for node in moved))  # type: ignore[misc]
    lowered = [_StageLowering(program, stage, schedule, watch, kernels, ahead) for stage in range(program.stages)]
    plan = _plan(program, schedule, lowered, [item.run() for item in lowered])
    peaks = [max(simulate_memory(plan, s, f).peak_bytes for f in variants(plan)) for s in range(program.stages)]
    return replace(plan, peak_bytes=tuple(peaks))


def _plan(
    program: Program, schedule: Schedule, lowered: Sequence[_StageLowering], stages: Sequence[StagePlan]
) -> ExecutionPlan:
    """A plan of these stages, which may be some of the program's."""
    return ExecutionPlan(
        mesh=program.mesh,
        stages=tuple(stages),
        microbatches=program.microbatches,
        schedule=str(schedule),
        reads=tuple(item.reads for item in lowered),
        results=tuple(item.results for item in lowered),
        params=program.params,
        buckets=program.buckets,
        constants=program.constants,
        kernels=lowered[0].kernels.table,
        unfused=dict(lowered[0].kernels.left),
    )


@dataclass
class _Piece:
    """One item of a stream: a segment to run, or one communication node."""

    kind: str  # "run", "issue", "wait", "send", "recv"
    node: fx.Node | None = None
    segment: str = ""
    first_segment: str = ""  # the variant for the first micro-batch, which overwrites accumulators
    inputs: list[fx.Node] = field(default_factory=list)
    first_inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    device: str = ""  # that runs it


class _StageLowering:
    def __init__(
        self, program: Program, stage: int, schedule: Schedule, watch: bool, kernels: Kernels, ahead: Ahead
    ) -> None:
        self.kernels, self.ahead = kernels, ahead
        self.program, self.stage, self.schedule, self.watch = program, stage, schedule, watch
        self.segments: dict[str, Segment] = {}
        self.work: dict[str, float] = {}  # what each segment takes, in FLOPs
        self.storages: dict[str, Storage] = {}
        self.reused: dict[fx.Node, fx.Node] = {}  # results to the value whose storage they take
        self.reads: dict[Slot, TensorType] = {}
        self.results: dict[Slot, TensorType] = {}
        self.homes = homes(program)
        self.beside: dict[fx.Node, list[fx.Node]] = {}  # by a value that a segment makes, all that the segment reads
        self.initialised: set[Slot] = set()  # carries the first micro-batch overwrites: the prologue need not

    def run(self) -> StagePlan:
        body = self._body()
        prologue = self._once(self.program.prologue, "prologue", "p.", skip=self.initialised)
        epilogue = self._once(self.program.epilogue, "epilogue", "e.")
        first = None
        if self.program.first_epilogue is not None:
            first = self._once(self.program.first_epilogue, "epilogue", "e1.")
        # A step that is watched is judged between its backward and its update.
        memory = None if self.watch else Memory(self.storages, self._held, Clock(self.work, self._moving))
        return self._stage_plan(order(prologue, body, epilogue, first, memory, self.ahead))

    def _stage_plan(self, parts: Parts) -> StagePlan:
        prologue, body, epilogue, first = parts
        return StagePlan(
            prologue=tuple(prologue),
            body=tuple(body),
            epilogue=tuple(epilogue),
            first_epilogue=None if first is None else tuple(first),
            segments=self.segments,
            storages=self.storages,
            homes={slot_ref(s): home for s, home in self.homes.items() if s in {*self.reads, *self.results}},
            watched=watched(self.program, self.stage, self._mine(self.program.body)) if self.watch else {},
        )

    def _held(self, parts: Parts) -> list[list[int]]:
        """Bytes at each instruction of a later step, and of the first one if it ends otherwise."""
        plan = _plan(self.program, self.schedule, [self], [self._stage_plan(parts)])
        return [[sum(now.values()) for now in simulated(plan, 0, first)] for first in variants(plan)]

    def _moving(self, move: Instruction) -> float:
        """What a copy takes, in FLOPs."""
        assert move.type is not None
        return flops_per_moved_byte(move.name, self.kernels.on_gpu) * move.type.nbytes

    # Streams

    def _mine(self, section: Section) -> list[fx.Node]:
        """This stage's nodes in order, getitems right behind what they pick from; dead ones left out."""
        chosen: list[fx.Node] = []
        for node in section.nodes():
            if node.target is gs.transfer.default:
                if self.stage in node.args[1:]:
                    chosen.append(node)
            elif info(node).stage in (self.stage, None) and not is_getitem(node):
                chosen.append(node)
                chosen += [user for user in node.users if is_getitem(user)]
        roots = [n for s, n in section.outputs.items() if self._is_mine(s, n)]
        roots += [n for n in chosen if n.target is gs.transfer.default or n.target in _STAGE_COLLECTIVES]
        needed = upstream(roots, stop=lambda n: info(n).stage not in (self.stage, None))
        return [n for n in chosen if n in needed]

    def _is_mine(self, slot: Slot, node: fx.Node) -> bool:
        """Whether this stage keeps or hands out an output of a graph. What every stage can compute, as a state that
        depends on the learning rate alone, is kept where its slot is."""
        stage = slot.stage if info(node).stage is None and slot.role in _KEPT else info(node).stage
        return stage in (self.stage, None)

    def _pieces(self, nodes: list[fx.Node], prefix: str, ends: Collection[fx.Node] = ()) -> list[_Piece]:
        """Cut one stream at its communication nodes, and behind ``ends``."""
        pieces: list[_Piece] = []
        run: list[fx.Node] = []
        issued: list[fx.Node] = []  # stage collectives, which have no wait in the graph

        def flush() -> None:
            if run:
                pieces.append(_Piece("run", segment=f"{prefix}_{len(pieces)}", outputs=list(run)))
                run.clear()

        def wait(nodes: list[fx.Node]) -> None:
            if nodes:
                flush()
            for node in nodes:
                pieces.append(_Piece("wait", node))
                issued.remove(node)

        for node in nodes:
            wait([source for source in node.all_input_nodes if source in issued])
            if node.target in _COLLECTIVES or node.target in _STAGE_COLLECTIVES or node.target in MOVES:
                flush()
                pieces.append(_Piece("issue", node))
                if node.target in _STAGE_COLLECTIVES:
                    issued.append(node)
            elif node.target is c10d.wait_tensor.default:
                flush()
                pieces.append(_Piece("wait", node.args[0]))  # type: ignore[arg-type]
            elif node.target is gs.transfer.default:
                flush()
                if node.args[1] == self.stage:
                    pieces.append(_Piece("send", node))
                else:
                    pieces.append(_Piece("wait", node))
            else:
                if run and on_host(run[-1]) != on_host(node):
                    flush()
                run.append(node)
                if node in ends:
                    flush()
        flush()
        wait(list(issued))
        return pieces

    def _read_early(self) -> set[fx.Node]:
        """The body's nodes whose value the epilogue reduces, or updates by if it moves state: a segment ends there, so
        that this can start while the rest of the last backward runs."""
        epilogue = self.program.epilogue
        slots = {
            epilogue.inputs.get(resolve(node.all_input_nodes[0]))
            for node in epilogue.nodes()
            if node.target in _COLLECTIVES
        }
        if not self.watch and any(node.target in MOVES for node in epilogue.nodes()):
            slots |= {slot for slot in epilogue.input_slots if slot.name.startswith("grad:")}
        return {node for slot, node in self.program.body.outputs.items() if slot in slots}

    def _finish(self, streams: Iterable[list[_Piece]], section: Section, accumulators: Collection[Slot]) -> None:
        """Find what each segment reads and leaves, and emit its code."""
        all_pieces = [piece for stream in streams for piece in stream]
        runs = [piece.outputs for piece in all_pieces if piece.kind == "run"]
        sums = sums_of(section, accumulators, runs, self.kernels.on_gpu)
        read_outside: dict[fx.Node, set[int]] = {}
        for index, piece in enumerate(all_pieces):
            for source in self._sources(piece, sums):
                read_outside.setdefault(source, set()).add(index)
        returned = set(section.outputs.values())
        for index, piece in enumerate(all_pieces):
            if piece.kind != "run":
                continue
            nodes = piece.outputs
            inside = set(nodes)
            outputs = [
                n
                for n in nodes
                if (n in returned or read_outside.get(n, set()) - {index}) and not isinstance(val(n), tuple)
            ]
            begins = sums.begins(nodes)
            outputs += begins
            watch = self.watch and section is self.program.body
            write = partial(emit, sums=sums, watch=watch)
            kernels = self.kernels.of(nodes[0])
            code = write(piece.segment, nodes, outputs, section, kernels)
            self.segments[piece.segment] = code.segment
            if on_host(nodes[0]):  # it takes none of the device's memory
                piece.device = HOST
                self.segments[piece.segment] = replace(code.segment, workspace=Workspace(), ends=())
            work = 0.0 if piece.device else sum(map(cost, nodes))  # of the device
            self.work[piece.segment] = self.work[f"{piece.segment}_first"] = work
            self.reused |= code.reused
            piece.inputs = code.inputs
            if code.accumulators:
                piece.first_segment = f"{piece.segment}_first"
                name = piece.first_segment
                first = write(name, nodes, outputs, section, kernels, first=True)
                self.segments[piece.first_segment] = first.segment
                piece.first_inputs = first.inputs
                self.initialised |= code.accumulators
            sums.begun.update(begins)
            assert inside.isdisjoint(piece.inputs)
            piece.outputs = outputs
            self.beside |= dict.fromkeys(outputs, piece.inputs)

    def _accumulators(self) -> list[Slot]:
        """Carries that the prologue sets to zero."""
        return [
            slot
            for slot, node in self.program.prologue.outputs.items()
            if slot.role is Role.CARRY and node.target is torch.ops.aten.full.default and node.args[1] == 0
        ]

    def _sources(self, piece: _Piece, sums: Sums) -> Iterator[fx.Node]:
        if piece.kind == "run":
            for node in piece.outputs:
                for source in node.all_input_nodes:
                    if source not in sums.ahead:
                        yield resolve(source)
        elif piece.kind in ("issue", "send"):
            assert piece.node is not None
            given = self._contribution(piece.node)
            if given is not None:
                yield resolve(given)

    def _contribution(self, node: fx.Node) -> fx.Node | None:
        """What this stage puts into a communication node; None: nothing, which counts as zero."""
        if node.target is gs.stage_sum.default:
            return next((n for n in node.all_input_nodes if info(n).stage == self.stage), None)
        if node.target is gs.stage_broadcast.default and node.args[1] != self.stage:
            return None
        return node.all_input_nodes[0]

    # Instructions

    def _instantiate(
        self, pieces: list[_Piece], name: Callable[[fx.Node], Ref], action: str, first: bool
    ) -> list[Instruction]:
        result: list[Instruction] = []
        for piece in pieces:
            node = piece.node
            if piece.kind == "run":
                use_first = first and piece.first_segment
                result.append(
                    Instruction(
                        Op.RUN,
                        piece.first_segment if use_first else piece.segment,
                        tuple(name(n) for n in (piece.first_inputs if use_first else piece.inputs)),
                        tuple(name(n) for n in piece.outputs),
                        action=action,
                        device=piece.device,
                    )
                )
                continue
            assert node is not None
            record = info(node)
            common = {"action": action, "made_by": record.made_by}
            if piece.kind == "wait":
                result.append(Instruction(Op.WAIT, inputs=(name(node),), **common))  # type: ignore[arg-type]
            elif piece.kind == "recv":
                peer: int = node.args[1]  # type: ignore[assignment]
                common["made_by"] = record.made_by or "pipeline-cut"
                result.append(
                    Instruction(
                        Op.RECV,
                        node.name,
                        outputs=(name(node),),
                        peer=peer,
                        type=type_of(val(node)),
                        **common,  # type: ignore[arg-type]
                    )
                )
            elif piece.kind == "send":
                source = name(node.args[0])  # type: ignore[arg-type]
                peer = node.args[2]  # type: ignore[assignment]
                result.append(Instruction(Op.SEND, node.name, (source,), peer=peer, type=type_of(val(node)), **common))  # type: ignore[arg-type]
            elif node.target in MOVES:
                result.append(self._move(node, name, common))
            else:
                result += self._collective(node, name, common)
        return result

    def _move(self, node: fx.Node, name: Callable[[fx.Node], Ref], common: dict[str, str]) -> Instruction:
        return Instruction(
            Op.OFFLOAD if node.target is gs.offload.default else Op.RELOAD,
            str(node.args[1]),
            (name(node.all_input_nodes[0]),),
            (name(node),),
            type=type_of(val(node)),
            bucket=info(node).module,
            **common,  # type: ignore[arg-type]
        )

    def _collective(self, node: fx.Node, name: Callable[[fx.Node], Ref], common: dict[str, str]) -> list[Instruction]:
        target: Any = node.target
        op, kind = _COLLECTIVES.get(target, (Op.REDUCE, "all_reduce"))
        source = self._contribution(node)
        before: list[Instruction] = []
        if source is None:
            segment = f"zero_{node.name}"
            self.work[segment] = cost(node)
            kind_of = type_of(val(node))
            self.segments[segment] = Segment(
                segment,
                f"def {segment}(args, coordinates, device, memory):\n"
                f"    return (torch.zeros({list(kind_of.shape)}, dtype={kind_of.dtype}, device=device),)\n",
                (),
                (segment,),
                output_types=(kind_of,),
                workspace=Workspace((kind_of.nbytes,)),
            )
            ref = Ref(f"{name(node).name}.zero", name(node).microbatch)
            before.append(Instruction(Op.RUN, segment, outputs=(ref,), action=common["action"]))
            typed = kind_of
        else:
            ref, typed = name(source), type_of(val(source))
        axis = "pp" if node.target in _STAGE_COLLECTIVES else str(node.args[-1])
        root: Any = node.args[1]
        issue = Instruction(
            op,
            kind,
            (ref,),
            (name(node),),
            axis=axis,
            peer=root if kind == "broadcast" else None,
            type=typed,
            bucket=info(node).module,
            **common,  # type: ignore[arg-type]
        )
        return [*before, issue]

    def _namer(self, section: Section, microbatch: int | None, prefix: str = "") -> Callable[[fx.Node], Ref]:
        """Where each node's value lives. A carry that nobody else reads is written straight to its slot by the segment
        that reads the old value last, and so is what is offloaded: it replaces the old value where that is kept."""
        outputs = section.outputs
        returned = Counter(outputs.values())
        direct = {
            node: slot
            for slot, node in outputs.items()
            if (slot.role is Role.CARRY or node.target is gs.offload.default or on_host(node))
            and len(node.users) == 1
            and node.op != "placeholder"
            and returned[node] == 1
            and (slot.role is not Role.CARRY or self._ends(section.input_slots.get(slot), node))
        }

        def name(node: fx.Node) -> Ref:
            node = resolve(node)
            slot = section.inputs.get(node) or direct.get(node)
            if slot is not None:
                return slot_ref(slot, microbatch if slot.role in _PER_MICROBATCH else None)
            return Ref(prefix + node.name, microbatch)

        return name

    def _ends(self, old: fx.Node | None, new: fx.Node) -> bool:
        """Whether nothing reads ``old`` behind the segment that makes ``new`` of it."""
        if old is None:
            return True
        return old in self.beside.get(new, ()) and not any(user > new for user in old.users)

    def _bindings(
        self,
        section: Section,
        nodes: set[fx.Node],
        name: Callable[[fx.Node], Ref],
        mb: int | None,
        action: str,
        skip: set[Slot],
    ) -> list[Instruction]:
        """What becomes of the section's outputs: results and carries that do not live in their slot yet."""
        inputs, outputs = [], []
        for slot, node in section.outputs.items():
            if not self._is_mine(slot, node) or slot in skip or node not in nodes:
                continue
            target = slot_ref(slot, mb if slot.role in _PER_MICROBATCH else None)
            if name(node) != target:
                inputs.append(name(node))
                outputs.append(target)
        if not inputs:
            return []
        return [Instruction(Op.BIND, inputs=tuple(inputs), outputs=tuple(outputs), action=action)]

    def _body(self) -> list[Instruction]:
        body = self.program.body
        has_weight = any(action.kind == "W" for action in self.schedule.stages[self.stage])
        streams: dict[str, list[fx.Node]] = {"F": [], "B": [], "W": []}
        receives: dict[str, list[fx.Node]] = {"F": [], "B": [], "W": []}
        for node in self._mine(body):
            streams[_kind(node)].append(node)
            if node.target is gs.transfer.default and node.args[2] == self.stage:
                receives[_kind(node)].append(node)
        ends = self._read_early()
        pieces = {}
        for kind, stream in streams.items():
            # A segment of their own: the host reads the key, and what it has a hand in cannot be a CUDA graph.
            seeds = [node for node in stream if node.target is gs.seed.default]
            others = [node for node in stream if node.target is not gs.seed.default]
            pieces[kind] = self._pieces([*seeds, *others], f"s{self.stage}_{kind}", {*ends, *seeds[-1:]})
        self._finish(pieces.values(), body, self._accumulators())
        self._collect(body, [n for nodes in streams.values() for n in nodes], self._namer(body, 0))
        produced = {kind: set(nodes) for kind, nodes in streams.items()}
        placeholders = set(body.inputs)
        result: list[Instruction] = []
        begun: set[str] = set()
        for action in self.schedule.stages[self.stage]:
            mb, label = action.microbatch, str(action)
            name = self._namer(body, mb)
            # Without weight actions they end the backward: what an earlier stage waits for is sent before.
            kinds = ("B", "W") if action.kind == "B" and not has_weight else (action.kind,)
            arriving = [_Piece("recv", node) for kind in kinds for node in receives[kind]]
            result += self._instantiate(arriving, name, label, first=False)
            for kind in kinds:
                result += self._instantiate(pieces[kind], name, label, first=kind not in begun)
                nodes = produced[kind] | (placeholders if kind == "F" else set())
                result += self._bindings(body, nodes, name, mb, label, skip=set())
            begun.update(kinds)
        return result

    def _once(self, section: Section, label: str, prefix: str, skip: set[Slot] | None = None) -> list[Instruction]:
        """Prologue or epilogue: one stream, run once."""
        skip = skip or set()
        nodes = self._mine(section)
        unwanted = {n for s, n in section.outputs.items() if s in skip and len(n.users) == 1}
        nodes = [n for n in nodes if n not in unwanted]
        pieces = self._pieces(nodes, f"s{self.stage}_{prefix.strip('.')}")
        self._finish([pieces], section, [])
        name = self._namer(section, None, prefix)
        self._collect(section, nodes, name)
        arriving = [_Piece("recv", n) for n in nodes if n.target is gs.transfer.default and n.args[2] == self.stage]
        result = self._instantiate(arriving + pieces, name, label, first=False)
        return result + self._bindings(section, {*section.inputs, *nodes}, name, None, label, skip)

    def _collect(self, section: Section, nodes: list[fx.Node], name: Callable[[fx.Node], Ref]) -> None:
        """Note which slots this stage reads from outside the step, which results it gives, and where values live."""
        mine = set(nodes)
        saved = saved_roots(nodes, self.reused)
        for node in (*section.inputs, *nodes):
            if isinstance(val(node), torch.Tensor):
                root = storage_root(node, self.reused)
                nbytes = storage_bytes(val(root))
                slot = section.inputs.get(node)
                away = slot is not None and self.homes.get(slot)  # also where this section only hands it on
                kind = OFFLOADED + away if away else category(root, section, saved)
                self.storages[name(node).name] = Storage(name(root), nbytes, kind)
        for node, slot in section.inputs.items():
            local = info(node).stage in (self.stage, None)
            used = any(user in mine for user in node.users) or (node in section.outputs.values() and local)
            if used and slot.role not in (Role.CARRY,):
                self.reads[slot] = type_of(val(node))
        for slot, node in section.outputs.items():
            if slot.role is not Role.CARRY and self._is_mine(slot, node):
                self.results[slot] = type_of(val(node))


def _kind(node: fx.Node) -> str:
    """The stream a node of the body belongs to. A transfer is received in the one that matches the sender's, so that
    both ends see one order on the channel."""
    phase = info(node.args[0]).phase if node.target is gs.transfer.default else info(node).phase  # type: ignore[arg-type]
    return {Phase.FORWARD: "F", Phase.WEIGHT: "W"}.get(phase, "B")
