"""What is minimised: named terms, weighted, each a mean over what it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .outputs import Batch, Outputs

Over = Literal["items", "tokens", "samples"]


@dataclass
class Progress:
    """How far a fit is.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs finished.
        batch: Batches of this epoch that were used.
        fraction: Of the whole fit, 0 to 1.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    fraction: float = 0.0


Weight = float | Callable[[Progress], float]


class Step:
    """What a term sees: a batch, and the outputs of every model on it, each computed when first asked for.

    Attributes:
        batch: With labels beside their logits, as the adaptor prepared it.
        progress: How far the fit is.
    """

    def __init__(
        self, batch: Batch, run: Callable[..., Outputs], progress: Progress, totals: dict[str, Any]
    ) -> None:
        self.batch, self.progress, self._run, self._totals = batch, progress, run, totals
        self._outputs: dict[str, Outputs] = {}

    def __getitem__(self, model: str) -> Outputs:
        """Outputs of a model by its name: without gradients, unless this update trains it."""
        if model not in self._outputs:
            self._outputs[model] = self._run(model)
        return self._outputs[model]

    def run(self, model: str, /, **entries: Any) -> Outputs:
        """Outputs of a model on the batch with other entries, as a function of them: `inputs=x` of x.

        Gradients go to what requires them there, and to the model if this update trains it; no teacher's
        parameter gets one.
        """
        return self._run(model, entries)

    @property
    def student(self) -> Outputs:
        """Of the model of that name."""
        return self["student"]

    @property
    def teacher(self) -> Outputs:
        """Likewise."""
        return self["teacher"]

    @property
    def labels(self) -> Any:
        """Of the batch, beside their logits; an error where there are none."""
        if self.batch.get("labels") is None:
            raise ValueError(
                "a term needs labels, and the batch has none: give (inputs, labels) or a 'labels' entry, or "
                "leave the term out for unlabelled data"
            )
        return self.batch["labels"]

    @property
    def mask(self) -> Tensor | None:
        """Rows that count, or None for all."""
        return self.batch["mask"]

    def total(self, over: Over) -> Any:
        """How many the whole optimizer step counts, for each process: what a sum over rows is divided by."""
        return self._totals[over]

    def share(self, over: Over) -> Any:
        """This batch's part of them: what a mean over this batch is multiplied by."""
        return count(self.batch, over) / self._totals[over]


def count(batch: Batch, over: Over) -> Any:
    """How many a prepared batch has: `items` that count, `tokens` that aren't padding, `samples`.

    A number where nothing has to be looked at, else a tensor, so that no device is waited for.
    """
    if over == "items" and batch["mask"] is not None:
        return batch["mask"].sum()
    if over == "tokens" and isinstance(mask := batch.get("attention_mask"), Tensor):
        return mask.sum()
    if over == "tokens" and isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    first = next((x for x in batch.values() if isinstance(x, Tensor) and x.dim()), None)
    if first is None:
        raise ValueError("a batch must hold a tensor with a dimension of samples, to be counted")
    return len(first)


class Term(nn.Module):
    """One named part of an objective: a function of a `Step` to a scalar, a mean over what it counts.

    Attributes:
        weight: What it is multiplied by: a number, or a function of the `Progress`.
        over: What it is a mean over. Batches are weighted by their share of it, so that accumulation and
            several processes give the mean of one big batch.
        wants: What it asks of the adaptor, by model: `{"teacher": ("hidden_states",)}`.
        captures: Names of modules, by model, whose outputs it uses.
    """

    over: Over = "items"

    def __init__(self, weight: Weight = 1.0, over: Over | None = None) -> None:
        super().__init__()
        if isinstance(weight, bool) or not (callable(weight) or isinstance(weight, (int, float))):
            raise TypeError(
                f"weight must be a number or a function of the progress, got {type(weight).__name__}"
            )
        self.weight, self.over = weight, over or self.over
        self.wants: dict[str, tuple[str, ...]] = {}
        self.captures: dict[str, tuple[str, ...]] = {}

    def weight_at(self, progress: Progress) -> float:
        """The weight at a point of the fit."""
        return float(self.weight(progress)) if callable(self.weight) else self.weight

    @property
    def group(self) -> Any:
        """Terms of one class with the same group that isn't None are computed by one call of `together`."""
        return None

    @classmethod
    def together(
        cls, step: Step, terms: Mapping[str, Term], weights: Mapping[str, float]
    ) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What every term adds, weights included (None where another's has it in), and its value."""
        found = {}
        for name, term in terms.items():
            value = term(step)
            if not isinstance(value, Tensor) or value.dim():
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"term {name} must return a scalar tensor, got {got}")
            share, weight = step.share(term.over), weights[name]
            value = value if isinstance(share, float) and share == 1 else value * share
            found[name] = (value if weight == 1 else value * weight, value)
        return found

    def around(self, name: str, model: nn.Module) -> AbstractContextManager[Any]:
        """What a forward pass of a model runs in; the mapping that it gives is added to the outputs."""
        return nullcontext({})

    def check_stored(self, teacher: str, row: Any) -> None:
        """Raises where a teacher of that name can't be one of which a row such as this is all that is known.

        Args:
            teacher: Its name.
            row: A `kd.TopK` or `kd.Sampled` of one row.
        """
        needs = [*map(repr, (*self.wants.get(teacher, ()), *self.captures.get(teacher, ())))]
        needs += ["what its layers compute"] * (type(self).around is not Term.around)
        needs += ["its logits"] * (getattr(self, "teacher", None) == teacher)
        if needs:
            raise ValueError(f"it needs {', '.join(needs)}; there are probabilities of some classes alone")

    def check(self) -> None:
        """Called when an epoch or a fit ends: raises where the data never had what the term is for."""


class Function(Term):
    """A function of the step as a term; `over` says what it is a mean over."""

    def __init__(
        self, function: Callable[[Step], Tensor], weight: Weight = 1.0, over: Over = "items"
    ) -> None:
        super().__init__(weight, over)
        self.function = function

    def forward(self, step: Step) -> Tensor:
        """The function's value."""
        return self.function(step)


class Objective(nn.Module):
    """A weighted sum of named terms.

    Formula: Σ weight · term, every term a mean over what it counts.

    Args:
        **terms: Terms by name; a function of a `Step` is one of weight 1 over items that count.

    Example:
        >>> objective = Objective(soft=SoftTargets(temperature=4.0, weight=0.9), hard=HardLabels(weight=0.1))
    """

    def __init__(self, **terms: Term | Callable[[Step], Tensor]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("an objective must have a term, such as soft=SoftTargets()")
        for name, term in terms.items():
            if not isinstance(term, Term) and not callable(term):
                raise TypeError(
                    f"term {name} must be a Term or a function of a Step, got {type(term).__name__}"
                )
        self.terms = nn.ModuleDict(
            {name: term if isinstance(term, Term) else Function(term) for name, term in terms.items()}
        )
        made: Any = self.terms  # which is typed as one of any modules
        # All that terms are means over.
        self.counted: tuple[Over, ...] = tuple(dict.fromkeys(("items", *(t.over for t in made.values()))))
        self._groups: list[tuple[str, Term, Any]] = [
            (name, term, name if term.group is None else term.group) for name, term in made.items()
        ]

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """What a batch adds to the objective, and to every term, without its weight, detached."""
        parts = self.parts(step)
        added = [part for part, _ in parts.values() if part is not None] or [torch.zeros(())]
        return sum(added[1:], added[0]), {name: value.detach() for name, (_, value) in parts.items()}

    def parts(self, step: Step, apart: bool = False) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Of terms whose weight isn't 0 now, what each adds, and its value; `apart`, by a call for each."""
        weights, groups = {}, {}  # type: dict[str, float], dict[Any, dict[str, Term]]
        for name, term, group in self._groups:
            if weight := term.weight_at(step.progress):
                weights[name] = weight
                groups.setdefault(name if apart else group, {})[name] = term
        found = {}
        for terms in groups.values():
            found.update(next(iter(terms.values())).together(step, terms, weights))
        return found
