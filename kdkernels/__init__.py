"""Fused knowledge-distillation losses: one call, one pass, gradient included."""

from .custom import check_divergence, register_divergence
from .divergences import DKD, JSD, AlphaBeta, BinaryKL, LogitMSE, SkewKL, SkewReverseKL, gkd
from .functional import Explanation, KDStats, explain, kd_loss, kd_loss_with_stats, shift_labels
from .integrations import hf
from .modules import KDLoss
from .noise import LogitNoise
from .sources import Head, Logits, Mixture
from .sparse import Sampled, TopK

__all__ = [
    "DKD",
    "JSD",
    "AlphaBeta",
    "BinaryKL",
    "Explanation",
    "Head",
    "KDLoss",
    "KDStats",
    "LogitMSE",
    "LogitNoise",
    "Logits",
    "Mixture",
    "Sampled",
    "SkewKL",
    "SkewReverseKL",
    "TopK",
    "check_divergence",
    "explain",
    "gkd",
    "hf",
    "kd_loss",
    "kd_loss_with_stats",
    "register_divergence",
    "shift_labels",
]
__version__ = "0.1.0"
