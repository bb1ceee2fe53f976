"""What each bad input says: the argument, what it got, what to do. All of it before any backend runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES
from torch import Tensor

import kdkernels as kd

N, V = 3, 7


@pytest.fixture
def z() -> Tensor:
    """Student logits."""
    return torch.randn(N, V)


@pytest.fixture
def v() -> Tensor:
    """Teacher logits."""
    return torch.randn(N, V)


def says(*parts: str) -> str:
    """A pattern that holds every part, in any order, over any number of lines."""
    return "(?si)" + "".join(f"(?=.*(?:{part}))" for part in parts)


# Shapes


@pytest.mark.parametrize("shape", [(N + 1, V), (V,), (1, V), (N, 1, V), (1, N, V)], ids=str)
def test_rows_that_do_not_match(z: Tensor, backend: str, shape: tuple[int, ...]) -> None:
    """Broadcasting by accident is a (B, B, V) loss; by intention it is `expand`."""
    with pytest.raises(ValueError, match=says("teacher", rf"{N}, {V}", ", ".join(map(str, shape)))):
        kd.kd_loss(z, torch.randn(shape), backend=backend)


def test_logits_without_a_vocabulary(backend: str) -> None:
    """A scalar has no classes."""
    with pytest.raises(ValueError, match=says("student", r"\[\.\.\., V\]|last dim|dimension")):
        kd.kd_loss(torch.tensor(1.0), torch.tensor(1.0), backend=backend)


@pytest.mark.parametrize("teacher", [V - 1, V + 2])
def test_unequal_vocabularies(z: Tensor, backend: str, teacher: int) -> None:
    """Both sizes and the remedies."""
    with pytest.raises(
        ValueError, match=says(rf"\b{V}\b", rf"\b{teacher}\b", "pad_vocab=True", "student", "teacher")
    ):
        kd.kd_loss(z, torch.randn(N, teacher), backend=backend)


@pytest.mark.parametrize("shape", [(N + 1,), (N, V), (N, 1), (), (1,)], ids=str)
@pytest.mark.parametrize("name", ["labels", "mask", "token_weights"])
def test_small_tensors_of_the_wrong_shape(
    z: Tensor, v: Tensor, backend: str, name: str, shape: tuple[int, ...]
) -> None:
    """(N, 1) labels would broadcast into something else."""
    dtype = {"labels": torch.int64, "mask": torch.bool, "token_weights": torch.float32}[name]
    words: dict[str, Any] = {
        name: torch.ones(shape).to(dtype),
        "hard_weight": 0.5 if name == "labels" else 0.0,
    }
    with pytest.raises(ValueError, match=says(name, rf"\b{N}\b", r"\(" + ", ".join(map(str, shape)))):
        kd.kd_loss(z, v, backend=backend, **words)


# Numbers


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_temperature(z: Tensor, v: Tensor, backend: str, value: float) -> None:
    """Zero divides, a negative one turns the distribution over, an infinite one erases it."""
    with pytest.raises(ValueError, match=says("temperature", "> 0|finite", str(value))):
        kd.kd_loss(z, v, temperature=value, backend=backend)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_beta(beta: float) -> None:
    """At 0 and 1 the JSD is 0 everywhere: the message names what was meant."""
    with pytest.raises(ValueError, match=says("beta", "forward_kl", "reverse_kl", r"kd\.gkd", str(beta))):
        kd.JSD(beta)


@pytest.mark.parametrize("name", ["soft_weight", "hard_weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_finite(z: Tensor, v: Tensor, backend: str, name: str, value: float) -> None:
    """A weight from a broken schedule is refused here, not found in the loss curve."""
    with pytest.raises(ValueError, match=says(name, str(value))):
        kd.kd_loss(z, v, torch.ones(N).long(), backend=backend, **{"hard_weight": 0.5, name: value})


def test_hard_weight_without_labels(z: Tensor, v: Tensor, backend: str) -> None:
    """The term that was asked for can't be computed, so it isn't silently dropped."""
    with pytest.raises(ValueError, match=says("hard_weight", "labels", "0.5")):
        kd.kd_loss(z, v, hard_weight=0.5, backend=backend)
    kd.kd_loss(z, v, hard_weight=0.0, backend=backend)


@pytest.mark.parametrize("value", [-1, -2.5, float("nan")])
def test_num_items(z: Tensor, v: Tensor, backend: str, value: float) -> None:
    """A count is not negative."""
    with pytest.raises(ValueError, match=says("num_items", str(value))):
        kd.kd_loss(z, v, num_items=value, backend=backend)


@pytest.mark.parametrize("value", ["7", [7], None, torch.ones(2)], ids=str)
def test_num_items_of_the_wrong_kind(z: Tensor, v: Tensor, backend: str, value: Any) -> None:
    """A number or a 0-d tensor; None is this batch's own count."""
    if value is None:
        assert torch.equal(
            kd.kd_loss(z, v, num_items=None, backend=backend), kd.kd_loss(z, v, backend=backend)
        )
        return
    with pytest.raises((TypeError, ValueError), match=says("num_items")):
        kd.kd_loss(z, v, num_items=value, backend=backend)


# Labels


def assert_refused(z: Tensor, v: Tensor, labels: Tensor, match: str, backend: str, **options: Any) -> None:
    """The label of row 1 is an error on a CPU. On a GPU, where looking would wait for it, that row alone is
    NaN."""
    words: dict[str, Any] = {"hard_weight": 0.5, "backend": backend, **options}
    if z.device.type == "cpu":
        with pytest.raises(ValueError, match=match):
            kd.kd_loss(z, v, labels, **words)
        return
    z.requires_grad_()
    for T in (1.0, 2.0):  # the hard term shares the soft term's softmax, and has its own
        assert kd.kd_loss(z, v, labels, temperature=T, **words).isnan()
        rows = kd.kd_loss(z, v, labels, temperature=T, reduction="none", **words)
        (grad,) = torch.autograd.grad(rows.sum(), z)
        assert rows.isnan().tolist() == [False, True, False]
        assert grad[1, : v.shape[-1]].isnan().all() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [V, V + 100, -1, -99])
def test_labels_out_of_range(z: Tensor, v: Tensor, backend: str, bad: int) -> None:
    """The label, and the range it missed."""
    labels = torch.tensor([0, bad, -100])
    assert_refused(z, v, labels, says("label", rf"(?<!\d){bad}\b", rf"\b({V}|{V - 1})\b"), backend)


def test_minus_100_is_out_of_range_under_another_ignore_index(z: Tensor, v: Tensor, backend: str) -> None:
    """Then it is a label like any other, and no class."""
    labels = torch.tensor([0, -100, 1])
    assert_refused(z, v, labels, says("label", "-100", "ignore_index"), backend, ignore_index=-1)


def test_a_label_in_the_padding(backend: str) -> None:
    """`pad_vocab` drops the classes that only one side has; a label there has no probability."""
    z, v, labels = torch.randn(N, V + 2), torch.randn(N, V), torch.tensor([0, V + 1, 1])
    assert_refused(z, v, labels, says("label", rf"\b{V + 1}\b"), backend, pad_vocab=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16], ids=str)
def test_labels_of_the_wrong_dtype(z: Tensor, v: Tensor, backend: str, dtype: torch.dtype) -> None:
    """Float labels are probabilities elsewhere; a bool is a mask."""
    with pytest.raises(TypeError, match=says("labels", str(dtype).removeprefix("torch."), "int64|integer")):
        kd.kd_loss(z, v, torch.ones(N).to(dtype), hard_weight=0.5, backend=backend)


DKD_NEEDS = says(
    "labels", "every row that counts", "row 1 of 3", "ignore_index", r"mask=labels != ignore_index"
)


def test_a_divergence_about_the_label_needs_one(z: Tensor, v: Tensor, backend: str) -> None:
    """None at all is an error everywhere; one missing where a row counts is, where looking waits for
    nothing."""
    for divergence in ("dkd", kd.DKD(1.0, 2.0)):
        with pytest.raises(ValueError, match=says("labels must be given", "dkd", "None")):
            kd.kd_loss(z, v, divergence=divergence, backend=backend)
    labels, mask = torch.tensor([0, -100, 2]), torch.tensor([True, True, False])
    assert_refused(z, v, labels, DKD_NEEDS, backend, divergence="dkd", mask=mask, hard_weight=None)
    assert_refused(z, v, labels, DKD_NEEDS, backend, divergence="dkd", mask=mask, hard_weight=0.5)
    # Not where the row doesn't count, nor where nothing asks for the soft term.
    kd.kd_loss(z, v, labels, divergence="dkd", backend=backend)
    kd.kd_loss(z, v, labels, divergence="dkd", mask=labels != -100, backend=backend)
    words: dict[str, Any] = {"divergence": "dkd", "mask": mask, "soft_weight": 0.0, "hard_weight": 0.5}
    kd.kd_loss(z, v, labels, backend=backend, **words)


@pytest.mark.parametrize("bad", [V, -1])
def test_a_target_out_of_range(z: Tensor, v: Tensor, backend: str, bad: int) -> None:
    """Also without a hard term, since the soft one is about it."""
    labels = torch.tensor([0, bad, 1])
    match = says("label", rf"(?<!\d){bad}\b", "row 1 of 3")
    assert_refused(z, v, labels, match, backend, divergence="dkd", hard_weight=None)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf")])
def test_binary_labels_out_of_range(z: Tensor, v: Tensor, backend: str, bad: float) -> None:
    """The label, its row and its class; nobody looks where they are not used or the row doesn't count."""
    labels = torch.rand(N, V)
    labels[1, 4] = bad
    divergence = kd.BinaryKL()
    match = says("labels of a binary divergence", r"\[0, 1\]", "row 1", "class 4")
    if z.device.type == "cpu":
        with pytest.raises(ValueError, match=match):
            kd.kd_loss(z, v, labels, divergence=divergence, hard_weight=0.5, backend=backend)
    else:
        rows = kd.kd_loss(
            z, v, labels, divergence=divergence, hard_weight=0.5, reduction="none", backend=backend
        )
        assert rows.isnan().tolist() == [False, True, False]
    kd.kd_loss(z, v, labels, divergence=divergence, hard_weight=0.0, backend=backend)
    mask = torch.tensor([True, False, True])
    words: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5, "mask": mask, "backend": backend}
    assert kd.kd_loss(z, v, labels, **words).isfinite()


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (
            torch.ones(N, V, dtype=torch.int64, device="cpu"),
            TypeError,
            says("labels", "floats", "int64", r"float\(\)"),
        ),
        (torch.ones(N, V, dtype=torch.bool, device="cpu"), TypeError, says("labels", "floats", "bool")),
        (torch.ones(N, device="cpu"), ValueError, says("labels", rf"\({N}, {V}\)", rf"\({N},\)")),
        (
            torch.ones(N, V + 1, device="cpu"),
            ValueError,
            says("labels", rf"\({N}, {V}\)", rf"\({N}, {V + 1}\)"),
        ),
        ([[1.0] * V] * N, TypeError, says("labels", "Tensor", "list")),
        (torch.ones(N, V, device="meta"), ValueError, says("labels", "device", "meta")),
        (
            torch.ones(N, V, device="cpu", requires_grad=True),
            ValueError,
            says("labels", "require grad", "detach"),
        ),
    ],
    ids=["int64", "bool", "a class a row", "another V", "list", "device", "requires grad"],
)
def test_binary_labels_that_do_not_fit(
    z: Tensor, v: Tensor, backend: str, labels: Any, error: type[Exception], match: str
) -> None:
    """One number for each class, like the logits."""
    if isinstance(labels, Tensor) and labels.device.type == "cpu":
        labels = labels.detach().to(z.device).requires_grad_(labels.requires_grad)
    with pytest.raises(error, match=match):
        kd.kd_loss(z, v, labels, divergence=kd.BinaryKL(), hard_weight=0.5, backend=backend)


def test_binary_sides_of_unequal_size(z: Tensor, backend: str) -> None:
    """`pad_vocab` is about a vocabulary, not about questions."""
    with pytest.raises(ValueError, match=says("pad_vocab", "binary_kl", "slice", str(V), str(V + 2))):
        kd.kd_loss(z, torch.randn(N, V + 2), divergence=kd.BinaryKL(), pad_vocab=True, backend=backend)


# Parameters


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize(("name", "limit"), [("SkewKL", "forward_kl"), ("SkewReverseKL", "reverse_kl")])
def test_skews(name: str, limit: str, alpha: float) -> None:
    """At 0 it is a KL, at 1 nothing."""
    with pytest.raises(ValueError, match=says("alpha", name, "between 0 and 1", limit, str(alpha))):
        getattr(kd, name)(alpha)


@pytest.mark.parametrize("name", ["AlphaBeta", "DKD"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_are_finite(name: str, value: float) -> None:
    """Either of the two, by name."""
    for parameter in ("alpha", "beta"):
        given = {"alpha": 0.5, "beta": 0.5, parameter: value}
        with pytest.raises(ValueError, match=says(parameter, name, "finite", str(value))):
            getattr(kd, name)(**given)


@pytest.mark.parametrize("name", ["JSD", "SkewKL", "SkewReverseKL", "AlphaBeta", "DKD"])
@pytest.mark.parametrize("value", ["0.5", None, True, torch.tensor(0.5, device="cpu")], ids=str)
def test_parameters_are_numbers(name: str, value: Any) -> None:
    """A tensor would be read by the device, or not at all."""
    parameter = "beta" if name == "JSD" else "alpha"
    given = {"beta": 0.5} if name in ("AlphaBeta", "DKD") else {}
    with pytest.raises(TypeError, match=says(parameter, name, "number", type(value).__name__)):
        getattr(kd, name)(**{**given, parameter: value})


def test_parameters_without_defaults(z: Tensor, v: Tensor) -> None:
    """α-β has none that is the usual one; LogitMSE and BinaryKL are objects of their own names."""
    with pytest.raises(ValueError, match=says("alpha_beta", "alpha, beta", r"kd\.AlphaBeta\(")):
        kd.kd_loss(z, v, divergence="alpha_beta")
    with pytest.raises(TypeError):
        kd.AlphaBeta()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=says("centered", "bool", "int")):
        kd.LogitMSE(centered=1)  # type: ignore[arg-type]


def test_an_object_that_is_no_row(z: Tensor, v: Tensor) -> None:
    """Its name must be in the table, with as many parameters."""

    class Mine:
        name, params = "mine", ()

    class Short:
        name, params = "jsd", ()

    with pytest.raises(TypeError, match=says("divergence", "Mine", "JSD")):
        kd.kd_loss(z, v, divergence=Mine())
    with pytest.raises(ValueError, match=says("jsd", "beta", r"\(\)")):
        kd.kd_loss(z, v, divergence=Short())


# Kinds


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_of_the_wrong_dtype(z: Tensor, v: Tensor, backend: str, side: str, dtype: torch.dtype) -> None:
    """Token ids where logits belong."""
    sides = {"student": z, "teacher": v, side: torch.ones(N, V).to(dtype)}
    with pytest.raises(TypeError, match=says(side, str(dtype).removeprefix("torch."))):
        kd.kd_loss(**sides, backend=backend)


SOURCES = {
    "list": [[0.0] * V] * N,
    "ndarray": np.zeros((N, V), np.float32),
    "str": "logits",
    "NoneType": None,
    "dict": {},
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_source_of_the_wrong_kind(z: Tensor, v: Tensor, backend: str, side: str, kind: str) -> None:
    """What it got, and which sources there are."""
    sides: dict[str, Any] = {"student": z, "teacher": v, side: SOURCES[kind]}
    with pytest.raises(TypeError, match=says(side, kind, "Tensor", "Logits")):
        kd.kd_loss(**sides, backend=backend)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=str)
def test_mask_of_the_wrong_dtype(z: Tensor, v: Tensor, backend: str, dtype: torch.dtype) -> None:
    """An attention mask is int64; as an index it would pick rows 0 and 1."""
    with pytest.raises(TypeError, match=says("mask", "bool", str(dtype).removeprefix("torch."))):
        kd.kd_loss(z, v, mask=torch.ones(N).to(dtype), backend=backend)


@pytest.mark.parametrize("name", ["labels", "mask", "token_weights"])
def test_lists_where_tensors_belong(z: Tensor, v: Tensor, backend: str, name: str) -> None:
    """Named, with its type."""
    words: dict[str, Any] = {name: [1, 1, 1]}
    with pytest.raises(TypeError, match=says(name, "list", "tensor")):
        kd.kd_loss(z, v, backend=backend, **words)


@pytest.mark.parametrize("name", ["temperature", "soft_weight", "hard_weight"])
@pytest.mark.parametrize("value", ["2.0", [2.0]], ids=str)
def test_numbers_of_the_wrong_kind(z: Tensor, v: Tensor, backend: str, name: str, value: Any) -> None:
    """A string out of a YAML file."""
    with pytest.raises(TypeError, match=says(name, type(value).__name__)):
        kd.kd_loss(z, v, torch.ones(N).long(), backend=backend, **{"hard_weight": 0.5, name: value})


# Names


@pytest.mark.parametrize(
    ("name", "value", "offered"),
    [
        ("divergence", "kl", ["forward_kl", "reverse_kl", "soft_cross_entropy", "JSD"]),
        ("reduction", "batchmean", ["mean", "sum", "none"]),
        ("backend", "gpu", ["reference", "cpu"]),
        ("teacher_requires_grad", "yes", ["error", "ignore"]),
    ],
)
def test_unknown_names(z: Tensor, v: Tensor, name: str, value: str, offered: list[str]) -> None:
    """What there is instead."""
    words: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=says(name, value, *offered)):
        kd.kd_loss(z, v, **words)


@pytest.mark.parametrize("value", [0.5, None, ("jsd", 0.5), torch.nn.KLDivLoss()], ids=str)
def test_divergence_of_the_wrong_kind(z: Tensor, v: Tensor, value: Any) -> None:
    """A bare beta is not a divergence."""
    with pytest.raises(TypeError, match=says("divergence", type(value).__name__, "JSD")):
        kd.kd_loss(z, v, divergence=value)


def test_an_unknown_option(z: Tensor, v: Tensor) -> None:
    """As Python says it, of the function and of the module, at once."""
    with pytest.raises(TypeError, match="temprature"):
        kd.kd_loss(z, v, temprature=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        kd.KDLoss(temprature=2.0)
    with pytest.raises(ValueError, match=says("temperature", "> 0", "-1")):
        kd.KDLoss(temperature=-1.0)


@pytest.mark.parametrize("name", ["cuda"])
def test_an_unavailable_backend(z: Tensor, v: Tensor, name: str) -> None:
    """A named backend that can't run is an error with its reason, never a silent fallback."""
    reason = kd.explain(z, v).reasons[name]
    assert reason is not None
    with pytest.raises(RuntimeError) as error:
        kd.kd_loss(z, v, backend=name)
    assert name in str(error.value) and reason in str(error.value)


# Devices


@pytest.mark.parametrize("name", ["teacher", "labels", "mask", "token_weights", "num_items"])
def test_different_devices(z: Tensor, v: Tensor, backend: str, name: str) -> None:
    """Which one is where."""
    given: dict[str, Any] = {"student": z, "teacher": v, "hard_weight": 0.5, "labels": torch.ones(N).long()}
    given["mask"], given["token_weights"] = torch.ones(N).bool(), torch.ones(N)
    given["num_items"] = torch.tensor(2.0)
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=says(name, "meta", z.device.type)):
        kd.kd_loss(**given, backend=backend)


def test_the_cpu_backend_refuses_other_devices(z: Tensor, v: Tensor) -> None:
    """It would read a device's address as its own memory."""
    with pytest.raises(RuntimeError, match=says("cpu", "meta")):
        kd.kd_loss(z.to("meta"), v.to("meta"), backend="cpu")


# Warnings

WARN = """
import warnings, torch, kdkernels as kd
torch.set_default_device({device!r})
z = torch.randn(3, 7)
labels = torch.tensor([1, -100, 2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        kd.kd_loss(z, z, labels, backend={backend!r})
        kd.kd_loss(z + 1, z, labels, temperature=2.0, backend={backend!r})
for w in caught:
    print(w.category.__name__, "|", w.filename.endswith("<string>"), "|", w.message)
"""


def test_labels_that_nothing_uses_warn_once_per_process(backend: str) -> None:
    """Someone who passes labels expects a hard term: told once, at their own line, and not once per step."""
    device = DEVICES[backend]
    run = subprocess.run(
        [sys.executable, "-c", WARN.format(backend=backend, device=device)],
        env={**os.environ, "TRITON_INTERPRET": str(int(device == "cpu"))},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.strip().splitlines()
    assert len(lines) == 1, run.stdout
    category, at_the_caller, message = (part.strip() for part in lines[0].split("|", 2))
    assert category == "UserWarning" and at_the_caller == "True"
    assert "hard_weight" in message and "labels" in message


def test_no_warning_where_labels_are_used(z: Tensor, v: Tensor, backend: str) -> None:
    """hard_weight=0.0 says that it is meant; so does a hard term, or no labels."""
    labels = torch.tensor([1, -100, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.kd_loss(z, v, labels, hard_weight=0.0, backend=backend)
        kd.kd_loss(z, v, labels, hard_weight=0.5, backend=backend)
        kd.kd_loss(z, v, mask=labels != -100, backend=backend)
        kd.kd_loss(z, v, labels, divergence="dkd", backend=backend)  # its soft term uses them


def test_a_divergence_that_was_not_called(backend: str) -> None:
    """The class, or what registration returned, without its parameters."""
    z = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"divergence.*class JSD.*JSD\(\)"):
        kd.kd_loss(z, z, divergence=kd.JSD, backend=backend)
    with pytest.raises(TypeError, match=r"divergence.*class DKD"):
        kd.KDLoss(divergence=kd.DKD)


@pytest.mark.parametrize(
    "given, error, says",
    [
        (torch.tensor(-2.0), ValueError, "num_items.*-2"),
        (torch.tensor(float("nan")), ValueError, "num_items.*nan"),
        (torch.tensor(True), TypeError, "num_items.*bool"),
        (torch.tensor(2j), TypeError, "num_items.*complex"),
    ],
    ids=str,
)
def test_a_tensor_that_is_no_count(backend: str, given: Any, error: type[Exception], says: str) -> None:
    """Refused where it can be looked at, as a number is."""
    z = torch.zeros(2, 3)
    with pytest.raises(error, match=says):
        kd.kd_loss(z, z, num_items=given.cpu(), backend=backend)


@pytest.mark.parametrize("T", [1e-200, 1e200])
def test_a_temperature_without_a_square(backend: str, T: float) -> None:
    """T² would be 0 or infinite."""
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"temperature.*square"):
        kd.kd_loss(z, z, temperature=T, backend=backend)
