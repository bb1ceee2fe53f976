"""Losses that people have written, each wrong in one way, with what an audit must say of it.

Each is what the field's code has had in it: a factor in one place and not in the other, an argument in the
place of another, a dtype, a mask, a buffer that was somebody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Broken:
    """A loss, and the lines of the scorecard that must say what is wrong with it.

    Attributes:
        loss: The loss.
        says: For each line that must be WRONG, words of what it found, by words of what it is about.
        tells: What the audit is told: what the loss's documentation would say.
        also: Lines that are WRONG for the same reason, and may be.
    """

    loss: Callable[..., Tensor]
    says: Mapping[str, str]
    tells: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()


def _kl(lq: Tensor, lp: Tensor) -> Tensor:
    """KL(p‖q) of each row, right at −inf."""
    p = lp.exp()
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, lp - lq)).sum(-1)


def _logs(x: Tensor, T: float = 1.0) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.log_softmax(wide / T, -1)


class _OwnBackward(torch.autograd.Function):
    """Forward KL, and what is wrong with the gradient that is written by hand."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, T: float, fault: str) -> Tensor:
        lq, lp = _logs(z, T), _logs(v, T)
        rows = _kl(lq, lp) * T**2
        gradient = ((lq.exp() - lp.exp()) * (1 / T if fault == "no T²" else T)).to(z.dtype)
        if fault == "in the logits' place":
            z.data.copy_(gradient)
        ctx.fault, ctx.rows = fault, len(rows)
        ctx.gradient = gradient
        return rows if fault == "first weight" else rows.mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradient = ctx.gradient
        above = upstream[0].to(gradient.dtype)
        if ctx.fault == "first weight":
            return gradient * above[0], None, None, None
        if ctx.fault == "no upstream":
            above = torch.ones_like(above)
        if ctx.fault == "scaled in place":
            gradient.mul_(above)
            above = torch.ones_like(above)
        each = gradient * above / ctx.rows
        return each, each.clone() if ctx.fault == "for the teacher" else None, None, None


def no_t_squared_in_gradient(z: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    """T² multiplies the loss; the hand-written gradient has the 1/T of the chain rule and no T²."""
    return _OwnBackward.apply(z, v, temperature, "no T²")


def t_squared_by_detach(z: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    """The loss is reported with T², its gradient has none."""
    loss = _kl(_logs(z, temperature), _logs(v, temperature)).mean()
    return loss + (loss * temperature**2 - loss).detach()


def forward_kl_with_swapped_arguments(z: Tensor, v: Tensor) -> Tensor:
    """The arguments of F.kl_div in the order of the formula, which isn't its own."""
    return _kl(_logs(v), _logs(z)).mean()


def softmax_in_bf16(z: Tensor, v: Tensor) -> Tensor:
    """Softmax in the dtype of the logits, which is bfloat16 in training."""
    lq, lp = F.log_softmax(z, -1), F.log_softmax(v, -1)
    return _kl(lq, lp).float().mean()


def rounds_before_the_upcast(z: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    """The division by T is in bfloat16, fp32 comes after it."""
    return _kl(_logs(z / temperature), _logs(v / temperature)).mean() * temperature**2


def mean_over_classes(z: Tensor, v: Tensor) -> Tensor:
    """torch's mean, which divides by N·V."""
    p = _logs(v).exp()
    lq = _logs(z)
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, _logs(v) - lq)).mean()


def divides_by_all_rows(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """Padding leaves the sum and stays in the denominator."""
    counted = labels != -100
    rows = _kl(_logs(z), _logs(v))
    return torch.where(counted, rows, 0.0).sum() / labels.numel()


def padding_counts(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """The hard term ignores padding; the soft one is taught by it."""
    return _kl(_logs(z), _logs(v)).mean() + F.cross_entropy(z, labels, ignore_index=-100)


def nan_without_rows(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """A mean over rows of which there are none."""
    return _kl(_logs(z), _logs(v))[labels != -100].mean()


def mask_by_multiplication(z: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """0 · NaN."""
    rows = _kl(_logs(z), _logs(v))
    weights = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
    return (rows * weights).sum() / weights.sum().clamp(min=1)


def pads_with_zero(z: Tensor, v: Tensor) -> Tensor:
    """A smaller vocabulary is padded with logit 0, which is not −inf."""
    z = F.pad(z, (0, v.shape[-1] - z.shape[-1]))
    return _kl(_logs(z), _logs(v)).mean()


def gradient_over_the_logits(z: Tensor, v: Tensor) -> Tensor:
    """The gradient is written where the student's logits were."""
    return _OwnBackward.apply(z, v, 1.0, "in the logits' place")


def nan_at_masked_classes(z: Tensor, v: Tensor) -> Tensor:
    """0 · (−inf + inf)."""
    lq, lp = _logs(z), _logs(v)
    return (lp.exp() * (lp - lq)).sum(-1).mean()


def shifts_the_hard_term_only(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """Next-token labels for the cross-entropy; the soft term masks row t by token t."""
    hard = F.cross_entropy(z[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)
    counted = labels != -100
    soft = torch.where(counted, _kl(_logs(z), _logs(v)), 0.0).sum() / counted.sum().clamp(min=1)
    return soft + hard


def never_shifts(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """Documented to take a causal LM's token ids; every token is its own label."""
    soft = _kl(_logs(z), _logs(v))
    counted = labels != -100
    hard = F.cross_entropy(z, labels, ignore_index=-100, reduction="none")
    return torch.where(counted, soft + hard, 0.0).sum() / counted.sum().clamp(min=1)


def wrong_sign(z: Tensor, v: Tensor) -> Tensor:
    """The log-ratio upside down."""
    return -_kl(_logs(z), _logs(v)).mean()


def log_target_without_logs(z: Tensor, v: Tensor) -> Tensor:
    """Probabilities, where log_target=True wants their logs."""
    return F.kl_div(_logs(z), _logs(v).exp(), reduction="batchmean", log_target=True)


def logits_for_log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """F.kl_div takes logs of probabilities, and logits are none."""
    return F.kl_div(student_logits, teacher_logits.softmax(-1), reduction="batchmean")


def teacher_is_taught(z: Tensor, v: Tensor) -> Tensor:
    """One gradient for both sides: that of the student."""
    return _OwnBackward.apply(z, v, 1.0, "for the teacher")


def teacher_is_not_detached(z: Tensor, v: Tensor) -> Tensor:
    """Documented to detach the teacher."""
    return _kl(_logs(z), _logs(v)).mean()


def batchmean_of_sequences(z: Tensor, v: Tensor) -> Tensor:
    """`batchmean` divides by the first dimension, which is not the number of tokens."""
    return _kl(_logs(z), _logs(v)).sum() / z.shape[0]


def truncated_and_clamped(z: Tensor, v: Tensor, k: int = 4) -> Tensor:
    """Σ p log(p/q) over the top k, cut off at 0 where it goes below."""
    lp, kept = _logs(v).topk(min(k, v.shape[-1]), -1)
    return (lp.exp() * (lp - _logs(z).gather(-1, kept))).sum(-1).clamp(min=0).mean()


def top_k_renormalised(z: Tensor, v: Tensor, k: int = 4) -> Tensor:
    """Both sides are made to sum to 1 over the teacher's top k."""
    u, kept = v.topk(min(k, v.shape[-1]), -1)
    return _kl(_logs(z.gather(-1, kept)), _logs(u)).mean()


def hard_coded_temperature(z: Tensor, v: Tensor, temperature: float = 2.0) -> Tensor:
    """The teacher's temperature was never made an argument."""
    return _kl(_logs(z, temperature), _logs(v, 2.0)).mean() * temperature**2


def detached_normaliser(z: Tensor, v: Tensor) -> Tensor:
    """log-sum-exp for numerical stability, detached with the maximum."""
    lq = z - z.logsumexp(-1, keepdim=True).detach()
    return _kl(lq, _logs(v)).mean()


def first_upstream_for_all(z: Tensor, v: Tensor) -> Tensor:
    """Rows are weighted after the loss; backward takes the first weight for all."""
    return _OwnBackward.apply(z, v, 1.0, "first weight")


def ignores_upstream(z: Tensor, v: Tensor) -> Tensor:
    """A loss that is always the last node of its graph, until a loss scale comes."""
    return _OwnBackward.apply(z, v, 1.0, "no upstream")


def scales_the_saved_gradient(z: Tensor, v: Tensor) -> Tensor:
    """The saved gradient is scaled in place, and again by the next backward."""
    return _OwnBackward.apply(z, v, 1.0, "scaled in place")


def epsilon_in_the_logarithm(z: Tensor, v: Tensor) -> Tensor:
    """log(q + 1e-8), which knows no q below."""
    wide = [x if x.dtype == torch.float64 else x.float() for x in (z, v)]
    q, p = (x.softmax(-1) for x in wide)
    return (p * ((p + 1e-8).log() - (q + 1e-8).log())).sum(-1).mean()


def clips_labels(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """A label that is no class becomes one."""
    counted = labels != -100
    target = labels.long().clamp(0, z.shape[-1] - 1)
    hard = F.cross_entropy(z, target, reduction="none")
    return torch.where(counted, hard + _kl(_logs(z), _logs(v)), 0.0).sum() / counted.sum().clamp(min=1)


def weighs_rows_by_the_batch(z: Tensor, v: Tensor) -> Tensor:
    """A normalisation over the whole batch in a loss of rows."""
    mean = z.mean(0, keepdim=True)
    return _kl(_logs(z - mean + mean.detach() * 0.9), _logs(v)).mean()


def assumes_one_stride(z: Tensor, v: Tensor) -> Tensor:
    """The rows of a tensor are read as if they followed one another."""
    rows, classes = z.shape
    flat = v.detach().as_strided((rows, classes), (classes, 1))
    return _kl(_logs(z), _logs(flat)).mean()


# What follows from a fault may be said of every line after it.
ANYTHING = ("",)
BROKEN: tuple[Broken, ...] = (
    Broken(
        no_t_squared_in_gradient,
        {
            "T² in the loss and the gradient": "T^2.00 multiplies the loss, T^0.00 its gradient",
            "derivative of its own loss at T = 3": "off central differences",
        },
        also=("gradient in ",),
    ),
    Broken(
        t_squared_by_detach,
        {
            "T² in the loss and the gradient": "T^2.00 multiplies the loss, T^0.00 its gradient",
            "derivative of its own loss at T = 3": "88.9 % off",
        },
        also=("−inf logits of the student only", "gradient in "),
    ),
    Broken(forward_kl_with_swapped_arguments, {"which it is": "reverse KL(q‖p); it says forward_kl"}),
    Broken(softmax_in_bf16, {"gradient in bfloat16": "× a careful loss's"}, also=("gradient in float16",)),
    Broken(
        rounds_before_the_upcast,
        {"gradient in bfloat16": "× a careful loss's"},
        also=("gradient in float16",),
    ),
    Broken(mean_over_classes, {"which it is": "the mean over N·V is 1/V of the divergence"}),
    Broken(divides_by_all_rows, {"ignored labels: denominator": "divides by all 6 rows, of which 4 count"}),
    Broken(
        padding_counts,
        {"ignored labels: which rows count": "ignored rows teach"},
        also=("ignored labels",),
    ),
    Broken(nan_without_rows, {"ignored labels: no row counts": "the loss is NaN"}),
    Broken(mask_by_multiplication, {"a mask: NaN and inf": "make the loss NaN"}),
    Broken(pads_with_zero, {"a teacher of 3 more classes": "padded with logit 0"}),
    Broken(
        gradient_over_the_logits,
        {"inputs in float32": "the student's logits are written over, and autograd"},
        also=("inputs in bfloat16",),
    ),
    Broken(
        nan_at_masked_classes,
        {"−inf logits on both sides": "NaN in the loss"},
        also=("−inf logits of the teacher only", "−inf logits of the student only"),
    ),
    Broken(
        shifts_the_hard_term_only,
        {"whose work shifting them is": "the hard term's row t has label t + 1"},
        also=ANYTHING,
    ),
    Broken(never_shifts, {"whose work shifting them is": "row t has label t; it says"}, {"shift": "inside"}),
    Broken(wrong_sign, {"which it is": "of the wrong sign"}),
    Broken(log_target_without_logs, {"least where both are the same": "the gradient is"}),
    Broken(
        logits_for_log_probabilities,
        {
            "which it is": "none that is known",
            "least where both are the same": "the gradient is",
            "a constant added to the student": "changes the loss",
        },
        {"divergence": "forward_kl"},
        also=ANYTHING,
    ),
    Broken(teacher_is_taught, {"a teacher that requires grad": "a gradient that is not the loss's"}),
    Broken(
        teacher_is_not_detached,
        {"a teacher that requires grad": "it says it gets none"},
        {"teacher_gradient": False},
    ),
    Broken(batchmean_of_sequences, {"logits [B, S, V]": "divides by B = 2, not by the 6 rows"}, {"ndim": 3}),
    Broken(
        truncated_and_clamped,
        {
            "which it is": "truncated to the teacher's top 4 of 11 classes, cut off at 0",
            "least where both are the same": "the gradient is",
        },
    ),
    Broken(top_k_renormalised, {"which it is": "over the teacher's top 4 of 11 classes"}),
    Broken(
        hard_coded_temperature,
        {"what it divides": "the student's logits by T, the teacher's by 2"},
        also=("least where",),
    ),
    Broken(
        detached_normaliser,
        {"derivative of its own loss": "off central differences"},
        also=ANYTHING,
    ),
    Broken(first_upstream_for_all, {"a weight for each row": "off its weight's"}),
    Broken(
        ignores_upstream,
        {"a loss × 3": "multiplies the gradient by 1"},
        also=("gradient in float16",),
    ),
    Broken(scales_the_saved_gradient, {"backward twice through a kept graph": "another gradient"}),
    Broken(
        epsilon_in_the_logarithm,
        {"margins of 120 and more": "where it is"},
        also=("logits of ±10,000", "classes"),
    ),
    Broken(
        clips_labels,
        {"label 14 of 11 classes": "read silently"},
        also=("label -7",),
    ),
    Broken(
        weighs_rows_by_the_batch,
        {"other rows": "change this row's gradient"},
        also=ANYTHING,
    ),
    Broken(
        assumes_one_stride,
        {"transposed logits": "change the result"},
        also=("a slice", "expanded", "3 more classes"),
    ),
)
