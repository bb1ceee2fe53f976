"""Recipes: what each minimises, stages that go on where they were, and layers that a student begins as."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch
from test_train import FEATURES, net, parameters, samples, sgd
from test_train_terms import FAMILIES, Convs, bert, images, llama, text, two
from torch import nn

import kdkernels as kd
from kdkernels.train import Distiller, Plan, recipes
from kdkernels.train.objective import Progress
from kdkernels.train.recipes import copy_layers


def classifiers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return net(8), net(12)


def evaluated(plan: Plan, batch: Any, stage: int = -1) -> dict[str, float]:
    return plan.distiller(plan.stages[stage]).evaluate([batch])


def kl(z: Any, v: Any, temperature: float) -> float:
    lq, lp = (z / temperature).log_softmax(-1), (v / temperature).log_softmax(-1)
    return float(temperature**2 * (lp.exp() * (lp - lq)).sum(-1).mean())


def test_hinton() -> None:
    student, teacher = classifiers()
    x, y = samples(9).tensors
    plan = recipes.hinton(student, teacher)
    row = evaluated(plan, (x, y.clamp(min=0)))
    z, v = student(x).detach(), teacher(x).detach()
    hard = float(nn.functional.cross_entropy(z, y.clamp(min=0)))
    assert row["loss"] == pytest.approx(kl(z, v, 20.0) + 0.5 * hard, rel=1e-4)
    assert {*plan.objective.terms} == {"soft", "hard"}
    assert {*recipes.hinton(student, teacher, hard_weight=0.0).objective.terms} == {"soft"}  # unlabelled data


def test_dkd_warms_up_over_epochs() -> None:
    student, teacher = classifiers()
    x, y = samples(9).tensors
    plan = recipes.dkd(student, teacher)
    soft = plan.objective.terms["soft"]
    assert [soft.weight_at(Progress(epoch=e)) for e in (0, 9, 19, 100)] == [0.05, 0.5, 1.0, 1.0]
    row = evaluated(plan, (x, y.clamp(min=0)))
    expected = kd.kd_loss(
        student(x),
        teacher(x).detach(),
        y.clamp(min=0),
        divergence=kd.DKD(1.0, 8.0),
        temperature=4.0,
        hard_weight=0.0,
    )
    assert row["soft"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["loss"] == pytest.approx(0.05 * row["soft"] + row["hard"], rel=1e-5)


@pytest.mark.parametrize("kind", ["multiplicative", "additive"])
def test_noise_of_the_teacher_changes_the_variance_and_not_the_mean(kind: str) -> None:
    """With squared error, over many draws; the student's multiplicative noise pulls its logits to 0."""
    student, teacher = classifiers()
    x = samples(6).tensors[0]

    def gradients(recipe: Any, draws: int) -> torch.Tensor:
        # The same row many times is as many draws.
        many = x.repeat(draws, 1)
        plan = recipe(student, teacher, sigma=0.5, probability=1.0, kind=kind)
        z = student(many).detach().requires_grad_()
        options = plan.objective.terms["soft"].options
        kd.kd_loss(z, teacher(many).detach(), reduction="sum", **options).backward()
        return z.grad.view(draws, *x.shape[:1], -1)

    z, v = student(x).detach(), teacher(x).detach()
    torch.manual_seed(0)
    noisy = gradients(recipes.noisy_teacher, 20_000)
    spread = 0.5 * (v.abs() if kind == "multiplicative" else torch.ones_like(v))
    torch.testing.assert_close(noisy.std(0), spread, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(noisy.mean(0), z - v, rtol=0.0, atol=5 * float(spread.max()) / 20_000**0.5)
    shrunk = gradients(recipes.noisy_student, 20_000).mean(0)
    pull = 0.25 * z if kind == "multiplicative" else torch.zeros_like(z)
    torch.testing.assert_close(shrunk, z - v + pull, rtol=0.0, atol=0.05)
    assert (pull.abs().max() > 0.05) == (kind == "multiplicative")


def test_fitnets_has_the_hint_first() -> None:
    torch.manual_seed(0)
    student, teacher = Convs(3), Convs(4)
    plan = recipes.fitnets(student, teacher, guided="a", hint="b", optimizer=sgd)
    assert [(s.name, [*s.updates[0].objective.terms]) for s in plan.stages] == [
        ("hint", ["hint"]),
        ("distil", ["soft", "hard"]),
    ]
    histories = plan.run([images()], epochs=4, progress=False, log_every=1)
    assert [len(h) for h in histories.values()] == [2, 2] and "soft" in histories["distil"][0]
    one = recipes.fitnets(student, teacher, guided="a", hint="b", two_stages=False)
    assert {n: t.weight for n, t in one.objective.terms.items()} == {"soft": 1.0, "hard": 1.0, "hint": 100.0}


def test_attention_transfer_on_feature_maps() -> None:
    torch.manual_seed(0)
    plan = recipes.attention_transfer(Convs(3), Convs(5), layers=[("a", "a"), ("b", "b")], optimizer=sgd)
    (history,) = plan.run([images()], steps=3, progress=False, log_every=1).values()
    assert {"hard", "attention"} <= history[0].keys() and "soft" not in history[0]


def test_multilabel_and_ensemble() -> None:
    student, teacher = classifiers()
    x, y = samples(9).tensors
    row = evaluated(recipes.multilabel(student, teacher), (x, torch.rand(9, 5)))
    expected = kd.kd_loss(student(x), teacher(x).detach(), divergence=kd.BinaryKL(), temperature=2.0)
    assert row["soft"] == pytest.approx(expected.item(), rel=1e-5)
    teachers = [teacher, net(4), net(5)]
    row = evaluated(recipes.ensemble(student, teachers, weights=[2.0, 1.0, 1.0]), (x, y))
    p = sum(w * (t(x).detach() / 4).softmax(-1) for w, t in zip((0.5, 0.25, 0.25), teachers, strict=True))
    lq = (student(x).detach() / 4).log_softmax(-1)
    assert row["soft"] == pytest.approx(float(16 * (p * (p.log() - lq)).sum(-1).mean()), rel=1e-4)


# Models of transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_distilbert_and_tinybert_learn(family: str) -> None:
    """Both on every family, with dropout and padding: what they minimise falls."""
    for recipe, stages in ((recipes.distilbert, 1), (recipes.tinybert, 2)):
        student, teacher = two(FAMILIES[family])
        teacher_before = parameters(teacher)
        plan = recipe(student, teacher, optimizer=lambda p: torch.optim.AdamW(p, 3e-3))
        batch = text()
        before = [evaluated(plan, batch, n)["loss"] for n in range(stages)]
        histories = plan.run([batch], steps=30, progress=False)
        after = [evaluated(plan, batch, n)["loss"] for n in range(stages)]
        assert len(histories) == stages and after[-1] < before[-1]
        assert all(map(torch.equal, teacher_before, parameters(teacher)))


def test_distilbert_is_five_two_one() -> None:
    student, teacher = two(bert)
    row = evaluated(recipes.distilbert(student, teacher), text())
    assert row["loss"] == pytest.approx(5 * row["soft"] + 2 * row["hard"] + row["cosine"], rel=1e-6)


def test_tinybert_maps_layers() -> None:
    student, teacher = two(bert, layers=(2, 6))
    terms = recipes.tinybert(student, teacher).stages[0].updates[0].objective.terms
    assert [*terms["hidden"].pairs] == [(1, 3), (2, 6)] and terms["attention"].pairs == [(0, 2), (1, 5)]
    top = recipes.tinybert(student, teacher, layer_map=[5, 6], share_projection=True)
    terms = top.stages[0].updates[0].objective.terms
    assert (
        terms["attention"].pairs == [(0, 4), (1, 5)]
        and terms["embeddings"].projectors is terms["hidden"].projectors
    )
    with pytest.raises(ValueError, match="6 layers of the teacher are no multiple of 4"):
        recipes.tinybert(bert(4), teacher)
    with pytest.raises(ValueError, match=r"layer_map must have 2 layers from 1 to 6, got \[0, 6\]"):
        recipes.tinybert(student, teacher, layer_map=[0, 6])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_begins_as_layers_of_the_teacher(family: str) -> None:
    student, teacher = two(FAMILIES[family], layers=(3, 6))
    copy_layers(student, teacher)
    own, given = student.state_dict(), teacher.state_dict()
    moved = {f".{i}.": f".{n}." for i, n in enumerate((0, 2, 5))}  # of 0 to 5, evenly: 0, 2.5, 5

    def source(name: str) -> str:
        for a, b in moved.items():
            if a in name:
                return name.replace(a, b, 1)
        return name

    assert all(torch.equal(x, given[source(name)]) for name, x in own.items())


def test_layers_of_twelve() -> None:
    student, teacher = two(llama, layers=(6, 12))
    copy_layers(student, teacher)
    for i, n in enumerate([0, 2, 4, 7, 9, 11]):
        a, b = (m.model.layers[k].mlp.up_proj.weight for m, k in ((student, i), (teacher, n)))
        assert torch.equal(a, b)


def test_layers_that_do_not_fit_are_refused() -> None:
    student, teacher = two(bert, widths=(8, 16))
    with pytest.raises(ValueError, match="the student's layers are not like the teacher's"):
        copy_layers(student, teacher)
    student, teacher = two(bert)
    with pytest.raises(ValueError, match=r"layers must be 2 of 0 to 3, got \[0, 4\]"):
        copy_layers(student, teacher, [0, 4])
    with pytest.raises(ValueError, match="has no list of layers"):
        copy_layers(nn.Linear(2, 2), teacher)


# Plans


def test_a_plan_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed in the second stage: the first is not run again, and the layers not copied again."""

    def run(folder: Path, stop: int | None = None) -> list[torch.Tensor]:
        class Stop:
            def on_step(self, distiller: Distiller, row: Any) -> None:
                if stop is not None and "soft" in row and distiller.progress.step == stop:
                    raise KeyboardInterrupt

        student, teacher = two(bert)
        plan = recipes.tinybert(
            student, teacher, callbacks=[Stop()], optimizer=lambda p: torch.optim.AdamW(p, 1e-3)
        )
        plan.stages[0].before = lambda plan: copy_layers(plan.student, plan.teacher)
        torch.manual_seed(3)
        plan.run([text(), text(3)], steps=8, save_every=1, progress=False, folder=folder)
        return parameters(student)

    whole = run(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["1-intermediate", "2-prediction"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=3)
    assert all(map(torch.equal, run(tmp_path / "cut"), whole))


def test_plans_refuse() -> None:
    student, teacher = classifiers()
    with pytest.raises(ValueError, match="run takes steps or epochs"):
        recipes.hinton(student, teacher).run([samples(9).tensors], progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        recipes.hinton(student, teacher, temprature=2.0)
    assert FEATURES == student[0].in_features


def lines_of_code(source: str) -> int:
    """Those with something on them that isn't a comment or a docstring."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            first = node.body[0]
            documented |= {*range(first.lineno, (first.end_lineno or 0) + 1)}
    layout = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    }  # fmt: skip
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            found |= {*range(token.start[0], token.end[0] + 1)}
    return len(found - documented)


def test_the_loop_is_small_and_knows_no_strategy() -> None:
    """What isn't a term or a recipe is read in one sitting, and a new strategy changes nothing in it."""
    assert lines_of_code("# one\n\ndef f():\n    '''Two.\n\n    Three.'''\n    return (1,\n        2)\n") == 3
    places = [*Path(recipes.__file__).parent.parent.glob("*.py")]
    sources = {place.name: place.read_text(encoding="utf-8") for place in places}
    assert {"distiller.py", "objective.py", "outputs.py"} <= {*sources}
    assert sum(map(lines_of_code, sources.values())) <= 900
    functions = inspect.getmembers(recipes, inspect.isfunction)
    strategies = {name for name, made in functions if made.__module__.startswith(recipes.__name__)}
    assert {"hinton", "tinybert"} <= strategies
    for name, source in sources.items():
        words = {*re.findall(r"\w+", source.lower())} - {"ensemble"}  # a kind of teacher
        assert not words & strategies, name
