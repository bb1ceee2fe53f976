"""What a benchmark says: the machine it ran on, tables, JSON, and progress while it works."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import replacing

# The vector extensions that a reader of the numbers wants to know about.
_EXTENSIONS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_bf16",
    "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers depend on, as a JSON object; what the system doesn't say is None."""
    info = _first_processor()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    system: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or None,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [name for name in _EXTENSIONS if name in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _total_memory(),
        "kernel": platform.release(),
        "transparent_hugepages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _first_line(["g++", "--version"]),
        "threads": threads,
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        system["device"] = properties.name
        system["cuda"] = torch.version.cuda
        system["hip"] = torch.version.hip
        system["device_memory_bytes"] = properties.total_memory
    return system


def _first_processor() -> dict[str, str]:
    info: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return info
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        info[name.strip()] = value.strip()
    return info


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _chosen(path: Path) -> str | None:
    """The word in brackets: `always [madvise] never`."""
    try:
        text = path.read_text()
    except OSError:
        return None
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What to type to run this again."""
    return shlex.join(["python", "-m", module, *arguments])


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """An aligned Markdown table.

    Args:
        header: The column heads.
        rows: Cells, one for each head.
        left: How many columns, from the first, are aligned to the left; the others are numbers.

    Returns:
        The table, with a newline at the end.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |\n"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return line(cells[0]) + line(rule) + "".join(line(row) for row in cells[1:])


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table: drawn by rich in a terminal, in Markdown elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
            for index, head in enumerate(header):
                table.add_column(head, justify="left" if index < left else "right", overflow="fold")
            for row in rows:
                table.add_row(*(cell.replace("[", "\\[") for cell in row))
            Console().print(table)
            return
    print(f"\n{title}\n\n{markdown_table(header, rows, left)}", flush=True)


class Progress:
    """How far a run is: a bar for each phase in a terminal, a line every few seconds elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        self.every = every
        self.seconds: dict[str, float] = {}
        self._bars: Any = None
        self._task: Any = None
        self._said = 0.0
        self._done = self._total = 0
        self._phase = ""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Progress]:
        """One phase of `total` steps; its duration is kept in `seconds`."""
        started = time.perf_counter()
        self._phase, self._done, self._total, self._said = name, 0, total, started
        self._bars = _rich_progress()
        if self._bars is None:
            print(f"{name}: {total} steps", flush=True)
        else:
            self._bars.start()
            self._task = self._bars.add_task(name, total=total, now="")
        try:
            yield self
        finally:
            self.seconds[name] = time.perf_counter() - started
            if self._bars is None:
                print(f"{name}: {self._done}/{total} in {self.seconds[name]:.0f} s", flush=True)
            else:
                self._bars.stop()

    def step(self, now: str, count: int = 1) -> None:
        """`count` more steps are done, and this is what is being done."""
        self._done += count
        if self._bars is not None:
            self._bars.update(self._task, advance=count, now=now)
        elif time.perf_counter() - self._said >= self.every:
            self._said = time.perf_counter()
            print(f"  {self._phase}: {self._done}/{self._total}  {now}", flush=True)

    def say(self, line: str) -> None:
        """A line of text above the bar."""
        if self._bars is None:
            print(line, flush=True)
        else:
            self._bars.console.print(line, markup=False, highlight=False)


def _rich_progress() -> Any:
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars
    except ImportError:
        return None
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
