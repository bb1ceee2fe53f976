"""What ``python -m benchmarks gpu`` says: its targets, tables and Markdown, from the JSON of its cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import OUT_OF_MEMORY
from benchmarks.logits_report import SHOWN, number, percent
from kdkernels import bench

# What forward KL and its gradient should reach of the copy. Rows that fit on the chip are read once; a
# program that streams its row reads both sides twice: 4 reads + 1 write, counted as 2 + 1, end at 60 %.
ROW_ON_CHIP, ROW_STREAMED = 0.80, 0.55
ON_CHIP = 32_000
# Below this a step is a few launches, and a share of bandwidth says nothing: (512, 1000) in bf16 moves 3 MB,
# a microsecond's worth.
SMALLEST_FOR_SHARE = 50_000_000

PEERS = {"eager": "eager PyTorch", "torch.compile": "torch.compile", "liger": "Liger"}
# fp16 is computed twice, so that no share of it is asked.
HELD_TO_SHARES = ("bfloat16", "float32")

# A case of the document, or one that was left out.
Described = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure that the losses should reach, or one that is only shown (`asked` is `SHOWN`).

    `met` is None for the latter, and where it was not measured.
    """

    name: str
    where: str
    asked: str
    measured: float | None
    met: bool | None


def place(case: Described) -> str:
    """What a case is called."""
    return f"{_shape(case)} {case['dtype']} {case['objective']}"


def _shape(case: Described) -> str:
    return f"({case['shape'][0]}, {case['shape'][1]})"


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """The contestant that `kd_loss` runs by itself."""
    return next(m for m in case["methods"] if m["name"] == case["ours"])


def fastest(case: dict[str, Any], family: str) -> dict[str, Any] | None:
    """The one with the shortest median time of those that were timed."""
    timed = [m for m in case["methods"] if m["family"] == family and m["times"]]
    return min(timed, key=lambda m: m["times"]["median_ms"], default=None)


def asked_share(case: dict[str, Any]) -> float | None:
    """What a case of forward KL should reach of the copy's bandwidth."""
    if case["dtype"] not in HELD_TO_SHARES or case["traffic_bytes"] < SMALLEST_FOR_SHARE:
        return None
    return ROW_ON_CHIP if case["shape"][1] <= ON_CHIP else ROW_STREAMED


def targets(cases: list[dict[str, Any]], left_out: list[Described]) -> list[Target]:
    """Every target, decided by median times; one that nothing was measured for is neither met nor missed."""
    found = []
    shapes = list(dict.fromkeys(_shape(c) for c in [*cases, *left_out]))
    for shape in shapes:
        for case in (c for c in cases if _shape(c) == shape and c["objective"] == "forward_kl"):
            found.append(_share(case, asked_share(case)))
        found += [
            Target("forward KL, share of copy", place(c), "not measured", None, None)
            for c in left_out
            if _shape(c) == shape and c["objective"] == "forward_kl" and c["dtype"] in HELD_TO_SHARES
        ]
        found += [_share(c, None) for c in cases if _shape(c) == shape and c["objective"] == "jsd"]
    for shape in shapes:
        here = [c for c in cases if _shape(c) == shape]
        found += [_against(family, shape, here) for family in PEERS]
    if cases:
        found += [_right(cases), _peak(cases)]
    return found


def _share(case: dict[str, Any], bound: float | None) -> Target:
    name = {"forward_kl": "forward KL", "jsd": "JSD(0.5)"}[case["objective"]] + ", share of copy"
    times = ours(case)["times"]
    value = None if times is None else times["copy_share"]
    if bound is None:
        return Target(name, place(case), SHOWN, value, None)
    return Target(name, place(case), f">= {bound:.2f}", value, None if value is None else value >= bound)


def _against(family: str, shape: str, cases: list[dict[str, Any]]) -> Target:
    """How often the family's fastest takes our time, in the worst case of those where both were timed."""
    name = f"× fastest {PEERS[family]}"
    ratios = []
    for case in cases:
        peer, own = fastest(case, family), ours(case)["times"]
        if peer is not None and own is not None:
            ratios.append((peer["times"]["median_ms"] / own["median_ms"], place(case)))
    if not ratios:
        return Target(name, shape, "> 1", None, None)
    worst, where = min(ratios)
    return Target(name, f"{where}, the worst of {len(ratios)}", "> 1", worst, worst > 1)


def _right(cases: list[dict[str, Any]]) -> Target:
    wrong = [c for c in cases if ours(c)["problem"] is not None]
    value = (len(cases) - len(wrong)) / len(cases)
    where = place(wrong[0]) if wrong else f"all {len(cases)} cases"
    return Target("cases that kdkernels gets right", where, ">= 1.00", value, not wrong)


def _peak(cases: list[dict[str, Any]]) -> Target:
    peaks = [(ours(c)["peak_tensors"], place(c)) for c in cases if ours(c)["peak_tensors"] is not None]
    value, where = max(peaks, default=(None, ""))
    return Target("peak memory in gradient tensors, worst case", where, SHOWN, value, None)


TARGET_HEAD = ("target", "case", "asked", "measured", "met")
CASE_HEAD = (
    "objective", "contestant", "median ms", "best ms", "spread", "GB/s", "of copy", "host ms", "peak",
    "launches", "loss error", "gradient error",
)  # fmt: skip


def target_rows(found: list[Target]) -> list[list[str]]:
    """The cells of the table of targets."""
    return [
        [
            t.name,
            t.where,
            t.asked,
            number(t.measured),
            "" if t.asked == SHOWN else {True: "yes", False: "NO", None: "not measured"}[t.met],
        ]
        for t in found
    ]


def case_rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table of one shape and dtype."""
    rows = []
    for case in cases:
        for method in case["methods"]:
            label = method["name"]
            if method["family"] in PEERS and method is fastest(case, method["family"]):
                label += " (fastest)"
            cells = [case["objective"], label]
            if method["problem"]:
                cells += [method["problem"].partition(":")[0].upper(), *[""] * 7]
            else:
                cells += _time_cells(method["times"])
                cells += [
                    number(method["host_ms"], ""),
                    "" if method["peak_tensors"] is None else f"{method['peak_tensors']:.2f}",
                    "" if method["launches"] is None else str(method["launches"]),
                ]
            cells += [
                "" if e is None else f"{e:.1e}" for e in (method["loss_error"], method["gradient_error"])
            ]
            rows.append(cells)
        for label, times in ((f"({case['ours']}, forward alone)", case["forward"]), ("(copy)", case["copy"])):
            if times:
                rows.append([case["objective"], label, *_time_cells(times), "", "", "", "", ""])
    return rows


def _time_cells(times: dict[str, Any] | None) -> list[str]:
    if times is None:
        return [""] * 5
    return [
        number(times["median_ms"]),
        number(times["best_ms"]),
        percent(times["spread"]),
        number(times["gb_per_s"]),
        percent(times["copy_share"]),
    ]


def summary(case: dict[str, Any]) -> str:
    """One line about a case that is done."""
    parts = []
    if case["copy"]:
        parts.append(f"copy {number(case['copy']['gb_per_s'])} GB/s")
    for family in (*PEERS, "kdkernels"):
        best = fastest(case, family)
        if best is not None:
            parts.append(f"{best['name']} {number(best['times']['median_ms'])} ms")
    own = ours(case)["times"]
    if own is not None and own["copy_share"] is not None:
        parts[-1] += f" ({percent(own['copy_share'])} of copy)"
    untimed = [f"{m['name']} ({m['problem']})" for m in case["methods"] if m["problem"]]
    return f"  {place(case)}: " + ", ".join(parts) + (f"; not timed: {', '.join(untimed)}" if untimed else "")


def notes(document: dict[str, Any]) -> list[str]:
    """What a reader has to know to read the tables."""
    env, settings = document["environment"], document["settings"]
    built = env.get("hip") or env.get("cuda")
    toolkit = "" if built is None else f" ({'ROCm' if env.get('hip') else 'CUDA'} {built})"
    peers = settings["no_liger"] or f"liger-kernel {env['liger-kernel']}"
    lines = [
        f"{env['device']}, torch {env['torch']}{toolkit}, triton {env['triton']}, {peers}.",
        "Forward + backward by device events, the second-level cache overwritten before each call; the "
        "device is kept busy while the host queues it. Interleaved with a copy in one process, "
        f"{settings['min_rounds']} rounds or more, or what fits in {settings['max_seconds']:.0f} s; spread "
        "is the interquartile range over median. GB/s and shares are of median times.",
        "GB/s counts 2 reads + 1 write of [N, V] (the forward alone: 2 reads), whatever a contestant really "
        f"moves. The copy is of {settings['copy_bytes'] / 2**20:.0f} MiB; what it reads and writes counts.",
        "Host ms is what a step keeps the host busy with an idle device: where it is more than the time, a "
        "loop that waits for each step takes that long. Peak is device memory beyond the logits over the "
        "whole step, in gradient tensors. Launches are kernels, copies and fills of a step.",
        "Errors against fp64: the loss relative to itself, the gradient relative to its row's largest entry.",
    ]
    scales = {c["loss_scale"] for c in document["cases"] if c["loss_scale"] is not None}
    lines += [
        f"float16 has a loss scale of {scale:.0f}, taken out of its errors." for scale in sorted(scales)
    ]
    if document["finished"] is None:
        lines.append("THE RUN HAS NOT FINISHED: these are the figures so far.")
    lines += [f"Left out: {place(c)}: {c['why']}." for c in document["left_out"]]
    lines += [f"{line}." for line in document["stopped"]]
    lines += [
        f"{place(case)}, {method['name']}: {method['problem']}."
        for case in document["cases"]
        for method in case["methods"]
        if method["problem"] and method["problem"] != OUT_OF_MEMORY
    ]
    return lines


def tables(document: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]], int]]:
    """Title, head, rows and number of left-aligned columns of each table; the targets come last."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in document["cases"]:
        groups.setdefault((_shape(case), case["dtype"]), []).append(case)
    result: list[tuple[str, Sequence[str], list[list[str]], int]] = [
        (f"{shape}, {dtype}", CASE_HEAD, case_rows(cases), 2) for (shape, dtype), cases in groups.items()
    ]
    found = [Target(**t) for t in document["targets"]]
    if found:
        result.append(("Targets", TARGET_HEAD, target_rows(found), 2))
    return result


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    parts = [f"# Losses on a GPU\n\n`{document['command']}`\n\n"]
    parts += [f"- {line}\n" for line in notes(document)]
    ordered = tables(document)
    for title, head, rows, left in ordered[-1:] + ordered[:-1]:
        parts.append(f"\n## {title}\n\n{bench.markdown_table(head, rows, left)}")
    return "".join(parts)
