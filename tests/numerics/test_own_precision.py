"""What a model says of precision itself holds under bf16 and fp16: its casts, and where it turns autocast off."""

from __future__ import annotations

import copy
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from graphshard.autocast import HALVES
from graphshard.errors import UncapturableOperator
from graphshard.passes.precision import Precision
from graphshard.pipeline import Context
from graphshard.program import Program
from graphshard.trace import capture
from numerics.cases import sgd
from numerics.mixed import both, rounding

SIZE = 16


class Norm(nn.Module):
    """RMS norm by hand of what is too large for its square to be a float16."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(SIZE, SIZE, bias=False), nn.Parameter(torch.rand(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x) * 1000
        wide = h.float()
        normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
        return normed.type_as(h) * (1 + self.scale.float())


class Differences(nn.Module):
    """What cancels in float32, and is lost in less; every spelling of a cast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.a(x)
        b: Tensor = self.b(x)
        wide = torch.ones(SIZE, device=x.device)
        result = a.float() * 1000 + b.to(torch.float32) - a.type(torch.float32) * 1000
        result = result + a.to(wide) * 1000 + b.to(dtype=torch.float32) - a.type_as(wide) * 1000
        return result + (b.type_as(a) - b) + a.to(b)


class Router(nn.Module):
    """A softmax of a linear layer in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.router = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        with torch.autocast(x.device.type, enabled=False):
            odds = torch.softmax(self.router(h.float() * 30), -1)
            total = h.sum(-1, keepdim=True, dtype=torch.float32)
        return odds * h + total / SIZE


class Fourier(nn.Module):
    """Features of coordinates."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(SIZE, SIZE)
        self.register_buffer("frequencies", torch.rand(SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        with torch.autocast(x.device.type, enabled=False):
            return h + torch.cos((x.float() * 4) @ self.frequencies)


def product_on(device: str) -> Any:
    """A product in float32, by an autograd function for ``device``."""

    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=device, cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        @torch.amp.custom_bwd(device_type=device)  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return gradients[0] @ w.T, x.T @ gradients[0]

    return Product


class Custom(nn.Module):
    """An operator of the user's that asks for float32."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.weight = nn.Linear(SIZE, SIZE), nn.Parameter(torch.randn(SIZE, SIZE) / 4)
        self.product = product_on(torch.get_default_device().type)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.product.apply(self.lin(x), self.weight)
        return result


class Nested(nn.Module):
    """On again, in the plan's precision, where it is off; a weight that is read in both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        with torch.autocast(device, enabled=False):
            h = self.a(x.float())
            with torch.autocast(device, dtype=torch.get_autocast_dtype(device)):
                h = self.b(h)
            h = h.float() * 1000 - (h * 1000).float()
            h = h + x.float()
        result: Tensor = self.c(h)
        return result


class Asks(nn.Module):
    """As libraries do: whether autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                assert not torch.is_autocast_enabled(x.device.type)
                h = h.float() * 1000 + torch.linspace(0, 1, SIZE, device=x.device) - h.float() * 1000
        return h


class Rotary(nn.Module):
    """Positions as complex numbers."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(SIZE, SIZE), nn.Parameter(torch.randn(SIZE // 2, 2))
        self.register_buffer("turns", torch.polar(torch.ones(SIZE // 2), torch.rand(SIZE // 2)))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        turned = torch.view_as_complex(h.float().reshape(-1, SIZE // 2, 2)) * self.turns
        turned = turned * torch.view_as_complex(self.scale)
        turned_back: Tensor = torch.fft.ifft(torch.fft.fft(h.float())).real
        return torch.view_as_real(turned).flatten(1).type_as(h) + turned_back


class Exacting(nn.Module):
    """Weights that are made of others by operators which amplify what is lost by rounding, or take no less."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.utils.parametrizations.orthogonal(nn.Linear(SIZE, SIZE))
        self.angles, self.filter = nn.Parameter(torch.randn(SIZE, SIZE)), nn.Parameter(torch.randn(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x) @ torch.matrix_exp(self.angles - self.angles.T)
        h = h + torch.linalg.slogdet(self.angles)[1] * (x @ self.angles)
        filtered: Tensor = torch.fft.irfft(torch.fft.rfft(h.float()) * torch.fft.rfft(self.filter), n=SIZE)
        return h + filtered


class Extremes(nn.Module):
    """Numbers that depend on the type of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        scores = h @ h.T
        mask = torch.ones_like(scores, dtype=torch.bool).triu()
        masked = scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1)
        chosen = torch.where(mask, torch.finfo(scores.dtype).min, scores).softmax(-1)  # of no row anything
        positive = F.relu(h) / (F.relu(h) + torch.finfo(h.dtype).tiny)
        return (masked + chosen) @ h + positive


class Split(nn.Module):
    """Parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3 * SIZE, SIZE) / 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.weights.chunk(3)
        return (x @ a) * torch.sigmoid(x @ b) + x @ c


class Sums(nn.Module):
    """Sums in float32 that begin with what is written to their memory, in every spelling."""

    start: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(SIZE, SIZE)
        self.register_buffer("start", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.lin(x)
        sums = torch.zeros(h.shape, device=x.device), torch.empty_like(x), x.new_zeros(h.shape), self.start.clone()
        sums[0].copy_(h)
        sums[1][:] = h
        sums[2].copy_(h.detach())
        sums[3][...] = h.detach()[0]
        for total in sums:
            for _ in range(50):
                total += h.detach().amax() * 0.01
        return (sums[0] + sums[1] + sums[2] + sums[3]) / 4


BLOCKS = (Norm, Differences, Router, Fourier, Custom, Nested, Asks, Rotary, Exacting, Extremes, Split, Sums)


class Stack(nn.Module):
    """Two blocks of a kind, and a layer."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([block(), block()]), nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        result: Tensor = self.head(x)
        return result


def rows(count: int = 8) -> Tensor:
    return torch.randn(count, SIZE)


def under_autocast(model: nn.Module, token: str, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast(x.device.type, HALVES[token]):
        result: Tensor = model(x)
    return result


def compiled(model: nn.Module, plan: str, x: Tensor, **options: Any) -> graphshard.Compiled:
    return graphshard.compile(
        copy.deepcopy(model),
        plan,
        loss_fn=options.pop("loss_fn", F.mse_loss),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        executor=options.pop("executor", "local"),
        example_inputs=(x, copy.deepcopy(model)(x).detach()),
        passes=options.pop("passes", rounding()),
        **options,
    )


@pytest.mark.parametrize("token", ["bf16", "fp16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_call_gives_what_autocast_gives(block: type[nn.Module], token: str) -> None:
    """Its type, too: float32 where the model says so last."""
    torch.manual_seed(0)
    model, x = block(), rows()
    ours, theirs = compiled(model, f"dp1+{token}", x)(x), under_autocast(model, token, x)
    assert theirs.isfinite().all()
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("plan", ["dp2+bf16+recompute:policy=full", "zero3+pp2+fp16:init_scale=64"])
@pytest.mark.parametrize("block", BLOCKS)
def test_training_follows_autocast(block: type[nn.Module], plan: str) -> None:
    torch.manual_seed(0)
    model, x, y = Stack(block), rows(16), torch.randn(16, 4)
    ours, eager, *_ = both(lambda: (model, (x, y), {}, F.mse_loss), plan, optimizer=sgd, passes=rounding())
    before = {n: v.detach().clone() for n, v in eager.model.named_parameters()}
    for _ in range(3):
        assert ours.step(x, y).item() == pytest.approx(eager.step((x, y), {}).item(), rel=3e-3)
    state = ours.state_dict()
    for name, value in eager.model.named_parameters():
        moved, wanted = state[name].to(value.device) - before[name], value.detach() - before[name]
        assert (moved - wanted).norm() <= 0.05 * wanted.norm(), name


def test_a_parameter_that_only_float32_is_read_of_stays_in_it() -> None:
    """One that is read elsewhere, too, is not; a cast of a weight whose product is lowered asks for nothing."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.off, self.cast, self.like, self.lowered, self.shared = (nn.Linear(SIZE, SIZE) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x.type_as(self.like.weight), self.lowered.weight.float(), self.lowered.bias.float())
            x = self.shared(x + self.cast.bias.float()) * self.like.weight.to(torch.float32)[0]
            with torch.autocast(x.device.type, enabled=False):
                return F.layer_norm(self.off(x.float()) + self.shared.weight.mean(), (SIZE,), self.cast.weight[0])

    torch.manual_seed(0)
    model, x = Reads(), rows()
    ours = compiled(model, "zero3:size=2+bf16", x)
    stored = {name: param.dtype for name, param in ours.program.params.items()}
    wide = {"off.weight", "off.bias", "cast.weight", "cast.bias", "like.weight"}
    read = wide | {"lowered.weight", "lowered.bias", "shared.weight", "shared.bias"}
    assert {name for name in read if stored[name] is torch.float32} == wide
    for _ in range(2):
        ours.step(x, torch.zeros_like(x))
    assert ours(x).isfinite().all()
    assert {value.dtype for value in ours.state_dict().values()} == {torch.float32}


def test_a_later_program_reads_parameters_as_they_are_stored() -> None:
    """In training the head is read in float32 alone, in a call it is a product of autocast's."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=not self.training):
                result: Tensor = self.head(x)
            return result

    torch.manual_seed(0)
    model, x = Head(), rows()
    ours = compiled(model, "zero3:size=2+bf16", x)
    assert ours(x).dtype is torch.bfloat16
    torch.testing.assert_close(ours(x), under_autocast(model.eval(), "bf16", x))
    assert ours.step(x, x).item() == pytest.approx(F.mse_loss(model.train()(x), x).item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_off_for_any_device_is_off() -> None:
    """A graph knows no device; and ``cuda`` where there is none says of itself that it is not on."""

    class On(nn.Module):
        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__()
            self.lin, self.options = nn.Linear(SIZE, SIZE), {"device_type": device, "enabled": enabled}

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(dtype=torch.bfloat16, **self.options):  # type: ignore[arg-type]
                result: Tensor = self.lin(x)
            return result

    x = rows()
    for device in ("cpu", "cuda"):
        assert compiled(On(device, False), "dp1+bf16", x)(x).dtype is torch.float32
        assert compiled(On(device, True), "dp1+bf16", x)(x).dtype is torch.bfloat16


def test_the_other_half_precision_is_as_autocast_makes_it() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=torch.float16):
                result: Tensor = self.lin(x)
            return result

    torch.manual_seed(0)
    model, x = Other(), rows()
    ours, theirs = compiled(model, "dp1+bf16", x)(x), under_autocast(model, "bf16", x)
    assert ours.dtype is theirs.dtype is torch.float16
    torch.testing.assert_close(ours, theirs)
    assert not torch.is_autocast_enabled("cpu")


def test_a_buffer_is_cast_in_place_of_itself() -> None:
    """Nothing narrows a buffer: its cast is the buffer, and what is written there is kept."""

    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(SIZE, SIZE)
            self.register_buffer("seen", torch.ones(SIZE))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.float().mul_(0.5)
            self.seen[:4].to(torch.float32).add_(1)
            result: Tensor = self.lin(x) * self.seen
            return result

    model, x = Counts(), rows()
    ours = compiled(copy.deepcopy(model), "dp1+bf16", x)
    before = ours.state_dict()["seen"].clone()
    ours.step(x, x)
    wanted = before * 0.5
    wanted[:4] += 1
    assert torch.equal(ours.state_dict()["seen"], wanted)


class Written(nn.Module):
    """A linear layer and a function of it."""

    mean: Tensor

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.lin, self.function = nn.Linear(SIZE, SIZE), function
        self.register_buffer("mean", torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(self, x)
        return result


def a_cast_is_added_to(m: Written, x: Tensor) -> Tensor:
    total = torch.zeros(SIZE, device=x.device)
    total.float().add_(m.lin(x).sum(0))
    total[:4].to(torch.float32).mul_(3)
    return total.expand(len(x), SIZE)


def a_norms_cast_is_scaled(m: Written, x: Tensor) -> Tensor:
    normed = F.layer_norm(m.lin(x), (SIZE,))
    wide = normed.float()
    wide.mul_(2)
    return normed + wide


def a_buffer_is_rebound(m: Written, x: Tensor) -> Tensor:
    before = m.mean
    before.float().add_(1)
    m.mean = before * 0.5 + m.lin(x).detach().mean(0)
    result: Tensor = m.lin(x) * m.mean
    return result


@pytest.mark.parametrize(
    "function",
    [a_cast_is_added_to, a_norms_cast_is_scaled, a_buffer_is_rebound],
)
def test_what_is_in_float32_for_sure_is_its_own_cast(function: Any) -> None:
    """As it is to the model that computes in float32 throughout."""
    torch.manual_seed(0)
    model, x = Written(function), rows()
    ours, wanted = compiled(model, "dp1+bf16", x), copy.deepcopy(model)
    torch.testing.assert_close(ours.step(x, x), F.mse_loss(wanted(x), x), rtol=2e-2, atol=0)


class Cubed(torch.autograd.Function):
    """Of one argument, which alone says what to compute in."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x * x


def test_custom_fwd_casts_wherever_the_model_is_captured() -> None:
    """Its device is the one that the plan runs on."""
    torch.manual_seed(0)
    model, x = Written(lambda m, x: Cubed.apply(m.lin(x))), rows()  # type: ignore[no-untyped-call]
    ours, h = compiled(model, "dp1+bf16", x)(x), F.linear(x.bfloat16(), *(p.bfloat16() for p in model.parameters()))
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, h.float() ** 3)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda h: torch.softmax(h, -1, torch.float32),
        lambda h: h.softmax(-1, torch.float32),
        lambda h: torch.softmax(input=h, dim=-1, dtype=torch.float32),
        lambda h: F.softmax(h, dim=-1, dtype=torch.float32),
    ],
)
def test_a_function_is_told_its_precision_in_any_way(softmax: Any) -> None:
    def off(m: Written, x: Tensor) -> Tensor:
        h = m.lin(x)
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = softmax(h)
        return result

    torch.manual_seed(0)
    model, x = Written(off), rows()
    ours, theirs = compiled(model, "dp1+bf16", x)(x), under_autocast(model, "bf16", x)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs)


with warnings.catch_warnings():  # as a library writes it: made when it is imported, where there may be no CUDA
    warnings.simplefilter("ignore")

    @torch.autocast("cuda", dtype=torch.bfloat16)  # type: ignore[untyped-decorator]
    def decorated(m: Written, x: Tensor) -> Any:
        return m.lin(x)


def other_inside(m: Written, x: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.float16):
        result: Tensor = m.lin(x)
    return result


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_another_precision_on_an_accelerator_is_refused() -> None:
    said = r"torch.autocast\('cuda', dtype=torch.float16\) in .*the plan says .*: bf16 or fp16"
    with pytest.raises(UncapturableOperator, match=said):
        capture(Written(other_inside), F.mse_loss, (rows(),), {}, mode="call", lower=torch.bfloat16)


@pytest.mark.only_cpu
def test_autocast_of_which_nothing_tells_whether_it_is_on_is_refused() -> None:
    said = r"torch.autocast\('cuda'\) that was made before the model was called, on a machine without CUDA in"
    with pytest.raises(UncapturableOperator, match=said):
        capture(Written(decorated), F.mse_loss, (rows(),), {}, mode="call", lower=torch.bfloat16)


def test_other_threads_have_autocast_as_it_is() -> None:
    seen: list[object] = []

    def look() -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", dtype=torch.float16):
            seen.extend((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        seen.append(torch.is_autocast_enabled("cpu"))

    def asks(m: Written, x: Tensor) -> Tensor:
        seen.clear()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        result: Tensor = m.lin(x)
        return result

    capture(Written(asks), F.mse_loss, (rows(),), {}, mode="call", lower=torch.bfloat16)
    assert seen == [False, True, torch.float16, torch.float16, False]


def a_product_is_written_after_its_cast(m: Written, x: Tensor) -> Tensor:
    h: Tensor = m.lin(x)
    wide = h.float()
    h.mul_(2)
    return wide * 1000 + h


def a_products_cast_is_written(m: Written, x: Tensor) -> Tensor:
    h: Tensor = m.lin(x)
    wide = h.float()
    wide[:, 0] = 0
    wide.mul_(1000)
    return wide + h


@pytest.mark.parametrize("function", [a_product_is_written_after_its_cast, a_products_cast_is_written])
def test_the_cast_of_a_product_is_a_copy(function: Any) -> None:
    torch.manual_seed(0)
    model, x = Written(function), rows()
    ours, theirs = compiled(model, "dp1+bf16", x), under_autocast(model, "bf16", x)
    torch.testing.assert_close(ours(x), theirs)
    torch.testing.assert_close(ours.step(x, x), F.mse_loss(theirs, x), rtol=1e-3, atol=0)


def a_cast_is_written(h: Tensor) -> Tensor:
    h.float().mul_(2)
    return h


def a_view_of_a_cast_is_written(h: Tensor) -> Tensor:
    wide = h.to(torch.float32)
    wide[:, 0] = 0
    return wide + h


def a_part_of_a_cast_is_written(h: Tensor) -> Tensor:
    part = h.type_as(torch.ones(1))[:, 1:]
    torch.relu_(part)
    return part


def a_detached_cast_is_written(h: Tensor) -> Tensor:
    h.float().detach().mul_(2)
    return h


def data_of_a_cast_is_written(h: Tensor) -> Tensor:
    h.float().data.mul_(2)
    return h


def a_cast_is_written_by_out(h: Tensor) -> Tensor:
    wide = h.detach().float()
    torch.add(wide, 1, out=wide)
    return wide + h


def what_was_cast_is_written(h: Tensor) -> Tensor:
    wide = h.float()
    h.mul_(2)
    return wide + h


@pytest.mark.parametrize("mode", ["call", "train"])
@pytest.mark.parametrize(
    "function",
    [
        a_cast_is_written,
        a_view_of_a_cast_is_written,
        a_part_of_a_cast_is_written,
        a_detached_cast_is_written,
        data_of_a_cast_is_written,
        a_cast_is_written_by_out,
        what_was_cast_is_written,
    ],
)
def test_what_may_be_its_own_cast_is_not_written_to(function: Any, mode: Any) -> None:
    """Only the plan knows: it would be lost, or not, by the precision of the value."""
    x = rows()
    model = Written(lambda m, x: function(m.lin(x) * torch.ones(SIZE)))
    with pytest.raises(
        UncapturableOperator, match=r"in-place .* in .*test_own_precision.py:\d+: .*float\(\)\.clone\(\)"
    ):
        capture(model, F.mse_loss, (x,) if mode == "call" else (x, x), {}, mode=mode, lower=torch.bfloat16)


@pytest.mark.parametrize("plan", ["dp2+bf16", "zero3+pp2+fp16"])
def test_verify_finds_the_meaning_kept(plan: str) -> None:
    model = nn.Sequential(Norm(), Router(), nn.Linear(SIZE, SIZE))
    ours = compiled(model, plan, rows(), executor="none")
    assert "precision" in [item.name for item in ours.verify()]


def test_without_a_precision_casts_are_no_operations() -> None:
    model, x = nn.Sequential(Norm(), Router()), rows()
    program = compiled(model, "dp1", x, executor="none").program
    for section in program.sections().values():
        assert not any("cast" in node.name or node.meta["info"].as_given for node in section.nodes())
    plain = compiled(model, "dp1+bf16", x, executor="none").program
    assert not any("graphshard.cast" in str(node.target) for node in plain.body.nodes())


class Idle(Precision):
    """Stands for the pass, and does nothing."""

    def run(self, program: Program, ctx: Context) -> Program:
        return program


def test_a_cast_that_no_pass_settles_is_computed() -> None:
    model, x = Norm(), rows()
    ours = compiled(model, "dp1+fp16", x, passes=[Idle("fp16")])
    torch.testing.assert_close(ours(x), model(x))
