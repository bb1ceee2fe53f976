"""What only the Triton kernels have: builds for GPUs that aren't here, and closed forms beside the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.divergences import TABLE

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("name", [name for name, d in TABLE.items() if d.closed is not None])
def test_closed_forms_are_the_sums_of_the_table(name: str) -> None:
    """D and the sum of g from one weighted sum and two log-sum-exps, against the expressions, in fp64."""
    y, u = (3 * torch.randn(7, 50, dtype=torch.float64) for _ in range(2))
    lq, lp = y.log_softmax(-1), u.log_softmax(-1)
    divergence = TABLE[name]
    c = divergence.closed
    assert c is not None
    own, other, weights = (u, y, lp.exp()) if c.teacher_weighs else (y, u, lq.exp())
    D = (weights * (c.a * own + c.b * other)).sum(-1) - c.a * own.logsumexp(-1) - c.b * other.logsumexp(-1)
    torch.testing.assert_close(D, divergence.phi(lq, lp).sum(-1), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        c.sum_g + c.sum_g_per_d * D, divergence.g(lq, lp).sum(-1), rtol=1e-12, atol=1e-13
    )


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_builds_for_gpus_that_are_not_here(target: str) -> None:
    """Nothing spills, and 16 bytes a thread are loaded and stored, whatever the divergence."""
    script = Path(__file__).parent / "triton_offline.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), target], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    builds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(builds) == 4 * len(TABLE)
    for build in builds:
        assert build["spills"] == 0, build
        assert build["registers"] <= 255, build
        assert build["wide_accesses"] == 2, build  # of both kinds: loads and stores


@needs_triton
def test_interpreted_kernels_run_only_where_they_are_named() -> None:
    """`backend=None` on a CPU is never the interpreter, which is thousands of times slower."""
    explained = kd.explain(torch.zeros(2, 3), torch.zeros(2, 3))
    assert explained.reasons["triton"] is None and explained.backend != "triton"


def test_triton_is_not_imported_with_the_package() -> None:
    """Importing it takes longer than all the rest."""
    code = "import sys, kdkernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
