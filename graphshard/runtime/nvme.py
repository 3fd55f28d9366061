"""Values in a file: written and read in the background, around the page cache where the file system can.

The file has no name, so that nothing is left of it whenever and however the process ends; where it must have one for a
moment, the next process removes what is left (leftovers.py). It grows before it is written
to: a disk without room says so then. A value has a region of its own, and a transfer is cut into pieces that a few
threads carry out, so that one is copied while another is on its way.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphshard.errors import OffloadFailed, OffloadFileLimit, OffloadPath, OffloadSpace
from graphshard.execution import TensorType
from graphshard.offloaded import span
from graphshard.runtime.leftovers import make_file, remove_leftovers
from graphshard.runtime.streams import Lane, streams_of

ALIGN = 4096
"""What direct access wants offsets, lengths and addresses to be multiples of; of every disk's block."""

PIECE = 1 << 20
"""Bytes of one read or write; large enough for a disk's full bandwidth."""

THREADS = 4
"""Pieces on their way at a time, some transferred while others are copied: a disk is faster with more than one."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class Region:
    """A span of the file. It is free again when neither a value nor a transfer holds it."""

    offset: int
    nbytes: int


class Disk:
    """One process's file in the folder ``path``. It is given back on ``close``, or when nobody holds this any more: a
    transfer under way does.

    Raises:
        OffloadPath: the folder does not exist, or no file can be made there.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.path, self._device = path, device
        self._file, self.direct = _open(path)
        self._size = 0
        self._free: dict[int, list[int]] = {}  # by length: offsets
        self._made: dict[int, int] = {}  # by length: how many there are
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="graphshard-nvme")
        self._staging = threading.local()
        self._under_way: set[Future[None]] = set()
        self._streams = streams_of(device)
        # The last to hold this may be a thread of the pool, at the end of its transfer, or the garbage collector
        # anywhere: so nothing is waited for. The threads end with the pool.
        self._give_back = weakref.finalize(self, _give_back, self._file)
        self._give_back.atexit = False  # the kernel does it

    def describe(self) -> str:
        """How it is accessed."""
        return f"{'O_DIRECT' if self.direct else 'buffered'} in {self.path}"

    def reserve(self, regions: Mapping[int, int]) -> None:
        """Grow the file so that there are so many regions of each number of bytes.

        Raises:
            OffloadSpace, OffloadFileLimit: the disk, or what a file may hold, has no room.
        """
        wanted: dict[int, int] = {}
        for nbytes, count in regions.items():
            wanted[_rounded(nbytes)] = wanted.get(_rounded(nbytes), 0) + count
        missing = {n: count - self._made.get(n, 0) for n, count in wanted.items() if count > self._made.get(n, 0)}
        begin = self._size
        self._grow(sum(n * count for n, count in missing.items()))
        for length, count in missing.items():
            self._free.setdefault(length, []).extend(range(begin, begin + length * count, length))
            self._made[length] = self._made.get(length, 0) + count
            begin += length * count

    def allocate(self, nbytes: int) -> Region:
        """A region for ``nbytes``.

        Raises:
            OffloadSpace, OffloadFileLimit: the disk, or what a file may hold, has no room.
        """
        length = _rounded(nbytes)
        if not self._free.get(length):
            self.reserve({length: self._made.get(length, 0) + 1})
        free = self._free[length]
        region = Region(free.pop(), nbytes)
        weakref.finalize(region, free.append, region.offset).atexit = False
        return region

    def write(self, value: Tensor, region: Region) -> Pieces:
        """Start writing ``value``, which must stay as it is until that is done."""
        return self._transfer(value, region, self._write)

    def read(self, region: Region, value: Tensor) -> Pieces:
        """Start reading into ``value``."""
        return self._transfer(value, region, self._read)

    def settle(self) -> None:
        """Return when all transfers have ended, well or not, also those that nobody waits for."""
        wait(list(self._under_way))

    def close(self) -> None:
        """Give the file back when what is on its way has ended."""
        self._pool.shutdown()
        self._give_back()

    def _grow(self, nbytes: int) -> None:
        if not nbytes:
            return
        try:
            os.posix_fallocate(self._file, self._size, nbytes)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise OffloadFileLimit(self.path, self._size + nbytes, _file_limit()) from error
            if error.errno not in _FULL:
                raise OffloadFailed(self.path, f"cannot grow: {error.strerror}") from error
            status = os.statvfs(self.path)
            free = None if error.errno == errno.EDQUOT else status.f_bavail * status.f_frsize
            raise OffloadSpace(self.path, nbytes, free, str(error.strerror)) from error
        self._size += nbytes

    def _transfer(self, value: Tensor, region: Region, move: Callable[[Tensor, int], None]) -> Pieces:
        whole = value.as_strided((region.nbytes // value.element_size(),), (1,), value.storage_offset())
        held = _Held((whole.view(torch.uint8), region))
        computed = self._streams.record(Lane.COMPUTE)

        def run(at: int) -> None:
            self._streams.hold(Lane.FILE, computed)
            assert held.moved is not None, "nobody has waited before all pieces had ended"
            data, there = held.moved
            move(data[at : at + PIECE], there.offset + at)

        pieces = []
        for at in range(0, region.nbytes, PIECE):
            pieces.append(self._pool.submit(run, at))
            self._under_way.add(pieces[-1])
            pieces[-1].add_done_callback(self._under_way.discard)
        return Pieces(pieces, held)

    def empty(self, kind: TensorType) -> Tensor:
        """Memory to read a value into. A large one is aligned, to be read, and written again, without a copy."""
        nbytes = span(kind)
        if nbytes < PIECE or self._device.type != "cpu":
            return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=self._device)
        # With a storage of its own, of which offsets in views count from the beginning; pages are aligned.
        flat = torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=kind.dtype)
        return flat.as_strided(kind.shape, kind.stride)

    def _write(self, piece: Tensor, offset: int) -> None:
        if self._is_aligned(piece):
            self._all(os.pwritev, "write", _memory(piece), offset)
            return
        buffer, memory = self._buffers()
        self._copy(buffer[: piece.numel()], piece)
        self._all(os.pwritev, "write", memory[: _rounded(piece.numel())], offset)

    def _read(self, piece: Tensor, offset: int) -> None:
        if self._is_aligned(piece):
            self._all(os.preadv, "read", _memory(piece), offset)
            return
        buffer, memory = self._buffers()
        self._all(os.preadv, "read", memory[: _rounded(piece.numel())], offset)
        self._copy(piece, buffer[: piece.numel()])

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Copy now: the one in host memory is this thread's buffer, which is used again at once."""
        self._streams.copy(Lane.FILE, target, source)
        self._streams.block(self._streams.record(Lane.FILE))

    def _all(self, call: Callable[..., int], what: str, memory: memoryview, offset: int) -> None:
        """A system call may move fewer bytes than asked for, and is made again for the rest; but not for none, and not
        within a block."""
        while memory:
            try:
                count = call(self._file, [memory], offset)
            except OSError as error:
                raise OffloadFailed(self.path, f"{what} at byte {offset}: {error.strerror}") from error
            if count <= 0 or count % ALIGN:
                raise OffloadFailed(self.path, f"short {what} at byte {offset}: {count} of {len(memory)} bytes")
            memory, offset = memory[count:], offset + count

    def _is_aligned(self, piece: Tensor) -> bool:
        return self._device.type == "cpu" and not (piece.data_ptr() % ALIGN or piece.numel() % ALIGN)

    def _buffers(self) -> tuple[Tensor, memoryview]:
        """This thread's own: a piece, at an aligned address."""
        if not hasattr(self._staging, "piece"):
            whole = torch.empty(PIECE + ALIGN, dtype=torch.uint8, device="cpu", pin_memory=self._streams.pins)
            piece = whole[-whole.data_ptr() % ALIGN :][:PIECE]
            self._staging.piece = piece, _memory(piece)
        made: tuple[Tensor, memoryview] = self._staging.piece
        return made


@dataclass
class _Held:
    """The bytes that a transfer moves and their place, which nobody else may have before its end.

    The threads hold it, and not who waits alone: after a failed step nobody waits, and the transfer goes on. But a
    thread forgets its work only some time after the end of it; so who has waited takes out what is in here.
    """

    moved: tuple[Tensor, Region] | None


@dataclass(frozen=True)
class Pieces:
    """A transfer on its way."""

    futures: list[Future[None]]
    held: _Held

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return all(future.done() for future in self.futures)

    def wait(self) -> None:
        """Return when it has ended. Raises OffloadFailed."""
        wait(self.futures)  # all of them, also where one has failed: then nothing is on its way any more
        self.held.moved = None
        for future in self.futures:
            future.result()


def _give_back(file: int) -> None:
    with suppress(OSError):  # nobody wants what it could not write
        os.close(file)


def _memory(piece: Tensor) -> memoryview:
    """The bytes of ``piece``, which must outlive this."""
    return memoryview((ctypes.c_char * piece.numel()).from_address(piece.data_ptr())).cast("B")


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def check_folder(path: str) -> None:
    """Whether a file can be made in the folder ``path``, as far as that can be told without making one.

    Raises:
        OffloadPath: it does not exist, or may not be written to.
    """
    if not Path(path).is_dir():
        raise OffloadPath(path, "is not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise OffloadPath(path, "may not be written to")


def _open(path: str) -> tuple[int, bool]:
    """A file without a name in the folder ``path``, and whether it is accessed directly."""
    check_folder(path)
    remove_leftovers(path)
    error: OSError | None = None
    for direct in (getattr(os, "O_DIRECT", 0), 0):
        try:
            return _unnamed(path, direct), bool(direct)
        except OSError as failed:
            error = failed
    assert error is not None
    raise OffloadPath(path, f"takes no file: {error.strerror}")


def _unnamed(path: str, flags: int) -> int:
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):  # not every file system can: one that has a name for a moment will do
            return os.open(path, os.O_TMPFILE | os.O_RDWR | flags, 0o600)
    made, name = make_file(path)
    os.close(made)
    try:
        return os.open(name, os.O_RDWR | flags)
    finally:
        Path(name).unlink()


def _file_limit() -> str:
    """What keeps a file from growing: the process's limit, or the file system's."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "the file system" if soft == resource.RLIM_INFINITY else f"the file size limit (ulimit -f) of {soft:,} bytes"
