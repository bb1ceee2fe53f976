"""The benchmark of the CUDA kernel, as far as a CPU can tell: its targets, and its measuring by stand-ins."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.__main__
import kdkernels as kd
from benchmarks import cluster, cluster_report
from benchmarks.cases import Case
from benchmarks.gpu_harness import DeviceInputs
from benchmarks.gpu_report import Target
from kdkernels import bench, tuning
from kdkernels.backends import cuda_ahead
from kdkernels.bench.timing import WallClock

CPU = torch.device("cpu")
STAND_INS = {"cuda": "reference", "triton": "reference"}
SETTINGS = cluster.Settings("cpu", 60.0, 2, 1.0, 2**16, ahead=False, backends=STAND_INS)
ONE = Case(6, 50, "bfloat16", "forward_kl")


# What is asked for


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks.__main__.main(["cluster"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "python -m benchmarks cluster: there is no GPU here" in said.err


def test_the_plan() -> None:
    plan = cluster.cases_for(cluster.parser().parse_args([]))
    assert plan[0] == cluster.HOST
    assert [str(c) for c in plan[1:3]] == [
        "(8192, 128256) bfloat16 forward_kl",
        "(8192, 128256) bfloat16 tvd",
    ]
    assert len(plan) == 1 + 3 * 4
    quick = cluster.cases_for(cluster.parser().parse_args(["--quick"]))
    assert quick == [cluster.HOST, Case(512, 32000, "bfloat16", "forward_kl")]
    chosen = ["--shapes", "4x50", "--dtypes", "float16", "--divergences", "jsd(0.5)", "logit_mse"]
    assert cluster.cases_for(cluster.parser().parse_args(chosen))[1:] == [
        Case(4, 50, "float16", "jsd(0.5)"),
        Case(4, 50, "float16", "logit_mse"),
    ]


def test_results_are_named_after_the_device() -> None:
    path = cluster.result_path("NVIDIA H100 80GB HBM3")
    assert path.name == "cluster-nvidia-h100-80gb-hbm3.json"
    assert path.parent.name == "results"


# Compiling


def test_what_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ahead, "architecture_here", lambda: "sm_90")
    monkeypatch.setattr("kdkernels.backends.cuda_build.architecture", lambda major, minor: "sm_90")
    names = list(cluster.jobs(cluster.cases_for(cluster.parser().parse_args([])), SETTINGS))
    # Of each of three vocabularies and four divergences, of (16, 1000), and what all share.
    assert sum(name.startswith("cuda Build") for name in names) == 13
    assert {"cuda TotalBuild()", "cuda ScaleBuild(type='kBFloat16')"} < set(names)
    # One build of Triton is of all three.
    assert sum(name.startswith("triton") for name in names) == 5
    half = [Case(4, 50, "float16", "tvd")]
    assert sum("kLoss" in name for name in cluster.jobs(half, SETTINGS)) == 1
    wide = [Case(4, 10**6, "float32", "tvd")]
    assert list(cluster.jobs(wide, SETTINGS)) == ["triton tvd float32"]


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(cluster, "jobs", lambda plan, settings: {"bad": fail, "good": lambda: None})
    said: list[Any] = []
    cluster.build_all([], SETTINGS, said.append)
    assert ("said", "bad: not built beforehand: failed: ValueError: no such thing", None) in said
    kind, seconds, _ = said[-1]
    assert (kind, list(seconds)) == ("built", ["good"])


# Measuring


def _inputs(case: Case) -> DeviceInputs:
    return DeviceInputs(case.rows, case.vocab, case.dtype, CPU, 2)


@pytest.mark.parametrize("objective", cluster.UNLABELLED)
def test_the_truth_of_every_divergence(objective: str) -> None:
    case = Case(6, 50, "float32", objective)
    inputs = _inputs(case)
    found = {"cuda": inputs.step(cluster.loss_of(case, "reference"))(0)}
    assert cluster.compare(found, inputs, case, elements=150)["cuda"].problem is None
    value, gradient = found["cuda"]
    wrong = gradient.clone()
    wrong[-1] *= 1.01
    assert "gradient off" in str(cluster.compare({"cuda": (value, wrong)}, inputs, case)["cuda"].problem)
    wrong = gradient.clone()
    wrong[2, 3] = float("nan")
    assert cluster.compare({"cuda": (value, wrong)}, inputs, case)["cuda"].problem is not None
    assert "loss off" in str(
        cluster.compare({"cuda": (value * 1.01, gradient)}, inputs, case)["cuda"].problem
    )


def test_a_tie_of_tvd_may_fall_either_way() -> None:
    case = Case(2, 50, "float32", "tvd")
    inputs = _inputs(case)
    z, v = inputs.sets[0]
    with torch.no_grad():
        # A class that hardly weighs is as likely to both; the others change places.
        z[:, 0] = -20.0
        v.copy_(z)
        v[:, 1:] = z[:, 1:].roll(1, -1)
    found = inputs.step(cluster.loss_of(case, "reference"))(0)
    off = found[1].clone()
    off[:, 0] += 1.0
    assert cluster.compare({"cuda": (found[0], off)}, inputs, case)["cuda"].problem is None
    off[:, 1] += 1.0
    assert cluster.compare({"cuda": (found[0], off)}, inputs, case)["cuda"].problem is not None


def test_a_case() -> None:
    at: list[str | None] = []
    ceiling = bench.copy(SETTINGS.copy_bytes, CPU)
    result = cluster.measure_case(ONE, _inputs(ONE), ceiling, WallClock(), SETTINGS, now=at.append)
    json.dumps(result, allow_nan=False)
    assert result["copy"]["gb_per_s"] > 0
    for method in result["methods"].values():
        assert method["problem"] is None
        assert method["times"]["median_ms"] > 0
        assert method["times"]["copy_share"] > 0
    assert at[:3] == ["cuda", "triton", "fp64"]


def test_who_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, backends={"cuda": "cuda", "triton": "reference"})
    ceiling = bench.copy(SETTINGS.copy_bytes, CPU)
    result = cluster.measure_case(ONE, _inputs(ONE), ceiling, WallClock(), settings)
    assert result["methods"]["cuda"]["problem"].startswith("failed: ")
    assert result["methods"]["cuda"]["times"] is None
    assert result["methods"]["triton"]["times"] is not None

    def twice(case: Case, backend: str) -> Any:
        def loss(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
            return kd.kd_loss(z, v, backend="reference") * (2 if backend == "cuda" else 1)

        return loss

    monkeypatch.setattr(cluster, "loss_of", twice)
    result = cluster.measure_case(ONE, _inputs(ONE), ceiling, WallClock(), settings)
    assert result["methods"]["cuda"]["problem"].startswith("wrong: loss off by 1.0e+00")
    assert result["methods"]["cuda"]["times"] is None
    banned = {"cuda": "failed: killed"}
    result = cluster.measure_case(ONE, _inputs(ONE), ceiling, WallClock(), settings, banned=banned)
    assert result["methods"]["cuda"]["problem"] == "failed: killed"


def test_the_host() -> None:
    result = cluster.measure_host(cluster.HOST, _inputs(cluster.HOST), SETTINGS, rounds=3)
    for method in result["methods"].values():
        assert method["forward_us"] > 0 and method["step_us"] > 0
    settings = replace(SETTINGS, backends={"cuda": "cuda", "triton": "reference"})
    result = cluster.measure_host(cluster.HOST, _inputs(cluster.HOST), settings, rounds=1)
    assert result["methods"]["cuda"]["forward_us"] is None
    assert cluster_report.host_rows(result)[0][:2] == ["cuda", "FAILED"]


def test_how_a_row_is_shared_out_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(case: Case, backend: str) -> Any:
        def loss(z: Tensor, v: Tensor, labels: Tensor) -> Tensor:
            if backend == "cuda":
                tuning.cuda(128256, 2, 232_448, 0, False, "light")
                tuning.cuda(128256, 2, 232_448)
            return kd.kd_loss(z, v, backend="reference")

        return loss

    monkeypatch.setattr(cluster, "loss_of", asks)
    original = tuning.cuda
    settings = replace(SETTINGS, backends={"cuda": "cuda", "triton": "reference"})
    _, _, config = cluster.right_ones(ONE, _inputs(ONE), settings, {}, lambda name: None)
    asked = tuning.cuda(128256, 2, 232_448, 0, False, "light")
    assert asked is not None and config is not None
    assert (config["cluster"], config["threads"]) == (asked.cluster, asked.threads)
    assert (config["blocks"], config["shared"]) == (asked.blocks, asked.shared)
    assert tuning.cuda is original


def test_from_end_to_end(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "cluster.json"
    arguments = ["--shapes", "4x50", "--divergences", "tvd", "--dtypes", "float16", "--json", str(path)]
    options = cluster.parser().parse_args(arguments)
    assert cluster.measure(options, SETTINGS, cluster.environment(CPU), ["cluster", *arguments]) == 0
    document = json.loads(path.read_text())
    assert document["finished"] is not None
    assert document["left_out"] == document["stopped"] == []
    assert document["cases"][0]["methods"]["cuda"]["times"]["median_ms"] > 0
    assert document["host"]["methods"]["triton"]["step_us"] > 0
    assert "| (4, 50) float16 tvd" in path.with_suffix(".md").read_text()
    assert f"written: {path}" in capsys.readouterr().out


# When a process dies


def _finish(send: Any, todo: list[Case]) -> None:
    for case in todo:
        result = _host() if case == cluster.HOST else _case((case.rows, case.vocab), case.objective)
        send(("case", case, result))


def test_the_culprit_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    TWO = Case(6, 50, "bfloat16", "tvd")
    asked: list[Any] = []

    def isolated(function: Any, todo: list[Case], settings: Any, banned: Any, **options: Any) -> None:
        send = options["on_message"]
        asked.append((todo, settings.ahead, dict(banned)))
        if len(asked) == 1:
            send(("building", 3, None))
        elif len(asked) == 2:
            send(("now", ONE, "triton"))
        elif len(asked) == 3:
            _finish(send, [ONE])
            send(("now", TWO, None))
        elif len(asked) == 4:
            _finish(send, todo)
            return
        raise bench.ProcessDied("measure_process ended with exit code -11")

    monkeypatch.setattr(bench, "run_isolated", isolated)
    path = tmp_path / "cluster.json"
    document = {"command": "", "environment": cluster.environment(CPU) | {"cuda-core": None}, "settings": {}}
    document["settings"] = {"copy_bytes": 1, "min_rounds": 1, "max_seconds": 1.0}
    run = cluster.Cluster([ONE, TWO], replace(SETTINGS, ahead=True), document, path)
    run.measure()
    why = "failed: measure_process ended with exit code -11"
    assert asked == [
        ([ONE, TWO], True, {}),
        ([ONE, TWO], False, {}),
        ([ONE, TWO], False, {(ONE, "triton"): why}),
        ([TWO], False, {(ONE, "triton"): why, (TWO, "cuda"): why}),
    ]
    assert len(run.stopped) == 3
    assert list(run.results) == [ONE, TWO] and not run.left_out
    assert "THE RUN HAS NOT FINISHED" in path.with_suffix(".md").read_text()


def test_what_there_is_no_time_for_is_left_out() -> None:
    run = cluster.Cluster([ONE], replace(SETTINGS, seconds=1e-9), {}, None)
    time.sleep(1e-3)
    run.measure()
    assert run.left_out == {ONE: "the time was up"}


# Targets


def _case(
    shape: tuple[int, int] = (8192, 128256),
    objective: str = "forward_kl",
    share: float = 0.9,
    triton: float | None = 4.0,
    problem: str | None = None,
) -> dict[str, Any]:
    def method(ms: float | None, of_copy: float) -> dict[str, Any]:
        times = {"median_ms": ms, "best_ms": ms, "spread": 0.01, "gb_per_s": 1.0, "copy_share": of_copy}
        return {
            "loss_error": 1e-7,
            "gradient_error": 2e-3,
            "problem": problem if ms is None else None,
            "times": times if ms else None,
        }

    return {
        "shape": list(shape),
        "dtype": "bfloat16",
        "objective": objective,
        "traffic_bytes": 6 * shape[0] * shape[1],
        "input_sets": 2,
        "copy": {"gb_per_s": 2800.0},
        "config": {"cluster": 8, "threads": 512, "blocks": 2, "part": 2004, "shared": 65_888},
        "methods": {"cuda": method(None if problem else 2.5, share), "triton": method(triton, 0.5)},
    }


def _host(cuda: float = 30.0) -> dict[str, Any]:
    def method(us: float) -> dict[str, Any]:
        return {
            "loss_error": 0.0,
            "gradient_error": 2e-3,
            "problem": None,
            "forward_us": us,
            "step_us": 2 * us,
        }

    return cluster.describe(cluster.HOST) | {
        "config": None,
        "methods": {"cuda": method(cuda), "triton": method(40.0)},
    }


def _targets(*cases: dict[str, Any], host: Any = None, left_out: Any = ()) -> dict[str, Target]:
    found = cluster_report.targets({"cases": list(cases), "host": host, "left_out": list(left_out)})
    return {t.name: t for t in found}


@pytest.mark.parametrize(
    ("objective", "share", "asked", "met"),
    [
        ("forward_kl", 0.84, ">= 0.85", False),
        ("tvd", 0.85, ">= 0.85", True),
        ("jsd(0.5)", 0.7, ">= 0.70", True),
        ("skew_kl(0.1)", 0.69, ">= 0.70", False),
        ("reverse_kl", 0.1, "shown only", None),
    ],
)
def test_shares(objective: str, share: float, asked: str, met: bool | None) -> None:
    found = _targets(_case(objective=objective, share=share))["share of copy"]
    assert (found.asked, found.met, found.measured) == (asked, met, share)


def test_no_share_is_asked_of_small_shapes() -> None:
    assert _targets(_case((512, 1000), share=0.1))["share of copy"].asked == "shown only"


@pytest.mark.parametrize(
    ("vocab", "triton", "asked", "met"),
    [
        (128256, 3.4, ">= 1.40", False),
        (262144, 3.5, ">= 1.40", True),
        (32000, 1.0, "shown only", None),
        (128256, None, ">= 1.40", None),
    ],
)
def test_how_much_faster_than_triton(vocab: int, triton: float | None, asked: str, met: bool | None) -> None:
    found = _targets(_case((8192, vocab), triton=triton))["times as fast as Triton"]
    assert (found.asked, found.met) == (asked, met)
    assert found.measured == (None if triton is None else triton / 2.5)


def test_launches() -> None:
    name = "host time of a forward, over Triton's"
    assert _targets(host=_host())[name].met is True
    assert _targets(host=_host(41.0))[name].met is False
    assert _targets()[name].met is None


def test_wrong_cases_and_those_left_out() -> None:
    left_out = [cluster.describe(Case(8192, 128256, "bfloat16", "tvd")) | {"why": "the time was up"}]
    found = cluster_report.targets(
        {"cases": [_case(problem="wrong: loss off"), _case()], "host": None, "left_out": left_out}
    )
    right = next(t for t in found if t.name == "cases that the CUDA kernel gets right")
    assert (right.measured, right.met) == (0.5, False)
    shares = [t for t in found if t.name == "share of copy"]
    assert [t.met for t in shares] == [None, True, None]
    assert [t.asked for t in shares] == [">= 0.85"] * 3


def test_the_tables() -> None:
    row = cluster_report.case_row(_case())
    assert len(row) == len(cluster_report.CASE_HEAD)
    assert row[1:9] == ["2.5", "2.5", "1 %", "90 %", "4", "50 %", "1.60", "2800"]
    assert row[-4:] == ["8", "512", "2", "65,888"]
    assert cluster_report.case_row(_case(problem="wrong: loss off"))[1:5] == ["WRONG", "", "", ""]
    said = cluster_report.summary(_case())
    assert "cuda 2.5 ms (90 % of copy); triton 4 ms (50 % of copy); ratio 1.60; copy 2800 GB/s" in said
    assert "cuda forward 30.0 µs, step 60.0 µs" in cluster_report.summary(_host())
