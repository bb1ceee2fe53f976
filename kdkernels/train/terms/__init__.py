"""The terms of objectives."""

from .adversarial import BoundarySamples, Deception, Discrimination
from .derivatives import Sobolev
from .features import AttentionTransfer, CosineHidden, Embeddings, HiddenStates, Hint, Projectors
from .logits import HardLabels, LogitMatch, MultiLabel, SoftTargets, accuracy, churn
from .scores import AttentionScores
from .weights import after, linear, warm_up

__all__ = [
    "AttentionScores",
    "AttentionTransfer",
    "BoundarySamples",
    "CosineHidden",
    "Deception",
    "Discrimination",
    "Embeddings",
    "HardLabels",
    "HiddenStates",
    "Hint",
    "LogitMatch",
    "MultiLabel",
    "Projectors",
    "Sobolev",
    "SoftTargets",
    "accuracy",
    "after",
    "churn",
    "linear",
    "warm_up",
]
