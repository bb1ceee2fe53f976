"""Terms of derivatives: explicit Jacobians and Hessians, projections on average, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
import torch.nn.functional as F
from test_train import Stop, parameters, same, sgd
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from kdkernels.train import Distiller, Objective, Sobolev, Step, recipes

WIDTH, CLASSES, ROWS = 3, 4, 5


def smooth(hidden: int, activation: Any = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), activation(), nn.Linear(hidden, CLASSES)).double()


def pair(seed: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(seed)
    return smooth(6), smooth(9, nn.Softplus)


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return {"inputs": x, "labels": torch.randint(CLASSES, (rows,), generator=generator)}


def differentiated(model: nn.Module, weights: Any, of: str) -> Any:
    """Outputs `[C]` as a function of one sample, and of its label."""

    def outputs(x: Tensor, y: Tensor) -> Tensor:
        z = functional_call(model, weights, (x,))
        if of == "output":
            return z
        logs = z.log_softmax(-1)
        return logs if of == "log_probs" else -logs.gather(0, y[None])

    return outputs


def written_out(
    student: nn.Module, weights: Any, teacher: nn.Module, data: Any, order: int, of: str
) -> Tensor:
    """Of explicit derivatives, `[N]`."""
    functions = (
        differentiated(student, weights, of),
        differentiated(teacher, dict(teacher.named_parameters()), of),
    )
    total = torch.zeros(len(data["inputs"]), dtype=torch.float64)
    for derivative in (jacrev, hessian)[:order]:
        ours, theirs = (vmap(derivative(f))(data["inputs"], data["labels"]) for f in functions)
        total = total + (ours - theirs).pow(2).flatten(1).sum(1)
    return total


def value(student: Any, teacher: Any, term: Sobolev, data: Any) -> float:
    return Distiller(student, teacher, Objective(it=term)).evaluate([data])["it"]


@pytest.mark.parametrize("of", ["output", "log_probs", "loss"])
@pytest.mark.parametrize("order", [1, 2])
def test_exact_derivatives_are_those_written_out(order: Any, of: Any) -> None:
    """Its value where nothing is trained, and the step that it makes in the student, the teacher fixed."""
    student, teacher = pair()
    data = batch()
    weights = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters()}
    truth = written_out(student, weights, teacher, data, order, of).mean()
    assert value(student, teacher, Sobolev(order, of=of), data) == pytest.approx(truth.item(), rel=1e-9)
    slopes = torch.autograd.grad(truth, [*weights.values()], allow_unused=True)
    before = parameters(teacher)
    Distiller(student, teacher, Objective(it=Sobolev(order, of=of)), sgd).fit([data], steps=1, progress=False)
    for p, start, g in zip(student.parameters(), weights.values(), slopes, strict=True):
        torch.testing.assert_close(p.detach(), start.detach() - (0.0 if g is None else 0.5 * g))
    assert same(parameters(teacher), before)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_is_that_of_finite_differences(order: Any) -> None:
    """Along a direction in the student's weights."""
    student, teacher = pair()
    data, term = batch(), Sobolev(order)
    torch.manual_seed(2)
    direction = [torch.randn_like(p) for p in student.parameters()]
    before = parameters(student)
    Distiller(student, teacher, Objective(it=term), sgd).fit([data], steps=1, progress=False)
    moved = zip(before, parameters(student), direction, strict=True)
    along = sum(float((2 * (old - new) * d).sum()) for old, new, d in moved)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, old, d in zip(student.parameters(), before, direction, strict=True):
                p.copy_(old + sign * 1e-5 * d)
        ends.append(value(student, teacher, term, data))
    assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_projections_are_right_on_average(order: Any) -> None:
    """A row many times over is a draw many times over; within 5 standard errors of the exact value."""
    student, teacher = pair()
    one = batch(1)
    many = {name: x.expand(20_000, *x.shape[1:]) for name, x in one.items()}
    rows: list[Tensor] = []

    class Rows(Sobolev):
        def _distance(self, *args: Any) -> Tensor:
            rows.append(super()._distance(*args).detach())
            return rows[-1]

    torch.manual_seed(3)
    value(student, teacher, Rows(order, 1), many)
    (drawn,) = rows
    exact = value(student, teacher, Sobolev(order), one)
    assert drawn.std() > 0.1 * exact  # else it says nothing
    assert abs(float(drawn.mean()) - exact) < 5 * float(drawn.std()) / len(drawn) ** 0.5


def test_second_derivatives_alone_are_right_on_average() -> None:
    """The first ones, which are larger, taken off draw by draw, as they are of the same directions."""
    student, teacher = pair()
    one = batch(1)
    many = {name: x.expand(20_000, *x.shape[1:]) for name, x in one.items()}
    found: list[list[Tensor]] = [[], []]
    for order in (1, 2):

        class Rows(Sobolev):
            def _distance(self, *args: Any) -> Tensor:
                torch.manual_seed(4)
                found[self.order - 1].append(super()._distance(*args).detach())
                return found[self.order - 1][-1]

        value(student, teacher, Rows(order, 1), many)  # type: ignore[arg-type]
    second = found[1][0] - found[0][0]
    exact = value(student, teacher, Sobolev(2), one) - value(student, teacher, Sobolev(1), one)
    assert abs(float(second.mean()) - exact) < 5 * float(second.std()) / len(second) ** 0.5


def test_more_projections_vary_less() -> None:
    student, teacher = pair()
    data = batch(1)
    spread = {}
    for draws in (1, 16):
        term, found = Sobolev(2, draws), []
        for seed in range(60):
            torch.manual_seed(seed)
            found.append(value(student, teacher, term, data))
        spread[draws] = float(torch.tensor(found).std())
    assert 2.0 < spread[1] / spread[16] < 8.0  # 4 on average


def test_projections_of_one_output_are_exact() -> None:
    """Of the loss, a scalar, v is ±1."""
    student, teacher = pair()
    values = [value(student, teacher, Sobolev(1, n, "loss"), batch()) for n in (None, 1, 3)]
    assert values[1:] == pytest.approx([values[0]] * 2)


def test_rows_that_dont_count_and_labels_that_arent_there() -> None:
    student, teacher = pair()
    data = batch()
    weights = dict(student.named_parameters())
    mask = torch.tensor([True, False, True, True, False])
    rows = written_out(student, weights, teacher, data, 2, "output").detach()
    found = value(student, teacher, Sobolev(2), {**data, "mask": mask})
    assert found == pytest.approx(float(rows[mask].mean()))
    rows = written_out(student, weights, teacher, data, 1, "loss").detach()
    labels = data["labels"].masked_fill(~mask, -100)
    found = value(student, teacher, Sobolev(of="loss"), {**data, "labels": labels})
    assert found == pytest.approx(float(rows[mask].sum()) / ROWS)
    with pytest.raises(ValueError, match=r"mask of samples, \[5\], got \[5, 1\]"):
        value(student, teacher, Sobolev(), {**data, "mask": mask[:, None]})


def test_images_and_maps_of_outputs() -> None:
    """Inputs and outputs of any shape: derivatives of all elements by all."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(1, c, 2), nn.Tanh(), nn.Conv2d(c, 2, 1)).double() for c in (3, 4)
    )
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    ours, theirs = (vmap(jacrev(model))(x) for model in (student, teacher))
    assert ours.shape == (2, 2, 2, 2, 1, 3, 3)
    truth = (ours - theirs).pow(2).flatten(1).sum(1).mean()
    assert value(student, teacher, Sobolev(), x) == pytest.approx(truth.item())


def test_a_function_teaches_and_other_entries_are_inputs() -> None:
    """f(x) = (x₀², 3x₁): J = diag(2x₀, 3), H₀₀₀ = 2, of a student whose derivatives are 0 at x₁ = 0."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, states: Tensor) -> Tensor:
            return self.scale * states[:, 1:].pow(3)

    def teacher(data: Any) -> Tensor:
        x = data["states"]
        return torch.stack([x[:, 0] ** 2, 3 * x[:, 1]], 1)

    data = {"states": torch.tensor([[1.0, 0.0], [-2.0, 0.0]])}
    assert value(Student(), teacher, Sobolev(1, inputs="states"), data) == pytest.approx((4 + 16) / 2 + 9)
    assert value(Student(), teacher, Sobolev(2, inputs="states"), data) == pytest.approx((4 + 16) / 2 + 9 + 4)


def test_a_linear_teacher_has_no_second_derivatives() -> None:
    student, _ = pair()
    teacher, data = nn.Linear(WIDTH, CLASSES).double(), batch()
    truth = written_out(student, dict(student.named_parameters()), teacher, data, 2, "output").mean()
    assert value(student, teacher, Sobolev(2), data) == pytest.approx(truth.item())
    torch.manual_seed(0)
    assert value(student, teacher, Sobolev(2, 2), data) > 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_teacher_that_is_trained_too_learns_nothing_from_it(order: Any) -> None:
    a, b = pair()
    before = parameters(a), parameters(b)
    goals = Objective(it=Sobolev(order, student="a", teacher="b"))
    Distiller({"a": a, "b": b}, None, goals, sgd).fit([batch()], steps=1, progress=False)
    assert not same(parameters(a), before[0]) and same(parameters(b), before[1])


# Recipes and fits


@pytest.mark.parametrize("of", ["output", "log_probs", "loss"])
def test_the_recipe_has_values_and_derivatives(of: Any) -> None:
    student, teacher = pair()
    data = batch()
    plan = recipes.sobolev(student, teacher, of=of, value_weight=0.5, derivative_weight=2.0)
    row = plan.distiller(plan.stages[0]).evaluate([data])
    with torch.no_grad():
        z, v = student(data["inputs"]), teacher(data["inputs"])
    truth = {
        "output": (z - v).pow(2).sum(1).mean() / 2,
        "log_probs": F.kl_div(z.log_softmax(1), v.softmax(1), reduction="batchmean"),
        "loss": F.cross_entropy(z, data["labels"]),
    }[of]
    assert row["value"] == pytest.approx(float(truth))
    assert row["derivatives"] == pytest.approx(value(student, teacher, Sobolev(of=of), data))
    assert row["loss"] == pytest.approx(0.5 * row["value"] + 2.0 * row["derivatives"])
    alone = recipes.sobolev(student, teacher, of=of, derivative_weight=0.0)
    assert {*alone.objective.terms} == {"value"}


def test_derivatives_of_a_function_are_learnt() -> None:
    """Of a sine through six points: less than half of the squared error of values alone."""

    def teacher(data: Any) -> Tensor:
        return torch.sin(4 * data["inputs"])

    x = torch.linspace(-2, 2, 6)[:, None]
    held, off = torch.linspace(-2, 2, 101)[:, None], {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
        plan = recipes.sobolev(
            student, teacher, derivative_weight=weight, optimizer=lambda p: torch.optim.Adam(p, lr=0.02)
        )
        plan.run([x], steps=300, progress=False, log_every=300)
        with torch.no_grad():
            off[weight] = float((student(held) - torch.sin(4 * held)).pow(2).mean())
    assert off[1.0] < 0.5 * off[0.0]


def test_killed_and_resumed_the_draws_are_the_same(tmp_path: Path) -> None:
    def fit(folder: Path, callbacks: Any = (), resume: bool = False) -> list[Tensor]:
        student, teacher = pair()
        distiller = Distiller(
            student, teacher, Objective(it=Sobolev(2, 1)), sgd, folder=folder, callbacks=callbacks
        )
        distiller.updates[0].optimizer = lambda p: torch.optim.SGD(p, lr=1e-2)
        if resume:
            assert distiller.resume()
        else:
            torch.manual_seed(6)
        distiller.fit([batch()], steps=4, save_every=1, progress=False)
        return parameters(student)

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", [Stop(3)])
    assert same(fit(tmp_path / "killed", resume=True), whole)


# What is refused


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU, "ReluBackward0"), (nn.LeakyReLU, "LeakyReluBackward0"), (nn.ReLU6, "HardtanhBackward0"),
     (nn.Hardtanh, "HardtanhBackward0"), (nn.PReLU, "PreluKernelBackward0"), (nn.RReLU, "Rrelu"),
     (lambda: nn.Threshold(0.1, 0.0), "ThresholdBackward0"), (nn.Hardsigmoid, "HardsigmoidBackward0"),
     (nn.Softshrink, "SoftshrinkBackward0"), (nn.Hardshrink, "HardshrinkBackward0")],
)  # fmt: skip
def test_order_2_refuses_a_piecewise_linear_student(activation: Any, name: str) -> None:
    student, teacher = smooth(6, activation), pair()[1]
    student.train()
    distiller = Distiller(student, teacher, Objective(it=Sobolev(2)))
    with pytest.raises(ValueError, match=rf"second derivatives \(.*{name}.*\).*Tanh, Softplus, GELU or SiLU"):
        distiller.fit([batch()], steps=1, progress=False)
    assert value(student, teacher, Sobolev(1), batch()) > 0


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Sigmoid])
def test_order_2_takes_smooth_activations(activation: Any) -> None:
    student, teacher = smooth(6, activation), smooth(6, nn.ReLU)  # the teacher may have what it has
    assert value(student, teacher, Sobolev(2), batch()) > value(student, teacher, Sobolev(1), batch())


def test_what_is_beside_the_inputs_may_be_piecewise_linear() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(WIDTH, CLASSES, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.a.relu()).tanh()

    assert value(Student(), pair()[1], Sobolev(2), batch()) > 0


def test_order_2_refuses_a_linear_student() -> None:
    with pytest.raises(ValueError, match="student is linear in 'inputs'"):
        value(nn.Linear(WIDTH, CLASSES).double(), pair()[1], Sobolev(2), batch())


class Deaf(nn.Module):
    """Gives the same whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(CLASSES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), -1)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"teacher": lambda b: b["inputs"].detach() @ torch.ones(WIDTH, CLASSES).double()}, ValueError,
         "outputs of teacher don't depend on 'inputs'"),
        ({"student": Deaf()}, ValueError, "outputs of student don't depend on 'inputs'"),
        ({"data": {"inputs": torch.ones(2, WIDTH, dtype=torch.long)}}, TypeError,
         "by floats, and 'inputs' is torch.int64"),
        ({"term": Sobolev(inputs="states")}, ValueError, "of the batch, got 'states'; it has 'inputs'"),
        ({"teacher": lambda b: b["inputs"] * 2}, ValueError, "student has 4 outputs and teacher 3"),
        ({"teacher": lambda b: b["inputs"][:1]}, ValueError, r"outputs \[5, \.\.\.\].*got \[1, 3\]"),
        ({"teacher": pair()}, TypeError, "those of teacher are Mixture"),
        ({"term": Sobolev(of="log_probs"), "teacher": lambda b: b["inputs"][:, :, None]}, ValueError,
         r"takes logits \[N, C\], got \[5, 3, 1\] of teacher"),
        ({"term": Sobolev(of="loss"), "data": {"inputs": batch()["inputs"]}}, ValueError, "needs labels"),
    ],
)  # fmt: skip
def test_what_has_no_derivatives(change: Any, error: type[Exception], said: str) -> None:
    student, teacher = pair()
    given = {"student": student, "teacher": teacher, "term": Sobolev(), "data": batch()}
    given |= change
    distiller = Distiller(given["student"], given["teacher"], Objective(it=given["term"]))
    with pytest.raises(error, match=said):
        distiller.evaluate([given["data"]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"order": True}, "order must be 1 or 2, got True"),
        ({"projections": 0}, "draws >= 1, or None for exact derivatives, got 0"),
        ({"projections": 1.5}, "got 1.5"),
        ({"of": "logits"}, "of must be 'output', 'log_probs' or 'loss', got 'logits'"),
    ],
)
def test_bad_options(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sobolev(**options)


def test_no_batch_is_changed() -> None:
    """The inputs that are differentiated by are the term's own."""
    student, teacher = pair()
    data = batch()
    kept = {name: x.clone() for name, x in data.items()}
    seen: list[Step] = []

    def look(step: Step) -> Tensor:
        seen.append(step)
        return step.student["logits"].mean()

    Distiller(student, teacher, Objective(it=Sobolev(), look=look), sgd).fit([data], steps=1, progress=False)
    assert not seen[0].batch["inputs"].requires_grad
    assert all(torch.equal(data[name], x) for name, x in kept.items())
