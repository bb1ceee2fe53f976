"""The losses that `benchmarks audit` examines: ours, eager spellings, libraries', called as their users do.

A library's loss of hidden states gets the logits as hidden states and an identity for a head, so that its
products are exact; classes that −inf excludes from every row are excluded by its bias, which is how a head
says so. What a library's documentation says of its loss is told to the audit, which takes it at its word.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels.bench import eager

# An identity of so many classes squared is a head that a test can afford.
MAX_VOCAB = 1024


@dataclass(frozen=True)
class Examined:
    """A loss, and what its documentation says of it.

    Attributes:
        file: The scorecards of a file stand together.
        name: What its scorecard calls it.
        loss: The loss.
        tells: Arguments of `kd.audit`.
        note: How it is called.
    """

    file: str
    name: str
    loss: Callable[..., Any]
    tells: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def ours(device: str) -> Iterator[Examined]:
    """`kd_loss`, every divergence, on every backend that runs here."""
    wanted: tuple[Any, ...] = (
        "forward_kl", "soft_cross_entropy", "reverse_kl", kd.JSD(0.5), kd.SkewKL(0.1),
        kd.SkewReverseKL(0.1), "tvd", "squared_error", kd.AlphaBeta(0.2, 0.7), kd.DKD(1.0, 8.0),
        kd.LogitMSE(), kd.LogitMSE(centered=True), kd.BinaryKL(),
    )  # fmt: skip
    logits = torch.zeros(2, 2, device=device)
    for backend, why in kd.explain(logits, logits).reasons.items():
        if why is not None:
            continue
        for divergence in wanted:
            binary = isinstance(divergence, kd.BinaryKL)
            both = divergence in ("forward_kl", kd.JSD(0.5), kd.DKD(1.0, 8.0))
            for hard_weight in (None, 0.5) if both else (None,):
                options = {"divergence": divergence, "backend": backend, "hard_weight": hard_weight}
                tells = {"divergence": divergence, "options": options, "teacher_gradient": False}
                if binary:
                    tells["labels"] = None
                more = "" if hard_weight is None else f", hard_weight={hard_weight}"
                shown = f"kd_loss, {divergence}{more}, backend={backend!r}"
                yield Examined(f"kd_loss-{backend}", shown, kd.kd_loss, tells)


def tutorial(z: Tensor, v: Tensor, labels: Tensor, T: float = 1.0) -> Tensor:
    """What PyTorch's tutorial on distillation has, and most code after it: in the dtype of the logits."""
    p = F.softmax(v / T, -1)
    lq = F.log_softmax(z / T, -1)
    soft = (p * (p.log() - lq)).sum() / len(z) * T**2
    return 0.25 * soft + 0.75 * F.cross_entropy(z, labels)


def one_line(z: Tensor, v: Tensor, T: float = 1.0) -> Tensor:
    """What most answers on forums have."""
    return F.kl_div(F.log_softmax(z / T, -1), F.softmax(v / T, -1), reduction="batchmean") * T**2


def spellings() -> Iterator[Examined]:
    """Eager PyTorch: what is most written, and honest spellings, fp32 first."""
    yield Examined(
        "eager", "PyTorch's tutorial", tutorial, {"ignore_index": None},
        "of images, whose labels are all classes; 0.25 × soft + 0.75 × cross-entropy",
    )  # fmt: skip
    yield Examined("eager", "F.kl_div in one line", one_line, {"divergence": "forward_kl"})
    for divergence in eager.TERMS:
        for name, spelling in eager.SPELLINGS[divergence].items():

            def loss(z: Tensor, v: Tensor, temperature: float, spelling: eager.Loss = spelling) -> Tensor:
                return spelling(
                    z, v, torch.zeros(len(z), dtype=torch.int64, device=z.device), temperature, 0.0
                )

            tells = {"divergence": divergence, "temperature": "temperature"}
            yield Examined("eager", f"{divergence}, {name}, upcast first", loss, tells)


def head(logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias that make these logits, to the bit."""
    cut = torch.isneginf(logits.detach()).all(0)
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    if not cut.any():
        return logits, eye, None
    bias = torch.zeros(len(cut), dtype=logits.dtype, device=logits.device).masked_fill(cut, -torch.inf)
    return logits.masked_fill(cut, 0.0), eye, bias


def liger_jsd(
    z: Tensor, v: Tensor, labels: Tensor, temperature: float = 1.0, beta: float = 0.5, **weights: float
) -> Tensor:
    """`LigerFusedLinearJSDLoss`, not compiled."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        beta=beta, temperature=temperature, compiled=False, **weights
    )
    (x, weight, bias), (t_x, t_weight, t_bias) = head(z), head(v)
    return loss(x, weight, t_x, t_weight, labels, bias, t_bias)


def liger(device: str) -> Iterator[Examined]:
    """Liger's chunked loss anywhere, its Triton kernels on a GPU."""
    for beta in (0.0, 0.5, 1.0):
        for hard in (0.0, 0.5):
            weights = {"weight_hard_loss": hard, "weight_soft_loss": 1.0 - hard}
            yield Examined(
                "liger-kernel", f"LigerFusedLinearJSDLoss, beta={beta}, weight_hard_loss={hard}",
                partial(liger_jsd, beta=beta, **weights),
                {"divergence": kd.gkd(beta), "labels": "labels", "temperature": "temperature",
                 "max_vocab": MAX_VOCAB, "options": {}},
                "compiled=False; the logits through an identity for a head",
            )  # fmt: skip
    if device == "cpu":
        return
    module = importlib.import_module("liger_kernel.transformers")
    kinds = {"student": "log_probs", "teacher": "log_probs"}
    for beta in (0.0, 0.5, 1.0):
        tells = {"divergence": kd.gkd(beta), "labels": "shift_labels", **kinds}
        yield Examined("liger-kernel", f"LigerJSD, beta={beta}", module.LigerJSD(beta=beta), tells)
    tells = {"divergence": "forward_kl", "labels": None, "teacher": "probs", "student": "log_probs"}
    yield Examined("liger-kernel", "LigerKLDIVLoss", module.LigerKLDIVLoss(), tells)
    module_tvd = module.LigerTVDLoss(reduction="batchmean")
    tells = {"divergence": "tvd", "student": "probs", "teacher": "probs", "labels": "shift_labels"}
    yield Examined("liger-kernel", "LigerTVDLoss", module_tvd, tells)


def trl_chunked(
    z: Tensor, v: Tensor, mask: Tensor | None = None, temperature: float = 1.0,
    num_items_in_batch: int | None = None, beta: float = 0.5,
) -> Tensor:  # fmt: skip
    """`_chunked_divergence_loss`, the loss of TRL's distillation trainer."""
    function = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    (x, weight, bias), (t_x, t_weight, t_bias) = head(z), head(v)
    counted = torch.ones(len(z), device=z.device) if mask is None else mask
    loss, _, _ = function(
        x[None], t_x[None], weight, t_weight, counted[None], beta, num_items_in_batch, bias, t_bias,
        temperature=temperature,
    )  # fmt: skip
    return loss  # type: ignore[no-any-return]


def trl() -> Iterator[Examined]:
    """TRL's losses of logits and of hidden states."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    generalized = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    for beta in (0.0, 0.5, 1.0):
        yield Examined(
            "trl", f"GKDTrainer.generalized_jsd_loss, beta={beta}", generalized,
            {"divergence": kd.gkd(beta), "ndim": 3, "denominator": "batch", "options": {"beta": beta}},
            "on [B, S, V], as the trainer calls it; its default reduction is 'batchmean'",
        )  # fmt: skip
    for beta in (0.0, 0.5, 1.0):
        yield Examined(
            "trl", f"_chunked_divergence_loss of DistillationTrainer, beta={beta}", trl_chunked,
            {"divergence": kd.gkd(beta), "options": {"beta": beta}, "max_vocab": MAX_VOCAB,
             "teacher_gradient": False, "ndim": 2},
            "the logits through an identity for a head",
        )  # fmt: skip
    sdft = importlib.import_module("trl.experimental.sdft.loss_utils")
    for alpha in (0.0, 0.5, 1.0):
        function = partial(sdft.compute_full_logit_self_distillation_loss, distillation_alpha=alpha)
        tells = {"divergence": kd.gkd(alpha), "ndim": 3}
        yield Examined("trl", f"compute_full_logit_self_distillation_loss, alpha={alpha}", function, tells)


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def all_of_them(device: str) -> tuple[list[Examined], dict[str, str]]:
    """Every loss that can be called here, and why others can't."""
    found, missing = [*ours(device), *spellings()], {}
    for package, module, peers in (
        ("liger-kernel", "liger_kernel", partial(liger, device)), ("trl", "trl", trl),
    ):  # fmt: skip
        if importlib.util.find_spec(module) is None:
            missing[package] = "not installed"
            continue
        try:
            found += list(peers())
        except Exception as error:  # whatever an import raises, the others can be examined without it
            missing[package] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return found, missing
