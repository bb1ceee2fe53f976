"""The pages of docs/: their Python runs, what is called the same is the same, and promises have tests."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels import divergences

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
# Pages whose snippets another file runs, with what they need.
ELSEWHERE = {
    "audit.md": "test_audit.py",
    "cached-teachers.md": "test_cache_cli.py",
    "data-parallel.md": "test_fsdp.py",
    "distill.md": "test_distill.py",
    "parallel.md": "test_parallel.py",
    "scale.md": "test_bench_scale.py",
    "strategies.md": "test_docs.py",
}
V = 50
Names = dict[str, Any]


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def snippets(page: str, kind: str = "python") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text(page), re.M | re.S)


PAGES = sorted(path.name for path in DOCS.glob("*.md"))
HERE = [page for page in PAGES if snippets(page) and page not in ELSEWHERE]


@pytest.fixture(autouse=True)
def _left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a snippet registers or patches is gone after it."""
    monkeypatch.chdir(tmp_path)
    registered = set(divergences.TABLE)
    yield
    for name in set(divergences.TABLE) - registered:
        del divergences.TABLE[name]
        divergences.DEFAULTS.pop(name, None)
    if importlib.util.find_spec("trl") is not None:
        from kdkernels.integrations import trl

        trl.unpatch()


def prelude(page: str) -> Names:
    """What a page's snippets speak of without making it."""
    generator = torch.Generator().manual_seed(0)

    def normals(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if page == "choosing.md":
        return {"student": normals(6, V), "teacher": normals(6, V), "labels": torch.arange(6)}
    if page != "migrating.md":
        return {}
    labels = torch.tensor([3, -100, 7, 0, 49, 12])
    input_ids = torch.arange(12).view(2, 6)
    lp = normals(6, V).log_softmax(-1)
    return {
        "F": F, "kd": kd, "T": 2.0, "beta": 0.3, "alpha": 0.5, "labels": labels, "input_ids": input_ids,
        "z": normals(6, V).requires_grad_(), "v": normals(6, V),
        "z3": normals(2, 6, V).requires_grad_(), "v3": normals(2, 6, V),
        "labels3": torch.where(input_ids % 3 == 0, -100, input_ids), "mask": input_ids % 4 != 0,
        "x": normals(6, 4).requires_grad_(), "weight": normals(V, 4).requires_grad_(),
        "t_x": normals(6, 3), "t_weight": normals(V, 3),
        "ids": lp.topk(5).indices, "log_probs": lp.topk(5).values, "original_loss": torch.tensor(1.0),
    }  # fmt: skip


def test_no_page_is_left_out() -> None:
    """A page with Python is here, or in a file of tests that speaks of it."""
    for page, file in ELSEWHERE.items():
        assert snippets(page), f"{page} has none"
        assert page in (TESTS / file).read_text(encoding="utf-8"), f"{file} doesn't speak of {page}"
    assert {"index.md", "choosing.md", "extending.md", "migrating.md", "troubleshooting.md"} <= set(HERE)


@pytest.mark.parametrize("page", HERE)
def test_snippets_run(page: str) -> None:
    """One after the other, in one namespace."""
    if "kdkernels.train" in text(page) and page == "extending.md":
        pytest.importorskip("accelerate")
    if page == "migrating.md":
        pytest.importorskip("trl")
    names = prelude(page)
    for code in snippets(page):
        exec(compile(code, page, "exec"), names)


DIFFS = snippets("migrating.md", "diff")


def side(diff: str, sign: str) -> str:
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[:1] in (sign, " "))


def computed(diff: str, sign: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of a side, and its gradients."""
    names = prelude("migrating.md")
    learns = [names[name] for name in ("z", "z3", "x", "weight")]
    exec(compile(side(diff, sign), "migrating.md", "exec"), names)
    gradients = torch.autograd.grad(names["loss"], learns, materialize_grads=True, allow_unused=True)
    return names["loss"].detach(), list(gradients)


@pytest.mark.parametrize("diff", DIFFS, ids=[str(n) for n in range(len(DIFFS))])
def test_what_is_written_gives_what_was_there(diff: str) -> None:
    """Loss and gradients; where what was there is of a library that isn't here, what is written runs."""
    ours = computed(diff, "+")
    assert ours[0].isfinite() and any(g.any() for g in ours[1])
    if "original_loss" in diff:
        return  # of which the page says that it is another number
    library = re.search(r"^-from (\w+)", diff, re.M)
    if library is not None and importlib.util.find_spec(library[1]) is None:
        pytest.skip(f"{library[1]} is not installed; what is to be written was run")
    theirs = computed(diff, "-")
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    for got, wanted in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_one_block_says_that_it_differs() -> None:
    before = text("migrating.md").split("original_loss")[0]
    assert "not the same number" in before.rsplit("```", 1)[0][-200:]
    assert len(DIFFS) >= 12 and sum("original_loss" in diff for diff in DIFFS) == 1


def test_infinities_are_what_the_tables_say() -> None:
    """Of a class that both exclude, eager's KL is NaN, and ours the limit."""
    names = prelude("migrating.md")
    z, v = names["z"].detach().clone(), names["v"].clone()
    z[:, 5] = v[:, 5] = -torch.inf
    assert F.kl_div(F.log_softmax(z, -1), F.softmax(v, -1), reduction="batchmean").isnan()
    kept = torch.arange(V) != 5
    torch.testing.assert_close(kd.kd_loss(z, v), kd.kd_loss(z[:, kept], v[:, kept]))


def test_every_promise_has_its_test() -> None:
    """By file and name; and there is no promise without one."""
    page = text("reliability.md")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page.split("| promise | kept by |")[1].split("\n\n")[0], re.M)
    assert len(rows) >= 35
    for promise, kept in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", kept)
        assert named, promise
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, (
                f"{file}::{name}"
            )


def figures(file: str) -> str:
    return (TESTS.parent / file).read_text(encoding="utf-8")


def test_figures_of_strategies_are_those_of_the_results() -> None:
    """Accuracies and differences on the page of choices, each as the table of results has it."""
    results, page = figures("benchmarks/results/strategies.md"), text("choosing.md")
    named = {
        "agreement.logit_mse": ("91.17", "78.12"), "agreement.forward_kl": ("90.43",),
        "agreement.jsd": ("90.13",),
        "agreement.reverse_kl": ("88.23",), "agreement.tvd": ("86.85",), "hinton.soft": ("91.33",),
        "hinton.hot": ("79.18",), "hinton.dark": ("75.90",), "transfer.unlabelled": ("93.87", "75.52"),
        "multilabel.soft": ("73.42", "66.44"), "agreement.kl_or_mse": ("0.73 ± 1.20",),
        "dkd.decoupled": ("0.98 ± 0.68",), "noise.teacher": ("0.00 ± 0.58",),
        "ensemble.labelled": ("0.55 ± 0.53",),
        "assistants.one": ("0.13 ± 0.73",), "born.second": ("0.22 ± 0.51",),
    }  # fmt: skip
    for claim, numbers in named.items():
        row = re.search(rf"^\| {re.escape(claim)} .*$", results, re.M)
        assert row is not None, claim
        assert all(number in row[0] and number in page for number in numbers), claim
    for temperature in re.findall(r"^\| T = (\d+) \| ([\d.]+) \|$", page, re.M):
        arm = re.search(rf"soft, T = {temperature[0]} .*?([\d.]+) ±", results)
        assert arm is not None and arm[1] == temperature[1]


def test_figures_of_times_are_those_of_the_readme() -> None:
    """The costs of choices, which stand in the README, too; the first page's table is made of results."""
    readme = figures("README.md")
    for said in re.findall(r"\| ([\d,.]+) \| ([\d,.]+) \| `", text("vocabularies.md")):
        assert all(n in readme + figures("benchmarks/results/hf-cpu.md") for n in said)


def test_the_oldest_versions_that_were_run_are_the_lower_bounds() -> None:
    """Of what docs/versions.md has a column for; a bound that moves has to be run again."""
    lines = text("versions.md").splitlines()
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines if "|" in line
    }
    asked = dict(re.findall(r'"([\w-]+)>=([\d.]+)', figures("pyproject.toml")))
    ran = dict(zip(rows["set"], rows["oldest"], strict=True))
    assert len(ran) == 9
    for name in ran.keys() - {"Python"}:
        assert re.match(rf"{re.escape(asked[name])}(\.0)*(\+|$)", ran[name]), name
