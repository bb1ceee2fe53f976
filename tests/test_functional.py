"""`kd_loss` against the fp64 truth: backend x divergence x dtype x vocabulary, and the calls around it."""

from __future__ import annotations

import itertools
import mmap
import warnings
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from conftest import DEVICES, interpreted
from tolerances import (
    DIVERGENCES,
    DTYPES,
    check,
    eager_result,
    fitting,
    keywords,
    our_loss,
    our_result,
)
from torch import Tensor
from truth import Options, truth

import kdkernels as kd
from kdkernels import tuning

V_LARGE = 128_256  # Llama 3's vocabulary


def pair(*shape: int, dtype: torch.dtype = torch.float32, std: float = 3.0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits."""
    return (std * torch.randn(*shape)).to(dtype), (std * torch.randn(*shape)).to(dtype)


def labelled(rows: tuple[int, ...], vocab: int, ignored: float = 0.3) -> Tensor:
    """Labels, some of them -100."""
    return torch.randint(vocab, rows).masked_fill(torch.rand(rows) < ignored, -100)


def assert_close_fp64(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for fp64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


OPTIONS = (
    Options(),
    Options(temperature=2.0, hard_weight=0.25),
    Options(temperature=0.7, t_squared=False, soft_weight=0.3, reduction="sum"),
    Options(student_scale=0.5, student_softcap=6.0, teacher_scale=1.5, hard_weight=1.0, reduction="none"),
    Options(teacher_softcap=4.0, temperature=3.0, num_items=17, student_scale=1.25),
)


@pytest.mark.parametrize("o", OPTIONS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_truth_is_what_autograd_says(divergence: Any, o: Options) -> None:
    """The closed forms in truth.py and autograd of the eager loss share no formula; in fp64 they agree."""
    z, v = pair(5, 23, dtype=torch.float64)
    labels, o = fitting(z, labelled((5,), 23), o.but(divergence=divergence))
    loss, grad = eager_result(z, v, labels, o, None)
    exact = truth(z, v, labels, o)
    torch.testing.assert_close(exact.loss, loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(exact.grad, grad, rtol=1e-11, atol=1e-14)


def test_uninitialised_memory_is_nan() -> None:
    """Without this, an output that nobody wrote could pass by luck."""
    for memory in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(1).new_empty(3)):
        assert memory.isnan().all()


@pytest.mark.parametrize("o", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity(backend: str, divergence: Any, dtype: torch.dtype, o: Options) -> None:
    """Eager and fused drift apart where only the default options are compared; here every one takes part."""
    check(*pair(3, 5, 131, dtype=dtype), labelled((3, 5), 131), o.but(divergence=divergence), backend=backend)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
]


@pytest.mark.parametrize(("student", "teacher"), MIXED, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_student_and_teacher_of_different_dtypes(
    backend: str, divergence: Any, student: torch.dtype, teacher: torch.dtype
) -> None:
    """An fp32 teacher beside a bf16 student is neither rounded to bf16 nor read as bf16."""
    z, v = pair(7, 50)
    o = Options(divergence, temperature=1.5, hard_weight=0.5)
    check(z.to(student), v.to(teacher), labelled((7,), 50), o, backend=backend)


@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 255, 1000, 1023, 4097])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.5])
def test_vocabularies_around_every_vector_width(backend: str, divergence: Any, vocab: int) -> None:
    """Lanes are 8, 16 or 32 wide and unrolled: each tail and each exact multiple.

    V = 1 has loss and gradient 0.
    """
    for dtype in (torch.float32, torch.bfloat16):
        o = Options(divergence, temperature=2.0, hard_weight=0.5, reduction="none")
        z, v = pair(3, vocab, dtype=dtype)
        check(z, v, labelled((3,), vocab), o, backend=backend)


@pytest.mark.thorough(
    but=lambda backend, divergence, dtype: (
        backend != "triton" or (dtype is torch.bfloat16) == (divergence == 0.5)
    )
)
@pytest.mark.parametrize(
    ("dtype", "divergence"),
    [
        *((torch.float32, d) for d in DIVERGENCES),
        (torch.bfloat16, "forward_kl"),
        (torch.bfloat16, 0.5),
        (torch.float16, "reverse_kl"),
    ],
    ids=str,
)
def test_a_real_vocabulary(backend: str, divergence: Any, dtype: torch.dtype) -> None:
    """Published tests stop at V = 4,096, where neither a serial fp32 sum over the row nor a spilled block
    shows."""
    o = Options(divergence, temperature=2.0, hard_weight=0.1, reduction="none")
    check(*pair(2, V_LARGE, dtype=dtype, std=2.0), labelled((2,), V_LARGE, 0.0), o, backend=backend)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.5])
def test_flat_rows_of_a_real_vocabulary(backend: str, divergence: Any) -> None:
    """Near-uniform rows are the worst case of a serial fp32 sum: every addend rounds the same way."""
    z, v = pair(2, V_LARGE, std=1e-3)
    check(z, v, None, Options(divergence, reduction="none"), backend=backend)


@pytest.mark.parametrize(
    "shape",
    [(9,), (4, 9), (2, 3, 9), (2, 1, 3, 9), (1, 2, 2, 2, 9), (2, 1) * 6 + (9,), (0, 9), (2, 0, 3, 9)],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_leading_shape(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    """Rows are what is left of the last dim, none of them included; "none" keeps their shape."""
    o = Options(reduction=reduction, hard_weight=0.5)
    exact = check(*pair(*shape), labelled(shape[:-1], 9), o, backend=backend)
    assert exact.loss.shape == (shape[:-1] if reduction == "none" else ())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """0 / 0 is not the mean of nothing: the loss is 0 and connected."""
    z = torch.zeros(0, 9, dtype=dtype, requires_grad=True)
    loss = kd.kd_loss(z, z.detach(), reduction=reduction, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None and z.grad.shape == (0, 9) and z.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("std", [1e-2, 1e-3])
def test_gradient_of_a_student_near_its_teacher(
    backend: str, divergence: Any, dtype: torch.dtype, std: float
) -> None:
    """A softmax in bf16 loses the difference q - p that is the whole gradient here (an error of 19 % and
    more)."""
    v = 2 * torch.randn(4, 512)
    z = (v + std * torch.randn(4, 512)).to(dtype)
    check(z, v.to(dtype), None, Options(divergence, temperature=2.0), backend=backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_on_which_both_sides_agree(backend: str, divergence: Any) -> None:
    """max(d, 0) and |d| have a kink at d = log p - log q = 0, no divergence has: autograd's pick there shows.

    A permuted row has the same normaliser, so that its fixed classes have the same probability to the bit.
    """
    v = torch.arange(8.0).repeat(3, 1)
    z = v.clone()
    z[0, [0, 7]], z[1, [5, 6, 7]] = v[0, [7, 0]], v[1, [7, 5, 6]]
    for dtype in DTYPES:
        check(z.to(dtype), v.to(dtype), None, Options(divergence, reduction="none"), backend=backend)


def test_subnormals_survive(backend: str) -> None:
    """A library linked with -ffast-math sets flush-to-zero in the thread that loads it, for all of torch."""
    kd.kd_loss(*pair(3 if interpreted(backend) else 300, 500), backend=backend)
    tiny = torch.full((200_000,), 1e-40, device="cpu")
    assert (tiny * 1.0 == tiny).all() and (tiny > 0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_more_than_two_to_the_31_elements_apart(backend: str, side: str) -> None:
    """row * stride overflows an int32 there.

    On a CPU the memory is reserved but, apart from two rows, never touched.
    """
    stride, vocab = 2**31 + 64, 40
    if DEVICES[backend] == "cpu":
        reserved = torch.frombuffer(mmap.mmap(-1, 2 * (stride + vocab)), dtype=torch.bfloat16)
    else:
        reserved = torch.empty(stride + vocab, dtype=torch.bfloat16)
    far = reserved.as_strided((2, vocab), (stride, 1))
    far.copy_(torch.randn(2, vocab))
    near = torch.randn(2, vocab).bfloat16()
    z, v = (far, near) if side == "student" else (near, far)
    check(z, v, torch.tensor([1, 2]), Options(0.5, hard_weight=0.5), backend=backend)


@pytest.mark.parametrize("feature", ["noise", "mixture", "binary labels"])
def test_what_else_lies_far_apart(backend: str, feature: str) -> None:
    """Of several teachers each, of labels `[..., V]` each class; noise is of rows, wherever they lie."""
    stride, vocab = 2**31 + 64, 40
    if DEVICES[backend] == "cpu":
        reserved = torch.frombuffer(mmap.mmap(-1, 2 * (stride + vocab)), dtype=torch.bfloat16)
    else:
        reserved = torch.empty(stride + vocab, dtype=torch.bfloat16)
    far = reserved.as_strided((2, vocab), (stride, 1))
    far.copy_(torch.rand(2, vocab))
    z, v, labels, o = pair(2, vocab)[0], pair(2, vocab)[1], torch.tensor([1, 2]), Options(hard_weight=0.5)
    if feature == "noise":
        check(far, v, labels, o.but(student_noise=kd.LogitNoise(0.5, seed=3)), backend=backend)
    elif feature == "mixture":
        check(z, [v, far], labels, o.but(weights=[1.0, 2.0]), backend=backend)
    else:
        check(z, v, far, o.but(divergence=kd.BinaryKL()), backend=backend)


@pytest.mark.parametrize("feature", ["plain", "noise", "mixture", "binary"])
def test_more_than_two_to_the_31_logits(backend: str, feature: str) -> None:
    """Rows past 2³¹ / V, of which few count: their numbers, offsets and samples are their own.

    Stride 0, so that there is one row of memory; the loss alone, whose rows don't count cost nothing.
    """
    if backend != "cpu" and DEVICES[backend] == "cpu":
        pytest.skip("this backend would make [N, V] temporaries, or interpret a billion logits")
    rows, vocab = 2**15 + 3, 2**16 + 8
    assert rows * vocab > 2**31
    one = torch.randn(3, 1, vocab)
    z, v, other = (x.expand(rows, vocab) for x in one)
    mask = torch.zeros(rows, dtype=torch.bool)
    last = rows - 2
    mask[[0, last]] = True
    noise = kd.LogitNoise(0.5, seed=9)
    words: dict[str, Any] = {
        "plain": {},
        "noise": {"student_noise": noise, "teacher_noise": noise},
        "mixture": {},
        "binary": {"divergence": kd.BinaryKL(), "hard_weight": 0.5},
    }[feature]
    labels = one[1].sigmoid().expand(rows, vocab) if feature == "binary" else None
    teacher = kd.Mixture([v, other], [1.0, 3.0]) if feature == "mixture" else v
    got = kd.kd_loss(z, teacher, labels, mask=mask, reduction="none", backend=backend, **words)
    assert (got[~mask] == 0).all()
    for row in (0, last):
        moved = {
            k: replace(n, row_offset=row) if isinstance(n, kd.LogitNoise) else n for k, n in words.items()
        }
        part = slice(row, row + 1)
        small = kd.kd_loss(
            z[part].clone(), teacher[part], None if labels is None else labels[part].clone(),
            reduction="none", backend="reference", **moved,
        )  # fmt: skip
        torch.testing.assert_close(got[part], small, rtol=1e-5, atol=1e-5)
    if feature == "noise":
        assert got[0] != got[last]


def test_none_picks_by_device() -> None:
    """On CPU tensors the fused kernel runs; its bits tell."""
    z, v = pair(6, 300)
    assert torch.equal(kd.kd_loss(z, v), kd.kd_loss(z, v, backend=kd.explain(z, v).backend))


def test_explain_names_every_backend(backend: str) -> None:
    """Which would run, and for each other one why it would not, without running anything."""
    z, v = pair(2, 5)
    explanation = kd.explain(z, v, temperature=2.0, backend=backend)
    assert explanation.backend == backend
    assert explanation.reasons["reference"] is None
    assert {"reference", "cpu", "triton", "cuda"} <= set(explanation.reasons)
    for name, reason in explanation.reasons.items():
        assert name in str(explanation) and (reason or "run") in str(explanation)
    # No device is everybody's.
    reason = explanation.reasons["cuda" if z.device.type == "cpu" else "cpu"]
    assert isinstance(reason, str) and len(reason) > 10
    assert backend in str(explanation)


def test_explain_refuses_what_kd_loss_refuses() -> None:
    """An explanation of a call that raises would be a lie."""
    z, v = pair(2, 5)
    with pytest.raises(ValueError, match="temperature"):
        kd.explain(z, v, temperature=-1.0)


def test_module_is_the_function(backend: str) -> None:
    """`KDLoss` keeps the options and takes the tensors."""
    z, v = pair(4, 11)
    labels, mask = labelled((4,), 11), torch.tensor([True, True, False, True])
    weights = torch.rand(4)
    o = Options(0.9, temperature=2.0, hard_weight=0.5)
    call = {"mask": mask, "token_weights": weights, "num_items": 7}
    module = kd.KDLoss(backend=backend, **{k: w for k, w in keywords(o).items() if k not in call})
    assert isinstance(module, torch.nn.Module) and not list(module.parameters())
    expected = our_loss(z, v, labels, o.but(**call), backend)
    assert torch.equal(module(z, v, labels, **call), expected)
    assert torch.equal(module(z, v, labels), our_loss(z, v, labels, o, backend))
    assert "temperature=2.0" in repr(module)
    plain = kd.KDLoss(divergence="reverse_kl", backend=backend)
    assert torch.equal(plain(z, v), our_loss(z, v, None, Options("reverse_kl"), backend))


def test_the_module_keeps_noise_and_takes_mixtures(backend: str) -> None:
    """An option like any other, that `repr` shows; a bad one is refused when it is bound."""
    (z, v), noise = pair(4, 11), kd.LogitNoise(0.5, seed=7)
    teacher, labels = kd.Mixture([v, v.flip(0)], [1.0, 2.0]), torch.tensor([1, 2, 3, 4])
    module = kd.KDLoss(divergence=kd.DKD(1.0, 2.0), teacher_noise=noise, backend=backend)
    assert "LogitNoise(sigma=0.5" in repr(module) and "DKD(alpha=1.0, beta=2.0)" in repr(module)
    o = Options(kd.DKD(1.0, 2.0), teacher_noise=noise, weights=[1.0, 2.0])
    assert torch.equal(module(z, teacher, labels), our_loss(z, [v, v.flip(0)], labels, o, backend))
    with pytest.raises(TypeError, match="teacher_noise must be None or"):
        kd.KDLoss(teacher_noise=0.5)


def test_shift_labels() -> None:
    """Column 0 goes, -100 comes: logits are never sliced. A wrong shift costs about 4 perplexity."""
    labels = torch.tensor([[5, 6, -100, 8], [1, 2, 3, 4]])
    shifted = kd.shift_labels(labels)
    assert shifted.tolist() == [[6, -100, 8, -100], [2, 3, 4, -100]]
    assert shifted.dtype == labels.dtype
    assert labels.tolist() == [[5, 6, -100, 8], [1, 2, 3, 4]]
    assert kd.shift_labels(torch.tensor([7])).tolist() == [-100]
    assert kd.shift_labels(torch.tensor([[3, 4]], dtype=torch.int32)).dtype == torch.int32


def test_shifted_labels_are_shifted_logits(backend: str) -> None:
    """The loss over unsliced logits and shifted labels is the textbook one over logits[:, :-1] and labels[:,
    1:]."""
    z, v = pair(2, 6, 13, dtype=torch.float64)
    labels = labelled((2, 6), 13)
    ours = kd.kd_loss(z, v, kd.shift_labels(labels), hard_weight=0.5, backend=backend)
    sliced = kd.kd_loss(z[:, :-1], v[:, :-1], labels[:, 1:], hard_weight=0.5, backend=backend)
    torch.testing.assert_close(ours, sliced, rtol=1e-13, atol=0)


def test_gkd_ends_are_the_two_kls() -> None:
    """TRL's and Liger's beta: 0 is forward KL, 1 is reverse KL, the JSD vanishes at both."""
    assert kd.gkd(0.0) == "forward_kl" and kd.gkd(1.0) == "reverse_kl" and kd.gkd(0) == "forward_kl"
    assert kd.gkd(0.3) == kd.JSD(beta=0.3)
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="beta"):
            kd.gkd(beta)


def test_jsd_by_name_is_the_even_one(backend: str) -> None:
    """`"jsd"` is `JSD(0.5)`, and `JSD()` too."""
    z, v = pair(3, 7)
    losses = [kd.kd_loss(z, v, divergence=d, backend=backend) for d in ("jsd", kd.JSD(), kd.JSD(0.5))]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[1], losses[2])


def test_the_public_names() -> None:
    """`__all__` is the promise."""
    promised = {
        "kd_loss",
        "kd_loss_with_stats",
        "KDLoss",
        "KDStats",
        "Logits",
        "JSD",
        "SkewKL",
        "SkewReverseKL",
        "AlphaBeta",
        "LogitMSE",
        "DKD",
        "BinaryKL",
        "LogitNoise",
        "Mixture",
        "explain",
        "shift_labels",
        "gkd",
    }
    assert promised <= set(kd.__all__)
    for name in kd.__all__:
        assert getattr(kd, name).__doc__, f"{name} has no docstring"


# Figures


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.5])
def test_stats(backend: str, divergence: Any, reduction: str, weighted: bool) -> None:
    """Every figure against plain torch, without the token weights; the loss is the same to the bit."""
    T = 2.0
    (z, v), labels = pair(6, 9, dtype=torch.float64), torch.tensor([1, -100, 3, 4, 5, 0])
    z[4, 5] = z[4].max() + 1
    v[:3] = z[:3] + 0.1
    mask = torch.tensor([True, True, True, False, True, True])
    weights = torch.rand(6).double() if weighted else None
    o = Options(
        divergence,
        temperature=T,
        hard_weight=0.5,
        soft_weight=0.7,
        mask=mask,
        token_weights=weights,
        reduction=reduction,
    )
    leaf = z.clone().requires_grad_()
    loss, stats = kd.kd_loss_with_stats(leaf, v, labels, backend=backend, **keywords(o))
    # Not to the bit: Triton compiles another kernel for them.
    torch.testing.assert_close(loss, our_loss(z, v, labels, o, backend))
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), leaf)[0], our_result(z, v, labels, o, backend)[1]
    )
    assert isinstance(stats, kd.KDStats)
    for name in ("soft", "hard", "student_entropy", "teacher_entropy", "agreement", "accuracy", "counted"):
        figure = getattr(stats, name)
        assert figure.shape == () and not figure.requires_grad, name

    exact = truth(z, v, labels, o)
    denominator = 1 if reduction == "sum" else 5
    assert_close_fp64(stats.soft.double(), exact.soft.sum() / denominator)
    assert_close_fp64(stats.hard.double(), exact.hard.sum() / denominator)
    if not weighted and reduction != "none":
        assert_close_fp64(loss.detach(), 0.7 * stats.soft + 0.5 * stats.hard)
    for entropy, x in ((stats.student_entropy, z), (stats.teacher_entropy, v)):
        assert_close_fp64(
            entropy.double(), torch.distributions.Categorical(logits=x[mask] / T).entropy().mean()
        )
    labelled = mask & (labels != -100)
    assert_close_fp64(stats.agreement.double(), (z.argmax(-1) == v.argmax(-1))[mask].double().mean())
    assert_close_fp64(stats.accuracy.double(), (z.argmax(-1) == labels)[labelled].double().mean())
    assert stats.counted.item() == 5


def test_stats_of_questions(backend: str) -> None:
    """Of binary classes: entropies summed over them, agreement and accuracy the share of answers."""
    T = 2.0
    (z, v), labels = pair(5, 9, dtype=torch.float64), torch.rand(5, 9).double()
    mask = torch.tensor([True, True, False, True, True])
    v[0] = z[0] * 0.5
    z[3, 4], v[3, 5] = 400.0, -400.0
    o = Options(kd.BinaryKL(), temperature=T, hard_weight=0.5, mask=mask)
    _, stats = kd.kd_loss_with_stats(z, v, labels, backend=backend, **keywords(o))
    exact = truth(z, v, labels, o)
    assert_close_fp64(stats.soft.double(), exact.soft.sum() / 4)
    assert_close_fp64(stats.hard.double(), exact.hard.sum() / 4)
    for entropy, x in ((stats.student_entropy, z), (stats.teacher_entropy, v)):
        p, not_p = (x[mask] / T).sigmoid(), (-x[mask] / T).sigmoid()
        expected = -(torch.xlogy(p, p) + torch.xlogy(not_p, not_p)).sum(-1).mean()
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-10, atol=1e-14)
    assert_close_fp64(stats.agreement.double(), ((z > 0) == (v > 0))[mask].double().mean())
    assert_close_fp64(stats.accuracy.double(), ((z > 0) == (labels > 0.5))[mask].double().mean())
    assert stats.counted.item() == 4


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if not Options(d).binary])
def test_stats_of_every_divergence(backend: str, divergence: Any) -> None:
    """The soft figure is the divergence, with noise and without; the others don't depend on it."""
    (z, v), labels = pair(6, 9, dtype=torch.float64), torch.tensor([1, -100, 3, 4, 5, 0])
    noise = kd.LogitNoise(0.5, "multiplicative", seed=2)
    for o in (
        Options(divergence, temperature=2.0, hard_weight=0.5),
        Options(divergence, temperature=2.0, hard_weight=0.5, student_noise=noise, teacher_noise=noise),
    ):
        loss, stats = kd.kd_loss_with_stats(z, v, labels, backend=backend, **keywords(o))
        exact = truth(z, v, labels, o)
        assert_close_fp64(loss.double(), exact.loss)
        assert_close_fp64(stats.soft.double(), exact.soft.sum() / 5)
        assert_close_fp64(stats.hard.double(), exact.hard.sum() / 5)
        _, plain = kd.kd_loss_with_stats(z, v, labels, backend=backend, **keywords(o.but(divergence=0.5)))
        for name in ("student_entropy", "teacher_entropy", "agreement", "accuracy", "counted"):
            assert_close_fp64(getattr(stats, name).double(), getattr(plain, name).double())


def test_stats_without_labels_or_rows(backend: str) -> None:
    """No label, or no row: figures are 0, never NaN."""
    z, v = pair(3, 9, dtype=torch.float64)
    _, stats = kd.kd_loss_with_stats(z, v, backend=backend)
    assert stats.hard.item() == 0 and stats.accuracy.item() == 0 and stats.counted.item() == 3
    _, stats = kd.kd_loss_with_stats(z, v, mask=torch.zeros(3).bool(), backend=backend)
    assert [float(x) for x in vars(stats).values()] == [0.0] * 7


def test_stats_keep_infinite_classes_finite(backend: str) -> None:
    """Entropies are of the distribution: a class at -inf has p log p = 0. fp32 stays near fp64."""
    z, v = pair(3, 40, dtype=torch.float64)
    z[:, 3:20] = v[:, 3:20] = -inf
    _, exact = kd.kd_loss_with_stats(z, v, temperature=2.0, backend="reference")
    _, stats = kd.kd_loss_with_stats(z.float(), v.float(), temperature=2.0, backend=backend)
    kept = torch.cat([z[:, :3], z[:, 20:]], -1)
    expected = torch.distributions.Categorical(logits=kept / 2).entropy().mean()
    assert_close_fp64(exact.student_entropy.double(), expected)
    assert abs(stats.student_entropy.item() - expected.item()) < 1e-5


# On a GPU, beside all tests of `backend="triton"`


def on_gpu(rows: tuple[int, ...], vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels."""
    given = (*pair(*rows, vocab, dtype=dtype), labelled(rows, vocab))
    return tuple(x.to("cuda") for x in given)  # type: ignore[return-value]


@pytest.mark.gpu
def test_none_picks_the_preferred_one_on_a_gpu() -> None:
    """And has nothing to warn of."""
    z, v, labels = on_gpu((6,), 300, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = kd.explain(z, v)
        assert chosen.backend == next(name for name in tuning.GPU_ORDER if chosen.reasons[name] is None)
        loss = kd.kd_loss(z, v, labels, hard_weight=0.5)
    assert torch.equal(loss, kd.kd_loss(z, v, labels, hard_weight=0.5, backend=chosen.backend))


@pytest.mark.gpu
@pytest.mark.parametrize("o", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_without_a_default_device(name: str, dtype: torch.dtype, o: Options) -> None:
    """Where the default device is the GPU, as in other tests, a tensor made on no device in particular is
    right by luck."""
    z, v, labels = on_gpu((3, 5), 131, dtype)
    mask, weights = torch.rand(3, 5).to("cuda") < 0.8, torch.rand(3, 5).to("cuda")
    counts = [3, torch.tensor(3), torch.tensor(3.0).to("cuda")] if o.reduction == "mean" else []
    for changes in ({}, {"mask": mask}, {"token_weights": weights}, *({"num_items": n} for n in counts)):
        check(z, v, labels, o.but(divergence=0.5, **changes), backend=name)
    loss, stats = kd.kd_loss_with_stats(z, v, labels, backend=name, **keywords(o.but(mask=mask)))
    assert all(x.device == z.device for x in (loss, *vars(stats).values()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_gpu(dtype: torch.dtype, masked: bool) -> None:
    """A call that looks at a label, or at how many there are, stops every step until the GPU is done."""
    z, v, labels = on_gpu((6,), 300, dtype)
    z.requires_grad_()
    weights = torch.rand(6).to("cuda")
    mask, count = (labels != -100, torch.tensor(7).to("cuda")) if masked else (None, None)
    o = Options(0.5, hard_weight=0.5, token_weights=weights, mask=mask, num_items=count)

    def step() -> None:
        loss, _ = kd.kd_loss_with_stats(z, v, labels, backend="triton", **keywords(o))
        loss.backward()

    step()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_stream_of_the_caller(dtype: torch.dtype) -> None:
    """A kernel on another stream reads logits that are still to be written."""
    z, v, labels = on_gpu((6,), 300, dtype)
    o = Options(0.5, hard_weight=0.5)
    expected = our_result(z, v, labels, o, "triton")
    late, stream = torch.zeros_like(z), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clock cycles: a tenth of a second
        late.copy_(z)
        loss, grad = our_result(late, v, labels, o, "triton")
    stream.synchronize()
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_run_on_a_gpu(divergence: Any, dtype: torch.dtype) -> None:
    """Programs finish in any order, and nothing depends on it."""
    z, v, labels = on_gpu((300,), 5000, dtype)
    for reduction, backend in itertools.product(("mean", "sum", "none"), ("triton", "cuda")):
        o = Options(divergence, temperature=2.0, hard_weight=0.5, reduction=reduction)
        targets, o = fitting(z, labels, o)
        if kd.explain(z, v, targets, **keywords(o)).reasons[backend] is not None:
            continue
        runs = []
        for _ in range(3):
            _, stats = kd.kd_loss_with_stats(z, v, targets, backend=backend, **keywords(o))
            runs.append((*our_result(z, v, targets, o, backend), *vars(stats).values()))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
