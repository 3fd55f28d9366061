"""One rank of a plan over torch.distributed: NCCL between GPUs; gloo between CPUs, shared memory within a machine."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from graphshard.errors import (
    CallMismatch,
    NonFiniteStep,
    PeerFailed,
    PeerNotReady,
    PlanMismatch,
    RanksError,
    RanksOutOfStep,
    WaitTimeout,
)
from graphshard.execution import ExecutionPlan, Op, Ref, TensorType
from graphshard.fingerprints import collectives_of, transfers_of
from graphshard.mesh import Mesh, ranks_by
from graphshard.runtime.blame import Blame, first_line
from graphshard.runtime.collectives import TorchCommunicator, Works
from graphshard.runtime.council import TorchCouncil
from graphshard.runtime.executor import Executor, Loaded, absent
from graphshard.runtime.groups import Groups, join_world, make_control, make_groups
from graphshard.runtime.handles import Handle
from graphshard.runtime.machine import Communicator, Machine, SharedLayouts, Value
from graphshard.runtime.neighbours import Neighbours, PeerGone
from graphshard.runtime.overdue import Overdue
from graphshard.runtime.shared_memory import SharedMemoryCommunicator

logger = logging.getLogger("graphshard")

T = TypeVar("T")

_COMMUNICATION = (Op.GATHER, Op.REDUCE, Op.SEND, Op.RECV)
_FAILING_S = 2.0  # how long a rank that lost a peer looks for the reason


class DistributedExecutor(Executor):
    """This process is one rank of ``mesh``.

    A step or a reading that a rank gives up in its middle leaves messages on their way, which whatever comes next would
    take for its own: from then on this rank raises RanksOutOfStep instead of communicating.

    Args:
        device: "cpu": ranks of one machine exchange through shared memory, unless GRAPHSHARD_SHARED_MEMORY=0 is in the
            environment of one of them, and others over gloo. "cuda": NCCL, on the GPU that LOCAL_RANK names.
        path: a folder for what is offloaded to files.
        cudagraphs: capture segments as CUDA graphs.
        timeout_s: a rank that waits longer in one instruction raises WaitTimeout. On a GPU the host may be ahead: it
            raises in its next step, or logs the error and ends the process where it waits for the device itself.

    Raises:
        NoProcessGroup: no process group is running and no launcher's environment is set.
        WorldSizeMismatch: the mesh has another size than the process group.
        PlanMismatch: another rank has another mesh or another ``measure_memory``.
    """

    cure: ClassVar[str] = RanksOutOfStep.CURE

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device | str = "cpu",
        *,
        timeout_s: float = 600.0,
        measure_memory: bool = False,
        path: str | None = None,
        cudagraphs: bool = False,
    ) -> None:
        device = torch.device(device)
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        join_world(device, timeout_s)
        self.timeout_s = timeout_s
        self._control = make_control(mesh, timeout_s, measure_memory)
        self.rank = dist.get_rank()
        super().__init__(mesh, (self.rank,), device, measure_memory, path, cudagraphs)
        self._neighbours = Neighbours(self._control, timeout_s) if device.type == "cpu" else None
        alone = self._neighbours is not None and len(self._neighbours.ranks) == mesh.world_size - 1
        # Each of gloo's groups has a thread that looks a hundred times a second whether there is something to do.
        self._groups = Groups() if alone else make_groups(mesh, device, timeout_s)
        self._link: Communicator = TorchCommunicator(mesh, self.rank, self._groups, device.type != "cuda", timeout_s)
        if self._neighbours is not None:
            self._link = SharedMemoryCommunicator(mesh, self.rank, self._neighbours, self._link, timeout_s)
            self._shared = self._link.shared if self.arenas else {}
        self._blame = Blame(mesh, self.rank, self._control.group_name)
        in_vain = partial(_waits_in_vain, mesh, self.rank, self._blame, timeout_s)
        self._overdue = Overdue(timeout_s, self._blame.is_trouble, in_vain) if device.type == "cuda" else None
        self._fingerprints: dict[int, tuple[int, int]] = {}
        self._layouts: dict[int, SharedLayouts] = {}  # by the fingerprint of collectives
        self._gave_up = ""  # why this rank may not communicate any more
        atexit.register(_close, weakref.ref(self))  # before the world is left

    def close(self) -> None:
        """Give back what there is outside of memory, and leave the process groups; there are no more steps."""
        super().close()
        if self._overdue is not None:
            self._overdue.close()
        if self._neighbours is not None:
            self._neighbours.close()
            self._neighbours = None
        if not self._gave_up:  # else a thread may wait for ranks that do not come, and nobody waits for it
            self._end_threads()

    def _end_threads(self) -> None:
        """Let go of process groups: gloo's threads end with the last that holds their group. One that is there while
        Python ends, and then lets go of a tensor that it was given, would abort the process."""
        if dist.is_initialized() and "_control" in vars(self):
            for group in (self._control, *self._groups.own()):
                dist.destroy_process_group(group)
        for name in ("_control", "_groups", "_link", "_shared"):
            vars(self).pop(name, None)
        self._loaded.clear()
        gc.collect()  # what is in common memory knows its communicator

    def choices(self) -> dict[str, str]:
        if self._neighbours is None:
            return super().choices() | {"exchange": "NCCL"}
        near, others = len(self._neighbours.ranks), self.mesh.world_size - 1
        exchange = f"shared memory with {near} of {others} other ranks, gloo with the rest"
        if near in (0, others):
            exchange = "shared memory" if near else "gloo"
        return super().choices() | {"exchange": exchange}

    def told(self, mine: T, at: str) -> list[T]:
        given = [(at, mine)] * self.mesh.world_size
        with self._together(PeerNotReady, PlanMismatch):
            agreement = _Agreement(self, _Doing.EXCHANGE)
            self._complete(agreement, at)
            self._agree(agreement)
            try:
                dist.all_gather_object(given, given[self.rank], group=self._control)
            except RuntimeError as error:
                raise PeerFailed(self.rank, at, "its peer", first_line(error), self._give_up("its peer", at)) from error
            if len(calls := ranks_by([what for what, _ in given])) > 1:
                raise CallMismatch(calls)
        return [value for _, value in given]

    def load(self, plan: ExecutionPlan) -> Loaded:
        self._check_in_step()  # rather than that a value is lost, which no loading would mend
        loaded = super().load(plan)
        if id(plan) not in self._fingerprints:
            self._fingerprints[id(plan)] = collectives_of(plan), transfers_of(plan)
        return loaded

    def forget(self, plan: ExecutionPlan) -> None:
        super().forget(plan)
        self._fingerprints.pop(id(plan), None)

    def read(self, ref: Ref, stage: int, kind: TensorType, axis: str = "", everywhere: bool = True) -> Tensor | None:
        self._check_there(ref, stage)
        with self._together():
            return self._read(ref, stage, kind, axis, everywhere)

    def _check_there(self, ref: Ref, stage: int) -> None:
        """Raise the same on all ranks if one of ``stage`` lacks the value. What failed on one rank may have lost it
        there alone: the others would begin to read, and that rank's next collective would be taken for its part."""
        lacks = self._ranks_of(stage) and ref not in self.stores[self.rank]
        mine = [self.lost[self.rank].get(ref)] if lacks else []
        if reasons := [why for reason in self.told(mine, f"reading {ref}") for why in reason]:
            raise absent(ref.name, reasons[0])

    def _read(self, ref: Ref, stage: int, kind: TensorType, axis: str, everywhere: bool) -> Tensor | None:
        size = self.mesh.size(axis) if axis else 1
        shape = (kind.shape[0] * size, *kind.shape[1:]) if size > 1 else kind.shape
        full = torch.empty(shape, dtype=kind.dtype, device=self.device)
        if self.mesh.coordinates(self.rank)["pp"] == stage:
            mine = self.stored(self.rank, ref).contiguous()
            if size > 1:
                self._complete(self._link.all_gather(axis, full, mine), f"gather of {ref}")
            else:
                full.copy_(mine)
        if not everywhere and self.mesh.dp_rank(self.rank) != 0:
            return None
        self._complete(self._link.broadcast("pp", full, stage), f"broadcast of {ref}")
        if everywhere and not axis:
            for data_axis in ("shard", "dp"):
                self._complete(self._link.broadcast(data_axis, full, 0), f"broadcast of {ref}")
        return full if everywhere or self.rank == 0 else None

    def _communicator(self, rank: int) -> Communicator:
        return self._link

    def _cannot_begin(self, error: Exception) -> None:
        """Say so instead of comparing plans. What others have begun they cannot end; if no rank has begun, all may try
        again."""
        if self._gave_up or isinstance(error, RanksError):
            return  # they know
        logger.warning("graphshard: rank %d cannot begin, and tells the others: %s", self.rank, first_line(error))
        with suppress(PeerFailed, WaitTimeout), self._together():
            agreement = _Agreement(self, _Doing.STEP, ready=False)
            self._complete(agreement, "comparing plans")
            if agreement.has_begun():
                self._leave(error)

    def _run(self, loaded: Loaded, values: dict[int, dict[Ref, Value]], first: bool) -> dict[int, dict[Ref, Value]]:
        with self._together():
            agreement = _Agreement(self, _Doing.STEP, loaded, first)
            if not loaded.steps:
                self._complete(agreement, "comparing plans")  # before anything that could hang if they differ
        if not loaded.steps:
            self._agree(agreement)
            with self._together():
                self._share(loaded, agreement)
        with self._together(NonFiniteStep):  # all ranks raise it
            self._move_in(loaded, values[self.rank], first)
            return self._run_agreed(loaded, values, first, agreement)

    def _share(self, loaded: Loaded, agreement: _Agreement) -> None:
        """Have the memory that ranks share. Where others have begun, as they do with a shape that this rank alone had
        not met, it is as in an earlier step: the first one with these collectives was that of all."""
        at = "making memory that ranks share"
        collectives, _ = self._fingerprints[id(loaded.plan)]
        known = self._layouts[collectives] if agreement.has_begun() else None
        sharing = _Sharing(loaded.machines[self.rank], known)
        try:
            self._complete(sharing, at)
            self._layouts[collectives] = sharing.agreed
        except OSError as error:
            error.add_note(f"on rank {self.rank}, {at}")
            self._blame.fail(f"{type(error).__name__}: {first_line(error)}", at)
            raise

    def _move_in(self, loaded: Loaded, values: dict[Ref, Value], first: bool) -> None:
        """Put parts of what ranks gather where the others find them: what was stored since the last step is not there,
        and others may still read in their last step what is."""
        elsewhere = loaded.machines[self.rank].elsewhere(values, first)
        if elsewhere:
            for shared in self._shared.values():
                self._complete(shared.unread(), "writing what others read")
        store = self.stores[self.rank]
        for ref, part in elsewhere.items():
            value = values[ref]
            assert isinstance(value, Tensor)
            values[ref] = part.copy_(value)
            if ref in store:
                store[ref] = part

    def _agree(self, agreement: _Agreement) -> None:
        """Before this rank begins: it may go on after an error if none of the others has begun."""
        try:
            agreement.check()
        except RanksError as error:
            if agreement.has_begun():
                self._leave(error)
            raise

    def _run_agreed(
        self, loaded: Loaded, values: dict[int, dict[Ref, Value]], first: bool, agreement: _Agreement
    ) -> dict[int, dict[Ref, Value]]:
        machine = loaded.machines[self.rank]
        council = self._council() if loaded.plan.watched else None
        steps = machine.step(values[self.rank], first, council=council)
        while True:
            handle = None  # what the one before kept may go
            try:
                handle = next(steps)
            except StopIteration as end:
                self._complete(agreement, "comparing plans")
                agreement.check()
                return {self.rank: end.value}
            except NonFiniteStep:
                self._complete(agreement, "comparing plans")
                agreement.check()
                raise
            except Exception as error:
                at = loaded.instruction_of(self.rank)
                if isinstance(error, RuntimeError) and machine.instruction.op in _COMMUNICATION:
                    agreement.explain()
                    account = self._give_up("its peer", at)
                    raise PeerFailed(self.rank, at, "its peer", first_line(error), account) from error
                error.add_note(f"on rank {self.rank} in instruction {at}")
                self._blame.fail(f"{type(error).__name__}: {first_line(error)}", at)
                raise
            assert handle is not None, "a machine that is not preempted stops only where it must wait"
            self._complete(handle, lambda: loaded.instruction_of(self.rank), agreement)

    @contextmanager
    def _together(self, *harmless: type[Exception]) -> Iterator[None]:
        """Around what ranks do together: once it ends with an error, an interrupt too, other than ``harmless`` ones,
        this rank communicates no more, and the others need not wait for it.

        Raises:
            RanksOutOfStep: such a thing has failed here before.
        """
        self._check_in_step()
        try:
            yield
        except harmless:
            raise
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Communicate no more: the others need not wait."""
        self._gave_up = first_line(error)
        if self._overdue is not None:
            self._overdue.close()  # Python is not waiting for the device, and the caller may go on to something else
        self._alarm()
        self._blame.leave(error)

    def _check_in_step(self) -> None:
        """Raise what keeps this rank from doing anything with the others."""
        if self._gave_up:
            raise RanksOutOfStep(self.rank, self._gave_up)
        if self._overdue is not None and (error := self._overdue.error()) is not None:
            self._leave(error)
            raise error

    def _hear(self, work: dist.Work) -> None:
        """Wait for control messages, and meanwhile serve neighbours, and hear whether a device waits in vain."""
        timeout = timedelta(seconds=self.timeout_s)
        if isinstance(self._link, SharedMemoryCommunicator):
            self._link.serve_during(lambda: work.wait(timeout))
        elif self._overdue is None:
            work.wait(timeout)
        else:
            self._overdue.hear(work, self.timeout_s)

    def _council(self) -> TorchCouncil:
        near = self._neighbours is not None and self._neighbours.ranks
        progress = self._link.progress if near and isinstance(self._link, SharedMemoryCommunicator) else time.sleep
        return TorchCouncil(self._control, self.timeout_s, progress)

    def _complete(self, handle: Handle, what: str | Callable[[], str], agreement: _Agreement | None = None) -> None:
        """Wait for ``handle``; what goes wrong is put into words."""
        began = time.monotonic()
        if self._overdue is not None and isinstance(handle, Works):
            self._overdue.started(handle, what if isinstance(what, str) else what())
        try:
            handle.wait()
        except RuntimeError as error:
            late = time.monotonic() - began >= 0.95 * self.timeout_s
            if agreement is not None:
                agreement.explain()
            at = what if isinstance(what, str) else what()
            peers = _name(self.mesh, self.rank, getattr(handle, "peers", range(self.mesh.world_size)))
            account = self._give_up(peers, at)
            if late:
                raise WaitTimeout(self.rank, at, peers, self.timeout_s, account) from error
            raise PeerFailed(self.rank, at, peers, first_line(error), account) from error

    def _give_up(self, peers: str, at: str) -> str:
        """Tell the others that this rank waits in vain, and hear what they say; see Blame.account."""
        self._alarm()
        return self._blame.account(peers, at, self._neighbours.ended if self._neighbours is not None else ())

    def _alarm(self) -> None:
        if self._neighbours is not None:
            self._neighbours.alarm()


@dataclass
class _Sharing:
    """The memory that a machine shares with those of other ranks, as something to wait for."""

    machine: Machine
    known: SharedLayouts | None
    agreed: SharedLayouts = field(default_factory=dict)

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        self.agreed = self.machine.share(self.known)


class _Doing(IntEnum):
    """What ranks do together."""

    STEP = 0
    EXCHANGE = 1  # they tell each other something, or read what they store


_CALLS = {_Doing.STEP: "a step or evaluation", _Doing.EXCHANGE: "state_dict, load_state_dict, close or a first step"}


class _Said(NamedTuple):
    """What a rank says of what it is about to do; numbers."""

    doing: int
    collectives: int = 0  # fingerprints of the plan
    transfers: int = 0
    first: int = 0  # whether there is no optimizer state yet
    ready: int = 1
    begins: int = 0  # whether it begins before it has heard of the others


class _Agreement:
    """All ranks tell each other in the background what they are about to do. Whatever they do together begins with one:
    a rank that does something else, or cannot begin, is known by it.

    Args:
        loaded: what to run; a plan that ran before is begun at once.
        ready: False: this rank cannot begin what the others may.
    """

    peers: tuple[int, ...] = ()

    def __init__(
        self,
        executor: DistributedExecutor,
        doing: _Doing,
        loaded: Loaded | None = None,
        first: bool = False,
        ready: bool = True,
    ) -> None:
        self._mesh = executor.mesh
        said = _Said(doing, ready=ready)
        if loaded is not None:
            said = _Said(doing, *executor._fingerprints[id(loaded.plan)], first, ready, begins=loaded.steps > 0)
        mine = torch.tensor(said, device="cpu")
        self._all = [torch.empty_like(mine) for _ in range(self._mesh.world_size)]
        self._work = dist.all_gather(self._all, mine, group=executor._control, async_op=True)
        self._hear = executor._hear
        self.peers = tuple(rank for rank in range(self._mesh.world_size) if rank != executor.rank)

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        # A rank that has not come so far may wait for something that this one has not told it yet.
        try:
            self._hear(self._work)
        except PeerGone:
            self.explain()
            raise

    def check(self) -> None:
        """Compare: what is done, collectives on all ranks, transfers on the ranks of one pipeline, whether there is
        optimizer state.

        Raises:
            PlanMismatch, CallMismatch: they differ.
            PeerNotReady: a rank cannot begin.
        """
        said = self._said()
        if late := [rank for rank, one in enumerate(said) if not one.ready]:
            raise PeerNotReady(late)
        if len({one.doing for one in said}) > 1:
            raise CallMismatch(ranks_by([_CALLS[_Doing(one.doing)] for one in said]))
        if len({one.collectives for one in said}) > 1:
            raise PlanMismatch("plan (its collectives)", ranks_by([_short(one.collectives) for one in said]))
        for dp_rank in range(self._mesh.dp_size):
            pipeline = [rank for rank in range(self._mesh.world_size) if self._mesh.dp_rank(rank) == dp_rank]
            if len({said[rank].transfers for rank in pipeline}) > 1:
                by_plan = ranks_by([_short(one.transfers) for one in said])
                kept = {plan: [rank for rank in ranks if rank in pipeline] for plan, ranks in by_plan.items()}
                raise PlanMismatch("plan (its transfers)", {plan: ranks for plan, ranks in kept.items() if ranks})
        if len({one.first for one in said}) > 1:
            raise PlanMismatch("optimizer state", ranks_by(["none" if one.first else "some" for one in said]))

    def has_begun(self) -> bool:
        """Whether any rank did not wait to hear of the others."""
        return any(one.begins for one in self._said())

    def _said(self) -> list[_Said]:
        return [_Said(*given.tolist()) for given in self._all]

    def explain(self) -> None:
        """After a failure: raise PlanMismatch or PeerNotReady if that is why."""
        try:
            self._work.wait(timedelta(seconds=_FAILING_S))
        except RuntimeError:
            return  # a rank is gone before it could tell: the caller reports that
        self.check()


def _close(executor: weakref.ref[DistributedExecutor]) -> None:
    """Close what is still there."""
    if (there := executor()) is not None:
        there.close()


def _short(value: int) -> str:
    return f"{value & 0xFFFFFFFF:08x}"


def _name(mesh: Mesh, rank: int, ranks: Iterable[int]) -> str:
    """``ranks`` but for ``rank`` itself."""
    others = [other for other in ranks if other != rank]
    return ", ".join(f"rank {other} (stage {mesh.coordinates(other)['pp']})" for other in others)


def _waits_in_vain(
    mesh: Mesh, rank: int, blame: Blame, timeout_s: float, works: Works, at: str, late: bool
) -> RanksError:
    """The error of a rank whose GPU waits for ``works``: ``late`` for too long, else for ranks of which one gave up."""
    peers = _name(mesh, rank, works.peers)
    account = blame.account(peers, at, ())
    if late:
        return WaitTimeout(rank, at, peers, timeout_s, account)
    return PeerFailed(rank, at, peers, "some rank gave up", account)
