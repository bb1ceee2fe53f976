"""What `python -m benchmarks strategies` says: a verdict for every claim, tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import strategies_plan as plan
from benchmarks.strategies_stats import NULL, OPPOSITE, REPRODUCED, SEEDS, holm, interval, paired, verdict
from kdkernels import bench

Found = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
UNITS = {
    "accuracy": "accuracy, %",
    "biased_recall_3": "recall of threes with a bias, %",
    "micro_f1": "micro-F1, %",
    "variance": "gradient variance / squared norm",
    "on_own_answers": "−KL(q‖p) on own answers, bits a byte",
    "minus_log_rmse": "−log₁₀ RMSE",
    "minus_kl": "−KL to the teacher",
}


def judged(claims: Mapping[str, plan.Claim], found: Found) -> dict[str, dict[str, Any]]:
    """The analysis of every claim; Holm's family is all claims of its plan, also where some were run."""

    def figures(experiment: str, arm: str, metric: str) -> list[float]:
        return [cell["metrics"][metric] for cell in found[experiment, arm]]

    compared, sides = {}, {}
    for name, claim in claims.items():
        strategy = figures(claim.experiment, claim.arm, claim.metric)
        control = figures(claim.experiment, claim.control, claim.control_metric or claim.metric)
        compared[name] = paired(strategy, control)
        sides[name] = {"strategy_mean": interval(strategy)[0], "control_mean": interval(control)[0]}
    adjusted = {}
    for number in dict.fromkeys(claim.plan for claim in claims.values()):
        family = [name for name, claim in plan.CLAIMS.items() if claim.plan == number]
        adjusted |= holm({n: compared[n].p for n in family if n in compared}, family=len(family))
    return {
        name: {
            **asdict(claim),
            "strategy": plan.EXPERIMENTS[claim.experiment].strategy,
            **sides[name],
            **asdict(compared[name]),
            "holm": adjusted[name],
            "verdict": verdict(compared[name], adjusted[name]),
        }
        for name, claim in claims.items()
    }


def arms(document: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The test cells of every arm, in the order of the plan."""
    seeds, chosen = plan.QUICK_SEEDS if document["quick"] else plan.TEST_SEEDS, document["chosen"]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {
        (e, a): [] for e, each in plan.EXPERIMENTS.items() for a in each.arms if f"{e}/{a}" in chosen
    }
    for cell in document["cells"]:
        key = cell["experiment"], cell["arm"]
        if key in found and cell["seed"] in seeds and cell["configuration"] == chosen["/".join(key)]:
            found[key].append(cell)
    return found


def _plus_minus(mean: float, half_width: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" + ("" if half_width is None else f" ± {half_width:.2f}")


def tables(document: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]], int]]:
    """Titles, heads, rows, and columns on the left."""
    claims = [
        [
            name,
            c["says"],
            c["paper"] or "–",
            f"{c['strategy_mean']:.2f} / {c['control_mean']:.2f}",
            _plus_minus(c["mean"], c["half_width"], "+"),
            "–" if c["effect"] is None else f"{c['effect']:+.1f}",
            str(c["n"]),
            f"{c['holm']:.2g}",
            c["verdict"],
        ]
        for name, c in document["claims"].items()
    ]
    head = [
        "claim",
        "what it says",
        "paper",
        "strategy / control",
        "difference",
        "d",
        "n",
        "Holm p",
        "verdict",
    ]
    parts = [("Claims", head, claims, 3)]
    rows = []
    for (name, arm), cells in arms(document).items():
        experiment, shown = plan.EXPERIMENTS[name], plan.EXPERIMENTS[name].shown
        configuration = experiment.arms[arm].grid[document["chosen"][f"{name}/{arm}"]]
        metrics = [cell["metrics"] for cell in cells]
        teacher = [m[f"teacher_{shown}"] for m in metrics if f"teacher_{shown}" in m]
        rows.append(
            [
                name,
                experiment.arms[arm].says,
                ", ".join(f"{key} {value:g}" for key, value in configuration.items()) or "–",
                UNITS[shown].removesuffix(", %"),
                _plus_minus(*interval([m[shown] for m in metrics])),
                f"{interval(teacher)[0]:.2f}" if teacher else "–",
                str(sum("diverged" in m for m in metrics)),
            ]
        )
    head = ["experiment", "arm", "configuration", "metric", "mean ± interval", "teacher", "diverged"]
    return [*parts, ("Arms", head, rows, 4)]


def notes(document: Mapping[str, Any]) -> list[str]:
    """How to read the tables."""
    environment, verdicts = document["environment"], [c["verdict"] for c in document["claims"].values()]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in (REPRODUCED, NULL, OPPOSITE))
    seeds = plan.QUICK_SEEDS if document["quick"] else plan.TEST_SEEDS
    budgets = sorted({plan.budget(plan.EXPERIMENTS[c["experiment"]]) for c in document["claims"].values()})
    tuned = (
        "nothing was tuned"
        if document["quick"]
        else f"tuned over {' or '.join(map(str, budgets))} configurations, as many for every arm of an "
        f"experiment, by the mean of {len(plan.TUNING_SEEDS)} other seeds on a validation split"
    )
    lines = [
        f"{len(verdicts)} claims: {counted}.",
        f"{len(seeds)} seeds, each another draw of training rows and another initialisation; {tuned}. "
        "Figures are of a test split that nothing else used.",
        "Difference: strategy − control, paired seed by seed, with its 95 % t interval; d is its mean over "
        "its standard deviation. p is of the paired t-test, after Holm's correction over all the "
        "claims of a plan. Differences of per cents are in points.",
        f"Verdicts: {REPRODUCED}, the corrected p is below 0.05 and the difference has the claimed sign; "
        f"{OPPOSITE}, it has the other; {NULL}, neither, or fewer than {SEEDS} seeds.",
        "The papers' figures are of other data and larger nets: what is compared is the sign. The test split "
        "is the same for all seeds, so intervals say nothing of other test data; the teacher of text is one "
        "for all seeds, so theirs say nothing of other teachers.",
        f"{environment.get('cpu')}, {document['jobs']} process(es) of 1 thread, "
        f"torch {environment['torch']}, Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + f"; the whole table takes about {document['predicted_seconds'] / 60:.0f} minutes there.",
    ]
    if document["quick"]:
        lines.insert(
            0, "A quick run: two seeds, short fits, nothing tuned. It shows that all of it runs, no more."
        )
    return lines


def markdown(document: Mapping[str, Any]) -> str:
    """The report."""
    parts = [f"# Strategies\n\n`{document['command']}`\n\n", *(f"- {line}\n" for line in notes(document))]
    for title, head, rows, left in tables(document):
        parts.append(f"\n## {title}\n\n{bench.markdown_table(head, rows, left)}")
    parts.append("\n## Settings and figures\n\nMeans of the test seeds with their 95 % t intervals.\n")
    for strategy, names in strategies(document).items():
        parts.append(f"\n![{strategy}](strategies/{_file(strategy)})\n\n")
        parts += [f"- {name}: {plan.EXPERIMENTS[name].setting}.\n" for name in names]
    return "".join(parts)


def strategies(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Experiments by strategy, of what was run."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(experiment for experiment, _ in arms(document)):
        found.setdefault(plan.EXPERIMENTS[name].strategy, []).append(name)
    return found


def _file(strategy: str) -> str:
    return f"{strategy.replace(' ', '_')}.png"


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """A figure for every strategy: a panel for each of its experiments, a line for each arm."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    found, paths = arms(document), []
    for strategy, names in strategies(document).items():
        sizes = [len(plan.EXPERIMENTS[name].arms) for name in names]
        figure = Figure(figsize=(7.0, 0.8 * len(names) + 0.32 * sum(sizes)), layout="constrained")
        panels = figure.subplots(len(names), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for panel, name in zip(panels, names, strict=True):
            experiment = plan.EXPERIMENTS[name]
            for place, arm in enumerate(experiment.arms):
                values = [c["metrics"][experiment.shown] for c in found[name, arm]]
                mean, half_width = interval(values)
                panel.plot(values, [place] * len(values), ".", color="0.75", markersize=4)
                panel.errorbar(
                    mean, place, xerr=half_width or 0.0, fmt="o", color="C0", capsize=3, markersize=4
                )
            panel.set_yticks(
                range(len(experiment.arms)), [arm.says for arm in experiment.arms.values()], fontsize=8
            )
            panel.set_ylim(len(experiment.arms) - 0.5, -0.5)
            panel.set_title(name, fontsize=9, loc="left")
            panel.set_xlabel(UNITS[experiment.shown], fontsize=8)
            panel.tick_params(axis="x", labelsize=8)
            panel.grid(axis="x", color="0.9")
            panel.set_axisbelow(True)
        paths.append(folder / _file(strategy))
        figure.savefig(paths[-1], dpi=110)
    return paths
