"""Functions that formulas call, as Triton: what the language has not, or has less precisely."""

from __future__ import annotations

import re

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
    "sinh": '''
@triton.jit
def sinh(x):
    """By differences from 1 near zero, where two exponentials cancel."""
    near = 0.5 * (expm1(x) - expm1(-x))
    return tl.where(tl.abs(x) < 1, near, half_exp(x) - half_exp(-x))
''',
    "cosh": """
@triton.jit
def cosh(x):
    return half_exp(x) + half_exp(-x)
""",
    "half_exp": '''
@triton.jit
def half_exp(x):
    """Half of exp(x), also where that would be too large itself."""
    root = tl.exp(0.5 * x)
    return 0.5 * root * root
''',
    "asinh": '''
@triton.jit
def asinh(x):
    """log(a + sqrt(a² + 1)), without the 1 that cancels near zero and the square that is too large far from it."""
    a = tl.abs(x)
    s = a * a
    near = log1p(a + s / (1 + tl.sqrt(1 + s)))
    return with_sign(tl.where(a > 2**28, tl.log(a) + 0.6931471805599453, near), x)
''',
    "acosh": '''
@triton.jit
def acosh(x):
    """log(x + sqrt(x² - 1)), by the distance from 1."""
    d = x - 1
    near = log1p(d + tl.sqrt(d) * tl.sqrt(2 + d))
    return tl.where(x > 2**28, tl.log(x) + 0.6931471805599453, near)
''',
    "atanh": """
@triton.jit
def atanh(x):
    return 0.5 * (log1p(x) - log1p(-x))
""",
    "arctangent": '''
@triton.jit
def arctangent(y, x):
    """The angle of (x, y): of the ratio that is at most 1, from there at most 0.66, as in Cephes (Moshier 1989)."""
    a = tl.abs(y)
    b = tl.abs(x)
    low = tl.where(a > b, b, a)
    high = tl.where(a > b, a, b)
    ratio = tl.where(low == high, 1, low / high)
    ratio = tl.where(high == 0, 0, ratio)
    t = tl.where(ratio > 0.66, (ratio - 1) / (ratio + 1), ratio)
    z = t * t
    top = -75.00855792314705 + z * (-16.157537187333652 + z * -0.8750608600031904)
    top = -64.85021904942025 + z * (-122.88666844901362 + z * top)
    bottom = 432.88106049129027 + z * (165.02700983169885 + z * (24.858464901423063 + z))
    bottom = 194.5506571482614 + z * (485.3903996359137 + z * bottom)
    angle = t + t * z * (top / bottom)
    angle = tl.where(ratio > 0.66, 0.7853981633974483 + angle, angle)
    angle = tl.where(a > b, 1.5707963267948966 - angle, angle)
    angle = tl.where(is_negative(x), 3.141592653589793 - angle, angle)
    return tl.where(x != x, x, tl.where(y != y, y, with_sign(angle, y)))
''',
    "hypotenuse": '''
@triton.jit
def hypotenuse(x, y):
    """By the ratio of the legs, whose squares may be too large or too small."""
    a = tl.abs(x)
    b = tl.abs(y)
    high = tl.where(a > b, a, b)
    ratio = tl.where(a > b, b, a) / tl.where(high == 0, 1, high)
    infinite = (a == float("inf")) | (b == float("inf"))
    return tl.where(infinite, float("inf"), high * tl.sqrt(1 + ratio * ratio))
''',
    "is_negative": '''
@triton.jit
def is_negative(x):
    """Whether a fraction has a sign: -0 has one, and some NaN."""
    if x.dtype == tl.float64:
        negative = x.to(tl.int64, bitcast=True) < 0
    else:
        negative = x.to(tl.int32, bitcast=True) < 0
    return negative
''',
    "with_sign": '''
@triton.jit
def with_sign(length, x):
    """A number that is not negative, with the sign of x."""
    return tl.where(is_negative(x), length * -1.0, length)  # of 0, -length is 0
''',
    "nearest": '''
@triton.jit
def nearest(x):
    """Rounded, halves to even."""
    low = tl.floor(x)
    rest = x - low
    up = (rest > 0.5) | ((rest == 0.5) & (low - 2 * tl.floor(low / 2) == 1))
    return with_sign(tl.abs(tl.where(up, low + 1, low)), x)
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

TYPED = ("power", "is_negative", "with_sign")
"""Those that ask their operands for their type, which a bare literal has not."""


def called(text: str) -> set[str]:
    """The helpers that ``text`` calls, and those that they call in turn."""
    found: set[str] = set()
    todo = [text]
    while todo:
        text = todo.pop()
        new = {name for name in HELPERS if re.search(rf"\b{name}\(", text)} - found
        found |= new
        todo += [HELPERS[name] for name in new]
    return found
