"""The gradient's life: upstream factors, kept graphs, memory that dies, fp16 under a loss scale, second
order, threads."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from conftest import fused
from tolerances import (
    DIVERGENCES,
    DTYPES,
    SOFTMAX,
    assert_within_budget,
    check,
    keywords,
    our_loss,
    our_result,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from truth import Options, truth

import kdkernels as kd
from kdkernels.autograd import KDFunction

USUAL = Options(0.5, temperature=2.0, hard_weight=0.5)


def logits(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape)).to(dtype).requires_grad_(requires_grad)


def labels_for(rows: int, vocab: int) -> Tensor:
    """Labels, the first ignored."""
    labels = torch.randint(vocab, (rows,))
    labels[0] = -100
    return labels


# Upstream gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [3.0, 0.0, -1.0, 1.0])
def test_upstream_factor(backend: str, dtype: torch.dtype, factor: float) -> None:
    """A backward that takes its upstream gradient for 1 trains with the wrong weight and never says so."""
    z, v, labels = (
        logits(5, 70, dtype=dtype, requires_grad=True),
        logits(5, 70, dtype=dtype),
        labels_for(5, 70),
    )
    loss = our_loss(z, v, labels, USUAL, backend)
    (loss * factor).backward()
    assert z.grad is not None
    up = torch.tensor(factor)
    if dtype == torch.bfloat16 and factor == 3.0:  # rounded in forward, and again by the factor
        exact = truth(z, v, labels, USUAL, up).grad
        torch.testing.assert_close(z.grad.double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-9)
    else:
        assert_within_budget((loss.detach(), z.grad), z, v, labels, USUAL, up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stride_zero_upstream(backend: str, dtype: torch.dtype) -> None:
    """`.sum().backward()` on "none" hands a stride-0 upstream; scaling all rows by grad_output[0] hides
    behind it."""
    z, v, labels = (
        logits(5, 70, dtype=dtype, requires_grad=True),
        logits(5, 70, dtype=dtype),
        labels_for(5, 70),
    )
    loss = our_loss(z, v, labels, USUAL.but(reduction="none"), backend)
    loss.sum().backward()
    assert z.grad is not None
    assert_within_budget((loss.detach(), z.grad), z, v, labels, USUAL.but(reduction="none"))


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_upstream_per_row(backend: str, shape: tuple[int, ...]) -> None:
    """Each row its own factor, zeros and signs too."""
    z, v = logits(*shape, 70), logits(*shape, 70)
    up = torch.tensor([0.5, 0.0, -2.0, 1.0, 8.0, 0.25]).view(shape)
    for o in (USUAL.but(reduction="none", hard_weight=0.0), Options(reduction="none")):
        check(z, v, None, o, backend=backend, upstream=up)
    if len(shape) == 2:
        check(z, v, None, Options(reduction="none"), backend=backend, upstream=up.t().contiguous().t())


def test_nan_upstream_stays_in_its_row(backend: str) -> None:
    """One row's NaN factor; the others keep their gradient, and a masked row its 0."""
    z, v, mask = logits(4, 30, requires_grad=True), logits(4, 30), torch.tensor([True, True, False, True])
    loss = kd.kd_loss(z, v, mask=mask, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss, z, torch.tensor([1.0, torch.nan, torch.nan, 1.0]))
    assert grad[1].isnan().all() and (grad[2] == 0).all() and grad[[0, 3]].isfinite().all()


# Kept graphs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_gives_the_same(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """A saved gradient scaled in place is wrong the second time: each of three passes has its own factor."""
    z, v = logits(5, 70, dtype=dtype, requires_grad=True), logits(5, 70, dtype=dtype)
    loss = our_loss(z, v, None, USUAL.but(reduction=reduction, hard_weight=0.0), backend).sum()
    if (
        dtype == torch.float16
    ):  # clear of the subnormals, where four times a rounded number is not the rounded fourfold
        loss = 1024 * loss
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (fourfold,) = torch.autograd.grad(4 * loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(second, kept) and torch.equal(fourfold, 4 * kept)
    first.zero_()
    second.fill_(7.0)
    (last,) = torch.autograd.grad(2 * loss, z)
    assert torch.equal(last, 2 * kept)
    assert torch.equal(fourfold, 4 * kept)


def test_the_gradient_belongs_to_the_caller(backend: str) -> None:
    """`z.grad` zeroed in place between two backwards must not zero what the graph saved."""
    z, v = logits(5, 70, requires_grad=True), logits(5, 70)
    loss = kd.kd_loss(z, v, backend=backend)
    loss.backward(retain_graph=True)
    assert z.grad is not None
    expected = z.grad.clone()
    z.grad.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(z.grad, expected)
    loss.backward()
    assert torch.equal(z.grad, 2 * expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_through_a_freed_graph_raises(backend: str, dtype: torch.dtype) -> None:
    """torch's own error, not a second, scaled gradient."""
    z, v = logits(5, 70, dtype=dtype, requires_grad=True), logits(5, 70, dtype=dtype)
    loss = kd.kd_loss(z, v, backend=backend)
    (3 * loss).backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_changed_before_backward(backend: str, dtype: torch.dtype) -> None:
    """The gradient of what was computed, or autograd's error. Never that of other logits."""
    leaf, v, noise = (
        logits(5, 70, dtype=dtype, requires_grad=True),
        logits(5, 70, dtype=dtype),
        logits(5, 70, dtype=dtype),
    )
    z = leaf + noise
    (expected,) = torch.autograd.grad(kd.kd_loss(z, v, backend=backend), leaf)
    z = leaf + noise
    loss = kd.kd_loss(z, v, backend=backend)
    with torch.no_grad():
        z.zero_()
        v.zero_()
    try:
        (grad,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(grad, expected)


# Memory


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_can_die_after_forward(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """The fused loss keeps one gradient and neither side's logits: their memory is gone before backward."""
    leaf, v = logits(5, 70, dtype=dtype, requires_grad=True), logits(5, 70, dtype=dtype)
    z = leaf * 1.0
    o = USUAL.but(reduction=reduction, hard_weight=0.0)
    expected = our_result(z.detach(), v, None, o, backend)[1]
    storages = [StorageWeakRef(x.untyped_storage()) for x in (z, v)]
    loss = our_loss(z, v, None, o, backend)
    del z, v
    gc.collect()
    assert [s.expired() for s in storages] == [True, True]
    loss.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_only_one_gradient_is_saved(backend: str, dtype: torch.dtype) -> None:
    """Eager saves about eight tensors of [N, V]."""
    saved: list[Tensor] = []
    z, v, labels = (
        logits(50, 70, dtype=dtype, requires_grad=True),
        logits(50, 70, dtype=dtype),
        labels_for(50, 70),
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = our_loss(z, v, labels, USUAL, backend)
    assert sum(t.numel() * t.element_size() for t in saved) <= z.numel() * z.element_size() + 50 * 64
    loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_callers_tensors_are_never_written(backend: str, dtype: torch.dtype) -> None:
    """A gradient written over the logits breaks what else uses them; version counters don't always tell."""
    z, v, labels = (
        logits(5, 70, dtype=dtype, requires_grad=True),
        logits(5, 70, dtype=dtype),
        labels_for(5, 70),
    )
    mask, weights, count, up = torch.rand(5) < 0.8, torch.rand(5), torch.tensor(3.0), torch.randn(5)
    given = [z, v, labels, mask, weights, count, up]
    before = [x.detach().clone() for x in given]
    versions = [x._version for x in given]
    for reduction in ("mean", "sum", "none"):
        for pad in (False, True):
            o = USUAL.but(
                mask=mask,
                token_weights=weights,
                reduction=reduction,
                num_items=count if reduction == "mean" else None,
            )
            o = o.but(pad_vocab=pad)
            kd.kd_loss_with_stats(z, v, labels, backend=backend, **keywords(o))
            our_result(z, v, labels, o, backend, up if reduction == "none" else None)
    assert [x._version for x in given] == versions
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now.detach(), then)


def test_tied_and_detached_teacher(backend: str) -> None:
    """`kd_loss(z, z.detach())` shares its memory: a gradient written there would be the teacher of the next
    row."""
    z = logits(5, 70, requires_grad=True)
    before = z.detach().clone()
    loss = kd.kd_loss(z, z.detach(), divergence="reverse_kl", backend=backend)
    loss.backward()
    assert torch.equal(z.detach(), before) and z.grad is not None
    assert abs(loss.item()) < 1e-5 and z.grad.abs().max() < 1e-6
    row = z.detach().flip(0)
    grad = our_result(row.flip(0), row, None, USUAL.but(hard_weight=0.0), backend)[1]
    assert grad.abs().max() > 1e-4


# fp16


@pytest.mark.parametrize(
    ("divergence", "reduction"),
    # A distance of logits has gradients as large as they are, which overflow here.
    [*((d, "mean") for d in (*SOFTMAX, kd.BinaryKL())), ("forward_kl", "none"), (0.5, "none")],
)
def test_fp16_under_a_loss_scale(backend: str, divergence: Any, reduction: str) -> None:
    """Rounded to fp16 before the loss scale arrives, 99.7 % of these gradients are 0.

    At V = 32,000, scale 65,536.
    """
    z, v, labels = (
        logits(4, 32_000, dtype=torch.float16),
        logits(4, 32_000, dtype=torch.float16),
        labels_for(4, 32_000),
    )
    o = Options(divergence, temperature=2.0, hard_weight=0.5, reduction=reduction)
    up = torch.full((4,) if reduction == "none" else (), 65_536.0 if reduction == "mean" else 16_384.0)
    exact = check(z, v, labels, o, backend=backend, upstream=up)
    grad = our_result(z, v, labels, o, backend, up)[1]
    assert grad.dtype == torch.float16
    assert (grad[1:] == 0).double().mean() <= (exact.grad[1:].abs() < 2**-25).double().mean() + 1e-3


def test_fp16_gradients_that_overflow_are_infinite(backend: str) -> None:
    """As autograd's: a scaler sees the inf and lowers its scale. Saturating would hide it."""
    z, v = torch.tensor([[10.0, -10.0]]).half().requires_grad_(), torch.tensor([[-10.0, 10.0]]).half()
    (kd.kd_loss(z, v, backend=backend) * 2.0**17).backward()
    assert z.grad is not None and z.grad.tolist() == [[torch.inf, -torch.inf]]


# Higher order


@pytest.mark.thorough(
    but=lambda backend, divergence, reduction: backend != "triton" or reduction == "none" or divergence == 0.5
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend: str, divergence: Any, reduction: str) -> None:
    """fp64 against central differences, through softcap and scale."""
    z, v, labels = (
        logits(2, 5, dtype=torch.float64, requires_grad=True),
        logits(2, 5, dtype=torch.float64),
        labels_for(2, 5),
    )
    o = USUAL.but(divergence=divergence, reduction=reduction, student_scale=1.5, student_softcap=5.0)
    assert torch.autograd.gradcheck(lambda x: our_loss(x, v, labels, o, backend), z)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_second_order_on_the_reference(divergence: Any) -> None:
    """The reference is differentiable any number of times."""
    z, v, labels = (
        logits(2, 5, dtype=torch.float64, requires_grad=True),
        logits(2, 5, dtype=torch.float64),
        labels_for(2, 5),
    )
    o = USUAL.but(divergence=divergence, student_softcap=5.0)
    assert torch.autograd.gradgradcheck(lambda x: our_loss(x, v, labels, o, "reference"), z)


@fused
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_order_elsewhere_names_the_reference(backend: str, dtype: torch.dtype) -> None:
    """A gradient written by a kernel is a constant to autograd: a penalty on it would silently be one."""
    z, v = logits(3, 7, dtype=dtype, requires_grad=True), logits(3, 7, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"backend=.reference."):
        loss = kd.kd_loss(z, v, backend=backend)
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        grad.float().square().sum().backward()


# Around the call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """A softmax in bf16 is what autocast would make of this; the loss upcasts in its own way, inside and
    outside."""
    z, v, labels = logits(5, 70, dtype=dtype), logits(5, 70, dtype=dtype), labels_for(5, 70)
    loss, grad = our_result(z, v, labels, USUAL, backend)
    with torch.autocast(z.device.type, torch.bfloat16):
        inside = z.clone().requires_grad_()
        inside_loss = our_loss(inside, v, labels, USUAL, backend)
    inside_loss.backward()
    assert inside_loss.dtype == torch.float32 and torch.equal(inside_loss, loss)
    assert inside.grad is not None and torch.equal(inside.grad, grad)


def test_autocast_logits_of_a_model(backend: str) -> None:
    """bf16 logits out of an autocast linear layer, fp32 parameters below."""
    head, x, v = torch.nn.Linear(8, 70), torch.randn(5, 8), logits(5, 70)
    with torch.autocast(v.device.type, torch.bfloat16):
        z = head(x)
        loss = kd.kd_loss(z, v, temperature=2.0, backend=backend)
    loss.backward()
    assert (
        z.dtype == torch.bfloat16 and head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    )
    assert head.weight.grad.abs().sum() > 0


def test_teacher_that_requires_grad(backend: str) -> None:
    """Learning both together is written on purpose; otherwise a teacher left attached is an error, not a
    leak."""
    z, v = logits(5, 70, requires_grad=True), logits(5, 70, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"(?s)teacher.*(detach|no_grad).*ignore|teacher.*ignore.*(detach|no_grad)"
    ):
        kd.kd_loss(z, v, backend=backend)
    with pytest.raises(ValueError, match="teacher"):
        kd.kd_loss(z, kd.Logits(v * 1.0, softcap=5.0), backend=backend)
    loss = kd.kd_loss(z, v * 1.0, teacher_requires_grad="ignore", backend=backend)
    loss.backward()
    assert v.grad is None and z.grad is not None
    assert torch.equal(z.grad, our_result(z.detach(), v.detach(), None, Options(), backend)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_gradients(backend: str, dtype: torch.dtype) -> None:
    """no_grad, inference_mode, or a student that needs none: the same loss, no graph."""
    z, v = logits(5, 70, dtype=dtype, requires_grad=True), logits(5, 70, dtype=dtype)
    expected = kd.kd_loss(z, v, backend=backend)
    assert expected.requires_grad
    with torch.no_grad():
        quiet = kd.kd_loss(z, v, backend=backend)
    with torch.inference_mode():
        inference = kd.kd_loss(z, v, backend=backend)
        inner = kd.kd_loss(z * 1.0, v * 1.0, backend=backend)
    frozen = kd.kd_loss(z.detach(), v, backend=backend)
    for loss in (quiet, inference, inner, frozen):
        assert not loss.requires_grad and torch.equal(loss, expected.detach())


def test_teacher_from_inference_mode(backend: str) -> None:
    """Teachers run under inference_mode in many loops; their logits must not stop the student's gradient."""
    with torch.inference_mode():
        v = logits(5, 70)
    for dtype in (torch.float32, torch.float16):
        z = logits(5, 70, dtype=dtype, requires_grad=True)
        with torch.inference_mode():
            teacher = v.to(dtype)
        kd.kd_loss(z, teacher, backend=backend).backward()
        assert z.grad is not None and z.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend: str, dtype: torch.dtype, reentrant: bool) -> None:
    """Forward runs twice, backward once."""
    leaf, v = logits(5, 70, dtype=dtype, requires_grad=True), logits(5, 70, dtype=dtype)

    def step(x: Tensor) -> Tensor:
        return our_loss(x * 1.5, v, None, USUAL.but(hard_weight=0.0), backend)

    (plain,) = torch.autograd.grad(step(leaf), leaf)
    checkpoint(step, leaf, use_reentrant=reentrant).backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, plain)


def test_gradients_add_up_over_losses(backend: str) -> None:
    """Two losses of one student, as for two teachers."""
    z, v, w = logits(5, 70, requires_grad=True), logits(5, 70), logits(5, 70)
    (
        2 * kd.kd_loss(z, v, backend=backend) + kd.kd_loss(z, w, divergence="reverse_kl", backend=backend)
    ).backward()
    parts = [
        our_result(z.detach(), x, None, Options(d), backend)[1]
        for x, d in ((v, "forward_kl"), (w, "reverse_kl"))
    ]
    torch.testing.assert_close(z.grad, 2 * parts[0] + parts[1], rtol=1e-6, atol=1e-8)


@fused
def test_the_function_is_public(backend: str) -> None:
    """`kdkernels.autograd.KDFunction` is what eager calls use, by that name in the graph."""
    assert issubclass(KDFunction, torch.autograd.Function)
    loss = kd.kd_loss(logits(2, 5, requires_grad=True), logits(2, 5), backend=backend)
    assert loss.grad_fn is not None and "KDFunction" in loss.grad_fn.name()


# Forward mode


@fused
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused_and_never_dropped(backend: str, requires_grad: bool) -> None:
    """A tangent that is lost is a derivative of 0 that nobody asked for; the reference carries it."""
    z, v, tangent = logits(3, 10), logits(3, 10), logits(3, 10)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z.requires_grad_(requires_grad), tangent)
        with pytest.raises(RuntimeError, match=r'forward-mode.*backend="reference"'):
            kd.kd_loss(dual, v, backend=backend)
        carried = forward_ad.unpack_dual(kd.kd_loss(dual, v, backend="reference")).tangent
        assert carried is not None
    leaf = z.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd.kd_loss(leaf, v, backend=backend), leaf)
    torch.testing.assert_close(carried.detach(), (gradient * tangent).sum())


def test_a_loss_of_each_row_may_be_written_to(backend: str) -> None:
    """It is a tensor of its own, not a view of the backend's memory."""
    z, v = logits(4, 10, requires_grad=True), logits(4, 10)
    for stats in (False, True):
        if stats:
            loss, _ = kd.kd_loss_with_stats(z, v, reduction="none", backend=backend)
        else:
            loss = kd.kd_loss(z, v, reduction="none", backend=backend)
        loss.mul_(2.0)
        expected = kd.kd_loss(z, v, backend=backend) * 8
        torch.testing.assert_close(loss.sum(), expected)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), z)[0], torch.autograd.grad(expected, z)[0])
