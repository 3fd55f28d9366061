"""``graphshard::attention``: scaled dot-product attention as one operator with its own backward.

A graph holds no kernel of a particular device. The operator chooses when it runs: torch's fused kernels where their
conditions hold, else the formula. All return the same log-sum-exp, so forward and backward need not agree on one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten

_FORWARD = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, bool enable_gqa)"
    " -> (Tensor, Tensor)"
)
_BACKWARD = (
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse,"
    " bool is_causal, float? scale, bool enable_gqa) -> (Tensor, Tensor, Tensor)"
)


def register(library: torch.library.Library) -> None:
    """Define both operators in ``library``."""
    for schema, run, types in ((_FORWARD, attention, _types), (_BACKWARD, attention_backward, _backward_types)):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, run, "CompositeExplicitAutograd")
        library.impl(name, types, "Meta")
    torch.library.register_autograd("graphshard::attention", _differentiate, setup_context=_save, lib=library)


def scaled_dot_product_attention(
    original: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``torch.nn.functional.scaled_dot_product_attention`` (``original``) becomes in a graph.

    Attention with dropout, a mask that is trained, and shapes that need broadcasting become plain operators.
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if dropout_p == 0.0 and _is_plain(q, k, v, attn_mask, is_causal, enable_gqa):
        result: Tensor = torch.ops.graphshard.attention(q, k, v, attn_mask, is_causal, scale, enable_gqa)[0]
        return result
    with sdpa_kernel(SDPBackend.MATH):
        return original(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)


def _is_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    if not (q.dim() == k.dim() == v.dim() == 4) or q.is_nested or not q.is_floating_point():
        return False
    if not (q.dtype == k.dtype == v.dtype) or 0 in (*q.shape, *k.shape, *v.shape):
        return False
    heads = q.shape[1] % k.shape[1] == 0 if enable_gqa else q.shape[1] == k.shape[1]
    if not heads or not (q.shape[0] == k.shape[0] == v.shape[0]) or k.shape[1:3] != v.shape[1:3]:
        return False
    return mask is None or (not mask.requires_grad and not is_causal and mask.dim() in (2, 4))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """Attention of [batch, heads, queries, dim] over [batch, key heads, keys, dim].

    Args:
        mask: broadcasts to [batch, heads, queries, keys]: bool (True takes part) or added to the scores.
        is_causal: query i sees keys 0 to i.
        enable_gqa: each key head serves ``heads / key heads`` query heads.

    Returns:
        The result, contiguous if q is, else contiguous in the order [batch, queries, heads, dim]; and the log-sum-exp
        of each query's scores, [batch, heads, queries], in float32 or the double precision of q.
    """
    out, lse = _results(q, v, "meta")
    k, v = _repeated(k, q, enable_gqa), _repeated(v, q, enable_gqa)
    bias = _bias(mask, q)
    match _kernel(q, k, v, bias, is_causal):
        case "halves":
            result, sums = _results(q, v, q.device)
            _halves(q, k, v, scale, result, sums)
        case "cpu":
            result, sums = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
            )
        case "flash":
            result, sums = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
        case "efficient":
            bias = _expanded(bias, q, k)
            result, sums = aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, 0.0, is_causal, scale=scale
            )[:2]
            sums = sums[..., : q.shape[2]]  # it pads queries
        case _:
            result, sums = _formula(q, k, v, bias, is_causal, scale)
    return _laid_out(result, out), _laid_out(sums, lse)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each contiguous in the order [batch, sequence, heads, dim]."""
    like = [_gradient(x, "meta") for x in (q, k, v)]
    heads = k.shape[1]
    k, v = _repeated(k, q, enable_gqa), _repeated(v, q, enable_gqa)
    bias = _bias(mask, q)
    if grad.stride(-1) != 1 or 0 in grad.stride():
        grad = grad.contiguous()
    match _kernel(q, k, v, bias, is_causal):
        case "halves":
            grads = tuple(_gradient(x, q.device) for x in (q, k, v))
            _halves_backward(grad, q, k, v, out, lse, scale, grads)
        case "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
            )
        case "flash":
            unused = torch.empty(0, dtype=torch.uint64, device=q.device)
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal,
                unused, unused, scale=scale,
            )  # fmt: skip
        case "efficient":
            bias = _expanded(bias, q, k)
            padded = F.pad(lse.contiguous(), (0, -lse.shape[2] % 32), value=math.inf)
            unused = torch.empty((), dtype=torch.int64, device=q.device)
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, bias, out, padded, unused, unused, 0.0, [True, True, True, False], is_causal, scale=scale
            )[:3]
        case _:
            grads = _formula_backward(grad, q, k, v, bias, out, lse, is_causal, scale)
    dq, dk, dv = grads
    return _laid_out(dq, like[0]), _laid_out(_summed(dk, heads), like[1]), _laid_out(_summed(dv, heads), like[2])


def _types(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    return _results(q, v, q.device)


def _results(q: Tensor, v: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Empty results: the strides that :func:`attention` promises."""
    batch, heads, queries, _ = q.shape
    if q.is_contiguous():
        out = q.new_empty(batch, heads, queries, v.shape[3], device=device)
    else:
        out = q.new_empty(batch, queries, heads, v.shape[3], device=device).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=_precise(q.dtype), device=device)


def _backward_types(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient(q, q.device), _gradient(k, q.device), _gradient(v, q.device)


def _gradient(x: Tensor, device: torch.device | str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3], device=device).transpose(1, 2)


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """``value`` with the strides of ``like``, a meta tensor; copied only if elements have to move."""
    pairs = zip(value.shape, value.stride(), like.stride(), strict=True)
    if all(have == want for size, have, want in pairs if size > 1):
        return value if value.stride() == like.stride() else value.as_strided(like.shape, like.stride())
    return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool) -> str:
    """Which fused kernel can do it; "" for none."""
    if not (q.shape[3] == k.shape[3] == v.shape[3]) or any(x.stride(3) != 1 for x in (q, k, v)):
        return ""
    if q.device.type == "cpu":
        square = is_causal and bias is None and q.shape[2] == k.shape[2]
        return "halves" if square and q.shape[2] in _HALVED and q.dtype.itemsize >= 4 else "cpu"
    if q.device.type == "cuda":
        given = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, is_causal, False)
        if bias is None and q.shape[3] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(given):
            return "flash"
        if (bias is None or k.shape[2] % 8 == 0) and torch.backends.cuda.can_use_efficient_attention(given):
            return "efficient"
    return ""


_HALVED = range(256, 1025)
"""Queries for which causal attention on a CPU is put together from parts, in float32 and float64. torch's kernel takes
512 keys at a time, and computes what the mask hides of them: of 256 positions half of all, of 1,024 a third. Parts of
128 positions are as fast for each score; smaller ones, and short or very long sequences, gain nothing or lose."""

_PART = 128


def _halves(q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor, lse: Tensor) -> None:
    """Causal attention into ``out`` and ``lse``: of each half, and of later queries over earlier keys."""
    kernel, half = aten._scaled_dot_product_flash_attention_for_cpu, q.shape[2] // 2
    if half < _PART:
        result, sums = kernel(q, k, v, 0.0, True, scale=scale)
        out.copy_(result)
        lse.copy_(sums)
        return
    for part in (slice(None, half), slice(half, None)):
        _halves(q[:, :, part], k[:, :, part], v[:, :, part], scale, out[:, :, part], lse[:, :, part])
    late, seen = out[:, :, half:], lse[:, :, half:]
    result, sums = kernel(q[:, :, half:], k[:, :, :half], v[:, :, :half], 0.0, False, scale=scale)
    total = torch.logaddexp(seen, sums)
    late.mul_((seen - total).exp_().unsqueeze(3)).addcmul_(result, (sums - total).exp_().unsqueeze(3))
    seen.copy_(total)


def _halves_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    grads: Sequence[Tensor],
) -> None:
    """The gradients into ``grads``: with the log-sum-exp over all keys, those of the parts add up."""
    kernel, half = aten._scaled_dot_product_flash_attention_for_cpu_backward, q.shape[2] // 2
    if half < _PART:
        for target, value in zip(grads, kernel(grad, q, k, v, out, lse, 0.0, True, scale=scale), strict=True):
            target.copy_(value)
        return
    early, late = slice(None, half), slice(half, None)
    for part in (early, late):
        own = [x[:, :, part] for x in grads]
        _halves_backward(
            grad[:, :, part], q[:, :, part], k[:, :, part], v[:, :, part], out[:, :, part], lse[:, :, part], scale, own
        )
    values = kernel(
        grad[:, :, late], q[:, :, late], k[:, :, early], v[:, :, early], out[:, :, late], lse[:, :, late],
        0.0, False, scale=scale,
    )  # fmt: skip
    for target, value, part in zip(grads, values, (late, early, early), strict=True):
        target[:, :, part].add_(value)


def _repeated(x: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if enable_gqa and x.shape[1] != q.shape[1] else x


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The gradient of key heads from that of their repetitions."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask as four-dimensional numbers to add."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return mask.to(q.dtype).view((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    scores = (q @ k.transpose(2, 3)) * scale
    if is_causal:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return scores if bias is None else scores + bias


def _formula(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    dtype = _precise(q.dtype)
    scores = _scores(q.to(dtype), k.to(dtype), bias, is_causal, scale)
    lse = scores.logsumexp(3)
    return (_weights(scores, lse) @ v.to(dtype)).to(q.dtype), lse


def _formula_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    dtype = _precise(q.dtype)
    q64, k64, v64, grad, out = (x.to(dtype) for x in (q, k, v, grad, out))
    weights = _weights(_scores(q64, k64, bias, is_causal, scale), lse)
    # softmax: ds_j = p_j (dp_j - sum_k p_k dp_k), and sum_k p_k dp_k = grad . out
    inner = grad @ v64.transpose(2, 3) - (grad * out).sum(3, keepdim=True)
    scores_grad = weights * inner * scale
    grads = scores_grad @ k64, scores_grad.transpose(2, 3) @ q64, weights.transpose(2, 3) @ grad
    return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Softmax from its log-sum-exp; zero where a query sees no key."""
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    return (scores - finite.unsqueeze(3)).exp()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.is_causal, ctx.scale, ctx.enable_gqa = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    assert grad_lse is None, "the log-sum-exp is for the backward only"
    if grad is None:
        return (None,) * 7
    grads = torch.ops.graphshard.attention_backward(grad, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.enable_gqa)
    return (*grads, None, None, None, None)
