"""Pictures of measured points: time, memory and share of the ceiling against V, time against N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .contestants import OURS
from .measure import AXES, described, families, fastest

# A colour for each family, ours first: Okabe and Ito's, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F", "#F0E442")

# A panel: its title, its unit, and its value of a point and a family.
Value = Callable[[dict[str, Any], str], float | None]


def _time(point: dict[str, Any], family: str) -> float | None:
    entry = fastest(point, family)
    return None if entry is None else float(entry["time"]["median_ms"])


def _memory(point: dict[str, Any], family: str) -> float | None:
    entry = fastest(point, family)
    return None if entry is None or not entry["peak_bytes"] else entry["peak_bytes"] / 1e6


def _share(point: dict[str, Any], family: str) -> float | None:
    entry = fastest(point, family)
    share = None if entry is None else entry["time"]["share"]
    return None if share is None else 100 * float(share)


PANELS: tuple[tuple[str, str, str, Value], ...] = (
    ("vocab", "time", "ms, forward + backward", _time),
    ("vocab", "peak memory", "MB beyond the inputs", _memory),
    ("vocab", "share of the ceiling", "%", _share),
    ("rows", "time", "ms, forward + backward", _time),
)
LETTERS = {"vocab": "V, classes", "rows": "N, tokens"}


def sweep(points: Sequence[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The longest run of points of one workload that differ in nothing but `axis`, in its order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        rest = {k: v for k, v in point["point"].items() if k != axis}
        groups.setdefault(repr(rest), []).append(point)
    longest = max(groups.values(), key=len, default=[])
    return sorted(longest, key=lambda p: int(p["point"][axis]))


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draws a picture for each workload into `folder`; needs matplotlib.

    Returns:
        The PNG files: curves where a size was swept, bars where it was not.
    """
    made = []
    for name in dict.fromkeys(p["point"]["workload"] for p in document["points"]):
        points = [p for p in document["points"] if p["point"]["workload"] == name]
        if not any(e["time"] for p in points for e in p["entries"]):
            continue
        path = folder / f"{name}.png"
        swept = any(len(sweep(points, axis)) > 1 for axis in AXES)
        figure = _curves(points) if swept else _bars(points)
        with replacing(path) as part:
            figure.savefig(part, dpi=130, format="png")
        made.append(path)
    return made


def _colours(points: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(families(points))}


def _curves(points: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    colours = _colours(points)
    panels = [
        panel
        for panel in PANELS
        if len(chosen := sweep(points, panel[0])) > 1
        and any(panel[3](point, family) is not None for point in chosen for family in colours)
    ]
    figure = Figure(figsize=(4.0 * len(panels), 3.6), layout="constrained")
    for axes, (axis, title, unit, value) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        chosen = sweep(points, axis)
        for family, colour in colours.items():
            known = [(p["point"][axis], y) for p in chosen if (y := value(p, family)) is not None]
            if known:
                style: dict[str, Any] = {"lw": 2.2, "zorder": 3} if family == OURS else {"lw": 1.4}
                axes.plot(*zip(*known, strict=True), marker="o", ms=4, color=colour, label=family, **style)
        if value is _time:
            least = [(p["point"][axis], b) for p in chosen if (b := _floor_ms(p)) is not None]
            if least:
                axes.plot(*zip(*least, strict=True), ls=":", lw=1.4, color="#444444", label="ceiling")
        other = chosen[0]["point"]["rows" if axis == "vocab" else "vocab"]
        fixed = f"{'N' if axis == 'vocab' else 'V'} = {other:,}"
        axes.set(title=f"{title}, {fixed}", xlabel=LETTERS[axis], ylabel=unit, xscale="log")
        if value is _share:
            axes.set_ylim(0, max(105.0, axes.get_ylim()[1]))
        else:
            axes.set_yscale("log")
        sizes: list[int] = []
        for size in (p["point"][axis] for p in chosen):
            if not sizes or size > 1.4 * sizes[-1]:  # nearer ones would be written over each other
                sizes.append(size)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    centre = described(sweep(points, panels[0][0])[0])
    figure.suptitle(f"{centre.workload}: {centre.loss_words}, {centre.dtype}", fontsize=11)
    return figure


def _floor_ms(point: dict[str, Any]) -> float | None:
    """What the least work takes at the measured ceiling."""
    ceiling = point["ceiling"]
    for unit in ("bytes", "flops"):
        if ceiling and (rate := ceiling[f"{unit}_per_s"]):
            return 1e3 * float(point["floor"][unit]) / float(rate)
    return None


def _bars(points: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    colours = _colours(points)
    figure = Figure(figsize=(7.5, 0.7 + 0.42 * len(colours) * len(points)), layout="constrained")
    axes = figure.subplots()
    labels, lengths, hues = [], [], []
    for point in points:
        for family, colour in colours.items():
            if (ms := _time(point, family)) is not None:
                where = f", {described(point)}" if len(points) > 1 else ""
                labels.append(f"{family}{where}")
                lengths.append(ms)
                hues.append(colour)
    bars = axes.barh(range(len(labels)), lengths, color=hues)
    axes.bar_label(bars, [f" {x:.3g}" for x in lengths], fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    title = str(described(points[0])) if len(points) == 1 else points[0]["point"]["workload"]
    axes.set(xlabel="ms, forward + backward", title=title)
    return figure
