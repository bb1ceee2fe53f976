"""Labels: whether they are shifted, other integer types, values that are no class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..adapter import Refused
from ..identify import CLASSES
from ..report import CONVENTION, NOT_APPLICABLE, RIGHT, WRONG, Line
from ..subject import Subject, off

CHECK = "labels"


def check(subject: Subject) -> Iterator[Line]:
    """Lines on shifting, dtypes and range."""
    if not subject.adapter.takes("labels"):
        yield Line(CHECK, "labels", "it takes none", NOT_APPLICABLE)
        return
    yield _shift(subject)
    yield _int32(subject)
    yield from _range(subject)


def probe(subject: Subject) -> tuple[list[bool], list[bool], list[bool]]:
    """Of a sequence of 4: rows with a gradient, labels that matter, rows that ignoring the third takes out.

    The last is of the soft term too, where it takes rows from it.
    """
    adapter = subject.adapter.but(shifts=False)
    z, v, labels = subject.sample(4, CLASSES, 113)
    labels = torch.arange(4, device=labels.device) + 2
    T: dict[str, Any] = {"temperature": 1.0} if adapter.takes("temperature") else {}

    def shaped(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if adapter.ndim == 3 else x

    def rows(labels: Tensor) -> Tensor:
        leaf = z.detach().clone().requires_grad_()
        loss = adapter.raw(shaped(leaf), shaped(v), shaped(labels), **T).sum()
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return torch.zeros_like(leaf) if grad is None else grad.nan_to_num()

    plain = rows(labels)
    taught = [bool(row.any()) for row in plain]
    matter = []
    for i in range(4):
        other = labels.clone()
        other[i] = 9
        matter.append(not torch.equal(rows(other), plain))
    if adapter.ignore_index is None:
        return taught, matter, [False] * 4
    ignored = labels.clone()
    ignored[2] = adapter.ignore_index
    after = rows(ignored)
    return taught, matter, [was and not bool(row.any()) for was, row in zip(taught, after, strict=True)]


def _shift(subject: Subject) -> Line:
    about = "whose work shifting them is"
    taught, matter, _ = probe(subject)
    said = subject.claims.shift
    inside = not matter[0] and any(matter[1:])
    if not any(matter):
        inside = not taught[-1] and all(taught[:-1])
        if not inside and said is None:
            return Line(CHECK, about, "no label names a class here; row t has label t", RIGHT)
    if inside and taught[-1]:
        words = "the hard term's row t has label t + 1, and the soft term has rows that the hard one has not"
        return Line(CHECK, about, words, WRONG)
    if not inside and not taught[-1]:
        words = "the soft term leaves the last row out, and the hard term's row t has label t"
        return Line(CHECK, about, words, WRONG)
    words = "its own: row t has label t + 1" if inside else "the caller's: row t has label t"
    if said is not None and (said == "inside") != inside:
        whose = "its own" if said == "inside" else "the caller's"
        return Line(CHECK, about, f"{words}; it says {whose}", WRONG)
    misaligned = _misaligned(subject, inside)
    if misaligned is not None:
        return Line(CHECK, about, misaligned, WRONG)
    return Line(CHECK, about, words, CONVENTION if inside else RIGHT)


def _misaligned(subject: Subject, inside: bool) -> str | None:
    """Where a label that is ignored takes another row from the soft term than from the hard one."""
    if subject.adapter.ignore_index is None:
        return None
    try:
        _, _, gone = probe(subject)
    except Refused:
        return None
    expected = 1 if inside else 2
    other = [i for i, is_gone in enumerate(gone) if is_gone and i != expected]
    if not other:
        return None
    return f"label 2 is of row {expected}, and ignoring it takes row {other[0]} out"


def _int32(subject: Subject) -> Line:
    about = "int32 labels"
    z, v, labels = subject.sample(4, CLASSES, 127)
    long = subject.outcome(z, v, labels)
    try:
        short = subject.outcome(z, v, labels.to(torch.int32))
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", CONVENTION)
    far = max(off(short.loss, long.loss), off(short.grad, long.grad))
    words = f"give what int64 gives, {far:.1g} off"
    return Line(CHECK, about, words, RIGHT if far < 1e-6 else WRONG)


def _range(subject: Subject) -> Iterator[Line]:
    about = "labels that are no class"
    if subject.model is None or (not subject.model.hard and subject.model.family.name != "dkd"):
        yield Line(CHECK, about, "no term reads a class from them", NOT_APPLICABLE)
        return
    z, v, labels = subject.sample(4, CLASSES, 131)
    for bad in (CLASSES + 3, -7):
        wrong = labels.clone()
        wrong[1] = bad
        where = f"label {bad} of {CLASSES} classes"
        try:
            loss = subject.call(z, v, wrong)
        except Refused as error:
            yield Line(CHECK, where, f"refused: {error}", RIGHT)
            continue
        silent = bool(loss.isfinite().all())
        words = (
            f"read silently: the loss is {float(loss.double().sum()):.4g}" if silent else "the loss is NaN"
        )
        yield Line(CHECK, where, words, WRONG if silent else RIGHT)
