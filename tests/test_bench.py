"""The benchmark harness: its counting on literals, its probes on planted causes, a quick run end to end."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import logits, logits_report
from kdkernels import bench
from kdkernels.bench import eager, roofline
from kdkernels.bench.timing import WallClock, round_order

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PLANTED = 48_000_000


# Counting and arithmetic


def test_bytes_are_two_reads_and_one_write() -> None:
    assert roofline.tensor_bytes(256, 32000, torch.float32) == 32_768_000
    assert roofline.traffic_bytes(256, 32000, torch.float32) == 98_304_000
    assert roofline.traffic_bytes(64, 128256, torch.bfloat16) == 49_250_304
    assert roofline.traffic_bytes(16, 1000, torch.float32, reads=1, writes=0) == 64_000


def test_gigabytes_are_powers_of_ten() -> None:
    assert roofline.gigabytes_per_second(98_304_000, 0.004096) == pytest.approx(24.0)


def test_input_sets_exceed_the_cache_within_a_quarter_of_memory() -> None:
    # 1.25 × 480 MB / 64 MB = 9.4 sets; a quarter of 1,200 MB holds 4; at least 2, at most 64.
    assert roofline.input_sets(64_000_000, 480_000_000, 24_000_000_000) == 10
    assert roofline.input_sets(64_000_000, 480_000_000, 1_200_000_000) == 4
    assert roofline.input_sets(64_000_000, 480_000_000, None) == 10
    assert roofline.input_sets(64_000_000, 480_000_000, 1_000_000) == 2
    assert roofline.input_sets(64_000, 480_000_000, 24_000_000_000) == 64
    assert roofline.input_sets(64_000_000, None, 24_000_000_000) == 2


def test_timing_statistics() -> None:
    timing = bench.Timing((5.0, 1.0, 2.0, 3.0, 4.0), (7, 9, 8, 7, 7))
    assert timing.best == 1.0
    assert timing.median == 3.0
    # Inclusive quartiles 2 and 4, median 3.
    assert timing.spread == pytest.approx(2 / 3)
    assert timing.median_faults == 7
    assert bench.Timing((1.0,)).median_faults is None


def test_figures_of_a_contestant() -> None:
    case = logits.Case(256, 32000, "float32", "forward_kl")
    figures = logits.figures(case, bench.Timing((0.008192, 0.016384), (3, 5)), ceiling=24.0)
    assert figures == {
        "best_ms": pytest.approx(8.192),
        "median_ms": pytest.approx(12.288),
        "spread": pytest.approx(0.004096 / 0.012288),
        "rounds": 2,
        "gb_per_s": pytest.approx(12.0),
        "triad_share": pytest.approx(0.5),
        "page_faults": 4,
    }


def test_triad_computes_what_it_counts() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    seen: list[list[float]] = []

    with pytest.MonkeyPatch.context() as patch:
        for name in ("add", "mul"):
            plain = getattr(torch, name)

            def spy(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                result = plain(*args, **kwargs)
                seen.append(result.tolist())
                return result

            patch.setattr(torch, name, spy)
        for contestant in bench.triad([(a, b)], scale=0.5):
            contestant.run(0)
    assert seen == [[6.0, 12.0, 18.0, 24.0], [11.0, 22.0, 33.0, 44.0], [10.0, 40.0, 90.0, 160.0]]
    names = [c.name for c in bench.triad([(a.bfloat16(), b.bfloat16())])]
    assert names == ["triad add as fp32", "triad add, factor 1 as fp32", "triad mul as fp32"]


# Interleaving


class FakeClock:
    """Takes each call's duration from the call itself."""

    def measure(self, run: Any, number: int) -> tuple[float, int | None]:
        return float(run(number)), 0


def test_rounds_interleave_and_inputs_rotate() -> None:
    calls: list[tuple[str, int]] = []

    def contestant(name: str) -> bench.Contestant:
        def run(number: int) -> float:
            calls.append((name, number))
            return 1.0

        return bench.Contestant(name, run)

    names = ["a", "b", "c", "d"]
    timings = bench.race([contestant(n) for n in names], sets=3, clock=FakeClock(), min_rounds=20, warmup=2)
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == 22
    assert all(sorted(name for name, _ in r) == names for r in rounds)
    assert [number for _, number in calls] == [i % 3 for i in range(88)]
    # In 22 rounds everybody follows everybody else and stands in every place.
    orders = [[name for name, _ in r] for r in rounds]
    assert {(order[i], order[i + 1]) for order in orders for i in range(3)} == {
        (a, b) for a in names for b in names if a != b
    }
    assert all({order[i] for order in orders} == set(names) for i in range(4))
    assert {name: len(t.seconds) for name, t in timings.items()} == dict.fromkeys(names, 20)


def test_a_round_is_a_permutation_that_repeats() -> None:
    assert sorted(round_order(7, 3)) == list(range(7))
    assert round_order(7, 3) == round_order(7, 3)
    assert len({tuple(round_order(7, seed)) for seed in range(20)}) > 15


def test_warm_up_is_not_timed_and_the_best_is_found() -> None:
    durations = iter([100.0, 100.0, 3.0, 2.0, 4.0])
    timings = bench.race(
        [bench.Contestant("a", lambda number: next(durations))],
        sets=1,
        clock=FakeClock(),
        min_rounds=3,
        max_rounds=3,
        warmup=2,
    )
    assert timings["a"].seconds == (3.0, 2.0, 4.0)


def test_short_work_is_repeated_until_the_time_is_up() -> None:
    quick = [bench.Contestant("a", lambda number: None)]
    timings = bench.race(quick, sets=1, clock=WallClock(), min_rounds=2, min_seconds=0.02, max_rounds=10**6)
    assert len(timings["a"].seconds) > 20
    timings = bench.race(quick, sets=1, clock=WallClock(), min_rounds=2, min_seconds=60.0, max_rounds=9)
    assert len(timings["a"].seconds) == 9


def test_race_refuses_two_of_one_name() -> None:
    twice = [bench.Contestant("a", lambda number: None)] * 2
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        bench.race(twice, sets=1, clock=WallClock())


def test_clock_times_and_counts_faults() -> None:
    pages = 512

    def touch(number: int) -> None:
        time.sleep(0.02)
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as area:
            for start in range(0, len(area), mmap.PAGESIZE):
                area[start] = 1

    seconds, faults = WallClock().measure(touch, 0)
    assert seconds >= 0.02
    if bench.page_faults() is not None:
        assert faults is not None
        assert pages <= faults <= pages + 200


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="/proc/stat tells of other processes")
def test_neighbours_sees_another_process_and_not_itself() -> None:
    def spin(seconds: float) -> float:
        neighbours = bench.Neighbours()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        cpus = neighbours.cpus()
        assert cpus is not None
        return cpus

    alone = spin(0.5)
    other = subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        beside = spin(0.5)
    finally:
        other.kill()
        other.wait()
    # Where the machine is full, the newcomer takes its share from others: then the sum can't rise.
    full = alone > len(os.sched_getaffinity(0)) - 1.5
    assert beside > 0.3
    assert full or beside > alone + 0.2


# Isolation and memory


def _square(send: Any, x: int) -> int:
    send(f"squaring {x}")
    return x * x


def _raise(send: Any) -> None:
    raise ValueError("no such luck")


def _die(send: Any) -> None:
    os._exit(7)


def _planted(send: Any, size: int, kept: bool) -> bench.Peak | None:
    def step() -> object:
        block = torch.ones(size // 4)
        if not kept:
            del block
            block = torch.ones(1)
        return block

    return bench.peak_growth(step, CPU)


def _least_faults(send: Any, raised: bool) -> int:
    """The fewest page faults among repeated allocations: malloc may put some of them elsewhere."""
    if raised:
        assert bench.raise_malloc_thresholds()
    torch.set_num_threads(1)
    return min(WallClock().measure(lambda number: torch.ones(PLANTED // 4), 0)[1] or 0 for _ in range(12))


PRELOAD = ("torch",)


def test_a_function_runs_in_its_own_process() -> None:
    said: list[str] = []
    assert bench.run_isolated(_square, 12, on_message=said.append, preload=PRELOAD) == 144
    assert said == ["squaring 12"]
    with pytest.raises(bench.ProcessDied, match="ValueError: no such luck"):
        bench.run_isolated(_raise, preload=PRELOAD)
    with pytest.raises(bench.ProcessDied, match="_die ended with exit code 7"):
        bench.run_isolated(_die, preload=PRELOAD)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "freed before the end"])
def test_the_memory_probe_finds_a_planted_allocation(kept: bool) -> None:
    peak = bench.run_isolated(_planted, PLANTED, kept, preload=PRELOAD)
    assert peak is not None
    assert peak.bytes == pytest.approx(PLANTED, rel=0.1)


def test_raised_thresholds_end_page_faults() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("no mallopt: this C library isn't glibc")
    # 48 MB is above glibc's largest dynamic threshold, 32 MiB: mapped anew each time, in 2 MiB pages at most.
    assert bench.run_isolated(_least_faults, False, preload=PRELOAD) >= PLANTED // 2**21
    assert bench.run_isolated(_least_faults, True, preload=PRELOAD) < 10


# Correctness before speed


@pytest.mark.parametrize("objective", logits.OBJECTIVES)
@pytest.mark.parametrize("dtype", logits.DTYPES)
def test_every_eager_spelling_is_right(objective: str, dtype: str) -> None:
    chosen = logits.OBJECTIVES[objective]
    inputs = logits.Inputs(5, 301, dtype, CPU, sets=1)
    z, v = inputs.sets[0]
    truth = eager.truth(
        chosen.divergence, z, v, inputs.labels, chosen.temperature, chosen.hard_weight, rows=2
    )
    for spelling in eager.SPELLINGS[chosen.divergence]:
        verdict = logits.judge(logits.build(logits.Method("eager", spelling), chosen), inputs, dtype, truth)
        assert verdict.problem is None, spelling


def test_truth_is_the_definition() -> None:
    # Two classes, by hand: p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8).
    v = torch.tensor([[3.0, 1.0]]).log()
    z = torch.zeros(1, 2)
    label = torch.tensor([0])
    expected = {
        "forward_kl": (0.130812035941137, [-0.25, 0.25]),
        "reverse_kl": (0.143841036225890, [-0.274653072167027, 0.274653072167027]),
        "soft_cross_entropy": (0.693147180559945, [-0.25, 0.25]),
        # dz_0 = q_0 (l_0 − <q, l>) / 2 with l = log(q / m) = log(4/5), log(4/3): −log(5/3) / 8.
        "jsd": (0.033822075568605, [-0.063853202970749, 0.063853202970749]),
    }
    for divergence, (loss, gradient) in expected.items():
        value, got = eager.truth(divergence, z, v, label, 1.0, 0.0)
        assert value == pytest.approx(loss, abs=1e-7), divergence
        assert got[0].tolist() == pytest.approx(gradient, abs=1e-7), divergence
    # The hard term adds w · log 2 and w · (1/2 − 1, 1/2).
    value, got = eager.truth("forward_kl", z, v, label, 1.0, 0.5)
    assert value == pytest.approx(0.130812035941137 + 0.346573590279973, abs=1e-7)
    assert got[0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-7)


def test_a_wrong_contestant_is_refused_and_not_timed() -> None:
    case = logits.Case(4, 50, "float32", "forward_kl")
    inputs = logits.Inputs(4, 50, "float32", CPU, sets=2)
    right = eager.forward_kl_kl_div

    def wrong_loss(z: torch.Tensor, v: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return right(z, v, labels, 1.0, 0.0) + 1e-3

    def wrong_gradient(z: torch.Tensor, v: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = right(z, v, labels, 1.0, 0.0)
        return loss + (z[3].sum() - z[3].sum().detach()) * 1e-5

    def not_a_number(z: torch.Tensor, v: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = right(z, v, labels, 1.0, 0.0)
        return loss + (z[0, 0] - z[0, 0].detach()) * float("nan")

    def broken(z: torch.Tensor, v: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")

    losses: dict[str, logits.LossFn] = {
        "right": lambda z, v, labels: right(z, v, labels, 1.0, 0.0),
        "wrong loss": wrong_loss,
        "wrong gradient": wrong_gradient,
        "not a number": not_a_number,
        "broken": broken,
    }
    result = logits.time_case(case, losses, inputs, logits.Settings("cpu", 1, 3, 0.0))
    assert list(result["times"]) == ["right"]
    assert result["times"]["right"]["rounds"] == 3
    problems = {name: verdict["problem"] for name, verdict in result["verdicts"].items()}
    assert problems["right"] is None
    assert problems["wrong loss"].startswith("wrong: loss off by")
    assert problems["wrong gradient"].startswith("wrong: gradient off by")
    assert problems["not a number"].startswith("wrong: loss off by nan")
    assert problems["broken"] == "failed: RuntimeError: out of order"


def test_a_wrong_contestant_is_shown_as_wrong() -> None:
    case = _case(objective="forward_kl")
    case["methods"][0] |= {
        "problem": "wrong: loss off by 1.0e-01, allowed 1.0e-05",
        "times": {"default": None},
    }
    row = next(r for r in logits_report.case_rows([case]) if r[1] == "eager kl_div")
    assert row[2] == "WRONG"
    assert row[3:11] == [""] * 8
    assert len(row) == len(logits_report.CASE_HEAD)


# Targets


# Two threads with two rows each of the 256, and 1 % more.
PEAK_TENSORS = 1.01 + 4 / 256
PEAK, NET_PEAK = logits_report.PEAK, logits_report.NET_PEAK


def _case(
    shape: tuple[int, int] = (256, 32000),
    dtype: str = "float32",
    objective: str = "forward_kl",
    ours: float = 5.0,
    other_cpus: float = 0.0,
    wide: float | None = None,
) -> dict[str, Any]:
    def times(ms: float) -> dict[str, Any]:
        figures = {"best_ms": ms, "median_ms": 2 * ms, "spread": 0.1, "rounds": 20, "gb_per_s": 1.0}
        return figures | {"triad_share": 0.5, "page_faults": 0}

    def entry(family: str, spelling: str, ms: float, peak: float) -> dict[str, Any]:
        return {
            "name": f"{family} {spelling}",
            "family": family,
            "spelling": spelling,
            "problem": None,
            "loss_error": 1e-7,
            "gradient_error": 1e-6,
            "times": {"default": times(ms), "raised": None},
            "peak_tensors": peak,
            "peak_method": "VmHWM",
        }

    return {
        "shape": list(shape),
        "dtype": dtype,
        "objective": objective,
        "tensor_bytes": roofline.tensor_bytes(*shape, logits.DTYPES[dtype]),
        "ours": "kdkernels cpu",
        "threads": 2,
        "wide": {"default": None if wide is None else times(wide), "raised": None},
        "other_cpus": {"default": other_cpus, "raised": None},
        "triad": {
            "default": {
                "best_ms": 3.0,
                "median_ms": 6.0,
                "spelling": "triad add",
                "spread": 0.0,
                "gb_per_s": 32.0,
            }
            | {"triad_share": 1.0, "page_faults": 0},
            "raised": None,
        },
        "methods": [
            entry("eager", "kl_div", 50.0, 4.0),
            entry("eager", "closed_form", 30.0, 4.0),
            entry("torch.compile", "log_target", 25.0, 2.0),
            entry("torch.compile", "kl_div", 20.0, 2.0),
            entry("torch.compile", "closed_form", 15.0, 2.0),
            entry("kdkernels", "reference", 1.0, 6.0),
            entry("kdkernels", "cpu", ours, PEAK_TENSORS),
        ],
    }


def test_targets_are_ratios_of_the_chosen_backend() -> None:
    found = {t.name: t for t in logits_report.targets([_case()])}
    assert {name: t.measured["best"] for name, t in found.items()} == {
        "forward KL, share of triad": pytest.approx(0.6),
        "forward KL, × torch.compile of the loss": pytest.approx(4.0),
        "forward KL, × torch.compile of the closed form": pytest.approx(3.0),
        "× fastest eager, worst objective": pytest.approx(6.0),
        PEAK: pytest.approx(PEAK_TENSORS),
        NET_PEAK: pytest.approx(1.01),
    }
    for name in ("forward KL, × torch.compile of the closed form", NET_PEAK):
        shown = found.pop(name)
        assert (shown.asked, shown.met) == (logits_report.SHOWN, None)
        assert logits_report.target_rows([shown])[0][-1] == ""
    assert all(t.met for t in found.values())
    assert found["forward KL, share of triad"].asked == ">= 0.55"
    assert found["forward KL, share of triad"].measured["median"] == pytest.approx(0.6)
    assert found["forward KL, share of triad"].measured["raised"] is None


def test_a_target_is_missed() -> None:
    met = {t.name: t.met for t in logits_report.targets([_case(ours=16.0)])}
    assert met == {
        "forward KL, share of triad": False,
        "forward KL, × torch.compile of the loss": False,
        "forward KL, × torch.compile of the closed form": None,
        "× fastest eager, worst objective": False,
        PEAK: True,
        NET_PEAK: None,
    }


def test_the_worst_case_decides() -> None:
    cases = [_case(), _case(objective="jsd", ours=20.0), _case(objective="reverse_kl", ours=10.0)]
    found = {t.name: t for t in logits_report.targets(cases)}
    worst = found["× fastest eager, worst objective"]
    assert worst.measured["best"] == pytest.approx(1.5)
    assert worst.where == "(256, 32000) float32 jsd"
    assert worst.met is False
    assert found["JSD(0.5), share of triad"].measured["best"] == pytest.approx(0.15)
    assert found["JSD(0.5), × torch.compile of the loss"].measured["best"] == pytest.approx(1.25)
    assert found["JSD(0.5), × torch.compile in probability space"].measured["best"] == pytest.approx(1.0)


def test_bf16_is_held_against_fp32_of_the_same_case() -> None:
    cases = [_case(), _case(dtype="bfloat16", ours=6.0, wide=5.0), _case(shape=(16, 1000), ours=40.0)]
    found = {t.name: t for t in logits_report.targets(cases)}
    assert found["bf16 time / fp32 time, worst objective"].measured["best"] == pytest.approx(1.2)
    assert found["bf16 time / fp32 time, worst objective"].met is False
    small = found["time / fastest eager, small, worst objective"]
    assert small.measured["best"] == pytest.approx(40 / 30)
    assert small.met is False


def test_a_busy_machine_decides_nothing_about_time() -> None:
    found = {t.name: t for t in logits_report.targets([_case(other_cpus=0.6)])}
    assert found["forward KL, share of triad"].met is None
    assert found[PEAK].met is True
    assert logits_report.target_rows([found["forward KL, share of triad"]])[0][-1] == "machine busy"


def test_what_was_not_measured_is_not_met() -> None:
    case = _case()
    case["methods"][-1]["times"]["default"] = None
    case["methods"][-1]["peak_tensors"] = None
    found = logits_report.targets([case])
    assert {t.met for t in found if t.asked != logits_report.SHOWN} == {False}
    assert logits_report.target_rows(found)[0][3] == "not measured"


def test_markdown_table_is_aligned() -> None:
    assert bench.markdown_table(("name", "ms"), [("a|b", "1.5"), ("c", "20")]) == (
        "| name |  ms |\n| ---- | --: |\n| a\\|b | 1.5 |\n| c    |  20 |\n"
    )


# End to end


def test_quick_run_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "logits.json"
    command = [sys.executable, "-m", "benchmarks", "logits", "--quick", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert set(document) == {
        "schema", "command", "finished", "kdkernels", "environment", "settings", "phases_s", "cases",
        "targets",
    }  # fmt: skip
    assert document["command"].startswith(
        "python -m benchmarks logits --quick --device cpu --threads 1 --json"
    )
    assert document["settings"]["threads"] == document["environment"]["threads"] == 1
    assert document["environment"]["torch"] == torch.__version__
    assert {"cpu", "isa", "transparent_hugepages", "torch_isa"} <= set(document["environment"])
    assert [(c["shape"], c["dtype"], c["objective"]) for c in document["cases"]] == [
        ([16, 1000], "float32", "forward_kl"),
        ([16, 1000], "float32", "jsd"),
    ]
    for case in document["cases"]:
        assert {m["name"] for m in case["methods"]} >= {
            "eager kl_div", "eager log_target", "eager closed_form", "kdkernels reference", case["ours"],
        }  # fmt: skip
        assert case["traffic_bytes"] == 192_000
        assert case["triad"]["default"]["triad_share"] == 1.0
        for method in case["methods"]:
            assert method["problem"] is None
            assert method["loss_error"] < 1e-5
            assert method["gradient_error"] < 1e-4
            times = method["times"]["default"]
            assert times["rounds"] >= 5
            assert 0 < times["best_ms"] <= times["median_ms"]
            assert times["gb_per_s"] == pytest.approx(192_000 / times["best_ms"] / 1e6)
            assert times["triad_share"] == pytest.approx(
                times["gb_per_s"] / case["triad"]["default"]["gb_per_s"]
            )
    report = path.with_suffix(".md").read_text()
    assert report.startswith("# Losses on logits\n")
    assert "| forward_kl | kdkernels cpu" in report or "| forward_kl | kdkernels reference" in report
    assert "## Targets" in report
    assert "## Targets" not in done.stdout
    assert f"written: {path}" in done.stdout


def test_check_fails_on_a_missed_target(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(logits, "measure_memory", lambda *args: {})
    monkeypatch.setattr(logits, "measure_times", lambda *args, **options: {})
    # Nothing was measured, so nothing is met.
    assert logits.main(["--quick", "--device", "cpu"]) == 0
    assert logits.main(["--quick", "--device", "cpu", "--check"]) == 1
    assert "1 of 1 targets missed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "256"], "a shape is ROWSxVOCAB, such as 256x32000, got '256'"),
        (["--shapes", "0x10"], "rows and vocabulary must be >= 1, got '0x10'"),
        (["--threads", "0"], "a number >= 1, got '0'"),
        (["--divergences", "tvd"], "invalid choice: 'tvd'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        logits.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "logits.json"
    assert logits.main(["--quick", "--device", "cuda", "--json", str(path)]) == 0
    for case in json.loads(path.read_text())["cases"]:
        assert all(m["problem"] is None for m in case["methods"])
