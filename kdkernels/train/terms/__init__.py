"""The terms of objectives."""

from .features import AttentionTransfer, CosineHidden, Embeddings, HiddenStates, Hint, Projectors
from .logits import HardLabels, LogitMatch, MultiLabel, SoftTargets, accuracy, churn
from .scores import AttentionScores
from .weights import after, linear, warm_up

__all__ = [
    "AttentionScores",
    "AttentionTransfer",
    "CosineHidden",
    "Embeddings",
    "HardLabels",
    "HiddenStates",
    "Hint",
    "LogitMatch",
    "MultiLabel",
    "Projectors",
    "SoftTargets",
    "accuracy",
    "after",
    "churn",
    "linear",
    "warm_up",
]
