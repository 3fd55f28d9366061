"""NCCL between emulated GPUs, which gloo carries; import it through emulated.gpu.

As with the real one, tensors are contiguous ones of the device, of a type that NCCL knows, and tags mean nothing. Every
group has a stream, so that reading a result before the work was waited for is a race, and the host waits for the other
ranks when a group is used for the first time. Whoever waits longer than the group's limit is aborted; a peer that died
is not noticed before. Unlike the real one the host waits until a transfer has been carried out, since what is computed
next is computed at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

_TYPES = (
    torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip

_device = torch.ops.emulated_gpu
_ProcessGroup: Any = dist.ProcessGroup


class Work:
    """A transfer that its group's stream carries out."""

    def __init__(self, group: ProcessGroupNCCL, works: Sequence[Any], keep: Sequence[Tensor], end: Callable[[], None]):
        self._group, self._works, self._keep, self._end = group, works, keep, end
        self._issued = group.stream.record_event()
        self._began, self._done = time.monotonic(), False

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Have the current stream wait."""
        assert timeout is None, "with a timeout the host would wait"
        if not self._done:
            left = self._began + self._group.timeout_s - time.monotonic()
            try:
                for work in self._works:
                    work.wait(timedelta(seconds=max(left, 1e-3)))
            except RuntimeError as error:
                self._abort(error)
            self._end()
            self._done = True
        torch.cuda.current_stream().wait_event(self._issued)
        self._works = self._keep = ()
        return True

    def is_completed(self) -> bool:
        return self._done

    def _abort(self, error: RuntimeError) -> None:
        """As the watchdog does, when the time is over."""
        time.sleep(max(0.0, self._began + self._group.timeout_s - time.monotonic()))
        print(f"[emulated NCCL] watchdog: a transfer timed out ({error})", file=sys.stderr, flush=True)
        os.abort()


class ProcessGroupNCCL(_ProcessGroup):  # type: ignore[misc]
    """What torch.distributed makes for backend "nccl"."""

    class Options:
        _timeout: timedelta

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        super().__init__(rank, size)
        self._store, self._rank, self._size = store, rank, size
        self.timeout_s = options._timeout.total_seconds()
        self.stream = torch.cuda.Stream()
        self._carrier: Any = None
        self._group_name = self._group_desc = ""

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Work:
        assert options is None or options.reduceOp == dist.ReduceOp.SUM
        (value,) = tensors
        (seen,) = self._seen(writes=tensors)
        return self._work([self._gloo().allreduce([seen])], (value,))

    def broadcast(self, tensors: list[Tensor], options: Any) -> Work:
        (value,) = tensors
        given = {"reads" if options.rootRank == self._rank else "writes": tensors}
        (seen,) = self._seen(**given)
        return self._work([self._gloo().broadcast([seen], options)], (value,))

    def all_gather_single(self, output: Tensor, given: Tensor, options: Any = None) -> Work:
        assert output.numel() == self._size * given.numel() and output.dtype == given.dtype
        source, target = self._seen(reads=[given], writes=[output])
        parts = list(target.view(self._size, -1))
        return self._work([self._gloo().allgather([parts], [source.view(-1)])], (output, given))

    def reduce_scatter_single(self, output: Tensor, given: Tensor, options: Any = None) -> Work:
        assert options is None or options.reduceOp == dist.ReduceOp.SUM
        assert given.numel() == self._size * output.numel() and output.dtype == given.dtype
        source, target = self._seen(reads=[given], writes=[output])
        total = source.clone().view(self._size, -1)

        def end() -> None:
            target.view(-1).copy_(total[self._rank])

        return self._work([self._gloo().allreduce([total])], (output, given), end)

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # names before torch 2.13

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        (seen,) = self._seen(reads=tensors)
        return self._work([self._gloo().send([seen], to, 0)], tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work:
        (seen,) = self._seen(writes=tensors)
        return self._work([self._gloo().recv([seen], source, 0)], tensors)

    def barrier(self, options: Any = None) -> Work:
        return self.allreduce([torch.ones(1, device="cuda")])

    def _seen(self, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()) -> list[Tensor]:
        """The memory of what a transfer reads and writes, in the group's stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        for value in (*reads, *writes):
            assert value.is_cuda, "No backend type associated with device type cpu"
            assert value.device.index == _device.current_device(0), f"{value.device} is not the current device"
            assert value.is_contiguous(), "Tensors must be contiguous"
            assert value.dtype in _TYPES, f"Unconvertible NCCL type {value.dtype}"
        with torch.cuda.stream(self.stream):
            seen = [_device.seen_by(value, False, "a transfer") for value in reads]
            return seen + [_device.seen_by(value, True, "a transfer") for value in writes]

    def _work(self, works: Sequence[Any], keep: Sequence[Tensor], end: Callable[[], None] = lambda: None) -> Work:
        return Work(self, works, tuple(keep), end)

    def _gloo(self) -> Any:
        """Made when it is first used, which all ranks have to come to."""
        if self._carrier is None:
            device = str(_device.current_device(0))
            self._store.set(f"device of {self._rank}", device)
            others = [self._store.get(f"device of {rank}").decode() for rank in range(self._size) if rank != self._rank]
            assert device not in others, f"Duplicate GPU detected: {others} and {device}"
            timeout = timedelta(seconds=self.timeout_s)
            self._carrier = distributed_c10d.ProcessGroupGloo(self._store, self._rank, self._size, timeout=timeout)
        return self._carrier

    # What torch.distributed asks of a group and of its backend.

    def _get_backend(self, device: torch.device) -> ProcessGroupNCCL:
        if device.type != "cuda":
            raise RuntimeError(f"No backend type associated with device type {device.type}")
        return self

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802
        return "nccl"

    def _set_sequence_number_for_group(self) -> None: ...

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, text: str) -> None:
        self._group_desc = text

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    @property
    def uid(self) -> int:
        return -1

    def shutdown(self) -> None:
        self._carrier = None

    abort = shutdown


def emulate() -> None:
    """Have torch.distributed find it."""
    there: Any = distributed_c10d
    there.ProcessGroupNCCL, there._NCCL_AVAILABLE = ProcessGroupNCCL, True
    torch._C._nccl_version = lambda: 2 << 32
