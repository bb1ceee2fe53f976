"""The table of divergences, entry by entry: phi against its definition, g against autograd of phi, C++
against Python."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, log

import pytest
import torch
from torch import Tensor

from kdkernels.divergences import JSD, TABLE

PARAMS: dict[str, list[tuple[float, ...]]] = {"jsd": [(0.1,), (0.5,), (0.9,), (1e-3,), (0.999,)]}
ENTRIES = [(name, params) for name in sorted(TABLE) for params in PARAMS.get(name, [()])]

# Log-probabilities: certain, near it, ordinary, tiny, below fp64's smallest, impossible.
FINITE = [0.0, -1e-12, -1e-3, -0.1, -log(2), -1.0, -3.3, -10.0, -37.0, -100.0, -700.0, -800.0, -2e4]
FINITE_PAIRS = torch.cartesian_prod(*[torch.tensor(FINITE, dtype=torch.float64)] * 2).unbind(-1)
ALL_PAIRS = torch.cartesian_prod(*[torch.tensor([*FINITE, -inf], dtype=torch.float64)] * 2).unbind(-1)


def limits(name: str, params: tuple[float, ...]) -> Iterator[tuple[float, float, float]]:
    """(lq, lp, phi) where one side or both are impossible, by hand."""
    lq = lp = log(0.25)
    yield -inf, -inf, 0.0
    if name == "forward_kl":
        yield from ((-inf, lp, inf), (lq, -inf, 0.0))
    elif name == "soft_cross_entropy":
        yield from ((-inf, lp, inf), (lq, -inf, 0.0), (-inf, 0.0, inf))
    elif name == "reverse_kl":
        yield from ((-inf, lp, 0.0), (lq, -inf, inf))
    elif name == "jsd":
        (beta,) = params
        yield from ((-inf, lp, -beta * 0.25 * log(beta)), (lq, -inf, -(1 - beta) * 0.25 * log(1 - beta)))
    else:
        raise AssertionError(f"{name} has no limits here: write them down")


def definition(name: str, params: tuple[float, ...], lq: Tensor, lp: Tensor) -> Tensor:
    """phi from probabilities, as a textbook has it; for ordinary probabilities only."""
    q, p = lq.exp(), lp.exp()
    if name == "forward_kl":
        return p * (p / q).log()
    if name == "soft_cross_entropy":
        return -p * q.log()
    if name == "reverse_kl":
        return q * (q / p).log()
    (beta,) = params
    m = beta * p + (1 - beta) * q
    return beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()


def assert_error_within(got: Tensor, expected: Tensor, allowed: Tensor, lq: Tensor, lp: Tensor) -> None:
    """Element by element; the worst one is shown."""
    over = ((got - expected).abs() / (allowed + 1e-300)).nan_to_num(inf)
    at = int(over.argmax())
    assert over[at] <= 1, (
        f"{int((over > 1).sum())} of {over.numel()} wrong; at lq = {lq[at]:.17g}, lp = {lp[at]:.17g} "
        f"got {got[at]:.17g}, expected {expected[at]:.17g}, error / allowed = {over[at]:.3g}"
    )


def test_the_table_holds_the_logits_divergences() -> None:
    """Four names, each with the parameters it says it has."""
    assert {"forward_kl", "soft_cross_entropy", "reverse_kl", "jsd"} <= set(TABLE)
    for name, entry in TABLE.items():
        assert len(entry.params) == len(PARAMS.get(name, [()])[0])
    assert JSD(0.3).params == (0.3,)


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_phi_is_its_definition(name: str, params: tuple[float, ...]) -> None:
    """To 1e-14 of the terms it is made of."""
    lq, lp = torch.cartesian_prod(
        *[torch.tensor([-1e-3, -0.1, -1.0, -3.3, -10.0], dtype=torch.float64)] * 2
    ).unbind(-1)
    expected = definition(name, params, lq, lp)
    size = (lq.exp() + lp.exp()) * (1 + lq.abs() + lp.abs())
    assert_error_within(TABLE[name].phi(lq, lp, *params), expected, 1e-14 * size, lq, lp)


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_phi_at_impossible_classes(name: str, params: tuple[float, ...]) -> None:
    """0 · (−inf) is NaN unless somebody thought of it."""
    for lq, lp, expected in limits(name, params):
        got = TABLE[name].phi(
            torch.tensor([lq], dtype=torch.float64), torch.tensor([lp], dtype=torch.float64), *params
        )
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_g_is_the_derivative_of_phi(name: str, params: tuple[float, ...]) -> None:
    """dphi/dlq by autograd, over thirteen decades of probability on either side."""
    lq, lp = FINITE_PAIRS[0].clone().requires_grad_(), FINITE_PAIRS[1]
    (expected,) = torch.autograd.grad(TABLE[name].phi(lq, lp, *params).sum(), lq)
    got = TABLE[name].g(lq.detach(), lp, *params)
    # q·(1 + |lq - lp|) and p are the sizes of the terms; where they cancel (p near q), their rounding is what
    # is left.
    size = lq.detach().exp() * (1 + (lq.detach() - lp).abs()) + lp.exp()
    assert_error_within(got, expected, 1e-14 * size, lq.detach(), lp)


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_g_is_the_derivative_of_the_definition(name: str, params: tuple[float, ...]) -> None:
    """Central differences of the textbook's phi: no code shared."""
    lq, lp = torch.cartesian_prod(*[torch.tensor([-0.1, -1.0, -3.3], dtype=torch.float64)] * 2).unbind(-1)
    h = 1e-5
    numeric = (definition(name, params, lq + h, lp) - definition(name, params, lq - h, lp)) / (2 * h)
    torch.testing.assert_close(TABLE[name].g(lq, lp, *params), numeric, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_impossible_on_both_sides_adds_nothing(name: str, params: tuple[float, ...]) -> None:
    """To Σphi and to Σg."""
    impossible = torch.tensor([-inf], dtype=torch.float64)
    assert TABLE[name].phi(impossible, impossible, *params).item() == 0
    assert TABLE[name].g(impossible, impossible, *params).item() == 0


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_nan_is_not_hidden(name: str, params: tuple[float, ...]) -> None:
    """A guard against 0 · inf must not swallow a real NaN."""
    ok, bad = torch.tensor([-1.0]).double(), torch.tensor([torch.nan]).double()
    for lq, lp in ((bad, ok), (ok, bad), (bad, bad)):
        assert TABLE[name].phi(lq, lp, *params).isnan().all()


@pytest.mark.parametrize(("name", "params"), ENTRIES)
def test_cpp_is_python_pointwise(name: str, params: tuple[float, ...]) -> None:
    """Two spellings of each formula, pinned to each other in fp64 over a grid with zeros and infinities."""
    from kdkernels.backends.cpu import BACKEND

    lq, lp = (x.contiguous() for x in ALL_PAIRS)
    phi, g = BACKEND.pointwise(name, params, lq, lp)
    for cpp, python in ((phi, TABLE[name].phi(lq, lp, *params)), (g, TABLE[name].g(lq, lp, *params))):
        finite = python.isfinite()
        assert torch.equal(cpp[~finite].nan_to_num(nan=7.0), python[~finite].nan_to_num(nan=7.0))
        size = (lq.exp() + lp.exp()) * (1 + sum(x.abs().nan_to_num(0, 0, 0) for x in (lq, lq - lp)))
        assert_error_within(cpp[finite], python[finite], 4e-15 * size[finite], lq[finite], lp[finite])
