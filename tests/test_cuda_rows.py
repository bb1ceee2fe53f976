"""The cluster kernel's rows, run on a processor: every divergence and option, held to the budget of fp64.

What is a parameter of the kernel's template takes a second to build, and so the cases are a few dozen builds
that have every pair of them. What isn't (threads, classes, masks, the order in which threads take turns) is
another one in every call.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu import Split, cuda_on_cpu
from cuda_shim import CUDA, LaunchError, why_not
from tolerances import RAW, assert_within_budget, check, fitting, keywords, our_result
from tolerances import arguments as arguments_of
from torch import Tensor
from truth import Options, truth

import kdkernels as kd
from kdkernels.backends.cuda_build import INCLUDE, NO_DIVERGENCE, TYPES, Build, divergence_name

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# One of each template of divergence.h, and what is built where the soft term has no weight.
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", 0.3, kd.SkewKL(0.1), kd.SkewReverseKL(0.3), "tvd",
    "squared_error", kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(0.5, 0.0), kd.AlphaBeta(0.5, -0.5),
    kd.DKD(1.0, 8.0), kd.LogitMSE(), kd.LogitMSE(centered=True), kd.BinaryKL(), NO_DIVERGENCE,
)  # fmt: skip
HARD = ("kNoHard", "kSharedHard", "kOwnHard")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of a block, where a cluster has so many: 512 in all.
THREADS = {1: (32, 512, 96), 2: (64, 256, 32), 4: (128, 32, 96), 8: (32, 64), 16: (32,)}
# Whether both sides lie alike within 16 bytes, as the gradient does, or one is sliced off wider rows.
LAYOUTS = ("alike", "student sliced", "alike", "teacher sliced")
KINDS = ("any", "far from zero", "sharp", "bad rows")
WIDTHS = (2, 35, 257, 1030, 2600)  # and up to 7 more: from a few classes to several vectors a thread


class Case(NamedTuple):
    """What is built, as far as all calls of a test have it in common."""

    divergence: Any
    hard: str
    dtype: torch.dtype
    cluster: int
    layout: str

    @property
    def template(self) -> str:
        """Of divergence.h."""
        return self.divergence if self.divergence == NO_DIVERGENCE else divergence_name(*self.options.row)

    @property
    def options(self) -> Options:
        """Of all calls."""
        alone = self.divergence == NO_DIVERGENCE
        return Options(
            "forward_kl" if alone else self.divergence,
            soft_weight=0.0 if alone else 1.0,
            hard_weight=0.0 if self.hard == "kNoHard" else 0.4,
            temperature=2.0 if self.hard == "kOwnHard" or alone else 1.0,
        )


def shown(value: Any) -> str:
    """What pytest says of it."""
    if isinstance(value, dict):
        return "+".join(value)
    if not isinstance(value, Case):
        return str(value)
    words = (
        value.template,
        value.hard,
        str(value.dtype).removeprefix("torch."),
        str(value.cluster),
        value.layout,
    )
    return "-".join(words).replace(" ", "_")


def has(divergence: Any, hard: str) -> bool:
    """Whether a call builds this: without a soft term there is a hard one, and DKD needs labels."""
    if divergence == NO_DIVERGENCE:
        return hard == "kSharedHard"
    return hard != "kNoHard" or Options(divergence).row[0] != "dkd"


CASES = [
    Case(
        divergence,
        hard,
        DTYPES[(d + h) % 3],
        (1, 2, 4, 8, 16)[(3 * d + 2 * h) % 5],
        LAYOUTS[(d // 2 + d + h) % 4],
    )
    for (d, divergence), (h, hard) in itertools.product(enumerate(DIVERGENCES), enumerate(HARD))
    if has(divergence, hard)
]


def is_plain(case: Case) -> bool:
    """Whether a plain run has it: of each template one, with another hard term each time."""
    d = DIVERGENCES.index(case.divergence)
    return case.hard == HARD[d % 3] or case.divergence == NO_DIVERGENCE


def test_a_plain_run_has_every_value() -> None:
    """Of what is a parameter of a build."""
    chosen = [case for case in CASES if is_plain(case)]
    for name in Case._fields:
        values = {getattr(case, name) for case in CASES}
        assert {getattr(case, name) for case in chosen} == values, name


def test_the_cases_have_every_pair() -> None:
    """Of divergences with hard terms, dtypes and both layouts, and of these with each other and clusters."""

    def values(*names: str) -> set[tuple[Any, ...]]:
        return {
            tuple(case.layout == "alike" if name == "alike" else getattr(case, name) for name in names)
            for case in CASES
            if case.template not in (NO_DIVERGENCE, "DKD")
        }

    for pair in (
        ("template", "hard"), ("template", "dtype"), ("template", "alike"),
        ("hard", "dtype"), ("hard", "layout"), ("hard", "cluster"),
        ("dtype", "cluster"), ("dtype", "layout"), ("cluster", "layout"),
    ):  # fmt: skip
        every = itertools.product(*({value for (value,) in values(name)} for name in pair))
        assert values(*pair) == set(every), pair


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def laid_out(x: Tensor, sliced: bool) -> Tensor:
    """The same logits, contiguous or as a slice of wider ones, whose leading dimensions are transposed."""
    if not sliced:
        return x.contiguous()
    wide = torch.full((x.shape[1], x.shape[0], x.shape[2] + 3), torch.nan, dtype=x.dtype).transpose(0, 1)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def rows_of(case: Case, kind: str, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both sides: (2, 3) rows."""
    z, v = (2.5 * numbers(generator, 2, 3, vocab) for _ in range(2))
    if case.template == "AlphaBetaAny":  # it has powers of the reciprocals of probabilities
        z, v = z / 4, v / 4
    elif kind == "sharp":
        z, v = 6 * z, 6 * v
    if kind == "far from zero":
        # Exponents beyond 2^20 are computed another way.
        farthest = 3e4 if case.dtype is torch.float16 else -3e6
        far = torch.tensor([[0.0, 1e4, -1e4], [100.0, farthest, -30.0]])[..., None]
        z, v = z + far, v + far / 2
    if kind == "bad rows":
        # Classes that neither side has, at both ends.
        z[..., :9] = v[..., :9] = z[..., -3:] = v[..., -3:] = -torch.inf
        z[0, 1, 11] = torch.nan
        v[1, 0] = -torch.inf
        v[1, 2, 12] = torch.nan
    return z.to(case.dtype), v.to(case.dtype)


BAD = torch.tensor([False, True, False, True, False, True])


@pytest.mark.thorough(but=lambda case: is_plain(case))
@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=shown)
def test_rows(number: int, case: Case) -> None:
    """Calls of one build, of which each kind of logits has one."""
    for i, kind in enumerate(KINDS):
        generator = torch.Generator().manual_seed(100 * number + i)
        vocab = WIDTHS[(number + i) % 5] + (number + 3 * i) % 8
        if kind == "bad rows":
            vocab = max(vocab, 40)
        z, v = rows_of(case, kind, vocab, generator)
        o = case.options
        labels = None
        if case.hard != "kNoHard":
            labels = torch.randint(vocab, (2, 3), generator=generator)
            if kind == "bad rows":
                labels = vocab // 2 + torch.arange(6).view(2, 3)
            labels[0, 2] = -100
        if i in (1, 3):
            mask = torch.rand(2, 3, generator=generator) < 0.7
            mask[1, 1] = True
            o = o.but(mask=mask)
        if i in (1, 2):
            o = o.but(token_weights=numbers(generator, 2, 3))
        if i == 1 and not o.binary:  # wider by what leaves the sides as they lie
            z = torch.cat([z, numbers(generator, 2, 3, 8).to(case.dtype)], -1)
            o = o.but(pad_vocab=True)
        if i == 2 and not o.binary:
            v = torch.cat([v, numbers(generator, 2, 3, 16).to(case.dtype)], -1)
            o = o.but(pad_vocab=True)
        if i == 0:
            o = o.but(num_items=[None, 7, 2.5, torch.tensor(3)][number % 4])
        o = o.but(reduction=("mean", "mean", "sum", "none")[i])
        # A loss scale, a gradient that is to be scaled once it is there, and one that isn't; by powers of
        # two, so that scaling rounds nothing.
        upstream = None
        if o.reduction == "none":
            upstream = 2.0 ** torch.randint(-3, 4, (2, 3), generator=generator)
        elif case.dtype is torch.float16:
            upstream = torch.tensor(1024.0 if kind == "any" else 4.0)
        elif i == 1:
            upstream = torch.tensor(-0.5)
        z, v = (laid_out(x, case.layout == f"{side} sliced") for side, x in (("student", z), ("teacher", v)))
        threads = THREADS[case.cluster]
        with cuda_on_cpu(
            Split(case.cluster, threads[(number + i) % len(threads)]),
            clusters=1 + (number + i) % 3,
            seed=(number + i) % 5,
            approximate=number % 3 == 0,
        ) as driver:
            result = our_result(z, v, labels, o, "cuda", upstream)
        rows = [build for build in driver.builds if isinstance(build, Build)]
        assert {build.hard for build in rows} == {case.hard} and {build.type for build in rows} == {
            TYPES[case.dtype]
        }
        assert {build.divergence for build in rows} == {case.template}
        assert {build.shifted for build in rows} == {case.layout != "alike"}
        if kind == "bad rows":
            assert o.mask is not None and upstream is not None
            rows = (x.flatten(0, 1) for x in (*result, z, v, upstream, o.mask))
            loss, grad, z, v, upstream, mask = rows
            bad = BAD & mask
            # Of logits alone an infinite one is no NaN.
            if case.divergence != NO_DIVERGENCE and o.row[0] not in RAW:
                assert loss[bad].isnan().all() and grad[bad].isnan().any(-1).all()
            if labels is not None:
                labels = labels.flatten()[~bad]
            z, v, upstream, o = z[~bad], v[~bad], upstream[~bad], o.but(mask=mask[~bad])
            result = loss[~bad], grad[~bad]
        assert_within_budget(result, z, v, labels, o, upstream)


# Caps, noise and figures


def noise(kind: str, per: str, probability: float = 1.0) -> kd.LogitNoise:
    return kd.LogitNoise(0.3, kind, per, probability, seed=5, row_offset=2**32 - 3)


PROCESSED = (
    {"student_scale": 0.7, "student_softcap": 20.0, "teacher_noise": noise("multiplicative", "logit")},
    {"teacher_softcap": 25.0, "student_noise": noise("multiplicative", "logit", 0.5)},
    {
        "student_noise": noise("additive", "row"),
        "teacher_noise": noise("additive", "logit"),
        "student_softcap": 15.0,
    },
    {"student_noise": noise("additive", "logit"), "teacher_noise": noise("multiplicative", "row", 0.5)},
    {"teacher_scale": 1.5, "teacher_softcap": 30.0, "student_softcap": 30.0},
)
PROCESSED_CASES = [
    (
        Case(
            divergence,
            HARD[1 + k % 2],
            DTYPES[2 * (k % 2)],
            (4, 1, 8, 2, 16)[(k + k // 5) % 5],
            LAYOUTS[k % 4],
        ),
        PROCESSED[k % 5],
    )
    for k, divergence in enumerate(DIVERGENCES[:-1])
]


# All that logits become, of the closed forms and JSD; and what isn't of two distributions.
PLAIN = ("ForwardKL", "SoftCrossEntropy", "ReverseKL", "JSD", "SkewKL", "DKD", "CenteredLogitMSE", "BinaryKL")


@pytest.mark.thorough(but=lambda case: case.template in PLAIN)
@pytest.mark.parametrize(
    ("number", "case", "more"), [(k, *x) for k, x in enumerate(PROCESSED_CASES)], ids=str
)
def test_caps_noise_and_figures(number: int, case: Case, more: dict[str, Any]) -> None:
    """Of rows whose logits become others before they are anything: the same loss, with its figures."""
    stats = number % 4 < 2
    for i in range(2):
        generator = torch.Generator().manual_seed(7 * number + i)
        vocab = (1003, 50)[i] + (number + 3 * i) % 8
        z, v = rows_of(case, "any", vocab, generator)
        z, v = (laid_out(x, case.layout == f"{side} sliced") for side, x in (("student", z), ("teacher", v)))
        labels = torch.randint(vocab, (2, 3), generator=generator)
        labels[1, 0] = -100
        o = case.options.but(**more, token_weights=torch.rand(2, 3, generator=generator))
        given, o = fitting(z, labels, o)
        threads = THREADS[case.cluster]
        with cuda_on_cpu(
            Split(case.cluster, threads[(number + i) % len(threads)]),
            seed=number % 4,
            approximate=number % 3 == 0,
        ):
            if not stats:
                check(z, v, given, o, backend="cuda")
                continue
            student = z.detach().requires_grad_()
            loss, figures = kd.kd_loss_with_stats(
                *arguments_of(student, v, given, o), backend="cuda", **keywords(o)
            )
            (gradient,) = torch.autograd.grad(loss, student)
        assert_within_budget((loss.detach(), gradient), z, v, given, o)
        exact = o.but(token_weights=o.token_weights.double())
        _, expected = kd.kd_loss_with_stats(
            *arguments_of(z.double(), v.double(), given, exact), backend="reference", **keywords(exact)
        )
        for name, figure in vars(figures).items():
            wanted = getattr(expected, name).double()
            assert torch.allclose(figure.double(), wanted, rtol=2e-5, atol=1e-5), (name, figure, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_the_place_of_logits(dtype: torch.dtype) -> None:
    """Those of a head are written where its logits were, which the kernel reads meanwhile."""
    hidden, weight, teacher, head = (torch.randn(n, 8).to(dtype) for n in (7, 67, 7, 67))
    results = []
    with cuda_on_cpu(Split(2, 32)) as driver:
        for backend in ("cuda", "reference"):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            sides = kd.Head(*leaves), kd.Head(teacher, head)
            loss = kd.kd_loss(*sides, divergence=kd.JSD(0.5), backend=backend)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert [build.mode for build in driver.builds if isinstance(build, Build)] == ["kGradient"]
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("cluster", [1, 4, 8])
def test_whoever_comes_first_the_numbers_are_the_same(cluster: int) -> None:
    """To the bit, in any order of the threads and with any number of clusters."""
    z, v = (laid_out(numbers(torch.Generator().manual_seed(k), 2, 3, 805).half(), False) for k in (1, 2))
    o, results = Options(0.3, temperature=2.0, reduction="none"), []
    for seed in range(5):
        with cuda_on_cpu(Split(cluster, 64), clusters=1 + seed % 3, seed=seed):
            results.append(our_result(z, v, None, o, "cuda", torch.ones(2, 3)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


# Under sanitizers

# What each runs: cases, threads of a block, and options. ThreadSanitizer takes a millisecond a thread.
SANITIZED = (
    ("thread address", Case("forward_kl", "kOwnHard", torch.bfloat16, 1, "alike"), 128, {}),
    ("thread", Case(0.3, "kSharedHard", torch.float32, 2, "student sliced"), 64, {}),
    ("thread address", Case("reverse_kl", "kNoHard", torch.float16, 4, "teacher sliced"), 32, {}),
    ("thread address", Case(kd.DKD(1.0, 8.0), "kOwnHard", torch.bfloat16, 2, "alike"), 32, PROCESSED[2]),
    ("thread", Case(kd.LogitMSE(True), "kSharedHard", torch.float32, 1, "alike"), 64, PROCESSED[0]),
    ("thread address", Case("tvd", "kNoHard", torch.bfloat16, 4, "alike"), 32, {"pad_vocab": True}),
    ("address", Case(kd.BinaryKL(), "kOwnHard", torch.bfloat16, 8, "student sliced"), 32, PROCESSED[1]),
)
# A block alone and several, both layouts, each sanitizer, with noise and without.
SANITIZED_PLAIN = {
    ("thread", "ForwardKL"), ("address", "ForwardKL"), ("thread", "JSD"), ("thread", "DKD"),
    ("address", "BinaryKL"),
}  # fmt: skip


def sanitized(
    sanitize: str, case: Case, threads: int, more: dict[str, Any], seed: int = 0, vocab: int = 1003
) -> None:
    """A call, forward and backward, held to the budget; it may point to what it was given, and no further."""
    if (reason := why_not(sanitize)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(seed)
    z, v = rows_of(case, "any", vocab, generator)
    o = case.options.but(
        **more, mask=torch.tensor([[True, True, False], [True, True, True]]), token_weights=torch.rand(2, 3)
    )
    if o.pad_vocab:
        z = torch.cat([z, z[..., :8]], -1)
    z, v = (laid_out(x, case.layout == f"{side} sliced") for side, x in (("student", z), ("teacher", v)))
    labels = torch.randint(vocab, (2, 3), generator=generator) if case.hard != "kNoHard" else None
    given, o = fitting(z, labels, o)
    upstream = torch.tensor(2.0) if o.reduction == "mean" else torch.ones(2, 3)
    with cuda_on_cpu(Split(case.cluster, threads), clusters=2, seed=seed, sanitize=sanitize):
        check(z, v, given, o, backend="cuda", upstream=upstream)


@pytest.mark.thorough(but=lambda sanitize, case: (sanitize, case.template) in SANITIZED_PLAIN)
@pytest.mark.parametrize(
    ("sanitize", "case", "threads", "more"),
    [(name, *what) for names, *what in SANITIZED for name in names.split()],
    ids=shown,
)
def test_sanitizers_find_nothing(sanitize: str, case: Case, threads: int, more: dict[str, Any]) -> None:
    """Neither a race nor a byte that isn't the call's; nothing that C++ leaves undefined."""
    sanitized(sanitize, case, threads, more)
    sanitized(sanitize, case, threads, {**more, "reduction": "none"}, seed=1, vocab=44)
    if sanitize == "address":
        sanitized(sanitize, case, threads, more, seed=2, vocab=517)


# A copy of the kernel with a line less, or a class more: (its text, what is there instead).
RACES = {
    "messages of warps": (
        "warp_boxes[q * warps + warp] = message[q];\n    }\n    block_barrier();",
        "BARRIER",
    ),
    "the answer": ("answer[q] = message[q];\n      }\n    }\n    block_barrier();", "BARRIER"),
    "messages of blocks": ("barrier_wait(barriers + side,", "if (false) barrier_wait(barriers + side,"),
    "one box for all messages": ("Quad* box = boxes + side * kBoxes * C::kCluster;", "Quad* box = boxes;"),
    "copies of others": ("copies_done();\n      if constexpr (C::kShifted) block_barrier();", "BARRIER"),
    "the next row": ("if constexpr (C::kShifted) block_barrier();\n        fetch(after);", "BARRIER"),
}
OVERRUNS = {
    "a vector too many": ("return i >= r.whole && i < r.partial;", "return i >= r.whole && i <= r.partial;"),
    "a class too many": ("if (c >= 0 && c < (int)a.width)", "if (c >= 0 && c <= (int)a.width)"),
    "a place too many": ("int s = thread; s < slots(); s +=", "int s = thread; s <= slots(); s +="),
}


def plant(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """Builds have the kernel with one place of its text changed, or without its barrier there."""
    text = (CUDA / "kd_cuda.cu").read_text()
    assert text.count(before) == 1, f"{text.count(before)} times in kd_cuda.cu: {before}"
    text = text.replace(before, before.replace("block_barrier()", "") if after == "BARRIER" else after)
    unit = Build.unit
    monkeypatch.setattr(Build, "unit", lambda self: unit(self).replace(INCLUDE, text))


FLAWED = Case("forward_kl", "kNoHard", torch.bfloat16, 2, "student sliced")


@pytest.mark.parametrize("defect", RACES)
def test_a_missing_barrier_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ThreadSanitizer, whatever the order that the threads happen to run in."""
    plant(monkeypatch, *RACES[defect])
    for seed in (0, 1):
        with pytest.raises(LaunchError, match="ThreadSanitizer: data race"):
            sanitized("thread", FLAWED, 64, {}, seed)


@pytest.mark.parametrize("defect", OVERRUNS)
def test_an_overrun_is_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By AddressSanitizer: of tensors, and of shared memory."""
    plant(monkeypatch, *OVERRUNS[defect])
    with pytest.raises(LaunchError, match="AddressSanitizer: heap-buffer-overflow"):
        sanitized("address", FLAWED, 64, {})


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_copies_that_nobody_waited_for_are_missed(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is computed from their places."""
    plant(monkeypatch, "      copies_done();\n", "")
    with pytest.raises(AssertionError, match="outside the budget"):
        sanitized("", FLAWED._replace(layout=layout), 64, {})


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", 0.5, "tvd"])
def test_exponents_larger_than_any_rounding(name: Any) -> None:
    """As in test_semantics.py: at 1e10 an ulp is 1,024, and the largest logit has all of the mass all the
    same."""
    z, v = (1e10 * torch.randn(3, 3000) for _ in range(2))
    options = Options(name, temperature=3.0)
    with cuda_on_cpu(Split(2, 64)):
        loss, grad = our_result(z, v, None, options, "cuda")
    exact = truth(z, v, None, options)
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-6, atol=1e-6)
