"""Fused knowledge-distillation losses: one call, one pass, gradient included."""

from .divergences import JSD, gkd
from .functional import Explanation, KDStats, explain, kd_loss, kd_loss_with_stats, shift_labels
from .modules import KDLoss
from .sources import Logits

__all__ = [
    "JSD",
    "Explanation",
    "KDLoss",
    "KDStats",
    "Logits",
    "explain",
    "gkd",
    "kd_loss",
    "kd_loss_with_stats",
    "shift_labels",
]
__version__ = "0.1.0"
