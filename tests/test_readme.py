"""The README is what people copy from: its code runs, and what it calls the same is the same."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from benchmarks import readme
from kdkernels import divergences

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
V = 50
TABLE = re.findall(r"^\| (.*) \| (`.*`) \|$", README.split("## You have this")[1].split("\n## ")[0], re.M)


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    """What a snippet registers is gone after it."""
    registered = set(divergences.TABLE)
    yield
    for name in set(divergences.TABLE) - registered:
        del divergences.TABLE[name]


def language_models() -> dict[str, Any]:
    """A student, a frozen teacher and a batch, where there is `transformers`."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"vocab_size": V, "intermediate_size": 8, "num_attention_heads": 2}
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(hidden_size=d, num_hidden_layers=1, pad_token_id=0, **size))
        for d in (8, 16)
    )
    ids = torch.randint(V, (2, 6))
    batch = {"input_ids": ids, "labels": ids}
    return {"student": student, "teacher": teacher.requires_grad_(False), "batch": batch}


@pytest.fixture
def names() -> dict[str, Any]:
    """What the README's snippets speak of."""
    z, v = torch.randn(2, 6, V, requires_grad=True), torch.randn(2, 6, V)
    y = torch.randint(V, (2, 6))
    return {
        "kd": kd, "torch": torch, "F": F, "z": z, "v": v, "y": y, "T": 2.0, "beta": 0.3, "s": 0.5,
        "student_logits": z, "teacher_logits": v, "input_ids": y,
        "count_over_all_of_them": 24, "completion_mask": torch.rand(2, 6) < 0.5,
        "x": torch.randn(2, 6, 4), "weight": torch.randn(V, 4, requires_grad=True),
        "t_x": torch.randn(2, 6, 3), "t_weight": torch.randn(V, 3),
        **language_models(),
        "ids": v.topk(5).indices, "log_probs": v.log_softmax(-1).topk(5).values,
        "drawn": torch.randint(V, (2, 6, 8)),
        "V": V, "alpha": 1.0, "targets": torch.rand(2, 6, V), "v1": v, "v2": v + 1, "v3": v.flip(-1),
    }  # fmt: skip


def test_the_table_was_found() -> None:
    assert len(TABLE) >= 8


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
TRAINER = [code for code in SNIPPETS if "kdkernels.train" in code]


@pytest.mark.parametrize("code", [code for code in SNIPPETS if code not in TRAINER])
def test_snippets_run(
    names: dict[str, Any], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<README>", "exec"), names)
    trained = {"student_logits": "z", "student_hidden": "student_hidden", "student = ": "student"}
    assert names[next(name for said, name in trained.items() if said in code)].grad is not None


def test_the_trainers_snippets_run(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other: the second goes on with the models of the first."""
    pytest.importorskip("accelerate")
    assert len(TRAINER) == 2
    for code in TRAINER:
        exec(compile(code, "<README>", "exec"), names)
    printed = capsys.readouterr().out
    assert all(f"'{name}'" in printed for name in ("soft", "hard", "hint", "loss", "accuracy"))


def test_the_diff_for_a_trainer_runs(names: dict[str, Any], tmp_path: Path) -> None:
    """What is left of the README's diff when it is applied."""
    pytest.importorskip("accelerate")
    transformers: Any = pytest.importorskip("transformers")
    names["args"] = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    names["data"] = [{"input_ids": row, "labels": row} for row in names["batch"]["input_ids"]]
    diff, _ = re.findall(r"```diff\n(.*?)```", README, re.S)
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    exec(compile(code, "<README>", "exec"), names)
    assert {"soft", "hard", "loss"} <= {*names["trainer"].state.log_history[0]}


def test_the_diff_for_trl_is_a_line_that_patches_it() -> None:
    pytest.importorskip("trl")
    from kdkernels.integrations import trl

    _, diff = re.findall(r"```diff\n(.*?)```", README, re.S)
    (added,) = (line[1:] for line in diff.splitlines() if line.startswith("+"))
    exec(compile(added, "<README>", "exec"), {})
    try:
        from trl.experimental.gkd import GKDTrainer

        assert GKDTrainer.generalized_jsd_loss is trl._of_logits
    finally:
        trl.unpatch()


def test_every_recipe_is_named() -> None:
    recipes = pytest.importorskip("kdkernels.train.recipes")
    table = README.split("| recipe | minimises |")[1].split("\n\n")[0]
    functions = inspect.getmembers(recipes, inspect.isfunction)
    made = {name for name, f in functions if f.__annotations__.get("return") in ("Plan", recipes.Plan)}
    assert "hinton" in made and set(re.findall(r"`(\w+)`", table)) == made


@pytest.mark.parametrize("code", [right for _, right in TABLE])
def test_what_the_table_says_to_write_runs(names: dict[str, Any], code: str, tmp_path: Path) -> None:
    if "kd.hf" in code:
        pytest.importorskip("transformers")
    if "group" not in code:
        exec(compile(code.strip("`"), "README.md", "exec"), names)
        return
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        names["group"] = torch.distributed.group.WORLD
        exec(compile(code.strip("`"), "README.md", "exec"), names)
    finally:
        torch.distributed.destroy_process_group()


def test_the_first_line_of_the_table_is_the_same_loss(names: dict[str, Any]) -> None:
    """`batchmean` divides by the first dimension alone, so that both sides are given rows."""
    names |= {"z": names["z"].flatten(0, 1), "v": names["v"].flatten(0, 1)}
    left, right = TABLE[0]
    ours, theirs = eval(right.strip("`"), names), eval(left.strip("`"), names)
    torch.testing.assert_close(ours, theirs)


def test_shifting_labels_is_slicing_logits(names: dict[str, Any]) -> None:
    """The table's second line: `kd.shift_labels` keeps every row that has a successor, and only those."""
    z, v, y = names["z"], names["v"], names["y"]
    ours = kd.kd_loss(z, v, kd.shift_labels(y), temperature=2.0, hard_weight=0.1)
    z, v, y = z[:, :-1].flatten(0, 1), v[:, :-1].flatten(0, 1), y[:, 1:].flatten()
    soft = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(v / 2, -1), reduction="batchmean") * 4
    torch.testing.assert_close(ours, soft + 0.1 * F.cross_entropy(z, y))


def test_other_lines_of_the_table_are_the_same_losses(names: dict[str, Any]) -> None:
    """Mean squared error of logits, DKD by its paper, one question a class, and an ensemble's mean."""
    z, v, y, targets = names["z"], names["v"], names["y"], names["targets"]
    close = torch.testing.assert_close
    close(kd.kd_loss(z, v, divergence=kd.LogitMSE(), soft_weight=2 / V), F.mse_loss(z, v))
    hard = kd.kd_loss(z, v, targets, divergence=kd.BinaryKL(), soft_weight=0.0, hard_weight=1.0)
    close(hard / V, F.binary_cross_entropy_with_logits(z, targets))
    p, q = F.softmax(v / 2, -1), F.softmax(z / 2, -1)
    t = F.one_hot(y, V).bool()
    p_t, q_t = p[t], q[t]
    tckd = p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()
    others_p, others_q = p[~t].view(12, -1) / (1 - p_t)[:, None], q[~t].view(12, -1) / (1 - q_t)[:, None]
    nckd = (others_p * (others_p / others_q).log()).sum(-1)
    ours = kd.kd_loss(z, v, y, divergence=kd.DKD(1.5, 8), temperature=2.0, hard_weight=1.0)
    close(ours, 4 * (1.5 * tckd + 8 * nckd).mean() + F.cross_entropy(z.flatten(0, 1), y.flatten()))
    teachers = [names["v1"], names["v2"], names["v3"]]
    mean = sum(F.softmax(x / 2, -1) for x in teachers) / 3
    theirs = F.kl_div(F.log_softmax(z / 2, -1).flatten(0, 1), mean.flatten(0, 1), reduction="batchmean") * 4  # type: ignore[union-attr]
    close(kd.kd_loss(z, kd.Mixture(teachers), temperature=2.0), theirs)
    x, weight, t_x, t_weight = (names[name] for name in ("x", "weight", "t_x", "t_weight"))
    ours = kd.kd_loss(kd.Head(x, weight), kd.Head(t_x, t_weight), y, hard_weight=0.1)
    close(ours, kd.kd_loss(x @ weight.T, t_x @ t_weight.T, y, hard_weight=0.1))


def test_what_the_readme_says_is_printed(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """How rows are taken, in the words of `kd.explain`."""
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "kd.Head(" in code)
    exec(snippet, names)
    said = re.search(r"# \.\.\. (heads: .*)", snippet)
    assert said is not None and said[1] in capsys.readouterr().out


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    """Between the marks is what `python -m benchmarks readme` makes of the committed figures."""
    text = page.read_text(encoding="utf-8")
    named = [found[2] for found in readme.PLACE.finditer(text)]
    assert len(named) == text.count("<!-- table:") == text.count("<!-- end -->")
    assert not readme.out_of_step(page)
    if page.name == "README.md":
        assert {*named} == readme.TABLES.keys() - {"first"}


def test_a_figure_that_was_changed_is_out_of_step(tmp_path: Path) -> None:
    text = readme.PAGES[0].read_text(encoding="utf-8")
    changed = tmp_path / "README.md"
    changed.write_text(re.sub(r"(forward KL +\| +)([0-9.]+)", r"\g<1>9.99", text, count=1), encoding="utf-8")
    assert readme.out_of_step(changed) == ["losses"]
