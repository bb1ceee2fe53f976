"""`python -m benchmarks strategies` on adversaries: samples at a teacher's boundary, and a discriminator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.strategies_claims import HARD, RATES, Arm, Claim, Experiment, Options, over
from benchmarks.strategies_fits import (
    Digits,
    Lab,
    Metrics,
    accuracy,
    adamw,
    batches,
    digits_teacher,
    mlp,
    recipe_of,
    rows,
    seeded,
)
from kdkernels.train import NonFiniteLoss


def discriminate(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, amount: int = 100,
    **options: Any,
) -> Metrics:  # fmt: skip
    """A student of some labelled digits, where the recipe takes one with a discriminator 10-64-1."""
    split = Digits.of(seed)
    teacher = digits_teacher(lab, "wide", seed)
    student = seeded(seed, lambda: mlp(64, 30, 30, 10))
    if recipe == "discriminator":
        judge = seeded(seed + 2000, lambda: mlp(10, 64, 1))
        options |= {"discriminator": judge, "discriminator_optimizer": adamw(1e-3)}
    # An order of the teacher's rows is drawn from it.
    torch.manual_seed(seed)
    made = recipe_of(recipe, student, teacher, steps, optimizer=adamw(lr, weight_decay), **options)
    ended: Metrics = {}
    try:
        made.run(batches(*rows(split.train[:amount])), steps=steps, progress=False, log_every=steps)
    except NonFiniteLoss:
        ended["diverged"] = 1.0
    student.eval()
    found = {"accuracy": accuracy(student, split.held), "teacher_accuracy": accuracy(teacher, split.held)}
    return {**found, **ended}


FITS: dict[str, Callable[..., Metrics]] = {"discriminate": discriminate}

_SETTING = "100 labelled digits; student 64-30-30-10; teacher 64-256-256-10 of 1,000 digits"


def _boundary() -> Experiment:
    def arm(says: str, **options: Any) -> Arm:
        return Arm(says, {"amount": 100, **options}, HARD)

    moved: Options = {"recipe": "boundary_samples", "clamp": (0.0, 1.0)}
    return Experiment(
        "boundary_samples",
        "classify",
        f"{_SETTING}; T = 3, weights as in the paper, 10 steps of 0.3 within the range of pixels",
        400,
        {
            "hard": arm("labels", recipe="labels"),
            "kd": arm("labels and soft targets", **moved, boundary_weight=0.0),
            "boundary": arm("and boundary-supporting samples", **moved),
            "random": arm("and samples moved as far at random", **moved, perturbation="random"),
        },
    )


def _discriminator() -> Experiment:
    def arm(says: str, **options: Any) -> Arm:
        given = {"recipe": "discriminator", "temperature": 4.0, **options}
        return Arm(says, given, over(lr=RATES, adversarial_weight=(0.1, 1.0)))

    kd: Options = {"recipe": "hinton", "temperature": 4.0, "hard_weight": 1.0}
    return Experiment(
        "discriminator",
        "discriminate",
        f"{_SETTING}; T = 4; discriminator 10-64-1, a step of its own after each of the student's",
        400,
        {
            "hard": Arm("labels", {"recipe": "labels"}, HARD),
            "kd": Arm("labels and soft targets", kd, HARD),
            "discriminator": arm("labels, soft targets, discriminator"),
            "alone": arm("labels and discriminator", soft_weight=0.0),
            "shuffled": arm("all three, the teacher's rows shuffled", shuffle_teacher=True),
        },
    )


EXPERIMENTS: dict[str, Experiment] = {"boundary": _boundary(), "discriminator": _discriminator()}

CLAIMS: dict[str, Claim] = {
    "boundary.kd": Claim(
        "Soft targets at T = 3 beat labels.", "boundary", "kd", "hard",
        paper="CIFAR-10, ResNet-26 → 8: 86.02 → 86.66 %, → 14: 89.11 → 89.75 %", plan=2,
    ),
    "boundary.samples": Claim(
        "Boundary-supporting samples beside them beat soft targets of the data.",
        "boundary", "boundary", "kd",
        paper="CIFAR-10, ResNet-26 → 8: 86.66 → 87.32 %, → 14: 89.75 → 90.34 %", plan=2,
    ),
    "boundary.direction": Claim(
        "It is the boundary that helps: they beat samples moved as far at random.",
        "boundary", "boundary", "random", plan=2,
    ),
    "discriminator.beside": Claim(
        "A discriminator beside soft targets beats soft targets.",
        "discriminator", "discriminator", "kd", plan=2,
    ),
    "discriminator.alone": Claim(
        "A discriminator without soft targets beats labels.", "discriminator", "alone", "hard", plan=2
    ),
    "discriminator.shuffled": Claim(
        "It is each digit's own logits that teach: they beat those of another.",
        "discriminator", "discriminator", "shuffled", plan=2,
    ),
}  # fmt: skip
