"""Strategies of the literature as plans: terms, weights, stages, initialisations, with the papers' settings.

Every recipe takes a student and a teacher and gives a `Plan`: `plan.stages` are what is done one after the
other, `plan.run(loader, eval_loader, epochs=...)` does it, and goes on where it was interrupted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..divergences import DKD, BinaryKL, LogitMSE
from ..noise import LogitNoise
from .distiller import Distiller, Update
from .objective import Objective, Term, Weight
from .records import Row
from .teachers import Ensemble
from .terms import (
    AttentionScores,
    AttentionTransfer,
    CosineHidden,
    Embeddings,
    HardLabels,
    HiddenStates,
    Hint,
    MultiLabel,
    Projectors,
    SoftTargets,
    warm_up,
)  # fmt: skip


@dataclass
class Stage:
    """One fit of a plan.

    Attributes:
        name: Its name, and that of its folder.
        updates: What is minimised.
        share: Its part of the steps or epochs, relative to the other stages'.
        student: The model, or models by name; None for the plan's.
        teacher: As `Distiller` takes it; None for the plan's.
        before: Called with the plan before the stage, unless it is resumed.
    """

    name: str
    updates: Sequence[Update]
    share: float = 1.0
    student: Any = None
    teacher: Any = None
    before: Callable[[Plan], None] | None = None


class Plan:
    """Stages of a strategy for a student and a teacher.

    Args:
        student: The model to train, or several by name.
        teacher: As `Distiller` takes it.
        stages: What is done, one after the other.
        **options: Further arguments of `Distiller`, for every stage.
    """

    def __init__(self, student: Any, teacher: Any, stages: Sequence[Stage], **options: Any) -> None:
        inspect.signature(Distiller).bind_partial(student, teacher, **options)  # a misspelt one is told now
        self.student, self.teacher, self.stages, self.options = student, teacher, list(stages), options

    @property
    def objective(self) -> Objective:
        """Of the last stage."""
        return self.stages[-1].updates[0].objective

    def distiller(self, stage: Stage, folder: str | Path | None = None) -> Distiller:
        """What runs a stage."""
        student = self.student if stage.student is None else stage.student
        teacher = self.teacher if stage.teacher is None else stage.teacher
        return Distiller(student, teacher, updates=stage.updates, folder=folder, **self.options)

    def run(
        self,
        loader: Iterable[Any],
        eval_loader: Iterable[Any] | None = None,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        folder: str | Path | None = None,
        **options: Any,
    ) -> dict[str, list[Row]]:
        """Runs the stages; with a folder, from where an earlier run of the same plan was.

        Args:
            loader: As `Distiller.fit` takes it.
            eval_loader: Likewise.
            steps: Optimizer steps of all stages together, or
            epochs: passes over the loader. Every stage has at least one.
            folder: Has a folder for each stage; None for no checkpoints.
            **options: Further arguments of `Distiller.fit`.

        Returns:
            The history of each stage by its name.
        """
        if (steps is None) == (epochs is None):
            raise ValueError(f"run takes steps or epochs, got steps={steps}, epochs={epochs}")
        whole, histories = sum(stage.share for stage in self.stages), {}  # type: float, dict[str, list[Row]]
        for number, stage in enumerate(self.stages):
            place = None if folder is None else Path(folder) / f"{number + 1}-{stage.name}"
            distiller = self.distiller(stage, place)
            if not (place is not None and distiller.resume()) and stage.before is not None:
                stage.before(self)
            length = max(1, round((steps or epochs or 0) * stage.share / whole))
            amount: dict[str, Any] = {"steps": length} if steps is not None else {"epochs": length}
            histories[stage.name] = distiller.fit(loader, eval_loader=eval_loader, **amount, **options)
        return histories


def _plan(
    student: Any, teacher: Any, stages: Mapping[str, Mapping[str, Term]], training: Mapping[str, Any]
) -> Plan:
    """Stages of one update each; terms of weight 0 are left out."""
    rest = dict(training)
    optimizer, scheduler = rest.pop("optimizer", None), rest.pop("scheduler", None)
    made = [
        Stage(
            name,
            [Update(Objective(**{n: t for n, t in terms.items() if t.weight != 0}), optimizer, scheduler)],
        )
        for name, terms in stages.items()
    ]
    return Plan(student, teacher, made, **rest)


def hinton(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 20.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 0.5,
    divergence: Any = "forward_kl",
    **training: Any,
) -> Plan:
    """Soft targets at a temperature and hard labels: soft_weight · T² · KL(p‖q) + hard_weight · CE.

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        temperature: T; 20 is that of the paper's MNIST nets.
        soft_weight: Weight of the soft term.
        hard_weight: Weight of the labels, 0.5 as in the paper's speech models; 0 for data without labels.
        divergence: As `kd_loss` takes it.
        **training: `optimizer` and `scheduler` as `Update` takes them, and arguments of `Distiller`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, sections 2 to 4.
    """
    soft = SoftTargets(divergence, temperature, soft_weight)
    return _plan(student, teacher, {"distil": {"soft": soft, "hard": HardLabels(hard_weight)}}, training)


def dkd(
    student: Any,
    teacher: Any,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    hard_weight: Weight = 1.0,
    warm_up_epochs: int = 20,
    **training: Any,
) -> Plan:
    """Decoupled distillation: CE + w(e) · T² · (α · TCKD + β · NCKD), w(e) = min(e / warm_up_epochs, 1).

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        alpha: Weight of the target class against the rest.
        beta: Weight of the distribution among the rest; the paper has 2 to 8 on CIFAR-100, 0.5 on ImageNet.
        temperature: T.
        hard_weight: Weight of the labels.
        warm_up_epochs: Epochs, counted from 1, in which the soft term reaches its weight; 0 for none.
        **training: As of `hinton`.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equation 7 and its official settings.
    """
    weight = warm_up(epochs=warm_up_epochs) if warm_up_epochs else 1.0
    soft = SoftTargets(DKD(alpha=alpha, beta=beta), temperature, weight)
    return _plan(student, teacher, {"distil": {"soft": soft, "hard": HardLabels(hard_weight)}}, training)


def noisy_teacher(
    student: Any,
    teacher: Any,
    *,
    sigma: float = 0.1,
    probability: float = 0.5,
    kind: Any = "multiplicative",
    divergence: Any = None,
    temperature: float = 1.0,
    hard_weight: Weight = 0.0,
    **training: Any,
) -> Plan:
    """Distillation from perturbed logits: ½‖z − (1 + ξ)·v‖², ξ ~ N(0, σ²) on a share of the rows, else 0.

    With squared error this changes the gradient's variance and not its mean; see also `noisy_student`.

    Args:
        student: The model to train.
        teacher: As `Distiller` takes it.
        sigma: σ.
        probability: The share of rows that are perturbed.
        kind: `"multiplicative"` as in the paper, or `"additive"`.
        divergence: None for squared error of logits, else as `kd_loss` takes it.
        temperature: T, of a divergence of probabilities.
        hard_weight: Weight of labels; the paper has none.
        **training: As of `hinton`.

    Source: Sau and Balasubramanian, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", 2016,
        section 3.1; σ and the share are not the paper's, which searches them.
    """
    noise = {"teacher_noise": LogitNoise(sigma, kind, probability=probability)}
    return _noisy(student, teacher, noise, divergence, temperature, hard_weight, training)


def noisy_student(
    student: Any,
    teacher: Any,
    *,
    sigma: float = 0.1,
    probability: float = 0.5,
    kind: Any = "multiplicative",
    divergence: Any = None,
    temperature: float = 1.0,
    hard_weight: Weight = 0.0,
    **training: Any,
) -> Plan:
    """The control of `noisy_teacher`: the same noise on the student's logits, where it shrinks them.

    With multiplicative noise and squared error the expected gradient gains σ² · z. Arguments and source as of
    `noisy_teacher`.
    """
    noise = {"student_noise": LogitNoise(sigma, kind, probability=probability)}
    return _noisy(student, teacher, noise, divergence, temperature, hard_weight, training)


def _noisy(
    student: Any, teacher: Any, noise: Mapping[str, Any], divergence: Any, temperature: float,
    hard_weight: Weight, training: Mapping[str, Any],
) -> Plan:  # fmt: skip
    """The same for both sides."""
    soft = SoftTargets(LogitMSE() if divergence is None else divergence, temperature, **noise)
    return _plan(student, teacher, {"distil": {"soft": soft, "hard": HardLabels(hard_weight)}}, training)


def fitnets(
    student: Any,
    teacher: Any,
    *,
    guided: str,
    hint: str,
    temperature: float = 4.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    hint_weight: Weight = 100.0,
    two_stages: bool = True,
    **training: Any,
) -> Plan:
    """A hint first, then distillation; or both at once.

    Args:
        student: The model to train.
        teacher: A module.
        guided: Name of the student's layer that learns, as `Capture` takes it.
        hint: Name of the teacher's layer that it learns from.
        temperature: T of the soft targets.
        soft_weight: Their weight.
        hard_weight: Weight of the labels.
        hint_weight: Weight of the hint where it is trained with the rest.
        two_stages: Whether the hint is a stage of its own; else it is a term beside soft targets and labels.
        **training: As of `hinton`.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.
    """
    rest = {"soft": SoftTargets(temperature=temperature, weight=soft_weight), "hard": HardLabels(hard_weight)}
    if two_stages:
        return _plan(student, teacher, {"hint": {"hint": Hint(guided, hint)}, "distil": rest}, training)
    return _plan(student, teacher, {"distil": {**rest, "hint": Hint(guided, hint, hint_weight)}}, training)


def attention_transfer(
    student: Any,
    teacher: Any,
    *,
    layers: Sequence[tuple[str, str]],
    weight: Weight = 1e3,
    temperature: float = 4.0,
    soft_weight: Weight = 0.0,
    hard_weight: Weight = 1.0,
    **training: Any,
) -> Plan:
    """Labels, and attention maps of feature maps that are to look like the teacher's.

    Args:
        student: The model to train.
        teacher: A module.
        layers: Names of layers of the student and of the teacher, in pairs.
        weight: Of the attention maps; it depends on their size.
        temperature: T of the soft targets.
        soft_weight: Their weight; 0 for none.
        hard_weight: Weight of the labels.
        **training: As of `hinton`.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017.
    """
    ours, theirs = zip(*layers, strict=True)
    terms = {
        "hard": HardLabels(hard_weight),
        "soft": SoftTargets(temperature=temperature, weight=soft_weight),
        "attention": AttentionTransfer(ours, theirs, weight),
    }
    return _plan(student, teacher, {"distil": terms}, training)


def distilbert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: float = 2.0,
    soft_weight: Weight = 5.0,
    hard_weight: Weight = 2.0,
    cosine_weight: Weight = 1.0,
    layers: Sequence[int] | None = None,
    initialise: bool = True,
    **training: Any,
) -> Plan:
    """The triple loss on a student that begins as every other layer of the teacher.

    5 · T² · KL + 2 · CE of the model's labels (masked or next tokens) + 1 − cos of the last hidden states;
    CE over tokens with a label, the rest over all that aren't padding.

    Args:
        student: A model of `transformers` as wide as the teacher.
        teacher: A deeper one of the same family.
        temperature: T.
        soft_weight: Weight of the soft targets.
        hard_weight: Weight of the labels.
        cosine_weight: Weight of the directions of hidden states.
        layers: The teacher's layer that each layer of the student begins as; None for evenly spaced ones, the
            first and the last among them ([0, 2, 4, 7, 9, 11] for 6 of 12).
        initialise: Whether to copy layers; False for a student that is initialised already.
        **training: As of `hinton`.

    Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019, and its official code.
    """
    terms = {
        "soft": SoftTargets(temperature=temperature, weight=soft_weight, over="tokens"),
        "hard": HardLabels(hard_weight),
        "cosine": CosineHidden(weight=cosine_weight),
    }
    plan = _plan(student, teacher, {"distil": terms}, training)
    if initialise:
        plan.stages[0].before = lambda plan: copy_layers(plan.student, plan.teacher, layers)
    return plan


def tinybert(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layer_map: Sequence[int] | None = None,
    temperature: float = 1.0,
    share_projection: bool = False,
    intermediate_share: float = 1.0,
    **training: Any,
) -> Plan:
    """Embeddings, hidden states and attention scores first, then predictions.

    Stage 1: MSE(E_s W_e, E_t) + Σ_m MSE(H_m W_h, H_g(m)) + Σ_m mean MSE(A_m, A_g(m)); stage 2: soft
    cross-entropy. The paper runs stage 1 on general text, then both on the task's.

    Args:
        student: A model of `transformers`, with as many heads as the teacher.
        teacher: A deeper one.
        layer_map: g: for each layer of the student, counted from 1, the teacher's; None for g(m) = m · N / M.
        temperature: t of the predictions.
        share_projection: One W for embeddings and hidden states, as the official code has it.
        intermediate_share: Length of stage 1, relative to stage 2.
        **training: As of `hinton`.

    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020, equations 5 to
        11.
    """
    ours, theirs = (int(cast(Any, model).config.num_hidden_layers) for model in (student, teacher))
    if layer_map is None:
        if theirs % ours:
            raise ValueError(
                f"layer_map must be given: {theirs} layers of the teacher are no multiple of {ours}"
            )
        layer_map = [m * theirs // ours for m in range(1, ours + 1)]
    if len(layer_map) != ours or not all(1 <= g <= theirs for g in layer_map):
        raise ValueError(f"layer_map must have {ours} layers from 1 to {theirs}, got {list(layer_map)}")
    pairs = list(enumerate(layer_map, start=1))
    projectors = Projectors() if share_projection else None
    stages: dict[str, dict[str, Term]] = {
        "intermediate": {
            "embeddings": Embeddings(projectors=projectors),
            "hidden": HiddenStates(pairs, projectors=projectors),
            "attention": AttentionScores([(m - 1, g - 1) for m, g in pairs]),
        },
        "prediction": {"soft": SoftTargets("soft_cross_entropy", temperature)},
    }
    plan = _plan(student, teacher, stages, training)
    plan.stages[0].share = intermediate_share
    return plan


def multilabel(
    student: Any,
    teacher: Any,
    *,
    temperature: float = 2.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    **training: Any,
) -> Plan:
    """A sigmoid for each label: binary cross-entropy of the labels, and binary KL at T with T².

    Args:
        student: The model to train; predicts a label where σ(z) > 0.5.
        teacher: As `Distiller` takes it.
        temperature: T.
        soft_weight: Weight of the soft term.
        hard_weight: Weight of the labels, floats `[N, C]`.
        **training: As of `hinton`.
    """
    soft = SoftTargets(BinaryKL(), temperature, soft_weight)
    return _plan(student, teacher, {"distil": {"soft": soft, "hard": MultiLabel(hard_weight)}}, training)


def ensemble(
    student: Any,
    teachers: Sequence[Any],
    *,
    weights: Any = None,
    temperature: float = 4.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 0.5,
    **training: Any,
) -> Plan:
    """Several teachers, averaged as probabilities.

    Args:
        student: The model to train.
        teachers: Modules, or functions of a batch.
        weights: As `kd.Mixture` takes them; None for equal ones.
        temperature: T.
        soft_weight: Weight of the soft targets.
        hard_weight: Weight of the labels.
        **training: As of `hinton`.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 5.
    """
    return hinton(
        student, Ensemble(teachers, weights), temperature=temperature, soft_weight=soft_weight,
        hard_weight=hard_weight, **training,
    )  # fmt: skip


@torch.no_grad()
def copy_layers(student: nn.Module, teacher: nn.Module, layers: Sequence[int] | None = None) -> None:
    """Begins a student as some of the teacher's layers, and all that is outside of layers as the teacher's.

    Args:
        student: A model with a list of layers, such as any of `transformers`.
        teacher: A deeper one, as wide.
        layers: The teacher's layer for each of the student's; None for evenly spaced ones.

    Raises:
        ValueError: Layers that don't fit.
    """
    (place, ours), (_, theirs) = _layers(student, "student"), _layers(teacher, "teacher")
    if layers is None:
        layers = [round(i * (len(theirs) - 1) / max(len(ours) - 1, 1)) for i in range(len(ours))]
    if len(layers) != len(ours) or not all(0 <= n < len(theirs) for n in layers):
        raise ValueError(f"layers must be {len(ours)} of 0 to {len(theirs) - 1}, got {list(layers)}")
    own, given = student.state_dict(), teacher.state_dict()
    outside = {k: v for k, v in given.items() if k in own and not k.startswith(place + ".")}
    unequal = [k for k, v in outside.items() if own[k].shape != v.shape]
    try:
        for layer, n in zip(ours, layers, strict=True):
            layer.load_state_dict(theirs[n].state_dict())
    except RuntimeError as error:
        raise ValueError(f"the student's layers are not like the teacher's: {error}") from error
    if unequal:
        raise ValueError(
            f"{unequal[0]} is {tuple(own[unequal[0]].shape)} in the student and "
            f"{tuple(given[unequal[0]].shape)} in the teacher; copy_layers needs equal widths"
        )
    student.load_state_dict(outside, strict=False)


def _layers(model: nn.Module, label: str) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ValueError(f"the {label} has no list of layers (nn.ModuleList) to copy; initialise it yourself")
    return max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))
