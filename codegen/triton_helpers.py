"""Functions that formulas call, as Triton: what the language has not, or has less precisely."""

from __future__ import annotations

HELPERS = {
    "drawn": '''
@triton.jit
def drawn(seed, at):
    """Word ``at % 4`` of the block that Philox-4x32-10 makes for counter ``at // 4``."""
    counter = tl.cast(at, tl.int64) >> 2
    low = counter.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    word = tl.cast(at, tl.int64) & 3
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
''',
    "drawn_in_fours": '''
@triton.jit
def drawn_in_fours(seed, at):
    """The same where each four numbers in a row begin with a multiple of 4: their block is computed once."""
    counter = tl.min(tl.reshape(at, [at.numel // 4, 4]), axis=1).to(tl.int64) >> 2
    low = counter.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), at.shape)
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """Near zero, where 1 - exp(-2|x|) cancels, Lambert's continued fraction cut at the seventh level."""
    s = x * x
    small = x * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0, -large, large))
''',
    "largest": '''
@triton.jit
def largest(a, b):
    """The larger one; NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)
''',
    "smallest": '''
@triton.jit
def smallest(a, b):
    """The smaller one; NaN if either is."""
    return tl.where((a < b) | (a != a), a, b)
''',
    "power": '''
@triton.jit
def power(x, y):
    """By logarithms in float64, so that a float32 result is rounded once."""
    a = x.to(tl.float64)
    b = y.to(tl.float64)
    length = tl.abs(a)
    size = tl.where(length == 1, 1.0, tl.exp(b * tl.log(length)))
    signed = tl.where(b - 2 * tl.floor(b / 2) == 1, size * -1.0, size)  # of 0, -size is 0
    real = (b == tl.floor(b)) | (length == 0) | (length == float("inf"))
    result = tl.where((a < 0) | (1 / a < 0), tl.where(real, signed, float("nan")), size)  # -0 is negative, too
    return tl.where((b == 0) | (a == 1), 1.0, result).to(x.dtype)
''',
    "log1p": '''
@triton.jit
def log1p(x):
    """Kahan's: the error of 1 + x cancels in log(u) / (u - 1)."""
    u = 1 + x
    return tl.where((u == 1) | (x == float("inf")), x, tl.log(u) * (x / tl.where(u == 1, 1, u - 1)))
''',
    "expm1": '''
@triton.jit
def expm1(x):
    """Kahan's: the error of exp(x) cancels in (u - 1) / log(u)."""
    u = tl.exp(x)
    small = (u - 1) * (x / tl.where(u == 1, 1, tl.log(u)))
    return tl.where(u == 1, x, tl.where((u - 1 == -1) | (u == float("inf")), u - 1, small))
''',
    "nearest": '''
@triton.jit
def nearest(x):
    """Rounded, halves to even."""
    low = tl.floor(x)
    rest = x - low
    up = (rest > 0.5) | ((rest == 0.5) & (low - 2 * tl.floor(low / 2) == 1))
    return tl.where(up, low + 1, low)
''',
    "toward_zero": '''
@triton.jit
def toward_zero(x):
    """Without its fraction."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
''',
    "floor_quotient": '''
@triton.jit
def floor_quotient(a, b):
    """Integer division that rounds down, where ``//`` rounds toward zero."""
    q = a // b
    return tl.where((a - q * b != 0) & ((a < 0) != (b < 0)), q - 1, q)
''',
}
"""Functions that a kernel's file gets where a formula calls them."""
