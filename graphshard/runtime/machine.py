"""One rank of a plan: its instructions, resolved once into closures over a list of values, run as a generator."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from graphshard.execution import (
    MOVES,
    ExecutionPlan,
    Instruction,
    Op,
    Ref,
    TensorType,
    made_type,
    match_waits,
    read_refs,
    result_refs,
)
from graphshard.memory.replaced import replaced_at
from graphshard.program import HOST, Slot
from graphshard.runtime.arena import Placing
from graphshard.runtime.council import Council
from graphshard.runtime.cuda_graphs import SegmentGraphs
from graphshard.runtime.handles import Handle
from graphshard.runtime.meter import Measured, Meter
from graphshard.runtime.nonfinite import judge
from graphshard.runtime.offload import Homes, HostWork, Offloaded
from graphshard.runtime.segments import SegmentFunction
from graphshard.runtime.watch import Watch


class Communicator(Protocol):
    """How one rank starts communication; nothing blocks. Collectives are over its group along a mesh axis."""

    def all_gather(self, axis: str, output: Tensor, source: Tensor) -> Handle:
        """``output`` becomes the group's ``source`` tensors one after the other along dim 0."""
        ...

    def reduce_scatter(self, axis: str, output: Tensor, source: Tensor) -> Handle:
        """``output`` becomes this rank's part, along dim 0, of the sum of the group's ``source`` tensors."""
        ...

    def all_reduce(self, axis: str, value: Tensor) -> Handle:
        """``value`` becomes the sum of the group's, in place."""
        ...

    def broadcast(self, axis: str, value: Tensor, source: int) -> Handle:
        """``value`` becomes that of the rank at coordinate ``source``."""
        ...

    def send(self, stage: int, wire: Tensor) -> Handle:
        """Send the elements of ``wire`` (1-D) to the rank of ``stage`` with this rank's other coordinates."""
        ...

    def recv(self, stage: int, wire: Tensor) -> Handle:
        """Receive into ``wire`` (1-D) from the rank of ``stage`` with this rank's other coordinates."""
        ...


Value = Tensor | Offloaded
Environment = list[Value | None]
Handles = list[Handle | None]
Action = Callable[[Environment, Handles], Handle | None]
"""An instruction with everything looked up; returns what to wait for, if it cannot go on."""


SharedLayouts = dict[bool, dict[str, str]]
"""For first steps and later ones, what ranks along an axis have in common of their layouts."""


class Machine:
    """Interprets the plan of one rank. ``placing``: where values lie in the first step, and in later ones.

    ``position`` is that of the instruction being run, for messages. Nothing is checked here: prove.py has.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        rank: int,
        communicator: Communicator,
        functions: Mapping[str, SegmentFunction],
        device: torch.device,
        homes: Homes,
        placing: Mapping[bool, Placing],
        *,
        meter: Meter | None = None,
        watch: Watch | None = None,
        graphs: SegmentGraphs | None = None,
    ) -> None:
        self.rank = rank
        self.position = 0
        self.meter = meter
        self.measured: Measured | None = None  # the last step that went through
        self.watch = watch
        self.graphs = graphs  # of later steps
        self._plan = plan
        stage_plan = plan.of_rank(rank)
        self._storages = stage_plan.storages
        self.stage = plan.mesh.coordinates(rank)["pp"]
        self.update_begins = len(stage_plan.prologue) + len(stage_plan.body)
        self._instructions = {first: stage_plan.step(first) for first in (False, True)}
        same = stage_plan.first_epilogue is None
        waits = match_waits(self._instructions[False])
        self._waits = {False: waits, True: waits if same else match_waits(self._instructions[True])}
        self._environment: Environment = []
        self._first = False
        resolver = _Resolver(plan, rank, communicator, functions, device, homes)
        steady = resolver.resolve(self._instructions[False], waits, placing[False], graphs)
        self._code = {
            False: steady,
            True: steady if same else resolver.resolve(self._instructions[True], self._waits[True], placing[True]),
        }
        reads = {first: read_refs(plan, self.stage, first) for first in (False, True)}
        self.reads: dict[bool, dict[Ref, tuple[Slot, TensorType]]] = reads
        self.homes = stage_plan.homes
        self.results: dict[Ref, Slot] = result_refs(plan, self.stage)
        self._placing = placing
        self._awaited = {first: placing[first].before() for first in (False, True)}
        self._parts: dict[bool, dict[Ref, Tensor]] = {False: {}, True: {}}
        self._places_in = {first: {ref: resolver.place(ref) for ref in refs} for first, refs in reads.items()}
        self._places_out = {ref: resolver.place(ref) for ref in self.results}
        self._size = resolver.size
        self._place = resolver.place

    def share(self, known: SharedLayouts | None) -> SharedLayouts:
        """Have the memory that ranks share, before the first step; see Placing.share."""
        steps = {placing: first for first, placing in self._placing.items()}  # one may be for both
        agreed = {p: p.share(None if known is None else known[first]) for p, first in steps.items()}
        for first, placing in self._placing.items():
            self._parts[first] = placing.parts({ref: kind for ref, (_, kind) in self.reads[first].items()})
        return {first: agreed[placing] for first, placing in self._placing.items()}

    def elsewhere(self, values: Mapping[Ref, Value], first: bool) -> dict[Ref, Tensor]:
        """Of the parts that this rank stores of what lies in shared memory for good, those whose ``values`` are
        elsewhere: where they are to be."""
        parts, found = self._parts[first], {}
        for ref, part in parts.items():
            value = values[ref]
            assert isinstance(value, Tensor)
            if value.data_ptr() != part.data_ptr():
                found[ref] = part
        return found

    @property
    def instruction(self) -> Instruction:
        """The instruction being run."""
        return self._instructions[self._first][self.position]

    def describe(self) -> str:
        """The instruction being run with its position; of a WAIT, what it waits for; and which pass made that."""
        told = f"{self.position} {' '.join(str(self.instruction).split())}"
        source = self.instruction
        if source.op is Op.WAIT:
            source = self._instructions[self._first][self._waits[self._first][self.position]]
            way = "to" if source.op is Op.SEND else "from"
            told += (
                f" for {source.op} {'to' if source.op is Op.OFFLOAD else 'from'} {source.name}"
                if source.op in MOVES
                else f" for {source.name} over {source.axis}"
                if source.axis
                else f" for {source.op} {way} stage {source.peer}"
            )
            told += f" of {source.type}"
        origin = [f"bucket {source.bucket}"] if source.bucket else []
        origin += [f"made by {source.made_by}"] if source.made_by else []
        return told + (f" ({', '.join(origin)})" if origin else "")

    def step(
        self, values: dict[Ref, Value], first: bool = False, preempt: bool = False, council: Council | None = None
    ) -> Generator[Handle | None, None, dict[Ref, Value]]:
        """Run one step; ``values`` is what the plan reads, and is emptied. Returns the results.

        Yields a handle when it must be complete before the rank can go on, and with ``preempt`` None after every
        other instruction. With a ``council``, all ranks tell what their ``watch`` saw before any begins the update.

        Raises:
            NonFiniteStep: a loss or gradient of some rank is NaN or infinite; nothing was updated.
        """
        places = self._places_in[first]
        graphs = None if first else self.graphs
        if graphs is not None:
            graphs.begin(values)
        environment: Environment = [None] * self._size
        for ref, value in values.items():
            environment[places[ref]] = value
        values.clear()
        code = self._code[first]
        handles: Handles = [None] * len(code)
        self._environment, self._first = environment, first
        if self.meter is not None:
            self.meter.begin(self._held(environment, places))
        awaited = self._awaited[first]
        agreed_at = -1 if council is None else self.update_begins
        observed = self.meter is not None or self.watch is not None
        for position, action in enumerate(code):
            if position == agreed_at:
                assert council is not None
                yield from self._agree(council, handles)
            self.position = position
            if position in awaited:
                for begin in awaited[position]:
                    handle = begin()
                    if handle is not None and not handle.done():
                        yield handle
            blocked = self._act(action, environment, handles) if observed else action(environment, handles)
            if blocked is not None:
                yield blocked
                blocked = None  # what it kept may go
            elif preempt:
                yield None
        results: dict[Ref, Value] = {}
        for ref, place in self._places_out.items():
            result = environment[place]
            assert result is not None, f"{ref} is not defined at the end of the step"
            results[ref] = result
        if graphs is not None:
            results = graphs.end(results)
        if self.meter is not None:
            self.measured = Measured(tuple(self.meter.rows), first)
        self._forget()
        return results

    def _act(self, action: Action, environment: Environment, handles: Handles) -> Handle | None:
        """What ``action`` returns; the watch knows what is coming, and a meter sees what it makes."""
        if self.watch is not None:
            self.watch.begin(self.instruction)
        if self.meter is None:
            return action(environment, handles)
        made = {ref: self._place(ref) for ref in self.instruction.outputs}
        # What a communication library takes for itself is not the plan's.
        with self.meter.running(watched=self.instruction.op is Op.RUN):
            blocked = action(environment, handles)
        self.meter.ran(self._held(environment, made))
        return blocked

    def _held(self, environment: Environment, places: Mapping[Ref, int]) -> Iterator[tuple[Tensor, str]]:
        """The values at ``places``, each with the category of its storage."""
        for ref, place in places.items():
            value, storage = environment[place], self._storages.get(ref.name)
            if isinstance(value, Tensor):
                yield value, "workspace" if storage is None else storage.category

    def _agree(self, council: Council, handles: Handles) -> Generator[Handle, None, None]:
        assert self.watch is not None
        council.tell(self.rank, self.watch.take())
        yield council
        error = judge(self._plan, council.accounts())
        if error is None:
            return
        # What is under way, all ranks have begun: it must not write into memory that the next step uses.
        for ins, handle in zip(self._instructions[self._first], handles, strict=True):
            if handle is not None and ins.op not in MOVES and not handle.done():
                yield handle
        raise error

    def abandon(self) -> dict[Ref, Value]:
        """After a failed step: what it had been given and had not begun to replace."""
        kept = {}
        if self._environment:
            replaced = replaced_at(self._plan, self.stage, self._first)
            for ref, place in self._places_in[self._first].items():
                value = self._environment[place]
                if value is not None and self.position < replaced.get(ref, self.position + 1):
                    kept[ref] = value
        self._forget()
        return kept

    def _forget(self) -> None:
        self._environment = []
        if self.watch is not None:
            self.watch.take()


class _Resolver:
    """Turns instructions into actions; gives every Ref a place in the environment."""

    def __init__(
        self,
        plan: ExecutionPlan,
        rank: int,
        communicator: Communicator,
        functions: Mapping[str, SegmentFunction],
        device: torch.device,
        homes: Homes,
    ) -> None:
        self.homes = homes
        self.segments = plan.of_rank(rank).segments
        self.mesh = plan.mesh
        self.coordinates = plan.mesh.coordinates(rank)
        self.communicator = communicator
        self.functions = functions
        self.device = device
        self.graphs: SegmentGraphs | None = None
        self._places: dict[Ref, int] = {}

    @property
    def size(self) -> int:
        return len(self._places)

    def place(self, ref: Ref) -> int:
        return self._places.setdefault(ref, len(self._places))

    def resolve(
        self,
        instructions: tuple[Instruction, ...],
        waits: Mapping[int, int],
        placing: Placing,
        graphs: SegmentGraphs | None = None,
    ) -> list[Action]:
        self._placing, self.graphs = placing, graphs
        moves = {wait for wait, started in waits.items() if instructions[started].op in MOVES}
        actions = [
            _settle(waits[position]) if position in moves else self._action(position, ins, waits)
            for position, ins in enumerate(instructions)
        ]
        for position, more in placing.behind().items():
            actions[position] = _followed(actions[position], more)
        return actions

    def _action(self, position: int, ins: Instruction, waits: Mapping[int, int]) -> Action:
        match ins.op:
            case Op.RUN:
                return self._run(position, ins)
            case Op.WAIT:
                return _wait(waits[position])
            case Op.FREE:
                return _free([self.place(ref) for ref in ins.inputs])
            case Op.BIND:
                sources, targets, last = ([self.place(ref) for ref in r] for r in (ins.inputs, ins.outputs, ins.last))
                return _bind(sources, targets, last)
            case Op.SEND:
                return self._send(position, ins)
            case Op.RECV:
                return self._recv(position, ins)
            case Op.GATHER | Op.REDUCE:
                return self._collective(position, ins)
            case Op.OFFLOAD:
                return self._offload(position, ins)
            case Op.RELOAD:
                return self._reload(position, ins)

    def _run_on_host(self, ins: Instruction) -> Action:
        """Inputs and outputs are where offloaded values are."""
        segment = self.segments[ins.name]
        work = HostWork(self.functions[ins.name], self.coordinates, segment.output_types, dict(segment.aliases))
        compute = self.homes.compute
        inputs, outputs, last = ([self.place(ref) for ref in refs] for refs in (ins.inputs, ins.outputs, ins.last))

        def run(environment: Environment, handles: Handles) -> None:
            kept = [value for place in inputs if isinstance(value := environment[place], Offloaded)]
            old = [value if isinstance(value := environment[place], Offloaded) else None for place in outputs]
            for place, result in zip(outputs, compute(work, kept, old), strict=True):
                environment[place] = result
            for place in last:
                environment[place] = None

        return run

    def _run(self, position: int, ins: Instruction) -> Action:
        if ins.device == HOST:
            return self._run_on_host(ins)
        function, coordinates, device = self.functions[ins.name], self.coordinates, self.device
        memory = self._placing.of_run(position, self.segments[ins.name].places)
        if self.graphs is not None:
            function = self.graphs.wrap(ins, function)
        inputs = [self.place(ref) for ref in ins.inputs]
        outputs = [self.place(ref) for ref in ins.outputs]
        last = [self.place(ref) for ref in ins.last]

        def run(environment: Environment, handles: Handles) -> None:
            # The list is the only thing that holds the values handed over: the segment empties it and frees them.
            arguments = [environment[place] for place in inputs]
            for place in last:
                environment[place] = None
            results = function(arguments, coordinates, device, memory)  # type: ignore[arg-type]
            for place, result in zip(outputs, results, strict=True):
                environment[place] = result

        return run

    def _send(self, position: int, ins: Instruction) -> Action:
        assert ins.peer is not None and ins.type is not None
        source, keep = self.place(ins.inputs[0]), not ins.last
        send, peer, kind = self.communicator.send, ins.peer, ins.type

        def run(environment: Environment, handles: Handles) -> None:
            value = environment[source]
            assert isinstance(value, Tensor)
            handles[position] = send(peer, outgoing(value, kind))
            if not keep:
                environment[source] = None

        return run

    def _recv(self, position: int, ins: Instruction) -> Action:
        assert ins.peer is not None and ins.type is not None
        target, recv, peer = self.place(ins.outputs[0]), self.communicator.recv, ins.peer
        memory, wire = self._placing.of_result(position, ins.type), (ins.type.numel,)

        def run(environment: Environment, handles: Handles) -> None:
            value = memory()
            handles[position] = recv(peer, value.as_strided(wire, (1,)))
            environment[target] = value

        return run

    def _offload(self, position: int, ins: Instruction) -> Action:
        source, target, keep = self.place(ins.inputs[0]), self.place(ins.outputs[0]), not ins.last
        offload, home = self.homes.offload, ins.name

        def run(environment: Environment, handles: Handles) -> None:
            value, old = environment[source], environment[target]
            assert isinstance(value, Tensor) and not isinstance(old, Tensor)
            environment[target], handles[position] = offload(value, home, old)
            if not keep:
                environment[source] = None

        return run

    def _reload(self, position: int, ins: Instruction) -> Action:
        source, target, keep = self.place(ins.inputs[0]), self.place(ins.outputs[0]), not ins.last
        reload = self.homes.reload

        def run(environment: Environment, handles: Handles) -> None:
            kept = environment[source]
            assert isinstance(kept, Offloaded)
            environment[target], handles[position] = reload(kept)
            if not keep:
                environment[source] = None

        return run

    def _collective(self, position: int, ins: Instruction) -> Action:
        assert ins.type is not None
        target, start = self.place(ins.outputs[0]), self._starter(position, ins)
        source = self.place(ins.inputs[0]) if ins.inputs else None
        keep = not ins.last

        def run(environment: Environment, handles: Handles) -> None:
            value = None if source is None else environment[source]
            assert not isinstance(value, Offloaded)
            if source is not None and not keep:
                environment[source] = None
            environment[target], handles[position] = start(value)

        return run

    def _starter(self, position: int, ins: Instruction) -> Callable[[Tensor | None], tuple[Tensor, Handle]]:
        assert ins.type is not None
        axis, memory = ins.axis, self._placing.of_result(position, _dense(made_type(ins, ins.type, self.mesh)))
        owned = bool(ins.last)  # handed over: nobody else reads it, so that it can be reduced in place
        communicator = self.communicator

        def all_gather(value: Tensor | None) -> tuple[Tensor, Handle]:
            assert value is not None
            output = memory()
            return output, communicator.all_gather(axis, output, value.contiguous())

        def reduce_scatter(value: Tensor | None) -> tuple[Tensor, Handle]:
            assert value is not None
            output = memory()
            return output, communicator.reduce_scatter(axis, output, value.contiguous())

        def all_reduce(value: Tensor | None) -> tuple[Tensor, Handle]:
            assert value is not None
            output = value.contiguous() if owned else memory().copy_(value)
            return output, communicator.all_reduce(axis, output)

        def broadcast(value: Tensor | None) -> tuple[Tensor, Handle]:
            if value is None or root != here:
                output = memory()
            else:
                output = value.contiguous() if owned else memory().copy_(value)
            assert root is not None
            return output, communicator.broadcast(axis, output, root)

        root, here = ins.peer, self.coordinates[axis]
        match ins.name:
            case "all_gather":
                return all_gather
            case "reduce_scatter":
                return reduce_scatter
            case "all_reduce":
                return all_reduce
            case _:
                return broadcast


def _followed(action: Action, more: Sequence[Callable[[], None]]) -> Action:
    def run(environment: Environment, handles: Handles) -> Handle | None:
        blocked = action(environment, handles)
        for call in more:
            call()
        return blocked

    return run


def _wait(started: int) -> Action:
    def run(environment: Environment, handles: Handles) -> Handle | None:
        handle = handles[started]
        handles[started] = None
        return None if handle is None or handle.done() else handle

    return run


def _settle(started: int) -> Action:
    """A move ends by itself, whatever other ranks do: nobody else need go on meanwhile."""

    def run(environment: Environment, handles: Handles) -> None:
        handle = handles[started]
        handles[started] = None
        if handle is not None:
            handle.wait()

    return run


def _free(places: list[int]) -> Action:
    def run(environment: Environment, handles: Handles) -> None:
        for place in places:
            environment[place] = None

    return run


def _bind(sources: list[int], targets: list[int], last: list[int]) -> Action:
    def run(environment: Environment, handles: Handles) -> None:
        values = [environment[source] for source in sources]
        for place in last:
            environment[place] = None
        for place, value in zip(targets, values, strict=True):
            environment[place] = value

    return run


def outgoing(value: Tensor, kind: TensorType) -> Tensor:
    """The elements of ``value`` as one run of memory in the order that ``kind``'s strides say; a view if it lies so."""
    stride = value.stride()
    if stride != kind.stride and any(
        ours != theirs for ours, theirs, size in zip(stride, kind.stride, kind.shape, strict=True) if size != 1
    ):
        packed = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=value.device)
        value = packed.copy_(value)
    return value.as_strided((kind.numel,), (1,), value.storage_offset())


def _dense(kind: TensorType) -> TensorType:
    """The contiguous type of the same shape."""
    strides = tuple(prod(kind.shape[dim + 1 :]) for dim in range(len(kind.shape)))
    return replace(kind, stride=strides)
