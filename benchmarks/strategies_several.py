"""Chains, peers, routed teachers, on-policy answers: experiments of the second plan, and their fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import strategies_text
from benchmarks.strategies_claims import HARD, RATES, TEXT_RATES, Arm, Claim, Experiment, over
from benchmarks.strategies_fits import (
    Digits,
    Lab,
    Metrics,
    accuracy,
    adamw,
    batches,
    carried_out,
    digits_teacher,
    is_test,
    mlp,
    recipe_of,
    rows,
    seeded,
    taught,
)
from kdkernels.train import Distiller, HardLabels, Objective, recipes

NET = (30, 30)
# Bytes of a prompt and of its answer.
PROMPT, ANSWER, BATCH, HELD = 8, 24, 32, 128
# Of the student, on labels alone, before it is distilled.
FIRST_STEPS = 300


def several(*widths: Sequence[int], seed: int) -> list[nn.Module]:
    """Nets, each with an initialisation of its own."""
    return [seeded(seed + 100_000 * n, partial(mlp, 64, *w, 10)) for n, w in enumerate(widths)]


@torch.no_grad()
def together_right(nets: Sequence[nn.Module], index: Tensor) -> float:
    """Accuracy of the mean of their probabilities, in per cent."""
    x, y = rows(index)
    mean = torch.stack([net(x).softmax(-1) for net in nets]).mean(0)
    return 100.0 * float((mean.argmax(-1) == y).float().mean())


def chain(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, amount: int = 100,
    net: Sequence[int] = NET, assistants: Sequence[Sequence[int]] = (), generations: int = 1, **options: Any,
) -> Metrics:  # fmt: skip
    """A student of some labelled digits, the last of a chain; every fit of it takes as many steps."""
    split = Digits.of(seed)
    x, y = rows(split.train[:amount])
    student, *before = several(net, *(assistants or [net] * (generations - 1)), seed=seed)
    optimizer, known = adamw(lr, weight_decay), {}
    if recipe == "teacher_assistants":
        teacher = digits_teacher(lab, "wide", seed)
        known = {"teacher_accuracy": accuracy(teacher, split.held)}
        made = recipes.teacher_assistants(student, teacher, before, optimizer=optimizer, **options)
    elif recipe == "born_again":
        made = recipes.born_again([*before, student], optimizer=optimizer, **options)
    else:
        made = recipe_of(recipe, student, None, steps, optimizer=optimizer, **options)
    ended = carried_out(made, batches(x, y), steps * len(made.stages))
    nets = [stage.student or student for stage in made.stages]
    for one in nets:
        one.eval()
    return {
        "accuracy": accuracy(student, split.held),
        "ensemble_accuracy": together_right(nets, split.held),
        **known,
        **ended,
    }


def peers(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, amount: int = 100,
    count: int = 2, data: str = "same", **options: Any,
) -> Metrics:  # fmt: skip
    """Peers on labelled digits, the `same` for all or `disjoint` shards; trained twice, for how far the first
    peers of both trainings agree.
    """
    split = Digits.of(seed)
    x, y = rows(split.train[:amount])
    shard = torch.arange(amount) % count
    trained, ended = [], {}
    for again in (0, 1):
        nets = several(*[NET] * count, seed=seed + 50_000 * again)
        optimizer = adamw(lr, weight_decay)
        if recipe == "labels":
            made = [recipe_of("labels", net, None, steps, optimizer=optimizer) for net in nets]
            parts = [(x, y) if data == "same" else (x[shard == n], y[shard == n]) for n in range(count)]
            for plan, part in zip(made, parts, strict=True):
                ended |= carried_out(plan, batches(*part), steps)
        else:
            batch: dict[str, Tensor] = {"inputs": x, "labels": y}
            if data == "disjoint":
                batch["shard"] = shard
            plan = getattr(recipes, recipe)(nets, optimizer=optimizer, **options)
            ended |= carried_out(plan, [batch] * 20, steps)
        trained.append(nets)
    one, other = (nets[0] for nets in trained)
    held = rows(split.held)[0]
    with torch.no_grad():
        agree = one(held).argmax(-1) == other(held).argmax(-1)
    nets = [net for nets in trained for net in nets]
    return {
        "accuracy": sum(accuracy(net, split.held) for net in nets) / len(nets),
        "ensemble_accuracy": sum(together_right(each, split.held) for each in trained) / 2,
        "stability": 100.0 * float(agree.float().mean()),
        **ended,
    }


def together(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01, **options: Any
) -> Metrics:
    """A student of 100 labelled digits, with a wider teacher of the same: trained before it, or with it."""
    split = Digits.of(seed)
    x, y = rows(split.train[:100])
    student, tutor = several(NET, (256, 256), seed=seed)
    optimizer = adamw(lr, weight_decay)
    if recipe == "learnt_together":
        made = recipes.learnt_together(student, tutor, optimizer=optimizer, **options)
    else:
        if recipe == "hinton":
            tutor = lab.teacher("of 100 digits", seed, lambda: taught(lab, tutor, x, y))
        made = recipe_of(recipe, student, tutor, steps, optimizer=optimizer, **options)
    ended = carried_out(made, batches(x, y), steps)
    return {"accuracy": accuracy(student, split.held), **ended}


def routed(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, weight_decay: float = 0.01,
    route: str = "own", **options: Any,
) -> Metrics:  # fmt: skip
    """A student of 50 digits and 50 negatives of others, each with a teacher; every sample asks its `own` or
    the `other`; or it learns from the mean of both.
    """
    split = Digits.of(seed)
    x, y = rows(split.train[:100])
    domain = torch.arange(100) % 2
    x = torch.where(domain[:, None] == 1, 1 - x, x)

    def negative() -> nn.Module:
        every, labels = rows(split.train)
        return taught(lab, seeded(seed + 2000, lambda: mlp(64, 256, 256, 10)), 1 - every, labels)

    teachers = [digits_teacher(lab, "wide", seed), lab.teacher("negatives", seed, negative)]
    student = seeded(seed, lambda: mlp(64, *NET, 10))
    optimizer = adamw(lr, weight_decay)
    if recipe == "routed":
        made = recipes.routed(student, teachers, by="domain", optimizer=optimizer, **options)
    else:
        made = recipe_of(recipe, student, teachers, steps, optimizer=optimizer, **options)
    batch = {"inputs": x, "labels": y, "domain": 1 - domain if route == "other" else domain}
    ended = carried_out(made, [batch] * 20, steps)
    held, truth = rows(split.held)
    with torch.no_grad():
        right = torch.cat([student(held).argmax(-1) == truth, student(1 - held).argmax(-1) == truth])
    return {"accuracy": 100.0 * float(right.float().mean()), **ended}


def llama(layers: int) -> nn.Module:
    """64 wide, 4 heads, of bytes; no token ends a text."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=strategies_text.BYTES, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=PROMPT + ANSWER, bos_token_id=None,
            eos_token_id=None, pad_token_id=strategies_text.MASK,
        )
    )  # fmt: skip


def continued(part: str, count: int, seed: int, size: int = BATCH) -> list[dict[str, Tensor]]:
    """Batches of pieces of text, whose first bytes are a prompt."""
    given, generator, found = strategies_text.text(part), torch.Generator().manual_seed(seed), []
    for _ in range(count):
        begin = torch.randint(len(given) - PROMPT - ANSWER, (size, 1), generator=generator)
        x = given[begin + torch.arange(PROMPT + ANSWER)]
        labels = x.clone()
        labels[:, :PROMPT] = -100
        found.append({"input_ids": x, "labels": labels})
    return found


@torch.no_grad()
def apart(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """KL(q‖p) and KL(p‖q) over answers, in bits for each byte."""
    keep = batch["labels"][:, 1:] != -100
    lq, lp = (
        net(input_ids=batch["input_ids"]).logits[:, :-1][keep].double().log_softmax(-1)
        for net in (student, teacher)
    )
    scale = 1.4426950408889634  # bits of a nat
    reverse, forward = ((a.exp() * (a - b)).sum(-1).mean() * scale for a, b in ((lq, lp), (lp, lq)))
    return float(reverse), float(forward)


def on_policy(
    lab: Lab, seed: int, steps: int, recipe: str, lr: float, *, fraction: float = 0.0, **options: Any
) -> Metrics:
    """A student of two layers, first of labels, then distilled on the text's answers or on its own."""
    teacher = strategies_text.kept_teacher(
        lab, "causal-text", lambda: llama(4), lambda steps: continued("train", steps, 7, 64)
    )

    def first() -> nn.Module:
        net = seeded(seed, lambda: llama(2))
        distiller = Distiller(
            net, objective=Objective(hard=HardLabels()), optimizer=adamw(3e-3), adaptor=strategies_text.LOGITS
        )
        count = lab.steps(FIRST_STEPS)
        distiller.fit(continued("train", count, 3000 + seed), steps=count, progress=False)
        return net

    student = llama(2)
    student.load_state_dict(lab.teacher("causal student", seed, first).state_dict())
    torch.manual_seed(seed)
    options |= {"optimizer": adamw(lr), "adaptor": strategies_text.LOGITS}
    made = recipes.on_policy(student, teacher, fraction=fraction, **options)
    ended = carried_out(made, continued("train", steps, 2000 + seed), steps)
    held = continued("test" if is_test(seed) else "validation", 1, 8, HELD)[0]
    torch.manual_seed(seed)
    own = recipes.OnPolicy(1.0).answered(student, held)
    return {
        "on_own_answers": -apart(student, teacher, own)[0],
        "on_text": -apart(student, teacher, held)[1],
        **ended,
    }


FITS: dict[str, Callable[..., Metrics]] = {
    "chain": chain,
    "peers": peers,
    "together": together,
    "routed": routed,
    "on_policy": on_policy,
}


def _labels(**options: Any) -> Arm:
    return Arm("labels", {"recipe": "labels", **options}, HARD)


def _experiments() -> dict[str, Experiment]:
    distilled = over(lr=RATES, temperature=(4.0, 10.0))
    chained = {"recipe": "teacher_assistants", "net": (8, 8), "soft_weight": 0.9}
    again = over(lr=RATES, temperature=(1.0, 4.0))
    mutual = over(lr=RATES, soft_weight=(1.0, 3.0))
    soft = over(lr=RATES, hard_weight=(0.5, 0.1))
    return {
        "assistants": Experiment(
            "teacher_assistants", "chain",
            "100 labelled digits; student 64-8-8-10; teacher 64-256-256-10 of 1,000 digits; assistants "
            "64-30-30-10, then also 64-90-90-10; λ = 0.9; every fit of a chain as long",
            400,
            {
                "hard": _labels(net=(8, 8)),
                "kd": Arm("KD", chained, distilled),
                "one": Arm("one assistant", {**chained, "assistants": ((30, 30),)}, distilled),
                "two": Arm("two assistants", {**chained, "assistants": ((90, 90), (30, 30))}, distilled),
            },
        ),
        "born-again": Experiment(
            "born_again", "chain", "100 labelled digits; nets 64-30-30-10; every generation as long", 400,
            {
                "hard": _labels(),
                "second": Arm("second generation", {"recipe": "born_again", "generations": 2}, again),
                "fourth": Arm("fourth generation", {"recipe": "born_again", "generations": 4}, again),
            },
        ),
        "peers": Experiment(
            "mutual_learning", "peers", "100 labelled digits; nets 64-30-30-10; T = 1", 400,
            {
                "hard": _labels(count=4),
                "two": Arm("two peers", {"recipe": "mutual_learning", "count": 2}, mutual),
                "turns": Arm(
                    "two peers, in turn", {"recipe": "mutual_learning", "count": 2, "alternating": True},
                    mutual,
                ),
                "four": Arm("four peers", {"recipe": "mutual_learning", "count": 4}, mutual),
            },
        ),
        "codistillation": Experiment(
            "codistillation", "peers",
            "two nets 64-30-30-10; 100 labelled digits, each net's own 50 or all for both; copies of every "
            "20 steps, after 100; trained twice, for how often the answers of both agree",
            400,
            {
                "hard": _labels(data="disjoint"),
                "disjoint": Arm(
                    "stale peers, own digits",
                    {"recipe": "codistillation", "data": "disjoint", "every": 20, "burn_in": 100}, mutual,
                ),
                "same": Arm(
                    "stale peers, the same digits",
                    {"recipe": "codistillation", "data": "same", "every": 20, "burn_in": 100}, mutual,
                ),
                "all": Arm("labels, all digits", {"recipe": "labels", "data": "same"}, HARD),
            },
        ),
        "together": Experiment(
            "learnt_together", "together", "100 labelled digits for the student 64-30-30-10 and the teacher "
            "64-256-256-10; T = 4", 400,
            {
                "hard": _labels(),
                "before": Arm("teacher trained before", {"recipe": "hinton", "temperature": 4.0}, soft),
                "together": Arm(
                    "teacher learnt together", {"recipe": "learnt_together"},
                    over(lr=RATES, hard_weight=(1.0, 0.3)),
                ),
            },
        ),
        "routed": Experiment(
            "routed", "routed",
            "50 labelled digits and 50 negatives, student 64-30-30-10; a teacher 64-256-256-10 of 1,000 "
            "digits, another of their negatives; T = 4",
            400,
            {
                "own": Arm("each its teacher", {"recipe": "routed", "temperature": 4.0}, soft),
                "both": Arm("mean of both", {"recipe": "ensemble", "temperature": 4.0}, soft),
                "other": Arm(
                    "each the other's", {"recipe": "routed", "temperature": 4.0, "route": "other"}, soft
                ),
            },
        ),
        "on-policy": Experiment(
            "on_policy", "on_policy",
            "bytes of Python's standard library, prompts of 8 and answers of 24; Llama 64 wide, 2 layers, "
            "300 steps of labels before; a teacher of 4 layers, one for all seeds; Jensen-Shannon divergence",
            100,
            {
                name: Arm(says, {"recipe": "on_policy", "fraction": fraction}, over(lr=TEXT_RATES))
                for name, says, fraction in (
                    ("text", "the text's answers", 0.0), ("half", "its own, half of them", 0.5),
                    ("own", "its own answers", 1.0),
                )
            },
            tuned_on="on_own_answers", shown="on_own_answers",
        ),
    }  # fmt: skip


EXPERIMENTS = _experiments()

CLAIMS: dict[str, Claim] = {
    "assistants.kd": Claim(
        "A far larger teacher helps a tiny student.", "assistants", "kd", "hard",
        paper="CNN of 2 layers, CIFAR-10: 70.16 → 72.57 %", plan=2,
    ),
    "assistants.one": Claim(
        "An assistant between helps more.", "assistants", "one", "kd",
        paper="CNN of 2 layers, CIFAR-10: 72.57 → 73.51 %", plan=2,
    ),
    "assistants.two": Claim("A longer path helps more.", "assistants", "two", "one", plan=2),
    "born.second": Claim("A net taught by its like beats it.", "born-again", "second", "hard", plan=2),
    "born.fourth": Claim("Later generations beat the second.", "born-again", "fourth", "second", plan=2),
    "born.ensemble": Claim(
        "An ensemble of all generations beats the last.", "born-again", "fourth", "fourth",
        "ensemble_accuracy", "accuracy", plan=2,
    ),
    "peers.two": Claim(
        "Two peers learn more than each alone.", "peers", "two", "hard",
        paper="CIFAR-100, two ResNet-32: 68.99 → 71.19 and 70.75 %", plan=2,
    ),
    "peers.four": Claim("Four learn more than two.", "peers", "four", "two", plan=2),
    "peers.turns": Claim("In turn, two learn more than at once.", "peers", "turns", "two", plan=2),
    "peers.ensemble": Claim(
        "A peer of four beats the ensemble of four that learnt alone.", "peers", "four", "hard", "accuracy",
        "ensemble_accuracy", plan=2,
    ),
    "codistillation.labels": Claim(
        "Agreeing with a stale peer of other data beats own labels.", "codistillation", "disjoint", "hard",
        plan=2,
    ),
    "codistillation.same": Claim(
        "On the same data, agreeing with a stale peer beats labels.", "codistillation", "same", "all", plan=2
    ),
    "codistillation.stability": Claim(
        "Codistilled nets agree more with another training of themselves.", "codistillation", "same", "all",
        "stability", plan=2,
    ),
    "together.labels": Claim("A teacher learnt together helps.", "together", "together", "hard", plan=2),
    "together.before": Claim(
        "It helps more than one that was trained before, on the same labels.", "together", "together",
        "before", plan=2,
    ),
    "routed.own": Claim("A sample's own teacher beats the mean of all.", "routed", "own", "both", plan=2),
    "routed.other": Claim(
        "It is the route that matters: own beats the other's.", "routed", "own", "other", plan=2
    ),
    "on_policy.own": Claim(
        "Distilled on its own answers, a student is nearer to the teacher on them.", "on-policy", "own",
        "text", "on_own_answers", plan=2,
    ),
    "on_policy.half": Claim("Half of them do, too.", "on-policy", "half", "text", "on_own_answers", plan=2),
    "on_policy.text": Claim(
        "It is no worse on the text: half beats none there, too.", "on-policy", "half", "text", "on_text",
        plan=2,
    ),
}  # fmt: skip
