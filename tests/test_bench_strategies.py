"""``python -m benchmarks strategies``: statistics on literals, a fair plan, fits, a run end to end."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from scipy import stats as scipy_stats

from benchmarks import strategies, strategies_text
from benchmarks import strategies_fits as fits
from benchmarks import strategies_plan as plan
from benchmarks import strategies_report as report
from benchmarks import strategies_stats as stats
from kdkernels import bench

# Statistics


def test_a_paired_comparison_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2√3; the quantile of 2 degrees of freedom is 4.3027."""
    found = stats.paired([11.0, 12.0, 13.0], [10.0, 10.0, 10.0])
    assert (found.n, found.mean, found.effect) == (3, 2.0, 2.0)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5)
    # With 2 degrees of freedom p = 1 − t / √(t² + 2).
    assert found.p == pytest.approx(1 - (12 / 14) ** 0.5)


def test_a_paired_comparison_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    strategy, control = (torch.randn(10, generator=generator).double().tolist() for _ in range(2))
    found, truth = stats.paired(strategy, control), scipy_stats.ttest_rel(strategy, control)
    assert found.p == pytest.approx(truth.pvalue)
    low, high = truth.confidence_interval(0.95)
    assert found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_differences_without_deviation() -> None:
    """One seed says nothing; equal figures have no difference; the same one everywhere leaves no doubt."""
    assert stats.paired([1.0], [0.0]) == stats.Paired(1, 1.0, None, None, 1.0)
    assert stats.paired([1.0, 2.0], [1.0, 2.0]) == stats.Paired(2, 0.0, 0.0, None, 1.0)
    assert stats.paired([2.0] * 5, [1.0] * 5) == stats.Paired(5, 1.0, 0.0, None, 0.0)
    with pytest.raises(ValueError, match="paired seed by seed, got 2 and 1"):
        stats.paired([1.0, 2.0], [1.0])


def test_holm_by_hand() -> None:
    """Of four: 4 · 0.01, 3 · 0.015, 2 · 0.03, and 0.035, which no later one may be below 0.06."""
    found = stats.holm({"a": 0.03, "b": 0.01, "c": 0.035, "d": 0.015})
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.045})
    assert stats.holm({"a": 0.4, "b": 0.9}) == {"a": 0.8, "b": 0.9}
    assert stats.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_holms_family_is_all_claims() -> None:
    """Claims that were not run count as the largest."""
    found = stats.holm({"a": 0.01, "b": 0.02}, family=10)
    assert found == pytest.approx({"a": 0.1, "b": 0.18})
    with pytest.raises(ValueError, match="at least 2"):
        stats.holm({"a": 0.01, "b": 0.02}, family=1)


@pytest.mark.parametrize(
    ("mean", "adjusted", "n", "said"),
    [(1.0, 0.049, 10, stats.REPRODUCED), (-1.0, 0.049, 10, stats.OPPOSITE), (1.0, 0.051, 10, stats.NULL),
     (1.0, 0.0, 2, stats.NULL)],
)  # fmt: skip
def test_verdicts(mean: float, adjusted: float, n: int, said: str) -> None:
    assert stats.verdict(stats.Paired(n, mean, 0.1, 1.0, 0.001), adjusted) == said


# The plan


def test_claims_name_arms_that_differ() -> None:
    for name, claim in plan.CLAIMS.items():
        arms = plan.EXPERIMENTS[claim.experiment].arms
        assert {claim.arm, claim.control} <= {*arms}, name
        assert (claim.arm, claim.metric) != (claim.control, claim.control_metric or claim.metric), name


def test_every_experiment_is_of_a_claim() -> None:
    assert {claim.experiment for claim in plan.CLAIMS.values()} == {*plan.EXPERIMENTS}


def test_every_recipe_has_a_claim() -> None:
    used = {arm.options["recipe"] for e in plan.EXPERIMENTS.values() for arm in e.arms.values()}
    # `binary` is the plan's word for the recipe of several labels.
    used = used - {"binary"} | {"multilabel"}
    given = {
        n for n, f in vars(fits.recipes).items() if getattr(f, "__annotations__", {}).get("return") == "Plan"
    }
    assert {name for name in given if not name.startswith("_")} <= used


@pytest.mark.parametrize("name", plan.EXPERIMENTS)
def test_arms_have_equal_budgets_and_no_configuration_twice(name: str) -> None:
    experiment = plan.EXPERIMENTS[name]
    assert plan.budget(experiment) in (1, 3, 6)
    for arm in experiment.arms.values():
        assert len({json.dumps(c, sort_keys=True) for c in arm.grid}) == len(arm.grid)
        assert not {*arm.options} & {key for c in arm.grid for key in c}


def test_unequal_budgets_are_an_error() -> None:
    arms = {"a": plan.Arm("", {}, plan.over(lr=(1.0, 2.0))), "b": plan.Arm("", {}, plan.over(lr=(1.0,)))}
    with pytest.raises(ValueError, match=r"as many configurations, got .*'a': 2, 'b': 1"):
        plan.budget(plan.Experiment("", "", "", 1, arms))


def test_the_plan_is_json() -> None:
    assert json.loads(json.dumps(plan.document()))["claims"].keys() == plan.CLAIMS.keys()


# Splits


def test_tuning_never_sees_the_test_split() -> None:
    """Seeds are for one or the other, and so are the rows that figures are of."""
    assert not {*plan.TEST_SEEDS} & {*plan.TUNING_SEEDS}
    tests = {tuple(fits.Digits.of(seed).held.tolist()) for seed in plan.TEST_SEEDS}
    assert len(tests) == 1
    test = {*next(iter(tests))}
    for seed in (*plan.TEST_SEEDS, *plan.TUNING_SEEDS):
        split = fits.Digits.of(seed)
        train, validation = {*split.train.tolist()}, {*split.validation.tolist()}
        assert (len(test), len(train), len(validation)) == (600, 1000, 197)
        assert not (test & train or test & validation or train & validation)
    for seed in plan.TUNING_SEEDS:
        split = fits.Digits.of(seed)
        assert split.held is split.validation
    with pytest.raises(ValueError, match="got 57"):
        fits.Digits.of(57)


def test_files_of_text_are_of_one_split() -> None:
    parts = strategies_text.files()
    assert sum(map(len, parts.values())) == len({path for part in parts.values() for path in part})
    assert all(len(part) > 10 for part in parts.values())


def test_masked_text_gives_the_masked_bytes_as_labels() -> None:
    (batch,) = strategies_text.masked("validation", 1, seed=0)
    hidden = batch["labels"] != -100
    assert (hidden.sum(1) == strategies_text.MASKED).all()
    assert (batch["input_ids"][hidden] == strategies_text.MASK).all()
    assert (batch["input_ids"][~hidden] < strategies_text.MASK).all()
    assert (batch["labels"][hidden] < strategies_text.MASK).all()


# What fits are made of


def test_a_shuffled_teacher_is_as_sure_of_the_same_class() -> None:
    v = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    teacher = fits.shuffled(torch.nn.Identity(), seed=3)
    found = teacher({"inputs": v})
    assert torch.equal(found.argmax(1), v.argmax(1)) and torch.equal(found.amax(1), v.amax(1))
    assert torch.equal(found.sort(1).values, v.sort(1).values)
    assert (found != v).sum() > 7 * 5
    assert torch.equal(found, teacher({"inputs": v}))


def test_the_best_bias() -> None:
    """Rows of class 1 win from a bias above 2 on; one of class 0 is lost from 5 on: 3.5 is in the middle."""
    z = torch.tensor([[2.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    assert fits.best_bias(z, torch.tensor([1, 1, 0]), 1) == pytest.approx(3.5)


def test_digits_laid_over_each_other() -> None:
    """One to three labels; where there is one digit, the image is one of the split's."""
    index = fits.Digits.of(0).held
    x, y = fits.laid_over(index, 200, torch.Generator().manual_seed(0))
    assert {*y.sum(1).tolist()} <= {1.0, 2.0, 3.0}
    images, labels = fits.rows(index)
    alike = (x[:, None] == images).all(-1)  # [200, 600]
    single = alike.any(1)
    assert 30 < single.sum() < 110
    assert (y[single].argmax(1) == labels[alike[single].int().argmax(1)]).all()


def test_noise_of_the_teacher_moves_no_mean(tmp_path: Path) -> None:
    """In units of what chance does: about 1 for noise of the teacher, much more for the student's."""
    lab, loud = fits.Lab(tmp_path, 0.2), {"sigma": 0.5, "probability": 1.0}
    teacher = fits.gradients(lab, 0, 100, "noisy_teacher", **loud)
    student = fits.gradients(lab, 0, 100, "noisy_student", **loud)
    clean = fits.gradients(lab, 0, 100, "clean")
    assert clean["bias"] == 0.0
    assert teacher["variance"] > 1.3 * clean["variance"]
    assert 0.2 < teacher["bias"] < 3.0 < student["bias"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> fits.Lab:
    """Teachers of a few steps."""
    return fits.Lab(tmp_path_factory.mktemp("lab"), 0.002)


@pytest.mark.parametrize(("name", "arm"), [(n, a) for n, e in plan.EXPERIMENTS.items() for a in e.arms])
def test_every_arm_runs_and_says_what_its_claims_need(name: str, arm: str, lab: fits.Lab) -> None:
    experiment = plan.EXPERIMENTS[name]
    options = {**experiment.arms[arm].options, **experiment.arms[arm].grid[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies_text, "HELD_BATCHES", 1)
        found = strategies.FITS[experiment.fit](lab, plan.TUNING_SEEDS[0], 3, **options)
    needed = {c.metric for c in plan.CLAIMS.values() if c.experiment == name}
    assert needed | {experiment.tuned_on, experiment.shown} <= {*found}
    assert all(isinstance(value, float) for value in found.values()) and "diverged" not in found


def test_a_fit_depends_on_its_seed_alone(tmp_path: Path) -> None:
    """Not on what was done before it, so that an interrupted run finds what a whole one does."""
    options = {"recipe": "hinton", "temperature": 4.0, "hard_weight": 0.5, "lr": 1e-2}
    first = fits.classify(fits.Lab(tmp_path, 0.05), 1, 10, **options)
    used = fits.Lab(tmp_path, 0.05)
    fits.classify(used, 0, 10, **options)
    fits.classify(used, 1, 10, recipe="labels", lr=1e-2)
    assert fits.classify(used, 1, 10, **options) == first


# A run


SMALL = plan.Experiment(
    "hinton",
    "classify",
    "small",
    8,
    {
        "hard": plan.Arm("labels", {"recipe": "labels"}, plan.over(lr=(1e-2, 1e-3))),
        "soft": plan.Arm("soft", {"recipe": "hinton", "hard_weight": 0.5}, plan.over(lr=(1e-2, 1e-3))),
    },
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of one experiment, two arms of two configurations, two seeds of each kind."""
    monkeypatch.setattr(plan, "EXPERIMENTS", {"small": SMALL})
    monkeypatch.setattr(plan, "CLAIMS", {"small.soft": plan.Claim("It works.", "small", "soft", "hard")})
    monkeypatch.setattr(plan, "TEST_SEEDS", (10, 11))
    monkeypatch.setattr(fits, "TEACHER_STEPS", 5)


@pytest.mark.usefixtures("small")
def test_a_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tuned, tested, written; the second time nothing is done again, and one lost fit alone."""
    arguments = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert strategies.main(arguments) == 0
    said = capsys.readouterr().out
    assert "in all, with this machine as it is" in said and "tuning: 6 steps" in said
    document = json.loads((tmp_path / "out" / "strategies.json").read_text())
    assert len(document["cells"]) == 2 * 2
    for arm, of_arm in document["tuning"].items():
        best = max(range(2), key=lambda n: fmean(of_arm[n]))
        assert [len(seeds) for seeds in of_arm] == [2, 2] and document["chosen"][arm] == best
    claim = document["claims"]["small.soft"]
    by_arm = report.arms(document)
    figures = {arm: [c["metrics"]["accuracy"] for c in cells] for (_, arm), cells in by_arm.items()}
    assert claim["mean"] == pytest.approx(fmean(figures["soft"]) - fmean(figures["hard"]))
    assert (claim["n"], claim["verdict"]) == (2, stats.NULL)
    text = (tmp_path / "out" / "strategies.md").read_text()
    assert "| small.soft | It works." in text and "1 claims: 0 reproduced, 1 null" in text
    assert (tmp_path / "out" / "strategies" / "hinton.png").stat().st_size > 1000

    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json")}
    lost = next(p for p in files if p.match("soft/*-11.json"))
    lost.unlink()
    assert strategies.main(arguments) == 0
    assert "test: 1 steps" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json")}
    assert {p for p in files if after[p] != files[p]} == {lost}
    again = json.loads((tmp_path / "out" / "strategies.json").read_text())
    assert again["claims"] == document["claims"]


@pytest.mark.usefixtures("small")
def test_a_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds of the validation split, a part of the steps, nothing tuned, the first configuration."""
    arguments = ["--quick", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert strategies.main(arguments) == 0
    assert "nothing was tuned" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "strategies.json").read_text())
    found = {(c["seed"], c["configuration"], c["steps"]) for c in document["cells"]}
    assert found == {(seed, 0, round(8 * plan.QUICK_SHARE)) for seed in plan.QUICK_SEEDS}
    assert {len(cells) for cells in report.arms(document).values()} == {2}


def test_processes_share_the_fits(tmp_path: Path) -> None:
    """What they find is what one finds: a fit depends on its seed, and on the threads of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of several processes
    cells = [strategies.Cell("noise-gradients", "clean", 0, seed) for seed in plan.QUICK_SEEDS]
    found = []
    for jobs in (1, 2):
        runs = strategies.Runs(tmp_path / str(jobs), 0.02)
        runs.all("test", cells, bench.Progress(), jobs)
        found.append([runs.done[cell]["metrics"] for cell in cells])
    torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.usefixtures("small")
def test_fits_of_another_plan_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a fit depends on changes its fingerprint; a file cut short is no fit."""
    runs, cell = strategies.Runs(tmp_path), strategies.Cell("small", "hard", 0, 10)
    runs.do(cell)
    assert strategies.Runs(tmp_path).read(cell) is not None
    assert strategies.Runs(tmp_path, 0.5).read(cell) is None
    with monkeypatch.context() as patch:
        patch.setattr(plan, "VERSION", plan.VERSION + 1)
        assert strategies.Runs(tmp_path).read(cell) is None
    path = cell.path(tmp_path)
    path.write_text(path.read_text()[:20])
    assert strategies.Runs(tmp_path).read(cell) is None


@pytest.mark.usefixtures("small")
def test_tuning_takes_the_best_mean(tmp_path: Path) -> None:
    runs = strategies.Runs(tmp_path)
    scores = {(0, 100): 90.0, (0, 101): 70.0, (1, 100): 81.0, (1, 101): 81.0}
    for (configuration, seed), score in scores.items():
        runs.done[strategies.Cell("small", "hard", configuration, seed)] = {"metrics": {"accuracy": score}}
    assert strategies.chosen(runs, "small", "hard") == 1


def test_the_prediction_counts_all_fits(tmp_path: Path) -> None:
    """From one fit at a quarter of the steps: 6 configurations on 2 seeds, 10 test seeds, 12 teachers."""
    runs = strategies.Runs(tmp_path, 0.25)
    found: dict[str, Any] = {"seconds": 1.0, "steps": 100, "teachers": {"wide": 0.5}}
    runs.done[strategies.Cell("hinton", "t4", 0, 0)] = found
    assert strategies.predicted(runs, [("hinton", "t4")]) == pytest.approx(4.0 * (12 + 10) + 4 * 0.5 * 12)


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (None, len(plan.CLAIMS)),
        ("hinton.dark", 1),
        ("dkd,hinton.dark", 4),
        ("noisy_teacher", 4),
        ("mythical", 2),
    ],
)
def test_selecting_claims(only: str | None, count: int) -> None:
    assert len(strategies.selected(only)) == count


def test_selecting_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="got 'nothing'"):
        strategies.selected("dkd,nothing")


def test_the_plan_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert strategies.main(["--plan"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == plan.VERSION
