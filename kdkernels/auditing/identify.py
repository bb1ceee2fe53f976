"""Which divergence a loss is, from its values on single rows: a least-squares fit of each family.

One row at a time, there is no mean or sum to know of yet. A family fits where what its terms leave, and a
hard cross-entropy where there are labels, is as small as rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, Refused
from .truth import Family, Sides, families, hard_cross_entropy

CLASSES = 11
ROWS = 24
# Of what a loss in fp32 leaves, in units of the norm of the values; and of what is this loss, but not quite.
FITS = 3e-5
NEAR = 0.02
# What people write into a loss instead of an argument.
FIXED = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 10.0, 20.0, 0.5)


@dataclass(frozen=True)
class Softening:
    """By what the logits of the student, the teacher and the hard term are divided; None stands for T."""

    student: float | None = None
    teacher: float | None = None
    hard: float | None = 1.0

    def at(self, T: float) -> tuple[float, float, float]:
        """All three at a temperature."""
        return tuple(T if x is None else x for x in (self.student, self.teacher, self.hard))  # type: ignore[return-value]


@dataclass(frozen=True)
class Model:
    """What a loss has been found to be: per row Σ factor · T^power · part + hard · CE.

    Attributes:
        family: The divergence.
        theta: Its parameters.
        factors: Of each of its parts.
        hard: Weight of the cross-entropy with the label; 0 where there is none.
        smoothing: Of its labels.
        off: What the fit leaves, relative to the values.
        softening: What T divides.
        power: Of T, by which the loss is multiplied.
        per_class: Divided by the number of classes.
        clamped: Of the rows, those that were cut off at 0.
    """

    family: Family
    theta: tuple[float, ...]
    factors: tuple[float, ...]
    hard: float
    off: float
    softening: Softening = Softening(1.0, 1.0, 1.0)
    power: float = 0.0
    per_class: bool = False
    clamped: int = 0
    smoothing: float = 0.0

    def rows(self, z: Tensor, v: Tensor, labels: Tensor | None, T: float = 1.0) -> Tensor:
        """The loss of each row, in the dtype of the logits, differentiable."""
        by, of, hard = self.softening.at(T)
        parts = self.family.values(Sides.of(z / by, v / of, labels), self.theta)
        each = sum(f * part for f, part in zip(self.factors, parts, strict=True)) * T**self.power
        if self.clamped:
            each = torch.as_tensor(each).clamp(min=0)
        if self.per_class:
            each = each * (CLASSES / z.shape[-1])
        if self.hard and labels is not None:
            each = each + self.hard * hard_cross_entropy(z / hard, labels, self.smoothing)
        return torch.as_tensor(each)

    @property
    def near(self) -> bool:
        """Whether the fit is no more than near."""
        return self.off > FITS


def logits(n: int, classes: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels of some rows, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    v = spread * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    # Some teachers are near their students, and some less sure than those, where a truncated sum is below 0.
    v[::3] = z[::3] + 0.5 * v[::3]
    v[4::6] = 0.5 * z[4::6]
    return z, v, torch.randint(classes, (n,), generator=generator)


def singles(adapter: Adapter, z: Tensor, v: Tensor, labels: Tensor | None, **given: float) -> Tensor:
    """The loss of each row by itself, in fp64."""
    found = []
    for i in range(len(z)):
        part = slice(i, i + 1)
        with torch.no_grad():
            out = adapter(z[part], v[part], None if labels is None else labels[part], **given)
        found.append(out.double().sum())
    return torch.stack(found)


def _solve(
    family: Family, theta: tuple[float, ...], s: Sides, hard: Tensor | None, values: Tensor
) -> tuple[float, Tensor]:
    """What the best factors leave, relative; and those."""
    columns = family.values(s, theta) + ([hard] if hard is not None else [])
    matrix = torch.stack(columns, 1)
    if not matrix.isfinite().all():
        return math.inf, torch.zeros(len(columns))
    # Columns of one size, so that none is taken for nothing.
    size = matrix.norm(dim=0).clamp_min(1e-300)
    factors = torch.linalg.lstsq(matrix / size, values[:, None]).solution[:, 0]
    left = values - (matrix / size) @ factors
    return float(left.norm() / values.norm().clamp_min(1e-300)), factors / size


def _refined(
    family: Family, theta: tuple[float, ...], s: Sides, hard: Tensor | None, values: Tensor
) -> tuple[float, ...]:
    """Parameters that fit better, by Levenberg's steps over numerical derivatives."""

    def left(t: tuple[float, ...]) -> Tensor:
        _, factors = _solve(family, t, s, hard, values)
        columns = family.values(s, t) + ([hard] if hard is not None else [])
        return values - torch.stack(columns, 1) @ factors

    def inside(t: tuple[float, ...]) -> bool:
        if family.name == "alpha_beta":
            return min(abs(t[0]), abs(t[1]), abs(sum(t))) > 1e-3 and max(map(abs, t)) < 4
        return all(1e-3 < x < 1 - 1e-3 for x in t)

    damping, best, now = 1e-3, theta, left(theta)
    for _ in range(25):
        columns = []
        for i in range(len(best)):
            moved = tuple(x + 1e-6 * (i == j) for j, x in enumerate(best))
            columns.append((left(moved) - now) / 1e-6)
        jacobian = torch.stack(columns, 1)
        square = jacobian.T @ jacobian
        step = torch.linalg.solve(square + damping * torch.diag(square.diagonal() + 1e-12), -jacobian.T @ now)
        tried = tuple(x + float(d) for x, d in zip(best, step, strict=True))
        if inside(tried) and (after := left(tried)).norm() < now.norm():
            done = (now.norm() - after.norm()) < 1e-3 * now.norm() and after.norm() > 1e-6 * values.norm()
            best, now, damping = tried, after, damping / 5
            if done:
                break
        else:
            damping *= 5
            if damping > 1e6:
                break
    return best


def _candidates(
    listed: Sequence[Family], s: Sides, hard: Tensor | None, values: Tensor, labelled: bool
) -> Model | None:
    """The first that fits, or else the nearest."""
    nearest: Model | None = None
    for family in listed:
        if family.labelled and not labelled:
            continue
        starts = sorted((_solve(family, t, s, hard, values)[0], t) for t in family.starts)
        tries = [t for _, t in starts[: 2 if family.params and not family.exact else 1]]
        for theta in tries:
            if family.params and not family.exact and starts[0][0] < math.inf:
                theta = _refined(family, theta, s, hard, values)
            off, factors = _solve(family, theta, s, hard, values)
            each = [float(x) for x in factors]
            weight = each.pop() if hard is not None else 0.0
            model = Model(family, theta, tuple(each), weight if abs(weight) > 1e-4 else 0.0, off)
            if off < FITS:
                return model
            # What a family of two parts fits nearly says little.
            better = nearest is None or off < nearest.off / (1 if len(each) == 1 and not family.params else 3)
            if better and family.proper and family.name != "alpha_beta":
                nearest = model
    return nearest


def identify(adapter: Adapter, T: float | None = None) -> Model | None:
    """What the loss is at T = 1 (or has no temperature); None where nothing known is within a twentieth.

    Args:
        adapter: The loss.
        T: The temperature that it is called with, if it takes one.
    """
    z, v, labels = logits(ROWS, CLASSES, seed=7)
    taken = labels if adapter.takes("labels") else None
    values = singles(adapter, z, v, taken, **({} if T is None else {"temperature": T}))
    if not values.isfinite().all() or not values.abs().max() > 0:
        return None
    hard = None
    if taken is not None:
        # Without a look at it, a cross-entropy would be fitted to a loss that has none.
        other = singles(adapter, z, v, (labels + 1) % CLASSES, **({} if T is None else {"temperature": T}))
        if not torch.allclose(other, values, rtol=1e-7, atol=1e-12):
            hard = hard_cross_entropy(z, labels)
    labelled = hard is not None
    listed = families(CLASSES)
    found = _candidates(listed, Sides.of(z, v, labels), hard, values, labelled)
    if found is not None and not found.near:
        return _scaled(found)
    if hard is not None and (smoothing := _smoothing(z, v, labels, values)):
        smoothed = hard_cross_entropy(z, labels, smoothing)
        found = _candidates(listed, Sides.of(z, v, labels), smoothed, values, labelled)
        if found is not None and not found.near:
            return _scaled(replace(found, smoothing=smoothing))
    kept = values != 0
    if 4 < kept.sum() < len(values):
        short = [f for f in listed if f.name == "truncated"]
        some = Sides.of(z[kept], v[kept], labels[kept])
        cut = _candidates(short, some, None if hard is None else hard[kept], values[kept], labelled)
        if cut is not None and not cut.near:
            return _scaled(replace(cut, clamped=int((~kept).sum())))
    fixed = _with_fixed_temperatures(z, v, labels, hard, values, labelled)
    if fixed is not None and (found is None or fixed.off < found.off / 30):
        return _scaled(fixed)
    return _scaled(found) if found is not None and found.off < NEAR else None


def _smoothing(z: Tensor, v: Tensor, labels: Tensor, values: Tensor) -> float:
    """The share of all classes in the hard term, where with one a family fits; else 0."""
    s = Sides.of(z, v, labels)
    hard, even = hard_cross_entropy(z, labels), hard_cross_entropy(z, labels, 1.0)
    for family in (f for f in families(CLASSES) if not f.params):
        matrix = torch.stack([*family.values(s, ()), hard, even], 1)
        factors = torch.linalg.lstsq(matrix, values[:, None]).solution[:, 0]
        left = (values - matrix @ factors).norm() / values.norm()
        label, everywhere = float(factors[-2]), float(factors[-1])
        if left < FITS and label > 0 and everywhere > 1e-4 * label:
            return everywhere / (label + everywhere)
    return 0.0


def _with_fixed_temperatures(
    z: Tensor, v: Tensor, labels: Tensor, hard: Tensor | None, values: Tensor, labelled: bool
) -> Model | None:
    """The same with temperatures that were written into the loss."""
    plain = [f for f in families(CLASSES) if len(f.parts) == 1 and not f.params]
    both = [(x, x) for x in FIXED] + [(x, 1.0) for x in FIXED] + [(1.0, x) for x in FIXED]
    hards = [(None, 1.0)] if hard is None else [(hard, 1.0)]
    best: Model | None = None
    for by, of in both:
        softened = [] if hard is None else [(hard_cross_entropy(z / by, labels), by)]
        for column, at in (*hards, *softened):
            found = _candidates(plain, Sides.of(z / by, v / of, labels), column, values, labelled)
            if found is not None and (best is None or found.off < best.off):
                best = replace(found, softening=Softening(by, of, at))
            if best is not None and not best.near:
                return best
    return best if best is not None and not best.near else None


def _scaled(model: Model) -> Model:
    """Recognises a division by the number of classes."""
    divided = all(min(abs(f * CLASSES - x) for x in (0.5, 1.0, 2.0)) < 1e-3 for f in model.factors)
    return replace(model, per_class=True) if divided else model


def with_temperature(adapter: Adapter, model: Model, T: float) -> tuple[Model, float]:
    """The model with what T divides and multiplies, and what that fit leaves at this T."""
    z, v, labels = logits(12, CLASSES, seed=11)
    values = singles(adapter, z, v, labels if adapter.takes("labels") else None, temperature=T)
    best: tuple[float, Softening, Tensor] = (math.inf, model.softening, torch.zeros(1))
    follows: list[float | None] = [None, 1.0, 1 / T, *FIXED]
    sides = [(None, None), *((a, b) for a in follows for b in follows if (a, b) != (None, None))]
    for by, of in sides:
        for at in [1.0] if not model.hard else [1.0, None, *(x for x in (by, of) if x not in (1.0, None))]:
            how = Softening(by, of, at)
            s, t, h = how.at(T)
            hard = hard_cross_entropy(z / h, labels, model.smoothing) if model.hard else None
            off, factors = _solve(model.family, model.theta, Sides.of(z / s, v / t, labels), hard, values)
            if off < best[0] / (1 if best[0] == math.inf else 30):
                best = off, how, factors
        if best[0] < FITS:
            break
    off, how, factors = best
    ratio = float(factors[0]) / model.factors[0] if model.factors[0] else math.nan
    power = math.log(ratio) / math.log(T) if ratio > 0 else math.nan
    return replace(model, softening=how, power=power), off


def choose_kinds(adapter: Adapter, pairs: Sequence[tuple[str, str]], T: float | None) -> Adapter:
    """The adapter with what the loss takes for student and teacher: the first of which it is a divergence."""
    for student, teacher in pairs:
        tried = adapter.but(student=student, teacher=teacher)
        try:
            found = identify(tried, T)
        except Refused:
            continue
        if found is not None and not found.near and found.family.proper:
            return tried
    student, teacher = pairs[0]
    return adapter.but(student=student, teacher=teacher)
