"""The Triton kernels: one generic row kernel for NVIDIA, AMD and Intel GPUs.

A program takes a row. Phase 1 reads both sides for their normalisers and, where the divergence has a closed
form, its cross sum; phase 2, for the others, sums phi and g; phase 3 writes the gradient. Of a vocabulary
that fits in one block the program keeps both rows and reads them once; of a larger one each phase reads them
again, from the second-level cache as long as the rows in flight fit in it.

Divergences of logits that no softmax normalises have no phase 2: phase 3 sums phi beside the gradient. An
ensemble of teachers has a phase 0, which finds the normaliser of each; what is then read as the teacher's
logits are the logs of their mean, made block by block and not stored.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import triton
import triton.language as tl

from ..expressions import g_binary_cross_entropy, g_binary_kl, phi_binary_cross_entropy, phi_binary_kl
from ..spec import STATE_ROWS
from . import triton_blocks as blocks
from . import triton_noise, triton_teachers
from .triton_blocks import on_device

NEG_INF, INF = blocks.NEG_INF, blocks.INF
# What a launch makes: the loss; the loss and the gradient; the loss and the row's state; from the state, the
# gradient times the upstream one.
LOSS, GRADIENT, STATE, SCALED_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# What lq is: log of a softmax, logits over T less their mean, logits over T.
SOFTMAX, CENTRED, RAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# No hard term; one at T = 1 that shares the soft term's softmax; one with its own.
NO_HARD, SHARED_HARD, OWN_HARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What a mean divides by: a number, a tensor, the count of the rows.
NUMBER, TENSOR, COUNT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STATE_NUMBERS = tl.constexpr(STATE_ROWS)  # before those of each teacher of a mixture
FIGURES = tl.constexpr(8)  # a row's loss, soft term, hard term, two entropies, agreement, accuracy, labelled
NO_NOISE = triton_noise.NO_NOISE
STUDENT = triton_noise.STUDENT

PHI_OF_MARGINS, G_OF_MARGINS = on_device(phi_binary_kl), on_device(g_binary_kl)
PHI_OF_LABELS, G_OF_LABELS = on_device(phi_binary_cross_entropy), on_device(g_binary_cross_entropy)


@triton.jit
def denominator(counted_ptr, given_ptr, number, ITEMS: tl.constexpr, COUNTED: tl.constexpr):
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


@triton.jit
def factor_of_row(
    weight, counted_ptr, given_ptr, number, upstream_ptr, at,
    MEAN: tl.constexpr, ITEMS: tl.constexpr, COUNTED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What a row's gradient is multiplied by beside the weights of the terms, in float64."""
    if MEAN:
        weight /= denominator(counted_ptr, given_ptr, number, ITEMS, COUNTED)
    if SCALED:
        weight *= tl.load(upstream_ptr + at).to(tl.float64)
    return weight


@triton.jit
def write_figures(
    rows_ptr, n, N, weight, soft, hard, t_factor, soft_weight, hard_weight,
    entropy_z, entropy_v, agrees, correct, labelled, R: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """A row's loss, and the figures that the stats are made of."""
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
        tl.store(rows_ptr + 3 * N + n, entropy_z)
        tl.store(rows_ptr + 4 * N + n, entropy_v)
        tl.store(rows_ptr + 5 * N + n, agrees)
        tl.store(rows_ptr + 6 * N + n, correct)
        tl.store(rows_ptr + 7 * N + n, labelled.to(R))


@triton.jit
def write_nothing(
    gradient_ptr, rows_ptr, state_ptr, n, N, width,
    MODE: tl.constexpr, STATS: tl.constexpr, NUMBERS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros of a row that doesn't count. It may hold anything, NaN too: it isn't read."""
    if MODE != SCALED_GRADIENT:
        tl.store(rows_ptr + n, 0.0)
        if STATS:
            for k in tl.static_range(1, FIGURES):
                tl.store(rows_ptr + k * N + n, 0.0)
    if MODE == STATE:
        for k in tl.static_range(NUMBERS):
            tl.store(state_ptr + k * N + n, 0.0)
    if MODE == GRADIENT or MODE == SCALED_GRADIENT:
        lane = tl.arange(0, BLOCK)
        nothing = tl.zeros([BLOCK], R).to(gradient_ptr.dtype.element_ty)
        for start in range(0, width, BLOCK):
            tl.store(gradient_ptr + n * width + start + lane, nothing, mask=start + lane < width)


# Integers that are compiled in would mean a build for each batch; what is known of them is in ALIGN and UNIT.
# Those in a tuple are compiled in all the same where they are 1 or a multiple of 16, hence 2 x + 3.
@triton.jit(
    do_not_specialize=[
        "rows", "n1", "n2", "classes", "width", "ignore_index", "upstream_stride", "shares_stride",
        "z_stride0", "z_stride1", "z_stride2", "z_column", "v_stride0", "v_stride1", "v_stride2", "v_column",
        "y_stride0", "y_stride1", "y_stride2", "y_column", "z_offset", "v_offset",
    ]
)  # fmt: skip
def row_kernel(
    z_ptr, v_ptr, gradient_ptr, rows_ptr, state_ptr,  # [..., V] twice, [N, width], [1 or FIGURES, N], [.., N]
    labels_ptr, mask_ptr, weights_ptr, counted_ptr, given_ptr, upstream_ptr,  # [N] thrice, 1 twice, [N] or 1
    z_seed_ptr, v_seed_ptr, shares_ptr, more_ptrs,  # 1 twice, [M] or [N, M], [..., V] for teachers 1 to M - 1
    rows, n1, n2, classes, width, ignore_index,  # N = n0 n1 n2
    z_stride0, z_stride1, z_stride2, z_column, v_stride0, v_stride1, v_stride2, v_column,
    y_stride0, y_stride1, y_stride2, y_column, upstream_stride, shares_stride,  # y: labels of each class
    more_strides, more_numbers,  # of each teacher more 4, and by, cap and slope as three sums of three
    z_offset, v_offset,
    cz: "fp64", cv: "fp64", c1: "fp64", T: "fp64",  # logits to exponents: both at T, the student at T = 1
    z_cap: "fp64", z_slope: "fp64", v_cap: "fp64", v_slope: "fp64", z_scale: "fp64",
    z_sigma: "fp64", z_probability: "fp64", v_sigma: "fp64", v_probability: "fp64",
    t_factor: "fp64", soft_weight: "fp64", hard_weight: "fp64", soft_gain: "fp64", hard_gain: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", number: "fp64",
    PHI: tl.constexpr, G: tl.constexpr, PARAMS: tl.constexpr, GUARD: tl.constexpr,
    NORMALISER: tl.constexpr, TARGET: tl.constexpr, BINARY: tl.constexpr,
    CLOSED: tl.constexpr, TEACHER_WEIGHS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SUM_G: tl.constexpr, SUM_G_PER_D: tl.constexpr, TIMES: tl.constexpr,
    MODE: tl.constexpr, SOFT: tl.constexpr, WEIGHED: tl.constexpr, HARD: tl.constexpr, STATS: tl.constexpr,
    Z_NORMS: tl.constexpr, V_NORMS: tl.constexpr,
    MEAN: tl.constexpr, ITEMS: tl.constexpr, COUNTED: tl.constexpr,
    LABELS: tl.constexpr, MASK: tl.constexpr, WEIGHTS: tl.constexpr,
    Z_CAPPED: tl.constexpr, V_CAPPED: tl.constexpr, Z_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr, M: tl.constexpr, MIXED: tl.constexpr,
    Z_NOISE: tl.constexpr, Z_PER_ROW: tl.constexpr, V_NOISE: tl.constexpr, V_PER_ROW: tl.constexpr,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, SHARDED: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One row: its loss and figures, its gradient.

    Classes, width and the strides of rows come divided by ALIGN, from which the compiler sees how wide an
    access may be. UNIT says that columns lie side by side, PADDED that width > classes, GUARD that
    expressions need help where neither side can produce a class; with WHOLE, width <= BLOCK. NORMS says which
    sides' softmax something needs, WEIGHED that the soft term is in the loss and not in the stats alone. With
    SHARDED the row has more classes elsewhere, whose part is in the state that the gradient is made from.
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
        write_nothing(
            gradient_ptr,
            rows_ptr,
            state_ptr,
            n,
            N,
            width,
            MODE,
            STATS,
            STATE_NUMBERS + 2 * M * MIXED,
            R,
            BLOCK,
        )
    else:
        zero = tl.full((), 0.0, R)
        # Doubles at the interface, so that a float64 call loses nothing.
        by_z = tl.full((), cz, R)
        by_1 = tl.full((), c1, R)
        to_1 = tl.full((), T, R)
        cap_z = tl.full((), z_cap, R)
        slope_z = tl.full((), z_slope, R)
        a0 = tl.full((), p0, R)
        a1 = tl.full((), p1, R)
        a2 = tl.full((), p2, R)
        a3 = tl.full((), p3, R)

        # The student's row, and its noise.
        z_row = z_ptr + blocks.row_start(n, n1, n2, z_stride0, z_stride1, z_stride2, ALIGN)
        z_number = n + z_offset
        z_seed = 0
        z_amount = zero
        z_sample = zero
        if Z_NOISE != NO_NOISE:
            z_seed = tl.load(z_seed_ptr)
            z_amount = triton_noise.amount(z_sigma, z_probability, z_seed, z_number, STUDENT, R)
            if Z_PER_ROW:
                z_sample = triton_noise.sample_of_row(z_amount, z_seed, z_number, STUDENT, R)

        # The teachers' rows and numbers, of each; what there is not stands for itself and isn't looked at.
        v_rows = (v_ptr + blocks.row_start(n, n1, n2, v_stride0, v_stride1, v_stride2, ALIGN),)
        v_columns = (v_column,)
        by_v = (tl.full((), cv, R),)
        cap_v = (tl.full((), v_cap, R),)
        slope_v = (tl.full((), v_slope, R),)
        for m in tl.static_range(M - 1):
            at = blocks.row_start(
                n, n1, n2, (more_strides[4 * m] - 3) >> 1, (more_strides[4 * m + 1] - 3) >> 1,
                (more_strides[4 * m + 2] - 3) >> 1, ALIGN,
            )  # fmt: skip
            v_rows = v_rows + (more_ptrs[m] + at,)
            v_columns = v_columns + ((more_strides[4 * m + 3] - 3) >> 1,)
            by_v = by_v + (triton_teachers.double(more_numbers, 9 * m).to(R),)
            cap_v = cap_v + (triton_teachers.double(more_numbers, 9 * m + 3).to(R),)
            slope_v = slope_v + (triton_teachers.double(more_numbers, 9 * m + 6).to(R),)
        v_number = n + v_offset
        v_seed = 0
        v_amounts = by_v
        v_samples = by_v
        if V_NOISE != NO_NOISE and SOFT:
            v_seed = tl.load(v_seed_ptr)
            for m in tl.static_range(M):
                amount = triton_noise.amount(v_sigma, v_probability, v_seed, v_number, 2 * m, R)
                of_row = amount
                if V_PER_ROW:
                    of_row = triton_noise.sample_of_row(amount, v_seed, v_number, 2 * m, R)
                v_amounts = (amount,) if m == 0 else v_amounts + (amount,)
                v_samples = (of_row,) if m == 0 else v_samples + (of_row,)
        shares = by_v
        if MIXED and SOFT:
            for m in tl.static_range(M):
                share = tl.load(shares_ptr + n * shares_stride + m).to(R)
                shares = (share,) if m == 0 else shares + (share,)

        # A loop of one round has no other: then what each phase works on are the same registers.
        end = classes
        out_end = width
        z_kept = 0
        v_kept = v_rows
        v_mean = 0
        if WHOLE:
            end = BLOCK
            out_end = BLOCK
            at = blocks.address(z_row, lane, z_column, Z_UNIT)
            z_kept = tl.load(at, mask=lane < classes, other=NEG_INF)
            if SOFT:
                for m in tl.static_range(M):
                    wanted = lane < (triton_teachers.span(classes, shares[m]) if MIXED else classes)
                    at = blocks.address(v_rows[m], lane, v_columns[m], (V_UNIT >> m) & 1)
                    v = tl.load(at, mask=wanted, other=NEG_INF)
                    v_kept = (v,) if m == 0 else v_kept + (v,)

        refs = by_v
        logs = by_v
        if MIXED and SOFT and not BINARY:
            for m in tl.static_range(M):
                at = (STATE_NUMBERS + 2 * m) * N + n
                if MODE == SCALED_GRADIENT:
                    ref = tl.load(state_ptr + at)
                    log = tl.load(state_ptr + at + N)
                else:
                    ref, log = triton_teachers.normaliser(
                        v_rows[m], v_kept[m], classes, end, lane, v_columns[m], by_v[m], cap_v[m], slope_v[m],
                        v_amounts[m], v_samples[m], shares[m], v_seed, v_number, 2 * m,
                        (V_UNIT >> m) & 1, (V_CAPPED >> m) & 1, V_NOISE, V_PER_ROW, WHOLE,
                        R, BLOCK, GROUP, AXIS,
                    )  # fmt: skip
                if MODE == STATE:
                    tl.store(state_ptr + at, ref)
                    tl.store(state_ptr + at + N, log)
                refs = (ref,) if m == 0 else refs + (ref,)
                logs = (log,) if m == 0 else logs + (log,)
        teachers = (v_rows, v_columns, by_v, cap_v, slope_v, v_amounts, v_samples, refs, logs, shares)
        DONE: tl.constexpr = MIXED and WHOLE
        if DONE and SOFT:
            v_mean = triton_teachers.logits(
                teachers, v_kept, v_mean, lane, lane < classes, 0, classes, v_seed, v_number,
                M, MIXED, False, BINARY, False, V_UNIT, V_CAPPED, V_NOISE, V_PER_ROW,
                WHOLE, False, R, BLOCK,
            )  # fmt: skip

        # lq = y − shift_z − lse_z, two steps, since one constant for both would lose the logarithm's digits
        # beside a large reference. lp likewise. At T = 1, log q = z − ref_1 − lse_1.
        shift_z = zero
        lse_z = zero
        shift_v = zero
        lse_v = zero
        ref_1 = zero
        lse_1 = zero
        soft = zero
        hard = zero
        sum_g = zero
        gamma = zero
        entropy_z = zero
        entropy_v = zero
        agrees = zero
        correct = zero
        # A label out of range makes its row NaN: looking at it on the host would wait for the device.
        valid = labelled & (label >= 0) & (label < classes)
        poison = zero
        if not SHARDED:  # there it is another process's
            poison = tl.where(labelled & (valid == 0), float("nan"), 0.0)
        # As columns are, since a number of 64 bits would take twice the registers and comparisons.
        target = tl.where(valid, label, -1).to(tl.int32)
        weight = tl.full((), 1.0, tl.float64)
        if WEIGHTS:
            weight = tl.load(weights_ptr + n).to(tl.float64)

        if MODE == SCALED_GRADIENT:
            shift_z = tl.load(state_ptr + n)
            lse_z = tl.load(state_ptr + N + n)
            shift_v = tl.load(state_ptr + 2 * N + n)
            lse_v = tl.load(state_ptr + 3 * N + n)
            ref_1 = tl.load(state_ptr + 4 * N + n)
            lse_1 = tl.load(state_ptr + 5 * N + n)
            sum_g = tl.load(state_ptr + 6 * N + n)
            gamma = tl.load(state_ptr + 7 * N + n)
        else:
            # Phase 1, for groups of columns, so that no thread waits for another before the end: maxima m and
            # sums s relative to them, of z and v over T, and of z at T = 1, whose reference is that of z over
            # T times T; the cross sum. Around a target, of all other classes.
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
            # For means: the sums of both sides and the number of classes where both are finite.
            total_z = groups
            total_v = groups
            finite_classes = groups
            LAST: tl.constexpr = MODE == LOSS and CLOSED and NORMALISER == SOFTMAX
            CENTRES: tl.constexpr = SOFT and NORMALISER == CENTRED
            if Z_NORMS or CENTRES:
                for start in range(0, end, BLOCK):
                    columns = start + lane
                    inside = columns < classes
                    z = blocks.read(z_row, z_kept, columns, inside, z_column, R, Z_UNIT, WHOLE, LAST)
                    eps = triton_noise.sample(
                        z_amount, z_sample, z_seed, z_number, start, STUDENT, Z_NOISE, Z_PER_ROW, R, BLOCK
                    )
                    z = blocks.processed(z, inside, cap_z, slope_z, eps, Z_CAPPED, Z_NOISE)
                    if TARGET:
                        z = tl.where(columns == target, NEG_INF, z)
                    z = blocks.grouped(z, GROUP, AXIS)
                    y = z * by_z
                    if V_NORMS or CENTRES:
                        u = triton_teachers.logits(
                            teachers, v_kept, v_mean, columns, inside, start, classes, v_seed, v_number,
                            M, MIXED, DONE, BINARY, False, V_UNIT, V_CAPPED, V_NOISE, V_PER_ROW,
                            WHOLE, LAST, R, BLOCK,
                        )  # fmt: skip
                        if TARGET:
                            u = tl.where(columns == target, NEG_INF, u)
                        u = blocks.grouped(u, GROUP, AXIS)
                    if CENTRES:
                        finite = (tl.abs(y) < INF) & (tl.abs(u) < INF)
                        total_z += tl.sum(tl.where(finite, y, 0.0), AXIS)
                        total_v += tl.sum(tl.where(finite, u, 0.0), AXIS)
                        finite_classes += tl.sum(finite.to(R), AXIS)
                    if Z_NORMS:
                        if STATS:
                            best_z = blocks.first_largest(
                                y, mz, blocks.grouped(columns, GROUP, AXIS), classes, best_z, AXIS
                            )
                        top_z = tl.maximum(mz, tl.max(y, AXIS), propagate_nan=tl.PropagateNan.ALL)
                        ref_z = blocks.reference_of(top_z)
                        y -= blocks.spread(ref_z, AXIS)
                        ey = tl.exp(y)
                        moved_z = blocks.shift_of(mz, ref_z)
                        keep_z = tl.exp(moved_z)
                    if V_NORMS:
                        if STATS:
                            best_v = blocks.first_largest(
                                u, mv, blocks.grouped(columns, GROUP, AXIS), classes, best_v, AXIS
                            )
                        top_v = tl.maximum(mv, tl.max(u, AXIS), propagate_nan=tl.PropagateNan.ALL)
                        ref_v = blocks.reference_of(top_v)
                        u -= blocks.spread(ref_v, AXIS)
                        eu = tl.exp(u)
                        moved_v = blocks.shift_of(mv, ref_v)
                        keep_v = tl.exp(moved_v)
                        if CLOSED:
                            # The sum so far, relative to the new references, and the block's.
                            if TEACHER_WEIGHS:
                                cross = blocks.carried(keep_v, cross + sv * (A * moved_v + B * moved_z))
                                cross += blocks.cross_sum(eu, u, y, A, B, AXIS)
                            else:
                                cross = blocks.carried(keep_z, cross + sz * (A * moved_z + B * moved_v))
                                cross += blocks.cross_sum(ey, y, u, A, B, AXIS)
                        if STATS:
                            xv = blocks.carried(keep_v, xv + sv * moved_v)
                            xv += blocks.cross_sum(eu, u, u, 0.0, 1.0, AXIS)
                        sv = sv * keep_v + tl.sum(eu, AXIS)
                        mv = top_v
                    if Z_NORMS:
                        if STATS:
                            xz = blocks.carried(keep_z, xz + sz * moved_z)
                            xz += blocks.cross_sum(ey, y, y, 0.0, 1.0, AXIS)
                        sz = sz * keep_z + tl.sum(ey, AXIS)
                        mz = top_z
                        if HARD == OWN_HARD:
                            at_1 = z * by_1 - blocks.spread(ref_z * to_1, AXIS)
                            s1 = s1 * tl.exp(moved_z * to_1) + tl.sum(tl.exp(at_1), AXIS)

            # The groups' sums, relative to the row's maxima.
            top_z = tl.max(mz, 0)
            rz = blocks.reference_of(top_z)
            moved_z = blocks.shift_of(mz, rz)
            keep_z = tl.exp(moved_z)
            top_v = tl.max(mv, 0)
            rv = blocks.reference_of(top_v)
            moved_v = blocks.shift_of(mv, rv)
            keep_v = tl.exp(moved_v)
            if CLOSED:
                if TEACHER_WEIGHS:
                    cross = tl.sum(blocks.carried(keep_v, cross + sv * (A * moved_v + B * moved_z)), 0)
                else:
                    cross = tl.sum(blocks.carried(keep_z, cross + sz * (A * moved_z + B * moved_v)), 0)
            if STATS:
                xz = tl.sum(blocks.carried(keep_z, xz + sz * moved_z), 0)
                xv = tl.sum(blocks.carried(keep_v, xv + sv * moved_v), 0)
                best_z = tl.min(tl.where(mz == top_z, best_z, classes), 0)
                best_v = tl.min(tl.where(mv == top_v, best_v, classes), 0)
            sz = tl.sum(sz * keep_z, 0)
            sv = tl.sum(sv * keep_v, 0)
            if HARD == OWN_HARD:
                s1 = tl.sum(s1 * tl.exp(moved_z * to_1), 0)
            else:
                s1 = sz
            log_z = tl.log(sz)
            log_v = tl.log(sv)
            ref_1 = rz * to_1

            if TARGET or (HARD != NO_HARD and not BINARY):
                at = tl.maximum(target, 0)
                z_t = blocks.read(z_row, z_row, at, True, z_column, R, Z_UNIT, False, False)
                eps_t = triton_noise.sample_at(
                    z_amount, z_sample, z_seed, z_number, at, STUDENT, Z_NOISE, Z_PER_ROW, R
                )
                z_t = blocks.processed(z_t, True, cap_z, slope_z, eps_t, Z_CAPPED, Z_NOISE)
            if TARGET:
                u_t = triton_teachers.logits(
                    teachers, v_rows, v_mean, at, True, 0, classes, v_seed, v_number,
                    M, MIXED, False, BINARY, True, V_UNIT, V_CAPPED, V_NOISE, V_PER_ROW,
                    False, False, R, BLOCK,
                )  # fmt: skip
                y_t = z_t * by_z
                margin_z = y_t - rz - log_z
                margin_v = u_t - rv - log_v
                # A term of weight 0 is absent, also where it is infinite.
                around = tl.where(a0 == 0, 0.0, a0 * PHI_OF_MARGINS(margin_z, margin_v))
                # A counted row needs a label.
                gamma = a0 * G_OF_MARGINS(margin_z, margin_v) + tl.where(valid, 0.0, float("nan"))
            if HARD != NO_HARD and not BINARY:
                x_t = z_t * by_1
                if TARGET:
                    ref_1, s1, _ = blocks.with_one(tl.where(s1 == 0, NEG_INF, ref_1), s1, zero, x_t)
                lse_1 = tl.log(s1)
                hard = tl.where(labelled, lse_1 - (x_t - ref_1) + poison, 0.0)
            if STATS and Z_NORMS:
                if TARGET:
                    best_z = blocks.first_with(best_z, top_z, target, y_t)
                    best_v = blocks.first_with(best_v, top_v, target, u_t)
                    _, all_z, xz = blocks.with_one(top_z, sz, xz, y_t)
                    _, all_v, xv = blocks.with_one(top_v, sv, xv, u_t)
                    entropy_z = tl.log(all_z) - xz / all_z
                    entropy_v = tl.log(all_v) - xv / all_v
                else:
                    entropy_z = log_z - xz / sz
                    entropy_v = log_v - xv / sv
                agrees = (best_z == best_v).to(R)
                correct = (valid & (best_z == target)).to(R)

            if SOFT and NORMALISER == CENTRED:
                divisor = tl.maximum(tl.sum(finite_classes, 0), 1.0)
                shift_z = tl.sum(total_z, 0) / divisor
                shift_v = tl.sum(total_v, 0) / divisor
            elif NORMALISER == SOFTMAX:
                shift_z = rz
                shift_v = rv
                lse_z = log_z
                lse_v = log_v
            if TARGET:
                # Nobody else on a side: the student's logs stay -inf, and where the teacher has nobody, +inf
                # says so and makes its logs -inf.
                lse_z = tl.where(sz == 0, 0.0, lse_z)
                lse_v = tl.where(sv == 0, INF, lse_v)

            # Phase 2: D and the sum of g.
            if SOFT and CLOSED:
                if TEACHER_WEIGHS:
                    soft = cross / sv - A * lse_v - B * lse_z
                else:
                    soft = cross / sz - A * lse_z - B * lse_v
                sum_g += SUM_G
                if TIMES == 0:
                    soft = tl.where(a0 == 0, 0.0, soft * a0)
                    sum_g *= a0
                elif TIMES == 1:
                    soft = tl.where(a1 == 0, 0.0, soft * a1)
                    sum_g *= a1
                elif TIMES == 2:
                    soft = tl.where(a2 == 0, 0.0, soft * a2)
                    sum_g *= a2
                elif TIMES == 3:
                    soft = tl.where(a3 == 0, 0.0, soft * a3)
                    sum_g *= a3
                if SUM_G_PER_D != 0:  # 0 times an infinite D isn't 0
                    sum_g += SUM_G_PER_D * soft
            elif SOFT and NORMALISER == SOFTMAX:
                phis = tl.zeros([BLOCK // GROUP], R)
                gs = phis
                for start in range(0, end, BLOCK):
                    columns = start + lane
                    inside = columns < classes
                    z = blocks.read(z_row, z_kept, columns, inside, z_column, R, Z_UNIT, WHOLE, MODE == LOSS)
                    eps = triton_noise.sample(
                        z_amount, z_sample, z_seed, z_number, start, STUDENT, Z_NOISE, Z_PER_ROW, R, BLOCK
                    )
                    z = blocks.processed(z, inside, cap_z, slope_z, eps, Z_CAPPED, Z_NOISE)
                    lq = z * by_z - shift_z - lse_z
                    u = triton_teachers.logits(
                        teachers, v_kept, v_mean, columns, inside, start, classes, v_seed, v_number,
                        M, MIXED, DONE, BINARY, False, V_UNIT, V_CAPPED, V_NOISE, V_PER_ROW,
                        WHOLE, MODE == LOSS, R, BLOCK,
                    )  # fmt: skip
                    lp = u - shift_v - lse_v
                    if TARGET:
                        lq = tl.where(columns == target, NEG_INF, lq)
                        lp = tl.where(columns == target, NEG_INF, lp)
                    phi = blocks.apply(PHI, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                    g = blocks.apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                    phis += blocks.group_sums(phi, GROUP, AXIS)
                    gs += blocks.group_sums(g, GROUP, AXIS)
                soft = tl.sum(phis, 0)
                sum_g = tl.sum(gs, 0)
            if TARGET:
                nobody = lse_v == INF
                soft = tl.where(nobody, 0.0, soft) + around + tl.where(valid, 0.0, float("nan"))
                sum_g = tl.where(nobody, 0.0, sum_g) + gamma
            if MODE == STATE:
                tl.store(state_ptr + n, shift_z)
                tl.store(state_ptr + N + n, lse_z)
                tl.store(state_ptr + 2 * N + n, shift_v)
                tl.store(state_ptr + 3 * N + n, lse_v)
                tl.store(state_ptr + 4 * N + n, ref_1)
                tl.store(state_ptr + 5 * N + n, lse_1)
                tl.store(state_ptr + 6 * N + n, sum_g)
                tl.store(state_ptr + 7 * N + n, gamma)
            if NORMALISER == SOFTMAX:
                write_figures(
                    rows_ptr, n, N, weight, soft, hard, t_factor, soft_weight, hard_weight,
                    entropy_z, entropy_v, agrees, correct, labelled, R, STATS,
                )  # fmt: skip

        # Phase 3: the gradient and, where no softmax stands before them, the sums of phi.
        SUMS: tl.constexpr = NORMALISER != SOFTMAX and MODE != SCALED_GRADIENT
        WRITES: tl.constexpr = MODE == GRADIENT or MODE == SCALED_GRADIENT
        if SUMS:
            phis = tl.zeros([BLOCK // GROUP], R)
            # Of labels for each class: cross-entropies, and for the stats entropies and counts of classes.
            hards = phis
            entropies_z = phis
            entropies_v = phis
            agreeing = phis
            right = phis
        if WRITES:
            out = gradient_ptr + n * width
            factor = factor_of_row(
                weight, counted_ptr, given_ptr, number, upstream_ptr, n * upstream_stride,
                MEAN, ITEMS, COUNTED, MODE == SCALED_GRADIENT,
            )  # fmt: skip
            on_soft = (factor * soft_gain).to(R)
            on_hard = (factor * hard_gain).to(R)
            if not BINARY:
                on_hard = tl.where(labelled, on_hard + poison, 0.0).to(R)
        if WRITES or (SUMS and (SOFT or BINARY)):
            y_row = labels_ptr
            if BINARY and HARD != NO_HARD:
                y_row = labels_ptr + blocks.row_start(n, n1, n2, y_stride0, y_stride1, y_stride2, ALIGN)
            for start in range(0, out_end if WRITES else end, BLOCK):
                columns = start + lane
                inside = columns < classes
                raw = blocks.read(z_row, z_kept, columns, inside, z_column, R, Z_UNIT, WHOLE, True)
                eps = triton_noise.sample(
                    z_amount, z_sample, z_seed, z_number, start, STUDENT, Z_NOISE, Z_PER_ROW, R, BLOCK
                )
                z = blocks.processed(raw, inside, cap_z, slope_z, eps, Z_CAPPED, Z_NOISE)
                dz = tl.zeros([BLOCK], R)
                if WEIGHED or (SOFT and SUMS):
                    u = triton_teachers.logits(
                        teachers, v_kept, v_mean, columns, inside, start, classes, v_seed, v_number,
                        M, MIXED, DONE, BINARY, False, V_UNIT, V_CAPPED, V_NOISE, V_PER_ROW,
                        WHOLE, True, R, BLOCK,
                    )  # fmt: skip
                    lq = z * by_z
                    lp = u
                    if NORMALISER != RAW:
                        lq -= shift_z
                        lp -= shift_v
                    if NORMALISER == SOFTMAX:
                        lq -= lse_z
                        lp -= lse_v
                    if TARGET:
                        lq = tl.where(columns == target, NEG_INF, lq)
                        lp = tl.where(columns == target, NEG_INF, lp)
                    if SUMS:
                        phi = blocks.apply(PHI, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                        phis += blocks.group_sums(phi, GROUP, AXIS)
                    if WRITES and WEIGHED:
                        dz = blocks.apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                        if TARGET:
                            dz = tl.where(lse_v == INF, 0.0, dz)
                        if NORMALISER == SOFTMAX:
                            dz -= tl.exp(lq) * sum_g
                        if TARGET:
                            dz = tl.where(columns == target, gamma, dz)
                        dz *= on_soft
                if BINARY and SUMS and STATS:
                    entropies_z += blocks.group_sums(blocks.binary_entropy(lq), GROUP, AXIS)
                    entropies_v += blocks.group_sums(blocks.binary_entropy(lp), GROUP, AXIS)
                    agreeing += blocks.group_sums((inside & ((lq > 0) == (lp > 0))).to(R), GROUP, AXIS)
                if BINARY and HARD != NO_HARD:
                    x = z * by_1
                    y = tl.load(blocks.address(y_row, columns, y_column, Y_UNIT), mask=inside, other=0.0)
                    if SUMS and STATS:
                        right += blocks.group_sums((inside & ((lq > 0) == (y > 0.5))).to(R), GROUP, AXIS)
                    # What is no probability makes its class NaN, and the loss.
                    y = tl.where((y >= 0) & (y <= 1), y.to(R), float("nan"))
                    if SUMS:
                        hards += blocks.group_sums(PHI_OF_LABELS(x, y), GROUP, AXIS)
                    if WRITES:
                        dz += on_hard * G_OF_LABELS(x, y)
                elif HARD != NO_HARD and WRITES:
                    dz += on_hard * (tl.exp(z * by_1 - ref_1 - lse_1) - (columns == target).to(R))
                if WRITES:
                    dz = blocks.through(dz, raw, z, eps, tl.full((), z_scale, R), slope_z, Z_CAPPED, Z_NOISE)
                    if PADDED:  # beyond both softmaxes
                        dz = tl.where(inside, dz, 0.0)
                    tl.store(out + columns, blocks.rounded_to(dz, out), mask=columns < width)
        if SUMS:
            soft = tl.sum(phis, 0)
            if BINARY:
                hard = tl.sum(hards, 0)
                labelled = label == ignore_index if HARD != NO_HARD else labelled
                if STATS:
                    entropy_z = tl.sum(entropies_z, 0)
                    entropy_v = tl.sum(entropies_v, 0)
                    agrees = tl.sum(agreeing, 0) / classes
                    correct = tl.sum(right, 0) / classes
            write_figures(
                rows_ptr, n, N, weight, soft, hard, t_factor, soft_weight, hard_weight,
                entropy_z, entropy_v, agrees, correct, labelled, R, STATS,
            )  # fmt: skip


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
                total /= denominator(counted_ptr, given_ptr, number, ITEMS, COUNTED)
            tl.store(loss_ptr, total.to(to))
    elif STATS:
        counted = N.to(tl.float64)
        if COUNTED:
            counted = tl.load(counted_ptr).to(tl.float64)
        divisor = tl.maximum(counted, 1.0)
        if k <= 2:
            divisor = tl.full((), 1.0, tl.float64)
            if STATS_MEAN:
                divisor = denominator(counted_ptr, given_ptr, number, ITEMS, COUNTED)
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
            tl.store(out_ptr + n * width + at, blocks.rounded_to(x, out_ptr), mask=at < width)
