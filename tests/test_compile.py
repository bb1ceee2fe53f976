"""`torch.compile` and `torch.export`: one node, the gradients of eager, few compilations, the same errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import DEVICES, fused, interpreted
from tolerances import assert_within_budget
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from truth import Options

import kdkernels as kd
from kdkernels.functional import checked_call, complete
from kdkernels.ops import kind_of, pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, GRADIENT = torch.ops.kdkernels.kd_loss_v1.default, torch.ops.kdkernels.kd_gradient_v1.default


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    """The function in one graph, or an error."""
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def inputs(
    rows: int = 6, vocab: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels of which one is ignored."""
    z, v = (2 * torch.randn(rows, vocab) for _ in range(2))
    labels = torch.randint(vocab, (rows,))
    labels[0] = -100
    return z.to(dtype).requires_grad_(), v.to(dtype), labels


def everything(z: Tensor, v: Tensor, y: Tensor, mask: Tensor, weights: Tensor, backend: str) -> Tensor:
    """A loss with every option."""
    return kd.kd_loss(
        kd.Logits(z, scale=0.5, softcap=9.0), kd.Logits(v, softcap=8.0), y, divergence=kd.JSD(0.3),
        temperature=2.0, soft_weight=0.7, hard_weight=0.4, mask=mask, token_weights=weights, backend=backend,
    )  # fmt: skip


OPTIONS = Options(
    0.3, temperature=2.0, soft_weight=0.7, hard_weight=0.4,
    student_scale=0.5, student_softcap=9.0, teacher_softcap=8.0,
)  # fmt: skip


@pytest.mark.thorough(but=lambda dtype, dynamic: not dynamic or dtype is torch.float32)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_are_those_of_eager(backend: str, dtype: torch.dtype, dynamic: bool) -> None:
    """Of fused backends to the bit, under an upstream factor too; of the reference within the budget."""
    step = compiled(everything, dynamic=dynamic)
    for rows in (6, 9):
        z, v, y = inputs(rows, 3 * rows + 10, dtype)
        mask, weights = torch.arange(rows) != 2, torch.rand(rows)
        z.data[2] = torch.nan  # a row that doesn't count
        results = []
        for function in (step, everything):
            loss = function(z, v, y, mask, weights, backend)
            (gradient,) = torch.autograd.grad(loss, z, torch.tensor(3.0))
            results.append((loss.detach(), gradient))
        if backend == "reference":
            o = Options(**{**OPTIONS.__dict__, "mask": mask, "token_weights": weights})
            assert_within_budget(results[0], z, v, y, o, torch.tensor(3.0))
        else:
            assert torch.equal(results[0][0], results[1][0])
            assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_stats(backend: str, reduction: str) -> None:
    """What else a call returns."""

    def step(z: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, kd.KDStats]:
        return kd.kd_loss_with_stats(z, v, y, hard_weight=0.5, reduction=reduction, backend=backend)

    z, v, y = inputs()
    results = []
    for function in (compiled(step), step):
        loss, stats = function(z, v, y)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        results.append((loss.detach(), gradient, *vars(stats).values()))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.thorough(
    but=lambda backend, dtype: backend == "cpu" or (dtype is torch.float16) == (backend == "triton")
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_twenty_steps_in_two_compilations(backend: str, dtype: torch.dtype) -> None:
    """A schedule of T, beta and the number of items compiles once for the first value and once for all."""

    def step(z: Tensor, v: Tensor, y: Tensor, T: float, beta: float, items: int) -> Tensor:
        return kd.kd_loss(
            z, v, y, divergence=kd.JSD(beta), temperature=T, hard_weight=0.1, num_items=items, backend=backend
        )

    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(step, backend=counter)
    for k in range(20):
        z, v, y = inputs(dtype=dtype)
        changing = (1.0 + 0.15 * k, 0.05 + 0.045 * k, 5 + k)
        results = []
        for f in (function, step):
            loss = f(z, v, y, *changing)
            results.append((loss.detach(), *torch.autograd.grad(loss, z)))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 2


@pytest.mark.thorough(but=lambda backend: backend != "triton")
def test_a_schedule_of_every_number_in_two_compilations(backend: str) -> None:
    """Of T, sigma, probability, the place of the first row, the seed, parameters and weights."""

    def step(z: Tensor, a: Tensor, b: Tensor, y: Tensor, x: float, k: int) -> Tensor:
        noise = kd.LogitNoise(0.1 * x, "multiplicative", probability=1 / (1 + x), seed=k, row_offset=2 * k)
        return kd.kd_loss(
            z, kd.Mixture([a, b], [1.0, 0.5 + x]), y, divergence=kd.DKD(1 + x, 8 - x), temperature=1 + x,
            hard_weight=0.1 * x, student_noise=noise, teacher_noise=noise, backend=backend,
        )  # fmt: skip

    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(step, backend=counter)
    for k in range(6 if interpreted(backend) else 20):
        z, a, y = inputs()
        b = inputs()[1]
        results = []
        for f in (function, step):
            loss = f(z, a, b, y, 0.25 + 0.05 * k, 3 + k)
            results.append((loss.detach(), *torch.autograd.grad(loss, z)))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 2


NOISE = kd.LogitNoise(0.5, "multiplicative", probability=0.7, seed=3)
# A teacher and labels made of those of a plain call, and options.
FEATURES: dict[str, Callable[[Tensor, Tensor], tuple[Any, Tensor | None, dict[str, Any]]]] = {
    "plain": lambda v, y: (v, y, {}),
    "noise": lambda v, y: (
        v, y, {"student_noise": NOISE, "teacher_noise": replace(NOISE, per="row", seed=-1)}
    ),
    "a seed that is a tensor": lambda v, y: (v, y, {"student_noise": replace(NOISE, seed=y[1].long())}),
    "mixture": lambda v, y: (kd.Mixture([v, kd.Logits(v.flip(0), softcap=9.0)], [1.0, 2.0]), y, {}),
    "weights of each row": lambda v, y: (kd.Mixture([v, v.flip(0)], v[:, :2].float().abs()), y, {}),
    "dkd": lambda v, y: (v, y, {"divergence": kd.DKD(1.0, 4.0)}),
    "binary": lambda v, y: (v, v.sigmoid(), {"divergence": kd.BinaryKL(), "hard_weight": 0.3}),
    "raw logits": lambda v, y: (v, y, {"divergence": kd.LogitMSE(centered=True)}),
    "all": lambda v, y: (
        kd.Mixture([v, v.flip(0)]), y,
        {"divergence": "dkd", "student_noise": NOISE, "teacher_noise": replace(NOISE, kind="additive")},
    ),
}  # fmt: skip


# What is saved for backward differs with the dtype, and what is traced with the feature.
@pytest.mark.thorough(
    but=lambda backend, feature, dtype: (
        backend == "reference" or dtype is torch.float32 or feature in ("plain", "all")
    )
)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_that_a_call_may_have(backend: str, feature: str, dtype: torch.dtype) -> None:
    """In one graph, and of fused backends to the bit what eager gives."""

    def step(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
        teacher, labels, options = FEATURES[feature](v, y)
        words = {"hard_weight": 0.2, "temperature": 2.0, **options}
        return kd.kd_loss(z, teacher, labels, backend=backend, **words)

    if backend == "reference" and dtype == torch.float16:
        pytest.skip("the reference is traced in one way for every dtype")
    z, v, y = inputs(dtype=dtype)
    results = []
    for function in (compiled(step), step):
        loss = function(z, v, y)
        results.append((loss.detach(), *torch.autograd.grad(loss, z, torch.tensor(3.0))))
    if backend == "reference":
        torch.testing.assert_close(results[0], results[1])
    else:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_seed_that_is_drawn(backend: str) -> None:
    """Inside the graph too it comes from torch's generator: calls differ, a run repeats."""
    z, v, _ = inputs()
    noise = kd.LogitNoise(0.5)
    step = compiled(lambda z, v: kd.kd_loss(z, v, teacher_noise=noise, backend=backend))

    def run() -> list[float]:
        torch.manual_seed(4)
        return [step(z, v).item() for _ in range(3)]

    first = run()
    assert len(set(first)) == 3 and run() == first


def test_a_mixture_is_an_argument(backend: str) -> None:
    """As a batch brings it."""
    z, v, _ = inputs()
    mixture = kd.Mixture([v, v.flip(0)], torch.rand(6, 2))
    step = compiled(lambda z, teacher: kd.kd_loss(z, teacher, backend=backend))
    torch.testing.assert_close(step(z, mixture), kd.kd_loss(z, mixture, backend=backend))


def test_changing_shapes_and_counts_on_the_device(backend: str) -> None:
    """Ragged batches, with the count as a tensor: one more compilation, for all of them."""

    def step(z: Tensor, v: Tensor, items: Tensor) -> Tensor:
        return kd.kd_loss(z, v, num_items=items, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(step, backend=counter)
    for rows in (4, 7, 5, 12):
        z, v, _ = inputs(rows, 30 + rows)
        items = torch.tensor(float(rows))
        torch.testing.assert_close(function(z, v, items), step(z, v, items))
    assert counter.frame_count <= 2


def test_a_model_trains_under_inductor(backend: str) -> None:
    """Compiled whole, loss included, it takes the steps that it takes in eager."""

    def curve(compile_it: bool) -> list[float]:
        torch.manual_seed(1)
        model = nn.Linear(12, 30)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(x: Tensor, v: Tensor, y: Tensor) -> Tensor:
            return kd.kd_loss(model(x), v, y, temperature=2.0, hard_weight=0.2, backend=backend)

        run = compiled(step, "inductor") if compile_it else step
        losses = []
        x, v, y = torch.randn(8, 12), torch.randn(8, 30), torch.randint(30, (8,))
        for _ in range(5):
            optimizer.zero_grad()
            loss = run(x, v, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    got, expected = curve(True), curve(False)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_node_that_saves_one_gradient(backend: str, dtype: torch.dtype) -> None:
    """No pass over the logits beside it; of [N, V] backward keeps the gradient, or for float16 the inputs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    rows, vocab = 6, 40
    z, v, y = inputs(rows, vocab, dtype)

    def step(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return kd.kd_loss(z, v, y, temperature=2.0, hard_weight=0.1, backend=backend)

    loss = compiled(step, backend=aot_autograd(fw_compiler=keep))(z, v, y)
    forward = graphs[0].graph
    large = [
        n for n in forward.nodes if n.op == "call_function" and getattr(n.meta.get("val"), "shape", None)
    ]
    assert [n.target for n in forward.nodes if "kdkernels" in str(n.target)] == [FORWARD]
    assert sum(n.meta["val"].numel() >= rows * vocab for n in large) <= 1
    loss.backward()
    backward = [n.target for n in graphs[1].graph.nodes if "kdkernels" in str(n.target)]
    assert backward == ([GRADIENT] if dtype == torch.float16 else [])
    saved = [
        n for n in graphs[1].graph.nodes if n.op == "placeholder" and n.meta["val"].numel() >= rows * vocab
    ]
    assert len(saved) == (2 if dtype == torch.float16 else 1)


@fused
def test_backward_twice(backend: str) -> None:
    """Out of place, so that a kept graph gives the same gradient again."""
    z, v, _ = inputs()
    loss = compiled(lambda z, v: kd.kd_loss(z, v, backend=backend))(z, v)
    (first,) = torch.autograd.grad(loss, z, torch.tensor(2.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, torch.tensor(2.0))
    assert torch.equal(first, second) and first.abs().max() > 0


def test_module_and_no_grad(backend: str) -> None:
    """`kd.KDLoss` compiles as it is; without a gradient none is made."""
    z, v, _ = inputs()
    criterion = kd.KDLoss(divergence="reverse_kl", temperature=2.0, backend=backend)
    counter = CompileCounter()
    with torch.no_grad():
        loss = compiled(criterion, backend=counter)(z, v)
    torch.testing.assert_close(loss, criterion(z, v).detach())
    assert counter.frame_count == 1 and not loss.requires_grad


def test_labels_out_of_range(backend: str) -> None:
    """The error of eager on a CPU; NaN where looking would wait for the device."""
    z, v, y = inputs()
    y[3] = 40
    step = compiled(lambda z, v, y: kd.kd_loss(z, v, y, hard_weight=1.0, backend=backend))
    if DEVICES[backend] == "cuda":
        assert step(z, v, y).isnan()
        return
    with pytest.raises(ValueError, match=r"labels must be in \[0, 40\).*got 40 at row 3 of 6"):
        step(z, v, y)


def test_errors_of_arguments() -> None:
    """A graph break leaves the error to eager; with fullgraph it names what eager would say."""
    z, v, _ = inputs()

    def step(z: Tensor, v: Tensor) -> Tensor:
        return kd.kd_loss(z, v)

    with pytest.raises(ValueError, match="teacher must have the student's leading shape"):
        torch.compile(step, backend="aot_eager")(z, v[:2])
    with pytest.raises(Exception, match="teacher must have the student's leading shape"):
        compiled(step)(z, v[:2])
    with pytest.raises(ValueError, match="backend must be None or one of"):
        compiled(lambda z, v: kd.kd_loss(z, v, backend="gpu"))(z, v)


def test_a_backend_that_is_not_here() -> None:
    """Named, it is an error, as in eager: no other runs in its place."""
    z, v, _ = inputs()
    with pytest.raises(RuntimeError, match="backend='cuda' can't run this call"):
        compiled(lambda z, v: kd.kd_loss(z, v, backend="cuda"))(z, v)


def test_warnings_are_said_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, as in eager, and they don't break the graph."""
    monkeypatch.setattr("kdkernels.caller._warned", set())
    z, v, y = inputs()
    step = compiled(lambda z, v, y: kd.kd_loss(z, v, y))
    with pytest.warns(UserWarning, match="labels are given and hard_weight is None"):
        step(z, v, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(z, v, y)


def test_export_of_an_evaluation_step(backend: str) -> None:
    """The exported program holds the node, or plain torch for the reference, and gives the loss again."""

    class Evaluation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 30)

        def forward(self, x: Tensor, v: Tensor, y: Tensor) -> Tensor:
            return kd.kd_loss(
                self.head(x), v, kd.shift_labels(y), temperature=2.0, hard_weight=0.1, backend=backend
            )

    model = Evaluation().eval()
    sequences = torch.export.Dim("sequences")
    arguments = (torch.randn(3, 5, 12), torch.randn(3, 5, 30), torch.randint(30, (3, 5)))
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=[{0: sequences}] * 3)
        nodes = [n.target for n in program.graph.nodes if n.target == FORWARD]
        assert len(nodes) == (backend != "reference")
        other = (torch.randn(7, 5, 12), torch.randn(7, 5, 30), torch.randint(30, (7, 5)))
        for given in (arguments, other):
            torch.testing.assert_close(program.module()(*given), model(*given))


# The operators themselves


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_no_cuda_graph_holds_on_to_the_numbers_of_a_step() -> None:
    """They come in a CPU tensor, which a captured graph would read once."""
    assert torch.Tag.cudagraph_unsafe in FORWARD.tags and torch.Tag.cudagraph_unsafe in GRADIENT.tags


def operator_inputs(
    backend: str,
    dtype: torch.dtype,
    keep: str,
    stats: bool = False,
    reduction: str = "mean",
    feature: str = "plain",
) -> tuple[Any, ...]:
    """What the node of a loss is given."""
    z, v, y = inputs(4, 10, dtype)
    teacher, labels, options = FEATURES[feature](v, y)
    words = {"hard_weight": 0.5, "reduction": reduction, "temperature": 2.0, **options}
    call = checked_call(z, teacher, labels, complete(words), stats)
    spec = call.spec
    return (
        call.student, list(call.teachers), *call[2:6], None, call.student_seed, call.teacher_seed,
        *(call.sparse or (None,) * 4), pack(spec, None), spec.divergence,
        kind_of(spec.student_noise) + kind_of(spec.teacher_noise),
        -100, reduction, stats, 10, keep, backend,
    )  # fmt: skip


@fused
@pytest.mark.parametrize(
    "dtype, keep, stats, reduction",
    [
        (torch.float32, "gradient", False, "mean"),
        (torch.bfloat16, "gradient", True, "none"),
        (torch.float16, "state", False, "sum"),
        (torch.float32, "nothing", True, "mean"),
    ],
)
def test_opcheck_of_the_loss(
    backend: str, dtype: torch.dtype, keep: str, stats: bool, reduction: str
) -> None:
    """Schema, fake, autograd and dynamic shapes are what torch expects of an operator."""
    given = operator_inputs(backend, dtype, keep, stats, reduction)
    if keep == "nothing":
        given = (given[0].detach(), *given[1:])
    torch.library.opcheck(FORWARD, given)


@fused
@pytest.mark.parametrize("feature", ["noise", "mixture", "weights of each row", "dkd", "binary"])
def test_opcheck_of_what_a_call_may_have(backend: str, feature: str) -> None:
    """Seeds, several teachers, floats for labels."""
    torch.library.opcheck(FORWARD, operator_inputs(backend, torch.float32, "gradient", feature=feature))


@fused
@pytest.mark.parametrize("feature", ["plain", "noise", "mixture", "binary"])
def test_opcheck_of_the_gradient(backend: str, feature: str) -> None:
    """And of the node that float16 leaves for backward."""
    z, *rest = operator_inputs(backend, torch.float16, "state", feature=feature)
    _, _, state = FORWARD(z.detach(), *rest)
    torch.library.opcheck(GRADIENT, (torch.tensor(2.0), z.detach(), *rest, state))


def test_opcheck_of_the_check_of_labels() -> None:
    """Which the compiled reference looks at labels with."""
    torch.library.opcheck(torch.ops.kdkernels.check_labels_v1.default, (torch.tensor([[1, 9]]), 10))
