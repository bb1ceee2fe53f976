"""A position's distribution as a row of bytes, and back.

A row of kind `topk` is, in this order (sizes in bytes for k = 64, V = 151,936 and three temperatures):

1. the ids + 1 (106), sorted, as `bits.SortedSet`; 0 in place of what is missing;
2. for each id a level of 12 bits (96): how far the log-probability is below the row's largest. 4,095 is −inf;
3. the row's range R (2), float16: the depth of level 4,094;
4. for each temperature (6), the log-odds of the tail in 16 bits.

`sampled`: 1., and for each id how often it was drawn, in as many bits as the number of draws has.

Levels are equally far apart down to a knee c, and ever farther from there, since the deeper a class, the
less it weighs: with s the hottest temperature, c = s·ln k and

    level = 4094·G(depth) / G(R),   G(d) = d for d ≤ c, else c + 2s·(1 − 1/√(1 + (d − c)/s))

What k classes at depth d weigh beside the first is at most k·exp(−d/s), which is 1 at the knee. G stays below
c + 2s, so that one class at the end of the world takes no more than a few levels from the others.

The log-odds of the tail keep both a small tail and a small head: 0 is no tail, 65,535 nothing but tail, and
any other code (code − 1)·80/65533 − 40.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bits import Bytes, Ints, SortedSet, pack, packed_bytes, unpack
from .errors import CacheError
from .manifest import Manifest

Floats = NDArray[np.float64]

LEVEL_BITS = 12
NOTHING = (1 << LEVEL_BITS) - 1  # the level of a probability of 0
_LEVELS = NOTHING - 1
_ODDS, _ODDS_STEPS, _ALL_TAIL = 40.0, 65533, 65535
# A row is written with the first range under this total variation from what it was, or the best one: 0.5 % of
# range moves the levels where the mass is by one or so.
_GOOD, _TRIES, _WIDER = 4e-4, 12, 0.005
# Elements decoded at a time: what is made on the way stays in the caches.
_CHUNK = 1 << 18


class TopKCodec:
    """Rows of ids, log-probabilities and the log-odds of their tails."""

    def __init__(self, manifest: Manifest) -> None:
        self.k = manifest.k
        self.temperatures = manifest.temperatures
        self.hottest = max(self.temperatures)
        self.knee = self.hottest * math.log(self.k)
        # exp of anything below is 0 in double precision, at any declared temperature.
        self.deepest = min(745.0 * self.hottest, 65000.0)
        self.ids = SortedSet(self.k, manifest.vocab_size)
        self._at_levels = self.ids.bytes
        self._at_range = self._at_levels + packed_bytes(self.k, LEVEL_BITS)
        self._at_odds = self._at_range + 2
        self.bytes = self._at_odds + 2 * len(self.temperatures)

    def encode(self, ids: Ints, x: Floats, odds: Floats) -> tuple[Bytes, Floats]:
        """Rows of bytes, and how far each is from what it was at each temperature, in total variation.

        Args:
            ids: `[n, k]`, sorted, −1 where there is nothing.
            x: Log-probabilities up to a constant `[n, k]`, −inf where there is nothing.
            odds: log(tail / (1 − tail)) at each temperature, `[n, temperatures]`.
        """
        top = x.max(1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        depth = np.where(x - top < -self.deepest, np.inf, top - x)
        odds = np.where(np.isinf(depth).all(1, keepdims=True), np.inf, np.minimum(odds, _ODDS))
        codes = _odds_codes(odds)
        kept = _odds_of(codes)
        exact = [_with_tail(-depth / t, odds[:, n]) for n, t in enumerate(self.temperatures)]

        finite = np.where(np.isfinite(depth), depth, 0.0)
        deepest = finite.max(1)
        n = len(ids)
        levels, ranges = np.zeros(depth.shape, np.int64), np.zeros(n, np.float16)
        errors = np.full((n, len(self.temperatures)), np.inf)
        todo = np.arange(n)
        for attempt in range(_TRIES):
            range_ = _up_to_half(deepest[todo] * (1 + _WIDER * attempt))
            tried = self._levels(depth[todo], range_)
            decoded = self._depths(tried, range_)
            error = np.stack(
                [
                    0.5 * np.abs(_with_tail(-decoded / t, kept[todo, m]) - exact[m][todo]).sum(1)
                    for m, t in enumerate(self.temperatures)
                ],
                axis=1,
            )
            better = error.max(1) < errors[todo].max(1)
            at = todo[better]
            levels[at], ranges[at], errors[at] = tried[better], range_[better], error[better]
            todo = todo[errors[todo].max(1) > _GOOD]
            if not len(todo):
                break
        octets = np.concatenate(
            [
                self.ids.encode(ids + 1),
                pack(levels, LEVEL_BITS),
                ranges.astype("<f2").view(np.uint8).reshape(n, 2),
                codes.astype("<u2").view(np.uint8).reshape(n, -1),
            ],
            axis=1,
        )
        return octets, errors

    def decode(self, rows: Bytes) -> dict[str, Any]:
        """`ids` (−1 where there is nothing), `log_probs` at temperature 1, and `lse` for each temperature.

        The log-sum-exp is that of what is returned, so that the mass of the classes and of the tail add to 1.

        Raises:
            CacheError: The bytes are no rows.
        """
        n = len(rows)
        ids, log_probs = np.empty((n, self.k), np.int64), np.empty((n, self.k), np.float32)
        lse = np.empty((len(self.temperatures), n))
        step = max(_CHUNK // self.k, 1)
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            self._decode(np.ascontiguousarray(rows[part]), ids[part], log_probs[part], lse[:, part])
        return {"ids": ids, "log_probs": log_probs, "lse": dict(zip(self.temperatures, lse, strict=True))}

    def _decode(self, rows: Bytes, ids: Ints, log_probs: NDArray[np.float32], lse: Floats) -> None:
        ids[:] = self.ids.decode(rows[:, : self._at_levels]) - 1
        levels = unpack(rows[:, self._at_levels : self._at_range], self.k, LEVEL_BITS)
        range_ = rows[:, self._at_range : self._at_odds].copy().view("<f2")[:, 0]
        if not (np.isfinite(range_) & (range_ >= 0)).all():
            raise CacheError("the range of a row is no number >= 0")
        if (levels[ids < 0] != NOTHING).any():
            raise CacheError("there is probability where there is no class")
        # In float32, as it is returned, before anything is summed.
        x = (-self._depths(levels, range_)).astype(np.float32).astype(np.float64)
        codes = rows[:, self._at_odds : self.bytes].copy().view("<u2")
        if ((codes == _ALL_TAIL) != (levels == NOTHING).all(1)[:, None]).any():
            raise CacheError("the classes of a row and its tail don't agree on whether all is tail")
        odds = _odds_of(codes)
        log_head = -np.logaddexp(0.0, odds)  # log(1 − tail)
        one = self.temperatures.index(1.0)
        log_probs[:] = x - _normalizer(x, log_head[:, one])[:, None]
        x = log_probs.astype(np.float64)
        for n, t in enumerate(self.temperatures):
            lse[n] = _normalizer(x / t, log_head[:, n])

    def _levels(self, depth: Floats, range_: NDArray[np.float16]) -> Ints:
        whole = self._companded(range_.astype(np.float64))[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            level = np.rint(self._companded(np.where(np.isfinite(depth), depth, 0.0)) / whole * _LEVELS)
        level = np.where(whole > 0, np.minimum(level, _LEVELS), 0)
        return np.where(np.isfinite(depth), level, NOTHING).astype(np.int64)

    def _depths(self, levels: Ints, range_: NDArray[np.float16]) -> Floats:
        g = levels * (self._companded(range_.astype(np.float64)) / _LEVELS)[:, None]
        deep = g > self.knee
        if deep.any():
            root = 1.0 - (g[deep] - self.knee) / (2 * self.hottest)
            g[deep] = self.knee + self.hottest * (1.0 / (root * root) - 1.0)
        g[levels == NOTHING] = np.inf
        return g

    def _companded(self, depth: Floats) -> Floats:
        beyond = np.maximum(depth - self.knee, 0.0) / self.hottest
        return np.minimum(depth, self.knee) + 2 * self.hottest * (1.0 - 1.0 / np.sqrt(1.0 + beyond))


class SampledCodec:
    """Rows of ids and of how often each was drawn."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.draws is not None
        self.k, self.draws = manifest.k, manifest.draws
        self.width = self.draws.bit_length()
        self.ids = SortedSet(self.k, manifest.vocab_size)
        self.bytes = self.ids.bytes + packed_bytes(self.k, self.width)

    def encode(self, ids: Ints, counts: Ints) -> Bytes:
        """Sorted ids `[n, k]`, −1 where there is nothing, and their counts, 0 there."""
        return np.concatenate([self.ids.encode(ids + 1), pack(counts, self.width)], axis=1)

    def decode(self, rows: Bytes) -> dict[str, Any]:
        """`ids` (−1 where there is nothing) and `weights`, their share of the draws, float32.

        Raises:
            CacheError: The bytes are no rows.
        """
        ids = self.ids.decode(rows[:, : self.ids.bytes]) - 1
        counts = unpack(rows[:, self.ids.bytes : self.bytes], self.k, self.width)
        if (counts.sum(1) != self.draws).any() or ((counts > 0) != (ids >= 0)).any():
            raise CacheError(f"the counts of a row are not those of {self.draws} draws")
        return {"ids": ids, "weights": (counts / self.draws).astype(np.float32)}


def codec_of(manifest: Manifest) -> TopKCodec | SampledCodec:
    """What a cache's rows are written and read with."""
    return TopKCodec(manifest) if manifest.kind == "topk" else SampledCodec(manifest)


def _with_tail(x: Floats, odds: Floats) -> Floats:
    """Probabilities `[n, k + 1]` of the classes and, last, of the tail."""
    log_head, log_tail = -np.logaddexp(0.0, odds), -np.logaddexp(0.0, -odds)
    log_p = x - _normalizer(x, log_head)[:, None]
    return np.exp(np.concatenate([log_p, log_tail[:, None]], axis=1))


def _log_sum_exp(x: Floats) -> Floats:
    top = x.max(1)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(x - top[:, None]).sum(1))


def _normalizer(x: Floats, log_head: Floats) -> Floats:
    """The log-sum-exp of all classes, or 0 where no stored one has any: −inf less that is still −inf."""
    head = _log_sum_exp(x)
    some = np.isfinite(head)
    return np.where(some, head - np.where(some, log_head, 0.0), 0.0)


def _odds_codes(odds: Floats) -> Ints:
    step = np.rint((np.clip(odds, -_ODDS, _ODDS) + _ODDS) / (2 * _ODDS) * _ODDS_STEPS).astype(np.int64) + 1
    return np.where(odds == -np.inf, 0, np.where(odds == np.inf, _ALL_TAIL, step))


def _odds_of(codes: Any) -> Floats:
    odds = (codes.astype(np.float64) - 1) * (2 * _ODDS / _ODDS_STEPS) - _ODDS
    return np.where(codes == 0, -np.inf, np.where(codes == _ALL_TAIL, np.inf, odds))


def _up_to_half(depth: Floats) -> NDArray[np.float16]:
    """The next float16 that is no smaller."""
    half = np.minimum(depth, 65504.0).astype(np.float16)
    return np.where(half < depth, np.nextafter(half, np.float16(np.inf)), half).astype(np.float16)
