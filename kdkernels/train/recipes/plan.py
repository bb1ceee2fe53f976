"""What a recipe gives: stages that are done one after the other, and go on where they were."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distiller import Distiller, Update
from ..objective import Objective, Term
from ..records import Row


@dataclass
class Stage:
    """One fit of a plan.

    Attributes:
        name: Its name, and that of its folder.
        updates: What is minimised.
        share: Its part of the steps or epochs, relative to the other stages'.
        student: The model, or models by name; None for the plan's.
        teacher: As `Distiller` takes it; None for the plan's.
        before: Called with the plan before the stage, unless it is resumed.
        loader: Its batches; None for those that `Plan.run` is given. With its own, it is not evaluated on
            those of `Plan.run`, whose labels may mean something else.
    """

    name: str
    updates: Sequence[Update]
    share: float = 1.0
    student: Any = None
    teacher: Any = None
    before: Callable[[Plan], None] | None = None
    loader: Iterable[Any] | None = None


class Plan:
    """Stages of a strategy for a student and a teacher.

    Args:
        student: The model to train, or several by name.
        teacher: As `Distiller` takes it.
        stages: What is done, one after the other.
        **options: Further arguments of `Distiller`, for every stage.
    """

    def __init__(self, student: Any, teacher: Any, stages: Sequence[Stage], **options: Any) -> None:
        inspect.signature(Distiller).bind_partial(student, teacher, **options)  # a misspelt one is told now
        self.student, self.teacher, self.stages, self.options = student, teacher, list(stages), options

    @property
    def objective(self) -> Objective:
        """Of the last stage."""
        return self.stages[-1].updates[0].objective

    def distiller(self, stage: Stage, folder: str | Path | None = None) -> Distiller:
        """What runs a stage."""
        student = self.student if stage.student is None else stage.student
        teacher = self.teacher if stage.teacher is None else stage.teacher
        return Distiller(student, teacher, updates=stage.updates, folder=folder, **self.options)

    def run(
        self,
        loader: Iterable[Any] | None = None,
        eval_loader: Iterable[Any] | None = None,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        folder: str | Path | None = None,
        **options: Any,
    ) -> dict[str, list[Row]]:
        """Runs the stages; with a folder, from where an earlier run of the same plan was.

        Args:
            loader: As `Distiller.fit` takes it, for stages without one of their own.
            eval_loader: Likewise.
            steps: Optimizer steps of all stages together, or
            epochs: passes over the loader. Every stage has at least one.
            folder: Has a folder for each stage; None for no checkpoints.
            **options: Further arguments of `Distiller.fit`.

        Returns:
            The history of each stage by its name.

        Raises:
            ValueError: Steps and epochs, or neither; a stage without batches.
        """
        if (steps is None) == (epochs is None):
            raise ValueError(f"run takes steps or epochs, got steps={steps}, epochs={epochs}")
        if loader is None and (bare := [stage.name for stage in self.stages if stage.loader is None]):
            raise ValueError(f"run needs a loader: {', '.join(bare)} has none of its own")
        whole, histories = sum(stage.share for stage in self.stages), {}  # type: float, dict[str, list[Row]]
        for number, stage in enumerate(self.stages):
            place = None if folder is None else Path(folder) / f"{number + 1}-{stage.name}"
            distiller = self.distiller(stage, place)
            if not (place is not None and distiller.resume()) and stage.before is not None:
                stage.before(self)
            length = max(1, round((steps or epochs or 0) * stage.share / whole))
            amount: dict[str, Any] = {"steps": length} if steps is not None else {"epochs": length}
            batches, held = (loader, eval_loader) if stage.loader is None else (stage.loader, None)
            assert batches is not None
            histories[stage.name] = distiller.fit(batches, eval_loader=held, **amount, **options)
        return histories


def stages_of(
    student: Any, teacher: Any, stages: Mapping[str, Mapping[str, Term]], training: Mapping[str, Any]
) -> Plan:
    """Stages of one update each; terms of weight 0 are left out."""
    rest = dict(training)
    optimizer, scheduler = rest.pop("optimizer", None), rest.pop("scheduler", None)
    made = [
        Stage(
            name,
            [Update(Objective(**{n: t for n, t in terms.items() if t.weight != 0}), optimizer, scheduler)],
        )
        for name, terms in stages.items()
    ]
    return Plan(student, teacher, made, **rest)
