"""The kernel of stored teachers on a GPU: rows as wide as vocabularies are, held to fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cuda_sparse import DIVERGENCES, DTYPES, TAILS, allowed, check, some_ids, stored_teacher
from torch import Tensor

import kdkernels as kd

pytestmark = pytest.mark.gpu


def problem(V: int, k: int, dtype: torch.dtype, T: float, tail: str) -> tuple[Tensor, kd.TopK, Tensor]:
    """Student, teacher and labels of some rows, on the CPU."""
    generator = torch.Generator().manual_seed(V + k)
    z, v = (2 * torch.randn(5, V, generator=generator) for _ in range(2))
    labels = torch.randint(V, (5,), generator=generator)
    labels[3] = -100
    return z.to(dtype), stored_teacher(v, some_ids(generator, v, k), tail, T), labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_every_divergence(divergence: Any, dtype: torch.dtype) -> None:
    """With each tail, of few and of many stored classes, with and without a hard term."""
    sizes = ((128_256, 64), (32_001, 3000), (1000, 1000))
    for n, (tail, (V, k)) in enumerate(zip(TAILS, sizes, strict=True)):
        if not allowed(divergence, tail):
            continue
        T = 1.0 + n % 2
        z, teacher, labels = problem(V, k, dtype, T, tail)
        options = {"divergence": divergence, "temperature": T, "hard_weight": 0.4}
        check(z, teacher, labels, options, device="cuda")
        check(z, teacher, None, {**options, "hard_weight": 0.0}, device="cuda")


def test_many_rows_one_after_another() -> None:
    """As many as that every cluster takes several, in the place of each other; the same to the bit each
    time."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    z = torch.randn(2048, 32_000, device="cuda", generator=generator).bfloat16()
    v = torch.randn(2048, 32_000, device="cuda", generator=generator)
    log_probs, ids = v.log_softmax(-1).topk(64)
    found = []
    for backend in ("cuda", "cuda", "reference"):
        leaf = z.clone().requires_grad_()
        loss = kd.kd_loss(leaf, kd.TopK(ids, log_probs), divergence=kd.JSD(0.5), backend=backend)  # type: ignore[arg-type]
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    first, second, exact = found
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    torch.testing.assert_close(first[0], exact[0])
    torch.testing.assert_close(first[1], exact[1])
