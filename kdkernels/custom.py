"""Divergences of one's own: registered as two expressions, checked before they are trusted."""

from __future__ import annotations

import dis
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from . import registry
from .divergences import BUILT_IN, DEFAULTS, TABLE, Divergence, Parametrised, resolve
from .functional import checked_call, complete, kd_loss
from .spec import make_spec

FUNCTIONS = ("exp", "expm1", "log", "log1p", "where", "abs", "maximum")
OPERATORS = ("+", "-", "*", "/", "&", "|")
MOST_PARAMS = 4

# Log-probabilities that a check looks at: near 1, ordinary, tiny.
_GRID = (-1e-6, -1e-2, -0.3, -1.0, -3.0, -8.0, -20.0)


@dataclass(frozen=True)
class Choice:
    """A registered divergence with values for its parameters: what `kd_loss` takes as `divergence`."""

    name: str
    params: tuple[float, ...]


@dataclass(frozen=True)
class Registered:
    """A divergence that `register_divergence` put into the table; called, it chooses its parameters.

    Attributes:
        name: What it is called.
        params: Names of its parameters.
    """

    name: str
    params: tuple[str, ...]

    def __call__(self, *values: float, **named: float) -> Choice:
        """Values of the parameters, in order or by name; those that are left out keep their defaults."""
        if TABLE[self.name].params != self.params:
            raise ValueError(
                f"{self.name} was registered again, with parameters ({', '.join(TABLE[self.name].params)}): "
                "use what that returned"
            )
        known = DEFAULTS.get(self.name)
        chosen = dict(zip(self.params, known.params, strict=True)) if known else {}
        if len(values) > len(self.params):
            raise TypeError(
                f"{self.name} has parameters ({', '.join(self.params)}), got {len(values)} values"
            )
        given = {**dict(zip(self.params, values, strict=False)), **named}
        for parameter, value in given.items():
            if parameter not in self.params:
                raise TypeError(f"{self.name} has no parameter {parameter!r}: it has {_listed(self.params)}")
            chosen[parameter] = _number(self.name, parameter, value)
        for parameter in self.params:
            if parameter not in chosen:
                raise TypeError(f"{self.name} needs a value of {parameter!r}, which has no default")
        return Choice(self.name, tuple(chosen[parameter] for parameter in self.params))


def register_divergence(
    name: str,
    phi: Callable[..., Any],
    g: Callable[..., Any],
    params: Sequence[str] | Mapping[str, float] = (),
    *,
    replace: bool = False,
) -> Registered:
    """A divergence of one's own, D = Σ φ(log q, log p) over the classes, on `reference` and `triton`.

    Formula: with g = ∂φ/∂ log q, the gradient with respect to the student's logits is T·(g − q·Σg), T²
    included. Everything around the pair (temperature, masks, labels, weights, noise, reductions) is the
    package's.

    `phi(lq, lp, ...)` and `g(lq, lp, ...)` are functions by `def`, of log-probabilities of the student and
    the teacher and of the parameters, that use arithmetic, comparisons, `&`, `|` and `xp.exp`, `expm1`,
    `log`, `log1p`, `where`, `abs`, `maximum` only. `xp` is torch on the reference and Triton's language on a
    GPU, whatever it is bound to where they stand. What can be infinite for a class that one side excludes is
    guarded inside the product: `p * xp.where(p == 0, 0.0, lp - lq)`. A class that both sides exclude
    contributes nothing by itself.

    Args:
        name: What `kd_loss` will know it by.
        phi: The class's share of the divergence.
        g: Its derivative with respect to log q.
        params: Names of up to four parameters, or names with their defaults.
        replace: Take the place of an earlier one of this name, as when a notebook's cell runs again.

    Returns:
        Itself, which called with values of the parameters is what `kd_loss` takes; with defaults, or without
        parameters, `divergence=name` does.

    Raises:
        TypeError: A function that isn't one by `def`, or has other arguments.
        ValueError: A name that is taken, or an expression that uses something else.

    Source: The frame of `kdkernels.divergences`, around two expressions of a class.

    Example:
        >>> import torch as xp
        >>> def phi_hellinger(lq, lp):
        ...     root = xp.exp(0.5 * lq) - xp.exp(0.5 * lp)
        ...     return 0.5 * root * root
        >>> def g_hellinger(lq, lp):
        ...     q = xp.exp(lq)
        ...     return 0.5 * (q - xp.exp(0.5 * (lq + lp)))
        >>> hellinger = register_divergence("hellinger", phi_hellinger, g_hellinger)
        >>> check_divergence("hellinger").error < 1e-8
        True
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a string, got {name!r}")
    if name in BUILT_IN:
        raise ValueError(f"name {name!r} is one of the package's own divergences; choose another")
    if name in TABLE and not replace:
        raise ValueError(f"name {name!r} is registered already; pass replace=True to put this in its place")
    names = tuple(params)
    if len(names) > MOST_PARAMS:
        raise ValueError(f"params must be at most {MOST_PARAMS}, got {_listed(names)}")
    defaults = {n: _number(name, n, v) for n, v in params.items()} if isinstance(params, Mapping) else {}
    pair = _expression("phi", phi, names), _expression("g", g, names)
    TABLE[name] = Divergence(name, pair[0], pair[1], names)
    make_spec.cache_clear()  # which may know the name with other parameters
    DEFAULTS.pop(name, None)
    if names and defaults:
        DEFAULTS[name] = Choice(name, tuple(defaults[n] for n in names))
    return Registered(name, names)


def _number(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} of {owner} must be a Python number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} of {owner} must be finite, got {value}")
    return float(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _expression(which: str, function: Any, params: tuple[str, ...]) -> Callable[..., Any]:
    """The function with `xp` bound to torch, once nothing in it is refused."""
    if not isinstance(function, types.FunctionType) or function.__name__ == "<lambda>":
        kind = "a lambda" if isinstance(function, types.FunctionType) else type(function).__name__
        raise TypeError(f"{which} must be a function by def, which a compiler can read, got {kind}")
    if function.__closure__:
        raise TypeError(
            f"{which} must not use variables of the function around it, got "
            f"{_listed(function.__code__.co_freevars)}: make them parameters"
        )
    wanted = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = list(inspect.signature(function).parameters.values())
    plain = all(a.kind is wanted and a.default is inspect.Parameter.empty for a in arguments)
    if not plain or [a.name for a in arguments[2:]] != list(params) or len(arguments) < 2:
        raise TypeError(
            f"{which} must take two log-probabilities, then {_listed(params)}, without defaults, got "
            f"({', '.join(map(str, arguments))})"
        )
    _refuse_foreign(which, function.__code__)
    bound = types.FunctionType(function.__code__, {**function.__globals__, "xp": torch}, function.__name__)
    bound.__annotations__, bound.__doc__ = function.__annotations__, function.__doc__
    probe = torch.tensor([-0.5, -2.0], dtype=torch.float64)
    try:
        out = bound(probe, probe.flip(0), *[0.5] * len(params))
    except Exception as error:
        raise ValueError(f"{which} fails on tensors: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or out.shape != probe.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{which} must give a number for each class, of shape (2,) for two, got {got}")
    return bound


def _refuse_foreign(which: str, code: types.CodeType) -> None:
    """A ValueError for the first thing in an expression that a kernel has not."""
    rest = f"; an expression has {', '.join(OPERATORS)}, comparisons and xp.{', xp.'.join(FUNCTIONS)}"
    after_xp = False
    for step in dis.get_instructions(code):
        name = step.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            if step.argval != "xp":
                raise ValueError(f"{which} uses {step.argval!r}{rest}")
            after_xp = True
            continue
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            if not after_xp or step.argval not in FUNCTIONS:
                owner = "xp." if after_xp else "."
                raise ValueError(f"{which} uses {owner + step.argval!r}{rest}")
        elif "JUMP" in name or name == "FOR_ITER":
            raise ValueError(
                f"{which} branches (if, and, or, a chained comparison or a loop); use xp.where, & and |{rest}"
            )
        elif name in ("BINARY_POWER", "BINARY_MODULO", "BINARY_FLOOR_DIVIDE", "UNARY_NOT", "CONTAINS_OP"):
            raise ValueError(f"{which} uses {name.split('_')[1].lower()}{rest}")
        elif name == "BINARY_OP" and step.argrepr.rstrip("=") not in OPERATORS:
            raise ValueError(f"{which} uses {step.argrepr!r}{rest}")
        after_xp = False


@dataclass(frozen=True)
class DivergenceCheck:
    """What `check_divergence` found of a divergence that is sound.

    Attributes:
        name: Its name.
        params: The parameters' values.
        error: Largest error of g against the derivative of φ, relative to the size of their terms.
        zero_at_equal: Whether D is 0 where student and teacher are equal, as of a divergence proper.
        non_negative: Whether D was never below 0.
        backends: For every backend, why it can't run it, or None where it can; those that can run it here
            agree with the reference.
    """

    name: str
    params: tuple[float, ...]
    error: float
    zero_at_equal: bool
    non_negative: bool
    backends: dict[str, str | None]

    def __str__(self) -> str:
        values = ", ".join(f"{n}={v:g}" for n, v in zip(TABLE[self.name].params, self.params, strict=True))
        lines = [
            f"{self.name}({values}): g is the derivative of phi (largest error {self.error:.1e})",
            f"  D(p, p) = 0: {'yes' if self.zero_at_equal else 'no'}; "
            f"D >= 0: {'yes' if self.non_negative else 'no'}",
        ]
        lines += [f"  {name}: {why or 'runs'}" for name, why in self.backends.items()]
        return "\n".join(lines)


def check_divergence(divergence: str | Parametrised) -> DivergenceCheck:
    """Checks a divergence before it is trusted: its derivative, its limits, its gradient, its backends.

    Args:
        divergence: A name, or an object with parameters, as `kd_loss` takes it.

    Returns:
        What was found, to be printed.

    Raises:
        ValueError: g is not the derivative of φ; φ or g is NaN for a class that one side excludes; or a
            backend that can run it here disagrees with the reference. The message says where.
    """
    name, params = resolve(divergence)
    row = TABLE[name]
    error = _check_derivative(row, params)
    _check_limits(row, params)
    generator = torch.Generator().manual_seed(0)
    z, v = (2 * torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    labels = torch.arange(6) if row.target else None
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    if labels is not None:
        options["hard_weight"] = 0.0

    def loss(student: Tensor) -> Tensor:
        return kd_loss(student, v, labels, backend="reference", **options)

    try:
        torch.autograd.gradcheck(loss, (z,))
    except GradcheckError as failed:
        raise ValueError(f"the gradient of {name!r} is wrong: {str(failed).splitlines()[0]}") from failed
    expected = loss(z)
    at_equal = kd_loss(z, z.detach(), labels, backend="reference", **options).abs().max().item()
    call = checked_call(z, v, labels, complete(options), stats=False)
    reasons = {b.name: registry.reason(b, call) for b in registry.BACKENDS.values()}
    for backend, why in reasons.items():
        if why is None and backend != "reference":
            _check_backend(name, backend, z, v, labels, expected, options)
    return DivergenceCheck(name, params, error, at_equal < 1e-12, bool((expected >= -1e-12).all()), reasons)


def _pairs(row: Divergence, values: Sequence[float]) -> tuple[Tensor, Tensor]:
    """All pairs of log-probabilities, or of logits where the divergence is of those."""
    grid = [*values, *(-x for x in values)] if row.normaliser != "softmax" else list(values)
    lq, lp = torch.cartesian_prod(*[torch.tensor(grid, dtype=torch.float64)] * 2).unbind(-1)
    return lq.clone(), lp.clone()


def _check_derivative(row: Divergence, params: tuple[float, ...]) -> float:
    lq, lp = _pairs(row, _GRID)
    lq.requires_grad_()
    phi = row.phi(lq, lp, *params)
    (slope,) = torch.autograd.grad(phi.sum(), lq) if phi.requires_grad else (torch.zeros_like(lq),)
    got, h = row.g(lq.detach(), lp, *params), 1e-6
    with torch.no_grad():
        ahead, behind = (row.phi(lq + step, lp, *params) for step in (h, -h))
        numeric = (ahead - behind) / (2 * h)
    size = phi.detach().abs() + slope.abs() + got.abs() + lq.detach().exp() + lp.exp()
    # Central differences see past a slip that autograd and g share, but not to more than 1e-7 or so, and
    # across a kink they are wrong.
    off = (got - slope).abs() / size
    far = ((got - numeric).abs() / size > 1e-4) & ((lq.detach() - lp).abs() > 2 * h)
    wrong = (off > 1e-8) | off.isnan() | far
    if wrong.any():
        at = int(torch.where(wrong, off.nan_to_num(math.inf) + far, -1.0).argmax())
        raise ValueError(
            f"g of {row.name!r} is not the derivative of phi: at lq = {lq[at].item():g}, lp = "
            f"{lp[at].item():g} g is {got[at].item():g}, autograd of phi {slope[at].item():g}, differences "
            f"of phi {numeric[at].item():g}"
        )
    return float(off.max())


def _check_limits(row: Divergence, params: tuple[float, ...]) -> None:
    """A class that one side excludes may be infinite, but it must be a number."""
    if row.normaliser != "softmax":
        return
    never, likely = torch.tensor([-math.inf, -1.0], dtype=torch.float64), torch.tensor([-1.0, -math.inf])
    for which, f in (("phi", row.phi), ("g", row.g)):
        value = f(never, likely.double(), *params)
        for i, side in enumerate(("student", "teacher")):
            if value[i].isnan():
                raise ValueError(
                    f"{which} of {row.name!r} is NaN for a class that the {side} excludes (log-probability "
                    "-inf): guard the product with 0, as in p * xp.where(p == 0, 0.0, lp - lq)"
                )


def _check_backend(
    name: str,
    backend: Any,
    z: Tensor,
    v: Tensor,
    labels: Tensor | None,
    expected: Tensor,
    options: dict[str, Any],
) -> None:
    upstream = torch.linspace(0.5, 1.5, len(expected), dtype=expected.dtype)
    got = kd_loss(z, v, labels, backend=backend, **options)
    (gradient,) = torch.autograd.grad(got, z, upstream)
    (wanted,) = torch.autograd.grad(expected, z, upstream, retain_graph=True)
    for what, x, y in (("loss", got, expected), ("gradient", gradient, wanted)):
        off = (x - y).abs().max().item()
        if not off <= 1e-9 * (1 + y.abs().max().item()):
            raise ValueError(f"{what} of {name!r} on backend={backend!r} is off by {off:.1e}")
