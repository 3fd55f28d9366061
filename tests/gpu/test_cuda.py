"""What there is on a GPU alone: its attention kernels, page-locked memory, copies beside computing, its allocator.

Run by ``make test-gpu``; nothing here is collected without a device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphshard
from graphshard import attention
from graphshard.runtime.groups import leave_world
from graphshard.runtime.offload import Homes, HostBlock
from graphshard.runtime.streams import Lane, streams_of


@pytest.fixture
def device() -> torch.device:
    return torch.get_default_device()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.bfloat16, "flash"), (torch.float16, "flash"), (torch.float32, "efficient")]
)
def test_attention_is_one_of_torchs_kernels(dtype: torch.dtype, kernel: str, causal: bool, masked: bool) -> None:
    if masked and causal:
        pytest.skip("a mask says what is causal")
    q, k, v = (torch.randn(2, 64, 4, 32, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    mask = torch.randn(64, 64, dtype=dtype) if masked else None
    bias = attention._expanded(attention._bias(mask, q), q, k)
    assert attention._kernel(q, k, v, bias, causal) == ("efficient" if masked else kernel)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    grad = torch.randn(2, 64, 4, 32, dtype=dtype).transpose(1, 2)
    out, lse = torch.ops.graphshard.attention(q, k, v, mask, causal, None, False)
    wide = None if mask is None else mask.double()
    expected, expected_lse = attention._formula(
        exact[0], exact[1], exact[2], attention._bias(wide, exact[0]), causal, None
    )
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close(lse.double(), expected_lse, **close)
    ours, theirs = torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, exact, grad.double())
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have.double(), want, **close)


def test_host_memory_is_page_locked(device: torch.device) -> None:
    homes = Homes(device)
    homes.reserve({"cpu": {4096: 2}, "nvme": {}})
    kept = homes.keep(torch.arange(1024.0), "cpu")
    assert isinstance(kept.place, HostBlock) and kept.place.memory.is_pinned()
    assert torch.equal(homes.fetch(kept), torch.arange(1024.0))
    assert "8,192 bytes of page-locked memory" in homes.choices()["offloaded to cpu"]


@pytest.fixture
def busy(device: torch.device) -> Iterator[Tensor]:
    """A matrix that takes the device a while to multiply."""
    matrix = torch.ones(8192, 8192)
    torch.cuda.synchronize(device)
    yield matrix @ matrix * 1e-4
    torch.cuda.synchronize(device)


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_the_host_does_not_wait_for_copies(device: torch.device, busy: Tensor) -> None:
    """What is computed before a copy is not done when it is issued; what comes after its WAIT sees it."""
    homes, value = Homes(device), torch.zeros(1 << 24)
    homes.reserve({"cpu": {value.nbytes: 1}, "nvme": {}})
    value += homes.fetch(homes.keep(value, "cpu"))  # kernels are loaded, for which the host does wait
    for _ in range(20):
        busy = busy @ busy * 1e-4
    value += 1
    kept, out = homes.offload(value, "cpu")
    del value
    assert not out.done()
    out.wait()
    torch.full((1 << 24,), 7.0)  # may take the memory of what was handed over
    back, arrival = homes.reload(kept)
    arrival.wait()
    assert bool((back == 1).all())


@pytest.mark.real_gpu("of an emulated one the host waits")
def test_a_lane_is_not_the_one_that_computes(device: torch.device, busy: Tensor) -> None:
    lanes = streams_of(device)
    idle = lanes.record(Lane.OUT)
    for _ in range(20):
        busy = busy @ busy * 1e-4
    computed = lanes.record(Lane.COMPUTE)
    lanes.block(idle)
    assert lanes.passed(idle) and not lanes.passed(computed)
    lanes.block(computed)


def test_the_allocator_agrees_with_the_simulation() -> None:
    """One rank, in its second step: libraries have what they keep for themselves."""
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)])
    compiled = graphshard.compile(
        model,
        "dp1+accum2",
        loss_fn=nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        executor="local",
        measure_memory=True,
    )
    x = torch.randn(256, 1024)
    for _ in range(2):
        compiled.step(x, x)
    (rank,) = compiled.report()["ranks"]
    assert rank["peak_bytes"] == pytest.approx(rank["measured_peak_bytes"], rel=0.05)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of the only rank there is."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environment | {"MASTER_PORT": "29531"}).items():
        monkeypatch.setenv(name, value)
    yield
    leave_world()


@pytest.mark.usefixtures("launched")
def test_one_rank_over_nccl() -> None:
    """The same losses as in the local executor."""
    losses = []
    for executor in ("local", "distributed"):
        torch.manual_seed(0)
        model, x = nn.Linear(64, 64), torch.randn(8, 64)
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        loss_fn = nn.functional.mse_loss
        with graphshard.compile(model, "dp1", loss_fn=loss_fn, optimizer=sgd, executor=executor) as compiled:
            losses.append([compiled.step(x, x).item() for _ in range(3)])
    assert losses[0] == losses[1]
