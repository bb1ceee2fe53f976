"""What is appended, checked and in the form that the codec takes: sorted ids, −1 for none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sources import Head
from .bits import Ints
from .codec import Floats
from .errors import CacheError
from .manifest import Manifest

# How far the classes' mass may be above all classes', in log space: 1 % is what bfloat16 makes of it.
_ROUNDING = 0.05
# Logits at a time. On a CPU so few that malloc has the memory for each at hand; a GPU wants more.
_CHUNK, _CHUNK_OF_DEVICE = 1 << 20, 1 << 26
# Logits that a head makes at a time, 128 MiB of float32: 220 rows of 151,936 classes, enough for its product.
_CHUNK_OF_HEAD = 1 << 25


def top_k_rows(manifest: Manifest, length: int, teacher: Any) -> tuple[Ints, Floats, Floats]:
    """Ids, log-probabilities and the log-odds of the tail, of a `kd.TopK`."""
    if not hasattr(teacher, "log_probs") or not hasattr(teacher, "lse"):
        raise CacheError(
            f"teacher must be a kd.TopK for a cache of kind 'topk', got {type(teacher).__name__}; of "
            "logits take append_logits"
        )
    ids = _ids(manifest, length, teacher.ids)
    x = _floats("log_probs of the teacher", teacher.log_probs, ids.shape)
    _refuse("log_probs of the teacher", np.isnan(x) | (x == np.inf))
    x = np.where(ids < 0, -np.inf, x)
    ids, x = _distinct(manifest, ids, x, -np.inf, summed=False)
    lse = dict(teacher.lse or {})
    odds = np.empty((length, len(manifest.temperatures)))
    whole = (ids >= 0).sum(1) == manifest.vocab_size
    for n, t in enumerate(manifest.temperatures):
        if t not in lse and t != 1.0:
            raise CacheError(
                f"lse of the teacher must have each temperature of the manifest, {manifest.temperatures}; "
                f"{t:g} is missing: what the tail weighs there can't be known from the classes that are kept"
            )
        total = _floats(f"lse[{t:g}] of the teacher", lse[t], (length,)) if t in lse else np.zeros(length)
        _refuse(f"lse[{t:g}] of the teacher", ~np.isfinite(total))
        head = np.logaddexp.reduce(x / t, axis=1) - total
        _refuse(f"log_probs of the teacher less lse[{t:g}], summed over the classes,", head > _ROUNDING)
        head = np.minimum(head, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            odds[:, n] = np.log(-np.expm1(head)) - head
        odds[whole, n] = -np.inf
    return ids, x, odds


def sampled_rows(manifest: Manifest, length: int, teacher: Any) -> tuple[Ints, Ints]:
    """Ids and how often each was drawn, of a `kd.Sampled`."""
    if not hasattr(teacher, "weights"):
        raise CacheError(
            f"teacher must be a kd.Sampled for a cache of kind 'sampled', got {type(teacher).__name__}; of "
            "logits take append_logits"
        )
    draws, (temperature,) = manifest.draws, manifest.temperatures
    assert draws is not None
    if float(teacher.temperature) != temperature:
        raise CacheError(
            f"temperature of the teacher must be the manifest's, {temperature:g}, got {teacher.temperature:g}"
        )
    ids = _ids(manifest, length, teacher.ids)
    counts = draws * _floats("weights of the teacher", teacher.weights, ids.shape)
    counts = np.where(ids < 0, 0.0, counts)
    whole = np.rint(counts)
    _refuse(
        f"weights of the teacher, which must be counts of {draws} draws over {draws},",
        ~((np.abs(counts - whole) <= 0.01) & (whole >= 0)),
    )
    _refuse(f"weights of the teacher, whose counts must add to {draws},", whole.sum(1) != draws)
    ids = np.where(whole == 0, -1, ids)
    ids, counts = _distinct(manifest, ids, whole, 0.0, summed=True)
    return ids, counts.astype(np.int64)


def top_k_of_logits(manifest: Manifest, logits: Tensor | Head) -> tuple[Ints, Floats, Floats]:
    """The k largest of each row of `[S, V]`, and the log-odds of the tail from its own log-sum-exp."""
    parts = []
    for z in _chunks(manifest, logits):
        x, ids = z.topk(manifest.k, dim=-1)
        ids, order = ids.sort(-1)
        x = x.gather(-1, order)
        odds = _tail_odds(manifest, z, ids, x)
        parts.append((ids, x.double(), odds.double()))
    ids_of, x_of, odds_of = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    _refuse("logits", ~(np.isfinite(x_of).any(1) & (x_of < np.inf).all(1)))
    _refuse("logits", np.isnan(odds_of))
    return ids_of, x_of, odds_of


def _tail_odds(manifest: Manifest, z: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """The log-odds of all but the k largest, `[S, temperatures]`, from their own sum: 1 − mass cancels."""
    # Nothing of the tail is above the least of them.
    least = x.amin(-1, keepdim=True)
    least = torch.where(least.isfinite(), least, 0.0)
    below = z - least
    odds, e = [], torch.empty_like(below)
    for t in manifest.temperatures:
        tail = torch.mul(below, 1.0 / t, out=e).exp_().scatter_(-1, ids, 0.0).sum(-1)
        head = ((x - least) / t).logsumexp(-1)
        odds.append(tail.log() - head)
    return torch.stack(odds, dim=-1)


def draws_of_logits(manifest: Manifest, logits: Tensor | Head, seed: int) -> tuple[Ints, Ints]:
    """Draws from each row of `[S, V]`: the ids, and how often each."""
    draws, (temperature,) = manifest.draws, manifest.temperatures
    assert draws is not None
    generator = torch.Generator(_rows_of(logits).device).manual_seed(seed)
    parts = []
    for z in _chunks(manifest, logits):
        p = (z / temperature).softmax(-1)
        if not bool(p.isfinite().all()):
            raise CacheError("logits must be finite or -inf, and not all of a row -inf")
        parts.append(p.multinomial(draws, replacement=True, generator=generator))
    ids = torch.cat(parts).cpu().numpy()
    return _counted(manifest, ids)


def _counted(manifest: Manifest, ids: Ints) -> tuple[Ints, Ints]:
    ids, counts = _distinct(manifest, ids, np.ones(ids.shape), 0.0, summed=True)
    return ids, counts.astype(np.int64)


def _chunks(manifest: Manifest, logits: Tensor | Head) -> Any:
    rows = _rows_of(logits)
    step = max((_CHUNK if rows.device.type == "cpu" else _CHUNK_OF_DEVICE) // manifest.vocab_size, 1)
    # Whole steps, so that draws are those of logits that are there already.
    made = max(_CHUNK_OF_HEAD // manifest.vocab_size // step, 1) * step
    for begin in range(0, len(rows), made):
        part = logits[begin : begin + made]
        for z in (part.logits() if isinstance(part, Head) else part).detach().split(step):
            yield z if z.dtype == torch.float64 else z.float()


def _rows_of(logits: Tensor | Head) -> Tensor:
    return logits.hidden if isinstance(logits, Head) else logits


def check_logits(manifest: Manifest, length: int, logits: Any) -> None:
    """Raises on what is not logits `[length, vocab_size]`, or a head that would make them."""
    if isinstance(logits, Head):
        shape = (*logits.hidden.shape[:-1], len(logits.weight))
        if shape != (length, manifest.vocab_size):
            raise CacheError(
                f"a kd.Head must make logits [S, V] = {(length, manifest.vocab_size)}, and makes {shape}"
            )
        return
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise CacheError(f"logits must be a float tensor, got {got}")
    if tuple(logits.shape) != (length, manifest.vocab_size):
        raise CacheError(
            f"logits must be [S, V] = {(length, manifest.vocab_size)}, a row for each token id and a class "
            f"for each of the manifest's vocab_size, got {tuple(logits.shape)}"
        )


def _ids(manifest: Manifest, length: int, given: Any) -> Ints:
    if not isinstance(given, Tensor) or given.dtype.is_floating_point:
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise CacheError(f"ids of the teacher must be a tensor of whole numbers, got {got}")
    if given.dim() != 2 or len(given) != length:
        raise CacheError(
            f"ids of the teacher must be [S, k] with a row for each of {length} token ids, got "
            f"{tuple(given.shape)}"
        )
    ids = given.detach().cpu().numpy().astype(np.int64)
    _refuse(
        f"ids of the teacher, which must be from 0 to {manifest.vocab_size - 1}, or -1 for none,",
        (ids < -1) | (ids >= manifest.vocab_size),
    )
    return ids


def _floats(name: str, given: Any, shape: tuple[int, ...]) -> Floats:
    if not isinstance(given, Tensor):
        raise CacheError(f"{name} must be a tensor, got {type(given).__name__}")
    if tuple(given.shape) != shape:
        raise CacheError(f"{name} must be of shape {shape}, got {tuple(given.shape)}")
    return given.detach().to("cpu", torch.float64).numpy()


def _distinct(
    manifest: Manifest, ids: Ints, values: Floats, none: float, summed: bool
) -> tuple[Ints, Floats]:
    """Sorted ids `[n, k]`, each once: with the first of its values, or their sum."""
    k = manifest.k
    ids, values = _sorted(ids, values)
    again = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    if again.any():
        if summed:
            group = np.cumsum(np.pad(~again, ((0, 0), (1, 0))), axis=1) - 1
            sums = np.zeros_like(values)
            np.add.at(sums, (np.arange(len(ids))[:, None], group), values)
            values = np.take_along_axis(sums, group, axis=1)
        ids[:, 1:][again], values[:, 1:][again] = -1, none
        ids, values = _sorted(ids, values)
    if (ids[:, :-k] >= 0).any():
        found = int((ids >= 0).sum(1).max())
        raise CacheError(
            f"ids of the teacher must be at most the manifest's k={k} different ones in each row, got {found}"
        )
    missing = max(k - ids.shape[1], 0)
    ids = np.pad(ids[:, -k:], ((0, 0), (missing, 0)), constant_values=-1)
    return ids, np.pad(values[:, -k:], ((0, 0), (missing, 0)), constant_values=none)


def _sorted(ids: Ints, values: Floats) -> tuple[Ints, Floats]:
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)


def _refuse(what: str, wrong: Any) -> None:
    if wrong.any():
        at = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise CacheError(f"{what} can't be kept: position {at[0]} is NaN, infinite or out of range")
