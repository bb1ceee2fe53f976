"""Of the plan of `python -m benchmarks strategies`: a generalist and its specialists.

Digits, and a hierarchy made of them: two digits side by side are one of 100 classes. Whatever is compared has
begun at the same generalist and takes as many steps more, of all nets together; an ensemble, whose nets begin
at random, also has the generalist's steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.strategies_claims import RATES, Arm, Claim, Experiment, over
from benchmarks.strategies_fits import Digits, Lab, Metrics, adamw, carried_out, mlp, rows, seeded
from kdkernels.train import HardLabels, Objective, Plan, Stage, Update, recipes

BATCH = 100
TEMPERATURE = 2.0


class Task:
    """What there is to learn: data, a net for it, and how its generalist is trained.

    Args:
        name: `digits`, of 10 classes, or `pairs`, of 100.
        seed: The plan's.
    """

    def __init__(self, name: str, seed: int) -> None:
        split, self.name, self.seed = Digits.of(seed), name, seed
        if name == "digits":
            self.x, self.y = rows(split.train[:300])
            self.held, self.truth = rows(split.held)
            self.classes, self.clusters, self.steps, self.widths = 10, 3, 100, (64, 64, 10)
        else:
            draw = torch.Generator().manual_seed(7_000 + seed)
            self.x, self.y = pairs(split.train, 3000, draw)
            self.held, self.truth = pairs(split.held, 3000, torch.Generator().manual_seed(7))
            self.classes, self.clusters, self.steps, self.widths = 100, 5, 400, (128, 96, 100)

    def net(self, number: int = 0) -> nn.Module:
        """Before it learns."""
        return seeded(10_000 * (number + 1) + self.seed, lambda: mlp(*self.widths))

    def loader(self, number: int = 0) -> Any:
        """Its data in an order of its own."""
        draw = torch.Generator().manual_seed(1_000 * number + self.seed)
        return DataLoader(TensorDataset(self.x, self.y), BATCH, shuffle=True, drop_last=True, generator=draw)

    def generalist(self, lab: Lab) -> nn.Module:
        """Trained for a while."""

        def make() -> nn.Module:
            net = self.net()
            carried_out(by_labels(net, 3e-3), self.loader(), lab.steps(self.steps))
            return net

        return lab.teacher(f"generalist of {self.name}", self.seed, make)

    @torch.no_grad()
    def accuracy(self, predict: Callable[[Tensor], Tensor]) -> float:
        """In per cent, of the split that is held."""
        return 100.0 * float((predict(self.held).argmax(-1) == self.truth).float().mean())


def pairs(index: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `[count, 128]` of two digits of a split, and what they are as a number."""
    x, y = rows(index)
    tens, units = torch.randint(len(x), (2, count), generator=generator)
    return torch.cat([x[tens], x[units]], 1), 10 * y[tens] + y[units]


def by_labels(net: nn.Module, lr: float) -> Plan:
    """A net that learns from labels alone."""
    return Plan(net, None, [Stage("labels", [Update(Objective(hard=HardLabels()), adamw(lr))])])


def specialised(lab: Lab, task: Task, steps: int, lr: float, prior: Any, top: int) -> tuple[Any, Metrics]:
    """The ensemble of a generalist and of specialists of the classes that it confuses."""
    generalist = task.generalist(lab)
    with torch.no_grad():
        classes = recipes.confusable_classes(generalist(task.x).softmax(-1), task.clusters, seed=task.seed)
    plan = recipes.specialists(
        generalist, classes, TensorDataset(task.x, task.y), count=task.classes, batch_size=BATCH,
        prior=prior, top=top, seed=task.seed, optimizer=adamw(lr),
    )  # fmt: skip
    return plan.student, carried_out(plan, None, steps)


def specialise(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, data: str, prior: str = "learned",
    top: int = 1,
) -> Metrics:  # fmt: skip
    """Specialists, or the generalist trained longer, or several nets from labels, of as many steps."""
    task = Task(data, seed)
    generalist = task.generalist(lab)
    known = {"generalist_accuracy": task.accuracy(generalist)}
    if recipe == "specialists":
        found, ended = specialised(lab, task, steps, lr, prior, top)
        return {"accuracy": task.accuracy(found), **known, **ended}
    if recipe == "longer":
        net = copy.deepcopy(generalist)
        ended = carried_out(by_labels(net, lr), task.loader(1), steps)
        return {"accuracy": task.accuracy(net), **known, **ended}
    nets, ended = [task.net(number) for number in range(task.clusters + 1)], {}  # type: Any, Metrics
    for number, net in enumerate(nets):
        share = max(1, (steps + lab.steps(task.steps)) // len(nets))
        ended |= carried_out(by_labels(net, lr), task.loader(number), share)
    mean = task.accuracy(lambda x: torch.stack([net(x).softmax(-1) for net in nets]).mean(0))
    return {"accuracy": mean, **known, **ended}


def specialists_student(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, data: str, teacher: str, more: int = 0
) -> Metrics:
    """A small net taught by a generalist, by the same trained for `more` steps, or by q of as many steps."""
    task = Task(data, seed)

    def make() -> Any:
        if teacher == "q":
            return specialised(lab, task, lab.steps(more), 1e-3, "learned", 1)[0].eval()
        net = copy.deepcopy(task.generalist(lab))
        carried_out(by_labels(net, 1e-3), task.loader(1), lab.steps(more))
        return net

    given = (
        task.generalist(lab) if teacher == "generalist" else lab.teacher(f"{teacher} of {data}", seed, make)
    )
    student = seeded(seed, lambda: mlp(task.widths[0], 24, task.classes))
    made = getattr(recipes, recipe)(
        student, given, temperature=TEMPERATURE, hard_weight=0.1, optimizer=adamw(lr)
    )
    ended = carried_out(made, task.loader(2), steps)
    return {"accuracy": task.accuracy(student), "teacher_accuracy": task.accuracy(given), **ended}


LOWER = (1e-3, 3e-4, 3e-3)


def _experiments() -> dict[str, Experiment]:
    def compared(data: str) -> dict[str, Arm]:
        def arm(says: str, recipe: str, rates: tuple[float, ...] = LOWER, **options: Any) -> Arm:
            return Arm(says, {"recipe": recipe, "data": data, **options}, over(lr=rates))

        return {
            "specialists": arm("specialists, the prior learnt", "specialists"),
            "known": arm("specialists, the prior known", "specialists", prior="known"),
            "longer": arm("the generalist, trained longer", "longer"),
            # These begin at random, where larger rates are better.
            "ensemble": arm("as many nets, averaged", "ensemble", RATES),
        }

    def student(says: str, teacher: str) -> Arm:
        options = {"recipe": "hinton", "data": "pairs", "teacher": teacher, "more": 1000}
        return Arm(says, options, over(lr=RATES))

    return {
        "specialists-digits": Experiment(
            "specialists", "specialise",
            "300 labelled digits; nets 64-64-10; a generalist of 100 steps, then 300 more of any arm, of 3 "
            "specialists together",
            300, compared("digits"),
        ),
        "specialists-pairs": Experiment(
            "specialists", "specialise",
            "3,000 pairs of 1,000 digits, 100 classes; nets 128-96-100; a generalist of 400 steps, then "
            "1,000 more of any arm, of 5 specialists together",
            1000, compared("pairs"),
        ),
        "specialists-student": Experiment(
            "specialists", "specialists_student",
            "the pairs of digits; student 128-24-100, T = 2; teachers of 400 and 1,000 steps at 1e-3",
            600,
            {
                "generalist": student("from the generalist", "generalist"),
                "longer": student("from the generalist, trained longer", "longer"),
                "q": student("from q of generalist and specialists", "q"),
            },
        ),
    }  # fmt: skip


PAPER = "JFT, 61 specialists of 300 classes: 25.0 → 26.1 %"

EXPERIMENTS: dict[str, Experiment] = _experiments()

CLAIMS: dict[str, Claim] = {
    "specialists.digits": Claim(
        "Of 10 classes: specialists beat their generalist trained for as many steps.",
        "specialists-digits", "specialists", "longer", plan=2,
    ),
    "specialists.generalist": Claim(
        "Of 100 classes: specialists make a generalist better.",
        "specialists-pairs", "specialists", "specialists", "accuracy", "generalist_accuracy",
        paper=PAPER, plan=2,
    ),
    "specialists.longer": Claim(
        "They beat their generalist trained for as many steps.",
        "specialists-pairs", "specialists", "longer", plan=2,
    ),
    "specialists.ensemble": Claim(
        "They beat an ensemble of as many nets and steps.",
        "specialists-pairs", "specialists", "ensemble", plan=2,
    ),
    "specialists.prior": Claim(
        "A prior that is known needs no unlearning: it beats one that is learnt.",
        "specialists-pairs", "known", "specialists", plan=2,
    ),
    "specialists.student": Claim(
        "What the specialists know can be distilled into one net: q teaches better than the generalist.",
        "specialists-student", "q", "generalist", plan=2,
    ),
    "specialists.student_longer": Claim(
        "q teaches better than the generalist trained for as many steps.",
        "specialists-student", "q", "longer", plan=2,
    ),
}  # fmt: skip

FITS: dict[str, Callable[..., Metrics]] = {
    "specialise": specialise,
    "specialists_student": specialists_student,
}
