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
from kdkernels import noise
from kdkernels.autograd import what_to_keep
from kdkernels.divergences import DEFAULTS, TABLE, resolve
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
    params = resolve(name)[1]
    c = divergence.closed
    assert c is not None
    own, other, weights = (u, y, lp.exp()) if c.teacher_weighs else (y, u, lq.exp())
    times = 1.0 if c.times is None else params[c.times]
    D = (weights * (c.a * own + c.b * other)).sum(-1) - c.a * own.logsumexp(-1) - c.b * other.logsumexp(-1)
    D = times * D
    torch.testing.assert_close(D, divergence.phi(lq, lp, *params).sum(-1), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        times * c.sum_g + c.sum_g_per_d * D, divergence.g(lq, lp, *params).sum(-1), rtol=1e-12, atol=1e-13
    )


@needs_triton
def test_constants_are_the_same_at_the_next_launch() -> None:
    """Triton refuses a second launch of a kernel one of whose constants is not equal to what it was."""
    import triton.language as tl

    from kdkernels.backends import (
        triton_blocks,
        triton_kernels,
        triton_math,
        triton_noise,
        triton_shards,
        triton_sparse,
        triton_teachers,
    )

    modules = (
        triton_blocks, triton_kernels, triton_math, triton_noise, triton_shards, triton_sparse,
        triton_teachers,
    )  # fmt: skip
    constants = {
        (module.__name__, name): value.value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, tl.constexpr)
    }
    assert constants and {at for at, value in constants.items() if value != value} == set()


# Builds


@needs_triton
@pytest.mark.parametrize("target", builds.TARGETS)
def test_builds_for_gpus_that_are_not_here(target: str, request: pytest.FixtureRequest) -> None:
    """No loop over a row spills, and it is read and written 16 bytes a thread, whatever is asked for.

    In a thorough run of all divergences on sm_90, and of each path on the others.
    """
    options = ("plain", "everything")
    thorough = request.config.getoption("--thorough")
    names = (TABLE if target == "sm_90" else PATHS) if thorough else OF_EACH[target]
    chosen = "--targets", target, "--options", *options, "--vocabularies", *map(str, VOCABULARIES)
    found = built(*chosen, "--dtypes", "bf16", "--divergences", *names)
    if both := [name for name in names if name in CHEAPEST]:
        found += built(*chosen, "--dtypes", "fp16", "fp32", "--divergences", *both)
    rows = [b for b in found if b["kernel"] == "row_kernel"]
    for name in names:
        dtypes = {"bf16", "fp16", "fp32"} if name in CHEAPEST else {"bf16"}
        for option in options:
            for vocab in VOCABULARIES:
                here = [b for b in rows if b["divergence"] == name and option in b["options"]]
                assert {b["dtype"] for b in here if vocab in b["vocab"]} == dtypes
    assert {b["kernel"] for b in found} == {"row_kernel", "scale_kernel", "total_kernel"}
    for b in found:
        assert fits(b) and b["registers"] <= 255 and b["shared"] <= 48 * 1024, b
        if b["kernel"] == "row_kernel":
            loads, stores = wide_accesses(b)
            if target == "gfx942":  # where loops are unrolled, too
                assert b["wide_loads"] >= loads and b["wide_stores"] >= stores, b
            else:
                assert (b["wide_loads"], b["wide_stores"]) == (loads, stores), b


CHEAPEST = ("forward_kl", "jsd")  # a closed form and none
PATHS = (*CHEAPEST, "dkd", "centered_logit_mse", "binary_kl")  # all that the kernel has
# Of which a plain run builds these: each path on one of the GPUs, and where it takes most registers.
OF_EACH = {
    "sm_80": ("binary_kl",), "sm_90": ("forward_kl", "jsd"), "sm_100": ("dkd",),
    "gfx942": ("centered_logit_mse",),
}  # fmt: skip
VOCABULARIES = (1000, 128256)  # one that a block holds, and one that streams


def fits(b: dict[str, Any]) -> bool:
    """Whether no loop moves spilled registers, and before them no more than a few numbers of a row go."""
    simple = b["target"] == "sm_90" and b["dtype"] != "fp16" and b["divergence"] in SIMPLE
    known = (b["target"], b["divergence"]) in builds.RELOADING
    return (known or b["reloads"] == 0) and b["spills"] <= (0 if simple else 32)


SIMPLE = ("forward_kl", "soft_cross_entropy", "reverse_kl", "jsd")


def wide_accesses(b: dict[str, Any]) -> tuple[int, int]:
    """The 16-byte accesses in the code where it has no others to a row: those of its passes over memory."""
    size = builds.DTYPES[b["dtype"]].itemsize
    at_once = b["block"] // (b["lanes"] * b["warps"]) * size // 16
    row, labelled = TABLE[b["divergence"]], b["options"] != ["plain"] or TABLE[b["divergence"]].target
    if row.normaliser == "softmax":
        phases = {1: 2 if row.closed else 3, builds.STATE: 1 if row.closed else 2, 3: 1}[b["mode"]]
        reads = 2 * phases
    else:
        # The sums of phi come with the last read. Before it one of both sides for means or for the stats'
        # softmax, or one of the student's for that of a hard term.
        both = row.normaliser == "mean" or "everything" in b["options"]
        first = 0 if row.binary else 2 if both else 1 if "hard" in b["options"] else 0
        reads = 2 + (first if b["mode"] != 3 else 0)
    if b["whole"]:
        reads = 2
    if row.binary and labelled:
        reads += 1
    # 0s, where none counts.
    zeros = row.binary and b["options"] != ["everything"]
    writes = 0 if b["mode"] == builds.STATE else 2 if labelled and not zeros else 1
    return reads * at_once, writes * at_once


@needs_triton
@pytest.mark.parametrize("options", ["noise", "mixture"])
def test_builds_with_noise_and_mixtures(options: str, request: pytest.FixtureRequest) -> None:
    """No loop over a row spills; with noise, threads exchange no more than sums.

    In a thorough run of all divergences, else of each path.
    """
    names = TABLE if request.config.getoption("--thorough") else PATHS
    chosen = "--targets", "sm_90", "--options", options, "--divergences", *names
    found = built(*chosen, "--dtypes", "bf16", "--vocabularies", "128256")
    rows = [b for b in found if b["kernel"] == "row_kernel"]
    expected = {name for name in names if options == "noise" or builds.has_mixtures(name)}
    assert {b["divergence"] for b in rows} == expected
    for b in rows:
        assert fits(b) and b["shared"] <= 256 and b["registers"] <= 168, b


@pytest.mark.thorough
@needs_triton
def test_float64_builds() -> None:
    """For tests alone, so that spills are allowed; that it builds is not."""
    found = built(
        "--targets", "sm_90", "gfx942", "--dtypes", "fp64", "--options", "everything",
        "--divergences", *PATHS, "--vocabularies", "128256",
    )  # fmt: skip
    assert {(b["target"], b["divergence"]) for b in found} >= {
        (t, d) for t in ("sm_90", "gfx942") for d in PATHS
    }


@needs_triton
def test_rows_that_begin_anywhere() -> None:
    """GPT-2's 50,257 classes: narrow accesses, no spill, and room for two programs a multiprocessor."""
    found = built(
        "--targets", "sm_90", "--dtypes", "bf16", "--vocabularies", "50257",
        "--options", "plain", "everything", "--divergences", *PATHS, "alpha_beta",
    )  # fmt: skip
    rows = [b for b in found if b["kernel"] == "row_kernel"]
    assert {b["divergence"] for b in rows} == {*PATHS, "alpha_beta"}
    for b in rows:
        assert b["wide_loads"] == 0 and fits(b), b
        # Binary classes have labels beside both sides, and nine sums with stats.
        assert b["registers"] <= (168 if b["divergence"] == "binary_kl" else 128), b


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

def keys(rows, options):
    launches = builds.launches_of("sm_90", "jsd", "bf16", 32_000, options, rows)
    return [repr(builds.specialised(launch)) for launch in launches]

for options in ("everything", "noise", "mixture"):
    assert keys(1, options) == keys(7, options) == keys(4096, options) and len(keys(2, options)) == 3
unspecialised = builds.launches_of("sm_90", "jsd", "bf16", 32_000, "everything")[0].kernel.do_not_specialize
assert {"rows", "n1", "n2", "z_stride0", "classes", "width"} <= set(unspecialised)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


# Passes over memory


def reads_of(name: str, mode: str) -> int:
    """Reads of both sides together, as the table of floors counts them, by a program that streams."""
    row = TABLE[name]
    if row.normaliser != "softmax":
        return {"none": 2, "mean": 4}[row.normaliser]
    return {"loss": 2, "gradient": 4}[mode] + (0 if row.closed else 2)


@pytest.mark.thorough(
    but=lambda name, vocab, dtype: name in PATHS or (vocab == 9000 and dtype is torch.float32)
)
@needs_interpreter
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("vocab", [1000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_passes_over_memory(
    monkeypatch: pytest.MonkeyPatch, name: str, vocab: int, dtype: torch.dtype
) -> None:
    """Streaming: 2 reads for the loss of a KL, 4 + 1 write with its gradient, 2 more of either for JSD; 2 + 1
    for logits as they are, 2 more for centred ones. Rows that fit are read once. With float16, whose gradient
    comes later, 2 + 1 more."""
    rows = 3
    z, v = (torch.randn(rows, vocab).to(dtype) for _ in range(2))
    counter = Counter(monkeypatch, z, v)
    stays = vocab <= 4096
    labels = torch.randint(vocab, (rows,)) if TABLE[name].target else None
    at_labels = 2 * rows if TABLE[name].target else 0  # the logits of the targets

    def passes() -> tuple[float, float]:
        reads, writes = counter.take()
        return (reads - at_labels) / (rows * vocab), writes / (rows * vocab)

    choice = CHOICES.get(name, name)
    kd.kd_loss(z, v, labels, divergence=choice, backend="triton")
    assert passes() == (2 if stays else reads_of(name, "loss"), 0)
    z.requires_grad_()
    loss = kd.kd_loss(z, v, labels, divergence=choice, backend="triton")
    if dtype == torch.float16:
        assert passes() == (2 if stays else reads_of(name, "loss"), 0)
        loss.backward()
        at_labels = 0
        assert passes() == (2, 1)
    else:
        assert passes() == (2 if stays else reads_of(name, "gradient"), 1)


CHOICES = builds.CHOICES | {name: choice for name, choice in DEFAULTS.items() if name != "jsd"}


@needs_interpreter
@pytest.mark.parametrize("vocab", [1000, 9000])
def test_passes_with_noise(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """Drawn again where logits are looked at, and not stored."""
    z, v = torch.randn(2, vocab, requires_grad=True), torch.randn(2, vocab)
    counter = Counter(monkeypatch, z, v)
    noises = {side: kd.LogitNoise(0.1, seed=1) for side in ("student_noise", "teacher_noise")}
    kd.kd_loss(z, v, backend="triton", **noises)
    assert counter.take() == ((2 if vocab == 1000 else 4) * z.numel(), z.numel())


@needs_interpreter
@pytest.mark.parametrize("vocab", [1000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_passes_with_a_mixture(monkeypatch: pytest.MonkeyPatch, vocab: int, dtype: torch.dtype) -> None:
    """One more read of each teacher, but for those without a share of a row, which are not read there;
    backward finds their normalisers in the state."""
    z, *teachers = (torch.randn(2, vocab).to(dtype) for _ in range(4))
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.4, 0.6]])
    counter = Counter(monkeypatch, z, *teachers)
    z.requires_grad_()
    loss = kd.kd_loss(z, kd.Mixture(teachers, weights), backend="triton")
    recomputed, whole = dtype == torch.float16, vocab == 1000
    looks = 1 if whole else (2 if recomputed else 3)  # at the five rows of teachers that have a share
    students = 1 if whole or recomputed else 2
    assert counter.take() == ((5 * looks + 2 * students) * vocab, 0 if recomputed else 2 * vocab)
    loss.backward()
    if recomputed:
        # Rows that stay on chip look at their teachers' once, too.
        assert counter.take() == (7 * vocab, 2 * vocab)


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


# Noise

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from kdkernels.backends import triton_noise

    @triton.jit
    def draw(seed_ptr, words_ptr, normals_ptr, row, start, STREAM: tl.constexpr, BLOCK: tl.constexpr):
        """Words as [4, BLOCK / 4], normals in the order of classes."""
        seed = tl.load(seed_ptr)
        lane = tl.arange(0, BLOCK // 4)
        row = tl.zeros([], tl.int64) + row
        words = triton_noise.words(seed, row, start // 4 + lane, STREAM)
        for k in tl.static_range(4):
            tl.store(words_ptr + k * (BLOCK // 4) + lane, words[k].to(tl.int64))
        one = tl.full((), 1.0, normals_ptr.dtype.element_ty)
        drawn = triton_noise.sample(
            one, one, seed, row, start, STREAM, triton_noise.ADDITIVE, False, one.dtype, BLOCK
        )
        tl.store(normals_ptr + tl.arange(0, BLOCK), drawn)


@needs_interpreter
@pytest.mark.parametrize("block", [4, 32, 1024])
@pytest.mark.parametrize("seed", [0, -1, 1 << 62, -(1 << 63)])
@pytest.mark.parametrize("row", [0, (1 << 40) + 3, (1 << 53) - 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 5e-6)])
def test_the_words_and_normals_of_the_noise(
    block: int, seed: int, row: int, dtype: torch.dtype, close: float
) -> None:
    """Word by word those of `noise.words`, in the order of classes; normals but for rounding."""
    stream, start = 2, 8
    key, rows = torch.tensor(seed), torch.tensor([row])
    words, normals = torch.empty(4, block // 4, dtype=torch.int64), torch.empty(block, dtype=dtype)
    draw[(1,)](key, words, normals, row, start, STREAM=stream, BLOCK=block)
    groups = torch.arange(start // 4, (start + block) // 4)
    assert torch.equal(words, torch.stack(noise.words(key, rows, groups, stream))[:, 0])
    exact = noise.normals(key, rows, start + block, stream, torch.float64)[0, start:]
    torch.testing.assert_close(normals.double(), exact, rtol=close, atol=close)


@needs_interpreter
def test_philox_has_its_published_words() -> None:
    """The first known answer of Random123: counter and key 0."""
    words = torch.empty(4, 1, dtype=torch.int64)
    draw[(1,)](torch.tensor(0), words, torch.empty(4), 0, 0, STREAM=0, BLOCK=4)
    assert words.flatten().tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


# The host


def opaque(name: str) -> Any:
    """A function whose source nobody has."""
    made: dict[str, Any] = {}
    exec(f"def {name}(lq, lp):\n    return lq * lp", made)
    return made[name]


@needs_triton
def test_a_registered_divergence_needs_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be compiled is refused with the reason, and what the reference does otherwise is done."""
    from kdkernels.backends.triton_ import BACKEND
    from kdkernels.divergences import Divergence
    from kdkernels.expressions import g_forward_kl, phi_forward_kl

    monkeypatch.setitem(TABLE, "mine", Divergence("mine", phi_forward_kl, g_forward_kl))
    monkeypatch.setitem(TABLE, "opaque", Divergence("opaque", phi_forward_kl, opaque("g")))
    monkeypatch.setitem(TABLE, "wide", Divergence("wide", phi_forward_kl, g_forward_kl, tuple("abcde")))
    assert BACKEND.knows("mine") is None and all(BACKEND.knows(name) is None for name in DEFAULTS)
    assert "from the source, and g of" in str(BACKEND.knows("opaque"))
    assert "up to 4 parameters, this one has 5" in str(BACKEND.knows("wide"))


@needs_interpreter
def test_a_registered_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as a built-in one does, without its closed form."""
    from kdkernels.divergences import Divergence
    from kdkernels.expressions import g_forward_kl, phi_forward_kl

    monkeypatch.setitem(TABLE, "mine", Divergence("mine", phi_forward_kl, g_forward_kl))
    z, v = torch.randn(2, 3, 50).unbind()
    z.requires_grad_()
    ours, theirs = (kd.kd_loss(z, v, divergence=name, backend="triton") for name in ("mine", "forward_kl"))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_waits_for_the_device(dtype: torch.dtype, mixed: bool) -> None:
    """On tensors that are on a GPU and hold no data, so that looking at them is an error; 0 looks."""
    if torch.cuda.is_available():
        pytest.skip("set_sync_debug_mode says it of a real device, in test_functional.py")
    from kdkernels.backends import triton_launch

    triton_launch.needs_guard(TABLE["forward_kl"], ())  # looks at numbers of its own, once
    with FakeTensorMode(), torch.no_grad():
        z, v = (torch.randn(4, 10, device="cuda", dtype=dtype) for _ in range(2))
        options = {
            "hard_weight": 0.5, "mask": torch.rand(4, device="cuda") > 0.5,
            "token_weights": torch.rand(4, device="cuda"), "num_items": torch.rand((), device="cuda"),
            "student_noise": kd.LogitNoise(0.1, probability=0.5), "teacher_noise": kd.LogitNoise(0.1, seed=3),
        }  # fmt: skip
        labels = torch.randint(10, (4,), device="cuda")
        if mixed:
            v = kd.Mixture([v, v.float()], torch.rand(4, 2, device="cuda"))
        with builds.recorded() as launches:
            loss, _ = kd.kd_loss_with_stats(z, v, labels, **options)
            assert loss.device.type == "cuda"
            call = checked_call(z, v, labels, complete(options), stats=True)
            keep = what_to_keep(dtype)
            loss, _, kept = triton_launch.forward(call, keep)
            upstream = torch.ones_like(loss)
            if keep == "state":
                triton_launch.gradient(upstream, call, kept)
            else:
                triton_launch.scale(kept, upstream, in_place=True)
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
    from kdkernels.backends import triton_launch

    triton_launch.needs_guard(TABLE["forward_kl"], ())  # looks at numbers of its own, once
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
            triton_launch.forward(call, "gradient")
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
