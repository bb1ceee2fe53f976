"""The error budget: |ours - truth| <= |eager in the same dtype - truth| + small, element by element.

*eager* is what a careful user writes: logits cast to fp32 (fp64 stays), `log_softmax`, the divergence from
logs, autograd. *small* is `UNITS` roundings in the computing dtype, each as large as the truth's own
magnitudes allow it to be (`Truth.loss_unit`, `Truth.grad_unit`: the exponent of a probability is rounded
relative to its logit, so that the probability moves by eps * |logit|, and a tree sum over V classes rounds
log2(V) times), and half a unit in the last place of the dtype that the result is rounded to, once.
"""

from __future__ import annotations

from dataclasses import fields
from math import log, log1p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from truth import Options, Truth, truth

import kdkernels as kd

# torch's own spellings, eager and closed-form, err by up to 3.1 units in fp32 (V from 2 to 128,256, logits of
# std 1 to 30).
UNITS = 4.0

DIVERGENCES: tuple[str | float, ...] = ("forward_kl", "soft_cross_entropy", "reverse_kl", 0.5, 0.1, 0.9)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def computing_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any side is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def eager_divergence(divergence: str | float, lq: Tensor, lp: Tensor) -> Tensor:
    """One value a row, as users of `F.kl_div` write it."""
    if divergence == "forward_kl":
        return F.kl_div(lq, lp, reduction="none", log_target=True).sum(-1)
    if divergence == "soft_cross_entropy":
        return -(lp.exp() * lq).sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(lp, lq, reduction="none", log_target=True).sum(-1)
    assert isinstance(divergence, float)
    lm = torch.logsumexp(torch.stack([lp + log(divergence), lq + log1p(-divergence)]), 0)
    to_teacher = F.kl_div(lm, lp, reduction="none", log_target=True).sum(-1)
    to_student = F.kl_div(lm, lq, reduction="none", log_target=True).sum(-1)
    return divergence * to_teacher + (1 - divergence) * to_student


def eager_logits(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scale, then softcap."""
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def eager(z: Tensor, v: Tensor, labels: Tensor | None = None, o: Options | None = None) -> Tensor:
    """The loss, differentiable in z, in the dtype of the logits but at least fp32."""
    o = o or Options()
    dtype, vocab = computing_dtype(z.dtype, v.dtype), min(z.shape[-1], v.shape[-1])
    x = eager_logits(z[..., :vocab].to(dtype), o.student_scale, o.student_softcap)
    u = eager_logits(v[..., :vocab].to(dtype), o.teacher_scale, o.teacher_softcap).detach()
    lq, lp = F.log_softmax(x / o.temperature, -1), F.log_softmax(u / o.temperature, -1)
    total = (
        o.soft_weight * (o.temperature**2 if o.t_squared else 1.0) * eager_divergence(o.divergence, lq, lp)
    )
    mask = o.mask
    if labels is not None:
        mask = labels != o.ignore_index if mask is None else mask
        wanted = labels.long().masked_fill(~mask, o.ignore_index)
        hard = F.cross_entropy(
            x.reshape(-1, vocab), wanted.reshape(-1), ignore_index=o.ignore_index, reduction="none"
        )
        total = total + o.hard_weight * hard.view_as(total)
    if mask is not None:
        total = torch.where(mask, total, 0.0)
    if o.token_weights is not None:
        total = total * o.token_weights.to(dtype)
    if o.reduction == "none":
        return total
    if o.reduction == "sum":
        return total.sum()
    counted = total.numel() if mask is None else mask.sum().clamp(min=1)
    return total.sum() / (counted if o.num_items is None else o.num_items)


def eager_result(
    z: Tensor, v: Tensor, labels: Tensor | None, o: Options, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The eager loss and its gradient with respect to z."""
    leaf = z.detach().clone().requires_grad_()
    loss = eager(leaf, v.detach(), labels, o)
    (grad,) = torch.autograd.grad(
        loss, leaf, torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    )
    return loss.detach(), grad


def keywords(o: Options) -> dict[str, Any]:
    """The keyword arguments of `kd_loss` that say the same."""
    divergence = kd.JSD(o.divergence) if isinstance(o.divergence, float) else o.divergence
    ours = {f.name: getattr(o, f.name) for f in fields(o) if not f.name.startswith(("student", "teacher"))}
    return {**ours, "divergence": divergence}


def source(z: Tensor, scale: float, softcap: float | None) -> Any:
    """A tensor, or `kd.Logits` where it has something to say."""
    return z if scale == 1.0 and softcap is None else kd.Logits(z, scale=scale, softcap=softcap)


def our_loss(z: Tensor, v: Tensor, labels: Tensor | None, o: Options, backend: str) -> Tensor:
    """`kd.kd_loss` of these options."""
    student = source(z, o.student_scale, o.student_softcap)
    teacher = source(v, o.teacher_scale, o.teacher_softcap)
    return kd.kd_loss(student, teacher, labels, backend=backend, **keywords(o))


def our_result(
    z: Tensor, v: Tensor, labels: Tensor | None, o: Options, backend: str, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`kd.kd_loss` and its gradient with respect to z, which may be a view of anything."""
    student = z if z.requires_grad else z.detach().requires_grad_()
    loss = our_loss(student, v, labels, o, backend)
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


def assert_close(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, unit: Tensor, eps: float) -> None:
    """One tensor within its budget; where the truth is infinite or NaN, so is ours."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    got, rounded = ours.double(), torch.finfo(ours.dtype)
    budget = (theirs.double() - exact).abs().nan_to_num(0.0, 0.0, 0.0)
    # Half of the smallest subnormal is the rounding near zero; exp flushes below the smallest normal of fp32.
    smallest = rounded.smallest_normal * rounded.eps / 2 + torch.finfo(torch.float32).smallest_normal
    budget = budget + UNITS * eps * unit.nan_to_num(0.0, 0.0, 0.0) + rounded.eps / 2 * exact.abs() + smallest
    finite = exact.isfinite()
    wrong = torch.where(
        finite, ~((got - exact).abs() <= budget), ~((got == exact) | (got.isnan() & exact.isnan()))
    )
    if wrong.any():
        over = torch.where(wrong, ((got - exact).abs() / budget).nan_to_num(torch.inf), -1.0)
        at = tuple(int(i) for i in torch.unravel_index(over.argmax(), over.shape))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} outside the budget; worst at {at}: "
            f"got {got[at].item()!r}, truth {exact[at].item()!r}, "
            f"eager {theirs[at].item()!r}, error / budget {over[at].item():.3g}"
        )


def assert_within_budget(
    result: tuple[Tensor, Tensor],
    z: Tensor,
    v: Tensor,
    labels: Tensor | None = None,
    o: Options | None = None,
    upstream: Tensor | None = None,
) -> Truth:
    """(loss, gradient) as `our_result` gives them, against the truth; dtypes too."""
    o = o or Options()
    loss, grad = result
    exact = truth(z, v, labels, o, upstream)
    eager_loss, eager_grad = eager_result(z, v, labels, o, upstream)
    dtype = computing_dtype(z.dtype, v.dtype)
    assert grad.dtype == z.dtype, f"gradient in {grad.dtype}, logits in {z.dtype}"
    if z.dtype == v.dtype:
        assert loss.dtype == dtype, f"loss in {loss.dtype}, computed in {dtype}"
    eps = torch.finfo(dtype).eps
    assert_close("loss", loss, eager_loss, exact.loss, exact.loss_unit, eps)
    assert_close("gradient", grad, eager_grad, exact.grad, exact.grad_unit, eps)
    return exact


def check(
    z: Tensor,
    v: Tensor,
    labels: Tensor | None = None,
    o: Options | None = None,
    *,
    backend: str,
    upstream: Tensor | None = None,
) -> Truth:
    """Run `kd_loss` with these options and hold it to the budget."""
    o = o or Options()
    return assert_within_budget(our_result(z, v, labels, o, backend, upstream), z, v, labels, o, upstream)
