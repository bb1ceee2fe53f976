"""`audit`: a loss is called, identified, and asked every question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..divergences import Parametrised, resolve
from . import checks
from .adapter import AUTO, KINDS, Adapter, Refused, detect, likely_kinds
from .identify import CLASSES, FITS, Softening, choose_kinds, identify, logits, singles, with_temperature
from .report import CONVENTION, NOT_EXAMINED, WRONG, Audit, Line
from .subject import Claims, Subject, off

DENOMINATORS = ("counted", "rows", "batch", "elements", "one")
# Divergences that nothing but the argument `divergence` of an audit can name.
STORED = ("truncated", "renormalised")


def audit(
    loss_fn: Callable[..., Any],
    *,
    name: str | None = None,
    student: str = AUTO,
    teacher: str = AUTO,
    labels: str | None = AUTO,
    temperature: str | None = AUTO,
    mask: str | None = AUTO,
    num_items: str | None = AUTO,
    reduction: str | None = AUTO,
    ignore_index: int | str | None = AUTO,
    ndim: int | None = None,
    divergence: str | Parametrised | None = None,
    denominator: str | None = None,
    shift: str | None = None,
    teacher_gradient: bool | None = None,
    options: Mapping[str, Any] | None = None,
    max_vocab: int = 1 << 18,
    device: str | torch.device = "cpu",
    progress: Callable[[str], object] | None = None,
) -> Audit:
    """Examines a distillation loss against fp64 truth, and says what it found.

    The loss is called as `loss_fn(student, teacher, **what_it_takes)` on small random rows, some hundreds of
    times. What it takes is found from its signature and by trying; whatever it raises is a finding.

    Args:
        loss_fn: The loss, a function or a module: of both sides and what else it takes, to a scalar or one
            value a row. Of a tuple the first is the loss.
        name: What the scorecard calls it.
        student: What its first argument is: `"logits"`, `"log_probs"` or `"probs"`; found by default.
        teacher: What its second argument is, likewise.
        labels: The name of the argument for integer labels, or None where there is none; likewise
        temperature: for the temperature,
        mask: for a bool mask of the rows that count,
        num_items: for the number of rows that a mean divides by,
        reduction: and for the reduction, which has to know `"none"`.
        ignore_index: The label of rows that don't count, or None where there is no such label.
        ndim: 2 for logits `[N, V]`, 3 for `[B, S, V]`; by default 2 where it takes them.
        divergence: Which it says it is, as `kd_loss` takes it, or `"truncated"` or `"renormalised"` for
            forward KL over the teacher's top k; otherwise the scorecard says which it is. A name with
            `forward_kl` or `reverse_kl` in it says so, too.
        denominator: By what it says a mean divides, where that is not `"counted"`, the rows that count:
            `"rows"`, `"batch"`, `"elements"` or `"one"`.
        shift: Who shifts labels, as it says: `"inside"` or `"caller"`.
        teacher_gradient: Whether it says that a teacher gets a gradient.
        options: Other arguments, given in every call.
        max_vocab: The largest vocabulary to call it with.
        device: Where its tensors are.
        progress: Called with the name of each group of questions before it is asked.

    Returns:
        The scorecard. Nothing that the loss does makes this raise.

    Raises:
        TypeError: `loss_fn` can't be called, or an argument here is of the wrong type.
        ValueError: An argument here has a value that isn't one of those above.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    _check("student", student, (AUTO, *KINDS))
    _check("teacher", teacher, (AUTO, *KINDS))
    _check("ndim", ndim, (None, 2, 3))
    _check("denominator", denominator, (None, *DENOMINATORS))
    _check("shift", shift, (None, "inside", "caller"))
    given = dict(labels=labels, temperature=temperature, mask=mask, num_items=num_items, reduction=reduction)
    say = progress or (lambda _: None)
    called = str(name or getattr(loss_fn, "__name__", type(loss_fn).__name__))
    claims = Claims(_claimed(divergence, called), denominator, shift, teacher_gradient)
    adapter = detect(loss_fn, given, options or {}, ignore_index)
    say("trying")
    try:
        adapter = _tried(adapter, ndim, (student, teacher), torch.device(device))
    except Refused as error:
        line = Line(
            "calling",
            "rows of logits",
            f"no way of calling it works: {error}; what else it needs goes into `options`",
            NOT_EXAMINED,
        )
        return Audit(called, str(adapter), (line,))
    subject = Subject(adapter, None, None, claims, None, max_vocab, torch.device(device))
    say("identifying")
    lines: list[Line] = []
    subject = _identified(subject, loss_fn, (student, teacher), lines)
    for check in checks.ALL:
        say(check.CHECK)
        lines += _asked(check, subject)
    return Audit(called, str(subject.adapter), tuple(lines))


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(x) for x in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def _claimed(divergence: str | Parametrised | None, called: str) -> tuple[str, tuple[float, ...]] | None:
    """What the loss says it is, or what its name says."""
    if isinstance(divergence, str) and divergence in STORED:
        return divergence, ()
    if isinstance(divergence, str) and divergence in (
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
        "dkd",
        "alpha_beta",
    ):
        return divergence, ()
    if divergence is not None:
        return resolve(divergence)
    said = [kind for kind in ("forward_kl", "reverse_kl") if kind in called.lower()]
    return (said[0], ()) if len(said) == 1 and "skew" not in called.lower() else None


def _asked(check: Any, subject: Subject) -> Iterator[Line]:
    """The lines of a group, of which one that fails costs what comes after it and nothing else."""
    lines = check.check(subject)
    while True:
        try:
            line = next(lines)
        except StopIteration:
            return
        except Exception as error:  # of the loss, or of what it gave back
            text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {str(error)[:120]}"
            yield Line(check.CHECK, "what comes next", text, NOT_EXAMINED)
            return
        yield line


def _tried(adapter: Adapter, ndim: int | None, kinds: tuple[str, str], device: torch.device) -> Adapter:
    """The adapter with a shape that the loss takes; raises `Refused` where there is none."""
    z, v, labels = (x.to(device) for x in logits(3, CLASSES, 5))
    first = likely_kinds(adapter.loss_fn)[0]
    student, teacher = (guess if kind == AUTO else kind for kind, guess in zip(kinds, first, strict=True))
    adapter = adapter.but(student=student, teacher=teacher)
    failure: Refused | None = None
    for each in (2, 3) if ndim is None else (ndim,):
        tried = adapter.but(ndim=each)
        T = {"temperature": 1.0} if adapter.takes("temperature") else {}
        try:
            tried(z, v, labels if adapter.takes("labels") else None, **T)
        except Refused as error:
            failure = failure or error
            continue
        return tried
    assert failure is not None
    raise failure


def _identified(
    subject: Subject, loss_fn: Callable[..., Any], kinds: tuple[str, str], lines: list[Line]
) -> Subject:
    """The subject with what it has been found to be."""
    adapter = subject.adapter
    T = 1.0 if adapter.takes("temperature") else None
    if adapter.takes("labels"):
        subject = _shifting(subject)
        adapter = subject.adapter
    pairs = [
        pair for pair in likely_kinds(loss_fn)
        if all(want in (AUTO, got) for want, got in zip(kinds, pair, strict=True))
    ] or [(kinds[0], kinds[1])]  # fmt: skip
    try:
        if len(pairs) > 1:
            adapter = choose_kinds(adapter, pairs, T)
        subject = replace(subject, adapter=adapter, model=identify(adapter, T))
        subject = replace(subject, reduction=_reduction(subject))
    except Refused as error:
        lines.append(Line("calling", "single rows", f"refused: {error}", WRONG))
    if AUTO in kinds and (adapter.student, adapter.teacher) != ("logits", "logits"):
        kind = {"logits": "logits", "log_probs": "log-probabilities", "probs": "probabilities"}
        words = (
            f"{kind[adapter.student]} of the student, {kind[adapter.teacher]} of the teacher, found by trying"
        )
        lines.append(Line("calling", "what it takes", words, CONVENTION))
    model = subject.model
    if T is None or model is None:
        return subject
    if not model.family.softmax:
        same = _same_at_any_temperature(subject)
        return replace(subject, tempered=replace(model, softening=Softening(1.0, 1.0, 1.0)) if same else None)
    try:
        tempered, left = with_temperature(adapter, model, 3.0)
    except Refused:
        return subject
    fits = left < max(FITS, 3 * model.off) and tempered.power == tempered.power
    return replace(subject, tempered=tempered if fits else None)


def _shifting(subject: Subject) -> Subject:
    """The subject, called as one that shifts labels itself if it does."""
    try:
        taught, matter, _ = checks.labels.probe(subject)
    except Exception:  # whatever it raises, the checks will say
        return subject
    inside = not taught[-1] and all(taught[:-1]) and not matter[0]
    return replace(subject, adapter=subject.adapter.but(shifts=True)) if inside else subject


def _same_at_any_temperature(subject: Subject) -> bool:
    z, v, labels = subject.sample(3, CLASSES, 19)
    return off(subject.call(z, v, labels, temperature=3.0), subject.call(z, v, labels)) < 1e-4


def _reduction(subject: Subject) -> str | None:
    """How several rows make one loss."""
    n = 5
    z, v, labels = subject.sample(n, CLASSES, 17)
    T = {"temperature": 1.0} if subject.adapter.takes("temperature") else {}
    each = singles(subject.adapter, z, v, labels if subject.adapter.takes("labels") else None, **T)
    whole: Tensor = subject.call(z, v, labels).detach().double()
    if whole.dim() == 1 and len(whole) == n:
        return "none" if off(whole, each) < 1e-4 else None
    if whole.dim() == 2 and len(whole) == n:
        return "classes" if off(whole.sum(-1), each) < 1e-4 else None
    if whole.dim():
        return None
    for reduction, exact in (("mean", each.mean()), ("sum", each.sum())):
        if off(whole, exact) < 1e-4:
            return reduction
    return None
