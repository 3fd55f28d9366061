"""A plugin of pytest's (``-p emulated.gpu``): torch sees CUDA devices, which the CPU emulates; see device.cpp.

What the tests of a GPU run on it is what they run on a real one: plans with Triton kernels, which Triton interprets,
transfers in streams, another allocator, tensors that do not mix with the host's, processes that exchange over NCCL (see
nccl.py). A test fails that lets two streams use the same memory in no order. How fast anything is, what NVIDIA's
libraries compute, and how CUDA graphs use memory again, are not emulated.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

_SOURCE = Path(__file__).with_name("device.cpp")
_BUILD = Path(__file__).parents[2] / "build"


def _built() -> Path:
    """The library, compiled for the torch that is installed, which need not have been imported."""
    version = importlib.metadata.version("torch")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    library = _BUILD / f"emulated-gpu-{hashlib.sha256(_SOURCE.read_bytes() + version.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _BUILD.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        include, lib = torch_folder / "include", torch_folder / "lib"
        assert not (lib / "libtorch_cuda.so").exists(), "this torch was built with CUDA: it has devices of its own"
        paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
        compiler = [os.environ.get("CXX", "g++"), "-O1", "-std=c++20", "-shared", "-fPIC", "-w", str(_SOURCE)]
        subprocess.run([*compiler, "-o", str(partial), *paths, "-ltorch_cpu", "-lc10"], check=True)
        partial.rename(library)
    return library


# Torch asks once whether there are devices, when it is imported; Triton once whether to interpret.
assert not {"torch", "triton"} & sys.modules.keys(), "emulated.gpu has to come before torch: pytest -p emulated.gpu"
ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

aten = torch.ops.aten
_device = torch.ops.emulated_gpu


def _index(device: Any = None) -> int:
    if isinstance(device, int) and device >= 0:
        return device
    index = None if device is None or isinstance(device, int) else torch.device(device).index
    return _device.current_device(0) if index is None else index


class Event:
    """torch.cuda.Event. What comes before it is done when it is recorded, as a device that is fast may have it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._recorded = _device.record((stream or current_stream()).stream_id)

    def wait(self, stream: Stream | None = None) -> None:
        if self._recorded is not None:
            _device.wait((stream or current_stream()).stream_id, self._recorded)

    def synchronize(self) -> None:
        if self._recorded is not None:
            _device.synchronize(self._recorded)

    def query(self) -> bool:
        self.synchronize()
        return True


class Stream:
    """torch.cuda.Stream."""

    _made = 0

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int | None = None) -> None:
        if stream_id is None:
            Stream._made += 1
            stream_id = Stream._made
            _device.record(stream_id)  # it is known from now on
        self.stream_id, self.device = stream_id, torch.device("cuda", _index(device))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return self.record_event().query()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (other.stream_id, other.device) == (self.stream_id, self.device)

    def __hash__(self) -> int:
        return hash((self.stream_id, self.device))


def current_stream(device: Any = None) -> Stream:
    """torch.cuda.current_stream."""
    index = _index(device)
    return Stream(index, stream_id=_device.current_stream(index))


@contextlib.contextmanager
def _in_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    index = stream.device.index
    before = _device.current_stream(index)
    _device.set_stream(index, stream.stream_id)
    try:
        yield
    finally:
        _device.set_stream(index, before)


def _memory_stats(device: Any = None) -> dict[str, int]:
    now, peak = _device.allocated(_index(device)), _device.peak(_index(device))
    names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
    return {f"{name}.all.{when}": count for name in names for when, count in (("current", now), ("peak", peak))}


def _is_emulated() -> None:
    """Have torch.cuda answer for the device."""
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: _device.device_count(0),
        "current_device": lambda: _device.current_device(0),
        "set_device": lambda device: _device.set_device(_index(device)),
        "get_device_name": lambda device=None: "emulated by the CPU",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="emulated by the CPU", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
        ),
        "synchronize": lambda device=None: _device.synchronize_all(0),
        "empty_cache": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "stream": _in_stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(device, stream_id=0),
        "memory_stats": _memory_stats,
        "memory_allocated": lambda device=None: _device.allocated(_index(device)),
        "max_memory_allocated": lambda device=None: _device.peak(_index(device)),
        "reset_peak_memory_stats": lambda device=None: _device.reset_peak(_index(device)),
        # The CPU's generator draws.
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "seed_all": lambda: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    plain: Any = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> Any:
        if storage.device.type != "cuda":
            return plain(storage)
        with torch.no_grad():
            seen = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            return seen.clone().untyped_storage()

    setattr(torch.UntypedStorage, "clone", clone)  # noqa: B010


# --- attention ------------------------------------------------------------------------------------------------------

_HALVES = (torch.float16, torch.bfloat16)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> Any:  # fmt: skip
    assert q.dtype in _HALVES and p == 0
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    key = torch.empty(2, dtype=torch.uint64, device=q.device)
    return out, lse, None, None, q.shape[2], k.shape[2], key, key[:0], torch.empty(0, device=q.device)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any, scale: float | None = None
) -> Any:
    _, _, queries, keys, _, causal, _, _ = others
    assert (queries, keys) == (q.shape[2], k.shape[2]) and lse.is_contiguous() and lse.shape == q.shape[:3]
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sums: bool, p: float = 0.0, causal: bool = False, *,
    scale: float | None = None,
) -> Any:  # fmt: skip
    assert sums and p == 0
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    key = torch.empty((), dtype=torch.int64, device=q.device)
    return out, F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf")), key, key.clone()


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *others: Any,
    scale: float | None = None,
) -> Any:  # fmt: skip
    wanted, causal = others[3], (*others[4:], False)[0]
    assert lse.shape[2] % 32 == 0 and list(wanted) == [True, True, True, False]
    sums = lse[..., : q.shape[2]].contiguous()
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, sums, 0.0, causal, attn_mask=bias, scale=scale
    )
    return (*grads, None)


_library = torch.library.Library("aten", "IMPL")


def _attention_is_emulated() -> None:
    kernels = {
        "_scaled_dot_product_flash_attention": _flash,
        "_scaled_dot_product_flash_attention_backward": _flash_backward,
        "_scaled_dot_product_efficient_attention": _efficient,
        "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
        "_fused_sdp_choice": lambda *_, **__: 0,  # eager attention is put together from products
    }
    for name, kernel in kernels.items():
        _library.impl(name, kernel, "CUDA")
    chosen = torch.backends.cuda
    setattr(chosen, "can_use_flash_attention", lambda given: given.query.dtype in _HALVES)  # noqa: B010
    setattr(chosen, "can_use_efficient_attention", lambda given: given.query.dtype.itemsize < 8)  # noqa: B010


# --- Triton ---------------------------------------------------------------------------------------------------------


def _kernels_are_interpreted() -> None:
    """On the memory of the device, as a kernel is; a tensor of the host is refused, as by a kernel."""

    def seen(value: Any, writes: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        assert value.is_cuda, "Pointer argument cannot be accessed from Triton (cpu tensor?)"
        return _device.seen_by(value, writes, "a Triton kernel")

    def arguments(grid: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        written = _written(grid.fn)
        with _disable_current_modes():
            placed = [seen(value, name in written) for name, value in zip(grid.arg_names, given, strict=False)]
            return placed, {name: seen(value, name in written) for name, value in named.items()}

    plain = interpreter.GridExecutor.__call__

    def launched(grid: Any, *given: Any, **named: Any) -> None:
        if (graph := graphs.CUDAGraph.capturing) is None:
            plain(grid, *given, **named)
            return
        values = dict(zip(grid.arg_names, given, strict=False)) | named
        written = [value for name, value in values.items() if name in _written(grid.fn)]
        graph.launch(lambda: plain(grid, *given, **named), written)

    interpreter.GridExecutor.__call__ = launched
    interpreter.GridExecutor._init_args_hst = arguments
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _rounding_to_nearest(builder.cast_impl)


@functools.cache
def _written(kernel: Any) -> frozenset[str]:
    """The arguments that a kernel stores to."""
    found = frozenset(re.findall(r"tl\.store\((\w+)", inspect.getsource(kernel)))
    assert found, f"{kernel.__name__} stores nothing"
    return found


def _rounding_to_nearest(plain: Any) -> Any:
    """The interpreter (triton 3.9.0) cuts off what bfloat16 has no bits for."""

    def cast(self: Any, source: Any, kind: Any) -> Any:
        have, want = source.dtype.scalar, kind.scalar
        if tl.bfloat16 not in (have, want):
            return plain(self, source, kind)
        with _disable_current_modes(), torch.no_grad():
            value = torch.from_numpy(np.ascontiguousarray(source.data))
            value = value.view(torch.bfloat16) if have == tl.bfloat16 else value
            if want == tl.bfloat16:
                return interpreter.TensorHandle(value.bfloat16().view(torch.uint16).numpy(), want)
            return interpreter.TensorHandle(value.float().numpy().astype(interpreter._get_np_dtype(kind)), want)

    return cast


_is_emulated()
_attention_is_emulated()
_kernels_are_interpreted()

from emulated import graphs, nccl  # noqa: E402

graphs.emulate()
nccl.emulate()


# --- tests ----------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("real_gpu") is not None]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    check_races()
    return result


def check_races() -> None:
    """Fail if there was one since the last time."""
    assert not (races := _device.races(0)), "\n".join(races)
