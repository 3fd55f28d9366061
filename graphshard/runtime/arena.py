"""One rank's block of memory, in which a step's values lie where the plan's layout says; see graphshard/arena.py."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphshard.arena import Layout
from graphshard.execution import Place, TensorType

Wanted = tuple[int, TensorType]
"""A byte offset, and the tensor that begins there."""


class Arena:
    """Grows to the largest layout that is used in it: steps of several plans, which never run at once, share it."""

    def __init__(self) -> None:
        self._block: mmap.mmap | bytearray = bytearray()
        self._given: list[tuple[Sequence[Wanted], list[Tensor]]] = []

    @property
    def nbytes(self) -> int:
        return len(self._block)

    def reserve(self, nbytes: int) -> None:
        """Have at least so many bytes; tensors that were given lie in the new block then, with other contents."""
        if nbytes <= self.nbytes:
            return
        for _, tensors in self._given:
            tensors.clear()
        self._block = bytearray()  # before there is another one
        self._block = _new_block(nbytes)
        for wanted, tensors in self._given:
            tensors += map(self._tensor, wanted)

    def tensors(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Tensors in the block, which must be large enough; the list has others after it has grown."""
        result = list(map(self._tensor, wanted))
        self._given.append((wanted, result))
        return result

    def _tensor(self, wanted: Wanted) -> Tensor:
        offset, kind = wanted
        count = kind.storage_bytes // kind.dtype.itemsize
        # With a storage of its own, of which offsets in views count from the beginning.
        part = torch.frombuffer(self._block, dtype=kind.dtype, count=count, offset=offset)
        return part.as_strided(kind.shape, kind.stride)


class Placing:
    """Memory for what the instructions of a step make: in ``arena`` where ``layout`` says so, newly allocated
    otherwise."""

    def __init__(self, device: torch.device, arena: Arena | None = None, layout: Layout | None = None) -> None:
        self._device, self._arena, self._layout = device, arena, layout or Layout()
        if arena is not None:
            arena.reserve(self._layout.nbytes)

    def of_run(self, position: int, places: Sequence[Place]) -> Callable[[int], Tensor]:
        """What the segment of a RUN calls with the number of a place."""
        kinds = [place.type for place in places]
        offsets = self._layout.runs.get(position) if self._arena is not None else None
        offsets = offsets or (None,) * len(places)
        numbers = [number for number, offset in enumerate(offsets) if offset is not None]
        inside = self._inside([(offsets[number], kinds[number]) for number in numbers])
        if len(numbers) == len(places):
            return inside.__getitem__
        index = {number: at for at, number in enumerate(numbers)}

        def memory(number: int) -> Tensor:
            at = index.get(number)
            return self._new(kinds[number]) if at is None else inside[at]

        return memory

    def of_result(self, position: int, kind: TensorType) -> Callable[[], Tensor]:
        """What gives memory for the result of a communication."""
        offset = self._layout.made.get(position)
        if offset is None or self._arena is None:
            return lambda: self._new(kind)
        inside = self._inside([(offset, kind)])
        return lambda: inside[0]

    def _inside(self, wanted: Sequence[tuple[int | None, TensorType]]) -> list[Tensor]:
        known = [(offset, kind) for offset, kind in wanted if offset is not None]
        return self._arena.tensors(known) if self._arena is not None else []

    def _new(self, kind: TensorType) -> Tensor:
        return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self._device)


def _new_block(nbytes: int) -> mmap.mmap | bytearray:
    """Memory whose pages are there once they are written to; large ones, where the system has them."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return bytearray(nbytes)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system has none
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
