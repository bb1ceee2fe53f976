"""What `--cached` adds to the report: how far cached students are from the live one, and what they cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95

# The mark: a cache of this arm should leave this share of what the live teacher gives. A teacher as young as
# the demo's misses it by far: a third of its mass is outside its 64 most probable classes.
MARK = 0.9
MARKED_ARM = "ghost"

# The students that the cached ones are compared with, and what they are called here.
HARD, LIVE = "hard", "kd_loss"
BESIDE = {HARD: "hard labels only", LIVE: "live teacher"}

Figures = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def student_cdf(t: float, df: int) -> float:
    """P(|X| ≤ t) of Student's t with a whole number of degrees of freedom.

    Formula: with θ = atan(t / √df), a finite sum of powers of cos θ (Abramowitz and Stegun, 26.7.3, 26.7.4).
    """
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for n in range(1 + odd, df, 2):
        total += term
        term *= cos2 * n / (n + 1)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def student_quantile(confidence: float, df: int) -> float:
    """The t with P(|X| ≤ t) = confidence."""
    low, high = 0.0, 1.0
    while student_cdf(high, df) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < confidence else (low, middle)
    return high


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least two values and its t interval; NaN where a value is no number."""
    with np.errstate(invalid="ignore"):
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = student_quantile(CONFIDENCE, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Of a − b, paired by seed."""
    return interval([x - y for x, y in zip(a, b, strict=True)])


def share(hard: Sequence[float], live: Sequence[float], arm: Sequence[float]) -> Interval | None:
    """Of (hard − arm) / (hard − live), seed by seed; None where the interval of hard − live isn't above 0."""
    gaps = [h - v for h, v in zip(hard, live, strict=True)]
    # A seed without a gap has no share, however sure the others are.
    if not interval(gaps).low > 0 or 0 in gaps:
        return None
    return interval([(h - a) / gap for h, a, gap in zip(hard, arm, gaps, strict=True)])


def bits(figures: Figures, name: str) -> list[float]:
    """Held-out bits per byte of the students of one objective, live or cached, a seed each."""
    cached = figures["cached"]["arms"]
    students = cached[name]["students"] if name in cached else figures["students"][name]
    return [student["bits_per_byte"] for student in students]


def share_of(figures: Figures, arm: str) -> Interval | None:
    """The share of the gap that a cached student recovers, or None where there is no gap."""
    return share(bits(figures, HARD), bits(figures, LIVE), bits(figures, arm))


def failures(figures: Figures) -> list[str]:
    """A line for each cached student that is no number."""
    return [
        f"not measured: student, {arm['label']}: a model diverged, its bits per byte are no number"
        for arm in figures["cached"]["arms"].values()
        if not all(math.isfinite(student["bits_per_byte"]) for student in arm["students"])
    ]


def table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of cached students, and of those beside them."""
    per_cent = f"{100 * CONFIDENCE:.0f} %"
    header = [
        "student",
        "bits per byte, held out",
        f"− live teacher's ({per_cent})",
        f"share of the gap ({per_cent})",
        "bytes per token",
        "steps per second",
    ]
    cached = figures["cached"]
    speeds = cached["steps_per_second"]
    live = bits(figures, LIVE)
    rows = []
    for name, label in {**BESIDE, **{n: a["label"] for n, a in cached["arms"].items()}}.items():
        apart, row = difference(bits(figures, name), live), [label]
        row.append(f"{statistics.fmean(bits(figures, name)):.3f}")
        row.append("" if name == LIVE else f"{apart.mean:+.4f} ({apart.low:+.4f} to {apart.high:+.4f})")
        row.append("" if name in BESIDE else in_per_cent(share_of(figures, name)))
        row.append("" if name in BESIDE else f"{cached['arms'][name]['bytes_per_token']:.0f}")
        row.append(f"{speeds[name]:.1f}")
        rows.append(row)
    return header, rows


def in_per_cent(found: Interval | None) -> str:
    """A share as the table has it."""
    if found is None:
        return "no gap"
    return f"{100 * found.mean:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def mark_in_words(figures: Figures) -> str:
    """Whether the ghost tail recovers as much of the gap as it should, as far as the seeds say."""
    label = figures["cached"]["arms"][MARKED_ARM]["label"]
    gap = difference(bits(figures, HARD), bits(figures, LIVE))
    seen = f"{gap.mean:+.4f} bits per byte ({gap.low:+.4f} to {gap.high:+.4f})"
    found = share_of(figures, MARKED_ARM)
    if found is None:
        return f"No gap between hard labels and the live teacher for {label} to recover: {seen}."
    mark = f"the mark of {100 * MARK:.0f} %"
    if found.low >= MARK:
        verdict = f"{mark} is met"
    elif found.high < MARK:
        verdict = f"{mark} is missed"
    else:
        verdict = f"these seeds don't decide whether {mark} is met"
    return (
        f"{label[0].upper()}{label[1:]} recovers {in_per_cent(found)} of the gap between hard labels and the "
        f"live teacher, {seen}: {verdict}."
    )


def notes(figures: Figures) -> list[str]:
    """What a reader must know to read the table rightly."""
    cached, vocab = figures["cached"], figures["vocab"]
    built, k = cached["build"], cached["stored"]["k"]
    return [
        mark_in_words(figures),
        f"Cached students see the live ones' sequences in the same order, {built['sequences']:,} in all, and "
        f"the teacher is not run; asking it about them beforehand took {built['seconds']:.0f} s, which no "
        "speed counts. Intervals are Student's over the seeds, paired by seed.",
        f"The top {k} of {vocab:,} classes hold {100 * built['mass']:.1f} % of the teacher's mass on "
        "average; of the rest, a ghost tail teaches the sum alone, and draws teach all of it, with noise. "
        f"Logits in 16 bits are {2 * vocab:,} bytes a token.",
        f"Steps per second are the median of {cached['speed_rounds']} steps of each objective, interleaved; "
        "looking the teacher up is in them.",
    ]
