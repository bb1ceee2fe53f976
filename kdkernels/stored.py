"""A stored teacher at the temperature of a call: checked, and as backends take it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .sources import LOGIT_DTYPES
from .sparse import PADDING, Sampled, Sparse, StoredSource, TopK

_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
# What is infinite as soon as the student gives anything to a class that the teacher gives nothing.
_NEEDS_TAIL = ("reverse_kl",)


def check_stored(source: StoredSource, leading: torch.Size, device: torch.device) -> None:
    """Raises on parts of a stored teacher that don't fit each other or the student."""
    kind, ids = type(source).__name__, source.ids
    parts: dict[str, Any] = (
        {"log_probs": source.log_probs, **{f"lse[{T}]": x for T, x in (source.lse or {}).items()}}
        if isinstance(source, TopK)
        else {"weights": source.weights, "log_probs": source.log_probs}
    )
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids of {kind} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"ids of {kind} must be integer class ids, got {ids.dtype}")
    if ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(f"ids of {kind} must have shape [..., k] with k >= 1, got {tuple(ids.shape)}")
    if ids.shape[:-1] != leading:
        raise ValueError(
            f"ids of {kind} must have the student's leading shape {tuple(leading)}, got "
            f"{tuple(ids.shape[:-1])} (shape {tuple(ids.shape)}); one row of k ids for each row of logits"
        )
    for name, x in parts.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} of {kind} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} of {kind} must be a float tensor, got {x.dtype}")
        shape = leading if name.startswith("lse") else ids.shape
        if x.shape != shape:
            raise ValueError(f"{name} of {kind} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    for name, x in {"ids": ids, **parts}.items():
        if x is not None and x.device != device:
            raise ValueError(
                f"{name} of {kind} must be on the student's device {device}, got {x.device}; move it with .to"
            )


def floats_of(source: StoredSource) -> list[Tensor]:
    """The parts of a stored teacher that may require grad."""
    if isinstance(source, TopK):
        return [source.log_probs, *(source.lse or {}).values()]
    return [source.weights] if source.log_probs is None else [source.weights, source.log_probs]


def check_meaning(source: StoredSource, divergence: Any, params: tuple[float, ...], T: float) -> None:
    """Raises where a loss of a stored teacher is none, naming what it asks for."""
    name, kind = divergence.name, f"kd.{type(source).__name__}"
    if divergence.target or divergence.binary or divergence.normaliser != "softmax":
        about = (
            "is about the label against all other classes"
            if divergence.target
            else "asks a question of each class"
            if divergence.binary
            else "compares logits"
        )
        raise ValueError(
            f"divergence={name!r} {about}, and {kind} is a part of a distribution: pass the teacher's "
            "logits, or take a divergence of distributions, such as 'forward_kl'"
        )
    if isinstance(source, Sampled):
        if name not in ("forward_kl", "soft_cross_entropy"):
            raise ValueError(
                f"divergence={name!r} is not linear in the teacher's probabilities, so that a sample gives "
                "another loss than the teacher: with kd.Sampled take 'forward_kl' or 'soft_cross_entropy'"
            )
        if not _is(source.temperature, T):
            raise ValueError(
                f"temperature must be the one that kd.Sampled was drawn at, {source.temperature}, got {T}: "
                "weights of one temperature say nothing of another; draw again"
            )
        return
    powers = name == "alpha_beta" and (params[0] <= 0 or params[0] + params[1] <= 0)
    if source.tail == "zero" and (name in _NEEDS_TAIL or powers):
        raise ValueError(
            f"divergence={name!r} is infinite where the teacher gives nothing, which tail='zero' says of "
            "every class that is not stored: take tail='ghost' or 'renormalize'"
        )
    if source.tail != "renormalize" and lse_at(source, T) is None and T != 1:
        given = ", ".join(str(t) for t in source.lse or ()) or "none beside 1"
        raise ValueError(
            f"temperature={T} was not declared by kd.TopK, whose lse has {given}: classes stored at one "
            f"temperature don't say how much is in the tail at another. Give lse={{{T}: (x / {T})"
            ".logsumexp(-1)} over the whole vocabulary, or take tail='renormalize'"
        )


def _is(declared: float, T: float) -> bool:
    # Arithmetic, which a compiler can follow.
    return abs(declared - T) <= 1e-9 * T


def lse_at(source: TopK, T: float) -> Tensor | None:
    """The log-sum-exp that is given for a temperature, or None."""
    return next((x for t, x in (source.lse or {}).items() if _is(t, T)), None)


@torch.no_grad()
def sparse(source: StoredSource, T: float, rows: Tensor, classes: int, R: torch.dtype, kl: bool) -> Sparse:
    """A checked stored teacher as backends take it.

    Args:
        source: The teacher.
        T: The temperature of the loss.
        rows: Which rows count, bool `[...]`; the others may hold anything.
        classes: V.
        R: float32 or float64.
        kl: Whether the loss is a forward KL, and no cross-entropy.
    """
    counted = rows.unsqueeze(-1)
    ids = torch.where(counted, source.ids.long(), PADDING)
    topk = source if isinstance(source, TopK) else None
    sampled = topk is None
    x, *more = floats_of(source)[: 2 if sampled else 1]
    x, a = x.double(), more[0].double() if more else None
    wrong = (ids < PADDING) | (ids >= classes)
    if sampled:
        wrong = wrong | ((x < 0) & (ids != PADDING))
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_entries(source, ids, x, wrong, classes)
    if not source._ordered:
        ids, order = ids.sort(dim=-1, stable=True)
        x, wrong = x.gather(-1, order), wrong.gather(-1, order)
        a = None if a is None else a.gather(-1, order)
        again = torch.nn.functional.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
        if sampled:
            # Weights of the same id, at its first place.
            places = torch.arange(ids.shape[-1], device=ids.device)
            first = torch.where(again, 0, places).cummax(-1).values
            x = torch.zeros_like(x).scatter_add(-1, first, torch.where(ids == PADDING, 0.0, x))
        ids = torch.where(again, PADDING, ids)
    there = ids != PADDING
    # A number that is none makes its row NaN, where nobody may look.
    ids = torch.where(wrong, PADDING, ids)
    extra: Tensor | None = None
    rest: Tensor | None
    if topk is None:
        log_p = x.log()
        if a is not None and kl:
            extra = torch.where(there & (x > 0), x * (a - log_p), 0.0).sum(-1)
    else:
        lse = None if topk.tail == "renormalize" else lse_at(topk, T)
        log_p = x / T if lse is None else x / T - lse.double().unsqueeze(-1)
    log_p = torch.where(wrong, math.nan, torch.where(there, log_p, -math.inf))
    if topk is None or topk.tail == "zero":
        rest = log_p.new_full(rows.shape, -math.inf)
    else:
        # Rounded log-probabilities may add up to more than 1, and those of all classes to less.
        log_mass = torch.logsumexp(log_p, -1)
        if topk.tail == "renormalize":
            rest, whole = None, log_mass != -math.inf  # a NaN makes the whole row one
        else:
            whole = (log_mass >= 0) | (there.sum(-1) == classes)
            rest = torch.where(whole, -math.inf, torch.log(-torch.expm1(log_mass)))
            log_p = _not_above_1(log_p, log_mass)
        log_p = torch.where(whole.unsqueeze(-1), log_p - log_mass.unsqueeze(-1), log_p)
    return Sparse(
        ids.contiguous(),
        log_p.to(R).contiguous(),
        None if rest is None else rest.to(R).contiguous(),
        None if extra is None else extra.to(R).contiguous(),
    )


# How far beyond 1 the stored mass may be, in nats: log-probabilities of 8 bits of mantissa are that wrong.
_ROUNDING = 0.1


def _not_above_1(log_p: Tensor, log_mass: Tensor) -> Tensor:
    """The same, where it is a part of a distribution; an error on a CPU, elsewhere NaN."""
    above = log_mass > _ROUNDING
    if log_p.device.type == "cpu" and not torch.compiler.is_compiling():
        if above.any():
            row = int(above.flatten().int().argmax())
            raise ValueError(
                f"log_probs of TopK must be log-probabilities, and those of row {row} add up to "
                f"{float(log_mass.flatten()[row].exp()):.4g}: of logits, or at another temperature than 1, "
                "give lse, the log-sum-exp over the whole vocabulary; tail='renormalize' needs none"
            )
        return log_p
    return torch.where(above.unsqueeze(-1), math.nan, log_p)


def _check_entries(source: StoredSource, ids: Tensor, x: Tensor, wrong: Tensor, classes: int) -> None:
    if not wrong.any():
        return
    kind, first = type(source).__name__, int(wrong.flatten().int().argmax())
    row, column = divmod(first, ids.shape[-1])
    one = int(ids.flatten()[first])
    if PADDING <= one < classes:
        raise ValueError(
            f"weights of {kind} must be >= 0, got {float(x.flatten()[first])} at row {row}, place {column}"
        )
    raise ValueError(
        f"ids of {kind} must be in [0, {classes}), or {PADDING} for padding, got {one} at row {row}, place "
        f"{column}; a class that the student doesn't have is left out, which tail='ghost' makes up for"
    )
