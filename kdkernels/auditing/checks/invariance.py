"""What must not change the result: calling again, other rows, a constant added to a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..identify import CLASSES
from ..report import CONVENTION, NOT_APPLICABLE, RIGHT, WRONG, Line, Verdict
from ..subject import Subject, off

CHECK = "invariance"


def check(subject: Subject) -> Iterator[Line]:
    """Lines on determinism, independence of rows and shifts."""
    z, v, labels = subject.sample(6, 257, 157, torch.float32)
    yield _again(subject, z, v, labels)
    yield _rows(subject)
    for side in ("student", "teacher"):
        yield _shift(subject, side)


def _again(subject: Subject, z: Tensor, v: Tensor, labels: Tensor) -> Line:
    about = "the same call again"
    first, second = (subject.outcome(z, v, labels, seeded=False) for _ in range(2))
    if torch.equal(first.loss, second.loss) and torch.equal(first.grad, second.grad):
        return Line(CHECK, about, "the same to the bit", RIGHT)
    far = max(off(second.loss, first.loss), off(second.grad, first.grad))
    if far < 1e-5:
        return Line(CHECK, about, f"{far:.1g} off", CONVENTION)
    third, fourth = (subject.outcome(z, v, labels) for _ in range(2))
    if torch.equal(third.loss, fourth.loss) and torch.equal(third.grad, fourth.grad):
        words = f"it draws random numbers: {far:.1g} off; the same to the bit from the same seed"
        return Line(CHECK, about, words, CONVENTION)
    return Line(CHECK, about, f"{far:.1g} off", WRONG)


def _rows(subject: Subject) -> Line:
    z, v, labels = subject.sample(6, CLASSES, 163)
    before = subject.outcome(z, v, labels).grad
    z, v = z.clone(), v.clone()
    z[4:], v[4:] = z[4:].flip(-1) * 1.7, v[4:].flip(-1) * 0.6
    after = subject.outcome(z, v, labels).grad
    far = off(after[:4], before[:4])
    words = "change nothing" if far < 1e-6 else f"change this row's gradient by {far:.2g}"
    return Line(CHECK, "other rows", words, RIGHT if far < 1e-6 else WRONG)


def _shift(subject: Subject, side: str) -> Line:
    about = f"a constant added to the {side}'s row"
    kind = getattr(subject.adapter, side)
    if kind != "logits":
        return Line(CHECK, about, "it is given probabilities", NOT_APPLICABLE)
    z, v, labels = subject.sample(4, CLASSES, 167)
    before = subject.call(z, v, labels).double()
    constants = torch.tensor([[1.0], [-2.0], [3.0], [5.0]], dtype=z.dtype, device=z.device)
    moved = (z + constants, v) if side == "student" else (z, v + constants)
    far = off(subject.call(*moved, labels).double(), before)
    allowed: Verdict = WRONG
    words = "changes nothing" if far < 1e-4 else f"changes the loss by {far:.2g}"
    said = subject.claims.divergence
    of_softmax = said is not None and said[0] not in ("logit_mse", "binary_kl")
    if not of_softmax and (subject.model is None or not subject.model.family.softmax):
        allowed = CONVENTION
    if not far == far:
        words = "makes the loss NaN"
    return Line(CHECK, about, words, RIGHT if far < 1e-4 else allowed)
