"""Operators of which capture makes something else than AOTAutograd would: models that use them train as eagerly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import graphshard
from graphshard import fake
from graphshard.errors import UnsupportedModule
from graphshard.trace import capture
from numerics.cases import sgd
from numerics.reference import check_parity

aten = torch.ops.aten

PLANS = ("dp1", "zero3:size=2+accum2", "pp2", "recompute:policy=full")
WIDTH = 6


class Model(nn.Module):
    """Two linear layers, with ``between(self, hidden)`` behind each; ``mask`` and ``width`` are plain attributes."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))
        self.mask = torch.ones(WIDTH, WIDTH, dtype=torch.bool).triu(1)
        self.width = torch.tensor(WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(self, layer(x))
        return x


def trained(between: Callable[[Any, Tensor], Tensor], plan: str, dtype: torch.dtype = torch.float64) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Model(between), (torch.randn(16, WIDTH), torch.randn(16, WIDTH)), {}, F.mse_loss

    check_parity(make, plan, sgd, dtype=dtype)


def filled(model: Any, hidden: Tensor) -> Tensor:
    bias = torch.zeros_like(model.mask, dtype=hidden.dtype).masked_fill_(model.mask, -1e4)
    bias[0] += 1
    result: Tensor = ((model.weight + bias).softmax(-1) @ hidden.t()).t()
    return result


def turned(model: Any, hidden: Tensor) -> Tensor:
    return torch.exp(1j * hidden).real - (2j * hidden * torch.exp(0.5j * hidden)).imag


def inverse(model: Any, hidden: Tensor) -> Tensor:
    return hidden @ torch.inverse(model.weight)


def cholesky(model: Any, hidden: Tensor) -> Tensor:
    result: Tensor = hidden @ torch.linalg.cholesky(model.weight @ model.weight.t())
    return result


def solved(model: Any, hidden: Tensor) -> Tensor:
    result: Tensor = torch.linalg.solve(model.weight, hidden.t()).t()
    return result


def transposed(model: Any, hidden: Tensor) -> Tensor:
    """A square weight, in every spelling: its gradient and the transposed one differ in type by strides alone."""
    hidden = torch.tanh(hidden @ model.weight.T) @ model.weight.mT
    hidden = torch.tanh(hidden @ model.weight.permute(1, 0)) @ model.weight.transpose(0, 1) @ model.weight
    result: Tensor = hidden @ (model.weight @ model.weight.T).t()
    return result


def read(model: Any, hidden: Tensor) -> Tensor:
    """Numbers of a constant: they are part of the program."""
    hidden = hidden * float(1 + model.mask.numpy().sum() / 8) * (1 + int(np.asarray(model.mask)[0, 1]) / 2)
    assert f"{model.width}" == str(model.width.item()), repr(model.width)
    if model.width:
        hidden = hidden * float(model.width) + model.width.tolist() + int(model.width)
    return hidden[:, : int(model.width)]


class Turned(nn.Module):
    """Kernels that lay out their result otherwise than their input, and a 1x1 convolution, whose weight's gradient is
    laid out otherwise than the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rows = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.convolution, self.image = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x * 2, x - 1, x / 2], 1)
        tokens = self.rows(self.norm(self.rows(tokens).transpose(1, 2)).transpose(1, 2))
        image = self.image(self.convolution(tokens.transpose(1, 2).unflatten(2, (2, 2))))
        image = F.relu_(self.image(image.to(memory_format=torch.channels_last)))
        result: Tensor = image.flatten(2).mean(2)
        return result


@pytest.mark.parametrize("plan", PLANS)
def test_layouts(plan: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Turned(), (torch.randn(16, WIDTH), torch.randn(16, WIDTH)), {}, F.mse_loss

    check_parity(make, plan, sgd, dtype=torch.float64)


def turned_in_place(model: Any, hidden: Tensor) -> Tensor:
    hidden = torch.sin(hidden).t_().unsqueeze_(0)
    hidden[0, 1].mul_(3)
    part = hidden.squeeze_(0)[:3].t_().swapaxes_(0, 1)
    return hidden.t() + part.t().repeat(1, 2)


def written_in_lists(model: Any, hidden: Tensor) -> Tensor:
    parts = (hidden * 2).unflatten(1, (2, 3))
    torch._foreach_mul_([parts], 2.0)
    torch._foreach_addcmul_([parts[:, 0]], [torch.sin(hidden[:, 3:])], [model.weight[:1, :3]], 0.5)
    torch._foreach_zero_([parts[:, 1, :1], parts[:1]])
    return torch.sin(parts).flatten(1)


def correlated(model: Any, hidden: Tensor) -> Tensor:
    return hidden @ torch.corrcoef(hidden.t()) + torch.corrcoef(hidden[:, 0])


def covariant(model: Any, hidden: Tensor) -> Tensor:
    frequencies, weights = model.mask.sum(0) + 1, torch.sin(model.weight[0]) ** 2
    made = [
        *(hidden.t().cov(), torch.cov(model.weight, correction=0), torch.cov(model.weight, fweights=frequencies)),
        *(torch.cov(model.weight, aweights=weights), torch.cov(model.weight[0], aweights=weights, correction=0)),
        torch.cov(model.weight, fweights=frequencies, aweights=weights),
        torch.complex(model.weight, 1 - model.weight).cov().imag,
    ]
    for matrix in made:
        hidden = hidden + hidden @ matrix.expand(WIDTH, WIDTH)
    return torch.tanh(hidden)


def combined(model: Any, hidden: Tensor) -> Tensor:
    pairs, triples = torch.combinations(model.weight[0]), torch.combinations(model.weight[1, :4], 3, True)
    return hidden * pairs.prod(1).sin().sum() + triples.prod(1).sin().sum() + torch.combinations(hidden[0, :1]).sum()


def eigenvalues(model: Any, hidden: Tensor) -> Tensor:
    """Their gradient solves a system, and checks that it is solved."""
    values, vectors = torch.linalg.eig(model.weight)
    result: Tensor = hidden * torch.linalg.eigvals(model.weight).abs() + values.abs() * vectors.abs()[0]
    return result


def likely(model: Any, hidden: Tensor) -> Tensor:
    """Of variances of every shape that torch takes, some of which are clamped."""
    given = hidden, torch.zeros_like(hidden)
    variances = model.weight[0].abs() * hidden.abs(), hidden[:, 0] ** 2, hidden[:, :1] ** 2
    losses = [F.gaussian_nll_loss(*given, variance, eps=0.1, reduction="none") for variance in variances]
    losses.append(F.gaussian_nll_loss(*given, variances[0], full=True, eps=0.1))
    return torch.tanh(hidden + torch.stack([loss.expand(hidden.shape) for loss in losses]).sum(0))


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "masked_fill_": lambda t, new: t.masked_fill_(t.detach() > 0.3, 0.1),
    "cumsum_": lambda t, new: t.cumsum_(1),
    "tril_": lambda t, new: t.tril_(),
    "index_add_": lambda t, new: t.index_add_(1, torch.tensor([1, 0, 1]), new),
    "index_put_": lambda t, new: t.__setitem__((slice(None), torch.tensor([2, 0])), new[:, 1:]),
    "scatter_": lambda t, new: t.scatter_(1, torch.tensor([[[1], [2]]]).expand(len(t), 2, 1), new[:, :2, :1]),
    "renorm_": lambda t, new: t.narrow(1, 0, 2).renorm_(2, 0, 0.3),
    "mvlgamma_": lambda t, new: t.abs_().add_(3).mvlgamma_(2),
    "elu_ in torch's own code": lambda t, new: F.elu(t, inplace=True),
    "cumsum into it": lambda t, new: torch.cumsum(new.detach(), 1, out=t.detach()),
    "add_": lambda t, new: t.add_(new),
    "copy_": lambda t, new: t.copy_(new),
}
"""In-place operators on a transposed view ``t`` [n, 3, 2], and a tensor ``new`` like it."""


def written_transposed(write: Callable[[Tensor, Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    def between(model: Any, hidden: Tensor) -> Tensor:
        base = hidden.unflatten(1, (2, 3)) * model.weight[0].view(2, 3)
        write(base.transpose(1, 2), torch.sin(hidden).unflatten(1, (3, 2)))
        result: Tensor = base.as_strided(hidden.shape, (WIDTH, 1)) * base.view(hidden.shape)
        return result

    return between


@pytest.mark.parametrize("write", WRITES)
def test_written_through_a_transposed_view(write: str) -> None:
    trained(written_transposed(WRITES[write]), "dp1")


@pytest.mark.parametrize("plan", PLANS[1:])
def test_written_through_a_transposed_view_by_any_plan(plan: str) -> None:
    trained(written_transposed(WRITES["masked_fill_"]), plan)


class WritesInBackward(torch.autograd.Function):
    """The lower triangle of each row's gradient, doubled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        result = 2 * gradients[0]
        result.transpose(1, 2).tril_()
        return result.view(-1).view(result.shape)


def test_written_through_a_transposed_view_in_the_backward() -> None:
    def between(model: Any, hidden: Tensor) -> Tensor:
        result: Tensor = WritesInBackward.apply(hidden.unflatten(1, (2, 3)))  # type: ignore[no-untyped-call]
        return result.flatten(1)

    trained(between, "dp1")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "between",
    [
        *(filled, turned, inverse, cholesky, solved, transposed),
        pytest.param(read, marks=pytest.mark.only_cpu("numpy reads no other constant")),
        *(turned_in_place, covariant, combined, written_in_lists, eigenvalues, likely),
    ],
)
def test_layers(between: Any, plan: str) -> None:
    trained(between, plan)


@pytest.mark.parametrize("plan", PLANS[:2])
def test_correlation(plan: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Model(correlated), (torch.randn(32, WIDTH), torch.randn(32, WIDTH)), {}, F.mse_loss

    check_parity(make, plan, sgd, dtype=torch.float64)


@pytest.mark.parametrize("plan", PLANS)
def test_batch_norm_over_all_batches(plan: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        layers = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
        return nn.Sequential(*layers), (torch.randn(16, WIDTH), torch.randn(16, WIDTH)), {}, F.mse_loss

    check_parity(make, plan, sgd, dtype=torch.float64)


def synchronised() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SyncBatchNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    return model, (torch.randn(16, WIDTH), torch.randn(16, WIDTH)), {}, F.mse_loss


@pytest.mark.parametrize("plan", ["dp1", "pp2"])
def test_batch_norm_that_synchronises_one_rank(plan: str) -> None:
    check_parity(synchronised, plan, sgd, dtype=torch.float64)


def test_batch_norm_that_synchronises_is_captured_in_a_process_group(tmp_path: Path) -> None:
    model, batch, _, loss_fn = synchronised()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        program = capture(model, loss_fn, batch, {}, mode="train").program
    finally:
        torch.distributed.destroy_process_group()
    assert any("batch_norm" in str(node.target) for node in program.body.nodes())


@pytest.mark.parametrize("plan", ["dp2", "zero3+pp2"])
def test_batch_norm_that_synchronises_several_ranks_is_refused(plan: str) -> None:
    model, batch, _, loss_fn = synchronised()
    with pytest.raises(UnsupportedModule, match="module '1' is a SyncBatchNorm; each data-parallel rank has"):
        graphshard.compile(model, plan, loss_fn=loss_fn, example_inputs=batch, executor="local")
    model[1].eval()
    graphshard.compile(model, plan, loss_fn=loss_fn, example_inputs=batch, executor="local")


def test_the_conjugate_of_a_number_does_not_widen_a_product() -> None:
    trained(turned, "dp1", torch.float32)


class MixedNorm(nn.Module):
    """A norm in float32 between layers in bfloat16, which a CPU takes as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(16, 256), nn.LayerNorm(256), nn.Linear(256, 4)
        for layer in (self.before, self.after):
            layer.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(torch.relu(self.norm(self.before(x.bfloat16())) * 1.5))
        return result.float()


@pytest.mark.only_cpu
def test_norms_in_a_higher_precision_than_what_they_norm() -> None:
    """Of more elements than one block has, so that their statistics are written to memory of their type."""
    torch.manual_seed(0)
    model, batch = MixedNorm(), (torch.randn(512, 16), torch.randn(512, 4))
    compiled = graphshard.compile(
        copy.deepcopy(model), "dp1", loss_fn=F.mse_loss, optimizer=partial(torch.optim.SGD, lr=1.0)
    )
    loss, before = F.mse_loss(model(batch[0]), batch[1]), copy.deepcopy(model.norm.state_dict())
    loss.backward()
    assert compiled.step(*batch).item() == pytest.approx(loss.item(), rel=1e-6)
    for name, value in model.norm.named_parameters():
        moved = before[name] - compiled.state_dict()[f"norm.{name}"]
        torch.testing.assert_close(moved, value.grad, rtol=1e-4, atol=1e-6)


HALF, WIDE = torch.ones(2, 4, 3, dtype=torch.bfloat16), torch.ones(4)
NORMS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.native_layer_norm.default, (HALF.transpose(1, 2), [4], None, WIDE, 1e-5)),
    (aten.native_group_norm.default, (HALF, WIDE, WIDE, 2, 4, 3, 2, 1e-5)),
    (aten._native_batch_norm_legit_functional.default, (HALF, WIDE, WIDE, WIDE, WIDE, True, 0.1, 1e-5)),
    (aten._native_batch_norm_legit.no_stats, (HALF, WIDE, WIDE, True, 0.1, 1e-5)),
    (aten._native_batch_norm_legit.no_stats, (HALF, None, None, True, 0.1, 1e-5)),
]


@pytest.mark.only_cpu
@pytest.mark.parametrize(("norm", "args"), NORMS)
def test_the_types_of_norms(norm: Any, args: tuple[Any, ...]) -> None:
    mode = fake.new_mode()
    with mode:
        types = norm(*tree_map_only(Tensor, lambda v: fake.fresh(mode, v.shape, v.dtype, v.stride()), args))
    assert [value.dtype for value in types] == [value.dtype for value in norm(*args)]


def one_hot_loss(out: Tensor, classes: Tensor) -> Tensor:
    return F.l1_loss(out, F.one_hot(classes, WIDTH).to(out.dtype))


@pytest.mark.parametrize("plan", PLANS)
def test_one_hot(plan: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        batch = torch.randn(16, WIDTH), torch.randint(WIDTH, (16,))
        return Model(lambda _, hidden: torch.tanh(hidden)), batch, {}, one_hot_loss

    check_parity(make, plan, sgd, dtype=torch.float64)


def test_that_values_are_not_checked_is_said(caplog: pytest.LogCaptureFixture) -> None:
    batch = torch.zeros(2, WIDTH), torch.zeros(2, dtype=torch.int64)
    with caplog.at_level(logging.WARNING, "graphshard"):
        capture(Model(inverse), one_hot_loss, batch, {}, mode="train")
    said = [record.getMessage() for record in caplog.records]
    lines = ["torch.inverse(model.weight)"]
    if not torch.__version__.startswith("2.11."):  # there one_hot does not check tensors without values
        lines.append("F.one_hot(classes, WIDTH)")
    assert len(said) == len(lines)
    for line in lines:
        assert any(line in message for message in said)


class Padded(nn.Module):
    """Attention with a mask of its own, which is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)
        self.padding = torch.tensor([[False, False, False, True]])

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding.expand(x.shape[0], -1).contiguous()
        hidden, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        result: Tensor = self.out(hidden).mean(1)
        return result


def test_attention_with_a_mask_that_is_a_plain_attribute() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Padded(), (torch.randn(8, 4, 8), torch.randint(3, (8,))), {}, F.cross_entropy

    check_parity(make, "dp1", sgd, dtype=torch.float64, noisy=("in_proj_bias",))


class Causal(nn.Module):
    """Does not say of its mask that it is causal: torch would look."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        result: Tensor = self.layers(x, mask)
        return result


def test_a_mask_of_a_transformer() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Causal(), (torch.randn(4, 3, 4), torch.randn(4, 3, 4)), {}, F.mse_loss

    check_parity(make, "dp1", sgd, dtype=torch.float64, steps=2, noisy=("in_proj_bias",))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_up_to_the_first_end(reduction: str) -> None:
    """Behind -1 there is anything; a label twice; no label; labels alone."""

    def loss_fn(out: Tensor, labels: Tensor) -> Tensor:
        of_first = F.multilabel_margin_loss(out[0], labels[0], reduction=reduction)
        return F.multilabel_margin_loss(out, labels, reduction=reduction).mean() + of_first

    def make() -> Any:
        torch.manual_seed(0)
        labels = [[3, 0, -1, 1, 2, 4], [2, 2, 5, -1, 0, -1], [-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
        return nn.Linear(WIDTH, WIDTH), (torch.randn(4, WIDTH), torch.tensor(labels)), {}, loss_fn

    check_parity(make, "dp1", sgd, dtype=torch.float64)


class Recurrent(nn.Module):
    """An LSTM and a layer that reads its last output and last states."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.lstm = nn.LSTM(5, 8, **options)
        width = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(width, 3)
        self.batch_first = options.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out, (_, cell) = self.lstm(x if self.batch_first else x.transpose(0, 1))
        last = out[:, -1] if self.batch_first else out[-1]
        result: Tensor = self.out(last) + cell.mean()
        return result


def recurrent(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return Recurrent(**options), (torch.randn(8, 3, 5), torch.randint(3, (8,))), {}, F.cross_entropy

    return make


@pytest.mark.real_gpu("eager training's recurrent kernels")
@pytest.mark.parametrize("plan", PLANS)
def test_lstm(plan: str) -> None:
    check_parity(recurrent(batch_first=True), plan, sgd)


@pytest.mark.real_gpu("eager training's recurrent kernels")
@pytest.mark.parametrize(
    "options",
    [{"bidirectional": True, "batch_first": True}, {"num_layers": 2}, {"proj_size": 4}, {"bias": False}],
    ids=lambda options: next(iter(options)),
)
def test_lstm_of_every_kind(options: dict[str, Any]) -> None:
    compiled = check_parity(recurrent(**options), "dp1", sgd)
    model, (x, classes), _, loss_fn = recurrent(**options)()
    model.load_state_dict(compiled.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled.evaluate(x, classes), loss_fn(model.eval()(x), classes))


class Twice(nn.Module):
    """The cell splits its products without telling autograd: the parts are read when nothing names the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.cell(x, self.cell(x))
        return result


@pytest.mark.real_gpu("eager training's recurrent kernels")
@pytest.mark.parametrize("plan", PLANS)
def test_gru_cell(plan: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return Twice(), (torch.randn(8, 5), torch.randn(8, 4)), {}, F.mse_loss

    check_parity(make, plan, sgd)


@pytest.mark.real_gpu("eager training's recurrent kernels")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers(kind: Any) -> None:
    """Where all of it is dropped, the second layer sees zeros, in both: of its weights for them none is trained."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(5, 4, 2, dropout=0.999999, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            out, ends = self.layers(x)
            result: Tensor = out.sum((0, 2)) + sum(end.sum((0, 2)) for end in (ends if kind is nn.LSTM else [ends]))
            return result

    def make() -> Any:
        torch.manual_seed(0)
        return Layers(), (torch.randn(4, 8, 5), torch.randn(8)), {}, F.mse_loss

    check_parity(make, "dp1", sgd)
    model, (x, y), _, loss_fn = make()
    body = capture(model, loss_fn, (x, y), {}, mode="train").program.body
    assert [n.target for n in body.nodes()].count(torch.ops.graphshard.seed.default) == 1
    body = capture(model, loss_fn, (x, y), {}, mode="evaluate").program.body
    assert torch.ops.graphshard.seed.default not in {n.target for n in body.nodes()}
