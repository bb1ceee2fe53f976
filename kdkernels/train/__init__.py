"""The trainer: `Distiller` minimises an `Objective` of terms; recipes compose them into strategies."""

import importlib.util

if importlib.util.find_spec("accelerate") is None:
    raise ModuleNotFoundError(
        "kdkernels.train needs more packages: pip install 'kdkernels[train]'", name="accelerate"
    )

from . import recipes, terms
from .distiller import Distiller, Update
from .objective import Function, Objective, Progress, Step, Term
from .outputs import Adaptor, Outputs
from .recipes import Plan, Stage
from .records import NonFiniteLoss
from .teachers import Ensemble, Stored
from .terms import *  # noqa: F403

__all__ = [
    "Adaptor", "Distiller", "Ensemble", "Function", "NonFiniteLoss", "Objective", "Outputs", "Plan",
    "Progress", "Stage", "Step", "Stored", "Term", "Update", "recipes",
]  # fmt: skip
__all__ += terms.__all__
