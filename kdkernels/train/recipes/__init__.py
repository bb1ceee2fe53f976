"""Strategies of the literature as plans: terms, weights, stages, initialisations, with the papers' settings.

Every recipe takes a student and a teacher and gives a `Plan`: `plan.stages` are what is done one after the
other, `plan.run(loader, eval_loader, epochs=...)` does it, and goes on where it was interrupted.
"""

from .features import attention_transfer, fitnets
from .language import copy_layers, distilbert, tinybert
from .logits import dkd, ensemble, hinton, multilabel, noisy_student, noisy_teacher
from .plan import Plan, Stage
from .specialist_solver import combine
from .specialists import (
    HalfAndHalf,
    Specialist,
    SpecialistEnsemble,
    active_specialists,
    confusable_classes,
    specialist_labels,
    specialists,
)

__all__ = [
    "HalfAndHalf", "Plan", "Specialist", "SpecialistEnsemble", "Stage", "active_specialists",
    "attention_transfer", "combine", "confusable_classes", "copy_layers", "distilbert", "dkd", "ensemble",
    "fitnets", "hinton", "multilabel", "noisy_student", "noisy_teacher", "specialist_labels", "specialists",
    "tinybert",
]  # fmt: skip
