"""Collectives of ranks of one machine in memory that they have in common: what is gathered is written there once, for
all of them, or lies there for good; and what is reduced is read where it was made, in memory that its maker alone
writes.

All ranks run the same instructions, and notes say how far each is; see neighbours.py.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from graphshard.runtime.arena import Arena, Block, Residents, Shared, SharedArena
from graphshard.runtime.collectives import add_up
from graphshard.runtime.handles import Handle
from graphshard.runtime.neighbours import Arrival, Neighbours, PeerGone

CHANNELS = 3
"""How many channels of Neighbours one takes: a note for a gather may come behind one for a later reduction."""


class CommonMemory:
    """That of ``members``, all ranks along an axis, one of which is ``rank``. ``channel`` is the first of its own;
    ``complete`` waits for a handle."""

    def __init__(
        self,
        neighbours: Neighbours,
        members: Sequence[int],
        rank: int,
        channel: int,
        timeout_s: float,
        complete: Callable[[Gather | Reduction | Unread], None],
    ) -> None:
        self._neighbours, self._members, self._timeout_s = neighbours, members, timeout_s
        self.others = [peer for peer in members if peer != rank]
        self.complete = complete
        self._gathering, self._reducing, self._residing = range(channel, channel + CHANNELS)
        self._gathers: deque[Gather] = deque()  # whose part is to be written
        self._reductions: deque[Reduction] = deque()  # that are to be added up
        self.reduced = 0  # reductions that this rank has begun
        place = members.index(rank)
        gathered = SharedArena(partial(self._block, self._gathering, members), partial(self._let_go, self._gathering))
        given = (Arena(partial(self._block, self._reducing, [m, *(n for n in members if n != m)])) for m in members)
        let_go, count = partial(self._let_go, self._residing), len(members)
        residents = Residents(partial(self._block, self._residing, members), let_go, place, count)
        self.shared = Shared(gathered, tuple(given), residents, place, self._agree, self._unread)

    def gather(self, output: Tensor, source: Tensor, place: int) -> Handle:
        """``output``, which lies at ``place`` on all members, becomes their ``source`` tensors in order."""
        part = output.view(len(self._members), -1)[self.shared.place]
        arrivals = self.expected(self._gathering)
        gather = Gather(self, arrivals, place, (part, source.view(-1)), self.shared.gathered.let_go_of)
        self._gathers.append(gather)
        return gather

    def show(self, number: int) -> Handle:
        """The members' parts of a resident are what it becomes."""
        self._neighbours.tell_part(self.others, self._residing, number, 0)
        return Gather(self, self.expected(self._residing), number)

    def reduce(self, output: Tensor, source: Tensor, place: int) -> Handle:
        """``output`` becomes this rank's part of the sum of the members' ``source`` tensors, which lie in their own
        blocks, this rank's at ``place``."""
        self._neighbours.tell_part(self.others, self._reducing, place, source.nbytes)
        self.reduced += 1
        arrivals = self.expected(self._reducing)
        reduction = Reduction(self, arrivals, source.view(len(self._members), -1)[self.shared.place], output.view(-1))
        self._reductions.append(reduction)
        return reduction

    def _unread(self) -> Handle:
        return Unread(self, self.shared.residents.let_go_of)

    def go_on(self) -> None:
        """Do what can be done of what was begun."""
        while self._gathers and self._gathers[0].write():
            self._gathers.popleft()
        while self._reductions and self._reductions[0].add_up():
            self._reductions.popleft()

    def is_awaited(self) -> bool:
        """Whether others may wait for something that this rank has begun and not ended."""
        return bool(self._gathers or self._reductions)

    def expected(self, channel: int) -> list[Arrival]:
        """Of the others, of the next value of a kind."""
        return [self._neighbours.expect(peer, channel) for peer in self.others]

    def may_write(self, count: int) -> bool:
        """Whether the others have let go of so many values that were gathered."""
        return self._neighbours.let_go(self.others, self._gathering) >= count

    def is_unread(self, count: int) -> bool:
        """Whether the others have let go of so many residents."""
        return self._neighbours.let_go(self.others, self._residing) >= count

    def wrote(self, place: int, nbytes: int) -> None:
        """This rank's part of what is gathered at ``place`` is there."""
        self._neighbours.tell_part(self.others, self._gathering, place, nbytes)

    def was_read(self, count: int) -> bool:
        """Whether the others have added up so many values."""
        return self._neighbours.let_go(self.others, self._reducing) >= count

    def read(self) -> None:
        """This rank has added up one more value."""
        self._neighbours.tell_gone(self.others, self._reducing)

    def bytes(self, peer: int, place: int, nbytes: int) -> Tensor:
        """What lies at ``place`` in the block of ``peer``."""
        return self.shared.given[self._members.index(peer)].bytes(place, nbytes)

    def _agree(self, text: str) -> bool:
        """Whether all members give the same text."""
        digest = hashlib.sha256(text.encode()).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        self._neighbours.put(self.others, self._gathering, mine)
        same = True
        for arrival in self.expected(self._gathering):
            deadline = time.monotonic() + self._timeout_s
            while arrival.value is None:
                self._neighbours.wait_for([arrival.peer], deadline)
            same = torch.equal(arrival.value, mine) and same
            self._neighbours.release(arrival)
        return same

    def _block(self, channel: int, members: Sequence[int], nbytes: int) -> Block:
        """Memory that the first of ``members`` makes for all."""
        return self._neighbours.common(members, channel, nbytes, time.monotonic() + self._timeout_s)

    def _let_go(self, channel: int) -> None:
        self._neighbours.tell_gone(self.others, channel)


class Gather:
    """The value at ``place``. Of what is ``unwritten``, a part of it and its source, the source is to become the part
    once the others have let go of the values that this rank had let go of when it ``asked``: these may have lain
    there."""

    __slots__ = ("_arrivals", "_asked", "_memory", "_place", "_unwritten", "peers")

    def __init__(
        self,
        memory: CommonMemory,
        arrivals: list[Arrival],
        place: int,
        unwritten: tuple[Tensor, Tensor] | None = None,
        asked: int = 0,
    ) -> None:
        self._memory, self._arrivals, self._place = memory, arrivals, place
        self._unwritten, self._asked = unwritten, asked
        self.peers = memory.others

    def write(self) -> bool:
        """Whether this rank's part is there."""
        if self._unwritten is not None and self._memory.may_write(self._asked):
            part, source = self._unwritten
            part.copy_(source)
            self._memory.wrote(self._place, part.nbytes)
            self._unwritten = None
        return self._unwritten is None

    def done(self) -> bool:
        return self._unwritten is None and not self._arrivals

    def wait(self) -> None:
        self._memory.complete(self)

    def complete(self) -> bool:
        """Whether all parts are there."""
        if self._unwritten is not None or any(arrival.value is None for arrival in self._arrivals):
            return False
        if elsewhere := [arrival.peer for arrival in self._arrivals if arrival.block != self._place]:
            raise PeerGone(f"rank {elsewhere[0]} puts its part of what is gathered elsewhere")
        self._arrivals = []
        return True


class Reduction:
    """``total`` is to become the sum of ``mine`` and what the others have for this rank; what this rank has for them
    must stay until they have read it."""

    __slots__ = ("_arrivals", "_count", "_memory", "_mine", "_total", "peers")

    def __init__(self, memory: CommonMemory, arrivals: list[Arrival], mine: Tensor, total: Tensor) -> None:
        self._memory, self._arrivals, self._mine, self._total = memory, arrivals, mine, total
        self._count = memory.reduced
        self.peers = memory.others

    def add_up(self) -> bool:
        """Whether the sum is there."""
        if self._arrivals and all(arrival.value is not None for arrival in self._arrivals):
            memory, nbytes, place = self._memory, self._mine.nbytes, self._memory.shared.place
            theirs = [memory.bytes(a.peer, a.block + place * nbytes, nbytes) for a in self._arrivals]
            terms = [term.view(self._mine.dtype) for term in theirs]
            terms.insert(place, self._mine)
            add_up(terms, self._total)
            self._memory.read()
            self._arrivals = []
        return not self._arrivals

    def done(self) -> bool:
        return self.complete()

    def wait(self) -> None:
        self._memory.complete(self)

    def complete(self) -> bool:
        """Whether the sum is there, and the others have read what they need."""
        return not self._arrivals and self._memory.was_read(self._count)


class Unread:
    """The others are to let go of ``count`` residents."""

    __slots__ = ("_count", "_memory", "peers")

    def __init__(self, memory: CommonMemory, count: int) -> None:
        self._memory, self._count, self.peers = memory, count, memory.others

    def done(self) -> bool:
        return self._memory.is_unread(self._count)

    def wait(self) -> None:
        self._memory.complete(self)

    def complete(self) -> bool:
        return self.done()
