"""The table of divergences: each is a pair of expressions over one class.

`phi(lq, lp)` is the class's share of the divergence, D = Σ phi, and `g(lq, lp)` = ∂phi/∂lq. With q the
student's probabilities, lq their logs, p and lp the teacher's, the gradient with respect to the student's
logits of any D is

    dz = (g − q · Σ g) / T

so everything around the pair (softmax, temperature, masks, labels, weights, reductions) is written once per
backend. The expressions use `xp.exp`, `log`, `log1p`, `where`, `abs` and `maximum` only: `xp` is torch here,
and a backend that compiles them binds it to its own namespace. Guards against 0 · inf stand inside the
product (`p * where(p == 0, 0, ...)`), so that autograd of `phi` has no NaN in a branch that was not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch as xp


def phi_forward_kl(lq: Any, lp: Any) -> Any:
    """φ = p (lp − lq)."""
    p = xp.exp(lp)
    return p * xp.where(p == 0, 0.0, lp - lq)


def g_forward_kl(lq: Any, lp: Any) -> Any:
    """∂φ/∂lq = −p."""
    return -xp.exp(lp)


def phi_soft_cross_entropy(lq: Any, lp: Any) -> Any:
    """φ = −p lq."""
    p = xp.exp(lp)
    return -p * xp.where(p == 0, 0.0, lq)


def g_soft_cross_entropy(lq: Any, lp: Any) -> Any:
    """∂φ/∂lq = −p."""
    return -xp.exp(lp)


def phi_reverse_kl(lq: Any, lp: Any) -> Any:
    """φ = q (lq − lp)."""
    q = xp.exp(lq)
    return q * xp.where(q == 0, 0.0, lq - lp)


def g_reverse_kl(lq: Any, lp: Any) -> Any:
    """∂φ/∂lq = q (lq − lp) + q."""
    q = xp.exp(lq)
    return q * xp.where(q == 0, 0.0, lq - lp) + q


def phi_jsd(lq: Any, lp: Any, beta: float) -> Any:
    """φ = β p (lp − lm) + (1−β) q (lq − lm)."""
    # With d = lp − lq and m = βp + (1−β)q: lq − lm = −log(β·e^d + 1 − β), lp − lm = d + (lq − lm). Taking the
    # exponential of −|d| keeps both finite at any margin, and log1p keeps them accurate where p is near q.
    # Every branch takes the same side at d = 0 (abs would not), so that autograd is right there too.
    p = xp.exp(lp)
    q = xp.exp(lq)
    d = lp - lq
    t = xp.exp(xp.where(d < 0, d, -d)) - 1.0
    log_mix = xp.log1p(xp.where(d < 0, beta * t, (1.0 - beta) * t))
    lp_lm = xp.where(p == 0, 0.0, xp.where(d < 0, d, 0.0) - log_mix)
    lq_lm = xp.where(q == 0, 0.0, xp.where(d < 0, 0.0, -d) - log_mix)
    return beta * p * lp_lm + (1.0 - beta) * q * lq_lm


def g_jsd(lq: Any, lp: Any, beta: float) -> Any:
    """∂φ/∂lq = (1−β) q (lq − lm); the other terms cancel."""
    q = xp.exp(lq)
    d = lp - lq
    t = xp.exp(xp.where(d < 0, d, -d)) - 1.0
    log_mix = xp.log1p(xp.where(d < 0, beta * t, (1.0 - beta) * t))
    return (1.0 - beta) * q * xp.where(q == 0, 0.0, xp.where(d < 0, 0.0, -d) - log_mix)


@dataclass(frozen=True)
class Closed:
    """How a divergence follows from sums of the first read of the rows, so that none comes after it.

    With a the logits over T of the side whose probabilities w weigh, and b the other's,
    D = Σ w (A a + B b) − A lse a − B lse b, and Σ g = `sum_g` + `sum_g_per_d` · D.
    """

    teacher_weighs: bool
    a: float
    b: float
    sum_g: float
    sum_g_per_d: float


@dataclass(frozen=True)
class Divergence:
    """A row of the table: name, the two expressions, the names of their parameters, a closed form if any."""

    name: str
    phi: Callable[..., Any]
    g: Callable[..., Any]
    params: tuple[str, ...] = ()
    closed: Closed | None = None


TABLE: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence(
            "forward_kl",
            phi_forward_kl,
            g_forward_kl,
            closed=Closed(True, 1.0, -1.0, sum_g=-1.0, sum_g_per_d=0.0),
        ),
        Divergence(
            "soft_cross_entropy",
            phi_soft_cross_entropy,
            g_soft_cross_entropy,
            closed=Closed(True, 0.0, -1.0, sum_g=-1.0, sum_g_per_d=0.0),
        ),
        Divergence(
            "reverse_kl",
            phi_reverse_kl,
            g_reverse_kl,
            closed=Closed(False, 1.0, -1.0, sum_g=1.0, sum_g_per_d=1.0),
        ),
        Divergence("jsd", phi_jsd, g_jsd, ("beta",)),
    )
}


@runtime_checkable
class Parametrised(Protocol):
    """A divergence with parameters: it names its row of the table and gives their values, in order."""

    @property
    def name(self) -> str:
        """The row of the table."""

    @property
    def params(self) -> tuple[float, ...]:
        """The values of the row's parameters."""


@dataclass(frozen=True)
class JSD:
    """Generalised Jensen-Shannon divergence, as in GKD.

    Formula: β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q, with p the teacher and q the student, in nats.
    Gradient with respect to the student's logits, T² included: T·(1−β)·q·(ℓ − ⟨q, ℓ⟩), ℓ = log(q/m).
    Source: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, equation 1 (there with p
        the student).

    Args:
        beta: The teacher's share of the mixture, 0 < beta < 1.

    Raises:
        ValueError: `beta` outside (0, 1). The limits are other divergences: `kd.gkd` maps 0 and 1 to them.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta of JSD must lie strictly between 0 and 1, got {self.beta}: use "
                "divergence='forward_kl' for 0, 'reverse_kl' for 1, or kd.gkd(beta), which chooses among the "
                "three"
            )

    @property
    def name(self) -> str:
        """The row of the table."""
        return "jsd"

    @property
    def params(self) -> tuple[float, ...]:
        """The values of the row's parameters."""
        return (float(self.beta),)


# Strings that stand for a parametrised divergence with its default.
DEFAULTS: dict[str, Parametrised] = {"jsd": JSD()}


def gkd(beta: float) -> str | JSD:
    """The divergence that GKD calls β, for those who come from TRL or Liger.

    Formula: forward KL(p‖q) at 0, reverse KL(q‖p) at 1, `JSD(beta)` between. (JSD itself tends to 0 at both
    ends; the two KLs are its limits after division by β and 1−β.)

    Args:
        beta: 0 ≤ beta ≤ 1.

    Returns:
        What `kd_loss` takes as `divergence`.

    Raises:
        ValueError: `beta` outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta of gkd must lie in [0, 1], got {beta}")
    if beta == 0.0:
        return "forward_kl"
    if beta == 1.0:
        return "reverse_kl"
    return JSD(beta)


def resolve(divergence: str | Parametrised) -> tuple[str, tuple[float, ...]]:
    """The table's name and the parameters' values of what a caller gave as `divergence`."""
    if isinstance(divergence, str):
        if divergence in DEFAULTS:
            divergence = DEFAULTS[divergence]
        elif divergence in TABLE:
            return divergence, ()
        else:
            raise ValueError(
                f"divergence must be one of {', '.join(map(repr, TABLE))} or an object such as "
                f"kd.JSD(beta=0.5), got {divergence!r}"
            )
    if isinstance(divergence, Parametrised) and divergence.name in TABLE:
        return divergence.name, divergence.params
    raise TypeError(
        f"divergence must be a string ({', '.join(map(repr, TABLE))}) or an object such as kd.JSD(beta=0.5), "
        f"got {type(divergence).__name__}"
    )
