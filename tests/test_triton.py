"""What only the Triton kernels have: builds for GPUs that are not here, their reads, launches and waits, and
closed forms beside the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interpreted
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import kdkernels as kd
from benchmarks import builds
from kdkernels.autograd import what_to_keep
from kdkernels.divergences import TABLE
from kdkernels.functional import checked_call, complete

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not interpreted("triton"),
    reason="the kernels are not interpreted here",
)
ROOT = Path(__file__).parent.parent


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


# Builds


@needs_triton
@pytest.mark.parametrize("target", builds.TARGETS)
def test_builds_for_gpus_that_are_not_here(target: str) -> None:
    """Nothing spills, and rows are read and written 16 bytes a thread, whatever is asked for."""
    found = built("--targets", target)
    rows = [b for b in found if b["kernel"] == "row_kernel"]
    for name in TABLE:
        for options in builds.OPTIONS:
            for vocab in builds.VOCABULARIES:
                here = [b for b in rows if b["divergence"] == name and options in b["options"]]
                assert {b["dtype"] for b in here if vocab in b["vocab"]} == {"bf16", "fp16", "fp32"}
    assert {b["kernel"] for b in found} == {"row_kernel", "scale_kernel", "total_kernel"}
    for b in found:
        assert b["spills"] == 0, b
        assert b["registers"] <= 255 and b["shared"] <= 48 * 1024, b
        if b["kernel"] == "row_kernel":
            loads, stores = wide_accesses(b)
            if target == "gfx942":  # where loops are unrolled, too
                assert b["wide_loads"] >= loads and b["wide_stores"] >= stores, b
            else:
                assert (b["wide_loads"], b["wide_stores"]) == (loads, stores), b


def wide_accesses(b: dict[str, Any]) -> tuple[int, int]:
    """The 16-byte accesses in the code where it has no others to a row: those of its passes over memory."""
    bytes_at_once = b["block"] // (b["lanes"] * b["warps"]) * builds.DTYPES[b["dtype"]].itemsize
    closed = TABLE[b["divergence"]].closed is not None
    phases = {1: 2 if closed else 3, builds.STATE: 1 if closed else 2, 3: 1}[b["mode"]]
    reads = 2 * (1 if b["whole"] else phases)
    writes = (
        0 if b["mode"] == builds.STATE else 1 if b["options"] == ["plain"] else 2
    )  # 0s, where none counts
    return reads * bytes_at_once // 16, writes * bytes_at_once // 16


@needs_triton
def test_float64_builds() -> None:
    """For tests alone, so that spills are allowed; that it builds is not."""
    found = built("--targets", "sm_90", "gfx942", "--dtypes", "fp64", "--options", "everything")
    assert {(b["target"], b["divergence"]) for b in found} >= {
        (t, d) for t in ("sm_90", "gfx942") for d in TABLE
    }


@needs_triton
def test_rows_that_begin_anywhere() -> None:
    """GPT-2's 50,257 classes: narrow accesses, no spill, and room for two programs a multiprocessor."""
    found = built("--targets", "sm_90", "--dtypes", "bf16", "--vocabularies", "50257")
    rows = [b for b in found if b["kernel"] == "row_kernel"]
    assert {b["divergence"] for b in rows} == set(TABLE)
    for b in rows:
        assert b["wide_loads"] == 0 and b["spills"] == 0 and b["registers"] <= 128, b


def built(*options: str) -> list[dict[str, Any]]:
    """What the builds use; in a process of its own, since in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "builds", "--lines", *options],
        capture_output=True, text=True, env=environment, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_builds_do_not_depend_on_the_batch() -> None:
    """A count that is compiled in would mean a build for every length of a sequence."""

    code = """
from benchmarks import builds

def keys(rows):
    launches = builds.launches_of("sm_90", "jsd", "bf16", 32_000, "everything", rows)
    return [repr(builds.specialised(launch)) for launch in launches]

assert keys(1) == keys(7) == keys(4096) and len(keys(2)) == 3
unspecialised = builds.launches_of("sm_90", "jsd", "bf16", 32_000, "everything")[0].kernel.do_not_specialize
assert {"rows", "n1", "n2", "z_stride0", "classes", "width"} <= set(unspecialised)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


# Passes over memory

READS = {  # of both sides together, as the table of floors counts them
    "loss": {"closed": 2, "open": 4},
    "gradient": {"closed": 4, "open": 6},
}


@needs_interpreter
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("vocab", [1000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_passes_over_memory(
    monkeypatch: pytest.MonkeyPatch, name: str, vocab: int, dtype: torch.dtype
) -> None:
    """Streaming: 2 reads for the loss of a KL, 4 + 1 write with its gradient, 2 more of either for JSD. Rows
    that fit are read once. With float16, whose gradient comes later, 2 + 1 more."""
    rows = 3
    z, v = (torch.randn(rows, vocab).to(dtype) for _ in range(2))
    counter = Counter(monkeypatch, z, v)
    stays, kind = vocab <= 4096, "open" if TABLE[name].closed is None else "closed"

    def passes() -> tuple[float, float]:
        reads, writes = (x / (rows * vocab) for x in counter.take())
        return reads, writes

    kd.kd_loss(z, v, divergence=name, backend="triton")
    assert passes() == (2 if stays else READS["loss"][kind], 0)
    z.requires_grad_()
    loss = kd.kd_loss(z, v, divergence=name, backend="triton")
    if dtype == torch.float16:
        assert passes() == (2 if stays else READS["loss"][kind], 0)
        loss.backward()
        assert passes() == (2, 1)
    else:
        assert passes() == (2 if stays else READS["gradient"][kind], 1)


@needs_interpreter
def test_passes_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, stats, weights and caps are had from the same reads; a row that doesn't count is not read."""
    rows, vocab = 4, 9000
    z, v = torch.randn(rows, vocab), torch.randn(rows, vocab)
    counter = Counter(monkeypatch, z, v)
    z.requires_grad_()
    labels = torch.randint(vocab, (rows,))
    mask = torch.tensor([True, True, False, True])
    kd.kd_loss_with_stats(
        kd.Logits(z, softcap=20.0), kd.Logits(v, scale=0.5), labels, hard_weight=0.1, temperature=2.0,
        mask=mask, token_weights=torch.rand(rows), backend="triton",
    )  # fmt: skip
    reads, writes = counter.take()
    assert reads == 4 * 3 * vocab + 3  # and the logit of each label
    assert writes == rows * vocab


class Counter:
    """Counts the logits that interpreted kernels load, and what they store that is as large."""

    def __init__(self, patch: pytest.MonkeyPatch, *logits: torch.Tensor) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.sides = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in logits]
        self.reads = self.writes = 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            at = pointers.data[mask.data]
            self.reads += sum(int(((at >= low) & (at < high)).sum()) for low, high in self.sides)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            if pointers.data.size > 1:  # all but a row's figures
                self.writes += int(mask.data.sum())
            return store(builder, pointers, value, mask, *rest)

        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def take(self) -> tuple[int, int]:
        """What was counted since last time."""
        counted, self.reads, self.writes = (self.reads, self.writes), 0, 0
        return counted


# The host


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    """On tensors that are on a GPU and hold no data, so that looking at them is an error; 0 looks."""
    if torch.cuda.is_available():
        pytest.skip("set_sync_debug_mode says it of a real device, in test_functional.py")
    from kdkernels.backends import triton_kernels

    with FakeTensorMode(), torch.no_grad():
        z, v = (torch.randn(4, 10, device="cuda", dtype=dtype) for _ in range(2))
        options = {
            "hard_weight": 0.5, "mask": torch.rand(4, device="cuda") > 0.5,
            "token_weights": torch.rand(4, device="cuda"), "num_items": torch.rand((), device="cuda"),
        }  # fmt: skip
        labels = torch.randint(10, (4,), device="cuda")
        with builds.recorded() as launches:
            loss, _ = kd.kd_loss_with_stats(z, v, labels, **options)
            assert loss.device.type == "cuda"
            call = checked_call(z, v, labels, complete(options), stats=True)
            keep = what_to_keep(dtype)
            loss, _, kept = triton_kernels.forward(call, keep)
            upstream = torch.ones_like(loss)
            if keep == "state":
                triton_kernels.gradient(upstream, call, kept)
            else:
                triton_kernels.scale(kept, upstream, in_place=True)
        assert len(launches) == 5
        with pytest.raises(DataDependentOutputException):
            loss.item()  # the test can fail


class DeviceWork(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts torch's operators that launch something."""

    # fill_: what the tests put into new memory.
    FREE = ("aten::empty", "aten::fill_", "aten::view", "aten::detach", "prim::device", "aten::unbind")

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name not in self.FREE:
            self.launched.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize(
    "given, expected",
    [((), 2), (("mask",), 3), (("labels",), 4), (("labels", "mask", "num_items", "stats"), 3)],
)
def test_launches(given: tuple[str, ...], expected: int) -> None:
    """The rows and their sum; the count of those that count is one more of torch's, or two from labels."""
    if torch.cuda.is_available():
        pytest.skip("counted on tensors without data")
    from kdkernels.backends import triton_kernels

    with FakeTensorMode(), torch.no_grad():
        z, v = (torch.randn(4, 10, device="cuda") for _ in range(2))
        tensors = {
            "mask": torch.rand(4, device="cuda") > 0.5,
            "num_items": torch.rand((), device="cuda"),
        }
        labels = torch.randint(10, (4,), device="cuda") if "labels" in given else None
        options = {"hard_weight": 0.1 if "labels" in given else None}
        options |= {name: tensors[name] for name in given if name in tensors}
        call = checked_call(z, v, labels, complete(options), stats="stats" in given)
        with builds.recorded() as launches, DeviceWork() as work:
            triton_kernels.forward(call, "gradient")
    assert len(launches) == 2
    assert len(launches) + len(work.launched) == expected, work.launched


@needs_interpreter
def test_interpreted_kernels_run_only_where_they_are_named() -> None:
    """`backend=None` on a CPU is never the interpreter, which is thousands of times slower."""
    explained = kd.explain(torch.zeros(2, 3), torch.zeros(2, 3))
    assert explained.reasons["triton"] is None and explained.backend != "triton"


def test_triton_is_not_imported_with_the_package() -> None:
    """Importing it takes longer than all the rest."""
    code = "import sys, kdkernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
