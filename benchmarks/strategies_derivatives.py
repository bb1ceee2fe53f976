"""`python -m benchmarks strategies` on derivatives: functions of the plane, and policies of a pendulum.

Seven functions are learnt side by side, by seven nets that are one student: their parameters are apart, so
that each is its own fit. The pendulum's teacher is a net fitted to the policy that value
iteration finds. Points that figures are of are one set for tuning seeds and another for test seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.strategies_claims import HARD, RATES, Arm, Claim, Experiment, Options, over
from benchmarks.strategies_fits import Lab, Metrics, adamw, carried_out, is_test, seeded
from kdkernels.train import recipes

# Functions of the plane

Function = Callable[[Tensor, Tensor], Tensor]


def styblinski_tang(x: Tensor, y: Tensor) -> Tensor:
    """½ Σ (x⁴ − 16x² + 5x)."""
    return sum((t**4 - 16 * t**2 + 5 * t for t in (x, y)), torch.zeros(())) / 2


def ackley(x: Tensor, y: Tensor) -> Tensor:
    """Ripples in a funnel; its tip has no derivative."""
    funnel = -20 * torch.exp(-0.2 * ((x**2 + y**2) / 2).sqrt())
    return funnel - torch.exp((torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)) / 2) + math.e + 20


def beale(x: Tensor, y: Tensor) -> Tensor:
    """Flat, with steep corners."""
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def booth(x: Tensor, y: Tensor) -> Tensor:
    """A quadratic."""
    return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2


def bukin(x: Tensor, y: Tensor) -> Tensor:
    """The sixth: a ravine, without a derivative along it."""
    return 100 * (y - 0.01 * x**2).abs().sqrt() + 0.01 * (x + 10).abs()


def mccormick(x: Tensor, y: Tensor) -> Tensor:
    """A sine on a parabola."""
    return torch.sin(x + y) + (x - y) ** 2 - 1.5 * x + 2.5 * y + 1


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """A curved valley."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


# With the domains that they are usually given: of x, and of y.
FUNCTIONS: dict[str, tuple[Function, tuple[float, float], tuple[float, float]]] = {
    "styblinski_tang": (styblinski_tang, (-5.0, 5.0), (-5.0, 5.0)),
    "ackley": (ackley, (-5.0, 5.0), (-5.0, 5.0)),
    "beale": (beale, (-4.5, 4.5), (-4.5, 4.5)),
    "booth": (booth, (-10.0, 10.0), (-10.0, 10.0)),
    "bukin": (bukin, (-15.0, -5.0), (-3.0, 3.0)),
    "mccormick": (mccormick, (-1.5, 4.0), (-3.0, 4.0)),
    "rosenbrock": (rosenbrock, (-2.0, 2.0), (-1.0, 3.0)),
}
POINTS, HELD = 20, 2000


def plain_values(points: Tensor) -> Tensor:
    """Of every function at points of its own, `[7, N, 2]` in [−1, 1]²; `[7, N]`."""
    found = []
    for (function, (left, right), (low, high)), at in zip(FUNCTIONS.values(), points, strict=True):
        x = left + (right - left) * (at[:, 0] + 1) / 2
        y = low + (high - low) * (at[:, 1] + 1) / 2
        found.append(function(x, y))
    return torch.stack(found)


@lru_cache(maxsize=1)
def _scale() -> tuple[Tensor, Tensor]:
    """Mean and deviation of each over its domain."""
    line = (torch.arange(200) + 0.5) / 100 - 1
    found = plain_values(torch.cartesian_prod(line, line).expand(len(FUNCTIONS), -1, -1))
    return found.mean(1, keepdim=True), found.std(1, keepdim=True)


def scaled_values(points: Tensor) -> Tensor:
    """The same, of mean 0 and deviation 1 over each domain."""
    mean, deviation = _scale()
    return (plain_values(points) - mean) / deviation


def rows_of(each: Callable[[Tensor], Tensor], inputs: Tensor, apart: bool) -> Tensor:
    """All functions as one of rows: of `[7 · N, 2]`, if apart, `[7 · N, 1]`; else of `[N, 2]` `[N, 7]`.

    Apart, a row is a point of one function, those of the first before those of the second, and derivatives
    are one backward pass; else seven.
    """
    if apart:
        return each(inputs.view(len(FUNCTIONS), -1, 2)).reshape(-1, 1)
    return each(inputs.expand(len(FUNCTIONS), -1, -1)).T


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _square(count: int, seed: int) -> Tensor:
    """Points of [−1, 1]², drawn uniformly."""
    return 2 * torch.rand(count, 2, generator=_generator(seed)) - 1


class Nets(nn.Module):
    """A net for each function, 2-32-32-1 with tanh.

    Args:
        apart: How they are one, as `rows_of` has it.
    """

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart, self.weights, self.biases = apart, nn.ParameterList(), nn.ParameterList()
        for wide, out in ((2, 32), (32, 32), (32, 1)):
            each = [nn.Linear(wide, out) for _ in FUNCTIONS]
            self.weights.append(torch.stack([one.weight.detach().T for one in each]))
            self.biases.append(torch.stack([one.bias.detach()[None] for one in each]))

    def each(self, x: Tensor) -> Tensor:
        """Of points `[7, N, 2]`, `[7, N]`."""
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.tanh() if n else x, weight)
        return x[..., 0]

    def forward(self, inputs: Tensor) -> Tensor:
        """As one."""
        return rows_of(self.each, inputs, self.apart)


def regress(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, times: int = 1,
    **options: Any,
) -> Metrics:  # fmt: skip
    """Nets of few points of seven functions; −log₁₀ of each one's RMSE in deviations, and their mean."""
    # A draw of an only output is no draw.
    apart = options.get("projections") is None
    points = _square(POINTS * times, seed)
    student = seeded(seed, lambda: Nets(apart))
    torch.manual_seed(seed)

    def teacher(batch: Any) -> Tensor:
        return rows_of(scaled_values, batch["inputs"], apart)

    made = getattr(recipes, recipe)(student, teacher, optimizer=adamw(lr, weight_decay), **options)
    ended = carried_out(made, [points.repeat(len(FUNCTIONS), 1) if apart else points], steps)
    held = _square(HELD, 999_983 + is_test(seed)).expand(len(FUNCTIONS), -1, -1)
    with torch.no_grad():
        off = (student.each(held) - scaled_values(held)).pow(2).mean(1).sqrt()
    found = dict(zip(FUNCTIONS, (-off.log10()).tolist(), strict=True))
    return {**found, "minus_log_rmse": sum(found.values()) / len(found), **ended}


# A pendulum, θ from the top, that has to be swung up with little force

TORQUES = (-1.0, 0.0, 1.0)
SPEED, TICK, DISCOUNT = 6.0, 0.1, 0.97
GRID = 41
LENGTH, STARTS = 120, 64


def moved(states: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Where states (θ, ω) `[N, 2]` go under actions `[N]`, and what that costs."""
    theta, speed = states.unbind(1)
    torque = torch.tensor(TORQUES)[action]
    cost = 1 - theta.cos() + 0.01 * speed**2
    speed = (speed + TICK * (3 * theta.sin() + torque)).clamp(-SPEED, SPEED)
    theta = (theta + TICK * speed + math.pi) % (2 * math.pi) - math.pi
    return torch.stack([theta, speed], 1), cost


@lru_cache(maxsize=1)
def best_values() -> Tensor:
    """Costs to go on a grid of (θ, ω), by value iteration; `[1, 1, θ, ω]`, θ once around."""
    theta = torch.linspace(-math.pi, math.pi, GRID)
    states = torch.cartesian_prod(theta, torch.linspace(-SPEED, SPEED, GRID))
    ahead = [moved(states, torch.full((len(states),), a)) for a in range(len(TORQUES))]
    found = torch.zeros(1, 1, GRID, GRID)
    for _ in range(300):
        costs = [cost + DISCOUNT * _interpolated(found, to) for to, cost in ahead]
        found = torch.stack(costs).amin(0).view(1, 1, GRID, GRID)
    return found


def _interpolated(grid: Tensor, states: Tensor) -> Tensor:
    at = torch.stack([states[:, 1] / SPEED, states[:, 0] / math.pi], 1)[None, None]  # ω along the last axis
    return F.grid_sample(grid, at, align_corners=True, padding_mode="border")[0, 0, 0]


def best_actions(states: Tensor) -> Tensor:
    """What value iteration does."""
    each = []
    for a in range(len(TORQUES)):
        to, cost = moved(states, torch.full((len(states),), a))
        each.append(cost + DISCOUNT * _interpolated(best_values(), to))
    return torch.stack(each, 1).argmin(1)


def seen(states: Tensor) -> Tensor:
    """What a policy is given of them, `[N, 3]`."""
    return torch.stack([states[:, 0].cos(), states[:, 0].sin(), states[:, 1] / SPEED], 1)


def states_of(count: int, seed: int) -> Tensor:
    """Drawn uniformly."""
    return _square(count, seed) * torch.tensor([math.pi, SPEED])


def policy(width: int) -> nn.Sequential:
    """Logits of the torques."""
    return nn.Sequential(
        nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def policy_teacher(lab: Lab, seed: int) -> nn.Module:
    """A net that does what value iteration does, in 2,000 steps."""

    def make() -> nn.Module:
        net = seeded(seed + 1000, lambda: policy(64))
        steps, optimizer = lab.steps(2000), torch.optim.Adam(net.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        states = states_of(20_000, seed + 1000)
        best = best_actions(states)
        for part in torch.randint(len(states), (steps, 256), generator=_generator(seed)):
            optimizer.zero_grad()
            F.cross_entropy(net(seen(states[part])), best[part]).backward()
            optimizer.step()
            schedule.step()
        return net.eval()

    return lab.teacher("pendulum", seed, make)


@torch.no_grad()
def returned(net: nn.Module, starts: Tensor) -> float:
    """What a policy's most probable actions cost, from some states on, a tick, less than nothing."""
    states, total = starts, torch.zeros(len(starts))
    for _ in range(LENGTH):
        states, cost = moved(states, net(seen(states)).argmax(1))
        total -= cost
    return float(total.mean()) / LENGTH


def imitate(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, amount: int = 40,
    **options: Any,
) -> Metrics:  # fmt: skip
    """A policy of few states: −KL to its teacher's on others, and what it earns a tick."""
    teacher = policy_teacher(lab, seed)
    student = seeded(seed, lambda: policy(32))
    x = seen(states_of(amount, seed))
    torch.manual_seed(seed)
    optimizer = adamw(lr, weight_decay)
    made = getattr(recipes, recipe)(student, teacher, of="log_probs", optimizer=optimizer, **options)
    ended = carried_out(made, [x], steps)
    held = states_of(HELD, 999_985 + is_test(seed))
    with torch.no_grad():
        lq, lp = (net(seen(held)).log_softmax(1) for net in (student, teacher))
    found = {"minus_kl": -float((lp.exp() * (lp - lq)).sum(1).mean())}
    for prefix, net in (("", student), ("teacher_", teacher)):
        found[f"{prefix}return"] = returned(net, held[:STARTS])
    return {**found, **ended}


FITS: dict[str, Callable[..., Metrics]] = {"regress": regress, "imitate": imitate}


def _arms(weights: tuple[float, ...], times: Options, says: str) -> dict[str, Arm]:
    """Values, derivatives in full and along drawn directions, and values of more points."""
    without: Options = {"recipe": "sobolev", "derivative_weight": 0.0}
    grid = over(lr=RATES, derivative_weight=weights)
    return {
        "values": Arm("values", without, HARD),
        "exact": Arm("values and derivatives", {"recipe": "sobolev"}, grid),
        "projected": Arm("values and one projection", {"recipe": "sobolev", "projections": 1}, grid),
        "more": Arm(says, {**without, **times}, HARD),
    }


EXPERIMENTS: dict[str, Experiment] = {
    "functions": Experiment(
        "sobolev",
        "regress",
        "20 points of each of seven functions of the plane, inputs and values standardised; nets 2-32-32-1 "
        "with tanh; the teacher is the function; −log₁₀ of the RMSE, the mean over functions; projections "
        "are of the seven outputs together",
        600,
        _arms((1.0, 0.1), {"times": 3}, "values of 60 points"),
        tuned_on="minus_log_rmse",
        shown="minus_log_rmse",
    ),
    "pendulum": Experiment(
        "sobolev",
        "imitate",
        "40 states of a pendulum that is swung up by one of three torques; the teacher 3-64-64-3 is fitted "
        "to value iteration's policy, the student is 3-32-32-3 with tanh; KL, and derivatives of log "
        "probabilities; −KL on other states",
        400,
        _arms((0.01, 0.1), {"amount": 160}, "values of 160 states"),
        tuned_on="minus_kl",
        shown="minus_kl",
    ),
}

_TITLES = {
    "styblinski_tang": "Styblinski–Tang", "ackley": "Ackley", "beale": "Beale", "booth": "Booth",
    "bukin": "Bukin 6", "mccormick": "McCormick", "rosenbrock": "Rosenbrock",
}  # fmt: skip

CLAIMS: dict[str, Claim] = {
    **{
        f"sobolev.{name}": Claim(
            f"A function's derivatives beside its values beat values alone: {title}.",
            "functions", "exact", "values", name, plan=2,
        )
        for name, title in _TITLES.items()
    },
    "sobolev.projected": Claim(
        "One projection of the derivatives beats values alone, on average over functions.",
        "functions", "projected", "values", "minus_log_rmse", plan=2,
    ),
    "sobolev.more": Claim(
        "In two dimensions, derivatives beat as many numbers in values: three times the points.",
        "functions", "exact", "more", "minus_log_rmse", plan=2,
    ),
    "sobolev.policy": Claim(
        "Derivatives of a policy beat its values alone (−KL on other states).",
        "pendulum", "exact", "values", "minus_kl", plan=2,
    ),
    "sobolev.policy_projected": Claim(
        "One projection of them does, too.", "pendulum", "projected", "values", "minus_kl", plan=2
    ),
    "sobolev.policy_more": Claim(
        "Derivatives of a policy beat its values at four times the states.",
        "pendulum", "exact", "more", "minus_kl", plan=2,
    ),
    "sobolev.policy_return": Claim(
        "A policy that learns derivatives earns more.", "pendulum", "exact", "values", "return", plan=2
    ),
}  # fmt: skip
