"""docs/maths.md: each formula that stands by itself holds, in float64, of `kd_loss` and of its autograd.

A check is found by the formula's own text: who changes a formula changes its check, and none goes unchecked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import TABLE, resolve

PAGE = (Path(__file__).parent.parent / "docs" / "maths.md").read_text(encoding="utf-8")
FORMULAS = [" ".join(tex.split()) for tex in re.findall(r"^\$\$\n(.*?)\n\$\$$", PAGE, re.M | re.S)]
V, T, t = 7, 1.7, 2
A, B = 0.3, 0.6  # α and β
SOFTMAX = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", "tvd", "squared_error", kd.JSD(A), kd.SkewKL(A),
    kd.SkewReverseKL(A), kd.AlphaBeta(A, B), kd.AlphaBeta(0, B), kd.AlphaBeta(A, 0), kd.AlphaBeta(-0.4, 0.4),
)  # fmt: skip
Check = Callable[[], None]
CHECKS: dict[str, list[Check]] = {}


def formula(tex: str) -> Callable[[Check], Check]:
    """The check of a formula; one that is there twice has a check for each place."""

    def keep(check: Check) -> Check:
        CHECKS.setdefault(" ".join(tex.split()), []).append(check)
        return check

    return keep


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, v = (2 * torch.randn(V, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, v


def softmaxes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, v, q, p."""
    z, v = logits()
    return z, v, (z / T).softmax(-1), (v / T).softmax(-1)


def loss(z: Tensor, v: Any, label: Any = None, **options: Any) -> Tensor:
    return kd.kd_loss(z, v, label, backend="reference", **{"temperature": T, **options})


def slope(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (got,) = torch.autograd.grad(f(z), z)
    return got


def close(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def value(divergence: Any, by_hand: Callable[[Tensor, Tensor], Tensor], label: Any = None) -> Check:
    """D is what the formula says, of `kd_loss`; and so is its slope."""

    def check() -> None:
        z, v, _, p = softmaxes()

        def written(z: Tensor) -> Tensor:
            return T * T * by_hand((z / T).softmax(-1), p)

        options = (
            {"divergence": divergence} if label is None else {"divergence": divergence, "hard_weight": 0.0}
        )
        close(loss(z, v, label, **options), written(z))
        close(slope(lambda z: loss(z, v, label, **options), z), slope(written, z))

    return check


def gradient(divergence: Any, by_hand: Callable[[Tensor, Tensor], Tensor]) -> Check:
    """The slope of T²·D is what the formula says of q and p."""

    def check() -> None:
        z, v, q, p = softmaxes()
        close(slope(lambda z: loss(z, v, divergence=divergence), z), by_hand(q, p))

    return check


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return inner(p, p.log() - q.log())


# The frame


@formula(r"L = w_s T^2 D(p, q) + w_h \left( \log \sum_i e^{z_i} - z_t \right)")
def _row() -> None:
    z, v, q, p = softmaxes()
    wanted = 0.9 * T * T * kl(p, q) + 0.2 * (z.exp().sum().log() - z[t])
    close(loss(z, v, torch.tensor(t), soft_weight=0.9, hard_weight=0.2), wanted)


@formula(r"D(p, q) = \sum_i \varphi(\log q_i, \log p_i)")
def _sum_of_phi() -> None:
    z, v, q, p = softmaxes()
    for divergence in SOFTMAX:
        name, params = resolve(divergence)
        close(loss(z, v, divergence=divergence), T * T * TABLE[name].phi(q.log(), p.log(), *params).sum())


@formula(
    r"\frac{\partial L}{\partial z_i} = w_s T \left( g_i - q_i \sum_j g_j \right) + w_h \left( "
    r"\mathrm{softmax}(z)_i - [i = t] \right)"
)
def _frame() -> None:
    z, v, q, p = softmaxes()
    hard = 0.2 * (z.softmax(-1) - torch.eye(V, dtype=z.dtype)[t])
    for divergence in SOFTMAX:
        name, params = resolve(divergence)
        g = TABLE[name].g(q.log(), p.log(), *params)
        options = {"divergence": divergence, "soft_weight": 0.9, "hard_weight": 0.2}
        got = slope(lambda z, o=options: loss(z, v, torch.tensor(t), **o), z)  # type: ignore[misc]
        close(got, 0.9 * T * (g - q * g.sum()) + hard)


@formula(r"\bar L = \frac{\sum_n m_n \omega_n L_n}{\sum_n m_n}")
def _mean() -> None:
    generator = torch.Generator().manual_seed(3)
    z, v = (torch.randn(5, V, generator=generator, dtype=torch.float64) for _ in range(2))
    m, w = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.rand(5, generator=generator, dtype=torch.float64)
    rows = loss(z, v, reduction="none")
    close(loss(z, v, mask=m, token_weights=w), (m * w * rows).sum() / m.sum())
    close(loss(z, v, mask=m, token_weights=w, num_items=11), (m * w * rows).sum() / 11)
    close(loss(z, v, mask=torch.zeros(5).bool()), 0.0)


@formula(r"\lim_{T \to \infty} T (q_i - p_i) = \frac{(z_i - \bar z) - (v_i - \bar v)}{V}")
def _hot() -> None:
    z, v = logits()
    wanted = ((z - z.mean()) - (v - v.mean())) / V
    off = [
        (slope(lambda z, hot=hot: loss(z, v, temperature=hot), z) - wanted).abs().max().item()  # type: ignore[misc]
        for hot in (1e3, 1e4)
    ]
    assert off[1] < 1e-3 and 8 < off[0] / off[1] < 12  # as 1/T
    got = loss(z, v, t_squared=False)
    close(loss(z, v), T * T * got)


# Divergences

KL = (r"D = \sum_i p_i (\log p_i - \log q_i)", r"T (q_i - p_i)")
formula(KL[0])(value("forward_kl", lambda q, p: kl(p, q)))
formula(KL[1])(gradient("forward_kl", lambda q, p: T * (q - p)))
formula(r"D = -\sum_i p_i \log q_i")(value("soft_cross_entropy", lambda q, p: -inner(p, q.log())))
formula(KL[1])(gradient("soft_cross_entropy", lambda q, p: T * (q - p)))


def centred(weight: Tensor, x: Tensor) -> Tensor:
    return weight * (x - inner(weight, x))


formula(r"D = \sum_i q_i (\log q_i - \log p_i)")(value("reverse_kl", lambda q, p: kl(q, p)))
formula(r"T q_i (\ell_i - \langle q, \ell \rangle)")(
    gradient("reverse_kl", lambda q, p: T * centred(q, q.log() - p.log()))
)


def mixed(share: float, a: Tensor, b: Tensor) -> Tensor:
    return share * a + (1 - share) * b


formula(r"D = \beta \sum_i p_i \log \frac{p_i}{m_i} + (1 - \beta) \sum_i q_i \log \frac{q_i}{m_i}")(
    value(kd.JSD(B), lambda q, p: B * kl(p, mixed(B, p, q)) + (1 - B) * kl(q, mixed(B, p, q)))
)
formula(r"T (1 - \beta) q_i (\ell_i - \langle q, \ell \rangle)")(
    gradient(kd.JSD(B), lambda q, p: T * (1 - B) * centred(q, (q / mixed(B, p, q)).log()))
)


@formula(r"\lim_{\beta \to 0} \frac{D}{\beta} = \mathrm{KL}(p \| q)")
def _jsd_at_0() -> None:
    z, v, q, p = softmaxes()
    close(loss(z, v, divergence=kd.JSD(1e-6)) / 1e-6, T * T * kl(p, q), 1e-4)
    assert kd.gkd(0) == "forward_kl"


@formula(r"\lim_{\beta \to 1} \frac{D}{1 - \beta} = \mathrm{KL}(q \| p)")
def _jsd_at_1() -> None:
    z, v, q, p = softmaxes()
    close(loss(z, v, divergence=kd.JSD(1 - 1e-6)) / 1e-6, T * T * kl(q, p), 1e-4)
    assert kd.gkd(1) == "reverse_kl"


formula(r"D = \sum_i p_i \log \frac{p_i}{m_i}")(value(kd.SkewKL(A), lambda q, p: kl(p, mixed(A, p, q))))
formula(r"T (1 - \alpha) q_i (\langle q, r \rangle - r_i)")(
    gradient(kd.SkewKL(A), lambda q, p: -T * (1 - A) * centred(q, p / mixed(A, p, q)))
)


@formula(r"\sum_i p_i \log \frac{p_i}{m_i} \leq \log \frac{1}{\alpha}")
def _skew_is_bounded() -> None:
    z, _ = logits()
    for far in (1.0, 10.0, 1000.0):
        got = loss(z * far, -z * far, divergence=kd.SkewKL(A), t_squared=False)
        assert got <= math.log(1 / A) + 1e-12
    close(got, math.log(1 / A), 1e-6)


def _h(q: Tensor, p: Tensor) -> Tensor:
    m = mixed(A, q, p)
    return (q / m).log() - A * q / m


formula(r"D = \sum_i q_i \log \frac{q_i}{m_i}")(
    value(kd.SkewReverseKL(A), lambda q, p: kl(q, mixed(A, q, p)))
)
formula(r"T q_i (h_i - \langle q, h \rangle)")(
    gradient(kd.SkewReverseKL(A), lambda q, p: T * centred(q, _h(q, p)))
)
formula(r"D = \frac{1}{2} \sum_i |p_i - q_i|")(value("tvd", lambda q, p: (p - q).abs().sum() / 2))
formula(r"\frac{T}{2} q_i (s_i - \langle q, s \rangle)")(
    gradient("tvd", lambda q, p: T / 2 * centred(q, (q - p).sign()))
)
formula(r"D = \frac{1}{2} \sum_i (q_i - p_i)^2")(
    value("squared_error", lambda q, p: ((q - p) ** 2).sum() / 2)
)
formula(r"T q_i ((q_i - p_i) - \langle q, q - p \rangle)")(
    gradient("squared_error", lambda q, p: T * centred(q, q - p))
)


def _alpha_beta(q: Tensor, p: Tensor) -> Tensor:
    both = A + B
    return -(p**A * q**B - A / both * p**both - B / both * q**both).sum() / (A * B)


def _of_w(w: Tensor, q: Tensor) -> Tensor:
    return T * (w - q * w.sum())


formula(
    r"D = -\frac{1}{\alpha \beta} \sum_i \left( p_i^\alpha q_i^\beta - \frac{\alpha}{\alpha + \beta} "
    r"p_i^{\alpha + \beta} - \frac{\beta}{\alpha + \beta} q_i^{\alpha + \beta} \right)"
)(value(kd.AlphaBeta(A, B), _alpha_beta))


@formula(r"T \left( w_i - q_i \sum_j w_j \right)")
def _alpha_beta_slope() -> None:
    gradient(kd.AlphaBeta(A, B), lambda q, p: _of_w((q ** (A + B) - p**A * q**B) / A, q))()
    gradient(kd.AlphaBeta(0, B), lambda q, p: _of_w(q**B * (q / p).log(), q))()
    gradient(kd.AlphaBeta(1, 0), lambda q, p: T * (q - p))()
    gradient(kd.AlphaBeta(0, 1), lambda q, p: T * centred(q, (q / p).log()))()
    gradient(kd.AlphaBeta(1, 1), lambda q, p: T * centred(q, q - p))()


formula(
    r"D = \frac{1}{\alpha^2} \sum_i \left( p_i^\alpha \log \frac{p_i^\alpha}{q_i^\alpha} - p_i^\alpha + "
    r"q_i^\alpha \right)"
)(value(kd.AlphaBeta(A, 0), lambda q, p: (p**A * (p**A / q**A).log() - p**A + q**A).sum() / A**2))
formula(
    r"D = \frac{1}{\beta^2} \sum_i \left( q_i^\beta \log \frac{q_i^\beta}{p_i^\beta} - q_i^\beta + "
    r"p_i^\beta \right)"
)(value(kd.AlphaBeta(0, B), lambda q, p: (q**B * (q**B / p**B).log() - q**B + p**B).sum() / B**2))
formula(
    r"D = \frac{1}{\alpha^2} \sum_i \left( \log \frac{q_i^\alpha}{p_i^\alpha} + \left( \frac{p_i}{q_i} "
    r"\right)^\alpha - 1 \right)"
)(value(kd.AlphaBeta(A, -A), lambda q, p: ((q**A / p**A).log() + (p / q) ** A - 1).sum() / A**2))
formula(r"D = \frac{1}{2} \sum_i (\log p_i - \log q_i)^2")(
    value(kd.AlphaBeta(0, 0), lambda q, p: ((p.log() - q.log()) ** 2).sum() / 2)
)


def of_logits(divergence: Any, by_hand: Callable[[Tensor, Tensor], Tensor]) -> Check:
    def check() -> None:
        z, v = logits()
        for heat in (1.0, T):
            close(loss(z, v, divergence=divergence, temperature=heat), by_hand(z, v))

    return check


def slope_of_logits(divergence: Any, by_hand: Callable[[Tensor, Tensor], Tensor]) -> Check:
    def check() -> None:
        z, v = logits()
        close(slope(lambda z: loss(z, v, divergence=divergence), z), by_hand(z, v))

    return check


def level(x: Tensor) -> Tensor:
    return x - x.mean()


formula(r"T^2 D = \frac{1}{2} \sum_i (z_i - v_i)^2")(
    of_logits(kd.LogitMSE(), lambda z, v: ((z - v) ** 2).sum() / 2)
)
formula(r"z_i - v_i")(slope_of_logits(kd.LogitMSE(), lambda z, v: z - v))
formula(r"T^2 D = \frac{1}{2} \sum_i ((z_i - \bar z) - (v_i - \bar v))^2")(
    of_logits(kd.LogitMSE(centered=True), lambda z, v: ((level(z) - level(v)) ** 2).sum() / 2)
)
formula(r"(z_i - \bar z) - (v_i - \bar v)")(
    slope_of_logits(kd.LogitMSE(centered=True), lambda z, v: level(z) - level(v))
)


def parts(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the target against the rest, and of the others among themselves."""
    others = torch.arange(V) != t
    target = p[t] * (p[t] / q[t]).log() + (1 - p[t]) * ((1 - p[t]) / (1 - q[t])).log()
    return target, kl(p[others] / (1 - p[t]), q[others] / (1 - q[t]))


formula(
    r"D = \alpha \left( p_t \log \frac{p_t}{q_t} + (1 - p_t) \log \frac{1 - p_t}{1 - q_t} \right) + \beta "
    r"\sum_{i \neq t} \hat p_i \log \frac{\hat p_i}{\hat q_i}"
)(value(kd.DKD(A, B), lambda q, p: A * parts(q, p)[0] + B * parts(q, p)[1], torch.tensor(t)))


def _dkd_slope() -> tuple[Tensor, Tensor, Tensor]:
    z, v, q, p = softmaxes()
    options = {"divergence": kd.DKD(A, B), "hard_weight": 0.0}
    return slope(lambda z: loss(z, v, torch.tensor(t), **options), z), q, p


@formula(r"T \alpha (q_t - p_t)")
def _dkd_target() -> None:
    got, q, p = _dkd_slope()
    close(got[t], T * A * (q[t] - p[t]))


@formula(r"T (\beta (\hat q_i - \hat p_i) - \alpha (q_t - p_t) \hat q_i)")
def _dkd_others() -> None:
    got, q, p = _dkd_slope()
    others = torch.arange(V) != t
    q_hat, p_hat = q[others] / (1 - q[t]), p[others] / (1 - p[t])
    close(got[others], T * (B * (q_hat - p_hat) - A * (q[t] - p[t]) * q_hat))


formula(
    r"\mathrm{KL}(p \| q) = p_t \log \frac{p_t}{q_t} + (1 - p_t) \log \frac{1 - p_t}{1 - q_t} + (1 - p_t) "
    r"\sum_{i \neq t} \hat p_i \log \frac{\hat p_i}{\hat q_i}"
)(value("forward_kl", lambda q, p: parts(q, p)[0] + (1 - p[t]) * parts(q, p)[1]))


@formula(r"D = \sum_i \left( p_i \log \frac{p_i}{q_i} + (1 - p_i) \log \frac{1 - p_i}{1 - q_i} \right)")
def _binary() -> None:
    z, v = logits()
    q, p = (z / T).sigmoid(), (v / T).sigmoid()
    close(loss(z, v, divergence=kd.BinaryKL()), T * T * (kl(p, q) + kl(1 - p, 1 - q)))


formula(r"T (\sigma(z_i/T) - \sigma(v_i/T))")(
    slope_of_logits(kd.BinaryKL(), lambda z, v: T * ((z / T).sigmoid() - (v / T).sigmoid()))
)


def _binary_hard(z: Tensor, y: Tensor) -> Tensor:
    return loss(z, z.detach(), y, divergence=kd.BinaryKL(), soft_weight=0.0, hard_weight=1.0)


@formula(r"-\sum_i \left( y_i \log \sigma(z_i) + (1 - y_i) \log (1 - \sigma(z_i)) \right)")
def _binary_cross_entropy() -> None:
    z, y = logits()[0], torch.linspace(0, 1, V, dtype=torch.float64)
    close(_binary_hard(z, y), -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).sum())


@formula(r"\sigma(z_i) - y_i")
def _binary_cross_entropy_slope() -> None:
    z, y = logits()[0], torch.linspace(0, 1, V, dtype=torch.float64)
    close(slope(lambda z: _binary_hard(z, y), z), z.sigmoid() - y)


# Mixtures and noise


@formula(r"T \left( q_i - \sum_m w_m p_{m,i} \right)")
def _mixture() -> None:
    z, v = logits()
    other, weights = logits(1)[1], (0.3, 0.7)
    q, ps = (z / T).softmax(-1), [(x / T).softmax(-1) for x in (v, other)]
    got = slope(lambda z: loss(z, kd.Mixture([v, other], list(weights))), z)
    close(got, T * (q - sum(w * p for w, p in zip(weights, ps, strict=True))))
    mean = slope(lambda z: weights[0] * loss(z, v) + weights[1] * loss(z, other), z)
    close(got, mean)


ROWS, SIGMA, SHARE = 200_000, 0.5, 0.4
NOISE = {
    kind: kd.LogitNoise(SIGMA, kind, probability=SHARE, seed=5) for kind in ("additive", "multiplicative")
}


def noisy(kind: str, side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, v, and of many rows of them the losses and gradients of squared logits under noise."""
    z, v = logits()
    rows = z.expand(ROWS, V).clone().requires_grad_()
    options = {"divergence": kd.LogitMSE(), "temperature": 1.0, side: NOISE[kind], "reduction": "none"}
    got = loss(rows, v.expand(ROWS, V), **options)
    (slopes,) = torch.autograd.grad(got.sum(), rows)
    return z, v, got.detach(), slopes


def mean_is(samples: Tensor, wanted: Tensor) -> None:
    """Within five standard errors, which are small beside what noise adds."""
    error = samples.std(0) / math.sqrt(ROWS)
    assert ((samples.mean(0) - wanted).abs() <= 5 * error).all() and (error < 0.05).all()


@formula(r"\mathrm{E}[z_i - v'_i] = z_i - v_i")
def _noise_leaves_the_mean() -> None:
    for kind in NOISE:
        z, v, _, slopes = noisy(kind, "teacher_noise")
        mean_is(slopes, z - v)


@formula(
    r"\mathrm{E} \left[ \frac{1}{2} \sum_i (z_i - v'_i)^2 \right] = \frac{1}{2} \sum_i (z_i - v_i)^2 + "
    r"\frac{1}{2} a \sigma^2 V"
)
def _noise_adds_a_constant() -> None:
    z, v, got, _ = noisy("additive", "teacher_noise")
    mean_is(got, ((z - v) ** 2).sum() / 2 + SHARE * SIGMA**2 * V / 2)


@formula(
    r"\mathrm{E} \left[ \frac{1}{2} \sum_i (z_i - v_i (1 + \sigma \varepsilon_i))^2 \right] = \frac{1}{2} "
    r"\sum_i (z_i - v_i)^2 + \frac{1}{2} a \sigma^2 \sum_i v_i^2"
)
def _multiplicative_noise_adds_a_constant() -> None:
    z, v, got, _ = noisy("multiplicative", "teacher_noise")
    mean_is(got, ((z - v) ** 2).sum() / 2 + SHARE * SIGMA**2 * (v**2).sum() / 2)


@formula(
    r"\mathrm{E}[(z_i (1 + \sigma \varepsilon_i) - v_i)(1 + \sigma \varepsilon_i)] = z_i - v_i "
    r"+ a \sigma^2 z_i"
)
def _student_noise_shrinks() -> None:
    z, v, _, slopes = noisy("multiplicative", "student_noise")
    mean_is(slopes, z - v + SHARE * SIGMA**2 * z)


@formula(r"\mathrm{E}[p'_i] \approx p_i + \frac{\sigma^2}{T^2} p_i \left( \sum_j p_j^2 - p_i \right)")
def _noise_smooths() -> None:
    """By quadrature over three classes; what is left is of fourth order."""
    points, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(24))
    grid, weight = (
        torch.cartesian_prod(points, points, points),
        torch.cartesian_prod(weights, weights, weights),
    )
    mass = weight.prod(-1) / weight.prod(-1).sum()
    v = logits()[1][:3]
    p, off = (v / T).softmax(-1), []
    for sigma in (0.2, 0.1):
        mean = (mass[:, None] * ((v + sigma * grid) / T).softmax(-1)).sum(0)
        second = sigma**2 / T**2 * p * ((p * p).sum() - p)
        off.append((mean - p - second).abs().max().item())
        assert off[-1] < 0.1 * second.abs().max()
    assert 12 < off[0] / off[1] < 20


@formula(
    r"\mathrm{softmax} \left( \frac{v (1 + \xi)}{T} \right) = \mathrm{softmax} \left( \frac{v}{T / "
    r"(1 + \xi)} \right)"
)
def _a_random_temperature() -> None:
    """What the package draws for a row is one factor: it is found in the gradient, and is a temperature."""
    z, v = logits()
    rows = v.expand(4, V)
    noise = kd.LogitNoise(0.3, "multiplicative", per="row", seed=2)
    wide = z.expand(4, V).clone().requires_grad_()
    kd.kd_loss(
        wide, rows, temperature=T, teacher_noise=noise, reduction="sum", backend="reference"
    ).backward()
    assert wide.grad is not None
    seen = (z / T).softmax(-1) - wide.grad / T  # p' of each row
    ratios = (seen[:, :-1] / seen[:, 1:]).log() / ((v[:-1] - v[1:]) / T)  # 1 + ξ, whichever two classes
    close(ratios, ratios[:, :1].expand_as(ratios), 1e-7)
    factor = ratios[:, :1]
    assert (factor - 1).abs().min() > 1e-3
    close(seen, (v / (T / factor)).softmax(-1), 1e-7)


# Stored teachers


def stored() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Callable[[str], kd.TopK]]:
    """z, then q and p at T = 1, which classes are stored, v, and the source with a tail."""
    z, v = logits()
    q, lp = z.softmax(-1), v.log_softmax(-1)
    top = lp.topk(3)
    inside = torch.zeros(V, dtype=torch.bool).scatter(0, top.indices, True)
    return z, q, lp.exp(), inside, v, lambda tail: kd.TopK(top.indices, top.values, tail=tail)


def of_stored(tail: str) -> tuple[Tensor, Tensor]:
    z, *_, source = stored()
    return loss(z, source(tail), temperature=1.0), slope(lambda z: loss(z, source(tail), temperature=1.0), z)


@formula(r"D_{\mathrm{ghost}} = \sum_{i \in S} p_i \log \frac{p_i}{q_i} + (1 - P) \log \frac{1 - P}{1 - Q}")
def _ghost() -> None:
    _, q, p, S, *_ = stored()
    P, Q = p[S].sum(), q[S].sum()
    close(of_stored("ghost")[0], kl(p[S], q[S]) + (1 - P) * ((1 - P) / (1 - Q)).log())


@formula("q_i - p_i")
def _ghost_inside() -> None:
    _, q, p, S, *_ = stored()
    close(of_stored("ghost")[1][S], (q - p)[S])


@formula(r"q_i \left( 1 - \frac{1 - P}{1 - Q} \right)")
def _ghost_outside() -> None:
    _, q, p, S, *_ = stored()
    P, Q = p[S].sum(), q[S].sum()
    close(of_stored("ghost")[1][~S], q[~S] * (1 - (1 - P) / (1 - Q)))


@formula(r"0 \leq D_{\mathrm{ghost}} \leq \mathrm{KL}(p \| q)")
def _ghost_is_between() -> None:
    z, _, _, _, v, source = stored()
    for student in (z, 3 * z, v, -v, z + v):
        got = loss(student, source("ghost"), temperature=1.0)
        assert -1e-12 <= got <= loss(student, v, temperature=1.0) + 1e-12


@formula(r"P q_i - [i \in S] p_i")
def _zero() -> None:
    _, q, p, S, *_ = stored()
    close(of_stored("zero")[1], p[S].sum() * q - S * p)


@formula(r"\sum_{i \in S} p_i \log \frac{p_i}{p_i / P} = P \log P")
def _zero_is_negative() -> None:
    _, _, p, S, v, source = stored()
    P = p[S].sum()
    student = v.masked_fill(~S, -torch.inf)  # q = p/P
    close(loss(student, source("zero"), temperature=1.0), P * P.log())
    close(slope(lambda z: loss(z, source("zero"), temperature=1.0), student), torch.zeros(V))
    assert P * P.log() < 0


@formula(r"D_{\mathrm{renormalize}} = \sum_{i \in S} \frac{p_i}{P} \log \frac{p_i / P}{q_i / Q}")
def _renormalize() -> None:
    _, q, p, S, *_ = stored()
    got, slopes = of_stored("renormalize")
    close(got, kl(p[S] / p[S].sum(), q[S] / q[S].sum()))
    close(slopes[~S], torch.zeros(V - 3))


@formula(r"\left( \sum_j \hat p_j \right) q_i - \hat p_i")
def _draws() -> None:
    z, v = logits()
    p = v.softmax(-1)
    ids, weights = torch.tensor([4, 1, 5]), torch.tensor([0.5, 0.25, 0.15], dtype=torch.float64)
    dense = torch.zeros(V, dtype=torch.float64).scatter(0, ids, weights)
    got = slope(lambda z: loss(z, kd.Sampled(ids, weights), temperature=1.0), z)
    close(got, weights.sum() * z.softmax(-1) - dense)
    # Each class as a draw with its probability: the expectation over one draw is the whole teacher's.
    one = torch.ones(1, dtype=torch.float64)
    each = [
        slope(lambda z, i=i: loss(z, kd.Sampled(torch.tensor([i]), one), temperature=1.0), z)  # type: ignore[misc]
        for i in range(V)
    ]
    close(sum(p[i] * each[i] for i in range(V)), z.softmax(-1) - p)


CASES = [(tex, n) for tex, checks in CHECKS.items() for n in range(len(checks))]


@pytest.mark.parametrize(("tex", "n"), CASES, ids=[f"{i}" for i in range(len(CASES))])
def test_a_formula_holds(tex: str, n: int) -> None:
    assert tex in FORMULAS
    CHECKS[tex][n]()


def test_every_formula_is_checked() -> None:
    """None stands on the page without a check, and every divergence has its section."""
    assert len(FORMULAS) >= 45
    assert set(FORMULAS) == set(CHECKS)
    sections = " ".join(re.findall(r"^### `(.*)`$", PAGE, re.M))
    by_name = {
        "jsd": "JSD", "skew_kl": "SkewKL", "skew_reverse_kl": "SkewReverseKL", "alpha_beta": "AlphaBeta",
        "logit_mse": "LogitMSE", "centered_logit_mse": "centered", "dkd": "DKD", "binary_kl": "BinaryKL",
    }  # fmt: skip
    for name in TABLE:
        assert by_name.get(name, f'"{name}"') in sections
