"""The functions that expressions of the divergences may use, for Triton: what `xp` is bound to there.

Functions of our own around `triton.language`'s, since the interpreter replaces the latter in a kernel's
globals only.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def expm1(x):
    """e^x − 1, with the digits of a small x (Kahan's quotient)."""
    u = tl.exp(x)
    safe = tl.where((u == 1.0) | (u == 0.0) | (u == float("inf")), 2.0, u)
    return tl.where(u == 1.0, x, tl.where(safe == u, (u - 1.0) * (x / tl.log(safe)), u - 1.0))


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, with the digits of a small x (Kahan's quotient)."""
    u = 1.0 + x
    safe = tl.where(u == 1.0, 2.0, u)
    return tl.where(u == 1.0, x, tl.log(safe) * (x / (safe - 1.0)))


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, with the digits of a small x."""
    size = tl.abs(x)
    if x.dtype == tl.float64:
        e = expm1(-2.0 * size)
        t = -e / (2.0 + e)
    else:
        e = tl.exp(-2.0 * size)
        s = size * size
        # Its series, whose next term is 9e-3 x^11, takes fewer registers than a logarithm.
        series = 1.0 - s * (1.0 / 3 - s * (2.0 / 15 - s * (17.0 / 315 - s * (62.0 / 2835))))
        t = tl.where(size < 0.25, size * series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -t, t)
