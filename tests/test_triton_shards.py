"""The Triton kernels of rows whose classes are shared out: their sums and gradients, reads, waits and builds.

Processes are threads here, which wait for each other at every exchange; that ones of their own do the same is
seen at the end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import parallel_triton
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DEVICES
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import Problem, problems
from test_properties import once_rounded
from test_triton import CHOICES, Counter, built, fits, needs_interpreter, needs_triton
from tolerances import arguments, assert_within_budget, fitting, keywords
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import kdkernels as kd
from benchmarks import builds
from kdkernels import reference
from kdkernels.autograd import what_to_keep
from kdkernels.backends.triton_ import BACKEND
from kdkernels.divergences import TABLE, Divergence
from kdkernels.functional import checked_call, complete
from kdkernels.fused_shards import FusedPhases
from kdkernels.shards import Exchange, Shard
from kdkernels.spec import SHARD_NUMBERS, Call, without_phases

on_triton = pytest.mark.parametrize("backend", ["triton", "streaming"], indirect=True)
SOFTMAX = [name for name, row in TABLE.items() if row.normaliser == "softmax"]
PATHS = ("forward_kl", "reverse_kl", "jsd", "dkd")  # all that the phases have
ALONE = Exchange(lambda x: x, lambda x: x, lambda x: [x])  # of a process that has all classes


def call_of(z: Any, v: Any, labels: Tensor | None = None, **options: Any) -> Call:
    return checked_call(z, v, labels, complete(options), stats=False)


# Shards by hand


class Processes:
    """What passes between threads, each of which stands for a process."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)
        self.given: list[Any] = [None] * count

    def exchange(self, rank: int) -> Exchange:
        def every(x: Tensor) -> list[Tensor]:
            self.given[rank] = x
            self.barrier.wait()
            found = list(self.given)
            self.barrier.wait()
            return found

        return Exchange(
            lambda x: torch.stack(every(x)).amax(0), lambda x: torch.stack(every(x)).sum(0), every
        )


def shards_of(call: Call, bounds: list[int]) -> list[Call]:
    """Each process's part of a call."""
    return [
        call._replace(
            student=call.student[..., a:b], teachers=tuple(v[..., a:b] for v in call.teachers), classes=b - a
        )
        for a, b in pairwise(bounds)
    ]


def in_shards(call: Call, bounds: list[int], upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss, which all have, and the gradient put together; upstream as autograd has it for the dtype."""
    group, shards = Processes(len(bounds) - 1), shards_of(call, bounds)
    keep = what_to_keep(call.student.dtype)

    def process(rank: int) -> tuple[Tensor, Tensor]:
        try:
            # The interpreter is numpy, whose state is a thread's; so is whether gradients are wanted.
            with torch.no_grad(), np.errstate(all="ignore"):
                mine = shards[rank]
                shard = Shard(bounds[rank], bounds[-1])
                phases = FusedPhases(mine, shard, group.exchange(rank), BACKEND)
                numbers = phases.run()
                loss, _ = phases.loss(numbers)
                out = torch.empty(mine.student.shape, dtype=mine.student.dtype, device=mine.student.device)
                if keep == "state":
                    numbers = phases.unpack(phases.pack(numbers))
                    up = torch.ones_like(loss) if upstream is None else upstream
                    return loss, phases.gradient(numbers, up, out)
                out = phases.gradient(numbers, None, out)
                return loss, out if upstream is None else BACKEND.scale(out, upstream, False)
        except BaseException:
            group.barrier.abort()
            raise

    with ThreadPoolExecutor(len(shards)) as pool:
        found = [task.result() for task in [pool.submit(process, rank) for rank in range(len(shards))]]
    losses, parts = zip(*found, strict=True)
    assert all(torch.equal(x.nan_to_num(), losses[0].nan_to_num()) for x in losses)
    return losses[0], torch.cat(parts, -1)


def bounds_of(vocab: int, cuts: list[int]) -> list[int]:
    return [0, *sorted(c % (vocab + 1) for c in cuts), vocab]


@on_triton
@given(problems(), st.lists(st.integers(0, 5000), min_size=1, max_size=2))
def test_any_problem_is_within_the_budget(backend: str, p: Problem, cuts: list[int]) -> None:
    """Every option that the phases take, in two and three ragged shards, some with no class at all."""
    k = p.classes
    z, v = p.z[..., :k], p.teachers[0][..., :k]
    o = p.o.but(pad_vocab=False, student_noise=None, teacher_noise=None, weights=None)
    labels, fitted = fitting(z, p.labels, o)
    call = call_of(*arguments(z, v, labels, fitted), **keywords(fitted))
    assume(without_phases(call) is None)
    loss, grad = in_shards(call, bounds_of(k, cuts), p.upstream)
    if not once_rounded(dataclasses.replace(p, z=z, v=v)):
        loss, grad = in_shards(call, bounds_of(k, cuts))
        assert_within_budget((loss, grad), z, v, p.labels, o)
    else:
        assert_within_budget((loss, grad), z, v, p.labels, o, p.upstream)


@pytest.mark.thorough(but=lambda backend, divergence: backend == "triton" or divergence in PATHS)
@on_triton
@pytest.mark.parametrize("divergence", SOFTMAX)
def test_sums_of_shards_are_those_of_whole_rows(backend: str, divergence: str) -> None:
    """Each shard's sums as they come, put together by hand; the target's logits are one shard's."""
    T, vocab, rows = 2.0, 41, 5
    z, v = (3 * torch.randn(rows, vocab, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 12, 13, 40, 25])
    call = call_of(
        z, v, labels, divergence=CHOICES.get(divergence, divergence), temperature=T, hard_weight=0.5
    )
    bounds, row = [0, 13, 13, 29, vocab], TABLE[divergence]
    others = torch.arange(vocab, device=z.device) != labels[:, None] if row.target else torch.tensor(True)
    y, u = (torch.where(others, x / T, -math.inf) for x in (z, v))
    found = []
    for first, part in zip(bounds, shards_of(call, bounds), strict=False):
        at = labels - first
        away = (at < 0) | (at >= part.classes)
        own = part._replace(
            labels=torch.where(away, part.classes, at), spec=dataclasses.replace(call.spec, ignore_index=-1)
        )
        numbers = BACKEND.shard_sums(own)
        assert numbers.shape == (rows, len(SHARD_NUMBERS)) and numbers.dtype == torch.float64
        s = dict(zip(SHARD_NUMBERS, numbers.unbind(-1), strict=True))
        mine = torch.where(away, 0.0, z.gather(1, labels[:, None]).squeeze(1))
        torch.testing.assert_close(s["z_target"], mine, rtol=0, atol=0)
        found.append(s)

    def together(name: str) -> Tensor:
        return torch.logsumexp(torch.stack([s[f"{name}_ref"] + s[f"{name}_sum"].log() for s in found]), 0)

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(together("z"), y.logsumexp(1), **close)
    torch.testing.assert_close(together("v"), u.logsumexp(1), **close)
    torch.testing.assert_close(together("one"), (T * y).logsumexp(1), **close)
    if row.closed is None:
        assert all((s["cross"] == 0).all() for s in found)
        return
    # Σ e^a (A a + B b), of logits as they are, where a side's references are put back.
    A, B = BACKEND.cross(divergence)
    one, other = ("v", "z") if row.closed.teacher_weighs else ("z", "v")
    whole = torch.zeros(rows, dtype=torch.float64)
    for s in found:
        a, b, mass = s[f"{one}_ref"], s[f"{other}_ref"], s[f"{one}_sum"]
        whole += a.exp() * (s["cross"] + mass * (A * a + B * b))
    a, b = (u, y) if row.closed.teacher_weighs else (y, u)
    terms = a.exp() * (A * a + B * b)
    torch.testing.assert_close(whole, torch.where(others, terms, 0.0).sum(1), **close)


@on_triton
@pytest.mark.thorough(
    but=lambda backend, divergence, T: (
        divergence in PATHS if backend == "streaming" else (T == 1.0) == (divergence in PATHS)
    )
)
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_every_divergence_is_what_whole_rows_have(backend: str, divergence: str, T: float) -> None:
    """With labels of every shard, a row without one and one that doesn't count, which may hold anything."""
    z, v = (3 * torch.randn(2, 3, 50, dtype=torch.float64) for _ in range(2))
    labels, mask = torch.tensor([[0, 17, 49], [20, 3, -100]]), torch.ones(2, 3, dtype=torch.bool)
    z[0, 1] = v[0, 1] = math.nan
    mask[0, 1] = False
    mask[1, 2] = not TABLE[divergence].target  # which needs a label
    student, teacher = kd.Logits(z, 0.7, softcap=9.0), kd.Logits(v, scale=1.3)
    options = {
        "divergence": CHOICES.get(divergence, divergence), "temperature": T, "hard_weight": 0.4, "mask": mask,
        "token_weights": torch.rand(2, 3),
    }  # fmt: skip
    loss, grad = in_shards(call_of(student, teacher, labels, **options), [0, 17, 17, 33, 50])
    z.requires_grad_()
    whole = kd.kd_loss(student, teacher, labels, backend="reference", **options)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, z.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.thorough(but=lambda backend, divergence: backend == "triton" or divergence in PATHS)
@on_triton
@pytest.mark.parametrize("divergence", SOFTMAX)
def test_classes_that_nobody_can_produce(backend: str, divergence: str) -> None:
    """−inf on both sides, over whole shards and all but the target: never NaN, and no gradient."""
    z, v = (torch.randn(4, 40, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([5, 14, 25, 39])
    gone = torch.rand(4, 40, device="cpu").to(z.device) < 0.5
    gone[0] = True
    gone[1, 13:] = True
    gone.scatter_(1, labels[:, None], False)
    z[gone] = v[gone] = -math.inf
    options = {"divergence": CHOICES.get(divergence, divergence), "temperature": 2.0, "hard_weight": 0.5}
    if divergence == "alpha_beta":
        options["divergence"] = kd.AlphaBeta(0.2, 0.7)
    loss, grad = in_shards(call_of(z, v, labels, **options), [0, 13, 27, 40])
    z.requires_grad_()
    whole = kd.kd_loss(z, v, labels, backend="reference", **options)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, z.grad, rtol=1e-10, atol=1e-12)
    assert loss.isfinite() and (grad[gone] == 0).all()


@on_triton
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_nan_stays_in_its_row(backend: str, divergence: str) -> None:
    """Of one class of one shard, in the row's gradient on all of them."""
    z, v = torch.randn(2, 3, 40).unbind()
    z[1, 30] = math.nan
    options = {"divergence": divergence, "reduction": "none", "hard_weight": 0.5}
    call = call_of(z, v, torch.tensor([3, 4, 5]), **options)
    loss, grad = in_shards(call, [0, 20, 40])
    assert loss[1].isnan() and grad[1].isnan().all()
    assert loss[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


@on_triton
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "dkd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_label_out_of_range_makes_its_row_nan(
    backend: str, monkeypatch: pytest.MonkeyPatch, divergence: str, dtype: torch.dtype
) -> None:
    """As on a GPU, where looking at labels would wait for it; of which a CPU makes an error."""
    monkeypatch.setattr(reference, "check_labels_here", lambda labels, classes: labels)
    z, v = torch.randn(2, 3, 40).to(dtype).unbind()
    options = {"divergence": divergence, "reduction": "none", "hard_weight": 0.5}
    for bad in (40, -7):
        loss, grad = in_shards(call_of(z, v, torch.tensor([3, bad, 25]), **options), [0, 20, 40])
        assert loss[1].isnan() and grad[1].isnan().all()
        assert loss[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


@on_triton
def test_a_registered_divergence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as a built-in one does, without its closed form."""
    from kdkernels.expressions import g_forward_kl, phi_forward_kl

    monkeypatch.setitem(TABLE, "mine", Divergence("mine", phi_forward_kl, g_forward_kl))
    z, v = torch.randn(2, 3, 50).unbind()
    ours, theirs = (in_shards(call_of(z, v, divergence=name), [0, 11, 50]) for name in ("mine", "forward_kl"))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


# Reads and waits


@needs_interpreter
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("vocab", [1000, 9000])
def test_passes_over_memory(monkeypatch: pytest.MonkeyPatch, divergence: str, vocab: int) -> None:
    """A read of both sides for the sums, one more without a closed form, and one for the gradient with its
    write; a row that doesn't count is not read."""
    z, v = torch.randn(2, 3, vocab).unbind()
    counter = Counter(monkeypatch, z, v)
    labels, mask = torch.tensor([5, 6, 2 * vocab]), torch.tensor([True, False, True])
    options = {"divergence": CHOICES.get(divergence, divergence), "temperature": 2.0, "hard_weight": 0.5}
    call = call_of(z, v, labels, mask=mask, **options)
    call = call._replace(spec=dataclasses.replace(call.spec, ignore_index=-1))
    found, (read, at_label) = BACKEND.shard_sums(call), counter.take()
    # The label of the third row is another process's.
    assert (read, at_label) == (2 * 2 * vocab + (2 if TABLE[divergence].target else 1), 0)
    BACKEND.shard_terms(call, found)
    assert counter.take() == (0 if TABLE[divergence].closed else 2 * 2 * vocab, 0)
    BACKEND.shard_gradient(torch.ones(()), call, found, torch.empty(3, vocab))
    assert counter.take() == (2 * 2 * vocab, 3 * vocab)


@needs_triton
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "dkd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(divergence: str, dtype: torch.dtype) -> None:
    """On tensors that are on a GPU and hold no data, so that looking at them is an error."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU tensors have data")
    from kdkernels.backends import triton_launch

    triton_launch.needs_guard(TABLE["jsd"], (0.5,))  # looks at numbers of its own, once
    with FakeTensorMode(), torch.no_grad():
        z, v = (torch.randn(4, 10, device="cuda", dtype=dtype) for _ in range(2))
        labels = torch.randint(20, (4,), device="cuda")
        options = {"divergence": divergence, "temperature": 2.0, "hard_weight": 0.5}
        call = call_of(z, v, labels, mask=torch.rand(4, device="cuda") > 0.5, **options)
        with builds.recorded() as launches:
            phases = FusedPhases(call, Shard(10, 20), ALONE, BACKEND)
            numbers = phases.run()
            loss, _ = phases.loss(numbers)
            assert loss.device.type == "cuda"
            phases.gradient(numbers, None, torch.empty_like(z))
            phases.gradient(phases.unpack(phases.pack(numbers)), loss, torch.empty_like(z))
        kernels = [launch.kernel.fn.__name__ for launch in launches]
        terms = [] if TABLE[divergence].closed else ["shard_terms_kernel"]
        assert kernels == ["shard_sums_kernel", *terms, "row_kernel", "row_kernel"]
        with pytest.raises(DataDependentOutputException):
            loss.item()  # the test can fail


# Builds


@pytest.mark.thorough(but=lambda target: target in ("sm_90", "gfx942"))
@needs_triton
@pytest.mark.parametrize("target", builds.TARGETS)
def test_builds_for_gpus_that_are_not_here(target: str) -> None:
    """No spills in the kernels of shards, a loop of any without, and rows are read 16 bytes a thread."""
    chosen = "--targets", target, "--options", *builds.SHARDED, "--vocabularies", "32064"
    names = ("forward_kl", "reverse_kl", "jsd", "dkd")
    found = built(*chosen, "--dtypes", "bf16", "--divergences", *names)
    found += built(*chosen, "--dtypes", "fp32", "--divergences", "jsd")
    sums, terms = ([b for b in found if b["kernel"] == f"shard_{kind}_kernel"] for kind in ("sums", "terms"))
    gradients = [b for b in found if b["kernel"] == "row_kernel"]
    assert len(sums) + len(terms) + len(gradients) == len(found)
    assert {b["divergence"] for b in gradients} == {*names} and {b["divergence"] for b in terms} == {"jsd"}
    assert {b["dtype"] for b in sums} == {b["dtype"] for b in terms} == {"bf16", "fp32"}
    for b in found:
        assert fits(b) and b["registers"] <= 128 and b["shared"] <= 48 * 1024, b
    for b in sums + terms:
        at_once = b["block"] // (b["lanes"] * b["warps"]) * builds.DTYPES[b["dtype"]].itemsize // 16
        # Where loops are unrolled there are more.
        assert b["wide_loads"] >= 2 * at_once if target == "gfx942" else b["wide_loads"] == 2 * at_once, b
        assert b["spills"] == 0, b


# Processes


@pytest.fixture
def process(backend: str) -> Iterator[None]:
    """A group of this process alone."""
    kind = "nccl" if DEVICES[backend] == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@on_triton
@pytest.mark.parametrize("divergence", [None, "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_process_that_has_all_classes(
    backend: str, process: None, divergence: str | None, dtype: torch.dtype
) -> None:
    """From kd_loss on, and said by kd.explain: chosen on a GPU, and on a CPU where it is named."""
    z, v = (2 * torch.randn(2, 6, 50)).to(dtype).unbind()
    labels = torch.randint(50, (6,)).masked_fill(torch.arange(6) == 2, -100)
    options = {"divergence": divergence or "forward_kl", "temperature": 2.0, "hard_weight": 0.3}
    vp = kd.VocabParallel()
    told = kd.explain(z, v, labels, vocab_parallel=vp, **options)
    assert told.backend == ("triton" if z.device.type == "cuda" else "cpu")
    assert told.reasons["triton"] is None and "whole rows" in str(told.reasons["cuda"])
    found = []
    for given_options in ({"vocab_parallel": vp}, {}):
        leaf = z.clone().requires_grad_()
        loss = kd.kd_loss(leaf, v, labels, backend="triton", **given_options, **options)
        (64 * loss).backward()
        found.append((loss.detach(), leaf.grad))
    for sharded, whole in zip(*found, strict=True):
        torch.testing.assert_close(sharded, whole)
    for more in ({"divergence": kd.LogitMSE()}, {"student_noise": kd.LogitNoise(0.1)}):
        told = kd.explain(z, v, vocab_parallel=vp, **more)
        assert told.backend == "reference" and "its phases" in str(told.reasons["triton"])


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} processes")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str | None]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(parallel_triton.main, (request.param, str(folder)), nprocs=request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.thorough(but=lambda found: found == 2)
@needs_interpreter
@pytest.mark.parametrize("case", parallel_triton.CASES)
def test_processes_give_what_whole_rows_give(case: str, found: list[dict[str, str | None]]) -> None:
    for rank, failures in enumerate(found):
        assert case in failures, f"process {rank} did not come to it"
        assert failures[case] is None, f"process {rank}: {failures[case]}"
