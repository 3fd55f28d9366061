"""One rank's communicator among ranks of one machine, through shared memory; see neighbours.py.

By trial, an exchange of 10 MB between two ranks takes 2.3 ms here and three to four times that in gloo over loopback,
whose threads also take the cores and the caches from the computation.

Large values go in pieces, a few at a time, so that what lies in shared memory is small beside them. What lies in memory
that all members have need not go at all; see common_memory.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from graphshard.mesh import Mesh
from graphshard.runtime.arena import Shared
from graphshard.runtime.background import in_background
from graphshard.runtime.collectives import add_up
from graphshard.runtime.common_memory import CHANNELS, CommonMemory, Gather, Reduction, Unread
from graphshard.runtime.handles import Handle
from graphshard.runtime.machine import Communicator
from graphshard.runtime.neighbours import Arrival, Neighbours

_PIECE_BYTES = 2**23
_UNDER_WAY = 4
"""Pieces, over one axis, that a rank puts into shared memory before it has read the answer to the first of them."""

_LISTEN_S = 0.01
"""How long a rank that waits for another machine listens to its neighbours at a time."""

_SMALL_BYTES = 2**18  # goes at once, and is not counted


class Exchange:
    """Values that are to come; ``finish`` gets their bytes when they all have, and ``after`` is complete."""

    __slots__ = ("_after", "_arrivals", "_finish", "_link", "peers")

    def __init__(
        self,
        link: SharedMemoryCommunicator,
        arrivals: Sequence[Arrival] = (),
        finish: Callable[[list[Tensor]], None] = lambda values: None,
        after: Exchange | None = None,
    ) -> None:
        self._link, self._arrivals, self._finish, self._after = link, arrivals, finish, after
        self.peers = [arrival.peer for arrival in arrivals]

    def done(self) -> bool:
        return not self._arrivals

    def wait(self) -> None:
        self._link.complete(self)

    def complete(self) -> bool:
        """Finish if everything has come; whether it had."""
        values = [arrival.value for arrival in self._arrivals if arrival.value is not None]
        if len(values) < len(self._arrivals) or not (self._after is None or self._after.done()):
            return False
        self._finish(values)
        self._link.release(self._arrivals)
        self._arrivals = ()
        return True


class Pieces:
    """Exchanges that are one communication, in order; ``starts`` begin those that have not begun."""

    __slots__ = ("_link", "begun", "peers", "starts")

    def __init__(
        self, link: SharedMemoryCommunicator, starts: Iterable[Callable[[], Exchange]], peers: list[int]
    ) -> None:
        self._link, self.starts, self.peers = link, deque(starts), peers
        self.begun: deque[Exchange] = deque()

    def done(self) -> bool:
        return not self.begun and not self.starts

    def wait(self) -> None:
        self._link.complete(self)

    def complete(self) -> bool:
        """If all has begun, finish what has come; whether that was all."""
        return not self.starts and self.finish()

    def finish(self) -> bool:
        """Finish what has come, in order; whether that was all."""
        while self.begun and self.begun[0].complete():
            self.begun.popleft()
        return self.done()


class Beyond:
    """What leaves the machine. While this rank waits for it, it serves what its neighbours wait for: a rank of another
    machine may wait for one of them."""

    __slots__ = ("_handle", "_link", "peers")

    def __init__(self, link: SharedMemoryCommunicator, handle: Handle) -> None:
        self._link, self._handle = link, handle
        self.peers = getattr(handle, "peers", ())

    def done(self) -> bool:
        return self._handle.done()

    def wait(self) -> None:
        self._link.serve_during(self._handle.wait)


class SharedMemoryCommunicator:
    """Asynchronous communication of ``rank``; see machine.Communicator. ``beyond`` serves what leaves the machine."""

    def __init__(self, mesh: Mesh, rank: int, neighbours: Neighbours, beyond: Communicator, timeout_s: float) -> None:
        self._neighbours, self._beyond, self._timeout_s = neighbours, beyond, timeout_s
        self._at = mesh.coordinates(rank)
        self._members = {axis: mesh.group(rank, axis) for axis in self._at}
        self._others = {axis: [peer for peer in peers if peer != rank] for axis, peers in self._members.items()}
        self._near = {axis for axis, peers in self._others.items() if peers and neighbours.ranks.issuperset(peers)}
        # Two channels for an axis, because an all-reduce is two exchanges, and one for transfers between stages.
        self._channels = {axis: (2 + CHANNELS) * place for place, axis in enumerate(self._at)}
        self._transfers = (2 + CHANNELS) * len(self._at)
        self._common = {
            axis: CommonMemory(neighbours, self._members[axis], rank, channel + 2, timeout_s, self.complete)
            for axis, channel in self._channels.items()
            if axis in self._near
        }
        # First halves of all-reduces, by axis in the order of their start: plans order collectives along an axis alone.
        self._reducing: dict[str, deque[Exchange]] = {axis: deque() for axis in self._at}
        # By axis, what is not complete and in pieces: none may begin before an earlier one, as order is all there is.
        self._queues: dict[str, deque[Pieces]] = {axis: deque() for axis in self._at}

    def all_gather(self, axis: str, output: Tensor, source: Tensor) -> Handle:
        if axis not in self._near or not source.numel():
            return Beyond(self, self._beyond.all_gather(axis, output, source))
        common = self._common[axis]
        if (place := common.shared.gathered.offset(output)) >= 0:
            return self._begun(common.gather(output, source, place))
        if (number := common.shared.residents.number(output)) >= 0:
            return self._begun(common.show(number))
        mine, parts, channel = source.view(-1), output.view(len(self._members[axis]), -1), self._channels[axis]

        def start(piece: slice) -> Exchange:
            self._neighbours.put(self._others[axis], channel, mine[piece])
            return self._gather(axis, channel, parts[:, piece].unbind(), mine[piece])

        return self._in_pieces(axis, mine, start)

    def reduce_scatter(self, axis: str, output: Tensor, source: Tensor) -> Handle:
        if axis not in self._near or not source.numel():
            return Beyond(self, self._beyond.reduce_scatter(axis, output, source))
        common = self._common[axis]
        if (place := common.shared.own.offset(source)) >= 0:
            return self._begun(common.reduce(output, source, place))
        parts, total = source.view(len(self._members[axis]), -1), output.view(-1)

        def start(piece: slice) -> Exchange:
            return self._reduce(axis, parts[:, piece].unbind(), total[piece], lambda: None)

        return self._in_pieces(axis, total, start)

    def all_reduce(self, axis: str, value: Tensor) -> Handle:
        if axis not in self._near or not value.numel():
            return Beyond(self, self._beyond.all_reduce(axis, value))
        flat, channel, put = value.view(-1), self._channels[axis] + 1, self._neighbours.put

        def start(piece: slice) -> Exchange:
            parts = flat[piece].tensor_split(len(self._members[axis]))
            mine = parts[self._at[axis]]
            reduction = self._reduce(axis, parts, mine, lambda: put(self._others[axis], channel, mine))
            self._reducing[axis].append(reduction)
            return self._gather(axis, channel, parts, mine, reduction)

        return self._in_pieces(axis, flat, start)

    def broadcast(self, axis: str, value: Tensor, source: int) -> Handle:
        if axis not in self._near or not value.numel():
            return Beyond(self, self._beyond.broadcast(axis, value, source))
        channel, flat = self._channels[axis], value.view(-1)

        def start(piece: slice) -> Exchange:
            if self._at[axis] == source:
                self._neighbours.put(self._others[axis], channel, flat[piece])
                return Exchange(self)
            arrival = self._neighbours.expect(self._members[axis][source], channel)
            return Exchange(self, [arrival], lambda values: _copy(values[0], flat[piece]))

        return self._in_pieces(axis, flat, start)

    def send(self, stage: int, wire: Tensor) -> Handle:
        peer = self._members["pp"][stage]
        if peer not in self._neighbours.ranks or not wire.numel():
            return Beyond(self, self._beyond.send(stage, wire))
        self._go_on()
        self._neighbours.put([peer], self._transfers, wire)
        return Exchange(self)

    def recv(self, stage: int, wire: Tensor) -> Handle:
        peer = self._members["pp"][stage]
        if peer not in self._neighbours.ranks or not wire.numel():
            return Beyond(self, self._beyond.recv(stage, wire))
        arrival = self._neighbours.expect(peer, self._transfers)
        return Exchange(self, [arrival], lambda values: _copy(values[0], wire))

    def complete(self, exchange: Exchange | Pieces | Gather | Reduction | Unread) -> None:
        """Wait until ``exchange`` is complete.

        Raises:
            PeerGone: it never will be.
            TookTooLong: it is not in time.
        """
        deadline = time.monotonic() + self._timeout_s
        self._neighbours.listen()
        self._go_on()
        while not exchange.complete():
            self._neighbours.wait_for(exchange.peers, deadline)
            self._go_on()

    def progress(self, wait_s: float) -> None:
        """Serve what others wait for, while this rank waits elsewhere: until something comes, at most ``wait_s``.

        Raises:
            PeerGone: some rank cannot go on.
        """
        self._neighbours.check()
        self._neighbours.listen(wait_s)
        self._go_on()

    def serve_during(self, wait: Callable[[], object]) -> None:
        """Call ``wait``, which does not return before others have done something, and meanwhile go on with what is
        under way here.

        Raises:
            PeerGone: some rank cannot go on.
        """
        if not self._is_awaited():  # nor will it be, as this rank begins nothing meanwhile
            wait()
            return
        waiting = in_background(wait, "graphshard-beyond")
        while self._is_awaited() and not waiting.done():
            self.progress(_LISTEN_S)
        waiting.result()

    def _is_awaited(self) -> bool:
        """Whether neighbours may wait for something that this rank has begun and not ended, or not told them yet."""
        waiting = self._neighbours.is_behind or any(common.is_awaited() for common in self._common.values())
        return waiting or any(self._reducing.values()) or any(self._queues.values())

    def release(self, arrivals: Sequence[Arrival]) -> None:
        """The values have been read."""
        for arrival in arrivals:
            self._neighbours.release(arrival)

    @property
    def shared(self) -> dict[str, Shared]:
        """By axis, memory that the members along it have in common."""
        return {axis: common.shared for axis, common in self._common.items()}

    def _begun(self, handle: Handle) -> Handle:
        self._neighbours.listen()
        self._go_on()
        return handle

    def _in_pieces(self, axis: str, value: Tensor, start: Callable[[slice], Exchange]) -> Handle:
        """A communication over ``axis``, of ``value`` and what is as long; ``start`` begins it for some elements."""
        self._go_on()
        queue, length = self._queues[axis], max(1, _PIECE_BYTES // value.itemsize)
        if value.nbytes <= _SMALL_BYTES and not any(pieces.starts for pieces in queue):
            return start(slice(None))
        starts = [partial(start, slice(at, at + length)) for at in range(0, value.numel(), length)]
        pieces = Pieces(self, starts, self._others[axis])
        queue.append(pieces)
        self._go_on()
        return pieces

    def _gather(
        self, axis: str, channel: int, parts: Sequence[Tensor], mine: Tensor, made: Exchange | None = None
    ) -> Exchange:
        """Receive every member's part, but this rank's, which is ``mine``, once it is ``made``."""
        arriving = [part for part, peer in zip(parts, self._members[axis], strict=True) if peer in self._others[axis]]
        if parts[self._at[axis]].data_ptr() != mine.data_ptr():
            parts[self._at[axis]].copy_(mine)

        def store(values: list[Tensor]) -> None:
            for value, part in zip(values, arriving, strict=True):
                _copy(value, part)

        return Exchange(self, [self._neighbours.expect(peer, channel) for peer in self._others[axis]], store, made)

    def _reduce(self, axis: str, parts: Sequence[Tensor], total: Tensor, then: Callable[[], None]) -> Exchange:
        """Give every member its part, and add up what they have for this rank, in the order of the members."""
        others, channel, place = self._others[axis], self._channels[axis], self._at[axis]
        for part, peer in zip(parts, self._members[axis], strict=True):
            if peer in others:
                self._neighbours.put([peer], channel, part)

        def add(values: list[Tensor]) -> None:
            mine = parts[place].clone() if place >= 2 else parts[place]  # ``total`` may be the same memory
            terms = [value.view(mine.dtype) for value in values]
            terms.insert(place, mine)
            add_up(terms, total)
            then()

        return Exchange(self, [self._neighbours.expect(peer, channel) for peer in others], add)

    def _go_on(self) -> None:
        """Begin the second half of all-reduces whose first half has arrived, and pieces that wait for earlier ones; go
        on in common memory, last: who puts something in takes in what has come, and nothing may come after that."""
        went_on = True
        while went_on:  # what began may have been waited for
            for reducing in self._reducing.values():
                while reducing and reducing[0].complete():
                    reducing.popleft()
            went_on = any(self._begin(queue) for queue in self._queues.values() if queue)
        for common in self._common.values():
            common.go_on()

    def _begin(self, queue: deque[Pieces]) -> bool:
        """Finish what has come, and begin in order as many pieces as may be under way; whether any began."""
        began = False
        while queue:
            while queue and queue[0].finish():
                queue.popleft()
            under_way = sum(len(pieces.begun) for pieces in queue)
            waiting = next((pieces for pieces in queue if pieces.starts), None)
            if waiting is None or under_way >= _UNDER_WAY:
                break
            waiting.begun.append(waiting.starts.popleft()())
            began = True
        return began


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source.view(target.dtype))
