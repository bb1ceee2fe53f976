"""Pictures of figures; matplotlib is asked for when one is drawn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import replacing


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]], skip: Collection[str] = ()) -> None:
    """A panel for each figure of the rows against their `step`, with its evaluations: `eval/` and its name.

    Args:
        path: The PNG.
        rows: Of figures by name; not every row has all.
        skip: Names that have no panel.
    """
    from matplotlib.figure import Figure

    names = dict.fromkeys(name.removeprefix("eval/") for row in rows for name in row)
    shown = [name for name in names if name not in skip and name != "step"]
    if not shown:
        return
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained")
    for axes, name in zip(figure.subplots(lines, columns, squeeze=False).flat, shown, strict=False):
        for key, label, style in ((name, "training", "-"), (f"eval/{name}", "evaluation", ".-")):
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                axes.plot(*zip(*points, strict=True), style, lw=1, label=label)
        axes.set(title=name, xlabel="step")
        axes.legend(fontsize=8)
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
