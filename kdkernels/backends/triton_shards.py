"""The Triton kernels for rows whose classes are shared out over processes: what a process finds of its own.

A program takes a row. `shard_sums_kernel` is phase 1 of `row_kernel`: it reads both sides once, and what it
sums is relative to the largest logits that it meets. `shard_terms_kernel` is phase 2, from the normalisers of
all classes, for divergences that have no closed form: it reads both sides once more. The gradient is phase 3
of `row_kernel` itself, from the state of rows: one more read, and the write.

So with V of the classes and logits of b bytes the loss reads 2 V b bytes a row, or 4 V b without a closed
form, and the gradient reads 2 V b and writes V b. Beside them a row has its numbers, SHARD_NUMBERS of them,
8 bytes each.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import triton
import triton.language as tl

from ..spec import SHARD_NUMBERS
from . import triton_blocks as blocks
from . import triton_noise
from .triton_kernels import NO_HARD, OWN_HARD

NEG_INF, NO_NOISE = blocks.NEG_INF, triton_noise.NO_NOISE
NUMBERS = tl.constexpr(len(SHARD_NUMBERS))
Z_REF, Z_SUM, V_REF, V_SUM, ONE_REF, ONE_SUM, CROSS, SUM_G, Z_TARGET, V_TARGET, PHI_SUM = (
    tl.constexpr(SHARD_NUMBERS.index(name))
    for name in (
        "z_ref", "z_sum", "v_ref", "v_sum", "one_ref", "one_sum", "cross", "sum_g", "z_target", "v_target",
        "phi",
    )
)  # fmt: skip


@triton.jit
def is_counted(n, labels_ptr, mask_ptr, ignore_index, LABELS: tl.constexpr, MASK: tl.constexpr):
    """Whether a row counts."""
    counts = True
    if MASK:
        counts = tl.load(mask_ptr + n) != 0
    elif LABELS:
        counts = tl.load(labels_ptr + n) != ignore_index
    return counts


@triton.jit
def logits(
    side, columns, inside, CAPPED: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Logits of a side as terms use them, but for the scale where there is no cap; -inf beyond the row."""
    row, stride, cap, slope = side
    x = blocks.read(row, row, columns, inside, stride, R, UNIT, False, False)
    return blocks.processed(x, inside, cap, slope, 0.0, CAPPED, NO_NOISE)


# Integers that are compiled in would mean a build for each batch; what is known of them is in ALIGN and UNIT.
@triton.jit(
    do_not_specialize=[
        "n1", "n2", "classes", "ignore_index",
        "z_stride0", "z_stride1", "z_stride2", "z_column", "v_stride0", "v_stride1", "v_stride2", "v_column",
    ]
)  # fmt: skip
def shard_sums_kernel(
    z_ptr, v_ptr, numbers_ptr, labels_ptr, mask_ptr,  # [..., V] twice, [N, NUMBERS], [N] twice
    n1, n2, classes, ignore_index,  # N = n0 n1 n2
    z_stride0, z_stride1, z_stride2, z_column, v_stride0, v_stride1, v_stride2, v_column,
    cz: "fp64", cv: "fp64", c1: "fp64", T: "fp64",  # logits to exponents: both at T, the student at T = 1
    z_cap: "fp64", z_slope: "fp64", v_cap: "fp64", v_slope: "fp64",
    CLOSED: tl.constexpr, TEACHER_WEIGHS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    TARGET: tl.constexpr, HARD: tl.constexpr, LABELS: tl.constexpr, MASK: tl.constexpr,
    Z_CAPPED: tl.constexpr, V_CAPPED: tl.constexpr, Z_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One row: maxima and sums of exponentials of its own classes, the cross sum, the target's logits.

    As in `row_kernel`, classes and strides of rows come divided by ALIGN. A label that is no class here is
    another process's. Of a row that doesn't count nothing is written, nor what nobody asks for.
    """
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    classes = classes * ALIGN
    if is_counted(n, labels_ptr, mask_ptr, ignore_index, LABELS, MASK):
        by_z = tl.full((), cz, R)
        by_v = tl.full((), cv, R)
        by_1 = tl.full((), c1, R)
        to_1 = tl.full((), T, R)
        z_row = z_ptr + blocks.row_start(n, n1, n2, z_stride0, z_stride1, z_stride2, ALIGN)
        v_row = v_ptr + blocks.row_start(n, n1, n2, v_stride0, v_stride1, v_stride2, ALIGN)
        student = (z_row, z_column, tl.full((), z_cap, R), tl.full((), z_slope, R))
        teacher = (v_row, v_column, tl.full((), v_cap, R), tl.full((), v_slope, R))
        target = tl.full((), -1, tl.int32)
        if TARGET or HARD != NO_HARD:
            label = tl.load(labels_ptr + n)
            target = tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)

        # By groups of columns, as in `row_kernel`: maxima m, sums s relative to them, of z at T = 1 to the
        # maximum times T.
        groups = tl.zeros([BLOCK // GROUP], R)
        mz = groups + NEG_INF
        mv = groups + NEG_INF
        sz = groups
        sv = groups
        s1 = groups
        cross = groups
        for start in range(0, classes, BLOCK):
            columns = start + lane
            inside = columns < classes
            z = logits(student, columns, inside, Z_CAPPED, Z_UNIT, R)
            u = logits(teacher, columns, inside, V_CAPPED, V_UNIT, R) * by_v
            if TARGET:
                z = tl.where(columns == target, NEG_INF, z)
                u = tl.where(columns == target, NEG_INF, u)
            z = blocks.grouped(z, GROUP, AXIS)
            u = blocks.grouped(u, GROUP, AXIS)
            y = z * by_z
            top_z = tl.maximum(mz, tl.max(y, AXIS), propagate_nan=tl.PropagateNan.ALL)
            top_v = tl.maximum(mv, tl.max(u, AXIS), propagate_nan=tl.PropagateNan.ALL)
            ref_z = blocks.reference_of(top_z)
            ref_v = blocks.reference_of(top_v)
            y -= blocks.spread(ref_z, AXIS)
            u -= blocks.spread(ref_v, AXIS)
            ey = tl.exp(y)
            eu = tl.exp(u)
            moved_z = blocks.shift_of(mz, ref_z)
            moved_v = blocks.shift_of(mv, ref_v)
            keep_z = tl.exp(moved_z)
            keep_v = tl.exp(moved_v)
            if CLOSED:
                if TEACHER_WEIGHS:
                    cross = blocks.carried(keep_v, cross + sv * (A * moved_v + B * moved_z))
                    cross += blocks.cross_sum(eu, u, y, A, B, AXIS)
                else:
                    cross = blocks.carried(keep_z, cross + sz * (A * moved_z + B * moved_v))
                    cross += blocks.cross_sum(ey, y, u, A, B, AXIS)
            sz = sz * keep_z + tl.sum(ey, AXIS)
            sv = sv * keep_v + tl.sum(eu, AXIS)
            mz = top_z
            mv = top_v
            if HARD == OWN_HARD:
                at_1 = z * by_1 - blocks.spread(ref_z * to_1, AXIS)
                s1 = s1 * tl.exp(moved_z * to_1) + tl.sum(tl.exp(at_1), AXIS)

        # The groups' sums, relative to the maxima of them all.
        rz = blocks.reference_of(tl.max(mz, 0))
        rv = blocks.reference_of(tl.max(mv, 0))
        moved_z = blocks.shift_of(mz, rz)
        moved_v = blocks.shift_of(mv, rv)
        keep_z = tl.exp(moved_z)
        keep_v = tl.exp(moved_v)
        to = numbers_ptr + n * NUMBERS
        if CLOSED:
            if TEACHER_WEIGHS:
                cross = blocks.carried(keep_v, cross + sv * (A * moved_v + B * moved_z))
            else:
                cross = blocks.carried(keep_z, cross + sz * (A * moved_z + B * moved_v))
            tl.store(to + CROSS, tl.sum(cross, 0).to(tl.float64))
        tl.store(to + Z_REF, rz.to(tl.float64))
        tl.store(to + Z_SUM, tl.sum(sz * keep_z, 0).to(tl.float64))
        tl.store(to + V_REF, rv.to(tl.float64))
        tl.store(to + V_SUM, tl.sum(sv * keep_v, 0).to(tl.float64))
        if HARD == OWN_HARD:
            tl.store(to + ONE_REF, (rz * to_1).to(tl.float64))
            tl.store(to + ONE_SUM, tl.sum(s1 * tl.exp(moved_z * to_1), 0).to(tl.float64))
        # Those of the target, where it is here. What there is not is not read: that may be all of a row.
        mine = target >= 0
        at = tl.maximum(target, 0)
        if TARGET or HARD != NO_HARD:
            z_t = logits(student, at, mine, Z_CAPPED, Z_UNIT, R)
            tl.store(to + Z_TARGET, z_t.to(tl.float64), mask=mine)
        if TARGET:
            u_t = logits(teacher, at, mine, V_CAPPED, V_UNIT, R)
            tl.store(to + V_TARGET, u_t.to(tl.float64), mask=mine)


@triton.jit(
    do_not_specialize=[
        "rows", "n1", "n2", "classes", "ignore_index",
        "z_stride0", "z_stride1", "z_stride2", "z_column", "v_stride0", "v_stride1", "v_stride2", "v_column",
    ]
)  # fmt: skip
def shard_terms_kernel(
    z_ptr, v_ptr, numbers_ptr, state_ptr, labels_ptr, mask_ptr,  # the same, state [4, N]
    rows, n1, n2, classes, ignore_index,
    z_stride0, z_stride1, z_stride2, z_column, v_stride0, v_stride1, v_stride2, v_column,
    cz: "fp64", cv: "fp64", z_cap: "fp64", z_slope: "fp64", v_cap: "fp64", v_slope: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64",
    PHI: tl.constexpr, G: tl.constexpr, PARAMS: tl.constexpr, GUARD: tl.constexpr,
    LABELS: tl.constexpr, MASK: tl.constexpr,
    Z_CAPPED: tl.constexpr, V_CAPPED: tl.constexpr, Z_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One row: sums of phi and g of its own classes. The state is what `row_kernel` has of normalisers."""
    n = tl.program_id(0).to(tl.int64)
    N = rows.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    classes = classes * ALIGN
    if is_counted(n, labels_ptr, mask_ptr, ignore_index, LABELS, MASK):
        by_z = tl.full((), cz, R)
        by_v = tl.full((), cv, R)
        a0 = tl.full((), p0, R)
        a1 = tl.full((), p1, R)
        a2 = tl.full((), p2, R)
        a3 = tl.full((), p3, R)
        z_row = z_ptr + blocks.row_start(n, n1, n2, z_stride0, z_stride1, z_stride2, ALIGN)
        v_row = v_ptr + blocks.row_start(n, n1, n2, v_stride0, v_stride1, v_stride2, ALIGN)
        student = (z_row, z_column, tl.full((), z_cap, R), tl.full((), z_slope, R))
        teacher = (v_row, v_column, tl.full((), v_cap, R), tl.full((), v_slope, R))
        shift_z = tl.load(state_ptr + n)
        lse_z = tl.load(state_ptr + N + n)
        shift_v = tl.load(state_ptr + 2 * N + n)
        lse_v = tl.load(state_ptr + 3 * N + n)
        phis = tl.zeros([BLOCK // GROUP], R)
        gs = phis
        for start in range(0, classes, BLOCK):
            columns = start + lane
            inside = columns < classes
            lq = logits(student, columns, inside, Z_CAPPED, Z_UNIT, R) * by_z - shift_z - lse_z
            lp = logits(teacher, columns, inside, V_CAPPED, V_UNIT, R) * by_v - shift_v - lse_v
            phi = blocks.apply(PHI, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
            g = blocks.apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
            phis += blocks.group_sums(phi, GROUP, AXIS)
            gs += blocks.group_sums(g, GROUP, AXIS)
        to = numbers_ptr + n * NUMBERS
        tl.store(to + PHI_SUM, tl.sum(phis, 0).to(tl.float64))
        tl.store(to + SUM_G, tl.sum(gs, 0).to(tl.float64))
