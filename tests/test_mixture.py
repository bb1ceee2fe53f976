"""`kd.Mixture`: probabilities are averaged, not logits; weights of each row; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from tolerances import DIVERGENCES, DTYPES, RAW, check, our_loss, our_result
from torch import Tensor
from truth import Options

import kdkernels as kd

AVERAGED = [d for d in DIVERGENCES if Options(d).row[0] not in RAW or Options(d).binary]
WEIGHTS = {
    "equal": None,
    "list": [1.0, 3.0, 0.5],
    "tuple": (0.2, 0.3, 0.5),
    "tensor": torch.tensor([1.0, 3.0, 0.5], device="cpu"),
    "float64": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, device="cpu"),
    "one left out": [0.0, 1.0, 1.0],
}


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random logits of std 2."""
    return (2 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def here(weights: Any) -> Any:
    """On the device of the test."""
    return weights.to(torch.get_default_device()) if isinstance(weights, Tensor) else weights


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-12) -> None:
    """Equal but for fp64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("divergence", AVERAGED)
def test_it_is_the_divergence_from_the_mean_of_probabilities(
    backend: str, divergence: Any, weights: Any
) -> None:
    """Brute force: logits of the averaged probabilities, as a single teacher."""
    z, teachers = logits(4, 9), [logits(4, 9) for _ in range(3)]
    labels, T = torch.tensor([3, 0, 8, 2]), 2.0
    o = Options(divergence, temperature=T, hard_weight=0.5, weights=here(weights))
    w = torch.as_tensor(here(weights) if weights is not None else [1.0] * 3, dtype=torch.float64)
    w = w / w.sum()
    if o.binary:
        p = sum(w_m * (v / T).sigmoid() for w_m, v in zip(w, teachers, strict=True))
        mean = T * (p / (1 - p)).log()
    else:
        mean = T * sum(w_m * (v / T).softmax(-1) for w_m, v in zip(w, teachers, strict=True)).log()
    for got, expected in zip(
        our_result(z, teachers, labels, o, backend), our_result(z, mean, labels, o, backend), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    averaged_logits = sum(w_m * v for w_m, v in zip(w, teachers, strict=True))
    _, other = our_result(z, averaged_logits, labels, o, backend)
    assert (other - our_result(z, teachers, labels, o, backend)[1]).abs().max() > 1e-4


def test_its_gradient_is_that_of_the_mean_of_kls(backend: str) -> None:
    """T(q − Σ w p_m): the KLs' own mean differs by what the student doesn't see."""
    z, teachers, w = logits(4, 9), [logits(4, 9) for _ in range(3)], [0.2, 0.3, 0.5]
    T = 2.0
    _, grad = our_result(z, teachers, None, Options(temperature=T, weights=w, reduction="sum"), backend)
    p = sum(w_m * (v / T).softmax(-1) for w_m, v in zip(w, teachers, strict=True))
    close(grad, T * ((z / T).softmax(-1) - p))
    each = [our_result(z, v, None, Options(temperature=T, reduction="sum"), backend) for v in teachers]
    close(grad, sum(w_m * g for w_m, (_, g) in zip(w, each, strict=True)), rtol=1e-11)


@pytest.mark.parametrize("divergence", AVERAGED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_budget(backend: str, dtype: torch.dtype, divergence: Any) -> None:
    """Teachers of other dtypes, strides, and each row its own weights."""
    shape = (2, 3, 67)
    z = logits(*shape, dtype=dtype)
    teachers = [
        logits(*shape, dtype=torch.float32),
        logits(2, 1, 67, dtype=torch.bfloat16).expand(shape),
        logits(67, 2, 3, dtype=torch.float16).permute(1, 2, 0),
    ]
    weights = torch.rand(2, 3, 3)
    weights[0, 1, 2] = weights[1, 0, 0] = weights[1, 2, 1] = weights[1, 2, 2] = 0.0
    labels = torch.randint(67, (2, 3))
    o = Options(divergence, temperature=2.0, hard_weight=0.5, reduction="none", weights=weights)
    check(z, teachers, labels, o, backend=backend)
    check(z, teachers, labels, o.but(weights=weights.double(), reduction="mean"), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sure_teachers_that_disagree(backend: str, dtype: torch.dtype) -> None:
    """Log of a mean of probabilities that underflow one by one; impossible for one, possible for another."""
    z, a, b = (logits(4, 40, dtype=dtype) for _ in range(3))
    a[0, 3] = b[0, 7] = 300.0
    a[1, 5:9] = -torch.inf
    b[2] -= 500.0
    a[3, :20] = b[3, :20] = z[3, :20] = -torch.inf
    for divergence in AVERAGED:
        o = Options(divergence, temperature=2.0, reduction="none", weights=[0.9, 0.1])
        exact = check(z, [a, b], torch.tensor([30] * 4), o, backend=backend)
        assert exact.loss.isfinite().all() and (exact.grad[3, :20] == 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", kd.BinaryKL()], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_teacher_of_weight_zero_is_not_looked_at(backend: str, divergence: Any, bad: float) -> None:
    """Routing: rows go to one teacher each, and the others may hold anything there."""
    z, teachers = logits(6, 9), [logits(6, 9) for _ in range(3)]
    route = torch.tensor([0, 1, 2, 2, 1, 0])
    weights = torch.nn.functional.one_hot(route, 3).float()
    chosen = torch.stack(teachers, 1)[torch.arange(6), route]
    for m, v in enumerate(teachers):
        v[route != m] = bad
    o = Options(divergence, temperature=2.0, reduction="none")
    loss, grad = our_result(z, teachers, None, o.but(weights=weights), backend)
    expected, expected_grad = our_result(z, chosen, None, o, backend)
    close(loss, expected, rtol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-13)


def test_rows_outside_the_mask_have_no_weights(backend: str) -> None:
    """All 0, negative or NaN: nobody asks."""
    z, teachers, mask = logits(4, 9), [logits(4, 9), logits(4, 9)], torch.tensor([True, False, False, True])
    weights = torch.tensor([[1.0, 2.0], [0.0, 0.0], [torch.nan, -1.0], [0.0, 3.0]])
    o = Options(mask=mask, weights=weights)
    loss, grad = our_result(z, teachers, None, o, backend)
    kept = Options(weights=weights[mask])
    close(loss, our_loss(z[mask], [v[mask] for v in teachers], None, kept, backend))
    assert (grad[1:3] == 0).all() and grad.isfinite().all()
    labels = torch.tensor([3, -100, -100, 1])
    close(our_loss(z, teachers, labels, Options(weights=weights), backend), loss)


@pytest.mark.parametrize("kind", ["list", "tuple", "tensor", "rows"])
def test_only_the_ratio_of_weights_matters(backend: str, kind: str) -> None:
    """They are normalised."""
    z, teachers = logits(4, 9), [logits(4, 9), logits(4, 9)]
    losses = []
    for w in ([1.0, 3.0], [0.25, 0.75], [8.0, 24.0]):
        weights: Any = {
            "list": w, "tuple": tuple(w), "tensor": torch.tensor(w), "rows": torch.tensor(w).expand(4, 2),
        }[kind]  # fmt: skip
        losses.append(our_loss(z, teachers, None, Options(weights=weights), backend))
    close(losses[1], losses[0])
    close(losses[2], losses[0])


def test_one_teacher_is_that_teacher(backend: str) -> None:
    """To the bit, with weights too: a run of one teacher needs no other code."""
    z, v = logits(4, 9, dtype=torch.float32), logits(4, 9, dtype=torch.float32)
    plain = our_result(z, v, None, Options(temperature=2.0), backend)
    for weights in (None, [3.0], (1,)):
        loss, grad = our_result(z, [v], None, Options(temperature=2.0, weights=weights), backend)
        assert torch.equal(loss, plain[0]) and torch.equal(grad, plain[1])
    for tensor in (torch.tensor([2.0]), torch.rand(4, 1) + 0.1):
        loss, grad = our_result(z, [v], None, Options(temperature=2.0, weights=tensor), backend)
        torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad, plain[1], rtol=1e-4, atol=1e-7)


def test_copies_of_a_teacher_are_that_teacher(backend: str) -> None:
    """Whatever the weights."""
    z, v = logits(4, 9), logits(4, 9)
    loss, grad = our_result(z, [v, v.clone()], None, Options(weights=[0.1, 0.9]), backend)
    expected, expected_grad = our_result(z, v, None, Options(), backend)
    close(loss, expected, rtol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


def test_each_teacher_has_its_own_post_processing(backend: str) -> None:
    """A softcapped model beside a scaled one."""
    z, a, b = logits(4, 9), logits(4, 9), logits(4, 9)
    processed = kd.Mixture([kd.Logits(a, softcap=3.0), kd.Logits(b, scale=0.5)], [1.0, 2.0])
    by_hand = kd.Mixture([3.0 * torch.tanh(a / 3.0), 0.5 * b], [1.0, 2.0])
    close(*(kd.kd_loss(z, teacher, temperature=2.0, backend=backend) for teacher in (processed, by_hand)))


def test_stats_are_of_the_mixture(backend: str) -> None:
    """Its entropy and its most probable class."""
    z, a, b = logits(5, 9), logits(5, 9), logits(5, 9)
    p = (0.25 * (a / 2).softmax(-1) + 0.75 * (b / 2).softmax(-1)).log()
    _, stats = kd.kd_loss_with_stats(z, kd.Mixture([a, b], [1, 3]), temperature=2.0, backend=backend)
    expected = torch.distributions.Categorical(logits=p).entropy().mean()
    torch.testing.assert_close(stats.teacher_entropy.double(), expected, rtol=1e-10, atol=0)
    agreement = (z.argmax(-1) == p.argmax(-1)).double().mean()
    assert stats.agreement.item() == agreement.item()


def test_pad_vocab(backend: str) -> None:
    """Classes that only the teachers have, or only the student, leave every softmax."""
    z, teachers = logits(4, 12), [logits(4, 9), logits(4, 9)]
    o = Options(pad_vocab=True, weights=[1.0, 3.0])
    cut = our_loss(z[:, :9], teachers, None, o, backend)
    close(our_loss(z, teachers, None, o, backend), cut)
    wide = [torch.cat([v, logits(4, 2)], -1) for v in teachers]
    close(our_loss(z[:, :9], wide, None, o, backend), cut)


# The object


def test_it_travels() -> None:
    """`.to`, rows with their weights, and as a pytree."""
    a, b = torch.randn(4, 5, 9), torch.randn(4, 5, 9)
    weights = torch.rand(4, 5, 2)
    held = kd.Mixture([a, kd.Logits(b, softcap=3.0)], weights)
    half = held.to(torch.bfloat16)
    assert half.teachers[0].dtype == half.teachers[1].z.dtype == half.weights.dtype == torch.bfloat16
    assert half.teachers[1].softcap == 3.0
    part = held[1:3]
    assert torch.equal(part.teachers[0], a[1:3]) and torch.equal(part.teachers[1].z, b[1:3])
    assert torch.equal(part.weights, weights[1:3])
    single = held[torch.tensor([0, 2]), 1]
    assert single.teachers[0].shape == (2, 9) and torch.equal(single.weights, weights[[0, 2], 1])
    with pytest.raises(IndexError, match="rows only"):
        held[..., 0]
    fixed = kd.Mixture([a, b], torch.tensor([1.0, 2.0]))
    assert torch.equal(fixed[2].weights, fixed.weights) and fixed[2].teachers[1].shape == (5, 9)
    for mixture in (held, fixed, kd.Mixture((a, b), (1.0, 2.0)), kd.Mixture([a, b])):
        moved = pytree.tree_map_only(Tensor, lambda t: t + 1, {"teacher": mixture})["teacher"]
        assert isinstance(moved, kd.Mixture) and len(moved.teachers) == 2
        assert torch.equal(moved.teachers[0], a + 1)
        if isinstance(mixture.weights, Tensor):
            assert torch.equal(moved.weights, mixture.weights + 1)
        else:
            assert moved.weights == mixture.weights
        leaves, structure = pytree.tree_flatten(mixture)
        assert all(isinstance(leaf, Tensor) for leaf in leaves)
        assert len(pytree.tree_unflatten(leaves, structure).teachers) == 2


def test_pinned_memory() -> None:
    """Each tensor of it is asked to pin itself."""

    class Pinned:
        def __init__(self) -> None:
            self.asked = 0

        def pin_memory(self) -> Pinned:
            self.asked += 1
            return self

    one, other = Pinned(), Pinned()
    assert len(kd.Mixture([one, other], [1, 2]).pin_memory().teachers) == 2  # type: ignore[list-item]
    assert (one.asked, other.asked) == (1, 1)


def test_the_teachers_get_no_gradient(backend: str) -> None:
    """One that requires grad is an error, unless it is ignored."""
    z, a, b = logits(3, 9).requires_grad_(), logits(3, 9), logits(3, 9).requires_grad_()
    with pytest.raises(ValueError, match="teacher requires grad"):
        kd.kd_loss(z, kd.Mixture([a, b]), backend=backend)
    kd.kd_loss(z, kd.Mixture([a, b]), teacher_requires_grad="ignore", backend=backend).backward()
    assert b.grad is None and z.grad is not None


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no teacher": ([], None, ValueError, "teachers.*at least one"),
    "a stacked tensor": (torch.zeros(2, 3, 7, device="cpu"), None, TypeError, r"teachers.*Tensor.*unbind"),
    "too few weights": (2, [1.0], ValueError, "weights.*2 teachers.*1"),
    "negative": (2, [1.0, -0.1], ValueError, r"weights.*>= 0.*-0\.1"),
    "nothing": (2, [0.0, 0.0], ValueError, "weights.*not all 0"),
    "NaN": (2, [1.0, float("nan")], ValueError, "weights.*nan"),
    "infinite": (2, [1.0, float("inf")], ValueError, "weights.*inf"),
    "strings": (2, ["1", "2"], TypeError, "weights.*numbers.*str"),
    "bools": (2, [True, False], TypeError, "weights.*numbers.*bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mixture(name: str) -> None:
    """Said where it is written."""
    teachers, weights, error, says = REFUSED[name]
    if isinstance(teachers, int):
        teachers = [torch.zeros(3, 7) for _ in range(teachers)]
    with pytest.raises(error, match=says):
        kd.Mixture(teachers, weights)


@pytest.mark.parametrize(
    ("teachers", "weights", "error", "says"),
    [
        ([(3, 7), (3, 8)], None, ValueError, r"teachers.*one shape.*\(3, 7\).*1.*\(3, 8\)"),
        ([(3, 7), (7,)], None, ValueError, r"teachers.*one shape"),
        ([(4, 7), (4, 7)], None, ValueError, r"teacher.*leading shape \(3,\).*\(4,\)"),
        ([(3, 8), (3, 8)], None, ValueError, "same vocabulary.*pad_vocab"),
        ([(3, 7), None], None, TypeError, r"teachers\[1\] of Mixture.*NoneType"),
        ([(3, 7), (3, 7)], (3,), ValueError, r"weights.*\(2,\).*\(3, 2\).*\(3,\)"),
        ([(3, 7), (3, 7)], (1, 2), ValueError, r"weights.*\(2,\).*\(3, 2\).*\(1, 2\)"),
        ([(3, 7), (3, 7)], 0.5, TypeError, "weights.*numbers or a float tensor.*float"),
    ],
    ids=str,
)
def test_mixtures_that_do_not_fit(
    backend: str, teachers: list[Any], weights: Any, error: type[Exception], says: str
) -> None:
    """What it got, and what there should be."""
    sides = [None if shape is None else torch.zeros(shape) for shape in teachers]
    given = torch.ones(weights) if isinstance(weights, tuple) else weights
    with pytest.raises(error, match=says):
        kd.kd_loss(torch.zeros(3, 7), kd.Mixture(sides, given), backend=backend)  # type: ignore[arg-type]


def test_tensors_of_weights_that_do_not_do(backend: str) -> None:
    """Of the wrong dtype or device, that want a gradient; and on a CPU, what they say."""
    z = torch.zeros(3, 7)
    two = [z, z.clone()]

    def loss(weights: Tensor, **options: Any) -> Tensor:
        return kd.kd_loss(z, kd.Mixture(two, weights), backend=backend, **options)

    with pytest.raises(TypeError, match=r"weights.*float tensor.*int64"):
        loss(torch.ones(2).long())
    with pytest.raises(ValueError, match=r"weights.*device.*meta"):
        loss(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"weights.*require grad.*detach"):
        loss(torch.ones(2, requires_grad=True))
    if z.device.type != "cpu":
        rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
        assert loss(rows, reduction="none").isnan().tolist() == [False, True, True]
        return
    for bad in ([1.0, -1.0], [0.0, 0.0], [1.0, torch.nan]):
        with pytest.raises(ValueError, match=r"weights.*>= 0, finite and not all 0"):
            loss(torch.tensor(bad))
        with pytest.raises(ValueError, match=r"weights.*>= 0.*in row 1"):
            loss(torch.tensor([[1.0, 1.0], bad, [2.0, 0.0]]))


@pytest.mark.parametrize("divergence", [kd.LogitMSE(), kd.LogitMSE(centered=True)], ids=str)
def test_a_mean_of_probabilities_has_no_logits(backend: str, divergence: Any) -> None:
    """LogitMSE would have to compare logits that no teacher gave."""
    z = torch.zeros(3, 7)
    with pytest.raises(
        ValueError, match=r"logit_mse.*compares logits.*Mixture.*average the teachers' logits"
    ):
        kd.kd_loss(z, kd.Mixture([z, z]), divergence=divergence, backend=backend)


def test_a_mixture_is_no_student() -> None:
    """Nor does the error offer it."""
    z = torch.zeros(3, 7)
    with pytest.raises(TypeError, match=r"student must be.*got Mixture"):
        kd.kd_loss(kd.Mixture([z, z]), z)  # type: ignore[arg-type]
