"""Noise on logits: the generator's published vectors, one sample wherever it is drawn, its statistics, and
what it does to a loss."""

from __future__ import annotations

from dataclasses import replace
from math import erf, pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
import truth as exact
from tolerances import DIVERGENCES, DTYPES, check, our_loss, our_result
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from truth import Options

import kdkernels as kd
from kdkernels import noise as ours
from kdkernels.registry import BACKENDS

ADDITIVE = kd.LogitNoise(0.7, seed=11)
KINDS = {
    "additive": ADDITIVE,
    "multiplicative": replace(ADDITIVE, kind="multiplicative"),
    "additive rows": replace(ADDITIVE, per="row"),
    "multiplicative rows": replace(ADDITIVE, kind="multiplicative", per="row"),
    "some rows": replace(ADDITIVE, probability=0.4),
    "far rows": replace(ADDITIVE, kind="multiplicative", row_offset=2**32 - 2, seed=2**64 - 3),
}
kinds = pytest.mark.parametrize("noise", KINDS.values(), ids=KINDS)


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def both(noise: Any, **others: Any) -> Options:
    """Options with this noise on both sides."""
    return Options(student_noise=noise, teacher_noise=noise, **others)


# The generator

# Random123's kat_vectors: counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Of the truth's Philox and of the package's."""
    assert tuple(int(w) for w in exact.philox(counter, key)) == words
    given = [tuple(torch.tensor(x, dtype=torch.int64) for x in xs) for xs in (counter, key)]
    assert tuple(int(w) for w in ours.philox(given[0], (given[1][0], given[1][1]))) == words


SEEDS = (0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), 0x299F31D0A4093822)
ROWS = (0, 1, 77, 2**31, 2**32 - 1, 2**32, 2**40 + 3)


@pytest.mark.parametrize("name", [*BACKENDS])
@pytest.mark.parametrize("stream", [0, 1, 2, 6, 2**31, 2**31 + 1])
def test_words_are_equal_to_the_bit(name: str, stream: int) -> None:
    """Counters and keys laid out as decided: class over four, row low and high, stream; seed low and high."""
    classes = 11
    rows = torch.tensor(ROWS, device="cpu")
    for seed in SEEDS:
        expected = torch.from_numpy(exact.words(seed, ROWS, classes, stream).astype(np.int64))
        if name == "reference":
            groups = torch.arange(3, device="cpu")
            got = torch.stack(ours.words(as_seed(seed), rows, groups, stream), -1).flatten(1)[:, :classes]
        elif hasattr(BACKENDS[name], "words"):
            got = BACKENDS[name].words(seed, rows, classes, stream).to("cpu", torch.int64)  # type: ignore
        else:
            pytest.skip(f"{name} shows no words")
        assert torch.equal(got & 0xFFFFFFFF, expected)


def as_seed(seed: int) -> Tensor:
    """The tensor that a call makes of an int."""
    return ours.seed_tensor(kd.LogitNoise(1.0, seed=seed), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normals_are_those_of_the_truth(dtype: torch.dtype) -> None:
    """To 1e-5 in fp32, from words at both ends of their range too; nothing is infinite."""
    rows = torch.arange(300)
    got = ours.normals(torch.tensor(5), rows, 403, 1, dtype).double()
    expected = torch.from_numpy(exact.normals(5, np.arange(300), 403, 1)).to(got.device)
    assert (got - expected).abs().max() <= exact.NORMALS[dtype]
    ends = torch.tensor([0, 1, 2**32 - 1, 2**31])
    u = ours.uniform(ends)
    assert u.dtype == torch.float32
    assert u.tolist() == exact.uniforms(ends.cpu().numpy()).tolist()
    assert 0 < u.min() and u.max() == 1 - 2**-24


# One sample, wherever it is drawn


@pytest.mark.thorough(
    but=lambda backend, dtype, noise: (
        backend != "triton" or dtype is torch.float32 or noise in (KINDS["additive"], KINDS["far rows"])
    )
)
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_that_of_the_truth(backend: str, dtype: torch.dtype, noise: kd.LogitNoise) -> None:
    """On either side, in both terms, after scale and softcap and before T."""
    z, v, labels = logits(3, 2, 37, dtype=dtype), logits(3, 2, 37, dtype=dtype), torch.randint(37, (3, 2))
    usual = Options(0.5, temperature=2.0, hard_weight=0.5, student_scale=0.5, student_softcap=6.0)
    for o in (usual.but(teacher_noise=noise), usual.but(student_noise=noise, reduction="none")):
        check(z, v, labels, o, backend=backend)
        if (noise.kind, noise.per) != ("additive", "row") and noise.probability == 1:
            plain = our_loss(z, v, labels, o.but(student_noise=None, teacher_noise=None), backend)
            assert not torch.equal(our_loss(z, v, labels, o, backend), plain)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_takes_noise(backend: str, divergence: Any) -> None:
    """Both sides, each its own stream."""
    z, v = logits(4, 131, dtype=torch.float32), logits(4, 131, dtype=torch.float32)
    labels = torch.randint(131, (4,))
    noises = {"student_noise": KINDS["multiplicative"], "teacher_noise": KINDS["some rows"]}
    check(z, v, labels, Options(divergence, temperature=2.0, hard_weight=0.5, **noises), backend=backend)


@kinds
def test_the_student_and_its_twin_draw_apart(backend: str, noise: kd.LogitNoise) -> None:
    """Equal logits and one seed: the streams of student and teacher differ, so that the loss is not 0."""
    z = logits(16, 9)
    loss = our_loss(z, z.clone(), None, both(replace(noise, probability=1.0)), backend)
    if noise.per == "row" and noise.kind == "additive":  # which a softmax doesn't see
        assert loss.item() == pytest.approx(0, abs=1e-12)
    else:
        assert loss.item() > 1e-3


@pytest.mark.thorough(but=lambda backend, noise, rows: backend != "triton" or rows == 3)
@kinds
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_chunks_of_rows_are_the_whole(backend: str, noise: kd.LogitNoise, rows: int) -> None:
    """`row_offset` is where a part begins; one row at a time in any order is the same batch."""
    z, v = logits(8, 21), logits(8, 21)
    o = both(noise, reduction="none", temperature=2.0)
    whole, whole_grad = our_result(z, v, None, o, backend)
    for first in reversed(range(0, 8, rows)):
        part = slice(first, first + rows)
        here = both(replace(noise, row_offset=noise.row_offset + first), reduction="none", temperature=2.0)
        loss, grad = our_result(z[part], v[part], None, here, backend)
        torch.testing.assert_close(loss, whole[part], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(grad, whole_grad[part], rtol=1e-12, atol=1e-14)


@kinds
def test_what_else_is_given_changes_no_sample(backend: str, noise: kd.LogitNoise) -> None:
    """Rows are numbered before any mask, over the leading dims flattened, classes from 0: padding, labels,
    strides and other rows don't shift it."""
    z, v, labels = logits(6, 20), logits(6, 20), torch.randint(20, (6,))
    o = both(noise, reduction="none")
    whole = our_loss(z, v, None, o, backend)

    def same(got: Tensor, rows: Tensor | slice = slice(None)) -> None:
        torch.testing.assert_close(got, whole[rows], rtol=1e-13, atol=1e-14)

    same(our_loss(z.view(2, 3, 20), v.view(3, 2, 20).view(2, 3, 20), None, o, backend).view(6))
    same(our_loss(z, v, labels, o, backend))
    mask = torch.tensor([False, True, True, False, False, True])
    same(our_loss(z, v, None, o.but(mask=mask), backend)[mask], mask)
    same(our_loss(torch.cat([z, logits(6, 5)], -1), v, None, o.but(pad_vocab=True), backend))
    same(our_loss(z.t().contiguous().t(), v, None, o, backend))
    more_z, more_v = torch.cat([z, logits(3, 20)]), torch.cat([v, logits(3, 20)])
    same(our_loss(more_z, more_v, None, o, backend)[:6])


@kinds
def test_any_number_of_threads(noise: kd.LogitNoise) -> None:
    """To the bit."""
    z, v = logits(300, 257, dtype=torch.float32), logits(300, 257, dtype=torch.float32)
    o = both(noise, temperature=2.0)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(our_result(z, v, None, o, "cpu"))
    finally:
        torch.set_num_threads(2)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@kinds
def test_sigma_zero_is_no_noise(backend: str, noise: kd.LogitNoise) -> None:
    """To the bit, as probability 0 is: a schedule that starts at 0 starts at the plain loss."""
    z, v = logits(5, 40, dtype=torch.float32), logits(5, 40, dtype=torch.float32)
    z[1, 3] = v[1, 3] = -torch.inf
    plain = our_result(z, v, None, Options(temperature=2.0), backend)
    for silent in (replace(noise, sigma=0.0), replace(noise, probability=0.0)):
        loss, grad = our_result(z, v, None, both(silent, temperature=2.0), backend)
        assert torch.equal(loss, plain[0]) and torch.equal(grad, plain[1])


@kinds
def test_impossible_classes_stay_so(backend: str, noise: kd.LogitNoise) -> None:
    """−inf + ε is −inf, and −inf · (1 + ε) must be, also where ε < −1."""
    z, v = logits(6, 40, dtype=torch.float32), logits(6, 40, dtype=torch.float32)
    z[:, 5:20] = v[:, 5:20] = -torch.inf
    o = both(replace(noise, sigma=3.0), temperature=2.0, reduction="none")
    loss_grad = check(z, v, None, o, backend=backend)
    assert loss_grad.loss.isfinite().all() and (loss_grad.grad[:, 5:20] == 0).all()


def test_bad_rows_outside_the_mask(backend: str) -> None:
    """NaN · (1 + ε) in a row that doesn't count is nobody's."""
    z, v, mask = logits(4, 30), logits(4, 30), torch.tensor([True, False, True, True])
    o = both(KINDS["multiplicative"], mask=mask)
    clean = our_result(z, v, None, o, backend)
    z[1], v[1] = torch.nan, torch.inf
    loss, grad = our_result(z, v, None, o, backend)
    assert torch.equal(loss, clean[0]) and torch.equal(grad, clean[1]) and (grad[1] == 0).all()


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_teachers_of_a_mixture_draw_apart(backend: str, kind: Any) -> None:
    """Stream 2m for teacher m: were they one, equal teachers would stay equal."""
    noise = kd.LogitNoise(1.0, kind, seed=4)
    z, v = logits(6, 9), logits(6, 9)
    o = Options(teacher_noise=noise, reduction="none")
    check(z, [v, v.clone(), v.clone()], None, o, backend=backend)
    pair, single = (our_loss(z, t, None, o, backend) for t in ([v, v.clone()], v))
    assert ((pair - single).abs() > 1e-6).all()


def test_student_noise_reaches_the_hard_term(backend: str) -> None:
    """Both terms see one student: the hard one is the cross-entropy of the noised logits."""
    z, v, labels = logits(5, 9), logits(5, 9), torch.randint(9, (5,))
    for noise in KINDS.values():
        o = Options(soft_weight=0.0, hard_weight=1.0, temperature=3.0, student_noise=noise)
        shift, _ = exact.sampled(noise, z, 1)
        noised = z + shift if noise.kind == "additive" else z * (1 + shift)
        expected = torch.nn.functional.cross_entropy(noised, labels)
        torch.testing.assert_close(our_loss(z, v, labels, o, backend), expected, rtol=1e-12, atol=0)
        teacher = o.but(student_noise=None, teacher_noise=noise)
        plain = o.but(student_noise=None)
        assert torch.equal(our_loss(z, v, labels, teacher, backend), our_loss(z, v, labels, plain, backend))


# Seeds


def test_manual_seed_reproduces(backend: str) -> None:
    """Without a seed each call draws one from torch's generator: two calls differ, a run repeats."""
    noise = kd.LogitNoise(0.5)
    z, v = logits(4, 9, dtype=torch.float32), logits(4, 9, dtype=torch.float32)

    def run() -> list[float]:
        torch.manual_seed(3)
        o = {"teacher_noise": noise, "student_noise": noise, "backend": backend}
        return [kd.kd_loss(z, v, **o).item() for _ in range(3)]

    first = run()
    assert len(set(first)) == 3
    torch.rand(5)
    assert run() == first


def test_each_call_takes_as_much_of_the_generator(backend: str) -> None:
    """Whatever the shape, so that what is drawn after it is the same on any split of the batch."""
    noise = kd.LogitNoise(0.5)
    after = []
    for rows, sides in (
        (1, ("student_noise",)),
        (7, ("teacher_noise",)),
        (3, ("student_noise", "teacher_noise")),
    ):
        torch.manual_seed(3)
        z = logits(rows, 9, dtype=torch.float32)
        torch.manual_seed(3)
        kd.kd_loss(z, z + 1, backend=backend, **dict.fromkeys(sides, noise))
        after.append(torch.rand(3).tolist())
    assert after[0] == after[1] == after[2]
    torch.manual_seed(3)
    kd.kd_loss(z, z + 1, backend=backend, teacher_noise=replace(noise, seed=1))
    untouched = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(untouched, torch.rand(3)) and untouched.tolist() != after[0]


def test_checkpointing_gives_the_same_gradient(backend: str) -> None:
    """It puts torch's generator back and runs forward again: the same seed, the same noise."""
    noise = kd.LogitNoise(0.5, "multiplicative")
    z, v = logits(4, 30, dtype=torch.float32).requires_grad_(), logits(4, 30, dtype=torch.float32)

    def step(z: Tensor) -> Tensor:
        return kd.kd_loss(2 * z, v, student_noise=noise, teacher_noise=noise, backend=backend)

    results = []
    for again in (False, True):
        torch.manual_seed(9)
        loss = checkpoint(step, z, use_reentrant=False) if again else step(z)
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_seed_on_the_device(backend: str) -> None:
    """A tensor, updated in place from step to step, is the int that it holds at the call."""
    z, v = logits(4, 30, dtype=torch.float32), logits(4, 30, dtype=torch.float32)
    held = torch.zeros((), dtype=torch.int64)
    live = kd.LogitNoise(0.5, seed=held)
    for seed in (0, 7, -1, 2**40):
        held.fill_(seed)
        got = our_result(z, v, None, both(live), backend)
        expected = our_result(z, v, None, both(kd.LogitNoise(0.5, seed=seed)), backend)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_twice_draws_the_same(backend: str, dtype: torch.dtype) -> None:
    """What is regenerated in backward is what forward drew."""
    noise = kd.LogitNoise(0.5, "multiplicative")
    z, v = logits(4, 30, dtype=dtype).requires_grad_(), logits(4, 30, dtype=dtype)
    loss = kd.kd_loss(z, v, student_noise=noise, teacher_noise=noise, backend=backend)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second) and first.abs().max() > 0


def test_negative_seeds_are_their_bits(backend: str) -> None:
    """−1 is 2⁶⁴ − 1, and each of the 64 bits matters."""
    z, v = logits(4, 9), logits(4, 9)

    def loss(seed: int) -> float:
        return our_loss(z, v, None, both(kd.LogitNoise(0.5, seed=seed)), backend).item()

    assert loss(-1) == loss(2**64 - 1)
    assert len({loss(1 << bit) for bit in (0, 1, 31, 32, 33, 62, 63)}) == 7


# What it does to a loss: facts, on the mean over many rows of one sample each

MANY = 40_000


def averaged(backend: str, z: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over many draws of a row's loss and gradient, and five standard errors of the gradient."""
    loss, grad = our_result(z.expand(MANY, -1), v.expand(MANY, -1), None, o.but(reduction="none"), backend)
    return loss.mean(), grad.mean(0), 5 * grad.std(0) / sqrt(MANY)


def few(backend: str) -> None:
    """Interpreted kernels take milliseconds a row."""
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("too many rows for Triton's interpreter")


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
@pytest.mark.parametrize("a", [1.0, 0.3])
def test_l2_with_teacher_noise_adds_a_constant(backend: str, kind: Any, a: float) -> None:
    """E[gradient] = z − v; the expected loss rises by ½aσ²C, or ½aσ²‖v‖²: it never moves the optimum."""
    few(backend)
    z, v = logits(1, 5), logits(1, 5)
    noise = kd.LogitNoise(0.8, kind, probability=a, seed=21)
    loss, grad, room = averaged(backend, z, v, Options(kd.LogitMSE(), teacher_noise=noise))
    assert ((grad - (z - v)[0]).abs() <= room).all() and (room < 0.1).all()
    rise = 0.5 * a * 0.8**2 * (5 if kind == "additive" else (v**2).sum().item())
    plain = 0.5 * ((z - v) ** 2).sum().item()
    assert loss.item() - plain == pytest.approx(rise, rel=0.05)


def test_l2_with_multiplicative_student_noise_shrinks(backend: str) -> None:
    """E[gradient] = (z − v) + σ²z: the factor (1 + σε) is on the gradient too."""
    few(backend)
    z, v = logits(1, 5), logits(1, 5)
    o = Options(kd.LogitMSE(), student_noise=kd.LogitNoise(0.8, "multiplicative", seed=22))
    _, grad, room = averaged(backend, z, v, o)
    assert ((grad - (z - v + 0.64 * z)[0]).abs() <= room).all()
    assert ((0.64 * z[0]).abs() > 3 * room).any()  # or nothing would have been told apart


def test_kl_with_additive_teacher_noise_smooths(backend: str) -> None:
    """E p' ≈ p + (σ²/T²) p (‖p‖² − p): unlike L2, it moves the optimum."""
    few(backend)
    v, T, sigma = torch.tensor([[1.5, 0.0, -1.0]]).double(), 2.0, 0.5
    o = Options(temperature=T, teacher_noise=kd.LogitNoise(sigma, seed=23))
    _, grad, room = averaged(backend, v, v, o)
    p = (v / T).softmax(-1)[0]
    # At z = v the gradient is T (p − p').
    moved, expected = -grad / T, (sigma / T) ** 2 * p * ((p**2).sum() - p)
    assert ((moved - expected).abs() <= room / T + 0.2 * expected.abs()).all()
    assert (expected.abs() > 2 * room / T).any()


def test_one_factor_a_row_is_a_random_temperature(backend: str) -> None:
    """T / (1 + ξ), exactly."""
    z, v = logits(5, 9), logits(5, 9)
    noise = kd.LogitNoise(0.3, "multiplicative", per="row", seed=24)
    o = Options("reverse_kl", temperature=2.0, reduction="none", t_squared=False, teacher_noise=noise)
    rows = our_loss(z, v, None, o, backend)
    xi = exact.sampled(noise, v, 0)[0][:, 0]
    for i in range(5):
        q, p = (z[i] / 2.0).softmax(-1), (v[i] / (2.0 / (1 + xi[i]))).softmax(-1)
        assert rows[i].item() == pytest.approx((q * (q / p).log()).sum().item(), rel=1e-11)


# Statistics of the sample itself: fixed seeds, bounds of five standard errors


def sample(
    rows: int, classes: int, seed: int = 1, stream: int = 1, offset: int = 0, **options: Any
) -> Tensor:
    """b·ε of the package, for σ = 1."""
    noise = kd.LogitNoise(1.0, seed=seed, row_offset=offset, **options).options
    shape = torch.Size((rows, classes))
    return ours.sample(noise, torch.tensor(seed), shape, stream, torch.float64)


def correlation(x: Tensor, y: Tensor) -> float:
    """In standard errors of independent ones."""
    return float((x * y).mean() / (x.std() * y.std()) * sqrt(x.numel()))


def test_moments_and_normality() -> None:
    """Mean, variance, skewness, kurtosis, and the Kolmogorov-Smirnov distance to the normal."""
    x = sample(1000, 1000).flatten()
    n = x.numel()
    for k, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((x**k).mean().item() - expected) <= 5 * sqrt(variance / n), k
    ranks = torch.arange(1, n + 1).double() / n
    cumulative = 0.5 * (1 + torch.erf(x.sort().values / sqrt(2)))
    distance = max((ranks - cumulative).max().item(), (cumulative - ranks + 1 / n).max().item())
    assert distance <= 1.95 / sqrt(n)  # 0.1 % of samples are farther
    assert x.abs().max() > 4.5 and abs(erf(1 / sqrt(2)) - (x.abs() < 1).double().mean().item()) < 5e-3


def test_cosine_and_sine_are_of_one_angle() -> None:
    """Each pair's radius is Rayleigh's and its angle uniform: a pair that shares a word is not."""
    x = sample(500, 1000)
    first, second = x[:, 0::2], x[:, 1::2]
    angle = (torch.atan2(second, first).flatten() + pi) / (2 * pi)
    counts = torch.histc(angle, 16, 0, 1)
    assert ((counts - angle.numel() / 16).abs() < 5 * sqrt(angle.numel() / 16)).all()
    squared = first**2 + second**2
    assert abs((squared < 2 * np.log(2)).double().mean().item() - 0.5) < 5 * 0.5 / sqrt(squared.numel())


def test_independence() -> None:
    """Between rows, classes, streams and steps: none is another's copy, nor is its sign or its square."""
    x = sample(400, 404)
    others = {f"class + {k}": (x[:, :-k], x[:, k:]) for k in (1, 2, 3, 4, 8)}
    others |= {f"row + {k}": (x[:-k], x[k:]) for k in (1, 2, 4)}
    others |= {f"stream {s}": (x, sample(400, 404, stream=s)) for s in (0, 2, 4)}
    others |= {f"seed {s}": (x, sample(400, 404, seed=s)) for s in (0, 2, 3, 1 + 2**32)}
    others |= {f"offset {k}": (x, sample(400, 404, offset=k)) for k in (1, 2**31, 2**32, 2**33)}
    others["teachers"] = (sample(400, 404, stream=0), sample(400, 404, stream=2))
    for name, (a, b) in others.items():
        if name == "offset 1":  # the same rows, one later
            assert torch.equal(a[1:], b[:-1])
        assert abs(correlation(a, b)) < 5, name
        assert abs(correlation(a**2 - 1, b**2 - 1)) < 5, name


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_the_coin(a: float) -> None:
    """A share of the rows, each whole, its own coin of its own stream, unlike the noise of the row."""
    x = sample(20_000, 5, probability=a)
    tossed = (x != 0).all(-1)
    assert (tossed == (x != 0).any(-1)).all()
    assert abs(tossed.double().mean().item() - a) < 5 * sqrt(a * (1 - a) / 20_000)
    assert torch.equal(x[tossed], sample(20_000, 5)[tossed])
    coin, full = tossed.double() - a, sample(20_000, 5)
    assert abs(correlation(coin[1:], coin[:-1])) < 5
    assert abs(correlation(coin, full[:, 0])) < 5
    other = (sample(20_000, 5, probability=a, stream=0) != 0).all(-1).double() - a
    assert abs(correlation(coin, other)) < 5


def test_a_sample_a_row() -> None:
    """Class 0's, and one number for the row."""
    x = sample(50, 9, per="row")
    assert x.shape == (50, 1)
    torch.testing.assert_close(x, sample(50, 9)[:, :1], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False], ids=["seed on the device", "no seed"])
def test_noise_in_a_captured_graph(given: bool) -> None:
    """A replay draws the sample of the seed that is there by then, or one of torch's generator."""
    z, v = (logits(5, 300, dtype=torch.float32).to("cuda") for _ in range(2))
    z.requires_grad_()
    seed = torch.zeros((), dtype=torch.int64, device="cuda") if given else None
    noise = kd.LogitNoise(0.7, seed=seed)

    def step(noise: kd.LogitNoise) -> tuple[Tensor, Tensor]:
        loss = kd.kd_loss(z, v, student_noise=noise, teacher_noise=noise)
        return loss, torch.autograd.grad(loss, z)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which no capture can hold
        step(noise)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(noise)
    replayed = []
    for number in (3, 4, 3):
        if seed is None:
            torch.cuda.manual_seed(number)
        else:
            seed.fill_(number)
        graph.replay()
        replayed.append([x.clone() for x in captured])
    for one, other, again in zip(*replayed, strict=True):
        assert not torch.equal(one, other) and torch.equal(one, again)
    if given:
        for here, there in zip(replayed[1], step(kd.LogitNoise(0.7, seed=4)), strict=True):
            assert torch.equal(here, there)


# The object


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"sigma": -1.0}, ValueError, "sigma.*>= 0.*-1"),
        ({"sigma": float("nan")}, ValueError, "sigma.*nan"),
        ({"sigma": float("inf")}, ValueError, "sigma.*inf"),
        ({"sigma": "1"}, TypeError, "sigma.*str"),
        ({"sigma": True}, TypeError, "sigma.*bool"),
        ({"sigma": torch.tensor(1.0)}, TypeError, "sigma.*Tensor"),
        ({"kind": "uniform"}, ValueError, "kind.*additive.*multiplicative.*uniform"),
        ({"per": "token"}, ValueError, "per.*logit.*row.*token"),
        ({"probability": 1.5}, ValueError, r"probability.*\[0, 1\].*1.5"),
        ({"probability": None}, TypeError, "probability.*NoneType"),
        ({"seed": 1.0}, TypeError, "seed.*float"),
        ({"seed": True}, TypeError, "seed.*bool"),
        ({"seed": 2**64}, ValueError, "seed.*64 bits"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, TypeError, "seed.*0-d int64"),
        ({"seed": torch.zeros(())}, TypeError, "seed.*0-d int64.*float32"),
        ({"row_offset": -1}, ValueError, "row_offset.*-1"),
        ({"row_offset": 0.5}, TypeError, "row_offset.*float"),
    ],
    ids=str,
)
def test_what_is_no_noise(given: dict[str, Any], error: type[Exception], says: str) -> None:
    """Named where it is written."""
    with pytest.raises(error, match=says):
        kd.LogitNoise(**{"sigma": 1.0, **given})


@pytest.mark.parametrize("name", ["student_noise", "teacher_noise"])
def test_noise_of_the_wrong_kind(backend: str, name: str) -> None:
    """A bare sigma is no noise; a seed elsewhere would be fetched."""
    z = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=rf"{name}.*LogitNoise.*float"):
        kd.kd_loss(z, z, backend=backend, **{name: 0.5})
    far = kd.LogitNoise(1.0, seed=torch.zeros((), dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"seed.*device.*meta"):
        kd.kd_loss(z, z, backend=backend, **{name: far})
