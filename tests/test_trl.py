"""TRL's functions and their replacements return the same, where TRL has these; elsewhere it is refused."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
import trl
from packaging.version import Version
from torch import Tensor

from kdkernels.integrations import trl as ours

B, S, V = 3, 7, 41
ROOT = Path(__file__).parent.parent


def why_not() -> str | None:
    """Why this TRL can't be patched, or None."""
    try:
        with ours.patched():
            return None
    except RuntimeError as error:
        return str(error)


REFUSED = why_not()
patchable = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED)[:100])


def test_the_releases_that_are_named_are_patched_and_older_ones_refused() -> None:
    """From the one that docs/migrating.md names to the tested one; of a newer one nothing is promised."""
    here = Version(trl.__version__)
    first = re.search(r"TRL (\d+\.\d+) or later", (ROOT / "docs" / "migrating.md").read_text("utf-8"))
    tested = re.search(r"^trl==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert first is not None and tested is not None
    if here < Version(first[1]):
        assert REFUSED is not None and re.search(r"TRL.*use a version", REFUSED) and not ours._ORIGINALS
    elif here <= Version(tested[1]):
        assert REFUSED is None


def problem(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = (torch.rand(B, S, generator=generator) < 0.6).long()
    return {
        "student_hidden_states": draw(B, S, 8), "teacher_hidden_states": draw(B, S, 12),
        "student_lm_head_weight": draw(V, 8), "teacher_lm_head_weight": draw(V, 12), "completion_mask": mask,
    }  # fmt: skip


CASES: list[dict[str, Any]] = [
    {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.1}, {"beta": 0.5, "temperature": 2.0},
    {"beta": 0.5, "num_items_in_batch": torch.tensor(37)}, {"beta": 0.0, "num_items_in_batch": 19},
    {"beta": 0.1, "student_logit_scale": 0.25, "teacher_logit_scale": 4.0, "temperature": 0.7},
    {"beta": 0.5, "student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0},
    {"beta": 0.5, "completion_mask": torch.zeros(B, S)},
]  # fmt: skip


def both(given: dict[str, Any], learnt: list[str]) -> list[list[Tensor]]:
    """Of TRL's function and of ours: loss, entropy sum, count, and gradients."""
    from trl.trainer import distillation_trainer

    found = []
    for patched in (False, True):
        parts = {name: given[name].clone().requires_grad_() for name in learnt}
        with ours.patched() if patched else contextlib.nullcontext():
            loss, entropy, count = distillation_trainer._chunked_divergence_loss(**{**given, **parts})
        assert not entropy.requires_grad or not patched
        found.append([loss, entropy, count, *torch.autograd.grad(loss, list(parts.values()))])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
    return found


HEAD = ["student_hidden_states", "student_lm_head_weight"]


@patchable
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads(case: dict[str, Any], bias: bool) -> None:
    given = problem(torch.float32)
    if bias:
        given |= {f"{side}_lm_head_bias": torch.linspace(-1, 1, V) for side in ("student", "teacher")}
    for a, b in zip(*both({**given, **case}, [*HEAD, *["student_lm_head_bias"] * bias]), strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2e-4, atol=2e-6)


@patchable
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_heads_in_every_combination(beta: float, temperature: float) -> None:
    """Of masks that are ragged, full and empty, scales and softcaps."""
    masks = problem()["completion_mask"], torch.ones(B, S), torch.zeros(B, S)
    for mask, scale, cap in itertools.product(masks, (1.0, 0.25, 4.0), (None, 3.0)):
        given = problem(torch.float32) | {
            "completion_mask": mask, "beta": beta, "temperature": temperature, "student_logit_scale": scale,
            "teacher_logit_scale": 2.0, "student_final_logit_softcapping": cap,
            "teacher_final_logit_softcapping": cap and 5.0,
        }  # fmt: skip
        for a, b in zip(*both(given, HEAD), strict=True):
            torch.testing.assert_close(b, a, rtol=2e-4, atol=1e-5, msg=lambda m: f"{m}\n{scale} {cap} {mask}")  # noqa: B023


@patchable
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32])
def test_heads_in_other_precisions(weight: torch.dtype) -> None:
    """Losses and counts are float32's, gradients have what they are of; heads may be kept more precise."""
    hidden = torch.bfloat16 if weight == torch.float32 else weight
    given = problem(torch.float32)
    for name, x in given.items():
        given[name] = x.to(hidden if "hidden" in name else weight if "weight" in name else x.dtype)
    for a, b in zip(*both({**given, "beta": 0.5}, HEAD), strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2e-2, atol=1e-2 * float(a.abs().max()))


@patchable
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_logits(beta: float, labelled: bool, reduction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    z, v = (torch.randn(B, S, V, generator=generator) for _ in range(2))
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels = labels.masked_fill(torch.rand(B, S, generator=generator) < 0.4, -100) if labelled else None
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    for items, temperature in itertools.product((None, torch.tensor(11), 13), (0.7, 1.0, 2.0)):
        found = []
        for patched in (False, True):
            z = z.detach().requires_grad_()
            if patched:
                ours.patch()
            try:
                loss = GKDTrainer.generalized_jsd_loss(z, v, labels, beta, temperature, reduction, items)
            finally:
                ours.unpatch()
            found.append((loss, *torch.autograd.grad(loss.sum(), z)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@patchable
def test_what_was_there_is_put_back() -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer import distillation_trainer

    def now() -> tuple[Any, Any]:
        return distillation_trainer._chunked_divergence_loss, GKDTrainer.generalized_jsd_loss

    before = now()
    with pytest.raises(KeyboardInterrupt), ours.patched():
        assert now() == (ours._of_heads, ours._of_logits)
        ours.patch()
        with ours.patched():
            pass
        assert now() == (ours._of_heads, ours._of_logits)
        raise KeyboardInterrupt
    assert now() == before
    assert isinstance(inspect.getattr_static(GKDTrainer, "generalized_jsd_loss"), staticmethod)
    ours.unpatch()
    assert now() == before


@patchable
def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import distillation_trainer

    before = distillation_trainer._chunked_divergence_loss

    def other(student_hidden_states: Any, beta: float) -> None:
        """As a later version might have it."""

    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", other)
    with pytest.raises(RuntimeError, match=r"_divergence_loss of TRL .* takes student_hidden_states, beta,"):
        ours.patch()
    assert distillation_trainer._chunked_divergence_loss is other and not ours._ORIGINALS
    changed = functools.partial(before, temperature=2.0)  # the same names, another default
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", changed)
    with pytest.raises(RuntimeError, match=r"takes .*temperature=2\.0, and this was .*temperature=1\.0: use"):
        ours.patch()
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    with pytest.raises(RuntimeError, match=r"this TRL has no .*_chunked_divergence_loss"):
        ours.patch()


@patchable
@pytest.mark.parametrize("which", ["gkd", "distillation"])
def test_twenty_steps_of_training(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curves of both trainers are the same, patched or not, and each step's loss was made here."""
    calls: list[str] = []
    for name in ("kd_loss", "kd_loss_with_stats"):
        own = getattr(ours, name)
        monkeypatch.setattr(
            ours, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
        )
    datasets = pytest.importorskip("datasets")
    from test_hf_trainer import V as words
    from test_hf_trainer import llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({f"w{n}": n for n in range(words)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0", eos_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    asked = [f"w{3 + n % 40} w{5 + n % 30}" for n in range(40)]
    said = [" ".join(f"w{2 + (n * k) % 45}" for k in range(1, 7)) for n in range(40)]
    rows: list[Any] = [{"prompt": a} for a in asked]
    if which == "gkd":
        roles = "user", "assistant"
        rows = [
            {"messages": [{"role": r, "content": c} for r, c in zip(roles, both, strict=True)]}
            for both in zip(asked, said, strict=True)
        ]
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 20, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "bf16": False, "learning_rate": 1e-2, "disable_tqdm": True,
        "lmbda": 0.0, "beta": 0.5, "max_completion_length": 6,
    }  # fmt: skip
    curves = []
    for patch in (False, True):
        student, teacher = llama(8), llama(12, seed=5)
        if which == "gkd":
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            kind: Any = GKDTrainer
            kept = {name: x for name, x in options.items() if name != "max_completion_length"}
            args: Any = GKDConfig(output_dir=str(tmp_path), temperature=0.9, **kept)
        else:
            kind = trl.DistillationTrainer
            known = inspect.signature(trl.DistillationConfig).parameters
            args = trl.DistillationConfig(
                output_dir=str(tmp_path), **{name: x for name, x in options.items() if name in known}
            )
        trainer = kind(
            student, teacher_model=teacher, args=args, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        if patch:
            with ours.patched():
                trainer.train()
        else:
            trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert calls == 20 * ["kd_loss" if which == "gkd" else "kd_loss_with_stats"]
    assert len(curves[0]) == 20 and curves[0][0] != curves[0][-1]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3, abs=1e-5)
