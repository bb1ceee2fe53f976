"""Weights of terms that change over a fit."""

from __future__ import annotations

from ..objective import Progress, Weight


def warm_up(weight: float = 1.0, *, epochs: int | None = None, steps: int | None = None) -> Weight:
    """A weight that grows linearly to its value: min(e / epochs, 1) of it in epoch e, counted from 1."""
    if (epochs is None) == (steps is None) or (epochs or steps or 0) <= 0:
        raise ValueError(f"warm_up takes epochs or steps, > 0, got epochs={epochs}, steps={steps}")

    def at(now: Progress) -> float:
        done = (now.epoch + 1) / epochs if epochs else (now.step + 1) / (steps or 1)
        return weight * min(done, 1.0)

    return at


def linear(start: float, end: float, until: float = 1.0) -> Weight:
    """A weight that goes from one value to another over a fraction of the fit, and stays there."""
    if not 0 < until <= 1:
        raise ValueError(f"until must be a fraction of the fit in (0, 1], got {until}")
    return lambda now: start + (end - start) * min(now.fraction / until, 1.0)


def after(steps: int, weight: float = 1.0) -> Weight:
    """A weight that is 0 in the first steps, whose term is then not computed, and constant afterwards."""
    if steps < 0:
        raise ValueError(f"steps must be a number of steps >= 0, got {steps}")
    return lambda now: weight if now.step >= steps else 0.0
