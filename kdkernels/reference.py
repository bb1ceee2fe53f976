"""The specification: the loss in plain PyTorch, on any device, differentiable any number of times.

Every other backend is tested against this file, and this file against float64 truth. It is written for
clarity; it makes about eight [N, V] temporaries, as any eager loss does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .divergences import Divergence
from .expressions import phi_binary_cross_entropy, phi_binary_kl
from .noise import STUDENT, Noise, noised
from .sparse import Sparse
from .spec import Call, LossSpec

# What stands for the label of a row that has none and needs one.
UNLABELLED = -(1 << 63)


def compute_dtype(student: Tensor, teachers: Sequence[Tensor]) -> torch.dtype:
    """float64 where any side is; float32 for everything else."""
    wide = torch.float64 in (student.dtype, *(v.dtype for v in teachers))
    return torch.float64 if wide else torch.float32


def kd_loss(call: Call) -> tuple[Tensor, Tensor | None]:
    """The loss and, where the spec asks for them, the seven figures of `KDStats` as one tensor."""
    # Inside autocast the logits come as they are; this arithmetic must not be lowered.
    with torch.autocast(call.student.device.type, enabled=False):
        return _kd_loss(call)


def _kd_loss(call: Call) -> tuple[Tensor, Tensor | None]:
    student, teachers, mixture, labels, _, token_weights, num_items, z_seed, v_seed, spec, classes, stored = (
        call
    )
    R = compute_dtype(student, teachers)
    rows = counted_rows(call)  # [...] bool
    T = spec.temperature

    # A row that doesn't count may hold anything; it is replaced before any arithmetic, so that neither its
    # value nor its gradient can be NaN.
    z = _logits(student, rows, classes, R, (spec.student_scale, spec.student_softcap))
    z = _noised(z, spec.student_noise, z_seed, STUDENT)
    each = [
        _noised(_logits(v, rows, classes, R, options), spec.teacher_noise, v_seed, 2 * m)
        for m, (v, options) in enumerate(zip(teachers, spec.teachers, strict=True))
    ]
    if mixture is not None:
        each = [T * mixed([x / T for x in each], mixture.to(R), rows, spec.row)]

    zero = z.new_zeros(z.shape[:-1])
    target, labelled = targets(call, rows) if labels is not None else (None, zero.bool())
    soft = zero
    if spec.soft_weight != 0 or spec.stats:
        soft = soft_term(z, each[0], target, spec) if stored is None else stored_term(z, stored, spec)
    hard = (
        hard_term(z, target, labelled, spec.row)
        if target is not None and (spec.hard_weight != 0 or spec.stats)
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
    stats = None
    if spec.stats:
        if stored is None:
            teacher = _figures(each[0], T, spec.row.binary)
        else:
            teacher = stored_figures(stored)
        stats = _stats(
            z.detach(), teacher, soft.detach(), hard.detach(), target, rows, labelled, num_items, spec
        )
    return reduce(loss, rows, num_items, spec.reduction), stats


def counted_rows(call: Call) -> Tensor:
    """Which rows count: the mask, else the labelled ones, else all."""
    if call.mask is not None:
        return call.mask
    if call.labels is not None and not call.spec.row.binary:
        return call.labels != call.spec.ignore_index
    return torch.ones(call.student.shape[:-1], dtype=torch.bool, device=call.student.device)


def _logits(
    x: Tensor, rows: Tensor, classes: int, R: torch.dtype, post_processing: tuple[float, float]
) -> Tensor:
    scale, softcap = post_processing
    x = torch.where(rows.unsqueeze(-1), x[..., :classes].to(R), 0.0) * scale
    return softcap * torch.tanh(x / softcap) if softcap else x


def _noised(x: Tensor, noise: Noise | None, seed: Tensor | None, stream: int) -> Tensor:
    return x if noise is None or seed is None else noised(x, noise, seed, stream)


def mixed(sides: list[Tensor], weights: Tensor, rows: Tensor, divergence: Divergence) -> Tensor:
    """Logits over T whose probabilities are the weighted mean of those of the sides, logits over T.

    A side of weight 0 may hold anything.
    """
    # Rows that don't count have no weights to speak of.
    per_row = torch.where(rows.unsqueeze(-1), weights, 1.0).unbind(-1)  # [...] each
    each = [torch.where((w == 0).unsqueeze(-1), 0.0, x) for x, w in zip(sides, per_row, strict=True)]

    def mean(logs: list[Tensor]) -> Tensor:
        terms = [lp + w.log().unsqueeze(-1) for lp, w in zip(logs, per_row, strict=True)]
        return torch.logsumexp(torch.stack(terms), 0)

    if divergence.binary:
        sigmoid = torch.nn.functional.logsigmoid
        return mean([sigmoid(u) for u in each]) - mean([sigmoid(-u) for u in each])
    return mean([torch.log_softmax(u, -1) for u in each])


def targets(call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as terms use them, 0 where there is none, and which rows have one."""
    labels, spec, classes = call.labels, call.spec, call.classes
    assert labels is not None
    if spec.row.binary:
        labels = torch.where(rows.unsqueeze(-1), labels, 0.0)
        if spec.hard_weight == 0 and not spec.stats:
            return labels, rows
        return check_labels_here(labels, classes), rows
    labelled = rows & (labels != spec.ignore_index)
    needed = spec.row.target and (spec.soft_weight != 0 or spec.stats)
    if spec.hard_weight == 0 and not spec.stats and not needed:
        return torch.where(labelled, labels, 0).long(), labelled
    target = torch.where(labelled, labels, torch.where(rows, UNLABELLED, 0) if needed else 0).long()
    return check_labels_here(target, classes), labelled


def soft_term(z: Tensor, v: Tensor, target: Tensor | None, spec: LossSpec) -> Tensor:
    """D(p, q) of each row at the spec's temperature, without T²."""
    y, u = z / spec.temperature, v / spec.temperature
    divergence, params = spec.row, spec.params
    if divergence.target:
        assert target is not None
        return _around_target(y, u, target, divergence, params)
    if divergence.normaliser == "softmax":
        y, u = torch.log_softmax(y, -1), torch.log_softmax(u, -1)
    elif divergence.normaliser == "mean":
        finite = torch.isfinite(y) & torch.isfinite(u)
        classes = finite.sum(-1, keepdim=True).clamp(min=1)
        y, u = (x - torch.where(finite, x, 0.0).sum(-1, keepdim=True) / classes for x in (y, u))
    return _sum(divergence, params, y, u)


def stored_term(z: Tensor, stored: Sparse, spec: LossSpec) -> Tensor:
    """D(p, q) of each row over the stored classes and, unless both sides are renormalised, the tail."""
    y = z / spec.temperature
    there = stored.ids >= 0
    # A column beyond the last class, for what is no class.
    columns = torch.where(there, stored.ids, y.shape[-1])
    kept = torch.nn.functional.pad(y, (0, 1), value=-torch.inf).gather(-1, columns)
    nobody = ~there.any(-1, keepdim=True)
    if stored.rest is None:
        lq = torch.log_softmax(kept.masked_fill(nobody, 0.0), -1).masked_fill(~there, -torch.inf)
        lp = stored.log_p
    else:
        others = torch.nn.functional.pad(y, (0, 1), value=-torch.inf).scatter(-1, columns, -torch.inf)
        # A sum of nothing has no gradient, and autograd of its logarithm is NaN.
        alone = torch.isneginf(others).all(-1)
        rest = torch.logsumexp(others.masked_fill(alone.unsqueeze(-1), 0.0), -1).masked_fill(
            alone, -torch.inf
        )
        # Where the tail has nearly all of the mass, its gradient is what little the others leave: few
        # columns, so in float64 where the device has that.
        wide = z.dtype if z.device.type == "mps" else torch.float64
        lq = torch.log_softmax(torch.cat([kept, rest.unsqueeze(-1)], -1).to(wide), -1)
        lp = torch.cat([stored.log_p, stored.rest.unsqueeze(-1)], -1).to(wide)
    soft = _sum(spec.row, spec.params, lq, lp).to(z.dtype)
    return soft if stored.extra is None else soft + stored.extra


def stored_figures(stored: Sparse) -> tuple[Tensor, Tensor]:
    """Entropy of a stored teacher, its tail one class, and its most probable stored class."""
    log_p, rest = stored.log_p, stored.rest
    best = stored.ids.gather(-1, log_p.argmax(-1, keepdim=True)).squeeze(-1)
    if rest is not None:
        log_p = torch.cat([log_p, rest.unsqueeze(-1)], -1)
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(-1), best


def _sum(divergence: Divergence, params: tuple[float, ...], lq: Tensor, lp: Tensor) -> Tensor:
    # A class that neither side can produce contributes nothing, whatever the divergence.
    dead = torch.isneginf(lq) & torch.isneginf(lp)
    lq, lp = lq.masked_fill(dead, 0.0), lp.masked_fill(dead, 0.0)
    return divergence.phi(lq, lp, *params).masked_fill(dead, 0.0).sum(-1)


def _around_target(
    y: Tensor, u: Tensor, target: Tensor, divergence: Divergence, params: tuple[float, ...]
) -> Tensor:
    """The target against all others, and the others among themselves."""
    # A label out of range, which only a CPU has looked at, makes its row NaN.
    index, poison = _in_range(target, y)
    logs, margins = [], []
    for x in (y, u):
        others = x.scatter(-1, index.unsqueeze(-1), -torch.inf)
        alone = torch.isneginf(others).all(-1)
        # A sum of nothing has no gradient, and autograd of its logarithm is NaN.
        lse = torch.logsumexp(others.masked_fill(alone.unsqueeze(-1), 0.0), -1).masked_fill(alone, -torch.inf)
        margins.append(x.gather(-1, index.unsqueeze(-1)).squeeze(-1) - lse)
        logs.append(others - lse.masked_fill(alone, 0.0).unsqueeze(-1))
    # Where the teacher is sure of the target, what the others share is nothing.
    nobody = torch.isneginf(logs[1]).all(-1, keepdim=True)
    among = _sum(divergence, params, logs[0].masked_fill(nobody, -torch.inf), logs[1])
    # A term of weight 0 is absent, also where it is infinite.
    around = params[0] * phi_binary_kl(*margins) if params[0] != 0 else 0.0
    return (around + among) * poison


def _in_range(target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    inside = (target >= 0) & (target < z.shape[-1])
    return torch.where(inside, target, 0), torch.where(inside, 1.0, torch.nan).to(z.dtype)


def hard_term(z: Tensor, target: Tensor, labelled: Tensor, divergence: Divergence) -> Tensor:
    """Cross-entropy of each labelled row at T = 1, 0 elsewhere; binary, the sum over its classes.

    A label out of range is an error on a CPU; elsewhere looking would wait for the device, and its row is
    NaN.
    """
    if divergence.binary:
        poison = torch.where((target >= 0) & (target <= 1), 1.0, torch.nan).to(z.dtype)
        return torch.where(labelled, phi_binary_cross_entropy(z, target.to(z.dtype) * poison).sum(-1), 0.0)
    target, poison = _in_range(target, z)
    nll = -torch.log_softmax(z, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return torch.where(labelled, nll * poison, 0.0)


def check_labels_here(target: Tensor, classes: int) -> Tensor:
    """The same labels, checked where looking at them waits for nothing."""
    if target.device.type != "cpu":
        return target
    # As a node of its own where the compiler looks on, which can't follow a look at the data.
    check = torch.ops.kdkernels.check_labels_v1 if torch.compiler.is_compiling() else check_labels
    return check(target, classes)


class LabelError(ValueError):
    """A label that is none.

    Attributes:
        row: Its row.
        message: What is wrong, of a row's number and the number of rows.
    """

    def __init__(self, message: Callable[[int, int], str], row: int, rows: int) -> None:
        super().__init__(message(row, rows))
        self.message, self.row = message, row


def check_labels(target: Tensor, classes: int) -> Tensor:
    """The same labels, of which none is out of range."""
    if target.dtype.is_floating_point:
        wrong = ~((target >= 0) & (target <= 1))
    else:
        wrong = (target < 0) | (target >= classes)
    if wrong.any():
        first = int(wrong.flatten().int().argmax())
        label = target.flatten()[first].item()
        if target.dtype.is_floating_point:
            row, column = divmod(first, target.shape[-1])
            raise LabelError(
                lambda row, _: target_error(float(label), row, column), row, target.shape[:-1].numel()
            )
        raise label_error(int(label), first, target.numel(), classes)
    return target


def label_error(label: int, row: int, rows: int, classes: int) -> LabelError:
    """The error for a label out of range, the same on every backend."""
    if label == UNLABELLED:
        return LabelError(
            lambda row, rows: (
                "labels must give every row that counts a class, since this divergence is about it; row "
                f"{row} of {rows} has ignore_index: leave such rows out with mask=labels != ignore_index"
            ),
            row,
            rows,
        )
    return LabelError(
        lambda row, rows: (
            f"labels must be in [0, {classes}) or equal to ignore_index, got {label} at row {row} of {rows}; "
            "mark rows without a label with ignore_index, or leave them out with mask"
        ),
        row,
        rows,
    )


def target_error(label: float, row: int, column: int) -> str:
    """The message for a target that is no probability, the same on every backend."""
    return (
        f"labels of a binary divergence must be in [0, 1], got {label} at row {row}, class {column}; leave "
        "rows without labels out with mask"
    )


def reduce(loss: Tensor, rows: Tensor, num_items: Tensor | float | None, reduction: str) -> Tensor:
    """`none`, `sum`, or the sum over the number of counted rows or `num_items`; 0 where nothing counts."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / denominator(rows, num_items, loss.dtype)


def denominator(rows: Tensor, num_items: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """What a mean divides by."""
    counted = rows.sum()
    if num_items is None:
        items = counted.to(dtype)
    elif isinstance(num_items, Tensor):
        items = num_items.to(counted.device, dtype)
    else:
        items = counted.new_full((), num_items, dtype=dtype)
    return torch.where(counted == 0, 1.0, items)


def _figures(v: Tensor, T: float, binary: bool) -> tuple[Tensor, Tensor]:
    """Entropy of a teacher, and its most probable class, or which of its binary ones are likely."""
    return (binary_entropy(v / T), v > 0) if binary else (entropy(torch.log_softmax(v / T, -1)), v.argmax(-1))


def _stats(
    z: Tensor,
    teacher: tuple[Tensor, Tensor],
    soft: Tensor,
    hard: Tensor,
    target: Tensor | None,
    rows: Tensor,
    labelled: Tensor,
    num_items: Tensor | float | None,
    spec: LossSpec,
) -> Tensor:
    entropy_v, best_v = teacher
    entropy_z, best = _figures(z, spec.temperature, spec.row.binary)
    if spec.row.binary:
        agrees = (best == best_v).to(z.dtype).mean(-1)
        correct = None if target is None else (best == (target > 0.5)).to(z.dtype).mean(-1)
    else:
        agrees = (best == best_v).to(z.dtype)
        correct = None if target is None else (labelled & (best == target)).to(z.dtype)
    return summary(soft, hard, entropy_z, entropy_v, agrees, correct, rows, labelled, num_items, spec)


def summary(
    soft: Tensor,
    hard: Tensor,
    entropy_z: Tensor,
    entropy_v: Tensor,
    agrees: Tensor,
    correct: Tensor | None,
    rows: Tensor,
    labelled: Tensor,
    num_items: Tensor | float | None,
    spec: LossSpec,
) -> Tensor:
    """The seven figures of `KDStats`, from those of each row."""
    counted, answered = rows.sum(), labelled.sum()

    def over(x: Tensor, n: Tensor) -> Tensor:
        return torch.where(rows, x, 0.0).sum() / n.clamp(min=1)

    terms = "mean" if spec.reduction == "none" else spec.reduction
    return torch.stack(
        [
            reduce(torch.where(rows, spec.t_factor * soft, 0.0), rows, num_items, terms),
            reduce(torch.where(rows, hard, 0.0), rows, num_items, terms),
            over(entropy_z, counted),
            over(entropy_v, counted),
            over(agrees, counted),
            counted * 0.0 if correct is None else over(correct, answered),
            counted.to(soft.dtype),
        ]
    ).detach()


def entropy(lp: Tensor) -> Tensor:
    """Σ −p log p of each row of log-probabilities."""
    p = lp.exp()
    return -(p * torch.where(p > 0, lp, 0.0)).sum(-1)


def binary_entropy(x: Tensor) -> Tensor:
    """The same of a distribution for each logit, summed over the row."""
    # log(1 + e^−|x|) + |x| / (1 + e^|x|)
    x = x.abs()
    e = torch.exp(-x)
    return (torch.log1p(e) + torch.where(e > 0, x, 0.0) * e / (1 + e)).sum(-1)
