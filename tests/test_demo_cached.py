"""The demo's cached teacher: the live loss from what is stored, building that goes on, intervals by hand, the
table, and a tiny run from end to end on top of a finished one."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="the demo needs kdkernels[cli]")
pytest.importorskip("matplotlib", reason="the demo needs kdkernels[cli]")
pytest.importorskip("safetensors", reason="caches need kdkernels[cache]")

from kdkernels import cli
from kdkernels.cache import CacheError, CacheWriter, TeacherCache
from kdkernels.demo import cached, cached_report, corpus, objectives, report
from kdkernels.demo import run as demo_run
from kdkernels.demo.config import Config, Mix, Recipe
from kdkernels.demo.model import Shape, Transformer
from kdkernels.demo.train import Data, Run, train

CPU = torch.device("cpu")
VOCAB, CONTEXT = 80, 64
MIX = Mix()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher_model() -> Transformer:
    torch.manual_seed(3)
    model = Transformer(VOCAB, CONTEXT, Shape(1, 32, 2)).eval().requires_grad_(False)
    model.embed.weight.mul_(8)  # neither uniform nor certain, so that the tails differ
    return model


def rows(count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).integers(VOCAB, size=(count, CONTEXT)).astype(np.int32)


def fill(folder: Path, stored: cached.Stored, mix: Mix = MIX) -> dict[str, Path]:
    """Caches of both kinds of all rows."""
    manifests = cached.manifests(stored, mix, teacher_model(), VOCAB, "tokenizer")
    folders = {kind: folder / kind for kind in manifests}
    cached.build({folders[k]: manifests[k] for k in folders}, teacher_model(), rows(), CPU, lambda *_: None)
    return folders


# What is cached


def test_the_sequences_are_what_the_students_see_each_once() -> None:
    windows = np.arange(50).reshape(10, 5)
    data = Data(windows, windows[:1], windows[:1], np.ones(50, dtype=np.int64), size=3)
    found = cached.sequences(data, (0, 1), 4)
    # Without the last token of a window, which is a label only.
    seen = [tuple(row[:-1]) for seed in (0, 1) for row in data.seen(seed, 4).tolist()]
    assert [tuple(row) for row in found.tolist()] == list(dict.fromkeys(seen))
    assert len(seen) == 24 > len(found)


def test_a_manifest_is_the_teachers() -> None:
    teacher = teacher_model()
    found = cached.manifests(cached.Stored(k=5, draws=7), Mix(2.0), teacher, VOCAB, "abc")
    assert (found["topk"].k, found["topk"].temperatures) == (5, (1.0, 2.0))
    assert (found["sampled"].k, found["sampled"].draws, found["sampled"].temperatures) == (7, 7, (2.0,))
    again = cached.manifests(cached.Stored(k=5, draws=7), Mix(2.0), teacher, VOCAB, "abc")
    assert again == found
    teacher.norm.weight[0] += 1e-3
    other = cached.manifests(cached.Stored(k=5, draws=7), Mix(2.0), teacher, VOCAB, "abc")
    for kind in found:
        assert [line.split()[0] for line in found[kind].differences(other[kind])] == ["revision"]
        assert cached.folder_of(Path(), found[kind]) != cached.folder_of(Path(), other[kind])


# A step


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_and_a_ghost_tail_are_the_live_step(tmp_path: Path, temperature: float) -> None:
    mix = Mix(temperature, soft_weight=0.7, hard_weight=0.3)
    folders = fill(tmp_path, cached.Stored(k=VOCAB, draws=VOCAB), mix)
    ids = torch.from_numpy(rows()[:3]).long()
    labels = torch.randint(VOCAB, (ids.numel(),), generator=torch.Generator().manual_seed(0))

    def value_and_gradient(step: objectives.StepLoss) -> tuple[float, torch.Tensor]:
        torch.manual_seed(5)
        student = Transformer(VOCAB, CONTEXT, Shape(1, 16, 2))
        value = step(student, ids, labels)
        value.backward()
        grad = student.embed.weight.grad
        assert grad is not None
        return value.item(), grad

    live = value_and_gradient(objectives.STUDENTS["kd_loss"].step_loss(mix, teacher_model()))
    hard = value_and_gradient(objectives.STUDENTS["hard"].step_loss(mix, None))
    stored = value_and_gradient(cached.step_loss(TeacherCache.open(folders["topk"]), mix))
    # A stored log-probability is a level of 12 bits, and their roundings average out.
    assert stored[0] == pytest.approx(live[0], rel=1e-5)
    torch.testing.assert_close(stored[1], live[1], rtol=0, atol=2e-4 * live[1].abs().max().item())
    assert abs(hard[0] - live[0]) > 0.1
    # Fewer classes are another loss, and each tail is its own; one bucket can only lose divergence.
    fewer = fill(tmp_path / "fewer", cached.Stored(k=4, draws=4), mix)
    tails = [
        value_and_gradient(cached.step_loss(TeacherCache.open(fewer["topk"], tail=tail), mix))[0]
        for tail in ("ghost", "zero", "renormalize")
    ]
    assert tails[0] < live[0] - 1e-2
    assert min(abs(a - b) for a, b in itertools.combinations(tails, 2)) > 1e-2


def test_a_sampled_step_has_the_live_gradient_on_average(tmp_path: Path) -> None:
    folders = fill(tmp_path, cached.Stored(k=4, draws=2000))
    ids = torch.from_numpy(rows()[:3]).long()
    labels = torch.zeros(ids.numel(), dtype=torch.int64)
    sums = []
    for step in (
        objectives.STUDENTS["kd_loss"].step_loss(Mix(), teacher_model()),
        cached.step_loss(TeacherCache.open(folders["sampled"]), Mix()),
    ):
        torch.manual_seed(5)
        student = Transformer(VOCAB, CONTEXT, Shape(1, 16, 2))
        step(student, ids, labels).backward()
        assert student.bias.grad is not None
        sums.append(student.bias.grad)
    # A class's share of 192 · 2000 draws has a standard deviation of at most 0.5/√(192 · 2000) = 0.0008.
    torch.testing.assert_close(sums[1], sums[0], rtol=0, atol=4 * 0.0008)
    assert sums[0].abs().max() > 0.05


def test_the_mass_is_that_of_the_largest_classes(tmp_path: Path) -> None:
    folders = fill(tmp_path, cached.Stored(k=4, draws=4))
    p = teacher_model()(torch.from_numpy(rows()).long()).double().softmax(-1)
    expected = p.topk(4).values.sum(-1).mean().item()
    assert cached.mass(TeacherCache.open(folders["topk"]), rows()) == pytest.approx(expected, abs=1e-3)
    assert 0.1 < expected < 0.99


# Building


def contents(folders: dict[str, Path]) -> dict[str, list[Any]]:
    """Every stored row by kind, as bits."""
    found = {}
    for kind, folder in folders.items():
        cache = TeacherCache.open(folder)
        teacher = cache.lookup_packed(rows())
        values = getattr(teacher, "log_probs" if kind == "topk" else "weights")
        found[kind] = [len(cache), teacher.ids.tolist(), values.tolist()]
    return found


@pytest.mark.parametrize("killed", [False, True], ids=["interrupted", "killed"])
def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    stored = cached.Stored(k=4, draws=4)
    whole = contents(fill(tmp_path / "whole", stored))
    asked = 0
    forward = Transformer.forward

    def counted(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return forward(model, ids)

    monkeypatch.setattr(Transformer, "forward", counted)
    with monkeypatch.context() as patch:
        if killed:
            # What a process does at its end doesn't happen; shards of two or three sequences were full.
            patch.setattr(CacheWriter, "flush", unless_interrupted(CacheWriter.flush))
            patch.setattr(cached, "SHARD_BYTES", 2 * CONTEXT * 15)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "parts", stored)
    topk = len(TeacherCache.open(tmp_path / "parts" / "topk"))
    assert (0 < topk < 8) if killed else (topk == 8)
    fill(tmp_path / "parts", stored)
    # 20 sequences are batches of 8, 8 and 4; what is there isn't asked for again.
    assert asked == 2 + (3 if killed else 2)
    assert contents({kind: tmp_path / "parts" / kind for kind in whole}) == whole
    fill(tmp_path / "parts", stored)
    assert asked == 2 + (3 if killed else 2)


def unless_interrupted(flush: Callable[[CacheWriter], None]) -> Callable[[CacheWriter], None]:
    def flushed(writer: CacheWriter) -> None:
        if sys.exc_info()[0] is not KeyboardInterrupt:
            flush(writer)

    return flushed


def test_another_cache_in_the_folder_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, cached.Stored(k=4, draws=4))
    with pytest.raises(CacheError, match="is a cache of something else: k is 4, and 5 is expected"):
        fill(tmp_path, cached.Stored(k=5, draws=4))


# Intervals


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 9, 30, 101])
def test_the_quantile_is_students(df: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for confidence in (0.5, 0.9, 0.95, 0.999):
        expected = stats.t.ppf(0.5 + confidence / 2, df)
        assert cached_report.student_quantile(confidence, df) == pytest.approx(expected, rel=1e-9)


def test_an_interval_by_hand() -> None:
    # Mean 2, deviation 1, t(0.975, 2) = 4.302653 from a table.
    found = cached_report.interval([1.0, 2.0, 3.0])
    assert (found.mean, found.high - 2, 2 - found.low) == pytest.approx((2, *[4.302653 / math.sqrt(3)] * 2))
    # Paired: the seeds' own spread cancels.
    found = cached_report.difference([1.1, 5.1, 9.1], [1.0, 5.0, 9.0])
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_a_share_is_of_each_seeds_gap() -> None:
    hard, live = [2.0, 2.2, 2.4], [1.8, 2.1, 2.0]  # gaps 0.2, 0.1, 0.4
    wide = cached_report.share(hard, live, [1.82, 2.11, 2.04])
    # 0.233 ± 0.379: these seeds don't exclude that there is no gap.
    assert wide is None
    hard = [2.0, 2.2, 2.4]
    live = [1.8, 2.0, 2.2]
    found = cached_report.share(hard, live, [1.82, 2.02, 2.22])
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))
    found = cached_report.share(hard, live, [1.80, 2.02, 2.24])  # 1, 0.9, 0.8
    assert found is not None
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.9, 0.9 - half, 0.9 + half))
    # The live teacher is worse than labels: nothing to recover.
    assert cached_report.share(live, hard, hard) is None


# Report


def figures(ghost: tuple[float, ...] = (1.81, 2.01, 2.21)) -> dict[str, Any]:
    """Of three seeds whose gap is 0.2 bits per byte."""

    def students(values: tuple[float, ...]) -> list[dict[str, Any]]:
        return [{"seed": seed, "bits_per_byte": value} for seed, value in enumerate(values)]

    def arm(label: str, values: tuple[float, ...], size: float) -> dict[str, Any]:
        return {"label": label, "bytes_per_token": size, "students": students(values)}

    return {
        "vocab": 8192,
        "students": {"hard": students((2.0, 2.2, 2.4)), "kd_loss": students((1.8, 2.0, 2.2))},
        "cached": {
            "stored": {"k": 64, "draws": 64},
            "build": {"sequences": 2400, "tokens": 307_200, "seconds": 61.4, "mass": 0.873},
            "arms": {
                "ghost": arm("ghost top-64", ghost, 167.2),
                "zero": arm("zero top-64", (1.9, 2.1, 2.3), 167.2),
            },
            "speed_rounds": 12,
            "steps_per_second": {"hard": 12.0, "kd_loss": 5.5, "ghost": 11.0, "zero": 11.1},
        },
    }


def test_the_table_has_its_columns() -> None:
    header, table = cached_report.table(figures())
    assert header == [
        "student",
        "bits per byte, held out",
        "− live teacher's (95 %)",
        "share of the gap (95 %)",
        "bytes per token",
        "steps per second",
    ]
    assert table == [
        ["hard labels only", "2.200", "+0.2000 (+0.2000 to +0.2000)", "", "", "12.0"],
        ["live teacher", "2.000", "", "", "", "5.5"],
        ["ghost top-64", "2.010", "+0.0100 (+0.0100 to +0.0100)", "95.0 % (95.0 to 95.0)", "167", "11.0"],
        ["zero top-64", "2.100", "+0.1000 (+0.1000 to +0.1000)", "50.0 % (50.0 to 50.0)", "167", "11.1"],
    ]


@pytest.mark.parametrize(
    ("ghost", "said"),
    [
        ((1.81, 2.01, 2.21), "Ghost top-64 recovers 95.0 % (95.0 to 95.0) of the gap"),
        ((1.81, 2.01, 2.21), "(+0.2000 to +0.2000): the mark of 90 % is met."),
        ((1.84, 2.04, 2.24), ": the mark of 90 % is missed."),
        # 1, 0.95 and 0.9: 0.95 ± 0.124.
        ((1.80, 2.01, 2.22), ": these seeds don't decide whether the mark of 90 % is met."),
    ],
)
def test_the_mark_is_said_as_it_was_measured(ghost: tuple[float, ...], said: str) -> None:
    assert said in cached_report.mark_in_words(figures(ghost))


def test_no_gap_is_said() -> None:
    flat = figures()
    flat["students"]["hard"] = [{"bits_per_byte": value} for value in (1.81, 2.0, 2.19)]
    assert cached_report.mark_in_words(flat).startswith("No gap between hard labels and the live teacher")
    assert [row[3] for row in cached_report.table(flat)[1]] == ["", "", "no gap", "no gap"]


def test_the_notes_say_what_the_teacher_had_and_took() -> None:
    said = "\n".join(cached_report.notes(figures()))
    assert "2,400 in all" in said
    assert "took 61 s, which no speed counts" in said
    assert "The top 64 of 8,192 classes hold 87.3 % of the teacher's mass on average" in said
    assert "16,384 bytes a token" in said


def test_a_diverged_cached_student_fails_the_run() -> None:
    spoilt = figures((1.8, math.nan, 2.2))
    assert cached_report.failures(figures()) == []
    (line,) = cached_report.failures(spoilt)
    assert line.startswith("not measured: student, ghost top-64: a model diverged")
    assert cached_report.table(spoilt)[1][2][1] == "nan"


# End to end

TINY = Config(
    vocab=300,
    context=64,
    windows=2,
    teacher=Recipe(Shape(1, 16, 2), steps=8, learning_rate=5e-3, warmup=2),
    student=Recipe(Shape(1, 8, 1), steps=6, learning_rate=5e-3, warmup=2),
    seeds=(0, 1),
    heldout_windows=4,
    validation_windows=2,
    validate_every=3,
    heads=(),
)
LIVE = ["teacher", *(f"{name}-{seed}" for name in objectives.STUDENTS for seed in TINY.seeds)]
CACHED = [f"{name}-{seed}" for name in cached.ARMS for seed in TINY.seeds]
STORED = cached.Stored(k=8, draws=8)


def write_sources(root: Path) -> Path:
    numbers = random.Random(0)
    wanted = dict(zip(corpus.SPLITS, (12, 2, 2), strict=True))
    for i in range(1000):
        name = f"m{i}.py"
        if wanted[corpus.split_of(name)] > 0:
            wanted[corpus.split_of(name)] -= 1
            pairs = ((numbers.randrange(99), numbers.randrange(99)) for _ in range(15))
            root.mkdir(exist_ok=True)
            (root / name).write_text("\n".join(f"def f{a}(x):\n    return x + {b}" for a, b in pairs))
    return root


def run_of(root: Path, out: Path, stored: cached.Stored | None, config: Config = TINY) -> list[str]:
    """What a run trains."""
    names: list[str] = []

    def spied(run: Run, loss: Any, validate_every: int, store: Any, name: str, *rest: Any) -> None:
        names.append(name)
        train(run, loss, validate_every, store, name, *rest)

    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "train", spied)
        # Files that are edited while the tests run are other code to the next run.
        patch.setattr(demo_run, "_fused_code", lambda: "fused")
        patch.setattr(demo_run, "hash_of_files", lambda paths: "files")
        # Every run draws the same picture of what isn't cached, which takes a second.
        patch.setattr(report, "plot", lambda figures, path: path.write_bytes(b""))
        demo_run.run(config, out, CPU, root, stored)
    return names


def published(out: Path) -> dict[str, Any]:
    found = json.loads((out / "figures.json").read_text())
    assert isinstance(found, dict)
    return found


def test_cached_students_are_trained_beside_the_live_ones(tmp_path: Path) -> None:
    root, out = write_sources(tmp_path / "src"), tmp_path / "out"
    assert run_of(root, out, None) == LIVE
    before = published(out)
    assert "cached" not in before
    # On top of a finished run nothing of it is trained again.
    assert run_of(root, out, STORED) == CACHED
    after = published(out)
    assert {k: after[k] for k in ("teacher", "students", "config")} == {
        k: before[k] for k in ("teacher", "students", "config")
    }
    found = after["cached"]
    assert list(found["arms"]) == list(cached.ARMS)
    labels = [arm["label"] for arm in found["arms"].values()]
    assert labels == ["ghost top-8", "zero top-8", "renormalize top-8", "sampled 8"]
    for arm in found["arms"].values():
        assert [student["seed"] for student in arm["students"]] == [0, 1]
        assert {student["steps"] for student in arm["students"]} == {6}
        # The same weights to begin with as those of the live teacher's student.
        starts = [curve[0] for curve in after["curves"]["kd_loss"]]
        assert [curve[0] for curve in arm["curves"]] == starts
        assert arm["bytes_per_token"] > 8
    assert set(found["steps_per_second"]) == {"hard", "kd_loss", *cached.ARMS}
    # 24 windows at most, of 64 tokens.
    assert found["build"]["tokens"] == 64 * found["build"]["sequences"] <= 64 * 24
    assert after["seconds"] > before["seconds"] + found["build"]["seconds"]
    written = (out / "report.md").read_text(encoding="utf-8")
    assert "| ghost top-8" in written
    assert cached_report.mark_in_words(after) in written
    # A third time nothing is trained, asked for or timed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached, "steps_per_second", lambda *args: pytest.fail("timed again"))
        patch.setattr(cached, "mass", lambda *args: pytest.fail("read again"))
        patch.setattr(Transformer, "forward", lambda *args: pytest.fail("a model ran again"))
        assert run_of(root, out, STORED) == []
    assert published(out)["cached"] == found
    # Another k is another cache, and only the cached students are trained again.
    assert run_of(root, out, replace(STORED, k=4)) == CACHED
    assert run_of(root, out, None) == []
    assert "cached" not in published(out)


# The command


def test_the_option_reaches_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    calls: list[tuple[Any, ...]] = []

    def nothing(*args: Any) -> int:
        calls.append(args)
        return 0

    monkeypatch.setattr(demo_run, "run", nothing)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--cached", "--out", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 0
    assert calls == [(Config(), tmp_path, CPU, None, cached.Stored(k=64, draws=64))]


def raising(error: Exception) -> Callable[..., int]:
    def run(*args: Any) -> int:
        raise error

    return run


def test_a_foreign_cache_ends_the_command_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    monkeypatch.setattr(demo_run, "run", raising(CacheError("runs/x is a cache of something else")))
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--cached", "--device", "cpu"])
    assert ended.value.code == "kdkernels demo: runs/x is a cache of something else"
