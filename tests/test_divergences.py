"""The table of divergences, entry by entry: phi against its definition, g against autograd of phi, C++
against Python; and what each divergence is known to be, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, log, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf
from tolerances import ALPHA_BETAS, assert_close, check, our_loss, our_result
from torch import Tensor
from truth import Options, truth

import kdkernels as kd
from kdkernels.divergences import TABLE
from kdkernels.expressions import phi_binary_cross_entropy

# No digits are lost near the limits.
NEAR_LIMITS = ((1e-4, 0.5), (0.5, 1e-4), (1e-4, 1e-4), (-1e-4, 0.8), (1 - 1e-4, 1e-4))
SHARES: list[tuple[float, ...]] = [(0.1,), (0.5,), (0.9,), (1e-3,), (0.999,)]
PARAMS: dict[str, list[tuple[float, ...]]] = {
    "jsd": SHARES,
    "skew_kl": SHARES,
    "skew_reverse_kl": SHARES,
    "alpha_beta": [*ALPHA_BETAS, *NEAR_LIMITS],
    "dkd": [(1.0, 8.0), (0.5, 0.25)],
}
# Of two logits, or of their deviations from a mean; every other pair is of logs of probabilities.
OF_LOGITS = ("logit_mse", "centered_logit_mse", "binary_kl")
ENTRIES = [(name, p) for name in sorted(TABLE) if name not in OF_LOGITS for p in PARAMS.get(name, [()])]
ALL = [*ENTRIES, *((name, ()) for name in OF_LOGITS)]


def grid(*values: float) -> tuple[Tensor, Tensor]:
    """Every pair."""
    return torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * 2).unbind(-1)


# Log-probabilities: certain, near it, ordinary, tiny, below fp64's smallest, impossible.
FINITE = [0.0, -1e-12, -1e-3, -0.1, -log(2), -1.0, -3.3, -10.0, -37.0, -100.0, -700.0, -800.0, -2e4]
LOGITS = [0.0, 1e-9, -1e-3, 0.7, -2.0, 9.0, -9.5, 40.0, -40.0, 800.0, -800.0]


def pairs_of(name: str, infinite: bool = False) -> tuple[Tensor, Tensor]:
    """What a pair may be given, at infinity too."""
    if name in OF_LOGITS:
        return grid(*LOGITS, *([inf, -inf] if infinite else []))
    return grid(*FINITE, *([-inf] if infinite else []))


def limits(name: str, params: tuple[float, ...]) -> Iterator[tuple[float, float, float]]:
    """(lq, lp, phi) where one side or both are impossible, by hand."""
    lq = lp = log(0.25)
    yield -inf, -inf, 0.0
    if name == "forward_kl":
        yield from ((-inf, lp, inf), (lq, -inf, 0.0))
    elif name == "soft_cross_entropy":
        yield from ((-inf, lp, inf), (lq, -inf, 0.0), (-inf, 0.0, inf))
    elif name == "reverse_kl":
        yield from ((-inf, lp, 0.0), (lq, -inf, inf))
    elif name == "jsd":
        (beta,) = params
        yield from ((-inf, lp, -beta * 0.25 * log(beta)), (lq, -inf, -(1 - beta) * 0.25 * log(1 - beta)))
    elif name == "skew_kl":
        yield from ((-inf, lp, -0.25 * log(params[0])), (lq, -inf, 0.0))
    elif name == "skew_reverse_kl":
        yield from ((-inf, lp, 0.0), (lq, -inf, -0.25 * log(params[0])))
    elif name == "tvd":
        yield from ((-inf, lp, 0.125), (lq, -inf, 0.125))
    elif name == "squared_error":
        yield from ((-inf, lp, 0.03125), (lq, -inf, 0.03125))
    elif name == "dkd":
        yield from ((-inf, lp, inf), (lq, -inf, 0.0))
    elif name == "alpha_beta":
        # Finite where the powers of 0 are 0: those of q need beta > 0, those of both alpha + beta > 0.
        a, b = params
        s = a + b
        yield -inf, lp, 0.25**s / (b * s) if b > 0 and s > 0 else inf
        yield lq, -inf, 0.25**s / (a * s) if a > 0 and s > 0 else inf
    else:
        raise AssertionError(f"{name} has no limits here: write them down")


def exact_alpha_beta(a: float, b: float, lq: float, lp: float) -> Any:
    """The definition and its limits, in fifty digits."""
    with mp.workdps(50):
        a, b, lq, lp = mpf(a), mpf(b), mpf(lq), mpf(lp)
        s = a + b
        if a == b == 0:
            return (lp - lq) ** 2 / 2
        if b == 0:
            return (a * mp.exp(a * lp) * (lp - lq) - mp.exp(a * lp) + mp.exp(a * lq)) / a**2
        if a == 0:
            return (b * mp.exp(b * lq) * (lq - lp) - mp.exp(b * lq) + mp.exp(b * lp)) / b**2
        if s == 0:
            return (a * (lq - lp) + mp.exp(a * (lp - lq)) - 1) / a**2
        return -(mp.exp(a * lp + b * lq) - a / s * mp.exp(s * lp) - b / s * mp.exp(s * lq)) / (a * b)


def definition(name: str, params: tuple[float, ...], lq: Tensor, lp: Tensor) -> Tensor:
    """phi from probabilities, as a textbook has it; for ordinary probabilities only."""
    q, p = lq.exp(), lp.exp()
    if name == "forward_kl":
        return p * (p / q).log()
    if name == "soft_cross_entropy":
        return -p * q.log()
    if name == "reverse_kl":
        return q * (q / p).log()
    if name == "tvd":
        return (p - q).abs() / 2
    if name == "squared_error":
        return (p - q) ** 2 / 2
    if name == "dkd":
        return params[1] * p * (p / q).log()
    if name == "alpha_beta":
        pairs = zip(lq.tolist(), lp.tolist(), strict=True)
        return torch.tensor([float(exact_alpha_beta(*params, *x)) for x in pairs], dtype=torch.float64)
    if name.endswith("logit_mse"):
        return (lq - lp) ** 2 / 2
    if name == "binary_kl":
        p, q, not_p, not_q = lp.sigmoid(), lq.sigmoid(), (-lp).sigmoid(), (-lq).sigmoid()
        return p * (p / q).log() + not_p * (not_p / not_q).log()
    (share,) = params
    if name == "skew_kl":
        return p * (p / (share * p + (1 - share) * q)).log()
    if name == "skew_reverse_kl":
        return q * (q / ((1 - share) * p + share * q)).log()
    m = share * p + (1 - share) * q
    return share * p * (p / m).log() + (1 - share) * q * (q / m).log()


def sizes(name: str, params: tuple[float, ...], lq: Tensor, lp: Tensor) -> Tensor:
    """Of the terms that phi and g are sums of: where these cancel, their rounding is what is left."""
    if name in OF_LOGITS:
        return 1 + lq.abs().clamp(max=1e3) ** 2 + lp.abs().clamp(max=1e3) ** 2
    logs = 1 + (lq - lp).abs()
    if name != "alpha_beta":
        return (lq.exp() * logs + lp.exp() * (1 + lp.abs() + lq.abs())) * max(1.0, *params, 1.0)
    a, b = params
    s = a + b
    powers = (s * lq).exp() + (s * lp).exp() + (a * lp + b * lq).exp()
    # An exponent is rounded relative to itself.
    exponents = 1 + abs(s) * torch.minimum(lq.abs(), lp.abs())
    factors = (1 + abs(a) + abs(b)) * (1 + (1 / abs(s) if s else 0))
    return powers * exponents * (1 + lq.abs() + lp.abs()) * factors


def assert_error_within(got: Tensor, expected: Tensor, allowed: Tensor, lq: Tensor, lp: Tensor) -> None:
    """Element by element; the worst one is shown. What is too large for fp64 says nothing."""
    over = ((got - expected).abs() / (allowed + 1e-300)).nan_to_num(inf)
    over = torch.where(allowed < 1e280, over, 0.0)
    assert (allowed < 1e280).double().mean() > 0.3
    at = int(over.argmax())
    assert over[at] <= 1, (
        f"{int((over > 1).sum())} of {over.numel()} wrong; at lq = {lq[at]:.17g}, lp = {lp[at]:.17g} "
        f"got {got[at]:.17g}, expected {expected[at]:.17g}, error / allowed = {over[at]:.3g}"
    )


def test_every_row_of_the_table_has_its_tests() -> None:
    """Names, and as many parameters as it says."""
    for name, entry in TABLE.items():
        assert len(entry.params) == len(PARAMS.get(name, [()])[0])
        assert name in OF_LOGITS or list(limits(name, PARAMS.get(name, [()])[0]))
    objects = (kd.JSD(0.3), kd.SkewKL(0.3), kd.SkewReverseKL(0.3), kd.AlphaBeta(0.3, 0.4), kd.DKD(0.3, 0.4))
    for given in objects:
        assert given.params == (0.3, 0.4)[: len(TABLE[given.name].params)]
    for plain in (kd.LogitMSE(), kd.LogitMSE(centered=True), kd.BinaryKL()):
        assert plain.name in OF_LOGITS and plain.params == ()


@pytest.mark.parametrize(("name", "params"), ALL)
def test_phi_is_its_definition(name: str, params: tuple[float, ...]) -> None:
    """To 1e-14 of the terms it is made of."""
    lq, lp = grid(-1e-3, -0.1, -1.0, -3.3, -10.0)
    expected = definition(name, params, lq, lp)
    got = TABLE[name].phi(lq, lp, *params)
    assert_error_within(got, expected, 1e-14 * sizes(name, params, lq, lp), lq, lp)


@pytest.mark.parametrize(("a", "b"), NEAR_LIMITS)
def test_no_digits_are_lost_near_a_limit(a: float, b: float) -> None:
    """Of phi and of g: the textbook's cancel to nothing, where q is near p too."""
    lq, lp = grid(-1e-3, -0.1, -0.10001, -1.0, -3.3, -10.0)
    s = a + b
    phi, g = (f(lq, lp, a, b) for f in (TABLE["alpha_beta"].phi, TABLE["alpha_beta"].g))
    points = list(zip(lq.tolist(), lp.tolist(), strict=True))
    exact = torch.tensor([float(exact_alpha_beta(a, b, *x)) for x in points], dtype=torch.float64)
    with mp.workdps(50):
        c, e = mpf(a), mpf(b)
        slope = [float((mp.exp((c + e) * x) - mp.exp(c * mpf(y) + e * x)) / c) for x, y in points]
    d, powers = (lq - lp).abs(), (s * lq).exp() + (s * lp).exp()
    assert_error_within(phi, exact, 1e-15 * powers * d * (1 + d) * (1 + 1 / s) + 1e-30, lq, lp)
    assert_error_within(g, torch.tensor(slope, dtype=torch.float64), 2e-15 * powers * d + 1e-30, lq, lp)


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_phi_at_impossible_classes(name: str, params: tuple[float, ...]) -> None:
    """0 · (−inf) is NaN unless somebody thought of it."""
    for lq, lp, expected in limits(name, params):
        got = TABLE[name].phi(
            torch.tensor([lq], dtype=torch.float64), torch.tensor([lp], dtype=torch.float64), *params
        )
        if (lq, lp, name) == (-inf, -inf, "alpha_beta"):
            continue  # left out before phi
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("params", ALPHA_BETAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_beta_that_overflows_is_infinite(dtype: torch.dtype, params: tuple[float, float]) -> None:
    """A difference of infinite powers is NaN unless somebody thought of it."""
    lq, lp = (x.to(dtype) for x in grid(*FINITE))
    points = zip(lq.tolist(), lp.tolist(), strict=True)
    exact = torch.tensor([float(exact_alpha_beta(*params, *x)) for x in points], dtype=torch.float64)
    got = TABLE["alpha_beta"].phi(lq, lp, *params)
    assert (got[exact > 1e6 * torch.finfo(dtype).max] == inf).all()
    assert got[exact < 1e-6 * torch.finfo(dtype).max].isfinite().all()


def test_binary_kl_at_the_ends() -> None:
    """Certain answers: agreed, 0; contradicted by a certain student, infinite."""
    phi = TABLE["binary_kl"].phi
    for y, u, expected in (
        (inf, 0.0, inf), (-inf, 0.0, inf), (0.0, inf, log(2)), (0.0, -inf, log(2)), (-inf, inf, inf),
        (inf, inf, 0.0), (800.0, 0.0, 400 - log(2)), (0.0, 800.0, log(2)), (-800.0, 800.0, 800.0),
    ):  # fmt: skip
        got = phi(torch.tensor([y]).double(), torch.tensor([u]).double()).item()
        assert got == pytest.approx(expected, rel=1e-14), (y, u)


@pytest.mark.parametrize(("name", "params"), ALL)
def test_g_is_the_derivative_of_phi(name: str, params: tuple[float, ...]) -> None:
    """dphi/dlq by autograd, over thirteen decades of probability on either side."""
    pairs = pairs_of(name)
    lq, lp = pairs[0].clone().requires_grad_(), pairs[1]
    (expected,) = torch.autograd.grad(TABLE[name].phi(lq, lp, *params).sum(), lq)
    got = TABLE[name].g(lq.detach(), lp, *params)
    assert_error_within(got, expected, 1e-14 * sizes(name, params, pairs[0], lp), pairs[0], lp)


@pytest.mark.parametrize(("name", "params"), ALL)
def test_g_is_the_derivative_of_the_definition(name: str, params: tuple[float, ...]) -> None:
    """Central differences of the textbook's phi: no code shared."""
    lq, lp = grid(-0.1, -1.0, -3.3)
    if name == "tvd":  # which has a corner
        lq, lp = lq[lq != lp], lp[lq != lp]
    h = 1e-5
    numeric = (definition(name, params, lq + h, lp) - definition(name, params, lq - h, lp)) / (2 * h)
    # Differences of rounded values of this size.
    size = definition(name, params, lq, lp).abs().max().item()
    torch.testing.assert_close(TABLE[name].g(lq, lp, *params), numeric, rtol=1e-8, atol=1e-9 * max(1.0, size))


def test_tvd_is_flat_at_its_corner() -> None:
    """Where p = q any slope from one side to the other is one; ours is the one between."""
    lq = torch.tensor([-0.5, -3.0]).double()
    assert TABLE["tvd"].g(lq, lq.clone()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "params"), [e for e in ENTRIES if e[0] != "alpha_beta"])
def test_impossible_on_both_sides_adds_nothing(name: str, params: tuple[float, ...]) -> None:
    """To Σphi and to Σg. (Powers of 0 may be infinite: there, the sums leave the class out before.)"""
    impossible = torch.tensor([-inf], dtype=torch.float64)
    assert TABLE[name].phi(impossible, impossible, *params).item() == 0
    assert TABLE[name].g(impossible, impossible, *params).item() == 0


@pytest.mark.parametrize(("name", "params"), ALL)
def test_nan_is_not_hidden(name: str, params: tuple[float, ...]) -> None:
    """A guard against 0 · inf must not swallow a real NaN, of phi or of g."""
    ok, bad = torch.tensor([-1.0]).double(), torch.tensor([nan]).double()
    for lq, lp in ((bad, ok), (ok, bad), (bad, bad)):
        assert TABLE[name].phi(lq, lp, *params).isnan().all()
        leaf = lq.clone().requires_grad_()
        (slope,) = torch.autograd.grad(TABLE[name].phi(leaf, lp, *params).sum(), leaf)
        if lp.isnan().all():
            assert slope.isnan().all() and TABLE[name].g(lq, lp, *params).isnan().all()


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.closed])
def test_closed_forms_are_the_sums(name: str) -> None:
    """What one read of the rows gives is Σphi and Σg."""
    entry = TABLE[name]
    closed, params = entry.closed, PARAMS.get(name, [()])[0]
    assert closed is not None
    y, u = (3 * torch.randn(5, 30, dtype=torch.float64) for _ in range(2))
    lq, lp = F.log_softmax(y, -1), F.log_softmax(u, -1)
    (a, la), (b, _) = ((u, lp), (y, lq)) if closed.teacher_weighs else ((y, lq), (u, lp))
    c = 1.0 if closed.times is None else params[closed.times]
    sums = (la.exp() * (closed.a * a + closed.b * b)).sum(-1)
    expected = c * (sums - closed.a * a.logsumexp(-1) - closed.b * b.logsumexp(-1))
    torch.testing.assert_close(entry.phi(lq, lp, *params).sum(-1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        entry.g(lq, lp, *params).sum(-1), c * closed.sum_g + closed.sum_g_per_d * expected
    )


@pytest.mark.parametrize(("name", "params"), ALL)
def test_cpp_is_python_pointwise(name: str, params: tuple[float, ...]) -> None:
    """Two spellings of each formula, pinned to each other in fp64 over a grid with zeros and infinities."""
    from kdkernels.backends.cpu import BACKEND

    if (reason := BACKEND.knows(name)) is not None:
        pytest.skip(reason)
    lq, lp = (x.contiguous() for x in pairs_of(name, infinite=True))
    phi, g = BACKEND.pointwise(name, params, lq, lp)
    # Classes that neither side has are left out by whoever calls the pair.
    counts = ~(lq.isneginf() & lp.isneginf())
    size = sizes(name, params, *(x.nan_to_num(0, 1e4, -1e4) for x in (lq, lp)))
    for cpp, python in ((phi, TABLE[name].phi(lq, lp, *params)), (g, TABLE[name].g(lq, lp, *params))):
        finite = python.isfinite() & counts
        other = ~python.isfinite() & counts
        assert torch.equal(cpp[other].nan_to_num(nan=7.0), python[other].nan_to_num(nan=7.0))
        assert_error_within(cpp[finite], python[finite], 4e-15 * size[finite], lq[finite], lp[finite])


# What they are, on every backend


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-11) -> None:
    """Equal but for fp64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize(
    ("params", "other", "factor"),
    [
        ((1.0, 0.0), "forward_kl", 1.0),
        ((0.0, 1.0), "reverse_kl", 1.0),
        ((1.0, 1.0), "squared_error", 1.0),
    ],
)
def test_alpha_beta_holds_the_others(
    backend: str, params: tuple[float, float], other: str, factor: float
) -> None:
    """Losses and gradients: a table with two spellings of one divergence must agree with itself."""
    z, v = logits(4, 9), logits(4, 9)
    for T in (1.0, 2.0):
        loss, grad = our_result(z, v, None, Options(kd.AlphaBeta(*params), temperature=T), backend)
        plain, plain_grad = our_result(z, v, None, Options(other, temperature=T), backend)
        close(loss, factor * plain)
        close(grad, factor * plain_grad)


def test_alpha_beta_by_other_names(backend: str) -> None:
    """(½, ½) is four times the squared Hellinger distance, (2, −1) half of Pearson's chi-square, (−1, 2)
    Neyman's."""
    z, v = logits(4, 9), logits(4, 9)
    q, p = z.softmax(-1), v.softmax(-1)
    for params, expected in (
        ((0.5, 0.5), 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1)),
        ((2.0, -1.0), 0.5 * ((p - q) ** 2 / q).sum(-1)),
        ((-1.0, 2.0), 0.5 * ((p - q) ** 2 / p).sum(-1)),
    ):
        close(our_loss(z, v, None, Options(kd.AlphaBeta(*params), reduction="none"), backend), expected)


@pytest.mark.parametrize("params", [*ALPHA_BETAS, *NEAR_LIMITS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_beta_everywhere(backend: str, dtype: torch.dtype, params: tuple[float, float]) -> None:
    """Against the truth alone, since the textbook's spelling loses all digits near a limit."""
    o = Options(kd.AlphaBeta(*params), temperature=2.0, reduction="none")
    z, v = logits(4, 60, dtype=dtype), logits(4, 60, dtype=dtype)
    v[0] = z[0] + 1e-3 * torch.randn(60).to(dtype)
    loss, grad = our_result(z, v, None, o, backend)
    exact = truth(z, v, None, o)
    eps = torch.finfo(dtype).eps
    assert_close("loss", loss, exact.loss, exact.loss, exact.loss_unit, eps)
    assert_close("gradient", grad, exact.grad, exact.grad, exact.grad_unit, eps)


@pytest.mark.parametrize("limit", [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (0.4, -0.4)], ids=str)
def test_alpha_beta_is_continuous_at_its_limits(backend: str, limit: tuple[float, float]) -> None:
    """The way to the limit is straight: a tenth of the step is a tenth of the difference."""
    z, v = logits(4, 9), logits(4, 9)

    def loss(step: float) -> float:
        a, b = limit
        off = (step, step) if limit == (0.0, 0.0) else (step, 0.0) if a == 0 else (0.0, step)
        o = Options(kd.AlphaBeta(a + off[0], b + off[1]), reduction="sum")
        return our_loss(z, v, None, o, backend).item()

    at, near, nearer = loss(0.0), loss(1e-4), loss(1e-5)
    assert abs(near - at) < 1e-2 * abs(at)
    assert (near - at) / (nearer - at) == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("name", ["SkewKL", "SkewReverseKL"])
def test_skew_tends_to_the_kl(backend: str, name: str) -> None:
    """alpha is the share that makes it finite: p's in the forward one, q's in the reverse one."""
    z, v = logits(4, 9), logits(4, 9)
    plain = "forward_kl" if name == "SkewKL" else "reverse_kl"
    loss, grad = our_result(z, v, None, Options(getattr(kd, name)(1e-9)), backend)
    expected, expected_grad = our_result(z, v, None, Options(plain), backend)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)
    q, p = z.softmax(-1), v.softmax(-1)
    m = 0.3 * p + 0.7 * q if name == "SkewKL" else 0.7 * p + 0.3 * q
    top = p if name == "SkewKL" else q
    by_hand = (top * (top / m).log()).sum(-1).mean()
    close(our_loss(z, v, None, Options(getattr(kd, name)(0.3)), backend), by_hand)


def test_tvd_is_half_the_distance(backend: str) -> None:
    """Between 0 and 1: disjoint distributions are 1 apart."""
    z, v = logits(4, 9), logits(4, 9)
    loss = our_loss(z, v, None, Options("tvd"), backend)
    close(loss, 0.5 * (z.softmax(-1) - v.softmax(-1)).abs().sum(-1).mean())
    apart = torch.tensor([[50.0, -50.0]]).double()
    close(our_loss(apart, -apart, None, Options("tvd"), backend), torch.tensor(1.0).double())


# Raw logits


@pytest.mark.parametrize("centered", [False, True])
def test_logit_mse_is_torch_mse(backend: str, centered: bool) -> None:
    """V/2 of the mean's, at any temperature where T² is on it."""
    z, v = logits(4, 9), logits(4, 9)
    x, u = (t - t.mean(-1, keepdim=True) if centered else t for t in (z, v))
    for T in (1.0, 3.0):
        o = Options(kd.LogitMSE(centered=centered), temperature=T)
        loss, grad = our_result(z, v, None, o, backend)
        close(loss, 4.5 * F.mse_loss(x, u))
        close(grad, (x - u) / 4)
        loss, grad = our_result(z, v, None, o.but(t_squared=False), backend)
        close(loss, 4.5 * F.mse_loss(x, u) / T**2)
        close(grad, (x - u) / 4 / T**2)


def test_centered_logits_have_no_level(backend: str) -> None:
    """As a softmax, it doesn't see a constant; and V times T²·KL tends to it."""
    z, v = logits(4, 9), logits(4, 9)
    o = Options(kd.LogitMSE(centered=True))
    loss, grad = our_result(z, v, None, o, backend)
    moved, moved_grad = our_result(z + 5.0, v - 7.0, None, o, backend)
    close(loss, moved)
    close(grad, moved_grad)
    hot, hot_grad = our_result(z, v, None, Options(temperature=1e4), backend)
    torch.testing.assert_close(9 * hot, loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(9 * hot_grad, grad, rtol=0, atol=1e-2)


def test_the_mean_is_over_classes_that_both_have(backend: str) -> None:
    """Masked classes are in neither side's mean."""
    z, v = logits(4, 9), logits(4, 9)
    o = Options(kd.LogitMSE(centered=True))
    loss, grad = our_result(z[:, :6].contiguous(), v[:, :6].contiguous(), None, o, backend)
    z[:, 6:] = v[:, 6:] = -inf
    masked, masked_grad = our_result(z, v, None, o, backend)
    close(masked, loss)
    close(masked_grad[:, :6], grad)
    assert (masked_grad[:, 6:] == 0).all()


def test_binary_kl_is_torch_binary_cross_entropy(backend: str) -> None:
    """Less the teacher's entropy; the hard term with labels of each class, at T = 1."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.rand(4, 9).double()
    T = 2.0
    cross = F.binary_cross_entropy_with_logits(z / T, (v / T).sigmoid(), reduction="sum") / 4
    entropy = F.binary_cross_entropy_with_logits(v / T, (v / T).sigmoid(), reduction="sum") / 4
    o = Options(kd.BinaryKL(), temperature=T)
    close(our_loss(z, v, None, o, backend), T * T * (cross - entropy))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = labels.to(dtype)
        hard = F.binary_cross_entropy_with_logits(z, y.double(), reduction="sum") / 4
        loss, grad = our_result(z, v, y, o.but(soft_weight=0.0, hard_weight=0.7), backend)
        close(loss, 0.7 * hard)
        close(grad, 0.7 * (z.sigmoid() - y.double()) / 4)


def test_binary_labels_do_not_choose_rows(backend: str) -> None:
    """Every row counts unless the mask says otherwise; what is outside of it may be NaN."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.randint(2, (4, 9)).float()
    mask = torch.tensor([True, False, True, True])
    labels[1] = nan
    o = Options(kd.BinaryKL(), hard_weight=0.5, mask=mask)
    kept = our_loss(z[mask], v[mask], labels[mask], Options(kd.BinaryKL(), hard_weight=0.5), backend)
    loss, grad = our_result(z, v, labels, o, backend)
    close(loss, kept)
    assert (grad[1] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sure_answers(backend: str, dtype: torch.dtype) -> None:
    """1 − σ of a large logit is not 0, nor its logarithm infinite."""
    z, v = grid(0.0, 30.0, -30.0, 200.0, -200.0, 1e4, -1e4, 7.0)
    z, v = (x.view(8, 8).to(dtype) for x in (z, v))
    labels = torch.tensor([0.0, 0.25, 0.5, 1.0] * 2).expand(8, 8)
    for T in (1.0, 2.0):
        o = Options(kd.BinaryKL(), temperature=T, hard_weight=0.5, reduction="none")
        assert check(z, v, labels, o, backend=backend).loss.isfinite().all()


def test_the_hard_binary_pair() -> None:
    """−y log σ(z) − (1−y) log(1 − σ(z)), at targets that are certain and logits that are infinite."""
    z, y = grid(*LOGITS)[0], torch.rand(len(LOGITS) ** 2).double()
    expected = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    torch.testing.assert_close(phi_binary_cross_entropy(z, y), expected, rtol=1e-13, atol=1e-15)
    ends = torch.tensor([inf, -inf, inf, -inf]).double(), torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    assert phi_binary_cross_entropy(*ends).tolist() == [0.0, 0.0, inf, inf]


# Decoupled


def decoupled(z: Tensor, v: Tensor, labels: Tensor, T: float) -> tuple[Tensor, Tensor, Tensor]:
    """TCKD, NCKD and p_t of each row, from probabilities as in the paper, section 3."""
    q, p = (z / T).softmax(-1), (v / T).softmax(-1)
    rows = torch.arange(len(z))
    q_t, p_t = q[rows, labels], p[rows, labels]
    binary = p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()
    others = torch.ones_like(z, dtype=torch.bool)
    others[rows, labels] = False
    q_hat, p_hat = ((x / (1 - x_t)[:, None])[others].view(len(z), -1) for x, x_t in ((q, q_t), (p, p_t)))
    return binary, (p_hat * (p_hat / q_hat).log()).sum(-1), p_t


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_dkd_is_the_papers(backend: str, T: float) -> None:
    """α·TCKD + β·NCKD, T² on both."""
    z, v, labels = logits(5, 9), logits(5, 9), torch.tensor([0, 8, 3, 3, 1])
    target, among, _ = decoupled(z, v, labels, T)
    for a, b in ((1.0, 8.0), (0.3, 0.0), (0.0, 2.0)):
        o = Options(kd.DKD(a, b), temperature=T, reduction="none")
        close(our_loss(z, v, labels, o, backend), T * T * (a * target + b * among))
    by_name = our_loss(z, v, labels, Options("dkd", temperature=T), backend)
    assert torch.equal(by_name, our_loss(z, v, labels, Options(kd.DKD(1.0, 8.0), temperature=T), backend))


def test_kl_is_the_target_and_the_unsure_rest(backend: str) -> None:
    """KL = TCKD + (1 − p_t)·NCKD, exactly, and so are the gradients."""
    z, v, labels = logits(5, 9), logits(5, 9), torch.tensor([0, 8, 3, 3, 1])
    for i, p_t in enumerate(v.softmax(-1)[torch.arange(5), labels].tolist()):
        row = slice(i, i + 1)
        ours = our_result(z[row], v[row], labels[row], Options(kd.DKD(1.0, 1 - p_t)), backend)
        for got, expected in zip(ours, our_result(z[row], v[row], None, Options(), backend), strict=True):
            close(got, expected)


def test_two_classes_have_no_others_to_tell_apart(backend: str) -> None:
    """NCKD is 0: what is left is the KL of the target."""
    z, v, labels = logits(5, 2), logits(5, 2), torch.tensor([0, 1, 1, 0, 1])
    for b in (0.0, 8.0):
        loss, grad = our_result(z, v, labels, Options(kd.DKD(1.0, b)), backend)
        expected, expected_grad = our_result(z, v, None, Options(), backend)
        close(loss, expected)
        close(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
def test_dkd_at_any_margin(backend: str, dtype: torch.dtype, margin: float) -> None:
    """Where the target has all of the mass, the others still share what is not there: log(1 − q_t) from 1 −
    q_t is −inf, and their softmax 0 / 0."""
    z, v = logits(6, 40, dtype=dtype), logits(6, 40, dtype=dtype)
    labels = torch.tensor([3] * 6)
    z[0, 3] = v[1, 3] = z[2, 3] = v[2, 3] = margin
    z[3, 3] = v[4, 3] = z[5, 3] = v[5, 3] = -margin
    for T in (1.0, 4.0):
        o = Options(kd.DKD(1.0, 8.0), temperature=T, reduction="none")
        exact = check(z, v, labels, o, backend=backend)
        assert exact.loss.isfinite().all() and (exact.loss > 0).all()
        # The rest is told apart whatever the target's margin.
        among = truth(z[:, 4:], v[:, 4:], None, Options(temperature=T, reduction="none")).loss
        assert (exact.loss > among).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dkd_of_impossible_targets_and_others(backend: str, dtype: torch.dtype) -> None:
    """A target that nobody has, one that alone is left, V = 1: a loss without NaN, and its gradient."""
    z, v = logits(4, 9, dtype=dtype), logits(4, 9, dtype=dtype)
    labels = torch.tensor([2, 2, 2, 2])
    z[0, 2] = v[0, 2] = -inf  # nobody has it
    v[1, 2] = -inf  # the teacher alone excludes it
    z[2, :2] = z[2, 3:] = v[2, :2] = v[2, 3:] = -inf  # nothing else is left
    v[3, :2] = v[3, 3:] = -inf  # the teacher alone is sure
    o = Options(kd.DKD(1.0, 8.0), temperature=2.0, reduction="none")
    exact = check(z, v, labels, o, backend=backend)
    assert exact.loss.isfinite().all() and exact.grad.isfinite().all()
    assert exact.loss[2].item() == 0 and (exact.grad[2] == 0).all()
    one = torch.randn(3, 1).to(dtype)
    loss, grad = our_result(one, one + 1, torch.zeros(3).long(), o, backend)
    assert (loss == 0).all() and (grad == 0).all()
    z[1], v[1] = 0.0, 0.0
    z[1, 2] = -inf  # the student excludes what the teacher has
    assert our_loss(z, v, labels, o, backend)[1].item() == inf


def test_dkd_of_ignored_rows(backend: str) -> None:
    """Rows without a label don't count; without a mask that is all there is to say."""
    z, v, labels = logits(4, 9), logits(4, 9), torch.tensor([1, -100, 3, 0])
    o = Options(kd.DKD(), hard_weight=0.5)
    kept = labels != -100
    close(our_loss(z, v, labels, o, backend), our_loss(z[kept], v[kept], labels[kept], o, backend))
    _, grad = our_result(z, v, labels, o, backend)
    assert (grad[1] == 0).all()
