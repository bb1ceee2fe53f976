"""The command line: what it prints, and one clear line for whatever it can't do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels import cli, registry

ROOT = Path(__file__).parent.parent

needs_typer = pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="needs kdkernels[cli]")
needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("typer", *cli.DEMO_NEEDS)),
    reason="needs kdkernels[cli]",
)


def kdkernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kdkernels", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def status(*arguments: str) -> Any:
    """What a call of the command ends with: a status, or the line that Python prints before status 1."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments])
    return stopped.value.code


def hide(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in absent else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The demos that were started, none of which does anything."""
    from kdkernels.demo import run

    calls: list[tuple[Any, ...]] = []

    def nothing(*args: Any) -> int:
        calls.append(args)
        return 0

    monkeypatch.setattr(run, "run", nothing)
    return calls


# info


@needs_typer
def test_info_tells_versions_and_every_backend() -> None:
    done = kdkernels("info")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.strip().split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["kdkernels"] == kd.__version__
    assert lines["torch"] == importlib.metadata.version("torch")
    assert lines["Python"].split()[0] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"\d+\.\d+|not found", lines["NVRTC"])
    # In a process where Triton isn't told to interpret.
    device = torch.device("cpu")
    reasons = {name: b.available(device) for name, b in registry.BACKENDS.items()}
    reasons["triton"] = "runs on cuda and xpu tensors, these are on cpu"
    assert set(registry.BACKENDS) == {"cuda", "triton", "cpu", "reference"}
    rows = done.stdout[done.stdout.index("backends for cpu tensors:\n") :].splitlines()[1:]
    assert [tuple(row.split(maxsplit=1)) for row in rows] == [
        (name, reasons[name] or "available") for name in registry.BACKENDS
    ]


def test_info_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "tokenizers":
            raise importlib.metadata.PackageNotFoundError(package)
        return f"version of {package}"

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = dict(line.strip().split(maxsplit=1) for line in cli.info_lines())
    assert lines["tokenizers"] == "not installed"
    assert lines["torch"] == "version of torch"


def test_info_gives_a_backends_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def available(self, device: torch.device) -> str | None:
            return f"not for {device.type} today"

    monkeypatch.setitem(registry.BACKENDS, "cpu", Absent())
    assert "  cpu         not for cpu today" in cli.info_lines()
    assert "  reference   available" in cli.info_lines()


@needs_typer
def test_info_refuses_builds_in_one_line(capsys: Any) -> None:
    line = status("info", "--compile", "--arch", "sm_80")
    assert line.startswith("kdkernels info --compile: ") and "\n" not in line


@needs_typer
@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "nothing"])
def test_help_lists_both_commands(arguments: list[str], capsys: Any) -> None:
    code = status(*arguments)
    assert code == 0 if arguments else code != 0
    said = capsys.readouterr().out
    assert "Distil a small language model" in said
    assert "Print versions" in said
    # Each command's name is a word before its own description.
    assert "demo" in said.split("Distil a small")[0].split()
    assert "info" in said.split("Print versions")[0].split()


@needs_typer
def test_help_of_the_demo_lists_its_options(capsys: Any) -> None:
    assert status("demo", "--help") == 0
    said = capsys.readouterr().out
    for option in ("--out", "--minutes", "--seeds", "--device"):
        assert option in said


# Missing extras


@pytest.mark.parametrize("command", ["info", "demo", "--help"])
def test_without_typer_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    hide(monkeypatch, "typer")
    assert status(command) == "kdkernels' command line needs typer: pip install 'kdkernels[cli]'"


@needs_typer
@pytest.mark.parametrize(
    "absent", [("rich",), ("tokenizers",), ("matplotlib",), ("tokenizers", "matplotlib")], ids=str
)
def test_without_an_extra_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]
) -> None:
    hide(monkeypatch, *absent)
    line = f"kdkernels' command line needs {', '.join(absent)}: pip install 'kdkernels[cli]'"
    assert status("demo") == line


def test_the_extra_brings_what_the_command_line_needs() -> None:
    required = importlib.metadata.requires("kdkernels") or []
    extra = {r.split(">")[0] for r in required if 'extra == "cli"' in r}
    assert extra == {"typer", "PyYAML", *cli.DEMO_NEEDS}


def test_a_missing_extra_ends_the_process_with_one_line() -> None:
    code = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'typer' else find(name, *rest)\n"
        "from kdkernels.cli import main\n"
        "main(['info'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "kdkernels' command line needs typer: pip install 'kdkernels[cli]'\n"


# demo


@needs_demo
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--minutes", "6.5"], "--minutes must be at least 7, got 6.5"),
        (["--minutes", "-1"], "--minutes must be at least 7, got -1"),
        (["--minutes", "nan"], "--minutes must be at least 7, got nan"),
        (["--minutes", "inf"], "--minutes must be at least 7, got inf"),
        (["--seeds", "1"], "--seeds must be at least 2, so that there is a spread to compare with, got 1"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--device", ""], "--device must be cpu or cuda, got ''"),
        (["--device", "cpu:3"], "--device must be cpu or cuda, got 'cpu:3'"),
        (["--device", "cuda:99"], "--device cuda:99 isn't here: torch sees {devices} CUDA devices"),
    ],
    ids=" ".join,
)
def test_bad_options_get_one_line(started: list[Any], arguments: list[str], line: str) -> None:
    expected = "kdkernels demo: " + line.replace("{devices}", str(torch.cuda.device_count()))
    assert status("demo", *arguments) == expected
    assert started == []


@needs_demo
@pytest.mark.parametrize("option", ["--minutes", "--seeds"])
def test_an_option_that_is_no_number_is_refused(started: list[Any], option: str, capsys: Any) -> None:
    assert status("demo", option, "many") == 2
    said = capsys.readouterr().err
    assert option in said
    assert "Traceback" not in said
    assert started == []


@needs_demo
def test_a_bad_option_ends_the_process_without_a_traceback() -> None:
    done = kdkernels("demo", "--device", "tpu")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "kdkernels demo: --device must be cpu or cuda, got 'tpu'\n"


@needs_demo
def test_options_reach_the_demo(started: list[Any], tmp_path: Path) -> None:
    from kdkernels.demo.config import config_for

    assert status("demo", "--device", "cpu") == 0
    options = ["--out", str(tmp_path), "--minutes", "8", "--seeds", "5", "--device", "cpu"]
    assert status("demo", *options) == 0
    cpu = torch.device("cpu")
    assert started == [
        (config_for(7.0, 3), Path("runs/demo"), cpu),
        (config_for(8.0, 5), tmp_path, cpu),
    ]


@needs_demo
@pytest.mark.parametrize("verdict", [0, 1])
def test_the_status_is_the_demos(monkeypatch: pytest.MonkeyPatch, verdict: int) -> None:
    from kdkernels.demo import run

    monkeypatch.setattr(run, "run", lambda *args: verdict)
    assert status("demo", "--device", "cpu") == verdict


@needs_demo
def test_an_interrupted_demo_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from kdkernels.demo import run

    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert status("demo", "--device", "cpu", "--out", str(tmp_path)) == 130
    said = capsys.readouterr().err
    assert said == f"interrupted; the same command goes on from {tmp_path / 'cache'}\n"


@needs_demo
def test_no_sources_and_no_folder_get_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sysconfig

    empty, file = tmp_path / "lib", tmp_path / "file"
    empty.mkdir()
    file.write_text("")
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {**paths, "stdlib": str(empty)})
    line = status("demo", "--device", "cpu", "--out", str(tmp_path / "out"))
    assert line.startswith(f"kdkernels demo: too few Python sources under {empty}")
    line = status("demo", "--device", "cpu", "--out", str(file))
    assert line.startswith("kdkernels demo: ")
    assert str(file) in line
