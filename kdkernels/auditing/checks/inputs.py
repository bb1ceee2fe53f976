"""What happens to tensors: graphs that are kept, inputs written over, layouts, unequal vocabularies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter import Refused
from ..identify import CLASSES
from ..report import CONVENTION, NOT_APPLICABLE, NOT_EXAMINED, RIGHT, WRONG, Line
from ..subject import Subject, off

CHECK = "tensors"
SAME = 1e-5  # vectorised sums of other alignment round otherwise


def check(subject: Subject) -> Iterator[Line]:
    """Lines on graphs, inputs, layouts and vocabularies."""
    yield from _written_over(subject)
    yield _twice(subject)
    yield from _layouts(subject)
    yield _padded(subject)


def _written_over(subject: Subject) -> Iterator[Line]:
    for dtype in (torch.float32, torch.bfloat16):
        about = f"inputs in {str(dtype).removeprefix('torch.')} after forward and backward"
        z, v, labels = subject.sample(4, CLASSES, 137, dtype)
        # A leaf can't be written over; what a model gives back is none, and can.
        leaf = z.clone().requires_grad_()
        student, teacher = leaf * 1.0, v.clone()
        before, versions = (student.detach().clone(), v.clone()), (student._version, teacher._version)
        try:
            loss = subject.call(student, teacher, labels, exposed=True)
        except Refused as error:
            yield Line(CHECK, about, f"refused: {error}", NOT_APPLICABLE)
            continue
        changed = _changed(student, teacher, before)
        try:
            torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
        except Exception as error:  # its own backward may raise anything
            yield Line(CHECK, about, f"backward raised {type(error).__name__}", WRONG)
            continue
        changed = changed or _changed(student, teacher, before)
        if changed:
            said = (student._version, teacher._version) != versions
            how = "" if said else ", and autograd is not told"
            yield Line(CHECK, about, f"the {changed}'s logits are written over{how}", WRONG)
        else:
            yield Line(CHECK, about, "are what they were", RIGHT)


def _changed(student: Tensor, teacher: Tensor, before: tuple[Tensor, Tensor]) -> str | None:
    sides = (("student", student, before[0]), ("teacher", teacher, before[1]))
    return next((name for name, x, was in sides if not torch.equal(x.detach(), was)), None)


def _twice(subject: Subject) -> Line:
    about = "backward twice through a kept graph"
    z, v, labels = subject.sample(4, CLASSES, 139)
    leaf = z.clone().requires_grad_()
    loss = subject.call(leaf, v, labels).sum()
    try:
        first = torch.autograd.grad(loss * 2, leaf, retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss * 2, leaf)[0]
    except Exception as error:  # its own backward may raise anything
        return Line(CHECK, about, f"refused: {type(error).__name__}", CONVENTION)
    far = off(second, first)
    words = f"gives the same, {far:.1g} off" if far < SAME else f"gives another gradient, {far:.2g} off"
    return Line(CHECK, about, words, RIGHT if far < SAME else WRONG)


def _layouts(subject: Subject) -> Iterator[Line]:
    n, classes = 6, 13
    z, v, labels = subject.sample(n, classes, 149, torch.float32)
    base = subject.outcome(z, v, labels)
    wide = torch.full((2 * n, classes + 5), 7.0, device=z.device)

    def transposed(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    def sliced(x: Tensor) -> Tensor:
        room = wide.clone()
        room[::2, 3 : 3 + classes] = x
        return room[::2, 3 : 3 + classes]

    for about, layout in (
        ("transposed logits", transposed),
        ("every other row of a slice", sliced),
    ):
        yield _laid_out(subject, about, layout(z), layout(v), labels, base.loss, base.grad)
    one = v[:1].expand(n, classes)
    same = subject.outcome(z, one.contiguous(), labels)
    yield _laid_out(subject, "one teacher's row expanded", z, one, labels, same.loss, same.grad)
    if subject.adapter.takes("labels"):
        strided = torch.stack([labels, torch.zeros_like(labels)], 1)[:, 0]
        yield _laid_out(subject, "strided labels", z, v, strided, base.loss, base.grad)


def _laid_out(
    subject: Subject, about: str, z: Tensor, v: Tensor, labels: Tensor, loss: Tensor, grad: Tensor
) -> Line:
    leaf = z.detach().requires_grad_()  # a view of the same strides
    try:
        got = subject.outcome_of(leaf, leaf, v, labels, exposed=True)
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", CONVENTION)
    far = max(off(got.loss, loss), off(got.grad, grad))
    words = f"give what contiguous ones give, {far:.1g} off"
    return Line(CHECK, about, words if far < SAME else f"change the result by {far:.2g}",
                RIGHT if far < SAME else WRONG)  # fmt: skip


def _padded(subject: Subject) -> Line:
    about = "a teacher of 3 more classes"
    model = subject.model
    if subject.adapter.student != "logits" or subject.adapter.teacher != "logits":
        return Line(CHECK, about, "it is given probabilities", NOT_APPLICABLE)
    z, v, labels = subject.sample(4, CLASSES + 3, 151)
    z = z[:, :CLASSES]
    labels = labels.clamp(max=CLASSES - 1)
    try:
        got = subject.outcome(z, v, labels).loss.double().sum()
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", RIGHT)
    if model is None:
        return Line(CHECK, about, "which divergence it is, is not known", NOT_EXAMINED)

    def padding(value: float) -> float:
        more = torch.full((4, 3), value, dtype=z.dtype, device=z.device)
        padded = torch.cat([z, more], 1)
        # The soft term has the teacher's classes; the hard one may be of the student's own.
        soft = replace(model, hard=0.0).rows(padded, v, labels)
        hard = replace(model, factors=tuple(0.0 for _ in model.factors)).rows(z, z, labels)
        return float((soft + hard).sum() * subject.weight(len(z)))

    cut = float(subject.truth(z, v[:, :CLASSES], labels).loss)
    for what, exact, right in (
        ("classes that one side lacks are left out", cut, True),
        ("the student is padded with logit 0, which gives padding real probability", padding(0.0), False),
        ("the student is padded with −inf", padding(-math.inf), True),
    ):
        if math.isfinite(exact) and abs(float(got) - exact) < 1e-4 * abs(exact):
            return Line(CHECK, about, what, RIGHT if right else WRONG)
    large = bool(got.isinf())
    words = (
        "infinite, as for a student that excludes them" if large else f"{float(got):.4g}, of no padding known"
    )
    return Line(CHECK, about, words, CONVENTION if large else WRONG)
