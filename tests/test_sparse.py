"""Stored teachers, `kd.TopK` and `kd.Sampled`, on every backend: against closed forms, an independent fp64
truth, the whole teacher, and statistics of samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import ONLY_GPU, fused
from hypothesis import given
from hypothesis import strategies as st
from tolerances import eager_divergence
from torch import Tensor
from torch.utils import _pytree as pytree
from truth import Options

import kdkernels as kd
from kdkernels.backends import cpu
from kdkernels.stored import sparse

DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", 0.5, kd.SkewKL(0.1), kd.SkewReverseKL(0.3), "tvd",
    "squared_error", kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(0.5, 0.0), kd.AlphaBeta(-0.4, 0.9),
)  # fmt: skip
TAILS = ("ghost", "zero", "renormalize")
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def ours(divergence: Any) -> Any:
    return kd.JSD(divergence) if isinstance(divergence, float) else divergence


def normals(*shape: int, std: float = 1.0, seed: int = 0) -> Tensor:
    """The same wherever the test runs."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = std * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def top(v: Tensor, k: int, tail: str = "ghost", T: float = 1.0, **changes: Any) -> kd.TopK:
    """The k most probable classes of logits."""
    lp = v.log_softmax(-1)
    log_probs, ids = lp.topk(k)
    return kd.TopK(ids, log_probs, tail, {T: (lp / T).logsumexp(-1)}, **changes)


def truth(z: Tensor, t: kd.TopK, divergence: Any, T: float) -> Tensor:
    """D of each row, from its definition: sets, sums over them, and a loop."""
    rows = []
    lse = (t.lse or {}).get(T, torch.zeros(len(z)))
    for y, ids, x, total in zip(z.double() / T, t.ids, t.log_probs.double() / T, lse.double(), strict=True):
        first: dict[int, int] = {}
        for place, i in enumerate(ids.tolist()):
            if i >= 0:
                first.setdefault(i, place)
        if not first and t.tail == "renormalize":
            rows.append(0 * y.sum())
            continue
        others = [i for i in range(len(y)) if i not in first]
        kept = y[list(first)]
        lp = x[list(first.values())] - total
        u, w = lp, kept
        if t.tail != "renormalize" and others:
            mass = lp.exp().sum()
            rest = torch.log1p(-mass) if t.tail == "ghost" else torch.full_like(mass, -torch.inf)
            u, w = torch.cat([lp, rest[None]]), torch.cat([kept, y[others].logsumexp(-1)[None]])
        if t.tail != "zero":
            rows.append(eager_divergence(Options(divergence), w[None], u[None], None)[0])
            continue
        lq, p = w.log_softmax(-1), u.exp()
        q = lq.exp()
        name, params = Options(divergence).row
        if name in ("forward_kl", "soft_cross_entropy"):
            own = torch.where(p > 0, u, 0.0) if name == "forward_kl" else 0.0
            rows.append((p * (own - lq)).sum())
        elif name == "tvd":
            rows.append((q - p).abs().sum() / 2)
        elif name == "squared_error":
            rows.append(((q - p) ** 2).sum() / 2)
        elif name == "alpha_beta":
            a, b = params
            if b == 0:
                own = torch.where(p > 0, a * u - a * lq, 0.0)
                rows.append(((p**a) * own - p**a + q**a).sum() / a**2)
            else:
                s = a + b
                rows.append(-(p**a * q**b - a / s * p**s - b / s * q**s).sum() / (a * b))
        else:
            share = params[0]
            m = (1 - share) * p + share * q if name == "skew_reverse_kl" else share * p + (1 - share) * q
            of_p = (p * torch.where(p > 0, p / m, 1.0).log()).sum()
            of_q = (q * (q / m).log()).sum()
            rows.append(
                of_p
                if name == "skew_kl"
                else of_q
                if name == "skew_reverse_kl"
                else share * of_p + (1 - share) * of_q
            )
    return torch.stack(rows)


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(loss, z)[0]


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest number of a row."""
    scale = exact.abs().amax(-1, keepdim=True) if exact.dim() > 1 else exact.abs().clamp(min=1)
    error = ((got.double() - exact).abs() / scale.clamp(min=1e-3)).max().item()
    assert error < ROUNDING[dtype], f"off by {error:.3g} of the largest"


# What it is


def test_the_closed_forms_of_a_stored_forward_kl() -> None:
    N, V, k = 5, 40, 6
    z = normals(N, V).requires_grad_()
    p = normals(N, V, std=3, seed=1).softmax(-1)
    best, ids = p.topk(k)
    q = z.detach().softmax(-1)
    P, Q = best.sum(-1, keepdim=True), q.gather(-1, ids).sum(-1, keepdim=True)
    onto = torch.zeros_like(q).scatter(-1, ids, best)
    stored = torch.zeros_like(q).scatter(-1, ids, 1.0).bool()
    qs, renormalised = q.gather(-1, ids) / Q, best / P
    expected = {
        "zero": P * q - onto,
        "ghost": torch.where(stored, q - onto, q * (1 - (1 - P) / (1 - Q))),
        "renormalize": torch.zeros_like(q).scatter(-1, ids, qs - renormalised),
    }
    head = (best * (best.log() - q.gather(-1, ids).log())).sum(-1)
    losses = {
        "zero": head,
        "ghost": head + ((1 - P) * ((1 - P) / (1 - Q)).log()).squeeze(-1),
        "renormalize": (renormalised * (renormalised.log() - qs.log())).sum(-1),
    }
    for tail, exact in expected.items():
        loss = kd.kd_loss(z, kd.TopK(ids, best.log(), tail), reduction="none", backend="reference")
        torch.testing.assert_close(loss, losses[tail])
        torch.testing.assert_close(gradient(loss.sum(), z), exact)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_each_divergence_with_each_tail(backend: str, divergence: Any, T: float, tail: str) -> None:
    """Rows with padding, nothing but padding, an id twice; the first and the last class."""
    if tail == "zero" and (divergence == "reverse_kl" or getattr(divergence, "alpha", 1) <= 0):
        pytest.skip("refused")
    N, V, k = 6, 259, 11
    z, v = normals(N, V, std=2), normals(N, V, std=3, seed=1)
    v[0, [0, V - 1]] = 9.0
    t = top(v, k, tail, T)
    t.ids[1, 4:] = -1
    t.ids[2] = -1
    t.ids[3, 7] = t.ids[3, 2]
    t.ids[4] = t.ids[4].flip(0)
    t.log_probs[4] = t.log_probs[4].flip(0)
    for dtype in (torch.float64, torch.float32):
        x = z.to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        exact = truth(wide, t, divergence, T) * T**2
        loss = kd.kd_loss(x, t, divergence=ours(divergence), temperature=T, reduction="none", backend=backend)
        assert_near(loss, exact, dtype)
        assert_near(gradient(loss.sum(), x), gradient(exact.sum(), wide), dtype)


@fused
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_all_classes_are_the_whole_teacher(backend: str, divergence: Any) -> None:
    """k = V: the dense loss, at T = 1 and another."""
    N, V = 3, 70
    z, v = normals(N, V).float().requires_grad_(), normals(N, V, std=3, seed=1)
    ids = torch.stack([torch.randperm(V) for _ in range(N)])
    for T in (1.0, 3.0):
        lp = v.log_softmax(-1)
        t = kd.TopK(ids, lp.gather(-1, ids), lse={T: (lp / T).logsumexp(-1)})
        options = {"divergence": ours(divergence), "temperature": T, "reduction": "none", "backend": backend}
        stored, dense = kd.kd_loss(z, t, **options), kd.kd_loss(z, v.float(), **options)
        torch.testing.assert_close(stored, dense, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(
            gradient(stored.sum(), z), gradient(dense.sum(), z), rtol=2e-4, atol=2e-7 * T
        )


@fused
@pytest.mark.parametrize("P, Q", [(1e-9, 1e-7), (1e-7, 1e-9), (1e-12, 0.3), (0.3, 1e-10), (0.9, 1e-6)])
def test_the_ghost_bucket_has_its_digits(backend: str, P: float, Q: float) -> None:
    """Masses P and Q of the tails, far below the rounding of 1 in float32: none comes from a subtraction."""
    V, stored = 1000, 2
    z = torch.full((1, V), math.log(Q / (V - stored)), dtype=torch.float64)
    z[0, 5], z[0, 700] = math.log((1 - Q) * 0.25), math.log((1 - Q) * 0.75)
    x = z.float().requires_grad_()
    q = x.detach().double().softmax(-1)[0]
    Q = (
        float(q.sum() - q[5] - q[700])
        if Q > 1e-3
        else float(q[[i for i in range(V) if i not in (5, 700)]].sum())
    )
    p = torch.tensor([0.5 * (1 - P), 0.5 * (1 - P)], dtype=torch.float64)
    t = kd.TopK(torch.tensor([[5, 700]]), p.log()[None])
    P = -math.expm1(float(p.log().logsumexp(-1)))
    loss = kd.kd_loss(x, t, backend=backend)
    exact = (p * (p.log() - q[[5, 700]].log())).sum() + P * math.log(P / Q)
    torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=1e-12)
    tail = gradient(loss, x)[0, [0, 6, V - 1]].double()
    torch.testing.assert_close(tail, q[[0, 6, V - 1]] * (1 - P / Q), rtol=2e-5, atol=1e-40)


@given(seed=st.integers(0, 2**20), k=st.integers(1, 29), share=st.sampled_from([0.1, 0.5, 0.9]))
def test_a_ghost_is_a_lower_bound(seed: int, k: int, share: float) -> None:
    """What is put together in a bucket can only lose divergence, and never goes below 0."""
    z, v = normals(2, 30, std=2, seed=seed), normals(2, 30, std=2, seed=seed + 1)
    for divergence in ("forward_kl", "reverse_kl", kd.JSD(share), "tvd", kd.SkewKL(share)):
        options = {"divergence": divergence, "reduction": "none", "backend": "cpu"}
        stored, whole = kd.kd_loss(z, top(v, k), **options), kd.kd_loss(z, v, **options)
        assert (stored >= -1e-14).all() and (stored <= whole + 1e-12).all()


@fused
def test_ids_of_the_student_and_of_a_sample(backend: str) -> None:
    """Which classes are stored is the caller's choice; k numbers of the teacher each."""
    z, v = normals(4, 90), normals(4, 90, std=2, seed=1)
    lp = v.log_softmax(-1)
    for ids in (z.topk(9).indices, torch.multinomial(v.softmax(-1), 20, replacement=True)):
        t = kd.TopK(ids, lp.gather(-1, ids))
        x = z.float().requires_grad_()
        wide = x.detach().double().requires_grad_()
        exact = truth(wide, t, "forward_kl", 1.0)
        loss = kd.kd_loss(x, t, reduction="none", backend=backend)
        assert_near(loss, exact, torch.float32)
        assert_near(gradient(loss.sum(), x), gradient(exact.sum(), wide), torch.float32)


@fused
def test_logits_may_be_stored_with_their_normalisers(backend: str) -> None:
    """Log-probabilities up to a constant of the row, with the log-sum-exp of each temperature."""
    z, v = normals(3, 50).float(), normals(3, 50, std=3, seed=1)
    x, ids = v.topk(8)
    of_logits = kd.TopK(ids, x, lse={1.0: v.logsumexp(-1), 2: (v / 2).logsumexp(-1)})
    for T in (1.0, 2.0):
        loss = kd.kd_loss(z, of_logits, temperature=T, backend=backend)
        torch.testing.assert_close(loss, kd.kd_loss(z, top(v, 8, T=T), temperature=T, backend=backend))
    at_one = kd.TopK(ids, x, lse=v.logsumexp(-1))
    assert kd.kd_loss(z, at_one, backend=backend) == kd.kd_loss(z, of_logits, backend=backend)


@fused
def test_of_an_id_that_is_there_twice_the_first_counts(backend: str) -> None:
    z = normals(1, 20).float().requires_grad_()
    log_probs = torch.tensor([[0.5, 0.2, 0.1]]).log()
    once = kd.kd_loss(z, kd.TopK(torch.tensor([[7, 3, 11]]), log_probs), backend=backend)
    more = torch.tensor([[0.5, 0.2, 0.3, 0.1, 0.4]]).log()
    twice = kd.kd_loss(z, kd.TopK(torch.tensor([[7, 3, 7, 11, 3]]), more), backend=backend)
    assert torch.equal(once, twice)
    assert torch.equal(gradient(once, z), gradient(twice, z))


# What else a call has


@fused
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_labels_masks_weights_and_stats(backend: str, dtype: torch.dtype, T: float, tail: str) -> None:
    """Against the reference in float64, whose terms other tests hold to theirs."""
    rows, V = (2, 4), 133
    z, v = normals(*rows, V, std=2).to(dtype), normals(*rows, V, std=3, seed=1)
    t = top(v, 7, tail, T)
    labels = torch.randint(V, rows)
    labels[0, 0], labels[0, 1] = t.ids[0, 0, 0], -100
    mask = torch.tensor([[True, True, True, False], [True, True, False, True]])
    with torch.no_grad():
        z[0, 3], t.log_probs[0, 3], t.ids[0, 3] = math.nan, math.nan, V + 5
    options = {
        "temperature": T, "hard_weight": 0.3, "soft_weight": 0.7, "mask": mask,
        "token_weights": torch.rand(rows), "num_items": 11.0,
    }  # fmt: skip
    for scale, softcap, noise in (
        (1.0, None, None),
        (0.5, 20.0, None),
        (2.0, None, kd.LogitNoise(0.3, seed=3)),
    ):
        options["student_noise"] = noise
        x = z.clone().requires_grad_()
        wide = z.double().requires_grad_()
        loss, stats = kd.kd_loss_with_stats(
            kd.Logits(x, scale, softcap), t, labels, backend=backend, **options
        )
        exact, theirs = kd.kd_loss_with_stats(
            kd.Logits(wide, scale, softcap), t, labels, backend="reference", **options
        )
        torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=2e-6)
        grad, truly = gradient(loss, x), gradient(exact, wide)
        assert (grad[0, 3] == 0).all() and (grad[1, 2] == 0).all()
        assert_near(grad.flatten(0, 1), truly.flatten(0, 1), dtype)
        for name in (
            "soft",
            "hard",
            "student_entropy",
            "teacher_entropy",
            "agreement",
            "accuracy",
            "counted",
        ):
            got, want = (getattr(s, name).double() for s in (stats, theirs))
            torch.testing.assert_close(got, want, rtol=5e-5, atol=5e-6, msg=name)


@fused
def test_strides_and_types_of_what_is_stored(backend: str) -> None:
    """int32 ids, bfloat16 log-probabilities, transposed rows, a sliced and shifted student."""
    v = normals(3, 5, 60, std=2, seed=1)
    t = top(v.transpose(0, 1), 6)
    z = normals(5, 4, 62).float()[:, :-1, 1:-1].requires_grad_()
    plain = kd.kd_loss(z.contiguous(), kd.TopK(t.ids.contiguous(), t.log_probs.contiguous()), backend=backend)
    strided = kd.kd_loss(
        z, kd.TopK(t.ids.int().transpose(0, 1).contiguous().transpose(0, 1), t.log_probs), backend=backend
    )
    torch.testing.assert_close(plain, strided, rtol=1e-6, atol=0)
    low = kd.TopK(t.ids, t.log_probs.bfloat16())
    same = kd.TopK(t.ids, t.log_probs.bfloat16().double())
    assert torch.equal(kd.kd_loss(z, low, backend=backend), kd.kd_loss(z, same, backend=backend))


@fused
def test_upstream_gradients_and_a_second_backward(backend: str) -> None:
    """float16's loss scale comes before the rounding; rows are weighted by theirs."""
    z, v = normals(4, 300), normals(4, 300, std=3, seed=1)
    t = top(v, 5)
    for dtype in (torch.float16, torch.float32):
        x = (z * 1.0).to(dtype).requires_grad_()
        wide = x.detach().double().requires_grad_()
        loss = kd.kd_loss(x, t, backend=backend)
        first = torch.autograd.grad(loss * 4096, x, retain_graph=True)[0]
        again = torch.autograd.grad(loss * 4096, x)[0]
        assert torch.equal(first, again)
        exact = gradient(4096 * kd.kd_loss(wide, t, backend="reference"), wide)
        assert_near(first, exact, dtype)
        weights = torch.tensor([1.0, 0.0, -2.0, 3.0])
        each = kd.kd_loss(x, t, reduction="none", backend=backend)
        got = torch.autograd.grad(each, x, weights)[0]
        exact = torch.autograd.grad(
            kd.kd_loss(wide, t, reduction="none", backend="reference"), wide, weights.double()
        )
        assert_near(got, exact[0], dtype)


@fused
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_a_head_as_the_student(backend: str, tail: str) -> None:
    """Gradients of hidden states, weight and bias, in several chunks, with rows that are dropped."""
    N, V, d = 33, 101, 8
    hidden, weight, bias = normals(N, d), normals(V, d, seed=2), normals(V, seed=3)
    t = top(normals(N, V, std=2, seed=1), 6, tail, 2.0)
    labels = torch.randint(V, (N,))
    labels[::5] = -100
    options = {"temperature": 2.0, "hard_weight": 0.2}
    exact = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    kd.kd_loss(logits, t, labels, backend="reference", **options).backward()
    for budget in (None, 12_000):
        parts = [x.float().requires_grad_() for x in (hidden, weight, bias)]
        loss = kd.kd_loss(kd.Head(*parts), t, labels, backend=backend, memory_budget=budget, **options)
        loss.backward()
        for got, want in zip(parts, exact, strict=True):
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-5)
    plan = kd.explain(kd.Head(*parts), t, labels, backend=backend, memory_budget=12_000, **options).plan
    assert plan is not None and plan.chunks > 1


@fused
def test_infinities(backend: str) -> None:
    """A student that can't reach the tail, or what is stored: the loss is infinite, the gradient isn't."""
    v = normals(2, 30, std=2, seed=1)
    t = top(v, 4)
    z = normals(2, 30).float()
    z[0, t.ids[0, 0]] = -torch.inf
    z[1] = torch.where(torch.zeros(30, dtype=torch.bool).scatter(0, t.ids[1], True), z[1], -torch.inf)
    x = z.requires_grad_()
    each = kd.kd_loss(x, t, reduction="none", backend=backend)
    assert each.isinf().all() and (each > 0).all()
    assert gradient(each.sum(), x).isfinite().all()
    certain = kd.TopK(torch.tensor([[3]]), torch.tensor([[0.0]]))
    loss = kd.kd_loss(x[:1].detach().nan_to_num(0.0, 0.0, -5.0).requires_grad_(), certain, backend=backend)
    assert loss.isfinite()


@fused
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_long_rows_with_noise_and_large_logits(backend: str, T: float) -> None:
    """Several runs of classes, of which a later one has the maximum; exponents of millions."""
    V = 9001
    v = normals(2, V, std=3, seed=1)
    t = top(v, 40, T=T)
    labels = torch.tensor([int(t.ids[0, 3]), 17])
    rising = normals(2, V) + torch.linspace(-30, 30, V)
    whole_numbers = (4 * normals(2, V)).round()
    for z, noise in (
        (rising, None),
        (whole_numbers + 2**22, None),
        (whole_numbers - 2**22, None),
        (normals(2, V), kd.LogitNoise(0.5, seed=2)),
        (normals(2, V), kd.LogitNoise(0.5, "multiplicative", seed=2)),
    ):
        x = z.float().requires_grad_()
        wide = x.detach().double().requires_grad_()
        options = {"temperature": T, "hard_weight": 0.5, "student_noise": noise, "reduction": "none"}
        each = kd.kd_loss(x, t, labels, backend=backend, **options)
        exact = kd.kd_loss(wide, t, labels, backend="reference", **options)
        torch.testing.assert_close(each.double(), exact, rtol=2e-5, atol=2e-5)
        assert_near(gradient(each.sum(), x), gradient(exact.sum(), wide), torch.float32)


@fused
@pytest.mark.parametrize("tail", TAILS)
def test_a_nan_stays_in_its_row_and_is_seen(backend: str, tail: str) -> None:
    """Whatever the divergence, also where a class that isn't there would have contributed nothing."""
    v = normals(2, 30, std=2, seed=1)
    for divergence in ("forward_kl", "reverse_kl", kd.JSD(0.5), "tvd", kd.SkewKL()):
        if (tail, divergence) == ("zero", "reverse_kl"):
            continue
        t = top(v, 4, tail)
        t.log_probs[1, 2] = math.nan
        z = normals(2, 30).float().requires_grad_()
        each = kd.kd_loss(z, t, divergence=divergence, reduction="none", backend=backend)
        assert each[0].isfinite() and each[1].isnan()
        grad = gradient(each.sum(), z)
        assert grad[0].isfinite().all() and grad[1].isnan().any()


@fused
def test_compiled(backend: str) -> None:
    """One graph without breaks, whatever the temperature is among those declared, and the same numbers."""
    torch._dynamo.reset()
    z, v = normals(6, 80).float(), normals(6, 80, std=2, seed=1)
    lp = v.log_softmax(-1)
    log_probs, ids = lp.topk(5)
    t = kd.TopK(ids, log_probs, lse={T: (lp / T).logsumexp(-1) for T in (1.0, 2.0)})

    def loss(x: Tensor, t: kd.TopK, T: float) -> Tensor:
        return kd.kd_loss(x, t, temperature=T, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for T in (1.0, 2.0):
        x, y = (z.clone().requires_grad_() for _ in range(2))
        a, b = compiled(x, t, T), loss(y, t, T)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(gradient(a, x), gradient(b, y))


# Samples


# Thousands of rows, which are too many to be interpreted.
@pytest.mark.parametrize("backend", ["reference", "cpu", *ONLY_GPU], indirect=True)
@pytest.mark.parametrize("T, power", [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)])
def test_a_sample_is_unbiased(backend: str, T: float, power: float) -> None:
    """Means over many samples: loss and gradient are the whole teacher's within five standard errors.

    Drawn from the teacher, or from a flatter proposal with importance weights; so is forward KL, given the
    log-probabilities.
    """
    M, V, n = 3000, 40, 16  # each class is drawn some dozen times at least, so that errors are about normal
    z, v = normals(1, V), normals(1, V, seed=1)
    p = (v / T).softmax(-1)
    r = (p**power) / (p**power).sum()
    ids = torch.multinomial(
        r.expand(M, V), n, replacement=True, generator=torch.Generator(z.device).manual_seed(5)
    )
    weights = (p / r).expand(M, V).gather(-1, ids) / n
    t = kd.Sampled(ids, weights, p.log().expand(M, V).gather(-1, ids), temperature=T)
    for divergence in ("soft_cross_entropy", "forward_kl"):
        options = {"divergence": divergence, "temperature": T, "backend": backend}
        dense = z.clone().requires_grad_()
        exact = kd.kd_loss(dense, v, **{**options, "backend": "reference"})
        want = gradient(exact, dense)[0]
        x = z.float().expand(M, V).clone().requires_grad_()
        each = kd.kd_loss(x, t, reduction="none", **options)
        grads = gradient(each.sum(), x)
        for got, truly in ((each[:, None].double(), exact.detach()[None]), (grads.double(), want)):
            off = (got.mean(0) - truly).abs() / (got.std(0) / math.sqrt(M)).clamp(min=1e-9)
            assert off.max() < 5, f"{off.max():.1f} standard errors"


@fused
def test_what_a_sample_weighs(backend: str) -> None:
    """(Σw) q − w, whose weights of the same id add up; without log-probabilities KL is the sample's own."""
    z = normals(2, 12).float().requires_grad_()
    ids = torch.tensor([[4, 9, 4, -1], [0, 11, 0, 0]])
    weights = torch.tensor([[0.25, 0.5, 0.25, 9.0], [0.1, 0.2, 0.3, 0.0]])
    w = torch.zeros(2, 12).scatter_add(-1, ids.clamp(min=0), torch.where(ids < 0, 0.0, weights))
    lq = z.detach().log_softmax(-1)
    t = kd.Sampled(ids, weights)
    for divergence in ("soft_cross_entropy", "forward_kl"):
        each = kd.kd_loss(z, t, divergence=divergence, reduction="none", backend=backend)
        own = torch.where(w > 0, w * w.log(), 0.0).nan_to_num(0.0) if divergence == "forward_kl" else 0.0
        torch.testing.assert_close(each, (own - w * lq).sum(-1))
        torch.testing.assert_close(gradient(each.sum(), z), w.sum(-1, keepdim=True) * lq.exp() - w)


# What it travels in


def test_sources_travel() -> None:
    """Pytrees, rows, devices and types; ids stay what they are."""
    v = normals(2, 3, 20)
    t = top(v, 4, "zero", 2.0)
    s = kd.Sampled(t.ids, t.log_probs.exp(), t.log_probs, 1.5)
    for x in (t, s):
        leaves, structure = pytree.tree_flatten({"teacher": x})
        back = pytree.tree_unflatten(leaves, structure)["teacher"]
        assert type(back) is type(x) and all(
            a is b for a, b in zip(leaves, pytree.tree_leaves(back), strict=True)
        )
        assert x.to(torch.float32).ids.dtype == torch.int64 and x.to("meta").ids.device.type == "meta"
        assert (
            x[0].ids.shape == (3, 4) and x[:, 1:].ids.shape == (2, 2, 4) and x[..., :2].ids.shape == (2, 2, 4)
        )
        with pytest.raises(IndexError, match="rows only"):
            x[0, 0, 0]
    assert (
        t[1].lse is not None
        and t[1].lse[2.0].shape == (3,)
        and t.to(torch.float32).lse[2.0].dtype == torch.float32
    )
    assert t[0].tail == "zero" and s[1].temperature == 1.5 and s[1].log_probs.shape == (3, 4)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert t[mask].ids.shape == (4, 4) and torch.equal(t[mask].lse[2.0], t.lse[2.0][mask])


@given(data=st.data())
def test_the_library_prepares_as_torch_does(data: st.DataObject) -> None:
    """Ids in any order, twice, padded; rows that don't count; every tail; samples with and without logs."""
    if cpu.BACKEND.available(torch.device("cpu")) is not None:
        pytest.skip("the CPU library is not here")
    rows, k, V = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 25))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    ids = torch.randint(-1, V, (rows, k), generator=generator)
    x = 3 * torch.randn(rows, V, generator=generator, dtype=torch.float64)
    lp = x.log_softmax(-1).gather(-1, ids.clamp(min=0))
    T = data.draw(st.sampled_from([1.0, 2.0]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    source: Any
    if data.draw(st.booleans()):
        logs = lp.to(dtype) if data.draw(st.booleans()) else None
        source = kd.Sampled(
            ids, (lp.exp() * torch.randint(0, 3, lp.shape, generator=generator)).to(dtype), logs, T
        )
    else:
        lse = {T: (x.log_softmax(-1) / T).logsumexp(-1)}
        source = kd.TopK(ids, lp.to(dtype), data.draw(st.sampled_from(TAILS)), lse)
    counted = torch.rand(rows, generator=generator) < 0.7
    kl = data.draw(st.booleans())
    a = cpu.BACKEND.store(source, T, counted, V, torch.float64, kl)
    b = sparse(source, T, counted, V, torch.float64, kl)
    assert a is not None and torch.equal(a.ids, b.ids)
    for name in ("log_p", "rest", "extra"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            # Of a mass that rounds to 1, what is left is its rounding.
            torch.testing.assert_close(one.exp(), other.exp(), rtol=1e-12, atol=1e-13)


# Refusals

IDS = torch.tensor([[3, 1], [0, 2]])
LOGS = torch.tensor([[0.5, 0.2], [0.6, 0.3]]).log()
Z = torch.zeros(2, 6)


@pytest.mark.parametrize(
    "teacher, options, message",
    [
        (kd.TopK(IDS, LOGS), {"temperature": 2.0}, "temperature=2.0 was not declared .* none beside 1"),
        (kd.TopK(IDS, LOGS, "zero", {3.0: torch.zeros(2)}), {"temperature": 2.0}, "was not declared .* 3.0"),
        (kd.Sampled(IDS, LOGS.exp()), {"temperature": 2.0}, "the one that kd.Sampled was drawn at, 1.0"),
        (kd.TopK(IDS, LOGS), {"teacher_noise": kd.LogitNoise(0.1)}, "teacher_noise must be None with"),
        (kd.TopK(IDS, LOGS), {"pad_vocab": True}, "pad_vocab must be False with kd.TopK"),
        (kd.TopK(IDS, LOGS), {"divergence": kd.DKD(1, 8)}, "'dkd' is about the label"),
        (kd.TopK(IDS, LOGS), {"divergence": kd.LogitMSE()}, "'logit_mse' compares logits"),
        (kd.TopK(IDS, LOGS), {"divergence": kd.LogitMSE(centered=True)}, "compares logits"),
        (kd.TopK(IDS, LOGS), {"divergence": kd.BinaryKL()}, "asks a question of each class"),
        (kd.TopK(IDS, LOGS, "zero"), {"divergence": "reverse_kl"}, "infinite where the teacher gives"),
        (kd.TopK(IDS, LOGS, "zero"), {"divergence": kd.AlphaBeta(-0.2, 0.7)}, "infinite where"),
        (kd.TopK(IDS, LOGS, "zero"), {"divergence": kd.AlphaBeta(0.5, -0.5)}, "infinite where"),
        (kd.Sampled(IDS, LOGS.exp()), {"divergence": "tvd"}, "not linear in the teacher's probabilities"),
        (kd.TopK(IDS + 4, LOGS), {}, r"ids of TopK must be in \[0, 6\), or -1 .* got 7 at row 0, place 0"),
        (kd.TopK(IDS - 3, LOGS), {}, "got -2 at row 0, place 1"),
        (kd.TopK(IDS, LOGS + 2), {}, r"those of row 0 add up to 5.172: of logits"),
        (kd.Sampled(IDS, LOGS), {}, "weights of Sampled must be >= 0, got -0.69.* at row 0, place 0"),
        (kd.TopK(IDS[:1], LOGS[:1]), {}, r"must have the student's leading shape \(2,\), got \(1,\)"),
        (kd.TopK(IDS, LOGS[:, :1]), {}, r"log_probs of TopK must have shape \(2, 2\), got \(2, 1\)"),
        (kd.TopK(IDS, LOGS, lse={1.0: torch.zeros(3)}), {}, r"lse\[1.0\] of TopK must have shape \(2,\)"),
        (kd.TopK(IDS[:, :0], LOGS[:, :0]), {}, "k >= 1"),
        (kd.TopK(IDS, LOGS.clone().requires_grad_()), {}, "teacher requires grad"),
        (kd.TopK(IDS.to("meta"), LOGS), {}, "must be on the student's device cpu, got meta"),
        (kd.Mixture([Z, kd.TopK(IDS, LOGS)]), {}, "teachers.1. of Mixture must be"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(teacher: Any, options: dict[str, Any], message: str) -> None:
    for backend in (None, "reference"):
        with pytest.raises((ValueError, TypeError), match=message):
            kd.kd_loss(Z, teacher, backend=backend, **options)


def test_types_and_options_of_the_sources() -> None:
    with pytest.raises(ValueError, match="tail must be one of 'ghost', 'zero', 'renormalize', got 'ghosts'"):
        kd.TopK(IDS, LOGS, "ghosts")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lse of TopK must map temperatures"):
        kd.TopK(IDS, LOGS, lse=[1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperatures > 0 as keys, got 0"):
        kd.TopK(IDS, LOGS, lse={0: torch.zeros(2)})
    with pytest.raises(ValueError, match="temperature of Sampled must be > 0"):
        kd.Sampled(IDS, LOGS, temperature=-1)
    with pytest.raises(TypeError, match=r"ids of TopK must be integer class ids, got torch\.float32"):
        kd.kd_loss(Z, kd.TopK(LOGS, LOGS))
    with pytest.raises(TypeError, match=r"log_probs of TopK must be a float tensor, got torch\.int64"):
        kd.kd_loss(Z, kd.TopK(IDS, IDS))
    with pytest.raises(TypeError, match=r"student must be .* got TopK"):
        kd.kd_loss(kd.TopK(IDS, LOGS), Z)  # type: ignore[arg-type]


def test_a_temperature_needs_no_declaration_where_the_tail_is_left_out() -> None:
    loss = kd.kd_loss(Z, kd.TopK(IDS, LOGS, "renormalize"), temperature=2.0)
    p = (LOGS / 2).softmax(-1)
    torch.testing.assert_close(loss, 4 * (p * (p.log() - math.log(0.5))).sum(-1).mean())


def test_explain_says_who_runs_it() -> None:
    told = kd.explain(Z, kd.TopK(IDS, LOGS))
    assert told.backend == "cpu" and told.reasons["cpu"] is None
