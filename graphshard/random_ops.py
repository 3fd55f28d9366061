"""Random operators that take a key: the same key and id draw the same numbers, wherever and however often they run.

``key`` is int64[4] on the CPU: seed, step, data-parallel rank, micro-batch; ``id`` tells a graph's operators apart.
Dropout's mask is a function of a seed made from both, the same on every device (philox.py), which kernels compute, too.
What else there is draws from torch's generators: a GPU's is another one than the CPU's, and what it draws may depend on
the model of the GPU, as with torch's own functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphshard.philox import at_least

_SCHEMAS = (
    "seed(Tensor key, int id, *, Device device) -> Tensor",
    "dropout_mask(Tensor seed, int[] size, float p, int first=0) -> Tensor",
    "bernoulli(Tensor p, Tensor key, int id) -> Tensor",
    "poisson(Tensor rate, Tensor key, int id) -> Tensor",
    "multinomial(Tensor p, Tensor key, int samples, bool replacement, int id) -> Tensor",
    "permutation(Tensor key, int n, int id, *, ScalarType dtype, Device device) -> Tensor",
    "sample(Tensor key, int[] size, str distribution, Scalar[] parameters, int id, *, ScalarType dtype, Device device)"
    " -> Tensor",
    "sample_like(Tensor x, Tensor key, str distribution, Scalar[] parameters, int id, *, ScalarType? dtype=None)"
    " -> Tensor",
)

DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "uniform": Tensor.uniform_,  # parameters: low, high
    "normal": Tensor.normal_,  # mean, standard deviation
    "bernoulli": Tensor.bernoulli_,  # probability
    "integers": Tensor.random_,  # low, high (exclusive)
    "exponential": Tensor.exponential_,  # rate
    "geometric": Tensor.geometric_,  # probability
    "cauchy": Tensor.cauchy_,  # median, scale
    "log_normal": Tensor.log_normal_,  # mean, standard deviation of the logarithm
}
"""What ``sample`` and ``sample_like`` draw from, by name."""


def register(library: torch.library.Library) -> None:
    """Define the operators in ``library``."""
    real: tuple[Callable[..., Any], ...] = (
        seed,
        dropout_mask,
        bernoulli,
        poisson,
        multinomial,
        permutation,
        sample,
        sample_like,
    )
    meta: tuple[Callable[..., Any], ...] = (
        _seed_type,
        _dropout_mask_type,
        _like,
        _like,
        _multinomial_type,
        _permutation_type,
        _sample_type,
        _sample_like_type,
    )
    for schema, run, types in zip(_SCHEMAS, real, meta, strict=True):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"graphshard::{name}", types, lib=library)  # key and result differ in device


def generator(key: Tensor, id: int, device: torch.device) -> torch.Generator:
    """A generator seeded by key and id alone."""
    return torch.Generator(device).manual_seed(_mixed(key, id))


def _mixed(key: Tensor, id: int) -> int:
    """63 bits from all words of a key and an id: splitmix64 (Steele, Lea and Flood 2014)."""
    state = 0
    for word in (*key.tolist(), id):
        state = _mix(state ^ (word & _MASK))
    return state >> 1  # seeds are signed in places


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def seed(key: Tensor, id: int, *, device: torch.device) -> Tensor:
    """A seed for :func:`dropout_mask`: an int64 scalar on ``device``."""
    return torch.full((), _mixed(key, id), device=device)


def dropout_mask(seed: Tensor, size: list[int], p: float, first: int = 0) -> Tensor:
    """Which elements dropout with probability ``p`` keeps: bool, contiguous. Element ``i``, counted from ``first`` on,
    is kept unless word ``i`` of the seed is less than p * 2**32."""
    return at_least(threshold(p), seed, first, math.prod(size)).view(size)


def threshold(p: float) -> int:
    """Of 2**32 equally likely words so many are less than this as come up with probability ``p``."""
    return round(p * 2**32)


def bernoulli(p: Tensor, key: Tensor, id: int) -> Tensor:
    """One with probability ``p``, else zero."""
    drawn = torch.bernoulli(p.contiguous(), generator=generator(key, id, p.device))
    return torch.empty_like(p).copy_(drawn)


def poisson(rate: Tensor, key: Tensor, id: int) -> Tensor:
    """Poisson numbers of that rate, elementwise."""
    drawn = torch.poisson(rate.contiguous(), generator=generator(key, id, rate.device))
    return torch.empty_like(rate).copy_(drawn)


def multinomial(p: Tensor, key: Tensor, samples: int, replacement: bool, id: int) -> Tensor:
    """Indices drawn from the weights ``p`` [n] or [batch, n]: int64 [samples] or [batch, samples]."""
    return torch.multinomial(p, samples, replacement, generator=generator(key, id, p.device))


def permutation(key: Tensor, n: int, id: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers 0 to n-1 in random order."""
    return torch.randperm(n, generator=generator(key, id, device), dtype=dtype, device=device)


def sample(
    key: Tensor,
    size: list[int],
    distribution: str,
    parameters: list[Any],
    id: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A contiguous tensor of random numbers."""
    return _drawn(torch.empty(size, dtype=dtype, device=device), distribution, parameters, key, id)


def sample_like(
    x: Tensor, key: Tensor, distribution: str, parameters: list[Any], id: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Random numbers in the shape and strides of ``x``."""
    return _drawn(torch.empty_like(x, dtype=dtype), distribution, parameters, key, id)


def _drawn(out: Tensor, distribution: str, parameters: list[Any], key: Tensor, id: int) -> Tensor:
    """Fill ``out`` in the order of its elements, whatever its strides."""
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    DISTRIBUTIONS[distribution](target, *parameters, generator=generator(key, id, out.device))
    return out if target is out else out.copy_(target)


def _seed_type(key: Tensor, id: int, *, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _dropout_mask_type(seed: Tensor, size: list[int], p: float, first: int = 0) -> Tensor:
    return torch.empty(size, dtype=torch.bool, device=seed.device)


def _like(x: Tensor, key: Tensor, id: int) -> Tensor:
    return torch.empty_like(x)


def _multinomial_type(p: Tensor, key: Tensor, samples: int, replacement: bool, id: int) -> Tensor:
    return p.new_empty((*p.shape[:-1], samples), dtype=torch.int64)


def _permutation_type(key: Tensor, n: int, id: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(n, dtype=dtype, device=device)


def _sample_type(
    key: Tensor,
    size: list[int],
    distribution: str,
    parameters: list[Any],
    id: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _sample_like_type(
    x: Tensor, key: Tensor, distribution: str, parameters: list[Any], id: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)
