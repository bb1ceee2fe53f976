"""Fused knowledge-distillation losses: one call, one pass, gradient included."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .custom import check_divergence, register_divergence
from .divergences import DKD, JSD, AlphaBeta, BinaryKL, LogitMSE, SkewKL, SkewReverseKL, gkd
from .functional import Explanation, KDStats, explain, kd_loss, kd_loss_with_stats, shift_labels
from .integrations import hf
from .modules import KDLoss
from .noise import LogitNoise
from .parallel import VocabParallel
from .sources import Head, Logits, Mixture
from .sparse import Sampled, TopK

if TYPE_CHECKING:
    from . import cache
    from .auditing import audit

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
    "VocabParallel",
    "audit",
    "cache",
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


def __getattr__(name: str) -> Any:
    """`cache` and `audit`, when they are asked for: who has no use for them needn't import them."""
    if name == "audit":
        return importlib.import_module(".auditing", __name__).audit
    if name != "cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(".cache", __name__)
