"""The terms of objectives."""

from .features import AttentionTransfer, CosineHidden, Embeddings, HiddenStates, Hint, Projectors
from .logits import HardLabels, LogitMatch, MultiLabel, SoftTargets, accuracy
from .scores import AttentionScores
from .weights import linear, warm_up

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
    "linear",
    "warm_up",
]
