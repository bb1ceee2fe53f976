"""Tables and charts of the end-to-end benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import replacing
from .report import markdown_table, print_table

HEAD = ["loss", "tokens/s", "a step, ms", "× ours", "largest tokens", "peak, MiB", "grows by", "error"]
# Above that many, times of several threads say little.
_BUSY = 0.1


def title(pair: dict[str, Any]) -> str:
    """A pair in a line."""
    student, teacher = pair["student"]["like"], pair["teacher"]["like"]
    return f"{pair['family'].capitalize()}: {student} from {teacher}, {pair['vocab']:,} classes"


def rows(document: dict[str, Any], pair: dict[str, Any]) -> list[list[str]]:
    """The cells of a pair's table; what was not measured says so or is empty."""
    return [_row(document, pair, name) for name in document["contestants"]]


def _row(document: dict[str, Any], pair: dict[str, Any], name: str) -> list[str]:
    if why := document["missing"].get(name):
        return [name, f"not measured: {why}", *[""] * (len(HEAD) - 2)]
    cells = dict.fromkeys(HEAD[1:], "")
    if (found := pair["time"]) is not None:
        if (error := found["errors"].get(name)) is not None:
            worst = [x for key, x in error.items() if key != "loss"]
            cells["error"] = "not finite" if None in worst else f"{max(worst):.0e}"
        if problem := found["problems"].get(name):
            cells["tokens/s"] = problem
        else:
            median = statistics.median(found["seconds"][name])
            cells["tokens/s"] = f"{document['settings']['tokens'] / median:,.0f}"
            cells["a step, ms"] = f"{1e3 * median:,.0f}"
            if name in found["ratios"]:
                cells["× ours"] = f"{found['ratios'][name]:.2f}"
    if (memory := (pair["memory"] or {}).get(name)) is not None:
        cells["largest tokens"] = _largest(memory, document["settings"]["length"])
        cells["peak, MiB"] = _peak(document, memory)
        if memory["growth"] is not None:
            cells["grows by"] = f"{memory['growth']:.2f}"
    return [name, *cells.values()]


def _largest(memory: dict[str, Any], length: int) -> str:
    if memory["tokens"] is None:
        return str(memory["problem"])
    if memory["capped"]:
        return f"> {memory['tokens']:,}"
    return f"{memory['tokens']:,}" if memory["tokens"] else f"< {length:,}"


def _peak(document: dict[str, Any], memory: dict[str, Any]) -> str:
    peak, allowed = peak_at(document, memory), document["settings"]["memory"]
    if peak is not None:
        return f"{peak / 2**20:,.0f}"
    if memory["tries"] and not memory["tries"][0]["fits"]:  # which is of the timed number
        return "no room" if allowed is None else f"> {allowed / 2**20:,.0f}"
    return ""


def peak_at(document: dict[str, Any], memory: dict[str, Any]) -> int | None:
    """Peak bytes at the timed number of tokens."""
    peaks = {each["tokens"]: each["peak"] for each in memory["tries"] if each["fits"]}
    return peaks.get(document["settings"]["tokens"])


def notes(document: dict[str, Any]) -> list[str]:
    """What was measured, and how to read it."""
    s, system = document["settings"], document["environment"]
    where = system["device"] if s["device"] == "cuda" else f"{system.get('cpu')}, {s['threads']} threads"
    versions = "".join(f", {name} {version}" for name, version in document["versions"].items())
    lines = [
        f"{where}, torch {system['torch']}{versions}, kdkernels {document['kdkernels']}.",
        "Models have random weights and the real vocabulary unless said otherwise, embedding and head are "
        f"one matrix, {s['dtype']}. A step is the teacher's forward pass, the student's, the loss and the "
        "backward pass, without the optimizer.",
        "All compute the forward KL at temperature 1, the mean over all tokens, without labels, which not "
        "all have a term for.",
    ]
    if s["vocab"] is not None:
        lines.append(f"Not the real vocabulary: {s['vocab']:,} classes.")
    if s["only"] != "memory":
        kept = "; glibc keeps what is freed, so that nobody pays for page faults" * (s["device"] == "cpu")
        several = f", in {s['passes']} processes" * (s["passes"] > 1)
        lines.append(
            f"Tokens a second: of {s['tokens']:,} tokens in sequences of {s['length']}, the median of "
            f"{s['rounds']} rounds{several}{kept}; × ours: the median of a round's time over that of "
            f"{document['ours'] or 'ours, which is not here'}"
            f"{', the mean of what processes find, of four or more without both extremes' * bool(several)}. "
            "The error is the largest of gradients of the head, the last norm and the first layer, beside "
            "heads and loss in float64."
        )
        busy = max((pair["time"]["other_cpus"] or 0.0 for pair in document["pairs"]), default=0.0)
        if busy > _BUSY:
            lines.append(f"The machine was busy while it was timed: others used up to {busy:.1f} CPUs.")
    else:
        lines.append("Not measured: times, and whether the losses are right.")
    if s["only"] != "time":
        room = "all of the GPU" if s["memory"] is None else f"{s['memory'] / 2**30:g} GiB beyond the models"
        lines.append(
            f"Largest tokens: of a step that {room} had room for, to a sixteenth or {s['length']} tokens; "
            f"more than {s['most']:,} were not tried. Peak: beyond models, with gradients, at "
            f"{s['tokens']:,} tokens; it grows by so many float32 tensors of tokens × classes."
        )
    else:
        lines.append("Not measured: memory.")
    lines += [f"{name}: {says}" for name, says in document["contestants"].items()]
    lines += [f"Not here: {name}: {why}." for name, why in document["missing"].items()]
    return lines


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    command = f"`{document['command']}`\n\n" if document["command"] else ""
    parts = ["# Distilling language models, end to end\n\n", command]
    parts += [f"- {line}\n" for line in notes(document)]
    for pair in document["pairs"]:
        parts.append(f"\n## {title(pair)}\n\n{markdown_table(HEAD, rows(document, pair))}")
    return "".join(parts)


def show(document: dict[str, Any]) -> None:
    """Prints notes and tables."""
    for line in notes(document):
        print(line)
    for pair in document["pairs"]:
        print_table(title(pair), HEAD, rows(document, pair))


_OURS, _OTHERS = "#1f6f8b", "#b8bec4"


def draw(document: dict[str, Any], folder: Path, name: str = "e2e") -> list[Path]:
    """Draws bars of what was measured: a row of panels for each pair.

    Args:
        document: Of `run`.
        folder: Where the picture goes.
        name: Of the picture, without its ending.

    Returns:
        The PNG, or nothing where nothing was measured.
    """
    from matplotlib.figure import Figure

    panels = [
        panel
        for panel, part in zip(PANELS, ("time", "memory", "memory"), strict=True)
        if any(pair[part] for pair in document["pairs"])
    ]
    if not panels:
        return []
    names = [each for each in document["contestants"] if each not in document["missing"]]
    pairs = document["pairs"]
    size = 5.2 * len(panels), (0.36 * len(names) + 1.1) * len(pairs)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(pairs), len(panels), squeeze=False)
    for line, pair in zip(grid, pairs, strict=True):
        for axes, panel in zip(line, panels, strict=True):
            _bars(axes, names, document, list(panel.bars(document, pair, names)), panel.log)
            axes.set_xlabel(panel.label(document), fontsize=9)
        line[0].set_title(title(pair), fontsize=10, loc="left")
    path = folder / f"{name}.png"
    with replacing(path) as part:
        figure.savefig(part, dpi=130, format="png")
    return [path]


Bar = tuple[float | None, str, bool]  # length, what is written at its end, whether it goes on


def _bars(axes: Any, names: list[str], document: dict[str, Any], bars: list[Bar], log: bool) -> None:
    if log:
        axes.set_xscale("log")
    known = [length for length, _, _ in bars if length]
    least, most = min(known, default=1.0), max(known, default=1.0)
    begin = least / 3 if log else 0.0
    for place, (name, (length, text, open_ended)) in enumerate(zip(names, bars, strict=True)):
        color = _OURS if name == document["ours"] else _OTHERS
        if length:
            hatch = "//" if open_ended else None
            axes.barh(place, length - begin, left=begin, color=color, hatch=hatch, edgecolor="white")
        short = text if len(text) < 36 else text[:33] + "..."
        axes.annotate(f" {short}", (length or begin, place), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(begin or None, most * (most / begin) ** 0.25 if log else most * 1.25)
    if log:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")  # between powers of ten they would be written over each other
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)


class _Panel:
    """A kind of bars: its label, and a bar for each name."""

    log = False

    @staticmethod
    def label(document: dict[str, Any]) -> str:
        raise NotImplementedError

    @staticmethod
    def bars(document: dict[str, Any], pair: dict[str, Any], names: list[str]) -> Iterator[Bar]:
        raise NotImplementedError


class _Speed(_Panel):
    """Tokens a second."""

    @staticmethod
    def label(document: dict[str, Any]) -> str:
        return f"tokens/s, forward + backward, {document['settings']['tokens']:,} tokens"

    @staticmethod
    def bars(document: dict[str, Any], pair: dict[str, Any], names: list[str]) -> Iterator[Bar]:
        for name in names:
            found = pair["time"]
            if found is None or name not in found["seconds"]:
                yield None, "not measured" if found is None else found["problems"].get(name, ""), False
                continue
            speed = document["settings"]["tokens"] / statistics.median(found["seconds"][name])
            yield speed, f"{speed:,.0f}", False


class _Tokens(_Panel):
    """The largest number of tokens."""

    log = True

    @staticmethod
    def label(document: dict[str, Any]) -> str:
        memory = document["settings"]["memory"]
        room = "the GPU's memory" if memory is None else f"{memory / 2**30:g} GiB"
        return f"largest number of tokens of a step within {room}"

    @staticmethod
    def bars(document: dict[str, Any], pair: dict[str, Any], names: list[str]) -> Iterator[Bar]:
        for name in names:
            found = (pair["memory"] or {}).get(name)
            if found is None:
                yield None, "not measured", False
                continue
            text = _largest(found, document["settings"]["length"])
            yield found["tokens"] or None, text, bool(found.get("capped"))


class _Peak(_Panel):
    """Peak memory at the timed number of tokens."""

    @staticmethod
    def label(document: dict[str, Any]) -> str:
        return f"peak MiB beyond the models, {document['settings']['tokens']:,} tokens"

    @staticmethod
    def bars(document: dict[str, Any], pair: dict[str, Any], names: list[str]) -> Iterator[Bar]:
        for name in names:
            found = (pair["memory"] or {}).get(name)
            peak = None if found is None else peak_at(document, found)
            if peak is None and found is not None and (text := _peak(document, found)):
                yield None, text, False
                continue
            yield (
                (None, "not measured", False)
                if peak is None
                else (peak / 2**20, f"{peak / 2**20:,.0f}", False)
            )


PANELS: tuple[type[_Panel], ...] = (_Speed, _Tokens, _Peak)
