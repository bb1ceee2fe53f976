"""`kd.Logits` and plain tensors as sources: post-processing, strides, broadcast, unequal vocabularies."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from tolerances import DIVERGENCES, check, our_loss, our_result, source
from torch import Tensor
from truth import Options

import kdkernels as kd


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-12) -> None:
    """Equal but for fp64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14)


# Post-processing


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", 0.5])
def test_scale_and_softcap_reach_both_terms(backend: str, divergence: Any) -> None:
    """A softcap that the fused path ignores is a silently different objective. Chain rule by autograd."""
    z, v, labels = logits(4, 9).requires_grad_(), logits(4, 9), torch.randint(9, (4,))
    o = Options(divergence, temperature=2.0, hard_weight=0.5, student_scale=1.5, student_softcap=3.0)
    ours = our_loss(z, v, labels, o.but(teacher_scale=0.5, teacher_softcap=2.0), backend)
    by_hand = our_loss(
        3.0 * torch.tanh(1.5 * z / 3.0),
        2.0 * torch.tanh(0.5 * v / 2.0),
        labels,
        Options(divergence, 2.0, hard_weight=0.5),
        backend,
    )
    close(ours, by_hand)
    close(*(torch.autograd.grad(loss, z)[0] for loss in (ours, by_hand)), rtol=1e-10)
    check(z.detach(), v, labels, o, backend=backend)
    plain = kd.kd_loss(kd.Logits(z), kd.Logits(v), labels, hard_weight=0.5, backend=backend)
    assert torch.equal(plain, kd.kd_loss(z, v, labels, hard_weight=0.5, backend=backend))


def test_broadcast_teacher(backend: str) -> None:
    """Stride 0: one teacher row for a whole batch, read as often as it is needed."""
    z, row = logits(4, 3, 9, dtype=torch.float32), logits(1, 1, 9, dtype=torch.float32)
    o = Options(0.5, temperature=2.0)
    check(z, row.expand(4, 3, 9), None, o, backend=backend)
    ours = our_result(z, row.expand(4, 3, 9), None, o, backend)
    theirs = our_result(z, row.expand(4, 3, 9).contiguous(), None, o, backend)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# `pad_vocab` is about a vocabulary, which questions of their own are not.
@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if not Options(d).binary])
@pytest.mark.parametrize(("student", "teacher"), [(12, 9), (9, 12)])
def test_pad_vocab(backend: str, divergence: Any, student: int, teacher: int) -> None:
    """151,936 against 152,064 is everyday.

    Padding with logit 0 gives the padding real probability: it is dropped.
    """
    for dtype in (torch.float32, torch.bfloat16):
        z, v, labels = (
            logits(4, student, dtype=dtype),
            logits(4, teacher, dtype=dtype),
            torch.tensor([8, 0, -100, 3]),
        )
        o = Options(divergence, temperature=2.0, hard_weight=0.5, pad_vocab=True)
        exact = check(z, v, labels, o, backend=backend)
        assert exact.loss.isfinite()
        loss, grad = our_result(z, v, labels, o, backend)
        cut, cut_grad = our_result(z[:, :9], v[:, :9], labels, o.but(pad_vocab=False), backend)
        if loss.is_cuda:
            # Rows of another length are read in other accesses, and summed in another order.
            close = {"rtol": 16 * torch.finfo(grad.dtype).eps, "atol": 1e-6}
            torch.testing.assert_close(grad[:, :9], cut_grad, **close)
        else:
            assert torch.equal(loss, cut) and torch.equal(grad[:, :9], cut_grad)
        assert grad.shape == z.shape and (grad[:, 9:] == 0).all()
    z[:, 9:] = nan
    v[:, 9:] = nan
    torch.testing.assert_close(
        our_loss(z, v, labels, o, backend), loss, rtol=1e-6 if z.is_cuda else 0, atol=0
    )
    equal = our_loss(z[:, :9], v[:, :9], labels, o, backend)
    assert torch.equal(equal, loss)


def test_sources_and_options_do_not_leak_between_calls(backend: str) -> None:
    """The same call gives the same bits after calls with other options."""
    z, v = logits(3, 40, dtype=torch.float32), logits(3, 40, dtype=torch.float32)
    first = kd.kd_loss(z, v, backend=backend)
    kd.kd_loss(source(z, 2.0, 3.0), source(v, 0.5, 1.0), divergence="jsd", temperature=3.0, backend=backend)
    assert torch.equal(kd.kd_loss(z, v, backend=backend), first)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softcap_saturates_without_nan(backend: str, divergence: Any) -> None:
    """tanh of ±1e4 is ±1 with derivative 0; -inf logits become -softcap, a class like any other."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        z, v = logits(3, 40, dtype=dtype), logits(3, 40, dtype=dtype)
        z[0, 3], z[0, 4], v[1, 5] = 1e4, -1e4, -1e4
        z[2, 6] = v[2, 7] = -torch.inf
        o = Options(divergence, hard_weight=0.5, student_softcap=30.0, teacher_softcap=30.0, reduction="none")
        check(z, v, torch.tensor([3, 4, 6]), o, backend=backend)


def test_scale_alone_and_softcap_alone(backend: str) -> None:
    """Cohere has a scale, Gemma a softcap; a negative infinity stays one under a scale."""
    z, v = logits(3, 40, dtype=torch.float32), logits(3, 40, dtype=torch.float32)
    z[:, 3] = v[:, 3] = -torch.inf
    check(z, v, None, Options(0.5, student_scale=0.0625, teacher_scale=0.25), backend=backend)
    z[:, 3] = v[:, 3] = 0.0
    check(z, v, None, Options(0.5, student_softcap=2.0), backend=backend)
    check(z, v, None, Options(0.5, teacher_softcap=2.0), backend=backend)


# Strides


def layouts(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same shape, each with strides that a training loop really makes."""
    a, b, c = shape
    return {
        "contiguous": logits(a, b, c, dtype=dtype),
        "rows transposed": logits(b, a, c, dtype=dtype).transpose(0, 1),
        "classes first": logits(c, a, b, dtype=dtype).permute(1, 2, 0),
        "shifted": logits(a, b + 1, c, dtype=dtype)[:, :-1],
        "classes cut": logits(a, b, c + 5, dtype=dtype)[..., 2:-3],
        "every other class": logits(a, b, 2 * c, dtype=dtype)[..., ::2],
        "every other row": logits(2 * a, b, c, dtype=dtype)[1::2],
        "broadcast over the batch": logits(b, c, dtype=dtype).expand(a, b, c),
        "broadcast over the sequence": logits(a, 1, c, dtype=dtype).expand(a, b, c),
        "one logit for all classes": logits(a, b, 1, dtype=dtype).expand(a, b, c),
        "odd storage offset": logits(a * b * c + 1, dtype=dtype)[1:].view(a, b, c),
        "as_strided, overlapping": logits(a * b + c, dtype=dtype).as_strided((a, b, c), (b, 1, 1)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", 0.5])
def test_strides(backend: str, divergence: Any, dtype: torch.dtype) -> None:
    """One stride used for both sides, or contiguity assumed, reads the wrong rows and says nothing."""
    shape = (3, 4, 50)
    labels = torch.randint(50, (4, 3)).T.masked_fill(torch.tensor([True, False, False])[:, None], -100)
    weights = torch.rand(3, 8)[:, ::2]
    mask = torch.ones(1, 4).bool().expand(3, 4)
    o = Options(
        divergence, temperature=2.0, hard_weight=0.5, token_weights=weights, mask=mask, reduction="none"
    )
    ours, theirs = layouts(shape, dtype), layouts(shape, dtype)
    names = list(ours)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        try:
            check(ours[name], theirs[other], labels, o, backend=backend)
        except AssertionError as error:
            raise AssertionError(f"student {name!r}, teacher {other!r}: {error}") from error


def test_many_dimensions_that_do_not_collapse(backend: str) -> None:
    """Nine leading dims, each with its own stride, on both sides in another order."""
    z, v = logits(*[2] * 9, 5, dtype=torch.float32), logits(*[2] * 9, 5, dtype=torch.float32)
    z, v = z.permute(*range(8, -1, -1), 9), v.permute(1, 3, 5, 7, 0, 2, 4, 6, 8, 9)
    check(z, v, torch.randint(5, [2] * 9), Options(0.5, hard_weight=0.5, reduction="none"), backend=backend)


def test_strided_small_tensors(backend: str) -> None:
    """Labels, mask, weights and upstream gradient of every stride mean what they mean when contiguous."""
    z, v = logits(3, 4, 9), logits(3, 4, 9)
    labels, mask, weights = (
        torch.randint(9, (4, 3)).T,
        (torch.rand(4, 3) < 0.7).T,
        torch.rand(1, 4).expand(3, 4),
    )
    up = torch.randn(3, 1).expand(3, 4).double()
    o = Options(0.5, hard_weight=0.5, mask=mask, token_weights=weights, reduction="none")
    dense = o.but(mask=mask.contiguous(), token_weights=weights.contiguous())
    loss, grad = our_result(z, v, labels, o, backend, up)
    other, other_grad = our_result(z, v, labels.contiguous(), dense, backend, up.contiguous())
    assert torch.equal(loss, other) and torch.equal(grad, other_grad)


# The object


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("value", [0.0, -1.0, nan, torch.inf])
def test_logits_refuses_what_is_not_a_transformation(name: str, value: float) -> None:
    """A scale of 0 erases the logits, a softcap of 0 divides by it: refused where it is written."""
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        kd.Logits(torch.zeros(2, 3), **{name: value})


@pytest.mark.parametrize("z", [[[0.0, 1.0]], 3.0, None, "logits"], ids=str)
def test_logits_wants_a_tensor(z: object) -> None:
    """Named at the latest when it is used, not an AttributeError three files later."""
    good = torch.zeros(1, 2)
    for name, sides in (("student", (z, good)), ("teacher", (good, z))):
        student, teacher = (kd.Logits(side) for side in sides)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=rf"(?s){name}.*{type(z).__name__}"):
            kd.kd_loss(student, teacher)


def test_logits_moves_and_indexes() -> None:
    """Sources travel in batches: `.to`, rows by index, and as pytrees, with scale and softcap unchanged."""
    z = torch.randn(4, 5, 9)
    held = kd.Logits(z, scale=0.5, softcap=30.0)
    half = held.to(torch.bfloat16)
    assert half.z.dtype == torch.bfloat16 and (half.scale, half.softcap) == (0.5, 30.0)
    part = held[1:3]
    assert torch.equal(part.z, z[1:3]) and (part.scale, part.softcap) == (0.5, 30.0)
    mapped = pytree.tree_map_only(Tensor, lambda t: t + 1, {"teacher": held})["teacher"]
    assert isinstance(mapped, kd.Logits)
    assert torch.equal(mapped.z, z + 1) and (mapped.scale, mapped.softcap) == (0.5, 30.0)


def test_gradient_reaches_through_logits(backend: str) -> None:
    """The student inside `kd.Logits` may be the output of a graph."""
    leaf = logits(3, 9).requires_grad_()
    o = Options(student_scale=2.0, student_softcap=5.0)
    our_loss(leaf * 1.5, logits(3, 9), None, o, backend).backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
