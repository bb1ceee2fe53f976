"""The support table, cell by cell: what it says runs gives what the reference gives, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES, interpreted
from torch import Tensor

import kdkernels as kd
from kdkernels import registry
from kdkernels.divergences import BUILT_IN, TABLE
from kdkernels.functional import KDStats
from kdkernels.support import DTYPES, NOISES, ORDER, STUDENTS, TEACHERS, Combination, combinations, table

DOCS = Path(__file__).parent.parent / "docs" / "support.md"


def outcome(c: Combination, backend: str, device: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, gradient and stats of a cell."""
    student, teacher, labels, options = c.arguments(device, DTYPES.get(backend, torch.float64))
    part = {kd.Logits: "z", kd.Head: "weight"}.get(type(student))
    z = (student if part is None else getattr(student, part)).requires_grad_()
    stats: list[Tensor] = []
    if c.stats:
        loss, figures = kd.kd_loss_with_stats(student, teacher, labels, backend=backend, **options)
        assert isinstance(figures, KDStats)
        stats = list(vars(figures).values())
    else:
        loss = kd.kd_loss(student, teacher, labels, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient, stats


def needed(c: Combination, backend: str) -> bool:
    """Whether a cell is run. Where kernels are interpreted, tensors and `kd.Logits` in all of them, and the
    other sources, which have tests of their own, in those with all options."""
    stored = c.teacher in ("TopK", "Sampled")
    few = interpreted(backend) and (c.student == "Head" or c.teacher not in ("tensor", "Logits"))
    return not few or (c.noise == ("student" if stored else "both") and c.stats)


# Where kernels are interpreted: every way that a kernel goes, and of tensors a sum without closed form, and
# powers. What all others are in is their expressions, which test_divergences.py has.
INTERPRETED = ("forward_kl", "jsd", "dkd", "centered_logit_mse", "binary_kl")
OF_TENSORS = (*INTERPRETED, "tvd", "alpha_beta")


def is_plain(backend: str, divergence: str, teacher: str) -> bool:
    """Whether a plain run has it."""
    names = {"tensor": OF_TENSORS, "Logits": ("jsd",)}.get(teacher, INTERPRETED)
    return backend != "triton" or divergence in names


@pytest.mark.thorough(but=lambda backend, divergence, teacher: is_plain(backend, divergence, teacher))
@pytest.mark.parametrize("divergence", sorted(BUILT_IN))
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_cell(backend: str, divergence: str, teacher: str) -> None:
    """Three students, noise on any side, stats or not: 24 calls, each against the reference in fp64."""
    device = DEVICES[backend]
    for c in (c for c in combinations(divergence) if c.teacher == teacher and needed(c, backend)):
        refusal = c.refusal()
        if refusal is not None:
            with pytest.raises(ValueError) as refused:
                outcome(c, backend, device)
            assert str(refused.value) == refusal
            continue
        why = c.reason(registry.BACKENDS[backend])
        if why is not None:
            with pytest.raises(RuntimeError, match="can't run this call") as unable:
                outcome(c, backend, device)
            assert why in str(unable.value)
            continue
        ours, theirs = outcome(c, backend, device), outcome(c, "reference", "cpu")
        rtol, atol = (2e-5, 2e-6) if backend in DTYPES else (1e-10, 1e-11)
        for x, y in zip((*ours[:2], *ours[2]), (*theirs[:2], *theirs[2]), strict=True):
            torch.testing.assert_close(
                x.cpu().double(), y, rtol=rtol, atol=atol, msg=lambda m, c=c: f"{c}: {m}"
            )


def test_the_table_has_every_divergence_and_source() -> None:
    """A row that is missing is a cell that nobody tests."""
    assert {c.divergence for name in BUILT_IN for c in combinations(name)} == BUILT_IN <= set(TABLE)
    cells = list(combinations("jsd"))
    assert len(cells) == len(set(cells)) == len(STUDENTS) * len(TEACHERS) * len(NOISES) * 2
    lines = table().splitlines()
    for name in BUILT_IN:
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == len(TEACHERS)


def test_the_table_in_the_docs_is_this_one() -> None:
    """Made from the registry: `python -m kdkernels.support > docs/support.md`."""
    assert DOCS.read_text(encoding="utf-8") == table()


def test_the_table_names_what_is_refused() -> None:
    """A cell that says no says why, once, below."""
    text = table()
    refused: list[Any] = [line for line in text.splitlines() if "no (" in line]
    assert refused and "compares logits" in text
    (number,) = {
        line.split("no (")[1].split(")")[0]
        for line in refused
        if line.startswith("| `logit_mse` | Mixture |")
    }
    assert f"\n{number}. this divergence compares logits, and kd.Mixture" in text
    assert "1. takes one teacher, not a kd.Mixture" in text


def test_the_table_has_every_backend() -> None:
    """A column each."""
    assert sorted(ORDER) == sorted(registry.BACKENDS)
