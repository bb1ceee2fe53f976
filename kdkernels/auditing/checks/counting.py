"""Which rows count, and what they are divided by: ignored labels, masks, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapter import Refused
from ..identify import CLASSES, singles
from ..report import CONVENTION, NOT_APPLICABLE, NOT_EXAMINED, RIGHT, WRONG, Line, Verdict
from ..subject import Subject
from .divergence import number

CHECK = "counting"
N, OUT = 6, [1, 4]


def check(subject: Subject) -> Iterator[Line]:
    """Lines on labels that say ignore, on masks, and on micro-batches."""
    adapter = subject.adapter
    if not adapter.takes("labels"):
        yield Line(CHECK, "ignored labels", "it takes no labels", NOT_APPLICABLE)
    elif adapter.ignore_index is None:
        yield Line(CHECK, "ignored labels", "no label means that a row is ignored", NOT_APPLICABLE)
    else:
        yield from _ignored(subject, "ignored labels", by_mask=False)
    if adapter.takes("mask"):
        yield from _ignored(subject, "a mask", by_mask=True)
    yield from _accumulated(subject)


def _ignoring(
    subject: Subject, labels: Tensor, by_mask: bool, out: list[int]
) -> tuple[Tensor, dict[str, Any]]:
    if by_mask:
        mask = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        mask[out] = False
        return labels, {"mask": mask}
    labels = labels.clone()
    labels[out] = subject.adapter.ignore_index or 0
    return labels, {}


def _ignored(subject: Subject, about: str, by_mask: bool) -> Iterator[Line]:
    z, v, labels = subject.sample(N, CLASSES, 101)
    wanted, given = _ignoring(subject, labels, by_mask, OUT)
    try:
        got = subject.outcome(z, v, wanted, **given)
    except Refused as error:
        yield Line(CHECK, about, f"refused: {error}", NOT_APPLICABLE)
        return
    kept = [i for i in range(N) if i not in OUT]
    outside, inside = got.grad[OUT].abs().max(), got.grad[kept].abs().max()
    if outside != 0:
        share = float(got.grad[OUT].double().norm() / got.grad.double().norm())
        if by_mask and inside == 0:
            words = "True marks the rows that don't count"
            yield Line(CHECK, f"{about}: which rows count", words, CONVENTION)
            return
        everywhere = torch.equal(got.grad, subject.outcome(z, v, labels).grad)
        words = f"ignored rows teach: they have {100 * share:.3g} % of the gradient's norm"
        words += (
            "" if by_mask else f"; ignore_index=None says that no label is {subject.adapter.ignore_index}"
        )
        verdict: Verdict = WRONG
        if everywhere and (subject.model is None or not subject.model.hard) and not by_mask:
            words, verdict = "labels change nothing, and every row counts", CONVENTION
        yield Line(CHECK, f"{about}: which rows count", words, verdict)
    else:
        words = f"the {len(OUT)} ignored of {N} rows have gradient 0"
        yield Line(CHECK, f"{about}: which rows count", words, RIGHT)
        yield _denominator(subject, about, by_mask)
    yield _garbage(subject, about, by_mask)
    yield _nothing_counts(subject, about, by_mask)


def _denominator(subject: Subject, about: str, by_mask: bool) -> Line:
    about = f"{about}: denominator"
    z, v, labels = subject.sample(N, CLASSES, 103)
    taken = labels if subject.adapter.takes("labels") else None
    T = {"temperature": 1.0} if subject.adapter.takes("temperature") else {}
    each = singles(subject.adapter, z, v, taken, **T)
    wanted, given = _ignoring(subject, labels, by_mask, OUT)
    whole = subject.call(z, v, wanted, **given).double()
    kept = [i for i in range(N) if i not in OUT]
    if whole.dim():
        if len(whole) == len(kept):
            return Line(CHECK, about, f"one value for each of the {len(kept)} rows that count", RIGHT)
        if len(whole) != N:
            return Line(CHECK, about, f"values of shape {list(whole.shape)} for {N} rows", CONVENTION)
        none = not whole[OUT].any()
        return Line(
            CHECK, about, f"ignored rows' losses are {'0' if none else 'not 0'}", RIGHT if none else WRONG
        )
    ratio = float(whole / each[kept].sum())
    counts = {len(kept): "the rows that count", N: f"all {N} rows, of which {len(kept)} count", 1: "nothing"}
    for count, words in counts.items():
        if abs(ratio * count - 1) < 1e-4:
            verdict: Verdict = RIGHT if count == len(kept) else CONVENTION if count == 1 else WRONG
            if count == N and subject.claims.denominator == "rows":
                verdict = CONVENTION
            if count == 1 and subject.reduction == "mean":
                verdict = WRONG
            more = ": padding makes the loss smaller" if count == N else ""
            return Line(CHECK, about, f"divides by {words}{more}", verdict)
    if subject.model is not None and subject.model.hard:
        return _apart(subject, about, by_mask)
    return Line(CHECK, about, f"{number(ratio)} × the sum of the {len(kept)} rows that count", WRONG)


def _apart(subject: Subject, about: str, by_mask: bool) -> Line:
    """Both terms, of which each may divide by another number."""
    assert subject.model is not None
    soft = replace(subject.model, hard=0.0)
    hard = replace(subject.model, factors=tuple(0.0 for _ in subject.model.factors))
    columns, values = [], []
    kept = [i for i in range(N) if i not in OUT]
    for seed in range(105, 111):
        z, v, labels = subject.sample(N, CLASSES, seed)
        wanted, given = _ignoring(subject, labels, by_mask, OUT)
        values.append(subject.call(z, v, wanted, **given).double())
        parts = [m.rows(z[kept], v[kept], labels[kept]).sum() for m in (soft, hard)]
        columns.append(torch.stack(parts))
    matrix, wanted_values = torch.stack(columns), torch.stack(values)
    found = torch.linalg.lstsq(matrix, wanted_values[:, None]).solution[:, 0]
    left = float((wanted_values - matrix @ found).norm() / wanted_values.norm())
    if left > 1e-4 or not (found > 0).all():
        return Line(CHECK, about, f"neither rows that count nor all: {100 * left:.2g} % is left", WRONG)
    shares = [f"{float(1 / x):.3g}" for x in found]
    words = (
        f"the soft term is divided by {shares[0]}, the hard one by {shares[1]}; {len(kept)} of {N} rows count"
    )
    return Line(CHECK, about, words, WRONG)


def _garbage(subject: Subject, about: str, by_mask: bool) -> Line:
    about = f"{about}: NaN and inf in rows that don't count"
    z, v, labels = subject.sample(N, CLASSES, 101)
    wanted, given = _ignoring(subject, labels, by_mask, OUT)
    clean = subject.outcome(z, v, wanted, **given)
    z, v = z.clone(), v.clone()
    z[OUT[0], 2], v[OUT[0], 3], z[OUT[1]], v[OUT[1], 0] = math.nan, math.nan, math.inf, math.inf
    try:
        got = subject.outcome(z, v, wanted, **given)
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", CONVENTION)
    kept = [i for i in range(N) if i not in OUT]
    if not got.loss.isfinite().all():
        return Line(CHECK, about, "make the loss NaN", WRONG)
    if not torch.allclose(got.grad[kept], clean.grad[kept], rtol=1e-5):
        return Line(CHECK, about, "change the gradients of other rows", WRONG)
    if got.grad[OUT].any():
        words = f"leave the loss alone; {int(got.grad[OUT].isnan().sum())} values of their gradients are NaN"
        return Line(CHECK, about, words, CONVENTION)
    return Line(CHECK, about, "change nothing, and their gradients are exactly 0", RIGHT)


def _nothing_counts(subject: Subject, about: str, by_mask: bool) -> Line:
    about = f"{about}: no row counts"
    z, v, labels = subject.sample(3, CLASSES, 107)
    wanted, given = _ignoring(subject, labels, by_mask, [0, 1, 2])
    try:
        got = subject.outcome(z, v, wanted, **given)
    except Refused as error:
        return Line(CHECK, about, f"refused: {error}", CONVENTION)
    if got.loss.isnan().any() or got.grad.isnan().any():
        where = "loss" if got.loss.isnan().any() else "gradient"
        return Line(
            CHECK, about, f"the {where} is NaN, which an all-padded micro-batch would train on", WRONG
        )
    if got.loss.any() or got.grad.any():
        return Line(CHECK, about, f"the loss is {float(got.loss.sum()):.3g}, and not 0", WRONG)
    return Line(CHECK, about, "the loss and its gradient are 0", RIGHT)


def _accumulated(subject: Subject) -> Iterator[Line]:
    """Two micro-batches of 2 and 6 rows, averaged, beside one batch of 8."""
    about = "micro-batches of 2 and 6 rows"
    if subject.reduction in ("none", "classes"):
        yield Line(CHECK, about, "the caller reduces", NOT_APPLICABLE)
        return
    if subject.reduction is None:
        yield Line(CHECK, about, "its reduction is not known", NOT_EXAMINED)
        return
    z, v, labels = subject.sample(8, CLASSES, 109)
    whole = subject.outcome(z, v, labels).grad
    parts = [slice(0, 2), slice(2, 8)]

    def together(**given: Any) -> Tensor:
        return torch.cat([subject.outcome(z[p], v[p], labels[p], **given).grad for p in parts])

    plain = together()
    if subject.reduction == "sum":
        far = float((plain - whole).norm() / whole.norm())
        yield Line(CHECK, about, f"add up to the whole batch, {far:.1g} off", RIGHT if far < 1e-4 else WRONG)
    else:
        far = float((plain / 2 - whole).norm() / whole.norm())
        words = f"averaged are {100 * far:.3g} % off the whole batch's gradient: a mean over local rows"
        verdict: Verdict = CONVENTION
        if not subject.adapter.takes("num_items"):
            words += ", and no argument gives it the number over all"
        yield Line(CHECK, about, words, verdict)
    if subject.adapter.takes("num_items") and subject.reduction == "mean":
        far = float((together(num_items=8) - whole).norm() / whole.norm())
        words = f"add up to the whole batch's gradient, {far:.1g} off"
        yield Line(
            CHECK, f"{about}, {subject.adapter.names['num_items']}=8", words, RIGHT if far < 1e-4 else WRONG
        )
