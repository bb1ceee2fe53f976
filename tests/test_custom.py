"""Divergences of one's own: what is taken, what is refused by name, and what a check finds."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch as xp

import kdkernels as kd
from kdkernels import custom, divergences


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(divergences.TABLE), dict(divergences.DEFAULTS)
    yield
    for table, kept in zip((divergences.TABLE, divergences.DEFAULTS), before, strict=True):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


def phi_hellinger(lq: Any, lp: Any) -> Any:
    root = xp.exp(0.5 * lq) - xp.exp(0.5 * lp)
    return 0.5 * root * root


def g_hellinger(lq: Any, lp: Any) -> Any:
    return 0.5 * (xp.exp(lq) - xp.exp(0.5 * (lq + lp)))


def phi_weighted(lq: Any, lp: Any, weight: float, power: float) -> Any:
    p = xp.exp(lp)
    return weight * xp.exp(power * lp) * xp.where(p == 0, 0.0, lp - lq)


def g_weighted(lq: Any, lp: Any, weight: float, power: float) -> Any:
    return -weight * xp.exp(power * lp)


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(2 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_a_registered_divergence_is_its_formula(backend: str) -> None:
    """Squared Hellinger distance, with everything that surrounds a divergence, against autograd by hand."""
    hellinger = kd.register_divergence("hellinger", phi_hellinger, g_hellinger)
    z, v = logits()
    z.requires_grad_()
    labels = torch.randint(7, (5,))
    loss = kd.kd_loss(z, v, labels, divergence="hellinger", temperature=2.0, hard_weight=0.3, backend=backend)
    q, p = (z / 2).softmax(-1), (v / 2).softmax(-1)
    expected = 4 * 0.5 * ((q.sqrt() - p.sqrt()) ** 2).sum(-1).mean()
    expected = expected + 0.3 * torch.nn.functional.cross_entropy(z, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    again = kd.kd_loss(
        z, v, labels, divergence=hellinger(), temperature=2.0, hard_weight=0.3, backend=backend
    )
    assert torch.equal(loss, again)


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_parameters_by_name_by_place_and_by_default(backend: str) -> None:
    """A string stands for the defaults, which a name without one doesn't have."""
    weighted = kd.register_divergence("weighted", phi_weighted, g_weighted, {"weight": 2.0, "power": 1.0})
    z, v = logits()
    kl = kd.kd_loss(z, v, backend=backend)
    close = torch.testing.assert_close
    close(kd.kd_loss(z, v, divergence="weighted", backend=backend), 2 * kl)
    close(kd.kd_loss(z, v, divergence=weighted(3.0), backend=backend), 3 * kl)
    close(kd.kd_loss(z, v, divergence=weighted(weight=0.5), backend=backend), 0.5 * kl)
    assert weighted(power=2).params == (2.0, 2.0)
    bare = kd.register_divergence("bare", phi_weighted, g_weighted, ("weight", "power"))
    with pytest.raises(ValueError, match=r"'bare' has parameters without defaults.*weight, power"):
        kd.kd_loss(z, v, divergence="bare", backend=backend)
    with pytest.raises(TypeError, match="bare needs a value of 'power'"):
        bare(1.0)
    with pytest.raises(TypeError, match="bare has no parameter 'exponent'"):
        bare(1.0, exponent=2.0)
    with pytest.raises(TypeError, match="got 3 values"):
        bare(1.0, 2.0, 3.0)
    for wrong, error in (("2", TypeError), (True, TypeError), (math.nan, ValueError)):
        with pytest.raises(error, match="weight of bare must be"):
            bare(wrong, 1.0)


def test_cpu_says_that_it_cannot() -> None:
    """By name it is an error with the reason; by itself the choice falls on the reference."""
    kd.register_divergence("hellinger", phi_hellinger, g_hellinger)
    z, v = logits()
    explained = kd.explain(z, v, divergence="hellinger")
    assert explained.backend == "reference" and "no C++ expression" in str(explained.reasons["cpu"])
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't run this call.*'hellinger'"):
        kd.kd_loss(z, v, divergence="hellinger", backend="cpu")


def test_names_are_taken_once() -> None:
    """The package's own never; one's own only on purpose."""
    with pytest.raises(ValueError, match="'jsd' is one of the package's own"):
        kd.register_divergence("jsd", phi_hellinger, g_hellinger, replace=True)
    kd.register_divergence("mine", phi_hellinger, g_hellinger)
    with pytest.raises(ValueError, match="'mine' is registered already; pass replace=True"):
        kd.register_divergence("mine", phi_hellinger, g_hellinger)
    kd.register_divergence("mine", phi_weighted, g_weighted, {"weight": 1.0, "power": 1.0}, replace=True)
    z, v = logits()
    torch.testing.assert_close(
        kd.kd_loss(z, v, divergence="mine", backend="reference"), kd.kd_loss(z, v, backend="reference")
    )
    kd.register_divergence("mine", phi_hellinger, g_hellinger, replace=True)
    assert kd.kd_loss(z, v, divergence="mine", backend="reference") < 1
    with pytest.raises(TypeError, match="name must be a string"):
        kd.register_divergence("", phi_hellinger, g_hellinger)


def uses_power(lq: Any, lp: Any) -> Any:
    return lq**2


def uses_if(lq: Any, lp: Any) -> Any:
    return lq if lq > lp else lp


def uses_and(lq: Any, lp: Any) -> Any:
    return xp.where(lq > 0 and lp > 0, lq, lp)


def uses_chain(lq: Any, lp: Any) -> Any:
    return xp.where(-1 < lq < 0, lq, lp)


def uses_loop(lq: Any, lp: Any) -> Any:
    for _ in (1, 2):
        lq = lq + lp
    return lq


def uses_math(lq: Any, lp: Any) -> Any:
    return lq * math.pi


def uses_method(lq: Any, lp: Any) -> Any:
    return lq.exp()


def uses_other_function(lq: Any, lp: Any) -> Any:
    return xp.sqrt(lq)


def uses_builtin(lq: Any, lp: Any) -> Any:
    return max(lq, lp)


def sums(lq: Any, lp: Any) -> Any:
    return xp.exp(lq) @ lp


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (uses_power, r"phi uses '\*\*'"),
        (uses_if, "phi branches"),
        (uses_and, "phi branches"),
        (uses_chain, "phi branches"),
        (uses_loop, "phi "),
        (uses_math, "phi uses 'math'"),
        (uses_method, r"phi uses '\.exp'"),
        (uses_other_function, r"phi uses 'xp\.sqrt'"),
        (uses_builtin, "phi uses 'max'"),
        (sums, "phi uses '@'"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_no_kernel_has_is_refused(function: Any, message: str) -> None:
    """Named, with what there is instead; not an error of a compiler at the first call on a GPU."""
    with pytest.raises(ValueError, match=message):
        kd.register_divergence("refused", function, g_hellinger)
    assert "refused" not in divergences.TABLE


def test_what_no_compiler_can_read_is_refused() -> None:
    """Lambdas, closures, callables and other arguments."""
    factor = 2.0

    def closure(lq: Any, lp: Any) -> Any:
        return factor * lq

    def default(lq: Any, lp: Any, weight: float = 1.0) -> Any:
        return weight * lq

    def one(lq: Any) -> Any:
        return lq

    class Phi:
        def __call__(self, lq: Any, lp: Any) -> Any:
            return lq

    def scalar(lq: Any, lp: Any) -> Any:
        return 1.0

    for function, error, message in (
        (lambda lq, lp: lq, TypeError, "got a lambda"),
        (closure, TypeError, "variables of the function around it, got factor"),
        (default, TypeError, "without defaults"),
        (one, TypeError, "must take two log-probabilities"),
        (Phi(), TypeError, "got Phi"),
        (phi_weighted, TypeError, "two log-probabilities, then none"),
        (scalar, ValueError, "a number for each class"),
    ):
        with pytest.raises(error, match=message):
            kd.register_divergence("refused", function, g_hellinger)
    with pytest.raises(TypeError, match="g must take two log-probabilities, then weight, power"):
        kd.register_divergence("refused", phi_weighted, g_hellinger, ("weight", "power"))
    with pytest.raises(ValueError, match="at most 4"):
        kd.register_divergence("refused", phi_hellinger, g_hellinger, tuple("abcde"))


# What a check finds


def g_of_the_wrong_sign(lq: Any, lp: Any) -> Any:
    return -0.5 * (xp.exp(lq) - xp.exp(0.5 * (lq + lp)))


def phi_unguarded(lq: Any, lp: Any) -> Any:
    return xp.exp(lp) * (lp - lq)


def g_unguarded(lq: Any, lp: Any) -> Any:
    return -xp.exp(lp)


def phi_detached(lq: Any, lp: Any) -> Any:
    return xp.exp(lp) * xp.where(lq > lp, 1.0, 1.0)


def test_a_wrong_derivative_is_found() -> None:
    """With the place and the three values; a phi that doesn't depend on q has none."""
    kd.register_divergence("wrong", phi_hellinger, g_of_the_wrong_sign)
    with pytest.raises(ValueError, match=r"g of 'wrong' is not the derivative of phi: at lq = .*autograd"):
        kd.check_divergence("wrong")
    kd.register_divergence("flat", phi_detached, g_hellinger)
    with pytest.raises(ValueError, match="g of 'flat' is not the derivative"):
        kd.check_divergence("flat")


def test_an_unguarded_product_is_found() -> None:
    """0 · inf for a class that the teacher excludes, which everyday masks do."""
    kd.register_divergence("unguarded", phi_unguarded, g_unguarded)
    with pytest.raises(ValueError, match=r"phi of 'unguarded' is NaN.*the teacher excludes"):
        kd.check_divergence("unguarded")


def test_a_sound_one_says_what_it_is() -> None:
    """A divergence proper, one that is not, and where each runs."""
    kd.register_divergence("hellinger", phi_hellinger, g_hellinger)
    found = kd.check_divergence("hellinger")
    assert found.zero_at_equal and found.non_negative and found.error < 1e-12
    assert found.backends["reference"] is None and "C++" in str(found.backends["cpu"])
    assert "g is the derivative of phi" in str(found) and "D(p, p) = 0: yes" in str(found)
    assert not kd.check_divergence("soft_cross_entropy").zero_at_equal
    negative = kd.register_divergence("negative", phi_weighted, g_weighted, {"weight": -1.0, "power": 1.0})
    assert not kd.check_divergence(negative()).non_negative
    with pytest.raises(ValueError, match="divergence must be a string"):
        kd.check_divergence("nobody's")


@pytest.mark.parametrize("name", sorted(divergences.BUILT_IN - {"alpha_beta"}))
def test_the_package_s_own_pass(name: str) -> None:
    """The check that users trust holds for what they trust already."""
    assert kd.check_divergence(name).error < 1e-12


def test_a_backend_that_disagrees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs it: a C++ spelling of another formula does not pass as this one's."""
    from kdkernels.backends.cpu import BACKEND

    if custom.registry.reason(BACKEND, *[_call()]) is not None:
        pytest.skip("no C++ library")
    number = BACKEND._library.number("reverse_kl")
    kd.register_divergence("hellinger", phi_hellinger, g_hellinger)
    monkeypatch.setitem(BACKEND._library._numbers, "hellinger", number)
    monkeypatch.setattr("kdkernels.backends.cpu.BUILT_IN", {"hellinger"})
    with pytest.raises(ValueError, match="loss of 'hellinger' on backend='cpu' is off by"):
        kd.check_divergence("hellinger")


def _call() -> Any:
    from kdkernels.functional import checked_call, complete

    z, v = logits()
    return checked_call(z, v, None, complete({}), stats=False)


def test_xp_need_not_be_bound(tmp_path: Path) -> None:
    """In a module of the user's own, where `xp` is nothing: it is torch here and Triton's language there."""
    module = tmp_path / "own.py"
    module.write_text(
        "def phi(lq, lp):\n    d = xp.exp(lq) - xp.exp(lp)\n    return 0.5 * d * d\n\n\n"
        "def g(lq, lp):\n    q = xp.exp(lq)\n    return q * (q - xp.exp(lp))\n"
    )
    code = (
        "import torch, own, kdkernels as kd\n"
        "kd.register_divergence('brier', own.phi, own.g)\n"
        "z, v = torch.randn(3, 5).double(), torch.randn(3, 5).double()\n"
        "a = kd.kd_loss(z, v, divergence='brier', backend='reference')\n"
        "b = kd.kd_loss(z, v, divergence='squared_error', backend='reference')\n"
        "assert torch.equal(a, b)\n"
        "print(kd.check_divergence('brier'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "brier()" in done.stdout


def test_a_handle_is_called_for_its_parameters() -> None:
    """Uncalled, or from before the name was given to another, it says so."""
    z, v = logits()
    first = kd.register_divergence("weighted", phi_weighted, g_weighted, {"weight": 2.0, "power": 1.0})
    with pytest.raises(TypeError, match=r"'weighted' has parameters \(weight, power\): call what"):
        kd.kd_loss(z, v, divergence=first)
    kd.register_divergence("weighted", phi_hellinger, g_hellinger, replace=True)
    with pytest.raises(ValueError, match="registered again"):
        first(1.0, 2.0)


def test_a_name_of_the_library_is_nobodys() -> None:
    """It has names of its own for forms of a divergence, which a caller may choose, too."""
    kd.register_divergence("alpha_beta <= 0", phi_hellinger, g_hellinger)
    z, v = logits()
    assert "C++" in str(kd.explain(z, v, divergence="alpha_beta <= 0").reasons["cpu"])
