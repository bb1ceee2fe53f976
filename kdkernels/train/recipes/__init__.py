"""Strategies of the literature as plans: terms, weights, stages, initialisations, with the papers' settings.

Every recipe takes a student and a teacher and gives a `Plan`: `plan.stages` are what is done one after the
other, `plan.run(loader, eval_loader, epochs=...)` does it, and goes on where it was interrupted.
"""

from .adversarial import boundary_samples, discriminator
from .chains import born_again, teacher_assistants
from .derivatives import sobolev
from .features import attention_transfer, fitnets
from .language import copy_layers, distilbert, tinybert
from .logits import dkd, ensemble, hinton, multilabel, noisy_student, noisy_teacher
from .on_policy import OnPolicy, on_policy
from .peers import codistillation, learnt_together, mutual_learning
from .plan import Plan, Stage
from .routing import Routed, routed
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
    "HalfAndHalf", "OnPolicy", "Plan", "Routed", "Specialist", "SpecialistEnsemble", "Stage",
    "active_specialists", "attention_transfer", "born_again", "boundary_samples", "codistillation", "combine",
    "confusable_classes", "copy_layers", "discriminator", "distilbert", "dkd", "ensemble", "fitnets",
    "hinton", "learnt_together", "multilabel", "mutual_learning", "noisy_student", "noisy_teacher",
    "on_policy", "routed", "sobolev", "specialist_labels", "specialists", "teacher_assistants", "tinybert",
]  # fmt: skip
