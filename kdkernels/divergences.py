"""The table of divergences: each is a pair of expressions over one class, which stand in `expressions.py`.

`phi(lq, lp)` is the class's share of the divergence, D = Σ phi, and `g(lq, lp)` = ∂phi/∂lq. With q the
student's probabilities, lq their logs, p and lp the teacher's, the gradient with respect to the student's
logits of any D is

    dz = (g − q · Σ g) / T

so everything around the pair (softmax, temperature, masks, labels, weights, reductions) is written once per
backend. A row of the table says what its lq and lp are where they are not logs of a softmax:

    normaliser    lq (lp likewise)    dz
    softmax       y − log Σ e^y       (g − q · Σ g) / T
    mean          y − mean(y)         g / T, for pairs whose g sums to 0
    none          y                   g / T                              with y = z / T, u = v / T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from . import expressions as ex


@dataclass(frozen=True)
class Closed:
    """How a divergence follows from sums of the first read of the rows, so that none comes after it.

    With a the logits over T of the side whose probabilities w weigh, and b the other's,
    D = c (Σ w (A a + B b) − A lse a − B lse b), and Σ g = c `sum_g` + `sum_g_per_d` · D; c is 1, or the
    parameter of number `times`.
    """

    teacher_weighs: bool
    a: float
    b: float
    sum_g: float
    sum_g_per_d: float
    times: int | None = None


Normaliser = Literal["softmax", "mean", "none"]


@dataclass(frozen=True)
class Divergence:
    """A row of the table.

    Attributes:
        name: What it is called.
        phi: A class's share of D.
        g: Its derivative.
        params: The names of the parameters of both.
        closed: The closed form, if there is one.
        normaliser: What lq and lp are: logs of probabilities, or logits over T, centred or not.
        target: Whether the pair is about the classes that are not the target alone. Then with the margins of
            the target, μ = y_t − lse of the other y and ν of the teacher, D = Σ phi + α·phi_binary_kl(μ, ν),
            α the first parameter; with γ = α·g_binary_kl(μ, ν) the gradient is (g − q (Σ g + γ)) / T, and
            γ / T for the target.
        binary: Whether a class is a question of its own: the hard term is the binary cross-entropy of labels
            `[..., V]`.
    """

    name: str
    phi: Callable[..., Any]
    g: Callable[..., Any]
    params: tuple[str, ...] = ()
    closed: Closed | None = None
    normaliser: Normaliser = "softmax"
    target: bool = False
    binary: bool = False


_KL = Closed(True, 1.0, -1.0, sum_g=-1.0, sum_g_per_d=0.0)

TABLE: dict[str, Divergence] = {
    d.name: d
    for d in (
        Divergence("forward_kl", ex.phi_forward_kl, ex.g_forward_kl, closed=_KL),
        Divergence(
            "soft_cross_entropy",
            ex.phi_soft_cross_entropy,
            ex.g_soft_cross_entropy,
            closed=Closed(True, 0.0, -1.0, sum_g=-1.0, sum_g_per_d=0.0),
        ),
        Divergence(
            "reverse_kl",
            ex.phi_reverse_kl,
            ex.g_reverse_kl,
            closed=Closed(False, 1.0, -1.0, sum_g=1.0, sum_g_per_d=1.0),
        ),
        Divergence("jsd", ex.phi_jsd, ex.g_jsd, ("beta",)),
        Divergence("skew_kl", ex.phi_skew_kl, ex.g_skew_kl, ("alpha",)),
        Divergence("skew_reverse_kl", ex.phi_skew_reverse_kl, ex.g_skew_reverse_kl, ("alpha",)),
        Divergence("tvd", ex.phi_tvd, ex.g_tvd),
        Divergence("squared_error", ex.phi_squared_error, ex.g_squared_error),
        Divergence("alpha_beta", ex.phi_alpha_beta, ex.g_alpha_beta, ("alpha", "beta")),
        Divergence("logit_mse", ex.phi_logit_mse, ex.g_logit_mse, normaliser="none"),
        Divergence("centered_logit_mse", ex.phi_logit_mse, ex.g_logit_mse, normaliser="mean"),
        Divergence("dkd", ex.phi_dkd, ex.g_dkd, ("alpha", "beta"), closed=replace(_KL, times=1), target=True),
        Divergence("binary_kl", ex.phi_binary_kl, ex.g_binary_kl, normaliser="none", binary=True),
    )
}
BUILT_IN = frozenset(TABLE)


@runtime_checkable
class Parametrised(Protocol):
    """A divergence with parameters: it names its row of the table and gives their values, in order."""

    @property
    def name(self) -> str:
        """The row of the table."""

    @property
    def params(self) -> tuple[float, ...]:
        """The values of the row's parameters."""


class _Choice:
    """A frozen dataclass whose fields are the parameters of a row of the table."""

    name: ClassVar[str]

    @property
    def params(self) -> tuple[float, ...]:
        """The values of the row's parameters."""
        return tuple(float(getattr(self, name)) for name in TABLE[self.name].params)

    def _numbers(self, unbounded: bool = False) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                kind = type(value).__name__
                raise TypeError(f"{f.name} of {type(self).__name__} must be a Python number, got {kind}")
            if unbounded and not -math.inf < value < math.inf:
                raise ValueError(f"{f.name} of {type(self).__name__} must be finite, got {value}")


@dataclass(frozen=True)
class JSD(_Choice):
    """Generalised Jensen-Shannon divergence, as in GKD.

    Formula: β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q, with p the teacher and q the student, in nats.
    Gradient with respect to the student's logits, T² included: T·(1−β)·q·(ℓ − ⟨q, ℓ⟩), ℓ = log(q/m).
    Source: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, equation 1 (there with p
        the student).

    Args:
        beta: The teacher's share of the mixture, 0 < beta < 1.

    Raises:
        TypeError: `beta` is not a number.
        ValueError: `beta` outside (0, 1). The limits are other divergences: `kd.gkd` maps 0 and 1 to them.
    """

    name: ClassVar[str] = "jsd"
    beta: float = 0.5

    def __post_init__(self) -> None:
        self._numbers()
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta of JSD must lie strictly between 0 and 1, got {self.beta}: use "
                "divergence='forward_kl' for 0, 'reverse_kl' for 1, or kd.gkd(beta), which chooses among the "
                "three"
            )


@dataclass(frozen=True)
class SkewKL(_Choice):
    """Forward KL to a mixture that holds some of the teacher, so that it is finite whatever the student.

    Formula: KL(p‖m), m = α·p + (1−α)·q, with p the teacher and q the student, in nats.
    Gradient with respect to the student's logits, T² included: T·(1−α)·q·(⟨q, r⟩ − r), r = p/m.
    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
        section 3.1.

    Args:
        alpha: The teacher's share of the mixture, 0 < alpha < 1.

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` outside (0, 1).
    """

    name: ClassVar[str] = "skew_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        self._numbers()
        _check_skew("SkewKL", self.alpha, "forward_kl")


@dataclass(frozen=True)
class SkewReverseKL(_Choice):
    """Reverse KL to a mixture that holds some of the student, so that it is finite whatever the teacher.

    Formula: KL(q‖m), m = (1−α)·p + α·q, with p the teacher and q the student, in nats.
    Gradient with respect to the student's logits, T² included: T·q·(h − ⟨q, h⟩), h = log(q/m) − α·q/m.
    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024,
        section 3.1.

    Args:
        alpha: The student's share of the mixture, 0 < alpha < 1.

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` outside (0, 1).
    """

    name: ClassVar[str] = "skew_reverse_kl"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        self._numbers()
        _check_skew("SkewReverseKL", self.alpha, "reverse_kl")


def _check_skew(owner: str, alpha: float, limit: str) -> None:
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha of {owner} must lie strictly between 0 and 1, got {alpha}: use divergence={limit!r} for "
            "0; at 1 there would be nothing to learn"
        )


@dataclass(frozen=True)
class AlphaBeta(_Choice):
    """α-β divergence: (1, 0) is the forward KL, (0, 1) the reverse one, (1, 1) half the squared distance.

    Formula: −1/(αβ) · Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)], with p the teacher and q the student.
        Limits: β = 0: α⁻² Σ [p^α log(p^α/q^α) − p^α + q^α]; α = 0: β⁻² Σ [q^β log(q^β/p^β) − q^β + p^β];
        α + β = 0: α⁻² Σ [log(q^α/p^α) + (p/q)^α − 1]; both 0: ½ Σ (log p − log q)².
    Gradient with respect to the student's logits, T² included: T·(w − q·Σw), w = (q^(α+β) − p^α q^β)/α, and
        q^β log(q/p) at α = 0.
    Numbers: no digits are lost near α = 0 or β = 0 (below 1e-30 they are 0); where |α + β| is small and not
        0, rounding errors of the loss (not of the gradient) grow as 1/|α + β|. With a negative exponent, a
        class that the student or the teacher all but excludes may make the divergence infinite.
    Source: Cichocki et al., "Generalized Alpha-Beta Divergences and Their Application to Robust Nonnegative
        Matrix Factorization", Entropy 2011; for distillation Wang et al., "ABKD", ICML 2025.

    Args:
        alpha: The teacher's exponent, any finite number.
        beta: The student's exponent, any finite number.

    Raises:
        TypeError: A parameter is not a number.
        ValueError: A parameter is not finite.
    """

    name: ClassVar[str] = "alpha_beta"
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        self._numbers(unbounded=True)

    @property
    def params(self) -> tuple[float, ...]:
        """Both exponents; one too small for a reciprocal in float32 is 0."""
        return tuple(0.0 if abs(x) < 1e-30 else float(x) for x in (self.alpha, self.beta))


@dataclass(frozen=True)
class LogitMSE:
    """Half the squared distance of the logits themselves, or of their deviations from their mean.

    Formula: T²·D = ½·Σ (z − v)², whatever T; centred ½·Σ ((z − z̄) − (v − v̄))², means over the classes that
        are finite on both sides. `F.mse_loss(z, v)` is 2/V of it.
    Gradient with respect to the student's logits: z − v; centred (z − z̄) − (v − v̄).
    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, equation 1; the centred form
        is V times the limit of T²·KL for T → ∞ (Hinton et al., 2015, section 2.1).

    Args:
        centered: Take each side's mean off first, which a softmax would not see.

    Raises:
        TypeError: `centered` is not a bool.
    """

    centered: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.centered, bool):
            raise TypeError(f"centered of LogitMSE must be a bool, got {type(self.centered).__name__}")

    @property
    def name(self) -> str:
        """The row of the table."""
        return "centered_logit_mse" if self.centered else "logit_mse"

    @property
    def params(self) -> tuple[float, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class DKD(_Choice):
    """Decoupled knowledge distillation: how sure, and which of the others, weighed apart.

    Formula: α·KL(b_p‖b_q) + β·KL(p̂‖q̂), with b = (probability of the target, of all others), p̂ and q̂ the
        distributions over the classes that are not the target. KL(p‖q) itself is α = 1, β = 1 − p_t. Right at
        any margin of the target; with two classes the second term is 0.
    Gradient with respect to the student's logits, T² included: T·α·(q_t − p_t) for the target t, and
        T·[β·(q̂ − p̂) − α·(q_t − p_t)·q̂] for the others.
    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, section 3.

    Every row that counts needs a label: one without is an error on a CPU; elsewhere looking would wait for
    the device, and the row is NaN.

    Args:
        alpha: Weight of the target's term.
        beta: Weight of the others' term.

    Raises:
        TypeError: A parameter is not a number.
        ValueError: A parameter is not finite.
    """

    name: ClassVar[str] = "dkd"
    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        self._numbers(unbounded=True)


@dataclass(frozen=True)
class BinaryKL(_Choice):
    """KL of each class's own yes or no, for multilabel models: one sigmoid per class.

    Formula: Σ over classes of p log(p/q) + (1−p) log((1−p)/(1−q)), p = σ(v/T), q = σ(z/T), in nats. The hard
        term is Σ BCE(y, σ(z)) at T = 1, of labels y in [0, 1] of shape `[..., V]`; every row counts unless
        `mask` says otherwise. `F.binary_cross_entropy_with_logits(z, y)` is 1/V of it.
    Gradient with respect to the student's logits, T² included: T·(q − p); of the hard term σ(z) − y.
    Source: Hinton et al., 2015, section 2, for each class by itself.
    """

    name: ClassVar[str] = "binary_kl"


# Strings that stand for a parametrised divergence with its default.
DEFAULTS: dict[str, Parametrised] = {
    "jsd": JSD(),
    "skew_kl": SkewKL(),
    "skew_reverse_kl": SkewReverseKL(),
    "dkd": DKD(),
}


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
        elif divergence in TABLE and not TABLE[divergence].params:
            return divergence, ()
        elif divergence in TABLE:
            names = ", ".join(TABLE[divergence].params)
            raise ValueError(
                f"divergence {divergence!r} has parameters without defaults: give an object with "
                f"{names}, such as kd.AlphaBeta(alpha=0.2, beta=0.7)"
            )
        else:
            raise ValueError(f"divergence must be {_choices()}, got {divergence!r}")
    if isinstance(divergence, type):
        raise TypeError(
            f"divergence must be an object, got the class {divergence.__name__}: call it, as in "
            f"{divergence.__name__}()"
        )
    if isinstance(divergence, Parametrised) and divergence.name in TABLE:
        wanted, given = TABLE[divergence.name].params, divergence.params
        if any(isinstance(value, str) for value in given):
            raise TypeError(
                f"divergence {divergence.name!r} has parameters ({', '.join(wanted)}): call what "
                "register_divergence returned with their values, and pass what that gives"
            )
        if len(given) != len(wanted):
            raise ValueError(
                f"divergence {divergence.name!r} has parameters ({', '.join(wanted)}), got {given}"
            )
        return divergence.name, given
    raise TypeError(f"divergence must be {_choices()}, got {type(divergence).__name__}")


def _choices() -> str:
    names = (n for n, d in TABLE.items() if n in DEFAULTS or not d.params)
    return f"a string ({', '.join(map(repr, names))}) or an object such as kd.JSD(beta=0.5)"
