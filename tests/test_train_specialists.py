"""Generalist and specialists: the distribution of all of them, clusters, halves of batches, an end to end."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import torch
from scipy.optimize import minimize
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import solver
from benchmarks import strategies_specialists as table
from benchmarks.strategies_fits import Lab
from kdkernels.train import Distiller, Plan, Stage, recipes
from kdkernels.train.recipes import (
    HalfAndHalf,
    Specialist,
    SpecialistEnsemble,
    active_specialists,
    combine,
    confusable_classes,
    specialist_labels,
    specialists,
)
from kdkernels.train.recipes.specialist_solver import combination_gradient, combine_with_stats

Specialists = list[tuple[Tensor, Tensor]]


def problem(
    seed: int, n: int = 6, v: int = 7, m: int = 3, sure: float = 1.5, disjoint: bool = False
) -> tuple[Tensor, Specialists, Tensor]:
    """Predictions that disagree, of random sets of classes, and which are asked."""
    g = torch.Generator().manual_seed(seed)
    z = sure * torch.randn(n, v, generator=g, dtype=torch.float64)
    found, order = [], torch.randperm(v, generator=g)
    for i in range(m):
        size = v // m if disjoint else int(torch.randint(1, v, (), generator=g))
        classes = order[i * size : (i + 1) * size] if disjoint else torch.randperm(v, generator=g)[:size]
        own = sure * torch.randn(n, size + 1, generator=g, dtype=torch.float64)
        found.append((classes, own.softmax(-1)))
    return z.softmax(-1), found, torch.rand(n, m, generator=g) < 0.7


def divergence(q: Tensor, p: Tensor, given: Specialists, active: Tensor) -> Tensor:
    """Of every row, as the paper has it, class by class in Python."""
    rows = []
    for n in range(len(p)):
        pairs = [(p[n, k], q[n, k]) for k in range(p.shape[1])]
        for m, (classes, probabilities) in enumerate(given):
            if active[n, m]:
                own = classes.tolist()
                others = [k for k in range(p.shape[1]) if k not in own]
                pairs += [(probabilities[n, i], q[n, k]) for i, k in enumerate(own)]
                pairs += [(probabilities[n, -1], q[n, others].sum())] if others else []
        rows.append(sum(a * (a / b).log() for a, b in pairs if a > 0))
    return torch.stack([torch.as_tensor(row) for row in rows])


def best(p: Tensor, given: Specialists, active: Tensor, row: int) -> Tensor:
    """Of one row, by L-BFGS of scipy on the logits with gradients by differences of autograd."""

    def value(z: Any) -> tuple[float, Any]:
        x = torch.tensor(z, requires_grad=True)
        one = slice(row, row + 1)
        loss = divergence(x.softmax(-1)[None], p[one], [(c, s[one]) for c, s in given], active[one]).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.item(), gradient.numpy()

    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}
    found = minimize(value, p[row].log().numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.as_tensor(found.x).softmax(-1)


# The solver


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_minimum(seed: int) -> None:
    p, given, active = problem(seed, n=4)
    q = combine(p, given, active)
    for row in range(len(p)):
        torch.testing.assert_close(q[row], best(p, given, active, row), rtol=0.0, atol=1e-6)
    assert q.dtype == torch.float64 and (q.sum(1) - 1).abs().max() < 1e-12


def test_no_step_from_it_goes_down() -> None:
    """It is convex: a minimum against steps in random directions is one."""
    p, given, active = problem(7)
    q = combine(p, given, active)
    least = divergence(q, p, given, active)
    g = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-3):
        for _ in range(10):
            other = q * (size * torch.randn(q.shape, generator=g, dtype=torch.float64)).exp()
            assert (divergence(other / other.sum(1, keepdim=True), p, given, active) > least).all()


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_classes_are_enough(seed: int) -> None:
    """Newton on groups agrees with the fixed point on groups, and with descent on all classes; of sets of
    classes that overlap at random, with many rows for each pattern, and few."""
    p, given, active = problem(seed, n=40, v=4 + seed, m=1 + seed % 6)
    newton = combine_with_stats(p, given, active)
    assert newton.residual.max() < 1e-9 and newton.iterations.max() < 40
    gradient = combination_gradient(newton.probabilities, p, given, active)
    assert gradient.abs().sum(1).max() < 1e-9
    assert (newton.residual - gradient.abs().sum(1)).abs().max() < 1e-12
    repeated = combine(p, given, active, "fixed_point", tolerance=1e-11)
    torch.testing.assert_close(newton.probabilities, repeated, rtol=0.0, atol=1e-6)
    if seed < 4:
        descended = combine(p, given, active, "gradient", tolerance=1e-9)
        torch.testing.assert_close(newton.probabilities, descended, rtol=0.0, atol=1e-6)


def test_the_gradient_is_autograds() -> None:
    p, given, active = problem(3)
    z = torch.randn(p.shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(divergence(z.softmax(-1), p, given, active).sum(), z)
    found = combination_gradient(z.detach().softmax(-1), p, given, active)
    torch.testing.assert_close(found, expected)
    everyone = torch.ones_like(active)
    (expected,) = torch.autograd.grad(divergence(z.softmax(-1), p, given, everyone).sum(), z)
    torch.testing.assert_close(combination_gradient(z.detach().softmax(-1), p, given), expected)


def test_one_specialist_by_hand() -> None:
    """On its classes 0 and 1 the mean, outside the mean of the masses, 0.5 and 0.1, as 3 to 2."""
    p = torch.tensor([[0.2, 0.3, 0.3, 0.2]])
    given = [(torch.tensor([1, 0]), torch.tensor([[0.5, 0.4, 0.1]]))]
    expected = torch.tensor([[0.3, 0.4, 0.18, 0.12]], dtype=torch.float64)
    for method in ("newton", "closed_form", "fixed_point", "gradient"):
        torch.testing.assert_close(combine(p, given, None, method), expected, rtol=0.0, atol=1e-6)


def test_the_closed_form_is_what_iterations_find() -> None:
    p, given, _ = problem(5, n=30, m=4)
    active = nn.functional.one_hot(torch.arange(30) % 5, 5)[:, :4].bool()  # one, or none
    closed = combine_with_stats(p, given, active, "closed_form")
    assert closed.iterations.max() == 0
    torch.testing.assert_close(closed.probabilities, combine(p, given, active, "fixed_point"))
    torch.testing.assert_close(closed.probabilities[4], p[4])
    with pytest.raises(ValueError, match="closed_form takes at most one active specialist a row, got 4"):
        combine(p, given, None, "closed_form")


def test_agreement_changes_nothing() -> None:
    """Specialists that say what the generalist says."""
    p, given, active = problem(11, m=4)
    same = [(c, torch.cat([p[:, c], 1 - p[:, c].sum(1, keepdim=True)], 1)) for c, _ in given]
    torch.testing.assert_close(combine(p, same, active), p, rtol=0.0, atol=1e-10)


def test_orders_do_not_matter() -> None:
    p, given, active = problem(13, v=9, m=4)
    q = combine(p, given, active)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(combine(p, [given[m] for m in order], active[:, order]), q)
    classes = torch.randperm(9)
    place = classes.argsort()
    torch.testing.assert_close(
        combine(p[:, classes], [(place[c], s) for c, s in given], active), q[:, classes]
    )
    inner = [torch.randperm(len(c)) for c, _ in given]
    mixed = [(c[i], torch.cat([s[:, i], s[:, -1:]], 1)) for (c, s), i in zip(given, inner, strict=True)]
    torch.testing.assert_close(combine(p, mixed, active), q)
    rows = torch.randperm(len(p))
    torch.testing.assert_close(combine(p[rows], [(c, s[rows]) for c, s in given], active[rows]), q[rows])


def test_rows_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are cut into chunks."""
    p, given, active = problem(17, n=50, m=4)
    q = combine(p, given, active)
    alone = [
        combine(p[i : i + 1], [(c, s[i : i + 1]) for c, s in given], active[i : i + 1]) for i in range(50)
    ]
    torch.testing.assert_close(torch.cat(alone), q, rtol=0.0, atol=1e-9)
    monkeypatch.setattr("kdkernels.train.recipes.specialist_solver._ELEMENTS", {"cpu": 7 * 5})
    torch.testing.assert_close(combine(p, given, active), q, rtol=0.0, atol=1e-9)


def test_nobody_is_asked() -> None:
    p, given, active = problem(19)
    torch.testing.assert_close(combine(p, given, torch.zeros_like(active)), p)
    torch.testing.assert_close(combine(p, [], None), p)
    assert combine(p[:0], [(c, s[:0]) for c, s in given]).shape == (0, 7)


def test_a_specialist_of_all_classes_is_a_second_generalist() -> None:
    p, given, _ = problem(23)
    everything = (torch.arange(7), torch.cat([given[0][1].new_ones(6, 7) / 7, torch.zeros(6, 1)], 1))
    torch.testing.assert_close(combine(p, [everything]), (p + 1 / 7) / 2)
    with pytest.raises(ValueError, match="specialist 0 has all 7 classes, and gives others a probability"):
        combine(p, [(torch.arange(7), torch.full((6, 8), 1 / 8))])


@pytest.mark.parametrize("method", ["newton", "fixed_point"])
def test_zeros(method: Any) -> None:
    """Where nobody gives a class anything it has nothing, unless a rest has nowhere else to go."""
    double = torch.float64
    # Rests that are 0: means on what is left.
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=double)
    given = [
        (torch.tensor([0, 1]), torch.tensor([[0.5, 0.5, 0.0]], dtype=double)),
        (torch.tensor([1, 2]), torch.tensor([[1.0, 0.0, 0.0]], dtype=double)),
    ]
    found = combine(p, given, None, method)
    torch.testing.assert_close(
        found, torch.tensor([[1.0, 1.75, 0.25, 0.0]], dtype=double) / 3, rtol=0.0, atol=1e-9
    )
    # Saturated, and both say it is none of theirs: of 3 parts one is the generalist's class, two are of the
    # classes of which nobody said anything, evenly.
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=double)
    none = torch.tensor([[0.0, 1.0]], dtype=double)
    found = combine(p, [(torch.tensor([0]), none), (torch.tensor([0]), none)], None, method)
    torch.testing.assert_close(
        found, torch.tensor([[1 / 3, 2 / 9, 2 / 9, 2 / 9]], dtype=double), rtol=0.0, atol=1e-6
    )
    # So that the optimum is where both rests meet, at classes 2 and 3.
    found = combine(
        p, [(torch.tensor([0]), none), (torch.tensor([0, 1]), torch.tensor([[0.0, 0.0, 1.0]]).double())]
    )
    torch.testing.assert_close(
        found[0, [0, 2, 3]], torch.tensor([1 / 3] * 3, dtype=double), rtol=0.0, atol=1e-6
    )


@pytest.mark.parametrize("sure", [8.0, 30.0, 200.0])
def test_saturated_predictions(sure: float) -> None:
    """Which contradict each other: converged without a warning, and below what the fixed point finds."""
    p, given, active = problem(29, n=200, v=20, m=8, sure=sure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = combine_with_stats(p, given, active)
    assert found.residual.max() < 1e-9 and (found.probabilities >= 0).all()
    assert (found.probabilities.sum(1) - 1).abs().max() < 1e-12
    with pytest.warns(
        RuntimeWarning, match="rows did not converge to 1e-10 within 30 iterations of fixed_point"
    ):
        repeated = combine(p, given, active, "fixed_point", iterations=30)
    ours, theirs = (
        divergence(x.clamp(min=1e-300), p, given, active) for x in (found.probabilities, repeated)
    )
    assert (ours <= theirs + 1e-9).all() and (ours < theirs - 1e-6).any()


def test_the_solver_refuses() -> None:
    p, given, active = problem(31)
    classes, own = given[0]
    for error, wanted, arguments in (
        (ValueError, r"generalist must be probabilities \[N, V\]", (p[0], given)),
        (ValueError, "generalist must be >= 0 with rows that sum to 1, got", (p * 2, given)),
        (ValueError, "generalist must be >= 0 with rows that sum to 1, got", (p.log(), given)),
        (ValueError, "generalist must be >= 0 with rows", (p.clone().fill_(math.nan), given)),
        (ValueError, "probabilities of specialist 0 must be >= 0", (p, [(classes, own * 0.5)])),
        (ValueError, r"probabilities of specialist 0 must be \[6, ", (p, [(classes, own[:, 1:])])),
        (ValueError, "classes of specialist 0 must be a list of at least one class", (p, [([], own)])),
        (ValueError, "classes of specialist 0 must be from 0 to 6, got 7 to 7", (p, [([7], own)])),
        (ValueError, "classes of specialist 0 must be from 0 to 6, got -1 to", (p, [([-1, 2], own)])),
        (ValueError, "classes of specialist 0 must be distinct, got 1 twice", (p, [([1, 1], own)])),
        (TypeError, "classes of specialist 0 must be integers, got torch.float32", (p, [([1.0], own)])),
        (ValueError, r"active must be bool \[6, 3\]", (p, given, active[:, 1:])),
        (ValueError, r"active must be bool \[6, 3\]", (p, given, active.float())),
        (ValueError, "method must be one of newton, fixed_point", (p, given, active, "simplex")),
    ):
        with pytest.raises(error, match=wanted):
            combine(*arguments)


# Which classes


def hierarchy(seed: int = 0, rows: int = 4000) -> tuple[Tensor, list[int]]:
    """Predictions of 24 classes in 4 clusters of 6, in no order, half of the mass within the cluster; some
    classes are ten times as frequent as others."""
    g = torch.Generator().manual_seed(seed)
    cluster = torch.arange(24)[torch.randperm(24, generator=g)] % 4
    frequency = torch.logspace(0, 1, 24)[torch.randperm(24, generator=g)]
    truth = torch.multinomial(frequency, rows, replacement=True, generator=g)
    z = torch.randn(rows, 24, generator=g)
    z += 2.5 * (cluster[truth][:, None] == cluster) + 3.0 * nn.functional.one_hot(truth, 24)
    return z.softmax(-1), cluster.tolist()


def agreement(found: list[Tensor], truth: list[int]) -> float:
    """The adjusted Rand index."""
    mine = torch.empty(len(truth), dtype=torch.long)
    for n, classes in enumerate(found):
        mine[classes] = n
    return float(adjusted_rand_score(truth, mine.tolist()))


@pytest.mark.parametrize("mini_batch", [False, True])
def test_planted_clusters_are_found(mini_batch: bool) -> None:
    p, truth = hierarchy()
    found = confusable_classes(p, 4, mini_batch=mini_batch)
    assert agreement(found, truth) == 1.0
    assert sorted(torch.cat(found).tolist()) == [*range(24)] and int(found[0][0]) == 0
    assert [c.tolist() for c in found] == [
        c.tolist() for c in confusable_classes(p, 4, mini_batch=mini_batch)
    ]


def test_the_diagonal_hides_them() -> None:
    """Of the raw covariance clusters are of large variances; without its diagonal the planted ones."""
    p, truth = hierarchy()
    assert agreement(confusable_classes(p, 4, of="covariance"), truth) > 0.9
    assert agreement(confusable_classes(p, 4, of="covariance", zero_diagonal=False), truth) < 0.5
    assert agreement(confusable_classes(p, 4, zero_diagonal=True), truth) > 0.9


def test_classes_that_are_never_predicted_are_in_a_cluster() -> None:
    p, _ = hierarchy()
    p = torch.cat([p, torch.zeros(len(p), 2)], 1)
    assert sum(map(len, confusable_classes(p, 5))) == 26


def test_clustering_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    p, _ = hierarchy(rows=50)
    for wanted, arguments in (
        (r"probabilities must be \[N, V\], floating, with N >= 2", (p[0], 2)),
        (r"probabilities must be \[N, V\]", (p[:1], 2)),
        ("clusters must be a number from 1 to 24", (p, 25)),
        ("clusters must be a number from 1 to 24", (p, 0)),
        ("of must be 'correlation' or 'covariance', got 'cosine'", (p, 2, "cosine")),
    ):
        with pytest.raises(ValueError, match=wanted):
            confusable_classes(*arguments)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kdkernels\[specialists\]'"):
        confusable_classes(p, 2)


def test_who_is_asked() -> None:
    p = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7]])
    classes = [[0], [1, 2], [3, 0]]
    assert active_specialists(p, classes).tolist() == [[True, False, True], [False, False, True]]
    assert active_specialists(p, classes, 2).tolist() == [[True, True, True], [False, True, True]]
    with pytest.raises(ValueError, match="top must be a number of classes from 1 to 4, got 5"):
        active_specialists(p, classes, 5)
    with pytest.raises(ValueError, match="classes of specialist 1 must be from 0 to 3"):
        active_specialists(p, [[0], [4]])


# Specialists


def net(seed: int = 0, classes: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, classes))


def samples(n: int = 120, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g, y = torch.Generator().manual_seed(seed), torch.arange(n) % classes
    return torch.randn(n, 5, generator=g) + 2 * torch.randn(classes, 5, generator=g)[y], y


def test_labels_of_a_specialist() -> None:
    labels = torch.tensor([[4, 0, 1], [-100, 2, 3]])
    assert specialist_labels(labels, [2, 0], 5).tolist() == [[2, 1, 2], [-100, 0, 2]]
    with pytest.raises(ValueError, match="labels must be from 0 to 4, or -100 for none, got 0 to 5"):
        specialist_labels(torch.tensor([0, 5]), [2], 5)


def test_a_specialist_begins_as_the_generalist() -> None:
    model, (x, _) = net(), samples()
    p = model(x).softmax(-1)
    own = torch.tensor([4, 1])
    expected = torch.cat([p[:, own], p[:, [0, 2, 3, 5]].sum(1, keepdim=True)], 1)
    specialist = Specialist(copy.deepcopy(model), own, 6)
    torch.testing.assert_close(specialist(x).softmax(-1), expected)
    torch.testing.assert_close(specialist.probabilities(x), expected.double(), rtol=1e-6, atol=1e-7)
    # As an ensemble that knows nothing more it is the generalist.
    everyone = SpecialistEnsemble(model, [specialist, Specialist(copy.deepcopy(model), [1, 2], 6)], top=3)
    torch.testing.assert_close(everyone(x).softmax(-1), p, rtol=1e-5, atol=1e-7)


def test_a_known_prior_is_not_unlearnt() -> None:
    """Then the logit of the rest is that of the mix, and predictions begin as the generalist's, corrected."""
    model, (x, _) = net(), samples()
    learned = Specialist(model, [4, 1], 6, share=0.2)
    known = Specialist(model, [4, 1], 6, share=0.2, prior="known")
    assert learned.correction == pytest.approx(math.log(0.8 / 0.2))
    torch.testing.assert_close(learned(x) - known(x), torch.tensor([0, 0, math.log(4.0)]).expand(120, 3))
    uncorrected = Specialist(model, [4, 1], 6)
    assert uncorrected.correction == 0.0
    torch.testing.assert_close(known.probabilities(x), uncorrected.probabilities(x))


def test_the_correction_is_bayes() -> None:
    """Classes with densities on 8 places: the best predictions of the half-and-half mix, corrected, are the
    posteriors of the data."""
    g = torch.Generator().manual_seed(0)
    density = torch.rand(5, 8, generator=g, dtype=torch.float64)
    density /= density.sum(1, keepdim=True)
    prior = torch.tensor([0.1, 0.05, 0.4, 0.15, 0.3], dtype=torch.float64)
    own, others = [1, 3], [0, 2, 4]
    share = float(prior[own].sum())
    mixed = prior.clone()
    mixed[own] *= 0.5 / share
    mixed[others] *= 0.5 / (1 - share)

    def posterior(weights: Tensor) -> Tensor:
        joint = (weights[:, None] * density).T
        return joint / joint.sum(1, keepdim=True)

    class Best(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return posterior(mixed).log()[x]

    found = Specialist(Best(), own, 5, share=share).probabilities(torch.arange(8))
    truth = posterior(prior)
    expected = torch.cat([truth[:, own], truth[:, others].sum(1, keepdim=True)], 1)
    torch.testing.assert_close(found, expected)


def test_specialists_refuse() -> None:
    model, (x, y) = net(), samples()
    data = TensorDataset(x, y)
    for error, wanted, make in (
        (ValueError, "classes must be a list of at least one class", lambda: Specialist(model, [], 6)),
        (ValueError, "classes must be from 0 to 5, got 6 to 6", lambda: Specialist(model, [6], 6)),
        (ValueError, "share must be between 0 and 1", lambda: Specialist(model, [0], 6, share=1.0)),
        (ValueError, "prior must be 'learned' or 'known'", lambda: Specialist(model, [0], 6, prior="none")),
        (ValueError, "must give logits of 7 classes, got 6", lambda: Specialist(model, [0], 7)(x)),
        (
            TypeError,
            "specialists must be of type Specialist, got Seq",
            lambda: SpecialistEnsemble(model, [model]),
        ),
        (
            ValueError,
            r"as many classes, got \[6, 7\]",
            lambda: SpecialistEnsemble(model, [Specialist(model, [0], 6), Specialist(model, [0], 7)]),
        ),
        (ValueError, "labels of all samples are needed", lambda: specialists(model, [[0]], [(x, y)])),
        (ValueError, "classes must be of at least one specialist", lambda: specialists(model, [], data)),
        (
            ValueError,
            "samples must be of the classes and of others",
            lambda: specialists(model, [range(6)], data),
        ),
        (
            TypeError,
            "optimizer must be a function",
            lambda: specialists(model, [[0]], data, optimizer=torch.optim.SGD(model.parameters())),
        ),
        (ValueError, "batch_size must be an even number, got 5", lambda: HalfAndHalf(y, [0], 5)),
        (ValueError, r"of others, got 0 and 120", lambda: HalfAndHalf(y, [6], 4)),
    ):
        with pytest.raises(error, match=wanted):
            make()


def test_half_and_half() -> None:
    """In an epoch every sample of the classes is there once, half of each batch; of others as many."""
    y = torch.tensor([0, 1, 2, 3, 4] * 20)
    y[0] = -100
    sampler = HalfAndHalf(y, [1, 3], 8, seed=3)
    first, second = list(sampler), list(sampler)
    assert len(sampler) == len(first) == 10 and first != second
    for batch in first:
        assert [bool(label in (1, 3)) for label in y[batch]] == [True] * 4 + [False] * 4
    counts = Counter(itertools.chain(*first))
    assert max(counts.values()) == 1 and 0 not in counts
    assert {i for i in counts if y[i] in (1, 3)} == {i for i in range(100) if y[i] in (1, 3)}
    assert list(HalfAndHalf(y, [1, 3], 8, seed=3)) == first
    sampler.generator.manual_seed(3)
    assert list(sampler) == first


def test_half_and_half_of_few() -> None:
    """Three samples of a class make half of a batch of 16: each twice or three times."""
    y = torch.tensor([0] * 3 + [1] * 50)
    (batch,) = HalfAndHalf(y, [0], 16)
    assert sorted(Counter(batch[:8]).values()) == [2, 3, 3] and len({*batch[8:]}) == 8
    batches = list(HalfAndHalf(y, [1], 16))  # now the others are few
    assert len(batches) == 6 and all(sorted(Counter(b[8:]).values()) == [2, 3, 3] for b in batches[:1])


# Plans


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_stage_with_a_loader_of_its_own() -> None:
    model, (x, y) = net(), samples(12)
    seen: list[int] = []

    class See:
        def on_batch(self, distiller: Distiller, batch: Any) -> Any:
            seen.append(len(batch["inputs"]))
            return batch

    made = recipes.hinton(model, net(1), optimizer=sgd, callbacks=[See()])
    own = replace(made.stages[0], name="own", loader=[(x[:5], y[:5])])
    plan = Plan(model, net(1), [made.stages[0], own], **made.options)
    histories = plan.run([(x, y)], [(x, y)], steps=4, progress=False)
    assert seen == [12, 12, 5, 5]
    assert any("eval/loss" in row for row in histories["distil"])
    assert not any(key.startswith("eval") for row in histories["own"] for key in row)
    with pytest.raises(ValueError, match="run needs a loader: distil has none of its own"):
        plan.run(steps=4, progress=False)
    assert Stage("a", []).loader is None


def test_specialists_learn_their_classes_and_leave_the_generalist() -> None:
    model, (x, y) = net(), samples()
    before = [p.clone() for p in model.parameters()]
    plan = specialists(model, [[0, 1], [2, 3, 4]], TensorDataset(x, y), optimizer=sgd, batch_size=20)
    assert [s.name for s in plan.stages] == ["specialist-0", "specialist-1"]
    assert [s.share for s in plan.student.specialists] == [pytest.approx(1 / 3), 0.5]
    batch = next(iter(plan.stages[1].loader))
    assert batch[1][:10].max() < 3 and (batch[1][10:] == 3).all()
    histories = plan.run(epochs=60, progress=False, log_every=5)
    for rows in histories.values():
        assert rows[-1]["hard"] < 0.8 * rows[0]["hard"]
    assert all(map(torch.equal, before, model.parameters()))


def test_specialists_of_mappings() -> None:
    """With labels apart, and batches by name."""

    class Named(torch.utils.data.Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return {"inputs": x[index], "labels": y[index]}

        def __len__(self) -> int:
            return len(x)

    model, (x, y) = net(), samples()
    plan = specialists(model, [[5, 1]], Named(), y, batch_size=8)
    batch = next(iter(plan.stages[0].loader))
    assert {*batch["labels"][:4].tolist()} <= {0, 1} and batch["labels"][4:].tolist() == [2] * 4
    plan.run(steps=1, progress=False)


def test_an_interrupted_plan_of_specialists_goes_on(tmp_path: Path) -> None:
    """Killed in the second specialist's second epoch: the same bits as without."""

    def run(folder: Path, stop: int | None = None) -> list[Tensor]:
        class Stop:
            def on_step(self, distiller: Distiller, row: Any) -> None:
                second = distiller.models["student"] is plan.student.specialists[1]
                if second and distiller.progress.step == stop:
                    raise KeyboardInterrupt

        x, y = samples(40)
        plan = specialists(
            net(), [[0, 1], [2, 3]], TensorDataset(x, y), batch_size=4, optimizer=sgd, callbacks=[Stop()]
        )
        torch.manual_seed(1)
        plan.run(steps=30, save_every=4, progress=False, folder=folder)
        return list(plan.student.parameters())

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=10)
    assert all(map(torch.equal, run(tmp_path / "cut"), whole))


def test_an_ensemble_of_specialists_is_a_teacher() -> None:
    model, (x, y) = net(), samples()
    model(x)
    others = [Specialist(net(n + 1), classes, 6, 0.4) for n, classes in enumerate(([0, 1], [2, 3], [1, 5]))]
    teacher = SpecialistEnsemble(model, others, top=2)
    p = model(x).detach().double().softmax(-1)
    asked = active_specialists(p, [s.own for s in others], 2)
    expected = combine(p, [(s.own, s.probabilities(x)) for s in others], asked)
    torch.testing.assert_close(teacher(x).double().softmax(-1), expected, rtol=1e-5, atol=1e-7)
    assert teacher(x).dtype == torch.float32 and not teacher(x).requires_grad
    torch.testing.assert_close(teacher(x.view(12, 10, 5)), teacher(x).view(12, 10, 6))
    student = net(9)
    plan = recipes.hinton(student, teacher, temperature=2.0, hard_weight=0.0, optimizer=sgd)
    rows = plan.run(DataLoader(TensorDataset(x, y), 40), epochs=40, progress=False, log_every=5)["distil"]
    assert rows[-1]["soft"] < 0.5 * rows[0]["soft"]


def test_specialists_that_nobody_asks_are_not_run() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[9.0, 1.0, -200.0]]).expand(len(x), 3)

    teacher = SpecialistEnsemble(Sure(), [Specialist(Never(), [1], 3), Specialist(Sure(), [0], 3)])
    z = teacher(torch.zeros(2, 1))
    assert z.isfinite().all()
    torch.testing.assert_close(z.softmax(-1), Sure()(torch.zeros(2, 1)).softmax(-1))


# The table


@pytest.mark.parametrize(("name", "arm"), [(n, a) for n, e in table.EXPERIMENTS.items() for a in e.arms])
def test_every_arm_runs_and_says_what_its_claims_need(name: str, arm: str, tmp_path: Path) -> None:
    experiment = table.EXPERIMENTS[name]
    options = {**experiment.arms[arm].options, **experiment.arms[arm].grid[0]}
    found = table.FITS[experiment.fit](Lab(tmp_path, 0.02), 100, 12, **options)
    claims = [c for c in table.CLAIMS.values() if c.experiment == name]
    needed = {c.metric for c in claims if arm == c.arm}
    needed |= {c.control_metric or c.metric for c in claims if arm == c.control}
    assert needed | {experiment.tuned_on, experiment.shown} <= {*found}
    assert all(isinstance(value, float) for value in found.values()) and "diverged" not in found


def test_the_solver_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(solver, "CASES", {"few": (4, False, True), "many": (9, True, False)})
    path = tmp_path / "solver.json"
    sizes = ["--rows", "30", "--classes", "20", "--specialists", "4", "--repeats", "1", "--compared", "2"]
    assert solver.main([*sizes, "--json", str(path), "--check"]) == 0
    assert "30 rows × 20 classes × 4 specialists on 1 thread(s)" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["cases"]["few"]["asked"] == 4.0 and document["cases"]["many"]["compared"] == 2
    assert "| many " in path.with_suffix(".md").read_text()
    monkeypatch.setattr(solver, "ALLOWED_SECONDS", 0.0)
    assert solver.main([*sizes, "--json", str(path), "--check"]) == 1


def test_two_digits_side_by_side() -> None:
    from benchmarks.strategies_fits import Digits, rows

    index = Digits.of(0).held
    x, y = table.pairs(index, 300, torch.Generator().manual_seed(0))
    images, labels = rows(index)
    assert x.shape == (300, 128) and {*y.tolist()} <= {*range(100)}
    for half, digit in ((x[:, :64], y // 10), (x[:, 64:], y % 10)):
        where = (half[:, None] == images).all(-1).int()
        assert where.any(1).all() and torch.equal(labels[where.argmax(1)], digit)
