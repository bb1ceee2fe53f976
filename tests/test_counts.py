"""Costs that are counted, against `counts.json`: passes over memory, launches, allocations and waits.

Times say the same later, and only on a quiet machine. What each number follows from stands beside it there.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import interpreted, why_not
from counted import (
    CountedUnit,
    Launches,
    Library,
    Steps,
    Traffic,
    build,
    counted_launches,
    counted_library,
    source,
    why_no_library,
)
from cuda_on_cpu import Split, cuda_on_cpu
from cuda_shim import why_not as why_no_cuda
from torch import Tensor

import kdkernels as kd
from kdkernels import registry, stored
from kdkernels.autograd import what_to_keep
from kdkernels.backends.cpu import CpuBackend
from kdkernels.divergences import TABLE, Divergence
from kdkernels.expressions import g_forward_kl, phi_forward_kl
from kdkernels.functional import checked_call, complete

COUNTS: dict[str, Any] = json.loads((Path(__file__).parent / "counts.json").read_text(encoding="utf-8"))
CHOICES = {"jsd": kd.JSD(0.5), "skew_kl": kd.SkewKL(0.1), "shards_jsd": kd.JSD(0.5)}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")
K = 64

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not interpreted("triton"),
    reason="the kernels are not interpreted here",
)


def cases(part: str) -> list[str]:
    """Those of a part of the file."""
    return [name for name in COUNTS[part] if name not in ("about", "floor", "why")]


class Problem:
    """One case: what it is given, and a step of it.

    Heads have so few features that what is made of logits is all that counts.
    """

    def __init__(self, case: str, rows: int, classes: int, dtype: torch.dtype = torch.float32) -> None:
        dtype = torch.float16 if case == "float16" else dtype
        self.case, self.rows, self.classes = case, rows, classes
        self.size = rows * classes * dtype.itemsize
        self.upstream = torch.ones(rows if case == "none" else ())
        if case == "upstream":
            self.upstream *= 3
        self.options: dict[str, Any] = {
            "divergence": CHOICES.get(case, case if case in DIVERGENCES else "forward_kl")
        }
        self.labels: Tensor | None = None
        self.learns: list[Tensor] = []
        if case.startswith("heads"):
            x, w, t_x, t_w = (torch.randn(n, 16).to(dtype) for n in (rows, classes, rows, classes))
            self.learns = [x.requires_grad_(), w.requires_grad_()]
            self.student: Any = kd.Head(x, w)
            self.teacher: Any = kd.Head(t_x, t_w)
        else:
            z, self.teacher = (torch.randn(rows, classes).to(dtype) for _ in range(2))
            self.student = z.requires_grad_()
            self.learns = [z]
        if case == "stored":
            # Evenly, so that each is in a group of 16 of its own.
            ids = (classes // K * torch.arange(K)).repeat(rows, 1)
            lp = self.teacher.float().log_softmax(-1)
            self.teacher = kd.TopK(ids, lp.gather(-1, ids), lse={2.0: (lp / 2).logsumexp(-1)})
        if case in ("labels", "heads_labels", "heads_dropped"):
            self.with_labels()
        if case == "heads_labels":
            self.options["drop_masked"] = False
        if case == "mask":
            self.options["mask"] = torch.arange(rows) < rows / 2
        if case == "none":
            self.options["reduction"] = "none"
        if case.startswith("shards"):
            self.options["vocab_parallel"] = kd.VocabParallel(dist.group.WORLD)

    def with_labels(self, temperature: float = 1.0) -> Problem:
        """The same with a hard term, which at another temperature has a softmax of its own."""
        self.labels = torch.randint(self.classes, (self.rows,))
        self.options |= {"hard_weight": 0.1, "temperature": temperature}
        return self

    def step(self, backend: str) -> None:
        """Forward and backward; the gradients are dropped."""
        loss = kd.kd_loss(self.student, self.teacher, self.labels, backend=backend, **self.options)
        loss.backward(self.upstream.to(loss.dtype))
        for x in self.learns:
            x.grad = None


@pytest.fixture(scope="module")
def _alone() -> Iterator[None]:
    """A group of this process, which has all of the classes."""
    if dist.is_initialized():
        pytest.skip("this process is in a group of others")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_bound_has_its_reason() -> None:
    """Nothing is below the floor, and what is above it says why."""
    for part in ("cpu", "triton", "cuda"):
        for case in cases(part):
            row, floor = COUNTS[part][case], COUNTS[part]["floor"]
            assert all(row.get(name, least) >= least for name, least in floor.items()), (part, case)
            assert len(row["why"].split()) >= 3, (part, case)
    step = COUNTS["step"]
    for case, row in (*step["cpu"].items(), *step["triton"].items()):
        assert row["peak"] >= row["logits"] * step["floor"]["peak"] >= 1 or case in step["why"], case
        assert row["peak"] < 1.02 or case in step["why"], case


# The C++ library


@pytest.fixture(scope="module")
def library() -> Path:
    if (reason := why_no_library()) is not None:
        pytest.skip(reason)
    return build(source())


NARROW, WIDE = 1024, 16_384


def differences(
    counts: Library, p: Problem, case: str, own_softmax: bool = False
) -> dict[str, tuple[Any, Any]]:
    """What differs from a case's row: allowed, found. A few numbers a row more are labels and references."""
    row, wide, dtype = COUNTS["cpu"][case], p.classes == WIDE, p.learns[0].dtype
    found: dict[str, tuple[float, float]] = {}

    def compare(name: str, allowed: float, number: float, least: float | None = None) -> None:
        if not (allowed if least is None else least) - 1e-9 <= number <= allowed + 0.03:
            found[name] = allowed, number

    rows_of_float32 = p.rows * p.classes * 4
    sides = ["student"] if case == "stored" else ["student", "teacher"]
    for side in sides:
        traffic = counts.traffic(side).per(p.size)
        reads = (
            row["reads"]
            if wide or case in ("float16", "heads", "shards")
            else COUNTS["cpu"]["floor"]["reads"]
        )
        # What was touched last before a phase turns round is still there: up to a fifth of these wide rows.
        compare(f"{side} reads", reads, traffic.fetched, reads - 0.5 if reads > 1 else reads)
        # The first run of a row, all of a narrow one, is looked through for stored classes before it is read.
        more = int(not wide) if case == "stored" else 0
        if dtype == torch.float32 and case != "stored":
            more = 2 if case == "shards" else 1  # of every phase 1
        compare(f"{side} loads", row["loads"] + more, traffic.loaded)
    written = counts.traffic("gradient").per(p.size)
    compare("writes", row["writes"], written.stored)
    if case != "heads":  # whose gradient is where the logits were
        compare("gradient loads", row.get("gradient_loads", 0), written.loaded)
    kept, own = counts.traffic("scratch").per(rows_of_float32), int(own_softmax)
    if case != "stored":
        compare("kept stored", row["kept"][0] + own, kept.stored)
        compare("kept loaded", row["kept"][1] + own, kept.loaded)
    compare("mallocs", row["mallocs"], counts.allocations[0])
    return found


@pytest.mark.parametrize("case", [*DIVERGENCES, "upstream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_library(library: Path, case: str, dtype: torch.dtype) -> None:
    with counted_library(library) as counts:
        for classes in (NARROW, WIDE):
            p = Problem(case, 2, classes, dtype)
            for own_softmax in (False, True):
                if own_softmax:
                    p.with_labels(2.0)
                counts.begin()
                p.step("cpu")
                assert differences(counts, p, case, own_softmax) == {}, (classes, own_softmax)
                scratch = (COUNTS["cpu"][case]["scratch"] + own_softmax) * 4 * classes
                assert scratch <= counts.allocations[1] <= scratch + 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [NARROW, WIDE])
def test_bytes_of_the_library_with_a_stored_teacher(library: Path, classes: int, dtype: torch.dtype) -> None:
    p = Problem("stored", 2, classes, dtype)
    with counted_library(library) as counts:
        p.step("cpu")
        assert differences(counts, p, "stored") == {}
        assert counts.traffic("teacher") == (0, 0, 0)
        assert counts.allocations[1] < 4096  # of k classes, and none of a row


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    "case, rows, classes", [("float16", 2, WIDE), ("heads", 256, NARROW), ("shards", 2, WIDE)]
)
def test_bytes_of_the_library_on_other_paths(library: Path, case: str, rows: int, classes: int) -> None:
    p = Problem(case, rows, classes)
    with counted_library(library) as counts:
        p.step("cpu")
        assert differences(counts, p, case) == {}


# One more pass, in turn over each of what is counted, where forward KL writes its gradient.
BEFORE = "if (writes) write_gradient<R, typename D::Writes, kHard>"
PLANTED = """
      {
        alignas(64) R again[kBlock];
        volatile R sink = 0;
        for (int64_t b = 0; b < c.classes; b += kBlock) sink += maximum(read(f.z, b, kBlock, again), kBlock);
        for (int64_t i = 0; i < c.classes; ++i) ((volatile R*)kept.z)[i] = ((volatile R*)kept.z)[i];
        for (int64_t i = 0; i < c.classes; ++i) ((volatile R*)out)[i] = 0;
        free(*(void* volatile*)&(const void* const&)malloc(8));
      }
      """


def test_one_more_pass_of_the_library_is_found() -> None:
    if (reason := why_no_library()) is not None:
        pytest.skip(reason)
    planted = build(source([(BEFORE, PLANTED + BEFORE)], ["forward_kl"]))
    p = Problem("forward_kl", 2, WIDE)
    with counted_library(planted) as counts:
        p.step("cpu")
        found = differences(counts, p, "forward_kl")
    assert set(found) == {
        "student reads", "student loads", "kept stored", "kept loaded", "writes", "mallocs"
    }  # fmt: skip
    assert all(1 <= number - allowed < 2.01 for allowed, number in found.values()), found


# Triton's kernels


def launched(
    case: str, classes: int, rows: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Problem, Launches]:
    p = Problem(case, rows, classes, dtype)
    with counted_launches() as launches:
        p.step("triton")
    return p, launches


def reads_and_writes(p: Problem, launches: Launches) -> tuple[dict[str, float], float]:
    """In tensors: loads of both sides, and stores of the gradient, in all kernels."""
    loads: Counter[str] = Counter()
    stores = 0.0
    for (kernel, argument), count in launches.found.items():
        if argument in ("z_ptr", "v_ptr"):
            loads[argument] += count["loaded"] / p.size
        # Scaled, it is the same memory under two names.
        if argument == ("out_ptr" if kernel == "scale_kernel" else "gradient_ptr"):
            stores += count["stored"] / p.size
        if argument == "gradient_ptr" and kernel == "scale_kernel":
            assert count["loaded"] == 0
    return dict(loads), stores


TRITON = [
    *((case, width) for case in (*DIVERGENCES, "float16", "stored") for width in ("narrow", "wide")),
    ("heads", "narrow"), ("shards", "narrow"), ("shards", "wide"), ("shards_jsd", "wide"),
]  # fmt: skip


@needs_interpreter
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("case, width", TRITON)
def test_bytes_and_launches_of_triton(case: str, width: str) -> None:
    """bfloat16 where rows are wide: nothing but the unit is another."""
    dtype = torch.bfloat16 if width == "wide" else torch.float32
    rows, classes = (128, 1000) if case == "heads" else (2, 8192 if width == "wide" else 1000)
    p, launches = launched(case, classes, rows, dtype)
    row = COUNTS["triton"][case]
    assert launches.names == row["launches"]
    loads, stores = reads_and_writes(p, launches)
    more = K / classes if case == "stored" else 0  # where classes are stored, of the student alone
    sides = ["z_ptr"] if case == "stored" else ["z_ptr", "v_ptr"]
    assert loads == pytest.approx(dict.fromkeys(sides, row[width] + more))
    assert stores == pytest.approx(row["writes"] + more)


@needs_interpreter
def test_one_more_pass_and_launch_of_triton_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence without its closed form takes a pass more; backward that multiplies twice, a launch."""
    from kdkernels.backends.triton_ import TritonBackend

    monkeypatch.setitem(TABLE, "planted", Divergence("planted", phi_forward_kl, g_forward_kl))
    scale = TritonBackend.scale
    monkeypatch.setattr(
        TritonBackend,
        "scale",
        lambda self, x, *more, **options: scale(self, scale(self, x, *more, **options), *more, **options),
    )
    p = Problem("forward_kl", 2, 8192)
    p.options["divergence"] = "planted"
    with counted_launches() as launches:
        p.step("triton")
    row = COUNTS["triton"]["forward_kl"]
    loads, _ = reads_and_writes(p, launches)
    assert loads == pytest.approx(dict.fromkeys(("z_ptr", "v_ptr"), row["wide"] + 1))
    assert launches.names == [*row["launches"], "scale_kernel"]


# CUDA's kernels


def counted_cuda(
    case: str, split: Split, classes: int, planted: str = ""
) -> tuple[Problem, list[str], dict[str, Traffic]]:
    """A problem, the kernels of its two passes, and the traffic of student, teacher and gradient."""
    p, units = Problem(case, 2, classes, torch.bfloat16), []

    def unit(text: str, **built: Any) -> CountedUnit:
        units.append(CountedUnit(f"{planted}\n{text}", **built))
        return units[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cuda_on_cpu.Unit", unit)
        with cuda_on_cpu(split) as driver, torch.no_grad():
            backend = registry.BACKENDS["cuda"]
            options = complete({**p.options, "backend": "cuda"})
            call = checked_call(p.student, p.teacher, None, options, stats=False)
            keep, out = what_to_keep(p.student.dtype), torch.empty_like(p.student)

            def step() -> None:
                loss, _, kept = backend.forward(call, keep, out if keep == "gradient" else None)
                if keep == "gradient":
                    backend.scale(out, torch.ones_like(loss), in_place=True)
                else:
                    backend.gradient(torch.ones_like(loss), call, kept, out)

            step()  # which builds them
            counts = [Library(unit.library) for unit in units]
            for count in counts:
                count.begin()
                count.tell("student", p.student)
                count.tell("gradient", out)
                if isinstance(p.teacher, Tensor):
                    count.tell("teacher", p.teacher)
            driver.builds.clear()
            step()
    names = ("student", "teacher", "gradient")
    found = {name: [count.traffic(name).per(p.size) for count in counts] for name in names}
    sums = {name: Traffic(*(sum(x) for x in zip(*each, strict=True))) for name, each in found.items()}
    return p, [build.kernel for build in driver.builds], sums


BLOCK, CLUSTER = (Split(1, 64), 1000), (Split(4, 32), 4000)


@pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda()))
@pytest.mark.parametrize(
    "case, split, classes",
    [("forward_kl", *BLOCK), *((case, *CLUSTER) for case in cases("cuda"))],
    ids=["forward_kl-block", *cases("cuda")],
)
def test_bytes_and_launches_of_cuda(case: str, split: Split, classes: int) -> None:
    row = COUNTS["cuda"][case]
    _, launches, traffic = counted_cuda(case, split, classes)
    assert launches == row["launches"]
    assert traffic["student"][:2] == pytest.approx((row["reads"], 0))
    assert traffic["teacher"][:2] == pytest.approx((0 if case == "stored" else row["reads"], 0))
    assert traffic["gradient"][:2] == pytest.approx((0, row["writes"]))


@pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda()))
def test_one_more_read_of_cuda_is_found() -> None:
    """Each copy to shared memory twice."""
    twice = "#define copy_later(to, from) (copy_later(to, from), copy_later(to, from))"
    _, _, traffic = counted_cuda("forward_kl", *BLOCK, twice)
    assert traffic["student"].loaded == traffic["teacher"].loaded == COUNTS["cuda"]["forward_kl"]["reads"] + 1


# Steps


def counted_step(backend: str, case: str) -> tuple[Problem, Steps]:
    """Of as few rows as have several parts; interpreted, each takes milliseconds."""
    heads = (256 if backend == "cpu" else 128, 1000)
    p = Problem(case, *(heads if case.startswith("heads") else (16, 4000)))
    Problem("forward_kl", 1, 8).step(backend)  # some numbers are found once
    with counted_launches() if backend == "triton" else nullcontext(), Steps() as steps:
        p.step(backend)
    return p, steps


@pytest.fixture
def _unlooked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are looked at on a CPU alone, where that waits for nothing."""
    if importlib.util.find_spec("triton") is not None:
        from kdkernels.backends import triton_launch

        monkeypatch.setattr(triton_launch, "check_labels_here", lambda call: None)


def found_in(p: Problem, steps: Steps) -> dict[str, Any]:
    """As the table has it."""
    waits = Counter(name.removeprefix("aten::") for name in steps.waits)
    peak = math.ceil(100 * steps.peak / p.size - 1e-9) / 100
    logits = steps.at_least(p.size // 2)
    return {"logits": logits, "pieces": len(steps.made), "peak": peak, "waits": dict(waits)}


@pytest.mark.usefixtures("_alone", "_unlooked_at")
@pytest.mark.parametrize(
    "backend, case", [(backend, case) for backend in ("cpu", "triton") for case in COUNTS["step"][backend]]
)
def test_memory_and_waits_of_a_step(backend: str, case: str) -> None:
    if backend == "triton" and (importlib.util.find_spec("triton") is None or not interpreted("triton")):
        pytest.skip("the kernels are not interpreted here")
    if (reason := why_not(backend)) is not None:
        pytest.skip(reason)
    found, allowed = found_in(*counted_step(backend, case)), COUNTS["step"][backend][case]
    assert found["pieces"] <= allowed["pieces"]
    assert found == {**allowed, "pieces": found["pieces"]}


def test_a_stored_teacher_is_prepared_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU prepares by operators of torch; the checks are a CPU's, as they are no compiled step's."""
    p = Problem("stored", 4, 1000)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Steps() as steps:
        stored.sparse(p.teacher, 1.0, torch.ones(4, dtype=torch.bool), 1000, torch.float32, True)
    assert steps.waits == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    with Steps() as steps:
        stored.sparse(p.teacher, 1.0, torch.ones(4, dtype=torch.bool), 1000, torch.float32, True)
    assert len(steps.waits) == 2  # ids, and what log-probabilities add up to


def looks(result: Any, call: Any) -> None:
    result[0].item()


def allocates(result: Any, call: Any) -> None:
    torch.empty(call.student.shape)


def copies(result: Any, call: Any) -> None:
    result[2].clone()


def allocates_a_row(result: Any, call: Any) -> None:
    torch.empty(call.student.shape[:-1])


def counts_rows(result: Any, call: Any) -> None:
    result[2][:, 0].nonzero()


def chooses(result: Any, call: Any) -> None:
    result[2][result[2][:, 0] == 0]


@pytest.mark.parametrize(
    "fault, more",
    [
        (looks, {"waits"}), (allocates, {"logits", "pieces", "peak"}),
        (copies, {"logits", "pieces", "peak"}), (allocates_a_row, {"pieces"}),
        (counts_rows, {"waits", "pieces"}), (chooses, {"waits", "pieces"}),
    ],
)  # fmt: skip
def test_what_a_step_does_more_is_found(
    fault: Callable[..., None], more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, in the forward pass."""
    if (reason := why_not("cpu")) is not None:
        pytest.skip(reason)
    forward = CpuBackend.forward

    def planted(self: CpuBackend, call: Any, keep: str, out: Tensor | None = None) -> Any:
        result = forward(self, call, keep, out)
        fault(result, call)
        return result

    monkeypatch.setattr(CpuBackend, "forward", planted)
    found, allowed = found_in(*counted_step("cpu", "logits")), COUNTS["step"]["cpu"]["logits"]
    assert {name for name in allowed if found[name] != allowed[name]} == more
