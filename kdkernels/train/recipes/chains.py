"""Chains: every model learns from the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..distiller import Update
from ..objective import Objective, Term, Weight
from ..terms import HardLabels, SoftTargets
from .plan import Plan, Stage


def teacher_assistants(
    student: nn.Module,
    teacher: Any,
    assistants: Sequence[nn.Module],
    *,
    temperature: float = 4.0,
    soft_weight: float = 0.5,
    divergence: Any = "forward_kl",
    shares: Sequence[float] | None = None,
    **training: Any,
) -> Plan:
    """A chain from the teacher over assistants of sizes between: (1 − λ) · CE + λ · T² · KL at every step.

    Args:
        student: The model that is wanted; the last of the chain.
        teacher: As `Distiller` takes it; the first assistant learns from it.
        assistants: Models, each learning from the one before; none is plain distillation.
        temperature: T.
        soft_weight: λ, from 0 to 1; T and λ are what the paper searches, for every arm as long.
        divergence: As `kd_loss` takes it.
        shares: Lengths of the fits, one for each assistant and the student, relative to each other; None for
            equal ones.
        **training: As of `hinton`; the optimizer is a function, since every model needs its own.

    Raises:
        TypeError: An optimizer or scheduler that is made already.
        ValueError: λ out of range, or not as many shares as fits.

    Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020, section 3.
    """
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight must be λ in [0, 1], got {soft_weight}")
    names = [f"assistant_{n}" for n in range(1, len(assistants) + 1)] + ["student"]

    def terms() -> dict[str, Term]:
        soft = SoftTargets(divergence, temperature, soft_weight)
        return {"soft": soft, "hard": HardLabels(1.0 - soft_weight)}

    chain = dict(zip(names, [*assistants, student], strict=True))
    plan = _chain(chain, teacher, {name: terms() for name in names}, training)
    if shares is not None:
        if len(shares) != len(names):
            raise ValueError(f"shares must be {len(names)}, of {', '.join(names)}, got {len(shares)}")
        for stage, share in zip(plan.stages, shares, strict=True):
            stage.share = share
    return plan


def born_again(
    generations: Sequence[nn.Module],
    teacher: Any = None,
    *,
    temperature: float = 1.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    **training: Any,
) -> Plan:
    """Generations of one architecture, each taught by the one before: CE + T² · KL.

    Args:
        generations: Models, freshly initialised; the last is `plan.student`, and an `Ensemble` of them all is
            the paper's other student.
        teacher: What the first learns from; None for labels alone.
        temperature: T.
        soft_weight: Weight of the soft targets.
        hard_weight: Weight of the labels.
        **training: As of `teacher_assistants`.

    Raises:
        TypeError: An optimizer or scheduler that is made already.
        ValueError: No generation.

    Source: Furlanello et al., "Born-Again Neural Networks", ICML 2018, section 3.
    """
    if not generations:
        raise ValueError("generations must be models, at least one, got none")
    chain = {f"generation_{n}": model for n, model in enumerate(generations, start=1)}
    terms: dict[str, dict[str, Term]] = {
        name: {
            "soft": SoftTargets(temperature=temperature, weight=soft_weight),
            "hard": HardLabels(hard_weight),
        }
        for name in chain
    }
    if teacher is None:
        terms["generation_1"] = {"hard": HardLabels(1.0)}
    return _chain(chain, teacher, terms, training)


def _chain(
    models: Mapping[str, nn.Module],
    teacher: Any,
    terms: Mapping[str, Mapping[str, Term]],
    training: Mapping[str, Any],
) -> Plan:
    """A stage for every model, taught by the one before; terms of weight 0 are left out."""
    rest = dict(training)
    makers = {name: rest.pop(name, None) for name in ("optimizer", "scheduler")}
    for name, maker in makers.items():
        if maker is not None and not callable(maker):
            raise TypeError(
                f"{name} must be a function that makes one, since every model of a chain needs its own, got "
                f"{type(maker).__name__}"
            )
    stages, before = [], teacher
    for name, model in models.items():
        objective = Objective(**{n: term for n, term in terms[name].items() if term.weight != 0})
        stages.append(Stage(name, [Update(objective, **makers)], student=model, teacher=before))
        before = model
    return Plan(before, teacher, stages, **rest)
