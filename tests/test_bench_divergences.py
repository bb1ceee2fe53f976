"""``python -m benchmarks divergences``: its eager forms are the divergences, its report says what is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import divergences
from kdkernels.divergences import TABLE, resolve

SETTINGS = divergences.Settings("cpu", "float32", 5, 203, 1, 1, False)


@pytest.fixture(scope="module")
def inputs() -> divergences.Inputs:
    return divergences.Inputs(SETTINGS, 2)


@pytest.mark.parametrize("name", divergences.OBJECTIVES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_eager_form_is_the_divergence(name: str, backend: str, inputs: divergences.Inputs) -> None:
    objective = divergences.OBJECTIVES[name]
    truth = inputs.truth(objective.eager, rows=2)
    for run in (inputs.ours(objective.options, backend=backend), inputs.eager(objective.eager)):
        loss, gradient = divergences.errors(run(0), truth)
        assert loss < 1e-5 and gradient < 2e-5


def test_every_divergence_is_measured() -> None:
    measured = {resolve(o.options["divergence"])[0] for o in divergences.OBJECTIVES.values()}
    assert measured == set(TABLE)


def test_a_wrong_loss_is_not_timed(inputs: divergences.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    right = divergences.OBJECTIVES["tvd"]
    monkeypatch.setitem(
        divergences.OBJECTIVES,
        "tvd",
        divergences.Objective(right.options, lambda *x: 1.01 * right.eager(*x), 0, 0),
    )
    with pytest.raises(RuntimeError, match="kd_loss of tvd is wrong"):
        divergences.time_objective("tvd", inputs, SETTINGS)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "found.json"
    threads = torch.get_num_threads()
    only = ["--only", "tvd", "teacher noise, jsd", "mixture"]
    try:
        done = divergences.main(
            ["--shape", "8x3000", "--rounds", "1", *only, "--no-compile", "--json", str(path)]
        )
    finally:
        torch.set_num_threads(threads)
    assert done == 0
    found = json.loads(path.read_text())
    found["markdown"] = Path(path.with_suffix(".md")).read_text()
    return found


def test_a_run(document: dict[str, Any]) -> None:
    assert set(document["divergences"]) == {"tvd"}
    assert set(document["extras"]) == {"teacher noise, jsd", "mixture of 3"}
    for times in (*document["divergences"].values(), *document["extras"].values()):
        assert all(t > 0 for t in times["best_ms"].values())
    assert "kd_loss on backend='cpu'" in document["markdown"]
    assert set(document["peaks"]) == {"tvd", "teacher noise, jsd", "mixture of 3"}
    table = [line.split("|")[1].strip() for line in document["markdown"].splitlines() if line.startswith("|")]
    assert [name for name in table if name in document["peaks"]] == [
        "tvd",
        "teacher noise, jsd",
        "mixture of 3",
    ]
    assert "not measured" in document["markdown"]  # torch.compile


def test_what_misses_a_target_is_named(document: dict[str, Any]) -> None:
    """Times and memory of our own making, so that every target is missed, and then met."""
    found = copy.deepcopy(document)
    tvd, noisy = found["divergences"]["tvd"], found["extras"]["teacher noise, jsd"]
    found["extras"].pop("mixture of 3")
    tvd["best_ms"] = {"kd_loss": 10.0, "eager": 20.0, "torch.compile": 9.0, "triad": 2.9}
    noisy["best_ms"] = {"kd_loss": 26.0, "without": 10.0, "eager": 25.0, "triad": 3.0}
    found["peaks"] = {"tvd": 1.2}
    assert divergences.targets(found) == [
        "tvd: 29 % of triad, 30 wanted",
        "tvd: slower than torch.compile",
        "teacher noise, jsd: 2.60 times the call without, 2.5 allowed",
        "teacher noise, jsd: slower than eager",
        "tvd: 1.20 gradient tensors at the peak, 1.15 allowed",
    ]
    tvd["best_ms"] |= {"kd_loss": 9.0, "triad": 2.8}
    noisy["best_ms"] |= {"kd_loss": 24.0}
    found["peaks"] = {"tvd": 1.1}
    assert divergences.targets(found) == []
