"""One distribution from a generalist's and its specialists', which know some classes each and a rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["newton", "fixed_point", "gradient", "closed_form"]
# Of a group of classes that nobody gives anything to but a rest: where that must go there, d = b / q is tiny,
# and in fp64 it is the difference of numbers near 1. No other probability moves by more than about this.
_FLOOR = 1e-13
_ITERATIONS: dict[str, int] = {"newton": 200, "fixed_point": 10_000, "gradient": 100_000, "closed_form": 1}
# What of [rows, classes] is worked on at once: some MB, which a CPU has in its cache.
_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


class Combined(NamedTuple):
    """What `combine_with_stats` found.

    Attributes:
        probabilities: q `[N, V]`, float64.
        iterations: Those of every row, `[N]`; 0 where the closed form was enough.
        residual: Σ_k |gradient_k| of every row, `[N]`, as `combination_gradient` has it.
    """

    probabilities: Tensor
    iterations: Tensor
    residual: Tensor


class _Problem(NamedTuple):
    generalist: Tensor  # [N, V]
    classes: list[Tensor]
    specialists: list[Tensor]  # [N, |S| + 1]
    active: Tensor  # [N, M]


def combine(
    generalist: Tensor,
    specialists: Sequence[tuple[Any, Tensor]],
    active: Tensor | None = None,
    method: Method = "newton",
    tolerance: float = 1e-10,
    iterations: int | None = None,
) -> Tensor:
    """The distribution that is nearest to a generalist's and to those of the specialists that are active.

    Formula: q = argmin KL(p‖q) + Σ_{m∈A} KL(p_m‖q_m), where q_m has q of the classes S_m, and of all others
    the sum. The gradient with respect to the logits of q is (1 + |A|) · q − p − Σ_m r_m, with r_mk = p_mk of
    its classes, else p_m,rest · q_k / Σ_{j∉S_m} q_j.

    At the optimum, classes that the same active specialists own have the proportions of
    b_k = p_k + Σ_{m∈A, k∈S_m} p_mk, so that what is solved for is the mass of every such group. `newton`
    solves q_g · (1 + |A| − Σ_{m∌g} c_m) = b_g, c_m · Σ_{g∌m} q_g = p_m,rest as interior-point methods do,
    a linear system of the size of |A| for every row; it takes about 5 iterations, tens where they contradict
    each other. `fixed_point` repeats q ← (p + Σ r_m) / (1 + |A|) on the masses, `gradient` descends in the
    logits of all classes: both are for comparison. Rows with at most one active specialist have a closed
    form, which `newton` uses: the mean of both on its classes, and outside as the generalist says, with the
    mean of both masses. All is computed in float64.

    Where there is a choice, since a mass has to go to classes to which nobody gives any, these share it
    evenly within their group.

    Args:
        generalist: p `[N, V]`, floating, probabilities.
        specialists: Of each its classes, distinct integers `[|S|]`, and its probabilities `[N, |S| + 1]`, of
            those classes in their order and of all others.
        active: bool `[N, M]`, which are asked for a row; None for all.
        method: See above; `closed_form` is an error where two are active.
        tolerance: Of the residual Σ_k |gradient_k|.
        iterations: The most; None for the method's: 200, 10,000 and 100,000.

    Returns:
        q `[N, V]`, float64.

    Raises:
        TypeError: Not floating, not integers, not bool.
        ValueError: Shapes that don't fit, classes that are no classes, numbers that are no probabilities.

    Warns:
        RuntimeWarning: Some rows did not converge.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5.4, equation 5.
    """
    return combine_with_stats(generalist, specialists, active, method, tolerance, iterations).probabilities


@torch.no_grad()
def combine_with_stats(
    generalist: Tensor,
    specialists: Sequence[tuple[Any, Tensor]],
    active: Tensor | None = None,
    method: Method = "newton",
    tolerance: float = 1e-10,
    iterations: int | None = None,
) -> Combined:
    """As `combine`, with iterations and residuals."""
    if method not in _ITERATIONS:
        raise ValueError(f"method must be one of {', '.join(_ITERATIONS)}, got {method!r}")
    given = _checked(generalist, specialists, active)
    most, asked = iterations or _ITERATIONS[method], given.active.sum(1)
    if method == "closed_form" and bool((asked > 1).any()):
        raise ValueError(
            f"closed_form takes at most one active specialist a row, got {int(asked.max())}; use newton"
        )
    q = given.generalist.clone()
    steps, residual = torch.zeros(len(q), dtype=torch.long, device=q.device), q.new_zeros(len(q))
    found = Combined(q, steps, residual)
    if method in ("newton", "closed_form"):
        for m in range(len(given.classes)):
            _closed_form(given, ((asked == 1) & given.active[:, m]).nonzero()[:, 0], m, q)
        left = asked > 1
    else:
        left = asked > 0
    if method == "gradient":
        _descend(given, left.nonzero()[:, 0], found, tolerance, most)
    elif method != "closed_form":
        for rows in _chunks(given, left.nonzero()[:, 0]):
            _reduced(given, rows, found, method, tolerance, most)
    # The floor is no failure to converge.
    bad = found.residual > tolerance + 100 * _FLOOR * (1 + len(given.classes))
    if bool(bad.any()):
        warnings.warn(
            f"{int(bad.sum())} of {len(q)} rows did not converge to {tolerance:g} within {most} iterations "
            f"of {method}: the residual is up to {float(found.residual.max()):.1e}",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def combination_gradient(
    q: Tensor, generalist: Tensor, specialists: Sequence[tuple[Any, Tensor]], active: Tensor | None = None
) -> Tensor:
    """Of what `combine` minimises, with respect to the logits of q: (1 + |A|) · q − p − Σ r_m.

    Args:
        q: `[N, V]`, probabilities.
        generalist: As of `combine`.
        specialists: Likewise.
        active: Likewise.

    Returns:
        The gradient `[N, V]`.
    """
    gradient = q - generalist
    for m, (classes, p) in enumerate(specialists):
        own, rest = torch.as_tensor(classes, device=q.device), p[:, -1:]
        outside = q.index_fill(1, own, 0.0)
        r = outside * torch.where(rest > 0, rest / outside.sum(1, keepdim=True), 0.0)
        each = q - r.index_copy(1, own, p[:, :-1])
        gradient += each if active is None else torch.where(active[:, m : m + 1], each, 0.0)
    return gradient


def _checked(
    generalist: Tensor, specialists: Sequence[tuple[Any, Tensor]], active: Tensor | None
) -> _Problem:
    """What was given, on one device, the generalist's in float64."""
    if generalist.dim() != 2 or not generalist.is_floating_point():
        raise ValueError(
            f"generalist must be probabilities [N, V], floating, got {generalist.dtype} "
            f"{tuple(generalist.shape)}; flatten leading dimensions"
        )
    n, v = generalist.shape
    owned, found = [], []
    for m, (classes, p) in enumerate(specialists):
        own = checked_classes(classes, v, f"classes of specialist {m}").to(generalist.device)
        if p.shape != (n, len(own) + 1):
            raise ValueError(
                f"probabilities of specialist {m} must be [{n}, {len(own) + 1}], of its {len(own)} classes "
                f"and of all others, got {tuple(p.shape)}"
            )
        found.append(_probabilities(p, f"probabilities of specialist {m}"))
        if len(own) == v and bool((p[:, -1] > 0).any()):
            raise ValueError(
                f"specialist {m} has all {v} classes, and gives others a probability that nothing can have"
            )
        owned.append(own)
    if active is None:
        active = torch.ones(n, len(owned), dtype=torch.bool, device=generalist.device)
    if active.dtype != torch.bool or active.shape != (n, len(owned)):
        raise ValueError(
            f"active must be bool [{n}, {len(owned)}], rows and specialists, got {active.dtype} "
            f"{tuple(active.shape)}"
        )
    return _Problem(
        _normalised(_probabilities(generalist, "generalist")), owned, found, active.to(generalist.device)
    )


def checked_classes(classes: Any, count: int, name: str) -> Tensor:
    """Distinct integers below a count, `[|S|]`.

    Raises:
        TypeError: Not integers.
        ValueError: None at all, one twice, or one out of range.
    """
    found = torch.as_tensor(classes)
    if found.numel() == 0 or found.dim() != 1:
        raise ValueError(f"{name} must be a list of at least one class, got shape {tuple(found.shape)}")
    if found.is_floating_point() or found.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {found.dtype}; of a mask, use mask.nonzero()[:, 0]")
    if int(found.min()) < 0 or int(found.max()) >= count:
        raise ValueError(
            f"{name} must be from 0 to {count - 1}, got {int(found.min())} to {int(found.max())}"
        )
    if len(found.unique()) < len(found):
        raise ValueError(f"{name} must be distinct, got {len(found) - len(found.unique())} twice")
    return found.long()


def _probabilities(p: Tensor, name: str) -> Tensor:
    """As they are."""
    sums = p.sum(1)
    if not bool((p >= 0).all() & ((sums - 1).abs() <= 1e-2).all()):
        raise ValueError(
            f"{name} must be >= 0 with rows that sum to 1, got a smallest of {float(p.min()):g} and sums "
            f"from {float(sums.min()):g} to {float(sums.max()):g}; of logits, use .softmax(-1)"
        )
    return p


def _normalised(p: Tensor) -> Tensor:
    """In float64, what rounding left taken out."""
    p = p.double()
    return p / p.sum(1, keepdim=True)


def _closed_form(given: _Problem, rows: Tensor, m: int, q: Tensor) -> None:
    """Rows whose only active specialist is m."""
    if not len(rows):
        return
    p, own = _normalised(given.specialists[m][rows]), given.classes[m]
    part = given.generalist[rows]
    outside = part.index_fill(1, own, 0.0)
    mass = outside.sum(1, keepdim=True)
    shared = outside / mass
    if bool((mass == 0).any()) and len(own) < part.shape[1]:
        even = torch.full_like(outside, 1 / (part.shape[1] - len(own))).index_fill(1, own, 0.0)
        shared = torch.where(mass > 0, shared, even)
    found = torch.nan_to_num(shared) * (mass + p[:, -1:]) / 2
    q[rows] = found.index_copy_(1, own, (part.index_select(1, own) + p[:, :-1]) / 2)


def _chunks(given: _Problem, rows: Tensor) -> Iterator[Tensor]:
    """Rows with the same active specialists together, few of which make few groups of classes."""
    if not len(rows):
        return
    size = max(1, _ELEMENTS.get(rows.device.type, 2**18) // given.generalist.shape[1])
    which, counts = given.active[rows].unique(dim=0, return_inverse=True, return_counts=True)[1:]
    rows, begin, end = rows[which.argsort(stable=True)], 0, 0
    for count in counts.tolist():
        if count > size // 4:  # enough for chunks of their own
            yield from rows[begin:end].split(size)
            yield from rows[end : end + count].split(size)
            begin = end + count
        end += count
    yield from rows[begin:].split(size)


def _reduced(
    given: _Problem, rows: Tensor, found: Combined, method: str, tolerance: float, most: int
) -> None:
    """Some rows, by groups of classes that the same of their active specialists own."""
    if not len(rows):
        return
    active = given.active[rows].double()
    asked = active.any(0).nonzero()[:, 0].tolist()
    base = given.generalist[rows]
    outside = torch.ones(base.shape[1], len(asked), dtype=torch.bool, device=base.device)
    rest = base.new_zeros(len(rows), len(asked))
    for n, m in enumerate(asked):
        p = _normalised(given.specialists[m][rows]) * active[:, m : m + 1]
        base.index_add_(1, given.classes[m], p[:, :-1])
        rest[:, n] = p[:, -1]
        outside[given.classes[m], n] = False
    patterns, group, sizes = outside.unique(dim=0, return_inverse=True, return_counts=True)
    owners, total = patterns.to(base.dtype), 1.0 + active.sum(1, keepdim=True)
    sums = base.new_zeros(len(rows), len(patterns)).index_add_(1, group, base)
    solve = _newton if method == "newton" else _repeat
    masses, found.iterations[rows] = solve(sums, rest, owners, total, tolerance, most)
    masses = masses / masses.sum(1, keepdim=True)
    share = torch.where(rest > 0, rest / (masses @ owners), 0.0)
    found.residual[rows] = (masses * (total - share @ owners.T) - sums).abs().sum(1)
    q = base * torch.where(sums > 0, masses / sums, 0.0).index_select(1, group)
    if bool((sums == 0).any()):
        q += torch.where(sums > 0, 0.0, masses / sizes).index_select(1, group)
    found.probabilities[rows] = q


def _newton(
    base: Tensor, rest: Tensor, outside: Tensor, total: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor]:
    """Masses `[n, G]` from `base`, of what the active specialists give the rest `[n, m]`, and iterations.

    q_g · d_g = b_g, with d = total − c · outsideᵀ, is the condition of an interior-point method whose barrier
    is b_g, c_m · Q_m = rest_m likewise. d is kept beside c, since of saturated predictions it is as small as
    b. No product is to fall to less than a tenth in one step, which keeps clear of the corners.
    """
    on = rest > 0
    pairs = torch.triu_indices(rest.shape[1], rest.shape[1], device=base.device)
    both = outside[:, pairs[0]] * outside[:, pairs[1]]
    found, steps = torch.empty_like(base), torch.full((len(base),), most, device=base.device)
    b, c = base.clamp(min=_FLOOR), on.to(base.dtype)
    d = total - c @ outside.T
    q = b / d
    rows = torch.arange(len(base), device=base.device)
    for step in range(most + 1):
        mass = q @ outside
        # The gradient is at most the first sum, if q · d is b.
        error = (rest - c * mass).abs().sum(1) + (b - q * d).abs().sum(1)
        done = error <= tolerance / 2 if step < most else torch.ones_like(error, dtype=torch.bool)
        if bool(done.any()):
            found[rows[done]], steps[rows[done]] = q[done], step
            if bool(done.all()):
                break
            left = ~done
            rows, b, c, d, q, mass = (x[left] for x in (rows, b, c, d, q, mass))
            rest, on = rest[left], on[left]
        ones = torch.where(on, c, 1.0)
        change = (torch.maximum(b, 0.1 * q * d) - q * d) / d
        ratio = q / d
        matrix = ratio.new_empty(len(rows), *[rest.shape[1]] * 2)
        matrix[:, pairs[0], pairs[1]] = matrix[:, pairs[1], pairs[0]] = ratio @ both
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += mass / ones
        scale = torch.where(on & (diagonal > 0), diagonal.rsqrt(), 0.0)
        matrix *= scale[:, :, None] * scale[:, None, :]
        diagonal += 1e-14 + (scale == 0)
        right = torch.maximum(rest, 0.1 * c * mass) / ones - mass - change @ outside
        factor = torch.linalg.cholesky_ex(matrix).L
        dc = torch.cholesky_solve((right * scale)[:, :, None], factor)[:, :, 0] * scale
        dd = -dc @ outside.T
        dq = change - ratio * dd
        # As far as nothing gets to 0.
        furthest = torch.stack([(-dx / x).amax(1) for x, dx in ((ones, dc), (d, dd), (q, dq))]).amax(0)
        length = (0.99 / furthest.clamp(min=0.99))[:, None]
        c, d, q = c + length * dc, d + length * dd, q + length * dq
    return found, steps


def _repeat(
    base: Tensor, rest: Tensor, outside: Tensor, total: Tensor, tolerance: float, most: int
) -> tuple[Tensor, Tensor]:
    """The plain fixed point; arguments and results as of `_newton`."""
    # Begun with 0 a mass would stay 0.
    q = (base + 1e-3) / (base + 1e-3).sum(1, keepdim=True)
    steps = torch.zeros(len(base), dtype=torch.long, device=base.device)
    for _ in range(most):
        mass = q @ outside
        share = torch.where(rest > 0, rest / mass, 0.0)
        new = (base + q * (share @ outside.T)) / total
        live = ((new - q).abs().sum(1) * total[:, 0]) > tolerance
        if not bool(live.any()):
            break
        steps += live
        q = torch.where(live[:, None], new, q)
    return q, steps


def _descend(given: _Problem, rows: Tensor, found: Combined, tolerance: float, most: int) -> None:
    """Gradient descent on the logits of all classes, with momentum that begins anew where it overshoots."""
    if not len(rows):
        return
    gen, active = given.generalist[rows], given.active[rows]
    specialists = [
        (own, _normalised(p[rows])) for own, p in zip(given.classes, given.specialists, strict=True)
    ]
    # The curvature is at most half of 1 + |A|.
    length = 2 / (1.0 + active.sum(1, keepdim=True))
    z = (gen + 1e-3 / gen.shape[1]).log()
    y, age = z, torch.zeros_like(length)
    for step in range(most + 1):
        prediction = y.softmax(1)
        gradient = combination_gradient(prediction, gen, specialists, active)
        error = gradient.abs().sum(1)
        live = error > tolerance
        found.iterations[rows[live]] = step
        if step == most or not bool(live.any()):
            break
        new = torch.where(live[:, None], y - length * gradient, z)
        uphill = (gradient * (new - z)).sum(1, keepdim=True) > 0
        age = torch.where(uphill, 0.0, age + 1)
        y = torch.where(live[:, None], new + age / (age + 3) * (new - z), y)
        z = new
    found.probabilities[rows], found.residual[rows] = prediction, error
