"""Strategies of the literature as plans: terms, weights, stages, initialisations, with the papers' settings.

Every recipe takes a student and a teacher and gives a `Plan`: `plan.stages` are what is done one after the
other, `plan.run(loader, eval_loader, epochs=...)` does it, and goes on where it was interrupted.
"""

from .adversarial import boundary_samples, discriminator
from .derivatives import sobolev
from .features import attention_transfer, fitnets
from .language import copy_layers, distilbert, tinybert
from .logits import dkd, ensemble, hinton, multilabel, noisy_student, noisy_teacher
from .plan import Plan, Stage

__all__ = [
    "Plan", "Stage", "attention_transfer", "boundary_samples", "copy_layers", "discriminator", "distilbert",
    "dkd", "ensemble", "fitnets", "hinton", "multilabel", "noisy_student", "noisy_teacher", "sobolev",
    "tinybert",
]  # fmt: skip
