"""The command line of benchmarks: `kdkernels bench [logits | linear | sparse | e2e]`."""

# No `from __future__ import annotations`: typer reads the annotations, which live inside `register`.
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from .auditing.named import NoLoss, load

if TYPE_CHECKING:
    import typer

    from .bench.workloads import Point

_HELP = """Measure the loss here: time, memory and error beside eager PyTorch and torch.compile.

WHAT is logits, linear (hidden states and heads), sparse (a stored teacher), or several; all by default. e2e,
by itself, is language models end to end: tokens per second, and the most tokens that memory holds. Without
sizes, a middle one is measured, and V, N, the divergence, T and the dtype are varied around it. Options of
several values, separated by commas, are combined.

OUT gets report.html, which needs no other file, report.md, bench.json, and a picture for each of WHAT.
"""


def numbers(name: str, text: str | None, kind: type) -> list[Any] | None:
    """The values of an option that takes several; ValueError where one is none."""
    if text is None:
        return None
    found = []
    for each in text.split(","):
        try:
            found.append(kind(each.strip().replace("_", "")) if kind is not str else each.strip())
        except ValueError:
            raise ValueError(f"--{name} must be numbers separated by commas, got {text!r}") from None
    return found


def points_of(
    what: Sequence[str], device: str, quick: bool, given: dict[str, list[Any] | None]
) -> "list[Point]":
    """What is asked for: the combinations of what is given, or the middle and what is around it.

    Raises:
        ValueError: A value is out of range.
    """
    from .bench import measure, workloads

    chosen = {name: values for name, values in given.items() if values is not None}
    if "widths" in chosen:
        chosen["widths"] = [tuple(chosen["widths"])]
    points: list[Point] = []
    for centre in measure.centres(device, what):
        around = (
            [centre] if quick or chosen.keys() - {"widths", "k"} else measure.star(device, [centre.workload])
        )
        for values in itertools.product(*chosen.values()):
            changes = dict(zip(chosen, values, strict=True))
            points += [replace(point, **changes) for point in around]
    for point in points:
        workloads.check(point)
    return list(dict.fromkeys(points))


def register(app: "typer.Typer") -> None:
    """Adds the command to an application."""
    import typer

    several = "one or several, separated by commas"

    @app.command("bench", help=_HELP)
    def bench(
        what: Annotated[
            list[str] | None, typer.Argument(metavar="[WHAT]...", help="logits, linear, sparse, or e2e.")
        ] = None,
        rows: Annotated[str | None, typer.Option(help=f"N, tokens: {several}.")] = None,
        vocab: Annotated[str | None, typer.Option(help=f"V, classes: {several}.")] = None,
        dtype: Annotated[str | None, typer.Option(help=f"float32, bfloat16, float16: {several}.")] = None,
        divergence: Annotated[
            str | None,
            typer.Option(help=f"Such as forward_kl, jsd; cross_entropy is labels alone: {several}."),
        ] = None,
        temperature: Annotated[str | None, typer.Option(help=f"T: {several}.")] = None,
        hard_weight: Annotated[
            str | None, typer.Option(help=f"Weight of the labels' cross-entropy: {several}.")
        ] = None,
        widths: Annotated[
            str | None, typer.Option(help="Of the hidden states of student and teacher, such as 256,384.")
        ] = None,
        k: Annotated[str | None, typer.Option(help=f"Stored classes of a row: {several}.")] = None,
        against: Annotated[
            list[str] | None,
            typer.Option(
                help="A loss of your own beside the others: file.py:function, of student and teacher logits.",
                show_default=False,
            ),
        ] = None,
        device: Annotated[
            str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
        ] = None,
        threads: Annotated[int | None, typer.Option(help="Of torch; by default its own choice.")] = None,
        seconds: Annotated[
            float, typer.Option(help="How long a size is timed at least, ten times that at most.")
        ] = 2.0,
        no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave torch.compile out.")] = False,
        keep_memory: Annotated[
            bool,
            typer.Option("--keep-memory", help="Raise glibc's thresholds, so that freed memory is kept."),
        ] = False,
        quick: Annotated[
            bool, typer.Option("--quick", help="Half a minute: one size of each, nothing compiled.")
        ] = False,
        out: Annotated[Path, typer.Option(help="Folder for what is found.")] = Path("runs/bench"),
    ) -> None:
        sizes = {"rows": rows, "vocab": vocab, "divergence": divergence, "temperature": temperature,
                 "hard-weight": hard_weight, "widths": widths, "k": k}  # fmt: skip
        told = {**sizes, "dtype": dtype, "device": device, "threads": threads}
        command = ["kdkernels", "bench", *(what or ())]
        command += [f"--{name}={value}" for name, value in told.items() if value is not None]
        command += [f"--against={each}" for each in against or ()]
        flags = {"--no-compile": no_compile, "--keep-memory": keep_memory, "--quick": quick}
        command += [flag for flag, on in flags.items() if on]
        try:
            if what == ["e2e"]:
                if extra := [f"--{name}" for name, value in sizes.items() if value is not None]:
                    raise ValueError(f"e2e has sizes and losses of its own, leave out {', '.join(extra)}")
                raise SystemExit(end_to_end(device, dtype, quick, out, shlex.join(command)))
            given = {
                "rows": numbers("rows", rows, int),
                "vocab": numbers("vocab", vocab, int),
                "dtype": numbers("dtype", dtype, str),
                "divergence": numbers("divergence", divergence, str),
                "temperature": numbers("temperature", temperature, float),
                "hard_weight": numbers("hard-weight", hard_weight, float),
                "widths": numbers("widths", widths, int),
                "k": numbers("k", k, int),
            }
            if given["widths"] is not None and (len(given["widths"]) != 2 or min(given["widths"]) < 1):
                raise ValueError(f"--widths must be two numbers above 0, got {widths!r}")
            raise SystemExit(
                run(
                    what or [], given, device=device, threads=threads, seconds=seconds, quick=quick,
                    compiled=not (no_compile or quick), raised=keep_memory, against=against or [], out=out,
                    command=shlex.join(command),
                )
            )  # fmt: skip
        except (ValueError, NoLoss) as error:
            print(f"kdkernels bench: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("kdkernels bench: interrupted, nothing was written", file=sys.stderr)
            raise SystemExit(130) from None


def device_of(device: str | None) -> str:
    """The device that is asked for, or the one that is here; ValueError where there is none such."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    here = torch.cuda.is_available()
    if device == "cuda" and not here:
        raise ValueError("--device cuda: torch.cuda.is_available() is False here")
    return device or ("cuda" if here else "cpu")


def run(
    what: Sequence[str],
    given: dict[str, list[Any] | None],
    *,
    device: str | None,
    threads: int | None,
    seconds: float,
    quick: bool,
    compiled: bool,
    raised: bool,
    against: Sequence[str],
    out: Path,
    command: str,
) -> int:
    """Measures, prints and writes; returns the exit status, 1 where kd_loss was wrong or failed somewhere."""
    from .bench import pages, workloads
    from .bench.contestants import OURS
    from .bench.measure import Settings, measure

    for name in what:
        if name not in workloads.WORKLOADS:
            known = ", ".join(workloads.WORKLOADS)
            raise ValueError(f"WHAT must be of {known}, or e2e by itself, got {name!r}")
    if not seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {seconds}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads must be at least 1, got {threads}")
    for named in against:
        load(named)  # says what is wrong with it before anything is measured
    where = device_of(device)
    points = points_of(what or workloads.WORKLOADS, where, quick, given)
    settings = Settings(
        threads or cores(),
        rounds=5 if quick else 10,
        seconds=min(seconds, 1.0) if quick else seconds,
        compiled=compiled,
        raised=raised,
        modules=tuple(against),
    )
    if len(points) > 1 and not quick:
        look = measure(points[:1], replace(settings, rounds=5, seconds=0.5, compiled=False, memory=False))
        print(f"A first look: {pages.headline(look)[0]}. The rest takes minutes.", flush=True)
    document = measure(points, settings)
    document["command"] = command
    write(document, out)
    own = [e for p in document["points"] for e in p["entries"] if e["family"] == OURS and e["problem"]]
    return int(bool(own))


def cores() -> int:
    """As many threads as torch takes, or as there are CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


def write(document: dict[str, Any], out: Path) -> None:
    """Prints tables and headline; writes pictures where matplotlib is there, report and figures."""
    from .bench import charts, pages, print_table, write_json
    from .files import replacing

    for title, head, body, left in pages.tables(document):
        print_table(title, head, body, left)
    for line in pages.headline(document):
        print(f"{line}.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        pictures = charts.draw(document, out)
    except ModuleNotFoundError as error:
        pictures = []
        print(f"no pictures, since {error.name} is not installed: pip install 'kdkernels[bench]'")
    write_json(out / "bench.json", document)
    for name, text in (
        ("report.md", pages.markdown(document, [path.name for path in pictures])),
        ("report.html", pages.html(document, pictures)),
    ):
        with replacing(out / name) as part:
            part.write_text(text, encoding="utf-8")
    print(f"report: {out / 'report.html'}")


def end_to_end(device: str | None, dtype: str | None, quick: bool, out: Path, command: str) -> int:
    """Language models from end to end; returns the exit status, 1 where a loss was wrong."""
    try:
        from .bench import Progress, e2e
    except ModuleNotFoundError as error:
        raise ValueError(f"e2e needs {error.name}: pip install 'kdkernels[hf,cli]'") from None
    settings = e2e.settings_for(device_of(device), dtype=dtype)
    document = e2e.run(e2e.quick(settings) if quick else settings, e2e.METHODS, Progress(), command)
    out.mkdir(parents=True, exist_ok=True)
    return e2e.write(document, out)
