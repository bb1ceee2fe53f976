"""Fits of the strategies' table with an adversary: what each is given, and what they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

import torch

from benchmarks import strategies_adversarial as adversarial
from benchmarks import strategies_fits as fits
from kdkernels.train import BoundarySamples, recipes


def test_a_fit_depends_on_its_seed_alone(tmp_path: Path) -> None:
    """With an order that is drawn, whatever was drawn before."""
    options = {"recipe": "discriminator", "adversarial_weight": 1.0, "shuffle_teacher": True, "lr": 1e-2}
    first = adversarial.discriminate(fits.Lab(tmp_path, 0.05), 1, 10, **options)
    used = fits.Lab(tmp_path, 0.05)
    adversarial.discriminate(used, 0, 5, **options)
    torch.rand(3)
    assert adversarial.discriminate(used, 1, 10, **options) == first


def test_a_fit_that_diverges_says_so(tmp_path: Path) -> None:
    found = adversarial.discriminate(fits.Lab(tmp_path, 0.01), 0, 20, recipe="labels", lr=1e30)
    assert found["diverged"] == 1.0 and 0.0 <= found["accuracy"] <= 100.0


def test_the_control_of_boundary_samples_differs_in_the_direction_alone() -> None:
    arms = adversarial.EXPERIMENTS["boundary"].arms
    attack, random = (arms[name].options for name in ("boundary", "random"))
    assert {k: v for k, v in random.items() if attack.get(k) != v} == {"perturbation": "random"}
    assert {k: v for k, v in arms["kd"].options.items() if attack.get(k) != v} == {"boundary_weight": 0.0}


def test_samples_are_moved_within_the_range_of_pixels(tmp_path: Path) -> None:
    """And nearly all arrive at the other side of a teacher's boundary: one that knows the digits."""
    split = fits.Digits.of(0)
    teacher = fits.digits_teacher(fits.Lab(tmp_path), "wide", 0)
    x, y = fits.rows(split.train[:100])
    given = dict(adversarial.EXPERIMENTS["boundary"].arms["boundary"].options)
    plan = recipes.boundary_samples(teacher, teacher, clamp=given["clamp"])
    term = plan.objective.terms["boundary"]
    assert isinstance(term, BoundarySamples)

    class Asked:
        def run(self, model: str, **entries: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": teacher(entries["inputs"])}

    v = teacher(x).detach()
    known = v.argmax(1) == y
    moved = term.moved(Asked(), {}, x[known], y[known], term.targets(v[known], y[known]))  # type: ignore[arg-type]
    assert float(moved.min()) >= 0.0 and float(moved.max()) <= 1.0
    assert float((teacher(moved).argmax(1) != y[known]).float().mean()) > 0.8
