"""What ``python -m benchmarks logits`` says: its targets, tables and Markdown, from the JSON of its cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels import bench

# The shape that must be no slower than eager; all others are held against bandwidth.
SMALL = (16, 1000)

# Below this, thread stacks and malloc's own slack would drown the peak.
SMALLEST_FOR_MEMORY = 8_000_000

# Times taken while others used more than this many CPUs decide no target: see `bench.Neighbours`.
BUSY = 0.1

# In place of what is asked, for a figure that nothing hangs on.
SHOWN = "shown only"

# A figure of one case, with one allocator, by best or median times.
Measure = Callable[[dict[str, Any], str, str], float | None]


@dataclass(frozen=True)
class Target:
    """A figure that the losses should reach, or one that is only shown (`asked` is `SHOWN`).

    `met` is None for the latter, and where the machine was too busy to say.
    """

    name: str
    asked: str
    measured: dict[str, float | None]
    where: str
    met: bool | None


def _time(case: dict[str, Any], name: str, allocator: str, figure: str) -> float | None:
    for method in case["methods"]:
        if method["name"] == name:
            times = method["times"].get(allocator)
            return None if times is None else float(times[figure])
    return None


def _fastest(
    case: dict[str, Any], family: str, allocator: str, figure: str, but: str | None = None
) -> float | None:
    times = [
        _time(case, m["name"], allocator, figure)
        for m in case["methods"]
        if m["family"] == family and m["spelling"] != but
    ]
    return min((t for t in times if t is not None), default=None)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def is_busy(case: dict[str, Any]) -> bool:
    """Whether others used the machine while the case was timed."""
    return (case["other_cpus"].get("default") or 0.0) > BUSY


PEAK = "peak memory in gradient tensors, worst case"
NET_PEAK = "the same without two fp32 rows of scratch a thread"


def targets(cases: list[dict[str, Any]]) -> list[Target]:
    """Every target that the cases have something to say about.

    Each is a ratio of figures from the same run. The worst case decides, by best times, with the allocator as
    it comes.
    """
    large32 = [c for c in cases if c["dtype"] == "float32" and tuple(c["shape"]) != SMALL]
    small32 = [c for c in cases if c["dtype"] == "float32" and tuple(c["shape"]) == SMALL]
    narrow = [c for c in cases if c["dtype"] == "bfloat16"]
    large = [c for c in cases if c["tensor_bytes"] >= SMALLEST_FOR_MEMORY]

    def share(c: dict[str, Any], allocator: str, figure: str) -> float | None:
        triad = c["triad"].get(allocator)
        return _ratio(triad and triad[figure], _time(c, c["ours"], allocator, figure))

    def against(family: str, but: str | None = None) -> Measure:
        return lambda c, allocator, figure: _ratio(
            _fastest(c, family, allocator, figure, but), _time(c, c["ours"], allocator, figure)
        )

    def to_wide(c: dict[str, Any], allocator: str, figure: str) -> float | None:
        wide = c["wide"].get(allocator)
        return _ratio(_time(c, c["ours"], allocator, figure), wide and wide[figure])

    def to_eager(c: dict[str, Any], allocator: str, figure: str) -> float | None:
        return _ratio(_time(c, c["ours"], allocator, figure), _fastest(c, "eager", allocator, figure))

    def peak(c: dict[str, Any], allocator: str, figure: str) -> float | None:
        if (allocator, figure) != ("default", "best_ms"):
            return None
        return next((m["peak_tensors"] for m in c["methods"] if m["name"] == c["ours"]), None)

    def net_peak(c: dict[str, Any], allocator: str, figure: str) -> float | None:
        whole = peak(c, allocator, figure)
        scratch = 2 * 4 * c["shape"][1] * c["threads"] / c["tensor_bytes"]
        return None if whole is None else whole - scratch

    def only(chosen: list[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
        return [c for c in chosen if c["objective"] == objective]

    # The loss is what users hand to torch.compile, JSD in log space. Compiling a gradient derived by hand
    # makes a better peer, and so does JSD in probability space; both are shown beside it.
    compiled_loss = against("torch.compile", but="closed_form")

    def compiled(spelling: str) -> Measure:
        return lambda c, allocator, figure: _ratio(
            _time(c, f"torch.compile {spelling}", allocator, figure), _time(c, c["ours"], allocator, figure)
        )

    rows: list[tuple[str, str, float | None, list[dict[str, Any]], Measure]] = []
    for shape in dict.fromkeys(tuple(c["shape"]) for c in large32):
        here = [c for c in large32 if tuple(c["shape"]) == shape]
        rows += [
            ("forward KL, share of triad", ">=", 0.55, only(here, "forward_kl"), share),
            ("JSD(0.5), share of triad", ">=", 0.30, only(here, "jsd"), share),
            ("forward KL, × torch.compile of the loss", ">=", 2.5, only(here, "forward_kl"), compiled_loss),
            ("JSD(0.5), × torch.compile of the loss", ">=", 10.0, only(here, "jsd"), compiled("log_target")),
            (
                "forward KL, × torch.compile of the closed form",
                ">=",
                None,
                only(here, "forward_kl"),
                compiled("closed_form"),
            ),
            (
                "JSD(0.5), × torch.compile in probability space",
                ">=",
                None,
                only(here, "jsd"),
                compiled("kl_div"),
            ),
            (
                "JSD(0.5), × torch.compile of the closed form",
                ">=",
                None,
                only(here, "jsd"),
                compiled("closed_form"),
            ),
            ("× fastest eager, worst objective", ">=", 2.0, here, against("eager")),
        ]
    for shape in dict.fromkeys(tuple(c["shape"]) for c in narrow):
        here = [c for c in narrow if tuple(c["shape"]) == shape]
        rows.append(("bf16 time / fp32 time, worst objective", "<=", 1.0, here, to_wide))
    rows.append((PEAK, "<=", 1.0, large, peak))
    rows.append((NET_PEAK, "<=", None, large, net_peak))
    rows.append(("time / fastest eager, small, worst objective", "<=", 1.0, small32, to_eager))
    return [_target(*row) for row in rows if row[3]]


def _target(
    name: str,
    relation: str,
    bound: float | None,
    cases: list[dict[str, Any]],
    measure: Measure,
) -> Target:
    worst = max if relation == "<=" else min
    measured: dict[str, float | None] = {}
    where = ""
    for key, allocator, figure in (
        ("best", "default", "best_ms"),
        ("median", "default", "median_ms"),
        ("raised", "raised", "best_ms"),
    ):
        values = [
            (measure(c, allocator, figure), f"{tuple(c['shape'])} {c['dtype']} {c['objective']}")
            for c in cases
        ]
        known = [(value, place) for value, place in values if value is not None]
        # A case without its figure can't be the best of the bunch: the target counts as not measured.
        complete = len(known) == len(values)
        measured[key] = worst(known)[0] if complete else None
        if key == "best":
            where = worst(known)[1] if complete else next(place for value, place in values if value is None)
    value = measured["best"]
    if bound is None:
        return Target(name, SHOWN, measured, where, None)
    met: bool | None = value is not None and (value >= bound if relation == ">=" else value <= bound)
    if name == PEAK:
        # Read in pages, beside row statistics and malloc's slack.
        met = value is not None and value <= bound * 1.05
    elif value is not None and any(is_busy(c) for c in cases):
        met = None
    return Target(name, f"{relation} {number(bound)}", measured, where, met)


def number(value: float | None, missing: str = "not measured") -> str:
    """Three digits."""
    if value is None:
        return missing
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share in per cent, without decimals."""
    return "" if value is None else f"{100 * value:.0f} %"


TARGET_HEAD = ("target", "worst case", "asked", "measured", "by medians", "thresholds raised", "met")
CASE_HEAD = (
    "objective", "contestant", "best ms", "median ms", "spread", "GB/s", "of triad", "faults",
    "raised: best ms", "of triad", "faults", "peak", "loss error", "gradient error",
)  # fmt: skip


def target_rows(found: list[Target]) -> list[list[str]]:
    """The cells of the table of targets."""
    return [
        [
            t.name,
            t.where,
            t.asked,
            number(t.measured["best"]),
            number(t.measured["median"], ""),
            number(t.measured["raised"], ""),
            "" if t.asked == SHOWN else {True: "yes", False: "NO", None: "machine busy"}[t.met],
        ]
        for t in found
    ]


def case_rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table of one shape and dtype."""
    rows = []
    for case in cases:
        for method in case["methods"]:
            label = method["name"]
            times = method["times"]["default"]
            if times and times["best_ms"] == _fastest(case, method["family"], "default", "best_ms"):
                label += " (fastest)" if method["family"] != "kdkernels" else ""
            cells = [case["objective"], label]
            if method["problem"]:
                cells += [method["problem"].partition(":")[0].upper(), *[""] * 8]
            else:
                cells += _time_cells(times, full=True) + _time_cells(
                    method["times"].get("raised"), full=False
                )
            peak = method["peak_tensors"]
            cells.append("" if peak is None else f"{peak:.2f}")
            cells += [
                "" if e is None else f"{e:.1e}" for e in (method["loss_error"], method["gradient_error"])
            ]
            rows.append(cells)
        wide = case["wide"]["default"]
        if wide:
            # Its bandwidth would be counted in bytes of the case's dtype.
            cells = [case["objective"], f"({case['ours']} on fp32 logits)", *_time_cells(wide, full=True)[:3]]
            rows.append([*cells, *[""] * (len(CASE_HEAD) - len(cells))])
        triad, raised = case["triad"]["default"], case["triad"].get("raised")
        if triad:
            cells = [case["objective"], f"({triad['spelling']})"]
            rows.append(
                [*cells, *_time_cells(triad, full=True), *_time_cells(raised, full=False), "", "", ""]
            )
    return rows


def _time_cells(times: dict[str, Any] | None, full: bool) -> list[str]:
    if times is None:
        return [""] * (6 if full else 3)
    faults = "" if times["page_faults"] is None else f"{times['page_faults']:.0f}"
    cells = [number(times["best_ms"])]
    if full:
        cells += [number(times["median_ms"]), percent(times["spread"]), number(times["gb_per_s"])]
    return [*cells, percent(times["triad_share"]), faults]


def notes(document: dict[str, Any]) -> list[str]:
    """What a reader has to know to read the tables."""
    env, settings = document["environment"], document["settings"]
    lines = [
        f"{env['cpu'] if env['device'] == 'cpu' else env['device']}, {env['cpus']} CPUs, "
        f"{settings['threads']} threads, torch {env['torch']} ({env['torch_isa']}), transparent huge pages: "
        f"{env['transparent_hugepages']}.",
        "Forward + backward, the freeing of the gradient included. Best of at least "
        f"{settings['min_rounds']} rounds, interleaved with the triad in one process; spread is the "
        "interquartile range over median.",
        "GB/s counts 2 reads + 1 write of [N, V], whatever a contestant really moves. The triad is the "
        "fastest of out = a + s·b, a + b and a·b over the same input sets, into one warm output.",
        "Faults are page faults per call (median). Peak is memory beyond the logits over the whole step, in "
        "gradient tensors, each contestant in a process of its own (blank: too small to tell).",
        "Errors against fp64: the loss relative to itself, the gradient relative to its row's largest entry.",
    ]
    if env["device"] == "cpu":
        lines.append(
            "“Raised”: glibc's mmap and trim thresholds raised for the whole process, so that freed memory "
            "is kept; fp32 only, and without the reference backend."
        )
        cache = document["settings"]["cache_bytes"]
        for shape, dtype, sets, size in dict.fromkeys(
            (tuple(c["shape"]), c["dtype"], c["input_sets"], c["input_bytes"]) for c in document["cases"]
        ):
            beyond = (
                "unknown cache"
                if cache is None
                else f"{size / cache:.2g} × the last-level cache of {cache / 1e6:.0f} MB"
            )
            lines.append(
                f"Inputs of {shape} {dtype} rotate among {sets} sets, {size / 1e6:.0f} MB: {beyond}."
            )
    busy = [c for c in document["cases"] if is_busy(c)]
    if busy:
        most = max(c["other_cpus"]["default"] for c in busy)
        lines.append(
            f"THE MACHINE WAS BUSY: in {len(busy)} of {len(document['cases'])} cases others used more "
            f"than {BUSY} CPUs (up to {most:.1f}). Threads that wait for each other then wait for "
            "milliseconds: these times and ratios say little."
        )
    lines += [f"{line}." for line in settings["stopped"]]
    lines += [
        f"{tuple(case['shape'])} {case['dtype']} {case['objective']}, {method['name']} {method['problem']}."
        for case in document["cases"]
        for method in case["methods"]
        if method["problem"]
    ]
    lines += [f"Backend {name}: {why}." for name, why in settings["unavailable"].items()]
    return lines


def tables(document: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]], int]]:
    """Title, head, rows and number of left-aligned columns of each table."""
    found = [Target(**t) for t in document["targets"]]
    result: list[tuple[str, Sequence[str], list[list[str]], int]] = []
    groups: dict[tuple[tuple[int, ...], str], list[dict[str, Any]]] = {}
    for case in document["cases"]:
        groups.setdefault((tuple(case["shape"]), case["dtype"]), []).append(case)
    for (shape, dtype), cases in groups.items():
        result.append((f"{shape}, {dtype}", CASE_HEAD, case_rows(cases), 2))
    if found:
        result.append(("Targets", TARGET_HEAD, target_rows(found), 2))
    return result


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    parts = [f"# Losses on logits\n\n`{document['command']}`\n\n"]
    parts += [f"- {line}\n" for line in notes(document)]
    ordered = tables(document)
    for title, head, rows, left in ordered[-1:] + ordered[:-1]:
        parts.append(f"\n## {title}\n\n{bench.markdown_table(head, rows, left)}")
    return "".join(parts)
