"""What the logits loss is, in fp64: each term with its closed-form gradient, without autograd or the package.

Names: p teacher, q student, lp and lq their logs, z student and v teacher logits, y = z / T and u = v / T,
T the temperature, V the classes. A row is one token. `test_functional.py` pins this file to autograd of the
eager loss in `tolerances.py`, which shares no formula with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import log, log1p, log2
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# torch's own spellings, eager and closed-form, err by up to 3.1 units in fp32 (V from 2 to 128,256, logits of
# std 1 to 30).
UNITS = 4.0
# What a normal may be off by, for each computing dtype.
NORMALS = {torch.float32: 1e-5, torch.float64: 1e-14}
DEFAULTS: dict[str, tuple[float, ...]] = {
    "jsd": (0.5,), "skew_kl": (0.1,), "skew_reverse_kl": (0.1,), "dkd": (1.0, 8.0)
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The arguments of one call.

    `divergence` is a name, a float (the beta of a JSD), or what has a `name` and `params`. `weights` are
    those of a mixture, where the teacher is a list. Noise is what has the attributes of `kd.LogitNoise`.
    """

    divergence: Any = "forward_kl"
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
    student_noise: Any = None
    teacher_noise: Any = None
    weights: Tensor | Sequence[float] | None = None

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

    @property
    def row(self) -> tuple[str, tuple[float, ...]]:
        """The divergence's name and parameters."""
        if isinstance(self.divergence, float):
            return "jsd", (self.divergence,)
        if isinstance(self.divergence, str):
            return self.divergence, DEFAULTS.get(self.divergence, ())
        return self.divergence.name, tuple(self.divergence.params)

    @property
    def binary(self) -> bool:
        """Whether a class is a question of its own, with labels `[..., V]`."""
        return self.row[0] == "binary_kl"


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


class Term(NamedTuple):
    """A term of the loss: per row, its derivative per class, and what a rounding may cost, in units of
    eps."""

    value: Tensor
    slope: Tensor
    unit: Tensor
    slope_unit: Tensor


def log_softmax(y: Tensor) -> Tensor:
    """Log-softmax over the last dim; a row of -inf, or one with a NaN, is NaN, as torch's."""
    shifted = y - y.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def times(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value` where a weight of exactly 0 gives 0, whatever the value."""
    return torch.where(weight == 0, 0.0, weight * value)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


# Divergences


def soft_term(
    o: Options, y: Tensor, u: Tensor, labels: Tensor | None, y_error: Tensor, u_error: Tensor, eps: float
) -> Term:
    """D per row and dD/dy per class; the errors are those of y and u, in units of eps."""
    name, params = o.row
    if name in ("logit_mse", "centered_logit_mse"):
        return logit_mse(name == "centered_logit_mse", y, u, y_error, u_error, eps)
    if name == "binary_kl":
        return binary_kl(y, u, y_error, u_error, eps)
    if name == "dkd":
        assert labels is not None
        return dkd(*params, y, u, labels, y_error, u_error)
    # How many roundings stand between a logit and its probability: the exponent's, which is relative to the
    # logits, and those of a tree sum over the classes.
    roundings = y_error.amax(-1) + u_error.amax(-1) + log2(y.shape[-1]) + 4
    lq, lp = log_softmax(y), log_softmax(u)
    q, p = lq.exp(), lp.exp()
    if name == "tvd":
        return tvd(q, p, roundings[..., None], eps)
    if name == "squared_error":
        return squared_error(q, p, roundings[..., None], eps)
    if name == "alpha_beta":
        return alpha_beta(*params, lq, lp, roundings[..., None], eps)

    # An exponential may be 0 below the smallest normal, and what it multiplies is as large as a logarithm.
    flushed = torch.finfo(torch.float32).smallest_normal * (1 + (lq - lp).abs().nan_to_num(0, 0, 0))

    def term(phi: Tensor, dy: Tensor, dy_size: Tensor) -> Term:
        unit = (1 + phi.abs().sum(-1)) * roundings
        return Term(phi.sum(-1), dy, unit, dy_size * roundings[..., None] + flushed / (UNITS * eps))

    def tilted(h: Tensor, factor: float, slope_of_h: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        # q (h - <q, h>), and the sizes of what it is a difference of.
        q_h = times(q, h)
        size = q_h.abs() + q * q_h.abs().sum(-1, keepdim=True) + slope_of_h * q
        return factor * (q_h - q * q_h.sum(-1, keepdim=True)), factor * size

    if name == "forward_kl":
        return term(times(p, lp - lq), q - p, p + q)
    if name == "soft_cross_entropy":
        return term(times(p, -lq), q - p, p + q)
    if name == "reverse_kl":
        return term(times(q, lq - lp), *tilted(lq - lp, 1.0))
    (share,) = params
    if name == "jsd":
        lm = torch.logaddexp(lp + log(share), lq + log1p(-share))
        phi = share * times(p, lp - lm) + (1 - share) * times(q, lq - lm)
        return term(phi, *tilted(lq - lm, 1 - share))
    if name == "skew_kl":
        lm = torch.logaddexp(lp + log(share), lq + log1p(-share))
        # r = p/m, where either may be 0.
        r = torch.where(torch.isneginf(lp), 0.0, (lp - lm).exp())
        return term(times(p, lp - lm), *tilted(-r, 1 - share, 0.0))
    assert name == "skew_reverse_kl", name
    lm = torch.logaddexp(lp + log1p(-share), lq + log(share))
    h = (lq - lm) - share * (lq - lm).exp()
    return term(times(q, lq - lm), *tilted(h, 1.0))


def tvd(q: Tensor, p: Tensor, roundings: Tensor, eps: float) -> Term:
    """½ Σ |p - q|."""
    sign = (q - p).sign()
    dy = 0.5 * q * (sign - (q * sign).sum(-1, keepdim=True))
    # Where p and q differ by less than their roundings, any sign is right: it may be off by up to 2.
    either = torch.where((q - p).abs() <= UNITS * eps * roundings * (p + q), 1.0, 0.0)
    off = q * either + q * (q * either).sum(-1, keepdim=True)
    unit = 0.5 * (p + q).sum(-1) * roundings[..., 0]
    return Term(0.5 * (p - q).abs().sum(-1), dy, unit, q * roundings + off / (UNITS * eps))


def squared_error(q: Tensor, p: Tensor, roundings: Tensor, eps: float) -> Term:
    """½ Σ (q - p)²."""
    h = q - p
    dy = q * (h - (q * h).sum(-1, keepdim=True))
    error = (p + q) * roundings
    unit = (h.abs() * error).sum(-1) + 0.5 * UNITS * eps * (error**2).sum(-1)
    size = q * (p + q)
    return Term(0.5 * (h * h).sum(-1), dy, unit, (size + q * size.sum(-1, keepdim=True)) * roundings)


def alpha_beta(a: float, b: float, lq: Tensor, lp: Tensor, roundings: Tensor, eps: float) -> Term:
    """-1/(ab) Σ [p^a q^b - a/s p^s - b/s q^s], s = a + b, from differences of (e^(cd) - 1) / c, which is d at
    c = 0."""
    s = a + b
    d = lp - lq
    no_q, no_p = torch.isneginf(lq), torch.isneginf(lp)
    dead = no_q & no_p

    def power(base: Tensor, c: float) -> Tensor:
        return (c * base).exp() if c else torch.ones_like(base)

    def grown(base: Tensor, c: float, d: Tensor) -> Tensor:
        # e^(s base) (e^(cd) - 1) / c; from its two powers where the exponential is large.
        if c == 0:
            return power(base, s) * d
        large = c * d > 30
        direct = ((s * base + c * d).exp() - power(base, s)) / c
        return torch.where(large, direct, power(base, s) * (c * d.masked_fill(large, 0.0)).expm1() / c)

    if a == b == 0:
        phi = 0.5 * d * d
    elif abs(b) >= abs(a):
        phi = (grown(lq, s, d) - grown(lq, a, d)) / b
    else:
        phi = (grown(lp, s, -d) - grown(lp, b, -d)) / a
    # A class that only one side has: finite where the powers of 0 are 0.
    no_q_limit = power(lp, s) / (b * s) if b > 0 and s > 0 else torch.full_like(phi, torch.inf)
    no_p_limit = power(lq, s) / (a * s) if a > 0 and s > 0 else torch.full_like(phi, torch.inf)
    phi = torch.where(no_q, no_q_limit, torch.where(no_p, no_p_limit, phi))
    phi = torch.where(dead, 0.0, phi)

    # (q^s - p^a q^b) / a, and the same of the other side.
    def slope(l1: Tensor, l2: Tensor, d: Tensor, a: float, b: float) -> Tensor:
        lone = (power(l1, s) - power(l2, a) * power(l1, b)) / a if a else power(l1, b) * -d
        return torch.where(dead, 0.0, torch.where(no_q | no_p, lone, -grown(l1, a, d)))

    w, w_of_p = slope(lq, lp, d, a, b), slope(lp, lq, -d, b, a)
    q = lq.exp()
    dy = w - q * w.sum(-1, keepdim=True)
    # The powers that phi is made of, over s: what autograd of it adds up, though its sum is smaller.
    both = (a * lp.clamp(min=-1e300) + b * lq.clamp(min=-1e300)).exp()
    powers = torch.where(dead, 0.0, power(torch.maximum(lp, lq), s) + both) * (1 + 1 / abs(s) if s else 1)
    size = (1 + abs(a) + abs(b)) * w.abs() + powers
    dy_size = size + q * size.sum(-1, keepdim=True)
    # phi is a difference of the two slopes, over s.
    largest = max(abs(a), abs(b))
    divided = 1 + (1 / abs(s) if s else 1 / largest if largest else 0)
    extra = d.abs().nan_to_num(0, 0, 0) / largest if s == 0 and largest else torch.zeros_like(d)
    second_order = 0.5 * UNITS * eps * torch.where(dead, 0.0, power(torch.maximum(lp, lq), s)) * roundings**2
    unit = (((w.abs() + w_of_p.abs()) * divided + extra) * roundings + second_order).sum(-1)
    return Term(phi.sum(-1), dy, unit, dy_size * roundings)


def logit_mse(centered: bool, y: Tensor, u: Tensor, y_error: Tensor, u_error: Tensor, eps: float) -> Term:
    """½ Σ (y - u)², of logits or of their deviations from the mean of those finite on both sides."""
    dead = torch.isneginf(y) & torch.isneginf(u)
    error = torch.where(dead, 0.0, y_error + u_error)
    difference = torch.where(dead, 0.0, y - u)
    if centered:
        finite = (y.isfinite() & u.isfinite()).double()
        classes = finite.sum(-1, keepdim=True).clamp(min=1)
        mean = sum(
            sign * (x.nan_to_num(0, 0, 0) * finite).sum(-1, keepdim=True) for x, sign in ((y, 1), (u, -1))
        )
        difference = torch.where(dead, 0.0, difference - mean / classes)
        of_mean = (error * finite).sum(-1, keepdim=True) / classes * (log2(y.shape[-1]) + 4)
        error = torch.where(dead, 0.0, error + of_mean)
    value = 0.5 * (difference**2).sum(-1)
    unit = (difference.abs() * error).sum(-1) + value * (log2(y.shape[-1]) + 4)
    return Term(value, difference, unit + 0.5 * UNITS * eps * (error**2).sum(-1), error)


def binary_kl(y: Tensor, u: Tensor, y_error: Tensor, u_error: Tensor, eps: float) -> Term:
    """Σ p log(p/q) + (1-p) log((1-p)/(1-q)) with sigmoids."""
    p, q, not_p, not_q = u.sigmoid(), y.sigmoid(), (-u).sigmoid(), (-y).sigmoid()
    yes = times(p, softplus(-y) - softplus(-u))
    no = times(not_p, softplus(y) - softplus(u))
    # The smaller of the two spellings loses fewer digits.
    dy = torch.where(p + q < not_p + not_q, q - p, not_p - not_q)
    roundings = log2(y.shape[-1]) + 4
    of_u = times(p * not_p, (u - y).abs().nan_to_num(0, 0, 0)) * u_error
    second_order = 0.5 * UNITS * eps * (p * not_p + q * not_q) * (y_error + u_error) ** 2
    # The rarer outcome's probability is what is rounded.
    rarer = torch.minimum(p, not_p) + torch.minimum(q, not_q)
    unit = (yes.abs() + no.abs()) * roundings + rarer + dy.abs() * y_error + of_u + second_order
    slope_unit = q * not_q * y_error + p * not_p * u_error + 4 * (rarer + dy.abs())
    return Term((yes + no).sum(-1), dy, unit.sum(-1), slope_unit)


def dkd(a: float, b: float, y: Tensor, u: Tensor, labels: Tensor, y_error: Tensor, u_error: Tensor) -> Term:
    """a KL of (target, not target) + b KL among those that are not; each row's label is a class."""
    target = labels[..., None]
    hot = torch.zeros_like(y, dtype=torch.bool).scatter_(-1, target, True)

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Logs of the target's share, of the others', of each other's share among the others; the margin.
        others = x.masked_fill(hot, -torch.inf)
        all_others = others.logsumexp(-1)
        among = torch.where(torch.isneginf(all_others)[..., None], -torch.inf, others - all_others[..., None])
        margin = x.gather(-1, target)[..., 0] - all_others
        return -softplus(-margin), -softplus(margin), among, margin

    (lq_t, lq_n, lq, mu), (lp_t, lp_n, lp, nu) = split(y), split(u)
    q_t, q_n, q, p_t, p_n, p = (x.exp() for x in (lq_t, lq_n, lq, lp_t, lp_n, lp))
    yes, no = times(p_t, lp_t - lq_t), times(p_n, lp_n - lq_n)
    phi = times(p, lp - lq)
    value = a * (yes + no) + b * phi.sum(-1)
    gap = torch.where(q_t + p_t < q_n + p_n, q_t - p_t, p_n - q_n)
    # A teacher that is sure of the target says nothing of the others.
    says = (p.sum(-1, keepdim=True) != 0).double()
    dy = torch.where(hot, a * gap[..., None], -a * gap[..., None] * q + b * says * (q - p))

    tree = log2(y.shape[-1]) + 4
    of_y, of_u = y_error.amax(-1) + tree, u_error.amax(-1) + tree
    among = (y_error.masked_fill(hot, 0.0).amax(-1) + u_error.masked_fill(hot, 0.0).amax(-1) + tree)[
        ..., None
    ]
    margins = times(p_t * p_n, (nu - mu).abs().nan_to_num(0, 0, 0))
    rarer = torch.minimum(p_t, p_n) + torch.minimum(q_t, q_n)
    unit = abs(a) * (gap.abs() * of_y + margins * of_u + 4 * (yes.abs() + no.abs()) + rarer)
    unit = unit + abs(b) * (1 + phi.abs().sum(-1)) * among[..., 0]
    gap_unit = q_t * q_n * of_y + p_t * p_n * of_u + 4 * torch.minimum(q_t + p_t, q_n + p_n)
    of_others = (gap_unit[..., None] + gap.abs()[..., None] * among) * abs(a) * q + abs(b) * (q + p) * among
    return Term(value, dy, unit, torch.where(hot, abs(a) * gap_unit[..., None], of_others))


# The hard term


def cross_entropy(x: Tensor, labels: Tensor, labelled: Tensor, error: Tensor) -> Term:
    """Of each labelled row, 0 elsewhere."""
    target, has = torch.where(labelled, labels, 0).long()[..., None], labelled[..., None]
    log_q = log_softmax(x)
    onehot = torch.zeros_like(x).scatter_(-1, target, 1.0)
    nll = torch.where(labelled, -log_q.gather(-1, target)[..., 0], 0.0)
    roundings = error.amax(-1) + log2(x.shape[-1]) + 4
    return Term(
        nll,
        torch.where(has, log_q.exp() - onehot, 0.0),
        torch.where(labelled, 1 + nll.abs(), 0.0) * roundings,
        torch.where(has, log_q.exp() + onehot, 0.0) * roundings[..., None],
    )


def binary_cross_entropy(x: Tensor, labels: Tensor, labelled: Tensor, error: Tensor) -> Term:
    """The sum over the classes of each counted row."""
    t, has = torch.where(labelled[..., None], labels.double(), 0.0), labelled[..., None]
    yes, no, q = times(t, softplus(-x)), times(1 - t, softplus(x)), x.sigmoid()
    slope_unit = q * (-x).sigmoid() * error + 4 * (q + t)
    unit = (yes + no) * (log2(x.shape[-1]) + 4) + (q - t).abs() * error
    return Term(
        torch.where(labelled, (yes + no).sum(-1), 0.0),
        torch.where(has, q - t, 0.0),
        torch.where(labelled, unit.sum(-1), 0.0),
        torch.where(has, slope_unit, 0.0),
    )


# Noise


def philox(counter: Sequence[Any], key: Sequence[Any]) -> list[Any]:
    """Philox-4x32-10 (Salmon et al., 2011): four words of 32 bits, in arrays of 64."""
    c = [np.asarray(x, np.uint64) for x in counter]
    k = [np.uint64(x) for x in key]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(y >> half) ^ c[1] ^ k[0], y & low, (x >> half) ^ c[3] ^ k[1], x & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return list(np.broadcast_arrays(*c))


def words(seed: int, rows: Any, classes: int, stream: int) -> Any:
    """The word of each row and class (`[N, classes]`, uint32): four classes share a counter."""
    seed &= (1 << 64) - 1
    rows = np.asarray(rows, np.uint64)[:, None]
    groups = np.arange((classes + 3) // 4, dtype=np.uint64)[None]
    counter = groups, rows & np.uint64(0xFFFFFFFF), rows >> np.uint64(32), np.uint64(stream)
    drawn = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(drawn, -1).reshape(len(rows), 4 * groups.size)[:, :classes].astype(np.uint32)


def uniforms(word: Any) -> Any:
    """In float32, as defined: (word + 0.5) 2^-32, at most 1 - 2^-24."""
    u = (word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return np.minimum(u, np.float32(1 - 2.0**-24))


def normals(seed: int, rows: Any, classes: int, stream: int) -> Any:
    """Box-Muller in fp64: first word radius, second angle; cosine, then sine."""
    u = uniforms(words(seed, rows, 4 * ((classes + 3) // 4), stream)).astype(np.float64)
    pairs = u.reshape(*u.shape[:-1], u.shape[-1] // 2, 2)
    radius, angle = np.sqrt(-2 * np.log(pairs[..., 0])), 2 * np.pi * pairs[..., 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(u.shape)[:, :classes]


def sampled(noise: Any, x: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """b·σ·ε of each logit of x, fp64, and b·σ of each row (`[..., 1]`)."""
    *leading, classes = x.shape
    rows = np.arange(int(np.prod(leading, dtype=np.int64))) + noise.row_offset
    seed = int(noise.seed)
    width = 1 if noise.per == "row" else classes
    epsilon = np.ascontiguousarray(normals(seed, rows, width, stream))
    coin = uniforms(words(seed, rows, 1, stream | 1 << 31)) < np.float32(noise.probability)
    size = noise.sigma * (coin if noise.probability < 1 else np.ones_like(coin)).astype(np.float64)
    b_sigma = torch.from_numpy(size).reshape(*leading, 1)
    scaled = b_sigma * torch.from_numpy(epsilon).reshape(*leading, width)
    return scaled.to(x.device), b_sigma.to(x.device)


# One side


class Side(NamedTuple):
    """Logits as the terms see them."""

    x: Tensor
    slope: Tensor  # with respect to the raw logits
    error: Tensor  # of x, in units of eps
    slope_error: Tensor  # relative to the slope without noise, absolute, in units of eps


def processed(
    z: Tensor, scale: float, softcap: float | None, noise: Any = None, stream: int = 0, eps: float = 1.0
) -> Side:
    """Logits after scale, softcap and noise."""
    x = scale * z
    if softcap is None:
        slope = torch.full_like(x, scale)
    else:
        x, slope = softcap * (x / softcap).tanh(), scale / (x / softcap).cosh() ** 2
    nothing = torch.zeros_like(x)
    error, slope_error = magnitude(x), nothing
    if noise is not None:
        normal = NORMALS[torch.float32 if eps > 1e-10 else torch.float64] / (UNITS * eps)
        scaled, b_sigma = sampled(noise, x, stream)
        if noise.kind == "additive":
            error = error + b_sigma * normal
            x = x + scaled
        else:
            error, slope_error = error + b_sigma * normal * magnitude(x), nothing + b_sigma * normal
            x, slope = torch.where(torch.isneginf(x), x, x * (1 + scaled)), slope * (1 + scaled)
        error = error + magnitude(x)
    return Side(x, slope, error, slope_error)


def magnitude(x: Tensor) -> Tensor:
    """|x| where it is finite: what it is rounded relative to."""
    return x.nan_to_num(0, 0, 0).abs()


def mixed(sides: list[Side], T: float, o: Options) -> tuple[Tensor, Tensor]:
    """Logits over T of the mean of the teachers' probabilities, and their error in units of eps."""
    if len(sides) == 1:
        return sides[0].x / T, sides[0].error / T
    weights = o.weights if o.weights is not None else [1.0] * len(sides)
    w = torch.as_tensor(weights, dtype=torch.float64, device=sides[0].x.device)
    w = (w / w.sum(-1, keepdim=True)).expand(*sides[0].x.shape[:-1], len(sides)).unbind(-1)

    def mean(logs: list[Tensor]) -> Tensor:
        each = [
            torch.where((w[m] == 0)[..., None], -torch.inf, logs[m] + w[m].log()[..., None])
            for m in range(len(logs))
        ]
        top = torch.stack(each).amax(0)
        safe = torch.where(torch.isneginf(top), 0.0, top)
        return safe + sum((x - safe).exp() for x in each).log()  # type: ignore[union-attr]

    us = [side.x / T for side in sides]
    if o.binary:
        u = mean([-softplus(-u) for u in us]) - mean([-softplus(u) for u in us])
    else:
        u = mean([log_softmax(u) for u in us])
    error = [torch.where((w[m] == 0)[..., None], 0.0, sides[m].error / T) for m in range(len(sides))]
    return u, torch.stack(error).amax(0) + 8


def counted_rows(z: Tensor, labels: Tensor | None, o: Options) -> Tensor:
    """Which rows count: the mask, else the labelled rows, else all."""
    if o.mask is not None:
        return o.mask
    if labels is None or o.binary:
        return torch.ones_like(z[..., 0], dtype=torch.bool)
    return labels != o.ignore_index


def row_weights(counted: Tensor, o: Options) -> Tensor:
    """Per row, the factor between its loss and the reduced one."""
    weight = counted.double()
    if o.token_weights is not None:
        weight = times(weight, o.token_weights.double())
    if o.reduction != "mean":
        return weight
    denominator = (
        counted.sum().double() if o.num_items is None else torch.as_tensor(o.num_items, dtype=torch.float64)
    )
    return weight if not counted.any() else weight / denominator


def truth(
    z: Tensor,
    v: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    o: Options | None = None,
    upstream: Tensor | None = None,
) -> Truth:
    """The loss of `kd_loss` and d sum(loss * upstream) / dz, from the logits as they are (rounded to their
    dtype). A list of teachers is a mixture."""
    o = o or Options()
    teachers = [v] if isinstance(v, Tensor) else list(v)
    rows, vocab = z.shape[:-1], min(z.shape[-1], teachers[0].shape[-1])
    eps = torch.finfo(
        torch.float64 if torch.float64 in [t.dtype for t in (z, *teachers)] else torch.float32
    ).eps
    T = o.temperature
    counted = counted_rows(z, labels, o)

    def kept(x: Tensor) -> Tensor:
        return x.detach().double()[..., :vocab]

    student = processed(kept(z), o.student_scale, o.student_softcap, o.student_noise, 1, eps)
    sides = [
        processed(kept(t), o.teacher_scale, o.teacher_softcap, o.teacher_noise, 2 * m, eps)
        for m, t in enumerate(teachers)
    ]
    u, u_error = mixed(sides, T, o)
    labelled = counted if labels is None or o.binary else (labels != o.ignore_index) & counted
    target = None if labels is None or o.binary else torch.where(labelled, labels, 0).long()
    x = student.x
    soft = soft_term(o, x / T, u, target, student.error / T, u_error, eps)
    loss_factor, grad_factor = (T * T, T) if o.t_squared else (1.0, 1 / T)
    if labels is None:
        zero, none = torch.zeros_like(soft.value), torch.zeros_like(x)
        hard = Term(zero, none, zero, none)
    else:
        hard = (binary_cross_entropy if o.binary else cross_entropy)(x, labels, labelled, student.error)

    def both(s: Tensor, h: Tensor, soft_weight: float, hard_weight: float) -> Tensor:
        # A term of weight 0 is left out, so that its infinities are too.
        total = torch.zeros_like(s)
        if soft_weight:
            total = total + soft_weight * s
        return total + hard_weight * h if hard_weight else total

    sizes = abs(o.soft_weight), abs(o.hard_weight)
    weight = row_weights(counted, o)
    value = both(soft.value, hard.value, o.soft_weight * loss_factor, o.hard_weight)
    unit = both(soft.unit, hard.unit, sizes[0] * loss_factor, sizes[1])
    loss = times(weight, torch.where(counted, value, 0.0))
    loss_unit = times(weight.abs(), unit)
    up = torch.ones_like(loss) if upstream is None else upstream.double().expand(rows)
    per_row = (weight * up)[..., None].expand(x.shape)
    slope = both(soft.slope, hard.slope, o.soft_weight * grad_factor, o.hard_weight)
    slope_unit = both(soft.slope_unit, hard.slope_unit, sizes[0] * grad_factor, sizes[1])
    grad = times(per_row, student.slope * slope)
    # At least the slope at the raw logits without a softcap, which is a product of roundings of its own.
    steepest = torch.maximum(student.slope.abs(), torch.full_like(x, abs(o.student_scale)))
    raw = abs(o.student_scale) * student.slope_error * slope.abs()
    grad_unit = times(per_row.abs(), steepest * slope_unit + raw)
    if o.reduction != "none":
        loss, loss_unit = loss.sum(), loss_unit.sum()
    padding = (0, z.shape[-1] - vocab)
    return Truth(
        loss=loss,
        grad=torch.nn.functional.pad(grad, padding),
        soft=torch.where(counted, loss_factor * soft.value, 0.0),
        hard=torch.where(counted, hard.value, 0.0),
        counted=counted,
        loss_unit=loss_unit,
        grad_unit=torch.nn.functional.pad(grad_unit, padding),
    )
