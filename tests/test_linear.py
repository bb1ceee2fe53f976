"""`kd.Head`: the loss and gradients of logits that are never made, for every chunking, option and side."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import DEVICES, fused, interpreted
from tolerances import DIVERGENCES, fitting, keywords
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from truth import Options, truth

import kdkernels as kd
from kdkernels import chunks, linear
from kdkernels.chunks import Job, plan
from kdkernels.functional import checked_call, complete

WIDTHS = 5, 3  # of student and teacher
V = 11


@dataclass
class Pair:
    """A student's head and a teacher's, in one dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    t_hidden: Tensor
    t_weight: Tensor
    t_bias: Tensor | None

    @property
    def parts(self) -> list[Tensor]:
        """Of the student."""
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def student(self, **options: Any) -> kd.Head:
        """As a source."""
        return kd.Head(self.hidden, self.weight, self.bias, **options)

    def teacher(self, **options: Any) -> kd.Head:
        """Likewise."""
        return kd.Head(self.t_hidden, self.t_weight, self.t_bias, **options)

    def logits(self) -> tuple[Tensor, Tensor]:
        """What the heads stand for, in fp64."""

        def of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            z = x.detach().double() @ weight.detach().double().T
            return z if bias is None else z + bias.detach().double()

        return of(self.hidden, self.weight, self.bias), of(self.t_hidden, self.t_weight, self.t_bias)

    def gradients(self, dz: Tensor) -> list[Tensor]:
        """Of the student's parts, from that of its logits."""
        flat, x = dz.flatten(0, -2), self.hidden.detach().double().flatten(0, -2)
        found = [dz @ self.weight.detach().double(), flat.T @ x, flat.sum(0)]
        return found[: len(self.parts)]


def pair(
    *rows: int, dtype: torch.dtype = torch.float64, vocab: int = V, bias: bool = True, std: float = 1.0
) -> Pair:
    """Random heads."""

    def head(width: int) -> list[Tensor | None]:
        shapes = [(*rows, width), (vocab, width), (vocab,)]
        x, weight, b = ((std * torch.randn(shape)).to(dtype) for shape in shapes)
        return [x, weight, b if bias else None]

    made = Pair(*head(WIDTHS[0]), *head(WIDTHS[1]))  # type: ignore[arg-type]
    for part in made.parts:
        part.requires_grad_()
    return made


def a_few_rows(p: Pair, rows: int = 3, dropped: bool = False, **options: Any) -> int:
    """A budget that holds so many rows and no more."""
    call = checked_call(p.student(), p.teacher(), None, complete(options), stats=False)
    want = linear.wanted(call.student)

    def fits(budget: int) -> bool:
        try:
            return plan(Job(call, budget, dropped), want, 10**6, dropped).rows >= rows
        except ValueError:
            return False

    return bisect_left(range(1 << 24), True, key=fits)


# Of each option something, so that no two are the same. Labels come with `labels`.
def option_sets(rows: tuple[int, ...]) -> dict[str, Options]:
    """By name."""
    n = torch.Size(rows).numel()
    mask = (torch.arange(n) % 3 != 1).view(rows)
    weights = (torch.arange(n) / n + 0.1).view(rows)
    noise = kd.LogitNoise(0.3, seed=3), kd.LogitNoise(0.2, "multiplicative", per="row", seed=4, row_offset=9)
    return {
        "plain": Options(),
        "hard": Options(0.3, temperature=2.0, soft_weight=0.7, hard_weight=0.4),
        "masked": Options(temperature=3.0, mask=mask, token_weights=weights, hard_weight=0.2),
        "none": Options("reverse_kl", reduction="none", hard_weight=0.3, mask=mask),
        "sum": Options("tvd", temperature=2.0, reduction="sum"),
        "items": Options(num_items=7.5, t_squared=False, hard_weight=0.1),
        "processed": Options(0.5, student_scale=0.5, student_softcap=3.0, teacher_scale=2.0),
        "noise": Options(temperature=2.0, student_noise=noise[1], teacher_noise=noise[0], mask=mask),
        "dkd": Options(kd.DKD(1.0, 2.0), temperature=2.0, hard_weight=0.5, mask=mask),
    }


NAMES = tuple(option_sets((1,)))
KINDS = ("heads", "teacher's logits", "student's logits", "mixture")


def sources(p: Pair, kind: str, o: Options) -> tuple[Any, Any, list[Tensor], Any]:
    """Student, teacher, what gets a gradient, and the teacher's logits in fp64."""
    z, v = p.logits()
    sides = {"scale": o.student_scale, "softcap": o.student_softcap}
    others = {"scale": o.teacher_scale, "softcap": o.teacher_softcap}
    if kind == "student's logits":
        z = z.requires_grad_()
        return kd.Logits(z, **sides), p.teacher(**others), [z], v
    student = p.student(**sides)
    if kind == "heads":
        return student, p.teacher(**others), p.parts, v
    if kind == "teacher's logits":
        return student, kd.Logits(v, **others), p.parts, v
    other = pair(*p.hidden.shape[:-1])
    teachers = [p.teacher(**others), kd.Logits(other.logits()[1], **others)]
    return student, kd.Mixture(teachers, o.weights), p.parts, [v, other.logits()[1]]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows have parts, too."""
    monkeypatch.setattr(chunks, "TILE", 1)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("number", ["one", "several"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_the_truths(backend: str, name: str, kind: str, number: str) -> None:
    """In fp64, through closed forms of the logits' gradient: hidden states, weight and bias."""
    if interpreted(backend) and (kind, number) not in (("heads", "several"), ("mixture", "one")):
        pytest.skip(
            "interpreted, the same kernel takes seconds; what is around it runs on the other backends"
        )
    rows = (2, 4)
    o = option_sets(rows)[name]
    if kind == "mixture":
        o = o.but(weights=[0.3, 0.7])
    p = pair(*rows)
    labels = torch.randint(V, rows)
    labels[0, 1] = -100
    y, o = fitting(p.logits()[0], labels if o.hard_weight or o.row[0] == "dkd" else None, o)
    student, teacher, parts, v = sources(p, kind, o)
    upstream = torch.rand(rows if o.reduction == "none" else (), dtype=torch.float64) + 0.5
    exact = truth(p.logits()[0], v, y, o, upstream)
    budget = None if number == "one" else a_few_rows(p, dropped=True)
    loss = kd.kd_loss(student, teacher, y, backend=backend, memory_budget=budget, **keywords(o))
    got = torch.autograd.grad(loss, parts, upstream)
    torch.testing.assert_close(loss, exact.loss, rtol=1e-9, atol=1e-12)
    wanted = [exact.grad] if kind == "student's logits" else p.gradients(exact.grad)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@fused
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(backend: str, divergence: Any) -> None:
    """The gradient is written over the logits that it is of, which no expression may still have to read."""
    p = pair(7, vocab=67)
    o = Options(divergence, temperature=2.0, hard_weight=0.3)
    labels = torch.randint(67, (7,))
    labels[3] = -100
    y, o = fitting(p.logits()[0], labels, o)
    for reduction in ("mean", "none"):
        o = o.but(reduction=reduction)
        exact = truth(*p.logits(), y, o)
        loss = kd.kd_loss(
            p.student(), p.teacher(), y, backend=backend, memory_budget=a_few_rows(p), **keywords(o)
        )
        got = torch.autograd.grad(loss.sum(), p.parts)
        torch.testing.assert_close(loss, exact.loss, rtol=1e-7, atol=1e-9)
        for ours, theirs in zip(got, p.gradients(exact.grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_stats_are_those_of_the_logits(backend: str, reduction: str, masked: bool) -> None:
    """Chunks of different counts are not weighed alike."""
    p = pair(9)
    labels = torch.tensor([1, 2, -100, 4, -100, -100, 7, 8, 9])
    mask = torch.tensor([True, False, True, True, True, True, False, True, True]) if masked else None
    options: Any = {"hard_weight": 0.4, "temperature": 2.0, "reduction": reduction, "mask": mask}
    z, v = p.logits()
    wanted = kd.kd_loss_with_stats(z, v, labels, backend="reference", **options)
    for drop in (True, False):
        for budget in (None, a_few_rows(p, 2, dropped=True)):
            loss, stats = kd.kd_loss_with_stats(
                p.student(), p.teacher(), labels, backend=backend, memory_budget=budget, drop_masked=drop,
                **options,
            )  # fmt: skip
            torch.testing.assert_close(loss, wanted[0])
            for name, figure in vars(stats).items():
                torch.testing.assert_close(
                    figure, getattr(wanted[1], name), msg=lambda m, n=name: f"{n}: {m}"
                )
            assert not any(x.requires_grad for x in vars(stats).values())


def test_binary_labels_and_pad_vocab(backend: str) -> None:
    """Labels of a row's own classes, and classes that one side lacks."""
    p = pair(6)
    o = Options(kd.BinaryKL(), temperature=2.0, hard_weight=0.5)
    targets = torch.rand(6, V, dtype=torch.float64)
    loss = kd.kd_loss(
        p.student(), p.teacher(), targets, backend=backend, memory_budget=a_few_rows(p), **keywords(o)
    )
    exact = truth(*p.logits(), targets, o)
    torch.testing.assert_close(loss, exact.loss)
    for ours, theirs in zip(torch.autograd.grad(loss, p.parts), p.gradients(exact.grad), strict=True):
        torch.testing.assert_close(ours, theirs)
    targets[4, 3] = 1.5
    if DEVICES[backend] == "cpu":
        with pytest.raises(ValueError, match=r"got 1.5 at row 4, class 3"):
            kd.kd_loss(
                p.student(), p.teacher(), targets, backend=backend, memory_budget=a_few_rows(p), **keywords(o)
            )
    o = Options(0.5, pad_vocab=True)
    small = kd.Head(p.t_hidden, p.t_weight[: V - 4], p.t_bias[: V - 4])  # type: ignore[index]
    z, v = p.logits()
    exact = truth(z, v[..., : V - 4], None, o)
    loss = kd.kd_loss(p.student(), small, backend=backend, **keywords(o))
    torch.testing.assert_close(loss, exact.loss)
    for ours, theirs in zip(torch.autograd.grad(loss, p.parts), p.gradients(exact.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


# Dtypes


def eager(p: Pair, labels: Tensor, o: Options, loss_scale: float) -> tuple[Tensor, ...]:
    """What a careful user writes: logits in the dtype of the head, the loss in fp32."""
    z = torch.nn.functional.linear(*p.parts).float()
    with torch.no_grad():
        v = torch.nn.functional.linear(p.t_hidden, p.t_weight, p.t_bias).float()
    T = o.temperature
    kl = torch.nn.functional.kl_div(
        (z / T).log_softmax(-1), (v / T).log_softmax(-1), reduction="batchmean", log_target=True
    )
    hard = torch.nn.functional.cross_entropy(z, labels)
    loss = o.soft_weight * T * T * kl + o.hard_weight * hard
    return loss.detach(), *torch.autograd.grad(loss, p.parts, torch.tensor(loss_scale))


@fused
@pytest.mark.parametrize("number", ["one", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_no_larger_than_eagers(backend: str, dtype: torch.dtype, number: str) -> None:
    """Of all gradients against fp64, in root mean square; float16 under a loss scale."""
    torch.manual_seed(7)
    rows, vocab = (16, 200) if interpreted(backend) else (64, 3000)
    o, scale = Options(temperature=2.0, soft_weight=0.9, hard_weight=0.1), 1024.0
    p, labels = pair(rows, dtype=dtype, vocab=vocab), torch.randint(vocab, (rows,))
    exact = truth(*p.logits(), labels, o, torch.tensor(scale))
    theirs = eager(p, labels, o, scale)
    budget = None if number == "one" else a_few_rows(p, rows // 4)
    loss = kd.kd_loss(p.student(), p.teacher(), labels, backend=backend, memory_budget=budget, **keywords(o))
    ours = torch.autograd.grad(loss, p.parts, torch.tensor(scale))
    assert loss.dtype == torch.float32 and [x.dtype for x in ours] == [dtype] * 3
    names = ("hidden", "weight", "bias")
    for name, got, other, true in zip(names, ours, theirs[1:], p.gradients(exact.grad), strict=True):
        error, eagers = ((x.double() - true).pow(2).mean().sqrt() for x in (got, other))
        assert error <= 1.01 * eagers + 1e-6 * true.abs().max(), f"{name}: {error:.3g} to {eagers:.3g}"


@pytest.mark.parametrize("given", ["alone", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 5, 40), (3, 40, 5), (40, 5, 3), (4, 4, 4)], ids=str)
def test_products_of_wide_copies_round_once(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], dtype: torch.dtype, given: str
) -> None:
    """Whichever side is the longest, in small parts: half a unit of the dtype, and what float32 sums lose."""
    monkeypatch.setattr(chunks, "WIDENED", 100)
    rows, inner, columns = sizes
    a, b = torch.randn(inner, rows).to(dtype).t(), torch.randn(inner, columns).to(dtype)
    bias = torch.randn(columns).to(dtype) if given == "bias" else None
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    linear._product_of_wide(a, b, out, bias)
    exact = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    lost = 1e-6 * (a.double().abs() @ b.double().abs() + 1)
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + lost).all()


@fused
@pytest.mark.parametrize("number", ["one", "several"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_products_of_16_bits_are_loops_none_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, number: str
) -> None:
    """With AVX2 alone such a product takes a hundred times as long as that of float32 copies."""
    monkeypatch.setattr(linear, "is_loop", lambda dtype: dtype != torch.float32)
    if DEVICES[backend] != "cpu":
        pytest.skip("products on a GPU have their instructions")
    p = pair(8, dtype=dtype, vocab=50)
    asked: set[torch.dtype] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "matmul"):
                asked.update(x.dtype for x in args if isinstance(x, Tensor))
            return func(*args, **(kwargs or {}))

    with Products():
        budget = None if number == "one" else a_few_rows(p)
        loss = kd.kd_loss(p.student(), p.teacher(), backend=backend, memory_budget=budget)
        torch.autograd.grad(loss, p.parts)
    assert asked == {torch.float32}


@fused
@pytest.mark.parametrize("lowered", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_multiplies_in_its_dtype(backend: str, lowered: torch.dtype) -> None:
    """Of float32 parts gradients in float32, from products in the other, as `F.linear` under autocast."""
    p = pair(8, dtype=torch.float32, vocab=50)
    device = DEVICES[backend]
    with torch.autocast(device, dtype=lowered):
        z = torch.nn.functional.linear(*p.parts)
        assert z.dtype == lowered
        v = torch.nn.functional.linear(p.t_hidden, p.t_weight, p.t_bias)
        wanted = kd.kd_loss(z, v, backend=backend)
        for budget in (None, a_few_rows(p)):
            loss = kd.kd_loss(p.student(), p.teacher(), backend=backend, memory_budget=budget)
            torch.testing.assert_close(loss, wanted)
    theirs = torch.autograd.grad(wanted, p.parts)
    for ours, other in zip(torch.autograd.grad(loss, p.parts), theirs, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, other, rtol=0.02, atol=2e-3)


# What it costs


class Operations(TorchDispatchMode):
    """What runs: products, what waits for a device, and the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts."""
        result = func(*args, **(kwargs or {}))
        self.count[func.overloadpacket.__name__] += 1
        mine = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in mine:
            self.largest = max(self.largest, result.numel())
        return result

    @property
    def products(self) -> int:
        """Matrix products."""
        return self.count["mm"] + self.count["addmm"]


@contextmanager
def operations() -> Iterator[Operations]:
    """Of what runs within."""
    with Operations() as counted:
        yield counted


def step(p: Pair, backend: str, **options: Any) -> None:
    """Forward and backward."""
    kd.kd_loss(p.student(), p.teacher(), backend=backend, **options).backward()


@fused
def test_four_products_a_chunk_and_none_for_what_is_frozen(backend: str) -> None:
    """Logits of both sides, hidden states, weight."""
    for frozen, products in (([], 4), (["weight"], 3), (["hidden"], 3), (["weight", "hidden"], 2)):
        p = pair(8, dtype=torch.float32, bias=False)
        for name in frozen:
            getattr(p, name).requires_grad_(False)
        with operations() as counted:
            loss = kd.kd_loss(p.student(), p.teacher(), backend=backend, memory_budget=a_few_rows(p, 4))
            if loss.requires_grad:
                loss.backward()
        assert counted.products == 2 * products
        assert [x.grad is not None for x in p.parts] == [x.requires_grad for x in p.parts]
    with torch.no_grad(), operations() as counted:
        kd.kd_loss(p.student(), p.teacher(), backend=backend)
    assert counted.products == 2


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_tensor_of_all_logits_is_made(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor of a half of them, whatever the strides of what is given."""
    monkeypatch.setattr(chunks, "WIDENED", 256)  # or all of these few rows fit in what a product may take
    rows, vocab = 40, 100
    p = pair(10, 4, dtype=dtype, vocab=vocab)
    p.t_hidden = p.t_hidden.view(4, 10, -1).transpose(0, 1)
    logits = torch.randn(4, 12, vocab, dtype=dtype)[:, 1:-1].transpose(0, 1)
    mask = torch.rand(10, 4) < 0.8
    for teacher in (p.teacher(), logits):
        for options in ({}, {"mask": mask}, {"reduction": "none"}):
            with operations() as counted:
                loss = kd.kd_loss(
                    p.student(), teacher, backend=backend, memory_budget=a_few_rows(p, 8, True), **options
                )  # fmt: skip
                loss.sum().backward()
            assert counted.largest <= rows * vocab / 4


@fused
def test_dropped_rows_cost_one_look_at_the_mask(backend: str) -> None:
    """And their share of the products; without, none is looked at."""
    p = pair(60, dtype=torch.float32)
    mask = torch.arange(60) < 20
    found: dict[bool, Operations] = {}
    for drop in (True, False):
        with operations() as counted:
            loss = kd.kd_loss(
                p.student(), p.teacher(), backend=backend, mask=mask, drop_masked=drop, reduction="sum",
                memory_budget=a_few_rows(p, 20, drop, mask=mask),
            )  # fmt: skip
            loss.backward()
        found[drop] = counted
        assert (p.hidden.grad[20:] == 0).all() and (p.hidden.grad[:20] != 0).any()  # type: ignore[index]
    assert found[True].count["nonzero"] == 1 and found[False].count["nonzero"] == 0
    assert found[True].products * 3 == found[False].products


@pytest.mark.gpu
@pytest.mark.parametrize("drop", ["auto", True, False])
def test_the_number_of_syncs_on_a_gpu(drop: Any) -> None:
    """Exactly one where rows are dropped, none elsewhere."""
    with torch.device("cuda"):
        p = pair(64, dtype=torch.bfloat16, vocab=1000)
        mask, labels = torch.rand(64) < 0.5, torch.randint(1000, (64,))

        def run() -> None:
            loss = kd.kd_loss(
                p.student(), p.teacher(), labels, hard_weight=0.5, mask=mask, drop_masked=drop,
                backend="triton", memory_budget=a_few_rows(p, 8),
            )  # fmt: skip
            loss.backward()

        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchroniz") as waits:
                run()
                torch.ones(1).item()  # so that there is one to be warned of
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(waits) == 1 + (drop is not False)


@fused
def test_the_budget_is_kept_and_used(backend: str) -> None:
    """The fewest chunks that fit; every budget gives the same result."""
    p = pair(50, dtype=torch.float32, vocab=300)
    results = []
    for rows in (1, 2, 7, 30, 100):
        budget = a_few_rows(p, rows)
        loss = kd.kd_loss(p.student(), p.teacher(), backend=backend, memory_budget=budget)
        results.append((loss.detach(), *torch.autograd.grad(loss, p.parts)))
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-5, atol=1e-6)
    call = checked_call(p.student(), p.teacher(), None, complete({}), stats=False)
    want, last = linear.wanted(call.student), 10**9
    for budget in (10_000, 20_000, 50_000, 100_000, 10**6):
        how = plan(Job(call, budget, False), want, 50, False)
        assert how.bytes <= budget and how.rows * how.chunks >= 50 and how.chunks <= last
        one_less = how.chunks - 1
        assert one_less == 0 or -(-50 // one_less) * (how.bytes // how.rows) > budget
        last = how.chunks
    for written, meant in (("64KiB", 65536), ("0.5 MB", 500_000), ("1e9", None), (64, 64)):
        if meant is None:
            with pytest.raises(ValueError, match="memory_budget must be bytes"):
                kd.kd_loss(p.student(), p.teacher(), memory_budget=written)
        elif meant > 10_000:
            kd.kd_loss(p.student(), p.teacher(), backend=backend, memory_budget=written)
        else:
            with pytest.raises(ValueError, match="memory_budget must hold a row at least"):
                kd.kd_loss(p.student(), p.teacher(), backend=backend, memory_budget=written)


def test_explain_says_how_rows_are_taken() -> None:
    """In numbers, and in words."""
    p = pair(40)
    found = kd.explain(p.student(), p.teacher(), memory_budget=a_few_rows(p, 7))
    assert found.plan is not None and found.plan[:2] == (7, 6)
    assert f"heads: 6 × 7 rows, {found.plan.bytes / 2**20:,.1f} MiB" in str(found)
    mask = torch.arange(40) < 5
    dropped = kd.explain(p.student(), p.teacher(), mask=mask).plan
    assert dropped is not None and dropped[:2] == (5, 1)
    assert kd.explain(*p.logits()).plan is None


# Autograd


@fused
def test_backward_twice_and_accumulated(backend: str) -> None:
    """The same values from a kept graph; `.grad` adds up; higher orders are refused by name."""
    for dtype, reduction in ((torch.float32, "mean"), (torch.float32, "none"), (torch.float16, "mean")):
        p = pair(8, dtype=dtype)
        loss = kd.kd_loss(p.student(), p.teacher(), backend=backend, reduction=reduction).sum()
        first = torch.autograd.grad(3 * loss, p.parts, retain_graph=True)
        second = torch.autograd.grad(3 * loss, p.parts, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(loss, p.parts, create_graph=True)
        loss.backward()
        kd.kd_loss(p.student(), p.teacher(), backend=backend, reduction=reduction).sum().backward()
        for part, gradient in zip(p.parts, first, strict=True):
            torch.testing.assert_close(part.grad * 1.5, gradient, rtol=3e-3, atol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("number", ["one", "several"])
def test_the_reference_is_differentiable_twice(number: str) -> None:
    """Through chunks that are computed again, too."""
    p = pair(4, vocab=6)
    budget = None if number == "one" else 6 * 8 * 13 * 2
    call = checked_call(p.student(), p.teacher(), None, complete({}), stats=False)
    how = plan(Job(call, budget, False), (True,) * 3, 4, False, fused=False)
    assert (how.chunks > 1) == (number == "several")

    def loss(*parts: Tensor) -> Tensor:
        return kd.kd_loss(
            kd.Head(*parts), p.teacher(), divergence=kd.JSD(0.3), backend="reference", memory_budget=budget
        )

    assert torch.autograd.gradcheck(loss, p.parts)
    assert torch.autograd.gradgradcheck(loss, p.parts)


def test_a_tied_weight_gets_both_gradients(backend: str) -> None:
    """The embedding's and the head's."""
    weight = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)
    tokens, p = torch.randint(V, (7,)), pair(7)
    results = []
    for head in (True, False):
        hidden = torch.nn.functional.embedding(tokens, weight).tanh()
        student = kd.Head(hidden, weight) if head else hidden @ weight.T
        loss = kd.kd_loss(student, p.logits()[1], backend=backend)
        results.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*results)


def test_nothing_counts_or_nothing_is_there(backend: str) -> None:
    """Loss 0, with gradients of 0, on all parts."""
    for rows, mask in (((0,), None), ((2, 0), None), ((4,), torch.zeros(4, dtype=torch.bool))):
        for drop in (True, False):
            p = pair(*rows)
            loss = kd.kd_loss(p.student(), p.teacher(), backend=backend, mask=mask, drop_masked=drop)
            assert loss == 0
            loss.backward()
            assert all((part.grad == 0).all() for part in p.parts)  # type: ignore[union-attr]


def test_masked_rows_may_hold_anything(backend: str) -> None:
    """A NaN of theirs stays theirs, where they are multiplied with the others, too."""
    p = pair(6)
    mask = torch.tensor([True, True, False, True, False, True])
    with torch.no_grad():
        p.t_hidden[2] = p.hidden[4] = torch.nan
    for reduction in ("mean", "none"):
        for drop in (True, False):
            loss = kd.kd_loss(
                p.student(), p.teacher(), backend=backend, mask=mask, drop_masked=drop, reduction=reduction
            )
            gradients = torch.autograd.grad(loss.sum(), p.parts)
            assert loss.isfinite().all() and all(x.isfinite().all() for x in gradients)
            assert (gradients[0][~mask] == 0).all()


# Sources


def test_a_head_travels() -> None:
    """As a pytree, to other dtypes, by rows; made under `no_grad` it is detached."""
    p = pair(4, 3)
    head = p.student(scale=0.5, softcap=7.0)
    leaves, structure = tree_flatten(head)
    again = tree_unflatten(leaves, structure)
    assert isinstance(again, kd.Head) and again.hidden is head.hidden and again.softcap == 7.0
    assert {x.dtype for x in (head.to(torch.float32).hidden, head.to(torch.float32).weight)} == {
        torch.float32
    }
    some = head[1:3]
    assert some.hidden.shape == (2, 3, 5) and some.weight is head.weight and some.scale == 0.5
    with pytest.raises(IndexError):
        head[..., 0]
    whole = kd.kd_loss(head, p.teacher(), reduction="none")
    assert torch.equal(kd.kd_loss(some, p.teacher()[1:3], reduction="none"), whole[1:3])
    with torch.no_grad():
        frozen = p.student()
    assert not any(x.requires_grad for x in (frozen.hidden, frozen.weight, frozen.bias))  # type: ignore[union-attr]
    assert kd.kd_loss(p.student(), frozen).requires_grad


def test_the_teacher_gets_no_gradient_unless_that_is_said() -> None:
    """As of logits."""
    p = pair(3)
    p.t_weight.requires_grad_()
    with pytest.raises(ValueError, match="teacher requires grad"):
        kd.kd_loss(p.student(), p.teacher())
    kd.kd_loss(p.student(), p.teacher(), teacher_requires_grad="ignore").backward()
    assert p.t_weight.grad is None


BAD: dict[str, tuple[Callable[[Pair], Any], type[Exception], str]] = {
    "width": (lambda p: kd.Head(p.hidden, p.t_weight), ValueError, r"hidden \[..., d\] and weight \[V, d\]"),
    "bias": (lambda p: kd.Head(p.hidden, p.weight, p.bias[:-1]), ValueError, r"bias of student's kd.Head"),  # type: ignore[index]
    "transposed": (lambda p: kd.Head(p.hidden, p.weight.T), ValueError, r"nn.Linear\(d, V\)"),
    "dtypes": (lambda p: kd.Head(p.hidden, p.weight.float()), TypeError, "torch.autocast"),
    "quantised": (lambda p: kd.Head(p.hidden, p.weight.char()), TypeError, "quantised"),
    "module": (lambda p: kd.Head(p.hidden, torch.nn.Linear(5, V)), TypeError, "weight of student's kd.Head"),  # type: ignore[arg-type]
    "device": (lambda p: kd.Head(p.hidden, p.weight.to("meta")), ValueError, "hidden states' device"),
    "rows": (lambda p: kd.Head(p.hidden[:-1], p.weight), ValueError, "leading shape"),
    "flat shard": (lambda p: kd.Head(p.hidden, p.weight.flatten()), ValueError, "sharded"),
    "integers": (lambda p: kd.Head(torch.ones(4, dtype=torch.long), p.weight), TypeError, "hidden of"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_heads_are_refused_by_name(what: str) -> None:
    """Which part, what it got, what to do."""
    p = pair(4)
    make, kind, message = BAD[what]
    p.hidden, p.weight, p.bias = (x.detach() for x in p.parts)
    with pytest.raises(kind, match=message):
        kd.kd_loss(make(p), p.teacher())


def test_a_sharded_head_is_refused_with_the_remedy(tmp_path: Any) -> None:
    """DTensor of one process, and what DeepSpeed leaves of a parameter."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        p, mesh = pair(4), init_device_mesh("cpu", (1,))
        p.weight = distribute_tensor(p.weight.detach(), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"weight of student's kd.Head is a DTensor.*full_tensor\(\)"):
            kd.kd_loss(p.student(), p.teacher())
        with pytest.raises(ValueError, match=r"sharded over its classes.*full_tensor\(\)"):
            wide = distribute_tensor(p.hidden.detach(), mesh, [Shard(1)])
            kd.kd_loss(
                kd.Head(wide, distribute_tensor(p.weight.full_tensor(), mesh, [Shard(1)])), p.teacher()
            )
        loss = kd.kd_loss(kd.Head(p.hidden, p.weight.full_tensor(), p.bias), p.teacher())
        assert loss.isfinite()
    finally:
        destroy_process_group()
    partitioned = torch.empty(0, dtype=torch.float64)
    partitioned.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ZeRO-3.*GatheredParameters"):
        kd.kd_loss(kd.Head(p.hidden, partitioned), p.teacher())


def test_labels_out_of_range_name_their_row(backend: str) -> None:
    """The row of the call, whatever chunk it is in and whatever was dropped before it."""
    if DEVICES[backend] != "cpu":
        pytest.skip("looking would wait for the device")
    p, labels = pair(12), torch.randint(V, (12,))
    labels[9], labels[2] = V, -100
    for drop in (True, False):
        with pytest.raises(ValueError, match=f"got {V} at row 9 of 12"):
            kd.kd_loss(
                p.student(), p.teacher(), labels, hard_weight=0.5, backend=backend, drop_masked=drop,
                memory_budget=a_few_rows(p, 2),
            )  # fmt: skip


# Compiled


@pytest.mark.thorough(but=lambda backend, how: backend != "triton" or how in ("mean", "float16"))
@pytest.mark.parametrize("how", ["mean", "none", "float16", "autocast", "student's logits"])
def test_compiled_it_is_one_node(backend: str, how: str) -> None:
    """Of a fused backend one operator forward; the gradients are those of eager."""
    torch._dynamo.reset()
    dtype = torch.float16 if how == "float16" else torch.float32
    p, labels = pair(8, dtype=dtype, vocab=20), torch.randint(20, (8,))
    labels[3] = -100
    z, v = (x.to(dtype) for x in p.logits())
    logits = z.requires_grad_()

    def loss(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, labels: Tensor, T: float) -> Tensor:
        student = logits if how == "student's logits" else kd.Head(x, weight, bias)
        teacher = p.teacher() if how == "student's logits" else v
        with torch.autocast(DEVICES[backend], torch.bfloat16, enabled=how == "autocast"):
            return kd.kd_loss(
                student, teacher, labels, temperature=T, hard_weight=0.3, backend=backend,
                reduction="none" if how == "none" else "mean",
            )  # fmt: skip

    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    parts = [logits] if how == "student's logits" else p.parts
    for engine in (keep, "aot_eager"):
        compiled = torch.compile(loss, fullgraph=True, backend=engine)
        for T in (1.5, 2.0, 2.5):
            arguments = (*p.parts, v, labels, T)
            ours, theirs = compiled(*arguments), loss(*arguments)
            torch.testing.assert_close(ours, theirs)
            for a, b in zip(
                torch.autograd.grad(ours.sum(), parts), torch.autograd.grad(theirs.sum(), parts), strict=True
            ):
                torch.testing.assert_close(a, b)
    if backend != "reference":
        names = [str(node.target) for node in graphs[0].graph.nodes if "kdkernels" in str(node.target)]
        assert len(names) == 1 and "kd_heads_v1" in names[0]
        assert not any("mm" in str(n.target) or "linear" in str(n.target) for n in graphs[0].graph.nodes)


@fused
def test_the_operators_keep_their_promises(backend: str) -> None:
    """torch's own checks of schemas, shapes and autograd registration."""
    from kdkernels.ops import kd_heads

    p = pair(6, dtype=torch.float32)
    calls: list[Any] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "kd_heads" in func.overloadpacket.__name__:
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    for reduction in ("mean", "none"):
        call = checked_call(p.student(), p.teacher(), None, complete({"reduction": reduction}), stats=True)
        with Recording():
            kd_heads(Job(call, None, False), backend)[0].sum().backward()
    assert {func.overloadpacket.__name__ for func, _ in calls} == {"kd_heads_v1", "kd_heads_gradient_v1"}
    for func, args in calls:
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(func, args, test_utils=checks)
