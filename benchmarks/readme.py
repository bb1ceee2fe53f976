"""``python -m benchmarks readme``: tables of the README and the docs, made of ``benchmarks/results``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the tests compare what stands there with
what is made here. ``--check`` says what is out of step, and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdkernels.bench import markdown_table, measure
from kdkernels.bench.pages import number

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
PLACE = re.compile(r"(<!-- table: (\S+) -->\n\n).*?(\n<!-- end -->)", re.S)

NAMES = {
    "forward_kl": "forward KL", "reverse_kl": "reverse KL", "jsd": "JSD(0.5)", "jsd(0.5)": "JSD(0.5)",
    "skew_kl(0.1)": "skew KL(0.1)", "tvd": "TVD", "cross_entropy": "labels alone",
}  # fmt: skip
WORDS = {"logits": "logits", "linear": "heads", "sparse": "a stored teacher"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def read(name: str) -> dict[str, Any]:
    """The figures of a file of results."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def losses() -> str:
    """Everyone's time as a multiple of ours, and memory, of each point of the comparison."""
    document = read("compare-cpu/bench.json")
    points = sorted(document["points"], key=lambda p: list(WORDS).index(p["point"]["workload"]))
    others = [family for family in measure.families(points) if family != measure.OURS]
    head = [
        "of",
        "size",
        "loss",
        "`kd_loss` ms",
        "share",
        *(f"× {name}" for name in others),
        "memory, × eager's",
    ]
    rows: list[list[str]] = []
    before = ""
    for point in points:
        p, own = measure.described(point), measure.fastest(point, measure.OURS)
        if own is None:
            raise ValueError(f"{p}: kd_loss was not timed")
        loss = NAMES.get(p.divergence, p.divergence) + p.loss_words.removeprefix(p.divergence)
        what = WORDS[p.workload]
        rows.append(
            [
                "" if what == before else what, f"({p.rows:,}, {p.vocab:,}) {SHORT[p.dtype]}", loss,
                number(own["time"]["median_ms"]), percent(own["time"]["share"]),
                *(ratio(point, family) for family in others),
                memory(own, measure.fastest(point, "eager")),
            ]
        )  # fmt: skip
        before = what
    return markdown_table(head, rows, left=3)


def first() -> str:
    """The middle size of each workload, in few columns."""
    seen: dict[str, dict[str, Any]] = {}
    for point in read("compare-cpu/bench.json")["points"]:
        seen.setdefault(point["point"]["workload"], point)
    rows = []
    for name, point in seen.items():
        p, own = measure.described(point), measure.fastest(point, measure.OURS)
        found = [own, *(measure.fastest(point, family) for family in ("eager", "torch.compile"))]
        times = [None if e is None else e["time"]["median_ms"] for e in found]
        what = f"{WORDS[name]}, ({p.rows:,}, {p.vocab:,})"
        rows.append([what, NAMES[p.divergence], *map(number, times), memory(found[0], found[1])])
    head = ["of", "loss", "`kd_loss` ms", "eager ms", "`torch.compile` ms", "memory, × eager's"]
    return markdown_table(head, rows, left=2)


def ratio(point: dict[str, Any], family: str) -> str:
    """Of its fastest."""
    if measure.hopeless(point, family):
        return f"> {measure.SLOW:.0f}"
    entry = measure.fastest(point, family)
    return "" if entry is None else number(entry["time"]["ratio"])


def memory(own: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Our peak in peaks of another."""
    if own is None or other is None or not own["peak_bytes"] or not other["peak_bytes"]:
        return ""
    return f"{own['peak_bytes'] / other['peak_bytes']:.2f}"


def percent(share: float | None) -> str:
    """Without decimals."""
    return "" if share is None else f"{100 * share:.0f} %"


def divergences() -> str:
    """Every divergence beside its textbook form."""
    document = read("divergences-cpu-epyc.json")
    rows = []
    for name, found in document["divergences"].items():
        best = found["best_ms"]
        share = best["triad"] / best["kd_loss"] * found["tensors"] / 3
        rows.append(
            [
                f"`{name}`", f"{found['exps']} + {found['logs']}", number(best["kd_loss"]),
                percent(share), number(best["eager"]), number(best.get("torch.compile")),
                tensors(document["peaks"].get(name)),
            ]
        )  # fmt: skip
    head = [
        "divergence",
        "exp + log",
        "`kd_loss` ms",
        "share of triad",
        "eager ms",
        "`torch.compile` ms",
        "peak",
    ]
    return markdown_table(head, rows)


def extras() -> str:
    """Noise and mixtures beside the same call without."""
    document = read("divergences-cpu-epyc.json")
    rows = []
    for name, found in document["extras"].items():
        best = found["best_ms"]
        rows.append(
            [
                name, number(best["kd_loss"]), number(best["without"]),
                number(best["kd_loss"] / best["without"]), number(best["eager"]),
                tensors(document["peaks"].get(name)),
            ]
        )  # fmt: skip
    return markdown_table(["on top of one", "`kd_loss` ms", "without", "ratio", "eager ms", "peak"], rows)


def tensors(peak: Any) -> str:
    """Peak memory in gradient tensors."""
    return f"{peak:.2f}" if isinstance(peak, float) else "not measured"


def cluster() -> str:
    """The CUDA kernel beside Triton's on an H100."""
    document = read("cluster-nvidia-h100-80gb-hbm3.json")
    rows: list[list[str]] = []
    before = ""
    for case in document["cases"]:
        cuda, triton = (case["methods"][name]["times"] for name in ("cuda", "triton"))
        shape = "({:,}, {:,})".format(*case["shape"])
        rows.append(
            [
                "" if rows and shape == before else shape, NAMES.get(case["objective"], case["objective"]),
                number(cuda["median_ms"]), percent(cuda["copy_share"]),
                number(triton["median_ms"]), percent(triton["copy_share"]),
                number(triton["median_ms"] / cuda["median_ms"]),
            ]
        )  # fmt: skip
        before = shape
    head = ["logits", "loss", '`"cuda"` ms', "share", '`"triton"` ms', "share", "times as fast"]
    return markdown_table(head, rows, left=2)


def models() -> str:
    """Language models from end to end."""
    from kdkernels.bench import e2e_report

    document = read("e2e-cpu.json")
    rows = [
        [pair["family"].capitalize() if i == 0 else "", *cells]
        for pair in document["pairs"]
        for i, cells in enumerate(e2e_report.rows(document, pair))
        if "not measured" not in cells[1]
    ]
    return markdown_table(["models like", *e2e_report.HEAD], rows, left=2)


def elsewhere() -> str:
    """What has no table of its own."""
    hand, ours = (read("hf-cpu.json")["seconds"][name] for name in ("by hand", "DistillMixin"))
    peak = read("hf-cpu.json")["peak_mb"]
    gpu = read("hf-cuda.json")
    on_gpu = {name.split(",")[0]: statistics.median(s) for name, s in gpu["seconds"].items()}
    tokens = gpu["shape"][1] * gpu["shape"][2]
    gpu_peak = {name.split(",")[0]: mb / 1e3 for name, mb in gpu["peak_mb"].items()}
    sent = [each["bytes_a_row"] for each in read("parallel-cpu.json")["counted"][0].values()]
    fsdp = read("fsdp-cpu.json")["peak_mb"]
    cache = read("cache-cpu.json")
    waits = {name: found["wait"] for name, found in cache["training"].items() if "1 worker" in name}
    full, alone = (next(w for n, w in waits.items() if word in n) for word in ("all classes", "stored"))
    rows = [
        [
            "a step of a `transformers` trainer, 2 layers, 131,072 classes, CPU",
            f"{statistics.median(hand) / statistics.median(ours):.1f} times as fast as the loss by hand, in "
            f"{peak['DistillMixin'] / peak['by hand']:.2f} of its memory", "hf",
        ],
        [
            "0.5 from 1.5 billion weights, 151,936 classes, 8 × 1,024 tokens, H100, heads on Triton",
            f"{tokens / on_gpu['DistillMixin']:,.0f} tokens/s and {gpu_peak['DistillMixin']:.1f} GB; by hand "
            f"{tokens / on_gpu['by hand']:,.0f} and {gpu_peak['by hand']:.1f}", "hf --device cuda",
        ],
        [
            "a vocabulary in two processes, labels at T = 2",
            f"{min(sent):.0f} to {max(sent):.0f} bytes a row and step, none backward", "parallel",
        ],
        [
            "a frozen teacher in parts of two processes, large blocks returned",
            f"{max(fsdp['returns large blocks in parts']):.0f} MB at the peak of each, "
            f"{max(fsdp['returns large blocks whole']):.0f} whole", "fsdp",
        ],
        [
            "a cache, k = 64, V = 151,936, three temperatures",
            f"{cache['bytes_per_token']:.1f} bytes a token; total variation lost "
            f"{cache['variation']['largest']['1']:.1e} at most", "cache",
        ],
        [
            "a training loop that waits for it, random reads from a disk, one worker",
            f"{100 * full:.1f} % of a step of all classes, {100 * alone:.0f} % of one that is the stored "
            "loss alone (5 % were meant)", "cache",
        ],
    ]  # fmt: skip
    said = [[what, figure, f"`python -m benchmarks {command}`"] for what, figure, command in rows]
    return markdown_table(["of", "measured", "by"], said, left=3)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (losses, first, models, divergences, extras, cluster, elsewhere)
}


def renewed(text: str) -> str:
    """A page with every table made anew."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def out_of_step(page: Path) -> list[str]:
    """The tables of a page that aren't what the results say."""
    return [
        found[2]
        for found in PLACE.finditer(page.read_text(encoding="utf-8"))
        if renewed(found[0]) != found[0]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables, or says which are out of step, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a table is out of step")
    options = parser.parse_args(arguments)
    wrong = False
    for page in PAGES:
        for name in out_of_step(page):
            wrong = True
            print(f"{page.relative_to(ROOT)}: {name} {'is out of step' if options.check else 'made anew'}")
        if not options.check:
            page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(options.check and wrong)
