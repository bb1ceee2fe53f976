"""Terms with an adversary: attacks by hand, who is attacked, towards what, and a discriminator's updates."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import torch.nn.functional as F
from test_train import CLASSES, FEATURES, Stop, net, pair, parameters, same, samples, sgd
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.train import (
    BoundarySamples,
    Deception,
    Discrimination,
    Distiller,
    Objective,
    Step,
    Update,
    recipes,
)
from kdkernels.train.objective import Progress


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    """Logits Wx + b."""
    layer = nn.Linear(len(weight[0]), len(bias))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


class Seen:
    """Keeps what a model is given last."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        model.register_forward_hook(lambda _, given, __: self.inputs.append(given[0].detach().clone()))


def attacked(
    term: BoundarySamples, teacher: nn.Module, student: nn.Module, data: Any
) -> tuple[float, Tensor]:
    """The term's value, and the samples that the student saw moved."""
    seen = Seen(student)
    found = Distiller(student, teacher, Objective(it=term)).evaluate([data])["it"]
    return found, seen.inputs[-1]


# Two classes, f₀ − f₁ = 3x₀ + 4x₁ + 1: the gradient of f₁ − f₀ is −(3, 4), of length 5.
TEACHER = ([[3.0, 4.0], [0.0, 0.0]], [1.0, 0.0])
STUDENT = ([[1.0, 0.0], [0.0, 1.0]], [2.0, 0.0])


@pytest.mark.parametrize("step_size", [0.05, 0.1])
def test_a_step_of_the_attack_by_hand(step_size: float) -> None:
    """At (1, 1), f₀ − f₁ = 8: one step is η · (8 + 0.1) along −(3, 4)/5."""
    teacher, student = linear(*TEACHER), linear(*STUDENT)
    term = BoundarySamples(steps=1, step_size=step_size, margin=0.1)
    data = torch.tensor([[1.0, 1.0]]), torch.tensor([0])
    value, moved = attacked(term, teacher, student, data)
    far = step_size * 8.1
    torch.testing.assert_close(moved, torch.tensor([[1 - 0.6 * far, 1 - 0.8 * far]]))
    with torch.no_grad():
        lq, lp = ((model(moved) / 3).log_softmax(1) for model in (student, teacher))
    assert value == pytest.approx(float((lp.exp() * (lp - lq)).sum()), rel=1e-5)
    squared, _ = attacked(
        BoundarySamples(steps=1, step_size=step_size, margin=0.1, t_squared=True), teacher, student, data
    )
    assert squared == pytest.approx(9 * value, rel=1e-5)


def test_a_sample_stops_when_it_has_left_its_class() -> None:
    """With f₀ − f₁ = g and η = 0.3, g ← g − 1.5 · (g + 0.1): one step leaves, each sample its own last."""
    teacher, student = linear(*TEACHER), linear(*STUDENT)
    data = torch.tensor([[1.0, 1.0], [-0.1, 0.0], [0.5, 0.5]]), torch.tensor([0, 0, 0])
    for steps in (1, 2, 10):
        _, moved = attacked(BoundarySamples(steps=steps, margin=0.1), teacher, student, data)
        gaps = torch.tensor([8.0, 0.7, 4.5])
        torch.testing.assert_close(moved @ torch.tensor([3.0, 4.0]) + 1, gaps - 1.5 * (gaps + 0.1))
    # Half as far, g ← g/4 − 0.075, it takes 8.0, 1.925, 0.406, 0.027, −0.068: four steps; two from 0.7.
    for steps, left in ((1, [1.925, 0.1, 1.05]), (2, [0.40625, -0.05, 0.1875]), (9, [None, -0.05, None])):
        _, moved = attacked(BoundarySamples(steps=steps, step_size=0.15, margin=0.1), teacher, student, data)
        found = (moved @ torch.tensor([3.0, 4.0]) + 1).tolist()
        for gap, truth in zip(found, left, strict=True):
            assert gap < 0 if truth is None else gap == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize(
    ("clamp", "low", "high"), [(0.25, -0.25, 0.25), ((0.0, 1.0), 0.0, 1.0), (None, -math.inf, math.inf)]
)
def test_what_is_moved_is_clamped(clamp: Any, low: float, high: float) -> None:
    teacher, student = linear(*TEACHER), linear(*STUDENT)
    data = torch.tensor([[1.0, 0.1]]), torch.tensor([0])
    _, moved = attacked(BoundarySamples(steps=1, clamp=clamp), teacher, student, data)
    free = torch.tensor([[1 - 0.6 * 0.3 * 4.4001, 0.1 - 0.8 * 0.3 * 4.4001]])
    torch.testing.assert_close(moved, free.clamp(low, high))


def test_many_samples_are_attacked_as_each_alone() -> None:
    """Of a net, several steps, their targets given."""
    torch.manual_seed(0)
    teacher, x = net(12), samples(30).tensors[0]
    base = teacher(x).argmax(1)
    target = (base + torch.randint(1, CLASSES, (30,))) % CLASSES
    term = BoundarySamples(steps=4, step_size=0.2)

    class Alone:
        """What the term asks of a step."""

        def run(self, model: str, **entries: Any) -> Any:
            return {"logits": teacher(entries["inputs"])}

    step: Any = Alone()
    moved = term.moved(step, {}, x, base, target)
    for n in range(30):
        at = x[n]
        for _ in range(4):
            at = at.detach().requires_grad_()
            f = teacher(at)
            if f.argmax() != base[n]:
                break
            gap = f[target[n]] - f[base[n]]
            (g,) = torch.autograd.grad(gap, at)
            at = (at + 0.2 * (1e-4 - gap.detach()) * g / g.norm()).clamp(-2.5, 2.5)
        torch.testing.assert_close(moved[n], at.detach())
    assert 0 < int((teacher(moved).argmax(1) != base).sum())


def test_bases_are_what_both_know_and_the_teacher_knows_best() -> None:
    """Of rows right, wrong for one, unlabelled and not counting; then the two of the largest difference."""
    v = torch.tensor([[4.0, 1.0, 0.0]] * 7)
    z = torch.tensor(
        [[4.0, 1.0, 0.0], [4.0, 0.0, 1.0], [0.0, 4.0, 0.0], [4.0, 0.0, 3.0], [4.0, 0.0, 3.9],
         [4.0, 0.0, 3.9], [4.0, 0.0, 3.9]]
    )  # fmt: skip
    v[4] = torch.tensor([0.0, 4.0, 1.0])
    labels = torch.tensor([0, 0, 0, 0, 0, -100, 0])
    mask = torch.tensor([True] * 6 + [False])
    assert BoundarySamples().bases(z, v, labels, mask).tolist() == [0, 1, 3]
    assert BoundarySamples().bases(z, v, labels, None).tolist() == [0, 1, 3, 6]
    assert sorted(BoundarySamples(at_most=2).bases(z, v, labels, mask).tolist()) == [1, 3]
    assert sorted(BoundarySamples(at_most=2).bases(z, v, labels, None).tolist()) == [3, 6]
    # A difference at the label itself counts for nothing: here it is 0.6, the others' 0.001 and more.
    p = torch.tensor([[0.98, 0.01, 0.01], [0.6, 0.4 - 1e-3, 1e-3]]).log()
    q = torch.tensor([[0.38, 0.31, 0.31], [0.6, 1e-3, 0.4 - 1e-3]]).log()
    zeros = torch.zeros(2, dtype=torch.long)
    assert BoundarySamples(at_most=1).bases(q, p, zeros, None).tolist() == [1]


def test_targets_are_drawn_with_their_probability() -> None:
    """p = (0.7, 0.2, 0.1) at the base 0: 2/3 and 1/3; also where what is beside it underflows."""
    torch.manual_seed(0)
    rows = 30_000
    v = torch.tensor([[0.7, 0.2, 0.1]]).log().expand(rows, -1)
    v = v + torch.tensor([200.0, 0.0, 0.0]) * (torch.arange(rows) % 2)[:, None]
    found = BoundarySamples.targets(v, torch.zeros(rows, dtype=torch.long))
    for part in (found[::2], found[1::2]):
        shares = part.bincount(minlength=3) / len(part)
        assert shares[0] == 0
        assert abs(float(shares[1]) - 2 / 3) < 5 * (2 / 9 / len(part)) ** 0.5


def test_the_control_goes_as_far_elsewhere() -> None:
    torch.manual_seed(0)
    teacher, x = net(12), samples(30).tensors[0]
    student, labels = net(12), teacher(x).argmax(1)
    student.load_state_dict(teacher.state_dict())
    found = {}
    for kind in ("attack", "random"):
        torch.manual_seed(1)
        found[kind] = attacked(BoundarySamples(perturbation=kind), teacher, student, (x, labels))[1] - x  # type: ignore[arg-type]
    lengths = {kind: moved.norm(dim=1) for kind, moved in found.items()}
    assert (lengths["attack"] > 0).all()
    torch.testing.assert_close(lengths["random"], lengths["attack"], rtol=1e-4, atol=1e-6)
    along = F.cosine_similarity(found["attack"], found["random"])
    assert abs(float(along.mean())) < 5 / (30 * FEATURES) ** 0.5 and float(along.std()) > 0.2


def test_only_the_student_learns_from_it() -> None:
    student, teacher = pair()
    x = samples().tensors[0]
    student[3].load_state_dict(
        {k: v[:, :8] if v.dim() == 2 else v for k, v in teacher[3].state_dict().items()}
    )
    with torch.no_grad():
        labels = teacher(x).argmax(1)
    before = parameters(student), parameters(teacher)
    Distiller(student, teacher, Objective(it=BoundarySamples()), sgd).fit(
        [(x, labels)], steps=1, progress=False
    )
    assert not same(parameters(student), before[0]) and same(parameters(teacher), before[1])
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_without_a_base_nothing_is_added() -> None:
    """And a step is made all the same, of whatever else there is."""
    student, teacher = pair()
    x = samples(9).tensors[0]
    labels = torch.full((9,), -100)
    before = parameters(student)
    history = Distiller(student, teacher, Objective(it=BoundarySamples()), sgd).fit(
        [(x, labels)], steps=1, progress=False, log_every=1
    )
    assert history[0]["it"] == 0.0 and same(parameters(student), before)


def test_what_else_a_model_takes_is_of_the_same_samples() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixels: Tensor, scale: Tensor) -> Tensor:
            assert len(pixels) == len(scale)
            return self.inner(pixels * scale[:, None])

    plain, teacher = linear(*STUDENT), linear(*TEACHER)
    x, labels = (
        torch.tensor([[1.0, 1.0], [-3.0, 0.0], [2.0, 0.0]]),
        torch.tensor([0, 0, 0]),
    )  # the 2nd is wrong
    data = {"pixels": x, "scale": torch.tensor([1.0, 1.0, 0.5]), "labels": labels}
    term = BoundarySamples(steps=1, inputs="pixels", clamp=None)
    value = Distiller(Scaled(plain), Scaled(teacher), Objective(it=term)).evaluate([data])["it"]
    each = [
        Distiller(Scaled(plain), Scaled(teacher), Objective(it=term)).evaluate(
            [{k: e[n : n + 1] for k, e in data.items()}]
        )["it"]
        for n in range(3)
    ]
    assert each[1] == 0.0 and value == pytest.approx((each[0] + each[2]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"at_most": 1.5}, "at_most must be an integer >= 1, got 1.5"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"step_size": math.nan}, "step_size must be > 0, got nan"),
        ({"margin": -1.0}, "margin must be >= 0"),
        ({"clamp": -1.0}, r"clamp must be a number > 0, \(low, high\) with low < high, or None, got -1.0"),
        ({"clamp": (1.0, 0.0)}, "low < high"),
        ({"perturbation": "none"}, "'attack' or 'random', got 'none'"),
    ],
)
def test_bad_options(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BoundarySamples(**options)


X = torch.tensor([[1.0, 1.0]])


@pytest.mark.parametrize(
    ("teacher", "data", "error", "said"),
    [
        (linear(*TEACHER), X, ValueError, "needs labels"),
        (linear(*TEACHER), (X.long(), torch.tensor([0])), TypeError, "'inputs' is torch.int64"),
        (lambda b: torch.tensor([[1.0, 0.0]]), (X, torch.tensor([0])), ValueError, "can't be attacked"),
        (lambda b: kd.Head(b["inputs"], torch.ones(2, 2)), (X, torch.tensor([0])), ValueError,
         "a tensor, and those of teacher are Head"),
        (lambda b: b["inputs"][:, :1], (X, torch.tensor([0])), ValueError, r"C >= 2\], got \[1, 1\]"),
    ],
)  # fmt: skip
def test_what_can_not_be_attacked(teacher: Any, data: Any, error: type[Exception], said: str) -> None:
    student = linear(*STUDENT)
    with pytest.raises(error, match=said):
        Distiller(student, teacher, Objective(it=BoundarySamples())).evaluate([data])


def test_the_recipe_of_boundary_samples() -> None:
    """CE + a · KL + b · KL of what is moved, none with T²; the weights over a fit."""
    student, teacher = pair()
    x, y = samples(20).tensors
    plan = recipes.boundary_samples(student, teacher)
    terms = plan.objective.terms
    at = [Progress(fraction=e) for e in (0.0, 0.375, 0.75, 1.0)]
    assert [terms["soft"].weight_at(p) for p in at] == pytest.approx([4.0, 2.875, 1.75, 1.0])
    assert [terms["boundary"].weight_at(p) for p in at] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    row = plan.distiller(plan.stages[0]).evaluate([(x, y)])
    with torch.no_grad():
        lq, lp = ((model(x) / 3).log_softmax(1) for model in (student, teacher))
    assert row["soft"] == pytest.approx(float((lp.exp() * (lp - lq)).sum(1).mean()), rel=1e-4)
    assert row["loss"] == pytest.approx(row["hard"] + 4 * row["soft"] + 2 * row["boundary"], rel=1e-5)
    alone = recipes.boundary_samples(student, teacher, boundary_weight=0.0)
    assert {*alone.objective.terms} == {"hard", "soft"}
    assert recipes.boundary_samples(student, teacher, clamp=(0.0, 1.0), perturbation="random", at_most=3)


# A discriminator


def judge(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(CLASSES, 7), nn.Tanh(), nn.Linear(7, 1))


def test_a_discriminators_terms_by_hand() -> None:
    """D(v) = σ(d(v)): −log D(v) − log(1 − D(z)), and −log D(z), of rows that count."""
    student, teacher = pair()
    models, x = {"student": student, "discriminator": judge()}, samples(9).tensors[0]
    mask = torch.arange(9) % 3 != 0
    row = Distiller(models, teacher, Objective(d=Discrimination(), s=Deception())).evaluate(
        [{"inputs": x, "mask": mask}]
    )
    with torch.no_grad():
        true, false = (models["discriminator"](m(x)).sigmoid()[mask].double() for m in (teacher, student))
    assert row["d"] == pytest.approx(float((-true.log() - (1 - false).log()).mean()), rel=1e-5)
    assert row["s"] == pytest.approx(float(-false.log().mean()), rel=1e-5)


def test_a_discriminator_that_is_sure_gives_finite_figures() -> None:
    """d = ∓1000: log of 0 written out; −log D(z) is 1000, and so is either part of the discriminator's."""
    z = torch.zeros(3, 1)
    for sign in (1.0, -1.0):
        models = {"student": linear([[0.0]], [sign]), "discriminator": linear([[1000.0]], [0.0])}
        row = Distiller(
            models, linear([[0.0]], [-sign]), Objective(d=Discrimination(), s=Deception())
        ).evaluate([z])
        assert row == pytest.approx(
            {"d": 2000.0, "s": 0.0, "loss": 2000.0} if sign > 0 else {"d": 0.0, "s": 1000.0, "loss": 1000.0}
        )


def test_each_update_moves_its_own_model() -> None:
    for term, trained, fixed in (
        (Discrimination(), "discriminator", "student"), (Deception(), "student", "discriminator")
    ):  # fmt: skip
        student, teacher = pair()
        models = {"student": student, "discriminator": judge()}
        before = {name: parameters(model) for name, model in (models | {"teacher": teacher}).items()}
        update = Update(Objective(it=term), sgd, trains=(trained,))
        Distiller(models, teacher, updates=[update]).fit([samples().tensors[0]], steps=1, progress=False)
        assert not same(parameters(models[trained]), before[trained])
        assert same(parameters(models[fixed]), before[fixed]) and same(parameters(teacher), before["teacher"])
        assert all(p.requires_grad for model in models.values() for p in model.parameters())


def test_the_recipe_of_a_discriminator_is_the_loop_written_by_hand() -> None:
    """The student first, then the discriminator, each by its own optimizer."""
    student, teacher = pair()
    told = judge()
    x, y = samples(12).tensors
    y = y.clamp(min=0)
    plan = recipes.discriminator(
        student, teacher, told, temperature=2.0, soft_weight=0.7, adversarial_weight=0.3, optimizer=sgd,
        discriminator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    history = plan.run([(x, y)], steps=3, progress=False, log_every=1)["distil"]
    assert {"hard", "soft", "adversarial", "loss", "discriminator/telling"} <= history[0].keys()
    ours, _ = pair()
    ruling = judge()
    with torch.no_grad():
        v = teacher(x)
    optimizers = sgd(ours.parameters()), torch.optim.SGD(ruling.parameters(), lr=0.1)
    for _ in range(3):
        z = ours(x)
        loss = kd.kd_loss(z, v, y, temperature=2.0, soft_weight=0.7, hard_weight=1.0)
        loss = loss - 0.3 * ruling(z).sigmoid().log().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        loss = -ruling(v).sigmoid().log() - (1 - ruling(ours(x).detach()).sigmoid()).log()
        loss.mean().backward()
        optimizers[1].step()
    found, truth = (parameters(a) + parameters(b) for a, b in ((student, told), (ours, ruling)))
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_shuffled_teacher_gives_the_rows_of_others() -> None:
    """The same rows, in an order that is another in every step and the same for both updates of one."""
    student, teacher = pair()
    x, y = samples(30).tensors
    plan = recipes.discriminator(student, teacher, judge(), shuffle_teacher=True, optimizer=sgd)
    seen: list[Tensor] = []

    def look(step: Step) -> Tensor:
        seen.append(step.teacher["logits"])
        return step.student["logits"].detach().mean()

    updates = [
        Update(Objective(**update.objective.terms, look=look), sgd, None, update.trains, update.name)
        for update in plan.stages[0].updates
    ]
    Distiller(plan.student, plan.teacher, updates=updates).fit([(x, y)], steps=2, progress=False)
    with torch.no_grad():
        v = teacher(x)
    assert len(seen) == 4 and torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    orders = [(rows[:, None] == v).all(-1).int().argmax(1) for rows in (seen[0], seen[2])]
    for rows, order in zip((seen[0], seen[2]), orders, strict=True):
        assert torch.equal(v[order], rows) and sorted(order.tolist()) == [*range(30)]
    assert len({tuple(range(30)), *(tuple(order.tolist()) for order in orders)}) == 3


def test_a_discriminator_of_other_shapes_is_refused() -> None:
    student, teacher = pair()
    plan = recipes.discriminator(student, teacher, nn.Linear(CLASSES, 2))
    with pytest.raises(ValueError, match=r"one logit for each row, \[20, 1\], got \[20, 2\]"):
        plan.run([samples(20).tensors], steps=1, progress=False)
    teacher_of_heads: Any = lambda batch: kd.Head(batch["inputs"], torch.ones(CLASSES, FEATURES))  # noqa: E731
    plan = recipes.discriminator(student, teacher_of_heads, judge(), shuffle_teacher=True)
    with pytest.raises(TypeError, match="shuffle_teacher takes a tensor of logits, got Head"):
        plan.run([samples(20).tensors], steps=1, progress=False)


def test_a_discriminator_is_trained_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run out of the wrapper that would average its gradients: an error, and not models that differ."""
    several = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2
    )
    monkeypatch.setattr("kdkernels.train.terms.adversarial.dist", several)
    student, teacher = pair()
    models = {"student": student, "discriminator": judge()}
    with pytest.raises(ValueError, match="in one process, not in 2"):
        Distiller(models, teacher, Objective(it=Discrimination())).evaluate([samples(4).tensors[0]])


# Resuming


@pytest.mark.parametrize("kind", ["boundary", "random", "discriminator", "shuffled"])
def test_killed_and_resumed_the_weights_are_the_same_to_the_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets and directions that are drawn, two models, two optimizers, an order of the teacher's rows."""
    monkeypatch.setattr("kdkernels.train.distiller.draw_curves", lambda *_: None)
    x = samples(40).tensors[0]

    def fit(folder: Path, callbacks: Any = (), anew: bool = True) -> list[Tensor]:
        student, teacher = pair(dropout=0.2)
        told = judge()
        with torch.no_grad():
            labels = teacher(x).argmax(1)
        options: Any = {"optimizer": lambda p: torch.optim.AdamW(p, 1e-2), "callbacks": callbacks}
        if kind in ("boundary", "random"):
            perturbation: Any = "attack" if kind == "boundary" else kind
            plan = recipes.boundary_samples(student, teacher, perturbation=perturbation, **options)
        else:
            plan = recipes.discriminator(
                student, teacher, told, shuffle_teacher=kind == "shuffled", **options
            )
        if anew:
            torch.manual_seed(6)
        plan.run([(x[:20], labels[:20]), (x[20:], labels[20:])], steps=6, save_every=1, folder=folder,
                 progress=False)  # fmt: skip
        return parameters(student) + parameters(told)

    whole = fit(tmp_path / "whole")
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / str(step), [Stop(step)])
        assert same(fit(tmp_path / str(step), anew=False), whole), f"killed at step {step}"
