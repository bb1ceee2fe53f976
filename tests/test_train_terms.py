"""Terms: their formulas written out, projectors, padding, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kdkernels as kd
from kdkernels.train import (
    AttentionScores,
    AttentionTransfer,
    CosineHidden,
    Distiller,
    Embeddings,
    HardLabels,
    HiddenStates,
    Hint,
    LogitMatch,
    MultiLabel,
    Objective,
    SoftTargets,
)
from kdkernels.train.terms import Projectors

VOCAB, LENGTH = 53, 7


def bert(layers: int = 2, width: int = 16) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2(layers: int = 2, width: int = 16) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=4, n_positions=16, bos_token_id=1,
            eos_token_id=1,
        )
    )  # fmt: skip


def llama(layers: int = 2, width: int = 16) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def qwen(layers: int = 2, width: int = 16) -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama, "qwen": qwen}
CAUSAL = ("gpt2", "llama", "qwen")


def text(rows: int = 4) -> dict[str, Tensor]:
    """Token ids padded on the right, with labels that are the ids, -100 on padding."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, VOCAB, (rows, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([7, 4, 6, 5] * rows)[:rows, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def two(make: Any, layers: tuple[int, int] = (2, 4), widths: tuple[int, int] = (16, 16)) -> tuple[Any, Any]:
    torch.manual_seed(1)
    student, teacher = (make(n, w).eval() for n, w in zip(layers, widths, strict=True))
    return student, teacher


def value(student: Any, teacher: Any, term: Any, batch: Any) -> float:
    return Distiller(student, teacher, Objective(it=term)).evaluate([batch])["it"]


# Logits


def apart(student: Any, teacher: Any) -> tuple[Any, Any]:
    """With a surer teacher: of a KL of 0.006, as between random weights, float32 knows four digits."""
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(20)
    return student, teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_and_hard_terms_of_language_models(family: str) -> None:
    """Causal labels are shifted once, masked ones not at all; padding counts nowhere."""
    student, teacher = apart(*two(FAMILIES[family]))
    batch = text()
    with torch.no_grad():
        z, v = (
            model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for model in (student, teacher)
        )
    labels = batch["labels"]
    if family in CAUSAL:
        z, v, labels = z[:, :-1], v[:, :-1], labels[:, 1:]
    counted = labels != -100
    lq, lp = (x[counted].double().div(2).log_softmax(-1) for x in (z, v))
    soft = 4 * (lp.exp() * (lp - lq)).sum(-1).mean()
    hard = F.cross_entropy(z[counted], labels[counted])
    row = Distiller(
        student, teacher, Objective(soft=SoftTargets(temperature=2.0), hard=HardLabels(0.3))
    ).evaluate([batch])
    assert row["soft"] == pytest.approx(float(soft), rel=1e-5)
    assert row["hard"] == pytest.approx(float(hard), rel=1e-5)
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    alone = value(student, teacher, SoftTargets(temperature=2.0), unlabelled)
    assert alone == pytest.approx(float(soft), rel=1e-5)  # the attention mask says the same
    whole = value(student, teacher, SoftTargets(temperature=2.0), {"input_ids": batch["input_ids"]})
    with torch.no_grad():
        z, v = (model(batch["input_ids"]).logits for model in (student, teacher))
    if family in CAUSAL:
        z, v = z[:, :-1], v[:, :-1]
    assert whole == pytest.approx(kd.kd_loss(z, v, temperature=2.0).item(), rel=1e-5)


def test_sequence_to_sequence() -> None:
    """Labels become the decoder's inputs, and are those of its logits as they are."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    student, teacher = T5ForConditionalGeneration(config).eval(), T5ForConditionalGeneration(config).eval()
    batch = text()
    with torch.no_grad():
        expected = student(**batch).loss
    row = Distiller(student, teacher, Objective(soft=SoftTargets(), hard=HardLabels())).evaluate([batch])
    assert row["hard"] == pytest.approx(float(expected), rel=1e-5) and row["soft"] > 0


def test_soft_targets_of_all_tokens_beside_labels_of_some() -> None:
    """Masked language modelling: some tokens have a label, all that aren't padding soft targets."""
    student, teacher = apart(*two(bert))
    batch = text()
    batch["labels"] = batch["labels"].masked_fill(torch.arange(LENGTH) % 3 != 0, -100)
    with torch.no_grad():
        z, v = (
            m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (student, teacher)
        )
    goals = Objective(soft=SoftTargets(temperature=2.0, over="tokens"), hard=HardLabels())
    row = Distiller(student, teacher, goals).evaluate([batch])
    real, labelled = batch["attention_mask"].bool(), batch["labels"] != -100
    lq, lp = (x[real].double().div(2).log_softmax(-1) for x in (z, v))
    assert row["soft"] == pytest.approx(float(4 * (lp.exp() * (lp - lq)).sum(-1).mean()), rel=1e-5)
    assert row["hard"] == pytest.approx(
        float(F.cross_entropy(z[labelled], batch["labels"][labelled])), rel=1e-5
    )


def test_rows_of_sequences_that_all_count() -> None:
    """Logits [B, S, V] without labels or mask: the mean is over B · S rows, however batches are split."""
    student, teacher, _ = linears()
    x = torch.randn(8, 3, 6)
    expected = kd.kd_loss(student(x), teacher(x).detach()).item()
    assert value(student, teacher, SoftTargets(), x) == pytest.approx(expected, rel=1e-5)
    weights = []
    for size, accumulate in ((8, 1), (2, 4)):
        student, teacher, _ = linears()
        Distiller(
            student,
            teacher,
            Objective(soft=SoftTargets()),
            lambda p: torch.optim.SGD(p, 1.0),
            accumulate=accumulate,
        ).fit(list(x.split(size)), steps=1, progress=False)
        weights.append(student.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_masks_and_weights_of_tokens_are_shifted_with_their_labels() -> None:
    student, teacher = two(gpt2)
    batch = text()
    weights = torch.rand(4, LENGTH)
    given = {**batch, "mask": batch["attention_mask"].bool(), "token_weights": weights}
    with torch.no_grad():
        z, v = (
            m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (student, teacher)
        )
    expected = kd.kd_loss(
        z[:, :-1], v[:, :-1], mask=given["mask"][:, 1:], token_weights=weights[:, 1:], temperature=2.0
    )
    assert value(student, teacher, SoftTargets(temperature=2.0), given) == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_what_rows_of_a_models_logits_are() -> None:
    """By the names of classes; of those that generate from a condition, by their configuration."""
    from types import SimpleNamespace

    from kdkernels.models.calls import rows

    def kind(name: str, **config: Any) -> str:
        model = type(name, (nn.Module,), {})()
        model.config = SimpleNamespace(**config)
        return rows(model)

    assert kind("LlavaForConditionalGeneration", is_encoder_decoder=False) == "causal"
    assert kind("BartForConditionalGeneration", is_encoder_decoder=True) == "tokens"
    assert kind("XLNetLMHeadModel") == "tokens" and kind("GPT2LMHeadModel") == "causal"
    assert kind("BertForSequenceClassification") == "samples"


def linears() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 5), nn.Linear(6, 5), torch.randn(9, 6)


def test_logit_match_is_half_the_squared_error() -> None:
    student, teacher, x = linears()
    expected = 0.5 * (student(x) - teacher(x)).detach().pow(2).sum(-1).mean()
    assert value(student, teacher, LogitMatch(), x) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", kd.JSD(0.3), kd.DKD(1.0, 8.0), "tvd"], ids=str)
def test_every_divergence_is_a_term(divergence: Any) -> None:
    student, teacher, x = linears()
    y = torch.randint(0, 5, (9,))
    expected = kd.kd_loss(
        student(x), teacher(x).detach(), y, divergence=divergence, temperature=2.0, hard_weight=0.0
    )
    found = value(student, teacher, SoftTargets(divergence, 2.0), (x, y))
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_labels_of_several_classes() -> None:
    student, teacher, x = linears()
    y = (torch.rand(9, 5) < 0.4).float()
    goals = Objective(soft=SoftTargets(kd.BinaryKL(), 3.0), hard=MultiLabel(0.5))
    row = Distiller(student, teacher, goals).evaluate([(x, y)])
    z, v = student(x).detach(), teacher(x).detach()
    hard = F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1).mean()
    p, q = torch.sigmoid(v / 3), torch.sigmoid(z / 3)
    soft = 9 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    assert row["hard"] == pytest.approx(float(hard), rel=1e-5)
    assert row["soft"] == pytest.approx(float(soft), rel=1e-4)
    with pytest.raises(TypeError, match=r"MultiLabel takes labels .* floats in \[0, 1\], got torch.int64"):
        value(student, teacher, MultiLabel(), (x, torch.zeros(9, 5, dtype=torch.int64)))


def test_soft_and_hard_terms_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are read once for both; apart, twice, with the same gradient."""
    from kdkernels.train.terms import logits

    calls: list[str] = []
    for name in ("kd_loss", "kd_loss_with_stats"):
        original = getattr(logits, name)
        monkeypatch.setattr(
            logits, name, lambda *a, o=original, n=name, **k: (calls.append(n), o(*a, **k))[1]
        )
    student, teacher, x = linears()
    y = torch.randint(0, 5, (9,))
    goals = Objective(soft=SoftTargets(temperature=2.0, weight=0.7), hard=HardLabels(0.3))
    distiller = Distiller(student, teacher, goals, lambda p: torch.optim.SGD(p, 1.0))
    distiller.fit([(x, y)], steps=1, progress=False)
    assert calls == ["kd_loss_with_stats"]
    after = student.weight.detach().clone()
    student, teacher, _ = linears()
    noisy = SoftTargets(temperature=2.0, weight=0.7, student_noise=kd.LogitNoise(0.0))
    Distiller(
        student, teacher, Objective(soft=noisy, hard=HardLabels(0.3)), lambda p: torch.optim.SGD(p, 1.0)
    ).fit([(x, y)], steps=1, progress=False)
    assert calls[1:] == ["kd_loss", "kd_loss"]  # noise on the student's logits is in no other term
    torch.testing.assert_close(student.weight.detach(), after)


# Features


class Convs(nn.Module):
    """Feature maps of 8×8 and 4×4, then classes."""

    def __init__(self, width: int, stride: int = 2) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(1, width, 3, padding=1),
            nn.Conv2d(width, 2 * width, 3, stride=stride, padding=1),
        )
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def images(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 1, 8, 8, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def test_a_hint_between_equal_widths_is_a_mean_squared_error() -> None:
    torch.manual_seed(0)
    student, teacher = Convs(4), Convs(4)
    x, y = images()
    expected = F.mse_loss(student.a(x), teacher.a(x)).item()
    assert value(student, teacher, Hint("a", "a"), (x, y)) == pytest.approx(expected, rel=1e-5)


def test_a_hint_of_other_width_and_size_learns_its_regressor() -> None:
    """A 1×1 convolution, maps pooled to the smaller; the regressor is trained and is not the student's."""
    torch.manual_seed(0)
    student, teacher = Convs(3), Convs(4, stride=1)
    x, y = images()
    term = Hint("b", "b")
    names = set(student.state_dict())
    distiller = Distiller(student, teacher, Objective(hint=term), lambda p: torch.optim.SGD(p, 0.1))
    history = distiller.fit([(x, y)], steps=60, log_every=1, progress=False)
    regressor = term.projectors["hint"]
    assert isinstance(regressor, nn.Conv2d) and regressor.weight.shape == (8, 6, 1, 1)
    assert history[-1]["hint"] < 0.9 * history[0]["hint"] and set(student.state_dict()) == names
    guided, hint = student.b(F.relu(student.a(x))), teacher.b(F.relu(teacher.a(x)))
    expected = F.mse_loss(regressor(guided), F.adaptive_avg_pool2d(hint, 4)).item()
    assert value(student, teacher, term, (x, y)) == pytest.approx(expected, rel=1e-5)


def test_projectors_come_back_from_their_state() -> None:
    made = Projectors()
    x, maps = torch.randn(2, 3), torch.randn(2, 3, 4, 4)
    a, b = made.match("a", x, torch.randn(2, 5)), made.match("b", maps, torch.randn(2, 6, 4, 4))
    assert made.match("c", x, torch.randn(7, 3)) is x
    again = nn.ModuleDict({"inner": Projectors()})
    again.load_state_dict({f"inner.{k}": v for k, v in made.state_dict().items()})
    torch.testing.assert_close(again["inner"].match("a", x, torch.randn(2, 5)), a)
    torch.testing.assert_close(again["inner"].match("b", maps, torch.randn(2, 6, 4, 4)), b)


def test_attention_transfer() -> None:
    torch.manual_seed(0)
    student, teacher = Convs(3), Convs(5)
    x, y = images()

    def q(maps: Tensor) -> Tensor:
        a = maps.detach().pow(2).mean(1).flatten(1)
        return a / a.norm(dim=1, keepdim=True)

    expected = sum(
        (q(s) - q(t)).pow(2).mean().item()
        for s, t in (
            (student.a(x), teacher.a(x)),
            (student.b(F.relu(student.a(x))), teacher.b(F.relu(teacher.a(x)))),
        )
    )
    term = AttentionTransfer(["a", "b"], ["a", "b"])
    assert value(student, teacher, term, (x, y)) == pytest.approx(expected, rel=1e-5)
    assert term.weight == 1e3


# Hidden states, embeddings, attention


def hidden(model: Any, batch: dict[str, Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"], **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_embeddings_and_cosines(family: str) -> None:
    student, teacher = two(FAMILIES[family])
    batch = text()
    h, g = (hidden(m, batch, output_hidden_states=True).hidden_states for m in (student, teacher))
    real = batch["attention_mask"].bool()
    mse = [(h[a] - g[b])[real].pow(2).mean().item() for a, b in ((1, 2), (2, 4))]
    assert value(student, teacher, HiddenStates([(1, 2), (2, 4)]), batch) == pytest.approx(sum(mse), rel=1e-4)
    embeddings = (h[0] - g[0])[real].pow(2).mean().item()
    assert value(student, teacher, Embeddings(), batch) == pytest.approx(embeddings, rel=1e-4)
    cosine = (1 - F.cosine_similarity(h[-1], g[-1], dim=-1))[real].mean().item()
    assert value(student, teacher, CosineHidden(), batch) == pytest.approx(cosine, rel=1e-4)


def test_hidden_states_of_other_widths_share_a_projection() -> None:
    student, teacher = two(bert, widths=(8, 16))
    batch = text()
    projectors = Projectors()
    goals = Objective(
        e=Embeddings(projectors=projectors), h=HiddenStates([(1, 2), (2, 4)], projectors=projectors)
    )
    Distiller(student, teacher, goals, lambda p: torch.optim.SGD(p, 0.1)).fit(
        [batch], steps=1, progress=False
    )
    w = projectors["hidden"]
    student.eval()
    h, g = (hidden(m, batch, output_hidden_states=True).hidden_states for m in (student, teacher))
    real = batch["attention_mask"].bool()
    expected = sum((w(h[a]) - g[b])[real].pow(2).mean().item() for a, b in ((1, 2), (2, 4)))
    found = value(student, teacher, HiddenStates([(1, 2), (2, 4)], projectors=projectors), batch)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len([p for p in goals.parameters()]) == 2
    with pytest.raises(
        ValueError, match="CosineHidden compares directions of one space: the student is 8 wide"
    ):
        value(student, teacher, CosineHidden(), batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_scores_are_those_of_the_softmax(family: str) -> None:
    """Their softmax, masked as the model masks, is the attention that it returns; logits stay the same."""
    student, _ = two(FAMILIES[family])
    batch = text()
    student.set_attn_implementation("eager")
    expected = hidden(student, batch, output_attentions=True)
    term = AttentionScores()
    with term.around("student", student) as found:
        logits = hidden(student, batch).logits
    torch.testing.assert_close(logits, expected.logits)
    assert student.config._attn_implementation == "eager"
    allowed = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, LENGTH, -1)
    if family in CAUSAL:
        allowed = allowed & torch.ones(LENGTH, LENGTH).tril().bool()
    rows = batch["attention_mask"].bool()
    for scores, attention in zip(found["attention_scores"], expected.attentions, strict=True):
        probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        torch.testing.assert_close(
            probabilities.transpose(1, 2)[rows], attention.transpose(1, 2)[rows], rtol=1e-4, atol=1e-6
        )


def test_attention_scores_term() -> None:
    student, teacher = two(bert)
    batch = text()
    term = AttentionScores([(0, 1), (1, 3)])
    scores = []
    for model in (student, teacher):
        with term.around("student", model) as found:
            hidden(model, batch)
        scores.append(found["attention_scores"])
    expected, real = 0.0, batch["attention_mask"].bool()
    for a, b in ((0, 1), (1, 3)):
        per_token = []
        for n, keep in enumerate(real):
            off = (scores[0][a][n] - scores[1][b][n]).pow(2)[:, keep][:, :, keep]  # heads, queries, keys
            per_token += off.mean((0, 2)).tolist()
        expected += sum(per_token) / len(per_token)
    assert value(student, teacher, term, batch) == pytest.approx(expected, rel=1e-4)


def test_attention_scores_of_a_causal_model_are_those_it_attends_to() -> None:
    """Two terms of the same model, too."""
    student, teacher = two(llama)
    batch = text()
    scores = []
    for model in (student, teacher):
        with AttentionScores().around("student", model) as found:
            hidden(model, batch)
        scores.append(found["attention_scores"])
    per_token = []
    for n, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        off = (scores[0][0][n] - scores[1][1][n]).pow(2).mean(0)
        per_token += [float(off[t, : t + 1].mean()) for t in range(length)]
    goals = Objective(a=AttentionScores([(0, 1)]), b=AttentionScores([(0, 1)]))
    row = Distiller(student, teacher, goals).evaluate([batch])
    assert row["a"] == row["b"] == pytest.approx(sum(per_token) / len(per_token), rel=1e-4)


def test_token_terms_accumulate_by_tokens() -> None:
    """Rows of 7, 4, 6 and 5 tokens, one by one and together."""
    results = []
    for size, accumulate in ((4, 1), (1, 4)):
        student, teacher = two(bert)
        goals = Objective(
            hidden=HiddenStates([(2, 4)]), attention=AttentionScores([(1, 3)]), cosine=CosineHidden(),
            soft=SoftTargets(),
        )  # fmt: skip
        student.config.hidden_dropout_prob = 0.0
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        batches = [{k: x[i : i + size] for k, x in text().items()} for i in range(0, 4, size)]
        Distiller(student, teacher, goals, lambda p: torch.optim.SGD(p, 0.5), accumulate=accumulate).fit(
            batches, steps=1, progress=False
        )
        results.append([p.detach() for p in student.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_terms_refuse() -> None:
    student, teacher = two(bert)
    batch = text()
    with pytest.raises(
        ValueError, match=r"paired as \(5, 1\), and there are 3 of the student and 5 of the teacher"
    ):
        value(student, teacher, HiddenStates([(5, 1)]), batch)
    other = two(
        lambda n, w: BertForMaskedLM(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                num_hidden_layers=n,
                num_attention_heads=2,
                intermediate_size=32,
            )
        )
    )[0]
    with pytest.raises(ValueError, match="give the student as many heads"):
        value(other, teacher, AttentionScores([(0, 0)]), batch)
    with pytest.raises(KeyError, match="gave no 'hidden_states', only 'logits'"):
        value(nn.Linear(6, 5), nn.Linear(6, 5), HiddenStates(), torch.randn(3, 6))
    with pytest.raises(ValueError, match="as many layers, got 1 and 2"):
        AttentionTransfer(["a"], ["a", "b"])
