"""The C functions of the CPU library, called with anything that Python may hand them.

`test_sanitized.py` runs these again where a read or a write outside of a tensor ends the process.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import why_not
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DIVERGENCES, DTYPES
from torch import Tensor
from truth import Options

import kdkernels as kd
from kdkernels import noise
from kdkernels.backends import cpu
from kdkernels.divergences import TABLE
from kdkernels.reference import counted_rows
from kdkernels.stored import sparse

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason=str(why_not("cpu")))

SIZES = st.integers(1, 40) | st.sampled_from([1023, 1024, 1025, 2500])
SEEDS = st.integers(-(2**63), 2**63 - 1)


def random(seed: int, *shape: int) -> Tensor:
    """Normals."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed & 0xFFFF))


@given(st.integers(0, 5), SIZES, st.sampled_from(DTYPES), st.booleans(), st.booleans(), SEEDS)
def test_scaling_of_any_gradient(
    rows: int, classes: int, dtype: torch.dtype, by_row: bool, in_place: bool, seed: int
) -> None:
    gradient = random(seed, rows, classes).to(dtype)
    gradient[:, ::3] = 0
    computed = torch.float64 if dtype is torch.float64 else torch.float32
    upstream = random(seed + 1, rows).to(computed) if by_row else random(seed + 1).to(computed)
    factor = upstream.unsqueeze(-1) if by_row else upstream
    expected = (gradient.to(computed) * factor).to(dtype)
    got = cpu.BACKEND.scale(gradient, upstream, in_place)
    assert (got.data_ptr() == gradient.data_ptr()) == in_place or not gradient.numel()
    assert torch.equal(got, torch.where(expected == 0, 0.0, expected))


@given(st.sampled_from(DIVERGENCES), st.integers(0, 70), SEEDS)
def test_a_pair_at_any_probabilities(divergence: object, count: int, seed: int) -> None:
    name, params = Options(divergence).row
    row = TABLE[name]
    lq, lp = (-random(seed + i, count).abs().double() * 5 for i in (0, 1))
    phi, g = cpu.BACKEND.pointwise(name, params, lq, lp)
    for got, expression in ((phi, row.phi), (g, row.g)):
        expected = expression(lq, lp, *params)
        size = lq.exp() + lp.exp() + expected.abs() if row.normaliser == "softmax" else 1 + expected.abs()
        assert ((got - expected).abs() <= 1e-12 * size).all()


@given(SEEDS, st.integers(0, 2**53), st.integers(0, 300), st.sampled_from([0, 1, 2, 7, 2**31]))
def test_the_words_of_any_row(seed: int, first: int, classes: int, stream: int) -> None:
    rows = torch.tensor([first, first + 1])
    groups = torch.arange((classes + 3) // 4)
    expected = torch.stack(noise.words(torch.tensor(seed), rows, groups, stream), -1).flatten(1)[:, :classes]
    assert torch.equal(cpu.BACKEND.words(seed, rows, classes, stream), expected)


@given(
    st.integers(0, 4),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from(["ghost", "zero", "renormalize"]),
    SEEDS,
)
def test_any_stored_rows_are_prepared_as_the_reference_does(
    rows: int, k: int, sampled: bool, tail: str, seed: int
) -> None:
    """Ids in any order, some twice, some of them padding, some rows that don't count."""
    classes, generator = 90, np.random.default_rng(seed & 0xFFFF)
    ids = torch.from_numpy(generator.integers(-1, classes, (rows, k)))
    counted = torch.from_numpy(generator.random(rows) < 0.8)
    lp = random(seed, rows, classes).double().log_softmax(-1)
    values = torch.where(ids >= 0, lp.gather(-1, ids.clamp(min=0)), 0.0)
    weights = torch.where(ids >= 0, 1.0 / k, 0.0).double()
    stored = kd.Sampled(ids, weights, values) if sampled else kd.TopK(ids, values, tail)  # type: ignore[arg-type]
    given_ = counted, classes, torch.float64, True
    expected = sparse(stored, 1.0, *given_)
    got = cpu.BACKEND.store(stored, 1.0, *given_)
    assert got is not None
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            x, y = x[counted], y[counted]
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, equal_nan=True)


@given(st.integers(0, 4), SIZES, st.sampled_from(DTYPES), st.sampled_from([1, 2, 3]), SEEDS)
def test_the_sums_of_shards_make_those_of_whole_rows(
    rows: int, classes: int, dtype: torch.dtype, stride: int, seed: int
) -> None:
    """Of any strides; a shard may have no class."""
    from kdkernels.functional import checked_call, complete

    z, v = (random(seed + i, rows, stride * classes).to(dtype)[:, ::stride] for i in (0, 1))
    cut = (seed & 0xFF) % (classes + 1)

    def sums(part: slice) -> Tensor:
        call = checked_call(z, v, None, complete({"divergence": kd.JSD(0.3), "temperature": 2.0}), False)
        call = call._replace(student=z[:, part], teachers=(v[:, part],), classes=z[:, part].shape[1])
        assert counted_rows(call).all()
        return cpu.BACKEND.shard_sums(call)

    names = cpu.SHARD_NUMBERS.index
    whole, *parts = (sums(part) for part in (slice(None), slice(0, cut), slice(cut, None)))
    for side in ("z", "v"):
        ref, mass = names(f"{side}_ref"), names(f"{side}_sum")

        def total(x: Tensor, ref: int = ref, mass: int = mass) -> Tensor:
            return torch.where(x[:, mass] == 0, 0.0, x[:, ref].exp() * x[:, mass])

        torch.testing.assert_close(total(whole), sum(map(total, parts)), rtol=1e-5, atol=0.0)
