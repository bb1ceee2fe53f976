"""What ``python -m benchmarks cluster`` says: its targets, tables and Markdown, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import OUT_OF_MEMORY
from benchmarks.gpu_report import (
    HELD_TO_SHARES,
    SMALLEST_FOR_SHARE,
    TARGET_HEAD,
    Target,
    place,
    target_rows,
)
from benchmarks.logits_report import SHOWN, number, percent
from kdkernels import bench

BACKENDS = ("cuda", "triton")
# Of the copy's bandwidth, of a kernel that reads both sides once and writes the gradient once. JSD and the
# skew KLs take three exponentials and a logarithm of a class, the others two exponentials.
SHARES = {"forward_kl": 0.85, "tvd": 0.85, "jsd(0.5)": 0.70, "skew_kl(0.1)": 0.70}
# Times as fast as Triton where its program reads rows twice, the KLs, or three times.
FASTER, WIDE = 1.4, 128_000


def targets(document: dict[str, Any]) -> list[Target]:
    """Every target, by medians; one that nothing was measured for is neither met nor missed."""
    described = [*document["cases"], *(c for c in document["left_out"] if not _is_host(c))]
    found = [_share(case) for case in described]
    found += [_ratio(case) for case in described]
    found += [_host(document["host"], what) for what in ("forward", "step")]
    if document["cases"]:
        wrong = [c for c in document["cases"] if c["methods"]["cuda"]["problem"] is not None]
        value = 1 - len(wrong) / len(document["cases"])
        where = place(wrong[0]) if wrong else f"all {len(document['cases'])} cases"
        found.append(Target("cases that the CUDA kernel gets right", where, ">= 1.00", value, not wrong))
    return found


def _is_host(case: dict[str, Any]) -> bool:
    return list(case["shape"]) == [16, 1000]


def times_of(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The times of a backend, where it was timed; of a case that was left out there are none."""
    return case["methods"][name]["times"] if "methods" in case else None


def ratio(case: dict[str, Any]) -> float | None:
    """Triton's time over that of the CUDA kernel, where both were timed."""
    cuda, triton = (times_of(case, name) for name in BACKENDS)
    return None if cuda is None or triton is None else triton["median_ms"] / cuda["median_ms"]


def _decided(name: str, where: str, asked: float | None, value: float | None) -> Target:
    if asked is None:
        return Target(name, where, SHOWN, value, None)
    return Target(name, where, f">= {asked:.2f}", value, None if value is None else value >= asked)


def _share(case: dict[str, Any]) -> Target:
    times = times_of(case, "cuda")
    large = case.get("traffic_bytes", SMALLEST_FOR_SHARE) >= SMALLEST_FOR_SHARE
    held = large and case["dtype"] in HELD_TO_SHARES
    asked = SHARES.get(case["objective"]) if held else None
    return _decided("share of copy", place(case), asked, None if times is None else times["copy_share"])


def _ratio(case: dict[str, Any]) -> Target:
    return _decided(
        "times as fast as Triton", place(case), FASTER if case["shape"][1] >= WIDE else None, ratio(case)
    )


def _host(host: dict[str, Any] | None, what: str) -> Target:
    name = f"host time of a {what}, over Triton's"
    where = "(16, 1000)" if host is None else place(host)
    cuda, triton = (None if host is None else host["methods"][b][f"{what}_us"] for b in BACKENDS)
    value = None if cuda is None or triton is None else cuda / triton
    return Target(name, where, "<= 1.00", value, None if value is None else value <= 1)


CASE_HEAD = (
    "case", "cuda ms", "best", "spread", "of copy", "triton ms", "of copy", "triton / cuda", "copy GB/s",
    "gradient error", "triton's", "cluster", "threads", "blocks", "shared",
)  # fmt: skip
HOST_HEAD = ("(16, 1000), bfloat16, forward KL", "forward µs", "step µs", "gradient error")


def _error(method: dict[str, Any]) -> str:
    return "" if method["gradient_error"] is None else f"{method['gradient_error']:.1e}"


def _time(method: dict[str, Any], key: str = "median_ms") -> str:
    if method["times"] is None:
        return (method["problem"] or "not measured").partition(":")[0].upper()
    return number(method["times"][key])


def case_row(case: dict[str, Any]) -> list[str]:
    """The cells of one case."""
    cuda, triton = (case["methods"][name] for name in BACKENDS)
    config, faster = case["config"] or {}, ratio(case)
    return [
        place(case),
        _time(cuda),
        "" if cuda["times"] is None else _time(cuda, "best_ms"),
        "" if cuda["times"] is None else percent(cuda["times"]["spread"]),
        "" if cuda["times"] is None else percent(cuda["times"]["copy_share"]),
        _time(triton),
        "" if triton["times"] is None else percent(triton["times"]["copy_share"]),
        "" if faster is None else f"{faster:.2f}",
        "" if case["copy"] is None else number(case["copy"]["gb_per_s"]),
        _error(cuda),
        _error(triton),
        *(f"{config[key]:,}" if key in config else "" for key in ("cluster", "threads", "blocks", "shared")),
    ]


def host_rows(host: dict[str, Any]) -> list[list[str]]:
    """The cells of what launches cost."""
    return [
        [
            name,
            *(
                (method["problem"] or "not measured").partition(":")[0].upper()
                if method[what] is None
                else f"{method[what]:.1f}"
                for what in ("forward_us", "step_us")
            ),
            _error(method),
        ]
        for name, method in host["methods"].items()
    ]


def summary(case: dict[str, Any]) -> str:
    """One line about a case that is done."""
    said = []
    for name, method in case["methods"].items():
        if method["problem"]:
            said.append(f"{name}: {method['problem']}")
        elif "times" not in method:
            said.append(f"{name} forward {method['forward_us']:.1f} µs, step {method['step_us']:.1f} µs")
        elif method["times"]:
            share = percent(method["times"]["copy_share"])
            said.append(f"{name} {number(method['times']['median_ms'])} ms ({share} of copy)")
    if "copy" in case:
        faster = ratio(case)
        said += [] if faster is None else [f"ratio {faster:.2f}"]
        said += [] if case["copy"] is None else [f"copy {number(case['copy']['gb_per_s'])} GB/s"]
    if case["config"]:
        said.append(str(case["config"]))
    return f"  {place(case)}: " + "; ".join(said)


def notes(document: dict[str, Any]) -> list[str]:
    """What a reader has to know to read the tables."""
    env, settings = document["environment"], document["settings"]
    compiled = document["built_seconds"]
    lines = [
        f"{env['device']}, torch {env['torch']} (CUDA {env.get('cuda')}), triton {env['triton']}, "
        f"cuda-core {env['cuda-core']}.",
        "Forward + backward of kd_loss by device events, medians; the second-level cache overwritten before "
        f"each call, interleaved with a copy of {settings['copy_bytes'] / 2**20:.0f} MiB, "
        f"{settings['min_rounds']} rounds, or what fits in {settings['max_seconds']:.0f} s.",
        "Share of copy: 2 reads + 1 write of [N, V] in that time, over the bandwidth of the copy, read and "
        "written bytes, in the same run.",
        "Errors against fp64, all rows: the gradient relative to its row's largest entry. Who is wrong isn't "
        "timed.",
        "Cluster, threads, blocks, shared: blocks that share a row, threads of a block, blocks of a "
        "multiprocessor, bytes of shared memory of a block.",
        "Host µs: what a call keeps the host busy with, with an idle device; a forward that has a gradient, "
        "and forward + backward.",
    ]
    if compiled is not None:
        lines.append(f"Compiled beforehand, in {compiled:.0f} s; the run took {document['seconds']:.0f} s.")
    if document["finished"] is None:
        lines.append("THE RUN HAS NOT FINISHED: these are the figures so far.")
    lines += [f"Left out: {place(c)}: {c['why']}." for c in document["left_out"]]
    lines += [f"{line}." for line in document["stopped"]]
    lines += [
        f"{place(case)}, {name}: {method['problem']}."
        for case in [*document["cases"], *([document["host"]] if document["host"] else [])]
        for name, method in case["methods"].items()
        if method["problem"] and method["problem"] != OUT_OF_MEMORY
    ]
    return lines


def tables(document: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]], int]]:
    """Title, head, rows and number of left-aligned columns of each table."""
    found: list[tuple[str, Sequence[str], list[list[str]], int]] = []
    if document["cases"]:
        found.append(("Times", CASE_HEAD, [case_row(case) for case in document["cases"]], 1))
    if document["host"]:
        found.append(("Launches", HOST_HEAD, host_rows(document["host"]), 1))
    decided = [Target(**t) for t in document["targets"]]
    return [*found, ("Targets", TARGET_HEAD, target_rows(decided), 2)]


def markdown(document: dict[str, Any]) -> str:
    """The report."""
    parts = [f"# The CUDA kernel beside Triton's\n\n`{document['command']}`\n\n"]
    parts += [f"- {line}\n" for line in notes(document)]
    for title, head, rows, left in tables(document):
        parts.append(f"\n## {title}\n\n{bench.markdown_table(head, rows, left)}")
    return "".join(parts)
