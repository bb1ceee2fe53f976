"""The kernel of stored teachers, run on a processor: every divergence, tail and option, held to fp64.

The truth is the reference backend in float64, which `test_sparse.py` pins to closed forms; the budget is that
of `tolerances.py`, with what one rounding may cost found by autograd.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from cuda_on_cpu import Launches, Split, cuda_on_cpu
from cuda_shim import CUDA, LaunchError, why_not
from test_cuda_rows import THREADS, laid_out, noise
from tolerances import assert_close
from torch import Tensor

import kdkernels as kd
from kdkernels import reference
from kdkernels.backends.cuda_build import NO_DIVERGENCE, STORED, Build
from kdkernels.functional import checked_call, complete

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# One of each template of divergence.h that a distribution has.
DIVERGENCES: tuple[Any, ...] = (
    "forward_kl", "soft_cross_entropy", "reverse_kl", kd.JSD(0.3), kd.SkewKL(0.1), kd.SkewReverseKL(0.3),
    "tvd", "squared_error", kd.AlphaBeta(0.2, 0.7), kd.AlphaBeta(0.5, 0.0), kd.AlphaBeta(0.5, -0.5),
)  # fmt: skip
TAILS = ("ghost", "zero", "renormalize")
HARD = ("none", "shared", "own")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Case(NamedTuple):
    """What is built, as far as all calls of a test have it in common."""

    divergence: Any
    hard: str
    dtype: torch.dtype
    cluster: int
    layout: str


def shown(value: Any) -> str:
    """What pytest says of it."""
    if isinstance(value, Case):
        return "-".join(str(x) for x in value).replace(" ", "_")
    return "+".join(value) if isinstance(value, dict) else str(value)


# ------------------------------------------------------------------------------------------------ the budget


def units_of(z: Tensor, teacher: Any, labels: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What one rounding of each intermediate may cost, in units of eps: of each row's loss, and gradient.

    Logarithms are off by a rounding of the largest logit and of each sum; what that does to phi and g is their
    derivatives.
    """
    call = checked_call(z, teacher, labels, complete(options), False)
    spec, stored, T = call.spec, call.sparse, call.spec.temperature
    assert stored is not None
    rows = reference.counted_rows(call)
    post = (spec.student_scale, spec.student_softcap)
    x = reference._logits(call.student.detach(), rows, call.classes, torch.float64, post)
    x = reference._noised(x, spec.student_noise, call.student_seed, reference.STUDENT)
    y = x / T
    there, V = stored.ids >= 0, y.shape[-1]
    columns = torch.where(there, stored.ids, V)
    padded = torch.nn.functional.pad(y, (0, 1), value=-torch.inf)
    kept, rest = padded.gather(-1, columns), padded.scatter(-1, columns, -torch.inf)[..., :V]
    q = torch.log_softmax(y, -1).exp().nan_to_num()
    lse_rest = rest.logsumexp(-1, keepdim=True)
    if stored.rest is None:
        lq, lp = kept - kept.logsumexp(-1, keepdim=True), stored.log_p
    else:
        lq = torch.cat([kept, lse_rest], -1) - y.logsumexp(-1, keepdim=True)
        lp = torch.cat([stored.log_p, stored.rest.unsqueeze(-1)], -1)
    roundings = 4 + torch.tensor(float(V)).log2() + sum(
        t.masked_fill(~t.isfinite(), 0.0).abs().amax(-1) for t in (y, lp)
    )
    lq, lp = (t.detach().clamp(min=-1e4).requires_grad_() for t in (lq, lp))
    phi = spec.row.phi(lq, lp, *spec.params)
    g, of_lp = torch.autograd.grad(phi.sum(), (lq, lp), create_graph=True)
    if g.requires_grad:
        more = torch.autograd.grad(g.sum(), (lq, lp), allow_unused=True)
        bends = sum(t.abs().nan_to_num() for t in more if t is not None)
    else:
        bends = torch.zeros_like(g)
    phi, g, of_lp = (t.detach().abs().nan_to_num(0.0, 0.0, 0.0) for t in (phi, g, of_lp))
    soft = abs(spec.soft_weight * spec.t_factor)
    loss_unit = soft * roundings * (phi + g + of_lp).sum(-1)
    each = g + bends + lq.detach().exp() * g.sum(-1, keepdim=True)
    k = stored.ids.shape[-1]
    grad_unit = torch.zeros_like(padded).scatter(-1, columns, each[..., :k])[..., :V]
    if stored.rest is not None:
        of_rest = (g + bends)[..., k:] * (rest - lse_rest).exp().nan_to_num()
        grad_unit = grad_unit + torch.where(rest == -torch.inf, 0.0, of_rest + q * (g + bends).sum(-1, keepdim=True))
    grad_unit = soft / T * roundings.unsqueeze(-1) * grad_unit
    if labels is not None and spec.hard_weight:
        at = labels.masked_fill((labels < 0) | (labels >= V), 0).unsqueeze(-1)
        bits = (4 + torch.tensor(float(V)).log2() + x.masked_fill(~x.isfinite(), 0.0).abs().amax(-1)) * abs(
            spec.hard_weight
        )
        loss_unit = loss_unit + bits
        one = torch.log_softmax(x, -1).exp().nan_to_num()
        grad_unit = grad_unit + bits.unsqueeze(-1) * one.scatter_add(-1, at, torch.ones_like(at).double())
    weights = 1.0 if call.token_weights is None else call.token_weights.double().abs()
    return loss_unit * weights, grad_unit * (weights if isinstance(weights, float) else weights.unsqueeze(-1))


def run(
    z: Any, teacher: Any, labels: Tensor | None, options: dict[str, Any], backend: str, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of rows, and the gradient with respect to the raw logits."""
    leaf = z.detach().requires_grad_()
    scale, cap = options.get("student_scale", 1.0), options.get("student_softcap")
    rest = {k: v for k, v in options.items() if k not in ("student_scale", "student_softcap")}
    student = kd.Logits(leaf, scale=scale, softcap=cap) if (scale, cap) != (1.0, None) else leaf
    loss = kd.kd_loss(student, teacher, labels, backend=backend, reduction="none", **rest)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach(), gradient


def check(
    z: Tensor,
    teacher: Any,
    labels: Tensor | None,
    options: dict[str, Any],
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A call, forward and backward, held to the budget."""
    upstream = torch.ones(z.shape[:-1]) if upstream is None else upstream
    loss, gradient = run(z, teacher, labels, options, "cuda", upstream)
    assert loss.dtype == torch.float32 and gradient.dtype == z.dtype
    double = teacher.to(torch.float64)
    exact = run(z.double(), double, labels, options, "reference", upstream)
    eager = run(z, teacher, labels, options, "reference", upstream)
    scale, cap = options.get("student_scale", 1.0), options.get("student_softcap")
    rest = {k: v for k, v in options.items() if k not in ("student_scale", "student_softcap")}
    units = units_of(kd.Logits(z.double(), scale=scale, softcap=cap), double, labels, rest)  # type: ignore[arg-type]
    factor = upstream.double()
    if scale != 1.0:
        units = units[0], units[1] * abs(scale)
    eps = torch.finfo(torch.float32).eps
    assert_close("loss", loss, eager[0], exact[0], units[0], eps)
    assert_close("gradient", gradient, eager[1], exact[1], units[1] * factor.abs().unsqueeze(-1), eps)
    return loss, gradient
