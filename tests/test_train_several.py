"""Recipes of several models: chains, peers, routed teachers; and students that learn on what they say."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import torch
from test_train import net, parameters, same, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import kdkernels as kd
from kdkernels.train import Distiller, Ensemble, Objective, SoftTargets, accuracy, after, churn, recipes
from kdkernels.train.objective import Progress

N, FEATURES, CLASSES = 12, 6, 5


def nets(*widths: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [net(width) for width in widths]


def batch(**more: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, FEATURES, generator=generator)
    return {"inputs": x, "labels": torch.randint(0, CLASSES, (N,), generator=generator), **more}


def kl(z: Any, v: Any, temperature: float = 1.0) -> Any:
    lq, lp = (z / temperature).log_softmax(-1), (v / temperature).log_softmax(-1)
    return temperature**2 * (lp.exp() * (lp - lq)).sum(-1).mean()


# Chains


def test_every_assistant_learns_from_the_one_before() -> None:
    teacher, first, second, student = nets(16, 12, 8, 4)
    plan = recipes.teacher_assistants(
        student, teacher, [first, second], temperature=3.0, soft_weight=0.7, shares=[1, 2, 1], optimizer=sgd
    )
    assert [stage.name for stage in plan.stages] == ["assistant_1", "assistant_2", "student"]
    given = batch()
    for stage, learns, teaches in zip(
        plan.stages, (first, second, student), (teacher, first, second), strict=True
    ):
        row = plan.distiller(stage).evaluate([given])
        z, v = learns(given["inputs"]).detach(), teaches(given["inputs"]).detach()
        wanted = 0.7 * kl(z, v, 3.0) + 0.3 * cross_entropy(z, given["labels"])
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-5)
    before = parameters(teacher)
    histories = plan.run([given], steps=8, progress=False)
    assert [rows[-1]["step"] for rows in histories.values()] == [2, 4, 2]
    assert same(parameters(teacher), before) and plan.student is student


def test_a_chain_goes_on_between_and_within_its_fits(tmp_path: Path) -> None:
    """Interrupted in the second of three fits, it is at the end what it is without."""
    given = [batch()]

    class Stop:
        def __init__(self, at: tuple[str, int]) -> None:
            self.at = at

        def on_step(self, distiller: Distiller, row: Any) -> None:
            assert distiller.folder is not None
            if (distiller.folder.name, distiller.progress.step) == self.at:
                raise KeyboardInterrupt

    def run(folder: Path | None, *callbacks: Any) -> Any:
        teacher, first, second, student = nets(16, 12, 8, 4)
        plan = recipes.teacher_assistants(
            student, teacher, [first, second], optimizer=partial(torch.optim.AdamW, lr=1e-2),
            callbacks=callbacks,
        )  # fmt: skip
        plan.run(given, steps=12, folder=folder, save_every=1, progress=False)
        return parameters(student)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Stop(("2-assistant_2", 3)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-assistant_1", "2-assistant_2"]
    assert same(run(tmp_path), run(None))


def test_generations_are_born_again() -> None:
    teacher, *generations = nets(8, 8, 8)
    given = batch()
    x, y = given["inputs"], given["labels"]
    plan = recipes.born_again(generations, teacher, temperature=2.0, soft_weight=0.5, hard_weight=2.0)
    for stage, learns, teaches in zip(plan.stages, generations, (teacher, *generations), strict=False):
        wanted = 0.5 * kl(learns(x), teaches(x), 2.0) + 2.0 * cross_entropy(learns(x), y)
        found = plan.distiller(stage).evaluate([given])["loss"]
        assert found == pytest.approx(wanted.item(), rel=1e-5)
    alone = recipes.born_again(generations)
    assert [[*stage.updates[0].objective.terms] for stage in alone.stages] == [["hard"], ["soft", "hard"]]
    assert alone.stages[1].teacher is generations[0] and alone.student is generations[1]


def test_chains_refuse_what_cannot_be() -> None:
    teacher, student = nets(8, 4)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with pytest.raises(TypeError, match="optimizer must be a function that makes one, since every model"):
        recipes.teacher_assistants(student, teacher, [net(6)], optimizer=optimizer)
    with pytest.raises(ValueError, match=r"shares must be 2, of assistant_1, student, got 1"):
        recipes.teacher_assistants(student, teacher, [net(6)], shares=[1.0])
    with pytest.raises(ValueError, match=r"soft_weight must be λ in \[0, 1\], got 1.5"):
        recipes.teacher_assistants(student, teacher, [], soft_weight=1.5)
    with pytest.raises(ValueError, match="generations must be models, at least one"):
        recipes.born_again([])


# Peers


def by_hand(
    models: list[nn.Module], x: Tensor, y: Tensor, share: float, rate: float, steps: int, alternating: bool
):
    """Mutual learning in plain PyTorch."""
    for _ in range(steps):
        losses = []
        for n, model in enumerate(models):
            z = model(x)
            loss = cross_entropy(z, y)
            loss = loss + sum(share * kl(z, p(x).detach()) for m, p in enumerate(models) if m != n)
            losses.append(loss)
            if alternating:
                gradients = torch.autograd.grad(loss, [*model.parameters()])
                with torch.no_grad():
                    for p, g in zip(model.parameters(), gradients, strict=True):
                        p -= rate * g
        if not alternating:
            gradients = [
                torch.autograd.grad(loss, [*m.parameters()]) for loss, m in zip(losses, models, strict=True)
            ]
            with torch.no_grad():
                for model, of_model in zip(models, gradients, strict=True):
                    for p, g in zip(model.parameters(), of_model, strict=True):
                        p -= rate * g


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize(("peers", "share"), [("mean", 0.5), ("sum", 1.0)])
def test_peers_learn_from_each_other(alternating: bool, peers: Any, share: float) -> None:
    ours, theirs, given = nets(4, 6, 8), nets(4, 6, 8), batch()
    plan = recipes.mutual_learning(
        ours, peers=peers, alternating=alternating, optimizer=lambda p: torch.optim.SGD(p, 0.3)
    )
    plan.run([given], steps=3, progress=False)
    by_hand(theirs, given["inputs"], given["labels"], share, 0.3, 3, alternating)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-5, atol=1e-6)


def test_peers_have_names_optimizers_and_metrics() -> None:
    a, b = nets(4, 6)
    makers = [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=1e-3)]
    metrics = {"a": partial(accuracy, model="a"), "churn": partial(churn, first="a", second="b")}
    plan = recipes.mutual_learning({"a": a, "b": b}, optimizer=makers, metrics=metrics)
    distiller, given = plan.distiller(plan.stages[0]), batch()
    distiller.fit([given], steps=1, progress=False)
    kinds = [type(o.optimizer).__name__ for o in distiller.updates[0].optimizer]
    assert kinds == ["SGD", "AdamW"]
    row = distiller.evaluate([given])
    first, second = (model(given["inputs"]).argmax(-1) for model in (a, b))
    assert row["a"] == pytest.approx(float((first == given["labels"]).float().mean()))
    assert row["churn"] == pytest.approx(float((first != second).float().mean()))
    assert {"a_soft_b", "a_hard", "b_soft_a", "b_hard", "loss"} <= {*row}
    with pytest.raises(ValueError, match="students must be at least two models, got 1"):
        recipes.mutual_learning([a])
    with pytest.raises(ValueError, match="peers must be 'mean' or 'sum', got 'max'"):
        recipes.mutual_learning([a, b], peers="max")  # type: ignore[arg-type]


def test_churn_counts_rows_that_count() -> None:
    class Said:
        mask = torch.tensor([True, True, True, False])

        def __getitem__(self, name: str) -> dict[str, Tensor]:
            top = {"a": [0, 1, 2, 0], "b": [0, 2, 2, 1]}[name]
            return {"logits": nn.functional.one_hot(torch.tensor(top), 3).float()}

    step: Any = Said()
    assert float(churn(step, "a", "b")) == pytest.approx(1 / 3)
    step.mask = None
    assert float(churn(step, "a", "b")) == pytest.approx(1 / 2)


def codistilled_by_hand(
    models: list[nn.Module], given: dict[str, Tensor], every: int, burn_in: int, steps: int
):
    """In plain PyTorch: own rows, old copies of the others, labels alone at first."""
    import copy

    stale = copy.deepcopy(models)
    for step in range(steps):
        for n, model in enumerate(models):
            rows = given["shard"] == n
            x, y = given["inputs"][rows], given["labels"][rows]
            z = model(x)
            loss = cross_entropy(z, y)
            if step >= burn_in:
                others = [p(x).softmax(-1).detach() for m, p in enumerate(stale) if m != n]
                mean = torch.stack(others).mean(0)
                loss = loss - (mean * z.log_softmax(-1)).sum(-1).mean()  # KL, without what is constant
            gradients = torch.autograd.grad(loss, [*model.parameters()])
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= 0.3 * g
        if (step + 1) % every == 0:
            stale = copy.deepcopy(models)


def test_codistillation_on_shards_from_stale_peers() -> None:
    ours, theirs = nets(4, 6, 8), nets(4, 6, 8)
    given = batch(shard=torch.tensor([0, 1, 2, 2] * 3))
    plan = recipes.codistillation(ours, every=2, burn_in=1, optimizer=lambda p: torch.optim.SGD(p, 0.3))
    plan.run([given], steps=5, progress=False)
    codistilled_by_hand(theirs, given, every=2, burn_in=1, steps=5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-5, atol=1e-6)


def test_codistillation_goes_on_with_the_copies_it_had(tmp_path: Path) -> None:
    given = [batch(shard=torch.tensor([0, 1] * 6))]

    def run(steps: int, folder: Path | None, resume: bool = False) -> Any:
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Dropout(0.3), net(width)) for width in (4, 6)]
        plan = recipes.codistillation(models, every=4, optimizer=sgd)
        distiller = plan.distiller(plan.stages[0], folder)
        assert distiller.resume() if resume else True
        distiller.fit(given, steps=steps, progress=False)
        stale = distiller.models["stale_peer_0"]
        assert not any(p.grad is not None or p.requires_grad for p in stale.parameters())
        return [p for m in models for p in parameters(m)]

    whole = run(9, None)
    run(6, tmp_path)
    assert same(run(9, tmp_path, resume=True), whole)


def test_stale_peers_are_in_eval_mode() -> None:
    """A model that nothing trains is used as a teacher is, and left as it was."""
    modes = []

    class Look(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(x)

    torch.manual_seed(0)
    plan = recipes.codistillation(
        [nn.Sequential(Look(), net(4)) for _ in range(2)], shard=None, optimizer=sgd
    )
    distiller = plan.distiller(plan.stages[0])
    distiller.fit([batch()], steps=1, progress=False)
    assert sorted(modes) == [False, False, True, True]
    assert all(m.training for m in distiller.models.values())


def test_codistillation_refuses_what_cannot_be() -> None:
    a, b = nets(4, 6)
    with pytest.raises(ValueError, match=r"no sample whose 'shard' is 1: every peer needs some of each"):
        recipes.codistillation([a, b]).run([batch(shard=torch.zeros(N).long())], steps=1, progress=False)
    with pytest.raises(ValueError, match="every must be >= 1 and burn_in >= 0, got 0 and 0"):
        recipes.codistillation([a, b], every=0)


def test_a_weight_after_steps() -> None:
    weight: Any = after(3, 0.5)
    assert [weight(Progress(step=n)) for n in (0, 2, 3, 9)] == [0.0, 0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="steps must be a number of steps >= 0"):
        after(-1)


def test_student_and_teacher_are_learnt_together() -> None:
    student, tutor = nets(4, 8)
    given = batch()
    x, y = given["inputs"], given["labels"]
    plan = recipes.learnt_together(student, tutor, temperature=2.0, teacher_weight=0.25, optimizer=sgd)
    z, v = student(x).detach(), tutor(x).detach()
    wanted = kl(z, v, 2.0) + cross_entropy(z, y) + cross_entropy(v, y) + 0.25 * kl(v, z, 2.0)
    distiller = plan.distiller(plan.stages[0])
    assert distiller.evaluate([given])["loss"] == pytest.approx(float(wanted), rel=1e-5)
    before = parameters(student), parameters(tutor)
    distiller.fit([given], steps=1, progress=False)
    assert not same(parameters(student), before[0]) and not same(parameters(tutor), before[1])


# Routed teachers


def test_every_sample_asks_its_teacher() -> None:
    student, *teachers = nets(4, 6, 8, 10)
    which = torch.tensor([2, 0, 2, 1, 0, 2, 1, 2, 0, 0, 1, 2])
    given, asked = batch(domain=which), []
    for n, teacher in enumerate(teachers):
        teacher.register_forward_hook(lambda _, args, out, n=n: asked.append((n, len(args[0]))))
    plan = recipes.routed(student, teachers, by="domain", temperature=2.0, hard_weight=0.0)
    found = plan.distiller(plan.stages[0]).evaluate([given])["soft"]
    assert asked == [(0, 4), (1, 3), (2, 5)]
    x = given["inputs"]
    v = torch.stack([teachers[int(t)](row) for t, row in zip(which, x, strict=True)])
    assert found == pytest.approx(kl(student(x), v, 2.0).item(), rel=1e-5)
    by = recipes.Routed(teachers, by=lambda batch: batch["domain"])
    goals = Objective(soft=SoftTargets(temperature=2.0))
    assert Distiller(student, by, goals).evaluate([given])["soft"] == pytest.approx(found)
    missing = recipes.Routed(teachers[:1] * 3, by="domain")  # some teacher is asked nothing
    assert Distiller(student, missing, goals).evaluate([batch(domain=torch.zeros(N).long())])["soft"] > 0


@pytest.mark.parametrize(
    ("which", "said"),
    [(None, r"by 'domain' which teacher, as integers \[N\], got NoneType"),
     (torch.zeros(N), r"got torch\.float32 \(12,\)"),
     (torch.full((N,), 2), "'domain' must be from 0 to 1, got 2 to 2"),
     (torch.full((N,), -1), "'domain' must be from 0 to 1, got -1 to -1")],
)  # fmt: skip
def test_routes_that_lead_nowhere(which: Any, said: str) -> None:
    student, *teachers = nets(4, 6, 8)
    plan = recipes.routed(student, teachers, by="domain")
    with pytest.raises(ValueError, match=said):
        plan.distiller(plan.stages[0]).evaluate([batch() if which is None else batch(domain=which)])
    assert isinstance(recipes.Routed(teachers), Ensemble)


# On-policy

VOCABULARY, END, PAD = 32, 2, 0


def decoder(kind: str = "llama", seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "bos_token_id": 1,
    }
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **size)
    else:
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **size
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def prompts() -> dict[str, Tensor]:
    """Rows of 3, 5 and 2 tokens of prompt, the last padded on the left, and answers."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=generator)
    real, labels = torch.ones_like(ids), ids.clone()
    labels[0, :3] = labels[1, :5] = labels[2, :4] = -100
    real[2, :2] = 0
    ids[2, :2] = PAD
    real[0, 8:], labels[0, 8:], ids[0, 8:] = 0, -100, PAD
    return {"input_ids": ids, "attention_mask": real, "labels": labels, "domain": torch.arange(3)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_student_answers_prompts(kind: str) -> None:
    """Greedily, each row gets what the model would say to that prompt alone; it ends at its end token."""
    model, given = decoder(kind), prompts()
    own = recipes.OnPolicy(1.0, do_sample=False, max_new_tokens=6)
    got = own.answered(model.eval(), given)
    assert got["domain"] is given["domain"] and {*got} == {*given}
    for n, length in enumerate((3, 5, 2)):
        prompt = given["input_ids"][n][(given["attention_mask"][n] == 1)][:length]
        alone = model.generate(prompt[None], do_sample=False, max_new_tokens=6, pad_token_id=PAD)[0, length:]
        end = (alone == END).nonzero()
        answer = alone[: int(end[0]) + 1] if len(end) else alone
        total = length + len(answer)
        assert got["input_ids"][n, :total].tolist() == [*prompt.tolist(), *answer.tolist()]
        assert got["attention_mask"][n].tolist() == [1] * total + [0] * (got["input_ids"].shape[1] - total)
        assert (got["input_ids"][n, total:] == END).all()  # the padding, where no token is given
        wanted = [-100] * length + answer.tolist()
        assert got["labels"][n].tolist() == wanted + [-100] * (got["labels"].shape[1] - total)
    assert model.training is False


def test_what_comes_after_an_end_is_not_learnt() -> None:
    """Of a model that always says the end token, the answer is that token."""
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[END] = 100.0
        model.model.norm.weight.fill_(1.0)
        for p in model.model.layers.parameters():
            p.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
    got = recipes.OnPolicy(1.0, max_new_tokens=4).answered(model, prompts())
    assert (got["labels"] != -100).sum(1).tolist() == [1, 1, 1]
    assert got["labels"][got["labels"] != -100].tolist() == [END] * 3
    assert got["attention_mask"].sum(1).tolist() == [4, 6, 3]


def test_on_policy_distillation_learns_from_the_teacher() -> None:
    """It brings the student to the teacher on what the student says, which is something else at each step."""
    student, teacher = decoder(seed=0), decoder(seed=5)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(3.0)
    seen = []

    class Look:
        def on_batch(self, distiller: Distiller, given: Any) -> Any:
            seen.append(given)
            return given

    plan = recipes.on_policy(
        student, teacher, fraction=1.0, divergence="reverse_kl",
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )  # fmt: skip
    plan.options["callbacks"].append(Look())
    held = recipes.OnPolicy(1.0).answered(student.eval(), prompts())
    stage = plan.stages[0]
    before = plan.distiller(stage).evaluate([held])["soft"]
    plan.run([prompts()], steps=40, progress=False)
    assert plan.distiller(stage).evaluate([held])["soft"] < 0.7 * before
    assert (
        len({tuple(given["input_ids"].flatten().tolist()) for given in seen}) > 30
    )  # other answers each time


def test_a_fraction_of_the_batches_is_generated_and_resumed(tmp_path: Path) -> None:
    def run(steps: int, folder: Path | None, resume: bool = False) -> tuple[Any, int]:
        student, teacher = decoder(seed=0), decoder(seed=5)
        count = [0]

        class Look:
            def on_batch(self, distiller: Distiller, given: Any) -> Any:
                count[0] += given["input_ids"] is not data["input_ids"]
                return given

        plan = recipes.on_policy(student, teacher, fraction=0.4, optimizer=sgd, max_new_tokens=3)
        plan.options["callbacks"].append(Look())
        distiller = plan.distiller(plan.stages[0], folder)
        if resume:
            assert distiller.resume()
        else:
            torch.manual_seed(1)
        distiller.fit([data] * steps, steps=steps, progress=False)
        return parameters(student), count[0]

    data = {name: x for name, x in prompts().items() if name != "domain"}
    whole, generated = run(40, None)
    # Binomial: 16 of 40 ± 4 standard deviations.
    assert abs(generated - 16) < 4 * math.sqrt(40 * 0.4 * 0.6)
    run(25, tmp_path)
    assert same(run(40, tmp_path, resume=True)[0], whole)


def test_on_policy_refuses_what_cannot_be() -> None:
    model, given = decoder(), prompts()
    with pytest.raises(ValueError, match=r"fraction must be a share of the batches in \[0, 1\], got 2"):
        recipes.OnPolicy(2.0)
    own = recipes.OnPolicy(1.0)
    with pytest.raises(
        ValueError, match="student must be a decoder of transformers, which generates, got Seq"
    ):
        own.answered(net(4), given)
    with pytest.raises(ValueError, match=r"need input_ids and labels \[N, S\], with prompts labelled -100"):
        own.answered(model, {"input_ids": given["input_ids"]})
    with pytest.raises(ValueError, match="row 1 has no prompt: its first token is labelled"):
        own.answered(model, {**given, "labels": given["labels"].clone().index_fill(0, torch.tensor([1]), 5)})
    with pytest.raises(ValueError, match="there is no room for an answer: prompts have 10 of 10 tokens"):
        own.answered(model, {**given, "labels": torch.full_like(given["labels"], -100),
                             "attention_mask": torch.ones_like(given["labels"])})  # fmt: skip


def test_recipes_of_several_take_loaders_and_heads() -> None:
    """A `DataLoader` of mappings, and peers whose logits are never made."""

    def call(model: Any, given: Any) -> Any:
        return kd.Head(model[:3](given["inputs"]), model[3].weight, model[3].bias)

    from kdkernels.train import Adaptor

    given = batch()
    rows = [{name: x[n] for name, x in given.items()} for n in range(N)]
    models = nets(4, 6)
    plan = recipes.mutual_learning(models, optimizer=sgd, adaptor=Adaptor(call))
    before = [parameters(m) for m in models]
    plan.run(DataLoader(rows, 4), epochs=1, progress=False)  # type: ignore[arg-type]
    assert not any(same(parameters(m), b) for m, b in zip(models, before, strict=True))
