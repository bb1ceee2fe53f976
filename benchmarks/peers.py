"""Whoever else computes such losses, each called as its own documentation has it, where it is installed.

liger-kernel
    Logits: ``LigerKLDIVLoss``, ``LigerJSD``, ``LigerCrossEntropyLoss``, Triton on a GPU. Heads:
    ``LigerFusedLinearJSDLoss`` anywhere, ``LigerFusedLinearCrossEntropyLoss`` on a GPU.
trl
    Logits: ``generalized_jsd_loss`` of its GKD trainer. Heads: ``_chunked_divergence_loss`` of its
    distillation trainer.
cut-cross-entropy
    Heads, labels alone: ``linear_cross_entropy``.
quack-kernels
    Labels alone, on a GPU: ``cross_entropy`` of logits, ``chunked_linear_cross_entropy`` of heads.

Where one has no T² or no labels' term, its user multiplies or adds: so do these. A module of
`kdkernels.bench`'s contestants.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import liger
from kdkernels.bench.contestants import Entry
from kdkernels.bench.eager import LABELS
from kdkernels.bench.workloads import Loss, Point

# The beta of a generalised JSD that each of these is, for Liger and TRL.
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
PACKAGES = {
    "liger-kernel": ("liger_kernel", "liger_kernel.transformers"),
    "trl": ("trl", "trl.trainer.distillation_trainer"),
    "cut-cross-entropy": ("cut_cross_entropy", "cut_cross_entropy"),
    "quack-kernels": ("quack", "quack.cross_entropy"),
}
# What imports what is slow to import; not those that may look for a GPU when they are.
PRELOAD = ("benchmarks.peers_imported",)
NO_GPU = "its kernels need a GPU"


def versions() -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in (*PACKAGES, "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def missing(package: str) -> str | None:
    """Why a package can't be used here, or None where it can."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    top, module = PACKAGES[package]
    if importlib.util.find_spec(top) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it raises, the others can be measured without it
        return f"can't be imported: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def entries(point: Point) -> tuple[list[Entry], dict[str, str]]:
    """Those that can run a point, and why others can't."""
    found, reasons = [], {}
    for package, spelling, gpu in _spellings(point):
        entry = Entry(package, spelling, __name__)
        why = missing(package) or (NO_GPU if gpu and point.device == "cpu" else None)
        if why is None:
            found.append(entry)
        else:
            reasons[package if missing(package) else entry.name] = why
    return found, reasons


def _spellings(point: Point) -> list[tuple[str, str, bool]]:
    """Package, spelling, and whether it needs a GPU."""
    labels, known = point.divergence == LABELS, point.divergence in BETAS
    if point.workload == "logits":
        if labels:
            return [
                ("liger-kernel", "LigerCrossEntropyLoss", True), ("quack-kernels", "cross_entropy", True)
            ]  # fmt: skip
        of_liger = [("liger-kernel", name, True) for name in liger.SPELLINGS.get(point.divergence, ())]
        return of_liger + ([("trl", "generalized_jsd_loss", False)] if known else [])
    if point.workload == "linear":
        if labels:
            return [
                ("liger-kernel", "LigerFusedLinearCrossEntropyLoss", True),
                ("cut-cross-entropy", "linear_cross_entropy", False),
                ("quack-kernels", "chunked_linear_cross_entropy", True),
            ]
        if known:
            return [
                ("liger-kernel", "LigerFusedLinearJSDLoss", False),
                ("trl", "_chunked_divergence_loss", False),
            ]
    return []


def build(entry: Entry, point: Point) -> Loss:
    """The loss of an entry."""
    if entry.family == "liger-kernel" and point.workload == "logits":
        if point.divergence == LABELS:
            return _labels_of(importlib.import_module("liger_kernel.transformers").LigerCrossEntropyLoss())
        return liger.SPELLINGS[point.divergence][entry.spelling]
    made: dict[str, Callable[[Point], Loss]] = {
        "cross_entropy": _quack,
        "generalized_jsd_loss": _trl_logits,
        "_chunked_divergence_loss": _trl_heads,
        "LigerFusedLinearCrossEntropyLoss": _liger_labels,
        "LigerFusedLinearJSDLoss": _liger_heads,
        "linear_cross_entropy": _cut,
        "chunked_linear_cross_entropy": _quack_heads,
    }
    return made[entry.spelling](point)


def _with_hard(soft: Tensor, z: Tensor, labels: Tensor, T: float, hard: float) -> Tensor:
    soft = soft if T == 1.0 else soft * T**2
    return soft + hard * F.cross_entropy(z.float(), labels) if hard else soft


def _labels_of(function: Any) -> Loss:
    # It may write its gradient over its input, which the caller still needs.
    return lambda z, v, labels, T, hard: function(z.clone(), labels)


def _quack(point: Point) -> Loss:
    return _labels_of(importlib.import_module("quack.cross_entropy").cross_entropy)


def _trl_logits(point: Point) -> Loss:
    function = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    beta = BETAS[point.divergence]

    def loss(z: Tensor, v: Tensor, labels: Tensor, T: float, hard: float) -> Tensor:
        # [B, S, V], and a mean over the tokens by the labels that it is given, as its trainer calls it.
        soft = function(z[None].float(), v[None].float(), labels=labels[None], beta=beta, temperature=T)
        return _with_hard(soft, z, labels, T, hard)

    return loss


def _trl_heads(point: Point) -> Loss:
    function = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    beta = BETAS[point.divergence]

    def loss(
        x: Tensor, weight: Tensor, t_x: Tensor, t_weight: Tensor, labels: Tensor, T: float, hard: float
    ) -> Tensor:
        mask = torch.ones(1, len(x), device=x.device)
        soft = function(x[None], t_x[None], weight, t_weight, mask, beta, temperature=T)[0]
        soft = soft if T == 1.0 else soft * T**2
        return soft + hard * F.cross_entropy(F.linear(x, weight).float(), labels) if hard else soft

    return loss


def _liger_heads(point: Point) -> Loss:
    beta = BETAS[point.divergence]
    # Its weights are of a hard term and of a soft one without T²; a weight of T² is what its user gives it.
    made = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=point.hard_weight, weight_soft_loss=point.temperature**2, beta=beta,
        temperature=point.temperature,
    )  # fmt: skip

    def loss(x: Tensor, weight: Tensor, t_x: Tensor, t_weight: Tensor, labels: Tensor, *_: float) -> Tensor:
        return made(x, weight, t_x, t_weight, labels)

    return loss


def _liger_labels(point: Point) -> Loss:
    made = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, t_x, t_weight, labels, T, hard: made(weight, x, labels)


def _cut(point: Point) -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    options = {"impl": "torch_compile"} if point.device == "cpu" else {}  # its kernels need a GPU
    return lambda x, weight, t_x, t_weight, labels, T, hard: function(x, weight, labels, **options)


def _quack_heads(point: Point) -> Loss:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda x, weight, t_x, t_weight, labels, T, hard: function(x, weight, labels)
