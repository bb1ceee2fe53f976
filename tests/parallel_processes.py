"""What processes of a vocabulary-parallel group do: the cases of `test_parallel.py`, one after the other.

Every process has all of the data, from the same seeds, and passes on its own classes of it. What goes wrong
is written down and not raised, so that no process waits for another that is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from problems import Problem, problems
from test_properties import once_rounded
from tolerances import (
    DIVERGENCES,
    arguments,
    assert_within_budget,
    computing_dtype,
    fitting,
    keywords,
)
from torch import Tensor
from truth import Options, truth

import kdkernels as kd
from kdkernels.bench import scale
from kdkernels.bench.traffic import counted
from kdkernels.divergences import TABLE

CASES: dict[str, Callable[[], None]] = {}
STORES: list[str] = []  # where processes have met
EXAMPLES = hypothesis.settings(
    max_examples=60, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck), phases=[hypothesis.Phase.generate],
)  # fmt: skip


def case(function: Callable[[], None]) -> Callable[[], None]:
    """One that is run in all processes."""
    CASES[function.__name__] = function
    return function


def main(rank: int, world: int, folder: str, cases: list[str]) -> None:
    """These cases; what failed is in the folder."""
    run({name: CASES[name] for name in cases}, rank, world, folder)


def start(rank: int, world: int, store: str) -> None:
    """The processes meet, by a file that is not there yet."""
    # Of the interfaces that there are, the one that needs no network.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    STORES.append(store)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )


def run(cases: dict[str, Callable[[], None]], rank: int, world: int, folder: str) -> None:
    """These, in one of the processes."""
    torch.set_num_threads(1)
    start(rank, world, f"{folder}/store")
    found: dict[str, str | None] = {}
    for name, function in cases.items():
        torch.manual_seed(0)
        try:
            function()
            found[name] = None
        except Exception as error:
            found[name] = "".join(traceback.format_exception(error))
            (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
            if isinstance(error, RuntimeError) and any(
                w in str(error) for w in ("imed out", "closed by peer")
            ):
                break  # another process is gone
        # One by one: a process whose peer does something else may be aborted.
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# Shards


def bounds(vocab: int, cuts: list[int] | None = None) -> list[int]:
    """Where the shards of every process begin and end, ragged where cuts are given."""
    world = dist.get_world_size()
    inner = (
        [vocab * r // world for r in range(1, world)]
        if cuts is None
        else sorted(c % (vocab + 1) for c in cuts)
    )
    return [0, *inner[: world - 1], vocab]


def mine(x: Tensor, cuts: list[int] | None = None, dim: int = -1) -> Tensor:
    """This process's classes."""
    at, rank = bounds(x.shape[dim], cuts), dist.get_rank()
    return x.narrow(dim, at[rank], at[rank + 1] - at[rank])


def gathered(x: Tensor, dim: int = -1) -> Tensor:
    """Of all processes."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, x)
    return torch.cat(every, dim)


def same(x: Tensor) -> None:
    """That all processes have this, to the bit."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, x)
    assert all(torch.equal(x, y) or (x.isnan() & y.isnan() | (x == y)).all() for y in every), every


def our_result(
    p: Problem, o: Options, cuts: list[int], upstream: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient put together."""
    labels, o = fitting(p.z, p.labels, o)
    z = mine(p.z, cuts).detach().requires_grad_()
    if o.binary and labels is not None:
        labels = mine(labels, cuts)
    given = arguments(z, p.each(lambda v: mine(v, cuts)), labels, o)
    loss = kd.kd_loss(*given, vocab_parallel=kd.VocabParallel(), backend=backend, **keywords(o))
    (grad,) = torch.autograd.grad(loss, z, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), gathered(grad)


def of_common_classes(p: Problem) -> tuple[Problem, Options]:
    """The same without classes that one side lacks."""
    k = p.classes
    z, v, o = p.z[..., :k], p.each(lambda v: v[..., :k]), p.o.but(pad_vocab=False)
    return Problem(z, v, p.labels, o, p.upstream), o


CUTS = st.lists(st.integers(0, 5000), min_size=2, max_size=2)


def recorded(test: Callable[[Any], None], examples: int = 60) -> None:
    """Runs a property with the same examples in every process; the first that fails is raised in the end."""
    failures: list[str] = []
    seen = 0

    def check(example: Any) -> None:
        nonlocal seen
        seen += 1
        try:
            test(example)
        except AssertionError as error:
            failures.append(f"{example!r}: {error}")

    settings = hypothesis.settings(EXAMPLES, max_examples=examples)
    settings(given(st.tuples(problems(), CUTS))(check))()
    assert seen >= examples, seen
    assert not failures, f"{len(failures)} of {seen}; {failures[0]}"


@case
def any_problem_is_within_the_budget() -> None:
    """Every option at once, ragged shards, some with no class at all."""

    def test(example: tuple[Problem, list[int]]) -> None:
        (p, o), cuts = of_common_classes(example[0]), example[1]
        # Every other one is for the kernels, which mixtures, noise and divergences of logits aren't.
        backend = "reference" if cuts[0] % 2 else None
        if backend is None:
            o = o.but(student_noise=None, teacher_noise=None, weights=None)
            p = dataclasses.replace(p, v=p.teachers[0])
        assert_right(p, o, cuts, backend)

    recorded(test)


def assert_right(p: Problem, o: Options, cuts: list[int], backend: str | None) -> None:
    """Loss and gradient within their budgets, and what is rounded twice within that."""
    loss, grad = our_result(p, o, cuts, p.upstream, backend)
    same(loss)
    if once_rounded(p):
        assert_within_budget((loss, grad), p.z, p.v, p.labels, o, p.upstream)
        return
    plain = our_result(p, o, cuts, None, backend)
    assert_within_budget((loss, plain[1]), p.z, p.v, p.labels, o)
    exact = truth(p.z, p.v, *fitting(p.z, p.labels, o), p.upstream)
    room = torch.finfo(p.z.dtype).eps * exact.grad.abs() + 8e-7 * exact.grad_unit + 1e-37
    assert ((grad.double() - exact.grad).abs() <= 1.01 * room).all()


@case
def hidden_classes() -> None:
    """−inf on both sides, over whole shards too: never NaN, and no gradient."""

    def test(example: tuple[Problem, list[int]]) -> None:
        (p, o), cuts = of_common_classes(example[0]), example[1]
        o = o.but(student_softcap=None, teacher_softcap=None, hard_weight=0.0)
        z, v = p.z.clone(), p.each(torch.clone)
        kept = cuts[0] % z.shape[-1]
        gone = torch.arange(z.shape[-1]).expand(z.shape) != kept
        if cuts[1] % 2:
            gone = gone & (torch.arange(z.shape[-1]) % 3 != 0)
        for side in (z, *([v] if isinstance(v, Tensor) else v)):
            side[gone] = -torch.inf
        p = Problem(z, v, p.labels, o, None)
        loss, grad = our_result(p, o, cuts, None, "reference" if cuts[1] % 3 else None)
        exact = assert_within_budget((loss, grad), z, v, p.labels, o)
        assert exact.loss.isfinite().all() and (grad[gone] == 0).all()

    recorded(test)


@case
def figures_are_those_of_whole_rows() -> None:
    """Entropies, agreement, accuracy, terms; of every divergence, and of a tie between shards."""

    def test(example: tuple[Problem, list[int]]) -> None:
        (p, o), cuts = of_common_classes(example[0]), example[1]
        if (o.row[0] == "alpha_beta" and min(o.row[1]) < 0) or (o.row[0] == "dkd" and not o.soft_weight):
            return  # one is as wrong as the other; figures ask for labels that the loss doesn't
        p = Problem(p.z.double(), p.each(Tensor.double), p.labels, o, None)
        if o.student_noise is None and p.z.shape[-1] > 2:
            p.z[..., [0, -1]] = p.z.amax(-1, keepdim=True) + 1
        labels, o = fitting(p.z, p.labels, o)
        whole, expected = kd.kd_loss_with_stats(
            *arguments(p.z, p.v, labels, o), backend="reference", **keywords(o)
        )
        if o.binary and labels is not None:
            labels = mine(labels, cuts)
        given = arguments(mine(p.z, cuts), p.each(lambda v: mine(v, cuts)), labels, o)
        loss, stats = kd.kd_loss_with_stats(*given, vocab_parallel=kd.VocabParallel(), **keywords(o))
        for name, x in [("loss", loss), *vars(stats).items()]:
            y = whole if name == "loss" else getattr(expected, name)
            ok = torch.isclose(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)
            assert ok.all(), f"{name}: {x}, of whole rows {y}"

    recorded(test)


# Stored teachers


@case
def stored_teachers() -> None:
    """kd.TopK and kd.Sampled, the same on every process, with class numbers of the whole vocabulary."""
    vocab, k = 37, 6
    for i, cuts in enumerate(([3, 20], [0, 37], None)):
        vp = kd.VocabParallel()
        g = torch.Generator().manual_seed(i)
        z, v = (3 * torch.randn(2, 4, vocab, generator=g, dtype=torch.float64) for _ in range(2))
        labels = torch.randint(vocab, (2, 4), generator=g).masked_fill(
            torch.rand(2, 4, generator=g) < 0.3, -100
        )
        lp = v.log_softmax(-1)
        log_probs, ids = lp.topk(k)
        ids[0, 0, 3:], ids[1, 1, :] = -1, -1  # padding, and a row of nothing else
        drawn = torch.multinomial(lp[0].exp(), 9, True, generator=g)[None].repeat(2, 1, 1)
        weights = torch.full(drawn.shape, 1 / 9, dtype=torch.float64)
        lse = {2.0: (lp / 2).logsumexp(-1)}
        teachers: list[Any] = [
            kd.TopK(ids, log_probs, tail, lse) for tail in ("ghost", "zero", "renormalize")
        ]
        teachers += [
            kd.Sampled(drawn, weights),
            kd.Sampled(drawn, weights, lp.gather(-1, drawn[:1].repeat(2, 1, 1))),
        ]
        hidden = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
        head = torch.randn(vocab, 5, generator=g, dtype=torch.float64)
        for teacher in teachers:
            sampled = isinstance(teacher, kd.Sampled)
            for divergence in (
                ("forward_kl", "soft_cross_entropy") if sampled else ("forward_kl", "tvd", kd.JSD(0.3))
            ):
                for T in (1.0,) if sampled else (1.0, 2.0):
                    noise = kd.LogitNoise(0.5, seed=3)
                    options = {"divergence": divergence, "temperature": T, "student_noise": noise}
                    options["hard_weight"] = 0.4
                    compare(z, teacher, labels, cuts, vp, **options)
                    compare(kd.Head(hidden, head), teacher, labels, cuts, vp, **options)


def compare(
    student: Any, teacher: Any, labels: Tensor, cuts: list[int] | None, vp: Any, **options: Any
) -> None:
    """Loss, figures and every gradient of the sharded call against those of the whole one, in float64."""
    whole_parts, whole = leaves(student)
    expected, figures = kd.kd_loss_with_stats(whole, teacher, labels, backend="reference", **options)
    wanted = torch.autograd.grad(expected.sum(), whole_parts)
    parts, sharded = leaves(shard_of(student, cuts))
    loss, stats = kd.kd_loss_with_stats(
        sharded, shard_of(teacher, cuts), labels, vocab_parallel=vp, **options
    )
    got = list(torch.autograd.grad(loss.sum(), parts))
    same(loss.detach())
    close = {"rtol": 1e-9, "atol": 1e-11, "equal_nan": True}
    torch.testing.assert_close(loss, expected, **close)
    for name, x in vars(stats).items():
        torch.testing.assert_close(x, getattr(figures, name), msg=lambda m, n=name: f"{n}: {m}", **close)
    if isinstance(student, kd.Head):
        same(got[0])
        got[1:] = [gathered(x, 0) for x in got[1:]]
    else:
        got = [gathered(got[0])]
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, **close)


def leaves(source: Any) -> tuple[list[Tensor], Any]:
    """What of a student gets a gradient, and the student made of it."""
    if isinstance(source, kd.Head):
        parts = [
            x.detach().clone().requires_grad_()
            for x in (source.hidden, source.weight, source.bias)
            if x is not None
        ]
        return parts, kd.Head(*parts, *[None] * (3 - len(parts)), source.scale, source.softcap)
    z = source.detach().clone().requires_grad_()
    return [z], z


def shard_of(source: Any, cuts: list[int] | None) -> Any:
    """This process's part of any source."""
    if isinstance(source, kd.Head):
        bias = None if source.bias is None else mine(source.bias, cuts)
        return kd.Head(source.hidden, mine(source.weight, cuts, 0), bias, source.scale, source.softcap)
    if isinstance(source, kd.Mixture):
        return kd.Mixture([shard_of(t, cuts) for t in source.teachers], source.weights)
    return mine(source, cuts) if isinstance(source, Tensor) else source


# Heads


@case
def heads() -> None:
    """As student, teacher, both and in a mixture, in one chunk and in several of every kind of gradient."""
    vocab = 41
    for i, cuts in enumerate((None, [5, 30], [41, 41])):
        vp = kd.VocabParallel()
        g = torch.Generator().manual_seed(i)

        def random(*shape: int, g: Any = g) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        student = kd.Head(random(3, 90, 4), random(vocab, 4), random(vocab), softcap=20.0)
        other = kd.Head(random(3, 90, 6), random(vocab, 6), None, scale=0.5)
        z, v = random(3, 90, vocab), random(3, 90, vocab)
        labels = torch.randint(vocab, (3, 90), generator=g).masked_fill(
            torch.rand(3, 90, generator=g) < 0.3, -100
        )
        for one, two in (
            (student, other),
            (student, v),
            (z, other),
            (student, kd.Mixture([other, v], [1.0, 2.0])),
        ):
            for divergence, reduction in (("forward_kl", "mean"), (kd.DKD(), "none"), (kd.JSD(0.3), "sum")):
                options = {
                    "divergence": divergence,
                    "reduction": reduction,
                    "temperature": 2.0,
                    "hard_weight": 0.4,
                }
                compare(one, two, labels, cuts, vp, **options)
        compare(student, other, labels, cuts, vp, memory_budget="100KiB", hard_weight=0.4)
        mask, noise = labels != -100, kd.LogitNoise(0.3, "multiplicative", probability=0.5, seed=7)
        compare(
            student,
            other,
            labels,
            cuts,
            vp,
            mask=mask,
            teacher_noise=noise,
            student_noise=noise,
            hard_weight=0.4,
        )


@case
def hidden_states_are_rounded_once() -> None:
    """Parts of their gradient are added up before they are rounded; or left as parts for the layer below."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 16, generator=g), torch.randn(512, 16, generator=g)
    v = torch.randn(64, 512, generator=g)
    exact = hidden.bfloat16().double().requires_grad_()
    kd.kd_loss(kd.Head(exact, weight.bfloat16().double()), v.double(), backend="reference").backward()

    def error(loss_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        x = hidden.bfloat16().requires_grad_()
        loss_of(x).backward()
        return (x.grad.double() - exact.grad).norm().item(), x.grad

    whole, _ = error(lambda x: kd.kd_loss(kd.Head(x, weight.bfloat16()), v))
    mine_, mine_v = mine(weight, None, 0).bfloat16(), mine(v)
    ours, _ = error(lambda x: kd.kd_loss(kd.Head(x, mine_), mine_v, vocab_parallel=kd.VocabParallel()))
    assert ours <= 1.1 * whole, (ours, whole)
    parts = kd.VocabParallel(reduce_hidden_grad=False)
    _, part = error(lambda x: kd.kd_loss(kd.Head(x, mine_), mine_v, vocab_parallel=parts))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, part.float())
    torch.testing.assert_close(
        sum(every).double(), exact.grad, rtol=0.05, atol=0.02 * float(exact.grad.abs().max())
    )
    assert not torch.equal(every[0], every[1])


# What is sent


def names(calls: list[Any]) -> list[str]:
    """Of what kinds they are."""
    return [x.kind for x in calls]


def total(calls: list[Any]) -> int:
    """Bytes of all."""
    return sum(x.bytes for x in calls)


@case
def collectives_are_those_of_the_documentation() -> None:
    """Three all-reduces forward, none backward, at most 64 bytes a row; what else there is, by name."""
    rows, vocab, vp = 16, 40, kd.VocabParallel()
    z, v, labels = torch.randn(rows, vocab), torch.randn(rows, vocab), torch.randint(vocab, (rows,))

    def sent(student: Any, teacher: Any, **options: Any) -> tuple[list[Any], list[Any]]:
        parts, student = leaves(student)
        with_stats = options.pop("stats", False)
        with counted() as forward:
            if with_stats:
                loss, _ = kd.kd_loss_with_stats(student, teacher, labels, vocab_parallel=vp, **options)
            else:
                loss = kd.kd_loss(student, teacher, labels, vocab_parallel=vp, **options)
        with counted() as backward:
            loss.sum().backward()
        assert all(x.grad is not None for x in parts)
        return forward, backward

    sent(mine(z), mine(v), hard_weight=0.5)  # shards of a new size are told of once
    softmax: list[Any] = [
        "forward_kl", "reverse_kl", "tvd", "squared_error", kd.JSD(), kd.SkewKL(), kd.SkewReverseKL(),
        kd.AlphaBeta(0.2, 0.7), kd.DKD(), "soft_cross_entropy",
    ]  # fmt: skip
    for divergence in softmax:
        for T in (1.0, 2.0):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                forward, backward = sent(
                    mine(z).to(dtype),
                    mine(v).to(dtype),
                    divergence=divergence,
                    temperature=T,
                    hard_weight=0.5,
                )
                count = 2 if TABLE[Options(divergence).row[0]].closed else 3
                assert names(forward) == ["all_reduce"] * count, (divergence, forward)
                assert total(forward) <= 64 * rows, (divergence, forward)
                assert not backward, (divergence, dtype)
    forward, _ = sent(mine(z), mine(v), hard_weight=0.0)
    assert total(forward) == 20 * rows, forward  # two maxima, two sums and the cross sum
    forward, _ = sent(mine(z), mine(v), hard_weight=0.0, backend="reference")
    assert total(forward) == 24 * rows, forward  # two maxima, two sums, phi and g
    forward, _ = sent(mine(z), mine(v), divergence=kd.LogitMSE(), hard_weight=0.0)
    assert total(forward) == 4 * rows and len(forward) == 1
    forward, _ = sent(mine(z), mine(v), divergence=kd.LogitMSE(centered=True), hard_weight=0.0)
    assert total(forward) == 16 * rows and len(forward) == 2
    forward, _ = sent(mine(z), mine(v), hard_weight=0.5, stats=True)
    assert names(forward) == ["all_reduce"] * 3 + ["all_gather"]
    forward, backward = sent(mine(z), mine(v), hard_weight=0.5, student_noise=kd.LogitNoise(0.1))
    assert forward[0] == ("broadcast", 8) and names(forward[1:]) == ["all_reduce"] * 3
    log_probs, ids = v.log_softmax(-1).topk(8)
    forward, backward = sent(mine(z), kd.TopK(ids, log_probs), hard_weight=0.5)
    assert names(forward) == ["all_reduce"] * 3 and total(forward) <= 64 * rows and not backward
    hidden, weight, t_hidden, t_weight = (
        torch.randn(*s) for s in ((rows, 4), (vocab, 4), (rows, 6), (vocab, 6))
    )
    teacher = kd.Head(t_hidden, mine(t_weight, None, 0))
    forward, backward = sent(kd.Head(hidden, mine(weight, None, 0)), teacher, hard_weight=0.5)
    assert names(forward) == ["all_reduce"] * 3 and forward[-1].bytes == rows * 4 * 4 and not backward


@case
def traffic_is_what_the_formulas_say() -> None:
    """Those of every divergence, with and without labels, of mixtures, heads and stored teachers."""
    rows, vocab, vp, world = 12, 40, kd.VocabParallel(), dist.get_world_size()
    z, labels = torch.randn(rows, vocab), torch.randint(vocab, (rows,))
    teachers = [torch.randn(rows, vocab) for _ in range(3)]
    log_probs, ids = teachers[0].log_softmax(-1).topk(8)
    halves = {2.0: (teachers[0].log_softmax(-1) / 2).logsumexp(-1)}

    def sent(student: Any, teacher: Any, y: Tensor | None, **options: Any) -> list[Any]:
        _, student = leaves(student)
        weight = None if y is None else 0.5
        with counted() as calls:
            kd.kd_loss(student, teacher, y, hard_weight=weight, vocab_parallel=vp, **options).backward()
        return calls

    sent(mine(z), mine(teachers[0]), None)
    for name in DIVERGENCES:
        o = Options(name)
        divergence = kd.JSD(name) if isinstance(name, float) else name
        for y, T in ((None, 2.0), (labels, 1.0), (labels, 2.0)):
            if o.row[0] == "dkd" and y is None:
                continue
            given = {"divergence": divergence, "temperature": T}
            y_mine = mine(torch.rand(rows, vocab)) if o.binary and y is not None else y
            logit_mse = o.row[0].endswith("logit_mse")
            for count in (1, 3) if not logit_mse else (1,):
                teacher = kd.Mixture([mine(v) for v in teachers]) if count > 1 else mine(teachers[0])
                for backend in ("reference", None):
                    numbers = scale.row_numbers(
                        divergence, labels=y is not None, temperature=T, teachers=count, fused=backend is None
                    )
                    calls = sent(mine(z), teacher, y_mine, backend=backend, **given)
                    assert calls == [("all_reduce", 4 * n * rows) for n in numbers if n], (
                        name,
                        T,
                        count,
                        calls,
                    )
            if not (logit_mse or o.binary or o.row[0] == "dkd"):
                numbers = scale.row_numbers(divergence, labels=y is not None, temperature=T, stored=True)
                calls = sent(mine(z), kd.TopK(ids, log_probs, lse=halves), y_mine, **given)
                assert calls == [("all_reduce", 4 * n * rows) for n in numbers], (name, T, calls)
    run = scale.Run(
        300,
        vocab,
        scale.Model(0, 8),
        scale.Model(0, 16),
        tensor=world,
        temperature=2.0,
        rows_at_once=256,
        fused=True,
    )
    hidden, t_hidden, weight, t_weight = (
        torch.randn(*s) for s in ((300, 8), (300, 16), (vocab, 8), (vocab, 16))
    )
    student, teacher = kd.Head(hidden, mine(weight, None, 0)), kd.Head(t_hidden, mine(t_weight, None, 0))
    y = torch.randint(vocab, (300,))
    options: dict[str, Any] = {"hard_weight": 0.5, "vocab_parallel": vp}

    def plan_of(budget: int) -> Any:
        return kd.explain(student, teacher, y, memory_budget=budget, **options).plan

    budget = next(n for n in range(10_000, 1_000_000, 500) if plan_of(n).rows >= 192)
    plan = plan_of(budget)
    run = dataclasses.replace(run, rows_at_once=plan.rows)
    assert plan.chunks > 1 and run.chunk == plan.rows
    calls = sent(student, teacher, y, temperature=2.0, memory_budget=budget)
    expected, of_hidden = scale.of_loss(run)
    assert len(calls) - 1 == expected.calls > 4, (calls, expected)
    assert sum(size for _, size in calls[:-1]) == expected.given
    assert calls[-1] == ("all_reduce", of_hidden.given)


class Layers(torch.nn.Module):
    """A model without a bias: an embedding, blocks, a head."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(60, width)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.head = torch.nn.Linear(width, 60, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


@case
def weights_are_gathered_as_the_formulas_say() -> None:
    """A student and a frozen teacher under FSDP, and replicas, whose gradients are added up by DDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    world, ids = dist.get_world_size(), torch.arange(12).view(2, 6)
    mesh = init_device_mesh("cpu", (world,))
    student, teacher = Layers(12, 3), Layers(24, 2).requires_grad_(False)

    def model_of(layers: Layers) -> scale.Model:
        kept = layers.embedding.weight.numel() + layers.head.weight.numel()
        return scale.Model(sum(p.numel() for p in layers.parameters()), layers.head.in_features, kept, 4)

    run = scale.Run(12, 60, model_of(student), model_of(teacher), shards=world)
    for layers in (student, teacher):
        for part in (*layers.blocks, layers):
            fully_shard(part, mesh=mesh)
    with counted() as calls:
        with torch.no_grad():
            v = teacher(ids)
        kd.kd_loss(student(ids), v).backward()
    given: dict[str, float] = {}
    for expected in scale.of_weights(run):
        given[expected.collective] = given.get(expected.collective, 0) + expected.given
    for kind, size in given.items():
        assert sum(x.bytes for x in calls if x.kind == kind) == size, (kind, size, calls)
    alone, summed = Layers(12, 3), 0

    def hook(_: Any, bucket: Any) -> Any:
        nonlocal summed
        summed += bucket.buffer().nbytes
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda found: found.value()[0])

    # DDP looks at the annotations, which here are strings.
    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
    replicas = DistributedDataParallel(alone)
    replicas.register_comm_hook(None, hook)
    kd.kd_loss(replicas(ids), v.detach()).backward()
    (expected,) = (
        x
        for x in scale.of_weights(dataclasses.replace(run, shards=1, data=world))
        if x.collective == "all_reduce"
    )
    assert summed == expected.given


# The rest of the interface


@case
def compiled() -> None:
    """One operator of a whole graph, which numbers that change don't make anew; heads, and float16, too."""
    vocab, vp, compilations = 40, kd.VocabParallel(), 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    for dtype in (torch.float32, torch.float16):
        z, v, labels = (
            torch.randn(8, vocab).to(dtype),
            torch.randn(8, vocab).to(dtype),
            torch.randint(vocab, (8,)),
        )
        torch._dynamo.reset()
        compilations = 0

        def loss_of(z: Tensor, v: Tensor, T: float) -> Tensor:
            return kd.kd_loss(z, v, labels, temperature=T, hard_weight=0.5, vocab_parallel=vp)  # noqa: B023

        step = torch.compile(loss_of, backend=count, fullgraph=True)
        for T in (1.0, 2.0, 3.0, 4.5):
            x, y = (mine(z).clone().requires_grad_() for _ in range(2))
            step(x, mine(v), T).backward()
            loss_of(y, mine(v), T).backward()
            assert torch.equal(x.grad, y.grad)
        assert compilations <= 2, compilations
    hidden, weight = torch.randn(8, 4), torch.randn(vocab, 4)

    def of_heads(x: Tensor, w: Tensor) -> Tensor:
        noise = kd.LogitNoise(0.1, seed=3)
        return kd.kd_loss(kd.Head(x, w), mine(v).float(), student_noise=noise, vocab_parallel=vp)

    found = []
    for function in (torch.compile(of_heads, backend="aot_eager", fullgraph=True), of_heads):
        x, w = hidden.clone().requires_grad_(), mine(weight, None, 0).clone().requires_grad_()
        function(x, w).backward()
        found.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@case
def compiled_of_any_kind() -> None:
    """Noise without a seed, stats, stored teachers, mixtures and DTensors: as eager, in one graph."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    vp, mesh = kd.VocabParallel(), init_device_mesh("cpu", (dist.get_world_size(),))
    z, v, labels = torch.randn(6, 41), torch.randn(6, 41), torch.randint(41, (6,))
    log_probs, ids = v.log_softmax(-1).topk(5)
    noise = kd.LogitNoise(0.3)
    v_mine, v_sharded = shard_like_dtensors(v), distribute_tensor(v, mesh, [Shard(1)])
    calls: dict[str, Callable[[Any], Tensor]] = {
        "noise": lambda z: kd.kd_loss(z, v_mine, student_noise=noise, vocab_parallel=vp),
        "stats": lambda z: kd.kd_loss_with_stats(z, v_mine, labels, hard_weight=0.1, vocab_parallel=vp)[0],
        "stored": lambda z: kd.kd_loss(z, kd.TopK(ids, log_probs), vocab_parallel=vp),
        "mixture": lambda z: kd.kd_loss(z, kd.Mixture([v_mine, v_mine + 1]), vocab_parallel=vp),
        "dtensors": lambda z: kd.kd_loss(z, v_sharded, labels, hard_weight=0.1),
    }
    for name, call in calls.items():
        found = []
        torch._dynamo.reset()
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(5)
            leaf = distribute_tensor(z, mesh, [Shard(1)]) if name == "dtensors" else shard_like_dtensors(z)
            leaf = leaf.detach().clone().requires_grad_()
            loss = function(leaf)
            loss.backward()
            grad = leaf.grad.to_local() if name == "dtensors" else leaf.grad
            found.append((loss.detach(), grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), name


def shard_like_dtensors(x: Tensor) -> Tensor:
    """This process's classes, as torch.chunk gives them."""
    return x.chunk(dist.get_world_size(), -1)[dist.get_rank()].clone()


@case
def noise_without_a_seed_is_the_same_everywhere() -> None:
    """The first process's; in backward again, where float16 has to have it twice."""
    z, v = torch.randn(6, 40), torch.randn(6, 40)
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(11)
        seed = torch.randint(1 << 62, (), dtype=torch.int64)
        noise, seeded = kd.LogitNoise(0.5), kd.LogitNoise(0.5, seed=int(seed))
        expected = z.to(dtype).detach().clone().requires_grad_()
        kd.kd_loss(expected, v.to(dtype), student_noise=seeded, teacher_noise=seeded).backward()
        torch.manual_seed(11 + dist.get_rank())
        x = mine(z).to(dtype).clone().requires_grad_()
        options = {"student_noise": noise, "teacher_noise": noise, "vocab_parallel": kd.VocabParallel()}
        loss = kd.kd_loss(x, mine(v).to(dtype), **options)
        same(loss.detach())
        loss.backward()
        torch.testing.assert_close(gathered(x.grad), expected.grad, rtol=2e-3, atol=1e-5)


@case
def a_group_within_the_world() -> None:
    """A part of the processes, and meshes."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    z, v = torch.randn(6, 40), torch.randn(6, 40)
    x, y = (z.clone().requires_grad_() for _ in range(2))
    kd.kd_loss(x, v, vocab_parallel=kd.VocabParallel(own)).backward()
    kd.kd_loss(y, v, backend="reference").backward()
    torch.testing.assert_close(x.grad, y.grad)
    refused(ValueError, "this process is in", lambda: kd.VocabParallel(groups[dist.get_rank() - 1]))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    assert kd.VocabParallel(mesh).size == dist.get_world_size()
    two = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp")
    )
    refused(ValueError, "one dimension", lambda: kd.VocabParallel(two))
    loss = kd.kd_loss(mine(z), mine(v), vocab_parallel=kd.VocabParallel(two["tp"]))
    torch.testing.assert_close(loss, kd.kd_loss(z, v, backend="reference"))


def refused(kind: type[Exception], part: str, call: Callable[[], Any]) -> None:
    """That the call raises this, with these words in its message."""
    try:
        call()
    except kind as error:
        assert part in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {part}")


@case
def dtensors() -> None:
    """Sharded over their classes they are recognised; any other placement is refused with what to do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    z, v, labels = torch.randn(3, 4, 41), torch.randn(3, 4, 41), torch.randint(41, (3, 4))
    expected = z.clone().requires_grad_()
    kd.kd_loss(expected, v, labels, hard_weight=0.5, backend="reference").backward()
    leaf = distribute_tensor(z, mesh, [Shard(2)]).requires_grad_()
    loss = kd.kd_loss(leaf, distribute_tensor(v, mesh, [Shard(2)]), labels, hard_weight=0.5)
    assert not isinstance(loss, DTensor)
    loss.backward()
    assert isinstance(leaf.grad, DTensor)
    torch.testing.assert_close(leaf.grad.full_tensor(), expected.grad)
    hidden, weight = torch.randn(3, 4, 5), torch.randn(41, 5)
    parts, head = leaves(kd.Head(hidden, weight))
    kd.kd_loss(head, v, labels, hard_weight=0.5, backend="reference").backward()
    w = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    x = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    given = kd.Logits(distribute_tensor(v, mesh, [Shard(2)])), distribute_tensor(labels, mesh, [Replicate()])
    kd.kd_loss(kd.Head(x, w), *given, hard_weight=0.5).backward()
    torch.testing.assert_close(w.grad.full_tensor(), parts[1].grad)
    torch.testing.assert_close(x.grad.full_tensor(), parts[0].grad)
    rows = distribute_tensor(z, mesh, [Shard(0)])
    refused(ValueError, "redistribute it to Shard(2)", lambda: kd.kd_loss(rows, rows))
    whole = distribute_tensor(z, mesh, [Replicate()])
    refused(ValueError, "got placements", lambda: kd.kd_loss(whole, v))
    sharded = distribute_tensor(labels, mesh, [Shard(0)])
    refused(
        ValueError, "labels must be whole", lambda: kd.kd_loss(leaf, leaf.detach(), sharded, hard_weight=0.1)
    )
    alone = kd.VocabParallel([dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()])
    refused(ValueError, "leave it out", lambda: kd.kd_loss(leaf, leaf.detach(), vocab_parallel=alone))


@case
def what_is_refused() -> None:
    """On every process alike, so that none waits for another."""
    vp, rank, world = kd.VocabParallel(), dist.get_rank(), dist.get_world_size()
    z, v = torch.randn(4, 7), torch.randn(4, 7 + (rank == 0))
    refused(ValueError, "got 7 and 8 on process 0", lambda: kd.kd_loss(z, v, vocab_parallel=vp))
    wide = torch.randn(4, 9)
    refused(ValueError, "got none", lambda: kd.kd_loss(wide[:, :0], wide[:, :0], vocab_parallel=vp))
    z = torch.randn(4, 7, requires_grad=True)
    v, labels = torch.randn(4, 7), torch.tensor([0, 1, 2, 7 * world])
    refused(
        ValueError, f"[0, {7 * world})", lambda: kd.kd_loss(z, v, labels, hard_weight=1.0, vocab_parallel=vp)
    )
    head = kd.Head(torch.randn(4, 3), torch.randn(7, 3))
    options = {"hard_weight": 1.0, "vocab_parallel": vp}
    refused(ValueError, "at row 3 of 4", lambda: kd.kd_loss(head, v, labels, **options))
    refused(ValueError, "of its own", lambda: kd.kd_loss(wide, wide, vocab_parallel=vp))
    refused(ValueError, "pad_vocab", lambda: kd.kd_loss(z, v, pad_vocab=True, vocab_parallel=vp))
    refused(RuntimeError, "whole rows", lambda: kd.kd_loss(z, v, backend="cuda", vocab_parallel=vp))
    noise = {"student_noise": kd.LogitNoise(0.1), "vocab_parallel": vp}
    refused(RuntimeError, "no mixtures, noise", lambda: kd.kd_loss(z, v, backend="cpu", **noise))
    refused(ValueError, "backend must be", lambda: kd.kd_loss(z, v, backend="no", vocab_parallel=vp))
    refused(TypeError, "kd.VocabParallel", lambda: kd.kd_loss(z, v, vocab_parallel=dist.group.WORLD))
    refused(TypeError, "got int", lambda: kd.VocabParallel(3))
    refused(TypeError, "reduce_hidden_grad", lambda: kd.VocabParallel(reduce_hidden_grad=1))
    loss = kd.kd_loss(z, v, vocab_parallel=vp)
    refused(RuntimeError, "without vocab_parallel", lambda: torch.autograd.grad(loss, z, create_graph=True))
    far = kd.TopK(torch.full((4, 1), 7 * world), torch.zeros(4, 1))
    refused(ValueError, f"[0, {7 * world})", lambda: kd.kd_loss(z, far, vocab_parallel=vp))
    refused(ValueError, "V >= 1", lambda: kd.kd_loss(wide[:, :0], wide[:, :0]))
    refused(TypeError, "vocab_parallel must be", lambda: kd.KDLoss(vocab_parallel=3))


@case
def what_is_explained_and_kept() -> None:
    """`explain` says what runs; logits may die once the loss is there; no rows, no counted rows."""
    vp = kd.VocabParallel()
    told = kd.explain(torch.randn(4, 7), torch.randn(4, 7), vocab_parallel=vp)
    assert told.backend == "cpu" and "whole rows" in str(told.reasons["cuda"])
    told = kd.explain(torch.randn(4, 7), torch.randn(4, 7), divergence=kd.LogitMSE(), vocab_parallel=vp)
    assert told.backend == "reference" and "two softmaxes" in str(told.reasons["cpu"])
    head = kd.Head(torch.randn(300, 3), torch.randn(7 + dist.get_rank(), 3))
    teacher = torch.randn(300, 7 + dist.get_rank())
    plan = kd.explain(head, teacher, vocab_parallel=kd.VocabParallel(), memory_budget="8KiB").plan
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, tuple(plan or ()))
    assert plan is not None and plan.chunks > 1 and len(set(every)) == 1
    leaf = torch.randn(4, 7, requires_grad=True)
    z, v = leaf * 1, torch.randn(4, 7)
    dead = weakref.ref(z), weakref.ref(v)
    loss = kd.kd_loss(z, v, vocab_parallel=vp)
    del z, v
    assert all(x() is None for x in dead)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * first)
    empty = torch.randn(0, 7, requires_grad=True)
    kd.kd_loss(empty, torch.randn(0, 7), vocab_parallel=vp).backward()
    assert empty.grad.shape == (0, 7)
    nan = torch.full((3, 7), torch.nan, requires_grad=True)
    loss = kd.kd_loss(nan, torch.randn(3, 7), mask=torch.zeros(3, dtype=torch.bool), vocab_parallel=vp)
    loss.backward()
    assert loss == 0 and (nan.grad == 0).all()
    module = kd.KDLoss(vocab_parallel=vp, temperature=2.0)
    z, v = torch.randn(4, 7), torch.randn(4, 7)
    assert torch.equal(module(z, v), kd.kd_loss(z, v, temperature=2.0, vocab_parallel=vp))
    computed = computing_dtype(torch.float64)
    assert kd.kd_loss(z.double(), v.double(), vocab_parallel=vp).dtype == computed


@case
def groups_of_a_later_world() -> None:
    """What was known of a group isn't taken for another one of its name, with other ranks; the last case."""
    z, v, labels = torch.randn(4, 40), torch.randn(4, 40), torch.arange(4) * 11
    expected = kd.kd_loss(z, v, labels, hard_weight=1.0, backend="reference")

    def check() -> None:
        options = {"hard_weight": 1.0, "vocab_parallel": kd.VocabParallel()}
        torch.testing.assert_close(kd.kd_loss(mine(z), mine(v), labels, **options), expected)

    check()
    dist.barrier()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    start(world - 1 - rank, world, f"{STORES[-1]}+")
    check()
