"""Segments as CUDA graphs: what a RUN issues is recorded once and issued again as a whole, without Python or launches.

A graph is tied to addresses. Every RUN instruction of a step has one of its own, so that micro-batches whose values are
alive at once have theirs, and all of a rank take memory from one pool, in the order in which they run: a value that a
graph leaves keeps its place from there to its last reader, in every step as in the one that was recorded. Once that is
over, values are known by their place alone, and nobody but the pool holds the memory. So

- what one graph leaves and another reads is read where it lies;
- parameters and state, which stay where they are from step to step, are read and written in place, and kept;
- anything else, of the batch, of communication, of a segment without a graph, is copied into a place in the pool before
  the graph runs;
- what leaves the step is copied out, unless it is one of those that stay.

A step that finds a parameter in another place, as after ``load_state_dict``, records again. The first step is run as it
is, so that kernels are compiled and libraries have what they need. Where a segment turns out not to be recordable, the
rest of that step is run as it is too, and the next one records all others anew.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from graphshard.execution import ExecutionPlan, Instruction, Op, Ref, TensorType, read_refs, type_of
from graphshard.offloaded import span
from graphshard.program import Role
from graphshard.runtime.feed import STORED
from graphshard.runtime.segments import SegmentFunction

logger = logging.getLogger("graphshard")

_MOVES_AT_MOST = 2
"""How often a value may be found in another place before it counts as one that moves."""


class Recorder(ABC):
    """Records what a device is told. All that is recorded by one shares memory."""

    @abstractmethod
    def prepare(self) -> None:
        """A step begins that is recorded: let the device end what it was told, and give back memory nobody uses."""

    @abstractmethod
    def record(self, issue: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """What does again all that ``issue`` tells the device, and the results, which have no values yet.

        Raises:
            RuntimeError: it cannot be recorded; nothing was done. The recorder is spent, but has to be kept.
        """

    @abstractmethod
    def place(self, address: int, kind: TensorType) -> Tensor:
        """The memory of a value, without holding it."""


class CudaRecorder(Recorder):
    """torch.cuda.CUDAGraph, with a pool and a stream for all.

    Other threads, as NCCL's watchdog, may ask CUDA what they like meanwhile ("thread_local"). The device is not waited
    for, as torch.cuda.graph does: it may be receiving what a peer sends only after this rank has gone on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._device_index = torch.cuda.current_device() if device.index is None else device.index
        self._failed: torch.cuda.CUDAGraph | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def prepare(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def record(self, issue: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = issue()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        return graph.replay, results

    def place(self, address: int, kind: TensorType) -> Tensor:
        if not kind.numel:
            return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self._device)
        flat = torch.as_tensor(_Bytes(address, span(kind)), device=self._device)
        return flat.view(kind.dtype).as_strided(kind.shape, kind.stride)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed. capture_end then raises before it tells the allocator, which would go on asking
        the graph which allocations are its own."""
        self._failed = graph
        for end in (graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(self._device_index, self._pool)):
            try:
                end()
            except RuntimeError as error:  # it had been ended, or told
                logger.debug("graphshard: %s", error)


class _Bytes:
    """Memory of the device, as other libraries show theirs."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def recorder_of(device: torch.device) -> Callable[[], Recorder] | None:
    """Makes the recorder of a rank on ``device``; None: it has no graphs."""
    return (lambda: CudaRecorder(device)) if device.type == "cuda" else None


def refusals(plan: ExecutionPlan, stage: int) -> dict[str, str]:
    """The segments of a stage that cannot be recorded, with the reason, as far as the plan says so."""
    if plan.watched:
        return dict.fromkeys(plan.stages[stage].segments, "debug_nan looks at its values")
    keys = {ref for ref, (slot, _) in read_refs(plan, stage, first=False).items() if slot.role is Role.RNG}
    runs = [ins for ins in plan.stages[stage].step() if ins.op is Op.RUN]
    drawing = {ins.name: "it draws random numbers by a key that the host reads" for ins in runs if keys & {*ins.inputs}}
    return drawing | {ins.name: "the CPU runs it" for ins in runs if ins.device}


class _State(Enum):
    PLAIN = "segments run as they are"
    RECORDING = "each is recorded, then run"
    REPLAYING = "graphs run"


@dataclass
class _Graph:
    """Of one RUN. ``copies``: places for inputs, by position; ``fixed``: addresses of the others."""

    replay: Callable[[], None]
    copies: dict[int, Tensor]
    fixed: dict[int, int]
    results: tuple[Tensor, ...]


@dataclass
class SegmentGraphs:
    """The graphs of one rank's steps, the first step of an optimizer left out.

    ``left``: segments that are run as they are, with the reason. ``stays``: what a step finds, and may stay where it
    is.
    """

    make: Callable[[], Recorder]
    left: dict[str, str]
    stays: frozenset[Ref]
    _state: _State = _State.PLAIN
    _whole: bool = False  # the last step went through
    _graphs: dict[int, _Graph] = field(default_factory=dict)
    _kept: dict[Ref, Tensor] = field(default_factory=dict)  # what stays, while there are graphs
    _kept_bases: set[int] = field(default_factory=set)  # addresses of its storages
    _before: dict[Ref, int] = field(default_factory=dict)  # where the step found what may stay
    _moved: Counter[Ref] = field(default_factory=Counter)
    _bases: set[int] = field(default_factory=set)  # addresses of storages in the pool
    _recorder: Recorder | None = None
    _spent: list[Recorder] = field(default_factory=list)
    _left_bytes: int = 0
    _runs: int = 0

    def begin(self, values: Mapping[Ref, Any]) -> None:
        """A step begins that finds ``values``."""
        if self._state is _State.PLAIN and not self._whole:
            pass  # not even one step has run
        elif self._state is _State.REPLAYING and self._in_place(values):
            pass
        elif self._state is _State.RECORDING and self._whole and self._in_place(values):
            self._state = _State.REPLAYING
        else:
            self._record(values)
        self._whole = False
        self._before = {ref: values[ref].data_ptr() for ref in self.stays if isinstance(values.get(ref), Tensor)}

    def wrap(self, ins: Instruction, function: SegmentFunction) -> SegmentFunction:
        """``function`` of a RUN instruction, by its graph as soon as there is one."""
        number, self._runs = self._runs, self._runs + 1

        def run(
            arguments: list[Tensor],
            coordinates: Mapping[str, int],
            device: torch.device,
            memory: Callable[[int], Tensor],
        ) -> tuple[Tensor, ...]:
            graph = self._graphs.get(number)
            if graph is not None:
                return _replayed(graph, arguments)
            if self._state is not _State.RECORDING or ins.name in self.left:
                return function(arguments, coordinates, device, memory)

            def bound(given: list[Tensor], at: Mapping[str, int], where: torch.device) -> tuple[Tensor, ...]:
                return function(given, at, where, memory)

            return self._recorded(number, ins, bound, arguments, coordinates, device)

        return run

    def end(self, results: Mapping[Ref, Any]) -> dict[Ref, Any]:
        """What a step leaves, none of it in memory of a graph."""
        moved = {ref for ref, was in self._before.items() if ref in results and _address(results[ref]) != was}
        self.stays -= moved
        self._whole = True
        if self._state is _State.PLAIN:
            return dict(results)
        if moved & self._kept.keys():  # it was taken for one that stays
            self._state, self._whole = _State.RECORDING, False
        left = {ref: self._copied_out(value) for ref, value in results.items()}
        self._left_bytes = sum(v.nbytes for ref, v in left.items() if v is not results[ref])
        return left

    def told(self) -> str:
        """For ``explain``: how many RUNs are graphs, and what they cost in copies."""
        if not self._graphs:
            return f"none yet: {self._state.value}"
        copied = sum(place.nbytes for graph in self._graphs.values() for place in graph.copies.values())
        return (
            f"{len(self._graphs)} of {self._runs} RUN instructions; "
            f"{copied:,} bytes are copied in and {self._left_bytes:,} out in a step"
        )

    def _in_place(self, values: Mapping[Ref, Any]) -> bool:
        """Whether all that is kept is where it was."""
        moved = [ref for ref, kept in self._kept.items() if _address(values[ref]) != kept.data_ptr()]
        self._moved.update(moved)
        self.stays -= {ref for ref in moved if self._moved[ref] >= _MOVES_AT_MOST}
        return not moved

    def _record(self, values: Mapping[Ref, Any]) -> None:
        """Forget all graphs: this step makes new ones."""
        self._recorder = self.make()
        self._recorder.prepare()
        self._graphs.clear()
        self._bases.clear()
        self._kept = {ref: values[ref] for ref in self.stays if isinstance(values.get(ref), Tensor)}
        self._kept_bases = {_base(value) for value in self._kept.values()}
        self._state = _State.RECORDING

    def _recorded(
        self,
        number: int,
        ins: Instruction,
        function: Callable[..., tuple[Tensor, ...]],
        arguments: list[Tensor],
        coordinates: Mapping[str, int],
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        """Record the segment, and run what was recorded; or, if that is not possible, the segment itself."""
        assert self._recorder is not None
        recorder = self._recorder
        host = next((ref for ref, v in zip(ins.inputs, arguments, strict=True) if v.device.type != device.type), None)
        if host is not None:
            self._leave(ins, f"it reads {host}, which is on the host")
            return function(arguments, coordinates, device)
        fixed = {i: v.data_ptr() for i, v in enumerate(arguments) if _base(v) in self._bases | self._kept_bases}
        # What lies in the pool is given up to the segment, so that it can use the memory again behind the last reader.
        again = [self._place(value) for value in arguments]
        sources = {index: value for index, value in enumerate(again) if index not in fixed}
        given = [value if index in fixed else None for index, value in enumerate(arguments)]
        arguments.clear()
        rooms: dict[int, int] = {}

        def issue() -> tuple[Tensor, ...]:
            for index, source in sources.items():
                given[index] = _room(source)
            rooms.update((index, given[index].data_ptr()) for index in sources)  # type: ignore[union-attr]
            return function(given, coordinates, device)

        try:
            replay, results = recorder.record(issue)
        except RuntimeError as error:
            self._leave(ins, " ".join(str(error).split())[:200])
            self._spent.append(recorder)
            self._state = _State.PLAIN
            return function(again, coordinates, device)
        copies = {index: recorder.place(rooms[index], type_of(source)) for index, source in sources.items()}
        for index, place in copies.items():
            _copy(place, sources[index])
        replay()
        self._bases |= {_base(result) for result in results} - self._kept_bases
        self._graphs[number] = _Graph(replay, copies, fixed, tuple(self._place(result) for result in results))
        return results

    def _place(self, value: Tensor) -> Tensor:
        """``value``; in the pool, its memory alone."""
        assert self._recorder is not None
        return self._recorder.place(value.data_ptr(), type_of(value)) if _base(value) in self._bases else value

    def _copied_out(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or _base(value) not in self._bases:
            return value
        room = _room(value)
        _copy(room, value)
        return room

    def _leave(self, ins: Instruction, reason: str) -> None:
        self.left[ins.name] = reason
        logger.warning("graphshard: segment %s is no CUDA graph: %s", ins.name, reason)


def _base(value: Tensor) -> int:
    """The address of the storage."""
    return value.untyped_storage().data_ptr()


def _address(value: Any) -> int | None:
    return value.data_ptr() if isinstance(value, Tensor) else None


def _replayed(graph: _Graph, arguments: list[Tensor]) -> tuple[Tensor, ...]:
    for index, place in graph.copies.items():
        _copy(place, arguments[index])
    for index, address in graph.fixed.items():
        assert arguments[index].data_ptr() == address, f"input {index} is not where it was recorded"
    arguments.clear()
    graph.replay()
    return graph.results


def _room(like: Tensor) -> Tensor:
    """New memory for a value of this shape, with its strides."""
    count = span(type_of(like)) // like.dtype.itemsize
    return torch.empty(count, dtype=like.dtype, device=like.device).as_strided(like.shape, like.stride())


def _copy(target: Tensor, source: Tensor) -> None:
    """All memory from the first element to the last: elements may share some."""
    count = span(type_of(source)) // source.dtype.itemsize
    flat = (value.as_strided((count,), (1,), value.storage_offset()) for value in (target, source))
    into, given = flat
    into.copy_(given)


def graphs_of(plan: ExecutionPlan, stage: int, make: Callable[[], Recorder], measured: bool) -> SegmentGraphs:
    """The graphs of a rank of ``stage``; ``measured``: a meter looks at what segments make."""
    left = refusals(plan, stage)
    if measured:
        left = dict.fromkeys(plan.stages[stage].segments, "measure_memory follows what it makes")
    found = read_refs(plan, stage, first=False).items()
    stays = frozenset(ref for ref, (slot, _) in found if slot.role in STORED or slot.role is Role.CONSTANT)
    return SegmentGraphs(make, left, stays)


def uncaptured(graphs: Iterable[SegmentGraphs]) -> dict[str, str]:
    """The segments of all ranks that are run as they are, with the reason."""
    return {name: reason for one in graphs for name, reason in one.left.items()}
