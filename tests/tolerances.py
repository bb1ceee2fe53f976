"""The error budget: |ours - truth| <= |eager in the same dtype - truth| + small, element by element.

*eager* is what a careful user writes: logits cast to fp32 (fp64 stays), `log_softmax`, the divergence from
logs, autograd. *small* is `UNITS` roundings in the computing dtype, each as large as the truth's own
magnitudes allow it to be (`Truth.loss_unit`, `Truth.grad_unit`: the exponent of a probability is rounded
relative to its logit, so that the probability moves by eps * |logit|, and a tree sum over V classes rounds
log2(V) times), and half a unit in the last place of the dtype that the result is rounded to, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import log, log1p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from truth import UNITS, Options, Truth, sampled, truth

import kdkernels as kd

Teacher = Tensor | Sequence[Tensor]

# One of each row of the table, and the ends of JSD.
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", 0.5, 0.1, 0.9, kd.SkewKL(0.1), kd.SkewReverseKL(0.3),
    "tvd", "squared_error", kd.AlphaBeta(0.2, 0.7), kd.DKD(1.0, 8.0),
    kd.LogitMSE(), kd.LogitMSE(centered=True), kd.BinaryKL(),
)  # fmt: skip
# Those of two distributions over the classes, which a softmax makes, and of those what no limit troubles.
RAW = ("logit_mse", "centered_logit_mse", "binary_kl")
SOFTMAX = tuple(d for d in DIVERGENCES if Options(d).row[0] not in RAW)
# The limits, both KLs among them, and signs.
ALPHA_BETAS = (
    (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (-0.5, 0.5), (1.0, 1.0),
    (0.3, 0.3), (-0.4, 0.9), (1.6, -0.5), (-0.3, 0.0), (0.0, -0.3), (-0.2, -0.3), (2.0, -1.0),
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fitting(z: Tensor, labels: Tensor | None, o: Options) -> tuple[Tensor | None, Options]:
    """The same call with labels as the divergence takes them: tests are about any divergence.

    Binary: a question for each class, in the place of a class. DKD: a label for each row that counts.
    """
    name, _ = o.row
    if o.binary and labels is not None and not labels.is_floating_point():
        mask = labels != o.ignore_index if o.mask is None else o.mask
        classes = torch.arange(z.shape[-1], device=z.device)
        targets = ((classes * 7 + labels[..., None]) % 5 / 4).to(torch.float32)
        return targets, o.but(mask=mask)
    if name == "dkd" and (o.soft_weight or labels is None):
        if labels is None:
            rows = z.shape[:-1]
            labels = (torch.arange(rows.numel(), device=z.device) % max(z.shape[-1] - 3, 1)).view(rows)
            return labels.masked_fill(labels == o.ignore_index, 1) if o.ignore_index == 0 else labels, o
        if o.mask is not None:
            return labels, o.but(mask=o.mask & (labels != o.ignore_index))
    return labels, o


def computing_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any side is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def xlogy_ratio(x: Tensor, log_ratio: Tensor) -> Tensor:
    """x log(x/y), 0 where x is."""
    return torch.where(x == 0, 0.0, x * torch.where(x == 0, 0.0, log_ratio))


def eager_alpha_beta(a: float, b: float, lq: Tensor, lp: Tensor) -> Tensor:
    """The formulas of the paper, powers and limits."""
    # Classes that neither side has.
    dead = torch.isneginf(lq) & torch.isneginf(lp)
    lq, lp = lq.masked_fill(dead, 0.0), lp.masked_fill(dead, 0.0)
    p, q, s = lp.exp(), lq.exp(), a + b
    if a == b == 0:
        phi = 0.5 * (lp - lq) ** 2
    elif b == 0:
        phi = (a * p**a * (lp - lq) - p**a + q**a) / a**2
    elif a == 0:
        phi = (b * q**b * (lq - lp) - q**b + p**b) / b**2
    elif s == 0:
        phi = (a * (lq - lp) + (a * (lp - lq)).exp() - 1) / a**2
    else:
        phi = -(p**a * q**b - a / s * p**s - b / s * q**s) / (a * b)
    return phi.masked_fill(dead, 0.0).sum(-1)


def eager_dkd(a: float, b: float, y: Tensor, u: Tensor, labels: Tensor) -> Tensor:
    """As its authors' code, from logs: the target against the rest, and the rest without the target."""
    target = labels[..., None]
    rest = torch.ones_like(y, dtype=torch.bool).scatter_(-1, target, False)

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        others = x.masked_fill(~rest, -torch.inf)
        two = torch.cat([x.gather(-1, target), others.logsumexp(-1, keepdim=True)], -1)
        return F.log_softmax(two, -1), F.log_softmax(x - 1e30 * ~rest, -1)

    (two_q, lq), (two_p, lp) = pairs(y), pairs(u)
    among = (lp.exp() * rest * torch.where(rest, lp - lq, 0.0)).sum(-1)
    return a * F.kl_div(two_q, two_p, reduction="none", log_target=True).sum(-1) + b * among


def eager_divergence(o: Options, y: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
    """One value a row, as users of `F.kl_div` write it."""
    name, params = o.row
    if name == "logit_mse":
        return 0.5 * F.mse_loss(y, u, reduction="none").sum(-1)
    if name == "centered_logit_mse":
        y, u = (x - x.mean(-1, keepdim=True) for x in (y, u))
        return 0.5 * F.mse_loss(y, u, reduction="none").sum(-1)
    if name == "binary_kl":
        logs = F.logsigmoid
        yes, no = (u.sigmoid() * (logs(u) - logs(y)), (-u).sigmoid() * (logs(-u) - logs(-y)))
        return (yes + no).sum(-1)
    if name == "dkd":
        assert labels is not None
        return eager_dkd(*params, y, u, labels)
    lq, lp = F.log_softmax(y, -1), F.log_softmax(u, -1)
    if name == "forward_kl":
        return F.kl_div(lq, lp, reduction="none", log_target=True).sum(-1)
    if name == "soft_cross_entropy":
        return -(lp.exp() * lq).sum(-1)
    if name == "reverse_kl":
        return F.kl_div(lp, lq, reduction="none", log_target=True).sum(-1)
    if name == "tvd":
        return 0.5 * (lq.exp() - lp.exp()).abs().sum(-1)
    if name == "squared_error":
        return 0.5 * F.mse_loss(lq.exp(), lp.exp(), reduction="none").sum(-1)
    if name == "alpha_beta":
        return eager_alpha_beta(*params, lq, lp)
    (share,) = params
    of_teacher = 1 - share if name == "skew_reverse_kl" else share
    lm = torch.logsumexp(torch.stack([lp + log(of_teacher), lq + log1p(-of_teacher)]), 0)
    to_teacher = F.kl_div(lm, lp, reduction="none", log_target=True).sum(-1)
    if name == "skew_kl":
        return to_teacher
    to_student = F.kl_div(lm, lq, reduction="none", log_target=True).sum(-1)
    return to_student if name == "skew_reverse_kl" else share * to_teacher + (1 - share) * to_student


def eager_logits(
    z: Tensor, scale: float, softcap: float | None, noise: Any = None, stream: int = 0
) -> Tensor:
    """Scale, then softcap, then noise."""
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if noise is None:
        return z
    scaled = sampled(noise, z, stream)[0].to(z.dtype)
    return z + scaled if noise.kind == "additive" else z * (1 + scaled)


def eager_teacher(us: list[Tensor], T: float, o: Options) -> Tensor:
    """Logits over T, of a mixture too: logs of the mean of the probabilities, or their logits."""
    if len(us) == 1:
        return us[0] / T
    given = o.weights if o.weights is not None else [1.0] * len(us)
    weights = torch.as_tensor(given, dtype=us[0].dtype, device=us[0].device)
    weights = weights / weights.sum(-1, keepdim=True)
    sides = torch.stack([u / T for u in us], -1)
    if o.binary:
        logs = [(F.logsigmoid(x) + weights.log()[..., None, :]).logsumexp(-1) for x in (sides, -sides)]
        return logs[0] - logs[1]
    return (F.log_softmax(sides, -2) + weights.log()[..., None, :]).logsumexp(-1)


def eager(z: Tensor, v: Teacher, labels: Tensor | None = None, o: Options | None = None) -> Tensor:
    """The loss, differentiable in z, in the dtype of the logits but at least fp32."""
    o = o or Options()
    teachers = [v] if isinstance(v, Tensor) else list(v)
    dtype = computing_dtype(z.dtype, *(t.dtype for t in teachers))
    vocab = min(z.shape[-1], teachers[0].shape[-1])
    x = eager_logits(z[..., :vocab].to(dtype), o.student_scale, o.student_softcap, o.student_noise, 1)
    us = [
        eager_logits(t[..., :vocab].to(dtype), o.teacher_scale, o.teacher_softcap, o.teacher_noise, 2 * m)
        for m, t in enumerate(teachers)
    ]
    mask = o.mask
    if mask is None and labels is not None and not o.binary:
        mask = labels != o.ignore_index
    target = wanted = None
    if labels is not None and not o.binary:
        assert mask is not None
        wanted = labels.long().masked_fill(~mask, o.ignore_index)
        target = wanted.masked_fill(wanted == o.ignore_index, 0)
    y, u = x / o.temperature, eager_teacher(us, o.temperature, o).detach()
    total = o.soft_weight * (o.temperature**2 if o.t_squared else 1.0) * eager_divergence(o, y, u, target)
    if labels is not None and o.binary:
        hard = F.binary_cross_entropy_with_logits(x, labels.to(dtype), reduction="none").sum(-1)
        total = total + o.hard_weight * hard
    elif wanted is not None:
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
    z: Tensor, v: Teacher, labels: Tensor | None, o: Options, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The eager loss and its gradient with respect to z."""
    leaf = z.detach().clone().requires_grad_()
    loss = eager(leaf, v.detach() if isinstance(v, Tensor) else v, labels, o)
    (grad,) = torch.autograd.grad(
        loss, leaf, torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    )
    return loss.detach(), grad


def keywords(o: Options) -> dict[str, Any]:
    """The keyword arguments of `kd_loss` that say the same."""
    divergence = kd.JSD(o.divergence) if isinstance(o.divergence, float) else o.divergence
    ours = {f.name: getattr(o, f.name) for f in fields(o) if not f.name.endswith(("_scale", "_softcap"))}
    del ours["weights"]
    return {**ours, "divergence": divergence}


def source(z: Tensor, scale: float, softcap: float | None) -> Any:
    """A tensor, or `kd.Logits` where it has something to say."""
    return z if scale == 1.0 and softcap is None else kd.Logits(z, scale=scale, softcap=softcap)


def arguments(z: Tensor, v: Teacher, labels: Tensor | None, o: Options) -> tuple[Any, ...]:
    """Student, teacher and labels as `kd_loss` takes them."""
    if isinstance(v, Tensor):
        teacher = source(v, o.teacher_scale, o.teacher_softcap)
    else:
        teacher = kd.Mixture([source(t, o.teacher_scale, o.teacher_softcap) for t in v], o.weights)
    return source(z, o.student_scale, o.student_softcap), teacher, labels


def our_loss(z: Tensor, v: Teacher, labels: Tensor | None, o: Options, backend: str) -> Tensor:
    """`kd.kd_loss` of these options."""
    labels, o = fitting(z, labels, o)
    given = arguments(z, v, labels, o)
    return kd.kd_loss(*given, backend=backend, **keywords(o))


def our_result(
    z: Tensor, v: Teacher, labels: Tensor | None, o: Options, backend: str, upstream: Tensor | None = None
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
    # Half of the smallest subnormal is the rounding near zero; exp flushes below the smallest normal of fp32,
    # and what it gives is multiplied by differences of logits, here of hundreds.
    smallest = rounded.smallest_normal * rounded.eps / 2 + 1e3 * torch.finfo(torch.float32).smallest_normal
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


def roundings_of_truth(exact: Tensor) -> Tensor:
    """What autograd in fp64 rounds itself, in units of fp32: of what cancels, relative to the row's largest.

    A stored class with 1e-30 of the student has a gradient of -3e-23 there, of which fp64 makes 1e-20.
    """
    largest = exact.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    return largest * (torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps)


def assert_within_budget(
    result: tuple[Tensor, Tensor],
    z: Tensor,
    v: Teacher,
    labels: Tensor | None = None,
    o: Options | None = None,
    upstream: Tensor | None = None,
) -> Truth:
    """(loss, gradient) as `our_result` gives them, against the truth; dtypes too."""
    labels, o = fitting(z, labels, o or Options())
    loss, grad = result
    exact = truth(z, v, labels, o, upstream)
    eager_loss, eager_grad = eager_result(z, v, labels, o, upstream)
    dtypes = [z.dtype, *([v.dtype] if isinstance(v, Tensor) else [t.dtype for t in v])]
    dtype = computing_dtype(*dtypes)
    assert grad.dtype == z.dtype, f"gradient in {grad.dtype}, logits in {z.dtype}"
    if len(set(dtypes)) == 1:
        assert loss.dtype == dtype, f"loss in {loss.dtype}, computed in {dtype}"
    eps = torch.finfo(dtype).eps
    assert_close("loss", loss, eager_loss, exact.loss, exact.loss_unit, eps)
    assert_close("gradient", grad, eager_grad, exact.grad, exact.grad_unit, eps)
    return exact


def check(
    z: Tensor,
    v: Teacher,
    labels: Tensor | None = None,
    o: Options | None = None,
    *,
    backend: str,
    upstream: Tensor | None = None,
) -> Truth:
    """Run `kd_loss` with these options and hold it to the budget."""
    o = o or Options()
    return assert_within_budget(our_result(z, v, labels, o, backend, upstream), z, v, labels, o, upstream)
