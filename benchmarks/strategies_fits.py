"""Fits of `python -m benchmarks strategies` on digits: data, nets, teachers, and an arm through its recipe.

Digits are scikit-learn's, 1,797 real scans of 8×8. 600 of them are the test split for good; the other 1,197
are shuffled by each seed into 1,000 for training and 197 for validation. A tuning seed is evaluated on its
validation split, a test seed on the test split, and nothing else chooses: `Digits.held` does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn

from benchmarks import strategies_claims as plan
from kdkernels.train import (
    Distiller,
    HardLabels,
    MultiLabel,
    NonFiniteLoss,
    Objective,
    Plan,
    SoftTargets,
    Stage,
    Update,
    recipes,
    warm_up,
)

TEST_ROWS, TRAIN_ROWS = 600, 1000
BATCH = 250
# So that warm-ups, which recipes count in epochs, mean the same with one batch and with many.
EPOCH = 20
TEACHER_STEPS, TEACHER_BATCH = 300, 100

Metrics = dict[str, float]


class Lab:
    """Teachers, each made once, and how long that took.

    Args:
        folder: Where a teacher that takes minutes is kept.
        share: The part of their steps that teachers get.
    """

    def __init__(self, folder: Path, share: float = 1.0) -> None:
        self.folder, self.share = folder, share
        self.made: dict[tuple[str, int], Any] = {}
        self.seconds: dict[str, float] = {}

    def steps(self, steps: int) -> int:
        """A teacher's."""
        return max(1, round(steps * self.share))

    def teacher(self, kind: str, seed: int, make: Callable[[], Any]) -> Any:
        """The one of this kind and seed. Its time is not that of the fit that asked first."""
        if (kind, seed) not in self.made:
            before, started = sum(self.seconds.values()), time.perf_counter()
            self.made[kind, seed] = make()
            # A teacher may ask for another: what that took is counted there.
            nested = sum(self.seconds.values()) - before
            took = time.perf_counter() - started - nested
            self.seconds[kind] = self.seconds.get(kind, 0.0) + took
        return self.made[kind, seed]


# Data


def is_test(seed: int) -> bool:
    """Whether a seed is for the final figures, and not for tuning.

    Raises:
        ValueError: A seed that the plan has for neither.
    """
    if (seed in plan.TEST_SEEDS) == (seed in (*plan.TUNING_SEEDS, *plan.QUICK_SEEDS)):
        raise ValueError(f"seed must be one of the plan's, for test or for tuning and not both, got {seed}")
    return seed in plan.TEST_SEEDS


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images `[1797, 64]` in [0, 1], labels, and the order that sets the test split aside."""
    given = load_digits()
    images = torch.as_tensor(given.data, dtype=torch.float32) / given.data.max()
    return images, torch.as_tensor(given.target), torch.randperm(len(images), generator=_generator(2026))


def _generator(*numbers: int) -> torch.Generator:
    """One for each purpose and seed."""
    seed = 0
    for number in numbers:
        seed = seed * 10_007 + number + 1
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Digits:
    """The splits of a seed, as indices.

    Attributes:
        train: What students and teachers may learn from, in the order in which they get it.
        validation: What biases are chosen on, and tuning seeds are evaluated on.
        held: What the figures are of.
    """

    train: Tensor
    validation: Tensor
    held: Tensor

    @classmethod
    def of(cls, seed: int) -> Digits:
        """Of a tuning seed, or of a test seed."""
        order = _digits()[2]
        pool = order[TEST_ROWS:]
        pool = pool[torch.randperm(len(pool), generator=_generator(1, seed))]
        train, validation = pool[:TRAIN_ROWS], pool[TRAIN_ROWS:]
        return cls(train, validation, order[:TEST_ROWS] if is_test(seed) else validation)


def rows(index: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    images, labels, _ = _digits()
    return images[index], labels[index]


def batches(x: Tensor, y: Tensor | None = None, size: int = BATCH, count: int | None = EPOCH) -> list[Any]:
    """So many batches, or one pass; without labels, inputs alone."""
    parts = list(x.split(size)) if y is None else list(zip(x.split(size), y.split(size), strict=True))
    return parts if count is None else [parts[i % len(parts)] for i in range(count)]


# Nets, teachers, fits


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them: in `net[2 k]` and `net[2 k + 1]`."""
    layers: list[nn.Module] = []
    for wide, out in pairwise(widths):
        layers += [nn.Linear(wide, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions(channels: int) -> nn.Sequential:
    """Three, of 8×8, 4×4 and 4×4: maps of `net[2]` and `net[6]`."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * channels, 10),
    )  # fmt: skip


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A net whose initialisation is the seed's, whatever was done before."""
    torch.manual_seed(seed)
    return make()


def taught(lab: Lab, net: nn.Module, x: Tensor, y: Tensor, steps: int = TEACHER_STEPS) -> nn.Module:
    """A teacher: a net trained with labels, of several labels a row where they are floats."""
    hard = MultiLabel() if y.is_floating_point() else HardLabels()
    distiller = Distiller(net, objective=Objective(hard=hard), optimizer=adamw(3e-3))
    loader = batches(x, y, TEACHER_BATCH, None)
    distiller.fit(loader, steps=lab.steps(steps), progress=False, log_every=steps)
    return net.eval()


def adamw(lr: float, weight_decay: float = 0.01) -> Any:
    """A maker of optimizers, as recipes take them."""
    return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)


def carried_out(plan: Plan, loader: Sequence[Any], steps: int) -> Metrics:
    """Runs a plan. A fit that diverged keeps its last finite weights, is evaluated like any, and says so."""
    try:
        plan.run(loader, steps=steps, progress=False, log_every=steps)
    except NonFiniteLoss:
        return {"diverged": 1.0}
    finally:
        several = isinstance(plan.student, dict)
        for model in plan.student.values() if several else [plan.student]:
            model.eval()
    return {}


@torch.no_grad()
def accuracy(net: nn.Module, index: Tensor) -> float:
    """In per cent."""
    x, y = rows(index)
    return 100.0 * float((net(x).argmax(-1) == y).float().mean())


def digits_teacher(lab: Lab, kind: str, seed: int) -> nn.Module:
    """64-256-256-10: `wide` of all training rows, `half` of the first half of them, `untrained` of none."""
    train = Digits.of(seed).train
    part = {"wide": TRAIN_ROWS, "half": TRAIN_ROWS // 2, "untrained": 0}[kind]

    def make() -> nn.Module:
        net = seeded(seed + 1000, lambda: mlp(64, 256, 256, 10))
        return taught(lab, net, *rows(train[:part])) if part else net.eval()

    return lab.teacher(kind, seed, make)


def shuffled(teacher: nn.Module, seed: int) -> Callable[[dict[str, Any]], Tensor]:
    """A teacher as sure as this one and of the same class, its logits of the other classes in another order.

    The order is drawn for each row of the batch, and is the same at every call: for full batches, of a row.
    """

    @torch.no_grad()
    def logits(batch: dict[str, Any]) -> Tensor:
        v = teacher(batch["inputs"])
        others = v.scatter(1, v.argmax(1, keepdim=True), torch.inf).argsort(1)[:, :-1]  # [N, C − 1]
        order = torch.rand(others.shape, generator=_generator(2, seed)).argsort(1)
        return v.scatter(1, others, v.gather(1, others.gather(1, order)))

    return logits


def recipe_of(name: str, student: nn.Module, teacher: Any, steps: int, **options: Any) -> Plan:
    """A recipe by name, with the words of the plan for what recipes have no name of."""
    if name == "labels":
        return recipes.hinton(student, teacher, soft_weight=0.0, hard_weight=1.0, **options)
    if name == "clean":
        return recipes.hinton(
            student, teacher, divergence="logit_mse", temperature=1.0, hard_weight=0.0, **options
        )
    warm_up_epochs = max(1, steps // EPOCH // 10)
    if name == "warmed":
        weight = warm_up(options.pop("soft_weight"), epochs=warm_up_epochs)
        return recipes.hinton(student, teacher, soft_weight=weight, **options)
    if name == "dkd":
        return recipes.dkd(student, teacher, warm_up_epochs=warm_up_epochs, **options)
    return getattr(recipes, name)(student, teacher, **options)


def classify(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, amount: int = 50,
    data: str = "labelled", teacher: str = "wide", teachers: int = 0, net: Sequence[int] = (30, 30),
    hints_from: str | None = None, **options: Any,
) -> Metrics:  # fmt: skip
    """A student of some rows of digits: `labelled` or `unlabelled` ones of the first half, which the teacher
    `half` has seen, or `held-out` ones of the second, with labels, without or with the teacher's `argmax`.
    """
    split = Digits.of(seed)
    given: Any = None
    if teachers:
        # Each learns what the student of labelled data learns, from another initialisation.
        given = [_small_teacher(lab, seed, number) for number in range(teachers)]
    elif recipe != "labels" or data == "argmax":
        given = digits_teacher(lab, "wide" if teacher == "shuffled" else teacher, seed)
    first = 0 if data in ("labelled", "unlabelled") else TRAIN_ROWS // 2
    x, y = rows(split.train[first : first + amount])
    if data == "argmax":
        with torch.no_grad():
            y = given(x).argmax(-1)
    labels = None if data.endswith("unlabelled") else y
    known = {"teacher_accuracy": accuracy(given, split.held)} if isinstance(given, nn.Module) else {}
    if teacher == "shuffled":
        given = shuffled(given, seed)
    student = seeded(seed, lambda: mlp(64, *net, 10))
    made = recipe_of(recipe, student, given, steps, optimizer=adamw(lr, weight_decay), **options)
    if hints_from is not None:
        made.stages[0].teacher = digits_teacher(lab, hints_from, seed)
    ended = carried_out(made, batches(x, labels), steps)
    return {"accuracy": accuracy(student, split.held), **known, **ended}


def _small_teacher(lab: Lab, seed: int, number: int) -> nn.Module:
    x, y = rows(Digits.of(seed).train[:100])
    return lab.teacher(
        f"64 wide, {number}",
        seed,
        lambda: taught(lab, seeded(1000 * (number + 1) + seed, lambda: mlp(64, 64, 64, 10)), x, y, 200),
    )


def mythical(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, **options: Any
) -> Metrics:
    """A student that sees all training rows but the threes, as it is and with a bias of class 3."""
    split = Digits.of(seed)
    x, y = rows(split.train)
    x, y = x[y != 3], y[y != 3]
    teacher, student = digits_teacher(lab, "wide", seed), seeded(seed, lambda: mlp(64, 30, 30, 10))
    made = recipe_of(recipe, student, teacher, steps, optimizer=adamw(lr, weight_decay), **options)
    ended = carried_out(made, batches(x, y), steps)
    with torch.no_grad():
        z, truth = student(rows(split.held)[0]), rows(split.held)[1]
        bias = best_bias(student(rows(split.validation)[0]), rows(split.validation)[1], 3)
    found = {"bias": bias}
    for prefix, add in (("", 0.0), ("biased_", bias)):
        right = (z + add * nn.functional.one_hot(torch.tensor(3), 10)).argmax(-1) == truth
        found[f"{prefix}accuracy"] = 100.0 * float(right.float().mean())
        found[f"{prefix}recall_3"] = 100.0 * float(right[truth == 3].float().mean())
    return {**found, "teacher_accuracy": accuracy(teacher, split.held), **ended}


def best_bias(z: Tensor, labels: Tensor, which: int) -> float:
    """What to add to a class's logits for the most right answers, the middle of what is best."""
    others = z.scatter(1, torch.full_like(labels, which)[:, None], -torch.inf).max(1).values
    # Between two neighbours of these, every bias gives the same answers.
    edges = (others - z[:, which]).sort().values
    tries = torch.cat([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
    biased = z.repeat(len(tries), 1, 1)  # [tries, N, C]
    biased[:, :, which] += tries[:, None]
    right = (biased.argmax(-1) == labels).float().mean(1)
    best = tries[right == right.max()]
    return float(best[len(best) // 2])


class Recorder(torch.optim.Optimizer):
    """An optimizer that keeps gradients and changes nothing."""

    def __init__(self, parameters: Any, kept: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.kept = kept

    def step(self, closure: Any = None) -> None:
        """Keeps them, flat."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.kept.append(torch.cat([p.grad.flatten() for p in parameters]).double())


def gradients(lab: Lab, seed: int, steps: int, recipe: str, **options: Any) -> Metrics:
    """Gradients of squared error at one student on many batches, beside those of the same without noise.

    `variance` is the trace of their covariance, relative to the squared norm of the clean mean; `bias` the
    squared norm of the mean of what noise adds, in units of what is expected if it adds 0 on average.
    """
    split = Digits.of(seed)
    x, _ = rows(split.train[:50])
    teacher, student = digits_teacher(lab, "wide", seed), seeded(seed, lambda: mlp(64, 30, 30, 10))
    carried_out(recipe_of("clean", student, teacher, 100, optimizer=adamw(3e-3)), batches(x), 100)
    order = torch.rand(steps, len(x), generator=_generator(3, seed)).argsort(1)[:, :10]
    found = {}
    for name, more in {"clean": {}, recipe: options}.items():
        torch.manual_seed(seed)
        kept: list[Tensor] = []
        recorder = partial(Recorder, kept=kept)
        at = copy.deepcopy(student)
        carried_out(recipe_of(name, at, teacher, steps, optimizer=recorder, **more), list(x[order]), steps)
        found[name] = torch.stack(kept)
    clean, noisy = found["clean"], found[recipe]
    added = noisy - clean
    expected = float(added.var(0).sum()) / len(added)
    return {
        "variance": float(noisy.var(0).sum() / clean.mean(0).square().sum()),
        "bias": float(added.mean(0).square().sum()) / expected if expected else 0.0,
    }


def convolve(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01,
    teacher: str = "trained", **options: Any,
) -> Metrics:  # fmt: skip
    """A student of 50 labelled digits with convolutions, 8 channels to the teacher's 32."""
    split = Digits.of(seed)

    def make() -> nn.Module:
        net = seeded(seed + 1000, lambda: convolutions(32))
        return taught(lab, net, *rows(split.train)) if teacher == "trained" else net.eval()

    given = lab.teacher(f"convolutions, {teacher}", seed, make)
    student = seeded(seed, lambda: convolutions(8))
    if recipe == "attention_transfer":
        options["layers"] = (("2", "2"), ("6", "6"))
    made = recipe_of(recipe, student, given, steps, optimizer=adamw(lr, weight_decay), **options)
    ended = carried_out(made, batches(*rows(split.train[:50])), steps)
    known = {"teacher_accuracy": accuracy(given, split.held)} if teacher == "trained" else {}
    return {"accuracy": accuracy(student, split.held), **known, **ended}


def laid_over(index: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of one to three digits of a split laid over each other, the darkest pixel of each, and which are
    there, floats `[count, 10]`."""
    x, y = rows(index)
    which = torch.randint(len(x), (count, 3), generator=generator)
    there = torch.arange(3) < torch.randint(1, 4, (count, 1), generator=generator)
    images = (x[which] * there[..., None]).max(1).values
    labels = (nn.functional.one_hot(y[which], 10) * there[..., None]).max(1).values
    return images, labels.float()


def multilabel(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01,
    soft_weight: float = 0.0,
) -> Metrics:  # fmt: skip
    """A student of 200 images of several digits, from labels, a sigmoid or a softmax over labels."""
    split = Digits.of(seed)
    x, y = laid_over(split.train, 4000, _generator(4, seed))
    teacher = lab.teacher(
        "several digits",
        seed,
        lambda: taught(lab, seeded(seed + 1000, lambda: mlp(64, 256, 256, 10)), x, y, 800),
    )
    student, optimizer = seeded(seed, lambda: mlp(64, 30, 30, 10)), adamw(lr, weight_decay)
    if recipe == "softmax":
        objective = Objective(soft=SoftTargets(temperature=2.0, weight=soft_weight), hard=MultiLabel())
        made = Plan(student, teacher, [Stage("distil", [Update(objective, optimizer)])])
    else:
        made = recipes.multilabel(student, teacher, soft_weight=soft_weight, optimizer=optimizer)
    ended = carried_out(made, batches(x[:200], y[:200]), steps)
    x, y = laid_over(split.held, 1000, _generator(5))
    found = {}
    for prefix, net in (("", student), ("teacher_", teacher)):
        with torch.no_grad():
            z = net(x)
        found[f"{prefix}micro_f1"] = 100.0 * float(f1_score(y.numpy(), (z > 0).numpy(), average="micro"))
        found[f"{prefix}map"] = 100.0 * float(average_precision_score(y.numpy(), z.numpy(), average="macro"))
    return {**found, **ended}
