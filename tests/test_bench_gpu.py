"""The benchmark for GPUs, as far as a CPU can tell: its plan, targets, and its measuring at small shapes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.__main__
from benchmarks import cases, gpu, gpu_harness, gpu_report, gpu_tune, liger
from benchmarks.cases import Case, Method
from kdkernels import bench, tuning
from kdkernels.bench import eager
from kdkernels.bench.timing import CudaClock, WallClock, repeats_for

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SETTINGS = gpu.Settings("cpu", 60.0, 2, 0.0, 1.0, 2**16)


# What is asked for


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks.__main__.main(["gpu"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "there is no GPU here: torch.cuda.is_available() is False" in said.err
    assert "'make bench' measures the CPU" in said.err


def test_an_interpreter_is_not_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (gpu.why_not() or "").startswith("TRITON_INTERPRET is set")


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(benchmarks.__main__.importlib, "import_module", fail)
    assert benchmarks.__main__.main(["gpu"]) == 2
    assert "python -m benchmarks gpu needs torch" in capsys.readouterr().err


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _make_gpu(tmp_path: Path, python: str, *arguments: str) -> tuple[int, list[str]]:
    """Runs `make gpu` with a Python that writes down what it is asked for, and exits as the script says."""
    log = tmp_path / "log"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{python}\n')
    fake.chmod(0o755)
    # The make that runs the tests, if one does, passes its own options on by these.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "ARGS", "PYTHON")}
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={fake}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, log.read_text().splitlines()


@needs_make
def test_make_gpu_measures_even_where_a_test_fails(tmp_path: Path) -> None:
    probe, measured = "-m benchmarks gpu --probe", "-m benchmarks gpu --seconds 9"
    tests = [f"-m pytest -m gpu -q --shard {i}/8" for i in range(1, 9)]
    clusters, heads, last = (
        "-m benchmarks cluster",
        "-m benchmarks linear --device cuda",
        "-m benchmarks divergences --device cuda --dtype bfloat16 --no-compile",
    )
    last += " --json benchmarks/results/divergences-cuda.json"
    code, asked = _make_gpu(tmp_path, "exit 0", "ARGS=--seconds 9")
    measuring = measured, clusters, heads, last
    assert (code, asked[0], sorted(asked[1:-4]), *asked[-4:]) == (0, probe, tests, *measuring)
    for failing in ("pytest", "seconds", "cluster", "linear", "divergences"):
        (tmp_path / "log").unlink()
        code, asked = _make_gpu(tmp_path, f'case "$*" in *{failing}*) exit 1;; esac', "ARGS=--seconds 9")
        found = code, asked[0], sorted(asked[1:-4]), *asked[-4:]
        assert found == (2, probe, tests, *measuring), failing


@needs_make
def test_make_gpu_takes_a_gpu_without_clusters(tmp_path: Path) -> None:
    code, asked = _make_gpu(tmp_path, 'case "$*" in *cluster*) exit 2;; esac')
    assert code == 0 and "-m benchmarks cluster" in asked


@needs_make
def test_make_gpu_ends_where_there_is_none(tmp_path: Path) -> None:
    assert _make_gpu(tmp_path, "exit 2") == (2, ["-m benchmarks gpu --probe"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "256"], "a shape is ROWSxVOCAB, such as 256x32000, got '256'"),
        (["--dtypes", "float64"], "invalid choice: 'float64'"),
        (["--divergences", "tvd"], "invalid choice: 'tvd'"),
        (["--seconds", "0"], "a number of seconds > 0, got '0'"),
        (["--seconds", "ages"], "a number of seconds > 0, got 'ages'"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_plan_begins_with_what_tells_most() -> None:
    plan = gpu.cases_for(None, None, None, quick=False)
    assert [str(c) for c in plan[:3]] == [
        "(8192, 128256) bfloat16 forward_kl",
        "(8192, 128256) bfloat16 jsd",
        "(8192, 32000) bfloat16 forward_kl",
    ]
    assert len(plan) == len(set(plan))
    bf16 = {(c.rows, c.vocab, c.objective) for c in plan if c.dtype == "bfloat16"}
    assert bf16 == {(*shape, name) for shape in gpu.SHAPES for name in cases.OBJECTIVES}
    assert {c.dtype for c in plan} == set(cases.DTYPES)


def test_a_selection_is_crossed_with_what_was_not_selected() -> None:
    assert gpu.cases_for(None, None, None, quick=True) == [
        Case(512, 1000, "bfloat16", "forward_kl"),
        Case(512, 1000, "bfloat16", "jsd"),
    ]
    assert gpu.cases_for([(4, 50)], ["float16", "float16"], ["jsd"], quick=False) == [
        Case(4, 50, "float16", "jsd")
    ]
    chosen = gpu.cases_for(None, None, ["jsd"], quick=False)
    assert chosen == [Case(*shape, "bfloat16", "jsd") for shape in gpu.SHAPES]


def test_contestants() -> None:
    names = [m.name for m in gpu.contestants_for("forward_kl", CPU, compiled=True, with_liger=True)]
    assert {"eager kl_div", "torch.compile log_target", "liger jsd", "liger kl_div"} <= set(names)
    ours = cases.default_backend(cases.OBJECTIVES["forward_kl"], CPU)
    assert [n for n in names if n.startswith("kdkernels")] == [ours]


def test_interpreted_kernels_are_not_timed_on_a_cpu() -> None:
    """In this process the Triton backend is available on the CPU, if Triton is."""
    methods, unavailable = cases.methods_for(cases.OBJECTIVES["jsd"], CPU, compiled=False)
    assert Method("kdkernels", "triton") not in methods
    assert "triton" in unavailable


def test_results_are_named_after_the_device() -> None:
    assert gpu.result_path("NVIDIA H100 80GB HBM3").name == "gpu-nvidia-h100-80gb-hbm3.json"
    assert gpu.result_path("AMD Instinct MI300X (VF)").name == "gpu-amd-instinct-mi300x-vf.json"


# The harness


def test_rounds_end_when_the_time_is_up() -> None:
    slow = [bench.Contestant("a", lambda number: time.sleep(0.02))]
    timings = bench.race(slow, sets=1, clock=WallClock(), min_rounds=100, max_seconds=0.05)
    assert 1 <= len(timings["a"].seconds) <= 4


def test_the_cache_is_overwritten_for_as_long_as_the_host_needs() -> None:
    assert repeats_for(2e-3, 1e-4) == 20
    assert repeats_for(2e-3, 1.0) == 1
    assert repeats_for(2e-3, 0.0) == 200


def test_the_device_is_busy_before_the_call_and_timed_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            did.append("record")

        def synchronize(self) -> None:
            did.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 0.5  # milliseconds

    class Memory:
        def zero_(self) -> None:
            did.append("overwrite")

    properties = types.SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: Memory() if size == 2**28 else None)
    clock = CudaClock(CPU, lead=2e-3)
    did.clear()
    assert clock.measure(lambda number: did.append(f"run {number}"), 7) == (0.5e-3, None)
    assert did == [*["overwrite"] * 4, "record", "run 7", "record", "synchronize"]


def test_the_copy_copies_what_it_counts() -> None:
    contestant = bench.copy(4096, CPU)
    copied = contestant.run(0)
    assert isinstance(copied, Tensor)
    assert copied.nbytes == 4096


def _speak(send: Any, seconds: float) -> str:
    send("here")
    time.sleep(seconds)
    return "done"


def test_a_process_that_is_silent_is_ended() -> None:
    said: list[str] = []
    assert (
        bench.run_isolated(_speak, 0.0, on_message=said.append, preload=("torch",), patience=60.0) == "done"
    )
    started = time.perf_counter()
    with pytest.raises(bench.ProcessDied, match="_speak said nothing for 3 s and was ended"):
        bench.run_isolated(_speak, 60.0, on_message=said.append, patience=3.0)
    assert said == ["here", "here"]
    assert time.perf_counter() - started < 30


# Right or wrong, on the device


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("objective", cases.OBJECTIVES)
def test_eager_is_right_on_the_device_too(
    objective: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three rows at a time, the last part shorter.
    monkeypatch.setattr(gpu_harness, "ELEMENTS", 3 * 301)
    case = Case(8, 301, dtype, objective)
    inputs = gpu.DeviceInputs(8, 301, dtype, CPU, sets=2)
    assert (inputs.upstream is None) == (dtype != "float16")
    chosen = cases.OBJECTIVES[objective]
    for spelling in eager.SPELLINGS[chosen.divergence]:
        found = gpu.compare(cases.build(Method("eager", spelling), chosen), inputs, case)
        assert found.problem is None, spelling
    if dtype != "float16":
        # The same judgement as on the host.
        truth = eager.truth(
            chosen.divergence, *inputs.sets[0], inputs.labels, chosen.temperature, chosen.hard_weight
        )
        loss = cases.build(Method("eager", "kl_div"), chosen)
        here, there = gpu.compare(loss, inputs, case), cases.judge(loss, inputs, dtype, truth)
        assert here.gradient_error == pytest.approx(there.gradient_error)
        assert here.loss_error == pytest.approx(there.loss_error, abs=1e-12)


def _right(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    return eager.forward_kl_kl_div(z, v, labels, 1.0, 0.0)


def _wrong_in_the_last_row(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    return _right(z, v, labels) + (z[-1].sum() - z[-1].sum().detach()) * 1e-3


def _not_a_number(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    return _right(z, v, labels) + (z[0, 0] - z[0, 0].detach()) * float("nan")


def _out_of_memory(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")


def _broken(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (_wrong_in_the_last_row, "wrong: gradient off by"),
        (_not_a_number, "wrong: loss off by nan"),
        (_out_of_memory, "out of memory"),
        (_broken, "failed: RuntimeError: out of order"),
    ],
)
def test_what_is_wrong_is_found(loss: cases.LossFn, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_harness, "ELEMENTS", 50)
    case = Case(4, 50, "float32", "forward_kl")
    found = gpu.compare(loss, gpu.DeviceInputs(4, 50, "float32", CPU, 1), case)
    assert found.problem is not None
    assert found.problem.startswith(problem)


def test_inputs_made_on_the_device() -> None:
    a, b = (gpu.DeviceInputs(64, 500, "bfloat16", CPU, sets=2) for _ in range(2))
    (z, v), (again, _) = a.sets
    assert torch.equal(z, b.sets[0][0]) and torch.equal(z, again)
    assert z.data_ptr() != again.data_ptr()
    assert z.requires_grad and not v.requires_grad
    assert v.float().std().item() == pytest.approx(2.5, rel=0.05)
    # 0.7 of the teacher, and 1 of its own.
    assert torch.corrcoef(torch.stack([z.detach().float().flatten(), v.float().flatten()]))[
        0, 1
    ].item() == pytest.approx(1.75 / (1.75**2 + 1) ** 0.5, abs=0.02)
    assert a.labels.shape == (64,) and 0 <= a.labels.min() and a.labels.max() < 500


# Liger, whose kernels need a GPU: modules of its signatures that compute what it documents


class _KLDiv(torch.nn.KLDivLoss):
    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        # No gradient for the second.
        return F.kl_div(y_pred, y_true.detach(), reduction=self.reduction, log_target=self.log_target)


class _JSD(torch.nn.Module):
    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        if self.beta in (0.0, 1.0):
            to = (log_q, log_p) if self.beta == 0.0 else (log_p, log_q)
            return F.kl_div(*to, reduction="batchmean", log_target=True)
        log_m = (self.beta * log_p.exp() + (1 - self.beta) * log_q.exp()).log()
        return self.beta * F.kl_div(log_m, log_p, reduction="batchmean", log_target=True) + (
            1 - self.beta
        ) * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)


class _OverwritingCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target)
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(target)), target] -= 1
        logits.detach().copy_(gradient / len(target))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return ctx.saved_tensors[0] * upstream[0], None


class _CrossEntropy(torch.nn.Module):
    def forward(self, _input: Tensor, target: Tensor) -> Tensor:
        return _OverwritingCrossEntropy.apply(_input, target)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("liger_kernel.transformers")
    module.__dict__.update(LigerKLDIVLoss=_KLDiv, LigerJSD=_JSD, LigerCrossEntropyLoss=_CrossEntropy)
    monkeypatch.setattr(liger, "_transformers", lambda: module)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("objective", cases.OBJECTIVES)
def test_every_liger_spelling_is_right(objective: str, dtype: str, stand_in: None) -> None:
    chosen, case = cases.OBJECTIVES[objective], Case(5, 301, dtype, objective)
    inputs = gpu.DeviceInputs(5, 301, dtype, CPU, sets=1)
    before = [x.detach().clone() for x in inputs.sets[0]]
    spellings = liger.SPELLINGS[chosen.divergence]
    assert bool(spellings) == (objective != "soft_cross_entropy")
    for spelling in spellings:
        found = gpu.compare(cases.build(Method("liger", spelling), chosen), inputs, case)
        assert found.problem is None, spelling
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, inputs.sets[0], strict=True))


def test_a_liger_that_cannot_be_used_is_no_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert liger.missing() == "liger-kernel is not installed"

    def fail() -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(liger, "_transformers", fail)
    assert liger.missing() == "liger-kernel can't be imported: RuntimeError: 0 active drivers"


# Measuring, with the clock of the CPU


METHODS = [Method("eager", "kl_div"), Method("eager", "log_target"), Method("eager", "closed_form")]


def _ours(objective: str = "forward_kl") -> Method:
    _, _, backend = cases.default_backend(cases.OBJECTIVES[objective], CPU).partition(" ")
    return Method("kdkernels", backend)


def _measure(
    monkeypatch: pytest.MonkeyPatch, losses: dict[str, cases.LossFn], **options: Any
) -> dict[str, Any]:
    build = cases.build
    monkeypatch.setattr(gpu, "build", lambda m, o: losses.get(m.name) or build(m, o))
    case = Case(4, 50, "float32", "forward_kl")
    inputs, ceiling = gpu.DeviceInputs(4, 50, "float32", CPU, 2), bench.copy(SETTINGS.copy_bytes, CPU)
    methods = [*METHODS, _ours()]
    return gpu.measure_case(case, methods, inputs, ceiling, WallClock(), SETTINGS, **options)


def test_a_case_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[str | None] = []
    result = _measure(monkeypatch, {}, now=at_work.append)
    json.dumps(result, allow_nan=False)
    # Our own are the first to be looked at, and the last in the report.
    assert at_work[0] == result["ours"] == result["methods"][-1]["name"]
    assert set(at_work) == {None, *(m["name"] for m in result["methods"])}
    copy = result["copy"]
    assert copy["gb_per_s"] == pytest.approx(2 * SETTINGS.copy_bytes / copy["median_ms"] / 1e6)
    for method in result["methods"]:
        assert method["problem"] is None
        times = method["times"]
        assert times["rounds"] >= 2
        assert 0 < times["best_ms"] <= times["median_ms"]
        assert times["gb_per_s"] == pytest.approx(3 * 4 * 50 * 4 / times["median_ms"] / 1e6)
        assert times["copy_share"] == pytest.approx(times["gb_per_s"] / copy["gb_per_s"])
        assert method["host_ms"] > 0
    forward = result["forward"]
    assert forward["gb_per_s"] == pytest.approx(2 * 4 * 50 * 4 / forward["median_ms"] / 1e6)


def test_who_is_wrong_or_finds_no_memory_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _measure(
        monkeypatch,
        {"eager kl_div": _wrong_in_the_last_row, "eager log_target": _out_of_memory},
        banned={"eager closed_form": "failed: it hung"},
    )
    wrong, memory, banned, ours = result["methods"]
    assert wrong["problem"].startswith("wrong: gradient off by") and wrong["times"] is None
    assert memory["problem"] == "out of memory" and memory["times"] is None
    assert banned["problem"] == "failed: it hung" and banned["times"] is None
    assert ours["problem"] is None and ours["times"] is not None
    rows = gpu_report.case_rows([result])
    assert [row[2] for row in rows[:3]] == ["WRONG", "OUT OF MEMORY", "FAILED"]
    assert {len(row) for row in rows} == {len(gpu_report.CASE_HEAD)}


def test_memory_for_each_may_not_be_memory_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def late(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return _right(z, v, labels) if calls < 3 else _out_of_memory(z, v, labels)

    result = _measure(monkeypatch, {"eager log_target": late})
    problems = {m["name"]: m["problem"] for m in result["methods"]}
    assert problems.pop("eager log_target") == "out of memory"
    assert set(problems.values()) == {None}
    assert all(m["times"] for m in result["methods"] if m["name"] in problems)


def test_when_time_is_up_ours_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _measure(monkeypatch, {}, deadline=0.0)
    *peers, ours = result["methods"]
    assert {m["problem"] for m in peers} == {gpu.NO_TIME}
    assert ours["times"] is not None


def test_launches_are_what_the_device_did() -> None:
    @dataclass
    class Event:
        device_type: Any
        is_user_annotation: bool = False

    of = torch.autograd.DeviceType
    events = [Event(of.CPU), Event(of.CUDA), Event(of.CUDA), Event(of.CUDA, is_user_annotation=True)]
    assert gpu.count_launches(events) == 2


def _run(plan: list[tuple[Case, list[Method]]], path: Path | None = None, **settings: Any) -> gpu.Run:
    document = {
        "command": "python -m benchmarks gpu",
        "environment": gpu.environment(CPU),
        "settings": {"no_liger": "liger-kernel is not installed", "min_rounds": 2, "max_seconds": 1.0}
        | {"copy_bytes": SETTINGS.copy_bytes},
    }
    return gpu.Run(plan, gpu.replace(SETTINGS, **settings), document, path)


ONE, TWO = Case(4, 50, "bfloat16", "forward_kl"), Case(4, 60, "bfloat16", "forward_kl")


def test_a_run_in_processes_of_its_own(tmp_path: Path) -> None:
    """The second case names a contestant that isn't there: the process dies, the next one has ours alone."""
    path = tmp_path / "gpu.json"
    run = _run([(ONE, [*METHODS, _ours()]), (TWO, [Method("eager", "nonsense"), _ours()])], path)
    run.measure()
    run.count_launches()
    run.save(finished=True)
    document = json.loads(path.read_text())
    assert [c["shape"] for c in document["cases"]] == [[4, 50], [4, 60]]
    assert document["left_out"] == []
    assert len(document["stopped"]) == 1 and "KeyError: 'nonsense'" in document["stopped"][0]
    nonsense, ours = document["cases"][1]["methods"]
    assert nonsense["problem"].startswith("not measured: failed: KeyError: 'nonsense'")
    assert ours["times"] is not None
    # A CPU is given no launches.
    assert ours["launches"] is None
    assert "## (4, 60), bfloat16" in path.with_suffix(".md").read_text()


class _Script:
    """In place of `run_isolated`: sends what it is told to, and dies."""

    def __init__(self, *acts: Callable[[list[Case], Callable[[Any], None]], None]) -> None:
        self.acts = list(acts)
        self.banned: list[dict[tuple[Case, str], str]] = []

    def __call__(
        self, function: Any, plan: Any, settings: gpu.Settings, banned: Any, *, on_message: Any, **_: Any
    ) -> None:
        self.banned.append(dict(banned))
        self.acts.pop(0)([case for case, _ in plan], on_message)


def _result(case: Case) -> dict[str, Any]:
    return _case((case.rows, case.vocab), case.dtype, case.objective)


def _finish(plan: list[Case], send: Callable[[Any], None]) -> None:
    for case in plan:
        send(("case", case, _result(case)))


def _dies_at(name: str | None) -> Callable[[list[Case], Callable[[Any], None]], None]:
    def act(plan: list[Case], send: Callable[[Any], None]) -> None:
        send(("now", plan[0], name))
        raise bench.ProcessDied("measure_process ended with exit code -11")

    return act


def test_the_culprit_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = _Script(_dies_at("eager kl_div"), _dies_at(None), _dies_at(None), _finish)
    monkeypatch.setattr(bench, "run_isolated", script)
    run = _run([(ONE, [*METHODS, _ours()]), (TWO, [*METHODS, _ours()])], tmp_path / "gpu.json")
    run.measure()
    why = "failed: measure_process ended with exit code -11"
    assert script.banned[0] == {}
    assert script.banned[1] == {(ONE, "eager kl_div"): why}
    # It died with all of them at work: then ours alone, then without the case.
    assert set(script.banned[2]) == {(ONE, m.name) for m in METHODS}
    assert run.left_out == {ONE: why}
    assert list(run.results) == [TWO]
    assert len(run.stopped) == 3
    # Written as soon as it was there.
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["finished"] is None
    assert "THE RUN HAS NOT FINISHED" in (tmp_path / "gpu.md").read_text()


def test_what_was_left_out_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_isolated", _Script(lambda plan, send: _finish(plan[:1], send)))
    run = _run([(ONE, METHODS), (TWO, METHODS)])
    run.measure()
    run.save(finished=True)
    assert run.left_out == {TWO: "the time was up"}
    assert "Left out: (4, 60) bfloat16 forward_kl: the time was up." in gpu_report.notes(run.document)


def test_a_process_that_never_begins_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(plan: list[Case], send: Any) -> None:
        raise bench.ProcessDied("no kernel image is available")

    monkeypatch.setattr(bench, "run_isolated", _Script(die))
    run = _run([(ONE, METHODS)])
    run.measure()
    assert run.stopped == ["At the start: failed: no kernel image is available"]
    assert list(run.left_out) == [ONE]


def test_the_command_from_end_to_end(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "gpu.json"
    arguments = ["--shapes", "4x50", "--dtypes", "float16", "--divergences", "jsd", "--quick"]
    options = gpu.parser().parse_args([*arguments, "--json", str(path), "--seconds", "60"])
    assert gpu.measure(options, CPU, ["gpu", *arguments]) == 0
    document = json.loads(path.read_text())
    assert set(document) == {
        "schema", "command", "started", "finished", "kdkernels", "environment", "settings", "phases_s",
        "cases", "left_out", "stopped", "targets",
    }  # fmt: skip
    assert document["finished"] is not None
    assert document["cases"][0]["loss_scale"] == 32768
    assert document["environment"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert f"written: {path}" in out
    assert "| jsd " in out


# Targets


def _case(
    shape: tuple[int, int] = (8192, 128256),
    dtype: str = "bfloat16",
    objective: str = "forward_kl",
    share: float = 0.58,
    ours: float = 4.0,
    liger: float | None = 20.0,
) -> dict[str, Any]:
    def entry(family: str, spelling: str, ms: float | None, problem: str | None = None) -> dict[str, Any]:
        times = {"median_ms": ms, "best_ms": ms, "spread": 0.01, "rounds": 20, "gb_per_s": 1.0}
        return {
            "name": f"{family} {spelling}",
            "family": family,
            "spelling": spelling,
            "loss_error": 1e-7,
            "gradient_error": 1e-3,
            "problem": problem,
            "times": None if ms is None else times | {"copy_share": share},
            "host_ms": 0.1,
            "peak_tensors": 1.0 if family == "kdkernels" else 5.0,
            "launches": 2 if family == "kdkernels" else None,
        }

    whole = Case(*shape, dtype, objective)
    copy = {
        "median_ms": 0.7,
        "best_ms": 0.7,
        "spread": 0.0,
        "rounds": 20,
        "gb_per_s": 3000.0,
        "copy_share": None,
    }
    methods = [
        entry("eager", "kl_div", 40.0),
        entry("eager", "closed_form", 30.0),
        entry("torch.compile", "log_target", None, "out of memory"),
        entry("torch.compile", "closed_form", 10.0),
    ]
    if liger is not None:
        methods.append(entry("liger", "kl_div", liger))
    return {
        "shape": list(shape),
        "dtype": dtype,
        "objective": objective,
        "tensor_bytes": whole.tensor_bytes,
        "traffic_bytes": whole.traffic_bytes,
        "loss_scale": None,
        "ours": "kdkernels triton",
        "copy": copy,
        "forward": None,
        "methods": [*methods, entry("kdkernels", "triton", ours)],
    }


def _targets(*measured: dict[str, Any], left_out: Any = ()) -> list[gpu_report.Target]:
    return gpu_report.targets(list(measured), list(left_out))


def test_targets_are_met() -> None:
    found = {t.name: t for t in _targets(_case())}
    share = found["forward KL, share of copy"]
    assert (share.asked, share.measured, share.met) == (">= 0.55", 0.58, True)
    assert found["× fastest eager PyTorch"].measured == pytest.approx(7.5)
    assert found["× fastest torch.compile"].measured == pytest.approx(2.5)
    assert found["× fastest Liger"].measured == pytest.approx(5.0)
    assert all(found[f"× fastest {name}"].met for name in gpu_report.PEERS.values())
    assert found["cases that kdkernels gets right"].met is True
    assert found["peak memory in gradient tensors, worst case"].met is None


@pytest.mark.parametrize(
    ("vocab", "share", "met"),
    [(128256, 0.54, False), (128256, 0.56, True), (32000, 0.79, False), (4096, 0.81, True)],
)
def test_what_a_share_has_to_be_depends_on_the_row(vocab: int, share: float, met: bool) -> None:
    assert _targets(_case((8192, vocab), share=share))[0].met is met


@pytest.mark.parametrize("case", [_case((512, 1000), share=0.1), _case(dtype="float16", share=0.1)])
def test_no_share_is_asked_of_launches_or_of_fp16(case: dict[str, Any]) -> None:
    share = _targets(case)[0]
    assert (share.asked, share.met) == (gpu_report.SHOWN, None)
    assert gpu_report.target_rows([share])[0][-1] == ""


def test_the_worst_case_of_a_shape_decides() -> None:
    found = {
        t.name: t for t in _targets(_case(), _case(objective="jsd", ours=12.0), _case((8192, 32000)))
        if t.name != "forward KL, share of copy" and "(8192, 128256)" in t.where
    }  # fmt: skip
    compiled = found["× fastest torch.compile"]
    assert compiled.measured == pytest.approx(10 / 12)
    assert compiled.met is False
    assert compiled.where == "(8192, 128256) bfloat16 jsd, the worst of 2"
    assert found["× fastest eager PyTorch"].met is True


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    left_out = [
        {"shape": [8192, 32000], "dtype": "bfloat16", "objective": "forward_kl", "why": "the time was up"}
    ]
    found = _targets(_case(liger=None), left_out=left_out)
    undecided = [t for t in found if t.met is None and t.asked != gpu_report.SHOWN]
    assert {(t.name, t.where) for t in undecided} == {
        ("× fastest Liger", "(8192, 128256)"),
        ("forward KL, share of copy", "(8192, 32000) bfloat16 forward_kl"),
        *((f"× fastest {name}", "(8192, 32000)") for name in gpu_report.PEERS.values()),
    }
    assert {row[-1] for row in gpu_report.target_rows(undecided)} == {"not measured"}


def test_ours_must_be_right() -> None:
    case = _case()
    case["methods"][-1] |= {"problem": "wrong: loss off by 1.0e-01, allowed 5.0e-05", "times": None}
    found = {t.name: t for t in _targets(case, _case(objective="jsd"))}
    right = found["cases that kdkernels gets right"]
    assert (right.measured, right.met) == (0.5, False)
    assert right.where == "(8192, 128256) bfloat16 forward_kl"
    assert found["forward KL, share of copy"].met is None


def test_the_report(tmp_path: Path) -> None:
    run = _run([])
    run.results = {Case(8192, 128256, "bfloat16", "forward_kl"): _case()}
    run.plan = [(case, []) for case in run.results]
    run.save(finished=True)
    report = gpu_report.markdown(run.document)
    assert report.index("## Targets") < report.index("## (8192, 128256), bfloat16")
    rows = {row[1]: row for row in gpu_report.case_rows(run.document["cases"])}
    assert "eager closed_form (fastest)" in rows and "eager kl_div" in rows
    assert rows["torch.compile log_target"][2] == "OUT OF MEMORY"
    assert rows["kdkernels triton"][2:10] == ["4", "4", "1 %", "1", "58 %", "0.1", "1.00", "2"]
    assert rows["(copy)"][5] == "3000"
    assert gpu_report.summary(_case()).endswith(
        "eager closed_form 30 ms, torch.compile closed_form 10 ms, liger kl_div 20 ms, kdkernels triton 4 ms "
        "(58 % of copy); not timed: torch.compile log_target (out of memory)"
    )


# Tuning


def test_pairs_hold_a_row_at_most_and_fill_registers() -> None:
    assert [str(p) for p in gpu_tune.pairs(1100)] == [
        "as tuned", "1024 / 4", "1024 / 8", "2048 / 4", "2048 / 8", "2048 / 16",
    ]  # fmt: skip
    assert max(p.block or 0 for p in gpu_tune.pairs(128256)) == 32768
    assert [p.block for p in gpu_tune.pairs(10)] == [None, 1024, 1024]


def test_a_pair_replaces_what_is_tuned_whatever_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    Config = tuning.TritonConfig
    monkeypatch.setattr(tuning, "triton", lambda width, itemsize, *, stats: Config(64, 64, False, 2, True))
    original = tuning.triton
    with gpu_tune.tuned(gpu_tune.Pair(2048, 8)) as asked:
        assert tuning.triton(50, 2, stats=True) == Config(2048, 2048, False, 8, True)
        assert tuning.triton(5000, 2, stats=True) == Config(2048, 8, False, 8, False)
        assert asked == [2]
    with gpu_tune.tuned(gpu_tune.Pair()):
        assert tuning.triton(50, 2, stats=True) == Config(64, 64, False, 2, True)
    assert tuning.triton is original


def test_pairs_are_timed_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton")
    case = Case(2, 1100, "float32", "forward_kl")
    inputs, ceiling = gpu.DeviceInputs(2, 1100, "float32", CPU, 1), bench.copy(SETTINGS.copy_bytes, CPU)
    result = gpu_tune.tune_case(case, inputs, ceiling, WallClock(), SETTINGS)
    json.dumps(result, allow_nan=False)
    assert [p["problem"] for p in result["pairs"]] == [None] * 6
    assert all(p["times"]["median_ms"] > 0 for p in result["pairs"])
    rows = gpu_tune.rows_of(result)
    assert [row[0] for row in rows] == ["1024", "2048", "as tuned"]
    assert {len(row) for row in rows} == {len(gpu_tune.HEAD)}
    assert sum(cell.endswith(" *") for row in rows for cell in row) >= 1


def test_a_setting_that_nobody_asks_for_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune, "build", lambda method, objective: _right)
    case = Case(2, 100, "float32", "forward_kl")
    inputs, ceiling = gpu.DeviceInputs(2, 100, "float32", CPU, 1), bench.copy(SETTINGS.copy_bytes, CPU)
    result = gpu_tune.tune_case(case, inputs, ceiling, WallClock(), SETTINGS)
    assert {p["problem"] for p in result["pairs"]} == {
        "failed: kdkernels.tuning.triton was not asked, so that nothing was changed"
    }


def test_tuning_says_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def isolated(function: Any, plan: list[Case], settings: Any, *, on_message: Any, **_: Any) -> None:
        times = {"median_ms": 2.0, "best_ms": 1.0}
        pairs = [
            {"block": None, "warps": None, "problem": None, "times": times},
            {"block": 1024, "warps": 4, "problem": None, "times": times | {"median_ms": 1.5}},
            {"block": 1024, "warps": 8, "problem": "wrong: loss off by nan, allowed 5.0e-05", "times": None},
        ]
        on_message(("now", plan[0], "1024 / 4"))
        on_message(("case", plan[0], {"copy": {"gb_per_s": 3000.0}, "pairs": pairs}))

    monkeypatch.setattr(bench, "run_isolated", isolated)
    path = tmp_path / "tune.json"
    options = argparse.Namespace(
        shapes=[(8, 1000)], dtypes=None, divergences=["jsd"], quick=False, seconds=9.0, json=path
    )
    assert gpu_tune.main(options, CPU, ["gpu", "--tune"]) == 0
    out = capsys.readouterr().out
    assert "(8, 1000) bfloat16 jsd, copy 3000 GB/s" in out
    assert "1.5 *" in out and "WRONG" in out
    assert "1024 / 8: wrong: loss off by nan" in out
    assert "Left out: (8, 1000) float32 jsd: the time was up" in out
    assert json.loads(path.read_text())["command"] == "python -m benchmarks gpu --tune"


# On a GPU


@pytest.mark.gpu
def test_device_time_is_not_host_time() -> None:
    device = torch.device("cuda")
    clock = bench.clock_for(device)
    x = torch.ones(2**28, dtype=torch.float32, device=device)

    def work(number: int) -> None:
        for _ in range(4):
            x.mul_(1.0)

    def nothing(number: int) -> None:
        time.sleep(2e-4)

    for run in (work, nothing):
        clock.measure(run, 0)
    assert clock.measure(work, 0)[0] > 10 * min(clock.measure(nothing, 0)[0] for _ in range(5))


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    """In a process without the interpreter that the tests put around Triton."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert document["left_out"] == [] and len(document["cases"]) == 2
    for case in document["cases"]:
        assert case["ours"] == "kdkernels triton"
        assert case["copy"]["gb_per_s"] > 0 and case["forward"]["median_ms"] > 0
        assert all(m["problem"] is None for m in case["methods"] if m["family"] != "liger")
        ours = case["methods"][-1]
        assert ours["launches"] is None or ours["launches"] >= 1
        assert ours["peak_tensors"] >= 1


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    command = [sys.executable, "-m", "benchmarks", "gpu", "--tune", "--quick", "--shapes", "512x1000"]
    command += ["--dtypes", "bfloat16", "--divergences", "forward_kl", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = json.loads(path.read_text())["cases"][0]["pairs"]
    assert pairs[0]["block"] is None and pairs[0]["problem"] is None
    assert any(p["times"] for p in pairs[1:])
