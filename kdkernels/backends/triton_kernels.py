"""The Triton kernels: one generic row kernel for NVIDIA, AMD and Intel GPUs, and how a call launches it.

A program takes a row. Phase 1 reads both sides for their normalisers and, where the divergence has a closed
form, its cross sum; phase 2, for the others, sums phi and g; phase 3 writes the gradient. Of a vocabulary
that fits in one block the program keeps both rows and reads them once; of a larger one each phase reads them
again, from the second-level cache as long as the rows in flight fit in it.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import math
import types
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .. import tuning
from ..divergences import TABLE, Closed, Divergence
from ..layout import common_rows
from ..reference import check_labels, compute_dtype, counted_rows
from ..spec import STATE_ROWS, STATS, Call
from . import triton_math

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NEG_INF = tl.constexpr(float("-inf"))
# What a launch makes: the loss; the loss and the gradient; the loss and the row's state; from the state, the
# gradient times the upstream one.
LOSS, GRADIENT, STATE, SCALED_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# No hard term; one at T = 1 that shares the soft term's softmax; one with its own.
NO_HARD, SHARED_HARD, OWN_HARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What a mean divides by: a number, a tensor, the count of the rows.
NUMBER, TENSOR, COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STATE_NUMBERS = tl.constexpr(STATE_ROWS)
FIGURES = tl.constexpr(8)  # a row's loss, soft term, hard term, two entropies, agreement, accuracy, labelled


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
def _at(row, columns, stride, UNIT: tl.constexpr):
    """Where columns of a row lie. Times a stride of its own, a column can pass 2^31."""
    if UNIT:
        return row + columns
    else:
        return row + tl.cast(columns, tl.int64) * stride


@triton.jit
def _read(
    row, kept, columns, inside, stride,
    R: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A block of raw logits, -inf beyond the row: the one kept, or read, the last time or not."""
    if WHOLE:
        x = kept
    elif LAST:
        # Makes room in the cache for rows that will be read again.
        at = _at(row, columns, stride, UNIT)
        x = tl.load(at, mask=inside, other=NEG_INF, eviction_policy="evict_first")
    else:
        x = tl.load(_at(row, columns, stride, UNIT), mask=inside, other=NEG_INF)
    return x.to(R)


@triton.jit
def _capped(x, inside, cap, slope, CAPPED: tl.constexpr):
    """Capped: cap tanh(slope x) where there is a cap; -inf beyond the row."""
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(x * slope))
        t = (1.0 - e) / (1.0 + e)
        x = tl.where(inside, cap * tl.where(x < 0, -t, t), NEG_INF)
    return x


@triton.jit
def _rounded(x, pointer):
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
def _grouped(x, GROUP: tl.constexpr, AXIS: tl.constexpr):
    """A block as groups along AXIS: of neighbours, [.., GROUP], or of strided columns, [GROUP, ..]."""
    if AXIS == 1:
        return tl.reshape(x, [x.shape[0] // GROUP, GROUP])
    else:
        return tl.reshape(x, [GROUP, x.shape[0] // GROUP])


@triton.jit
def _spread(x, AXIS: tl.constexpr):
    """A number of each group, for each of its members."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def _reference(maximum):
    """What exponents are relative to: the maximum, or 0 where nothing is finite."""
    return tl.where(maximum == NEG_INF, 0.0, maximum)


@triton.jit
def _moved(maximum, reference):
    """By how much exponents so far change with their reference; where there are none, by nothing."""
    return tl.where(maximum == NEG_INF, 0.0, maximum - reference)


@triton.jit
def _carried(keep, x):
    """A cross sum so far under its new reference. What no longer weighs anything is gone, infinite or not."""
    return tl.where(keep == 0, 0.0, keep * x)


@triton.jit
def _apply(expression: tl.constexpr, lq, lp, p0, p1, p2, p3, PARAMS: tl.constexpr, GUARD: tl.constexpr):
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
def _cross(e, own, other, A: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr):
    """Sums of e (A own + B other). What the weighing side can't produce contributes nothing; NaN stays."""
    term = B * other
    if A != 0:
        term += A * own
    return tl.sum(tl.where(e == 0, 0.0, e * term), AXIS)


@triton.jit
def _best(x, maximum, columns, classes, best, AXIS: tl.constexpr):
    """The first column of each group's largest value, given that of the blocks before and their maximum."""
    largest = tl.max(x, AXIS)
    first = tl.min(tl.where(x == _spread(largest, AXIS), columns, classes), AXIS)
    return tl.where(largest > maximum, first, best)


@triton.jit
def _divisor(counted_ptr, given_ptr, number, ITEMS: tl.constexpr, COUNTED: tl.constexpr):
    """What a mean divides by; 1 where no row counts, so that 0 stays 0."""
    items = tl.full((), number, tl.float64)
    if ITEMS == TENSOR:
        items = tl.load(given_ptr).to(tl.float64)
    if COUNTED:
        counted = tl.load(counted_ptr).to(tl.float64)
        if ITEMS == COUNT:
            items = counted
        items = tl.where(counted == 0, 1.0, items)
    return items


# Integers that are compiled in would mean a build for each batch; what is known of them is in ALIGN and UNIT.
@triton.jit(
    do_not_specialize=[
        "rows", "n1", "n2", "classes", "width", "ignore_index", "upstream_stride",
        "z_stride0", "z_stride1", "z_stride2", "z_column", "v_stride0", "v_stride1", "v_stride2", "v_column",
    ]
)  # fmt: skip
def row_kernel(
    z_ptr, v_ptr, gradient_ptr, rows_ptr, state_ptr,  # [..., V] twice, [N, width], [1 or FIGURES, N], [6, N]
    labels_ptr, mask_ptr, weights_ptr, counted_ptr, given_ptr, upstream_ptr,  # [N] thrice, 1 twice, [N] or 1
    rows, n1, n2, classes, width, ignore_index,  # N = n0 n1 n2
    z_stride0, z_stride1, z_stride2, z_column, v_stride0, v_stride1, v_stride2, v_column, upstream_stride,
    cz: "fp64", cv: "fp64", c1: "fp64", T: "fp64",  # logits to exponents: both at T, the student at T = 1
    z_cap: "fp64", z_slope: "fp64", v_cap: "fp64", v_slope: "fp64", z_scale: "fp64",
    t_factor: "fp64", soft_weight: "fp64", hard_weight: "fp64", soft_gain: "fp64", hard_gain: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", number: "fp64",
    PHI: tl.constexpr, G: tl.constexpr, PARAMS: tl.constexpr, GUARD: tl.constexpr,
    CLOSED: tl.constexpr, TEACHER_WEIGHS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SUM_G: tl.constexpr, SUM_G_PER_D: tl.constexpr,
    MODE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, STATS: tl.constexpr,
    MEAN: tl.constexpr, ITEMS: tl.constexpr, COUNTED: tl.constexpr,
    LABELS: tl.constexpr, MASK: tl.constexpr, WEIGHTS: tl.constexpr,
    Z_CAPPED: tl.constexpr, V_CAPPED: tl.constexpr, Z_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One row: its loss and figures, its gradient.

    Classes, width and the strides of rows come divided by ALIGN, from which the compiler sees how wide an
    access may be. UNIT says that columns lie side by side, PADDED that width > classes, GUARD that
    expressions need help where neither side can produce a class; with WHOLE, width <= BLOCK.
    """
    n = tl.program_id(0).to(tl.int64)
    N = rows.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    classes = classes * ALIGN
    width = width * ALIGN

    label = ignore_index
    if LABELS:
        label = tl.load(labels_ptr + n)
    labelled = label != ignore_index
    counts = True
    if MASK:
        counts = tl.load(mask_ptr + n) != 0
    elif LABELS:
        counts = labelled

    if not counts:
        # The row may hold anything, NaN too: it isn't read.
        if MODE != SCALED_GRADIENT:
            tl.store(rows_ptr + n, 0.0)
            if STATS:
                for k in tl.static_range(1, FIGURES):
                    tl.store(rows_ptr + k * N + n, 0.0)
        if MODE == STATE:
            for k in tl.static_range(STATE_NUMBERS):
                tl.store(state_ptr + k * N + n, 0.0)
        if MODE == GRADIENT or MODE == SCALED_GRADIENT:
            nothing = tl.zeros([BLOCK], R).to(gradient_ptr.dtype.element_ty)
            for start in range(0, width, BLOCK):
                tl.store(gradient_ptr + n * width + start + lane, nothing, mask=start + lane < width)
    else:
        z_row = z_ptr + (n // n2 // n1 * z_stride0 + n // n2 % n1 * z_stride1 + n % n2 * z_stride2) * ALIGN
        v_row = v_ptr + (n // n2 // n1 * v_stride0 + n // n2 % n1 * v_stride1 + n % n2 * v_stride2) * ALIGN
        # A loop of one round has no other: then what each phase works on are the same registers.
        end = classes
        out_end = width
        z_kept = 0
        v_kept = 0
        if WHOLE:
            end = BLOCK
            out_end = BLOCK
            z_kept = tl.load(_at(z_row, lane, z_column, Z_UNIT), mask=lane < classes, other=NEG_INF)
            if SOFT:
                v_kept = tl.load(_at(v_row, lane, v_column, V_UNIT), mask=lane < classes, other=NEG_INF)
        # Doubles at the interface, so that a float64 call loses nothing.
        by_z = tl.full((), cz, R)
        by_v = tl.full((), cv, R)
        by_1 = tl.full((), c1, R)
        to_1 = tl.full((), T, R)
        cap_z = tl.full((), z_cap, R)
        cap_v = tl.full((), v_cap, R)
        slope_z = tl.full((), z_slope, R)
        slope_v = tl.full((), v_slope, R)
        a0 = tl.full((), p0, R)
        a1 = tl.full((), p1, R)
        a2 = tl.full((), p2, R)
        a3 = tl.full((), p3, R)

        zero = tl.full((), 0.0, R)
        soft = zero
        if MODE == SCALED_GRADIENT:
            rz = tl.load(state_ptr + n)
            lse_z = tl.load(state_ptr + N + n)
            rv = tl.load(state_ptr + 2 * N + n)
            lse_v = tl.load(state_ptr + 3 * N + n)
            lse_1 = tl.load(state_ptr + 4 * N + n)
            sum_g = tl.load(state_ptr + 5 * N + n)
        else:
            # Phase 1, for groups of columns, so that no thread waits for another before the end: maxima m and
            # sums s relative to them, of z and v over T, and of z at T = 1, whose reference is that of z over
            # T times T; the cross sum.
            groups = tl.zeros([BLOCK // GROUP], R)
            mz = groups + NEG_INF
            mv = groups + NEG_INF
            sz = groups
            sv = groups
            s1 = groups
            cross = groups
            # For the stats: sums of e^y y, and the most probable classes.
            xz = groups
            xv = groups
            best_z = tl.zeros([BLOCK // GROUP], tl.int32)
            best_v = best_z
            for start in range(0, end, BLOCK):
                columns = start + lane
                inside = columns < classes
                z = _read(z_row, z_kept, columns, inside, z_column, R, Z_UNIT, WHOLE, MODE == LOSS and CLOSED)
                z = _grouped(_capped(z, inside, cap_z, slope_z, Z_CAPPED), GROUP, AXIS)
                y = z * by_z
                if STATS:
                    best_z = _best(y, mz, _grouped(columns, GROUP, AXIS), classes, best_z, AXIS)
                top_z = tl.maximum(mz, tl.max(y, AXIS), propagate_nan=tl.PropagateNan.ALL)
                ref_z = _reference(top_z)
                y -= _spread(ref_z, AXIS)
                ey = tl.exp(y)
                moved_z = _moved(mz, ref_z)
                keep_z = tl.exp(moved_z)
                if SOFT:
                    u = _read(
                        v_row, v_kept, columns, inside, v_column, R, V_UNIT, WHOLE, MODE == LOSS and CLOSED
                    )
                    u = _grouped(_capped(u, inside, cap_v, slope_v, V_CAPPED), GROUP, AXIS) * by_v
                    if STATS:
                        best_v = _best(u, mv, _grouped(columns, GROUP, AXIS), classes, best_v, AXIS)
                    top_v = tl.maximum(mv, tl.max(u, AXIS), propagate_nan=tl.PropagateNan.ALL)
                    ref_v = _reference(top_v)
                    u -= _spread(ref_v, AXIS)
                    eu = tl.exp(u)
                    moved_v = _moved(mv, ref_v)
                    keep_v = tl.exp(moved_v)
                    if CLOSED:
                        # The sum so far, relative to the new references, and the block's.
                        if TEACHER_WEIGHS:
                            so_far = cross + sv * (A * moved_v + B * moved_z)
                            cross = _carried(keep_v, so_far) + _cross(eu, u, y, A, B, AXIS)
                        else:
                            so_far = cross + sz * (A * moved_z + B * moved_v)
                            cross = _carried(keep_z, so_far) + _cross(ey, y, u, A, B, AXIS)
                    if STATS:
                        xv = _carried(keep_v, xv + sv * moved_v) + _cross(eu, u, u, 0.0, 1.0, AXIS)
                    sv = sv * keep_v + tl.sum(eu, AXIS)
                    mv = top_v
                if STATS:
                    xz = _carried(keep_z, xz + sz * moved_z) + _cross(ey, y, y, 0.0, 1.0, AXIS)
                sz = sz * keep_z + tl.sum(ey, AXIS)
                mz = top_z
                if HARD == OWN_HARD:
                    at_1 = z * by_1 - _spread(ref_z * to_1, AXIS)
                    s1 = s1 * tl.exp(moved_z * to_1) + tl.sum(tl.exp(at_1), AXIS)

            # The groups' sums, relative to the row's maxima.
            top_z = tl.max(mz, 0)
            rz = _reference(top_z)
            moved_z = _moved(mz, rz)
            keep_z = tl.exp(moved_z)
            top_v = tl.max(mv, 0)
            rv = _reference(top_v)
            moved_v = _moved(mv, rv)
            keep_v = tl.exp(moved_v)
            if CLOSED:
                if TEACHER_WEIGHS:
                    cross = tl.sum(_carried(keep_v, cross + sv * (A * moved_v + B * moved_z)), 0)
                else:
                    cross = tl.sum(_carried(keep_z, cross + sz * (A * moved_z + B * moved_v)), 0)
            if STATS:
                xz = tl.sum(_carried(keep_z, xz + sz * moved_z), 0)
                xv = tl.sum(_carried(keep_v, xv + sv * moved_v), 0)
                best_z = tl.min(tl.where(mz == top_z, best_z, classes), 0)
                best_v = tl.min(tl.where(mv == top_v, best_v, classes), 0)
            sz = tl.sum(sz * keep_z, 0)
            sv = tl.sum(sv * keep_v, 0)
            if HARD == OWN_HARD:
                s1 = tl.sum(s1 * tl.exp(moved_z * to_1), 0)
            else:
                s1 = sz
            lse_z = tl.log(sz)
            lse_v = tl.log(sv)
            lse_1 = tl.log(s1)

            # Phase 2: D and the sum of g.
            sum_g = zero
            if SOFT and CLOSED:
                if TEACHER_WEIGHS:
                    soft = cross / sv - A * lse_v - B * lse_z
                else:
                    soft = cross / sz - A * lse_z - B * lse_v
                sum_g += SUM_G
                if SUM_G_PER_D != 0:  # 0 times an infinite D isn't 0
                    sum_g += SUM_G_PER_D * soft
            elif SOFT:
                phis = tl.zeros([BLOCK // GROUP], R)
                gs = phis
                for start in range(0, end, BLOCK):
                    columns = start + lane
                    inside = columns < classes
                    z = _read(z_row, z_kept, columns, inside, z_column, R, Z_UNIT, WHOLE, MODE == LOSS)
                    u = _read(v_row, v_kept, columns, inside, v_column, R, V_UNIT, WHOLE, MODE == LOSS)
                    # Two steps: one constant for both would lose the logarithm's digits beside a large
                    # reference.
                    lq = _capped(z, inside, cap_z, slope_z, Z_CAPPED) * by_z - rz - lse_z
                    lp = _capped(u, inside, cap_v, slope_v, V_CAPPED) * by_v - rv - lse_v
                    phi = _apply(PHI, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                    g = _apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                    phis += tl.sum(_grouped(phi, GROUP, AXIS), AXIS)
                    gs += tl.sum(_grouped(g, GROUP, AXIS), AXIS)
                soft = tl.sum(phis, 0)
                sum_g = tl.sum(gs, 0)
            if MODE == STATE:
                tl.store(state_ptr + n, rz)
                tl.store(state_ptr + N + n, lse_z)
                tl.store(state_ptr + 2 * N + n, rv)
                tl.store(state_ptr + 3 * N + n, lse_v)
                tl.store(state_ptr + 4 * N + n, lse_1)
                tl.store(state_ptr + 5 * N + n, sum_g)

        # A label out of range makes its row NaN: looking at it on the host would wait for the device.
        valid = (label >= 0) & (label < classes)
        poison = tl.where(labelled & (valid == 0), float("nan"), 0.0)
        weight = tl.full((), 1.0, tl.float64)
        if WEIGHTS:
            weight = tl.load(weights_ptr + n).to(tl.float64)

        if MODE != SCALED_GRADIENT:
            hard = zero
            if HARD != NO_HARD:
                x = tl.load(_at(z_row, tl.where(valid, label, 0), z_column, Z_UNIT)).to(R)
                x = _capped(x, True, cap_z, slope_z, Z_CAPPED)
                hard = tl.where(labelled, lse_1 - (x * by_1 - rz * to_1) + poison, 0.0)
            # A term of weight 0 is absent, also where it is infinite.
            loss = tl.full((), 0.0, tl.float64)
            if soft_weight != 0:
                loss += soft_weight * t_factor * soft.to(tl.float64)
            if hard_weight != 0:
                loss += hard_weight * hard.to(tl.float64)
            tl.store(rows_ptr + n, (weight * loss).to(R))
            if STATS:
                tl.store(rows_ptr + N + n, (t_factor * soft.to(tl.float64)).to(R))
                tl.store(rows_ptr + 2 * N + n, hard)
                tl.store(rows_ptr + 7 * N + n, labelled.to(R))
                tl.store(rows_ptr + 3 * N + n, lse_z - xz / sz)
                tl.store(rows_ptr + 4 * N + n, lse_v - xv / sv)
                tl.store(rows_ptr + 5 * N + n, (best_z == best_v).to(R))
                tl.store(rows_ptr + 6 * N + n, (labelled & (best_z == label)).to(R))

        # Phase 3.
        if MODE == GRADIENT or MODE == SCALED_GRADIENT:
            out = gradient_ptr + n * width
            factor = weight
            if MEAN:
                factor /= _divisor(counted_ptr, given_ptr, number, ITEMS, COUNTED)
            if MODE == SCALED_GRADIENT:
                factor *= tl.load(upstream_ptr + n * upstream_stride).to(tl.float64)
            on_soft = (factor * soft_gain).to(R)
            on_hard = tl.where(labelled, factor * hard_gain + poison, 0.0).to(R)
            for start in range(0, out_end, BLOCK):
                columns = start + lane
                inside = columns < classes
                raw = _read(z_row, z_kept, columns, inside, z_column, R, Z_UNIT, WHOLE, True)
                z = _capped(raw, inside, cap_z, slope_z, Z_CAPPED)
                dz = tl.zeros([BLOCK], R)
                if SOFT:
                    u = _read(v_row, v_kept, columns, inside, v_column, R, V_UNIT, WHOLE, True)
                    lq = z * by_z - rz - lse_z
                    lp = _capped(u, inside, cap_v, slope_v, V_CAPPED) * by_v - rv - lse_v
                    dz = on_soft * (_apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD) - tl.exp(lq) * sum_g)
                if HARD != NO_HARD:
                    dz += on_hard * (tl.exp(z * by_1 - rz * to_1 - lse_1) - (columns == label).to(R))
                if Z_CAPPED:  # d cap tanh(scale z / cap) / dz
                    e = tl.exp(-2.0 * tl.abs(raw * slope_z))
                    dz *= tl.full((), z_scale, R) * (4.0 * e / ((1.0 + e) * (1.0 + e)))
                if PADDED:  # beyond both softmaxes
                    dz = tl.where(inside, dz, 0.0)
                tl.store(out + columns, _rounded(dz, out), mask=columns < width)


@triton.jit(do_not_specialize=["rows"])
def total_kernel(
    rows_ptr, loss_ptr, stats_ptr, counted_ptr, given_ptr, rows, number: "fp64",
    LOSS_MEAN: tl.constexpr, STATS_MEAN: tl.constexpr, ITEMS: tl.constexpr, COUNTED: tl.constexpr,
    STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program k adds up figure k of the rows, in one fixed order, and divides: the loss, and the stats."""
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    N = rows.to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    labels = tl.zeros([BLOCK], tl.float64)
    for start in range(0, N, BLOCK):
        inside = start + lane < N
        sums += tl.load(rows_ptr + k * N + start + lane, mask=inside, other=0.0).to(tl.float64)
        if STATS:
            if k == 6:
                at = rows_ptr + 7 * N + start + lane
                labels += tl.load(at, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(sums, 0)
    to: tl.constexpr = rows_ptr.dtype.element_ty
    if k == 0:
        if loss_ptr is not None:
            if LOSS_MEAN:
                total /= _divisor(counted_ptr, given_ptr, number, ITEMS, COUNTED)
            tl.store(loss_ptr, total.to(to))
    elif STATS:
        counted = N.to(tl.float64)
        if COUNTED:
            counted = tl.load(counted_ptr).to(tl.float64)
        divisor = tl.maximum(counted, 1.0)
        if k <= 2:
            divisor = tl.full((), 1.0, tl.float64)
            if STATS_MEAN:
                divisor = _divisor(counted_ptr, given_ptr, number, ITEMS, COUNTED)
        if k == 6:
            divisor = tl.maximum(tl.sum(labels, 0), 1.0)
            tl.store(stats_ptr + 6, counted.to(to))
        tl.store(stats_ptr + k - 1, (total / divisor).to(to))


@triton.jit(do_not_specialize=["upstream_stride", "width"])
def scale_kernel(
    gradient_ptr, out_ptr, upstream_ptr, upstream_stride, width,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Out = gradient * upstream, row by row; in place and times 1 it returns at once."""
    n = tl.program_id(0).to(tl.int64)
    width = width * ALIGN
    upstream = tl.load(upstream_ptr + n * upstream_stride)
    if not IN_PLACE or upstream != 1.0:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(gradient_ptr + n * width + at, mask=at < width).to(upstream.dtype)
            x = tl.where(x == 0, 0.0, x * upstream)  # rows that don't count stay 0
            tl.store(out_ptr + n * width + at, _rounded(x, out_ptr), mask=at < width)


TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
MODES = {"nothing": LOSS.value, "gradient": GRADIENT.value, "state": STATE.value}
ALIGNMENT = 8  # numbers: 16 bytes of 16-bit ones
ROWS_AT_ONCE = 4096  # of the one program that adds up the losses


class Items(NamedTuple):
    """What a mean divides by: a number, one value on the device, or where there is neither the count itself.

    Attributes:
        counted: How many rows count, one integer on the device, or None where all do.
        given: The caller's denominator where it is on the device.
        number: The caller's, or the number of rows, where no device has to be asked.
    """

    counted: Tensor | None
    given: Tensor | None
    number: float | None

    @property
    def arguments(self) -> tuple[Tensor | None, Tensor | None, float]:
        """What a kernel is given."""
        return self.counted, self.given, 1.0 if self.number is None else self.number

    @property
    def constants(self) -> dict[str, Any]:
        """What it is compiled for."""
        kind = TENSOR if self.given is not None else COUNT if self.number is None else NUMBER
        return {"ITEMS": kind.value, "COUNTED": self.counted is not None}


def forward(call: Call, keep: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the stats where the spec asks for them, and what is kept for backward."""
    student, spec = call.student, call.spec
    leading, rows = student.shape[:-1], student.shape[:-1].numel()
    R, device = compute_dtype(student, call.teachers), student.device
    each = spec.reduction == "none"
    # Without stats the rows' losses are the only figures, and returned as they are, not as a view of more.
    shape = (FIGURES.value, rows) if spec.stats else leading if each else (rows,)
    figures = torch.empty(shape, dtype=R, device=device)
    kept = None
    if keep == "gradient":
        kept = torch.empty(student.shape, dtype=student.dtype, device=device)
    elif keep == "state":
        kept = torch.empty(STATE_ROWS, rows, dtype=R, device=device)
    loss = None if each else torch.empty((), dtype=R, device=device)
    stats = torch.empty(STATS, dtype=R, device=device) if spec.stats else None
    items = count_items(call)
    with _launching(student):
        launch(
            MODES[keep], call, items, gradient=kept if keep == "gradient" else None, figures=figures,
            state=kept if keep == "state" else None,
        )  # fmt: skip
        if loss is not None or stats is not None:
            total_kernel[(STATS if spec.stats else 1,)](
                figures, loss, stats, *items.arguments[:2], rows, items.arguments[2],
                LOSS_MEAN=spec.reduction == "mean", STATS_MEAN=spec.reduction != "sum", **items.constants,
                STATS=spec.stats, BLOCK=ROWS_AT_ONCE, num_warps=8,
            )  # fmt: skip
    if loss is None:
        loss = figures[0].reshape(leading).clone() if spec.stats else figures
    return loss, stats, kept


def gradient(upstream: Tensor, call: Call, state: Tensor) -> Tensor:
    """The gradient alone, from the rows and their state, with the upstream factor before the one rounding."""
    student = call.student
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    with _launching(student):
        launch(SCALED_GRADIENT.value, call, count_items(call), gradient=out, state=state, upstream=upstream)
    return out


def scale(gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
    """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
    out = gradient if in_place else torch.empty_like(gradient)
    width = gradient.shape[-1]
    if gradient.numel():
        upstream, stride = (upstream, 0) if upstream.dim() == 0 else (upstream.contiguous(), 1)
        align = math.gcd(ALIGNMENT, width)
        config = tuning.triton(width, gradient.element_size(), align, lanes=lanes(gradient.device))
        with _launching(gradient):
            scale_kernel[(gradient.numel() // width,)](
                gradient, out, upstream, stride, width // align,
                IN_PLACE=in_place, BLOCK=config.block, ALIGN=align, num_warps=config.warps,
            )  # fmt: skip
    return out


def _launching(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; the interpreter is numpy, which warns of every -inf."""
    if tensor.device.type == "cpu":
        return np.errstate(all="ignore")
    return torch.get_device_module(tensor.device).device(tensor.device)


def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on some of AMD's GPUs."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def count_items(call: Call) -> Items:
    """What a mean divides by, found without waiting for the device."""
    spec, given = call.spec, call.num_items
    rows = call.student.shape[:-1].numel()
    if rows == 0 or (spec.reduction != "mean" and not spec.stats):
        return Items(None, None, 1.0)
    counted: Tensor | None = None
    if call.mask is not None:
        counted = call.mask.sum()
    elif call.labels is not None:
        counted = (call.labels != spec.ignore_index).sum()
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            return Items(counted, given, None)
        given = float(given)
    if given is None and counted is None:
        given = rows
    return Items(counted, None, None if given is None else float(given))


@lru_cache(maxsize=256)
def needs_guard(divergence: Divergence, params: tuple[float, ...]) -> bool:
    """Whether an expression is other than 0 for a class that neither side can produce."""
    never = torch.full((), -math.inf, device="cpu")
    return any(expression(never, never, *params).item() != 0 for expression in (divergence.phi, divergence.g))


def closed_constants(divergence: Divergence) -> dict[str, bool | float]:
    """The kernel's constants for a divergence's closed form, or for none."""
    closed = divergence.closed or Closed(False, 0.0, 0.0, 0.0, 0.0)
    return {
        "CLOSED": divergence.closed is not None,
        "TEACHER_WEIGHS": closed.teacher_weighs,
        "A": closed.a,
        "B": closed.b,
        "SUM_G": closed.sum_g,
        "SUM_G_PER_D": closed.sum_g_per_d,
    }


def launch(
    mode: int,
    call: Call,
    items: Items,
    *,
    gradient: Tensor | None = None,
    figures: Tensor | None = None,
    state: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """One program a row: reads or fills whatever of these the mode is about."""
    student, teachers, _, labels, mask, token_weights, _, _, _, spec, classes = call
    rows, width = student.shape[:-1].numel(), student.shape[-1]
    if rows == 0:
        return
    (z, v), shape, (z_strides, v_strides) = common_rows([student, *teachers], 3)
    teacher_scale, teacher_softcap = spec.teachers[0]
    none = [0] * (3 - len(shape))
    divergence = TABLE[spec.divergence]
    T = spec.temperature
    # A cap is applied to scaled logits, so that the scale goes inside.
    z_scale = 1.0 if spec.student_softcap else spec.student_scale
    v_scale = 1.0 if teacher_softcap else teacher_scale
    z_cap, v_cap = spec.student_softcap or 1.0, teacher_softcap or 1.0
    params = (*spec.params, *[0.0] * (4 - len(spec.params)))
    uses_labels = labels is not None and (spec.hard_weight != 0 or spec.stats)
    hard = NO_HARD if not uses_labels else SHARED_HARD if T == 1 else OWN_HARD
    if labels is not None and uses_labels and student.device.type == "cpu":
        # Elsewhere looking would wait for the device.
        labelled = counted_rows(call) & (labels != spec.ignore_index)
        check_labels(torch.where(labelled, labels, 0), classes)
    counted, given, number = items.arguments
    R = compute_dtype(student, teachers)
    itemsize = max(student.element_size(), v.element_size())
    align = math.gcd(ALIGNMENT, classes, width, *z_strides, *v_strides)
    units = z.stride(-1) == 1, v.stride(-1) == 1
    config = tuning.triton(width, itemsize, align if all(units) else 1, spec.stats, lanes(student.device))
    z_strides, v_strides = ([x // align for x in strides] for strides in (z_strides, v_strides))
    row_kernel[(rows,)](
        z, v, gradient, figures, state,
        None if labels is None else labels.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if token_weights is None else token_weights.detach().contiguous(),
        counted, given,
        None if upstream is None else upstream.contiguous(),
        rows, *[1, 1, 1, *shape][-2:], classes // align, width // align, spec.ignore_index,
        *none, *z_strides, z.stride(-1), *none, *v_strides, v.stride(-1),
        0 if upstream is None or upstream.dim() == 0 else 1,
        z_scale / T, v_scale / T, z_scale, T,
        z_cap, spec.student_scale / z_cap, v_cap, teacher_scale / v_cap, spec.student_scale,
        spec.t_factor, spec.soft_weight, spec.hard_weight,
        spec.soft_weight * spec.t_factor * z_scale / T, spec.hard_weight * z_scale,
        *params, number,
        PHI=on_device(divergence.phi), G=on_device(divergence.g), PARAMS=len(spec.params),
        GUARD=needs_guard(divergence, spec.params), PADDED=classes != width,
        **closed_constants(divergence),
        MODE=mode, SOFT=spec.soft_weight != 0 or spec.stats, HARD=hard.value, STATS=spec.stats,
        MEAN=spec.reduction == "mean", **items.constants,
        LABELS=labels is not None, MASK=mask is not None, WEIGHTS=token_weights is not None,
        Z_CAPPED=spec.student_softcap != 0, V_CAPPED=teacher_softcap != 0,
        Z_UNIT=units[0], V_UNIT=units[1], WHOLE=config.whole,
        R=TYPES[R], BLOCK=config.block, GROUP=config.group, AXIS=0 if config.strided else 1, ALIGN=align,
        num_warps=config.warps,
    )  # fmt: skip
