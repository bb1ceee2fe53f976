"""The analysis of `python -m benchmarks strategies`, fixed before any run: paired differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student_t

CONFIDENCE = 0.95
# Fewer decide nothing: of two, equal differences are a coincidence of rounded accuracies.
SEEDS = 5
REPRODUCED, OPPOSITE, NULL = "reproduced", "not reproduced", "null"


@dataclass(frozen=True)
class Paired:
    """Differences strategy − control over seeds.

    Attributes:
        n: How many.
        mean: Their mean.
        half_width: Of the t interval around it; None for fewer than two.
        effect: Mean over standard deviation (Cohen's d of paired samples); None where there is no deviation.
        p: Of the two-sided paired t-test; 1 for fewer than two.
    """

    n: int
    mean: float
    half_width: float | None
    effect: float | None
    p: float


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its t interval; None for fewer than two values."""
    if len(values) < 2:
        return fmean(values), None
    quantile = float(student_t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def paired(strategy: Sequence[float], control: Sequence[float]) -> Paired:
    """The paired comparison of two arms, seed by seed.

    Args:
        strategy: A figure for each seed.
        control: That of the control on the same seeds, in the same order.

    Raises:
        ValueError: Unequal numbers of figures, or none.
    """
    if len(strategy) != len(control) or not strategy:
        raise ValueError(f"arms must be paired seed by seed, got {len(strategy)} and {len(control)} figures")
    differences = [s - c for s, c in zip(strategy, control, strict=True)]
    mean, half_width = interval(differences)
    n = len(differences)
    if half_width is None:
        return Paired(n, mean, None, None, 1.0)
    deviation = stdev(differences)
    if deviation == 0.0:
        # The same difference at every seed: no doubt is left, unless it is none at all.
        return Paired(n, mean, 0.0, None, 1.0 if mean == 0.0 else 0.0)
    p = 2.0 * float(student_t.sf(abs(mean) / deviation * math.sqrt(n), n - 1))
    return Paired(n, mean, half_width, mean / deviation, p)


def holm(p: Mapping[str, float], family: int | None = None) -> dict[str, float]:
    """Holm's step-down correction: the k-th smallest p times m − k + 1, not below an earlier one, at most 1.

    Args:
        p: By name.
        family: m, how many claims there are in all; those that are not in `p` count as the largest.

    Raises:
        ValueError: A family smaller than what is given of it.
    """
    m = len(p) if family is None else family
    if m < len(p):
        raise ValueError(f"family must be at least {len(p)}, the number of p-values, got {m}")
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (m - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def verdict(found: Paired, adjusted: float) -> str:
    """Whether 0 is excluded, after the correction, above (as claimed), below, or neither."""
    if found.n < SEEDS or adjusted >= 1.0 - CONFIDENCE:
        return NULL
    return REPRODUCED if found.mean > 0 else OPPOSITE
