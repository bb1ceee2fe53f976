"""The Triton kernels: one generic row kernel for NVIDIA, AMD and Intel GPUs, and how a call launches it.

A program takes a row. Phase 1 reads both sides for their normalisers and, where the divergence has a closed
form, its cross sum; phase 2, for the others, sums phi and g; phase 3 writes the gradient. What is read again
comes from the second-level cache as long as the rows in flight fit in it.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import types
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .. import tuning
from ..divergences import TABLE, Closed, Divergence
from ..layout import common_rows
from ..reference import label_error
from ..spec import Call
from . import triton_math

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NEG_INF = tl.constexpr(float("-inf"))
# What a call wants: the loss; the loss and the gradient; the gradient times the upstream one.
LOSS, GRADIENT, SCALED_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# No hard term; one at T = 1 that shares the soft term's softmax; one with its own.
NO_HARD, SHARED_HARD, OWN_HARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FIGURES = tl.constexpr(7)  # a row's loss, soft term, hard term, two entropies, agreement, accuracy


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
def _read(row, columns, inside, column_stride, cap, slope, CAPPED: tl.constexpr, R: tl.constexpr):
    """A block of logits before scale and temperature, capped where there is a cap; -inf beyond the row."""
    x = tl.load(row + columns * column_stride, mask=inside, other=NEG_INF).to(R)
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
        # The interpreter truncates; what is rounded already stays as it is.
        u = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = ((u + 0x7FFF + ((u >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(to)


@triton.jit
def _grow(maximum, x):
    """The row's maximum with a block's, and the reference of its exponents: 0 where nothing is finite."""
    new = tl.maximum(maximum, tl.max(x, 0), propagate_nan=tl.PropagateNan.ALL)
    return new, tl.where(new == NEG_INF, 0.0, new)


@triton.jit
def _apply(expression: tl.constexpr, lq, lp, p0, p1, p2, p3, PARAMS: tl.constexpr):
    """An expression of the table, 0 for a class that neither side can produce."""
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
    return tl.where(dead, 0.0, x)


@triton.jit
def _cross(e, own, other, A: tl.constexpr, B: tl.constexpr):
    """Sum of e (A own + B other). What the weighing side can't produce contributes nothing; NaN stays."""
    term = B * other
    if A != 0:
        term += A * own
    return tl.sum(tl.where(e == 0, 0.0, e * term), 0)


@triton.jit
def row_kernel(
    z_ptr, v_ptr, gradient_ptr, rows_ptr,  # [..., V], [..., V], [N, width], [1 or FIGURES, N]
    labels_ptr, mask_ptr, weights_ptr, items_ptr, upstream_ptr,  # [N], [N], [N], one, [N] or one
    rows, n1, n2, classes, width, ignore_index,  # N = n0 n1 n2
    z_stride0, z_stride1, z_stride2, z_column, v_stride0, v_stride1, v_stride2, v_column, upstream_stride,
    cz: "fp64", cv: "fp64", c1: "fp64",  # from logits to exponents: both at T, the student at T = 1
    z_cap: "fp64", z_slope: "fp64", v_cap: "fp64", v_slope: "fp64", z_scale: "fp64",
    t_factor: "fp64", soft_weight: "fp64", hard_weight: "fp64", soft_gain: "fp64", hard_gain: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", items: "fp64",
    PHI: tl.constexpr, G: tl.constexpr, PARAMS: tl.constexpr,
    CLOSED: tl.constexpr, TEACHER_WEIGHS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SUM_G: tl.constexpr, SUM_G_PER_D: tl.constexpr,
    MODE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, STATS: tl.constexpr,
    MEAN: tl.constexpr, COUNTED: tl.constexpr,
    LABELS: tl.constexpr, MASK: tl.constexpr, WEIGHTS: tl.constexpr,
    Z_CAPPED: tl.constexpr, V_CAPPED: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss and figures, its gradient."""
    n = tl.program_id(0).to(tl.int64)
    N = rows.to(tl.int64)
    lane = tl.arange(0, BLOCK)

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
        if MODE != LOSS:
            nothing = tl.zeros([BLOCK], R).to(gradient_ptr.dtype.element_ty)
            for start in range(0, width, BLOCK):
                tl.store(gradient_ptr + n * width + start + lane, nothing, mask=start + lane < width)
    else:
        z_row = z_ptr + (n // n2 // n1 * z_stride0 + n // n2 % n1 * z_stride1 + n % n2 * z_stride2)
        v_row = v_ptr + (n // n2 // n1 * v_stride0 + n // n2 % n1 * v_stride1 + n % n2 * v_stride2)
        # Doubles at the interface, so that a float64 call loses nothing.
        by_z = tl.full((), cz, R)
        by_v = tl.full((), cv, R)
        by_1 = tl.full((), c1, R)
        cap_z = tl.full((), z_cap, R)
        cap_v = tl.full((), v_cap, R)
        slope_z = tl.full((), z_slope, R)
        slope_v = tl.full((), v_slope, R)
        a0 = tl.full((), p0, R)
        a1 = tl.full((), p1, R)
        a2 = tl.full((), p2, R)
        a3 = tl.full((), p3, R)

        # Phase 1: maxima m, references r, sums s of z, v, and z at T = 1; the cross sum.
        zero = tl.full((), 0.0, R)
        mz = zero + NEG_INF
        mv = mz
        m1 = mz
        rz = zero
        rv = zero
        r1 = zero
        sz = zero
        sv = zero
        s1 = zero
        cross = zero
        for start in range(0, classes, BLOCK):
            columns = start + lane
            inside = columns < classes
            z = _read(z_row, columns, inside, z_column, cap_z, slope_z, Z_CAPPED, R)
            y = z * by_z
            mz, ref_z = _grow(mz, y)
            y -= ref_z
            ey = tl.exp(y)
            moved_z = rz - ref_z
            keep_z = tl.exp(moved_z)
            if SOFT:
                u = _read(v_row, columns, inside, v_column, cap_v, slope_v, V_CAPPED, R) * by_v
                mv, ref_v = _grow(mv, u)
                u -= ref_v
                eu = tl.exp(u)
                moved_v = rv - ref_v
                keep_v = tl.exp(moved_v)
                if CLOSED:
                    # The sum so far, relative to the new references, and the block's.
                    if TEACHER_WEIGHS:
                        cross = keep_v * (cross + sv * (A * moved_v + B * moved_z)) + _cross(eu, u, y, A, B)
                    else:
                        cross = keep_z * (cross + sz * (A * moved_z + B * moved_v)) + _cross(ey, y, u, A, B)
                sv = sv * keep_v + tl.sum(eu, 0)
                rv = ref_v
            sz = sz * keep_z + tl.sum(ey, 0)
            rz = ref_z
            if HARD == OWN_HARD:
                m1, ref_1 = _grow(m1, z * by_1)
                s1 = s1 * tl.exp(r1 - ref_1) + tl.sum(tl.exp(z * by_1 - ref_1), 0)
                r1 = ref_1
        if HARD != OWN_HARD:
            r1 = rz
            s1 = sz
        lse_z = tl.log(sz)
        lse_v = tl.log(sv)
        lse_1 = tl.log(s1)

        # Phase 2: D and the sum of g.
        soft = zero
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
            phis = tl.zeros([BLOCK], R)
            gs = tl.zeros([BLOCK], R)
            for start in range(0, classes, BLOCK):
                columns = start + lane
                inside = columns < classes
                # Two steps: one constant for both would lose the logarithm's digits beside a large reference.
                lq = _read(z_row, columns, inside, z_column, cap_z, slope_z, Z_CAPPED, R) * by_z - rz - lse_z
                lp = _read(v_row, columns, inside, v_column, cap_v, slope_v, V_CAPPED, R) * by_v - rv - lse_v
                phis += _apply(PHI, lq, lp, a0, a1, a2, a3, PARAMS)
                gs += _apply(G, lq, lp, a0, a1, a2, a3, PARAMS)
            soft = tl.sum(phis, 0)
            sum_g = tl.sum(gs, 0)

        # A label out of range makes its row NaN: looking at it on the host would wait for the device.
        valid = (label >= 0) & (label < classes)
        poison = tl.where(labelled & (valid == 0), float("nan"), 0.0)
        weight = tl.full((), 1.0, tl.float64)
        if WEIGHTS:
            weight = tl.load(weights_ptr + n).to(tl.float64)

        if MODE != SCALED_GRADIENT:
            hard = zero
            if HARD != NO_HARD:
                x = _read(z_row, tl.where(valid, label, 0), True, z_column, cap_z, slope_z, Z_CAPPED, R)
                hard = tl.where(labelled, lse_1 - (x * by_1 - r1) + poison, 0.0)
            # A term of weight 0 is absent, also where it is infinite.
            loss = tl.full((), 0.0, tl.float64)
            if soft_weight != 0:
                loss += soft_weight * t_factor * soft.to(tl.float64)
            if hard_weight != 0:
                loss += hard_weight * hard.to(tl.float64)
            tl.store(rows_ptr + n, (weight * loss).to(R))
            if STATS:
                xz = tl.zeros([BLOCK], R)
                xv = tl.zeros([BLOCK], R)
                top_z = zero + NEG_INF
                top_v = zero + NEG_INF
                best_z = tl.full((), 0, tl.int32)
                best_v = tl.full((), 0, tl.int32)
                for start in range(0, classes, BLOCK):
                    columns = start + lane
                    inside = columns < classes
                    y = _read(z_row, columns, inside, z_column, cap_z, slope_z, Z_CAPPED, R) * by_z - rz
                    u = _read(v_row, columns, inside, v_column, cap_v, slope_v, V_CAPPED, R) * by_v - rv
                    ey = tl.exp(y)
                    eu = tl.exp(u)
                    xz += tl.where(ey > 0, ey * y, 0.0)
                    xv += tl.where(eu > 0, eu * u, 0.0)
                    block_z, at_z = tl.max(y, 0, return_indices=True)
                    block_v, at_v = tl.max(u, 0, return_indices=True)
                    best_z = tl.where(block_z > top_z, start + at_z, best_z)
                    best_v = tl.where(block_v > top_v, start + at_v, best_v)
                    top_z = tl.maximum(top_z, block_z)
                    top_v = tl.maximum(top_v, block_v)
                tl.store(rows_ptr + N + n, (t_factor * soft.to(tl.float64)).to(R))
                tl.store(rows_ptr + 2 * N + n, hard)
                tl.store(rows_ptr + 3 * N + n, lse_z - tl.sum(xz, 0) / sz)
                tl.store(rows_ptr + 4 * N + n, lse_v - tl.sum(xv, 0) / sv)
                tl.store(rows_ptr + 5 * N + n, (best_z == best_v).to(R))
                tl.store(rows_ptr + 6 * N + n, (labelled & (best_z == label)).to(R))

        # Phase 3.
        if MODE != LOSS:
            out = gradient_ptr + n * width
            factor = weight
            if MEAN:
                if COUNTED:
                    factor /= tl.load(items_ptr)
                else:
                    factor /= items
            if MODE == SCALED_GRADIENT:
                factor *= tl.load(upstream_ptr + n * upstream_stride).to(tl.float64)
            on_soft = (factor * soft_gain).to(R)
            on_hard = tl.where(labelled, factor * hard_gain + poison, 0.0).to(R)
            for start in range(0, width, BLOCK):
                columns = start + lane
                inside = columns < classes
                z = _read(z_row, columns, inside, z_column, cap_z, slope_z, Z_CAPPED, R)
                dz = tl.zeros([BLOCK], R)
                if SOFT:
                    lq = z * by_z - rz - lse_z
                    lp = (
                        _read(v_row, columns, inside, v_column, cap_v, slope_v, V_CAPPED, R) * by_v
                        - rv
                        - lse_v
                    )
                    dz = on_soft * (_apply(G, lq, lp, a0, a1, a2, a3, PARAMS) - tl.exp(lq) * sum_g)
                if HARD != NO_HARD:
                    dz += on_hard * (tl.exp(z * by_1 - r1 - lse_1) - (columns == label).to(R))
                if Z_CAPPED:  # d cap tanh(scale z / cap) / dz
                    raw = tl.load(z_row + columns * z_column, mask=inside, other=0.0).to(R)
                    e = tl.exp(-2.0 * tl.abs(raw * slope_z))
                    dz *= tl.full((), z_scale, R) * (4.0 * e / ((1.0 + e) * (1.0 + e)))
                tl.store(out + columns, _rounded(tl.where(inside, dz, 0.0), out), mask=columns < width)


@triton.jit
def total_kernel(
    rows_ptr, loss_ptr, items_ptr, rows, items: "fp64", COUNTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of the row losses over the number of items, in one fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(rows_ptr + at, mask=at < rows, other=0.0).to(tl.float64)
    if COUNTED:
        divisor = tl.load(items_ptr)
    else:
        divisor = tl.full((), items, tl.float64)
    tl.store(loss_ptr, (tl.sum(total, 0) / divisor).to(loss_ptr.dtype.element_ty))


@triton.jit
def scale_kernel(
    gradient_ptr, out_ptr, upstream_ptr, upstream_stride, width, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Out = gradient * upstream, row by row; in place and times 1 it returns at once."""
    n = tl.program_id(0).to(tl.int64)
    upstream = tl.load(upstream_ptr + n * upstream_stride)
    if not IN_PLACE or upstream != 1.0:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(gradient_ptr + n * width + at, mask=at < width).to(upstream.dtype)
            x = tl.where(x == 0, 0.0, x * upstream)  # rows that don't count stay 0
            tl.store(out_ptr + n * width + at, _rounded(x, out_ptr), mask=at < width)


TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
ROWS_AT_ONCE = 1024  # of the one program that adds up the losses


def forward(call: Call, with_gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, the stats where the spec asks for them, and the gradient where it is wanted."""
    student, spec = call.student, call.spec
    leading = student.shape[:-1]
    R = working_dtype(call)
    figures = torch.empty(FIGURES.value if spec.stats else 1, leading.numel(), dtype=R, device=student.device)
    gradient = (
        torch.empty(student.shape, dtype=student.dtype, device=student.device) if with_gradient else None
    )
    items = count_items(call)
    with _launching(student):
        launch(GRADIENT.value if with_gradient else LOSS.value, call, items, gradient, figures, None)
        if spec.reduction == "none":
            loss = figures[0].reshape(leading)
        else:
            loss = torch.empty((), dtype=R, device=student.device)
            memory, value = (None, 1.0) if spec.reduction == "sum" else items
            total_kernel[(1,)](
                figures, loss, memory, leading.numel(), value, COUNTED=memory is not None, BLOCK=ROWS_AT_ONCE
            )
    return loss, stats_of(call, figures, items) if spec.stats else None, gradient


def gradient(upstream: Tensor, call: Call) -> Tensor:
    """The gradient alone, with the upstream factor applied before the one rounding."""
    student = call.student
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    with _launching(student):
        launch(SCALED_GRADIENT.value, call, count_items(call), out, None, upstream)
    return out


def scale(gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
    """The gradient times the upstream one (0-d, or one per row); in place and times 1 it does nothing."""
    out = gradient if in_place else torch.empty_like(gradient)
    width = gradient.shape[-1]
    if gradient.numel():
        upstream, stride = (upstream, 0) if upstream.dim() == 0 else (upstream.contiguous(), 1)
        block = tuning.triton(width).block
        with _launching(gradient):
            scale_kernel[(gradient.numel() // width,)](
                gradient, out, upstream, stride, width, IN_PLACE=in_place, BLOCK=block
            )
    return out


def _launching(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; the interpreter is numpy, which warns of every -inf."""
    if INTERPRETED.value:
        return np.errstate(all="ignore")
    return torch.get_device_module(tensor.device).device(tensor.device)


def working_dtype(call: Call) -> torch.dtype:
    """float64 where either side is; float32 for everything else."""
    return torch.float64 if torch.float64 in (call.student.dtype, call.teacher.dtype) else torch.float32


def count_items(call: Call) -> tuple[Tensor | None, float]:
    """What a mean divides by: one float64 on the device, or where no device has to be asked, a number."""
    if call.spec.reduction != "mean" and not call.spec.stats:
        return None, 1.0
    counted: Tensor | None = None
    if call.mask is not None:
        counted = call.mask.sum()
    elif call.labels is not None:
        counted = (call.labels != call.spec.ignore_index).sum()
    items = call.num_items
    if counted is None:
        rows = call.student.shape[:-1].numel()
        if rows == 0:
            return None, 1.0
        if isinstance(items, Tensor):
            return items.to(call.student.device, torch.float64), 1.0
        return None, float(rows if items is None else items)
    given = counted if items is None else items
    return torch.where(counted == 0, 1.0, given).to(call.student.device, torch.float64), 1.0


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
    items: tuple[Tensor | None, float],
    gradient: Tensor | None,
    figures: Tensor | None,
    upstream: Tensor | None,
) -> None:
    """One program a row: fills whichever of gradient and figures the mode asks for."""
    student, teacher, labels, mask, token_weights, _, spec, classes = call
    rows = student.shape[:-1].numel()
    if rows == 0:
        return
    z, v, shape, z_strides, v_strides = common_rows(student, teacher, 3)
    none = [0] * (3 - len(shape))
    divergence = TABLE[spec.divergence]
    T = spec.temperature
    # A cap is applied to scaled logits, so that the scale goes inside.
    z_scale = 1.0 if spec.student_softcap else spec.student_scale
    v_scale = 1.0 if spec.teacher_softcap else spec.teacher_scale
    z_cap, v_cap = spec.student_softcap or 1.0, spec.teacher_softcap or 1.0
    params = (*spec.params, *[0.0] * (4 - len(spec.params)))
    uses_labels = labels is not None and (spec.hard_weight != 0 or spec.stats)
    hard = NO_HARD if not uses_labels else SHARED_HARD if T == 1 else OWN_HARD
    if uses_labels and student.device.type == "cpu":
        _check_labels(call)
    config = tuning.triton(classes)
    row_kernel[(rows,)](
        z, v, gradient, figures,
        None if labels is None else labels.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if token_weights is None else token_weights.detach().contiguous(),
        items[0],
        None if upstream is None else upstream.contiguous(),
        rows, *[1, 1, 1, *shape][-2:], classes, student.shape[-1], spec.ignore_index,
        *none, *z_strides, z.stride(-1), *none, *v_strides, v.stride(-1),
        0 if upstream is None or upstream.dim() == 0 else 1,
        z_scale / T, v_scale / T, z_scale,
        z_cap, spec.student_scale / z_cap, v_cap, spec.teacher_scale / v_cap, spec.student_scale,
        spec.t_factor, spec.soft_weight, spec.hard_weight,
        spec.soft_weight * spec.t_factor * z_scale / T, spec.hard_weight * z_scale,
        *params, items[1],
        PHI=on_device(divergence.phi), G=on_device(divergence.g), PARAMS=len(spec.params),
        **closed_constants(divergence),
        MODE=mode, SOFT=spec.soft_weight != 0 or spec.stats, HARD=hard.value, STATS=spec.stats,
        MEAN=spec.reduction == "mean", COUNTED=items[0] is not None,
        LABELS=labels is not None, MASK=mask is not None, WEIGHTS=token_weights is not None,
        Z_CAPPED=spec.student_softcap != 0, V_CAPPED=spec.teacher_softcap != 0,
        R=TYPES[working_dtype(call)], BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip


def _check_labels(call: Call) -> None:
    """The error of every backend on a CPU, where looking at the labels waits for nothing."""
    assert call.labels is not None
    labels = call.labels.flatten()
    wrong = (labels != call.spec.ignore_index) & ((labels < 0) | (labels >= call.classes))
    if call.mask is not None:
        wrong &= call.mask.flatten()
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(label_error(int(labels[row]), row, labels.numel(), call.classes))


def stats_of(call: Call, figures: Tensor, items: tuple[Tensor | None, float]) -> Tensor:
    """The seven figures of `KDStats` from those of the rows."""
    spec = call.spec
    counted = call.mask
    if counted is None and call.labels is not None:
        counted = call.labels != spec.ignore_index
    rows = figures.new_full((), figures.shape[1]) if counted is None else counted.sum().to(figures.dtype)
    labelled = rows * 0
    if call.labels is not None:
        here = call.labels != spec.ignore_index
        labelled = (here if call.mask is None else here & call.mask).sum().to(figures.dtype)
    sums = figures.sum(1, dtype=torch.float64).to(figures.dtype)
    if spec.reduction == "sum":
        over: Any = 1.0
    else:
        over = items[1] if items[0] is None else items[0].to(figures.dtype)
    one = rows.clamp(min=1)
    return torch.stack(
        [sums[1] / over, sums[2] / over, sums[3] / one, sums[4] / one, sums[5] / one,
         sums[6] / labelled.clamp(min=1), rows]
    )  # fmt: skip
