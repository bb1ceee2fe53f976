"""The trainer: `Distiller` minimises an `Objective` of terms; recipes compose them into strategies."""

import importlib.util

if importlib.util.find_spec("accelerate") is None:
    raise ModuleNotFoundError(
        "kdkernels.train needs more packages: pip install 'kdkernels[train]'", name="accelerate"
    )

from . import recipes
from .distiller import Distiller, NonFiniteLoss, Update
from .objective import Function, Objective, Progress, Step, Term, linear, warm_up
from .outputs import Adaptor, Outputs
from .recipes import Plan, Stage
from .teachers import Ensemble, Stored
from .terms import (
    AttentionScores,
    AttentionTransfer,
    CosineHidden,
    Embeddings,
    HardLabels,
    HiddenStates,
    Hint,
    LogitMatch,
    MultiLabel,
    SoftTargets,
    accuracy,
)  # fmt: skip

__all__ = [
    "Adaptor",
    "AttentionScores",
    "AttentionTransfer",
    "CosineHidden",
    "Distiller",
    "Embeddings",
    "Ensemble",
    "Function",
    "HardLabels",
    "HiddenStates",
    "Hint",
    "LogitMatch",
    "MultiLabel",
    "NonFiniteLoss",
    "Objective",
    "Outputs",
    "Plan",
    "Progress",
    "SoftTargets",
    "Stage",
    "Step",
    "Stored",
    "Term",
    "Update",
    "accuracy",
    "linear",
    "recipes",
    "warm_up",
]
