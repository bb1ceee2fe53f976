"""Words of the plan of `python -m benchmarks strategies`: seeds, arms, experiments, claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

# Part of what a finished fit is recognised by: raised when the code of the fits changes what they find.
VERSION = 1

# The final figures, of the test split.
TEST_SEEDS = tuple(range(10, 20))
# What chooses configurations, and --quick: of the validation split.
TUNING_SEEDS = (100, 101)
QUICK_SEEDS = (0, 1)
# The part of the steps, of fits and of teachers, that --quick takes.
QUICK_SHARE = 0.1

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        says: What it is, in the figures.
        options: What the experiment's fit is given.
        grid: Configurations, further options, among which tuning chooses; --quick takes the first.
    """

    says: str
    options: Options
    grid: tuple[Options, ...]


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in what is compared and in nothing else.

    Attributes:
        strategy: The recipe that it is about.
        fit: The name of what does one: `FITS` of `benchmarks.strategies`.
        setting: Data, nets and lengths, in a sentence.
        steps: Optimizer steps of every arm, all stages together.
        tuned_on: The metric, of the validation split, that tuning maximises.
        shown: The metric of the figure.
        arms: By name.
    """

    strategy: str
    fit: str
    setting: str
    steps: int
    arms: Mapping[str, Arm]
    tuned_on: str = "accuracy"
    shown: str = "accuracy"


@dataclass(frozen=True)
class Claim:
    """A hypothesis: in this experiment, `arm` has more of `metric` than `control`.

    Attributes:
        says: It, in one sentence.
        experiment: The experiment's name.
        arm: The strategy.
        control: What it is compared with.
        metric: What is compared.
        control_metric: Of the control, where it is another of the same fit.
        paper: What the literature reports, elsewhere and at another scale.
        plan: Which commit of hypotheses it was in: Holm's correction is over the claims of one.
    """

    says: str
    experiment: str
    arm: str
    control: str
    metric: str = "accuracy"
    control_metric: str | None = None
    paper: str = ""
    plan: int = 1


def over(**values: tuple[Any, ...]) -> tuple[Options, ...]:
    """Every combination, those of the first values first."""
    return tuple(dict(zip(values, combination, strict=True)) for combination in product(*values.values()))


# In steps of about three, around the best of a plain net; the first is what --quick takes.
RATES = (1e-2, 3e-3, 3e-2)
TEXT_RATES = (3e-3, 1e-3, 1e-2)
# An arm that has nothing else to tune may tune weight decay: its budget is that of the others.
DECAYS = (0.01, 0.3)
HARD = over(lr=RATES, weight_decay=DECAYS)
