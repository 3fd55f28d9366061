"""Every rank of a plan inside this process: the reference semantics of execution plans.

Ranks take turns; where one must wait, the next goes on. Communication follows the channel model that prove.py assumes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphshard.errors import NonFiniteStep, StuckPlan
from graphshard.execution import Ref, TensorType
from graphshard.mesh import Mesh
from graphshard.runtime.council import LocalCouncil
from graphshard.runtime.executor import Executor, Loaded
from graphshard.runtime.handles import Handle
from graphshard.runtime.machine import Communicator, Value


class LocalExecutor(Executor):
    """All ranks of ``mesh`` in one process.

    Args:
        interleaving: None: ranks run round-robin, each until it must wait. A seed: after every instruction a random
            rank goes on, and a communication whose ends are all there completes at a random later moment.
        measure_memory: measure what every rank holds, in ``meters``.
        path: a folder for what is offloaded to files.
        cudagraphs: capture segments as CUDA graphs.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device | str = "cpu",
        *,
        interleaving: int | None = None,
        measure_memory: bool = False,
        path: str | None = None,
        cudagraphs: bool = False,
    ) -> None:
        super().__init__(mesh, range(mesh.world_size), torch.device(device), measure_memory, path, cudagraphs)
        self._random = None if interleaving is None else random.Random(interleaving)
        self._network = _Network(delayed=interleaving is not None)

    def read(self, ref: Ref, stage: int, kind: TensorType, axis: str = "", everywhere: bool = True) -> Tensor | None:
        rank = self.mesh.rank({"pp": stage})
        if not axis:
            return self.stored(rank, ref).clone()
        return torch.cat([self.stored(peer, ref) for peer in self.mesh.group(rank, axis)])

    def _communicator(self, rank: int) -> Communicator:
        return _Link(self._network, self.mesh, rank)

    def _run(self, loaded: Loaded, values: dict[int, dict[Ref, Value]], first: bool) -> dict[int, dict[Ref, Value]]:
        self._network.reset()
        council = LocalCouncil(self.mesh.world_size) if loaded.plan.watched else None
        ranks = {
            rank: _Running(machine.step(values[rank], first, preempt=self._random is not None, council=council))
            for rank, machine in loaded.machines.items()
        }
        turns = deque(ranks)
        results: dict[int, dict[Ref, Value]] = {}
        while turns:
            rank = self._next(loaded, ranks, turns)
            if rank is None:
                continue
            running = ranks[rank]
            try:
                running.blocked = None  # what it kept may go
                running.blocked = next(running.steps)
            except StopIteration as end:
                results[rank] = end.value
                turns.remove(rank)
            except NonFiniteStep:
                raise
            except Exception as error:
                error.add_note(f"on rank {rank} in instruction {loaded.instruction_of(rank)}")
                raise
        return results

    def _next(self, loaded: Loaded, ranks: Mapping[int, _Running], turns: deque[int]) -> int | None:
        """The rank to go on; None after a delivery that made one possible."""
        if self._random is None:
            for _ in range(len(turns)):
                rank = turns[0]
                turns.rotate(-1)
                if ranks[rank].ready():
                    return rank
            raise self._stuck(loaded, ranks, turns)
        moves: list[int | None] = [rank for rank in turns if ranks[rank].ready()]
        moves += [None] * min(1, len(self._network.deliverable))
        if not moves:
            raise self._stuck(loaded, ranks, turns)
        move = self._random.choice(moves)
        if move is None:
            self._network.deliver(self._random.randrange(len(self._network.deliverable)))
        return move

    def _stuck(self, loaded: Loaded, ranks: Mapping[int, _Running], turns: deque[int]) -> StuckPlan:
        lines = []
        for rank in sorted(turns):
            blocked = ranks[rank].blocked
            if isinstance(blocked, LocalCouncil):
                continue  # for those that the others wait for
            assert isinstance(blocked, _Attendance)
            meeting = blocked.meeting
            missing = ", ".join(str(member) for member in meeting.members if member not in meeting.joined)
            plural = "s" if "," in missing else ""
            lines.append(
                f"rank {rank} waits for rank{plural} {missing} to join in {meeting.what}, "
                f"in instruction {loaded.instruction_of(rank)}"
            )
        return StuckPlan(lines)


@dataclass
class _Running:
    """A rank within a step."""

    steps: Generator[Handle | None, None, dict[Ref, Value]]
    blocked: Handle | None = None

    def ready(self) -> bool:
        return self.blocked is None or self.blocked.done()


@dataclass
class _Meeting:
    """One communication: complete once all members have joined and it was delivered."""

    what: str
    members: tuple[int, ...]
    joined: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)  # (source, output) by rank
    delivered: bool = False

    def deliver(self) -> None:
        """Copy what the members put in to where they want it."""
        joined = [self.joined[member] for member in self.members]
        sources = [source for source, _ in joined if source is not None]
        outputs = [output for _, output in joined]
        kind, _, detail = self.what.partition(" ")
        match kind:
            case "all_gather":
                for output in outputs:
                    assert output is not None
                    torch.cat(sources, out=output)
            case "reduce_scatter":
                parts = [source.chunk(len(sources)) for source in sources]
                for index, output in enumerate(outputs):
                    assert output is not None
                    _sum([part[index] for part in parts], output)
            case "all_reduce":
                total = _sum(sources, torch.empty_like(sources[0]))
                for output in outputs:
                    assert output is not None
                    output.copy_(total)
            case "broadcast":
                for output in outputs:
                    assert output is not None
                    output.copy_(sources[int(detail)])
            case _:
                assert outputs[1] is not None
                outputs[1].copy_(sources[0])
        self.joined = dict.fromkeys(self.members, (None, None))
        self.delivered = True


@dataclass(frozen=True)
class _Attendance:
    """One rank's end of a meeting. What it put in is in use until the rank has waited, as on any network."""

    meeting: _Meeting
    buffers: tuple[Tensor | None, ...]

    def done(self) -> bool:
        return self.meeting.delivered

    def wait(self) -> None:
        assert self.meeting.delivered, "the scheduler goes on with a rank only when what it waits for is complete"


def _sum(parts: list[Tensor], output: Tensor) -> Tensor:
    output.copy_(parts[0])
    for part in parts[1:]:
        output.add_(part)
    return output


class _Network:
    """The meetings that are not complete. The k-th communications that ranks issue on one channel meet."""

    def __init__(self, delayed: bool) -> None:
        self.deliverable: list[_Meeting] = []
        self._delayed = delayed
        self._open: dict[tuple[object, ...], deque[_Meeting]] = {}

    def reset(self) -> None:
        """Forget what a step that failed left behind."""
        self.deliverable.clear()
        self._open.clear()

    def join(
        self,
        channel: tuple[object, ...],
        members: tuple[int, ...],
        rank: int,
        what: str,
        source: Tensor | None,
        output: Tensor | None,
    ) -> _Attendance:
        """Put in this rank's end of the next meeting it has not joined on the channel."""
        queue = self._open.get(channel)
        if queue is None:
            queue = self._open[channel] = deque()
        for meeting in queue:
            if rank not in meeting.joined:
                break
        else:
            meeting = _Meeting(what, members)
            queue.append(meeting)
        assert meeting.what == what, f"rank {rank} issues {what} where its peers issue {meeting.what}"
        meeting.joined[rank] = (source, output)
        if len(meeting.joined) == len(members):
            queue.popleft()  # members join a channel's meetings in order, so that the first one fills up first
            if self._delayed:
                self.deliverable.append(meeting)
            else:
                meeting.deliver()
        return _Attendance(meeting, (source, output))

    def deliver(self, index: int) -> None:
        """Complete one of the meetings that everybody has joined."""
        self.deliverable.pop(index).deliver()


class _Link:
    """One rank's communicator."""

    def __init__(self, network: _Network, mesh: Mesh, rank: int) -> None:
        self._network, self._rank = network, rank
        self._groups = {axis: mesh.group(rank, axis) for axis in mesh.coordinates(rank)}
        self._channels = {axis: (axis, *group) for axis, group in self._groups.items()}

    def all_gather(self, axis: str, output: Tensor, source: Tensor) -> Handle:
        return self._collective(axis, "all_gather", source, output)

    def reduce_scatter(self, axis: str, output: Tensor, source: Tensor) -> Handle:
        return self._collective(axis, "reduce_scatter", source, output)

    def all_reduce(self, axis: str, value: Tensor) -> Handle:
        return self._collective(axis, "all_reduce", value, value)

    def broadcast(self, axis: str, value: Tensor, source: int) -> Handle:
        return self._collective(axis, f"broadcast {source}", value, value)

    def send(self, stage: int, wire: Tensor) -> Handle:
        peer = self._groups["pp"][stage]
        channel = (self._rank, peer)
        return self._network.join(channel, channel, self._rank, "transfer", wire, None)

    def recv(self, stage: int, wire: Tensor) -> Handle:
        peer = self._groups["pp"][stage]
        channel = (peer, self._rank)
        return self._network.join(channel, channel, self._rank, "transfer", None, wire)

    def _collective(self, axis: str, what: str, source: Tensor, output: Tensor) -> Handle:
        return self._network.join(self._channels[axis], self._groups[axis], self._rank, what, source, output)
