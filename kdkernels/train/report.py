"""What a fit leaves for people: a table of its figures, and curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

Row = Mapping[str, Any]


class Means:
    """Weighted means of figures by name."""

    def __init__(self) -> None:
        self.sums: dict[Any, tuple[float, float]] = {}

    def add(self, name: Any, value: float, weight: float = 1.0) -> None:
        """Takes a figure in."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + value * weight, weights + weight)

    def over(self, processes: int) -> dict[Any, float]:
        """The means over all processes."""
        each = gather_object([self.sums]) if processes > 1 else [self.sums]
        names = dict.fromkeys(name for sums in each for name in sums)
        pairs = {name: [sums[name] for sums in each if name in sums] for name in names}
        return {n: sum(t for t, _ in p) / max(sum(w for _, w in p), 1e-300) for n, p in pairs.items()}


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV, every figure that any of them has a column."""
    columns = dict.fromkeys(name for row in rows for name in row)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def draw_curves(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each figure against the step: as it trained, and as it was evaluated."""
    from matplotlib.figure import Figure

    skip = {"step", "epoch", "items_per_second", "lr"}
    names = dict.fromkeys(name.removeprefix("eval/") for row in rows for name in row if name not in skip)
    if not names:
        return
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained")
    for axes, name in zip(figure.subplots(lines, columns, squeeze=False).flat, names, strict=False):
        for key, style in (
            (name, {"lw": 1, "label": "training"}),
            (f"eval/{name}", {"marker": ".", "label": "evaluation"}),
        ):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), **style)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    for axes in figure.axes[len(names) :]:
        axes.remove()
    figure.savefig(path, dpi=120)
