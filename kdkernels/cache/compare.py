"""What is stored against the teacher, run again: how far rows are from what it says now."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sources import Head
from ..sparse import Sampled, TopK
from .errors import CacheError
from .folder import answers
from .reader import TeacherCache

# Log-probabilities of classes below this say nothing of a loss, and are stored coarsely.
LIKELY = 1e-3
# Logits at a time, in double precision.
_CHUNK = 1 << 24
# What mean total variation passes, as a share of the stored mass. The format keeps rows within some 4e-4. Run
# in another batch, logits of 8 bits of mantissa (bfloat16) differ by 1/256 of themselves: 0.06 of a logit of
# 16, and so some 6 % of a probability.
BOUNDS = {"float32": 2e-3, "float64": 2e-3, "float16": 1e-2, "bfloat16": 4e-2}


@dataclass
class Differences:
    """Over the rows that were compared.

    Attributes:
        mean: Of the total variation, classes and tail, for each temperature.
        largest: Likewise.
        mass: The mean of what the stored classes weigh, likewise.
        log_prob: The largest difference of a stored log-probability, of classes above `LIKELY`.
        same: The share of rows that hold the teacher's k most probable classes now.
        shared: The share of stored classes that are among those.
        rows: How many.
        deviation: Of draws, how many standard deviations their mean log-probability is from the expected one.
    """

    mean: dict[float, float] = field(default_factory=dict)
    largest: dict[float, float] = field(default_factory=dict)
    mass: dict[float, float] = field(default_factory=dict)
    log_prob: float = 0.0
    same: float = 0.0
    shared: float = 0.0
    rows: int = 0
    deviation: float = 0.0


@torch.no_grad()
def differences(cache: TeacherCache, model: Any, sample: int, seed: int) -> Differences:
    """Compares a sample of sequences.

    Raises:
        CacheError: The model has another number of classes, or there is nothing to compare.
    """
    temperatures = cache.manifest.temperatures
    mean, largest, mass = (dict.fromkeys(temperatures, 0.0) for _ in range(3))
    found = Differences(mean, largest, mass)
    surprise = variance = 0.0
    for tokens, stored in cache.sequences(sample, seed):
        (made,) = answers(model, [tokens.tolist()])
        for rows, z in _parts(made):
            if z.shape[-1] != cache.manifest.vocab_size:
                raise CacheError(
                    f"--teacher has {z.shape[-1]} classes, and the cache {cache.path} is of "
                    f"{cache.manifest.vocab_size}"
                )
            part = stored[rows]
            found.rows += len(z)
            if isinstance(part, TopK):
                _add(found, part, z)
            else:
                excess, spread = _surprise(part, z, cache.manifest.draws or 1)
                surprise, variance = surprise + excess, variance + spread
    if not found.rows:
        raise CacheError(f"{cache.path} holds nothing that could be compared")
    for each in (found.mean, found.mass):
        each.update({t: x / found.rows for t, x in each.items()})
    found.same, found.shared = found.same / found.rows, found.shared / found.rows
    found.deviation = surprise / math.sqrt(variance) if variance else (0.0 if surprise == 0 else math.inf)
    return found


def masses(cache: TeacherCache, sample: int, seed: int) -> Tensor:
    """Of the rows of some sequences, what the stored classes weigh at temperature 1; of draws, all."""
    each = [
        torch.ones(len(stored.ids))
        if isinstance(stored, Sampled)
        else torch.where(stored.ids < 0, -math.inf, stored.log_probs).double().logsumexp(-1).exp().float()
        for _, stored in cache.sequences(sample, seed)
    ]
    return torch.cat(each) if each else torch.zeros(0)


def bound_of(dtype: torch.dtype) -> float:
    """What mean total variation passes, of a teacher run in a dtype."""
    return BOUNDS[str(dtype).removeprefix("torch.")]


def _parts(made: Tensor | Head) -> Iterator[tuple[slice, Tensor]]:
    rows, classes = (made.hidden, len(made.weight)) if isinstance(made, Head) else (made, made.shape[-1])
    for begin in range(0, len(rows), step := max(_CHUNK // classes, 1)):
        at = slice(begin, begin + step)
        part = made[at]
        yield at, (part.logits() if isinstance(part, Head) else part).double().cpu()


def _add(found: Differences, stored: TopK, z: Tensor) -> None:
    there = stored.ids >= 0
    known = there.any(-1)  # of what a server didn't say there is nothing to compare
    ids = stored.ids.clamp(min=0)
    for t, lse in (stored.lse or {}).items():
        p = (z / t).softmax(-1).gather(-1, ids).where(there, 0.0)
        q = (stored.log_probs.double() / t - lse.double()[:, None]).exp().where(there, 0.0)
        tails = (1 - p.sum(-1)) - (1 - q.sum(-1))
        tv = (0.5 * ((p - q).abs().sum(-1) + tails.abs())).where(known, 0.0)
        found.mean[t] += float(tv.sum())
        found.mass[t] += float(q.sum())
        found.largest[t] = max(found.largest[t], float(tv.max()))
    log_p = z.log_softmax(-1).gather(-1, ids)
    likely = there & (log_p > math.log(LIKELY))
    apart = (log_p - stored.log_probs.double()).abs().where(likely, 0.0)
    found.log_prob = max(found.log_prob, float(apart.max()))
    k = min(int(stored.ids.shape[-1]), z.shape[-1])
    top = z.topk(k).indices
    hits = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, top, True).gather(-1, ids) & there
    share = hits.sum(-1) / there.sum(-1).clamp(min=1)
    found.shared += float(share.where(known, 1.0).sum())
    found.same += float(((share == 1) | ~known).sum())


def _surprise(stored: Sampled, z: Tensor, draws: int) -> tuple[float, float]:
    """Of the draws' mean log-probability what is not expected, and its variance, summed over rows."""
    log_p = (z / stored.temperature).log_softmax(-1)
    p = log_p.exp()
    expected = (p * log_p).nan_to_num(0.0).sum(-1)
    variance = (p * (log_p - expected[:, None]).pow(2)).nan_to_num(0.0).sum(-1) / draws
    drawn = (stored.weights.double() * log_p.gather(-1, stored.ids.clamp(min=0))).where(stored.ids >= 0, 0.0)
    return float((drawn.sum(-1) - expected).sum()), float(variance.sum())
