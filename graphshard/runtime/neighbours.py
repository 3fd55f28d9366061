"""Ranks on one machine: a value is copied once into shared memory, and a note over a Unix socket says where it lies.

The reader uses it there and answers with a note, so that its owner can write the next value into the same block. Blocks
and sockets have no names in the file system: nothing stays behind, however a process ends; and a peer that ends is
known at once, because its sockets close. Everything happens on the calling thread. Only ``wait_for`` and ``common``
block: a note that a full socket does not take stays here until it does.

Beside blocks of one owner there are common ones, into which several ranks write where they have agreed to; notes say
what is there, and who has let go of how much.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_NOTE = struct.Struct("<BIQQ")  # kind, channel, block or place in common memory, bytes
_CREDENTIALS = struct.Struct("3i")  # process, user, group of the other end; see unix(7), SO_PEERCRED
_FAREWELL_S = 2.0  # how long a process that leaves waits for one that does not listen
_WASTE = 2  # a free block is used for a value when it is at most so many times as large
_SWITCH = "GRAPHSHARD_SHARED_MEMORY"  # "0" in the environment: this rank has no neighbours
_NAMESPACES = ("pid", "net")  # processes that share these reach each other's sockets and see the same process ids


_NOTHING = torch.empty(0, dtype=torch.uint8)


class PeerGone(RuntimeError):
    """Another process has ended, or has said that it cannot go on."""


class TookTooLong(RuntimeError):
    """Nothing came within the time that was given."""


class _Kind(IntEnum):
    BLOCK = 0  # here is a new block: the note carries its file descriptor
    VALUE = 1  # a value lies in this block
    READ = 2  # I have read it
    ALARM = 3  # I cannot go on
    COMMON = 4  # here is the memory that we have in common: the note carries its file descriptor
    PART = 5  # my part of a value lies there
    GONE = 6  # I have let go of one more value there


@dataclass
class Arrival:
    """A value that a peer puts into its shared memory; ``value`` is its bytes there, once it has come. Of a part of a
    common value it is empty, and ``block`` is where that is."""

    peer: int
    value: Tensor | None = None
    block: int = -1


@dataclass
class _Block:
    number: int
    memory: Tensor  # uint8
    readers: int = 0


@dataclass
class _Peer:
    """The other end of one socket."""

    link: socket.socket
    blocks: dict[int, Tensor] = field(default_factory=dict)
    expected: dict[int, deque[Arrival]] = field(default_factory=dict)  # by channel: asked for and not here
    early: dict[int, deque[tuple[int, Tensor]]] = field(default_factory=dict)  # here and not asked for, with its block
    unsent: deque[tuple[bytes, int | None]] = field(default_factory=deque)
    is_full: bool = False  # its socket did not take a note, and says when it has room
    common: dict[int, deque[mmap.mmap]] = field(default_factory=dict)  # by channel, not taken yet
    let_go: Counter[int] = field(default_factory=Counter)  # by channel: values in common memory
    gone: bool = False  # its end is closed
    alarm: bool = False  # it cannot go on


class Neighbours:
    """This rank's connections to the other ranks of its machine.

    On each channel between two ranks, the k-th value that one puts in is the k-th that the other expects.

    Args:
        control: a group of all ranks; every rank must make its Neighbours at the same point.
        timeout_s: how long to wait for the others to connect.

    Raises:
        TookTooLong: another rank did not connect.
    """

    def __init__(self, control: dist.ProcessGroup, timeout_s: float) -> None:
        rank, world_size = dist.get_rank(control), dist.get_world_size(control)
        self._peers: dict[int, _Peer] = {}
        self._by_descriptor: dict[int, int] = {}
        self._blocks: list[_Block] = []
        self._free: list[_Block] = []
        place, given = _place(), [("", "", 0)] * world_size
        if not place:
            dist.all_gather_object(given, ("", "", 0), group=control)
        else:
            self._poll = select.poll()
            with _socket() as listener:
                address = f"\0graphshard-{secrets.token_hex(16)}"  # in the kernel's name space, not the file system's
                listener.bind(address)
                listener.listen(world_size)
                listener.settimeout(timeout_s)
                dist.all_gather_object(given, (place, address, os.getpid()), group=control)
                here = {other: given[other] for other in range(world_size) if given[other][0] == place}
                self._connect({other: where for other, (_, where, _) in here.items() if other < rank})
                self._accept(listener, {process: other for other, (_, _, process) in here.items() if other > rank})
        self.ranks = frozenset(self._peers)

    def _connect(self, addresses: Mapping[int, str]) -> None:
        for rank, address in addresses.items():
            link = _socket()
            link.connect(address)
            self._add(rank, link)

    def _accept(self, listener: socket.socket, rank_of: dict[int, int]) -> None:
        """Wait for the processes that are the keys of ``rank_of``."""
        while rank_of:
            try:
                link, _ = listener.accept()
            except TimeoutError as error:
                raise TookTooLong(f"ranks {sorted(rank_of.values())} did not connect") from error
            credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            process, user, _ = _CREDENTIALS.unpack(credentials)
            if user == os.getuid() and process in rank_of:
                self._add(rank_of.pop(process), link)
            else:
                link.close()  # a stranger

    def put(self, peers: Sequence[int], channel: int, value: Tensor) -> None:
        """Give ``peers`` a contiguous ``value``; it may be changed as soon as this returns.

        Raises:
            PeerGone: one of them has ended.
            OSError: the machine has no memory left for it.
        """
        self.listen()
        for peer in peers:
            if self._peers[peer].gone:
                raise PeerGone(f"rank {peer} has ended")
        block = self._block(value.nbytes)
        block.memory[: value.nbytes].view(value.dtype).copy_(value.view(-1))
        block.readers = len(peers)
        note = _NOTE.pack(_Kind.VALUE, channel, block.number, value.nbytes)
        for peer in peers:
            self._send(self._peers[peer], note)

    def common(self, members: Sequence[int], channel: int, nbytes: int, deadline: float) -> mmap.mmap:
        """Memory of at least so many bytes that all ``members`` have, this rank among them; they call it together, and
        the first of them makes it.

        Raises:
            PeerGone: the first one has ended.
            TookTooLong: it has made none by the ``deadline`` (of time.monotonic).
            OSError: the machine has no memory left for it.
        """
        maker, *others = members
        if maker not in self._peers:
            size = _whole_pages(nbytes)
            note = _NOTE.pack(_Kind.COMMON, channel, 0, size)
            with _shared_memory(size) as descriptor:
                for peer in others:
                    self._send(self._peers[peer], note, descriptor)
                return mmap.mmap(descriptor, size)
        made = self._peers[maker].common.setdefault(channel, deque())
        while not made:
            self.wait_for([maker], deadline)
        return made.popleft()

    def tell_part(self, peers: Sequence[int], channel: int, place: int, nbytes: int) -> None:
        """This rank's part of the next common value lies at ``place``: ``peers`` expect it as any other value."""
        for peer in peers:
            self._send(self._peers[peer], _NOTE.pack(_Kind.PART, channel, place, nbytes))

    def tell_gone(self, peers: Sequence[int], channel: int) -> None:
        """This rank has let go of one more value in common memory."""
        for peer in peers:
            self._send(self._peers[peer], _NOTE.pack(_Kind.GONE, channel, 0, 0))

    def let_go(self, peers: Sequence[int], channel: int) -> int:
        """How many common values all of ``peers`` have let go of, as of what was taken in."""
        return min(self._peers[peer].let_go[channel] for peer in peers)

    def expect(self, peer: int, channel: int) -> Arrival:
        """The next value that ``peer`` puts in on ``channel`` and that was not expected before."""
        state, arrival = self._peers[peer], Arrival(peer)
        if early := state.early.get(channel):
            _fill(arrival, *early.popleft())
        else:
            state.expected.setdefault(channel, deque()).append(arrival)
        return arrival

    @property
    def is_behind(self) -> bool:
        """Whether there are notes that a socket did not take yet."""
        return any(peer.unsent for peer in self._peers.values())

    @property
    def ended(self) -> list[int]:
        """Ranks whose end is closed."""
        return [rank for rank, peer in self._peers.items() if peer.gone]

    def alarm(self) -> None:
        """Tell all others that this rank cannot go on: whoever waits stops waiting."""
        for peer in self._peers.values():
            self._send(peer, _NOTE.pack(_Kind.ALARM, 0, 0, 0))

    def wait_for(self, peers: Sequence[int], deadline: float) -> None:
        """Take in what has come; if nothing has, wait for something until ``deadline`` (of time.monotonic).

        Raises:
            PeerGone: one of ``peers`` has ended, and all that it had sent was taken in before; or some rank cannot
                go on.
            TookTooLong: the deadline has passed.
        """
        self.check(peers)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TookTooLong(f"nothing from ranks {sorted(peers)} in time")
        self.listen(left)

    def check(self, peers: Sequence[int] = ()) -> None:
        """Only as of what was taken in.

        Raises:
            PeerGone: one of ``peers`` has ended, or some rank cannot go on.
        """
        for rank, peer in self._peers.items():
            if peer.gone and rank in peers:
                raise PeerGone(f"rank {rank} has ended")
            if peer.alarm:
                raise PeerGone(f"rank {rank} cannot go on")

    def release(self, arrival: Arrival) -> None:
        """The value has been read: its owner may use the memory again."""
        assert arrival.value is not None
        arrival.value = None
        self._send(self._peers[arrival.peer], _NOTE.pack(_Kind.READ, 0, arrival.block, 0))

    def listen(self, wait_s: float = 0.0) -> None:
        """Take in what has come; wait up to ``wait_s`` until something does."""
        for descriptor, events in self._poll.poll(wait_s * 1000):
            peer = self._peers[self._by_descriptor[descriptor]]
            if events & select.POLLOUT:
                self._flush(peer)
            if events & ~select.POLLOUT:
                self._receive(peer)

    def close(self) -> None:
        """Disconnect. What was put in can still be read."""
        for peer in self._peers.values():
            peer.link.settimeout(_FAREWELL_S)
            with contextlib.suppress(OSError):  # it does not listen any more
                self._flush(peer)
            peer.link.close()
        self._peers.clear()

    def _add(self, rank: int, link: socket.socket) -> None:
        link.setblocking(False)
        self._peers[rank] = _Peer(link)
        self._by_descriptor[link.fileno()] = rank
        self._poll.register(link, select.POLLIN)

    def _block(self, size: int) -> _Block:
        """A free block of at least ``size`` bytes, the smallest that there is, or a new one."""
        fits = [block for block in self._free if size <= block.memory.numel() <= _WASTE * max(size, mmap.PAGESIZE)]
        if fits:
            best = min(fits, key=lambda block: block.memory.numel())
            self._free.remove(best)
            return best
        size = _whole_pages(size)
        with _shared_memory(size) as descriptor:
            block = _Block(len(self._blocks), _map(descriptor, size))
            note = _NOTE.pack(_Kind.BLOCK, 0, block.number, size)
            for peer in self._peers.values():
                self._send(peer, note, descriptor)
        self._blocks.append(block)
        return block

    def _send(self, peer: _Peer, note: bytes, descriptor: int | None = None) -> None:
        peer.unsent.append((note, None if descriptor is None else os.dup(descriptor)))
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        while peer.unsent:
            note, descriptor = peer.unsent[0]
            try:
                if descriptor is None:
                    peer.link.send(note)
                else:
                    socket.send_fds(peer.link, [note], [descriptor])
            except BlockingIOError:
                peer.is_full = True
                self._poll.modify(peer.link, select.POLLIN | select.POLLOUT)
                return
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has ended: _receive notices, after what it had sent
            if descriptor is not None:
                os.close(descriptor)
            peer.unsent.popleft()
        if peer.is_full and not peer.gone:
            peer.is_full = False
            self._poll.modify(peer.link, select.POLLIN)

    def _receive(self, peer: _Peer) -> None:
        while True:
            try:
                note, descriptors, _, _ = socket.recv_fds(peer.link, _NOTE.size, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it ended before it had read everything; what it had sent is still there
            if not note:
                peer.gone = True
                self._poll.unregister(peer.link)
                return
            self._take_in(peer, note, descriptors)

    def _take_in(self, peer: _Peer, note: bytes, descriptors: Sequence[int]) -> None:
        kind, channel, number, size = _NOTE.unpack(note)
        match kind:
            case _Kind.VALUE | _Kind.PART:
                value = peer.blocks[number][:size] if kind == _Kind.VALUE else _NOTHING
                if expected := peer.expected.get(channel):
                    _fill(expected.popleft(), number, value)
                else:
                    peer.early.setdefault(channel, deque()).append((number, value))
            case _Kind.READ:
                block = self._blocks[number]
                block.readers -= 1
                if not block.readers:
                    self._free.append(block)
            case _Kind.GONE:
                peer.let_go[channel] += 1
            case _Kind.ALARM:
                peer.alarm = True
            case _Kind.BLOCK:
                peer.blocks[number] = _map(descriptors[0], size)
                os.close(descriptors[0])
            case _Kind.COMMON:
                peer.common.setdefault(channel, deque()).append(mmap.mmap(descriptors[0], size))
                os.close(descriptors[0])


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _fill(arrival: Arrival, block: int, value: Tensor) -> None:
    arrival.block, arrival.value = block, value


def _whole_pages(nbytes: int) -> int:
    return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE


@contextlib.contextmanager
def _shared_memory(nbytes: int) -> Iterator[int]:
    """A file descriptor of memory without a name."""
    descriptor = os.memfd_create("graphshard")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)  # an error here, not a signal at the first write
        yield descriptor
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _place() -> str:
    """What ranks that can share memory have in common; "" where this one cannot share any, or is not to."""
    if os.environ.get(_SWITCH) == "0":
        return ""
    try:
        os.close(os.memfd_create("graphshard"))
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return " ".join([machine, *(str(Path("/proc/self/ns", name).readlink()) for name in _NAMESPACES)])
    except (AttributeError, OSError):
        return ""
