"""What the logits loss is, in fp64: each term with its closed-form gradient, without autograd or the package.

Names: p teacher, q student, lp and lq their logs, z student and v teacher logits, T the temperature, V the
classes. A row is one token. `test_functional.py` pins this file to autograd of the eager loss in
`tolerances.py`, which shares no formula with it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import log, log1p, log2
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The arguments of one call. `divergence` is a name, or a float: the beta of a JSD."""

    divergence: str | float = "forward_kl"
    temperature: float = 1.0
    t_squared: bool = True
    soft_weight: float = 1.0
    hard_weight: float = 0.0
    mask: Tensor | None = None
    ignore_index: int = -100
    token_weights: Tensor | None = None
    reduction: str = "mean"
    num_items: int | float | Tensor | None = None
    pad_vocab: bool = False
    student_scale: float = 1.0
    student_softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None

    def but(self, **changes: Any) -> Options:
        """The same options with some changed."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        """Only what differs from the defaults: these are test ids and hypothesis reports."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) is not f.default
        ]
        return f"Options({', '.join(changed)})"


@dataclass(frozen=True)
class Truth:
    """Loss and gradient in fp64, and how far one rounding in the computation may move each."""

    loss: Tensor  # scalar, or (rows...) for "none"
    grad: Tensor  # the student's shape: d sum(loss * upstream) / dz
    soft: Tensor  # (rows...) the soft term of each row, T² in it, unweighted
    hard: Tensor  # (rows...) the hard term of each row, unweighted, 0 where there is no label
    counted: Tensor  # (rows...) bool
    loss_unit: Tensor  # of the loss's shape; times eps: what one rounding of each intermediate may cost
    grad_unit: Tensor  # of the gradient's shape; the same


def log_softmax(y: Tensor) -> Tensor:
    """Log-softmax over the last dim; a row of -inf, or one with a NaN, is NaN, as torch's."""
    shifted = y - y.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def times(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value` where a weight of exactly 0 gives 0, whatever the value."""
    return torch.where(weight == 0, 0.0, weight * value)


def soft_term(divergence: str | float, lq: Tensor, lp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D per row, dD/dy per class (y = z / T), and the magnitudes of the terms that each is a sum of."""
    q, p = lq.exp(), lp.exp()
    if divergence in ("forward_kl", "soft_cross_entropy"):
        phi = times(p, lp - lq) if divergence == "forward_kl" else times(p, -lq)
        return phi.sum(-1), q - p, 1 + phi.abs().sum(-1), p + q
    if divergence == "reverse_kl":
        beta, ell = 0.0, lq - lp
        phi = times(q, ell)
    else:
        assert isinstance(divergence, float)
        beta = divergence
        lm = torch.logaddexp(lp + log(beta), lq + log1p(-beta))
        ell = lq - lm
        phi = beta * times(p, lp - lm) + (1 - beta) * times(q, ell)
    q_ell = times(q, ell)
    spread = q_ell.abs() + q * q_ell.abs().sum(-1, keepdim=True) + q
    dy = (1 - beta) * (q_ell - q * q_ell.sum(-1, keepdim=True))
    return phi.sum(-1), dy, 1 + phi.abs().sum(-1), (1 - beta) * spread


def processed(z: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Logits after scale and softcap, and their derivative with respect to the raw ones."""
    x = scale * z
    if softcap is None:
        return x, torch.full_like(x, scale)
    return softcap * (x / softcap).tanh(), scale / (x / softcap).cosh() ** 2


def magnitude(*logits: Tensor) -> Tensor:
    """Per row, the largest finite |logit| of each: an exponent is rounded relative to it."""
    return sum(x.nan_to_num(0, 0, 0).abs().amax(-1) for x in logits)  # type: ignore[return-value]


def counted_rows(z: Tensor, labels: Tensor | None, o: Options) -> Tensor:
    """Which rows count: the mask, else the labelled rows, else all."""
    if o.mask is not None:
        return o.mask
    return torch.ones_like(z[..., 0], dtype=torch.bool) if labels is None else labels != o.ignore_index


def row_weights(counted: Tensor, o: Options) -> Tensor:
    """Per row, the factor between its loss and the reduced one."""
    weight = counted.double()
    if o.token_weights is not None:
        weight = times(weight, o.token_weights.double())
    if o.reduction != "mean":
        return weight
    denominator = counted.sum().double() if o.num_items is None else torch.as_tensor(o.num_items).double()
    return weight if not counted.any() else weight / denominator


def truth(
    z: Tensor,
    v: Tensor,
    labels: Tensor | None = None,
    o: Options | None = None,
    upstream: Tensor | None = None,
) -> Truth:
    """The loss of `kd_loss` and d sum(loss * upstream) / dz, from the logits as they are (rounded to their
    dtype)."""
    o = o or Options()
    rows, vocab = z.shape[:-1], min(z.shape[-1], v.shape[-1])
    x, dx = processed(z.detach().double()[..., :vocab], o.student_scale, o.student_softcap)
    u, _ = processed(v.detach().double()[..., :vocab], o.teacher_scale, o.teacher_softcap)
    counted = counted_rows(z, labels, o)
    T = o.temperature

    soft, dy, soft_size, dy_size = soft_term(o.divergence, log_softmax(x / T), log_softmax(u / T))
    loss_factor, grad_factor = (T * T, T) if o.t_squared else (1.0, 1 / T)
    hard, dx_hard = torch.zeros_like(soft), torch.zeros_like(dy)
    hard_size, dx_hard_size = hard, dx_hard
    if labels is not None:
        labelled = (labels != o.ignore_index) & counted
        target = torch.where(labelled, labels, 0).long()[..., None]
        log_q = log_softmax(x)
        onehot = torch.zeros_like(x).scatter_(-1, target, 1.0)
        hard = torch.where(labelled, -log_q.gather(-1, target)[..., 0], 0.0)
        dx_hard = torch.where(labelled[..., None], log_q.exp() - onehot, 0.0)
        hard_size = torch.where(labelled, 1 + hard.abs(), 0.0)
        dx_hard_size = torch.where(labelled[..., None], log_q.exp() + onehot, 0.0)

    def mixed(s: Tensor, h: Tensor, s_factor: float) -> Tensor:
        # A term of weight 0 is left out, so that its infinities are too.
        total = torch.zeros_like(s)
        if o.soft_weight:
            total = total + o.soft_weight * s_factor * s
        return total + o.hard_weight * h if o.hard_weight else total

    # How many roundings stand between a logit and its probability, in units of eps: the exponent's, which is
    # relative to
    # the logits, and those of a tree sum over the classes.
    roundings = magnitude(x / T, u / T) + (magnitude(x) if o.hard_weight else 0) + log2(vocab) + 4
    weight = row_weights(counted, o)
    loss = times(weight, torch.where(counted, mixed(soft, hard, loss_factor), 0.0))
    loss_unit = times(weight.abs(), mixed(soft_size, hard_size, loss_factor).abs() * roundings)
    up = torch.ones_like(loss) if upstream is None else upstream.double().expand(rows)
    per_row = (weight * up)[..., None]
    grad = times(per_row.expand(x.shape), dx * mixed(dy, dx_hard, grad_factor))
    grad_unit = times(
        per_row.abs().expand(x.shape),
        abs(o.student_scale) * mixed(dy_size, dx_hard_size, grad_factor).abs() * roundings[..., None],
    )
    if o.reduction != "none":
        loss, loss_unit = loss.sum(), loss_unit.sum()
    padding = (0, z.shape[-1] - vocab)
    return Truth(
        loss=loss,
        grad=torch.nn.functional.pad(grad, padding),
        soft=torch.where(counted, (T * T if o.t_squared else 1.0) * soft, 0.0),
        hard=hard,
        counted=counted,
        loss_unit=loss_unit,
        grad_unit=torch.nn.functional.pad(grad_unit, padding),
    )
