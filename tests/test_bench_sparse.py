"""``python -m benchmarks sparse``: its eager forms are the losses, wrong ones are not timed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import sparse

SETTINGS = sparse.Settings("cpu", "float32", 6, 400, 9, 1, 1)


@pytest.fixture(scope="module")
def inputs() -> sparse.Inputs:
    return sparse.Inputs(SETTINGS, 2)


@pytest.mark.parametrize("name", sparse.CASES)
def test_every_spelling_is_the_loss(name: str, inputs: sparse.Inputs) -> None:
    case = inputs.case(name)
    for spelling in case.spellings.values():
        z = inputs.sets[0][0]
        value = spelling(z)
        wide = z.detach().double().requires_grad_()
        exact = case.truth(wide).mean()
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-6)
        (ours,), (theirs,) = (torch.autograd.grad(x, y) for x, y in ((value, z), (exact, wide)))
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6)


def test_a_wrong_loss_is_not_timed(inputs: sparse.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    right = inputs.case("forward_kl, ghost")
    wrong = dataclasses.replace(right, truth=lambda z: 1.01 * right.truth(z))
    monkeypatch.setattr(inputs, "case", lambda name: wrong)
    with pytest.raises(RuntimeError, match="kd_loss of forward_kl, ghost is wrong"):
        sparse.time_case("forward_kl, ghost", inputs, SETTINGS)


def test_the_report(tmp_path: Path) -> None:
    path, threads = tmp_path / "found.json", torch.get_num_threads()
    options = ["--shape", "8x2000", "-k", "7", "--rounds", "1", "--only", "forward_kl, ghost", "sampled"]
    try:
        assert sparse.main([*options, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    document = json.loads(path.read_text())
    assert {*document["cases"]} == {"forward_kl, ghost", "sampled"} and document["settings"]["k"] == 7
    best = {"stored": 2.0, "dense": 3.0, "eager a": 14.0, "eager b": 12.0, "read and write": 1.0}
    for found in document["cases"].values():
        found["best_ms"] = best
    document["peaks"] = dict.fromkeys(document["cases"], 0.004)
    assert sparse.targets(document) == []
    (row, _) = sparse.table(document)
    assert row[1:8] == ["2.00", "3.00", "1.50", "12.0", "6.0", "50 %", "0.40 %"]
    slow = copy.deepcopy(document)
    slow["cases"]["forward_kl, ghost"]["best_ms"] = {**best, "dense": 2.5, "eager b": 9.0}
    slow["peaks"]["sampled"] = 0.02
    assert [line.split(":")[0] for line in sparse.targets(slow)] == ["forward_kl, ghost"] * 2 + ["sampled"]
    assert "1.25 times as fast as the whole, 1.3 wanted" in sparse.markdown(slow)
