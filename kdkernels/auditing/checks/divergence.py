"""Which divergence, with what factor, and what its mean divides by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..adapter import Refused
from ..identify import CLASSES, ROWS, Model, singles
from ..report import CONVENTION, NOT_APPLICABLE, NOT_EXAMINED, RIGHT, WRONG, Line, Verdict
from ..subject import Subject, off

CHECK = "divergence"


def number(x: float) -> str:
    """With four digits."""
    return f"{x:.4g}"


def described(model: Model) -> str:
    """The divergence with parameters and factors."""
    family = model.family
    theta = ", ".join(f"{n} = {number(t)}" for n, t in zip(family.params, model.theta, strict=True))
    factors = [f * (CLASSES if model.per_class else 1) for f in model.factors]
    words = f"{family.words}{f' with {theta}' if theta else ''}"
    if family.name == "dkd":
        words = f"DKD, {number(factors[0])} × the target's KL + {number(factors[1])} × the others'"
    elif len(factors) > 1:
        words += f", weights {' and '.join(number(f) for f in factors)}"
    elif (by := fixed(model)) and abs(factors[0] - by**2) < 1e-3 * by**2:
        words = f"T² × {words}"
    elif abs(factors[0] - 1) > 1e-3:
        words = f"{number(factors[0])} × {words}"
    if model.per_class:
        words += ", divided by the number of classes"
    if model.hard:
        words += f", and {number(model.hard)} × cross-entropy with the label"
        words += f", smoothed by {number(model.smoothing)}" if model.smoothing else ""
    softened = [x for x in (model.softening.student, model.softening.teacher) if x not in (None, 1.0)]
    if softened:
        student, teacher = (x or 1.0 for x in (model.softening.student, model.softening.teacher))
        words += f", student's logits divided by {number(student)} and teacher's by {number(teacher)}"
    return words


def fixed(model: Model) -> float | None:
    """The temperature that both sides are divided by without being asked, or None."""
    student, teacher = model.softening.student, model.softening.teacher
    return student if student == teacher and student not in (None, 1.0) else None


def check(subject: Subject) -> Iterator[Line]:
    """Lines on the divergence and on what a mean divides by."""
    yield from _identity(subject)
    yield from _least(subject)
    if subject.model is not None:
        yield _rows(subject)
    yield from _batches(subject)


def _identity(subject: Subject) -> Iterator[Line]:
    model, claimed = subject.model, subject.claims.divergence
    about = "which it is"
    if model is None:
        said = f", and it says {claimed[0]}" if claimed else ""
        verdict: Verdict = WRONG if claimed else NOT_EXAMINED
        yield Line(CHECK, about, f"none that is known fits within 2 %{said}", verdict)
        return
    family, words = model.family, described(model)
    negative = any(f < 0 for f in model.factors) or model.hard < 0
    if model.near:
        words += f", but {100 * model.off:.2g} % off in float64"
        yield Line(CHECK, about, words, WRONG)
    elif negative:
        yield Line(CHECK, about, f"{words}: of the wrong sign, training moves away from the teacher", WRONG)
    elif family.name == "truncated":
        cut = f", cut off at 0 in {model.clamped} of {ROWS} rows" if model.clamped else ""
        k = int(model.theta[0])
        yield Line(
            CHECK, about, f"forward KL truncated to the teacher's top {k} of {CLASSES} classes{cut}: no "
            "divergence, it is negative where the student's mass there is larger, and least where that "
            "mass is 1", _claimed(claimed, "truncated"),
        )  # fmt: skip
    elif family.name == "renormalised":
        k = int(model.theta[0])
        yield Line(
            CHECK, about, f"forward KL over the teacher's top {k} of {CLASSES} classes, both sides made to "
            "sum to 1 there: the student may put any mass elsewhere at no cost",
            _claimed(claimed, "renormalised"),
        )  # fmt: skip
    elif claimed is not None and not _agrees(model, claimed):
        theta = f"({', '.join(number(x) for x in claimed[1])})" if claimed[1] else ""
        yield Line(CHECK, about, f"{words}; it says {claimed[0]}{theta}", WRONG)
    elif model.per_class and family.softmax and not family.name.endswith(("_error", "_mse")):
        yield Line(
            CHECK, about, f"{words}: the mean over N·V is 1/V of the divergence, and training slows with the "
            "vocabulary", CONVENTION if subject.claims.denominator == "elements" else WRONG,
        )  # fmt: skip
    else:
        wanted = (1.0, (fixed(model) or 1.0) ** 2)
        plain = len(model.factors) == 1 and min(abs(model.factors[0] - x) for x in wanted) < 1e-3
        verdict = RIGHT if plain or family.name == "dkd" or model.hard else CONVENTION
        if family.name == "soft_cross_entropy":
            words += ": the gradient of the forward KL, but never 0 (it is larger by the teacher's entropy)"
            verdict = RIGHT if claimed is not None else CONVENTION
        yield Line(CHECK, about, words, verdict)


def _claimed(claimed: tuple[str, tuple[float, ...]] | None, name: str) -> Verdict:
    return CONVENTION if claimed is not None and claimed[0] == name else WRONG


def _agrees(model: Model, claimed: tuple[str, tuple[float, ...]]) -> bool:
    name, theta = claimed
    if model.family.name == "dkd" and name == "dkd":
        return not theta or all(abs(a - b) < 1e-3 for a, b in zip(theta, model.factors, strict=True))
    if name == "alpha_beta" and len(theta) == 2 and model.family.name != "alpha_beta":
        same = {(1.0, 0.0): "forward_kl", (0.0, 1.0): "reverse_kl", (1.0, 1.0): "squared_error"}
        return same.get((theta[0], theta[1])) == model.family.name
    if model.family.name != name:
        return False
    return not theta or all(abs(a - b) < 1e-3 for a, b in zip(theta, model.theta, strict=True))


def _least(subject: Subject) -> Iterator[Line]:
    """Whether a student that is the teacher has nothing to learn."""
    about = "least where both are the same"
    if subject.adapter.takes("labels") and (subject.model is None or subject.model.hard):
        why = "the hard term draws the student to the label"
        yield Line(CHECK, about, why, NOT_APPLICABLE)
        return
    _, v, labels = subject.sample(5, CLASSES, 23)
    z, _, _ = subject.sample(5, CLASSES, 24)
    at_rest, elsewhere = subject.outcome(v, v, labels), subject.outcome(z, v, labels)
    ratio = float(at_rest.grad.norm() / elsewhere.grad.norm().clamp_min(1e-30))
    value = float(at_rest.loss.double().sum() / elsewhere.loss.double().sum())
    words = f"there the gradient is {ratio:.1g} of an ordinary one, the loss {value:.1g}"
    if not ratio == ratio:
        words = "there the gradient is NaN"
    sign = subject.model is not None and subject.model.family.name == "tvd"
    yield Line(CHECK, about, words, RIGHT if ratio < 1e-3 or (sign and value < 1e-3) else WRONG)


def _rows(subject: Subject) -> Line:
    """What several rows make of those of each."""
    about = "reduction"
    words = {
        "mean": "mean over the rows", "sum": "sum over the rows", "none": "one value for each row",
        "classes": "one value for each class of each row",
    }  # fmt: skip
    if subject.reduction is not None:
        others = subject.reduction in ("mean", "none")
        return Line(CHECK, about, words[subject.reduction], RIGHT if others else CONVENTION)
    n = 5
    z, v, labels = subject.sample(n, CLASSES, 31)
    taken = labels if subject.adapter.takes("labels") else None
    T: dict[str, Any] = {"temperature": 1.0} if subject.adapter.takes("temperature") else {}
    each, whole = singles(subject.adapter, z, v, taken, **T), subject.call(z, v, labels)
    if whole.dim():
        ratio = f"values of shape {list(whole.shape)} for {n} rows"
    else:
        ratio = f"{number(float(whole) / float(each.sum()))} × the sum of its {n} rows taken one by one"
    return Line(CHECK, about, f"neither mean nor sum: {ratio}", WRONG)


def _batches(subject: Subject) -> Iterator[Line]:
    """What is divided by with logits `[B, S, V]`."""
    about = "logits [B, S, V]"
    adapter = subject.adapter
    if adapter.shifts:
        yield Line(
            CHECK, about, "labels are shifted inside, which the labels' lines are about", NOT_APPLICABLE
        )
        return
    B, S = 2, 3
    z, v, labels = subject.sample(B * S, CLASSES, 41)
    T: dict[str, Any] = {"temperature": 1.0} if adapter.takes("temperature") else {}
    ways = [labels, None] if adapter.takes("labels") and not adapter.required else [labels]
    for given in ways:
        taken = given if adapter.takes("labels") else None
        where = about if len(ways) == 1 else f"{about}, {'without' if given is None else 'with'} labels"
        try:
            each = singles(adapter, z, v, taken, **T)
            shaped = None if taken is None else taken.view(B, S)
            whole = adapter.raw(z.view(B, S, -1), v.view(B, S, -1), shaped, **T)
        except Refused as error:
            yield Line(CHECK, where, f"refused: {error}", CONVENTION if adapter.ndim == 2 else WRONG)
            continue
        if whole.dim():
            same = whole.shape[:2] == (B, S) and off(whole.double().flatten(2).sum(-1) if whole.dim() > 2
                                                     else whole, each.view(B, S)) < 1e-4  # fmt: skip
            flat = whole.numel() == B * S and off(whole, each) < 1e-4
            yield Line(
                CHECK, where, f"values of shape {list(whole.shape)}", RIGHT if same or flat else CONVENTION
            )
            continue
        yield _denominator(subject, where, float(whole) / float(each.sum()), B, S)


def _denominator(subject: Subject, where: str, ratio: float, B: int, S: int) -> Line:
    names = {
        B * S: ("counted", f"divides by all {B * S} rows"),
        B: ("batch", f"divides by B = {B}, not by the {B * S} rows: the loss grows with the length"),
        S: ("length", f"divides by S = {S}, not by the {B * S} rows: the loss grows with the batch"),
        1: ("one", "divides by nothing"),
    }
    for count, (name, words) in names.items():
        if abs(ratio * count - 1) < 1e-4:
            if name == "counted":
                return Line(CHECK, where, words, RIGHT)
            said = subject.claims.denominator == name or (name == "one" and subject.reduction == "sum")
            if subject.adapter.ndim == 2 and not said:
                return Line(CHECK, where, f"{words}; flatten to [N, V] first", CONVENTION)
            return Line(CHECK, where, words, CONVENTION if said else WRONG)
    words = f"{number(ratio)} × the sum of its {B * S} rows taken one by one"
    strange = torch.isnan(torch.tensor(ratio)) or subject.adapter.ndim == 3
    return Line(CHECK, where, words, WRONG if strange else CONVENTION)
