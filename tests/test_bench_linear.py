"""``python -m benchmarks linear``: what it times is the same loss, and its report says what was measured."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from benchmarks import linear

SETTINGS = linear.Settings("cpu", "float32", 6, 203, (5, 7), 1, 1)


@pytest.mark.parametrize("divergence", linear.EAGER)
def test_contestants_compute_the_same_loss(divergence: str) -> None:
    """Ours in one chunk and in several, eager, and every peer that is installed."""
    inputs = linear.Inputs(SETTINGS)
    truth = inputs.truth(divergence, rows=4)
    found, missing = linear.contestants("cpu")
    assert {*found, *missing} == {*linear.BUDGETS["cpu"], "eager", *linear.PEERS}
    few = linear.job_of(inputs.student(), inputs.teacher())
    size = linear.plan(few, (True, True, False), 2, False).bytes
    found["in chunks"] = lambda i, d: linear.ours(i, d, memory_budget=size)
    for loss in found.values():
        assert max(linear.errors(linear.step(loss, inputs, divergence), truth).values()) < 1e-5


@pytest.mark.parametrize("chunk", [2, 4, 6])
def test_the_products_are_those_of_a_step(chunk: int) -> None:
    """Logits of both sides, and from what lies in the place of their gradient the two gradients."""
    inputs = linear.Inputs(SETTINGS)
    products = linear.Products(inputs, chunk)
    products(0)
    x, weight = inputs.x.detach(), inputs.weight.detach()
    z = x @ weight.T
    torch.testing.assert_close(products.dx, z @ weight)
    torch.testing.assert_close(products.dw, z.T @ x)
    last = 6 - (6 - 1) // chunk * chunk
    torch.testing.assert_close(products.v[:last], (inputs.t_x @ inputs.t_weight.T)[-last:])


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run, small, without peers."""
    path = tmp_path_factory.mktemp("bench") / "found.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "PEERS", {"nobody": ("a_module_that_is_not_there", linear.eager)})
        patch.setitem(linear.MEMORY, "cpu", ((8,), (1 << 20, None)))
        arguments = ["--shape", "8x2000", "--widths", "5", "7", "--rounds", "1", "--json", str(path)]
        assert linear.main(arguments) == 0
    return json.loads(path.read_text())


def test_the_report_says_what_was_found(document: dict[str, Any]) -> None:
    """Every part, and what could not be measured."""
    text = linear.markdown(document)
    assert "N = 8, V = 2,000, student 5 and teacher 7 wide" in text
    for name in ("products, 8 rows", "kd_loss, forward_kl", "eager, jsd"):
        assert document["times"][linear.AS_IT_COMES]["best_ms"][name] > 0 and f"| {name}" in text
    assert {m["budget"] for m in document["memory"]} == {1 << 20, None}
    assert all(m["first"] is None or m["first"] >= m["peak"] >= 0 for m in document["memory"])
    assert set(document["errors"]) == set(linear.SAME)


def test_what_is_missed_is_named(document: dict[str, Any]) -> None:
    """Each target, by a figure that misses it."""
    good = copy.deepcopy(document)
    found = good["times"][linear.AS_IT_COMES]
    good["times"] = {linear.AS_IT_COMES: found}
    found["best_ms"] = {"products, 8 rows": 10.0, "kd_loss, forward_kl": 10.9, "kd_loss, jsd": 12.4}
    good["memory"] = [{**good["memory"][0], "budget": 100, "peak": 109}]
    for e in good["errors"].values():
        e["kd_loss"] = e["kd_loss, in chunks"] = e["eager"]
    assert linear.targets(good) == []

    def slower(divergence: str, ms: float) -> Any:
        return lambda d: d["times"][linear.AS_IT_COMES]["best_ms"].update({f"kd_loss, {divergence}": ms})

    warm = copy.deepcopy(good)
    warm["times"] = {linear.AS_IT_COMES: {"best_ms": {}}, linear.WARM: found}
    assert linear.targets(warm) == []

    wrong = {"loss": 0.0, "hidden": 0.0, "weight": 9.0}
    for change, said in (
        (slower("forward_kl", 11.1), "kd_loss, forward_kl, allocator as it comes: 1.11 times"),
        (slower("jsd", 12.6), "kd_loss, jsd, allocator as it comes: 1.26 times"),
        (
            lambda d: d["times"][linear.AS_IT_COMES]["best_ms"].pop("kd_loss, jsd"),
            "jsd, allocator as it comes: not",
        ),
        (lambda d: d["memory"][0].update({"peak": 111}), "8 rows: 111 bytes"),
        (lambda d: d["errors"]["bfloat16"].update({"kd_loss": wrong}), "error of weight 9"),
    ):
        bad = copy.deepcopy(good)
        change(bad)
        missed = linear.targets(bad)
        assert len(missed) == 1 and said in missed[0], missed
        assert missed[0] in linear.notes(bad)[-1]
