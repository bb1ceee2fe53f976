"""The kernel of stored teachers, run on a processor: every divergence, tail and option, held to fp64.

The truth is the reference backend in float64, which `test_sparse.py` pins to closed forms; the budget is that
of `tolerances.py`, with what one rounding may cost found by autograd.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu import Split, cuda_on_cpu
from cuda_shim import CUDA, LaunchError, why_not
from test_cuda_rows import THREADS, laid_out, noise
from tolerances import assert_close, roundings_of_truth
from torch import Tensor

import kdkernels as kd
from kdkernels import reference
from kdkernels.backends.cuda_build import STORED, Build
from kdkernels.functional import checked_call, complete

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# One of each template of divergence.h that a distribution has.
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", kd.JSD(0.3), kd.SkewKL(0.1), kd.SkewReverseKL(0.3),
    "tvd", "squared_error", kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(0.5, 0.0), kd.AlphaBeta(0.5, -0.5),
)  # fmt: skip
TAILS = ("ghost", "zero", "renormalize")
HARD = ("none", "shared", "own")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("alike", "student sliced")


class Case(NamedTuple):
    """What is built, as far as all calls of a test have it in common."""

    divergence: Any
    hard: str
    dtype: torch.dtype
    cluster: int
    layout: str


def shown(value: Any) -> str:
    """What pytest says of it."""
    if isinstance(value, Case):
        return "-".join(str(x) for x in value).replace(" ", "_")
    return "+".join(value) if isinstance(value, dict) else str(value)


# The budget


def units_of(
    z: Tensor, teacher: Any, labels: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What one rounding of each intermediate may cost, in units of eps: of each row's loss, and gradient.

    Logarithms are off by a rounding of the largest logit and of each sum; what that does to phi and g is
    their derivatives.
    """
    call = checked_call(z, teacher, labels, complete(options), False)
    spec, stored, T = call.spec, call.sparse, call.spec.temperature
    assert stored is not None
    rows = reference.counted_rows(call)
    post = (spec.student_scale, spec.student_softcap)
    x = reference._logits(call.student.detach(), rows, call.classes, torch.float64, post)
    x = reference._noised(x, spec.student_noise, call.student_seed, reference.STUDENT)
    y = x / T
    there, V = stored.ids >= 0, y.shape[-1]
    columns = torch.where(there, stored.ids, V)
    padded = torch.nn.functional.pad(y, (0, 1), value=-torch.inf)
    kept, rest = padded.gather(-1, columns), padded.scatter(-1, columns, -torch.inf)[..., :V]
    q = torch.log_softmax(y, -1).exp().nan_to_num()
    lse_rest = rest.logsumexp(-1, keepdim=True)
    if stored.rest is None:
        lq, lp = kept - kept.logsumexp(-1, keepdim=True), stored.log_p
    else:
        lq = torch.cat([kept, lse_rest], -1) - y.logsumexp(-1, keepdim=True)
        lp = torch.cat([stored.log_p, stored.rest.unsqueeze(-1)], -1)
    roundings = (
        4
        + torch.tensor(float(V)).log2()
        + sum(t.masked_fill(~t.isfinite(), 0.0).abs().amax(-1) for t in (y, lp))
    )
    lq, lp = (t.detach().clamp(min=-1e4).requires_grad_() for t in (lq, lp))
    phi = spec.row.phi(lq, lp, *spec.params)
    g, of_lp = torch.autograd.grad(phi.sum(), (lq, lp), create_graph=True)
    if g.requires_grad:
        more = torch.autograd.grad(g.sum(), (lq, lp), allow_unused=True)
        bends = sum(t.abs().nan_to_num() for t in more if t is not None)
    else:
        bends = torch.zeros_like(g)
    phi, g, of_lp = (t.detach().abs().nan_to_num(0.0, 0.0, 0.0) for t in (phi, g, of_lp))
    if spec.divergence == "tvd":  # where both are the same, its derivatives are 0 by chance
        g, of_lp = lq.detach().exp() / 2, lp.detach().exp() / 2
    soft = abs(spec.soft_weight * spec.t_factor)
    loss_unit = soft * roundings * (phi + g + of_lp).sum(-1)
    each = g + bends + lq.detach().exp() * g.sum(-1, keepdim=True)
    k = stored.ids.shape[-1]
    grad_unit = torch.zeros_like(padded).scatter(-1, columns, each[..., :k])[..., :V]
    if stored.rest is not None:
        of_rest = (g + bends)[..., k:] * (rest - lse_rest).exp().nan_to_num()
        grad_unit = grad_unit + torch.where(
            rest == -torch.inf, 0.0, of_rest + q * (g + bends).sum(-1, keepdim=True)
        )
    grad_unit = soft / T * roundings.unsqueeze(-1) * grad_unit
    if labels is not None and spec.hard_weight:
        at = labels.masked_fill((labels < 0) | (labels >= V), 0).unsqueeze(-1)
        bits = (4 + torch.tensor(float(V)).log2() + x.masked_fill(~x.isfinite(), 0.0).abs().amax(-1)) * abs(
            spec.hard_weight
        )
        loss_unit = loss_unit + bits
        one = torch.log_softmax(x, -1).exp().nan_to_num()
        grad_unit = grad_unit + bits.unsqueeze(-1) * one.scatter_add(-1, at, torch.ones_like(at).double())
    weights = 1.0 if call.token_weights is None else call.token_weights.double().abs()
    return loss_unit * weights, grad_unit * (weights if isinstance(weights, float) else weights.unsqueeze(-1))


def run(
    z: Any, teacher: Any, labels: Tensor | None, options: dict[str, Any], backend: str, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of rows, and the gradient with respect to the raw logits."""
    leaf = z.detach().requires_grad_()
    scale, cap = options.get("student_scale", 1.0), options.get("student_softcap")
    rest = {k: v for k, v in options.items() if k not in ("student_scale", "student_softcap")}
    student = kd.Logits(leaf, scale=scale, softcap=cap) if (scale, cap) != (1.0, None) else leaf
    loss = kd.kd_loss(student, teacher, labels, backend=backend, reduction="none", **rest)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach(), gradient


def check(
    z: Tensor,
    teacher: Any,
    labels: Tensor | None,
    options: dict[str, Any],
    upstream: Tensor | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A call, forward and backward, held to the budget; tensors are of the CPU, wherever it runs."""
    upstream = torch.ones(z.shape[:-1]) if upstream is None else upstream
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    given = [None if x is None else x.to(device) for x in (z, teacher, labels)]
    loss, gradient = (x.cpu() for x in run(*given, there, "cuda", upstream.to(device)))
    assert loss.dtype == torch.float32 and gradient.dtype == z.dtype
    double = teacher.to(torch.float64)
    exact = run(z.double(), double, labels, options, "reference", upstream)
    eager = run(z, teacher, labels, options, "reference", upstream)
    scale, cap = options.get("student_scale", 1.0), options.get("student_softcap")
    rest = {k: v for k, v in options.items() if k not in ("student_scale", "student_softcap")}
    units = units_of(kd.Logits(z.double(), scale=scale, softcap=cap), double, labels, rest)  # type: ignore[arg-type]
    factor = upstream.double()
    if scale != 1.0:
        units = units[0], units[1] * abs(scale)
    eps = torch.finfo(torch.float32).eps
    assert_close("loss", loss, eager[0], exact[0], units[0], eps)
    of_gradient = units[1] * factor.abs().unsqueeze(-1) + roundings_of_truth(exact[1])
    assert_close("gradient", gradient, eager[1], exact[1], of_gradient, eps)
    return loss, gradient


# Calls


def stored_teacher(v: Tensor, ids: Tensor, tail: str, T: float) -> kd.TopK:
    """Logits of some classes, and what all of them sum to."""
    lse = None if tail == "renormalize" else {T: (v / T).logsumexp(-1)}
    there = v.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 7.0)
    return kd.TopK(ids, there, tail, lse)


def some_ids(generator: torch.Generator, v: Tensor, k: int) -> Tensor:
    """The teacher's likeliest classes and others, padded here and there, in no order."""
    ids = v.topk(k).indices
    other = torch.rand(v.shape, generator=generator).argsort(-1)[..., :k]
    ids = torch.where(torch.rand(v.shape[:-1], generator=generator)[..., None] < 0.3, other, ids)
    if k > 1:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -1)
    return ids


def allowed(divergence: Any, tail: str) -> bool:
    """Whether it is finite of a tail without mass."""
    name, params = getattr(divergence, "name", divergence), getattr(divergence, "params", ())
    infinite = name == "reverse_kl" or (name == "alpha_beta" and (params[0] <= 0 or sum(params) <= 0))
    return tail != "zero" or not infinite


CASES = [
    Case(divergence, HARD[h], DTYPES[(d + h) % 3], (1, 2, 4)[(d // 3 + h) % 3], LAYOUTS[(d + d // 2 + n) % 2])
    for d, divergence in enumerate(DIVERGENCES)
    for n, h in enumerate((d % 3, (2 * d + d // 3 + 1) % 3))
    if n == 0 or h != d % 3
]


def is_plain(case: Case) -> bool:
    """Whether a plain run has it: of each divergence one."""
    return case.hard == HARD[DIVERGENCES.index(case.divergence) % 3]


def test_the_cases_have_every_pair() -> None:
    """Of hard terms, dtypes, clusters and layouts, of which each divergence has one or two; and of the ones
    that a plain run has, every value."""
    for name in Case._fields:
        assert {getattr(c, name) for c in CASES if is_plain(c)} == {getattr(c, name) for c in CASES}, name
    places = (HARD, DTYPES, (1, 2, 4), LAYOUTS)
    for (i, some), (j, others) in itertools.combinations(enumerate(places), 2):
        assert {(case[1 + i], case[1 + j]) for case in CASES} == set(itertools.product(some, others))


# Classes, and how many of them are stored: one, all, and more than a block has threads.
SIZES = ((2, 1), (37, 37), (260, 5), (1033, 97), (2601, 64), (901, 700))


@pytest.mark.thorough(but=lambda case: is_plain(case))
@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=shown)
def test_rows(number: int, case: Case) -> None:
    """Calls of one build, each with another tail."""
    for i, tail in enumerate(TAILS):
        if not allowed(case.divergence, tail):
            continue
        generator = torch.Generator().manual_seed(10 * number + i)
        V, k = SIZES[(number + 2 * i) % 6]
        T = 2.0 if case.hard == "own" or (case.hard == "none" and i == 1) else 1.0
        z, v = (2 * torch.randn(2, 3, V, generator=generator) for _ in range(2))
        if i == 1:
            z = z + 50.0 * torch.randn(2, 3, 1, generator=generator)
        z = laid_out(z.to(case.dtype), case.layout == "student sliced")
        teacher = stored_teacher(v, some_ids(generator, v, k), tail, T)
        options: dict[str, Any] = {"divergence": case.divergence, "temperature": T}
        labels = None
        if case.hard != "none":
            labels = torch.randint(V, (2, 3), generator=generator)
            labels[0] = teacher.ids[0, :, 0].clamp(min=0)
            labels[1, 2] = -100
            options["hard_weight"] = 0.4
        if i == 1:
            options["mask"] = torch.tensor([[True, False, True], [False, True, True]])
        if i == 2:
            options["token_weights"] = torch.rand(2, 3, generator=generator)
        upstream = 2.0 ** torch.randint(-3, 4, (2, 3), generator=generator)
        threads = THREADS[case.cluster]
        with cuda_on_cpu(
            Split(case.cluster, threads[(number + i) % len(threads)]),
            clusters=1 + (number + i) % 3, seed=(number + i) % 5, approximate=number % 3 == 0,
        ) as driver:  # fmt: skip
            check(z, teacher, labels, options, upstream)
        rows = [build for build in driver.builds if isinstance(build, Build)]
        assert rows and all(build.stored for build in rows)
        assert {build.hard for build in rows} == {
            {"none": "kNoHard", "shared": "kSharedHard", "own": "kOwnHard"}[case.hard]
        }
        written = {build.shifted for build in rows if build.mode != "kLoss"}
        assert written == {case.layout == "student sliced"}


# Rows of a kind


def extreme(V: int, k: int) -> tuple[Tensor, Tensor]:
    """Logits of rows, and the classes that are stored of each: every k-th of a part, in a random order."""
    generator = torch.Generator().manual_seed(V)
    z = torch.randn(9, V, generator=generator)
    ids = torch.stack([torch.randperm(V, generator=generator)[:k] for _ in z])
    within = torch.zeros(z.shape).scatter(-1, ids, 1.0).bool()
    z[0] += 70.0 * within[0]  # the others have 1e-30
    z[1] -= 70.0 * within[1]  # those that are stored have it
    z[2] += 300.0 * within[2]  # what no float32 has
    z[3] -= 300.0 * within[3]
    z[4] = z[4].masked_fill(~within[4], -torch.inf)
    z[5] = z[5].masked_fill(within[5], -torch.inf)
    z[6, ids[6, 0]] += 200.0  # one has all
    ids[7, :] = -1  # nothing is stored
    ids[8, : k // 2] = -1
    return z, ids


# alpha_beta of one sign at either end has infinite powers of those.
EXTREME = [
    (name, T, hard, cluster, dtype)
    for name, T, hard, cluster, dtype in (
        ("forward_kl", 1.0, 0.3, 2, torch.float32),
        ("soft_cross_entropy", 2.0, 0.3, 1, torch.bfloat16),
        ("reverse_kl", 1.0, 0.0, 1, torch.float32),
        (kd.JSD(0.3), 2.0, 0.3, 4, torch.float32),
        (kd.SkewKL(0.1), 1.0, 0.0, 2, torch.bfloat16),
        ("tvd", 2.0, 0.0, 1, torch.float32),
        (kd.AlphaBeta(0.2, 0.7), 1.0, 0.3, 2, torch.float32),
    )
]


@pytest.mark.thorough(but=lambda divergence: divergence in ("forward_kl", kd.JSD(0.3), "tvd"))
@pytest.mark.parametrize(("divergence", "T", "hard", "cluster", "dtype"), EXTREME, ids=str)
def test_masses_that_are_next_to_nothing(
    divergence: Any, T: float, hard: float, cluster: int, dtype: torch.dtype
) -> None:
    """Of the stored classes or of all others, and none at all; a loss that is infinite has a gradient."""
    for tail, (V, k) in itertools.product(TAILS, ((300, 12), (40, 40), (9, 1))):
        if not allowed(divergence, tail):
            continue
        z, ids = extreme(V, k)
        z = z.to(dtype)
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(V + 1))
        labels = ids.roll(1, -1)[:, 0].clamp(min=0) if hard else None
        if labels is not None:
            labels[::2] = (labels[::2] + 1) % V
        teacher = stored_teacher(v, ids, tail, T)
        options = {"divergence": divergence, "temperature": T, "hard_weight": hard}
        with cuda_on_cpu(Split(cluster, 64), clusters=2, seed=1):
            loss, gradient = check(z, teacher, labels, options)
        # Where there is a softmax at all.
        rows = torch.full((9,), True)
        rows[5] = tail != "renormalize" and k < V
        assert not loss[rows].isnan().any() and gradient[rows].isfinite().all()


def test_what_is_no_number_makes_its_row_none() -> None:
    """A log-probability, a logit, a label that is none; and what doesn't count is 0, whatever it holds."""
    z, v = (torch.randn(8, 203, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    ids = v.topk(9).indices
    teacher = stored_teacher(v, ids, "ghost", 1.0)
    teacher.log_probs[0, 3] = torch.nan
    z[1, 5] = torch.nan
    z[2, ids[2, 4]] = torch.nan
    teacher.log_probs[3] = torch.nan
    teacher.ids[3] = 10**6
    z[3] = torch.nan
    labels = torch.full((8,), 7)
    labels[4] = 203
    mask = torch.arange(8) != 3
    for divergence in ("forward_kl", "tvd"):
        leaf = z.clone().requires_grad_()
        with cuda_on_cpu(Split(2, 32)):
            loss = kd.kd_loss(
                leaf, teacher, labels, divergence=divergence, hard_weight=0.5, mask=mask, reduction="none",
                backend="cuda",
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        bad = torch.tensor([True, True, True, False, True, False, False, False])
        assert loss[bad].isnan().all() and gradient[bad].isnan().any(-1).all()
        assert loss[~bad].isfinite().all() and gradient[~bad].isfinite().all()
        assert loss[3] == 0 and (gradient[3] == 0).all()


def test_terms_of_weight_0_are_absent() -> None:
    """Also where they are infinite; and what is stored isn't looked at where nobody asks."""
    z = torch.randn(4, 50)
    z[1, 10:] = -torch.inf
    ids = torch.arange(5).expand(4, 5)
    teacher = kd.TopK(ids, torch.full((4, 5), -2.0), lse=torch.ones(4))
    labels = torch.tensor([3, 4, 20, 30])
    for options in ({"soft_weight": 0.0}, {"hard_weight": 0.0, "soft_weight": 0.0}):
        options = {"hard_weight": 1.0, **options}
        with cuda_on_cpu(Split(1, 32)):
            results = []
            for backend in ("cuda", "reference"):
                leaf = z.clone().requires_grad_()
                loss, stats = kd.kd_loss_with_stats(leaf, teacher, labels, backend=backend, **options)
                plain = kd.kd_loss(leaf, teacher, labels, backend=backend, **options)
                torch.testing.assert_close(loss, plain)
                (gradient,) = torch.autograd.grad(plain, leaf)
                results.append((loss, gradient, stats.agreement, stats.accuracy))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


# Caps, noise, figures

PROCESSED: tuple[dict[str, Any], ...] = (
    {"student_scale": 0.7, "student_softcap": 20.0},
    {"student_noise": noise("multiplicative", "logit", 0.5), "student_scale": 1.5},
    {"student_noise": noise("additive", "logit"), "student_softcap": 15.0},
    {"student_noise": noise("multiplicative", "row"), "student_softcap": 30.0},
)
PROCESSED_CASES = [
    (
        Case(divergence, HARD[k % 3], DTYPES[(0, 1, 2, 0, 2)[k]], (4, 1, 2)[k % 3], LAYOUTS[k % 2]),
        PROCESSED[k % 4],
    )
    for k, divergence in enumerate(("forward_kl", kd.JSD(0.3), "reverse_kl", "tvd", "soft_cross_entropy"))
]


@pytest.mark.thorough(but=lambda number: number < len(PROCESSED))
@pytest.mark.parametrize(
    ("number", "case", "more"), [(k, *x) for k, x in enumerate(PROCESSED_CASES)], ids=shown
)
def test_caps_noise_and_figures(number: int, case: Case, more: dict[str, Any]) -> None:
    """Of rows whose logits become others before they are anything: the same loss, with its figures."""
    for i, tail in enumerate(("ghost", "renormalize")):
        generator = torch.Generator().manual_seed(7 * number + i)
        V, k = ((1003, 50), (61, 61))[i]
        T = 1.0 if case.hard == "shared" else 2.0
        z, v = (2 * torch.randn(2, 3, V, generator=generator) for _ in range(2))
        z = laid_out(z.to(case.dtype), case.layout == "student sliced")
        teacher = stored_teacher(v, some_ids(generator, v, k), tail, T)
        labels = torch.randint(V, (2, 3), generator=generator) if case.hard != "none" else None
        if labels is not None:
            labels[1, 0] = -100
            labels[0, 1] = int(z[0, 1].argmax())
        options = {
            "divergence": case.divergence, "temperature": T, "hard_weight": 0.4 * (labels is not None),
            "token_weights": torch.rand(2, 3, generator=generator), **more,
        }  # fmt: skip
        threads = THREADS[case.cluster]
        split = Split(case.cluster, threads[(number + i) % len(threads)])
        with cuda_on_cpu(split, seed=number, approximate=number % 3 == 0):
            if i == number % 2:
                check(z, teacher, labels, options)
                continue
            scale, cap = more.get("student_scale", 1.0), more.get("student_softcap")
            options = {k: v for k, v in options.items() if k not in ("student_scale", "student_softcap")}
            results = []
            for dtype, backend in ((case.dtype, "cuda"), (torch.float64, "reference")):
                leaf = laid_out(z.to(dtype), case.layout == "student sliced").requires_grad_()
                loss, figures = kd.kd_loss_with_stats(
                    kd.Logits(leaf, scale=scale, softcap=cap), teacher.to(torch.float64), labels,
                    backend=backend, **options,
                )  # fmt: skip
                results.append((vars(figures), torch.autograd.grad(loss, leaf)[0], loss.detach()))
        (ours, gradient, loss), (exact, wanted, value) = results
        for name, figure in ours.items():
            torch.testing.assert_close(figure.double(), exact[name].double(), rtol=2e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(loss.double(), value, rtol=2e-5, atol=1e-5)
        eps = torch.finfo(case.dtype).eps
        torch.testing.assert_close(gradient.double(), wanted, rtol=2 * eps + 1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_the_place_of_logits(dtype: torch.dtype) -> None:
    """Those of a head are written where its logits were, which the kernel reads meanwhile."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype) for n in (7, 67))
    v = torch.randn(7, 67, generator=generator)
    results = []
    with cuda_on_cpu(Split(2, 32)) as driver:
        for backend in ("cuda", "reference"):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            teacher = stored_teacher(v, v.topk(50).indices, "ghost", 1.0)
            loss = kd.kd_loss(kd.Head(*leaves), teacher, divergence=kd.JSD(0.5), backend=backend)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert [(b.mode, b.stored) for b in driver.builds if isinstance(b, Build)] == [("kGradient", True)]
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


def test_sampled_teachers() -> None:
    """With what they add to a loss."""
    generator = torch.Generator().manual_seed(4)
    z, v = (torch.randn(2, 3, 205, generator=generator) for _ in range(2))
    p = (v / 2).softmax(-1)
    ids = torch.multinomial(p.flatten(0, 1), 40, replacement=True, generator=generator).view(2, 3, 40)
    teacher = kd.Sampled(ids, torch.full(ids.shape, 1 / 40), p.log().gather(-1, ids), temperature=2.0)
    for divergence in ("forward_kl", "soft_cross_entropy"):
        with cuda_on_cpu(Split(2, 64)):
            check(z, teacher, None, {"divergence": divergence, "temperature": 2.0})


@pytest.mark.parametrize("cluster", [1, 4])
def test_whoever_comes_first_the_numbers_are_the_same(cluster: int) -> None:
    """To the bit, in any order of the threads and with any number of clusters."""
    generator = torch.Generator().manual_seed(5)
    z, v = (torch.randn(2, 3, 805, generator=generator) for _ in range(2))
    teacher, results = stored_teacher(v, some_ids(generator, v, 200), "ghost", 2.0), []
    options = {"divergence": kd.JSD(0.3), "temperature": 2.0}
    for seed in range(4):
        with cuda_on_cpu(Split(cluster, 64), clusters=1 + seed % 3, seed=seed):
            results.append(run(z, teacher, None, options, "cuda", torch.ones(2, 3)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


# Under sanitizers

SANITIZED: tuple[Any, ...] = (
    ("thread address", Case("forward_kl", "own", torch.bfloat16, 1, "alike"), 64, {}),
    ("thread", Case(kd.JSD(0.3), "shared", torch.float32, 2, "student sliced"), 32, {}),
    ("address", Case("reverse_kl", "none", torch.float16, 4, "student sliced"), 32, PROCESSED[0]),
)


def sanitized(
    sanitize: str, case: Case, threads: int, more: dict[str, Any], seed: int = 0, V: int = 517, k: int = 100
) -> None:
    """A call, forward and backward, held to the budget; it may point to what it was given, and no further."""
    if (reason := why_not(sanitize)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(seed)
    z, v = (torch.randn(2, 3, V, generator=generator) for _ in range(2))
    T = 2.0 if case.hard == "own" else 1.0
    teacher = stored_teacher(v, some_ids(generator, v, k), "ghost", T)
    labels = torch.randint(V, (2, 3), generator=generator) if case.hard != "none" else None
    options = {"divergence": case.divergence, "temperature": T, "hard_weight": 0.4 * (labels is not None)}
    options |= {"mask": torch.tensor([[True, True, False], [True, True, True]]), **more}
    z = laid_out(z.to(case.dtype), case.layout == "student sliced")
    with cuda_on_cpu(Split(case.cluster, threads), clusters=2, seed=seed, sanitize=sanitize):
        check(z, teacher, labels, options)


@pytest.mark.thorough(but=lambda sanitize, case: (sanitize == "thread") == (case.cluster == 1))
@pytest.mark.parametrize(
    ("sanitize", "case", "threads", "more"),
    [(name, *what) for names, *what in SANITIZED for name in names.split()],
    ids=shown,
)
def test_sanitizers_find_nothing(sanitize: str, case: Case, threads: int, more: dict[str, Any]) -> None:
    """Neither a race nor a byte that isn't the call's; nothing that C++ leaves undefined."""
    sanitized(sanitize, case, threads, more)
    sanitized(sanitize, case, threads, more, seed=1, V=44, k=44)


# The kernel with a line less: (its text, what is there instead, how it is found).
DEFECTS = {
    "the row before": (
        "if constexpr (!C::kShifted) block_barrier();\n    if (kWrites",
        "if (kWrites",
        "race",
    ),
    "bits of others": ("mark(r);\n    block_barrier();", "mark(r);", "race"),
    "corrections": ("dz);\n    });\n    block_barrier();", "dz);\n    });", "race"),
    "bits that stay": ("          store_byte(bits + i, 0);\n        }", "        }", "budget"),
    "bits of a loss": ("if (stored != 0) store_byte(bits + i, 0);", "{}", "budget"),
}


def plant(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """Builds have the kernel with one place of its text changed."""
    text = (CUDA / "kd_sparse.cu").read_text()
    assert text.count(before) == 1, f"{text.count(before)} times in kd_sparse.cu: {before}"
    unit = Build.unit
    monkeypatch.setattr(Build, "unit", lambda self: unit(self).replace(STORED, text.replace(before, after)))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier by ThreadSanitizer, whatever the order that the threads happen to run in; bits that
    nobody clears by what comes out."""
    before, after, how = DEFECTS[defect]
    plant(monkeypatch, before, after)
    of_loss = defect == "bits of a loss"
    case = Case("forward_kl", "none", torch.float16 if of_loss else torch.bfloat16, 2, "alike")
    if how == "race":
        with pytest.raises(LaunchError, match="ThreadSanitizer: data race"):
            sanitized("thread", case, 64, {})
    else:
        with pytest.raises(AssertionError, match="outside the budget"):
            sanitized("", case, 64, {})
