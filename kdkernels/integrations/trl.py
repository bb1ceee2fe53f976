"""TRL's distillation trainers on these kernels: functions of theirs replaced by ones that return the same."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..divergences import gkd
from ..functional import kd_loss, kd_loss_with_stats
from ..sources import Head

# What is replaced: a module, and a name in it.
_HEADS = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"
_LOGITS = "trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss"
_ORIGINALS: dict[tuple[str, str], Any] = {}


def patch() -> None:
    """Makes TRL's `DistillationTrainer` and `GKDTrainer` compute their divergence here, until `unpatch`.

    They return what they did: the loss without T², over the same tokens and denominators, the sum of the
    student's entropies and the number of tokens; in float32. What is not done here, such as a loss for each
    class, goes to TRL's own.

    Raises:
        ModuleNotFoundError: There is no TRL.
        RuntimeError: This TRL hasn't these functions, or with other parameters or defaults; nothing is
            replaced.

    Example:
        >>> with kdkernels.integrations.trl.patched():
        ...     GKDTrainer(student, teacher_model=teacher, args=args, train_dataset=data).train()
    """
    if _ORIGINALS:
        return
    ours: dict[tuple[str, str], Callable[..., Any]] = {_HEADS: _of_heads, _LOGITS: _of_logits}
    found = {place: _at(*place) for place in ours}
    for (module, name), (_, function) in found.items():
        theirs, wanted = _takes(function), _takes(ours[module, name])
        if theirs != wanted:
            raise RuntimeError(
                f"{module}.{name} of TRL {importlib.import_module('trl').__version__} takes {theirs}, and "
                f"this was written for {wanted}: use a version of TRL that has these, or go without"
            )
    for place, (owner, function) in found.items():
        _ORIGINALS[place] = function
        mine: Any = ours[place]
        setattr(owner, place[1].split(".")[-1], staticmethod(mine) if inspect.isclass(owner) else mine)


def unpatch() -> None:
    """Puts TRL's own functions back."""
    for (module, name), function in _ORIGINALS.items():
        owner, _ = _at(module, name)
        setattr(owner, name.split(".")[-1], staticmethod(function) if inspect.isclass(owner) else function)
    _ORIGINALS.clear()


@contextmanager
def patched() -> Iterator[None]:
    """Within it, as after `patch`; what was patched before stays so."""
    before = bool(_ORIGINALS)
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()


def _takes(function: Callable[..., Any]) -> str:
    """Its parameters and their defaults; annotations change nothing."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)


def _at(module: str, name: str) -> tuple[Any, Callable[..., Any]]:
    """Where a function is, and itself."""
    try:
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        return owner, getattr(owner, last)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "trl":
            raise
        raise RuntimeError(
            f"this TRL has no {module}.{name} ({error}): use a version that has, or go without"
        ) from error


def _of_heads(
    student_hidden_states: Tensor, teacher_hidden_states: Tensor, student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor, completion_mask: Tensor, beta: float, num_items_in_batch: Any = None,
    student_lm_head_bias: Tensor | None = None, teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None, temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of hidden states and heads: loss, sum of the student's entropies, number of tokens."""
    empty = not (student_lm_head_weight.numel() and teacher_lm_head_weight.numel())  # gathered by TRL
    if empty or not (student_logit_scale > 0 and teacher_logit_scale > 0):
        return _ORIGINALS[_HEADS](
            student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight,
            completion_mask, beta, num_items_in_batch, student_lm_head_bias, teacher_lm_head_bias,
            student_logit_scale, teacher_logit_scale, student_final_logit_softcapping,
            teacher_final_logit_softcapping, temperature,
        )  # fmt: skip
    student = _head(
        student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale,
        student_final_logit_softcapping,
    )  # fmt: skip
    with torch.no_grad():
        teacher = _head(
            teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale,
            teacher_final_logit_softcapping,
        )  # fmt: skip
    loss, stats = kd_loss_with_stats(
        student, teacher, divergence=gkd(beta), temperature=temperature, t_squared=False,
        mask=completion_mask != 0, num_items=num_items_in_batch,
    )  # fmt: skip
    count = (completion_mask != 0).sum()
    return loss, stats.student_entropy * count, count


def _head(hidden: Tensor, weight: Any, bias: Any, scale: float, softcap: float | None) -> Head:
    """Of a head that may be sharded, or in another precision than hidden states."""
    parts = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (weight, bias)]
    weight, bias = (None if x is None else x.to(hidden.dtype) for x in parts)
    return Head(hidden, weight, bias, scale, softcap)


def _of_logits(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
    temperature: float = 1.0, reduction: str = "batchmean", num_items_in_batch: Any = None,
) -> Tensor:  # fmt: skip
    """Of logits."""
    if (
        reduction not in ("batchmean", "sum", "mean") and num_items_in_batch is None
    ) or teacher_logits.requires_grad:
        return _ORIGINALS[_LOGITS](
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )
    mask = None if labels is None else labels != -100
    whole = kd_loss(
        student_logits, teacher_logits, divergence=gkd(beta), temperature=temperature, t_squared=False,
        mask=mask, reduction="sum",
    )  # fmt: skip
    rows = student_logits.shape[:-1].numel() if mask is None else mask.sum()
    if num_items_in_batch is not None:
        count = num_items_in_batch
        return whole / (count.to(whole.device) if isinstance(count, Tensor) else count)
    if reduction == "batchmean":
        return whole / (max(len(student_logits), 1) if mask is None else mask.sum().clamp_min(1))
    return whole if reduction == "sum" else whole / (rows * student_logits.shape[-1])
