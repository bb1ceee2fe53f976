"""Where logarithms and exponentials end: −inf logits, sure rows, large logits, few and many classes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapter import Refused
from ..identify import CLASSES
from ..report import CONVENTION, NOT_APPLICABLE, NOT_EXAMINED, RIGHT, WRONG, Line
from ..subject import Subject

CHECK = "limits"
LOSS, GRADIENT = 1e-4, 1e-3  # of fp32, relative
Case = tuple[str, Tensor, Tensor, Tensor]


def check(subject: Subject) -> Iterator[Line]:
    """A line for each limit, against the fp64 truth of the same rows."""
    for about, z, v, labels in _cases(subject):
        yield _compare(subject, about, z, v, labels)
    for classes in (65_543, 131_077):
        about = f"{classes:,} classes"
        if classes > subject.max_vocab:
            yield Line(CHECK, about, f"it is called with at most {subject.max_vocab:,}", NOT_APPLICABLE)
            continue
        z, v, labels = subject.sample(2, classes, 89, torch.float32)
        z[0, -1], v[0, -1], v[1, 65_536 % classes] = 12.0, 11.0, 12.0
        labels[0], labels[1] = classes - 1, classes - 2
        yield _compare(subject, about, z, v, labels)


def _cases(subject: Subject) -> Iterator[Case]:
    z, v, labels = subject.sample(4, CLASSES, 83, torch.float32)
    labels = labels.clamp(max=2)

    def cut(student: bool, teacher: bool) -> tuple[Tensor, Tensor]:
        a, b = z.clone(), v.clone()
        for x, does in ((a, student), (b, teacher)):
            if does:
                x[:, [3, 8]] = -math.inf
        return a, b

    yield "−inf logits on both sides", *cut(True, True), labels
    yield "−inf logits of the student only", *cut(True, False), labels
    yield "−inf logits of the teacher only", *cut(False, True), labels
    sure_z, sure_v = torch.zeros_like(z), torch.zeros_like(v)
    sure_z[:, 0], sure_v[:, 1] = 150.0, 120.0
    sure_v[2:, 0], sure_v[2:, 1] = 180.0, 0.0
    yield "margins of 120 and more", sure_z, sure_v, labels
    one_hot = torch.full_like(v, -1e4)
    one_hot[:, 2] = 0.0
    yield "a one-hot teacher", z, one_hot, labels
    yield "logits around 10,000", z + 1e4, v + 1e4, labels
    yield "logits of ±10,000", z * 5e3, v.flip(-1) * 5e3, labels
    yield "2 classes", *subject.sample(4, 2, 84, torch.float32)
    yield "1 class", *subject.sample(4, 1, 85, torch.float32)


def _compare(subject: Subject, about: str, z: Tensor, v: Tensor, labels: Tensor) -> Line:
    model = subject.model
    if model is not None and not model.family.proper and z.shape[-1] < model.theta[0]:
        return Line(CHECK, about, f"fewer than its {int(model.theta[0])} classes", NOT_APPLICABLE)
    if model is not None and model.family.name == "dkd" and z.shape[-1] == 1:
        return Line(CHECK, about, "there are no others than the target", NOT_APPLICABLE)
    if model is not None and not model.family.softmax and not z.isfinite().all():
        return Line(CHECK, about, "squared differences of such logits have no limit", NOT_APPLICABLE)
    if model is not None and model.family.name == "centered_logit_mse" and not (z + v).isfinite().all():
        return Line(CHECK, about, "a mean of such logits has no limit", NOT_APPLICABLE)
    try:
        got = subject.outcome(z, v, labels)
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", CONVENTION)
    nan = [n for n, x in (("loss", got.loss), ("gradient", got.grad)) if x.isnan().any()]
    if model is None and nan and not (z + v).isfinite().all():
        words = f"NaN in the {' and the '.join(nan)}; whether there is a limit is not known"
        return Line(CHECK, about, words, NOT_EXAMINED)
    if model is None:
        words = f"NaN in the {' and the '.join(nan)}" if nan else "no NaN; which divergence, is not known"
        return Line(CHECK, about, words, WRONG if nan else NOT_EXAMINED)
    exact = subject.truth(z, v, labels)
    value = float(exact.loss)
    if math.isnan(value):
        return Line(CHECK, about, "it has no limit there", NOT_APPLICABLE)
    infinite = not math.isfinite(value)
    limit = "infinite" if infinite else f"{value:.4g}"
    if nan == ["gradient"] and infinite and not exact.grad.isfinite().all():
        return Line(CHECK, about, "the loss is infinite, as its limit is, and the gradient NaN", CONVENTION)
    if nan:
        finite = "" if infinite or exact.grad.isnan().any() else " and the gradient is finite"
        return Line(
            CHECK, about, f"NaN in the {' and the '.join(nan)}, where the loss is {limit}{finite}", WRONG
        )
    loss = float(got.loss.double().sum())
    if infinite:
        words = f"the loss is {loss:.4g}, where its limit is infinite"
        return Line(CHECK, about, words, RIGHT if math.isinf(loss) else CONVENTION)
    scale = max(abs(value), 1e-3 * max(map(abs, (*model.factors, model.hard))))
    loss_off = abs(loss - value) / scale
    if not exact.grad.isfinite().all():
        return Line(
            CHECK, about, f"the loss is {loss_off:.1g} off {limit}", RIGHT if loss_off < LOSS else WRONG
        )
    # An exponent is rounded relative to its logit: at 10,000 fp32 has three digits of a probability. Where a
    # gradient is far below an ordinary one, no digits of it are asked for.
    largest = max(float(x[x.isfinite()].abs().max()) for x in (z, v))
    rounding = 4 * 2.0**-24 * largest * max(map(abs, (*model.factors, model.hard)))
    ordinary = subject.weight(len(z)) * len(z) ** 0.5
    size = max(float(exact.grad.norm()), 1e-3 * ordinary)
    grad_error = float((got.grad.double() - exact.grad).norm())
    grad_off = grad_error / size
    words = f"loss {loss_off:.1g} off {limit}, gradient {grad_off:.1g} off, relative"
    near = model.off / 1e-5 if model.near else 0.0
    right = loss_off < LOSS * (1 + near) + rounding / scale
    right = right and grad_error < GRADIENT * (1 + near) * size + rounding * ordinary
    if not right and not exact.grad.any() and got.grad.any():
        words = (
            f"loss {loss:.4g} where it is {limit}, a gradient of {float(got.grad.norm()):.3g} where it is 0"
        )
        return Line(CHECK, about, words, WRONG)
    if not right and max(loss_off, grad_off) > 0.01:
        words = f"loss {loss:.4g} where it is {limit}, gradient {100 * min(grad_off, 1e6):.3g} % off"
    return Line(CHECK, about, words, RIGHT if right else WRONG)
