"""Strategies with an adversary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distiller import Update
from ..objective import Objective, Weight
from ..outputs import Batch, Outputs
from ..teachers import Ensemble, Stored, Teacher
from ..terms import BoundarySamples, Deception, Discrimination, HardLabels, SoftTargets, linear
from .plan import Plan, Stage, stages_of


def boundary_samples(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 3.0,
    hard_weight: Weight = 1.0,
    soft_weight: Weight | None = None,
    boundary_weight: Weight | None = None,
    steps: int = 10,
    step_size: float = 0.3,
    clamp: float | tuple[float, float] | None = 2.5,
    at_most: int = 64,
    perturbation: Literal["attack", "random"] = "attack",
    t_squared: bool = False,
    inputs: str = "inputs",
    **training: Any,
) -> Plan:
    """Labels, soft targets, and soft targets of samples at the teacher's decision boundary.

    CE + a · KL(p‖q) + b · KL(p'‖q'), of samples and of those moved; a = 1 + 3(1 − e), b = max(2 − 8e/3, 0)
    with e the part of the fit that is done, both at T and, as in the paper's code, without T².

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it, differentiable in its inputs.
        temperature: T.
        hard_weight: Weight of the labels.
        soft_weight: a; None for that.
        boundary_weight: b; None for that.
        steps: Of the attack, as `BoundarySamples` takes them.
        step_size: Likewise.
        clamp: Likewise: of inputs that aren't standardised images, their range.
        at_most: Likewise.
        perturbation: Likewise: `"random"` for the control.
        t_squared: Whether T² multiplies both soft terms.
        inputs: The batch's entry that is moved.
        **training: As of `hinton`.

    Source: Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI
        2019.
    """
    boundary = BoundarySamples(
        linear(2.0, 0.0, until=0.75) if boundary_weight is None else boundary_weight,
        temperature, steps, step_size, clamp, at_most, perturbation=perturbation, t_squared=t_squared,
        inputs=inputs,
    )  # fmt: skip
    a = linear(4.0, 1.0) if soft_weight is None else soft_weight
    soft = SoftTargets(temperature=temperature, weight=a, t_squared=t_squared)
    terms = {"hard": HardLabels(hard_weight), "soft": soft, "boundary": boundary}
    return stages_of(student, teacher, {"distil": terms}, training)


class Shuffled(Ensemble):
    """A teacher that gives every sample the logits of another of its batch, drawn anew each time."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__([teacher])

    def answer(self, batch: Batch, ask: Callable[[Teacher, Batch], Outputs]) -> Outputs:
        """Its logits, their rows in another order."""
        v = ask(self.teachers[0], batch)["logits"]
        if not isinstance(v, Tensor):
            raise TypeError(f"shuffle_teacher takes a tensor of logits, got {type(v).__name__}")
        return Outputs(logits=v[torch.randperm(len(v)).to(v.device)])


def discriminator(
    student: Any,
    teacher: Any,
    discriminator: nn.Module,
    *,
    temperature: float = 4.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    adversarial_weight: Weight = 0.1,
    shuffle_teacher: bool = False,
    discriminator_optimizer: Any = None,
    **training: Any,
) -> Plan:
    """Labels, soft targets, and a discriminator that is to take the student's logits for the teacher's.

    In each step first the student, CE + α · T² · KL(p‖q) − β · log D(z), then the discriminator,
    −log D(v) − log(1 − D(z)), of what the student is then. Their figures are `loss` and `discriminator/loss`.

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        discriminator: Takes logits `[N, C]`, gives one logit for each row; trained as `discriminator`.
        temperature: T.
        soft_weight: α; 0 for none.
        hard_weight: Weight of the labels.
        adversarial_weight: β.
        shuffle_teacher: As a control, whether a sample gets the teacher's logits of another of its batch. A
            discriminator sees no difference, as it isn't told of which sample logits are: soft targets do.
        discriminator_optimizer: Of its own, as `Update` takes it; `optimizer` is the student's.
        **training: As of `hinton`; a scheduler that is a function is for both.

    Source: Xu et al., "Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with
        Conditional Adversarial Networks", 2018; −log D(z) for log(1 − D(z)) is Goodfellow et al.,
        "Generative Adversarial Nets", 2014, section 3.
    """
    rest = dict(training)
    optimizer, scheduler = rest.pop("optimizer", None), rest.pop("scheduler", None)
    terms = {
        "hard": HardLabels(hard_weight),
        "soft": SoftTargets(temperature=temperature, weight=soft_weight),
        "adversarial": Deception(adversarial_weight),
    }
    learnt = Objective(**{name: term for name, term in terms.items() if term.weight != 0})
    told = Update(
        Objective(telling=Discrimination()), discriminator_optimizer,
        scheduler if callable(scheduler) else None, ("discriminator",), "discriminator",
    )  # fmt: skip
    if shuffle_teacher:
        teacher = Shuffled(Stored() if teacher is None else teacher)
    models = {"student": student, "discriminator": discriminator}
    return Plan(models, teacher, [Stage("distil", [Update(learnt, optimizer, scheduler), told])], **rest)
