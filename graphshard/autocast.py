"""Which precision operators compute in under mixed precision: torch's autocast lists, by ATen operator.

``LOWER`` and ``FLOAT32`` follow its lists for CUDA ("CUDA Ops that can autocast to float16" and "to float32", page
torch.amp), with the losses and, as ``EXACTING``, the transforms and decompositions that its list for the CPU has.
Added are means, which round as sums do, batch norm, whose statistics are float32 buffers, and products of groups of
rows, which no list has. Any other operator computes in what it is given; where it does not promote by itself, in the
widest of it.

Losses that capture knows only as the operators they are made of are not in the lists, though they are in torch's: their
means and norms are in float32, and so is what reads a float32 target (l1_loss, kl_div, poisson_nll_loss); differences
and products before those are as narrow as what the model gives (margin and embedding losses, triplet_margin_loss).
"""

from __future__ import annotations

import torch
from torch import fx

LOWER = frozenset([
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "linear", "matmul",
    "chain_matmul", "_prelu_kernel", "convolution", "_convolution", "convolution_overrideable", "conv1d", "conv2d",
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc", "attention",
    "grouped_mm", "grouped_outer",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
])  # fmt: skip
"""Products: inputs are cast to the lower precision."""

FLOAT32 = frozenset([
    "acos", "asin", "cosh", "sinh", "tan", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "pow",
    "reciprocal", "rsqrt", "softplus", "sum", "mean", "var", "std", "var_mean", "std_mean", "prod", "cumsum",
    "cumprod", "logsumexp", "logcumsumexp", "trace", "norm", "linalg_vector_norm", "linalg_matrix_norm", "dist",
    "cdist", "_cdist_forward", "_pdist_forward", "renorm", "native_layer_norm", "native_group_norm",
    "_fused_rms_norm", "rms_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "mse_loss", "smooth_l1_loss",
    "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "nll_loss_forward",
    "nll_loss2d_forward", "soft_margin_loss", "_ctc_loss", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d",
    "grid_sampler_3d", "avg_pool3d", "polar", "view_as_complex",
])  # fmt: skip
"""Norms, softmax, losses, sums and what grows fast: inputs are cast to float32."""

EXACTING = frozenset([
    "_cholesky_solve_helper", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_linalg_det", "_linalg_eigh", "_linalg_eigvals",
    "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "cholesky_inverse", "cholesky_solve", "complex", "geqrf",
    "linalg_cholesky_ex", "linalg_cross", "linalg_eig", "linalg_eigvals", "linalg_householder_product",
    "linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_lstsq", "linalg_lu", "linalg_lu_factor_ex", "linalg_lu_solve",
    "linalg_matrix_exp", "linalg_pinv", "linalg_qr", "linalg_solve_triangular", "lu_unpack", "ormqr",
    "triangular_solve",
])  # fmt: skip
"""Transforms and decompositions, which torch's list for the CPU has in float32: few take less, and of what they make of
rounded values nothing may be right."""

BACKWARD_FLOAT32 = frozenset(["embedding_dense_backward"])
"""Operators of the backward in float32 whatever they differentiate: a frequent token's gradient is a long sum."""

_ONE_DTYPE = ("lerp", "heaviside")
"""Pointwise operators that refuse floats of several precisions all the same."""

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The lower precisions, as plan strings name them."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What is cast. Float64 was written on purpose and stays; the narrow floats of quantization are no arithmetic types."""


def island(node: fx.Node, lower: torch.dtype) -> torch.dtype | None:
    """The precision that a forward operator computes in whatever it is given; None: in what it is given."""
    name = operator_name(node)
    if name in LOWER:
        return lower
    return torch.float32 if name in FLOAT32 or name in EXACTING else None


def backward_island(node: fx.Node) -> bool:
    """Whether an operator of the backward computes in float32 whatever it differentiates."""
    return operator_name(node) in BACKWARD_FLOAT32


def promotes(node: fx.Node) -> bool:
    """Whether the operator takes floats of several precisions and computes in the widest."""
    target, name = node.target, operator_name(node)
    return isinstance(target, torch._ops.OpOverload) and (
        (torch.Tag.pointwise in target.tags and name not in _ONE_DTYPE) or name in ("cat", "stack")
    )


def operator_name(node: fx.Node) -> str:
    """As the lists have it; "" where there is none."""
    target = node.target
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""
