"""CUDA graphs of an emulated GPU: operators and kernels are noted while they are captured, undone, and done again when
a graph is replayed. Import it through emulated.gpu.

A pool's memory is not used again, whatever it is said to be: what lies there is not overwritten as it would be; that is
what recorded.OnCpu is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from recorded import Log

_device = torch.ops.emulated_gpu
_refused = (torch.ops.aten._local_scalar_dense.default,)


class CUDAGraph:
    """torch.cuda.CUDAGraph."""

    capturing: CUDAGraph | None = None

    def __init__(self) -> None:
        self._log: Log | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert CUDAGraph.capturing is None and torch.cuda.current_stream() != torch.cuda.default_stream()
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        CUDAGraph.capturing, self._log = self, Log(_refused)
        _device.watch(False)  # nothing is done yet
        self._entered = ExitStack()
        self._entered.enter_context(self._log)

    def capture_end(self) -> None:
        if CUDAGraph.capturing is not self or self._log is None:
            raise RuntimeError("capture_end() called without a corresponding capture_begin()")
        CUDAGraph.capturing = None
        self._entered.close()
        self._log.undo()
        _device.watch(True)

    def replay(self) -> None:
        assert self._log is not None
        self._log.again()

    def launch(self, kernel: Callable[[], None], written: Sequence[Tensor]) -> None:
        """A kernel is captured that writes to those."""
        assert self._log is not None
        with _disable_current_modes():
            self._log.note(kernel, written)
            kernel()


def emulate() -> None:
    """Have torch.cuda find it."""
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph_pool_handle = CUDAGraph, object
    torch._C._cuda_endAllocateToPool = lambda *_: None
