"""The loss as users of liger-kernel write it on logits, for the divergences that it has.

Liger's losses take log-probabilities (``LigerKLDIVLoss`` also probabilities), so that every spelling begins
with torch's ``log_softmax`` in fp32, through which autograd comes back to the logits. A spelling takes ``(z,
v, labels, temperature, hard_weight)`` and returns the mean over the rows, as those of `eager` do.

``kl_div``
    ``LigerKLDIVLoss`` against probabilities.
``log_target``
    ``LigerKLDIVLoss`` in log space.
``jsd``
    ``LigerJSD``, whose beta 0 and 1 are the forward and the reverse KL.

The hard term is ``LigerCrossEntropyLoss``. There is no soft cross-entropy, and no reverse KL by
``LigerKLDIVLoss``, which gives its second argument no gradient.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kdkernels.bench.eager import Loss


def missing() -> str | None:
    """Why Liger can't be used here, or None where it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        _transformers()
    except Exception as error:  # whatever it raises, the others can be measured without it
        return f"liger-kernel can't be imported: {type(error).__name__}: {error}"
    return None


def version() -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _transformers() -> Any:
    return importlib.import_module("liger_kernel.transformers")


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _with_hard(
    soft: Tensor, z: Tensor, wide: Tensor, labels: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    if temperature != 1.0:
        soft = soft * temperature**2
    if not hard_weight:
        return soft
    # It writes its gradient over its input: the caller's logits must not be that.
    own = wide.clone() if wide is z else wide
    return soft + hard_weight * _transformers().LigerCrossEntropyLoss()(own, labels)


def kl_div(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """KL(p || q) as ``LigerKLDIVLoss()(log q, p)``."""
    wide, v = z.float(), v.float()
    p = F.softmax(v if temperature == 1.0 else v / temperature, -1)
    soft = _transformers().LigerKLDIVLoss(reduction="batchmean")(_log_probs(wide, temperature), p)
    return _with_hard(soft, z, wide, labels, temperature, hard_weight)


def log_target(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
    """KL(p || q) as ``LigerKLDIVLoss(log_target=True)(log q, log p)``."""
    wide, v = z.float(), v.float()
    loss = _transformers().LigerKLDIVLoss(reduction="batchmean", log_target=True)
    soft = loss(_log_probs(wide, temperature), _log_probs(v, temperature))
    return _with_hard(soft, z, wide, labels, temperature, hard_weight)


def _jsd(beta: float) -> Loss:
    def spelled(z: Tensor, v: Tensor, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
        wide, v = z.float(), v.float()
        loss = _transformers().LigerJSD(beta=beta)
        soft = loss(_log_probs(wide, temperature), _log_probs(v, temperature))
        return _with_hard(soft, z, wide, labels, temperature, hard_weight)

    return spelled


SPELLINGS: dict[str, dict[str, Loss]] = {
    "forward_kl": {"kl_div": kl_div, "log_target": log_target, "jsd": _jsd(0.0)},
    "reverse_kl": {"jsd": _jsd(1.0)},
    "soft_cross_entropy": {},
    "jsd": {"jsd": _jsd(0.5)},
}
