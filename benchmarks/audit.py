"""``python -m benchmarks audit``: scorecards of `kd_loss`, of eager spellings and of installed libraries.

A Markdown file for each of them in ``results/audit``, and ``README.md`` with the count of verdicts and what
is WRONG. Exits with 1 where something of ours is.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

import kdkernels as kd
from benchmarks.audit_losses import Examined, all_of_them, version
from kdkernels.auditing import Audit
from kdkernels.bench.report import command_line

RESULTS = Path(__file__).parent / "results" / "audit"


def main(arguments: list[str]) -> int:
    """Examines, writes, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks audit", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", help="those of which file or name has this in it, such as trl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    losses, missing = all_of_them(options.device)
    losses = [each for each in losses if not options.only or options.only in f"{each.file} {each.name}"]
    found = examined(losses, options.device)
    write(options.out, found, options.device)
    if not options.only:
        text = summary(found, missing, arguments, options.device)
        (options.out / "README.md").write_text(text, encoding="utf-8")
    return int(any(not card.ok for each, card in found if each.file.startswith("kd_loss")))


def examined(losses: list[Examined], device: str) -> list[tuple[Examined, Audit]]:
    """Each with its scorecard; says how it went."""
    found = []
    for number, each in enumerate(losses, 1):
        print(f"{number}/{len(losses)} {each.name}", end=": ", flush=True)
        scorecard = kd.audit(each.loss, name=each.name, device=device, **each.tells)
        print(", ".join(f"{n} {verdict}" for verdict, n in scorecard.counts.items() if n))
        found.append((each, scorecard))
    return found


def write(out: Path, found: list[tuple[Examined, Audit]], device: str) -> None:
    """A file for those that stand together."""
    out.mkdir(parents=True, exist_ok=True)
    for file in dict.fromkeys(each.file for each, _ in found):
        text = page(file, [(each, card) for each, card in found if each.file == file], device)
        (out / f"{file}.md").write_text(text, encoding="utf-8")


def versions(device: str) -> str:
    """Of what took part."""
    names = [f"kdkernels {kd.__version__}", f"torch {torch.__version__}"]
    peers = (
        f"{name} {found}" for name in ("liger-kernel", "trl", "transformers") if (found := version(name))
    )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    return ", ".join([*names, *peers, where])


def page(file: str, found: Iterable[tuple[Examined, Audit]], device: str) -> str:
    """The scorecards of a file, one after another."""
    parts = [f"# Scorecards: {file}\n\n{versions(device)}. What the verdicts mean is in `docs/audit.md`.\n"]
    for each, card in found:
        note = f"{each.note[0].upper()}{each.note[1:]}.\n\n" if each.note else ""
        head, _, body = card.markdown().partition("\n\n")
        parts.append(f"#{head}\n\n{note}{body}")
    return "\n".join(parts)


def summary(
    found: list[tuple[Examined, Audit]], missing: dict[str, str], arguments: list[str], device: str
) -> str:
    """All of them in a table, and what is WRONG with each."""
    command = command_line("benchmarks", ["audit", *arguments])
    rows = [
        "# Scorecards of distillation losses", "", f"`{command}`", "",
        f"- {versions(device)}.",
        "- Each loss is called as its documentation has it, and what that says is no fault: no T² is a "
        "convention, as is a mean over the batch that is called one.",
        "- Where −inf logits reach a head, classes are excluded by its bias.",
        "- Precision is that of a loss given logits in the dtype, as a model in it makes them.",
        *[f"- {package}: {why}." for package, why in missing.items()], "",
        "| loss | right | convention | WRONG | n/a | not examined |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for each, card in found:
        counts = " | ".join(str(n) for n in card.counts.values())
        rows.append(f"| [{each.name}]({each.file}.md) | {counts} |")
    rows += ["", "## WRONG", ""]
    for each, card in found:
        if card.wrong:
            rows += [f"{each.name}:", ""]
            rows += [f"- {line.check}, {line.about}: {line.found}" for line in card.wrong]
            rows.append("")
    if all(card.ok for _, card in found):
        rows.append("Nothing.")
    return "\n".join(rows).rstrip() + "\n"
