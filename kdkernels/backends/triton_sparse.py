"""The Triton kernel for stored teachers: of each row k classes and the mass of the rest.

A program takes a row. With S the stored classes, the divergence is a sum over S and one more term, the tail,
so that the teacher's side is k numbers; the student's is read for its normaliser and again for the gradient,
once where the row fits in one block:

    phase 0    the student's logits at the ids: maximum and sums over S
    phase 1    the row but for S: maximum and sums over the tail, never as 1 − Q
    phase 2    D and the sum of g, of k + 1 terms
    phase 3    the row's gradient as if every class were of the tail, then that of S over it

What a stored class gets is computed before the first store, since the gradient may lie where the logits do.
"""

# No `from __future__ import annotations`: Triton reads the kernels' annotations.
import triton
import triton.language as tl

from . import triton_blocks as blocks
from . import triton_kernels as rows_of
from . import triton_noise

NEG_INF, INF = blocks.NEG_INF, blocks.INF
LOSS, GRADIENT, STATE, SCALED_GRADIENT = (
    rows_of.LOSS,
    rows_of.GRADIENT,
    rows_of.STATE,
    rows_of.SCALED_GRADIENT,
)
NO_HARD, SHARED_HARD, OWN_HARD = rows_of.NO_HARD, rows_of.SHARED_HARD, rows_of.OWN_HARD
STATE_NUMBERS, NO_NOISE, STUDENT = rows_of.STATE_NUMBERS, rows_of.NO_NOISE, rows_of.STUDENT
NO_ID = tl.constexpr(-1)
# Ids that are looked at together where those of a block of classes are found: loads that wait for each other
# would take longer than what is done with them.
AT_ONCE = tl.constexpr(4)


@triton.jit
def block_of(
    student, kept, start, lane, classes,
    CAPPED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    LAST: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the student's logits: as they are, as terms use them, and their noise."""
    row, stride, cap, slope, amount, of_row, seed, number = student
    inside = start + lane < classes
    raw = blocks.read(row, kept, start + lane, inside, stride, R, UNIT, WHOLE, LAST)
    eps = triton_noise.sample(amount, of_row, seed, number, start, STUDENT, NOISE, PER_ROW, R, BLOCK)
    return raw, blocks.processed(raw, inside, cap, slope, eps, CAPPED, NOISE), eps


@triton.jit
def logits_at(
    student, columns, there,
    CAPPED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The same of single columns, -inf where there is none."""
    row, stride, cap, slope, amount, of_row, seed, number = student
    raw = blocks.read(row, row, columns, there, stride, R, UNIT, False, False)
    at = tl.maximum(columns, 0)
    eps = triton_noise.sample_at(amount, of_row, seed, number, at, STUDENT, NOISE, PER_ROW, R)
    return raw, tl.where(there, blocks.processed(raw, there, cap, slope, eps, CAPPED, NOISE), NEG_INF), eps


@triton.jit
def stored_block(
    student, held, ids_row, log_p_row, first, stored,
    CAPPED: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr, UNIT: tl.constexpr, HELD: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Stored classes from number `first` on, held or read: ids, log p, and the student's logits as above."""
    if HELD:
        return held
    place = first + tl.arange(0, K)
    ids = tl.load(ids_row + place, mask=place < stored, other=NO_ID).to(tl.int32)
    lp = tl.load(log_p_row + place, mask=place < stored, other=NEG_INF)
    raw, z, eps = logits_at(student, ids, ids != NO_ID, CAPPED, NOISE, PER_ROW, UNIT, R)
    return ids, lp, raw, z, eps


@triton.jit
def marks(
    ids_row, at, stored, start, BLOCK: tl.constexpr, MEMBERS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Which of the BLOCK classes from `start` on are stored, a bit for each member of a group of them.

    Ids rise, so that those of a block follow those of the block before; `at` is where they begin, and what
    comes back beside the bits where the next block's do.
    """
    GROUPS: tl.constexpr = BLOCK // MEMBERS
    group = tl.arange(0, GROUPS)
    bits = tl.zeros([GROUPS], tl.int32)
    more = at < stored
    while more:
        for k in tl.static_range(AT_ONCE):
            id = tl.load(ids_row + at + k, mask=at + k < stored, other=2**31 - 1).to(tl.int32)
            if k == 0:
                mine = id < start + BLOCK
                passed = mine.to(tl.int32)
            else:
                mine = mine & (id < start + BLOCK)
                passed += mine.to(tl.int32)
            # What is of other blocks, or no id, is too large.
            local = (id - start).to(tl.uint32)
            if AXIS == 1:
                of = local // MEMBERS
                member = local % MEMBERS
            else:
                of = local % GROUPS
                member = (local // GROUPS) & 31
            bit = tl.where(local < BLOCK, 1 << member.to(tl.int32), 0)
            bits |= tl.where(group == of.to(tl.int32), bit, 0)
        at += passed
        more = mine
    return bits, at


@triton.jit
def without(z, bits, MEMBERS: tl.constexpr, AXIS: tl.constexpr):
    """A block of logits with -inf where a bit is set."""
    member = 1 << tl.expand_dims(tl.arange(0, MEMBERS), 1 - AXIS)
    grouped = blocks.grouped(z, MEMBERS, AXIS)
    grouped = tl.where((blocks.spread(bits, AXIS) & member) != 0, NEG_INF, grouped)
    return tl.reshape(grouped, z.shape)


@triton.jit
def no_sums(GROUPS: tl.constexpr, R: tl.constexpr):
    """The sums of no class: see `added`."""
    zeros = tl.zeros([GROUPS], R)
    return zeros + NEG_INF, zeros, zeros, zeros, tl.zeros([GROUPS], tl.int32)


@triton.jit
def added(sums, z, columns, last, by, by_1, to_1, AXIS: tl.constexpr, OWN: tl.constexpr, STATS: tl.constexpr):
    """With more classes, group by group: the maximum of y, sums of e^y, e^y y, e^z, and the first largest.

    They are relative to the maximum, and that of e^z to the maximum times T.
    """
    m, s, x, s1, best = sums
    y = z * by
    if STATS:
        best = blocks.first_largest(y, m, columns, last, best, AXIS)
    top = tl.maximum(m, tl.max(y, AXIS), propagate_nan=tl.PropagateNan.ALL)
    ref = blocks.reference_of(top)
    y -= blocks.spread(ref, AXIS)
    e = tl.exp(y)
    moved = blocks.shift_of(m, ref)
    keep = tl.exp(moved)
    if STATS:
        x = blocks.carried(keep, x + s * moved) + blocks.cross_sum(e, y, y, 0.0, 1.0, AXIS)
    s = s * keep + tl.sum(e, AXIS)
    if OWN:
        s1 = s1 * tl.exp(moved * to_1) + tl.sum(tl.exp(z * by_1 - blocks.spread(ref * to_1, AXIS)), AXIS)
    return top, s, x, s1, best


@triton.jit
def of_row(sums, last, to_1, OWN: tl.constexpr, STATS: tl.constexpr):
    """The same numbers of all groups together."""
    m, s, x, s1, best = sums
    top = tl.max(m, 0)
    moved = blocks.shift_of(m, blocks.reference_of(top))
    keep = tl.exp(moved)
    if STATS:
        x = tl.sum(blocks.carried(keep, x + s * moved), 0)
        best = tl.min(tl.where(m == top, best, last), 0)
    else:
        x = top
        best = 0
    s1 = tl.sum(s1 * tl.exp(moved * to_1), 0) if OWN else top
    return top, tl.sum(s * keep, 0), x, s1, best


@triton.jit
def joined(one, other, to_1, OWN: tl.constexpr, STATS: tl.constexpr):
    """The same numbers of two sets of classes together."""
    top_a, s_a, x_a, s1_a, best_a = one
    top_b, s_b, x_b, s1_b, best_b = other
    top = tl.maximum(top_a, top_b)
    ref = blocks.reference_of(top)
    moved_a = blocks.shift_of(top_a, ref)
    moved_b = blocks.shift_of(top_b, ref)
    keep_a = tl.exp(moved_a)
    keep_b = tl.exp(moved_b)
    x = x_a
    s1 = s1_a
    best = best_a
    if STATS:
        x = blocks.carried(keep_a, x_a + s_a * moved_a) + blocks.carried(keep_b, x_b + s_b * moved_b)
        best = blocks.first_with(best_a, top_a, best_b, top_b)
    if OWN:
        s1 = s1_a * tl.exp(moved_a * to_1) + s1_b * tl.exp(moved_b * to_1)
    return top, s_a * keep_a + s_b * keep_b, x, s1, best


# Integers that are compiled in would mean a build for each batch; what is known of them is in ALIGN and UNIT.
@triton.jit(
    do_not_specialize=[
        "rows", "n1", "n2", "classes", "stored", "ignore_index", "upstream_stride",
        "z_stride0", "z_stride1", "z_stride2", "z_column", "z_offset",
    ]
)  # fmt: skip
def sparse_kernel(
    z_ptr, ids_ptr, log_p_ptr, rest_ptr, extra_ptr,  # [..., V], [N, k] twice, [N] twice
    gradient_ptr, changes_ptr, rows_ptr, state_ptr,  # [N, V], [N, k], [1 or FIGURES, N], [STATE_NUMBERS, N]
    labels_ptr, mask_ptr, weights_ptr, counted_ptr, given_ptr, upstream_ptr,  # [N] thrice, 1 twice, [N] or 1
    z_seed_ptr,  # 1
    rows, n1, n2, classes, stored, ignore_index,  # N = n0 n1 n2
    z_stride0, z_stride1, z_stride2, z_column, upstream_stride, z_offset,
    cz: "fp64", c1: "fp64", T: "fp64",  # logits to exponents: at T, and at T = 1
    z_cap: "fp64", z_slope: "fp64", z_scale: "fp64", z_sigma: "fp64", z_probability: "fp64",
    t_factor: "fp64", soft_weight: "fp64", hard_weight: "fp64", soft_gain: "fp64", hard_gain: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", number: "fp64",
    PHI: tl.constexpr, G: tl.constexpr, PARAMS: tl.constexpr, GUARD: tl.constexpr,
    MODE: tl.constexpr, SOFT: tl.constexpr, WEIGHED: tl.constexpr, HARD: tl.constexpr, STATS: tl.constexpr,
    MEAN: tl.constexpr, ITEMS: tl.constexpr, COUNTED: tl.constexpr,
    LABELS: tl.constexpr, MASK: tl.constexpr, WEIGHTS: tl.constexpr,
    CAPPED: tl.constexpr, UNIT: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, ALIGN: tl.constexpr,
    K: tl.constexpr, HELD: tl.constexpr, MEMBERS: tl.constexpr, MEMBER_AXIS: tl.constexpr,
):  # fmt: skip
    """One row: its loss and figures, its gradient.

    As in `row_kernel`, classes and strides of rows come divided by ALIGN. Stored classes come K at a time,
    and with HELD there are no more, so that they are read once. MEMBERS of a block share the bits that say
    which of them are stored, along MEMBER_AXIS.
    """
    n = tl.program_id(0).to(tl.int64)
    N = rows.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    classes = classes * ALIGN

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
        rows_of.write_nothing(
            gradient_ptr, rows_ptr, state_ptr, n, N, classes, MODE, STATS, STATE_NUMBERS, R, BLOCK
        )
    else:
        # Both sides over all classes, the tail's as one, or over the stored ones alone.
        TAIL: tl.constexpr = SOFT and rest_ptr is not None
        OWN: tl.constexpr = HARD == OWN_HARD
        # Whether anything is about all classes.
        READS: tl.constexpr = TAIL or HARD != NO_HARD or STATS
        zero = tl.full((), 0.0, R)
        by_z = tl.full((), cz, R)
        by_1 = tl.full((), c1, R)
        to_1 = tl.full((), T, R)
        a0 = tl.full((), p0, R)
        a1 = tl.full((), p1, R)
        a2 = tl.full((), p2, R)
        a3 = tl.full((), p3, R)
        number_of_row = n + z_offset
        seed = 0
        amount = zero
        of_all = zero
        if NOISE != NO_NOISE:
            seed = tl.load(z_seed_ptr)
            amount = triton_noise.amount(z_sigma, z_probability, seed, number_of_row, STUDENT, R)
            if PER_ROW:
                of_all = triton_noise.sample_of_row(amount, seed, number_of_row, STUDENT, R)
        z_row = z_ptr + blocks.row_start(n, n1, n2, z_stride0, z_stride1, z_stride2, ALIGN)
        cap = tl.full((), z_cap, R)
        slope = tl.full((), z_slope, R)
        student = (z_row, z_column, cap, slope, amount, of_all, seed, number_of_row)

        # Loops of one round, as in `row_kernel`: then what each phase works on are the same registers.
        ids_row = ids_ptr + n * stored
        log_p_row = log_p_ptr + n * stored
        end = classes
        kept = 0
        if WHOLE:
            end = BLOCK
        if WHOLE and READS:
            kept = tl.load(blocks.address(z_row, lane, z_column, UNIT), mask=lane < classes, other=NEG_INF)
        stored_end = stored
        held = (0,)
        if HELD and SOFT:
            stored_end = K
            held = stored_block(
                student, 0, ids_row, log_p_row, 0, stored, CAPPED, NOISE, PER_ROW, UNIT, False, R, K
            )

        # A label out of range makes its row NaN: looking at it on the host would wait for the device.
        valid = labelled & (label >= 0) & (label < classes)
        poison = tl.where(labelled & (valid == 0), float("nan"), 0.0)
        target = tl.where(valid, label, -1).to(tl.int32)
        weight = tl.full((), 1.0, tl.float64)
        if WEIGHTS:
            weight = tl.load(weights_ptr + n).to(tl.float64)

        # lq of a stored class = y − ref_q − log_q. A class of the tail has the share e^(y − ref_t − log_t) of
        # what the tail gets, +inf saying that nobody else is there. At T = 1, log q = z − ref_1 − lse_1.
        ref_q = zero
        log_q = zero
        ref_t = zero
        log_t = zero
        ref_1 = zero
        lse_1 = zero
        sum_g = zero
        of_tail = zero
        if MODE == SCALED_GRADIENT:
            ref_q = tl.load(state_ptr + n)
            log_q = tl.load(state_ptr + N + n)
            ref_t = tl.load(state_ptr + 2 * N + n)
            log_t = tl.load(state_ptr + 3 * N + n)
            ref_1 = tl.load(state_ptr + 4 * N + n)
            lse_1 = tl.load(state_ptr + 5 * N + n)
            sum_g = tl.load(state_ptr + 6 * N + n)
            of_tail = tl.load(state_ptr + 7 * N + n)
        else:
            soft = zero
            hard = zero
            entropy_z = zero
            entropy_v = zero
            agrees = zero
            correct = zero

            # Phase 0.
            if SOFT:
                sums = no_sums(K, R)
                for first in range(0, stored_end, K):
                    ids, lp, raw, z, eps = stored_block(
                        student, held, ids_row, log_p_row, first, stored,
                        CAPPED, NOISE, PER_ROW, UNIT, HELD, R, K,
                    )  # fmt: skip
                    sums = added(
                        sums, tl.expand_dims(z, 1), tl.expand_dims(ids, 1), classes, by_z, by_1, to_1,
                        1, OWN, STATS,
                    )  # fmt: skip
                of_stored = of_row(sums, classes, to_1, OWN, STATS)

            # Phase 1: over the tail, or where nobody asks for that, over all classes.
            if READS:
                sums = no_sums(BLOCK // GROUP, R)
                next_id = 0
                for start in range(0, end, BLOCK):
                    _, z, _ = block_of(
                        student, kept, start, lane, classes,
                        CAPPED, NOISE, PER_ROW, UNIT, WHOLE, MODE != GRADIENT, R, BLOCK,
                    )  # fmt: skip
                    if TAIL:
                        bits, next_id = marks(ids_row, next_id, stored, start, BLOCK, MEMBERS, MEMBER_AXIS)
                        z = without(z, bits, MEMBERS, MEMBER_AXIS)
                    sums = added(
                        sums, blocks.grouped(z, GROUP, AXIS), blocks.grouped(start + lane, GROUP, AXIS),
                        classes, by_z, by_1, to_1, AXIS, OWN, STATS,
                    )  # fmt: skip
                others = of_row(sums, classes, to_1, OWN, STATS)
                of_all_classes = joined(others, of_stored, to_1, OWN, STATS) if TAIL else others
                top, s, x, s1, best = of_all_classes
                ref_1 = blocks.reference_of(top) * to_1
                lse_1 = tl.log(s1 if OWN else s)
                if STATS:
                    entropy_z = tl.log(s) - x / s
                    correct = (valid & (best == target)).to(R)
            if HARD != NO_HARD:
                z_t = logits_at(student, tl.maximum(target, 0), True, CAPPED, NOISE, PER_ROW, UNIT, R)[1]
                hard = tl.where(labelled, lse_1 - (z_t * by_1 - ref_1) + poison, 0.0)

            # Phase 2.
            if SOFT:
                numbers = of_all_classes if TAIL else of_stored
                ref_q = blocks.reference_of(numbers[0])
                s_q = numbers[1]
                log_q = tl.log(s_q)
                phis = tl.zeros([K], R)
                gs = phis
                entropies = phis
                best_lp = phis + NEG_INF
                best_place = tl.zeros([K], tl.int32)
                for first in range(0, stored_end, K):
                    ids, lp, raw, z, eps = stored_block(
                        student, held, ids_row, log_p_row, first, stored,
                        CAPPED, NOISE, PER_ROW, UNIT, HELD, R, K,
                    )  # fmt: skip
                    lq = tl.where(ids == NO_ID, NEG_INF, z * by_z - ref_q - log_q)
                    # Of a class that the student excludes phi may not say so.
                    unknown = tl.where(lp == lp, 0.0, lp)
                    phis += blocks.apply(PHI, lq, lp, a0, a1, a2, a3, PARAMS, GUARD) + unknown
                    gs += blocks.apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD) + unknown
                    if STATS:
                        p = tl.exp(lp)
                        entropies -= p * tl.where(p == 0, 0.0, lp)
                        best_place = tl.where(lp > best_lp, first + tl.arange(0, K), best_place)
                        best_lp = tl.maximum(best_lp, lp)
                soft = tl.sum(phis, 0)
                sum_g = tl.sum(gs, 0)
                if STATS:
                    entropy_v = tl.sum(entropies, 0)
                    first_best = tl.min(tl.where(best_lp == tl.max(best_lp, 0), best_place, stored - 1), 0)
                    agrees = (best == tl.load(ids_row + first_best).to(tl.int32)).to(R)
                if TAIL:
                    rest = tl.load(rest_ptr + n)
                    ref_t = blocks.reference_of(others[0])
                    s_t = others[1]
                    nobody = s_t == 0
                    log_t = tl.where(nobody, INF, tl.log(s_t))
                    lq_tail = tl.where(nobody, NEG_INF, ref_t - ref_q + tl.log(s_t / s_q))
                    g_tail = blocks.apply(G, lq_tail, rest, a0, a1, a2, a3, PARAMS, GUARD)
                    soft += blocks.apply(PHI, lq_tail, rest, a0, a1, a2, a3, PARAMS, GUARD)
                    sum_g += g_tail
                    # 0 where nobody is there, whatever g of nobody is; NaN stays.
                    of_tail = tl.where(nobody & (sum_g == sum_g), 0.0, g_tail - tl.exp(lq_tail) * sum_g)
                    if STATS:
                        p_tail = tl.exp(rest)
                        entropy_v -= p_tail * tl.where(p_tail == 0, 0.0, rest)
                if extra_ptr is not None:
                    soft += tl.load(extra_ptr + n)
            if MODE == STATE:
                tl.store(state_ptr + n, ref_q)
                tl.store(state_ptr + N + n, log_q)
                tl.store(state_ptr + 2 * N + n, ref_t)
                tl.store(state_ptr + 3 * N + n, log_t)
                tl.store(state_ptr + 4 * N + n, ref_1)
                tl.store(state_ptr + 5 * N + n, lse_1)
                tl.store(state_ptr + 6 * N + n, sum_g)
                tl.store(state_ptr + 7 * N + n, of_tail)
            rows_of.write_figures(
                rows_ptr, n, N, weight, soft, hard, t_factor, soft_weight, hard_weight,
                entropy_z, entropy_v, agrees, correct, labelled, R, STATS,
            )  # fmt: skip

        # Phase 3.
        if MODE == GRADIENT or MODE == SCALED_GRADIENT:
            TAILED: tl.constexpr = TAIL and WEIGHED
            # At T = 1 a class of the tail has the same share of the hard term's softmax.
            SHARES: tl.constexpr = TAILED and HARD == SHARED_HARD
            out = gradient_ptr + n * classes
            scale = tl.full((), z_scale, R)
            factor = rows_of.factor_of_row(
                weight, counted_ptr, given_ptr, number, upstream_ptr, n * upstream_stride,
                MEAN, ITEMS, COUNTED, MODE == SCALED_GRADIENT,
            )  # fmt: skip
            on_soft = (factor * soft_gain).to(R)
            on_hard = tl.where(labelled, (factor * hard_gain).to(R) + poison, 0.0).to(R)
            on_tail = on_soft * of_tail
            if SHARES:
                on_tail += on_hard * tl.where(log_t == INF, 0.0, tl.exp(ref_t - ref_q + (log_t - log_q)))

            if WEIGHED:
                change = tl.zeros([K], R)
                for first in range(0, stored_end, K):
                    ids, lp, raw, z, eps = stored_block(
                        student, held, ids_row, log_p_row, first, stored,
                        CAPPED, NOISE, PER_ROW, UNIT, HELD, R, K,
                    )  # fmt: skip
                    lq = tl.where(ids == NO_ID, NEG_INF, z * by_z - ref_q - log_q)
                    change = blocks.apply(G, lq, lp, a0, a1, a2, a3, PARAMS, GUARD)
                    change = (change - tl.exp(lq) * sum_g) * on_soft
                    if HARD != NO_HARD:
                        change += on_hard * (tl.exp(z * by_1 - ref_1 - lse_1) - (ids == target).to(R))
                    change = blocks.through(change, raw, z, eps, scale, slope, CAPPED, NOISE)
                    if not HELD:
                        place = first + tl.arange(0, K)
                        at = changes_ptr + n * stored + place
                        tl.store(at, blocks.rounded_to(change, changes_ptr), mask=place < stored)
                # The ids' logits may lie where other threads write now.
                tl.debug_barrier()

            for start in range(0, end, BLOCK):
                columns = start + lane
                dz = tl.zeros([BLOCK], R)
                if TAILED or HARD != NO_HARD:
                    raw, z, eps = block_of(
                        student, kept, start, lane, classes,
                        CAPPED, NOISE, PER_ROW, UNIT, WHOLE, True, R, BLOCK,
                    )  # fmt: skip
                    if TAILED:
                        dz = tl.exp(z * by_z - ref_t - log_t) * on_tail
                    if HARD != NO_HARD:
                        if not SHARES:
                            dz += on_hard * tl.exp(z * by_1 - ref_1 - lse_1)
                        dz -= tl.where(columns == target, on_hard, 0.0)
                    dz = blocks.through(dz, raw, z, eps, scale, slope, CAPPED, NOISE)
                tl.store(out + columns, blocks.rounded_to(dz, out), mask=columns < classes)

            if WEIGHED:
                # Two threads write to a stored class: the one of its column first.
                tl.debug_barrier()
                for first in range(0, stored_end, K):
                    if HELD:
                        ids = held[0]
                        rounded = blocks.rounded_to(change, out)
                    else:
                        place = first + tl.arange(0, K)
                        ids = tl.load(ids_row + place, mask=place < stored, other=NO_ID).to(tl.int32)
                        rounded = tl.load(changes_ptr + n * stored + place, mask=place < stored)
                    tl.store(out + ids, rounded, mask=ids != NO_ID)
