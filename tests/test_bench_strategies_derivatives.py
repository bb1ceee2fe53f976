"""Fits of the strategies' table on derivatives: the functions, nets side by side, and the pendulum."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

import torch
from torch import nn

from benchmarks import strategies_derivatives as derivatives
from benchmarks import strategies_fits as fits
from kdkernels.train import Distiller, LogitMatch, Objective, Sobolev

MINIMA = {
    "styblinski_tang": ((-2.903534, -2.903534), -78.332331),
    "ackley": ((0.0, 0.0), 0.0),
    "beale": ((3.0, 0.5), 0.0),
    "booth": ((1.0, 3.0), 0.0),
    "bukin": ((-10.0, 1.0), 0.0),
    "mccormick": ((-0.547198, -1.547198), -1.913223),
    "rosenbrock": ((1.0, 1.0), 0.0),
}


@pytest.mark.parametrize("name", derivatives.FUNCTIONS)
def test_minima_that_are_known_of_the_functions(name: str) -> None:
    """There, and nowhere else in the domain is it less; the domain's corners are those of the square."""
    function, *domain = derivatives.FUNCTIONS[name]
    at, least = MINIMA[name]
    found = float(function(*(torch.tensor(x, dtype=torch.float64) for x in at)))
    assert found == pytest.approx(least, abs=1e-5)
    which = [*derivatives.FUNCTIONS].index(name)
    square = derivatives._square(5000, 1).expand(7, -1, -1)
    assert float(derivatives.plain_values(square)[which].min()) >= least - 1e-3
    corner = derivatives.plain_values(torch.tensor([[-1.0, 1.0]]).expand(7, 1, 2))[which]
    x, y = torch.tensor([domain[0][0]]), torch.tensor([domain[1][1]])
    torch.testing.assert_close(corner, function(x, y))


def test_values_are_scaled_over_their_domains() -> None:
    found = derivatives.scaled_values(derivatives._square(50_000, 2).expand(7, -1, -1))
    assert float(found.mean(1).abs().max()) < 0.05
    torch.testing.assert_close(found.std(1), torch.ones(7), rtol=0.05, atol=0.0)


def test_nets_side_by_side_are_nets_alone() -> None:
    """Each gives what its layers do; of one as of rows apart, seven times the terms per row and no other."""
    whole, apart = (fits.seeded(3, lambda kind=kind: derivatives.Nets(kind)) for kind in (False, True))
    points = derivatives._square(5, 0)
    assert isinstance(whole, derivatives.Nets)
    for n in range(7):
        x = points
        for k, (weight, bias) in enumerate(zip(whole.weights, whole.biases, strict=True)):
            x = (x.tanh() if k else x) @ weight[n] + bias[n]
        torch.testing.assert_close(whole(points)[:, n : n + 1], x)
    torch.testing.assert_close(apart(points.repeat(7, 1))[:, 0], whole(points).T.flatten())
    rows = []
    for net, given, kind in ((whole, points, False), (apart, points.repeat(7, 1), True)):
        goals = Objective(value=LogitMatch(), derivatives=Sobolev())
        rows.append(
            Distiller(
                net,
                lambda b, kind=kind: derivatives.rows_of(derivatives.scaled_values, b["inputs"], kind),
                goals,
            ).evaluate([given])
        )
    for name in ("value", "derivatives"):
        assert rows[0][name] == pytest.approx(7 * rows[1][name], rel=1e-5)


def test_value_iteration_swings_the_pendulum_up() -> None:
    """From hanging, where no torque lifts it at once: up in the end, and up it stays."""
    states = torch.tensor([[math.pi, 0.0], [-3.0, 0.5]])
    pushed = states
    for _ in range(300):
        pushed, _ = derivatives.moved(pushed, torch.full((2,), 2))
        assert float(pushed[:, 0].cos().max()) < 0.5
    for tick in range(120):
        states, cost = derivatives.moved(states, derivatives.best_actions(states))
        assert tick < 100 or float(cost.max()) < 0.05


def test_the_teacher_is_that_policy_and_the_return_its_costs(tmp_path: Path) -> None:
    lab = fits.Lab(tmp_path, 0.25)
    net, states = derivatives.policy_teacher(lab, 0), derivatives.states_of(500, 5)
    with torch.no_grad():
        agree = net(derivatives.seen(states)).argmax(1) == derivatives.best_actions(states)
    assert float(agree.float().mean()) > 0.85

    class Idle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), -1)

    at = torch.tensor([[math.pi, 0.0]])  # where it stays, at a cost of 1 − cos π = 2
    assert derivatives.returned(Idle(), at) == pytest.approx(-2.0, abs=1e-4)
    assert derivatives.returned(net, at) > -1.5


@pytest.mark.parametrize("fit", ["regress", "imitate"])
def test_a_fit_depends_on_its_seed_alone(fit: str, tmp_path: Path) -> None:
    """With draws, whatever was drawn before."""
    do = derivatives.FITS[fit]
    options = {"recipe": "sobolev", "projections": 1, "lr": 1e-2}
    first = do(fits.Lab(tmp_path, 0.01), 1, 5, **options)
    used = fits.Lab(tmp_path, 0.01)
    do(used, 0, 3, **options)
    assert do(used, 1, 5, **options) == first
