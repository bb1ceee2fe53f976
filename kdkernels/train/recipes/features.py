"""Strategies of what is inside: hints and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..objective import Weight
from ..terms import AttentionTransfer, HardLabels, Hint, SoftTargets
from .plan import Plan, stages_of


def fitnets(
    student: Any,
    teacher: Any,
    *,
    guided: str,
    hint: str,
    temperature: float = 4.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    hint_weight: Weight = 100.0,
    two_stages: bool = True,
    **training: Any,
) -> Plan:
    """A hint first, then distillation; or both at once.

    Args:
        student: The model to train.
        teacher: A module.
        guided: Name of the student's layer that learns, as `Capture` takes it.
        hint: Name of the teacher's layer that it learns from.
        temperature: T of the soft targets.
        soft_weight: Their weight.
        hard_weight: Weight of the labels.
        hint_weight: Weight of the hint where it is trained with the rest.
        two_stages: Whether the hint is a stage of its own; else it is a term beside soft targets and labels.
        **training: As of `hinton`.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.
    """
    rest = {"soft": SoftTargets(temperature=temperature, weight=soft_weight), "hard": HardLabels(hard_weight)}
    if two_stages:
        return stages_of(student, teacher, {"hint": {"hint": Hint(guided, hint)}, "distil": rest}, training)
    return stages_of(
        student, teacher, {"distil": {**rest, "hint": Hint(guided, hint, hint_weight)}}, training
    )


def attention_transfer(
    student: Any,
    teacher: Any,
    *,
    layers: Sequence[tuple[str, str]],
    weight: Weight = 1e3,
    temperature: float = 4.0,
    soft_weight: Weight = 0.0,
    hard_weight: Weight = 1.0,
    **training: Any,
) -> Plan:
    """Labels, and attention maps of feature maps that are to look like the teacher's.

    Args:
        student: The model to train.
        teacher: A module.
        layers: Names of layers of the student and of the teacher, in pairs.
        weight: Of the attention maps; it depends on their size.
        temperature: T of the soft targets.
        soft_weight: Their weight; 0 for none.
        hard_weight: Weight of the labels.
        **training: As of `hinton`.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017.
    """
    ours, theirs = zip(*layers, strict=True)
    terms = {
        "hard": HardLabels(hard_weight),
        "soft": SoftTargets(temperature=temperature, weight=soft_weight),
        "attention": AttentionTransfer(ours, theirs, weight),
    }
    return stages_of(student, teacher, {"distil": terms}, training)
