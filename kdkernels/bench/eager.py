"""The loss as users of PyTorch write it, in honest spellings, and its fp64 truth.

Every spelling takes ``(z, v, labels, temperature, hard_weight)`` (student and teacher logits, both ``[N,
V]``) and returns the mean over the rows. All of them upcast to fp32 first, and once: a softmax in bf16 would
be faster and wrong, and logits that are upcast twice have their two gradients added in bf16.

``definition``
    the terms of `TERMS` summed over the classes, for any divergence.

``kl_div``
    ``F.kl_div`` against probabilities (``F.cross_entropy`` for the soft cross-entropy): what most code says.
``log_target``
    ``F.kl_div(..., log_target=True)``: everything in log space, one tensor fewer.
``closed_form``
    a custom ``autograd.Function`` that writes the gradient by hand in forward, in place where it can, and
    scales it out of place in backward, so that a second backward through a kept graph is still right.

``"cross_entropy"`` is no divergence: the labels alone, what is left of a distillation without its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
# The term of each class from log q and log p. Here kd.JSD(0.5), kd.SkewKL(0.1) and kd.SkewReverseKL(0.1).
Terms = Callable[[Tensor, Tensor], Tensor]

LABELS = "cross_entropy"


def _mixed(lq: Tensor, lp: Tensor, of_teacher: float) -> Tensor:
    return torch.logaddexp(lp + math.log(of_teacher), lq + math.log1p(-of_teacher))


def _jsd_terms(lq: Tensor, lp: Tensor) -> Tensor:
    lm = _mixed(lq, lp, 0.5)
    return 0.5 * (lp.exp() * (lp - lm) + lq.exp() * (lq - lm))


TERMS: dict[str, Terms] = {
    "forward_kl": lambda lq, lp: lp.exp() * (lp - lq),
    "soft_cross_entropy": lambda lq, lp: -lp.exp() * lq,
    "reverse_kl": lambda lq, lp: lq.exp() * (lq - lp),
    "jsd": _jsd_terms,
    "skew_kl": lambda lq, lp: lp.exp() * (lp - _mixed(lq, lp, 0.1)),
    "skew_reverse_kl": lambda lq, lp: lq.exp() * (lq - _mixed(lq, lp, 0.9)),
    "tvd": lambda lq, lp: 0.5 * (lq.exp() - lp.exp()).abs(),
    "squared_error": lambda lq, lp: 0.5 * (lq.exp() - lp.exp()) ** 2,
}


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_scaled(logits, temperature), -1)


def _probs(logits: Tensor, temperature: float) -> Tensor:
    return F.softmax(_scaled(logits, temperature), -1)


def _with_hard(soft: Tensor, z: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    if temperature != 1.0:
        soft = soft * temperature**2
    return soft + hard_weight * F.cross_entropy(z, labels) if hard_weight else soft


def forward_kl_kl_div(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """KL(p || q) as ``F.kl_div(log q, p)``."""
    z, v = z.float(), v.float()
    soft = F.kl_div(_log_probs(z, temperature), _probs(v, temperature), reduction="batchmean")
    return _with_hard(soft, z, labels, temperature, hard_weight)


def forward_kl_log_target(
    z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    """KL(p || q) as ``F.kl_div(log q, log p, log_target=True)``."""
    z, v = z.float(), v.float()
    lq, lp = _log_probs(z, temperature), _log_probs(v, temperature)
    soft = F.kl_div(lq, lp, reduction="batchmean", log_target=True)
    return _with_hard(soft, z, labels, temperature, hard_weight)


def reverse_kl_kl_div(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """KL(q || p) as ``F.kl_div(log p, q)``."""
    z, v = z.float(), v.float()
    soft = F.kl_div(_log_probs(v, temperature), _probs(z, temperature), reduction="batchmean")
    return _with_hard(soft, z, labels, temperature, hard_weight)


def reverse_kl_log_target(
    z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    """KL(q || p) as ``F.kl_div(log p, log q, log_target=True)``."""
    z, v = z.float(), v.float()
    lq, lp = _log_probs(z, temperature), _log_probs(v, temperature)
    soft = F.kl_div(lp, lq, reduction="batchmean", log_target=True)
    return _with_hard(soft, z, labels, temperature, hard_weight)


def soft_cross_entropy_kl_div(
    z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    """H(p, q) as ``F.cross_entropy`` with probabilities as its target."""
    z, v = z.float(), v.float()
    soft = F.cross_entropy(_scaled(z, temperature), _probs(v, temperature))
    return _with_hard(soft, z, labels, temperature, hard_weight)


def soft_cross_entropy_log_target(
    z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    """H(p, q) as ``-(p * log q).sum()``, Hinton's formula typed in."""
    z, v = z.float(), v.float()
    soft = -(_probs(v, temperature) * _log_probs(z, temperature)).sum(-1).mean()
    return _with_hard(soft, z, labels, temperature, hard_weight)


def jsd_kl_div(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """JSD(0.5) with the mixture in probability space."""
    z, v = z.float(), v.float()
    p, q = _probs(v, temperature), _probs(z, temperature)
    lm = ((p + q) * 0.5).clamp_min(torch.finfo(torch.float32).tiny).log()
    soft = 0.5 * (F.kl_div(lm, p, reduction="batchmean") + F.kl_div(lm, q, reduction="batchmean"))
    return _with_hard(soft, z, labels, temperature, hard_weight)


def jsd_log_target(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """JSD(0.5) in log space, the mixture by ``logaddexp``."""
    z, v = z.float(), v.float()
    lq, lp = _log_probs(z, temperature), _log_probs(v, temperature)
    lm = torch.logaddexp(lq, lp) - math.log(2)
    soft = 0.5 * (
        F.kl_div(lm, lp, reduction="batchmean", log_target=True)
        + F.kl_div(lm, lq, reduction="batchmean", log_target=True)
    )
    return _with_hard(soft, z, labels, temperature, hard_weight)


def _definition(terms: Terms) -> Loss:
    def loss(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
        z, v = z.float(), v.float()
        soft = terms(_log_probs(z, temperature), _log_probs(v, temperature)).sum(-1).mean()
        return _with_hard(soft, z, labels, temperature, hard_weight)

    return loss


def labels_alone(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """``F.cross_entropy``; the other arguments don't matter."""
    return F.cross_entropy(z.float(), labels)


def _close(
    ctx: Any,
    z: Tensor,
    dtype: torch.dtype,
    labels: Tensor,
    soft: Tensor,
    gradient: Tensor,
    temperature: float,
    hard_weight: float,
) -> Tensor:
    """Adds the hard term, saves the mean's gradient in the logits' dtype and returns the mean of the rows."""
    if temperature != 1.0:
        soft = soft * temperature**2
        gradient.mul_(temperature)
    if hard_weight:
        lq = F.log_softmax(z, -1)
        column = labels[:, None]
        soft = soft - hard_weight * lq.gather(1, column).squeeze(1)
        gradient.add_(lq.exp_(), alpha=hard_weight)
        gradient.scatter_add_(1, column, torch.full_like(column, -hard_weight, dtype=gradient.dtype))
    ctx.save_for_backward(gradient.div_(z.shape[0]).to(dtype))
    return soft.mean()


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


class _ForwardKL(_ClosedForm):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
    ) -> Tensor:
        dtype, z, v = z.dtype, z.float(), v.float()
        lq, lp = _log_probs(z, temperature), _log_probs(v, temperature)
        p = lp.exp()
        rows = lp.sub_(lq).mul_(p).sum(-1)
        return _close(ctx, z, dtype, labels, rows, lq.exp_().sub_(p), temperature, hard_weight)


class _SoftCrossEntropy(_ClosedForm):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
    ) -> Tensor:
        dtype, z, v = z.dtype, z.float(), v.float()
        lq, p = _log_probs(z, temperature), _probs(v, temperature)
        rows = -(lq * p).sum(-1)
        return _close(ctx, z, dtype, labels, rows, lq.exp_().sub_(p), temperature, hard_weight)


class _ReverseKL(_ClosedForm):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
    ) -> Tensor:
        dtype, z, v = z.dtype, z.float(), v.float()
        lq, lp = _log_probs(z, temperature), _log_probs(v, temperature)
        ratio = torch.sub(lq, lp, out=lp)
        q = lq.exp_()
        rows = (q * ratio).sum(-1)
        return _close(
            ctx, z, dtype, labels, rows, ratio.sub_(rows[:, None]).mul_(q), temperature, hard_weight
        )


class _JSD(_ClosedForm):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float
    ) -> Tensor:
        dtype, z, v = z.dtype, z.float(), v.float()
        lq, lp = _log_probs(z, temperature), _log_probs(v, temperature)
        p, q = lp.exp(), lq.exp()
        lm = (p + q).mul_(0.5).clamp_min_(torch.finfo(torch.float32).tiny).log_()
        p_terms = lp.sub_(lm).mul_(p).sum(-1)
        ratio = lq.sub_(lm)
        q_terms = torch.mul(q, ratio, out=lm).sum(-1)
        gradient = ratio.sub_(q_terms[:, None]).mul_(q).mul_(0.5)
        return _close(ctx, z, dtype, labels, 0.5 * (p_terms + q_terms), gradient, temperature, hard_weight)


_WITH_SPELLINGS = ("forward_kl", "reverse_kl", "soft_cross_entropy", "jsd")
SPELLINGS: dict[str, dict[str, Loss]] = {
    "forward_kl": {
        "kl_div": forward_kl_kl_div,
        "log_target": forward_kl_log_target,
        "closed_form": cast(Loss, _ForwardKL.apply),
    },
    "reverse_kl": {
        "kl_div": reverse_kl_kl_div,
        "log_target": reverse_kl_log_target,
        "closed_form": cast(Loss, _ReverseKL.apply),
    },
    "soft_cross_entropy": {
        "kl_div": soft_cross_entropy_kl_div,
        "log_target": soft_cross_entropy_log_target,
        "closed_form": cast(Loss, _SoftCrossEntropy.apply),
    },
    "jsd": {
        "kl_div": jsd_kl_div,
        "log_target": jsd_log_target,
        "closed_form": cast(Loss, _JSD.apply),
    },
    **{name: {"definition": _definition(TERMS[name])} for name in TERMS if name not in _WITH_SPELLINGS},
    LABELS: {"cross_entropy": labels_alone},
}

# What torch.compile is given: what came out fastest on two cores at (256, 32000) in fp32. For forward KL and
# JSD, which the targets name, an autograd spelling (24 ms against 34 for kl_div) and the closed form, which
# Inductor fuses further than autograd's own gradient; for the others the better of the two (busy machine:
# reverse KL 76 ms against 87, soft cross-entropy 51 against 69). JSD also in log space, the form that
# distillation trainers use, since a probability that underflows has no logarithm.
COMPILED: dict[str, tuple[str, ...]] = {
    "forward_kl": ("log_target", "closed_form"),
    "reverse_kl": ("closed_form",),
    "soft_cross_entropy": ("log_target",),
    "jsd": ("log_target", "kl_div", "closed_form"),
    **{name: ("definition",) for name in TERMS if name not in _WITH_SPELLINGS},
    LABELS: ("cross_entropy",),
}


def truth(
    divergence: str,
    z: Tensor,
    v: Tensor,
    labels: Tensor,
    temperature: float,
    hard_weight: float,
    rows: int = 32,
) -> tuple[float, Tensor]:
    """The mean loss and its gradient in fp64, from the definitions and plain autograd, on the CPU.

    Args:
        divergence: A key of `SPELLINGS`.
        z: Student logits `[N, V]`, any dtype; taken as they are (already rounded) and widened.
        v: Teacher logits `[N, V]`, likewise.
        labels: `[N]`, used where `hard_weight` is not 0.
        temperature: T.
        hard_weight: Weight of the cross-entropy at T = 1.
        rows: Rows in memory at once.

    Returns:
        The loss, and the gradient `[N, V]` in fp64 on the CPU.
    """
    total, gradient = 0.0, torch.empty(z.shape, dtype=torch.float64)
    parts = truth_parts(divergence, z, v, labels, temperature, hard_weight, rows, torch.device("cpu"))
    for part, loss, part_gradient in parts:
        gradient[part] = part_gradient
        total += loss.item()
    return total, gradient


def truth_parts(
    divergence: str,
    z: Tensor,
    v: Tensor,
    labels: Tensor,
    temperature: float,
    hard_weight: float,
    rows: int,
    device: torch.device,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """What `truth` puts together, `rows` rows at a time, computed on `device`.

    Yields:
        The rows, what they add to the mean loss (0-d), and their part of its gradient.
    """
    if divergence not in SPELLINGS:
        raise ValueError(f"divergence must be one of {', '.join(SPELLINGS)}, got {divergence!r}")
    count = z.shape[0]
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        wide = z[part].detach().double().to(device).requires_grad_()
        lq = F.log_softmax(wide / temperature, -1)
        lp = F.log_softmax(v[part].detach().double().to(device) / temperature, -1)
        if divergence == LABELS:
            loss, weight = wide.new_zeros(()), 1.0
        else:
            loss, weight = TERMS[divergence](lq, lp).sum() * temperature**2, hard_weight
        if weight:
            loss = loss + weight * F.cross_entropy(wide, labels[part].to(device), reduction="sum")
        loss = loss / count
        (gradient,) = torch.autograd.grad(loss, wide)
        yield part, loss.detach(), gradient
