"""The expressions of the divergences over one class, in pairs.

`phi(lq, lp)` is the class's share of the divergence, D = Σ phi, and `g(lq, lp)` = ∂phi/∂lq; what lq and lp
are, logs of probabilities mostly, says the row of the table that a pair stands in (`divergences.py`).

They use `xp.exp`, `expm1`, `log`, `log1p`, `where`, `abs` and `maximum` only: `xp` is torch here, and a
backend that compiles them binds it to its own namespace. Guards against 0 · inf stand inside the product
(`p * where(p == 0, 0, ...)`), so that autograd of `phi` has no NaN in a branch that was not taken.
"""

from __future__ import annotations

from typing import Any

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


def phi_skew_kl(lq: Any, lp: Any, alpha: float) -> Any:
    """φ = p (lp − lm), m = αp + (1−α)q."""
    # As in the JSD: autograd of expm1 would give e^t as (e^t − 1) + 1, and a q far below p lose its digits.
    p = xp.exp(lp)
    d = lp - lq
    t = xp.exp(xp.where(d < 0, d, -d)) - 1.0
    log_mix = xp.log1p(xp.where(d < 0, alpha * t, (1.0 - alpha) * t))
    return p * xp.where(p == 0, 0.0, xp.where(d < 0, d, 0.0) - log_mix)


def g_skew_kl(lq: Any, lp: Any, alpha: float) -> Any:
    """∂φ/∂lq = −(1−α) p q/m."""
    # Both relative to the larger of p and q, without a difference.
    p = xp.exp(lp)
    d = lp - lq
    smaller = xp.exp(xp.where(d < 0, d, -d))
    q = xp.where(d < 0, 1.0, smaller)
    m = xp.where(d < 0, alpha * smaller + (1.0 - alpha), alpha + (1.0 - alpha) * smaller)
    return -(1.0 - alpha) * p * xp.where(p == 0, 0.0, q / m)


def phi_skew_reverse_kl(lq: Any, lp: Any, alpha: float) -> Any:
    """φ = q (lq − lm), m = (1−α)p + αq."""
    q = xp.exp(lq)
    d = lp - lq
    t = xp.expm1(xp.where(d < 0, d, -d))
    log_mix = xp.log1p(xp.where(d < 0, (1.0 - alpha) * t, alpha * t))
    return q * xp.where(q == 0, 0.0, xp.where(d < 0, 0.0, -d) - log_mix)


def g_skew_reverse_kl(lq: Any, lp: Any, alpha: float) -> Any:
    """∂φ/∂lq = q (lq − lm) + q (1 − αq/m), the last of which is (1−α) q p/m."""
    q = xp.exp(lq)
    d = lp - lq
    t = xp.expm1(xp.where(d < 0, d, -d))
    mix = xp.where(d < 0, (1.0 - alpha) * t, alpha * t)
    lq_lm = xp.where(d < 0, 0.0, -d) - xp.log1p(mix)
    p_over_m = xp.where(d < 0, 1.0 + t, 1.0) / (1.0 + mix)
    return q * xp.where(q == 0, 0.0, lq_lm + (1.0 - alpha) * p_over_m)


def phi_tvd(lq: Any, lp: Any) -> Any:
    """φ = ½ |p − q|."""
    # Not abs, whose derivative at NaN is 0: a NaN in the loss and none in the gradient.
    difference = xp.exp(lq) - xp.exp(lp)
    sign = xp.where(difference < 0, -1.0, xp.where(difference > 0, 1.0, difference))
    return 0.5 * difference * sign


def g_tvd(lq: Any, lp: Any) -> Any:
    """∂φ/∂lq = ½ q sign(q − p)."""
    q = xp.exp(lq)
    p = xp.exp(lp)
    return 0.5 * xp.where(q < p, -q, xp.where(q > p, q, q - p))


def phi_squared_error(lq: Any, lp: Any) -> Any:
    """φ = ½ (q − p)²."""
    difference = xp.exp(lq) - xp.exp(lp)
    return 0.5 * difference * difference


def g_squared_error(lq: Any, lp: Any) -> Any:
    """∂φ/∂lq = q (q − p)."""
    q = xp.exp(lq)
    return q * (q - xp.exp(lp))


def phi_alpha_beta(lq: Any, lp: Any, alpha: float, beta: float) -> Any:
    """φ = −(p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)) / (αβ), and its limits."""
    # Relative to the larger of p and q, whose exponent is a, with t = −|log p − log q| ≤ 0, b the other
    # exponent, s = a + b, and e(c) = (e^(ct) − 1) / c, which is t at c = 0:
    #     φ = larger^s (e^(at) e(b) − e(a)) / s,    at s = 0 φ = (e(a) − t) / a, and at a = b = 0 t² / 2.
    # Nothing there divides by α or β. `f` is t kept finite, so that no product with it is 0 · inf. e(c) of a
    # negative c is e(|c|) e^(ct), the power of which goes to what it is multiplied by.
    d = lp - lq
    t = xp.where(d < 0, d, -d)
    f = xp.where(t < -1e30, -1e30, t)
    at = xp.where(d < 0, alpha * f, beta * f)
    bt = xp.where(d < 0, beta * f, alpha * f)
    st = (alpha + beta) * f
    size_a = xp.where(at == 0, 1.0, xp.abs(at))
    size_b = xp.where(bt == 0, 1.0, xp.abs(bt))
    e_a = xp.where(at == 0, t, xp.expm1(-size_a) * (-f / size_a))
    e_b = xp.where(bt == 0, t, xp.expm1(-size_b) * (-f / size_b))
    log_larger = (alpha + beta) * xp.where(d < 0, lq, lp)
    from_larger = xp.exp(log_larger + xp.where(at > 0, at, 0.0))
    from_both = xp.exp(log_larger + at + xp.where(bt > 0, bt, 0.0))
    # What underflows weighs nothing, also beside an infinite logarithm.
    subtrahend = from_larger * xp.where(from_larger == 0, 0.0, e_a)
    minuend = from_both * xp.where(from_both == 0, 0.0, e_b)
    t_at_s_0 = xp.where(st == 0, t, 0.0)
    over_a = f / xp.where(at == 0, 1.0, at)
    at_s_0 = xp.where(at == 0, 0.5 * t_at_s_0 * t_at_s_0, (subtrahend - t_at_s_0) * over_a)
    phi = xp.where(st == 0, at_s_0, (minuend - subtrahend) * (f / xp.where(st == 0, 1.0, st)))
    # A difference of infinite powers is infinite: of two finite or impossible classes it is no NaN.
    return xp.where(phi == phi, phi, xp.exp(xp.where(phi == phi, 0.0, xp.where(t < 0, 1e30, t))))


def g_alpha_beta(lq: Any, lp: Any, alpha: float, beta: float) -> Any:
    """∂φ/∂lq = (q^(α+β) − p^α q^β) / α, and at α = 0 q^β (lq − lp)."""
    d = lp - lq
    t = xp.where(d < 0, d, -d)
    f = xp.where(t < -1e30, -1e30, t)
    # e(α) times the larger of both powers, as in φ.
    ct = alpha * f
    size = xp.where(ct == 0, 1.0, xp.abs(ct))
    e = xp.where(ct == 0, t, xp.expm1(-size) * (-f / size))
    log_larger = (alpha + beta) * xp.where(d < 0, lq, lp)
    power = xp.exp(log_larger + xp.where(d < 0, 0.0, beta * f) + xp.where(ct > 0, ct, 0.0))
    product = power * xp.where(power == 0, 0.0, e)
    return xp.where(d < 0, -product, product)


def phi_logit_mse(y: Any, u: Any) -> Any:
    """φ = ½ (y − u)²."""
    return 0.5 * (y - u) * (y - u)


def g_logit_mse(y: Any, u: Any) -> Any:
    """∂φ/∂y = y − u."""
    return y - u


def phi_binary_kl(y: Any, u: Any) -> Any:
    """φ = p log(p/q) + (1−p) log((1−p)/(1−q)), p = σ(u), q = σ(y)."""
    # Both outcomes exchanged, φ is the same: the teacher's rarer one is taken, so that nothing cancels where
    # both sides are sure. With u ≤ 0 then, φ = log(1 + e^y) − log(1 + e^u) − p (y − u).
    x = xp.where(u > 0, -y, y)
    w = xp.where(u > 0, -u, u)
    t = xp.exp(w)
    p = t / (1.0 + t)
    e = xp.exp(xp.where(x > 0, -x, x))
    from_student = xp.where(x > 0, (1.0 - p) * x + p * xp.where(p == 0, 0.0, w), 0.0)
    from_both = p * xp.where(x > 0, 0.0, xp.where(p == 0, 0.0, w - x))
    return xp.log1p((e - t) / (1.0 + t)) + from_student + from_both


def g_binary_kl(y: Any, u: Any) -> Any:
    """∂φ/∂y = σ(y) − σ(u)."""
    x = xp.where(u > 0, -y, y)
    t = xp.exp(xp.where(u > 0, -u, u))
    e = xp.exp(xp.where(x > 0, -x, x))
    difference = xp.where(x > 0, 1.0, e) / (1.0 + e) - t / (1.0 + t)
    return xp.where(u > 0, -difference, difference)


def phi_binary_cross_entropy(z: Any, y: Any) -> Any:
    """φ = −y log σ(z) − (1−y) log(1 − σ(z)): the hard term of `BinaryKL`, of a target y in [0, 1]."""
    n = xp.where(z > 0, -z, z)
    weight = xp.where(z > 0, 1.0 - y, y)
    return xp.log1p(xp.exp(n)) - weight * xp.where(weight == 0, 0.0, n)


def g_binary_cross_entropy(z: Any, y: Any) -> Any:
    """∂φ/∂z = σ(z) − y."""
    e = xp.exp(xp.where(z > 0, -z, z))
    return xp.where(z > 0, 1.0, e) / (1.0 + e) - y


def phi_dkd(lq: Any, lp: Any, alpha: float, beta: float) -> Any:
    """φ = β p (lp − lq), over the classes that are not the target; the target's term is α·`binary_kl`."""
    weight = beta * xp.exp(lp)
    return weight * xp.where(weight == 0, 0.0, lp - lq)


def g_dkd(lq: Any, lp: Any, alpha: float, beta: float) -> Any:
    """∂φ/∂lq = −β p."""
    return -beta * xp.exp(lp)
