"""``python -m benchmarks e2e``: contestants are right or said to be wrong, limits are found."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor

from benchmarks import e2e as command
from benchmarks.e2e_peers import PEERS
from kdkernels.bench import e2e, e2e_methods, e2e_process, e2e_report
from kdkernels.bench.e2e_methods import Method
from kdkernels.bench.e2e_models import VOCABS, models_of, pair_of, tokens_of, watched

LENGTH = 16
TINY = e2e.Settings(
    "cpu", "float32", ("qwen",), 2 * LENGTH, LENGTH, 2, 2**28, 2 * LENGTH, threads=1, vocab=300, patience=60
)
CPU = torch.device("cpu")


def case(family: str, vocab: int = 300) -> e2e_process.Case:
    """Of the tiny settings."""
    return e2e_process.Case(pair_of(family, "cpu", vocab), "cpu", "float32", 1, LENGTH)


def twice(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Another loss."""
    return 2 * e2e_methods.eager(student, teacher, tokens)


def detached(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """The right number with gradients of half of it."""
    loss = e2e_methods.eager(student, teacher, tokens)
    return loss / 2 + (loss / 2).detach()


def of_the_teacher(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """The right number and, but for the layers, the right gradients."""
    hidden = student.base_model(input_ids=tokens).last_hidden_state.detach()
    z = student.get_output_embeddings()(hidden)
    return e2e_methods.forward_kl(z, teacher(input_ids=tokens).logits)


def unbounded(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Not a number."""
    return e2e_methods.eager(student, teacher, tokens) * float("nan")


def leaves(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Ends its process."""
    os._exit(3)


def when_larger(what: Any, student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Does something else once it is warm."""
    if len(tokens) > 1:
        what()
    return e2e_methods.eager(student, teacher, tokens)


def hungry() -> None:
    """Takes 256 MiB."""
    bytearray(2**28)


def killed() -> None:
    """As the system does when it has no memory, and as others do, too."""
    os.kill(os.getpid(), signal.SIGKILL)


def aborted(text: str) -> None:
    """As C++ does with what nobody catches."""
    os.write(2, text.encode())
    os.abort()


def mistaken() -> None:
    """Has a fault of its own, and has written of memory before."""
    os.write(2, b"warning: out of memory\n")
    raise ValueError("memory of elephants")


def larger(what: Any, *args: Any) -> Method:
    """A method that does it when its memory is measured."""
    return Method("planted", partial(when_larger, partial(what, *args)), "")


def names(methods: Any) -> dict[str, Method]:
    """By their names."""
    return {method.name: method for method in methods}


OURS = names(e2e.METHODS)
PYTORCH = OURS["PyTorch"]
HEADS = OURS["kdkernels, heads"]
# The first process says what all of them need not import.
PRELOAD = e2e.preload(e2e.METHODS, TINY)


@pytest.mark.parametrize("family", VOCABS)
def test_the_truth_is_that_of_autograd_in_float64(family: str) -> None:
    pair = pair_of(family, "cpu", 300)
    student, teacher = models_of(pair, CPU, torch.float64)
    tokens = tokens_of(pair, 3 * LENGTH, LENGTH, CPU)
    loss, gradients = e2e_process.truth(student, teacher, tokens, rows=10)
    z, v = student(input_ids=tokens).logits, teacher(input_ids=tokens).logits
    q, p = z.log_softmax(-1), v.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-12)
    assert 2 < z.std() + 0.5 < 3 and 1 < wanted < 20  # neither side knows nothing, nor the other's answer
    for name, parameter in watched(student).items():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("family", VOCABS)
def test_contestants_that_run_here_are_right(family: str) -> None:
    methods = [m for m in (*e2e.METHODS, *PEERS) if m.why_not("cpu") is None and m.warm_up == (1,)]
    assert len(methods) >= 3
    found = e2e_process.time_process(lambda message: None, case(family), methods, 2 * LENGTH, 1)
    assert found["problems"] == {}
    assert {*found["seconds"]} == {method.name for method in methods}
    assert all(max(off.values()) < 1e-4 for off in found["errors"].values())


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (twice, "WRONG: loss off by 1.0e+00"),
        (detached, "WRONG: gradient of the head off by 5.0e-01"),
        (of_the_teacher, "WRONG: gradient of the "),
        (unbounded, "WRONG: loss off by nan"),
    ],
)
def test_who_is_wrong_is_said_to_be_and_not_timed(loss: Any, says: str) -> None:
    methods = [Method("planted", loss, ""), PYTORCH]
    heard: list[Any] = []
    found = e2e_process.time_process(heard.append, case("llama"), methods, 2 * LENGTH, 1)
    assert found["problems"]["planted"].startswith(says)
    assert {*found["seconds"]} == {"PyTorch"}
    assert json.dumps(found, allow_nan=False)
    assert heard == [("trying", "planted"), ("trying", "PyTorch"), ("trying", None), ("round", 1)]


@pytest.mark.parametrize("start", [1, 4, 32])
@pytest.mark.parametrize("most", [32, 1000])
@pytest.mark.parametrize("off", [None, 0.3, 0.97, 1.0, 1.03, 4.0])
def test_the_search_finds_a_planted_limit(start: int, most: int, off: float | None) -> None:
    for limit in (0, 1, 2, 3, 5, 16, 17, 31, 32, 100, 517, 999, 1000, 5000):
        tried: list[int] = []

        def fits(count: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count <= limit

        guess = (lambda: None) if off is None else (lambda limit=limit: off * limit)
        found = e2e.largest(fits, start, most, 1, guess)
        assert len(tried) == len({*tried}) <= 18 and max(tried) <= most
        if limit >= most:
            assert found == most
        else:
            # Exact up to 31, then to a sixteenth; and both sides of it were tried.
            assert found <= limit < found + max(1, found / 16) + 1e-9
            assert (found in tried or found == 0) and min(n for n in tried if n > limit) <= max(
                found + 1, found * 17 / 16
            )


def test_the_search_goes_by_whole_sequences_and_a_good_guess_saves_tries() -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= 1000

    assert e2e.largest(fits, 128, 8192, 64) == 960 and all(count % 64 == 0 for count in tried)
    without = len(tried)
    tried.clear()
    assert e2e.largest(fits, 128, 8192, 64, lambda: 1030.0) == 960
    assert tried == [128, 960, 1024] and len(tried) < without


@pytest.mark.skipif(e2e_process.resource is None, reason="RLIMIT_DATA is Linux's")
@pytest.mark.parametrize(
    ("method", "memory", "vocab", "fits"),
    [
        (larger(hungry), 2**27, 300, False),
        (larger(aborted, "what():  std::bad_alloc\n"), 2**28, 300, False),
        # The gradient of the head takes 26 MB, the logits of both sides 26 MB.
        (HEADS, 2**24, 100_000, False),
        (OURS["kdkernels, logits"], 2**24, 100_000, False),
        (HEADS, 2**28, 100_000, True),
    ],
)
def test_a_step_that_finds_no_memory_is_known_as_that(
    method: Method, memory: int, vocab: int, fits: bool
) -> None:
    found = e2e.probe(case("qwen", vocab), method, 2 * LENGTH, replace(TINY, memory=memory), PRELOAD)
    assert found["fits"] is fits
    assert (found["peak"] is not None) is fits
    if fits:
        assert 0.8 * 100_000 * 64 * 4 < found["peak"] < memory


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (larger(killed), "probe_process ended with exit code -9"),
        (larger(mistaken), "ValueError: memory of elephants"),
    ],
)
def test_a_process_that_ends_otherwise_is_an_error(method: Method, says: str) -> None:
    found = e2e._of_memory(case("qwen"), method, TINY, PRELOAD, lambda text, count: None)
    assert found == {"tokens": None, "problem": f"error: {says}", "tries": []}


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (torch.OutOfMemoryError("CUDA: no room"), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory",
        ),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(12, os.strerror(12)), "out of memory"),
        (
            RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore"),
            "error: RuntimeError: mat1 and mat2 ",
        ),
        (ValueError("memory_format must be one of these"), "error: ValueError: memory_format"),
    ],
)
def test_what_counts_as_no_memory(raised: Exception, says: str) -> None:
    assert e2e_process.short(raised).startswith(says) and "\n" not in e2e_process.short(raised)


def test_growth_is_in_logits() -> None:
    tries = [
        {"tokens": 256, "fits": True, "peak": 10**9},
        {"tokens": 1024, "fits": False, "peak": None},
        {"tokens": 512, "fits": True, "peak": 10**9 + 256 * 3 * 4 * 1000},
    ]
    assert e2e._growth(tries, 1000) == pytest.approx(3.0)
    assert e2e._growth(tries[:2], 1000) is None


def document() -> dict[str, Any]:
    """Made up, with one of each kind of finding."""
    contestants = ("ours", "eager", "lib", "broken", "huge", "absent")
    size = {"like": "a small one"}

    def memory(tokens: int | None, peak: int | None, capped: bool = False) -> dict[str, Any]:
        tries = [{"tokens": 256, "fits": peak is not None, "peak": peak}]
        return {"tokens": tokens, "capped": capped, "growth": None, "tries": tries}

    pair = {
        "family": "qwen", "vocab": 1000, "student": size, "teacher": {"like": "a large one"},
        "time": {
            "errors": {name: {"loss": 1e-7, "head": 2e-6} for name in contestants[:3]},
            "problems": {"lib": "WRONG: loss off by 1.0e+00, allowed 1e-04", "huge": "out of memory"},
            "seconds": {"ours": [0.25, 0.5, 1.0], "eager": [1.0, 1.0, 2.0], "broken": [2.0, 2.0, 2.0]},
            "ratios": {"ours": 1.0, "eager": 2.0, "broken": 4.0},
            "other_cpus": 0.0,
        },
        "memory": {
            "ours": {**memory(8192, 100 << 20, True), "growth": 0.0},
            "eager": {**memory(768, 700 << 20), "growth": 7.25},
            "broken": {"tokens": None, "problem": "error: exit code -11", "growth": None, "tries": []},
            "huge": memory(0, None),
        },
    }  # fmt: skip
    settings = {
        "device": "cpu", "dtype": "float32", "threads": 2, "tokens": 256, "length": 64, "rounds": 3,
        "memory": 2 << 30, "most": 8192, "only": None, "vocab": None, "passes": 1,
    }  # fmt: skip
    return {
        "schema": 1, "command": "python -m benchmarks e2e", "kdkernels": "1", "versions": {"trl": "1.2"},
        "environment": {"device": "cpu", "cpu": "a processor", "torch": "2"}, "settings": settings,
        "contestants": {name: f"how {name} is called" for name in contestants}, "ours": "ours",
        "missing": {"absent": "absent is not installed"}, "pairs": [pair], "seconds": {},
    }  # fmt: skip


def test_the_report_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    made = document()
    by_name = {row[0]: row[1:] for row in e2e_report.rows(made, made["pairs"][0])}
    assert by_name == {
        "ours": ["512", "500", "1.00", "> 8,192", "100", "0.00", "2e-06"],
        "eager": ["256", "1,000", "2.00", "768", "700", "7.25", "2e-06"],
        "lib": ["WRONG: loss off by 1.0e+00, allowed 1e-04", "", "", "", "", "", "2e-06"],
        "broken": ["128", "2,000", "4.00", "error: exit code -11", "", "", ""],
        "huge": ["out of memory", "", "", "< 64", "> 2,048", "", ""],
        "absent": ["not measured: absent is not installed", "", "", "", "", "", ""],
    }
    said = e2e.markdown(made)
    for text in ("`python -m benchmarks e2e`", "trl 1.2", "how lib is called", "2 GiB beyond the models"):
        assert text in said
    assert "Not here: absent: absent is not installed." in said and "Not measured" not in said
    assert "busy" not in said and "Not the real vocabulary" not in said
    assert sorted(e2e.failures(made)) == [
        "qwen, broken: error: exit code -11",
        "qwen, lib: WRONG: loss off by 1.0e+00, allowed 1e-04",
    ]
    (picture,) = e2e.draw(made, tmp_path, "it")
    assert picture == tmp_path / "it.png" and picture.read_bytes().startswith(b"\x89PNG")

    assert "processes" not in said
    made["settings"]["passes"] = 4
    assert "3 rounds, in 4 processes" in e2e.markdown(made)

    made["settings"] |= {"only": "memory", "vocab": 1000}
    made["pairs"][0]["time"] = None
    said = e2e.markdown(made)
    assert "Not measured: times, and whether the losses are right." in said
    assert "Not the real vocabulary: 1,000 classes." in said and "WRONG" not in said
    assert e2e.draw(made, tmp_path)
    made["pairs"][0]["memory"] = None
    assert e2e.draw(made, tmp_path) == []
    made = document()
    made["settings"]["only"], made["pairs"][0]["memory"] = "time", None
    made["pairs"][0]["time"]["other_cpus"] = 0.7
    said = e2e.markdown(made)
    assert "Not measured: memory." in said and "others used up to 0.7 CPUs" in said


def test_bars_are_of_what_was_measured() -> None:
    made = document()
    shown = [*made["contestants"]][:5]
    bars = {panel: list(panel.bars(made, made["pairs"][0], shown)) for panel in e2e_report.PANELS}
    speed, tokens, peak = bars.values()
    assert [bar[0] for bar in speed] == [512, 256, None, 128, None]
    assert speed[2][1].startswith("WRONG") and speed[4][1] == "out of memory"
    assert tokens == [
        (8192, "> 8,192", True), (768, "768", False), (None, "not measured", False),
        (None, "error: exit code -11", False), (None, "< 64", False),
    ]  # fmt: skip
    assert [bar[:2] for bar in peak[:2]] == [(100, "100"), (700, "700")] and peak[4][:2] == (None, "> 2,048")


def test_a_whole_run_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = (
        HEADS, PYTORCH, Method("twice", twice, "another loss"), Method("leaves", leaves, "ends its process"),
        Method("absent", twice, "of a library that isn't here", modules=("no_such_library_of_losses",)),
    )  # fmt: skip
    found = e2e.run(replace(TINY, passes=2), methods, command="the command")
    (pair,) = found["pairs"]
    assert {*pair["time"]["seconds"]} == {"kdkernels, heads", "PyTorch"} == {*pair["memory"]}
    assert all(len(times) == 2 for times in pair["time"]["seconds"].values())
    assert pair["time"]["problems"]["twice"].startswith("WRONG")
    assert pair["time"]["problems"]["leaves"] == "error: time_process ended with exit code 3"
    assert found["missing"] == {"absent": "no_such_library_of_losses is not installed"}
    eager, ours = (pair["time"]["seconds"][name] for name in ("PyTorch", "kdkernels, heads"))
    of_passes = [a / b for a, b in zip(eager, ours, strict=True)]
    assert pair["time"]["pass_ratios"]["PyTorch"] == pytest.approx(of_passes)
    assert pair["time"]["ratios"]["PyTorch"] == pytest.approx((of_passes[0] * of_passes[1]) ** 0.5)
    assert pair["memory"]["PyTorch"]["tokens"] == 2 * LENGTH and pair["memory"]["PyTorch"]["capped"]
    assert e2e.write(found, tmp_path, "it") == 1
    assert json.loads((tmp_path / "it.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "it.png").stat().st_size > 10_000
    said = (tmp_path / "it.md").read_text()
    assert "`the command`" in said and "Not the real vocabulary: 300 classes." in said
    line = next(line for line in said.splitlines() if line.startswith("| twice "))
    assert "WRONG: loss off by 1.0e+00" in line and line in capsys.readouterr().out
    assert str(Path.cwd()) not in (tmp_path / "it.json").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pairs": ("bert",)}, "pairs must be of qwen, llama, gemma, got bert"),
        ({"tokens": 100}, "tokens must be whole sequences of 16, got 100"),
        ({"most": 16}, "most must be >= tokens, 32, got 16"),
        ({"memory": None}, "memory must be given on a CPU"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"passes": 0}, "passes must be >= 1, got 0"),
        ({"only": "space"}, "only must be one of None, time, memory, got 'space'"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TINY, **changes)


def test_defaults() -> None:
    for device in ("cpu", "cuda"):
        settings = e2e.settings_for(device, dtype=None, rounds=3)
        assert settings.pairs == ("qwen", "llama", "gemma") and settings.rounds == 3
        assert e2e.quick(settings).pairs == ("qwen",)
    with pytest.raises(ValueError, match="methods must be of"):
        e2e.run(replace(TINY, methods=("nobody",)))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees none"):
            e2e.run(e2e.settings_for("cuda"))


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--rounds", "2"], "results"),
        (["--pairs", "gemma", "llama"], "selection"),
        (["--quick"], "selection"),
        (["--memory", "2.5"], "selection"),
        (["--out", "own"], "own"),
    ],
)
def test_where_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], folder: str
) -> None:
    asked: list[Any] = []

    def run(settings: e2e.Settings, contestants: Any, progress: Any, line: str) -> dict[str, Any]:
        asked.append((settings, line))
        return document()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "RESULTS", Path("results"))
    monkeypatch.setattr(command, "SELECTION", Path("selection"))
    monkeypatch.setattr(command.e2e, "run", run)
    assert command.main(arguments) == 1  # since one is wrong
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "e2e-cpu.json",
        "e2e-cpu.md",
        "e2e-cpu.png",
    ]
    ((settings, line),) = asked
    assert line == " ".join(["python -m benchmarks e2e", *arguments])
    assert settings.rounds == 2 or "--quick" not in arguments
    usual = e2e.settings_for("cpu").memory
    assert settings.memory == (
        2.5 * 2**30 if "--memory" in arguments else 2**29 if "--quick" in arguments else usual
    )
