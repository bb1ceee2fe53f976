"""Divergences of one row in fp64, as their papers write them, differentiated by autograd.

Nothing here comes from the package's own expressions: they are examined too. Each is right at −inf logits,
where a class has probability 0 and its term the limit 0 · log 0 = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sides:
    """Both sides of some rows, over the temperature: logits, log-probabilities, probabilities."""

    y: Tensor
    u: Tensor
    lq: Tensor
    lp: Tensor
    q: Tensor
    p: Tensor
    labels: Tensor | None

    @classmethod
    def of(cls, y: Tensor, u: Tensor, labels: Tensor | None) -> Sides:
        """Of logits `[N, V]`. Classes that neither side has weigh nothing, and have finite logs here."""
        dead = torch.isneginf(y) & torch.isneginf(u)
        lq, lp = F.log_softmax(y, -1), F.log_softmax(u, -1)
        q, p = lq.exp(), lp.exp()
        return cls(y, u, lq.masked_fill(dead, 0.0), lp.masked_fill(dead, 0.0), q, p, labels)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """The product, and 0 where the weight is, whatever x; so is its derivative."""
    return weight * torch.where(weight == 0, 0.0, x)


def forward_kl(s: Sides) -> Tensor:
    """KL(p‖q)."""
    return _product(s.p, s.lp - s.lq).sum(-1)


def reverse_kl(s: Sides) -> Tensor:
    """KL(q‖p)."""
    return _product(s.q, s.lq - s.lp).sum(-1)


def soft_cross_entropy(s: Sides) -> Tensor:
    """H(p, q)."""
    return _product(s.p, -s.lq).sum(-1)


def _log_mix(s: Sides, of_teacher: float) -> Tensor:
    return torch.logaddexp(s.lp + math.log(of_teacher), s.lq + math.log1p(-of_teacher))


def jsd(s: Sides, beta: float) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q."""
    lm = _log_mix(s, beta)
    return beta * _product(s.p, s.lp - lm).sum(-1) + (1 - beta) * _product(s.q, s.lq - lm).sum(-1)


def skew_kl(s: Sides, alpha: float) -> Tensor:
    """KL(p‖αp + (1−α)q)."""
    return _product(s.p, s.lp - _log_mix(s, alpha)).sum(-1)


def skew_reverse_kl(s: Sides, alpha: float) -> Tensor:
    """KL(q‖(1−α)p + αq)."""
    return _product(s.q, s.lq - _log_mix(s, 1 - alpha)).sum(-1)


def tvd(s: Sides) -> Tensor:
    """½‖p − q‖₁."""
    return 0.5 * (s.q - s.p).abs().sum(-1)


def squared_error(s: Sides) -> Tensor:
    """½‖p − q‖²."""
    return 0.5 * (s.q - s.p).square().sum(-1)


def alpha_beta(s: Sides, alpha: float, beta: float) -> Tensor:
    """−Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] / (αβ), where none of the three is 0."""
    total = alpha + beta
    dead = torch.isneginf(s.y) & torch.isneginf(s.u)
    # From logs: the derivative of a root of 0 is infinite.
    powers = (alpha * s.lp + beta * s.lq).exp()
    powers = powers - alpha / total * (total * s.lp).exp() - beta / total * (total * s.lq).exp()
    return -powers.masked_fill(dead, 0.0).sum(-1) / (alpha * beta)


def logit_mse(s: Sides) -> Tensor:
    """½‖z − v‖², over T²."""
    return 0.5 * torch.where(s.y == s.u, 0.0, s.y - s.u).square().sum(-1)


def centered_logit_mse(s: Sides) -> Tensor:
    """½‖(z − z̄) − (v − v̄)‖², over T²."""
    y, u = (x - x.mean(-1, keepdim=True) for x in (s.y, s.u))
    return 0.5 * (y - u).square().sum(-1)


def binary_kl(s: Sides) -> Tensor:
    """Σ over classes of the KL of yes or no, σ of the logits."""

    def half(y: Tensor, u: Tensor) -> Tensor:
        return _product(u.sigmoid(), F.logsigmoid(u) - F.logsigmoid(y))

    return (half(s.y, s.u) + half(-s.y, -s.u)).sum(-1)


def _labels(s: Sides) -> Tensor:
    assert s.labels is not None
    return s.labels[:, None]


def target_kl(s: Sides) -> Tensor:
    """KL of (target, all others)."""
    others_q = s.y.scatter(-1, _labels(s), -math.inf).logsumexp(-1) - s.y.logsumexp(-1)
    others_p = s.u.scatter(-1, _labels(s), -math.inf).logsumexp(-1) - s.u.logsumexp(-1)
    lq, lp = (x.gather(-1, _labels(s)).squeeze(-1) for x in (s.lq, s.lp))
    return _product(lp.exp(), lp - lq) + _product(others_p.exp(), others_p - others_q)


def others_kl(s: Sides) -> Tensor:
    """KL among the classes that are not the target."""
    y, u = (x.scatter(-1, _labels(s), -math.inf) for x in (s.y, s.u))
    return forward_kl(Sides.of(y, u, None))


def hard_cross_entropy(z: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """−log softmax(z) of the label; of the smoothing's share, the mean of that of all classes."""
    logs = -F.log_softmax(z, -1)
    hard = logs.gather(-1, labels[:, None]).squeeze(-1)
    return (1 - smoothing) * hard + smoothing * logs.mean(-1) if smoothing else hard


def truncated(s: Sides, k: float) -> Tensor:
    """Σ p log(p/q) over the teacher's k most probable classes, of which neither side sums to 1."""
    kept = s.u.topk(int(k), -1).indices
    return _product(s.p, s.lp - s.lq).gather(-1, kept).sum(-1)


def renormalised(s: Sides, k: float) -> Tensor:
    """KL over the teacher's k most probable classes, both sides made to sum to 1 over them."""
    kept = s.u.topk(int(k), -1).indices
    return forward_kl(Sides.of(s.y.gather(-1, kept), s.u.gather(-1, kept), None))


@dataclass(frozen=True)
class Family:
    """A divergence that a loss may be, up to factors and parameters.

    Attributes:
        name: As the package's table calls it, where it does.
        words: As a scorecard calls it.
        parts: The terms, each with a factor of its own.
        params: The names of the parameters.
        starts: Where a fit of the parameters begins.
        exact: Whether the starts are all that the parameters can be.
        softmax: Whether a constant added to a row changes nothing.
        proper: Whether it is least where both sides are the same, and only there.
        labelled: Whether it needs a label.
    """

    name: str
    words: str
    parts: tuple[Callable[..., Tensor], ...]
    params: tuple[str, ...] = ()
    starts: Sequence[tuple[float, ...]] = ((),)
    exact: bool = False
    softmax: bool = True
    proper: bool = True
    labelled: bool = False

    def values(self, s: Sides, theta: tuple[float, ...]) -> list[Tensor]:
        """Each part of each row, `[N]`."""
        return [part(s, *theta) for part in self.parts]


def families(classes: int) -> list[Family]:
    """All that are looked for, in order: one that contains others comes after them."""
    shares = tuple((x,) for x in (0.05, 0.25, 0.5, 0.75, 0.95))
    ks = tuple((float(k),) for k in range(1, classes))
    exponents = (-0.6, 0.3, 0.8, 1.7)
    pairs = tuple((a, b) for a in exponents for b in exponents if abs(a + b) > 0.1)
    return [
        Family("forward_kl", "forward KL(p‖q)", (forward_kl,)),
        Family("reverse_kl", "reverse KL(q‖p)", (reverse_kl,)),
        Family("soft_cross_entropy", "soft cross-entropy H(p, q)", (soft_cross_entropy,)),
        Family("tvd", "total variation ½‖p − q‖₁", (tvd,)),
        Family("squared_error", "squared error ½‖p − q‖²", (squared_error,)),
        Family("logit_mse", "squared error of the logits, ½‖z − v‖²", (logit_mse,), softmax=False),
        Family("centered_logit_mse", "squared error of the centred logits", (centered_logit_mse,)),
        Family("binary_kl", "binary KL of every class", (binary_kl,), softmax=False),
        Family("jsd", "JSD", (jsd,), ("β",), shares),
        Family("skew_kl", "skew KL(p‖αp + (1−α)q)", (skew_kl,), ("α",), shares),
        Family("skew_reverse_kl", "skew reverse KL(q‖(1−α)p + αq)", (skew_reverse_kl,), ("α",), shares),
        Family("dkd", "DKD", (target_kl, others_kl), labelled=True),
        Family("truncated", "forward KL truncated to the teacher's top k", (truncated,), ("k",), ks, True,
               proper=False),
        Family("renormalised", "forward KL renormalised over the teacher's top k", (renormalised,), ("k",),
               ks, True, proper=False),
        Family("mixture", "mixture of forward and reverse KL", (forward_kl, reverse_kl)),
        Family("mixture_mse", "mixture of forward KL and squared error of the logits",
               (forward_kl, logit_mse), softmax=False),
        Family("alpha_beta", "α-β divergence", (alpha_beta,), ("α", "β"), pairs),
    ]  # fmt: skip
