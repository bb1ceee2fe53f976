"""What models say to a batch: those that are trained, their teachers, and what is captured in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.calls import constant, evaluating
from ..models.capture import Capture
from ..models.gathering import check_alike
from .objective import Over, Progress, Step, Term, count
from .outputs import Adaptor, Batch, Outputs, detached, named
from .teachers import Ensemble, Stored, modules_of


class Given(NamedTuple):
    """A batch as the loader gave it and as terms see it, and what teachers said to it."""

    raw: Batch
    batch: Batch
    known: dict[str, Outputs]


class Passes:
    """Forward passes, each when a term first asks for it.

    Args:
        models: Those that may be trained, by name.
        ready: The same, in the wrappers that they are run in.
        teachers: As `Distiller` has them, by name.
        terms: All that will ask.
        adaptor: How models are called.
        remembers: Whether what a teacher said is kept for the batch's next step.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        ready: Mapping[str, nn.Module],
        teachers: Mapping[str, Any],
        terms: Sequence[Any],
        adaptor: Adaptor,
        remembers: bool = False,
    ) -> None:
        self.models, self.ready, self.teachers, self.adaptor = models, dict(ready), teachers, adaptor
        self.modules = [m for teacher in teachers.values() for m in modules_of(teacher)]
        students = {m for model in models.values() for m in model.modules()}
        self.shared = {m for m in self.modules if not students.isdisjoint(m.modules())}
        # Before the next update of a step a shared teacher changes.
        self.remembers = remembers and not self.shared
        everyone = {**ready, **{n: t for n, t in teachers.items() if isinstance(t, nn.Module)}}
        self.captures: dict[str, Capture] = {}
        for name in dict.fromkeys(n for term in terms for n in term.captures):
            if name not in everyone:
                raise ValueError(f"a term captures modules of {name!r}; there are {', '.join(everyone)}")
            paths = [path for term in terms for path in term.captures.get(name, ())]
            self.captures[name] = Capture(everyone[name], paths, name)
        names = {*ready, *teachers}
        self.wants = {name: {w for term in terms for w in term.wants.get(name, ())} for name in names}
        self.recorders = [term for term in terms if type(term).around is not Term.around]

    @contextmanager
    def open(self, trained: Iterable[str] = ()) -> Iterator[None]:
        """Within it, models that aren't trained are in eval mode, and what is captured is."""
        fixed = [model for name, model in self.ready.items() if name not in trained]
        with ExitStack() as stack:
            stack.enter_context(evaluating([*fixed, *(m for m in self.modules if m not in self.shared)]))
            for capture in self.captures.values():
                stack.enter_context(capture)
            yield

    def given(self, raws: Iterable[Batch]) -> list[Given]:
        """Batches as terms will see them."""
        first = next(iter(self.models.values()))
        return [Given(raw, self.adaptor.prepare(first, raw), {}) for raw in raws]

    def steps(
        self, given: Sequence[Given], trains: Sequence[str], progress: Progress, totals: dict[Over, Any]
    ) -> Iterator[Step]:
        """What terms see of every batch, with what all of them count."""
        clamped: Any = {o: s.clamp(min=1) if isinstance(s, Tensor) else max(s, 1) for o, s in totals.items()}
        for raw, batch, known in given:
            yield Step(batch, partial(self.outputs, raw, trains, known), progress, clamped)

    def outputs(
        self, raw: Batch, trains: Sequence[str], known: dict[str, Outputs], name: str, entries: Any = None
    ) -> Outputs:
        """Of a model on a batch: with gradients if it is trained here; or on other entries, as a function."""
        again = entries is not None
        if name in known and not again:
            return known[name]
        model: Any = self.ready.get(name, self.teachers.get(name))
        if model is None:
            raise KeyError(f"there is no model {name!r}, only {', '.join([*self.ready, *self.teachers])}")
        if name == "teacher" and name in self.teachers and raw.get("teacher") is not None:
            check_alike([model], "and batches bring what it said to some of them: leave it, or those, out")
            model = model if isinstance(model, Stored) else Stored()  # what is there needn't be asked live
        recorders, wants = self.recorders if isinstance(model, nn.Module) else [], self.wants[name]
        with ExitStack() as stack, torch.set_grad_enabled(again or name in trains):
            if again:  # wrappers expect one pass for every backward
                model, raw = self.models.get(name, model), {**raw, **entries}
                stack.enter_context(constant([] if name in trains else modules_of(model)))
            found = [stack.enter_context(term.around(name, model)) for term in recorders]
            if name in self.ready:
                outputs = self.adaptor(model, raw, wants)
            else:
                outputs = self.ask(wants, again, model, raw)
                if self.remembers and not again:
                    known[name] = outputs
        if "stored" in outputs and again:
            raise ValueError(
                f"a term asks the {name} about other inputs than the batch's ({', '.join(entries)}), and it "
                "is stored: leave the term out, or pass the model itself as teacher="
            )
        captured = name in self.captures and "stored" not in outputs
        for more in (*found, *([self.captures[name].take()] if captured else [])):
            outputs.update(more)
        outputs.of = name
        return outputs

    def ask(self, wants: set[str], gradients: bool, teacher: Any, raw: Batch) -> Outputs:
        """A teacher's outputs, in eval mode; constants, or with `gradients` a function of the batch."""
        with torch.set_grad_enabled(gradients):
            if isinstance(teacher, Ensemble):
                return teacher.answer(raw, partial(self.ask, wants, gradients))
            if isinstance(teacher, nn.Module):
                with evaluating([teacher] if teacher in self.shared else []):
                    return self.adaptor(teacher, raw, wants)
            outputs = named(teacher(raw))
            return outputs if gradients else Outputs((k, detached(x)) for k, x in outputs.items())


def counts(given: Sequence[Given], kinds: Iterable[Over]) -> dict[Over, Any]:
    """How many of each kind batches have together."""
    return {over: sum(count(each.batch, over) for each in given) for over in kinds}
