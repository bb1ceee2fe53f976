"""The Triton kernel of stored teachers: every divergence, tail and option held to fp64, its builds and reads.

The truth is the reference backend in float64, which `test_sparse.py` pins to closed forms; the budget is that
of `tolerances.py`, with what one rounding may cost found by autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from conftest import DEVICES
from test_cuda_sparse import allowed, extreme, run, some_ids, stored_teacher, units_of
from test_triton import Counter, DeviceWork, built, needs_interpreter, needs_triton
from tolerances import assert_close, roundings_of_truth
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels as kd
from benchmarks import builds
from kdkernels.divergences import TABLE, Divergence
from kdkernels.expressions import g_forward_kl, phi_forward_kl
from kdkernels.functional import checked_call, complete
from kdkernels.sparse import Sparse

# Rows that a block holds, and such that have several.
both = pytest.mark.parametrize("backend", ["triton", "streaming"], indirect=True)
whole = pytest.mark.parametrize("backend", ["triton"], indirect=True)
streaming = pytest.mark.parametrize("backend", ["streaming"], indirect=True)
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", kd.JSD(0.3), kd.SkewKL(0.1), kd.SkewReverseKL(0.3),
    "tvd", "squared_error", kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(0.5, 0.0), kd.AlphaBeta(0.5, -0.5),
)  # fmt: skip
TAILS = ("ghost", "zero", "renormalize")
GPU = DEVICES["triton"]


def check(
    z: Tensor, teacher: Any, labels: Tensor | None, options: dict[str, Any], upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A call, forward and backward, held to the budget."""
    upstream = torch.ones(z.shape[:-1]) if upstream is None else upstream
    loss, gradient = run(z, teacher, labels, options, "triton", upstream)
    R = torch.float64 if z.dtype == torch.float64 else torch.float32
    assert loss.dtype == R and gradient.dtype == z.dtype
    double = teacher.to(torch.float64)
    exact = run(z.double(), double, labels, options, "reference", upstream)
    eager = run(z, teacher, labels, options, "reference", upstream)
    scale, cap = options.get("student_scale", 1.0), options.get("student_softcap")
    rest = {k: v for k, v in options.items() if k not in ("student_scale", "student_softcap")}
    student: Any = kd.Logits(z.double(), scale=scale, softcap=cap)
    of_loss, of_gradient = units_of(student, double, labels, rest)
    of_gradient = of_gradient * upstream.double().abs().unsqueeze(-1) * scale
    if R == torch.float32:
        of_gradient = of_gradient + roundings_of_truth(exact[1])
    eps = torch.finfo(R).eps
    assert_close("loss", loss, eager[0], exact[0], of_loss, eps)
    assert_close("gradient", gradient, eager[1], exact[1], of_gradient, eps)
    return loss, gradient


def problem(
    number: int, tail: str, T: float, V: int, k: int, rows: int = 2
) -> tuple[Tensor, kd.TopK, Tensor]:
    """Logits, a teacher, and labels: one that is stored, and the last class."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(number)
        z, v = (2 * torch.randn(rows, V, generator=generator) for _ in range(2))
        ids = some_ids(generator, v, k)
        ids[0, 0], ids[0, -1] = 0, V - 1  # the first and the last, and of one class twice the same
        labels = torch.full((rows,), V - 1)
        labels[0] = ids[0, k // 2].clamp(min=0)
        teacher = stored_teacher(v, ids, tail, T)
    return z.to(GPU), teacher.to(GPU), labels.to(GPU)


COMBINATIONS = list(itertools.product(TAILS, (1.0, 2.0), (0.0, 0.4)))
# Classes, and how many of them are stored.
SIZES = ((37, 37), (70, 5), (33, 1), (65, 20))


@pytest.mark.thorough(
    but=lambda backend, divergence: backend == "triton" or divergence in ("forward_kl", 0.5, "tvd")
)
@both
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence(backend: str, divergence: Any, request: pytest.FixtureRequest) -> None:
    """Of every tail, at both temperatures, with and without a hard term, in rows of one kind or the other."""
    number = DIVERGENCES.index(divergence)
    other = request.node.callspec.params["backend"] == "streaming"
    for i, (tail, T, hard) in enumerate(COMBINATIONS):
        if (i // 4 + i // 2 + i + number) % 2 != other or not allowed(divergence, tail):
            continue
        z, teacher, labels = problem(100 * number + i, tail, T, *SIZES[(i // 2 + number) % len(SIZES)])
        options = {"divergence": divergence, "temperature": T, "hard_weight": hard}
        check(z, teacher, labels if hard else None, options)


@both
@pytest.mark.parametrize(("V", "k"), [(1, 1), (2, 1), (131, 131), (150, 140)])
def test_rows_of_every_size(backend: str, V: int, k: int) -> None:
    """One class, all, and more than the 128 that are worked on at once, duplicates and padding among them."""
    for tail in ("ghost", "renormalize"):
        z, teacher, labels = problem(V, tail, 2.0, V, k)
        check(z, teacher, labels, {"divergence": kd.JSD(0.3), "temperature": 2.0, "hard_weight": 0.4})


EXTREME = [
    ("forward_kl", 1.0, 0.3, torch.float32), ("reverse_kl", 1.0, 0.0, torch.float32),
    (kd.JSD(0.3), 2.0, 0.3, torch.bfloat16), ("tvd", 2.0, 0.0, torch.float32),
]  # fmt: skip


@both
@pytest.mark.parametrize(("divergence", "T", "hard", "dtype"), EXTREME, ids=str)
def test_masses_that_are_next_to_nothing(
    backend: str, divergence: Any, T: float, hard: float, dtype: torch.dtype
) -> None:
    """Of the stored classes or of all others, and none at all; a loss that is infinite has a gradient."""
    cases = (("ghost", 40, 12), ("renormalize", 40, 12), ("ghost", 9, 9))
    for tail, V, k in cases[: 2 if hard else 3]:
        with torch.device("cpu"):
            z, ids = extreme(V, k)
            v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1000 + k))
            labels = ids.roll(1, -1)[:, 0].clamp(min=0)
            labels[::2] = (labels[::2] + 1) % V
            teacher = stored_teacher(v, ids, tail, T)
        z, teacher, labels = z.to(GPU, dtype), teacher.to(GPU), labels.to(GPU)
        options = {"divergence": divergence, "temperature": T, "hard_weight": hard}
        loss, gradient = check(z, teacher, labels if hard else None, options)
        known = torch.arange(9) != 5 if k == V or tail == "renormalize" else torch.full((9,), True)
        assert not loss[known].isnan().any()
        if not hard:
            assert gradient[known].isfinite().all()


# Layouts, by how they are made of a contiguous tensor of one row and one class more.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows sliced": lambda x: x[..., :-1, :-1],
    "columns apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)[..., :-1, 1:],
    "one row for all": lambda x: x[..., :1, 1:].expand(*x.shape[:-2], x.shape[-2] - 1, -1),
}
NOISES = [
    None,
    *(
        kd.LogitNoise(0.2, kind, per, seed=3)
        for kind in ("additive", "multiplicative")
        for per in ("logit", "row")
    ),
]


@both
@pytest.mark.parametrize("number", range(8))
def test_every_dtype_layout_and_option(backend: str, number: int) -> None:
    """Scale, softcap, and every kind of noise; fp16, whose gradient comes later."""
    dtype = (torch.bfloat16, torch.float16, torch.float32, torch.float64)[number % 4]
    layout = list(LAYOUTS.values())[number % 3]
    T = 1.0 + number // 4 % 2
    z, teacher, labels = problem(number, TAILS[number % 3], T, 52, 11, rows=3)
    z = layout(torch.nn.functional.pad(z, (0, 1, 0, 1)).to(dtype))
    options: dict[str, Any] = {
        "divergence": DIVERGENCES[3], "temperature": T, "hard_weight": 0.3, "student_scale": 0.5,
        "student_noise": NOISES[number % 5],
    }  # fmt: skip
    if number % 2:
        options["student_softcap"] = 5.0
    check(z, teacher, labels, options, torch.tensor([1.0, -0.5, 1024.0]))


def results(backend: str, z: Tensor, *given: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, stats and gradient."""
    leaf = z.detach().requires_grad_()
    loss, stats = kd.kd_loss_with_stats(leaf, *given, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), torch.stack([getattr(stats, f.name).double() for f in fields(stats)]), gradient


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_stats_weights_and_reductions(backend: str, reduction: str, tail: str) -> None:
    """As the reference has them, ties and rows without a label or anything stored included."""
    z, teacher, labels = problem(5, tail, 2.0, 70, 9, rows=6)
    z = z.round()  # ties
    teacher.log_probs.round_()
    labels[2] = -100
    teacher.ids[3] = -1
    z[4, int(teacher.ids[4, int(teacher.log_probs[4].argmax())])] = 30.0
    mask = torch.tensor([True, True, True, True, True, False])
    z[5] = teacher.log_probs[5] = torch.nan
    options = {
        "temperature": 2.0, "hard_weight": 0.3, "mask": mask, "token_weights": torch.rand(6),
        "reduction": reduction,
    }  # fmt: skip
    if reduction == "mean" and tail == "ghost":
        options["num_items"] = torch.tensor(7.0)
    ours, theirs = (results(name, z, teacher, labels, **options) for name in ("triton", "reference"))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert (ours[2][5] == 0).all()


@both
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_what_is_no_number_makes_its_row_none(backend: str, tail: str) -> None:
    """A log-probability or a logit; and what doesn't count is 0, whatever it holds."""
    for divergence in ("forward_kl", "reverse_kl", "tvd"):
        z, teacher, _ = problem(7, tail, 1.0, 50, 9, rows=5)
        teacher.log_probs[0, 3] = torch.nan
        teacher.ids[0, 3], z[0, 20] = 20, -torch.inf  # where q phi is 0 whatever p is
        z[1, int(teacher.ids[1, 4])] = torch.nan
        z[2, int(teacher.ids[2, 4])] = -torch.inf
        teacher.log_probs[3], teacher.ids[3], z[3] = torch.nan, 10**6, torch.nan
        mask = torch.arange(5) != 3
        loss, _, gradient = results("triton", z, teacher, divergence=divergence, reduction="none", mask=mask)
        assert loss[:2].isnan().all() and gradient[:2].isnan().any(-1).all()
        assert not loss[2:].isnan().any() and gradient[2:].isfinite().all()
        assert loss[3] == 0 and (gradient[3] == 0).all()


@both
def test_a_label_that_is_none(backend: str) -> None:
    """An error where looking waits for nothing, else its row is NaN."""
    z, teacher, labels = problem(8, "ghost", 1.0, 50, 9)
    labels[1] = 50
    if GPU == "cpu":
        with pytest.raises(ValueError, match="labels must be in"):
            kd.kd_loss(z, teacher, labels, hard_weight=0.5, backend="triton")
    else:
        loss, _, gradient = results("triton", z, teacher, labels, hard_weight=0.5, reduction="none")
        assert loss.isnan().tolist() == [False, True] and gradient[1].isnan().all()


@both
def test_terms_of_weight_0_are_absent(backend: str) -> None:
    """Also where they are infinite; and what is stored isn't looked at where nobody asks."""
    z = torch.randn(2, 50)
    z[1, 10:] = -torch.inf
    teacher = kd.TopK(torch.arange(5).expand(2, 5), torch.full((2, 5), -2.0))
    labels = torch.tensor([3, 4])
    for weights in ({"soft_weight": 0.0}, {"hard_weight": 0.0, "soft_weight": 0.0}):
        options = {"hard_weight": 1.0, **weights}
        ours, theirs = (results(name, z, teacher, labels, **options) for name in ("triton", "reference"))
        exact = results("reference", z.double(), teacher.to(torch.float64), labels, **options)
        for i in (0, 2):
            torch.testing.assert_close(ours[i], theirs[i])
        # Figures in fp32, each of one sum, stacked in fp64.
        assert_close("stats", ours[1], theirs[1], exact[1], exact[1].abs(), torch.finfo(torch.float32).eps)
        leaf = z.detach().requires_grad_()
        loss = kd.kd_loss(leaf, teacher, labels, backend="triton", **options)
        assert torch.equal(loss, ours[0])
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], theirs[2])


@both
@pytest.mark.parametrize("k", [9, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_in_place_of_the_logits(backend: str, k: int, dtype: torch.dtype) -> None:
    """What of a row is needed at the ids is had before the row is written."""
    from kdkernels.backends.triton_ import BACKEND

    z, teacher, labels = problem(9, "ghost", 1.0, 150, k)
    z = z.to(dtype)
    call = checked_call(z, teacher, labels, complete({"hard_weight": 0.3}), stats=False)
    made = []
    for out in (torch.empty_like(z), z):
        if dtype == torch.float16:
            _, _, state = BACKEND.forward(call, "state")
            made.append(BACKEND.gradient(torch.tensor(2.0), call, state, out))
        else:
            _, _, kept = BACKEND.forward(call, "gradient", out)
            assert kept is not None and kept.data_ptr() == out.data_ptr()
            made.append(kept)
    assert torch.equal(*made) and made[1].data_ptr() == z.data_ptr()


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head(backend: str, reduction: str) -> None:
    """In chunks, with rows that don't count."""
    _, teacher, labels = problem(10, "ghost", 1.0, 40, 9, rows=5)
    labels[2] = -100
    hidden, weight = torch.randn(5, 6), torch.randn(40, 6)
    grads = []
    for name in ("triton", "reference"):
        parts = [x.detach().requires_grad_() for x in (hidden, weight)]
        options = {"hard_weight": 0.3, "reduction": reduction, "memory_budget": 2000}
        if name == "reference":
            del options["memory_budget"]
        loss = kd.kd_loss(kd.Head(*parts), teacher, labels, backend=name, **options)
        grads.append((loss.detach(), *torch.autograd.grad((loss * torch.arange(1.0, 6.0)).sum(), parts)))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@whole
@pytest.mark.parametrize("known", [True, False])
def test_a_sample(backend: str, known: bool) -> None:
    """Whose loss has a part that the student has nothing to do with."""
    z, v = torch.randn(2, 2, 60).unbind()
    p = (v / 2).softmax(-1)
    ids = torch.multinomial(p, 9, replacement=True)
    weights = torch.full(ids.shape, 1 / 9)
    teacher = kd.Sampled(ids, weights, p.log().gather(-1, ids) if known else None, temperature=2.0)
    for divergence in ("forward_kl", "soft_cross_entropy"):
        ours, theirs = (
            results(name, z, teacher, divergence=divergence, temperature=2.0)
            for name in ("triton", "reference")
        )
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@whole
def test_a_registered_divergence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "mine", Divergence("mine", phi_forward_kl, g_forward_kl))
    z, teacher, _ = problem(11, "ghost", 1.0, 50, 9)
    ours, theirs = (results("triton", z, teacher, divergence=name) for name in ("mine", "forward_kl"))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# Passes over memory


@needs_interpreter
@pytest.mark.parametrize(("vocab", "k"), [(1000, 5), (9000, 5), (1000, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_passes_over_memory(monkeypatch: pytest.MonkeyPatch, vocab: int, dtype: torch.dtype, k: int) -> None:
    """Of the row 1 read + 1 write where a block holds it, 2 + 1 where not; fp16 1 + 1 more, in backward.

    At the ids a logit is read once, or where there are more of them than are kept in registers, by each of
    two phases, and written with the gradient; a row that doesn't count is not read.
    """
    rows, T = 3, 2.0
    z, v = torch.randn(rows, vocab).to(dtype), torch.randn(rows, vocab)
    ids = v.topk(k).indices
    teacher = stored_teacher(v, ids, "ghost", T)
    counter = Counter(monkeypatch, z)
    held, counted, stays = k == 5, rows - 1, vocab <= 4096
    options = {"mask": torch.tensor([True, False, True]), "temperature": T, "backend": "triton"}
    options["divergence"] = kd.JSD(0.3)
    kd.kd_loss(z, teacher, **options)
    at_ids = k * (1 if held else 2)
    assert counter.take() == (counted * (vocab + at_ids), 0)
    z.requires_grad_()
    loss = kd.kd_loss(z, teacher, **options)
    # What is not kept goes through memory: once more to where it waits.
    written = rows * vocab + counted * k * (1 if held else 2)
    if dtype == torch.float16:
        assert counter.take() == (counted * (vocab + at_ids), 0)
        loss.backward()
        assert counter.take() == (counted * (vocab + k), written)
    else:
        at_ids = k * (1 if held else 3)
        assert counter.take() == (counted * ((1 if stays else 2) * vocab + at_ids), written)


@needs_interpreter
def test_what_nobody_asks_for_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renormalised, the row is read at its ids alone; without a soft term not there."""
    z, v = torch.randn(2, 2, 500).unbind()
    teacher = stored_teacher(v, v.topk(9).indices, "renormalize", 1.0)
    counter = Counter(monkeypatch, z)
    z.requires_grad_()
    kd.kd_loss(z, teacher, backend="triton")
    assert counter.take() == (2 * 9, 2 * (500 + 9))
    kd.kd_loss(z, teacher, torch.tensor([3, 4]), soft_weight=0.0, hard_weight=1.0, backend="triton")
    assert counter.take() == (2 * (500 + 1), 2 * 500)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_launches(dtype: torch.dtype) -> None:
    """Two, without looking at the device, and one for the gradient; the teacher is made ready before."""
    if torch.cuda.is_available():
        pytest.skip("counted on tensors without data")
    from kdkernels.backends import triton_launch
    from kdkernels.backends.triton_ import BACKEND

    triton_launch.needs_guard(TABLE["forward_kl"], ())  # looks at numbers of its own, once
    with FakeTensorMode(), torch.no_grad():
        z, v = (torch.randn(4, 100, device="cuda", dtype=dtype) for _ in range(2))
        options = {"hard_weight": 0.1, "mask": torch.rand(4, device="cuda") > 0.5}
        labels = torch.randint(10, (4,), device="cuda")
        log_p, ids = v.float().log_softmax(-1).topk(5)
        call = checked_call(z, v, labels, complete(options), stats=True)
        call = call._replace(teachers=(), sparse=Sparse(ids, log_p, log_p.sum(-1), None))
        keep = "state" if dtype == torch.float16 else "gradient"
        with builds.recorded() as launches, DeviceWork() as work:
            _, _, kept = BACKEND.forward(call, keep)
        assert len(launches) == 2 and work.launched == ["aten::sum"]  # of the mask
        with builds.recorded() as launches:
            if keep == "state":
                BACKEND.gradient(torch.ones((), device="cuda"), call, kept)
            else:
                assert kept is not None
                BACKEND.scale(kept, torch.ones((), device="cuda"), in_place=True)
        assert len(launches) == 1


# Builds

# The cheapest expressions, and the dearest; all others are on k classes of a row.
TARGETS = {
    "sm_80": ("forward_kl", "bf16"), "sm_90": ("alpha_beta", "bf16"), "sm_100": ("forward_kl", "fp16"),
    "gfx942": ("jsd", "bf16"),
}  # fmt: skip


@pytest.mark.thorough(but=lambda target: target in ("sm_90", "gfx942"))
@needs_triton
@pytest.mark.parametrize("target", builds.TARGETS)
def test_builds_for_gpus_that_are_not_here(target: str) -> None:
    """No loop over a row spills, and it is read and written 16 bytes a thread, whatever is asked for."""
    name, dtype = TARGETS[target]
    found = built(
        "--targets", target, "--options", *builds.STORED, "--vocabularies", "1000", "128256",
        "--dtypes", dtype, "--divergences", name,
    )  # fmt: skip
    rows = [b for b in found if b["kernel"] == "sparse_kernel"]
    assert len(rows) == (8 if dtype == "fp16" else 4)
    for b in rows:
        # Before the loops a number or two of the row may go, so that one more program fits.
        assert b["reloads"] == 0 and b["spills"] <= 16 and b["registers"] <= 96 and b["shared"] <= 64, b
        size = builds.DTYPES[b["dtype"]].itemsize
        at_once = b["block"] // (b["lanes"] * b["warps"]) * size // 16
        writes = b["mode"] != builds.STATE
        reads = at_once * (2 if b["mode"] == 1 and not b["whole"] else 1)
        zeros = "stored" not in b["options"]  # of rows that don't count
        stores = at_once * (1 + zeros) if writes else 0
        if target == "gfx942":  # where loops are unrolled, too
            assert b["wide_loads"] >= reads and b["wide_stores"] >= stores, b
        else:
            assert (b["wide_loads"], b["wide_stores"]) == (reads, stores), b
