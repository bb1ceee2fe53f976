"""The specification: the loss in plain PyTorch, on any device, differentiable any number of times.

Every other backend is tested against this file, and this file against float64 truth. It is written for
clarity; it makes about eight [N, V] temporaries, as any eager loss does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import TABLE
from .spec import Call, LossSpec


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """float64 where either side is; float32 for everything else."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def kd_loss(call: Call) -> tuple[Tensor, Tensor | None]:
    """The loss and, where the spec asks for them, the seven figures of `KDStats` as one tensor."""
    # Inside autocast the logits come as they are; this arithmetic must not be lowered.
    with torch.autocast(call.student.device.type, enabled=False):
        return _kd_loss(call)


def _kd_loss(call: Call) -> tuple[Tensor, Tensor | None]:
    student, teacher, labels, mask, token_weights, num_items, spec, classes = call
    R = compute_dtype(student, teacher)
    rows = counted_rows(student, labels, mask, spec.ignore_index)  # [...] bool

    # A row that doesn't count may hold anything; it is replaced before any arithmetic, so that neither its
    # value nor its gradient can be NaN.
    z = _logits(student, rows, classes, R, spec.student_scale, spec.student_softcap)
    v = _logits(teacher, rows, classes, R, spec.teacher_scale, spec.teacher_softcap)

    zero = z.new_zeros(z.shape[:-1])
    soft = soft_term(z, v, spec) if spec.soft_weight != 0 or spec.stats else zero
    labelled = zero.bool() if labels is None else rows & (labels != spec.ignore_index)
    hard = (
        hard_term(z, labels, labelled)
        if labels is not None and (spec.hard_weight != 0 or spec.stats)
        else zero
    )

    loss = zero
    if spec.soft_weight != 0:
        loss = loss + spec.soft_weight * spec.t_factor * soft
    if spec.hard_weight != 0:
        loss = loss + spec.hard_weight * hard
    # With both weights 0, or N = 0, the loss still hangs on the logits.
    loss = torch.where(rows, loss, z.sum(-1) * 0)
    if token_weights is not None:
        loss = loss * torch.where(rows, token_weights.to(R), 0.0)
    stats = _stats(z.detach(), v, soft.detach(), hard.detach(), labels, rows, labelled, num_items, spec)
    return reduce(loss, rows, num_items, spec.reduction), stats


def counted_rows(student: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Which rows count: the mask, else the labelled ones, else all."""
    if mask is not None:
        return mask
    if labels is not None:
        return labels != ignore_index
    return torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)


def _logits(x: Tensor, rows: Tensor, classes: int, R: torch.dtype, scale: float, softcap: float) -> Tensor:
    x = torch.where(rows.unsqueeze(-1), x[..., :classes].to(R), 0.0) * scale
    return softcap * torch.tanh(x / softcap) if softcap else x


def soft_term(z: Tensor, v: Tensor, spec: LossSpec) -> Tensor:
    """D(p, q) of each row at the spec's temperature, without T²."""
    lq = torch.log_softmax(z / spec.temperature, -1)
    lp = torch.log_softmax(v / spec.temperature, -1)
    # A class that neither side can produce contributes nothing, whatever the divergence.
    dead = torch.isneginf(lq) & torch.isneginf(lp)
    lq, lp = lq.masked_fill(dead, 0.0), lp.masked_fill(dead, 0.0)
    return TABLE[spec.divergence].phi(lq, lp, *spec.params).masked_fill(dead, 0.0).sum(-1)


def hard_term(z: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of each labelled row at T = 1, 0 elsewhere.

    A label out of range is an error on a CPU; elsewhere looking would wait for the device, and its row is
    NaN.
    """
    target = torch.where(labelled, labels, 0).long()
    if z.device.type == "cpu":
        # As a node of its own where the compiler looks on, which can't follow a look at the data.
        check = torch.ops.kdkernels.check_labels_v1 if torch.compiler.is_compiling() else check_labels
        target = check(target, z.shape[-1])
    in_range = (target >= 0) & (target < z.shape[-1])
    target = torch.where(in_range, target, 0)
    nll = -torch.log_softmax(z, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    poison = torch.where(in_range, 1.0, torch.nan).to(nll.dtype)
    return torch.where(labelled, nll * poison, 0.0)


def check_labels(target: Tensor, classes: int) -> Tensor:
    """The same labels, of which none is out of range."""
    wrong = (target < 0) | (target >= classes)
    if wrong.any():
        row = int(wrong.flatten().int().argmax())
        raise ValueError(label_error(int(target.flatten()[row]), row, target.numel(), classes))
    return target


def label_error(label: int, row: int, rows: int, classes: int) -> str:
    """The message for a label out of range, the same on every backend."""
    return (
        f"labels must be in [0, {classes}) or equal to ignore_index, got {label} at row {row} of {rows}; "
        "mark rows without a label with ignore_index, or leave them out with mask"
    )


def reduce(loss: Tensor, rows: Tensor, num_items: Tensor | float | None, reduction: str) -> Tensor:
    """`none`, `sum`, or the sum over the number of counted rows or `num_items`; 0 where nothing counts."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counted = rows.sum()
    if num_items is None:
        items = counted.to(loss.dtype)
    elif isinstance(num_items, Tensor):
        items = num_items.to(loss)
    else:
        items = loss.new_full((), num_items)
    return loss.sum() / torch.where(counted == 0, 1.0, items)


def _stats(
    z: Tensor,
    v: Tensor,
    soft: Tensor,
    hard: Tensor,
    labels: Tensor | None,
    rows: Tensor,
    labelled: Tensor,
    num_items: Tensor | float | None,
    spec: LossSpec,
) -> Tensor | None:
    if not spec.stats:
        return None
    T = spec.temperature
    counted, answered = rows.sum(), labelled.sum()

    def over(x: Tensor, n: Tensor) -> Tensor:
        return torch.where(rows, x, 0.0).sum() / n.clamp(min=1)

    best = z.argmax(-1)
    terms = "mean" if spec.reduction == "none" else spec.reduction
    return torch.stack(
        [
            reduce(torch.where(rows, spec.t_factor * soft, 0.0), rows, num_items, terms),
            reduce(torch.where(rows, hard, 0.0), rows, num_items, terms),
            over(_entropy(z / T), counted),
            over(_entropy(v / T), counted),
            over((best == v.argmax(-1)).to(z.dtype), counted),
            over((labelled & (best == labels)).to(z.dtype), answered)
            if labels is not None
            else counted * 0.0,
            counted.to(z.dtype),
        ]
    ).detach()


def _entropy(x: Tensor) -> Tensor:
    lp = torch.log_softmax(x, -1)
    p = lp.exp()
    return -(p * torch.where(p > 0, lp, 0.0)).sum(-1)
