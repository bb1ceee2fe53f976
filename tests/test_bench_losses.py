"""`kdkernels bench`: its truth and floors, who takes part, who is shown as wrong, and what is written."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import compare, peers
from kdkernels import bench_cli, cli
from kdkernels.bench import Timing, charts, contestants, eager, measure, pages, workloads
from kdkernels.bench.timing import typical
from kdkernels.bench.workloads import Point

SMALL: dict[str, Any] = {"rows": 6, "vocab": 203, "widths": (5, 7), "k": 9}
LOSSES = [*eager.TERMS, eager.LABELS]


def points(workload: str) -> list[Point]:
    """Every divergence; T and labels with the first."""
    found = [Point(workload, divergence=name, **SMALL) for name in LOSSES]
    found.append(Point(workload, temperature=2.0, hard_weight=0.1, **SMALL))
    return [p for p in found if workload != "sparse" or p.divergence != eager.LABELS]


ALL_POINTS = [p for name in workloads.WORKLOADS for p in points(name)]


def exact(point: Point, given: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
    """Loss and gradients by the reference backend in float64."""
    made = [x.detach().double() if x.is_floating_point() else x for x in given]
    entry = contestants.Entry(contestants.OURS, "reference")
    leaves = workloads.workload(point, 1).leaves
    made = [x.requires_grad_() if i in leaves else x for i, x in enumerate(made)]
    loss = contestants.build(entry, point)(*made, point.temperature, point.hard_weight)
    return float(loss.detach()), torch.autograd.grad(loss, [made[i] for i in leaves])


@pytest.mark.parametrize("point", ALL_POINTS, ids=str)
def test_the_truth_is_that_of_the_reference_in_fp64(point: Point) -> None:
    """The reference shares no formula with what is compared with."""
    made = workloads.workload(point, 1)
    value, gradients = made.truth()
    expected, by_reference = exact(point, made.sets[0])
    # What is stored is float32, so that its ghost of 1 - Σp is right to 1e-7 of 1, and all else to 1e-12.
    close = 1e-6 if point.workload == "sparse" else 1e-9
    assert value == pytest.approx(expected, rel=close)
    for got, wanted in zip(gradients, by_reference, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < close


def test_the_truth_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in workloads.WORKLOADS:
        point = Point(name, temperature=2.0, hard_weight=0.1, **SMALL)
        whole = workloads.workload(point, 1).truth()
        with monkeypatch.context() as patch:
            patch.setattr(workloads, "_parts", lambda rows, vocab: iter([slice(0, 4), slice(4, rows)]))
            parts = workloads.workload(point, 1).truth()
        assert parts[0] == pytest.approx(whole[0], rel=1e-12)
        for a, b in zip(parts[1], whole[1], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("point", ALL_POINTS, ids=str)
@pytest.mark.parametrize("dtype", workloads.DTYPES)
def test_who_takes_part_computes_the_loss(point: Point, dtype: str) -> None:
    """Ours, eager spellings, and every installed library; torch.compile is of the same spellings."""
    point = replace(point, dtype=dtype)
    made = workloads.workload(point, 1)
    truth = made.truth()
    found, _ = contestants.everyone(point, ["benchmarks.peers"])
    assert {"eager", "torch.compile", "kd_loss"} <= {entry.family for entry in found}
    for entry in found:
        if entry.family == "torch.compile" or entry.spelling == "LigerFusedLinearJSDLoss":  # compiled, too
            continue
        errors = made.errors(made.step(contestants.build_any(entry, point))(0), truth)
        assert made.wrong(errors) is None, entry.name


FAULTS: dict[str, Any] = {
    "no T²": lambda z, v, y, T, hard: eager.forward_kl_kl_div(z, v, y, T, hard) / T**2,
    "no labels": lambda z, v, y, T, hard: eager.forward_kl_kl_div(z, v, y, T, 0.0),
    "the other way round": lambda z, v, y, T, hard: eager.reverse_kl_kl_div(z, v, y, T, hard),
    "half the gradient": lambda z, v, y, T, hard: _half(eager.forward_kl_kl_div(z, v, y, T, hard)),
    "NaN": lambda z, v, y, T, hard: eager.forward_kl_kl_div(z * torch.nan, v, y, T, hard),
    "a gradient of NaN": lambda z, v, y, T, hard: _nan(eager.forward_kl_kl_div(z, v, y, T, hard)),
}


def _half(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def _nan(x: Tensor) -> Tensor:
    x.register_hook(lambda g: g * torch.nan)
    return x * 1.0


@pytest.mark.parametrize("workload", ["logits", "linear"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", workloads.DTYPES)
def test_another_loss_is_told_from_it(workload: str, fault: str, dtype: str) -> None:
    point = Point(workload, dtype=dtype, temperature=2.0, hard_weight=0.1, **SMALL)
    made = workloads.workload(point, 1)
    loss = FAULTS[fault] if workload == "logits" else workloads.of_heads(FAULTS[fault])
    problem = made.wrong(made.errors(made.step(loss)(0), made.truth()))
    assert problem is not None and problem.startswith("wrong: ")


def test_floors_on_literals() -> None:
    assert workloads.floor(Point("logits", 64, 1000)) == workloads.Floor(3 * 64 * 1000 * 4, 0)
    assert workloads.floor(Point("logits", 64, 1000, "bfloat16", eager.LABELS)).bytes == 2 * 64 * 1000 * 2
    assert workloads.floor(Point("sparse", 64, 1000, k=16)).bytes == 2 * 64 * 1000 * 4 + 64 * 16 * 12
    heads = workloads.floor(Point("linear", 64, 1000, widths=(8, 16)))
    assert heads.flops == 2 * 64 * 1000 * (3 * 8 + 16)
    assert workloads.floor(Point("linear", 64, 1000, divergence=eager.LABELS, widths=(8, 16))).flops == (
        2 * 64 * 1000 * 3 * 8
    )


@pytest.mark.parametrize("chunk", [2, 4, 6])
def test_the_products_are_those_of_a_step(chunk: int) -> None:
    made = workloads.workload(Point("linear", **SMALL), 1)
    products = workloads.Products(made.sets, chunk)
    products(0)
    x, weight, t_x, t_weight = (each.detach() for each in made.sets[0][:4])
    z = x @ weight.T
    torch.testing.assert_close(products.dx, z @ weight)
    torch.testing.assert_close(products.dw, z.T @ x)
    last = 6 - (6 - 1) // chunk * chunk
    assert products.v is not None
    torch.testing.assert_close(products.v[:last], (t_x @ t_weight.T)[-last:])


def test_inputs_rotate_in_memory_of_their_own() -> None:
    made = workloads.workload(Point("logits", **SMALL), 3)
    assert len({x.data_ptr() for given in made.sets for x in given}) == 9
    seen: list[int] = []

    def loss(z: Tensor, *_: Any) -> Tensor:
        seen.append(z.data_ptr())
        return z.sum()

    for number in range(6):
        made.step(loss)(number)
    assert seen == 2 * [given[0].data_ptr() for given in made.sets]
    assert len(workloads.workload(Point("logits", **SMALL)).sets) == 64  # small ones: as many as there may be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workload": "lgits"}, "workload must be one of logits, linear, sparse, got 'lgits'"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl, "),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"vocab": 1}, "vocab must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"hard_weight": -1.0}, "hard_weight must be finite and at least 0, got -1.0"),
        ({"workload": "sparse", "k": 203}, "k must be below vocab, 203, got 203"),
        ({"workload": "sparse", "divergence": eager.LABELS}, "a stored teacher has no loss of labels alone"),
    ],
)
def test_a_point_that_is_none(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        workloads.workload(Point(**{"workload": "logits", **SMALL, **changes}))


# Figures


def test_a_ratio_is_the_median_over_rounds() -> None:
    """Of both times in one round: a slow spell falls on both, and leaves it as it is."""
    ours, peer = Timing((1.0, 1.0, 10.0)), Timing((3.0, 3.0, 30.0))
    ceiling = {"bytes_per_s": 400.0, "flops_per_s": None}
    found = measure._time_document(peer, workloads.Floor(600, 0), ceiling, ours, [3])
    assert (found["ratio"], found["best_ms"], found["median_ms"]) == (pytest.approx(3.0), 3000.0, 3000.0)
    assert (found["bytes_per_s"], found["share"]) == (200.0, 0.5)


def a_pass(ours: Sequence[float], peer: Sequence[float], best: float = 1.0) -> dict[str, Any]:
    """What a process found."""
    timings = {"kd_loss cpu": Timing(tuple(ours), (0,) * len(ours)), "eager kl_div": Timing(tuple(peer))}
    ceiling = {"name": f"triad of {best}", "best": best, "work": workloads.Floor(800, 0)}
    return {"verdicts": {}, "timings": timings, "ceiling": ceiling, "sets": 2, "other_cpus": best}


def test_a_ratio_over_passes_weighs_each_alike() -> None:
    """Whatever the number of their rounds: what moves a time is settled once a process."""
    joined = measure._joined([a_pass([1.0, 2.0, 1.0], [2.0, 4.0, 9.0]), a_pass([1.0], [8.0], 0.5)])
    assert isinstance(joined, dict) and joined["rounds"] == [3, 1] and joined["other_cpus"] == 0.75
    assert joined["ceiling"] == {
        "name": "triad of 0.5", "best_ms": 500.0, "pass_best_ms": [1000.0, 500.0], "bytes_per_s": 1600.0,
        "flops_per_s": None,
    }  # fmt: skip
    peer, ours = (joined["timings"][name] for name in ("eager kl_div", "kd_loss cpu"))
    assert (ours.faults, peer.faults) == ((0,) * 4, None)
    found = measure._time_document(peer, workloads.Floor(600, 0), joined["ceiling"], ours, joined["rounds"])
    assert found["ratio"] == pytest.approx((2.0 * 8.0) ** 0.5) and found["rounds"] == 4
    assert found["pass_ratios"] == [2.0, 8.0]


def test_an_odd_pass_moves_nothing() -> None:
    """Once there are enough to tell which that is."""
    assert typical([3.0]) == pytest.approx(3.0) and typical([2.0, 8.0]) == pytest.approx(4.0)
    assert typical([2.0, 4.0, 8.0]) == pytest.approx(4.0)
    assert typical([2.0, 100.0, 8.0, 0.1]) == pytest.approx(4.0)


def test_passes_end_before_their_time_is_up() -> None:
    """Two there are in any case; a third begins where it would end in time, as long as the last."""
    settings = measure.Settings(1, passes=9, most_seconds=10.0)
    assert measure._has_time([0.0], settings) and measure._has_time([0.0, 99.0], settings)
    assert measure._has_time([0.0, 5.0, 7.0], settings)
    assert not measure._has_time([0.0, 2.0, 7.0], settings)
    assert measure._has_time([0.0, 2.0, 7.0], measure.Settings(1, passes=9))


def test_who_is_slow_beyond_comparison_is_not_timed(tmp_path: Path) -> None:
    """But for one that was only compiled, or otherwise slow, at its first call."""
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "import torch.nn.functional as F\n"
        "calls = []\n"
        "def kl(z, v):\n"
        "    return F.kl_div(z.log_softmax(-1), v.log_softmax(-1), reduction='batchmean', log_target=True)\n"
        "def slow(z, v):\n    time.sleep(1.1)\n    return kl(z, v)\n"
        "def slow_at_first(z, v):\n"
        "    calls.append(time.sleep(0.0 if calls else 1.1))\n    return kl(z, v)\n"
    )
    settings = measure.Settings(
        torch.get_num_threads(), 1, 0.01, compiled=False, memory=False,
        modules=tuple(f"{tmp_path}/mine.py:{name}" for name in ("slow", "slow_at_first")),
    )  # fmt: skip
    (point,) = measure.measure([Point("logits", 4, 300)], settings)["points"]
    entries = {e["name"]: e for e in point["entries"]}
    assert entries["yours slow"]["time"] is None and entries["yours slow_at_first"]["time"]
    assert re.match(r"slow: a step took 1\.\d s, over 10 times", entries["yours slow"]["problem"])
    assert not measure.hopeless(point, "yours")
    point["entries"].remove(entries["yours slow_at_first"])
    assert measure.hopeless(point, "yours") and not measure.hopeless(point, "eager")


def test_passes_end_where_one_failed_or_all_had_their_time() -> None:
    settings = measure.Settings(1, seconds=1.0, passes=3)
    short = a_pass([1.0], [2.0])
    assert measure._goes_on([], settings) and measure._goes_on([short], settings)
    assert not measure._goes_on([short] * 2, settings)  # 6 seconds of 6
    assert not measure._goes_on([short, "ended with exit code 3"], settings)
    assert measure._joined([short, "ended with exit code 3"]) == "ended with exit code 3"


def test_rounds_are_spread_over_processes() -> None:
    """And only the first checks: those that it found to be wrong are in none of the others."""
    found = measure.measure(
        [Point("logits", 4, 300)], measure.Settings(1, 5, 0.01, passes=2, compiled=False, memory=False)
    )
    (point,) = found["points"]
    assert {e["time"]["rounds"] >= 6 for e in point["entries"]} == {True}
    assert all(e["loss_error"] is not None and e["problem"] is None for e in point["entries"])


def test_what_is_slow_to_import_is_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("theirs")
    monkeypatch.setitem(sys.modules, "theirs", module)
    assert contestants.preload(["theirs", "a.py:loss"]) == ["theirs"]
    monkeypatch.setattr(module, "PRELOAD", ("one", "other"), raising=False)
    assert contestants.preload(["theirs"]) == ["one", "other"]


def synthetic(**axis: int) -> dict[str, Any]:
    """A measured point whose eager time grows as V^2 and N, and ours as the root of V."""
    point = Point("logits", **{"rows": 4, "vocab": 8, **axis})
    times = {"eager kl_div": point.vocab**2 * point.rows, "kd_loss cpu": point.vocab**0.5 * point.rows}
    entries = [
        {
            "name": name, "family": name.split()[0], "spelling": name.split()[1], "problem": None,
            "loss_error": 1e-9, "gradient_error": 2e-9, "peak_bytes": 100 * point.vocab, "peak_method": "",
            "time": {"best_ms": ms, "median_ms": ms, "spread": 0.0, "rounds": 3, "share": 0.5,
                     "bytes_per_s": 1e9, "ratio": ms / times["kd_loss cpu"], "page_faults": None},
        }
        for name, ms in times.items()
    ]  # fmt: skip
    ceiling = {"name": "triad", "best_ms": 1.0, "bytes_per_s": 2e9, "flops_per_s": None}
    return {
        "point": json.loads(json.dumps(asdict(point))), "tensor_bytes": 1000,
        "floor": {"bytes": 3000, "flops": 0}, "ceiling": ceiling, "sets": 2, "other_cpus": 0.0,
        "ours": "kd_loss cpu", "entries": entries,
    }  # fmt: skip


def document(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """A document around them."""
    return {
        "command": "kdkernels bench", "finished": "2030-01-02T03:04:05Z", "kdkernels": "1", "versions": {},
        "environment": {"cpu": "a <fast> one", "cpus": 2, "device": "cpu", "torch": "2", "isa": ["avx"]},
        "settings": {"threads": 2, "passes": 1, "raised": False}, "missing": {"kd_loss cuda": "no GPU"},
        "points": measured, "exponents": measure.exponents(measured),
    }  # fmt: skip


SWEPT = [synthetic(vocab=v) for v in (8, 32, 128)] + [synthetic(rows=n) for n in (8, 16)]


def test_exponents_are_slopes_of_three_sizes_at_least() -> None:
    found = {(e["axis"], e["figure"], e["family"]): e for e in measure.exponents(SWEPT)}
    assert found["vocab", "time", "eager"]["exponent"] == pytest.approx(2.0)
    assert found["vocab", "time", "kd_loss"]["exponent"] == pytest.approx(0.5)
    assert found["vocab", "memory", "eager"]["exponent"] == pytest.approx(1.0)
    assert found["rows", "time", "eager"]["exponent"] == pytest.approx(1.0)
    assert found["rows", "time", "eager"]["sizes"] == [4, 8, 16]
    assert not measure.exponents(SWEPT[:2])


def test_the_default_plan_varies_one_thing_at_a_time() -> None:
    for device in measure.DEFAULTS:
        for name in workloads.WORKLOADS:
            (centre,) = measure.centres(device, [name])
            for point in measure.star(device, [name]):
                workloads.check(point)
                changed = [k for k, v in asdict(point).items() if v != asdict(centre)[k]]
                assert len(changed) <= 1 or changed == ["temperature", "hard_weight"]


# Pages and pictures


def test_tables_name_everyone_and_what_is_wrong() -> None:
    measured = [synthetic()]
    measured[0]["entries"][0] |= {"problem": "wrong: loss off by 1e+00, allowed 5e-05", "time": None}
    text = pages.markdown(document(measured))
    assert "| forward_kl | eager kl_div | " in text and "WRONG" in text
    assert "logits (4, 8) float32 forward_kl, eager kl_div: wrong: loss off by 1e+00" in text
    assert "kd_loss cuda: no GPU" in text
    assert "nobody else" in text  # who is wrong is not beside anybody
    assert "the mean of what processes find" not in text
    several = synthetic()
    several["entries"][0]["time"] |= {"ratio": 1.5, "pass_ratios": [1.25, 1.5, 1.75]}
    several = document([several])
    several["settings"]["passes"] = 3
    text = pages.markdown(several)
    assert "| 1.5 (1.25 to 1.75) |" in text and "the mean of what processes find" in text
    measured[0]["other_cpus"] = 0.7
    assert "THE MACHINE WAS BUSY: at 1 of 1 points others used up to 0.7 CPUs" in pages.markdown(
        document(measured)
    )


@pytest.mark.parametrize("measured", [SWEPT, SWEPT[:1]], ids=["curves", "bars"])
def test_the_page_needs_no_other_file(measured: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = charts.draw(document(measured), tmp_path)
    assert [path.name for path in pictures] == ["logits.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    text = pages.html(document(measured), pictures)
    assert re.findall(r'(?:src|href)=[\'"]([^\'"]{5})', text) == ["data:"]
    assert "<script" not in text and "@import" not in text
    assert "a &lt;fast&gt; one" in text and "<fast>" not in text
    assert text.count("<table>") == text.count("</table>") >= 3
    for line in pages.headline(document(measured)):
        assert line in text


def test_curves_are_of_the_points_that_differ_in_one_size() -> None:
    assert [p["point"]["vocab"] for p in charts.sweep(SWEPT[::-1], "vocab")] == [8, 32, 128]
    assert [p["point"]["rows"] for p in charts.sweep(SWEPT, "rows")] == [4, 8, 16]


# From end to end


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """A run of the command, with losses of one's own: a right one, and one without its logarithm."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "mine.py").write_text(
        "import torch.nn.functional as F\n"
        "def right(z, v, temperature=1.0):\n"
        "    lq, p = F.log_softmax(z / temperature, -1), F.softmax(v / temperature, -1)\n"
        "    return F.kl_div(lq, p, reduction='batchmean') * temperature**2\n"
        "def wrong(z, v):\n"
        "    return F.kl_div(z.softmax(-1), v.softmax(-1), reduction='batchmean')\n"
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["bench", "logits", "--rows", "4,8", "--vocab", "300", "--temperature", "1,2", "--no-compile",
             "--against", f"{folder}/mine.py:right", "--against", f"{folder}/mine.py:wrong",
             "--seconds", "0.05", "--threads", "1", "--device", "cpu", "--out", str(folder / "out")]
        )  # fmt: skip
    found = json.loads((folder / "out" / "bench.json").read_text())
    return ended.value.code, found, (folder / "out" / "report.md").read_text()


def test_a_run_measures_what_was_asked_for(measured: tuple[int, dict[str, Any], str]) -> None:
    status, found, _ = measured
    assert status == 0
    sizes = [(p["point"]["rows"], p["point"]["temperature"]) for p in found["points"]]
    assert sizes == [(4, 1.0), (4, 2.0), (8, 1.0), (8, 2.0)]
    for point in found["points"]:
        own = measure.fastest(point, "kd_loss")
        assert own is not None and own["time"]["ratio"] == 1.0 and own["time"]["rounds"] >= 3
        assert point["sets"] > 1 and point["ceiling"]["bytes_per_s"] > 0
    assert found["environment"]["threads"] == 1
    assert "--out" not in found["command"]


def test_ones_own_loss_takes_part_and_a_wrong_one_is_not_timed(
    measured: tuple[int, dict[str, Any], str],
) -> None:
    _, found, report = measured
    first = {e["name"]: e for e in found["points"][0]["entries"]}
    assert first["yours right"]["time"] and first["yours right"]["problem"] is None
    assert first["yours wrong"]["time"] is None and first["yours wrong"]["problem"].startswith(
        "wrong: loss off"
    )
    assert "yours wrong: its signature has no temperature" in report
    assert "yours wrong" not in {e["name"] for e in found["points"][1]["entries"]}


def test_a_contestant_that_dies_takes_nobody_else_down(tmp_path: Path) -> None:
    """One that raises is named; one that ends the process leaves its point unmeasured, and that is said."""
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def raises(z, v):\n    raise RuntimeError('no such thing')\n"
        "def ends(z, v):\n    os._exit(3)\n"
    )
    settings = measure.Settings(1, 2, 0.01, compiled=False, memory=False)
    point = Point("logits", 4, 300)
    for name, said in (("raises", "failed: RuntimeError: no such thing"), ("ends", "ended with exit code 3")):
        found = measure.measure([point], replace(settings, modules=(f"{tmp_path}/mine.py:{name}",)))
        own = {e["name"]: e for e in found["points"][0]["entries"]}
        assert said in own[f"yours {name}"]["problem"]
        assert (own["kd_loss cpu"]["time"] is None) == (name == "ends")
        assert pages.html(document(found["points"]))


def test_peak_memory_is_taken_of_large_tensors() -> None:
    point = Point("logits", 64, 32_768)
    settings = measure.Settings(1, 1, 0.01, compiled=False)
    peaks = measure._all_peaks(
        [(point, measure.takes_part(point, settings)[0])], settings, measure.Progress()
    )
    ours = peaks[point, "kd_loss cpu"]
    assert isinstance(ours, measure.Peak) and 1.0 <= ours.bytes / point.tensor_bytes < 1.2
    eager_peak = peaks[point, "eager kl_div"]
    assert isinstance(eager_peak, measure.Peak) and eager_peak.bytes / point.tensor_bytes > 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lgits"], "WHAT must be of logits, linear, sparse, or e2e by itself, got 'lgits'"),
        (["logits", "--vocab", "many"], "--vocab must be numbers separated by commas, got 'many'"),
        (["logits", "--dtype", "float8"], "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (["linear", "--widths", "5"], "--widths must be two numbers above 0, got '5'"),
        (["sparse", "--k", "0"], "k must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be above 0, got 0.0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--against", "nowhere"], "LOSS must be module:function or file.py:function, got 'nowhere'"),
        (["e2e", "--vocab", "8"], "e2e has sizes and losses of its own, leave out --vocab"),
    ],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert f"kdkernels bench: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_several_values_are_combined() -> None:
    given = {"rows": [4, 8], "vocab": None, "dtype": ["float32", "bfloat16"], "widths": [3, 5]}
    found = bench_cli.points_of(["logits", "linear"], "cpu", False, given)
    assert len(found) == 8
    assert {p.widths for p in found} == {(3, 5)} and {p.rows for p in found} == {4, 8}
    alone = {"k": [8]}
    assert len(bench_cli.points_of(["sparse"], "cpu", False, alone)) == len(measure.star("cpu", ["sparse"]))
    assert len(bench_cli.points_of(workloads.WORKLOADS, "cpu", True, {})) == 3


# Peers, and two runs


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "quack-kernels", ("nobody_has_this", "nobody_has_this.part"))
    peers.missing.cache_clear()
    _, why = peers.entries(Point("linear", divergence=eager.LABELS, **SMALL))
    assert why["quack-kernels"] == "not installed"
    peers.missing.cache_clear()


def test_two_runs_agree_or_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"a": 2.0, "b": 1.0, "only here": 3.0}
    assert compare.agreement(one, {"a": 2.1, "b": 0.95, "only there": 1.0}) == 0
    assert "2 ratios of both runs: 2 within 10 %" in capsys.readouterr().out
    assert compare.agreement(one, {"a": 2.3, "b": 1.0}) == 1
    assert "a: 2 and 2.3, 15 % apart" in capsys.readouterr().out
    assert compare.agreement(one, {"c": 1.0}) == 1
    slower = {"a": 1.0, "b": 1.0}, {"a": 1.5, "b": 1.05}
    assert compare.agreement(one, {"a": 2.3, "b": 2.0}, slower) == 1
    said = capsys.readouterr().out
    assert "a: 2 and 2.3, 15 % apart; the ceiling itself 50 %\n" in said and "100 % apart\n" in said


def test_another_run_is_read_before_its_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is none is refused before minutes go into a run."""
    command = ["--only", "losses", "--device", "cpu", "--out", str(tmp_path), "--agree", str(tmp_path)]
    with pytest.raises(SystemExit):
        compare.main(command)
    assert "--agree must be the --out of another run" in capsys.readouterr().err
    bench = tmp_path / "compare-cpu" / "bench.json"
    bench.parent.mkdir()
    bench.write_text(json.dumps(document([synthetic()])))
    slower = document([synthetic()])
    slower["points"][0]["entries"][0]["time"]["ratio"] *= 2
    monkeypatch.setattr(compare.isolated, "start", lambda modules: None)
    monkeypatch.setattr(compare.measure, "measure", lambda points, settings: slower)
    monkeypatch.setattr(compare, "write", lambda made, folder: bench.write_text(json.dumps(made)))
    assert compare.main(command) == 1
    assert "100 % apart" in capsys.readouterr().out


def test_ratios_are_of_everyone_but_ours() -> None:
    found = dict(compare.ratios(document(SWEPT)))
    assert len(found) == len(SWEPT)
    assert found["logits (4, 8) float32 forward_kl, eager kl_div"] == pytest.approx(8**1.5)


def test_the_contestants_are_those_that_kd_loss_would_take() -> None:
    z = torch.zeros(1, 2)
    assert contestants.default(Point("logits", **SMALL)) == f"kd_loss {kd.explain(z, z).backend}"
