"""The teacher's side of a row, of one teacher or of a mixture: its logits, and the normaliser of each."""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import triton
import triton.language as tl

from . import triton_blocks as blocks
from . import triton_math, triton_noise

NEG_INF = blocks.NEG_INF


@triton.jit
def span(classes, share):
    """How many classes of a teacher are read: none without a share."""
    return tl.where(share == 0, 0, classes)


@triton.jit
def mixed_in(top, s, x):
    """The running maximum and sum of exponentials of logs, with one more."""
    new = tl.maximum(top, x)
    ref = blocks.reference_of(new)
    return new, s * tl.exp(blocks.shift_of(top, ref)) + tl.exp(x - ref)


@triton.jit
def logits(
    teachers, kept, mean, columns, inside, start, classes, seed, number,
    M: tl.constexpr, MIXED: tl.constexpr, DONE: tl.constexpr, BINARY: tl.constexpr, ONE: tl.constexpr,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr,
    WHOLE: tl.constexpr, LAST: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The teacher's logits over T, of a block or, with ONE, of a class; of a mixture those of its mean.

    What `teachers` holds, and `kept`, have an entry for each teacher, UNIT and CAPPED a bit. DONE says that
    the mean is there already.
    """
    rows, strides, by, caps, slopes, amounts, samples, refs, logs, shares = teachers
    if DONE:
        u = mean
    else:
        top = NEG_INF
        s = 0.0
        not_top = NEG_INF
        not_s = 0.0
        for m in tl.static_range(M):
            wanted = inside
            if MIXED:
                # A teacher without a share is not read, and what is not read is -inf.
                wanted = columns < span(classes, shares[m])
            u = blocks.read(rows[m], kept[m], columns, wanted, strides[m], R, (UNIT >> m) & 1, WHOLE, LAST)
            if ONE:
                eps = triton_noise.sample_at(
                    amounts[m], samples[m], seed, number, columns, 2 * m, NOISE, PER_ROW, R
                )
            else:
                eps = triton_noise.sample(
                    amounts[m], samples[m], seed, number, start, 2 * m, NOISE, PER_ROW, R, BLOCK
                )
            u = blocks.processed(u, inside, caps[m], slopes[m], eps, (CAPPED >> m) & 1, NOISE) * by[m]
            if MIXED:
                share = tl.log(shares[m])
                if BINARY:
                    smaller = triton_math.log1p(tl.exp(-tl.abs(u)))
                    top, s = mixed_in(top, s, tl.where(u > 0, 0.0, u) - smaller + share)
                    not_top, not_s = mixed_in(not_top, not_s, tl.where(u > 0, -u, 0.0) - smaller + share)
                else:
                    top, s = mixed_in(top, s, u - refs[m] - logs[m] + share)
        if MIXED:
            u = blocks.reference_of(top) + tl.log(s)
            if BINARY:
                u -= blocks.reference_of(not_top) + tl.log(not_s)
    return u


@triton.jit
def normaliser(
    row, kept, classes, end, lane, stride, by, cap, slope, scale, of_row, share, seed, number,
    STREAM: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, NOISE: tl.constexpr,
    PER_ROW: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Phase 0, of one teacher of a mixture: its log-sum-exp, as a reference and the log relative to it."""
    groups = tl.zeros([BLOCK // GROUP], R)
    maximum = groups + NEG_INF
    s = groups
    for start in range(0, end, BLOCK):
        columns = start + lane
        inside = columns < classes
        u = blocks.read(row, kept, columns, columns < span(classes, share), stride, R, UNIT, WHOLE, False)
        eps = triton_noise.sample(scale, of_row, seed, number, start, STREAM, NOISE, PER_ROW, R, BLOCK)
        u = blocks.grouped(blocks.processed(u, inside, cap, slope, eps, CAPPED, NOISE), GROUP, AXIS) * by
        top = tl.maximum(maximum, tl.max(u, AXIS), propagate_nan=tl.PropagateNan.ALL)
        ref = blocks.reference_of(top)
        s = s * tl.exp(blocks.shift_of(maximum, ref)) + tl.sum(tl.exp(u - blocks.spread(ref, AXIS)), AXIS)
        maximum = top
    ref = blocks.reference_of(tl.max(maximum, 0))
    s = tl.sum(s * tl.exp(blocks.shift_of(maximum, ref)), 0)
    return tl.where(share == 0, 0.0, ref), tl.where(share == 0, 0.0, tl.log(s))


@triton.jit
def double(parts, at: tl.constexpr):
    """A float64 number from the three of float32 that it was taken apart into."""
    x = tl.full((), parts[at], tl.float64) + tl.full((), parts[at + 1], tl.float64)
    return x + tl.full((), parts[at + 2], tl.float64)
