"""What the row kernel does to blocks of a row: reads, expressions, and sums by groups of columns."""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import types
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from . import triton_math, triton_noise

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))
# No NaN: at each launch Triton compares constants with those of the build, and NaN is never the same.
NO_NOISE = triton_noise.NO_NOISE


@cache
def on_device(expression: Any) -> Any:
    """An expression of the table with `xp` bound to Triton's functions."""
    # Triton looks annotations up, too, and among constants only.
    annotations = dict.fromkeys(map(str, expression.__annotations__.values()), tl.constexpr(0))
    names = {**expression.__globals__, **annotations, "xp": triton_math, "tl": tl}
    function = types.FunctionType(expression.__code__, names, expression.__name__)
    # What these kernels were made for, whatever the environment says by now.
    return InterpretedFunction(function) if INTERPRETED.value else triton.jit(function)


@triton.jit
def row_start(n, n1, n2, stride0, stride1, stride2, ALIGN: tl.constexpr):
    """Where row n begins."""
    return (n // n2 // n1 * stride0 + n // n2 % n1 * stride1 + n % n2 * stride2) * ALIGN


@triton.jit
def address(row, columns, stride, UNIT: tl.constexpr):
    """Where columns of a row lie. Times a stride of its own, a column can pass 2^31."""
    if UNIT:
        return row + columns
    else:
        return row + tl.cast(columns, tl.int64) * stride


@triton.jit
def read(
    row, kept, columns, inside, stride,
    R: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A block of raw logits, -inf beyond the row: the one kept, or read, the last time or not."""
    if WHOLE:
        x = kept
    elif LAST:
        # Makes room in the cache for rows that will be read again.
        at = address(row, columns, stride, UNIT)
        x = tl.load(at, mask=inside, other=NEG_INF, eviction_policy="evict_first")
    else:
        x = tl.load(address(row, columns, stride, UNIT), mask=inside, other=NEG_INF)
    return x.to(R)


@triton.jit
def processed(x, inside, cap, slope, eps, CAPPED: tl.constexpr, NOISE: tl.constexpr):
    """Logits as terms use them: cap tanh(slope x) where there is a cap, noise; -inf beyond the row.

    Without either the scale is left to what comes next, which multiplies anyway.
    """
    if CAPPED:
        x = tl.where(inside, cap * triton_math.tanh(x * slope), NEG_INF)
    elif NOISE != NO_NOISE:
        x *= slope
    return triton_noise.noised(x, eps, NOISE)


@triton.jit
def through(dz, raw, z, eps, scale, slope, CAPPED: tl.constexpr, NOISE: tl.constexpr):
    """A gradient with respect to what `processed` gives, z, as one with respect to what it is given."""
    if NOISE == triton_noise.MULTIPLICATIVE:
        dz = tl.where(z == NEG_INF, dz, dz * (1.0 + eps))
    if CAPPED:  # d cap tanh(scale z / cap) / dz
        e = tl.exp(-2.0 * tl.abs(raw * slope))
        dz *= scale * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return dz


@triton.jit
def rounded_to(x, pointer):
    """The values in the type that is pointed to, rounded to nearest."""
    to: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and to == tl.bfloat16:
        # The interpreter truncates, and of float64 makes something else; what is rounded stays as it is.
        x = x.to(tl.float32)
        u = x.to(tl.int32, bitcast=True)
        rounded = ((u + 0x7FFF + ((u >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(to)


@triton.jit
def grouped(x, GROUP: tl.constexpr, AXIS: tl.constexpr):
    """A block as groups along AXIS: of neighbours, [.., GROUP], or of strided columns, [GROUP, ..]."""
    if AXIS == 1:
        return tl.reshape(x, [x.shape[0] // GROUP, GROUP])
    else:
        return tl.reshape(x, [GROUP, x.shape[0] // GROUP])


@triton.jit
def spread(x, AXIS: tl.constexpr):
    """A number of each group, for each of its members."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def group_sums(x, GROUP: tl.constexpr, AXIS: tl.constexpr):
    """The sum of each group of a block."""
    return tl.sum(grouped(x, GROUP, AXIS), AXIS)


@triton.jit
def reference_of(maximum):
    """What exponents are relative to: the maximum, or 0 where nothing is finite."""
    return tl.where(maximum == NEG_INF, 0.0, maximum)


@triton.jit
def shift_of(maximum, reference):
    """By how much exponents so far change with their reference; where there are none, by nothing."""
    return tl.where(maximum == NEG_INF, 0.0, maximum - reference)


@triton.jit
def carried(keep, x):
    """A cross sum so far under its new reference. What no longer weighs anything is gone, infinite or not."""
    return tl.where(keep == 0, 0.0, keep * x)


@triton.jit
def with_one(maximum, s, weighed, one):
    """The reference, the sum of e^x and that of e^x x of classes, given those of all but one, and the one."""
    top = tl.maximum(maximum, one)
    ref = reference_of(top)
    moved = shift_of(maximum, ref)
    keep = tl.where(s == 0, 0.0, tl.exp(moved))
    e = tl.exp(one - ref)
    return ref, s * keep + e, carried(keep, weighed + s * moved) + tl.where(e == 0, 0.0, e * (one - ref))


@triton.jit
def apply(expression: tl.constexpr, lq, lp, p0, p1, p2, p3, PARAMS: tl.constexpr, GUARD: tl.constexpr):
    """An expression of the table, 0 for a class that neither side can produce."""
    if GUARD:
        dead = (lq == NEG_INF) & (lp == NEG_INF)
        lq = tl.where(dead, 0.0, lq)
        lp = tl.where(dead, 0.0, lp)
    if PARAMS == 0:
        x = expression(lq, lp)
    elif PARAMS == 1:
        x = expression(lq, lp, p0)
    elif PARAMS == 2:
        x = expression(lq, lp, p0, p1)
    elif PARAMS == 3:
        x = expression(lq, lp, p0, p1, p2)
    else:
        x = expression(lq, lp, p0, p1, p2, p3)
    if GUARD:
        x = tl.where(dead, 0.0, x)
    return x


@triton.jit
def cross_sum(e, own, other, A: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr):
    """Sums of e (A own + B other). What the weighing side can't produce contributes nothing; NaN stays."""
    term = B * other
    if A != 0:
        term += A * own
    return tl.sum(tl.where(e == 0, 0.0, e * term), AXIS)


@triton.jit
def first_largest(x, maximum, columns, classes, best, AXIS: tl.constexpr):
    """The first column of each group's largest value, given that of the blocks before and their maximum."""
    largest = tl.max(x, AXIS)
    first = tl.min(tl.where(x == spread(largest, AXIS), columns, classes), AXIS)
    return tl.where(largest > maximum, first, best)


@triton.jit
def first_with(best, maximum, label, x):
    """The first column of the largest value, given that of all but the label's."""
    return tl.where(x > maximum, label, tl.where(x == maximum, tl.minimum(best, label), best))


@triton.jit
def binary_entropy(x):
    """Entropy of a yes or no of logit x: log(1 + e^-|x|) + |x| / (1 + e^|x|)."""
    x = tl.abs(x)
    e = tl.exp(-x)
    return triton_math.log1p(e) + tl.where(e == 0, 0.0, x * e / (1.0 + e))
