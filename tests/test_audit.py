"""Audits: every planted fault is said, and nothing is said of losses that are right."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken_losses import BROKEN, Broken
from torch import Tensor

import kdkernels as kd
from benchmarks import audit_losses
from benchmarks.audit import examined, summary, write
from kdkernels import audit_cli
from kdkernels.auditing import Audit, Line
from kdkernels.auditing.truth import Sides, families
from kdkernels.bench.eager import LABELS, SPELLINGS

ROOT = Path(__file__).parent.parent
BOTH, TEACHER_ONLY = "−inf logits on both sides", "−inf logits of the teacher only"


def wrong(scorecard: Audit) -> dict[str, str]:
    return {line.about: line.found for line in scorecard.wrong}


def line(scorecard: Audit, about: str) -> Line:
    """The line that is about this."""
    found = [each for each in scorecard.lines if each.about == about]
    assert len(found) == 1, f"{len(found)} lines about {about!r}"
    return found[0]


# Losses that are wrong


def test_there_are_twenty_faults_and_more() -> None:
    assert len(BROKEN) >= 20 and len({broken.loss for broken in BROKEN}) == len(BROKEN)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.loss.__name__)
def test_every_planted_fault_is_said(broken: Broken) -> None:
    """By the lines that must say it, in words; and no other line calls something else wrong."""
    found = wrong(kd.audit(broken.loss, **broken.tells))
    for about, words in broken.says.items():
        said = [text for name, text in found.items() if about in name]
        assert any(words in text for text in said), f"{about}: {words!r} is not in {said}"
    others = [name for name in found if not any(x in name for x in (*broken.says, *broken.also))]
    assert not others


# Losses that are right

OPTIONS: tuple[dict[str, Any], ...] = (
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl", "hard_weight": 0.5},
    {"divergence": "soft_cross_entropy"},
    {"divergence": kd.JSD(0.5), "reduction": "sum"},
    {"divergence": kd.JSD(0.1), "hard_weight": 2.0, "soft_weight": 0.3},
    {"divergence": kd.SkewKL(0.1)},
    {"divergence": kd.SkewReverseKL(0.3), "reduction": "none"},
    {"divergence": "tvd"},
    {"divergence": "squared_error"},
    {"divergence": kd.AlphaBeta(0.2, 0.7)},
    {"divergence": kd.AlphaBeta(1.0, 0.0), "t_squared": False},
    {"divergence": kd.DKD(1.0, 8.0)},
    {"divergence": kd.DKD(0.5, 2.0), "hard_weight": 1.0},
    {"divergence": kd.LogitMSE()},
    {"divergence": kd.LogitMSE(centered=True)},
    {"divergence": kd.BinaryKL()},
    {"divergence": "forward_kl", "pad_vocab": True, "hard_weight": 1.0},
)


def audited(options: dict[str, Any], backend: str) -> Audit:
    """Of `kd_loss`, told what its documentation says."""
    divergence = options["divergence"]
    labels = None if isinstance(divergence, kd.BinaryKL) else "auto"
    return kd.audit(
        kd.kd_loss, divergence=divergence, options={**options, "backend": backend}, labels=labels,
        teacher_gradient=False, shift=None if labels is None else "caller",
    )  # fmt: skip


def name_of(options: dict[str, Any]) -> str:
    return " ".join(str(x) for x in options.values())


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("where", ["reference", "cpu"])
def test_nothing_is_wrong_with_ours(where: str, options: dict[str, Any]) -> None:
    logits = torch.zeros(1, 2)
    if (why := kd.explain(logits, logits).reasons[where]) is not None:
        pytest.skip(why)
    scorecard = audited(options, where)
    assert scorecard.ok, wrong(scorecard)
    assert scorecard.counts["could not be examined"] == 0, str(scorecard)
    assert scorecard.counts["right"] >= 20


@pytest.mark.parametrize(
    ("divergence", "words"),
    [
        (kd.JSD(0.3), "JSD with β = 0.3"),
        (kd.SkewKL(0.2), "skew KL(p‖αp + (1−α)q) with α = 0.2"),
        (kd.SkewReverseKL(0.35), "skew reverse KL(q‖(1−α)p + αq) with α = 0.35"),
        (kd.AlphaBeta(0.4, 0.9), "α-β divergence with α = 0.4, β = 0.9"),
        (kd.DKD(1.5, 4.0), "DKD, 1.5 × the target's KL + 4 × the others'"),
        ("reverse_kl", "reverse KL(q‖p)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("hard_weight", [None, 0.25])
def test_parameters_and_weights_are_fitted(divergence: Any, words: str, hard_weight: float | None) -> None:
    options = {"divergence": divergence, "hard_weight": hard_weight, "backend": "reference"}
    found = line(kd.audit(kd.kd_loss, options=options), "which it is").found
    assert found == words + (", and 0.25 × cross-entropy with the label" if hard_weight else "")


def closed_form(z: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL with a hand-written gradient, and no trap in it."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, v: Tensor) -> Tensor:
            wide = [x if x.dtype == torch.float64 else x.float() for x in (z, v)]
            lq, lp = (F.log_softmax(x / temperature, -1) for x in wide)
            p = lp.exp()
            rows = torch.where(p == 0, 0.0, p * (lp - lq).nan_to_num(0.0, torch.inf, -torch.inf)).sum(-1)
            ctx.save_for_backward((temperature * (lq.exp() - p) / len(z)).to(z.dtype))
            return rows.mean() * temperature**2

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[0].to(gradient.dtype), None

    return Own.apply(z, v)  # type: ignore[no-any-return]


def test_nothing_is_wrong_with_a_closed_form() -> None:
    scorecard = kd.audit(closed_form)
    assert scorecard.ok, wrong(scorecard)
    assert line(scorecard, "T² in the loss and the gradient").verdict == "right"
    assert line(scorecard, "a teacher that requires grad").found == "gets no gradient"


def spelled(spelling: Callable[..., Tensor], hard_weight: float) -> Callable[..., Tensor]:
    def loss(z: Tensor, v: Tensor, labels: Tensor, temperature: float) -> Tensor:
        return spelling(z, v, labels, temperature, hard_weight)

    return loss


# 0 · (−inf) and 0 · (−inf + inf), the two limits that torch's own kl_div doesn't take.
AT_INFINITY = {
    "kl_div": {BOTH},
    "log_target": {BOTH, TEACHER_ONLY},
    "closed_form": {BOTH, TEACHER_ONLY},
}
# The derivative of its target is log 0 where a student's probability underflows: NaN.
UNDERFLOWS = {"margins of 120 and more", "logits of ±10,000"}


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize(
    ("divergence", "name"), [(d, name) for d, named in SPELLINGS.items() if d != LABELS for name in named]
)
def test_correct_eager_losses_are_wrong_nowhere_but_at_infinity(
    divergence: str, name: str, hard_weight: float
) -> None:
    loss = spelled(SPELLINGS[divergence][name], hard_weight)
    scorecard = kd.audit(loss, divergence=divergence, ignore_index=None)
    limits = {each.about for each in scorecard.lines if each.check == "limits" and "−inf" in each.about}
    beyond = UNDERFLOWS if name == "kl_div" and divergence in ("reverse_kl", "jsd") else set()
    assert beyond <= set(wrong(scorecard)) <= limits | beyond, wrong(scorecard)
    if divergence == "forward_kl":
        assert set(wrong(scorecard)) == AT_INFINITY[name]
    for about in (
        "which it is",
        "what it divides",
        "T² in the loss and the gradient",
        "gradient in bfloat16",
    ):
        assert line(scorecard, about).verdict == "right", str(line(scorecard, about))


def test_a_soft_cross_entropy_is_told_from_a_kl() -> None:
    def loss(z: Tensor, v: Tensor) -> Tensor:
        return F.cross_entropy(z.float(), v.float().softmax(-1))

    found = line(kd.audit(loss), "which it is")
    assert found.verdict == "convention" and "never 0" in found.found


def test_no_t_squared_is_a_convention() -> None:
    def loss(z: Tensor, v: Tensor, tau: float = 1.0) -> Tensor:
        lq, lp = (F.log_softmax(x.float() / tau, -1) for x in (z, v))
        return F.kl_div(lq, lp.exp(), reduction="batchmean")

    scorecard = kd.audit(loss)
    assert line(scorecard, "T² in the loss and the gradient").verdict == "convention"
    assert "temperature=tau" in scorecard.called


def smoothed(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
    return 0.5 * kd.kd_loss(z, v) + 2.0 * F.cross_entropy(z, y, label_smoothing=0.1)


def softened(z: Tensor, v: Tensor) -> Tensor:
    return kd.kd_loss(z, v, temperature=2.0)


def mean_squares(z: Tensor, v: Tensor) -> Tensor:
    return F.mse_loss(z.softmax(-1), v.softmax(-1))


def both_ways(z: Tensor, v: Tensor) -> Tensor:
    return 0.7 * kd.kd_loss(z, v) + 0.3 * kd.kd_loss(z, v, divergence="reverse_kl")


@pytest.mark.parametrize(
    ("loss", "words", "verdict"),
    [
        (smoothed, "0.5 × forward KL(p‖q), and 2 × cross-entropy with the label, smoothed by 0.1", "right"),
        (softened, "T² × forward KL(p‖q), student's logits divided by 2 and teacher's by 2", "right"),
        (mean_squares, "2 × squared error ½‖p − q‖², divided by the number of classes", "convention"),
        (both_ways, "mixture of forward and reverse KL, weights 0.7 and 0.3", "convention"),
    ],
)
def test_what_else_is_recognised(loss: Callable[..., Tensor], words: str, verdict: str) -> None:
    scorecard = kd.audit(loss, ignore_index=None)
    assert scorecard.ok, wrong(scorecard)
    found = line(scorecard, "which it is")
    assert (found.found, found.verdict) == (words, verdict)


def test_a_divergence_of_one_s_own_is_not_called_wrong() -> None:
    """Nor are its limits, which nobody knows."""

    def cosine(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(student_logits, teacher_logits, -1)).mean()

    scorecard = kd.audit(cosine)
    assert scorecard.ok, wrong(scorecard)
    assert line(scorecard, "which it is").verdict == "could not be examined"
    assert line(scorecard, "derivative of its own loss").verdict == "right"
    assert line(scorecard, "a constant added to the student's row").verdict == "convention"


def test_random_numbers_are_told_from_a_race() -> None:
    def noisy(z: Tensor, v: Tensor) -> Tensor:
        return kd.kd_loss(F.dropout(z, 0.2), v)

    calls = iter(range(10**9))

    def racing(z: Tensor, v: Tensor) -> Tensor:
        return kd.kd_loss(z, v) * (1 + 1e-3 * next(calls))

    again = line(kd.audit(noisy), "the same call again")
    assert again.verdict == "convention" and "draws random numbers" in again.found
    assert line(kd.audit(racing), "the same call again").verdict == "WRONG"


# What a loss takes


def test_log_probabilities_are_found() -> None:
    def of_logs(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a, b, reduction="batchmean", log_target=True)

    def of_probabilities(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a, b, reduction="batchmean")

    found = line(kd.audit(of_probabilities), "what it takes")
    assert found.found == "log-probabilities of the student, probabilities of the teacher, found by trying"
    assert kd.audit(of_logs).called == "loss(log_probs, log_probs) on [N, V]"
    assert kd.audit(of_probabilities).called == "loss(log_probs, probs) on [N, V]"
    told = kd.audit(of_probabilities, student="log_probs", teacher="probs")
    verdicts = [(each.about, each.verdict) for each in kd.audit(of_probabilities).lines[1:]]
    assert [(each.about, each.verdict) for each in told.lines] == verdicts


def test_modules_and_tuples_are_losses() -> None:
    class Loss(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, str]:
            soft = kd.kd_loss(student, teacher)
            return soft + F.cross_entropy(student, target), "and what is logged"

    scorecard = kd.audit(Loss())
    assert scorecard.name == "Loss" and "labels=target" in scorecard.called
    assert line(scorecard, "which it is").found.endswith("and 1 × cross-entropy with the label")


def test_a_loss_that_shifts_is_examined_as_one() -> None:
    def loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return kd.kd_loss(logits[..., :-1, :], teacher_logits[..., :-1, :], labels[..., 1:], hard_weight=1.0)

    for given in ({}, {"ndim": 3}):
        scorecard = kd.audit(loss, shift="inside", **given)  # type: ignore[arg-type]
        assert scorecard.ok, wrong(scorecard)
        assert "shifting labels itself" in scorecard.called
        assert line(scorecard, "whose work shifting them is").found == "its own: row t has label t + 1"
        assert line(scorecard, "which it is").found.startswith("forward KL(p‖q), and 1 ×")
    said = kd.audit(loss, shift="caller")
    assert list(wrong(said)) == ["whose work shifting them is"]


@pytest.mark.parametrize("ndim", [2, 3])
def test_rows_of_a_loss_that_shifts(ndim: int) -> None:
    """One value for each row that has a label after it."""

    def loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        rows = [x[..., :-1, :] for x in (logits, teacher_logits)]
        return kd.kd_loss(*rows, labels[..., 1:], hard_weight=1.0, reduction="none")

    scorecard = kd.audit(loss, ndim=ndim)
    assert scorecard.ok, wrong(scorecard)
    assert line(scorecard, "reduction").found == "one value for each row"
    assert line(scorecard, "a weight for each row, after reduction='none'").verdict == "right"


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_a_batchmean_divides_by(ndim: int) -> None:
    """On rows it is right, and the scorecard warns; on sequences it is wrong, unless it is what it says."""

    def loss(z: Tensor, v: Tensor) -> Tensor:
        return F.kl_div(z.log_softmax(-1), v.softmax(-1), reduction="batchmean")

    found = line(kd.audit(loss, ndim=ndim), "logits [B, S, V]")
    assert found.verdict == ("convention" if ndim == 2 else "WRONG") and "B = 2" in found.found
    assert line(kd.audit(loss, ndim=ndim, denominator="batch"), "logits [B, S, V]").verdict == "convention"


# Losses that misbehave


def nothing(z: Tensor, v: Tensor) -> None:
    return None


def raises(z: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("not today")


def is_nan(z: Tensor, v: Tensor) -> Tensor:
    return z.sum() * torch.nan


def has_no_gradient(z: Tensor, v: Tensor) -> Tensor:
    return kd.kd_loss(z.detach(), v)


def exits(z: Tensor, v: Tensor) -> Tensor:
    sys.exit("enough")


def raises_in_backward(z: Tensor, v: Tensor) -> Tensor:
    def refuse(gradient: Tensor) -> Tensor:
        raise RuntimeError("not backwards")

    loss = kd.kd_loss(z, v)
    if loss.requires_grad:
        loss.register_hook(refuse)
    return loss


def raises_now_and_then(z: Tensor, v: Tensor) -> Tensor:
    if z.shape[0] == 4:
        raise ValueError("four rows")
    return kd.kd_loss(z, v)


def is_constant(z: Tensor, v: Tensor) -> Tensor:
    return z.sum() * 0 + 1.0


@pytest.mark.parametrize(
    "loss",
    [nothing, raises, exits, is_nan, has_no_gradient, raises_in_backward, raises_now_and_then, is_constant],
)
def test_nothing_that_a_loss_does_ends_the_audit(loss: Callable[..., Any]) -> None:
    scorecard = kd.audit(loss)
    assert scorecard.lines and str(scorecard) and scorecard.markdown() and json.loads(scorecard.json())
    bad = [each for each in scorecard.lines if each.verdict in ("WRONG", "could not be examined")]
    assert bad, str(scorecard)


def test_what_is_lacking_is_told() -> None:
    def weighed(z: Tensor, v: Tensor, alpha: float) -> Tensor:
        return alpha * kd.kd_loss(z, v)

    (only,) = kd.audit(weighed).lines
    assert "'alpha'; what else it needs goes into `options`" in only.found
    found = line(kd.audit(weighed, options={"alpha": 0.3}), "which it is").found
    assert found == "0.3 × forward KL(p‖q)"


def test_what_was_raised_is_told() -> None:
    (only,) = kd.audit(raises).lines
    assert only.verdict == "could not be examined" and "RuntimeError: not today" in only.found
    assert "gave back NoneType" in kd.audit(nothing).lines[0].found
    assert "without a gradient" in str(kd.audit(has_no_gradient)).replace("\n", " ")


def test_what_a_loss_prints_is_not_seen(capsys: pytest.CaptureFixture[str]) -> None:
    def loud(z: Tensor, v: Tensor) -> Tensor:
        print("loss!")
        return kd.kd_loss(z, v)

    steps: list[str] = []
    kd.audit(loud, progress=steps.append)
    assert capsys.readouterr().out == ""
    assert steps[:2] == ["trying", "identifying"] and "limits" in steps


def test_the_seed_of_torch_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    kd.audit(closed_form)
    assert torch.equal(torch.rand(1), expected)


# Errors


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": "logit"}, "teacher must be one of 'auto', 'logits'"),
        ({"ndim": 4}, "ndim must be one of"),
        ({"denominator": "tokens"}, "denominator must be one of"),
        ({"temperature": "heat"}, "temperature must name an argument of the loss, got 'heat'; it has z, v"),
        ({"divergence": "kl"}, "divergence must be"),
    ],
)
def test_arguments_are_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        kd.audit(closed_form, **given)


def test_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="loss_fn must be callable, got str"):
        kd.audit("loss")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temperature must be the name of an argument"):
        kd.audit(closed_form, temperature=2.0)  # type: ignore[arg-type]


# Truth


def test_truths_are_finite_and_differentiable_at_infinity() -> None:
    """On both sides: classes that nobody has weigh nothing, in the loss and in its gradient."""
    z, v = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    cut = z.clone(), v.clone()
    for x in cut:
        x[:, 2] = -torch.inf
    short = [x[:, [0, 1, 3, 4, 5]].requires_grad_() for x in (z, v)]
    labels = torch.tensor([0, 1, 3])
    for family in families(5):
        if not family.softmax or family.name == "centered_logit_mse":
            continue
        theta = (0.3, 0.8) if family.name == "alpha_beta" else family.starts[0]
        leaf = cut[0].clone().requires_grad_()
        parts = family.values(Sides.of(leaf, cut[1], labels), theta)
        whole = torch.stack([part.sum() for part in parts]).sum()
        less = torch.tensor([0, 1, 2])
        rest = torch.stack([part.sum() for part in family.values(Sides.of(*short, less), theta)]).sum()
        torch.testing.assert_close(whole, rest, msg=family.name)
        grad = torch.autograd.grad(whole, leaf)[0]
        expected = torch.autograd.grad(rest, short[0])[0]
        torch.testing.assert_close(grad[:, [0, 1, 3, 4, 5]], expected, msg=family.name)
        assert not grad[:, 2].any(), family.name


# The command, the document


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kdkernels", "audit", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    (tmp_path / "losses.py").write_text(
        "import kdkernels as kd\n\n\n"
        "def good(z, v, tau=1.0, kind='reverse_kl'):\n"
        "    return kd.kd_loss(z, v, temperature=tau, divergence=kind)\n"
        "\n\ndef bad(z, v):\n    return -kd.kd_loss(z, v)\n"
    )
    found = command(
        "losses:good", "--markdown", "good.md", "--json", "good.json", "--option", "kind=tvd", cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert "total variation" in found.stdout and found.stdout.startswith("good: ")
    assert (tmp_path / "good.md").read_text(encoding="utf-8").startswith("# good\n")
    told = json.loads((tmp_path / "good.json").read_text(encoding="utf-8"))
    assert told["ok"] is True and told["counts"]["WRONG"] == 0
    found = command("losses.py:bad", cwd=tmp_path)
    assert found.returncode == 1 and "of the wrong sign" in found.stdout


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("kdkernels", "LOSS must be module:function or file.py:function, got 'kdkernels'"),
        ("nowhere_at_all:loss", "nowhere_at_all can't be imported: ModuleNotFoundError"),
        ("nowhere.py:loss", "there is no file nowhere.py"),
        ("kdkernels:nothing", "kdkernels has no nothing"),
        ("kdkernels:__version__", "must be a function, got str"),
    ],
)
def test_a_loss_that_is_not_there(named: str, words: str) -> None:
    with pytest.raises(audit_cli.NoLoss, match=re.escape(words)):
        audit_cli.load(named)


def test_a_method_of_a_class_is_named_with_dots() -> None:
    assert audit_cli.load("kdkernels:KDLoss.forward") is kd.KDLoss.forward


def test_options_of_the_command() -> None:
    assert audit_cli.options_of(["beta=0.5", "kind=jsd", "on=True"]) == {
        "beta": 0.5, "kind": "jsd", "on": True,
    }  # fmt: skip
    with pytest.raises(audit_cli.NoLoss, match="--option must be NAME=VALUE, got 'beta'"):
        audit_cli.options_of(["beta"])


def test_the_package_imports_no_audit() -> None:
    code = "import sys, kdkernels; print(any('auditing' in name for name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_benchmark_writes_scorecards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ours and of eager spellings; libraries are where they are installed."""
    losses = [*audit_losses.ours("cpu"), *audit_losses.spellings()]
    chosen = [each for each in losses if each.name in ("F.kl_div in one line", "PyTorch's tutorial")]
    chosen.append(next(each for each in losses if each.file == "kd_loss-reference"))
    found = examined(chosen, "cpu")
    write(tmp_path, found, "cpu")
    text = (tmp_path / "eager.md").read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in text and "## F.kl_div in one line" in text
    assert "| **WRONG** | limits: −inf logits on both sides |" in text
    assert (tmp_path / "kd_loss-reference.md").exists()
    assert "F.kl_div in one line: " in capsys.readouterr().out
    table = summary(found[-1:], {"trl": "not installed"}, [], "cpu")
    assert "- trl: not installed." in table and table.endswith("## WRONG\n\nNothing.\n")
    assert "−inf logits on both sides: NaN" in summary(found, {}, [], "cpu")


def test_the_head_makes_the_logits_to_the_bit() -> None:
    z = torch.randn(3, 7)
    z[:, 2] = -torch.inf
    x, weight, bias = audit_losses.head(z)
    assert bias is not None and torch.equal(F.linear(x, weight, bias), z)
    assert audit_losses.head(z[:, :2])[2] is None


def test_committed_scorecards_say_nothing_wrong_of_ours() -> None:
    files = list((ROOT / "benchmarks" / "results" / "audit").glob("kd_loss-*.md"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n## ") >= 10 and "WRONG" not in text, file.name


def test_the_document_runs_and_shows_what_it_prints() -> None:
    text = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    code, *more = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(None):
        exec(compile(code, "audit.md", "exec"), names)
    shown = re.search(r"```text\n(.*?)```", text, re.S)
    assert shown is not None
    verdicts = ("right", "convention", "WRONG", "n/a")
    printed = [row[:60].rstrip() for row in str(names["scorecard"]).splitlines() if row.startswith(verdicts)]
    rows = [row[:60].rstrip() for row in shown[1].splitlines() if row.startswith(verdicts)]
    assert rows and all(row in printed for row in rows)
    assert set(names["wrong"]) == {each.about for each in names["scorecard"].wrong}
    for snippet in more:
        exec(compile(snippet, "audit.md", "exec"), names)
