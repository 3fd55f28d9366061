"""Blocks of memory in which a step's values lie where the plan's layout says; see graphshard/memory/arena.py."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from graphshard.errors import LayoutMismatch
from graphshard.execution import Place, Ref, TensorType
from graphshard.memory.arena import Layout, Resident, aligned
from graphshard.runtime.handles import Handle

Block = mmap.mmap | bytearray

Wanted = tuple[int, TensorType]
"""A byte offset, and the tensor that begins there."""


class _Given(list[Tensor]):
    """Tensors that somebody was given, who may forget them: a plan that is not going to run any more."""

    wanted: Sequence[Wanted]


class Arena:
    """Grows to the largest layout that is used in it: steps of several plans, which never run at once, share it.

    ``block`` makes one of so many bytes.
    """

    def __init__(self, block: Callable[[int], Block] | None = None) -> None:
        self._make = block or _new_block
        self._block: Block = bytearray()
        self._begin = 0  # its address
        self._given: dict[int, weakref.ref[_Given]] = {}  # by identity

    @property
    def nbytes(self) -> int:
        return len(self._block)

    def reserve(self, nbytes: int) -> None:
        """Have at least so many bytes; tensors that were given lie in the new block then, with other contents."""
        if nbytes <= self.nbytes:
            return
        given = [one for ref in self._given.values() if (one := ref()) is not None]
        for one in given:
            one.clear()
        self._block = bytearray()  # before there is another one
        self._block = self._make(nbytes)
        self._begin = torch.frombuffer(self._block, dtype=torch.uint8).data_ptr()
        for one in given:
            self._fill(one)

    def tensors(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Tensors in the block; the list has others after it has grown, and none before it is large enough."""
        given = _Given()
        given.wanted = wanted
        self._fill(given)
        key = id(given)
        self._given[key] = weakref.ref(given, lambda _: self._given.pop(key))
        return given

    def _fill(self, given: _Given) -> None:
        if self._holds(given.wanted):
            given += map(self._tensor, given.wanted)

    def offset(self, tensor: Tensor) -> int:
        """Where in the block the tensor begins, in bytes; -1: it is not there."""
        offset = tensor.data_ptr() - self._begin
        return offset if 0 <= offset < self.nbytes else -1

    def bytes(self, offset: int, nbytes: int) -> Tensor:
        """What lies there, as uint8."""
        return torch.frombuffer(self._block, dtype=torch.uint8, count=nbytes, offset=offset)

    def _holds(self, wanted: Sequence[Wanted]) -> bool:
        return all(offset + kind.storage_bytes <= self.nbytes for offset, kind in wanted)

    def _tensor(self, wanted: Wanted) -> Tensor:
        offset, kind = wanted
        return _tensor(self._block, offset, kind)


class SharedArena(Arena):
    """A block that several ranks have, each of which makes a part of the values there.

    ``tell`` lets the others know that this rank has let go of one more value. All run the same instructions: nobody
    reads what lay in some place if all have let go of as many values as this rank had when it asked for the place.
    """

    def __init__(self, block: Callable[[int], Block], tell: Callable[[], None]) -> None:
        super().__init__(block)
        self._tell = tell
        self.let_go_of = 0

    def let_go(self) -> None:
        """This rank does not read one of the values there any more."""
        self.let_go_of += 1
        self._tell()


class Residents:
    """Values that ``size`` ranks have in blocks that lie there for good: each stores its part of them, this one that at
    ``place``, and writes to it when the others do not read it. ``tell`` as of :class:`SharedArena`."""

    def __init__(self, block: Callable[[int], Block], tell: Callable[[], None], place: int, size: int) -> None:
        self._make, self._tell, self._place, self._size = block, tell, place, size
        self._where: dict[Ref, tuple[Block, int, int]] = {}  # offset, bytes
        self._numbers: dict[int, int] = {}  # by address
        self.let_go_of = 0

    def holds(self, wanted: Mapping[Ref, int]) -> bool:
        """Whether values of so many bytes are there."""
        return all(ref in self._where and self._where[ref][2] == nbytes for ref, nbytes in wanted.items())

    def reserve(self, wanted: Mapping[Ref, int]) -> None:
        """Have room for values of so many bytes."""
        new = {ref: nbytes for ref, nbytes in wanted.items() if not self.holds({ref: nbytes})}
        ends = list(accumulate(aligned(nbytes) for nbytes in new.values()))
        if not new:
            return
        block = self._make(ends[-1])
        for (ref, nbytes), offset in zip(new.items(), [0, *ends], strict=False):
            self._where[ref] = block, offset, nbytes
            address = torch.frombuffer(block, dtype=torch.uint8, count=1, offset=offset).data_ptr()
            self._numbers[address] = len(self._numbers)

    def number(self, value: Tensor) -> int:
        """Which of the values it is, the same on all ranks; -1: none."""
        return self._numbers.get(value.data_ptr(), -1)

    def value(self, ref: Ref, kind: TensorType) -> Tensor:
        """The whole value of which ``ref`` is a part."""
        block, offset, _ = self._where[ref]
        return _tensor(block, offset, kind)

    def part(self, ref: Ref, kind: TensorType) -> Tensor:
        """This rank's part."""
        block, offset, nbytes = self._where[ref]
        return _tensor(block, offset + self._place * (nbytes // self._size), kind)

    def let_go(self) -> None:
        """This rank does not read one of the values any more, until it is gathered again."""
        self.let_go_of += 1
        self._tell()


@dataclass(frozen=True)
class Shared:
    """Memory of the ranks along an axis, this one being at ``place``: one block that all write and read, of each rank
    one that it alone writes, and what lies there for good. They reserve them together, in this order. ``agree``:
    whether all give the same text; they call it together. ``unread``: complete when the others have let go of all
    residents that this rank has let go of."""

    gathered: SharedArena
    given: tuple[Arena, ...]
    residents: Residents
    place: int
    agree: Callable[[str], bool]
    unread: Callable[[], Handle]

    @property
    def own(self) -> Arena:
        """What this rank writes."""
        return self.given[self.place]

    @property
    def nbytes(self) -> int:
        return self.gathered.nbytes + sum(arena.nbytes for arena in self.given)


class Placing:
    """Memory for what the instructions of a step make: in ``arena``, or in the one that ranks along an axis share,
    where ``layout`` says so, newly allocated otherwise."""

    def __init__(
        self,
        device: torch.device,
        arena: Arena | None = None,
        layout: Layout | None = None,
        shared: Mapping[str, Shared] | None = None,
    ) -> None:
        self._device, self._arena, self._layout = device, arena, layout or Layout()
        self._shared = shared or {}
        self._apart: set[str] = set()  # axes along which ranks have other layouts, and share nothing
        if arena is not None:
            arena.reserve(self._layout.nbytes)

    def share(self, known: Mapping[str, str] | None) -> dict[str, str]:
        """Have all the memory that other ranks share; by axis what they have in common, "" if their layouts differ and
        each has memory of its own. Without what is ``known`` of an earlier step they all call it at the same point.

        Raises:
            LayoutMismatch: this layout is not the one that is known.
        """
        agreed: dict[str, str] = {}
        for axis, nbytes in self._layout.shared_bytes.items():
            shared, layout = self._shared[axis], self._layout.shared_along(axis)
            given_bytes, residents = self._layout.given_bytes[axis], self._layout.residents_along(axis)
            if known is not None:
                agreed[axis] = known[axis]
                there = given_bytes <= shared.own.nbytes and shared.residents.holds(residents)
                if known[axis] and (known[axis] != layout or not there):
                    raise LayoutMismatch(axis)
            elif shared.agree(f"{layout} {given_bytes}"):
                agreed[axis] = layout
                shared.gathered.reserve(nbytes)
                for arena in shared.given:
                    arena.reserve(given_bytes)
                shared.residents.reserve(residents)
            else:
                agreed[axis] = ""
            if not agreed[axis]:
                self._apart.add(axis)
        return agreed

    def behind(self) -> dict[int, list[Callable[[], None]]]:
        """What to call behind instructions, by position."""
        found: dict[int, list[Callable[[], None]]] = {}
        for place in self._layout.gathered.values():
            let_go = partial(self._let_go, place.axis, self._shared[place.axis].gathered)
            found.setdefault(place.until, []).append(let_go)
        for resident in self._layout.residents.values():
            let_go = partial(self._let_go, resident.axis, self._shared[resident.axis].residents)
            found.setdefault(resident.until, []).append(let_go)
        return found

    def _let_go(self, axis: str, memory: SharedArena | Residents) -> None:
        if axis not in self._apart:
            memory.let_go()

    def before(self) -> dict[int, list[Callable[[], Handle | None]]]:
        """What gives a handle that must be complete before an instruction begins, by position."""
        found: dict[int, list[Callable[[], Handle | None]]] = {}
        for axis, positions in self._layout.replaced.items():
            for position in positions:
                found.setdefault(position, []).append(partial(self._unread, axis))
        return found

    def _unread(self, axis: str) -> Handle | None:
        return None if axis in self._apart else self._shared[axis].unread()

    def parts(self, kinds: Mapping[Ref, TensorType]) -> dict[Ref, Tensor]:
        """Where this rank is to store its parts of what lies in shared memory for good."""
        residents = {resident.ref: resident.axis for resident in self._layout.residents.values()}
        return {
            ref: self._shared[axis].residents.part(ref, kinds[ref])
            for ref, axis in residents.items()
            if axis not in self._apart
        }

    def of_run(self, position: int, places: Sequence[Place]) -> Callable[[int], Tensor]:
        """What the segment of a RUN calls with the number of a place."""
        kinds = [place.type for place in places]
        offsets = self._layout.runs.get(position) if self._arena is not None else None
        offsets = offsets or (None,) * len(places)
        numbers = [number for number, offset in enumerate(offsets) if offset is not None]
        inside = self._inside([(offsets[number], kinds[number]) for number in numbers])
        if len(numbers) == len(places):
            return inside.__getitem__
        found = {number: (inside, at, "") for at, number in enumerate(numbers)}
        for number, kind in enumerate(kinds):
            if (given := self._layout.given.get((position, number))) is not None:
                found[number] = self._shared[given.axis].own.tensors([(given.offset, kind)]), 0, given.axis

        def memory(number: int) -> Tensor:
            tensors, at, axis = found.get(number, ([], 0, ""))
            return self._new(kinds[number]) if not tensors or axis in self._apart else tensors[at]

        return memory

    def of_result(self, position: int, kind: TensorType) -> Callable[[], Tensor]:
        """What gives memory for the result of a communication."""
        if (gathered := self._layout.gathered.get(position)) is not None:
            axis, common = gathered.axis, self._shared[gathered.axis].gathered.tensors([(gathered.offset, kind)])
            return lambda: self._new(kind) if axis in self._apart else common[0]
        if (resident := self._layout.residents.get(position)) is not None:
            return self._of_resident(resident, kind)
        offset = self._layout.made.get(position)
        if offset is None or self._arena is None:
            return lambda: self._new(kind)
        inside = self._inside([(offset, kind)])
        return lambda: inside[0]

    def _of_resident(self, resident: Resident, kind: TensorType) -> Callable[[], Tensor]:
        axis, found = resident.axis, list[Tensor]()

        def memory() -> Tensor:
            if axis in self._apart:
                return self._new(kind)
            if not found:
                found.append(self._shared[axis].residents.value(resident.ref, kind))
            return found[0]

        return memory

    def _inside(self, wanted: Sequence[tuple[int | None, TensorType]]) -> list[Tensor]:
        known = [(offset, kind) for offset, kind in wanted if offset is not None]
        return self._arena.tensors(known) if self._arena is not None else []

    def _new(self, kind: TensorType) -> Tensor:
        return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self._device)


def _tensor(block: Block, offset: int, kind: TensorType) -> Tensor:
    """With a storage of its own, of which offsets in views count from the beginning."""
    count = kind.storage_bytes // kind.dtype.itemsize
    return torch.frombuffer(block, dtype=kind.dtype, count=count, offset=offset).as_strided(kind.shape, kind.stride)


def _new_block(nbytes: int) -> Block:
    """Memory whose pages are there once they are written to; large ones, where the system has them."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return bytearray(nbytes)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system has none
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
