"""Hypothesis: any shape, strides, dtypes, labels, masks, weights and options within the error budget."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from math import inf, prod
from typing import Any

import pytest
import torch
from conftest import interpreted
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import Problem, drawn, problems
from tolerances import (
    DIVERGENCES,
    DTYPES,
    RAW,
    assert_within_budget,
    check,
    computing_dtype,
    fitting,
    keywords,
    our_loss,
    our_result,
)
from torch import Tensor
from truth import Options, truth

import kdkernels as kd


def once_rounded(p: Problem) -> bool:
    """Whether the gradient is rounded to its dtype once: an upstream factor after the rounding rounds again.

    float16 is rounded after the factor, and a dtype that is computed in is not rounded at all.
    """
    in_full = p.z.dtype in (torch.float16, computing_dtype(*p.dtypes))
    return in_full or p.upstream is None


def assert_right(backend: str, p: Problem) -> None:
    """Loss and gradient within their budgets, and what is rounded twice within that."""
    loss, grad = our_result(p.z, p.v, p.labels, p.o, backend, p.upstream)
    if once_rounded(p):
        assert_within_budget((loss, grad), p.z, p.v, p.labels, p.o, p.upstream)
        return
    plain = our_result(p.z, p.v, p.labels, p.o, backend)
    assert_within_budget((loss, plain[1]), p.z, p.v, p.labels, p.o)
    exact = truth(p.z, p.v, *fitting(p.z, p.labels, p.o), p.upstream)
    room = torch.finfo(p.z.dtype).eps * exact.grad.abs() + 8e-7 * exact.grad_unit + 1e-37
    assert ((grad.double() - exact.grad).abs() <= 1.01 * room).all()


@given(problems())
def test_any_problem_is_within_the_budget(backend: str, p: Problem) -> None:
    """Everything at once, where the pieces alone are right and their product isn't."""
    assert_right(backend, p)


# What loops write over classes that must not be produced. In bfloat16's own numbers, which float32 has, too.
FILLS = (-inf, torch.tensor(-1e30).bfloat16().item(), torch.finfo(torch.bfloat16).min)


# Interpreted rows of one block are in test_semantics.py, and whether rows are independent further below.
@pytest.mark.thorough(but=lambda backend: backend != "triton")
@given(problems(dtypes=(torch.float32, torch.bfloat16)), st.data())
def test_hidden_classes_anywhere(backend: str, p: Problem, data: st.DataObject) -> None:
    """Classes hidden on both sides, in any pattern that leaves one: never NaN.

    A softcap would lift them, so none here. Of what a number hides, multiplicative noise may turn the sign,
    logits differ by as much as it is large, and powers of nothing are infinite.
    """
    fill = data.draw(st.sampled_from(FILLS))
    o = p.o.but(student_softcap=None, teacher_softcap=None, hard_weight=0.0)
    if fill != -inf:
        assume(o.row[0] not in RAW and (o.row[0] != "alpha_beta" or min(o.row[1]) > 0))
        o = o.but(student_noise=None, teacher_noise=None)
    smaller, shape = p.classes, (*p.z.shape[:-1], p.classes)
    if data.draw(st.booleans()):
        first = data.draw(st.integers(0, smaller - 1))
        gone = (
            torch.arange(smaller).expand(shape) >= first
            if data.draw(st.booleans())
            else (torch.arange(smaller).expand(shape) < first)
        )
        gone = gone.clone()
    else:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        gone = drawn(torch.rand, shape, generator=generator) < data.draw(st.sampled_from([0.1, 0.5, 0.95]))
    gone[..., data.draw(st.integers(0, smaller - 1))] = False
    z, v = p.z.clone(), p.each(torch.clone)
    for side in (z, *([v] if isinstance(v, Tensor) else v)):
        side[..., :smaller][gone] = fill
    exact = check(z, v, p.labels, o, backend=backend)
    assert exact.loss.isfinite().all() and exact.grad.isfinite().all()
    _, grad = our_result(z, v, p.labels, o, backend)
    assert (grad[..., :smaller][gone] == 0).all()


@pytest.mark.thorough(but=lambda backend: backend != "triton")
@given(problems())
def test_rows_are_independent(backend: str, p: Problem) -> None:
    """`none` row by row is `none` at once, the sum of `none` is `sum`, `mean` is that over what counts."""
    o = p.o.but(reduction="none", num_items=None)
    rows = our_loss(p.z, p.v, p.labels, o, backend)
    total = our_loss(p.z, p.v, p.labels, o.but(reduction="sum"), backend)
    size = rows.double().abs().sum() * 1e-6 + 1e-30
    assert (total.double() - rows.double().sum()).abs() <= size
    counted = truth(p.z, p.v, *fitting(p.z, p.labels, o)).counted.sum().clamp(min=1)
    mean = our_loss(p.z, p.v, p.labels, o.but(reduction="mean"), backend)
    assert (mean.double() - rows.double().sum() / counted).abs() <= size / counted
    if prod(rows.shape):
        flat_z, flat_v = p.z.reshape(-1, p.z.shape[-1]), p.each(lambda v: v.reshape(-1, v.shape[-1]))
        labels = None if p.labels is None else p.labels.reshape(-1)
        per_row = {name: getattr(o, name) for name in ("mask", "token_weights")}
        flat = o.but(**{name: None if x is None else x.reshape(-1) for name, x in per_row.items()})
        if isinstance(o.weights, Tensor) and o.weights.dim() > 1:
            flat = flat.but(weights=o.weights.reshape(-1, o.weights.shape[-1]))
        whole = our_loss(flat_z, flat_v, labels, flat, backend)
        torch.testing.assert_close(whole.view_as(rows), rows, rtol=1e-5, atol=1e-6 * float(rows.abs().max()))


@given(problems(dtypes=(torch.float64,)), st.floats(-100, 100))
def test_adding_a_constant_to_a_row_changes_nothing(backend: str, p: Problem, shift: float) -> None:
    """Softmax doesn't see it; a kernel that forgot to subtract the maximum does.

    Softcaps and factors of a logit see it too, so none here.
    """
    assume(p.o.row[0] not in RAW)
    o = p.o.but(student_softcap=None, teacher_softcap=None, student_noise=None, teacher_noise=None)
    loss, grad = our_result(p.z, p.v, p.labels, o, backend)
    moved, moved_grad = our_result(p.z + shift, p.each(lambda v: v - shift), p.labels, o, backend)
    exact = truth(p.z, p.v, *fitting(p.z, p.labels, o))
    room = 1e-13 * (1 + 10 * abs(shift) / o.temperature + 10 * abs(shift))
    assert ((loss - moved).abs() <= room * exact.loss_unit + 1e-300).all()
    assert ((grad - moved_grad).abs() <= room * exact.grad_unit + 1e-300).all()


@given(problems(dtypes=(torch.float64,)))
def test_gradients_of_a_row_sum_to_zero(backend: str, p: Problem) -> None:
    """A softmax has no opinion on the sum of its logits, whatever the divergence and whatever the label."""
    assume(p.o.row[0] not in RAW)
    o = p.o.but(student_softcap=None, student_noise=None)
    _, grad = our_result(p.z, p.v, p.labels, o, backend)
    exact = truth(p.z, p.v, *fitting(p.z, p.labels, o))
    assert (grad.sum(-1).abs() <= 1e-14 * exact.grad_unit.sum(-1) + 1e-300).all()


def assert_not_negative(backend: str, p: Problem) -> None:
    """No more than the rounding of the divergence's terms below zero."""
    o = Options(
        p.o.divergence, p.o.temperature, reduction="none", pad_vocab=p.o.pad_vocab, weights=p.o.weights
    )
    loss = our_loss(p.z, p.v, None, o, backend)
    room = torch.finfo(torch.float32).eps * truth(p.z, p.v, *fitting(p.z, None, o)).loss_unit
    assert (loss.double() >= -4 * room).all()


@given(problems(dtypes=(torch.float32, torch.bfloat16)))
def test_divergences_are_not_negative(backend: str, p: Problem) -> None:
    """A KL below zero is a truncated one, or a cancelled one."""
    assert_not_negative(backend, p)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_of_a_certain_class_is_not_negative(backend: str, divergence: Any) -> None:
    """Nor is it where there is nothing to compare."""
    certain = torch.zeros(2, 1)
    assert_not_negative(backend, Problem(certain, certain.clone(), None, Options(divergence), None))


# The same bits

USUAL = Options(0.5, temperature=2.0, hard_weight=0.5)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_run_and_thread_count(divergence: Any, dtype: torch.dtype) -> None:
    """Row losses are summed by a fixed tree: neither threads nor runs change a bit, figures too."""
    z, v, labels = logits(300, 257, dtype=dtype), logits(300, 257, dtype=dtype), torch.randint(257, (300,))
    noise = kd.LogitNoise(0.3, "multiplicative", probability=0.7, seed=5)
    plain = [USUAL.but(divergence=divergence, reduction=reduction) for reduction in ("mean", "sum", "none")]
    for usual in (*plain, plain[0].but(student_noise=noise, teacher_noise=noise)):
        y, o = fitting(z, labels, usual)
        results: list[Any] = []
        try:
            for threads in (1, 2, 1, 3, 2):
                torch.set_num_threads(threads)
                _, stats = kd.kd_loss_with_stats(z, v, y, backend="cpu", **keywords(o))
                results.append((*our_result(z, v, labels, o, "cpu"), *vars(stats).values()))
        finally:
            torch.set_num_threads(2)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    """The same row alone, first, last or strided: the same bits on cpu."""
    z, v = logits(40, 257), logits(40, 257)
    o = USUAL.but(hard_weight=0.0, reduction="none")
    loss, grad = our_result(z, v, None, o, backend)
    for rows in (slice(7, 8), slice(30, 40), slice(0, 40, 3)):
        part, part_grad = our_result(z[rows].clone(), v[rows].clone(), None, o, backend)
        if backend == "cpu":
            assert torch.equal(part, loss[rows]) and torch.equal(part_grad, grad[rows])
        torch.testing.assert_close(part, loss[rows], rtol=1e-5, atol=1e-6)


def test_several_python_threads_at_once(backend: str) -> None:
    """No shared scratch: each thread gets what it would get alone."""
    rows, times = (1, 2) if interpreted(backend) else (20, 20)
    problems = []
    for i, d in enumerate(DIVERGENCES):
        z, v = logits(rows + i, 300), logits(rows + i, 300)
        problems.append((z, v, Options(d, temperature=1.0 + i)))
    alone = [our_result(z, v, None, o, backend) for z, v, o in problems]
    together = threading.Barrier(len(problems))

    def work(z: Tensor, v: Tensor, o: Options) -> list[tuple[Tensor, Tensor]]:
        together.wait()
        return [our_result(z, v, None, o, backend) for _ in range(times)]

    with ThreadPoolExecutor(len(problems)) as pool:
        threads = [pool.submit(work, *problem) for problem in problems]
    for (loss, grad), thread in zip(alone, threads, strict=True):
        for other, other_grad in thread.result():
            assert torch.equal(loss, other) and torch.equal(grad, other_grad)
