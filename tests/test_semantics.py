"""What counts, what divides, what multiplies: the semantics of the logits loss, on every backend."""

from __future__ import annotations

from math import inf, log, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import DIVERGENCES, RAW, check, fitting, our_loss, our_result
from torch import Tensor
from truth import Options, truth

import kdkernels as kd

KLS = ("forward_kl", "reverse_kl", 0.5)
# In small blocks, which are interpreted slowly: a closed form, an open one, a target's, one of questions.
STREAMED = ("forward_kl", 0.5, kd.DKD(1.0, 8.0), kd.BinaryKL())


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-12) -> None:
    """Equal but for fp64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14)


# Against torch, and by hand


@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
def test_forward_kl_is_torch_kl_div(backend: str, T: float) -> None:
    """The direction is KL(teacher || student), and T² is on it."""
    z, v = logits(4, 9), logits(4, 9)
    expected = T * T * F.kl_div((z / T).log_softmax(-1), (v / T).softmax(-1), reduction="batchmean")
    close(kd.kd_loss(z, v, temperature=T, backend=backend), expected)


def test_reverse_kl_is_the_other_direction(backend: str) -> None:
    """KL(student || teacher): arguments of `kl_div` exchanged."""
    z, v = logits(4, 9), logits(4, 9)
    expected = F.kl_div(v.log_softmax(-1), z.softmax(-1), reduction="batchmean")
    close(kd.kd_loss(z, v, divergence="reverse_kl", backend=backend), expected)


def test_soft_cross_entropy_is_torch_cross_entropy_of_probabilities(backend: str) -> None:
    """Hinton's form: forward KL plus the teacher's entropy, and the same gradient."""
    z, v = logits(4, 9), logits(4, 9)
    loss, grad = our_result(z, v, None, Options("soft_cross_entropy"), backend)
    close(loss, F.cross_entropy(z, v.softmax(-1)))
    kl, kl_grad = our_result(z, v, None, Options("forward_kl"), backend)
    close(grad, kl_grad)
    close(loss - kl, -(v.softmax(-1) * v.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("index", [-100, 3])
def test_hard_only_is_torch_cross_entropy(backend: str, reduction: str, index: int) -> None:
    """At T = 1 whatever the soft temperature; `mean` divides by the labelled rows."""
    z, v, labels = logits(4, 5, 9), logits(4, 5, 9), torch.randint(9, (4, 5))
    labels[0, 1] = labels[2, 2] = index
    o = Options(soft_weight=0.0, hard_weight=1.0, temperature=3.0, reduction=reduction, ignore_index=index)
    expected = F.cross_entropy(z.reshape(-1, 9), labels.reshape(-1), ignore_index=index, reduction=reduction)
    close(our_loss(z, v, labels, o, backend), expected.view(4, 5) if reduction == "none" else expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_by_hand(backend: str, beta: float) -> None:
    """beta belongs to the teacher: p = (1/2, 1/2), q = (1/4, 3/4); and disjoint p and q give the entropy of
    beta."""
    z, v = torch.tensor([[0.0, log(3.0)]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    m0, m1 = 0.5 * beta + 0.25 * (1 - beta), 0.5 * beta + 0.75 * (1 - beta)
    teacher = 0.5 * log(0.5 / m0) + 0.5 * log(0.5 / m1)
    student = 0.25 * log(0.25 / m0) + 0.75 * log(0.75 / m1)
    expected = torch.tensor(beta * teacher + (1 - beta) * student, dtype=torch.float64)
    close(our_loss(z, v, None, Options(beta), backend), expected)
    z, v = torch.tensor([[0.0, -inf]]).double(), torch.tensor([[-inf, 0.0]]).double()
    entropy = torch.tensor(-beta * log(beta) - (1 - beta) * log(1 - beta), dtype=torch.float64)
    close(our_loss(z, v, None, Options(beta), backend), entropy)


@pytest.mark.thorough(but=lambda backend, divergence: backend != "streaming" or divergence in STREAMED[:2])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits(backend: str, divergence: Any) -> None:
    """A "KL" that is a cross-entropy never reaches 0, so it can't be compared."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        z = logits(4, 300, dtype=dtype)
        o = Options(divergence, temperature=2.0)
        exact = check(z, z.clone(), None, o, backend=backend)
        if divergence != "soft_cross_entropy":
            loss, grad = our_result(z, z.clone(), None, o, backend)
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            assert exact.loss.abs() < 1e-13
            assert abs(loss.item()) <= 40 * eps and grad.abs().max() <= 4 * eps


# Temperature


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_t_squared_is_in_loss_and_gradient(backend: str, divergence: Any) -> None:
    """On the loss but not on the gradient, or the reverse, is a silent change of the soft term's weight by
    T²."""
    z, v = logits(4, 9), logits(4, 9)
    T = 2.5
    loss, grad = our_result(z, v, None, Options(divergence, temperature=T), backend)
    plain, plain_grad = our_result(z, v, None, Options(divergence, temperature=T, t_squared=False), backend)
    scaled, scaled_grad = our_result(z / T, v / T, None, Options(divergence), backend)
    close(loss, T * T * plain)
    close(grad, T * T * plain_grad)
    close(plain, scaled)
    close(plain_grad, scaled_grad / T)


def test_high_temperature_is_logit_matching(backend: str) -> None:
    """T²·KL tends to ½·mean((z − z̄ − v + v̄)²), and its gradient to (z − z̄ − v + v̄) / V: an outside check
    of T²."""
    z, v = logits(3, 8), logits(3, 8)
    difference = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    for divergence, factor in (("forward_kl", 1.0), ("reverse_kl", 1.0), (0.25, 0.25 * 0.75)):
        o = Options(divergence, temperature=1e4, reduction="sum")
        loss, grad = our_result(z, v, None, o, backend)
        torch.testing.assert_close(grad, factor * difference / 8, rtol=0, atol=20 / 1e4)
        torch.testing.assert_close(loss, factor * (difference**2).sum() / 16, rtol=20 / 1e4, atol=0)


def test_the_hard_term_is_at_temperature_one(backend: str) -> None:
    """The soft temperature doesn't touch it, nor does T²."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.randint(9, (4,))
    for T in (1.0, 4.0):
        o = Options(temperature=T)
        hard = our_loss(z, v, labels, o.but(hard_weight=0.7), backend) - our_loss(z, v, labels, o, backend)
        close(hard, 0.7 * F.cross_entropy(z, labels), rtol=1e-11)


# Weights


def test_loss_is_the_weighted_sum_of_its_terms(backend: str) -> None:
    """soft_weight·soft + hard_weight·hard, each also alone."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.randint(9, (4,))
    o = Options(0.5, temperature=2.0)
    soft, soft_grad = our_result(z, v, labels, o.but(hard_weight=0.0), backend)
    hard, hard_grad = our_result(z, v, labels, o.but(soft_weight=0.0, hard_weight=1.0), backend)
    both, both_grad = our_result(z, v, labels, o.but(soft_weight=0.3, hard_weight=1.7), backend)
    close(both, 0.3 * soft + 1.7 * hard)
    close(both_grad, 0.3 * soft_grad + 1.7 * hard_grad)


def test_a_term_of_weight_zero_is_absent(backend: str) -> None:
    """0 * inf: an infinite term that nobody asked for must not make the loss NaN."""
    z, v = logits(2, 5), logits(2, 5)
    z[0, 2] = -inf
    labels = torch.tensor([2, 1])
    check(z, v, torch.tensor([0, 1]), Options(soft_weight=0.0, hard_weight=1.0), backend=backend)
    check(z, z.clone(), labels, Options(soft_weight=1.0, hard_weight=0.0), backend=backend)
    check(z, z.clone(), labels, Options(soft_weight=0.0, hard_weight=0.0), backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights_multiply_rows_and_never_divide(backend: str, reduction: str) -> None:
    """A weighted mean would cancel the weights' size; theirs is the caller's business."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.tensor([1, -100, 3, 4])
    weights = torch.tensor([0.5, 9.0, 0.0, 2.0])
    o = Options(hard_weight=0.5, temperature=2.0, reduction=reduction)
    rows = our_loss(z, v, labels, o.but(reduction="none"), backend) * weights
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 3}[reduction]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        close(our_loss(z, v, labels, o.but(token_weights=weights.to(dtype)), backend), expected)
    check(z, v, labels, o.but(token_weights=weights), backend=backend)
    doubled, single = (our_loss(z, v, labels, o.but(token_weights=k * weights), backend) for k in (2, 1))
    close(doubled, 2 * single)


# Which rows count, and what divides


def test_labels_decide_which_rows_count(backend: str) -> None:
    """Without a mask, a row labelled `ignore_index` loses its soft term too, and leaves the denominator."""
    z, v, labels = logits(2, 3, 9), logits(2, 3, 9), torch.tensor([[1, -100, 2], [-100, -100, 3]])
    o = Options(hard_weight=0.5)
    kept = labels != -100
    close(our_loss(z, v, labels, o, backend), our_loss(z[kept], v[kept], labels[kept], o, backend))
    rows, grad = our_result(z, v, labels, o.but(reduction="none"), backend)
    assert (rows[~kept] == 0).all() and (grad[~kept] == 0).all() and (rows[kept] > 0).all()


def test_a_mask_overrides_the_labels(backend: str) -> None:
    """A masked-in row labelled `ignore_index` is unlabelled data: it keeps its soft term, and divides both
    terms."""
    z, v = logits(4, 9), logits(4, 9)
    labels, mask = torch.tensor([1, -100, 2, 3]), torch.tensor([True, True, False, True])
    o = Options(hard_weight=0.5, mask=mask)
    soft = F.kl_div(z.log_softmax(-1), v.softmax(-1), reduction="none").sum(-1)
    hard = F.cross_entropy(z, labels, reduction="none")
    expected = (soft[[0, 1, 3]].sum() + 0.5 * hard[[0, 3]].sum()) / 3
    close(our_loss(z, v, labels, o, backend), expected)
    check(z, v, labels, o, backend=backend)
    close(our_loss(z, v, None, o.but(hard_weight=0.0), backend), soft[[0, 1, 3]].mean())


def test_labels_that_only_choose_rows_may_be_anything(backend: str) -> None:
    """Without a hard term nobody looks a class up, out of the row or not."""
    z, v = logits(3, 9), logits(3, 9)
    loss, grad = our_result(z, v, torch.tensor([10**12, -100, -7]), Options(), backend)
    expected, expected_grad = our_result(z, v, torch.tensor([1, -100, 2]), Options(), backend)
    assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("index", [0, -1, 5, 10_000])
def test_any_ignore_index(backend: str, index: int) -> None:
    """Also one that is a class, and one that isn't."""
    z, v, labels = logits(6, 9), logits(6, 9), torch.tensor([0, 5, 1, 2, 3, 4])
    labels[3] = index
    check(z, v, labels, Options(hard_weight=0.5, ignore_index=index), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_label_dtypes(backend: str, dtype: torch.dtype) -> None:
    """int32 labels are what many data loaders give."""
    check(
        logits(4, 9),
        logits(4, 9),
        torch.tensor([1, -100, 0, 8], dtype=dtype),
        Options(hard_weight=0.5),
        backend=backend,
    )


@pytest.mark.parametrize(
    "num_items", [7, 7.0, 2.5, torch.tensor(7), torch.tensor(7.0), torch.tensor(2.5).double()], ids=str
)
def test_num_items_divides_the_sum(backend: str, num_items: int | float | Tensor) -> None:
    """An int, a float (global_count / W) or a tensor, in the place of this batch's count."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.tensor([1, -100, 3, 4])
    o = Options(hard_weight=0.5, token_weights=torch.rand(4))
    total, total_grad = our_result(z, v, labels, o.but(reduction="sum"), backend)
    loss, grad = our_result(z, v, labels, o.but(num_items=num_items), backend)
    close(loss, total / float(num_items))
    close(grad, total_grad / float(num_items))


def test_accumulation_over_uneven_batches_is_one_big_batch(backend: str) -> None:
    """A mean of local means weighs tokens by up to 100 : 1.

    With the global count it is the big batch's loss.
    """
    z, v, labels = logits(12, 9), logits(12, 9), torch.randint(9, (12,))
    labels[:5] = -100
    o = Options(hard_weight=0.5, temperature=2.0)
    whole, whole_grad = our_result(z, v, labels, o, backend)
    total, grads = torch.zeros(()).double(), []
    for rows in (slice(0, 6), slice(6, 7), slice(7, 12)):
        loss, grad = our_result(z[rows], v[rows], labels[rows], o.but(num_items=7), backend)
        total, grads = total + loss, [*grads, grad]
    close(total, whole)
    close(torch.cat(grads), whole_grad)


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2), (12, 1)])
def test_mean_is_over_rows_of_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    """Never over N·V, as torch's own `mean` divides."""
    z, v = logits(12, 9), logits(12, 9)
    expected = F.kl_div(z.log_softmax(-1), v.softmax(-1), reduction="sum") / 12
    close(kd.kd_loss(z.view(*shape, 9), v.view(*shape, 9), backend=backend), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_items", [None, 0, 5, torch.tensor(0)], ids=str)
def test_nothing_counted(backend: str, reduction: str, num_items: int | Tensor | None) -> None:
    """A batch that is all padding gives 0 with connected zero gradients, not NaN, by mask and by labels."""
    if num_items is not None and reduction != "mean":
        num_items = None
    for labels, mask in ((None, torch.zeros(3).bool()), (torch.full((3,), -100), None)):
        for dtype in (torch.float32, torch.float16):
            z, v = logits(3, 9, dtype=dtype), logits(3, 9, dtype=dtype)
            o = Options(
                hard_weight=0.5 if labels is not None else 0.0,
                mask=mask,
                reduction=reduction,
                num_items=num_items,
            )
            loss, grad = our_result(z, v, labels, o, backend)
            assert (loss == 0).all() and (grad == 0).all()


# Infinities, saturation, NaN


@pytest.mark.thorough(
    but=lambda backend, divergence, o: (
        backend != "streaming" or (divergence in STREAMED and o.hard_weight > 0)
    )
)
@pytest.mark.parametrize(
    "o", [Options(), Options(temperature=2.0, hard_weight=0.5, reduction="none")], ids=str
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_masked_on_both_sides(backend: str, divergence: Any, o: Options) -> None:
    """0 · (−inf) is NaN: a class at -inf on both sides adds nothing to the loss and has no gradient; nor does
    a tile of them."""
    z, v = logits(4, 200, dtype=torch.float32), logits(4, 200, dtype=torch.float32)
    for where in (slice(3, 4), slice(0, 130), slice(70, 200), slice(0, 199)):
        zm, vm = z.clone(), v.clone()
        zm[:, where] = vm[:, where] = -inf
        labels = torch.tensor([199 if where.start == 0 else 0] * 4)
        check(zm, vm, labels, o.but(divergence=divergence), backend=backend)
        _, grad = our_result(zm, vm, labels, o.but(divergence=divergence, hard_weight=0.0), backend)
        assert (grad[:, where] == 0).all()


# What is infinite where only the other side has a class, and what has no gradient there.
NO_GRADIENT = {
    (name, side) for name in ("logit_mse", "centered_logit_mse") for side in ("student", "teacher")
} | {("reverse_kl", "teacher")}
INFINITE = NO_GRADIENT | {
    (name, "student") for name in ("forward_kl", "soft_cross_entropy", "dkd", "binary_kl")
}  # fmt: skip


@pytest.mark.thorough(but=lambda backend, divergence: backend != "streaming" or divergence in STREAMED)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_masked_on_one_side(backend: str, divergence: Any, side: str) -> None:
    """phi's limit: 0 or finite where it exists, inf where it doesn't; forward KL's gradient is finite even
    then."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        z, v = logits(3, 40, dtype=dtype), logits(3, 40, dtype=dtype)
        (z if side == "student" else v)[1, 5:9] = -inf
        o = Options(divergence, temperature=2.0, reduction="none")
        exact = truth(z, v, *fitting(z, None, o))
        infinite = (o.row[0], side) in INFINITE
        assert exact.loss[1].item() == inf if infinite else exact.loss[1].isfinite()
        if (o.row[0], side) not in NO_GRADIENT:
            check(z, v, None, o, backend=backend)
            continue
        # The row's own gradient has no limit; its loss and every other row do.
        loss, grad = our_result(z, v, None, o, backend)
        assert loss[1].item() == inf
        rest = torch.tensor([0, 2])
        torch.testing.assert_close(loss[rest].double(), exact.loss[rest], rtol=1e-5, atol=1e-6)
        assert grad[rest].isfinite().all()


@pytest.mark.thorough(
    but=lambda backend, divergence, dtype, size: (
        backend != "streaming" or (divergence in STREAMED and (dtype is torch.float32) == (size == 30.0))
    )
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_saturated_rows(backend: str, divergence: Any, dtype: torch.dtype, size: float) -> None:
    """One-hot probabilities, agreeing and not: exp neither overflows nor, underflowing, leaves a 0 · inf."""
    z, v = torch.full((4, 100), -size), torch.full((4, 100), -size)
    z[0, 3] = v[0, 3] = size
    z[1, 3] = v[1, 7] = size
    z[2] = 2 * torch.randn(100)
    v[2, 7] = size
    z[3, ::2] = v[3, ::3] = size
    labels = torch.tensor([3, 7, 7, 1])
    for T in (1.0, 2.0):
        o = Options(divergence, temperature=T, hard_weight=0.5, reduction="none")
        exact = check(z.to(dtype), v.to(dtype), labels, o, backend=backend)
        assert exact.loss.isfinite().all()


@pytest.mark.thorough(
    but=lambda backend, divergence, shift: (
        backend != "streaming" or (divergence in STREAMED and shift == -1e4)
    )
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shift", [-1e4, -100.0, 1e4])
def test_rows_far_from_zero(backend: str, divergence: Any, shift: float) -> None:
    """A maximum that grows block by block starts somewhere: at 0, the first row below would be NaN. So would
    one whose first classes are far below the rest."""
    z, v = logits(4, 120) + shift, logits(4, 120) + shift / 2
    z[1, :64] -= 1e3
    v[2, :64] -= 1e3
    z[3, 64:] += 1e3
    for T in (1.0, 2.0):
        o = Options(divergence, temperature=T, hard_weight=0.5, reduction="none")
        check(z, v, torch.tensor([3, 100, 7, 110]), o, backend=backend)


# Not the centred logits, whose mean such a class is part of.
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if Options(d).row[0] != "centered_logit_mse"])
def test_classes_as_low_as_the_dtype_goes(backend: str, divergence: Any) -> None:
    """What many models write for a masked class: differences from it overflow, and 0 times that is NaN."""
    z, v = (logits(3, 120, dtype=torch.float32) for _ in range(2))
    z[:, :40] = v[:, :40] = torch.finfo(torch.float32).min
    z[1, 40:80] = torch.finfo(torch.float32).min
    v[1, 40:80] = torch.finfo(torch.float32).min
    check(z, v, None, Options(divergence), backend=backend)
    _, stats = kd.kd_loss_with_stats(z, v, backend=backend)
    _, plain = kd.kd_loss_with_stats(z[:, 40:], v[:, 40:], backend=backend)
    torch.testing.assert_close(stats.student_entropy, plain.student_entropy)
    torch.testing.assert_close(stats.teacher_entropy, plain.teacher_entropy)


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_cross_entropy"])
def test_an_impossible_class_of_no_weight(backend: str, divergence: str) -> None:
    """Where p underflows, p log(p/q) is 0 even at q = 0, though a sum up to there was infinite."""
    z, v = (logits(2, 100, dtype=torch.float32) for _ in range(2))
    z[0, 3] = -inf
    v[0, 50:] += 300.0
    check(z[1:], v[1:], None, Options(divergence), backend=backend)
    loss, grad = our_result(z, v, None, Options(divergence, reduction="none"), backend)
    assert loss.isfinite().all() and grad.isfinite().all()


@pytest.mark.thorough(
    but=lambda backend, divergence, side, poison: (
        backend != "streaming"
        or divergence == 0.5
        or (divergence in STREAMED and (side, poison) in (("student", "nan"), ("teacher", "all -inf")))
    )
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", ["nan", "all -inf", "+inf"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bad_row_poisons_only_itself(backend: str, divergence: Any, side: str, poison: str) -> None:
    """NaN in one row, as torch's softmax gives it, and not one bit of difference in the others."""
    z, v = logits(5, 40, dtype=torch.float32), logits(5, 40, dtype=torch.float32)
    o = Options(divergence, reduction="none")
    clean, clean_grad = our_result(z, v, None, o, backend)
    bad = (z if side == "student" else v)[2]
    if poison == "all -inf":
        bad[:] = -inf
    else:
        bad[7] = nan if poison == "nan" else inf
    loss, grad = our_result(z, v, None, o, backend)
    others = torch.tensor([0, 1, 3, 4])
    if poison == "nan" or o.row[0] not in RAW:
        assert loss[2].isnan() and grad[2].isnan().any()
    assert torch.equal(loss[others], clean[others]) and torch.equal(grad[others], clean_grad[others])
    mean = our_loss(z, v, None, o.but(reduction="mean"), backend)
    assert not mean.isfinite() if loss[2].item() == inf else mean.isnan() == loss[2].isnan()


@pytest.mark.thorough(
    but=lambda backend, divergence, dtype, reduction: (
        backend != "streaming" or (divergence == 0.5) == (reduction == "none" or dtype is torch.float16)
    )
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", KLS)
def test_an_ignored_bad_row_poisons_nothing(
    backend: str, divergence: Any, dtype: torch.dtype, reduction: str
) -> None:
    """Padding may hold anything: outside the mask, loss and gradient are exactly 0, and the others don't
    notice."""
    z, v, labels = logits(5, 40, dtype=dtype), logits(5, 40, dtype=dtype), torch.tensor([1, 2, -100, -100, 5])
    o = Options(divergence, reduction=reduction, hard_weight=0.5, token_weights=torch.rand(5))
    clean, clean_grad = our_result(z, v, labels, o, backend)
    z[2], v[2] = nan, nan
    z[3, 4:], v[3] = inf, -inf
    weights = o.token_weights.clone()  # type: ignore[union-attr]
    weights[2] = nan
    loss, grad = our_result(z, v, labels, o.but(token_weights=weights), backend)
    assert torch.equal(loss, clean)
    assert (grad[2:4] == 0).all()
    assert torch.equal(grad, clean_grad)


# What is large, infinite, or of weight 0


@pytest.mark.thorough(but=lambda backend, T: backend != "streaming" or T == 3.0)
@pytest.mark.parametrize("fill", [-1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("T", [0.7, 3.0, 5.0])
@pytest.mark.parametrize("name", [*KLS, "tvd"])
def test_long_runs_of_masked_classes(backend: str, fill: float, T: float, name: Any) -> None:
    """Whole blocks of classes that a model masks with a large finite number: of weight 0, and no NaN."""
    z, v = (logits(2, 4096, dtype=torch.float32) for _ in range(2))
    z[:, 1024:2048] = v[:, 1024:2048] = fill
    check(z, v, torch.tensor([3, 5]), Options(name, temperature=T, hard_weight=0.3), backend=backend)


@pytest.mark.parametrize("name", [*KLS, "tvd"])
def test_exponents_larger_than_any_rounding(backend: str, name: Any) -> None:
    """At 1e10 an ulp is 1,024: the largest logit has all of the mass all the same."""
    z, v = (1e10 * logits(3, 3000, dtype=torch.float32) for _ in range(2))
    options = Options(name, temperature=3.0)
    loss, grad = our_result(z, v, None, options, backend)
    exact = truth(z, v, None, options)
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_a_binary_soft_term_of_weight_0_is_absent(backend: str) -> None:
    """Whatever its teacher holds."""
    z, y = torch.tensor([[0.5, 1.0, -1.0]], requires_grad=True), torch.tensor([[1.0, 0.0, 1.0]])
    v = torch.tensor([[nan, 0.0, 1.0]])
    loss = kd.kd_loss(z, v, y, divergence=kd.BinaryKL(), soft_weight=0.0, hard_weight=1.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(z.detach(), y, reduction="sum"))
    torch.testing.assert_close(grad, z.detach().sigmoid() - y)


@pytest.mark.parametrize(
    "z, weights, expected",
    [
        ([1.0, -inf, -inf], (1.0, 1.0), inf),  # nothing left for the others
        ([-inf, 1.0, 2.0], (0.0, 1.0), None),  # the target's term is infinite, and of weight 0
        ([1.0, -inf, 2.0], (1.0, 0.0), None),  # the others' is
    ],
)
def test_dkd_of_impossible_classes(
    backend: str, z: list[float], weights: tuple[float, float], expected: float | None
) -> None:
    """An infinite term makes the loss infinite, unless its weight is 0: then it is absent."""
    student, v, label = torch.tensor([z]), torch.tensor([[0.5, 1.0, -1.0]]), torch.tensor([0])
    loss = kd.kd_loss(student, v, label, divergence=kd.DKD(*weights), hard_weight=0.0, backend=backend)
    if expected is None:
        p, q = v.softmax(-1)[0], student.softmax(-1)[0]
        if weights[0]:
            two = [torch.stack([x[0], 1 - x[0]]) for x in (p, q)]
        else:
            two = [x[1:] / x[1:].sum() for x in (p, q)]
        expected = (two[0] * (two[0] / two[1]).log()).sum().item()
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=0)


def test_an_exponent_that_goes_to_0(backend: str) -> None:
    """An alpha-beta divergence under a schedule ends in its limit, not in a reciprocal that overflows."""
    z, v = logits(2, 9, dtype=torch.float32), logits(2, 9, dtype=torch.float32)
    limit = kd.kd_loss(z, v, divergence=kd.AlphaBeta(0.0, 0.5), backend=backend)
    for alpha in (1e-32, 1e-39, 1e-46, 1e-300, -1e-40):
        assert torch.equal(kd.kd_loss(z, v, divergence=kd.AlphaBeta(alpha, 0.5), backend=backend), limit)
    close_to = kd.kd_loss(z, v, divergence=kd.AlphaBeta(1e-20, 0.5), backend=backend)
    torch.testing.assert_close(close_to, limit, rtol=1e-5, atol=0)


def test_weights_whose_sum_would_overflow(backend: str) -> None:
    """Only their ratios matter."""
    z, v, u = (logits(2, 9, dtype=torch.float32) for _ in range(3))
    huge = kd.Mixture([v, u], torch.tensor([3e38, 3e38]))
    assert torch.equal(
        kd.kd_loss(z, huge, backend=backend), kd.kd_loss(z, kd.Mixture([v, u]), backend=backend)
    )
    with pytest.raises(ValueError, match=r"weights of Mixture.*sum"):
        kd.Mixture([v, u], [1e308, 1e308])


def test_explaining_draws_nothing() -> None:
    """A line of diagnosis leaves torch's generator, and so the run, as it was."""
    before = torch.get_rng_state()
    kd.explain(torch.zeros(1, 2), torch.zeros(1, 2), student_noise=kd.LogitNoise(0.1))
    assert torch.equal(before, torch.get_rng_state())
