"""What a temperature divides, and whether T² multiplies the loss, its gradient, or both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..identify import CLASSES, FITS, with_temperature
from ..report import CONVENTION, NOT_APPLICABLE, NOT_EXAMINED, RIGHT, WRONG, Line
from ..subject import Subject
from .divergence import number

CHECK = "temperature"
T = 3.0


def check(subject: Subject) -> Iterator[Line]:
    """Lines on what T divides and what it multiplies."""
    model = subject.model
    if not subject.adapter.takes("temperature"):
        if model is not None and (model.softening.student, model.softening.teacher) != (1.0, 1.0):
            student, teacher = (x or 1.0 for x in (model.softening.student, model.softening.teacher))
            words = f"fixed: student's logits over {number(student)}, teacher's over {number(teacher)}"
            yield Line(CHECK, "what it divides", words, CONVENTION if student == teacher else WRONG)
        else:
            yield Line(CHECK, "what it divides", "no argument is a temperature", NOT_APPLICABLE)
        return
    if model is None:
        yield Line(CHECK, "what it divides", "which divergence it is, is not known", NOT_EXAMINED)
        return
    if not model.family.softmax:
        yield _without_softmax(subject)
        return
    tempered, left = with_temperature(subject.adapter, model, T)
    if left > max(FITS, 3 * model.off):
        yield Line(
            CHECK, "what it divides", f"at T = {T:g} no division of either side by T fits: "
            f"{100 * left:.2g} % is left", WRONG,
        )  # fmt: skip
        return
    yield _sides(subject, tempered.softening.student, tempered.softening.teacher)
    if model.hard:
        hard = tempered.softening.hard
        plain = hard == 1.0
        words = "taken at T = 1" if plain else "softened, too" if hard is None else f"over {number(hard)}"
        yield Line(CHECK, "the hard term", words, RIGHT if plain else CONVENTION)
    yield from _powers(subject, tempered.power)


def _without_softmax(subject: Subject) -> Line:
    z, v, labels = subject.sample(4, CLASSES, 51)
    one = subject.call(z, v, labels).double().sum()
    other = subject.call(z, v, labels, temperature=T).double().sum()
    ratio = float(other / one)
    words = "changes nothing" if abs(ratio - 1) < 1e-4 else f"multiplies the loss by {number(ratio)}"
    return Line(CHECK, f"T = {T:g} of a squared error", words, CONVENTION)


def _sides(subject: Subject, student: float | None, teacher: float | None) -> Line:
    about = "what it divides"

    def words(x: float | None) -> str:
        return "by T" if x is None else "by nothing" if x == 1.0 else f"by {number(x)}, whatever T"

    if student is None and teacher is None:
        return Line(CHECK, about, "the logits of both sides", RIGHT)
    found = f"the student's logits {words(student)}, the teacher's {words(teacher)}"
    if subject.adapter.teacher != "logits" and teacher == 1.0:
        return Line(CHECK, about, f"{found}: the caller softens the teacher", CONVENTION)
    return Line(CHECK, about, found, WRONG)


def _powers(subject: Subject, in_loss: float) -> Iterator[Line]:
    """Of T, in the loss and in the gradient, which a loss with a backward of its own writes apart."""
    about = "T² in the loss and the gradient"
    assert subject.model is not None
    tempered, _ = with_temperature(subject.adapter, subject.model, T)
    z, v, labels = subject.sample(6, CLASSES, 53)
    got = subject.outcome(z, v, labels, temperature=T).grad.double().flatten()

    def exact(power: float, hard: bool) -> torch.Tensor:
        only = replace(tempered, power=power, hard=tempered.hard if hard else 0.0)
        if hard:
            only = replace(only, factors=tuple(0.0 for _ in only.factors))
        leaf = z.detach().clone().requires_grad_()
        loss = only.rows(leaf, v, labels, T).sum() * subject.weight(len(z))
        return torch.autograd.grad(loss, leaf)[0].flatten()

    columns = [exact(0.0, False), *([exact(0.0, True)] if tempered.hard else [])]
    matrix = torch.stack(columns, 1)
    factors = torch.linalg.lstsq(matrix, got[:, None]).solution[:, 0]
    left = float((got - matrix @ factors).norm() / got.norm().clamp_min(1e-30))
    ratio = float(factors[0])
    in_loss = round(in_loss, 4) + 0.0  # no −0
    in_gradient = float(torch.tensor(ratio).log() / torch.tensor(T).log()) if ratio > 0 else float("nan")
    in_gradient = round(in_gradient, 4) + 0.0
    loss, gradient = f"T^{in_loss:.2f} multiplies the loss", f"T^{in_gradient:.2f} its gradient"
    found = f"{loss}, {gradient}"
    if left > 1e-2 or in_gradient != in_gradient:
        yield Line(CHECK, about, f"{loss}; the gradient is of another loss, {100 * left:.2g} % off", WRONG)
    elif abs(in_loss - in_gradient) > 0.01:
        yield Line(CHECK, about, f"{found}: not the same loss", WRONG)
    elif abs(in_loss - 2) < 0.01:
        yield Line(CHECK, about, f"{found}, as Hinton et al. have it", RIGHT)
    elif abs(in_loss) < 0.01:
        yield Line(
            CHECK, about, f"{found}: none, so that the gradient falls as 1/T² against a hard term", CONVENTION
        )
    else:
        yield Line(CHECK, about, found, CONVENTION)
