"""The terms of objectives."""

from .features import AttentionTransfer, CosineHidden, Embeddings, HiddenStates, Hint, Projectors
from .logits import HardLabels, LogitMatch, MultiLabel, SoftTargets, accuracy
from .scores import AttentionScores

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
]
