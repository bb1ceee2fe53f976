"""What a measurement says: tables for a terminal, Markdown, and one HTML file that needs no other."""

from __future__ import annotations

import base64
import html as escaping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contestants import OURS
from .measure import described, families, fastest
from .report import markdown_table

# Times taken while others used more than this many CPUs say little: see `timing.Neighbours`.
BUSY = 0.1
HEAD = ("loss", "contestant", "median ms", "× kd_loss", "share of ceiling", "peak MB", "gradient error")
FULL_HEAD = (
    "loss", "contestant", "median ms", "best ms", "spread", "× kd_loss", "GB/s or GFLOP/s",
    "share of ceiling", "peak MB", "in [N, V]", "loss error", "gradient error",
)  # fmt: skip
Table = tuple[str, Sequence[str], list[list[str]], int]


def number(value: float | None, missing: str = "") -> str:
    """Three digits."""
    if value is None:
        return missing
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def headline(document: dict[str, Any]) -> list[str]:
    """A sentence for each workload: how fast, beside whom, with what memory."""
    lines = []
    for name in dict.fromkeys(p["point"]["workload"] for p in document["points"]):
        point = next(p for p in document["points"] if p["point"]["workload"] == name)
        own = fastest(point, OURS)
        if own is None:
            lines.append(f"{described(point)}: kd_loss was not timed")
            continue
        said = []
        for family in families([point])[1:]:
            peer = fastest(point, family)
            if peer is not None and peer["time"]["ratio"]:
                memory = _memory_ratio(peer, own)
                said.append(f"{number(peer['time']['ratio'])} times as fast as {family}{memory}")
        lines.append(
            f"{described(point)}: {number(own['time']['median_ms'])} ms, {', '.join(said) or 'nobody else'}"
        )
    return lines


def _memory_ratio(peer: dict[str, Any], own: dict[str, Any]) -> str:
    if not peer["peak_bytes"] or not own["peak_bytes"]:
        return ""
    return f" in {number(own['peak_bytes'] / peer['peak_bytes'])} of its memory"


def notes(document: dict[str, Any]) -> list[str]:
    """How to read the tables."""
    env, settings = document["environment"], document["settings"]
    versions = "".join(f", {name} {version}" for name, version in document["versions"].items())
    allocator = (
        "glibc's mmap and trim thresholds raised, so that freed memory is kept and no page is cleared twice"
        if settings["raised"]
        else "the allocator as it comes"
    )
    several = (
        ", the mean of what processes find, of four or more without both extremes (in brackets, the least "
        "and the greatest)"
    )
    lines = [
        f"{env['cpu'] if env['device'] == 'cpu' else env['device']}, {env['cpus']} CPUs, "
        f"{settings['threads']} threads, kdkernels {document['kdkernels']}, torch {env['torch']}{versions}.",
        "Forward + backward, the freeing of the gradient included, interleaved round by round in an order "
        f"shuffled anew, on input sets that rotate and exceed the cache; {allocator}. “× kd_loss” is the "
        "median over rounds of a contestant's time over kd_loss's in the same round"
        f"{several * (settings['passes'] > 1)}; spread the interquartile range over median.",
        "Every contestant was compared with fp64 first: errors of the loss, relative to itself, and of "
        "gradients, relative to the row's largest entry (logits) or to the norm (heads). Who is wrong isn't "
        "timed.",
        "Ceilings, measured in the same rounds: for logits a triad, 2 reads + 1 write; for stored teachers a "
        "read and a write; for heads the matrix products alone. A share is of the least work, whatever a "
        "contestant does.",
        "Peak memory: beyond inputs, over the whole step, gradients included, in a process of its own; blank "
        "where tensors are too small to tell.",
    ]
    busy = [p for p in document["points"] if (p["other_cpus"] or 0.0) > BUSY]
    if busy:
        most = max(p["other_cpus"] for p in busy)
        lines.append(
            f"THE MACHINE WAS BUSY: at {len(busy)} of {len(document['points'])} points others used up to "
            f"{most:.1f} CPUs; times and ratios say little there."
        )
    lines += [
        f"{described(p)}, {e['name']}: {e['problem']}."
        for p in document["points"]
        for e in p["entries"]
        if e["problem"]
    ]
    lines += [f"{name}: {why}." for name, why in document["missing"].items()]
    return lines


def tables(document: dict[str, Any], full: bool = False) -> list[Table]:
    """Title, head, rows and left-aligned columns: for each size the fastest of a family, or everyone."""
    found: list[Table] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in document["points"]:
        p = described(point)
        extra = {"linear": f", widths {p.widths[0]} and {p.widths[1]}", "sparse": f", k = {p.k}"}
        title = f"{p.workload} ({p.rows:,}, {p.vocab:,}) {p.dtype}{extra.get(p.workload, '')}"
        groups.setdefault(title, []).append(point)
    for title, points in groups.items():
        rows = []
        for point in points:
            entries = point["entries"] if full else _shown(point)
            rows += [_row(point, entry, full) for entry in entries]
            ceiling = point["ceiling"]
            if full and ceiling:
                rate = ceiling["flops_per_s"] or ceiling["bytes_per_s"]
                cells = [described(point).loss_words, f"({ceiling['name']})", "", number(ceiling["best_ms"])]
                rows.append([*cells, "", "", number(rate / 1e9), *[""] * 5])
        found.append((title, FULL_HEAD if full else HEAD, rows, 2))
    if document["exponents"]:
        found.append(("Cost against V and N", EXPONENT_HEAD, _exponent_rows(document), 3))
    return found


def _shown(point: dict[str, Any]) -> list[dict[str, Any]]:
    best = [entry for family in families([point]) if (entry := fastest(point, family)) is not None]
    return best + [e for e in point["entries"] if e["problem"]]


def _row(point: dict[str, Any], entry: dict[str, Any], full: bool) -> list[str]:
    head, loss = (FULL_HEAD if full else HEAD), described(point).loss_words
    time = entry["time"]
    if time is None:
        said = (entry["problem"] or "not measured").partition(":")[0].upper()
        errors = [_error(entry["loss_error"]), _error(entry["gradient_error"])]
        blank = [loss, entry["name"], said, *[""] * (len(head) - 3)]
        return blank[:-2] + errors if full else [*blank[:-1], errors[1]]
    share = "" if time["share"] is None else f"{100 * time['share']:.0f} %"
    peak = entry["peak_bytes"]
    megabytes = "" if peak is None else number(peak / 1e6)
    ratio = number(time["ratio"])
    if not full:
        return [loss, entry["name"], number(time["median_ms"]), ratio, share, megabytes,
                _error(entry["gradient_error"])]  # fmt: skip
    passes = time.get("pass_ratios", ())
    if len(passes) > 1 and entry["name"] != point["ours"]:
        ratio += f" ({number(min(passes))} to {number(max(passes))})"
    rate = time.get("flops_per_s") or time.get("bytes_per_s")
    return [
        loss, entry["name"], number(time["median_ms"]), number(time["best_ms"]),
        f"{100 * time['spread']:.0f} %", ratio, number(rate / 1e9), share, megabytes,
        "" if peak is None else f"{peak / point['tensor_bytes']:.2f}",
        _error(entry["loss_error"]), _error(entry["gradient_error"]),
    ]  # fmt: skip


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


EXPONENT_HEAD = ("workload", "cost", "contestant", "exponent", "sizes")


def _exponent_rows(document: dict[str, Any]) -> list[list[str]]:
    rows = []
    for each in document["exponents"]:
        letter = "V" if each["axis"] == "vocab" else "N"
        fixed = each["fixed"]
        other = "rows" if each["axis"] == "vocab" else "vocab"
        at = f"{'N' if letter == 'V' else 'V'} = {fixed[other]:,}"
        rows.append(
            [
                f"{fixed['workload']}, {at}", f"{each['figure']} against {letter}", each["family"],
                f"{each['exponent']:.2f}", f"{min(each['sizes']):,} to {max(each['sizes']):,}",
            ]
        )  # fmt: skip
    return rows


def markdown(document: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report, with pictures by their names."""
    parts = [f"# Losses measured\n\n`{document['command']}`\n\n"]
    parts += [f"- {line}.\n" for line in headline(document)]
    parts.append("\n")
    parts += [f"![{Path(name).stem}]({name})\n\n" for name in pictures]
    parts += [f"- {line}\n" for line in notes(document)]
    for title, head, rows, left in tables(document, full=True):
        parts.append(f"\n## {title}\n\n{markdown_table(head, rows, left)}")
    return "".join(parts)


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --ours: #0072b233; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { font-size: 1.05rem; } .lead li { margin: .3rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; width: 100%; }
th, td { padding: .28rem .55rem; border-bottom: 1px solid var(--line); text-align: right; }
th { background: var(--soft); } .l { text-align: left; }
tr.ours td { background: var(--ours); font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; }
summary { cursor: pointer; margin: .8rem 0; } footer { margin: 3rem 0 1rem; font-size: .85rem; opacity: .8; }
"""


def html(document: dict[str, Any], pictures: Sequence[Path] = ()) -> str:
    """The report as one HTML file: pictures and style are in it, and there is no script."""
    e = escaping.escape
    parts = [
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n",
        f"<title>kdkernels: losses measured</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n",
        "<h1>Losses measured</h1>\n",
        f"<p><code>{e(document['command'])}</code></p>\n<ul class='lead'>\n",
        *(f"<li>{e(line)}.</li>\n" for line in headline(document)),
        "</ul>\n",
    ]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        parts.append(f"<p><img alt='{e(path.stem)}' src='data:image/png;base64,{data}'></p>\n")
    for title, head, rows, left in tables(document):
        parts.append(f"<h2>{e(title)}</h2>\n{_html_table(head, rows, left)}")
    parts.append("<h2>How it was measured</h2>\n<ul>\n")
    parts += [f"<li>{e(line)}</li>\n" for line in notes(document)]
    parts.append("</ul>\n<details><summary>Every contestant, with medians, best times and errors</summary>\n")
    for title, head, rows, left in tables(document, full=True):
        if head is FULL_HEAD:
            parts.append(f"<h2>{e(title)}</h2>\n{_html_table(head, rows, left)}")
    parts.append("</details>\n<h2>Environment</h2>\n")
    system = [[name, _words(value)] for name, value in document["environment"].items() if value is not None]
    parts.append(_html_table(("what", "here"), system, 2))
    finished, version = e(document["finished"]), e(document["kdkernels"])
    parts.append(f"<footer>kdkernels {version}, finished {finished}</footer>\n</body>\n</html>\n")
    return "".join(parts)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=l' if i < left else ''}>{escaping.escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=ours' if len(row) > 1 and row[1].startswith(OURS) else ''}>{cells('td', row)}</tr>\n"
        for row in rows
    )
    return f"<div class='wide'><table>\n<tr>{cells('th', head)}</tr>\n{body}</table></div>\n"
